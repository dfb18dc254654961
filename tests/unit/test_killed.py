"""Runs that are killed within a step and resumed: `tests/killed.py` contains the runs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killed import CASES, NUM_STEPS

TIMES = {"sync/seconds", "perf/rollout_tokens_per_s", "epoch"}


@pytest.fixture(scope="module")
def done(forkserver, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    ended = forkserver.run("-m", "tests.killed", tiny_model, folder, timeout_s=400)
    assert ended.returncode == 0, ended.printed[-3000:]
    return folder


def rollouts(folder: Path, name: str, first: int, end: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [line for line in lines if first <= line["step"] < end]


def metrics(folder: Path, first: int) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"] and int(row["step"]) >= first]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, list) else one == other


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} ranks, {case[1]} updates")
def test_six_steps_are_three_a_kill_within_the_fourth_and_a_resume(done, case):
    """Bit for bit: weights, optimizer, rollouts and metrics, with dropout."""
    folder, saved, (num_ranks, num_updates) = done / f"{case[0]}-{case[1]}", CASES[case], case
    straight, killed, resumed = (folder / name for name in ("straight", "killed", "resumed"))
    start, end, expected = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (killed, resumed, straight)
    )
    assert (start["global_step"], end["global_step"], expected["global_step"]) == (saved, NUM_STEPS, NUM_STEPS)
    assert not same(start["state_dict"], end["state_dict"])
    assert same(end["state_dict"], expected["state_dict"])
    assert same(end["optimizer_states"], expected["optimizer_states"])
    for name in ["rollouts.jsonl"] if num_ranks == 1 else ["rollouts.jsonl.rank0", "rollouts.jsonl.rank1"]:
        both = rollouts(killed, name, 0, saved) + rollouts(resumed, name, saved, NUM_STEPS)
        assert len(both) == NUM_STEPS // num_updates * 4 // num_ranks
        assert both == rollouts(straight, name, 0, NUM_STEPS)
    assert metrics(resumed, saved) == metrics(straight, saved)
    assert len(metrics(resumed, saved)) == NUM_STEPS - saved
