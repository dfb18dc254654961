"""The policies that `fuchsia eval` measures: by a run, a checkpoint, an adapter, or the model of a config."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fuchsia_pl.callbacks.adapter_export import ADAPTER_FOLDER
from fuchsia_pl.cli.checkpoints import CHECKPOINT_FOLDER, LAST_FILE
from fuchsia_pl.cli.find_run import find_run
from fuchsia_pl.cli.run_folder import CONFIG_OPTIONS, DEFAULT_ROOT, SAVED_CONFIG
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.types import ConfigError

BASE = "base"
ADAPTER_CONFIG = "adapter_config.json"
ROOT_OPTION = "--trainer.default_root_dir"
ITEMS_OPTION = "--trainer.limit_val_batches"


@dataclass(frozen=True)
class Rival:
    """The policy that another one is compared with.

    Attributes:
        name: What the user wrote.
        policy: Its model and adapter.
        checkpoint: A checkpoint with its weights, None if the policy has them.

    >>> Rival("base", PolicyConfig("smollm2")).checkpoint is None
    True
    """

    name: str
    policy: PolicyConfig
    checkpoint: Path | None = None


def run_arguments(given: argparse.Namespace, words: list[str]) -> list[str]:
    """The words of `fuchsia validate` for the options of `fuchsia eval`.

    Args:
        given: The options of `fuchsia eval`.
        words: All other options.

    Raises:
        ConfigError: There is no such run or adapter, or several policies are given.
    """
    configs, found = policy_words(given, words)
    if given.num_items is not None and given.num_items < 1:
        raise ConfigError(f"--num_items must be 1 or more, got {given.num_items}")
    has_limit = any(word.partition("=")[0] == ITEMS_OPTION for word in words)
    if has_limit and given.num_items is not None:
        raise ConfigError(f"--num_items and {ITEMS_OPTION} both limit the items: give one")
    if not has_limit:
        found += [ITEMS_OPTION, "1.0" if given.num_items is None else str(given.num_items)]
    found += sampling_words(given)
    # A config changes what options before it have set.
    return [*configs, *words, *found, "--verbose", "false"]


def policy_words(given: argparse.Namespace, words: list[str]) -> tuple[list[str], list[str]]:
    """The words that choose a policy by `run`, `ckpt_path` or `adapter`: configs, which come first, and options.

    Args:
        given: The options of a command.
        words: All other options.

    Raises:
        ConfigError: There is no such run or adapter, or several policies are given.
    """
    named = {
        f"--{name}": vars(given)[name] for name in ("run", "ckpt_path", "adapter") if vars(given)[name] is not None
    }
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} both choose the weights: give one")
    if given.run is not None:
        return _words_of_run(find_run(given.run, _root(words)), words)
    if given.ckpt_path is not None:
        return [], ["--ckpt_path", given.ckpt_path]
    return [], [] if given.adapter is None else _words_of_adapter(Path(given.adapter))


def sampling_words(given: argparse.Namespace) -> list[str]:
    """The words that set how held-out items are sampled by `samples`, `temperature` and `max_completion_tokens`."""
    settings = {
        "validation_samples": given.samples,
        "validation_temperature": given.temperature,
        "validation_max_completion_tokens": given.max_completion_tokens,
    }
    return [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--data.sampling.{name}", str(value))
    ]


def choose_temperature(sampling: Any, temperature: float | None) -> None:
    """Gives several samples the temperature of training, unless one was chosen: greedy ones would be all alike.

    Args:
        sampling: The parsed `data.sampling`, which is changed.
        temperature: The `--temperature` of the command.
    """
    if sampling.validation_samples > 1 and sampling.validation_temperature == 0 and temperature is None:
        sampling.validation_temperature = sampling.temperature


def _words_of_run(folder: Path, words: list[str]) -> tuple[list[str], list[str]]:
    """The config of a run unless another one is given, and its newest weights."""
    has_config = any(word.partition("=")[0] in CONFIG_OPTIONS for word in words)
    configs = [] if has_config else ["--config", str(folder / SAVED_CONFIG)]
    fresh = ["--resume.optimizer", "null", "--resume.scheduler", "null"]  # of a run that resumed another one
    checkpoint, adapter = _weights_of(folder)
    if checkpoint is not None:
        return configs, [*fresh, "--ckpt_path", str(checkpoint)]
    return configs, [*fresh, "--ckpt_path", "null", *_words_of_adapter(adapter)]


def _weights_of(folder: Path) -> tuple[Path | None, Path]:
    """The newest checkpoint of a run, or else its adapter.

    Raises:
        ConfigError: The run has left neither.
    """
    checkpoint, adapter = folder / CHECKPOINT_FOLDER / LAST_FILE, folder / ADAPTER_FOLDER
    if checkpoint.exists():
        return checkpoint, adapter
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"the run {folder} has left neither {CHECKPOINT_FOLDER}/{LAST_FILE} nor an adapter in {ADAPTER_FOLDER}/: it ended "
            "before its first checkpoint"
        )
    return None, adapter


def _words_of_adapter(folder: Path) -> list[str]:
    settings = {"enabled": True, "init_from": str(folder), **read_adapter_settings(folder)}
    return [word for name, value in settings.items() for word in (f"--model.policy.lora.{name}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Rank, alpha and scale of an adapter, by the names of `LoRASettings`.

    Raises:
        ConfigError: The folder is not that of a PEFT adapter.
    """
    try:
        loaded = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return {"r": loaded["r"], "alpha": loaded["lora_alpha"], "use_rslora": bool(loaded.get("use_rslora", False))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} is not the folder of a PEFT adapter: its {ADAPTER_CONFIG} cannot be read ({type(error).__name__}). Give a "
            "folder that save_pretrained or a run wrote, as runs/NAME/0/adapter"
        ) from error


def find_rival(name: str, policy: PolicyConfig, words: list[str]) -> Rival:
    """The policy of `--against`.

    Args:
        name: What the user wrote: "base", the folder of an adapter, or a run.
        policy: The model of the evaluation.
        words: The command line, for the root of the runs.

    Raises:
        ConfigError: There is no such run or adapter, or it has another model.
    """
    if name == BASE:
        return Rival(name, replace(policy, lora=replace(policy.lora, init_from=None)))
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return Rival(name, _with_adapter(policy, Path(name)))
    folder = find_run(name, _root(words))
    model, lora = _model_of(folder)
    if model != policy.name:
        raise ConfigError(
            f"--against {name} has the model {model!r}, and the evaluation {policy.name!r}: evaluate it by its own "
            f"`fuchsia eval --run {name}`"
        )
    checkpoint, adapter = _weights_of(folder)
    if (adapter / ADAPTER_CONFIG).is_file():
        return Rival(name, _with_adapter(policy, adapter))
    if lora:
        raise ConfigError(f"--against {name}: the run has exported no adapter. Give a folder with {ADAPTER_CONFIG}")
    return Rival(name, replace(policy, lora=replace(policy.lora, enabled=False, init_from=None)), checkpoint)


def _with_adapter(policy: PolicyConfig, folder: Path) -> PolicyConfig:
    lora = replace(policy.lora, enabled=True, init_from=str(folder), **read_adapter_settings(folder))
    return replace(policy, lora=lora)


def _model_of(folder: Path) -> tuple[str, bool]:
    """Model of a run, and whether it trained an adapter."""
    try:
        policy = yaml.safe_load((folder / SAVED_CONFIG).read_text(encoding="utf-8"))["model"]["policy"]
        return policy["name"], policy["lora"]["enabled"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"the config {folder / SAVED_CONFIG} is not that of a run: {type(error).__name__}") from error


def _root(words: list[str]) -> str:
    """The root of the runs on a command line.

    >>> _root(["--trainer.default_root_dir", "a"]), _root(["--trainer.default_root_dir=b"]), _root([])
    ('a', 'b', 'runs')
    """
    root = DEFAULT_ROOT
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == ROOT_OPTION and (equals or position + 1 < len(words)):
            root = value if equals else words[position + 1]
    return root
