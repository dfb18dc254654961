"""`fuchsia export --push-to-hub`, against a double of the hub's HTTP interface."""

import json

import pytest
from huggingface_hub import ModelCard

from fuchsia_pl.cli.export import export
from tests.exported import save_base, save_held_out, save_run
from tests.hub_double import receiving_hub


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return save_run(tmp_path / "runs", save_base(tmp_path / "base"), hub_id="someone/tiny-base")


def push(run, address, monkeypatch, *words) -> int:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    return export([str(run), "--push-to-hub", "me/tiny", *words])


def test_all_files_of_an_adapter_arrive(run, monkeypatch, capsys):
    save_held_out(run)
    with receiving_hub() as (address, received):
        assert push(run, address, monkeypatch, "--private") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded: {address}/me/tiny"
    (made,) = received.repositories
    assert (made["name"], made["organization"]) == ("tiny", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert received.tokens == {"Bearer hf_of_a_test"}
    assert received.messages == ["tiny-0, exported by Fuchsia-PL"]
    folder = run / "export" / "peft"
    assert received.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= received.files.keys()
    assert json.loads(received.files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny-base"
    card = ModelCard(received.files["README.md"].decode())
    assert card.data.base_model == "someone/tiny-base"
    assert 'PeftModel.from_pretrained(base, "me/tiny")' in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("rollout/accuracy", 0.75, "validation")


def test_a_public_repository_is_not_made_private(run, monkeypatch):
    with receiving_hub() as (address, received):
        assert push(run, address, monkeypatch) == 0
    assert received.repositories[0].get("private") is None
    assert received.repositories[0].get("visibility") in (None, "public")


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_refusal_is_one_line(run, monkeypatch, capsys, path):
    with receiving_hub(refuses_at=path) as (address, received):
        capsys.readouterr()
        assert push(run, address, monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the hub refused the upload to 'me/tiny' (403: ")
    assert told.count("\n") == 1
    assert "hf_of_a_test" not in told
    assert (run / "export" / "peft" / "adapter_model.safetensors").is_file()
    assert received.files == {}


def test_a_hub_that_is_not_there_is_one_line(run, monkeypatch, capsys):
    capsys.readouterr()
    assert push(run, "http://127.0.0.1:9", monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the upload to 'me/tiny' failed (ConnectError")
    assert told.count("\n") == 1


def test_without_a_token_nothing_is_computed(run, monkeypatch, capsys):
    monkeypatch.setattr("fuchsia_pl.cli.upload.get_token", lambda: None)
    capsys.readouterr()
    assert push(run, "http://127.0.0.1:9", monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: --push-to-hub needs a token: log in with `hf auth login`")
    assert not (run / "export").exists()
