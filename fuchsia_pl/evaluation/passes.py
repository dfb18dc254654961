"""Figures of several samples of one item: pass@k and maj@k."""

from collections import Counter
from collections.abc import Sequence
from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374): 1 - C(n - c, k) / C(n, k).

    It is the share of the subsets of `k` of the samples that contain a correct one.

    Args:
        num_samples: Samples n of the item.
        num_correct: Correct ones c among them.
        k: Number of tries.

    Raises:
        ValueError: There are fewer samples than `k`.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 to {num_samples} tries: the item has {num_samples} samples")
    # Whole numbers of any size are exact, so only the division is rounded.
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def pass_sizes(num_samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two, and the number of samples.

    >>> pass_sizes(1), pass_sizes(6), pass_sizes(8)
    ([1], [1, 2, 4, 6], [1, 2, 4, 8])
    """
    powers = [2**exponent for exponent in range(num_samples.bit_length()) if 2**exponent < num_samples]
    return [*powers, num_samples]


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """The expected correctness of the most frequent answer of an item, maj@k.

    Samples without an answer do not vote. Of several most frequent answers, each is chosen with the same probability. Samples
    with the same answer may differ in correctness, for example by their form; then the chosen answer counts by the share of
    them that is correct.

    Args:
        answers: The answer of each sample, None for a sample without one.
        correct: Whether each sample is correct.

    Returns:
        A number from 0 to 1; 0 if no sample has an answer.

    >>> majority_correct(["7", "8", "7"], [True, False, True]), majority_correct(["7", "8", None], [True, False, False])
    (1.0, 0.5)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, number in votes.items() if number == most}
    right = sum(is_right for answer, is_right in zip(answers, correct, strict=True) if answer in winners)
    # All winners have the same number of votes, so the mean of their shares is the share of all their samples.
    return right / (most * len(winners))
