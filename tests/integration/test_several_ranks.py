"""The quickstart on two ranks, each with its own vLLM, as a user runs it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuchsia_pl.library.arithmetic import Arithmetic, last_integer
from tests.integration.held_out import greedy_answers
from tests.machine import OVERLAY

pytestmark = pytest.mark.engine
SMALL = """--trainer.max_steps 5 --data.steps_per_epoch 5 --data.batch_size 4 --data.sampling.group_size 4
--data.engine.init_args.kv_cache_gb 0.4 --model.optimizer.init_args.lr 1e-3 --trainer.num_sanity_val_steps 0"""
OVERLAYS = {"ddp": [], "fsdp": ["--config", "overlays/fsdp.yaml"]}


@pytest.fixture(scope="module", params=list(OVERLAYS))
def run(request, tmp_path_factory) -> Path:
    """The folder of five steps on two ranks."""
    root = tmp_path_factory.mktemp(request.param)
    command = [
        str(Path(sys.executable).parent / "fuchsia"),
        "fit",
        "--config",
        "quickstart.yaml",
        *OVERLAY,
        *OVERLAYS[request.param],
    ]
    command += ["--trainer.devices", "2", *SMALL.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return root / "runs/quickstart/0"


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for rank in (0, 1) for line in (run / f"{name}.rank{rank}").read_text().splitlines()]


def test_each_rank_samples_its_share_and_groups_never_cross_ranks(run):
    shares = [
        [json.loads(line) for line in (run / f"rollouts.jsonl.rank{rank}").read_text().splitlines()] for rank in (0, 1)
    ]
    for step in range(5):
        items = [{line["item_index"] for line in share if line["step"] == step} for share in shares]
        assert [len(of_rank) for of_rank in items] == [2, 2]
        assert not items[0] & items[1]
    assert {line["policy_version"] - line["step"] for line in lines(run, "rollouts.jsonl")} == {0}
    with (run / "metrics.csv").open() as stream:
        assert len([row for row in csv.DictReader(stream) if row["train/loss"]]) == 5


@pytest.fixture(scope="module")
def answers_of_the_base() -> list[str]:
    return greedy_answers(None)


def test_the_adapter_reloaded_elsewhere_says_what_the_engines_said(run, answers_of_the_base):
    """Greedy answers of the trained policy by vLLM on both ranks, and by plain transformers from the export."""
    said = {
        line["item_index"]: line["completion"]
        for line in lines(run, "rollouts-validation.jsonl")
        if line["policy_version"] == 5
    }
    assert len(said) == 64
    by_adapter, by_base = greedy_answers(run / "adapter"), answers_of_the_base
    # Rounding in bfloat16 changes a few greedy answers.
    assert sum(said[n] == by_adapter[n] for n in said) >= 48
    assert sum(said[n] == by_base[n] for n in said) < 32
    sums = [item["a"] + item["b"] for item in Arithmetic().validation_items()]
    right = [sum(last_integer(answers[n]) == sums[n] for n in said) for answers in (said, by_adapter)]
    assert abs(right[0] - right[1]) <= 6
