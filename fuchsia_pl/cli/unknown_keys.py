"""All unknown keys of a command line and its configs, each with a suggestion.

jsonargparse stops at the first unknown key. This search runs only after jsonargparse refused something, over the whole
command line and all configs. So a fault here can make an error message worse, but never refuses a config that works.
"""

import difflib
import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fuchsia_pl.cli.foreign_names import our_setting, reason_not_offered

CONFIG_OPTIONS = ("-c", "--config")
CLASS_KEYS = ("class_path", "dict_kwargs")
SIMILAR, SIMILAR_PATH = 0.6, 0.8


@dataclass(frozen=True)
class UnknownKey:
    """A key that no parser has.

    Attributes:
        key: Dotted.
        source: The config file that contains it, "" for the command line.
        advice: A suggestion, as a sentence; "" if no key is similar.
    """

    key: str
    source: str
    advice: str

    def __str__(self) -> str:
        """The error message, in one line."""
        where = f" in {self.source}" if self.source else ""
        return f"unknown key {self.key}{where}" + (f". {self.advice}" if self.advice else "")


def unknown_keys(parser: ArgumentParser, words: list[str]) -> list[UnknownKey]:
    """All unknown keys, in the order in which they were given.

    Args:
        parser: The parser of the subcommand.
        words: The command line after the subcommand, with configs as paths.
    """
    search = _Search(parser)
    for source, key, value in _given(words):
        search.visit(source, key, value)
    return list(dict.fromkeys(search.found))


class _Search:
    """The classes that were named so far, and the unknown keys that were found."""

    def __init__(self, parser: ArgumentParser) -> None:
        self._keys = keys_of(parser)
        self._classes = {key: path for key, default in self._keys.items() if (path := _class_path(default))}
        self.found: list[UnknownKey] = []

    def visit(self, source: str, key: str, value: Any) -> None:
        """Checks a key and, if its value is a mapping, the keys in it."""
        if self._is_group(key):
            for name, inner in value.items() if isinstance(value, Mapping) else ():
                self.visit(source, f"{key}.{name}", inner)
        elif key in self._keys:
            self._visit_value(source, key, value)
        elif (owner := self._owner(key)) is None:
            self._unknown(source, key, value, self._keys)
        else:
            name = key.removeprefix(f"{owner}.").removeprefix("init_args.")
            self._visit_value(source, owner, {name: value} if name in CLASS_KEYS else {"init_args": {name: value}})

    def _is_group(self, key: str) -> bool:
        return any(known.startswith(f"{key}.") for known in self._keys)

    def _owner(self, key: str) -> str | None:
        """The key of the class, or of another value with parts, that contains a dotted key."""
        parts = key.split(".")
        starts = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next((start for start in starts if start in self._keys and not self._is_group(start)), None)

    def _visit_value(self, source: str, key: str, value: Any) -> None:
        path = _class_path(value)
        if path:
            self._classes[key] = path
        arguments = _arguments(value)
        known = _class_keys(self._classes[key]) if key in self._classes and arguments else {}
        for name, inner in arguments.items() if known else ():
            first = name.split(".")[0]
            if first not in known and not any(argument.startswith(f"{first}.") for argument in known):
                self._unknown(source, f"{key}.init_args.{name}", inner, {f"{key}.init_args.{n}": None for n in known})

    def _unknown(self, source: str, key: str, value: Any, near: Mapping[str, Any]) -> None:
        """Records a key; of a mapping, each part with another name here, since other programs group settings differently."""
        if isinstance(value, Mapping):
            moved = [
                (inner, part) for inner, part in _leaves(key, value) if our_setting(inner) or reason_not_offered(inner)
            ]
            for inner, part in moved:
                self._unknown(source, inner, part, near)
            if moved:
                return
        self.found.append(UnknownKey(key, source, _advice(key, near)))


def keys_of(parser: ArgumentParser) -> dict[str, Any]:
    """The dotted keys of a parser with their defaults, those of its dataclasses included."""
    actions = [*parser._actions, *(action for group in parser._action_groups for action in group._group_actions)]
    return {action.dest: action.default for action in actions if action.dest and action.dest.split(".")[-1] != "help"}


def nearest_key(unknown: str, known: Mapping[str, Any]) -> str | None:
    """The most similar known key, or None: a sibling by its own name, else a key by its whole path.

    >>> nearest_key("model.polcy.name", {"model.policy.name": None, "data.seed": None})
    'model.policy.name'
    >>> nearest_key("data.sed", {"model.policy.name": None, "data.seed": None})
    'data.seed'
    """
    parent, _, name = unknown.rpartition(".")
    prefix = f"{parent}." if parent else ""
    siblings = {key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)}
    matches = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=SIMILAR)
    if matches:
        return f"{prefix}{matches[0]}"
    named_alike = [key for key in known if difflib.get_close_matches(name, [key.split(".")[-1]], cutoff=SIMILAR)]
    matches = difflib.get_close_matches(unknown, sorted(named_alike), n=1, cutoff=SIMILAR_PATH)
    return matches[0] if matches else None


def _advice(key: str, near: Mapping[str, Any]) -> str:
    reason = reason_not_offered(key)
    if reason is not None:
        return reason
    setting = our_setting(key)
    if setting is not None:
        return f"Here it is {setting.key}" + (f" ({setting.note})" if setting.note else "")
    nearest = nearest_key(key, near)
    return f"Did you mean {nearest!r}?" if nearest else ""


def _given(words: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Source, key and value of all settings that were given, from left to right. Values of a file may be mappings."""
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[position + 1] if position + 1 < len(words) else ""
        if option in CONFIG_OPTIONS:
            loaded = _loaded(value)
            for key, inner in loaded.items():
                yield value, str(key), inner
        elif option.startswith("--"):
            yield "", option.removeprefix("--").removesuffix("+"), _parsed(value)


def _loaded(file: str) -> Mapping[Any, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # jsonargparse reports what is wrong with the file
    return loaded if isinstance(loaded, Mapping) else {}


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _class_path(value: Any) -> str | None:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, str):
        return value if "." in value else None
    path = value.get("class_path") if isinstance(value, Mapping) else None
    return path if isinstance(path, str) else None


def _arguments(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    inner = value.get("init_args", {}) if {"class_path", "init_args"} & set(value) else value
    return {name: part for name, part in inner.items() if name not in CLASS_KEYS} if isinstance(inner, Mapping) else {}


@functools.cache
def _class_keys(path: str) -> dict[str, Any]:
    """The arguments of a class; none if it cannot be imported, which jsonargparse reports."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(found, fail_untyped=False)
    except Exception:  # a user's module may raise anything when it is imported
        return {}
    return keys_of(parser)
