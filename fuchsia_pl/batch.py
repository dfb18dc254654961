"""The tensors of a micro-batch, the facts of its optimizer step, and what the model computes for them.

Shape letters: B rows of a micro-batch, T label positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Rollout


class StaleBatchError(RuntimeError):
    """A batch was sampled with weights other than those that it would train."""


@dataclass(frozen=True)
class Denominators:
    """Divisors of a loss, counted over one optimizer step and all ranks, never over one micro-batch.

    Attributes:
        num_tokens: Tokens that the policy sampled in the step's trainable rows.
        num_rollouts: Rollouts with at least one such token. Most are one row.
        max_completion_tokens: The configured bound of a completion's length.
        num_forward_tokens: Tokens of the rows that enter the forward; the divisor of metrics. Rows that cannot change any weight
            do not enter the forward, but count in the loss's mean.

    >>> Denominators(num_tokens=1500, num_rollouts=64, max_completion_tokens=32, num_forward_tokens=1400).num_rollouts
    64
    """

    num_tokens: int
    num_rollouts: int
    max_completion_tokens: int
    num_forward_tokens: int


@dataclass(frozen=True)
class PrefixGroup:
    """Adjacent rows of a micro-batch with a common prefix.

    Attributes:
        num_rows: Number of rows.
        prefix_length: Input positions that the rows have in common, at least 1; all positions of a single row.

    >>> PrefixGroup(num_rows=8, prefix_length=40).num_rows
    8
    """

    num_rows: int
    prefix_length: int


@dataclass(frozen=True)
class StepInfo:
    """Facts of one optimizer step on one rank. All micro-batches of the step point to the same record.

    Attributes:
        step: The optimizer step that the rows train, counted from 0.
        denominators: Divisors of the loss and of the metrics, over all micro-batches and ranks.
        policy_version: The optimizer step whose weights sampled the rows; the oldest one if several did.
        max_staleness: Largest allowed difference between `policy_version` and the first step of the phase.
        metrics: Metrics of the step's rollouts, over all ranks.
        skip_reason: Why the optimizer step is skipped, None if it is not.
        unused: Rollouts that are not trained on, for logs.
        zero_advantage: Rows that cannot change any weight and do not enter the forward, for logs.
        policy_update: Number of earlier optimizer steps with the same rows.
        phase_step: Number of earlier optimizer steps of the phase.
        later: Micro-batches of the phase's other mini-batches, in order. The trainer computes its logprobs of them before the
            phase's first update. Empty in the records of all other steps.

    >>> info = StepInfo(step=7, denominators=Denominators(1500, 64, 32, 1400), policy_version=6, max_staleness=2)
    >>> second = info.in_pass(1, steps_per_pass=4)
    >>> (second.step, second.policy_update, second.phase_step, second.denominators is info.denominators)
    (11, 1, 4, True)
    """

    step: int
    denominators: Denominators
    policy_version: int
    max_staleness: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    skip_reason: str | None = None
    unused: tuple[Rollout, ...] = ()
    zero_advantage: tuple[Sample, ...] = ()
    policy_update: int = 0
    phase_step: int = 0
    later: tuple["Batch", ...] = ()

    def check_age(self, global_step: int) -> None:
        """Checks that the rows were not sampled with weights that are too old, or newer than those at the phase's start.

        Args:
            global_step: The trainer's optimizer step.

        Raises:
            StaleBatchError: They were.
        """
        if not 0 <= global_step - self.phase_step - self.policy_version <= self.max_staleness:
            raise StaleBatchError(
                f"step {global_step} received rollouts of policy version {self.policy_version} for step {self.phase_step} of "
                f"their phase, and the largest allowed lag is {self.max_staleness} steps: the data loader sampled before the "
                "sync, or the engine was not synced"
            )

    def in_pass(self, number: int, steps_per_pass: int) -> "StepInfo":
        """Returns the record of the optimizer step that trains the rows of this first one again.

        Args:
            number: Number of earlier passes over the phase's rows; 0 is the first pass.
            steps_per_pass: Optimizer steps of a pass.
        """
        moved = number * steps_per_pass
        return replace(self, step=self.step + moved, policy_update=number, phase_step=self.phase_step + moved)


@dataclass(frozen=True)
class Batch:
    """The tensors of one micro-batch. Labels are shifted already: position t predicts `labels[:, t]`.

    Rows are padded on the right. For a prompt P0 P1 and a completion A0 A1, padded to T = 4:

        input_ids           P0    P1    A0    pad
        labels              P1    A0    A1    pad
        loss_mask           False True  True  False     (True: this label contributes to the loss)
        sampling_logprobs   0.0   -0.4  -0.1  0.0

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T].
        loss_mask: bool [B, T].
        sampling_logprobs: float32 [B, T].
        advantages: float32 [B, T], 0 where loss_mask is False.
        temperatures: float32 [B], the temperature each row was sampled with.
        lengths: Number of input positions of each row without padding. Length [B].
        groups: Adjacent rows with a common prefix, in order.
        step: Facts of the optimizer step, shared by all of its micro-batches.
        samples: Sources of the rows, for logs. A row without a sample is padding.
        old_values: Critic values before the update, float32 [B, T]; None without a critic.
        value_targets: Targets of the critic values, float32 [B, T]; None without a critic.
        dropout_seed: Seed of the training forward's dropout.
        other_tokens: Sampled tokens in the other rows of each row's rollout, int64 [B]; None if no rollout has several rows.

    >>> zeros = torch.zeros(1, 4)
    >>> batch = Batch(
    ...     zeros.long(), zeros.long(), zeros.bool(), zeros, zeros, zeros[:, 0] + 1,
    ...     (4,), (PrefixGroup(1, 4),), StepInfo(0, Denominators(1, 1, 1, 1), policy_version=0), samples=())
    >>> batch.to("cpu").labels.shape
    torch.Size([1, 4])
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    temperatures: Tensor
    lengths: tuple[int, ...]
    groups: tuple[PrefixGroup, ...]
    step: StepInfo
    samples: tuple[Sample, ...]
    old_values: Tensor | None = None
    value_targets: Tensor | None = None
    dropout_seed: int = 0
    other_tokens: Tensor | None = None

    @property
    def has_rows(self) -> bool:
        """Whether there are rows, be it one of padding.

        A step whose rows fill fewer micro-batches than it may have begins with batches without rows. They are neither computed
        nor differentiated, on any rank.
        """
        return len(self.input_ids) > 0

    def num_computed_tokens(self, shares_prefix: bool) -> int:
        """Tokens of the forward: each prefix once and no padding, or padded rows.

        Args:
            shares_prefix: Whether the common prefix of a group is computed once.
        """
        if not shares_prefix:
            return self.input_ids.numel()
        return sum(self.lengths) - sum((group.num_rows - 1) * group.prefix_length for group in self.groups)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def head(self, num_tokens: int) -> "Batch":
        """Returns the first rows, up to the label that is number `num_tokens` of those in `loss_mask`; the last row ends there.

        Attention is causal, so the outputs at the remaining positions do not depend on the rest.

        Args:
            num_tokens: Number of labels in the new `loss_mask`, at least 1. If there are no more, the batch itself is returned.
        """
        places = self.loss_mask.nonzero()
        if len(places) <= num_tokens:
            return self
        last_row, last_position = places[num_tokens - 1].tolist()
        num_rows, lengths = last_row + 1, (*self.lengths[:last_row], last_position + 1)
        kept: dict[str, Any] = {
            name: value[:num_rows, : max(lengths)] if value.dim() == 2 else value[:num_rows]
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        loss_mask = kept.pop("loss_mask").clone()
        loss_mask[last_row, last_position + 1 :] = False
        groups, samples = _first_groups(self.groups, lengths), self.samples[:num_rows]
        rest: dict[str, Any] = {"loss_mask": loss_mask, "lengths": lengths, "groups": groups, "samples": samples}
        return replace(self, **kept, **rest)


def _first_groups(groups: tuple[PrefixGroup, ...], lengths: tuple[int, ...]) -> tuple[PrefixGroup, ...]:
    """The groups of the first rows, whose last one may have become shorter."""
    found: list[PrefixGroup] = []
    first = 0
    for group in groups:
        of_group = lengths[first : first + group.num_rows]
        if of_group:
            prefix_length = of_group[0] if len(of_group) == 1 else min(group.prefix_length, *of_group)
            found.append(PrefixGroup(len(of_group), prefix_length))
        first += group.num_rows
    return tuple(found)


@dataclass(frozen=True)
class PolicyOutput:
    """Policy output for the tokens of a batch. Shapes [B, T]; undefined where `loss_mask` is False.

    Attributes:
        logprobs: Log-probabilities of the labels at the sampling temperature.
        entropies: Entropies of the distributions that the labels were sampled from, in nats.
        values: Critic values, None without a critic.

    >>> PolicyOutput(torch.zeros(1, 2), torch.zeros(1, 2), None).logprobs.shape
    torch.Size([1, 2])
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class TrainerSignals:
    """What the trainer computes before the advantages. Shapes [B, T].

    Attributes:
        kl: Estimate of KL(policy || reference) per token, None if the reward does not contain it.
        values: Critic values, None without a critic.
        policy_logprobs: Logprobs of the policy before the first update, without dropout; None if nothing needs them.
        teacher_logprobs: Logprobs of the teacher, None without a teacher.

    >>> TrainerSignals(None, torch.zeros(1, 2)).values.shape
    torch.Size([1, 2])
    """

    kl: Tensor | None
    values: Tensor | None
    policy_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
