"""Foreign environments and any agent through `fuchsia fit`: three steps with the real engine and the quickstart's model.

The configs and modules are those that the pages show.
"""

import csv
import sys

import pytest

from fuchsia_pl.cli import FuchsiaCLI
from tests.contracts.test_readme import write_files
from tests.integration.kept_engine import KeptEngine
from tests.machine import OVERLAY

pytestmark = pytest.mark.engine
QUICKSTART = ["--config", "quickstart.yaml"]
GYM = ["--config", "reasoning_gym.yaml", "--config", "overlays/cpu.yaml"]
ENVIRONMENT = "--data.environment.class_path"
# Several environments in one run, whose items are drawn by their success.
MIXTURE = """
data:
  sampling: {curriculum: {band: [0.2, 0.8]}}
  environment:
    class_path: fuchsia_pl.library.mixture.Mixture
    init_args:
      parts:
        gym:
          environment:
            class_path: fuchsia_pl.library.reasoning_gym.ReasoningGym
            init_args: {num_items: 40, num_validation: 12, tasks: [{name: chain_sum}, {name: leg_counting}]}
          weight: 2
        tasks:
          environment:
            class_path: fuchsia_pl.library.verifiers.VerifiersEnvironment
            init_args: {taskset: my-taskset, num_validation: 8}
        guesses: {environment: {class_path: my_games.HigherLower}, max_turns: 3}
"""
# What runs, and columns of metrics.csv that show it.
RUNS = {
    "a mixture by success": (
        [*QUICKSTART, "--config", "mixture.yaml"],
        ["gym/reward/score", "tasks/rollout/turns", "guesses/reward/close", "curriculum/unseen"],
    ),
    "reasoning-gym by level": ([*GYM, "--config", "by_level.yaml"], ["curriculum/level_chain_sum", "reward/score"]),
    "rewards of turns": (
        [*QUICKSTART, ENVIRONMENT, "my_turns.Counting", "--model.loss.advantage", "turn_group"],
        ["reward/right"],
    ),
    "any agent": ([*QUICKSTART, ENVIRONMENT, "my_agent.MyAgent"], ["count/agent_requests"]),
}
SIZES = [
    *("--trainer.max_steps", "3", "--trainer.limit_val_batches", "0", "--trainer.accumulate_grad_batches", "1"),
    *("--data.batch_size", "4", "--data.sampling.group_size", "2", "--data.sampling.max_length", "768"),
]


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_with_the_real_engine(name, command_folder, monkeypatch):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("verifiers")
    write_files(command_folder)
    monkeypatch.syspath_prepend(str(command_folder))
    (command_folder / "mixture.yaml").write_text(MIXTURE)
    words, columns = RUNS[name]
    few = ["--data.environment.init_args.num_items", "40"] if words[: len(GYM)] == GYM else []
    engine = ["--data.engine", "tests.integration.kept_engine.KeptEngine"]
    cli = FuchsiaCLI(["fit", *words, *OVERLAY, *engine, *few, *SIZES])
    with (cli.run_folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(rows) == 3
    assert all(row[column] for row in rows for column in columns)
    assert all(float(row["train/logprob_gap"]) < 0.15 for row in rows)


@pytest.fixture(scope="module", autouse=True)
def engine_ends_with_the_file():
    yield
    KeptEngine.end()
    for module in ("my_turns", "my_agent", "my_games", "my_taskset"):
        sys.modules.pop(module, None)
