"""Environments with the real model and real vLLM: those of the README unchanged, and those of the package."""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean

import psutil
import pytest

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from tests.contracts.test_readme import COMMANDS, write_files
from tests.envs.test_gsm8k import DATA
from tests.integration.kept_engine import KeptEngine
from tests.machine import OVERLAY

pytestmark = pytest.mark.engine
# Fewer and smaller steps than the configs' own, and one engine for all of them. Nothing of an environment is set here.
SMALL = [
    *("--data.engine", "tests.integration.kept_engine.KeptEngine", "--data.sampling.max_length", "1024"),
    *("--data.batch_size", "2", "--data.sampling.group_size", "2", "--trainer.accumulate_grad_batches", "1"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0", "--model.loss.loss_type", "grpo"),
]
CPU = ["--config", "overlays/cpu.yaml"]


@pytest.fixture(scope="module", autouse=True)
def engine_ends_with_the_file():
    yield
    KeptEngine.end()


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: None)

    def run(words: list[str], num_steps: int) -> tuple[list[dict[str, str]], list[dict]]:
        before = set(psutil.Process().children(recursive=True))
        cli = FuchsiaCLI([*words, *OVERLAY, *SMALL, "--trainer.max_steps", str(num_steps)])
        assert cli.trainer.global_step == num_steps
        ours = {p for p in set(psutil.Process().children(recursive=True)) - before if "tool" in " ".join(p.cmdline())}
        assert not ours  # the servers of the run have ended
        with (cli.run_folder / "metrics.csv").open() as stream:
            rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
        lines = (cli.run_folder / "rollouts.jsonl").read_text().splitlines()
        assert len(rows) == num_steps
        assert len(lines) == num_steps * 4
        assert all(float(row["train/logprob_gap"]) < 0.15 for row in rows)
        return rows, [json.loads(line) for line in lines]

    return run


def check_masks(rollout: dict) -> None:
    """Sampled tokens are where the mask is True, and decode to the texts of the turns."""
    assert len(rollout["completion_ids"]) == len(rollout["completion_mask"])
    num_turns = sum(message["role"] == "assistant" for message in rollout["messages"])
    mask = rollout["completion_mask"]
    assert sum(1 for i, kept in enumerate(mask) if kept and (i == 0 or not mask[i - 1])) <= num_turns


@pytest.mark.parametrize(
    ("module", "reward"), [("my_envs", "names_it"), ("my_games", "close"), ("my_tools", "correct")]
)
def test_the_environments_of_the_readme_train_as_they_stand_there(fit, module, reward):
    write_files(Path())
    (command,) = [command for command in COMMANDS if f"class_path {module}" in command and " fit " in command]
    rows, rollouts = fit(command.split()[1:], num_steps=2)
    assert all(row[f"reward/{reward}"] for row in rows)
    for rollout in rollouts:
        check_masks(rollout)
    if module == "my_games":
        assert max(float(row["rollout/turns"]) for row in rows) > 1
        assert any(message["content"] in ("Higher.", "Lower.") for r in rollouts for message in r["messages"])
    if module == "my_tools":
        assert all("count_letters" in rollout["prompt"] for rollout in rollouts)
        assert all(row["count/tool_calls"] for row in rows)


def test_an_environment_in_the_originals_shape_trains(fit):
    words = ["river", "stone", "comet", "willow", "ember"]
    lines = [json.dumps({"prompt": f"Tell me of the {word}.", "word": word}) for word in words]
    Path("train.jsonl").write_text("\n".join(lines))
    environment = ["--data.environment", "tests.integration.original.CustomEnvironment"]
    data = ["--data.environment.init_args.train_file", "train.jsonl"]
    rows, rollouts = fit(["fit", "--config", "quickstart.yaml", *environment, *data], num_steps=2)
    assert max(float(row["rollout/turns"]) for row in rows) > 1
    assert min(float(row["rollout/environment_tokens"]) for row in rows) > 0
    for rollout in rollouts:
        check_masks(rollout)
        assert rollout["rewards"].keys() == {"custom_reward_function"}


@pytest.mark.may_warn("all siblings have the same reward")  # two siblings of a model that solves few of these questions
@pytest.mark.skipif(not DATA.exists(), reason="the official files of GSM8K do not lie beside the checkout")
def test_gsm8k_trains_on_the_official_data(fit):
    files = ["--data.environment.init_args.train_file", str(DATA / "train.jsonl")]
    rows, rollouts = fit(["fit", "--config", "gsm8k.yaml", *CPU, *files], num_steps=5)
    assert all(row["reward/correct"] and row["reward/format"] and row["reward/number"] for row in rows)
    assert all(row["rollout/accuracy"] for row in rows)
    assert {rollout["item"].keys() == {"question", "answer"} for rollout in rollouts} == {True}


@pytest.mark.may_warn("all siblings have the same reward")
def test_function_calling_calls_its_interpreter(fit):
    """At least half of the rollouts call the tool: four worked examples before each question help the small model."""
    overlays = [*CPU, "--config", "overlays/examples.yaml"]
    rows, rollouts = fit(["fit", "--config", "function_calling.yaml", *overlays], num_steps=5)
    assert fmean(float(row["rollout/tool_use"]) for row in rows) >= 0.5
    assert sum(float(row["count/tool_ok"]) for row in rows) > 0
    assert all(row["rollout/accuracy"] for row in rows)
    right = [rollout for rollout in rollouts if rollout["rewards"]["correct"] == 1.0]
    assert right
    for rollout in rollouts:
        check_masks(rollout)
    # the interpreter computed it: the conversation contains the result before the answer
    assert any(rollout["item"]["answer"] in rollout["messages"][-2]["content"] for rollout in right)
