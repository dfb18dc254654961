"""From trainable rows to the micro-batches of one optimizer step. The one place that shifts, masks and pads.

Shape letters: B rows of a micro-batch, T label positions.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fuchsia_pl.types import Batch, Denominators, Rollout, Sample

# Masks come from lengths, so the padding id is never compared with anything, not even where it is the end-of-turn id.
PADDING_ID = 0


def count_denominators(samples: Sequence[Sample], max_completion_tokens: int) -> Denominators:
    """Counts what the losses of these samples are divided by."""
    counts = [sample.rollout.num_sampled_tokens for sample in samples]
    return Denominators(sum(counts), sum(count > 0 for count in counts), max_completion_tokens)


def split_balanced(samples: Sequence[Sample], num_parts: int) -> list[list[Sample]]:
    """Splits rows into exactly `num_parts` parts with about the same number of tokens.

    The longest row goes first, each to the part with the fewest tokens so far (longest-processing-time rule).
    """
    parts: list[list[Sample]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for sample in sorted(samples, key=lambda sample: len(sample.rollout.token_ids), reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest].append(sample)
        loads[lightest] += len(sample.rollout.token_ids)
    return parts


def make_batches(
    samples: Sequence[Sample],
    num_micro_batches: int,
    denominators: Denominators,
    policy_version: int,
    metrics: Mapping[str, float],
) -> list[Batch]:
    """Packs one optimizer step into exactly `num_micro_batches` micro-batches.

    A part without rows becomes a row of padding, which trains nothing but lets every rank take the same steps.

    Args:
        samples: This rank's rows.
        num_micro_batches: The trainer's `accumulate_grad_batches`.
        denominators: Of the whole step and all ranks.
        policy_version: The step whose weights sampled the rows.
        metrics: The step's rollout figures.
    """
    parts = split_balanced(samples, num_micro_batches)
    return [_collate(part, denominators, policy_version, metrics) for part in parts]


def _collate(
    samples: Sequence[Sample], denominators: Denominators, policy_version: int, metrics: Mapping[str, float]
) -> Batch:
    rollouts = [sample.rollout for sample in samples]
    length = max([len(rollout.token_ids) for rollout in rollouts], default=2)
    num_rows = max(len(samples), 1)

    def rows(values: Callable[[Rollout], Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        tensor = torch.full((num_rows, length), fill, dtype=dtype)
        for row, rollout in enumerate(rollouts):
            tensor[row, : len(rollout.token_ids)] = torch.tensor(values(rollout), dtype=dtype)
        return tensor

    def per_sampled_token(values: Callable[[Sample], Sequence[float] | None]) -> Tensor:
        tensor = torch.zeros(num_rows, length - 1)
        for row, sample in enumerate(samples):
            tensor[row, loss_mask[row]] = torch.tensor(values(sample), dtype=torch.float32)
        return tensor

    token_ids = rows(lambda rollout: rollout.token_ids, PADDING_ID, torch.int64)
    loss_mask = rows(lambda rollout: rollout.loss_mask, False, torch.bool)[:, 1:]
    has_values = all(sample.old_values is not None for sample in samples)  # a padding row has some, and needs none
    # The shift: inputs lose their last position, everything that belongs to labels its first.
    return Batch(
        input_ids=token_ids[:, :-1],
        labels=token_ids[:, 1:],
        loss_mask=loss_mask,
        sampling_logprobs=rows(lambda rollout: rollout.sampling_logprobs, 0.0, torch.float32)[:, 1:],
        advantages=per_sampled_token(lambda sample: sample.advantages),
        temperatures=torch.tensor([rollout.temperature for rollout in rollouts] or [1.0], dtype=torch.float32),
        denominators=denominators,
        policy_version=policy_version,
        samples=tuple(samples),
        metrics=metrics,
        old_values=per_sampled_token(lambda sample: sample.old_values) if has_values else None,
        value_targets=per_sampled_token(lambda sample: sample.value_targets) if has_values else None,
    )
