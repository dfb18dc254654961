"""Typed access of callbacks to the parts of a run: module, policy, data module and other callbacks.

Lightning types the module of a trainer as LightningModule, and does not type its data module and its callbacks.
"""

from typing import TypeVar

from lightning.pytorch import Callback, Trainer

from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError

C = TypeVar("C", bound=Callback)


def module_of(trainer: Trainer) -> GRPOModule:
    """The module of a run.

    Raises:
        ConfigError: The trainer runs another LightningModule, or none yet.
    """
    module = trainer.lightning_module
    if isinstance(module, GRPOModule):
        return module
    raise ConfigError(_unexpected(GRPOModule, module))


def policy_of(trainer: Trainer) -> Policy:
    """The policy of a run, which `configure_model` has loaded.

    Raises:
        ConfigError: The trainer runs another LightningModule, or none yet.
    """
    policy = module_of(trainer).policy
    assert policy is not None, "configure_model comes first"
    return policy


def data_of(trainer: Trainer) -> RolloutDataModule:
    """The data module of a run.

    Raises:
        ConfigError: The trainer has another data module, or none, as with plain data loaders.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, RolloutDataModule):
        return data
    raise ConfigError(_unexpected(RolloutDataModule, data))


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """The callbacks of a run that are instances of a class, in the order in which Lightning calls them."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_trial(trainer: Trainer) -> bool:
    """Whether `trainer.fast_dev_run` is set. Such a run writes no checkpoint and no adapter."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _unexpected(expected: type, found: object) -> str:
    name = expected.__name__
    what, argument = {"GRPOModule": ("module", "model"), "RolloutDataModule": ("data module", "datamodule")}[name]
    got = f"no {what}" if found is None else f"a {type(found).__name__} as its {what}"
    return (
        f"the trainer has {got}, and the callbacks of fuchsia_pl require a {expected.__module__}.{name}: pass one as "
        f"`{argument}` to the trainer"
    )
