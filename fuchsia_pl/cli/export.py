"""`fuchsia export`: trained weights in the format of another tool, with a model card, in a folder or on the hub."""

import json
import os
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from fuchsia_pl.callbacks.card_facts import CARD_FILE
from fuchsia_pl.cli.gguf_file import write_gguf
from fuchsia_pl.cli.modelfile import MODELFILE, modelfile
from fuchsia_pl.cli.options import export_options
from fuchsia_pl.cli.trained import Trained, find_trained
from fuchsia_pl.cli.upload import check_upload, upload
from fuchsia_pl.engines.merge import ADAPTER_WEIGHTS, merged_weights
from fuchsia_pl.files import share_permissions, writing
from fuchsia_pl.policy.adapter_files import ADAPTER_CONFIG, loading_line, read_adapter_config
from fuchsia_pl.report.model_card import TAG, model_card
from fuchsia_pl.types import ConfigError

EXPORT_FOLDER = "export"
ADVICE = "Make room there, or set another folder with --output"


def export(arguments: list[str]) -> int:
    """Runs `fuchsia export`; returns the exit code."""
    given = export_options().parse_args(arguments)
    disable_progress_bar()
    try:
        if given.push_to_hub is not None:
            check_upload(given.push_to_hub)
        trained = find_trained(given.run, given.root, given.base)
        folder = export_weights(trained, given)
        lines = [f"exported: {folder}", *_hints(trained, given, folder)]
        if given.push_to_hub is not None:
            lines.append(f"uploaded: {upload(folder, given.push_to_hub, given.private, trained.name)}")
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def export_weights(trained: Trained, given: Namespace) -> Path:
    """Writes the files of an export to a new folder, or none of them.

    Args:
        trained: The weights.
        given: Options of the command.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder exists, or the format cannot hold these weights.
        DiskError: The folder could not be written.
    """
    _check_options(trained, given)
    own_place = trained.weights.resolve().parent if trained.run is None else trained.run / EXPORT_FOLDER
    target = own_place / (f"{trained.name}-{given.to}" if trained.run is None else given.to)
    target = target if given.output is None else given.output
    _check_target(target, given.overwrite)
    partial = target.with_name(f".{target.name}.partial")
    with writing(target, ADVICE):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            WRITERS[given.to](trained, partial, given)
            card = model_card(trained.facts, given.to, given.push_to_hub)
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
            share_permissions(partial / CARD_FILE)
            _replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def write_peft(trained: Trained, folder: Path, given: Namespace) -> None:
    """Copies an adapter; its config names the base without a path. Adds the tokenizer with the chat template of the run."""
    config = {**read_adapter_config(trained.weights), "base_model_name_or_path": trained.base_id}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(trained.weights / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    trained.tokenizer.save_pretrained(folder)


def write_merged(trained: Trained, folder: Path, given: Namespace) -> None:
    """Writes a model folder of transformers: W + scale B A, computed in float32 and rounded once to the type.

    Raises:
        ConfigError: The adapter is for another model, or a weight is not finite in this type.
    """
    dtype = getattr(torch, given.dtype or trained.policy.dtype)
    state: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in merged_weights(trained.base, trained.weights):
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if not torch.isfinite(state[name]).all():
                raise ConfigError(
                    f"the weight {name} is not finite in {dtype}: export another --dtype, or other weights"
                )
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"{trained.weights} does not fit {trained.base}: {error}. Name its base with --base"
        ) from error
    save_torch_state_dict(state, folder, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(trained.base)
    config.dtype, config.name_or_path = dtype, trained.name
    config.save_pretrained(folder)
    if (trained.base / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(trained.base).save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)


def write_gguf_folder(trained: Trained, folder: Path, given: Namespace) -> None:
    """Writes one GGUF file with weights, tokenizer and chat template."""
    write_gguf(trained, folder / f"{trained.name}.gguf", given.quantize or "f16")


def write_ollama(trained: Trained, folder: Path, given: Namespace) -> None:
    """Writes a GGUF file and the Modelfile of Ollama."""
    write_gguf_folder(trained, folder, given)
    text = modelfile(trained.tokenizer, f"{trained.name}.gguf", given.temperature)
    (folder / MODELFILE).write_text(text, encoding="utf-8")


WRITERS: dict[str, Callable[[Trained, Path, Namespace], None]] = {
    "peft": write_peft,
    "merged": write_merged,
    "gguf": write_gguf_folder,
    "ollama": write_ollama,
}


def _check_options(trained: Trained, given: Namespace) -> None:
    """Rejects options that would do nothing with a format."""
    if given.to == "peft" and not trained.is_adapter:
        raise ConfigError(
            f"{trained.weights} is a whole model, since all weights were trained: --to merged, gguf or ollama"
        )
    uses = {"dtype": ("merged",), "quantize": ("gguf", "ollama"), "temperature": ("ollama",)}
    for name, formats in uses.items():
        if getattr(given, name) is not None and given.to not in formats:
            raise ConfigError(
                f"--{name} does nothing with --to {given.to} (only with {', '.join(formats)}): leave it out"
            )
    if given.private and given.push_to_hub is None:
        raise ConfigError("--private does nothing without --push-to-hub: leave it out")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{target} exists: give another --output, or replace it with --overwrite")
    card = target / CARD_FILE
    if not card.is_file() or TAG not in card.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{target} is not an export of this command, so --overwrite does not remove it: give another --output"
        )


def _replace(partial: Path, target: Path) -> None:
    """Puts a complete folder in the place of an older one, which is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _hints(trained: Trained, given: Namespace, folder: Path) -> list[str]:
    """How to use what was written."""
    if given.to == "peft":
        return [f"load it:  {loading_line(folder)}"]
    if given.to == "merged":  # the command `vllm` of the CPU build does not start; its module does, in every build
        serve = f"python -m vllm.entrypoints.openai.api_server --model {shlex.quote(str(folder))}"
        return [f"load it:  {loading_line(folder)}", f"serve it: {serve}"]
    if given.to == "ollama":
        return [f"use it:   ollama create {trained.name} -f {folder / MODELFILE}"]
    return [f"use it:   llama-cli -m {folder / trained.name}.gguf"]
