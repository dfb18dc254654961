"""The table of all settings, read from the parser: for help pages, and for completion.

`python -m fuchsia_pl.cli.settings_table` writes `settings.json`, the table of the default classes. A test compares that file with
the parser.
"""

import collections.abc
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import ActionConfigFile, _ActionConfigLoad, _ActionHelpClassPath, _ActionPrintConfig
from jsonargparse._link_arguments import ActionLink
from jsonargparse._util import import_object
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.class_change import fresh_arguments
from fuchsia_pl.cli.commands import HELP_ALL_OPTION, RUN_COMMANDS, is_help
from fuchsia_pl.cli.help_page import PACKAGED_TABLE, Group, SettingHelp, Table, as_json, help_page
from fuchsia_pl.cli.options import RUN_OPTIONS
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.report.settings import class_defaults

LAST_GROUP = "checkpoints, weights, memory and logs"
LIGHTNING = "settings of Lightning"
# Titles, and the keys or the beginnings of keys under them, the most used first.
GROUPS = {
    "run": (
        "config",
        "ckpt_path",
        "trainer.max_steps",
        "trainer.accumulate_grad_batches",
        "trainer.precision",
        "trainer.gradient_clip_val",
        "trainer.devices",
        "trainer.strategy",
        "trainer.limit_val_batches",
        "trainer.logger",
        "trainer.callbacks",
        "trainer.default_root_dir",
        "seed_everything",
        "print_config",
    ),
    "environment": ("data.environment",),
    "rollouts": (
        "data.batch_size",
        "data.sampling.group_size",
        "data.sampling.max_completion_tokens",
        "data.sampling.max_length",
        "data.sampling.temperature",
        "data.steps_per_epoch",
        "data.sampling",
    ),
    "model and adapter": ("model.policy.name", "model.policy.dtype", "model.policy.lora", "model.policy"),
    "optimizer": ("model.optimizer", "model.lr_scheduler"),
    "objective": (
        "model.loss.loss_type",
        "model.loss.beta",
        "model.loss.mini_batches",
        "model.loss.num_policy_updates",
        "model.loss",
        "data.teacher",
    ),
    "engine": ("data.engine",),
    LAST_GROUP: ("checkpoint", "console", "resume", "hotswap", ""),
    LIGHTNING: ("trainer", "verbose", "return_predictions", "weights_only"),
}
# Lightning describes these for other programs.
TEXTS = {
    "config": "A YAML file, or the name of a packaged config such as quickstart.yaml; may be given several times.",
    "ckpt_path": "A checkpoint to continue from or to measure: a path, `last` or `best` of this config's runs.",
    "seed_everything": "Seed of the run: item order, sampling, dropout.",
    "trainer.max_steps": "Optimizer steps, counted from the first step of the run that is resumed; -1 is no limit.",
    "trainer.accumulate_grad_batches": "Number of micro-batches into which the rollouts of a step are divided.",
    "trainer.precision": "Precision of the forward pass; trained weights are float32. bf16-mixed on a GPU, 32-true otherwise.",
    "trainer.default_root_dir": "Folder of all runs; a run is in <folder>/<config>/<number>. Default: runs.",
    "trainer.logger": "Loggers beside metrics.csv, such as lightning.pytorch.loggers.WandbLogger.",
    "trainer.limit_val_batches": "Held-out items to measure: a number of batches (int), or a share (float).",
    "print_config": "Prints the whole configuration and exits.",
}
TYPE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false", type(None): "null"}
RARE_IN_TORCH = {"amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"}
MAX_TYPE_CHARS = 100
CLASS_PATH = re.compile(r"^[^#\n]*\bclass_path: (\S+)", re.MULTILINE)
# Defaults of the classes that a config names. The settings of an environment depend on its class.
DEFAULT_CLASSES = {"data.engine": VLLMColocatedEngine, "data.environment": Environment}


class SettingsCLI(FuchsiaCLI):
    """Reads the settings of a command line without making objects.

    Attributes:
        table: All settings, with the given values.
    """

    table: Table

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without the check for required settings: a help page may be about some of them only."""
        assert isinstance(args, list)
        self.arguments = self.found_configs(parser, args)
        with fresh_arguments():
            self.config = parser.parse_args(self.arguments, _skip_validation=True)
        command = self.config["subcommand"]
        self.table = settings_table(self._parser(command), self.config[command])

    def _set_seed(self) -> None:
        """Does nothing: no command runs."""

    def before_instantiate_classes(self) -> None:
        """Does nothing: no objects are made."""

    def instantiate_classes(self) -> None:
        """Does nothing: no objects are made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing: no command runs."""


def print_help(words: list[str]) -> None:
    """Prints the help page of a command line that names a config or classes."""
    rest = [word for word in words if not is_help(word)]
    if words[0] in RUN_OPTIONS:
        rest = RUN_OPTIONS[words[0]]().parse_known_args(rest)[1]
    page = SettingsCLI(rest)
    sys.stdout.write(help_page(page.config["subcommand"], page.table, with_all=HELP_ALL_OPTION in words))


def default_table() -> Table:
    """The table of all commands with the default classes, which `settings.json` contains."""
    tables = {command: SettingsCLI([command]).table for command in RUN_COMMANDS}
    merged = []
    for position, group in enumerate(tables["fit"].groups):
        settings = list(group.settings)
        keys = {setting.key for setting in settings}
        for command, table in tables.items():
            own = [setting for setting in table.groups[position].settings if setting.key not in keys]
            settings += [SettingHelp(**{**vars(setting), "command": command}) for setting in own]
        merged.append(Group(group.title, tuple(settings)))
    return Table(tuple(merged), tables["fit"].configs, {path: class_defaults(path) for path in packaged_classes()})


def packaged_classes() -> list[str]:
    """The paths of the classes that the packaged configs name."""
    files = CONFIG_FOLDER.rglob("*.yaml")
    return sorted({path for file in files for path in CLASS_PATH.findall(file.read_text(encoding="utf-8"))})


def settings_table(parser: ArgumentParser, values: Namespace) -> Table:
    """The settings of a command, in groups.

    Args:
        parser: The parser of the command.
        values: The parsed values.
    """
    found: list[SettingHelp] = []
    titles = {title: title for title in GROUPS}
    for action in parser._actions:
        if isinstance(action, ActionLink | _ActionConfigLoad | _ActionHelpClassPath) or action.dest == "help":
            continue
        found.append(_setting(action, action.dest, values))
        if class_type := _class_of(action.dest, values):
            titles[_group_of(action.dest)] = f"{_group_of(action.dest)} ({class_type.__name__})"
            found += _class_settings(class_type, action.dest, values)
    groups = (
        Group(titles[title], tuple(sorted((s for s in found if _group_of(s.key) == title), key=_rank)))
        for title in GROUPS
    )
    return Table(
        tuple(groups), tuple(sorted(str(file.relative_to(CONFIG_FOLDER)) for file in CONFIG_FOLDER.rglob("*.yaml")))
    )


def _setting(action: Any, key: str, values: Namespace, is_rare: bool = False) -> SettingHelp:
    is_option = isinstance(action, ActionConfigFile | _ActionPrintConfig)
    default = "" if is_option or action.default is None else _yaml(action.default)
    given = None if is_option else values.get(key)
    value = None if given is None or given == action.default else _yaml(given)
    return SettingHelp(
        key,
        "FILE" if isinstance(action, ActionConfigFile) else type_text(getattr(action, "_typehint", None)),
        TEXTS.get(key, " ".join(str(action.help or "").split())),
        None if action.required else default,
        None if value == default else value,
        is_rare or _group_of(key) == LIGHTNING,
    )


def _class_of(key: str, values: Namespace) -> type | None:
    """The class with its settings under a key, None if there is no class."""
    value = values.get(key)
    path = value.get("class_path") if isinstance(value, Namespace) else None
    return import_object(path) if path else DEFAULT_CLASSES.get(key)


def _class_settings(class_type: type, key: str, values: Namespace) -> list[SettingHelp]:
    is_torch = issubclass(class_type, Optimizer | LRScheduler)
    parser = ArgumentParser(exit_on_error=False)
    # The module provides the weights of an optimizer and the optimizer of a schedule.
    parser.add_class_arguments(class_type, fail_untyped=False, skip={1} if is_torch else None)
    names = [action for action in parser._actions if not isinstance(action, _ActionConfigLoad | _ActionHelpClassPath)]
    return [
        _setting(action, f"{key}.init_args.{action.dest}", values, is_torch and action.dest in RARE_IN_TORCH)
        for action in names
        if action.dest != "help"
    ]


def _group_of(key: str) -> str:
    """The title of the group with the longest beginning of a key."""
    beginnings = [
        (len(start), title)
        for title, starts in GROUPS.items()
        for start in starts
        if not start or key == start or key.startswith(f"{start}.")
    ]
    return max(beginnings)[1]


def _rank(setting: SettingHelp) -> tuple[int, int]:
    """Position in the group: by the longest beginning; sorting keeps the parser's order within it."""
    starts = GROUPS[_group_of(setting.key)]
    fitting = [start for start in starts if not start or setting.key == start or setting.key.startswith(f"{start}.")]
    return int(setting.is_rare), starts.index(max(fitting, key=len))


def type_text(hint: Any) -> str:
    """A type as a help page shows it.

    >>> type_text(int | None), type_text(Literal["a", "b"]), type_text(list[int]), type_text(Path | str)
    ('INT|null', 'a|b', '[INT,...]', 'PATH|TEXT')
    """
    parts = list(dict.fromkeys(_type_parts(hint)))
    text = "|".join(parts)
    return text if len(text) <= MAX_TYPE_CHARS else "|".join([parts[0], "..."])


def _type_parts(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (None, Any):
        return []
    if hint in TYPE_NAMES:
        return [TYPE_NAMES[hint]]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin in (Union, types.UnionType):
        return [part for argument in arguments for part in _type_parts(argument)]
    if origin is collections.abc.Callable:
        return _type_parts(arguments[-1])
    if origin in (list, tuple, set, collections.abc.Iterable, collections.abc.Sequence) and arguments:
        return [f"[{type_text(arguments[0])},...]"]
    if origin is dict or hint is dict:
        return ["{...}"]
    return [getattr(hint, "__name__", str(hint))]


def _yaml(value: Any) -> str:
    """A value in one line, as a config has it.

    >>> _yaml(1e-05), _yaml((1, 2)), _yaml(True), _yaml("runs")
    ('1.0e-05', '[1, 2]', 'true', 'runs')
    """
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict) and set(value) <= {"class_path", "init_args"}:
        return str(value.get("class_path"))
    plain = list(value) if isinstance(value, tuple) else value
    text = str(plain) if isinstance(plain, Path) else yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    PACKAGED_TABLE.write_text(as_json(default_table()), encoding="utf-8")
