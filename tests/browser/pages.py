"""Data of made-up runs, in the form that the report's page takes. Equal seeds give equal data."""

import random
from pathlib import Path
from typing import Any

from fuchsia_pl.report.page.render import render_page

WORDS = [
    "the",
    "sum",
    "of",
    "two",
    "numbers",
    "is",
    "found",
    "by",
    "adding",
    "tens",
    "and",
    "then",
    "units",
    "so",
    "we",
    "get",
    "12",
    "plus",
    "30",
    "equals",
    "42",
    ".",
]
Summary = dict[str, Any]
Row = dict[str, Any]


def make_run(name: str = "quickstart/0", num_steps: int = 25, seed: int = 0, **changes: Any) -> Summary:
    """A run whose reward rises from 0.1 to about 0.75."""
    draw = random.Random(seed)
    share = [step / max(1, num_steps - 1) for step in range(num_steps)]
    metrics = {
        "reward/mean": [0.1 + 0.65 * s + draw.gauss(0, 0.04) for s in share],
        "reward/correct": [0.1 + 0.6 * s + draw.gauss(0, 0.04) for s in share],
        "reward/format": [min(1.0, 0.4 + 0.6 * s + draw.gauss(0, 0.02)) for s in share],
        "rollout/accuracy": [0.1 + 0.6 * s + draw.gauss(0, 0.04) for s in share],
        "rollout/completion_tokens": [24 - 10 * s + draw.gauss(0, 0.6) for s in share],
        "rollout/truncated_fraction": [max(0.0, 0.3 - 0.4 * s) for s in share],
        "rollout/zero_variance_groups": [float(draw.randint(0, 4)) for _ in share],
        "train/kl": [0.65 * s + draw.gauss(0, 0.01) for s in share],
        "train/entropy": [1.4 - 0.9 * s + draw.gauss(0, 0.03) for s in share],
        "train/clip_fraction": [abs(draw.gauss(0.01, 0.006)) for _ in share],
        "train/logprob_gap": [0.03 + abs(draw.gauss(0, 0.006)) for _ in share],
        "train/sampler_weight": [1 + draw.gauss(0, 0.004) for _ in share],
        "train/sampler_ratio": [1 + draw.gauss(0, 0.006) for _ in share],
        "train/grad_norm": [0.4 + abs(draw.gauss(0, 0.1)) for _ in share],
        "train/loss": [draw.gauss(0, 0.02) for _ in share],
        "sync/seconds": [0.23 + abs(draw.gauss(0, 0.02)) for _ in share],
        "perf/rollout_seconds": [1.9 + abs(draw.gauss(0, 0.2)) for _ in share],
        "perf/train_seconds": [1.35 + abs(draw.gauss(0, 0.2)) for _ in share],
        "perf/step_seconds": [3.9 + abs(draw.gauss(0, 0.2)) for _ in share],
        "perf/rollout_tokens_per_s": [700 + draw.gauss(0, 30) for _ in share],
        "perf/train_tokens_per_s": [1500 + draw.gauss(0, 60) for _ in share],
        "perf/memory_gb": [6.1 + 0.2 * s for s in share],
        "count/tool_calls": [float(draw.randint(0, 9)) for _ in share],
    }
    run = {
        "name": name,
        "folder": f"runs/{name}",
        "status": {
            "outcome": "finished",
            "words": f"Finished after {num_steps} steps.",
            "reason": "",
            "step": num_steps,
            "max_steps": num_steps,
            "started_at": "2026-11-27T01:00:00+00:00",
            "ended_at": "2026-11-27T01:03:20+00:00",
            "seconds": 200.0,
            "seconds_left": None,
        },
        "warnings": [],
        "steps": list(range(1, num_steps + 1)),
        "metrics": metrics,
        "evaluations": [evaluation(step, step / max(1, num_steps)) for step in range(0, num_steps + 1, 5)],
        "config": [
            {"key": "data.batch_size", "value": "8", "default": "4"},
            {"key": "data.group_size", "value": "8", "default": "8"},
            {"key": "model.objective.beta", "value": "0.02", "default": "0.0"},
            {"key": "model.policy.name", "value": "HuggingFaceTB/SmolLM2-135M-Instruct", "default": None},
            {"key": "trainer.max_steps", "value": str(num_steps), "default": "-1"},
            {"key": "trainer.gradient_clip_val", "value": "1.0", "default": "1.0"},
        ],
        "objective": "grpo: advantage (reward - mean of the group), token-level loss, clip 0.2, beta 0.02",
    }
    return {**run, **changes}


def evaluation(step: int, share: float, environment: str = "Arithmetic") -> dict[str, Any]:
    middle = {"rollout/accuracy": 0.156, "reward/mean": 0.17, "pass@1": 0.15, "pass@4": 0.35, "maj@4": 0.2}
    figures = {
        name: {"value": value + 0.5 * share, "low": value + 0.5 * share - 0.09, "high": value + 0.5 * share + 0.1}
        for name, value in middle.items()
    }
    figures["completion_tokens"] = {"value": 24 - 10 * share, "low": 23 - 10 * share, "high": 25 - 10 * share}
    return {
        "step": step,
        "split": "validation",
        "environment": environment,
        "num_items": 64,
        "num_samples": 4,
        "figures": figures,
    }


def make_summary(*runs: Summary, **changes: Any) -> Summary:
    return {
        "format": 1,
        "generated_at": "2026-11-27T01:03:21+00:00",
        "version": "0.1.0",
        "runs": list(runs) or [make_run()],
        "num_rollouts": 0,
        "num_shown": 0,
        "shown_words": "",
        **changes,
    }


def make_row(step: int, item: int, sibling: int, draw: random.Random, num_tokens: int = 24) -> Row:
    """A rollout of one turn. Its prompt and item are those of its number."""
    tokens = [draw.choice(WORDS) if i == 0 else " " + draw.choice(WORDS) for i in range(num_tokens)]
    correct = float(draw.random() < 0.1 + 0.02 * step)
    return {
        "id": f"train-{step}-{item}-{sibling}",
        "split": "train",
        "step": step,
        "item": item,
        "item_row": item,
        "prompt": item,
        "environment": 0,
        "sibling": sibling,
        "status": "truncated" if draw.random() < 0.06 else "completed",
        "reward": correct + 0.1 * draw.randint(0, 2),
        "rewards": [correct, round(draw.random(), 2)],
        "advantage": None,
        "version": step - 1,
        "parts": [
            {
                "role": "assistant",
                "policy": True,
                "text": "".join(tokens),
                "tokens": tokens,
                "gaps": [round(draw.gauss(0, 0.04), 4) for _ in tokens],
            }
        ],
    }


def make_rollouts(num_groups: int = 40, group_size: int = 8, num_items: int = 20, **changes: Any) -> dict[str, Any]:
    draw = random.Random(1)
    numbers = [(draw.randint(1, 50), draw.randint(1, 50)) for _ in range(num_items)]
    rows = [
        make_row(1 + group // num_items, group % num_items, sibling, draw)
        for group in range(num_groups)
        for sibling in range(group_size)
    ]
    for start in range(0, len(rows), group_size):
        siblings = rows[start : start + group_size]
        mean = sum(row["reward"] for row in siblings) / len(siblings)
        for row in siblings:
            row["advantage"] = round(row["reward"] - mean, 4)
    return {
        "prompts": [f"You add numbers. Answer with the sum.\n\nQ: {a} + {b} =" for a, b in numbers],
        "items": [f'{{"a": {a}, "b": {b}, "answer": "{a + b}"}}' for a, b in numbers],
        "environments": ["Arithmetic"],
        "reward_names": ["correct", "format"],
        "rows": rows,
        **changes,
    }


def write_page(file: Path, summary: Summary | None = None, rollouts: dict[str, Any] | None = None) -> str:
    """Writes a report and returns its address."""
    rollouts = make_rollouts() if rollouts is None else rollouts
    count = len(rollouts["rows"])
    summary = make_summary(num_rollouts=count, num_shown=count) if summary is None else summary
    file.write_text(render_page("quickstart/0", summary, rollouts), encoding="utf-8")
    return file.as_uri()
