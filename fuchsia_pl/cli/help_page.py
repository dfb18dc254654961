"""Help pages of commands that take the settings of a run, written from a table of settings.

The package contains the table of the default classes, written by `settings_table`. So no help page loads torch.
"""

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuchsia_pl.cli.commands import DEBUG_OPTION, HELP_ALL_OPTION, RUN_COMMANDS
from fuchsia_pl.cli.options import RUN_OPTIONS

PACKAGED_TABLE = Path(__file__).parent / "settings.json"
WIDTH = 100


@dataclass(frozen=True)
class SettingHelp:
    """One setting as a help page shows it.

    Attributes:
        key: Dotted, without dashes.
        type: Accepted values, such as "INT" or "true|false".
        text: The description.
        default: The default as YAML; "" if it is null, None if the setting is required.
        value: The value in the given configs, as YAML; None if they do not change the default.
        is_rare: Shown by `--help-all` only.
        command: The one command that has the setting; "" if all have it.

    >>> SettingHelp("data.batch_size", "INT", "Items of a phase.", "8").command
    ''
    """

    key: str
    type: str
    text: str
    default: str | None
    value: str | None = None
    is_rare: bool = False
    command: str = ""


@dataclass(frozen=True)
class Group:
    """Settings under one title.

    Attributes:
        title: Title of the group.
        settings: The settings, the most used first.

    >>> Group("rollouts", ()).settings
    ()
    """

    title: str
    settings: tuple[SettingHelp, ...]


@dataclass(frozen=True)
class Table:
    """All settings of the commands that take the settings of a run.

    Attributes:
        groups: The groups, the most used first.
        configs: Names of the packaged configs.
        classes: Defaults of the arguments of the classes that the packaged configs name, as YAML, by class path.

    >>> Table((), ("quickstart.yaml",)).configs
    ('quickstart.yaml',)
    """

    groups: tuple[Group, ...]
    configs: tuple[str, ...]
    classes: dict[str, dict[str, str]] = field(default_factory=dict)


def packaged_table() -> Table:
    """The settings of all commands with the default classes."""
    return from_json(PACKAGED_TABLE.read_text(encoding="utf-8"))


def as_json(table: Table) -> str:
    """A table as the text of a file."""
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Table:
    """The table of a file.

    >>> groups = (Group("rollouts", (SettingHelp("data.batch_size", "INT", "Items of a phase.", "8"),)),)
    >>> from_json(as_json(Table(groups, ()))) == Table(groups, ())
    True
    """
    loaded = json.loads(text)
    groups = (
        Group(group["title"], tuple(SettingHelp(**setting) for setting in group["settings"]))
        for group in loaded["groups"]
    )
    return Table(tuple(groups), tuple(loaded["configs"]), loaded["classes"])


def help_page(command: str, table: Table, with_all: bool) -> str:
    """The text of `fuchsia COMMAND --help`.

    Args:
        command: One of RUN_COMMANDS.
        table: The settings.
        with_all: Whether rare settings and whole descriptions are shown.
    """
    sections = [_section(command, group, with_all) for group in (*_own_groups(command), *table.groups)]
    hidden = [s for group in table.groups for s in group.settings if s.is_rare and s.command in ("", command)]
    ends = [
        "Settings may also be given in YAML files (--config), nested by their dots; the last value counts.",
        f"`fuchsia {command} --config FILE --help` shows the settings of the classes in the file, and its values.",
        "`--data.environment.help CLASS_PATH` shows those of another class; likewise for the engine and the optimizer.",
        f"{DEBUG_OPTION} prints the traceback of an error.",
    ]
    if not with_all:
        ends.insert(
            0, f"{HELP_ALL_OPTION} shows {len(hidden)} more settings of Lightning and torch, and longer descriptions."
        )
    summary = RUN_COMMANDS[command].partition(":")[0]
    head = f"usage: fuchsia {command} [--config FILE ...] [--SETTING VALUE ...]\n\n{summary}\n"
    return "\n".join([head, *(section for section in sections if section), *ends]) + "\n"


def _own_groups(command: str) -> list[Group]:
    """The options that only this command has, which are no settings of a config."""
    if command not in RUN_OPTIONS:
        return []
    shown = [action for action in RUN_OPTIONS[command]()._actions if action.help != argparse.SUPPRESS]
    return [Group(command, tuple(SettingHelp(one.dest, str(one.metavar or ""), str(one.help), "") for one in shown))]


def _section(command: str, group: Group, with_all: bool) -> str:
    shown = [s for s in group.settings if s.command in ("", command) and (with_all or not s.is_rare)]
    if not shown:
        return ""
    return "\n".join([f"{group.title}:", *(_entry(setting, with_all) for setting in shown), ""])


def _entry(setting: SettingHelp, with_all: bool) -> str:
    notes = ["required"] if setting.default is None else [setting.default] if setting.default else []
    if setting.value is not None:
        notes = [f"config: {setting.value}", *(f"default: {note}" if setting.default else note for note in notes)]
    head = f"  --{setting.key} {setting.type}".rstrip() + (f" ({'; '.join(notes)})" if notes else "")
    text = setting.text if with_all else first_sentence(setting.text)
    return "\n".join([head, *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def first_sentence(text: str) -> str:
    """The first sentence of a description.

    >>> first_sentence("Names of layers, e.g. q_proj. One name is a text.")
    'Names of layers, e.g. q_proj.'
    """
    end = next(
        (at for at in range(len(text)) if text[at : at + 2] == ". " and text[at + 2 : at + 3].isupper()), len(text)
    )
    return text[: end + 1]
