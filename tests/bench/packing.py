"""Packing of a step's rows: seconds and their growth, and the share of a budget of tokens that its micro-batches use."""

import random
import time
from collections.abc import Callable
from statistics import mean

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced, split_filled
from fuchsia_pl.types import Sample
from tests.bench.work import report
from tests.doubles import make_sample

GROUP, PROMPT, BUDGET, VOCABULARY, NUM_ROUNDS = 8, 300, 16_384, 150_000, 5


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


def seconds(work: Callable[[], object]) -> float:
    """The fastest of a few rounds, in seconds of the processor."""
    found = []
    for _ in range(NUM_ROUNDS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def costs(num_groups: int) -> dict[str, float]:
    """Seconds of both ways to split rows of about 4,000 tokens, and of making their tensors."""
    samples = rows(num_groups, lambda numbers: numbers.randint(3_400, 4_000))
    step = StepInfo(0, count_denominators(samples, 4_000), 0)
    parts = split_filled(samples, BUDGET, True)
    return {
        "packing_filled": seconds(lambda: split_filled(samples, BUDGET, True)),
        "packing_balanced": seconds(lambda: split_balanced(samples, len(samples), True)),
        "packing_tensors": seconds(lambda: make_batches(parts, step)),
    }


def used(seed: int) -> tuple[float, int]:
    """Share of the budget that 32 groups with completions of 50 to 512 tokens use, and the number of groups that are split."""
    samples = rows(32, lambda numbers: numbers.randint(50, 512), seed)
    batches = make_batches(split_filled(samples, BUDGET, True), StepInfo(0, count_denominators(samples, 512), 0))
    units = sum(len(batch.groups) for batch in batches)
    return sum(batch.num_computed_tokens(True) for batch in batches) / (len(batches) * BUDGET), units - 32


def main() -> None:
    once, twice = costs(64), costs(128)
    found = [used(seed) for seed in range(20)]
    report(
        **{f"{name}_s": value for name, value in once.items()},
        **{f"{name}_growth": twice[name] / value for name, value in once.items()},
        packing_used=mean(share for share, _ in found),
        packing_split=sum(number for _, number in found),
    )


if __name__ == "__main__":
    main()
