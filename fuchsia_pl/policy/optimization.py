"""Optimizer and schedule as plain data, which checkpoints store and a resume compares with the config."""

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fuchsia_pl.policy.checkpoint_files import OPTIMIZATION_KEY
from fuchsia_pl.types import ConfigError

Choice = Literal["checkpoint", "config"]
Plain = dict[str, Any]
SECTIONS = {"optimizer": "model.optimizer", "scheduler": "model.lr_scheduler"}
# Fields of a schedule's state that contain its progress or values of the optimizer; all others are its settings.
PROGRESS = {"last_epoch", "base_lrs", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
FUNCTION = "function"


@dataclass(frozen=True)
class ResumeChoice:
    """Which settings apply if checkpoint and config differ; None rejects a difference.

    Attributes:
        optimizer: For the optimizer's class and settings. "config" keeps the momenta if the class is the same.
        scheduler: For the schedule. "config" continues with the config's schedule at the checkpoint's step.

    >>> ResumeChoice(scheduler="config").optimizer is None
    True
    """

    optimizer: Choice | None = None
    scheduler: Choice | None = None


@dataclass(frozen=True)
class Recipe:
    """Factories of optimizer and schedule.

    Attributes:
        optimizer: Builds the optimizer from weights.
        scheduler: Builds the schedule from the optimizer; None keeps the learning rate constant.

    >>> recipe = Recipe(torch.optim.SGD, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=5))
    >>> recipe.described()["scheduler"]
    {'class': 'torch.optim.lr_scheduler.StepLR', 'settings': {'step_size': 5, 'gamma': 0.1}}
    """

    optimizer: Callable[[Any], Optimizer]
    scheduler: Callable[[Optimizer], Any] | None

    def build(self) -> tuple[Optimizer, Any]:
        """Builds optimizer and schedule for a single weight with one value."""
        optimizer = self._optimizer()
        return optimizer, self._scheduler(optimizer)

    def described(self) -> Plain:
        """Class and settings of both, as plain data that can be stored in a checkpoint and compared."""
        optimizer = self._optimizer()
        settings = _group(optimizer)
        described: Plain = {"class": _name(type(optimizer)), "settings": _plain(settings)}
        scheduler = self._scheduler(optimizer)
        if scheduler is None:
            return {"optimizer": described, "scheduler": None}
        # Values that the schedule wrote into the optimizer belong to the schedule, such as OneCycleLR's max_lr.
        own = {name: value for name, value in _group(optimizer).items() if name not in settings}
        if own.get("initial_lr") == settings["lr"]:
            del own["initial_lr"]
        schedule = {"class": _name(type(scheduler)), "settings": {**_settings(scheduler), **_plain(own)}}
        return {"optimizer": described, "scheduler": schedule}

    def at_step(self, step: int, settings: Plain | None) -> tuple[Plain, Any]:
        """Computes the state of optimizer and schedule after a number of steps from the start.

        Args:
            step: Number of steps.
            settings: Settings of the optimizer that replace those of the recipe.

        Returns:
            The settings of the optimizer's weights, and the schedule.

        Raises:
            ConfigError: The schedule has fewer steps.
        """
        optimizer = self._optimizer()
        group = optimizer.param_groups[0]
        for name, value in (settings or {}).items():
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        scheduler = self._scheduler(optimizer)
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            advance(scheduler, step)
        return _group(optimizer), scheduler

    def outlook(self, settings: Plain, scheduler_state: Plain, num_steps: int) -> list[float] | None:
        """The next learning rates, `num_steps + 1` of them; None if only a metric determines them.

        Args:
            settings: Current settings of the optimizer's weights.
            scheduler_state: Current state dict of the schedule.
            num_steps: Number of steps.

        Raises:
            ConfigError: The schedule has fewer steps left.
        """
        optimizer, scheduler = self.build()
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return None
        optimizer.param_groups[0].update(settings)
        scheduler.load_state_dict(copy.deepcopy(scheduler_state))
        rates = [float(settings["lr"])]
        for _ in range(num_steps):
            advance(scheduler, 1)
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    def _optimizer(self) -> Optimizer:
        # Two dimensions: some optimizers accept no weight with fewer.
        return self.optimizer([torch.nn.Parameter(torch.zeros(1, 1))])

    def _scheduler(self, optimizer: Optimizer) -> Any:
        return None if self.scheduler is None else self.scheduler(optimizer)


@dataclass(frozen=True)
class Resumed:
    """The optimizer and schedule with which a run continues.

    Attributes:
        optimization: Optimizer and schedule that apply, as returned by `Recipe.described`.
        settings: Settings of the optimizer's weights; None if those of the checkpoint apply.
        scheduler_state: State dict of the schedule; None if that of the checkpoint applies, or if there is no schedule.
        keeps_momenta: Whether the optimizer's state of each weight is restored from the checkpoint.

    >>> Resumed(optimization={}).keeps_momenta
    True
    """

    optimization: Plain
    settings: Plain | None = None
    scheduler_state: Plain | None = None
    keeps_momenta: bool = True

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Changes the checkpoint from which Lightning will restore."""
        for state in checkpoint.get("optimizer_states", []) if self.settings is not None else []:
            state["param_groups"] = [{**self.settings, "params": group["params"]} for group in state["param_groups"]]  # type: ignore[dict-item]
            if not self.keeps_momenta:
                state["state"] = {}
        if self.settings is not None:
            checkpoint["lr_schedulers"] = [] if self.scheduler_state is None else [self.scheduler_state]

    def apply(self, optimizer: Optimizer) -> None:
        """Applies the same changes to an optimizer that is restored already."""
        if self.settings is None:
            return
        for group in optimizer.param_groups:
            weights = group["params"]
            group.clear()
            group.update(self.settings, params=weights)
        if not self.keeps_momenta:
            optimizer.state.clear()


def resumed(checkpoint: Mapping[str, Any], recipe: Recipe, choice: ResumeChoice) -> Resumed:
    """Selects the optimizer and schedule with which a run continues.

    Raises:
        ConfigError: Checkpoint and config differ and the choice is None, or the chosen side cannot be restored.
    """
    saved, own = checkpoint[OPTIMIZATION_KEY], recipe.described()
    optimizer = _decided("optimizer", saved, own, choice.optimizer)
    scheduler = _decided("scheduler", saved, own, choice.scheduler)
    in_force = {
        "optimizer": own["optimizer"] if optimizer == "config" else saved["optimizer"],
        "scheduler": own["scheduler"] if scheduler == "config" else saved["scheduler"],
    }
    if "config" not in (optimizer, scheduler):
        return Resumed(in_force)
    if scheduler == "checkpoint":
        raise ConfigError(
            "--resume.optimizer config and --resume.scheduler checkpoint cannot be combined if both differ: the checkpoint's "
            "schedule belongs to its own learning rate. Set both to the same"
        )
    if any(len(state["param_groups"]) != 1 for state in checkpoint.get("optimizer_states", [])):
        raise ConfigError(
            "--resume takes the config's settings for optimizers with one group of weights only: set checkpoint"
        )
    settings = saved["optimizer"]["settings"] if optimizer == "checkpoint" else None
    group, schedule = recipe.at_step(checkpoint["global_step"], settings)
    state = None if schedule is None else schedule.state_dict()
    if isinstance(schedule, ReduceLROnPlateau) and scheduler is None:
        state = checkpoint["lr_schedulers"][0]  # its progress so far
    return Resumed(in_force, group, state, saved["optimizer"]["class"] == in_force["optimizer"]["class"])


def _decided(part: Literal["optimizer", "scheduler"], saved: Plain, own: Plain, choice: Choice | None) -> Choice | None:
    """The side that applies; None if there is no difference."""
    old, new = saved[part], own[part]
    if old == new:
        return None
    difference = _difference(old, new)
    if choice is None:
        kept = (
            "its momenta are kept if the class is the same"
            if part == "optimizer"
            else "as if it had been so from the first step"
        )
        raise ConfigError(
            f"the checkpoint was trained with another {part} than this config's ({SECTIONS[part]}): {difference}. Decide with "
            f"--resume.{part} checkpoint, to continue as before, or --resume.{part} config, to use the config ({kept})"
        )
    is_same_class = old is not None and new is not None and old["class"] == new["class"]
    if choice == "checkpoint" and not is_same_class:
        raise ConfigError(
            f"--resume.{part} checkpoint is impossible, since {SECTIONS[part]} has another class: {difference}. Set it to "
            f"that of the checkpoint, or --resume.{part} config"
        )
    if choice == "checkpoint" and FUNCTION in repr(old):
        raise ConfigError(
            f"--resume.{part} checkpoint is impossible, since a checkpoint does not hold the functions of a schedule: "
            f"{difference}. Set {SECTIONS[part]} to that of the checkpoint, or --resume.{part} config"
        )
    return choice


def _difference(old: Plain | None, new: Plain | None) -> str:
    """Lists each difference with both values."""
    names = (
        {"": None}
        if old is None or new is None or old["class"] != new["class"]
        else {**old["settings"], **new["settings"]}
    )
    words = []
    for name in names:
        pair = [
            side["settings"].get(name) if side and name else (side["class"] if side else None) for side in (old, new)
        ]
        if pair[0] != pair[1]:
            words.append(f"{name or 'class'} is {pair[0]} in the checkpoint and {pair[1]} in the config")
    return ", ".join(words)


def advance(scheduler: Any, num_steps: int) -> None:
    """Advances the schedule of a stand-in optimizer.

    Raises:
        ConfigError: It has fewer steps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule warns if it is stepped without its optimizer
        try:
            for _ in range(num_steps):
                scheduler.step()
        except ValueError as error:  # raised by OneCycleLR after its last step
            raise ConfigError(
                f"model.lr_scheduler has fewer steps than the run: {error}. Give it as many as trainer.max_steps"
            ) from error


def _group(optimizer: Optimizer) -> Plain:
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def _settings(scheduler: Any) -> Plain:
    """Settings of a schedule: its state before the first step, without its progress."""
    settings = {name: _plain(value) for name, value in scheduler.state_dict().items() if name not in PROGRESS}
    if "_schedulers" in settings:
        inner = vars(scheduler)["_schedulers"]
        settings["_schedulers"] = [{"class": _name(type(one)), **_settings(one)} for one in inner]
    if "lr_lambdas" in settings:  # a state dict holds None instead of a function
        settings["lr_lambdas"] = [_plain(function) for function in vars(scheduler)["lr_lambdas"]]
    return settings


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, functools.partial):
        return {FUNCTION: _name(value.func), "arguments": _plain(value.args), "keywords": _plain(value.keywords)}
    if isinstance(value, FunctionType):
        # Lambdas of one module share a name: their code and closure distinguish them.
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        holds = [value.__code__.co_names, value.__code__.co_consts, value.__defaults__, inner]
        return {FUNCTION: _name(value), "holds": _plain(holds)}
    if callable(value) and not isinstance(value, type):
        return {FUNCTION: _name(type(value)), "holds": _plain(dict(vars(value)))}
    return _name(type(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
