"""Run folders without a run: files as a run writes them, made of a few numbers."""

import json
import random
from pathlib import Path
from typing import Any

from fuchsia_pl.run_record import RunRecord, write_record

WORDS = ["The", "answer", "is", "27", "plus", "35", ",", "so", "62", "because", "seven", "and", "five", "make", "."]
CONFIG = "data:\n  batch_size: 8\n  environment:\n    class_path: fuchsia_pl.library.arithmetic.Arithmetic\n"


def rollout_line(step: int, item: int, sibling: int, tokens: list[str], **changes: Any) -> dict[str, Any]:
    """A line of `rollouts.jsonl` with a completion of one turn."""
    said = "".join(tokens)
    question = f"What is {item} + 35?"
    line = {
        "step": step,
        "item_index": item,
        "item": {"a": item, "b": 35, "answer": item + 35},
        "sibling": sibling,
        "prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "completion": said,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}],
        "prompt_ids": list(range(20)),
        "completion_ids": list(range(len(tokens))),
        "completion_mask": [1] * len(tokens),
        "rewards": {"correct": 1.0},
        "reward": 1.0,
        "advantage": 0.5,
        "status": "completed",
        "counts": {},
        "policy_version": step,
        "policy_versions": [step] * len(tokens),
        "tokens": [tokens],
        "logprobs": [-0.5] * len(tokens),
    }
    return {**line, **changes}


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, num_steps: int = 2, num_items: int = 2, group_size: int = 2, num_held_out: int = 2) -> Path:
    """A finished training with tokens of random words, their advantages and gaps, and two evaluations."""
    numbers = random.Random(0)
    train, gaps, held_out = [], [], []
    for step in range(num_steps):
        for item in range(num_items):
            for sibling in range(group_size):
                tokens = [f" {numbers.choice(WORDS)}" for _ in range(numbers.randint(20, 30))]
                reward, advantage = float(numbers.random() < 0.5), numbers.gauss(0, 1)
                varied = [round(numbers.gauss(0, 1), 5) for _ in tokens]
                figures = {
                    "reward": reward,
                    "rewards": {"correct": reward},
                    "advantage": advantage,
                    "advantages": varied,
                }
                train.append(rollout_line(step, step * num_items + item, sibling, tokens, **figures))
                address = {name: train[-1][name] for name in ("step", "item_index", "sibling")}
                gaps.append({**address, "gaps": [round(numbers.gauss(0, 0.04), 5) for _ in tokens]})
    for step in (0, num_steps):
        for item in range(num_held_out):
            tokens = [f" {numbers.choice(WORDS)}" for _ in range(25)]
            held_out.append(rollout_line(step, item, 0, tokens, advantage=None))
    write_lines(folder / "rollouts.jsonl", train)
    write_lines(folder / "gaps.jsonl", gaps)
    write_lines(folder / "rollouts-validation.jsonl", held_out)
    columns = ["step", "reward/mean", *(f"perf/m{number}" for number in range(40)), "perf/step_seconds"]
    rows = [[step, *(f"{numbers.random():.17g}" for _ in columns[1:-1]), 8.0] for step in range(num_steps)]
    table = [columns, *rows]
    (folder / "metrics.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in table))
    (folder / "config.yaml").write_text(CONFIG)
    record(folder)
    return folder


def record(folder: Path, **changes: Any) -> None:
    """Writes `run.json` of a training of 25 steps that took 3 min 20 s."""
    facts = {"ended_at": "2026-01-02T03:07:25+00:00", "outcome": "finished", "step": 25, "max_steps": 25, **changes}
    write_record(folder, RunRecord("fit", "2026-01-02T03:04:05+00:00", "0.1.0", "host", pid=1, **facts))
