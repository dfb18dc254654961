"""Converts trainable rows to the micro-batches of one optimizer step. Only this module shifts, masks, pads and groups.

Shape letters: B rows of a micro-batch, T label positions.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, PrefixGroup, StepInfo
from fuchsia_pl.rollouts.bins import fill_bins
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Row

# Masks are made from lengths. No code compares ids with the padding id, which may also be the end-of-turn id.
PADDING_ID = 0
NO_ROWS = "none of the step's rollouts can be trained on: not scored, masked, too old, or in groups without spread"
NO_ADVANTAGE = "every advantage of the step is 0: the rewards do not differ"
# Adjacent rows of a micro-batch. Their prefix is computed once if the policy supports it.
Unit = Sequence[Sample]
# The units of a micro-batch: [] is a row of padding, and None a micro-batch that the step does not need.
MicroBatch = Sequence[Unit] | None
Array = NDArray[Any]
Ids = NDArray[np.int64]


def count_denominators(samples: Sequence[Sample], max_completion_tokens: int) -> Denominators:
    """Denominators of some rows that all enter the forward."""
    counts = [sample.row.num_sampled_tokens for sample in samples]
    num_rollouts = sum(count > 0 and sample.is_first for sample, count in zip(samples, counts, strict=True))
    return Denominators(sum(counts), num_rollouts, max_completion_tokens, sum(counts))


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
    num_forward = sum(sample.row.num_sampled_tokens for sample in effective)
    counts = torch.tensor([local.num_tokens, local.num_rollouts, num_forward, num_learnable], dtype=torch.int64)
    num_tokens, num_rollouts, num_forward, num_learnable = add_up(counts).tolist()
    reason = NO_ROWS if num_rollouts == 0 else NO_ADVANTAGE if num_learnable == 0 else None
    return Denominators(num_tokens, num_rollouts, max_completion_tokens, num_forward), reason


def num_used_tokens(row: Row) -> int:
    """Tokens of a row up to the last sampled token. Later tokens of the environment do not affect the loss."""
    behind = row.loss_mask[::-1].index(True) if True in row.loss_mask else 0
    return len(row.token_ids) - behind


def common_length(inputs: Sequence[Ids]) -> int:
    """Number of leading positions that are equal in all rows, at least 1, so that a row of padding has a prefix too."""
    common = inputs[0]
    for ids in inputs[1:]:
        length = min(len(common), len(ids))
        differing = np.flatnonzero(common[:length] != ids[:length])
        common = common[: differing[0] if len(differing) else length]
    return max(len(common), 1)


@dataclass(frozen=True)
class SizedUnit:
    """A unit with its inputs and its cost, which are computed once.

    Attributes:
        unit: The rows.
        inputs: Input ids of each row, int64 [number of input positions]; the last token of a row is no input.
        num_tokens: Tokens of the forward for these rows. A prefix of several rows counts once.

    >>> SizedUnit.of([np.array([1, 2, 5]), np.array([1, 2, 6, 7])], unit=[]).num_tokens
    5
    """

    unit: Unit
    inputs: Sequence[Ids]
    num_tokens: int

    @classmethod
    def of(cls, inputs: Sequence[Ids], unit: Unit) -> "SizedUnit":
        """Computes the cost of some rows."""
        total = sum(len(ids) for ids in inputs)
        return cls(unit, inputs, total - (len(inputs) - 1) * common_length(inputs) if len(inputs) > 1 else total)

    def halves(self) -> "list[SizedUnit]":
        """The first and the last rows as two units."""
        half = len(self.unit) // 2
        return [self.of(self.inputs[part], self.unit[part]) for part in (slice(half), slice(half, None))]

    def pieces(self, max_tokens: int) -> "list[SizedUnit]":
        """The unit, halved until each piece fits or is a single row."""
        if self.num_tokens <= max_tokens or len(self.unit) == 1:
            return [self]
        return [piece for half in self.halves() for piece in half.pieces(max_tokens)]


def sized_units(samples: Sequence[Sample], shares_prefix: bool) -> list[SizedUnit]:
    """Units that are assigned to micro-batches: the siblings of an item if they share a prefix, else single rows.

    Rows that a rewritten history began are together if they have the same number. Their first ids may still differ, and such
    rows have nothing in common.
    """
    if not shares_prefix:
        return [SizedUnit([sample], (), num_used_tokens(sample.row) - 1) for sample in samples]
    siblings: dict[tuple[int | None, ...], list[Sample]] = {}
    for sample in samples:
        key = (sample.rollout.item_index, sample.rollout.step, sample.row_number, sample.row.token_ids[0])
        siblings.setdefault(key, []).append(sample)
    return [SizedUnit.of([_input_ids(sample.row) for sample in unit], unit) for unit in siblings.values()]


def _input_ids(row: Row) -> Ids:
    return np.array(row.token_ids, dtype=np.int64)[: num_used_tokens(row) - 1]


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
    units = _halved(sized_units(samples, shares_prefix), num_micro_batches)
    max_units = math.ceil(len(units) / num_micro_batches)
    with_room = [(0, number) for number in range(num_micro_batches)]  # tokens so far and micro-batch, a heap
    for sized in sorted(units, key=lambda sized: sized.num_tokens, reverse=True):
        load, lightest = heapq.heappop(with_room)
        micro_batches[lightest].append(sized.unit)
        if len(micro_batches[lightest]) < max_units:
            heapq.heappush(with_room, (load + sized.num_tokens, lightest))
    return micro_batches


def _halved(units: Sequence[SizedUnit], number: int) -> list[SizedUnit]:
    """Units, of which the largest are halved until there are at least `number`, or single rows only."""
    found = dict(enumerate(units))
    largest = [(-sized.num_tokens, place) for place, sized in found.items() if len(sized.unit) > 1]
    heapq.heapify(largest)
    place = len(found)
    while largest and len(found) < number:
        for half in found.pop(heapq.heappop(largest)[1]).halves():
            found[place] = half
            if len(half.unit) > 1:
                heapq.heappush(largest, (-half.num_tokens, place))
            place += 1
    return list(found.values())


def split_filled(samples: Sequence[Sample], max_tokens: int, shares_prefix: bool) -> list[list[Unit]]:
    """Packs rows into as few micro-batches of at most `max_tokens` computed tokens as they fill.

    Siblings that share a prefix stay together unless they exceed `max_tokens` alone. Plain rows are padded to the longest of
    their micro-batch, and the padding counts, so rows of similar lengths are put together.

    Args:
        samples: The rows. One that is longer than `max_tokens` gets a micro-batch of its own.
        max_tokens: Largest number of computed tokens, padding included.
        shares_prefix: Whether the common prefix of siblings is computed once.
    """
    units = sized_units(samples, shares_prefix)
    if shares_prefix:
        pieces = [piece for sized in units for piece in sized.pieces(max_tokens)]
        bins = fill_bins([max(piece.num_tokens, 1) for piece in pieces], max_tokens)
        return [[pieces[place].unit for place in places] for places in bins]
    micro_batches: list[list[Unit]] = []
    longest = 0
    for sized in sorted(units, key=lambda sized: sized.num_tokens, reverse=True):
        if not micro_batches or (len(micro_batches[-1]) + 1) * longest > max_tokens:
            micro_batches.append([])
            longest = sized.num_tokens
        micro_batches[-1].append(sized.unit)
    return micro_batches


def make_batches(micro_batches: Sequence[MicroBatch], step: StepInfo) -> list[Batch]:
    """Makes the tensors of each micro-batch.

    A micro-batch without rows becomes a row of padding. It trains nothing, and every rank takes the same number of steps.
    None becomes a batch without any row, see `Batch.has_rows`.

    Args:
        micro_batches: This rank's rows, see `split_balanced` and `Forward.split`.
        step: Facts of the optimizer step.
    """
    return [_collate(micro_batch, step) for micro_batch in micro_batches]


def _collate(units: MicroBatch, step: StepInfo) -> Batch:
    samples = [sample for unit in units or () for sample in unit]
    own_rows = [sample.row for sample in samples]
    used = [num_used_tokens(row) for row in own_rows]
    length = max(used, default=2)
    num_rows = len(samples) or (0 if units is None else 1)

    # numpy converts a list of Python numbers several times as fast as torch.
    def rows(values: Callable[[Row], Sequence[float]], fill: float, dtype: type) -> Array:
        array: Array = np.full((num_rows, length), fill, dtype=dtype)
        for place, (row, size) in enumerate(zip(own_rows, used, strict=True)):
            array[place, :size] = np.array(values(row), dtype=dtype)[:size]
        return array

    def per_sampled_token(values: Callable[[Sample], Sequence[float] | None]) -> Tensor:
        array = np.zeros((num_rows, length - 1), dtype=np.float32)
        for row, sample in enumerate(samples):
            array[row, loss_mask[row]] = values(sample)
        return torch.from_numpy(array)

    token_ids = rows(lambda row: row.token_ids, PADDING_ID, np.int64)
    loss_mask = rows(lambda row: row.loss_mask, False, np.bool_)[:, 1:]
    has_values = all(sample.old_values is not None for sample in samples)  # true for a padding row, which needs none
    # The shift: inputs lose their last position, labels and all that belongs to them lose their first.
    return Batch(
        input_ids=torch.from_numpy(token_ids)[:, :-1],
        labels=torch.from_numpy(token_ids)[:, 1:],
        loss_mask=torch.from_numpy(loss_mask),
        sampling_logprobs=torch.from_numpy(rows(lambda row: row.sampling_logprobs, 0.0, np.float32))[:, 1:],
        advantages=per_sampled_token(lambda sample: sample.advantages),
        temperatures=torch.tensor([s.rollout.temperature for s in samples] or [1.0] * num_rows, dtype=torch.float32),
        lengths=tuple(size - 1 for size in used) or (1,) * num_rows,
        groups=_groups(units, token_ids, used) or (PrefixGroup(1, 1),) * num_rows,
        step=step,
        samples=tuple(samples),
        old_values=per_sampled_token(lambda sample: sample.old_values) if has_values else None,
        value_targets=per_sampled_token(lambda sample: sample.value_targets) if has_values else None,
        other_tokens=_other_tokens(samples),
    )


def _other_tokens(samples: Sequence[Sample]) -> Tensor | None:
    """See `Batch.other_tokens`."""
    counts = [sample.rollout.num_sampled_tokens - sample.row.num_sampled_tokens for sample in samples]
    return torch.tensor(counts, dtype=torch.int64) if any(counts) else None


def _groups(units: MicroBatch, token_ids: Array, used: Sequence[int]) -> tuple[PrefixGroup, ...]:
    groups, first = [], 0
    for unit in units or ():
        inputs = [token_ids[row, : used[row] - 1] for row in range(first, first + len(unit))]
        groups.append(PrefixGroup(len(unit), common_length(inputs)))
        first += len(unit)
    return tuple(groups)
