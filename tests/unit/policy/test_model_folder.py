"""Model folders that are broken: found from headers, before anything loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fuchsia_pl.policy.model_folder import INDEX_FILE, blank_model, check_weight_files
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.types import ConfigError


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_weights_that_are_cut_off_anywhere_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    check_weight_files(folder)
    for length in [*range(0, 64, 7), *range(64, len(whole), len(whole) // 20), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"the weights in .*model.safetensors cannot be read"):
            resolve_model(str(folder))


def test_a_file_that_the_index_names_must_be_there(folder):
    names = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        ConfigError, match=r"lacks model-00002-of-00002.safetensors \(1 of 2 weight files are missing\)"
    ):
        resolve_model(str(folder))
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"the index .* cannot be read"):
        resolve_model(str(folder))


def test_a_blank_model_has_the_layers_and_no_weights(folder, tiny_model):
    (folder / "model.safetensors").unlink()
    blank = blank_model(folder)
    assert {parameter.device for parameter in blank.parameters()} == {torch.device("meta")}
    assert type(blank).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"model_type": "nonesuch"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_of_no_model_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"the config.json in .* describes no causal language model"):
        blank_model(folder)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not one" * 100])
def test_a_gguf_file_that_is_none_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setenv("FUCHSIA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the GGUF file .*model.gguf cannot be read"):
        resolve_model(str(file))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("FUCHSIA_CACHE", str(tmp_path / "taken"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="set FUCHSIA_CACHE to a folder that can"):
        resolve_model(str(tmp_path / "model.gguf"))
