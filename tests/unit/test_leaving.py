"""User code that tries to end the process, at every place where it is called: the error names the place."""

import os
import sys
import threading
from pathlib import Path

import pytest
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.rollouts.calls import EnvironmentStepError
from fuchsia_pl.rollouts.scoring import RewardError
from fuchsia_pl.types import ConfigError
from tests.doubles import TINY, RecordedEngine, TinyEngine, TinyEnvironment, make_data, make_module, make_trainer
from tests.unit.test_cli import config

__all__ = ["config"]  # a fixture
ROOT = Path(__file__).parents[2]


def leave(how: str) -> None:
    """Tries to end the process."""
    if how == "exit":
        sys.exit(0)
    if how == "interrupt":
        raise KeyboardInterrupt
    os._exit(0)


class Leaving(TinyEnvironment):
    """Tries to end the process at one place, after a number of calls there."""

    def __init__(self, place: str, how: str, after: int = 0) -> None:
        super().__init__()
        self.place, self.how, self.left = place, how, after

        def even(rollouts, *args, **kwargs):
            self.at("reward")
            return [float(rollout.sibling) for rollout in rollouts]

        even.check_gold = lambda item: self.at("check_gold")
        even.close = lambda: self.at("closing a reward")
        self.reward_functions, self.reward_weights = [even], {}

    def at(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left < 0:
                leave(self.how)

    def train_items(self):
        self.at("train_items")
        return super().train_items()

    def validation_items(self):
        self.at("validation_items")
        return super().validation_items()

    def messages(self, item):
        self.at("messages")
        return super().messages(item)

    async def prepare(self):
        self.at("prepare")

    async def close(self):
        await super().close()
        self.at("close")

    async def open_rollout(self, rollout):
        self.at("open_rollout")

    def step_rollout(self, rollout):
        self.at("step_rollout")
        rollout.finish()

    async def close_rollout(self, rollout):
        self.at("close_rollout")

    def is_correct(self, rollout):
        self.at("is_correct")
        return True

    def reward_weight(self, name, step):
        self.at("reward_weight")
        return 1.0

    def counter_names(self):
        self.at("counter_names")
        return super().counter_names()


# The place, after how many calls (some are checked at the start), and the error.
PLACES = [
    ("train_items", 0, ConfigError),
    ("train_items", 1, ConfigError),
    ("validation_items", 0, ConfigError),
    ("validation_items", 1, ConfigError),
    ("messages", 0, ConfigError),
    ("messages", 26, ConfigError),
    ("check_gold", 0, ConfigError),
    ("prepare", 0, ConfigError),
    ("prepare", 1, EnvironmentStepError),
    ("open_rollout", 0, EnvironmentStepError),
    ("step_rollout", 0, EnvironmentStepError),
    ("close_rollout", 0, EnvironmentStepError),
    ("reward", 0, RewardError),
    ("reward_weight", 0, RuntimeError),
    ("is_correct", 0, RuntimeError),
    ("counter_names", 0, RuntimeError),
    ("close", 0, EnvironmentStepError),
    ("closing a reward", 0, EnvironmentStepError),
]
WORDS = {"exit": "SystemExit: 0", "interrupt": "KeyboardInterrupt", "end": r"SystemExit: os\._exit\(0\)"}
NAMES = {
    "reward": "the reward function 'even'",
    "check_gold": "the check of its gold answer",
    "messages": r"messages\(item\)",
    "closing a reward": r"Leaving\.close",
}


@pytest.mark.parametrize(("number", "place", "after", "error"), [(n, *place) for n, place in enumerate(PLACES)])
def test_a_run_whose_user_code_leaves_ends_and_names_the_place(tiny_model, tmp_path, number, place, after, error):
    how = list(WORDS)[number % len(WORDS)]
    before = set(threading.enumerate())
    # The environment does not respond to a truncated turn, so the engine of that place ends every turn.
    engine = RecordedEngine() if place == "step_rollout" else TinyEngine()
    environment = Leaving(place, how, after)
    data = make_data(make_module(tiny_model), engine, environment, batch_size=2, steps_per_epoch=1)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1.0)
    name = NAMES.get(place, rf"Leaving\.{place}\b.*")
    with pytest.raises(error, match=f"{name} raised {WORDS[how]}"):
        trainer.fit(make_module(tiny_model), datamodule=data)
    assert engine.__dict__.get("_model") is None  # it was closed, or never started
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "rollouts"]


def leaving_scheduler(optimizer: Optimizer) -> LRScheduler:
    """A learning-rate schedule that tries to end the process at its first step."""

    def factor(step: int) -> float:
        return leave("exit") if step else 1.0

    return LambdaLR(optimizer, factor)


class LeavingAtOnce(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        leave("exit")


@pytest.mark.parametrize(
    "words",
    [
        ["--data.environment", "tests.unit.test_leaving.LeavingAtOnce"],
        ["--model.lr_scheduler", "tests.unit.test_leaving.leaving_scheduler"],
    ],
)
def test_other_code_of_a_run_that_exits_with_success_is_a_failure(config, capsys, words):
    with pytest.raises(SystemExit) as caught:
        FuchsiaCLI(["fit", "--config", str(config), *words])
    assert caught.value.code == 1
    assert "some code called sys.exit(0)" in capsys.readouterr().err


USER = """
import os
from tests.doubles import TinyEnvironment

def correct(rollouts, *args, **kwargs):
    os._exit(0)

class Mine(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [correct], {}
"""


def test_a_real_run_whose_reward_function_ends_the_process_fails_by_name(forkserver, tiny_model, tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "tiny.yaml").write_text(TINY % tiny_model)
    words = ["-m", "fuchsia_pl", "fit", "--config", "tiny.yaml", "--data.environment", "mine.Mine"]
    done = forkserver.run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "the reward function 'correct' raised SystemExit: os._exit(0) on item" in done.printed
