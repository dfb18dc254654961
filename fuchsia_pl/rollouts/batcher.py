"""Converts trainable rows to the micro-batches of one optimizer step. Only this module shifts, masks, pads and groups.

Shape letters: B rows of a micro-batch, T label positions.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, PrefixGroup, StepInfo
from fuchsia_pl.types import Rollout, Sample

# Masks are made from lengths. No code compares ids with the padding id, which may also be the end-of-turn id.
PADDING_ID = 0
NO_ROWS = "none of the step's rollouts can be trained on: not scored, masked, too old, or in groups without spread"
NO_ADVANTAGE = "every advantage of the step is 0: the rewards do not differ"
# Adjacent rows of a micro-batch. Their prefix is computed once if the policy supports it.
Unit = Sequence[Sample]


def count_denominators(samples: Sequence[Sample], max_completion_tokens: int) -> Denominators:
    """Denominators of some rows that all enter the forward."""
    counts = [sample.rollout.num_sampled_tokens for sample in samples]
    return Denominators(sum(counts), sum(count > 0 for count in counts), max_completion_tokens, sum(counts))


def count_over_ranks(
    samples: Sequence[Sample],
    effective: Sequence[Sample],
    max_completion_tokens: int,
    add_up: Callable[[Tensor], Tensor],
) -> tuple[Denominators, str | None]:
    """A step's denominators over all ranks, and a reason to skip the step, None without one.

    Args:
        samples: This rank's rows.
        effective: The rows that enter the forward.
        max_completion_tokens: Longest completion, in tokens.
        add_up: Sums a tensor over all ranks.
    """
    local = count_denominators(samples, max_completion_tokens)
    num_learnable = sum(any(sample.advantages) or sample.old_values != sample.value_targets for sample in samples)
    num_forward = sum(sample.rollout.num_sampled_tokens for sample in effective)
    counts = torch.tensor([local.num_tokens, local.num_rows, num_forward, num_learnable], dtype=torch.int64)
    num_tokens, num_rows, num_forward, num_learnable = add_up(counts).tolist()
    reason = NO_ROWS if num_rows == 0 else NO_ADVANTAGE if num_learnable == 0 else None
    return Denominators(num_tokens, num_rows, max_completion_tokens, num_forward), reason


def num_used_tokens(rollout: Rollout) -> int:
    """Tokens of a row up to the last sampled token. Later tokens of the environment do not affect the loss."""
    behind = rollout.loss_mask[::-1].index(True) if True in rollout.loss_mask else 0
    return len(rollout.token_ids) - behind


def prefix_length(samples: Sequence[Sample]) -> int:
    """Number of leading input positions that are equal in all rows. The last token of a row is no input."""
    rollouts = [sample.rollout for sample in samples]
    inputs = zip(*(rollout.token_ids[: num_used_tokens(rollout) - 1] for rollout in rollouts), strict=False)
    # At least 1, so that a row of padding has a prefix too.
    return max(sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, inputs)), 1)


def num_computed_tokens(unit: Unit, shares_prefix: bool) -> int:
    """Tokens of the forward for some rows."""
    total = sum(num_used_tokens(sample.rollout) - 1 for sample in unit)
    return total - (len(unit) - 1) * prefix_length(unit) if shares_prefix and len(unit) > 1 else total


def split_units(samples: Sequence[Sample], num_micro_batches: int, shares_prefix: bool) -> list[Unit]:
    """Units that are assigned to micro-batches: the siblings of an item if they share a prefix, else single rows.

    The largest units are halved until there are at least `num_micro_batches`.
    """
    if not shares_prefix:
        return [[sample] for sample in samples]
    siblings: dict[tuple[int, int | None], list[Sample]] = {}
    for sample in samples:
        siblings.setdefault((sample.rollout.item_index, sample.rollout.step), []).append(sample)
    units: list[Unit] = list(siblings.values())
    while units and len(units) < num_micro_batches and max(len(unit) for unit in units) > 1:
        largest = max((unit for unit in units if len(unit) > 1), key=lambda unit: num_computed_tokens(unit, True))
        units.remove(largest)
        units += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return units


def split_balanced(samples: Sequence[Sample], num_micro_batches: int, shares_prefix: bool = False) -> list[list[Unit]]:
    """Splits rows into exactly `num_micro_batches` micro-batches with about the same number of computed tokens.

    Units are placed from the largest to the smallest, each into the micro-batch with the fewest tokens so far
    (longest-processing-time rule) among those with fewer units than their share. The limit keeps every micro-batch at or below
    the size that it would have if all rows had the greatest length.

    Args:
        samples: The rows.
        num_micro_batches: Number of micro-batches.
        shares_prefix: Whether the common prefix of siblings is computed once.
    """
    micro_batches: list[list[Unit]] = [[] for _ in range(num_micro_batches)]
    loads = [0] * num_micro_batches
    units = split_units(samples, num_micro_batches, shares_prefix)
    max_units = math.ceil(len(units) / num_micro_batches)
    for unit in sorted(units, key=lambda unit: num_computed_tokens(unit, shares_prefix), reverse=True):
        with_room = [n for n in range(num_micro_batches) if len(micro_batches[n]) < max_units]
        lightest = min(with_room, key=lambda n: loads[n])
        micro_batches[lightest].append(unit)
        loads[lightest] += num_computed_tokens(unit, shares_prefix)
    return micro_batches


def make_batches(micro_batches: Sequence[Sequence[Unit]], step: StepInfo) -> list[Batch]:
    """Makes the tensors of each micro-batch.

    A micro-batch without rows becomes a row of padding. It trains nothing, and every rank takes the same number of steps.

    Args:
        micro_batches: This rank's rows, see `split_balanced`.
        step: Facts of the optimizer step.
    """
    return [_collate(micro_batch, step) for micro_batch in micro_batches]


def _collate(units: Sequence[Unit], step: StepInfo) -> Batch:
    samples = [sample for unit in units for sample in unit]
    rollouts = [sample.rollout for sample in samples]
    used = [num_used_tokens(rollout) for rollout in rollouts]
    length = max(used, default=2)
    num_rows = max(len(samples), 1)

    def rows(values: Callable[[Rollout], Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        tensor = torch.full((num_rows, length), fill, dtype=dtype)
        for row, (rollout, size) in enumerate(zip(rollouts, used, strict=True)):
            tensor[row, :size] = torch.tensor(values(rollout)[:size], dtype=dtype)
        return tensor

    def per_sampled_token(values: Callable[[Sample], Sequence[float] | None]) -> Tensor:
        tensor = torch.zeros(num_rows, length - 1)
        for row, sample in enumerate(samples):
            tensor[row, loss_mask[row]] = torch.tensor(values(sample), dtype=torch.float32)
        return tensor

    token_ids = rows(lambda rollout: rollout.token_ids, PADDING_ID, torch.int64)
    loss_mask = rows(lambda rollout: rollout.loss_mask, False, torch.bool)[:, 1:]
    has_values = all(sample.old_values is not None for sample in samples)  # true for a padding row, which needs none
    # The shift: inputs lose their last position, labels and all that belongs to them lose their first.
    return Batch(
        input_ids=token_ids[:, :-1],
        labels=token_ids[:, 1:],
        loss_mask=loss_mask,
        sampling_logprobs=rows(lambda rollout: rollout.sampling_logprobs, 0.0, torch.float32)[:, 1:],
        advantages=per_sampled_token(lambda sample: sample.advantages),
        temperatures=torch.tensor([rollout.temperature for rollout in rollouts] or [1.0], dtype=torch.float32),
        lengths=tuple(size - 1 for size in used) or (1,),
        groups=tuple(PrefixGroup(len(unit), prefix_length(unit)) for unit in units) or (PrefixGroup(1, 1),),
        step=step,
        samples=tuple(samples),
        old_values=per_sampled_token(lambda sample: sample.old_values) if has_values else None,
        value_targets=per_sampled_token(lambda sample: sample.value_targets) if has_values else None,
    )
