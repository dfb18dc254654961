"""`fuchsia serve`: the options that it derives from a run's configs, read by vLLM's own parser."""

import os
import socket
import sys
from pathlib import Path

import pytest
import yaml

from fuchsia_pl.cli.serve import serve
from tests.doubles import TINY

ROOT = Path(__file__).parents[2]

COLOCATED = "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine"


class StartedError(Exception):
    """Raised instead of replacing this process."""


def start_nothing(*command) -> None:
    raise StartedError(*command)


@pytest.fixture
def start(tiny_model, tmp_path, monkeypatch):
    """The command line and environment that `fuchsia serve` starts the server with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    settings = yaml.safe_load(TINY % tiny_model)
    settings["data"]["engine"] = {"class_path": COLOCATED}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("os.execve", start_nothing)

    def run(*words: str):
        with pytest.raises(StartedError) as caught:
            serve(["--config", "tiny.yaml", *words])
        path, command, environment = caught.value.args
        assert path == command[0] == sys.executable
        return command, environment

    return run


@pytest.fixture(scope="module")
def parse():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return lambda command: vars(parser.parse_args(command[3:]))


def test_the_server_is_started_with_what_the_run_says(start, parse, tiny_model):
    command, environment = start()
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    said = parse(command)
    expected = {
        "model": str(tiny_model),
        "dtype": "float32",
        "max_model_len": 40,
        "max_num_batched_tokens": 2048,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 4 * 2**30,
        "gpu_memory_utilization": 0.05,
        "max_num_seqs": 64,
        "enforce_eager": False,
        "tensor_parallel_size": 1,
        "quantization": None,
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 2,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "seed": 3,
        "host": "127.0.0.1",
        "port": 8000,
        "api_key": None,
    }
    assert {name: said[name] for name in expected} == expected
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert not Path("runs").exists()


ENGINE = "--data.engine.init_args."


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([f"{ENGINE}kv_cache_gb", "0.5"], {"kv_cache_memory_bytes": 2**29}),
        ([f"{ENGINE}max_num_seqs", "7"], {"max_num_seqs": 7}),
        ([f"{ENGINE}enforce_eager", "true"], {"enforce_eager": True}),
        ([f"{ENGINE}tensor_parallel_size", "2"], {"tensor_parallel_size": 2}),
        (["--data.sampling.max_length", "3000"], {"max_model_len": 3000, "max_num_batched_tokens": 3000}),
        (["--model.policy.lora.r", "20"], {"max_lora_rank": 32}),
        (["--model.policy.dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--seed_everything", "5"], {"seed": 5}),
        (["--host", "0.0.0.0", "--allow_open"], {"host": "0.0.0.0"}),
        (["--host", "127.0.0.2"], {"host": "127.0.0.2"}),
        (["--port", "8123"], {"port": 8123}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_setting_changes_what_it_says_and_nothing_else(start, parse, words, changes):
    before, after = parse(start()[0]), parse(start(*words)[0])
    assert {name: after[name] for name in after if after[name] != before[name]} == changes


def test_quantization_is_passed_on_where_there_is_a_gpu(start, parse, monkeypatch, capsys):
    words = [f"{ENGINE}quantization", "fp8", f"{ENGINE}kv_cache_gb", "2"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        start(*words)
    assert 'quantization="fp8" needs a GPU' in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert parse(start(*words)[0])["quantization"] == "fp8_per_tensor"
    with pytest.raises(SystemExit) as caught:
        start(f"{ENGINE}quantization", "int8")
    assert caught.value.code == 2
    assert "fp8_per_channel" in capsys.readouterr().err


def test_the_server_takes_what_its_gpu_has_left(start, parse, monkeypatch):
    """24 GiB free of 24: less 5 % (1.2), context, workspace and graphs (1.9), and a tiny model: 20.8 are left, rounded down."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (24 * 2**30, 24 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda index: 0)
    found = parse(start()[0])
    assert found["kv_cache_memory_bytes"] == int(20.8 * 2**30)
    assert (found["enable_chunked_prefill"], found["max_num_batched_tokens"]) == (True, 8192)


def test_arguments_of_vllm_are_passed_on(start, parse, capsys):
    given = (
        "{speculative_config: {method: ngram, num_speculative_tokens: 2}, cpu_offload_gb: 2, async_scheduling: false, "
        "cudagraph_capture_sizes: [1, 2], attention_config: {backend: TRITON_ATTN}, kv_cache_dtype: fp8}"
    )
    before, after = parse(start()[0]), parse(start(f"{ENGINE}engine_args", given)[0])
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed.pop("attention_config").backend.name == "TRITON_ATTN"
    assert changed == {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "cpu_offload_gb": 2.0,
        "async_scheduling": False,
        "cudagraph_capture_sizes": [1, 2],
        "kv_cache_dtype": "fp8",
    }
    with pytest.raises(SystemExit) as caught:
        start(f"{ENGINE}engine_args", "{cpu_offload_bg: 2}")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "engine_args.cpu_offload_bg is no argument of vLLM: did you mean cpu_offload_gb" in error
    assert "Traceback" not in error


def test_the_key_is_in_the_environment_and_not_on_the_command_line(start, monkeypatch):
    command, environment = start("--api_key", "secret")
    assert environment["VLLM_API_KEY"] == "secret"
    assert not any("secret" in word for word in command)
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert start()[1]["VLLM_API_KEY"] == "of the environment"
    own = ("--config", "overlays/server.yaml", "--data.engine.init_args.api_key", "of the trainer")
    assert start(*own)[1]["VLLM_API_KEY"] == "of the trainer"


def test_the_key_is_asked_for_on_every_path(start, parse):
    guard = ["fuchsia_pl.engines.vllm_guard.KeyGuard"]
    assert parse(start("--api_key", "secret")[0])["middleware"] == guard
    assert parse(start("--host", "0.0.0.0", "--api_key", "secret")[0])["middleware"] == guard
    command, environment = start()  # on this machine alone
    assert (parse(command)["middleware"], environment["VLLM_API_KEY"]) == ([], "")


@pytest.mark.parametrize("key", [[], ["--api_key", ""]])
def test_a_server_that_others_reach_and_that_asks_for_no_key_is_refused_or_asked_for(start, capsys, caplog, key):
    with pytest.raises(SystemExit) as caught:
        start("--host", "0.0.0.0", *key)
    assert caught.value.code == 2
    assert "--host 0.0.0.0 lets other machines reach the server, and there is no API key" in capsys.readouterr().err
    assert "requires no key" not in caplog.text
    start("--host", "0.0.0.0", *key, "--allow_open")
    assert "the server at 0.0.0.0 requires no key" in caplog.text


@pytest.mark.parametrize("key", ["clé", "a\nb", " secret", "secret\n"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_printed(start, capsys, key):
    with pytest.raises(SystemExit):
        start("--api_key", key)
    printed = capsys.readouterr().err
    assert "the API key must be printable ASCII without blanks at its ends" in printed
    assert "secret" not in printed


def test_whole_weights_are_taken_where_there_is_a_gpu(start, parse, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command, environment = start("--model.policy.lora.enabled", "false", f"{ENGINE}kv_cache_gb", "2")
    said = parse(command)
    assert said["weight_transfer_config"].backend == "nccl"
    assert said["worker_extension_cls"] == "fuchsia_pl.engines.vllm_worker.WorkerExtension"
    assert not said["enable_lora"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    with pytest.raises(SystemExit):
        start("--model.policy.lora.enabled", "false", f"{ENGINE}quantization", "fp8")
    assert "would be sampled from in another precision" in capsys.readouterr().err


def test_another_engine_leaves_the_defaults(start):
    assert start("--config", "overlays/server.yaml")[0] == start()[0]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--model.policy.lora.enabled", "false"], "this machine has no GPU: whole weights reach a vLLM server"),
        (["--data.batch_sise", "3"], "Did you mean 'data.batch_size'?"),
        (["--port", "x"], "invalid int value: 'x'"),
    ],
)
def test_mistakes_are_told(start, capsys, words, error):
    with pytest.raises(SystemExit) as caught:
        start(*words)
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "is taken by another program: choose another"),
        (["--port", "0"], "--port must be between 1 and 65535, got 0"),
        (["--port", "70000"], "--port must be between 1 and 65535, got 70000"),
        (["--host", "203.0.113.7"], "nothing can listen on --host 203.0.113.7"),
        (["--host", "no.such.host.invalid"], "nothing can listen on --host no.such.host.invalid"),
    ],
)
def test_a_port_that_cannot_be_listened_on_is_told_before_anything_is_read(monkeypatch, capsys, words, error):
    monkeypatch.setattr("fuchsia_pl.cli.serve.ServeCLI", lambda *arguments: pytest.fail("read the configs"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit) as caught:
            serve(["--config", "nowhere.yaml", "--port", str(other.getsockname()[1]), *words])
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


def test_the_process_becomes_the_server(forkserver, tmp_path, tiny_model):
    """With a module instead of the server: it receives signals, and its exit code is that of the command."""
    stand_in = tmp_path / "vllm/entrypoints/openai/api_server.py"
    stand_in.parent.mkdir(parents=True)
    for folder in (stand_in.parent, *stand_in.parent.parents[:2]):
        (folder / "__init__.py").touch()
    stand_in.write_text("import sys; print(sys.argv[1:3]); sys.exit(7)")
    (tmp_path / "tiny.yaml").write_text(TINY % tiny_model)
    words = ["-m", "fuchsia_pl", "serve", "--config", "tiny.yaml"]
    process = forkserver.start(*words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert process.wait(120) == 7, process.printed
    assert process.printed.splitlines()[-1] == f"['--model', '{tiny_model}']"
