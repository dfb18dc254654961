"""`fuchsia check-env --all-tasks`: the audit of an environment's rewards as a command."""

import io

import pytest
from rich.console import Console

from fuchsia_pl.cli.audit_table import report_audit
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.envs.audit import Audited, Finding, FindingKind
from fuchsia_pl.envs.audit.environment_task import environment_task
from fuchsia_pl.envs.parts import Part
from fuchsia_pl.gateway import AgentEnvironment
from fuchsia_pl.library.arithmetic import Arithmetic
from fuchsia_pl.library.mixture import Mixture
from fuchsia_pl.types import ConfigError


@pytest.fixture
def run(command_folder, capsys):
    def call(class_path: str, *more: str):
        words = ["--config", "quickstart.yaml", "--data.environment.class_path", class_path]
        try:
            code = check_env([*words, *more, "--all-tasks", "--num-items", "2"])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_sound_environment_has_no_findings(run):
    code, out, _ = run("tests.unsound.Sums", "--data.environment.init_args.first", "3")
    assert code == 0
    assert "without findings: Sums\n" in out
    assert "audit: 0 findings in 0 of 1 tasks" in out


def test_a_reward_that_runs_an_event_loop_is_called_as_in_training(run):
    code, out, _ = run("tests.unsound.LoopedSums")
    assert code == 0, out
    assert "audit: 0 findings in 0 of 1 tasks" in out


def test_faults_of_an_environment_are_a_table_and_exit_code_1(run):
    code, out, _ = run("tests.unsound.EvaluatedSums")
    assert code == 1
    assert "evaluates text" in out
    assert "held-out items are" in out
    assert "audit: 2 findings in 1 of 1 tasks" in out
    assert "without findings: none\n" in out


def test_rollouts_of_several_turns_are_played_in_order(run):
    code, out, _ = run("tests.unsound.GuessedSums")
    assert code == 1
    assert "pays for junk" in out
    assert "'0'" in out
    assert "audit: 1 finding in 1 of 1 tasks" in out


def test_an_environment_that_another_process_cannot_make_is_a_finding(run):
    code, out, _ = run("tests.unsound.OnlyHere")
    assert code == 1
    assert "cannot be made" in out
    assert "FileNotFoundError" in " ".join(out.split())


def test_an_environment_with_tool_servers_is_refused_in_one_line(run):
    code, _, err = run("fuchsia_pl.library.function_calling.environment.FunctionCalling")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "FunctionCalling has tools, and an audit starts no tool servers" in line


def test_texts_of_a_reward_cannot_control_the_terminal():
    console = Console(file=io.StringIO(), width=200)
    finding = Finding(FindingKind.RAISES, "sums", "'x'", "ValueError: \x1b[2Jgone")
    report_audit(console, [Audited("sums", (finding,), ("sums: \x1b[2J",), num_played=3, seconds=0.1)])
    printed = console.file.getvalue()
    assert "\x1b" not in printed
    assert "\\x1b[2Jgone" in printed
    assert "not checked: sums: \\x1b[2J" in printed


def test_a_mixture_and_an_agent_are_refused_in_one_line():
    mixture = Mixture({"sums": Part(Arithmetic())})
    agent = AgentEnvironment(entry="tests.agents:talk", rewards=["tests.doubles:constant"])
    for environment in (mixture, agent):
        with pytest.raises(ConfigError, match="takes no answers of its own"):
            environment_task(environment, "a.Class", {})
