"""The probe of a sync at `beta: 0`: its forward against forward and backward of a step, in one process."""

import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from fuchsia_pl.callbacks.adapter_sync import PROBED_TOKENS
from fuchsia_pl.policy.policy import Policy
from tests.bench.training import batches_of, make_policy, rows, run
from tests.bench.work import report

NUM_ROUNDS, NUM_MICRO_BATCHES = 3, 2


def seconds(work: Callable[[], object]) -> float:
    """Median seconds of processor time."""
    found = []
    for _ in range(NUM_ROUNDS + 1):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found[1:])


def main() -> None:
    dtype = os.environ.get("DTYPE", "bfloat16")
    policy: Policy = make_policy(True, dtype)
    batches = batches_of(policy, rows(8, 40, 24), NUM_MICRO_BATCHES)
    step = seconds(lambda: run(policy, batches, getattr(torch, dtype)))
    found = {}
    for name, probed in (("micro_batch", batches[-1]), ("part", batches[-1].head(PROBED_TOKENS))):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            found[name] = seconds(lambda probed=probed: policy.reference_logprobs(probed)) / step
        sys.stderr.write(f"{name}: {int(probed.loss_mask.sum())} tokens, {found[name]:.3f} of {step:.2f} s\n")
    report(probe_share=found["part"], micro_batch_probe_share=found["micro_batch"])


if __name__ == "__main__":
    main()
