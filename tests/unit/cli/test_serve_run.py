"""`fuchsia serve RUN`: the options that it starts the server with, read by vLLM's own parser."""

import sys

import pytest
import torch
import yaml
from vllm.lora.ops.torch_ops.lora_ops import bgmv_expand

from fuchsia_pl.cli.serve import serve
from tests.exported import save_base, save_run


class StartedError(Exception):
    """Raised instead of replacing this process."""


def start_nothing(*command) -> None:
    raise StartedError(*command)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = save_base(root / "base")
    return base, save_run(root / "runs", base, hub_id="someone/tiny-base")


@pytest.fixture
def start(folders, monkeypatch):
    """Options and environment of the server of the run."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("os.execve", start_nothing)

    def run(*words: str):
        with pytest.raises(StartedError) as caught:
            serve([str(folders[1]), *words])
        path, command, environment = caught.value.args
        assert path == command[0] == sys.executable
        assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
        return vars(make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])), environment

    return run


def refused(capsys, folders, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        serve([*words, str(folders[1])] if {"--port", "--max_model_len"} & set(words) else [str(folders[1]), *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_adapter_and_base_have_readable_names(start, folders, capsys):
    base, run = folders
    found, environment = start()
    (module,) = found["lora_modules"]
    assert (module.name, module.path) == ("tiny-0", str((run / "adapter").resolve()))
    expected = {
        "model": str(base),
        "served_model_name": ["someone/tiny-base"],
        "dtype": "float32",
        "enable_lora": True,
        "max_loras": 2,  # on a CPU
        "max_lora_rank": 8,  # the smallest size of vLLM's buffers that holds rank 4
        "max_model_len": 256,  # the model's own limit, not a run's
        "chat_template": None,
        "host": "127.0.0.1",
        "port": 8000,
    }
    assert {name: found[name] for name in expected} == expected
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert (
        "serving tiny-0 (trained) and someone/tiny-base (its base) at http://127.0.0.1:8000/v1"
        in capsys.readouterr().out
    )


def test_on_a_cpu_a_row_of_the_base_reads_the_last_slot():
    """The reason for a second slot. If this fails, vLLM has mended it, and one slot suffices."""
    slots = torch.stack([torch.ones(3, 2), torch.zeros(3, 2)])  # of an adapter, and an empty one
    for used, added in ((slots, 0.0), (slots[:1], 2.0)):
        output = torch.zeros(2, 3)
        bgmv_expand(torch.ones(2, 2), used, output, torch.tensor([0, -1]))  # a row of the adapter, one of the base
        assert output.tolist() == [[2.0] * 3, [added] * 3]


def test_the_longest_request_fits_into_the_cache(start, folders, capsys):
    """A token of this model takes 2 (keys and values) x 2 layers x 2 heads x 16 values x 4 bytes = 512 bytes."""
    assert start("--max_model_len", "100")[0]["max_model_len"] == 100
    assert start("--max-model-len", "100")[0]["max_model_len"] == 100
    gib = 100 * 512 / 2**30
    assert start("--kv_cache_gb", str(gib))[0]["max_model_len"] == 96  # whole blocks of 32
    assert "holds no request (512 bytes per token)" in refused(capsys, folders, "--kv_cache_gb", str(gib / 10))
    assert "is not between 1 and 256" in refused(capsys, folders, "--max_model_len", "257")
    assert "or give at most 96" in refused(capsys, folders, "--max_model_len", "200", "--kv_cache_gb", str(gib))


def test_a_key_is_required_from_other_machines(start, folders, capsys):
    assert "there is no API key" in refused(capsys, folders, "--host", "0.0.0.0")
    found, environment = start("--host", "0.0.0.0", "--api_key", "secret")
    assert found["middleware"] == ["fuchsia_pl.engines.vllm_guard.KeyGuard"]
    assert environment["VLLM_API_KEY"] == "secret"


def test_type_and_template_of_the_run_are_served(start, folders, monkeypatch):
    _, run = folders
    before = (run / "config.yaml").read_text()
    config = yaml.safe_load(before)
    config["model"]["policy"]["chat_template"] = "none"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        assert "{% for m in messages %}{{ m['content'] }}" in start()[0]["chat_template"]
        assert start("--dtype", "float16")[0]["dtype"] == "float16"
    finally:
        (run / "config.yaml").write_text(before)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data.batch_size", "3"], "'--data.batch_size' is not an option of `fuchsia serve RUN`"),
        (["--root", "/nowhere", "--base", "/nowhere/model"], "the base of"),
        (["--port", "70000"], "--port must be between 1 and 65535, got 70000"),
        (["--port", "8000", "--api_key", "clé"], "the API key must be printable ASCII"),
    ],
)
def test_mistakes_are_told(folders, capsys, words, error):
    assert error in refused(capsys, folders, *words)
