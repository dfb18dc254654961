"""The resolved settings of a run beside their defaults, without secrets."""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import fuchsia_pl
from fuchsia_pl.report.secrets import SECRET_NAME, follows_option, may_be_secret
from fuchsia_pl.report.values import text

CONFIG_FILE = "config.yaml"
OBJECTIVE_FILE = "objective.yaml"
# Written by `python -m fuchsia_pl.cli.settings_table` from the parser of the command line.
SETTINGS_TABLE = Path(fuchsia_pl.__file__).parent / "cli" / "settings.json"
# Classes that may be imported to read their defaults. A report never runs the code of a user's environment.
TRUSTED = ("fuchsia_pl", "torch", "lightning")
SECRET = re.compile(
    r"(^|[_.-])(api_?key|key|token|password|passwd|secret|credentials?|authorization|cookie)$", re.IGNORECASE
)
IN_URL = re.compile(r"(://)[^/@\s]+@")
USERS_OWN = re.compile(r"(environment|engine|logger)(\[\])?\.(init_args\.)?")
HIDDEN = "(hidden)"
MAX_VALUE_CHARS = 2000

Setting = dict[str, str | None]


def settings_of(folder: Path) -> list[Setting]:
    """Every setting of `config.yaml`: its dotted key, its value as YAML, and its default or None if there is none."""
    config = _loaded(folder / CONFIG_FILE)
    leaves = dict(_leaves(config, ""))
    defaults = {**packaged_defaults(), **_class_defaults(leaves)}
    return [
        {"key": key, "value": as_yaml(_masked(key, value)), "default": _default(key, value, leaves, defaults)}
        for key, value in leaves.items()
    ]


def environment_of(folder: Path) -> str:
    """Name of the environment's class, "" if the config does not name one."""
    environment = _loaded(folder / CONFIG_FILE).get("data")
    environment = environment.get("environment") if isinstance(environment, dict) else None
    path = environment.get("class_path") if isinstance(environment, dict) else environment
    return str(path).rpartition(".")[2] if path else ""


def objective_of(folder: Path) -> str:
    """The objective with all parts of its preset, in one line."""
    model = _loaded(folder / OBJECTIVE_FILE).get("model")
    loss = model.get("loss") if isinstance(model, dict) else None
    if not isinstance(loss, dict):
        return ""
    parts = [f"{key} {as_yaml(value)}" for key, value in loss.items() if key != "loss_type" and value is not None]
    return f"{loss.get('loss_type')}: {', '.join(parts)}"


@cache
def _table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SETTINGS_TABLE.read_text(encoding="utf-8"))
    return loaded


@cache
def packaged_defaults() -> dict[str, str | None]:
    """Defaults of all settings with the default classes, as YAML; None for a required setting."""
    # In the table, "" is null.
    return {
        setting["key"]: "null" if setting["default"] == "" else setting["default"]
        for group in _table()["groups"]
        for setting in group["settings"]
    }


def as_yaml(value: Any) -> str:
    """A value in one line of YAML.

    >>> as_yaml(1e-05), as_yaml([1, 2]), as_yaml(None), as_yaml("a: b")
    ('1.0e-05', '[1, 2]', 'null', "'a: b'")
    """
    written = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
    return text(written.removesuffix("\n").removesuffix("\n..."), MAX_VALUE_CHARS)


def _loaded(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _class_defaults(leaves: dict[str, Any]) -> dict[str, str | None]:
    """Defaults of the arguments of the classes that the config names; None for an argument of a class that is not loaded."""
    found: dict[str, str | None] = {}
    for key, path in leaves.items():
        parent, _, last = key.rpartition(".")
        if last != "class_path":
            continue
        given = [name for name in leaves if name.startswith(f"{parent}.init_args.")]
        found |= dict.fromkeys(given)
        packaged = _table()["classes"]
        # A run of a packaged config imports no class here, and so no torch.
        arguments = packaged[path] if path in packaged else class_defaults(str(path))
        found |= {
            name: arguments[name.removeprefix(f"{parent}.init_args.")]
            for name in given
            if name.removeprefix(f"{parent}.init_args.") in arguments
        }
    return found


def class_defaults(path: str) -> dict[str, str]:
    """Defaults of the arguments of a class, as YAML; none if its module may not be imported here, or cannot.

    >>> class_defaults("torch.optim.lr_scheduler.LinearLR")["total_iters"], class_defaults("my_envs.Mine")
    ('5', {})
    """
    module, _, name = path.rpartition(".")
    if module not in sys.modules and module.partition(".")[0] not in TRUSTED:
        return {}
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except Exception:  # the code of the module may raise anything
        return {}
    plain = (bool, int, float, str, list, tuple, type(None))
    defaults = {
        name: parameter.default for name, parameter in parameters.items() if isinstance(parameter.default, plain)
    }
    return {name: as_yaml(list(value) if isinstance(value, tuple) else value) for name, value in defaults.items()}


def _default(key: str, value: Any, leaves: dict[str, Any], defaults: dict[str, str | None]) -> str | None:
    if key.endswith(".class_path"):
        return defaults.get(key.removesuffix(".class_path"))
    default = defaults.get(key)
    # 0.001 and 1e-3, or 4 and 4.0, are one value.
    return as_yaml(value) if default is not None and value is not None and _parsed(default) == value else default


def _parsed(default: str) -> Any:
    try:
        return yaml.safe_load(default)
    except yaml.YAMLError:
        return None


def _masked(key: str, value: Any) -> Any:
    """A value without secrets: those whose name says so, and user names and passwords in URLs.

    >>> _masked("data.engine.init_args.api_key", "s3cret"), _masked("model.max_tokens", 3), _masked("a.api_key", None)
    ('(hidden)', 3, None)
    >>> _masked("finite_guard.record_steps", [])
    []
    >>> _masked("urls", ["http://me:s3cret@host:1", {"env": {"HF_TOKEN": "s3cret"}}])
    ['http://(hidden)@host:1', {'env': {'HF_TOKEN': '(hidden)'}}]
    """
    if SECRET.search(key) and value not in (None, "", [], {}):
        return HIDDEN
    if isinstance(value, str | list | dict) and value and _may_be_secret(key):
        return HIDDEN
    if isinstance(value, str):
        shown = IN_URL.sub(rf"\1{HIDDEN}@", value)
        return HIDDEN if may_be_secret(shown.replace(f"{HIDDEN}@", "")) else shown
    if isinstance(value, list):
        return [
            HIDDEN if follows_option(value, position) else _masked(f"{key}[]", inner)
            for position, inner in enumerate(value)
        ]
    if isinstance(value, dict):
        return {name: _masked(f"{key}.{name}", inner) for name, inner in value.items()}
    return value


def _may_be_secret(key: str) -> bool:
    """Whether a key is one of a user's class, and its name that of a secret."""
    found = USERS_OWN.search(key)
    return found is not None and SECRET_NAME.search(key[found.end() :]) is not None
