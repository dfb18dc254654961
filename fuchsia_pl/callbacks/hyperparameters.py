"""Settings of a run, for every logger."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

import fuchsia_pl
from fuchsia_pl.callbacks.access import data_of, module_of, policy_of
from fuchsia_pl.envs.base import Environment, reward_name, weights_at
from fuchsia_pl.report.secrets import SECRET_NAME, follows_option, may_be_secret

Plain = bool | int | float | str | None
MAX_TEXT_CHARS = 500


class HyperparameterLog(Callback):
    """Logs objective, sizes, model, optimizer and environment to every logger once, when training or an evaluation starts.

    TensorBoard gets them as text too, and as a row of its table of hyperparameters. The figures there are the newest values of
    the curves.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the settings. The optimizer exists by now, with the changes of a checkpoint."""
        self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the settings of `fuchsia validate`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the settings of `fuchsia test`."""
        self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return  # loggers of other ranks are dummies
        described = hyperparameters(trainer)
        for logger in trainer.loggers:
            log_to(logger, described, figure_names(trainer))


def log_to(logger: Logger, described: dict[str, Any], figures: list[str]) -> None:
    """Logs settings.

    Args:
        logger: Any logger of the first rank.
        described: Settings, nested.
        figures: Metrics beside which TensorBoard shows the settings.
    """
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(described)
        return
    logger.log_hyperparams(described, metrics={})  # else it would log a curve `hp_metric` of -1
    writer = logger.experiment
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    writer.add_text("hyperparameters", "".join(f"    {line}\n" for line in text.splitlines()))
    _log_table_row(writer, described, figures)


def _log_table_row(writer: Any, described: dict[str, Any], figures: list[str]) -> None:
    """Adds the row of the run to TensorBoard's table. It names the curves of its figures, so a killed run has figures too."""
    from torch.utils.tensorboard.summary import hparams  # needs the package tensorboard

    values = {name: value for name, value in flat(described).items() if isinstance(value, bool | int | float | str)}
    for summary in hparams(values, dict.fromkeys(figures, 0.0)):
        writer._get_file_writer().add_summary(summary)


def figure_names(trainer: Trainer) -> list[str]:
    """Metrics by which runs are compared."""
    environment = data_of(trainer).environment
    parts = [f"{name}/" for name in environment.mixed]
    rewards = ["reward/mean", *(f"reward/{reward_name(function)}" for function in environment.reward_functions)]
    compared = [*rewards, "rollout/accuracy", "rollout/completion_tokens"]
    compared += [f"{part}{name}" for part in parts for name in ("reward/mean", "rollout/accuracy")]
    held_out = [f"validation/{name}" for name in compared] if trainer.limit_val_batches else []
    kl = ["train/kl"] if module_of(trainer).loss_config.beta > 0.0 else []
    return [*held_out, *compared, *kl, "train/entropy", "train/logprob_gap"]


def hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Settings for the comparison of runs, as plain data. Secrets are left out, see `public_settings`."""
    module, data, policy = module_of(trainer), data_of(trainer), policy_of(trainer)
    optimization = module.recipe.described() if trainer.optimizers else {}
    return {
        "model": asdict(module.policy_config),
        "objective": module.loss_config.resolved(),
        "optimizer": _optimizer(trainer.optimizers[0]) if trainer.optimizers else None,
        "lr_scheduler": optimization.get("scheduler"),
        "data": {
            "environment": described_object(data.environment),
            "rewards": _rewards(data.environment),
            **_parts(data.environment),
            "engine": described_object(data.engine),
            "batch_size": data.batch_size,
            "rows_per_step": data.rows_per_step,
            "steps_per_epoch": data.steps_per_epoch,
            "seed": data.seed,
            "sampling": asdict(data.sampling),
            "teacher": None if data.teacher is None else public_settings(asdict(data.teacher)),
        },
        "trainer": {
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
            "num_ranks": trainer.world_size,
            "run_folder": str(trainer.default_root_dir),
        },
        "sizes": {
            "trained_parameters": sum(parameter.numel() for parameter in policy.trainable_parameters()),
            "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        },
        "version": fuchsia_pl.__version__,
    }


def described_object(thing: object) -> dict[str, Any]:
    """Class and public settings of an environment or an engine."""
    kind = type(thing)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **public_settings(vars(thing))}


def public_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an object that may be shown: plain values, and lists and mappings of them.

    Left out: names that begin with an underscore; texts under a name such as `api_key`; texts that look like a key or have a
    password in an address.

    >>> public_settings({"max_value": 99, "api_key": "abc", "url": "http://me:pw@host", "max_tokens": 5, "_cache": 1})
    {'max_value': 99, 'max_tokens': 5}
    >>> public_settings({"command": ["server", "--api-key", "abc"], "address": "https://host?key=abc", "args": "--token=abc"})
    {}
    """
    found = {name: _public(name, value) for name, value in attributes.items() if not str(name).startswith("_")}
    return {str(name): value for name, value in found.items() if value is not Ellipsis}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with one name each.

    >>> flat({"model": {"lora": {"r": 4}}, "version": "1"})
    {'model/lora/r': 4, 'version': '1'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _public(name: str, value: Any) -> Any:
    """The value, or Ellipsis if it may not be shown."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        is_secret = SECRET_NAME.search(name) is not None or may_be_secret(value)
        return ... if is_secret else value[:MAX_TEXT_CHARS]
    if isinstance(value, Mapping):
        return ... if SECRET_NAME.search(name) else (public_settings(value) or ...)
    if isinstance(value, list | tuple) and len(value) <= 100:
        parts = [... if follows_option(value, place) else _public(name, part) for place, part in enumerate(value)]
        return ... if any(part is ... for part in parts) or not parts else parts
    return ...


def _rewards(environment: Environment) -> dict[str, float]:
    """Name and final weight of each reward function."""
    return {name: float(weight) for name, weight in weights_at(environment, None).items()}


def _parts(environment: Environment) -> dict[str, Any]:
    """The parts of a mixture with their settings; nothing for other environments."""
    parts = {
        name: {**public_settings(vars(part)), "environment": described_object(part.environment)}
        for name, part in environment.mixed.items()
    }
    return {"parts": parts} if parts else {}


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer. The learning rate is the initial one, before the schedule."""
    group = optimizer.param_groups[0]
    settings = {name: _plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
    rate = group.get("initial_lr", group["lr"])  # None if the optimizer computes its own
    return {**settings, "lr": None if rate is None else float(rate), "class": type(optimizer).__name__}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
