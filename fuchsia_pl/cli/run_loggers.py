"""Loggers of a config: their place in the run folder, their names, their start before the engine's, and their end."""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from fuchsia_pl.cli.failures import made, one_line
from fuchsia_pl.cli.launch import is_first_rank
from fuchsia_pl.types import ConfigError

HERE = "."  # WandbLogger's default for save_dir; in a config of a run it is the run folder
LOGIN_ADVICE = (
    "Log in by `wandb login` or WANDB_API_KEY, or record without an account by --trainer.logger.init_args.offline true"
)

# Lightning's loggers with a package of their own: module and name for pip.
PACKAGES = {
    "WandbLogger": ("wandb", "wandb"),
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
}


def check_packages(configs: Any) -> None:
    """Checks that the packages of the loggers of a config are installed.

    Args:
        configs: The value of `trainer.logger`.

    Raises:
        ConfigError: One is missing.
    """
    for config in configs if isinstance(configs, list) else [configs]:
        name = str(config.get("class_path", "")).rpartition(".")[2] if isinstance(config, Namespace) else ""
        module, package = PACKAGES.get(name, ("sys", ""))
        if not _is_installed(module):
            raise ConfigError(
                f"trainer.logger: {name} needs a package that is not installed: pip install {package}. Without that logger the "
                "run writes metrics.csv all the same"
            )


def _is_installed(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def placed(loggers: Sequence[Logger], configs: Sequence[Any], folder: Path) -> list[Logger]:
    """Loggers that write into the run folder, under the run's name, unless their settings name another place or name.

    Args:
        loggers: The loggers as the config makes them. None has written anything yet.
        configs: Class and settings of each, in the same order.
        folder: The run folder, `<root>/<config name>/<n>`.
    """
    return [_placed(logger, config, folder) for logger, config in zip(loggers, configs, strict=True)]


def _placed(logger: Logger, config: Any, folder: Path) -> Logger:
    if type(logger) not in (WandbLogger, TensorBoardLogger) or not isinstance(config, Namespace):
        return logger
    settings = {**config.get("init_args", Namespace()).as_dict(), **(config.get("dict_kwargs") or {})}
    is_wandb = isinstance(logger, WandbLogger)
    changed = wandb_settings(settings, folder) if is_wandb else tensorboard_settings(settings, folder)
    return made(type(logger), **changed)


def wandb_settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a WandbLogger with the run's name and place.

    >>> wandb_settings({"name": None, "save_dir": ".", "project": "p"}, Path("/runs/quickstart/0"))
    {'name': 'quickstart/0', 'save_dir': '/runs/quickstart/0', 'project': 'p'}
    """
    changed = dict(settings)
    if changed.get("name") is None and not os.environ.get("WANDB_NAME"):
        changed["name"] = f"{folder.parent.name}/{folder.name}"
    if changed.get("save_dir", HERE) in (HERE, None) and changed.get("dir") is None:
        # Absolute: the process of W&B that writes the files keeps the working directory in which it was started.
        changed["save_dir"] = os.environ.get("WANDB_DIR") or str(folder.absolute())
    return changed


def tensorboard_settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a TensorBoardLogger. In the run folder itself, so that `tensorboard --logdir runs` shows the run's name.

    >>> tensorboard_settings({"save_dir": ".", "name": "lightning_logs", "version": None}, Path("runs/quickstart/0"))
    {'save_dir': 'runs/quickstart/0', 'name': '', 'version': ''}
    """
    if settings["save_dir"] != HERE:
        return dict(settings)
    is_named = settings.get("name", "lightning_logs") != "lightning_logs" or settings.get("version") is not None
    own = {} if is_named else {"name": "", "version": ""}
    return {**settings, "save_dir": str(folder), **own}


@contextmanager
def running(trainer: Trainer) -> Iterator[None]:
    """Starts the loggers of a run, and closes those of Weights & Biases at its end with its success or failure.

    Raises:
        ConfigError: A logger does not start, for example without an account. The engine has not started yet.
    """
    if is_first_rank():
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                _start(logger)
    try:
        yield
    except BaseException:
        _finish(trainer, exit_code=1)
        raise
    _finish(trainer, exit_code=0)


def _start(logger: Logger) -> None:
    kind = type(logger).__name__
    if not hasattr(type(logger), "experiment"):
        return  # nothing to start; asking the class runs no code of the logger, whose AttributeError would be its own
    if isinstance(logger, WandbLogger):
        os.environ.setdefault("WANDB_QUIET", "true")  # else it prints dozens of lines at the end
    try:
        _ = logger.experiment  # type: ignore[attr-defined]
    except Exception as error:  # loggers raise many types; each is one line before the engine starts
        advice = f". {LOGIN_ADVICE}" if isinstance(logger, WandbLogger) else ""
        raise ConfigError(f"trainer.logger: {kind} does not start: {one_line(error)}{advice}") from error


def _finish(trainer: Trainer, exit_code: int) -> None:
    for logger in trainer.loggers if is_first_rank() and "wandb" in sys.modules else ():
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish(exit_code=exit_code)
