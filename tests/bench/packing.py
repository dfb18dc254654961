"""Packing of a step's rows: seconds and their growth, and the share of a budget of tokens that its micro-batches use."""

import math
import random
import time
from collections.abc import Callable
from statistics import mean

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced, split_filled
from fuchsia_pl.samples import Sample
from tests.bench.work import report
from tests.doubles import make_sample

GROUP, PROMPT, BUDGET, VOCABULARY, NUM_ROUNDS = 8, 300, 16_384, 150_000, 9


def rows(num_groups: int, lengths: Callable[[random.Random], int], seed: int = 0) -> list[Sample]:
    """Siblings with random ids, a prompt of 300 tokens and random lengths."""
    numbers, samples = random.Random(seed), []
    for item in range(num_groups):
        prompt = [numbers.randrange(VOCABULARY) for _ in range(PROMPT)]
        for sibling in range(GROUP):
            sample = make_sample(prompt, [numbers.randrange(VOCABULARY) for _ in range(lengths(numbers))], 1.0)
            sample.rollout.item_index, sample.rollout.sibling = item, sibling
            samples.append(sample)
    return samples


def works(num_groups: int) -> dict[str, Callable[[], object]]:
    """Both ways to split rows of about 4,000 tokens, and making their tensors."""
    samples = rows(num_groups, lambda numbers: numbers.randint(3_400, 4_000))
    step = StepInfo(0, count_denominators(samples, 4_000), 0)
    parts = split_filled(samples, BUDGET, True)
    return {
        "packing_filled": lambda: split_filled(samples, BUDGET, True),
        "packing_balanced": lambda: split_balanced(samples, len(samples), True),
        "packing_tensors": lambda: make_batches(parts, step),
    }


def costs() -> dict[str, float]:
    """Seconds of the processor for 512 rows, and how many times as long twice as many take: the fastest of some rounds."""
    both = [works(64), works(128)]
    found: dict[str, list[float]] = {name: [math.inf, math.inf] for name in both[0]}
    for _ in range(NUM_ROUNDS):
        for size, work in enumerate(both):
            for name, call in work.items():
                start = time.process_time()
                call()
                found[name][size] = min(found[name][size], time.process_time() - start)
    seconds = {f"{name}_s": once for name, (once, _) in found.items()}
    return {**seconds, **{f"{name}_growth": twice / once for name, (once, twice) in found.items()}}


def used(seed: int) -> tuple[float, int]:
    """Share of the budget that 32 groups with completions of 50 to 512 tokens use, and the number of groups that are split."""
    samples = rows(32, lambda numbers: numbers.randint(50, 512), seed)
    batches = make_batches(split_filled(samples, BUDGET, True), StepInfo(0, count_denominators(samples, 512), 0))
    units = sum(len(batch.groups) for batch in batches)
    return sum(batch.num_computed_tokens(True) for batch in batches) / (len(batches) * BUDGET), units - 32


def main() -> None:
    shares, splits = zip(*(used(seed) for seed in range(20)), strict=True)
    report(**costs(), packing_used=mean(shares), packing_split=sum(splits))


if __name__ == "__main__":
    main()
