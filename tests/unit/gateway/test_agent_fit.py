"""`fuchsia fit` with an agent that rewrites its history."""

import csv
import json
from pathlib import Path

import yaml

from fuchsia_pl.cli import FuchsiaCLI
from tests.doubles import TINY


def config(tiny_model) -> str:
    settings = yaml.safe_load(TINY % tiny_model)
    settings["trainer"]["max_steps"] = settings["data"]["steps_per_epoch"] = 3
    settings["data"]["batch_size"] = 4
    settings["data"]["sampling"] |= {"max_completion_tokens": 9, "max_length": 80}
    arguments = {"entry": "tests.agents:branching", "rewards": ["tests.agents:even_ids"], "train_file": "train.jsonl"}
    settings["data"]["environment"] = {
        "class_path": "fuchsia_pl.gateway.AgentEnvironment",
        "init_args": {**arguments, "settings": {"max_rows": 2, "timeout_s": 60.0}},
    }
    return yaml.safe_dump(settings)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_three_steps_train_every_row_of_an_agent_once_and_repeat_bit_for_bit(tiny_model, command_folder):
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(12)))
    Path("agent.yaml").write_text(config(tiny_model))
    folders = [FuchsiaCLI(["fit", "--config", "agent.yaml"]).run_folder for _ in range(2)]
    first, second = (lines_of(folder / "rollouts.jsonl") for folder in folders)
    assert first == second
    # 3 steps of 4 items of 2 siblings; each rollout has two turns in its first row and one in its second.
    assert sorted((line["step"], line["row"]) for line in first) == sorted(
        (step, row) for step in range(3) for row in (0, 1) for _ in range(8)
    )
    assert {(line["row"], len(line["tokens"])) for line in first} == {(0, 2), (1, 1)}
    assert all(line["status"] == "completed" for line in first)
    by_rollout: dict[tuple, list[dict]] = {}
    for line in first:
        by_rollout.setdefault((line["step"], line["item_index"], line["sibling"]), []).append(line)
    for rows in by_rollout.values():
        assert (
            len({(round(row["advantage"], 9), row["reward"]) for row in rows}) == 1
        )  # the mean over tokens has a rounding
        ids = [
            token
            for row in rows
            for token, kept in zip(row["completion_ids"], row["completion_mask"], strict=True)
            if kept
        ]
        assert rows[0]["reward"] == sum(token % 2 == 0 for token in ids) / len(ids)
    trained = {(line["step"], line["item_index"], line["sibling"], line["row"]) for line in first if line["advantage"]}
    gaps = lines_of(folders[0] / "gaps.jsonl")
    assert {(line["step"], line["item_index"], line["sibling"], line["row"]) for line in gaps} == trained
    assert max(abs(gap) for line in gaps for gap in line["gaps"]) < 1e-4
    with (folders[0] / "metrics.csv").open() as stream:
        metrics = [row for row in csv.DictReader(stream) if row["train/loss"]]
    assert [float(row["count/branches"]) for row in metrics] == [8.0] * 3
    assert [float(row["count/agent_requests"]) for row in metrics] == [24.0] * 3
    assert [float(row["rollout/turns"]) for row in metrics] == [3.0] * 3
    assert [float(row["rollout/untrained"]) for row in metrics] == [0.0] * 3
