"""The runner of `make gpu-check` with checks that fail in every way, and its table. No check of a device runs here."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.gpu_check import runner
from tests.gpu_check.__main__ import chosen
from tests.gpu_check.checks import CHECKS, Check
from tests.gpu_check.findings import Figure, Findings, NotHereError, Outcome
from tests.gpu_check.runner import run_check, run_checks
from tests.gpu_check.table import Run

ROOT = Path(__file__).parents[2]
HANGS_S = 60.0


def works(findings: Findings, number: float) -> None:
    findings.device("cpu, float32")
    findings.note("three rows", rows=3)
    findings.bar("gap", number, "<=", 0.5)


def is_not_here(findings: Findings) -> None:
    findings.note("before")
    raise NotHereError("needs two GPUs")


def raises(findings: Findings) -> None:
    findings.note("before")
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")


def leaves(findings: Findings) -> None:
    raise SystemExit(0)


def dies(findings: Findings) -> None:
    findings.note("before")
    os.kill(os.getpid(), 9)


def hangs(findings: Findings, file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({HANGS_S})"])
    with tempfile.NamedTemporaryFile() as kept:
        Path(file).write_text(f"{child.pid} {kept.name}")
        findings.note("before")
        time.sleep(HANGS_S)


def leaves_a_fork(findings: Findings) -> None:
    if child := os.fork():
        findings.note(str(child))
    else:  # it holds the pipe to the parent
        time.sleep(HANGS_S)


def shows_nothing(findings: Findings) -> None: ...


def check(function: str, *arguments, limit_s: float = 30.0) -> Check:
    return Check(function, function, f"test_gpu_check:{function}", arguments, limit_s, package="tests.unit")


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in time, be it that nobody has waited for it yet. A killed process ends after the call returns."""
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


@pytest.fixture
def outcomes(tmp_path):
    """Runs checks in forks of this process; returns their outcomes and the lines of progress."""

    def run(*checks: Check) -> tuple[list[Outcome], list[str]]:
        lines: list[str] = []
        return run_checks(checks, multiprocessing.get_context("fork"), tmp_path / "log", lines.append), lines

    return run


def test_every_end_of_a_check_is_an_outcome_and_the_next_one_runs(outcomes, tmp_path):
    checks = [check(name) for name in ("is_not_here", "raises", "leaves", "dies", "shows_nothing")]
    found, lines = outcomes(check("works", 0.25), *checks, check("works", 0.75))
    assert [o.result for o in found] == ["pass", "not here", "fail", "fail", "fail", "fail", "fail"]
    assert [figure.text for figure in found[0].figures] == ["three rows", "gap 0.25 (<= 0.5)"]
    assert found[0].device == "cpu, float32"
    assert found[1].reason == "needs two GPUs"
    assert [figure.text for figure in found[2].figures] == [
        "before",
        "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
    ]
    assert found[3].figures[-1].text.startswith("SystemExit")
    assert [figure.text for figure in found[4].figures] == ["before", "its process ended with code -9"]
    assert found[6].figures[-1] == Figure("gap 0.75 (<= 0.5)", False, {"gap": 0.75})
    assert "    FAILED gap 0.75 (<= 0.5)" in lines
    assert lines[0] == "[1/7] works: works"
    assert "and more lines" in (tmp_path / "log").read_text()  # the traceback


def test_a_check_that_hangs_ends_with_all_its_processes_and_files(tmp_path):
    start, file = time.monotonic(), tmp_path / "pid"
    hanging = check("hangs", str(file), limit_s=3.0)
    outcome = run_check(hanging, multiprocessing.get_context("fork"), tmp_path / "log", lambda line: None)
    assert time.monotonic() - start < HANGS_S / 2
    assert [figure.text for figure in outcome.figures] == ["before", "took longer than 3 s"]
    pid, kept = file.read_text().split()
    assert is_gone(int(pid))
    assert not Path(kept).exists()


def test_a_check_has_ended_when_its_process_has_whatever_it_left(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "END_S", 0.5)
    start = time.monotonic()
    found = run_check(check("leaves_a_fork"), multiprocessing.get_context("fork"), tmp_path / "log", lambda line: None)
    assert found.result == "pass"
    assert time.monotonic() - start < HANGS_S / 2
    assert is_gone(int(found.figures[0].text))


@pytest.mark.parametrize(
    ("value", "sign", "bar", "holds"),
    [(1.0, "<=", 1.0, True), (1.1, "<=", 1.0, False), (2.0, ">=", 1.0, True), (3.0, "==", 3.0, True)],
)
def test_a_bar_holds_or_is_missed_and_not_a_number_misses_every_bar(value, sign, bar, holds):
    found = []
    findings = Findings(found.append)
    findings.bar("x", value, sign, bar)
    findings.bar("x", float("nan"), sign, bar)
    assert [message.content.holds for message in found] == [holds, False]


def test_the_table_has_a_line_per_check_and_its_data_are_the_same(tmp_path):
    cells = "a | b <i>"
    outcomes = [
        Outcome("environment", "versions", "cuda, bfloat16", 1.0, [Figure("1 x Card")]),
        Outcome("one", "first", "cuda, bfloat16", 2.0, [Figure(cells), Figure("gap 2 (<= 1)", False, {"gap": 2.0})]),
        Outcome("two", "second", reason="needs 2 GPUs", is_skipped=True),
    ]
    run = Run(outcomes, "2026-11-27", 90.0)
    run.write(tmp_path / "a" / "table.md")
    assert (tmp_path / "a" / "table.md").read_text() == (
        "### 1 x Card\n\n2026-11-27, 1.5 minutes: 1 fail, 1 not here, 1 pass.\n\n"
        "| check | device | result | figures |\n|---|---|---|---|\n"
        "| `environment`<br>versions | cuda, bfloat16 | pass | 1 x Card |\n"
        "| `one`<br>first | cuda, bfloat16 | **fail** | **gap 2 (<= 1)**<br>a \\| b &lt;i> |\n"
        "| `two`<br>second | - | not here | needs 2 GPUs |\n"
    )
    data = json.loads((tmp_path / "a" / "table.json").read_text())
    assert [each["result"] for each in data["checks"]] == ["pass", "fail", "not here"]
    assert data["checks"][1]["figures"][1] == {"text": "gap 2 (<= 1)", "holds": False, "values": {"gap": 2.0}}


def test_checks_are_chosen_by_name_and_a_wrong_name_lists_them():
    assert [each.name for each in chosen(["prefix", "logprobs"])] == ["environment", "logprobs", "prefix"]
    assert all(each.is_named for each in chosen(["fit"]))
    assert not any(each.is_named for each in chosen(None))
    assert len({each.name for each in CHECKS}) == len(CHECKS)
    with pytest.raises(SystemExit, match=r"--only nothing: there is no such check. There are environment, startup"):
        chosen(["nothing"])


def test_the_list_of_checks_costs_no_import_of_torch():
    code = "import sys, tests.gpu_check.__main__ as m; m.main(['--list']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(CHECKS)
