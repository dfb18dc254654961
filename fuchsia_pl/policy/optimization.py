"""How a run is optimised, as plain data: in a checkpoint, in a config, and where a run resumes."""

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
# How far a schedule is, and what it took from the optimizer; the rest is what it was configured with.
PROGRESS = {"last_epoch", "base_lrs", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
FUNCTION = "function"


@dataclass(frozen=True)
class ResumeChoice:
    """Which side counts where a checkpoint and the config differ; None refuses the difference.

    Attributes:
        optimizer: Of the optimizer's class and settings. "config" keeps the momenta where the class is the same.
        scheduler: Of the learning rate's schedule. "config" continues where the config's own would be at the checkpoint's step.

    >>> ResumeChoice(scheduler="config").optimizer is None
    True
    """

    optimizer: Choice | None = None
    scheduler: Choice | None = None


@dataclass(frozen=True)
class Recipe:
    """What makes optimizer and schedule.

    Attributes:
        optimizer: Makes the optimizer from weights.
        scheduler: Makes the schedule from the optimizer; None keeps the learning rate.

    >>> recipe = Recipe(torch.optim.SGD, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=5))
    >>> recipe.described()["scheduler"]
    {'class': 'torch.optim.lr_scheduler.StepLR', 'settings': {'step_size': 5, 'gamma': 0.1}}
    """

    optimizer: Callable[[Any], Optimizer]
    scheduler: Callable[[Optimizer], Any] | None

    def build(self) -> tuple[Optimizer, Any]:
        """Optimizer and schedule of one weight of one number."""
        optimizer = self._optimizer()
        return optimizer, self._scheduler(optimizer)

    def described(self) -> Plain:
        """Class and settings of both, as plain data that a checkpoint can hold and that can be compared."""
        optimizer = self._optimizer()
        settings = _group(optimizer)
        described: Plain = {"class": _name(type(optimizer)), "settings": _plain(settings)}
        scheduler = self._scheduler(optimizer)
        if scheduler is None:
            return {"optimizer": described, "scheduler": None}
        # What the schedule wrote into the optimizer is its own setting, as OneCycleLR's max_lr.
        own = {name: value for name, value in _group(optimizer).items() if name not in settings}
        if own.get("initial_lr") == settings["lr"]:
            del own["initial_lr"]
        schedule = {"class": _name(type(scheduler)), "settings": {**_settings(scheduler), **_plain(own)}}
        return {"optimizer": described, "scheduler": schedule}

    def at_step(self, step: int, settings: Plain | None) -> tuple[Plain, Any]:
        """Where optimizer and schedule are after some steps, if they were these from the first on.

        Args:
            step: Number of steps.
            settings: Of the optimizer, in place of the recipe's own.

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
        """Learning rates from now on, one more than steps; None where nothing but a metric decides.

        Args:
            settings: Of the optimizer's weights now.
            scheduler_state: State dict of the schedule now.
            num_steps: How far to look.

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
        # Two dimensions, without which some optimizers take no weight.
        return self.optimizer([torch.nn.Parameter(torch.zeros(1, 1))])

    def _scheduler(self, optimizer: Optimizer) -> Any:
        return None if self.scheduler is None else self.scheduler(optimizer)


@dataclass(frozen=True)
class Resumed:
    """What a run continues with.

    Attributes:
        optimization: Optimizer and schedule in force, as `Recipe.described` has them.
        settings: Of the optimizer's weights, None where they are as in the checkpoint.
        scheduler_state: State dict of the schedule, None where it is as in the checkpoint, or where there is none.
        keeps_momenta: Whether the optimizer's memory of each weight is the checkpoint's.

    >>> Resumed(optimization={}).keeps_momenta
    True
    """

    optimization: Plain
    settings: Plain | None = None
    scheduler_state: Plain | None = None
    keeps_momenta: bool = True

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Changes what Lightning will restore from."""
        for state in checkpoint.get("optimizer_states", []) if self.settings is not None else []:
            state["param_groups"] = [{**self.settings, "params": group["params"]} for group in state["param_groups"]]  # type: ignore[dict-item]
            if not self.keeps_momenta:
                state["state"] = {}
        if self.settings is not None:
            checkpoint["lr_schedulers"] = [] if self.scheduler_state is None else [self.scheduler_state]

    def apply(self, optimizer: Optimizer) -> None:
        """Does the same to an optimizer that was restored already."""
        if self.settings is None:
            return
        for group in optimizer.param_groups:
            weights = group["params"]
            group.clear()
            group.update(self.settings, params=weights)
        if not self.keeps_momenta:
            optimizer.state.clear()


def resumed(checkpoint: Mapping[str, Any], recipe: Recipe, choice: ResumeChoice) -> Resumed:
    """Decides what a run continues with.

    Raises:
        ConfigError: Checkpoint and config differ and nothing says which counts, or what counts cannot be restored.
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
            "--resume.optimizer config and --resume.scheduler checkpoint do not go together where both differ: the checkpoint's "
            "schedule was of its own learning rate. Set both to the same"
        )
    if any(len(state["param_groups"]) != 1 for state in checkpoint.get("optimizer_states", [])):
        raise ConfigError(
            "--resume takes the config's settings for optimizers with one group of weights only: set checkpoint"
        )
    settings = saved["optimizer"]["settings"] if optimizer == "checkpoint" else None
    group, schedule = recipe.at_step(checkpoint["global_step"], settings)
    state = None if schedule is None else schedule.state_dict()
    if isinstance(schedule, ReduceLROnPlateau) and scheduler is None:
        state = checkpoint["lr_schedulers"][0]  # what it has seen so far
    return Resumed(in_force, group, state, saved["optimizer"]["class"] == in_force["optimizer"]["class"])


def _decided(part: Literal["optimizer", "scheduler"], saved: Plain, own: Plain, choice: Choice | None) -> Choice | None:
    """Which side counts, None where there is no difference."""
    old, new = saved[part], own[part]
    if old == new:
        return None
    difference = _difference(old, new)
    if choice is None:
        kept = (
            "its momenta are kept where the class is the same"
            if part == "optimizer"
            else "as if it had been so from the first step"
        )
        raise ConfigError(
            f"the checkpoint was trained with another {part} than this config's ({SECTIONS[part]}): {difference}. Decide with "
            f"--resume.{part} checkpoint, to continue as before, or --resume.{part} config, to take the config's ({kept})"
        )
    is_same_class = old is not None and new is not None and old["class"] == new["class"]
    if choice == "checkpoint" and not is_same_class:
        raise ConfigError(
            f"--resume.{part} checkpoint cannot be followed, since {SECTIONS[part]} is of another class: {difference}. Set it to "
            f"the checkpoint's, or --resume.{part} config"
        )
    if choice == "checkpoint" and FUNCTION in repr(old):
        raise ConfigError(
            f"--resume.{part} checkpoint cannot be followed, since a checkpoint does not hold the functions of a schedule: "
            f"{difference}. Set {SECTIONS[part]} to the checkpoint's, or --resume.{part} config"
        )
    return choice


def _difference(old: Plain | None, new: Plain | None) -> str:
    """Both values of everything that differs."""
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
    """Steps a schedule of a stand-in.

    Raises:
        ConfigError: It has fewer steps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that is stepped without its optimizer
        try:
            for _ in range(num_steps):
                scheduler.step()
        except ValueError as error:  # OneCycleLR, after its last step
            raise ConfigError(
                f"model.lr_scheduler has fewer steps than the run: {error}. Give it as many as trainer.max_steps"
            ) from error


def _group(optimizer: Optimizer) -> Plain:
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def _settings(scheduler: Any) -> Plain:
    """What a schedule was configured with: its state before the first step, less how far it is."""
    settings = {name: _plain(value) for name, value in scheduler.state_dict().items() if name not in PROGRESS}
    if "_schedulers" in settings:
        inner = vars(scheduler)["_schedulers"]
        settings["_schedulers"] = [{"class": _name(type(one)), **_settings(one)} for one in inner]
    if "lr_lambdas" in settings:  # a state dict has None in the place of a function
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
        # Two lambdas of one module have one name: what they compute with tells them apart.
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        holds = [value.__code__.co_names, value.__code__.co_consts, value.__defaults__, inner]
        return {FUNCTION: _name(value), "holds": _plain(holds)}
    if callable(value) and not isinstance(value, type):
        return {FUNCTION: _name(type(value)), "holds": _plain(dict(vars(value)))}
    return _name(type(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
