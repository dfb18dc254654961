"""`fuchsia check-env`, as the command runs it and with environments that pay for the wrong thing."""

import subprocess
import sys
from pathlib import Path

import pytest

from fuchsia_pl.cli import check_env as module
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.envs import SingleTurnEnvironment
from tests.doubles import TinyEnvironment

GOLD_RIGHT = "<answer>4</answer>"


def right(rollouts, *args, **kwargs):
    return [float(GOLD_RIGHT in r.completion) for r in rollouts]


class Right(TinyEnvironment):
    def __init__(self, reward=right, gold: bool = True) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights, self.gold = [reward], {}, gold
        self.timeout_s = 5.0

    def gold_turns(self, item):
        return [GOLD_RIGHT] if self.gold else None


class PaysForLength(Right):
    """A mistake as people make it: whatever is long enough is paid for."""

    def __init__(self) -> None:
        def long(rollouts, *args, **kwargs):
            return [min(len(r.completion), 100) / 10 for r in rollouts]

        super().__init__(long)


class Evaluates(Right):
    """The original's mistake: the answer is evaluated, and what is no number stops everything."""

    def __init__(self) -> None:
        def value(rollouts, *args, **kwargs):
            return [float(r.completion.removeprefix("<answer>").removesuffix("</answer>")) for r in rollouts]

        super().__init__(value)


class NoGold(Right):
    def __init__(self) -> None:
        super().__init__(gold=False)


class NoReward(SingleTurnEnvironment):
    """Has items and nothing to score them by."""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])

    def call(name: str, *more: str):
        words = ["--config", "quickstart.yaml", *more]
        words += ["--data.environment.class_path", f"tests.unit.test_check_env.{name}"]
        code = check_env([*words, "--num-items", "2"])
        return code, capsys.readouterr().out

    return call


def test_an_environment_that_holds(run, tmp_path):
    code, out = run("Right")
    assert code == 0
    assert out.endswith("Right: holds\n")
    assert "prompt of item" in out
    for name in ("gold", "truncated", *module.HOSTILE):
        assert name.split()[0] in out
    assert not Path("runs").exists()  # nothing ran, so nothing is left


def test_an_environment_that_pays_for_something_else_is_found_out(run):
    code, out = run("PaysForLength")
    assert code == 1
    assert "does not hold: 'brackets' on item" in out
    assert "earns 10, no less than the gold answer's 1.8" in out


def test_an_environment_that_hostile_text_stops_is_found_out(run):
    code, out = run("Evaluates")
    assert code == 1
    assert "'code' on item" in out
    assert "stopped the run: RewardError: the reward function 'value' raised ValueError" in out
    assert "does not count as right" not in out


def test_an_unknown_gold_answer_is_said(run):
    code, out = run("NoGold")
    assert code == 0
    assert "the gold answer is not known (override gold_turns)" in out


def test_what_cannot_be_checked_is_an_error(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("NoReward")
    assert caught.value.code == 2
    assert "NoReward.reward_functions is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        check_env(["--num-items", "0"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        run("Right", "--data.batch_sise", "3")
    assert caught.value.code == 2
    assert "Did you mean 'data.batch_size'?" in capsys.readouterr().err


def test_it_shows_the_prompts_that_the_chat_template_of_the_config_makes(run, tmp_path, capsys):
    _, out = run("Right")
    assert "<|im_start|>user" in out
    code, out = run("Right", "--model.policy.chat_template", "none")
    assert code == 0
    assert "<|im_start|>" not in out.partition("text")[0]  # the table below has a row of special tokens
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}Question: {{ m['content'] }}{% endfor %} Answer:")
    code, out = run("Right", "--model.policy.chat_template", "chat.jinja")
    assert code == 0
    assert "Question: " in out
    with pytest.raises(SystemExit) as caught:
        run("Right", "--model.policy.chat_template", "other.jinja")
    assert caught.value.code == 2
    assert "'other.jinja' is no template" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["quickstart.yaml", "countdown.yaml", "function_calling.yaml"])
def test_the_environments_that_come_with_it_hold(config, tmp_path):
    command = [
        Path(sys.executable).parent / "fuchsia",
        "check-env",
        "--config",
        config,
        "--config",
        "overlays/cpu.yaml",
    ]
    done = subprocess.run([*command, "--num-items", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": holds\n")
    assert list(tmp_path.iterdir()) == []
