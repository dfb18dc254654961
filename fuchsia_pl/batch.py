"""The tensors that are trained on, and what the model says of them.

Shape letters: B rows of a micro-batch, T label positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuchsia_pl.types import Rollout, Sample


@dataclass(frozen=True)
class Denominators:
    """What a loss is divided by, counted over one optimizer step and all ranks, never over one micro-batch.

    Attributes:
        num_tokens: Tokens that the policy sampled in the step's trainable rows.
        num_rows: Rows with at least one such token.
        max_completion_tokens: The configured bound of a completion's length.
        num_forward_tokens: Those of the tokens that enter the forward, what metrics are divided by: rows that could not change
            any weight are left out of it, but not of the loss's mean.

    >>> Denominators(num_tokens=1500, num_rows=64, max_completion_tokens=32, num_forward_tokens=1400).num_rows
    64
    """

    num_tokens: int
    num_rows: int
    max_completion_tokens: int
    num_forward_tokens: int


@dataclass(frozen=True)
class PrefixGroup:
    """Adjacent rows of a micro-batch that start alike.

    Attributes:
        num_rows: How many there are.
        prefix_length: Input positions that they have in common, at least 1; all of them where there is one row.

    >>> PrefixGroup(num_rows=8, prefix_length=40).num_rows
    8
    """

    num_rows: int
    prefix_length: int


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
        lengths: Input positions of each row that are no padding. Length [B].
        groups: Which adjacent rows start alike, in order.
        denominators: Of the whole optimizer step.
        policy_version: The optimizer step whose weights sampled these rows; where several did, the first of them.
        samples: What the rows were made of, for logs. A row without a sample is padding.
        metrics: Figures of the whole step's rollouts, the same in each of its micro-batches.
        unused: Rollouts of the step that are not trained on, for logs; in its first micro-batch.
        zero_advantage: Rows of the step that no weight would move by and that the forward leaves out, likewise.
        old_values: With a critic, its values before the update; float32 [B, T].
        value_targets: With a critic, what its values should have been; float32 [B, T].
        policy_update: How many optimizer steps were made with these rows already.
        skip_reason: Why the optimizer step is to be skipped, None where it is not.
        max_staleness: Optimizer steps by which `policy_version` may lie behind the weights that are trained.
        dropout_seed: What its training forward draws from, where anything is dropped out.

    >>> zeros = torch.zeros(1, 4)
    >>> batch = Batch(
    ...     zeros.long(), zeros.long(), zeros.bool(), zeros, zeros, zeros[:, 0] + 1,
    ...     (4,), (PrefixGroup(1, 4),), Denominators(1, 1, 1, 1), policy_version=0, samples=(), metrics={})
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
    denominators: Denominators
    policy_version: int
    samples: tuple[Sample, ...]
    metrics: Mapping[str, float]
    unused: tuple[Rollout, ...] = ()
    zero_advantage: tuple[Sample, ...] = ()
    old_values: Tensor | None = None
    value_targets: Tensor | None = None
    policy_update: int = 0
    skip_reason: str | None = None
    max_staleness: int = 0
    dropout_seed: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy says of the tokens of a batch, all [B, T] and meaningless where `loss_mask` is False.

    Attributes:
        logprobs: Of the labels, at the temperature they were sampled with.
        entropies: Of the distributions they were drawn from, in nats.
        values: The critic's, None without one.

    >>> PolicyOutput(torch.zeros(1, 2), torch.zeros(1, 2), None).logprobs.shape
    torch.Size([1, 2])
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class TrainerSignals:
    """What the trainer says of the tokens of a batch before there are advantages, [B, T].

    Attributes:
        kl: An estimate of KL(policy || reference) per token, None where the reward does not need it.
        values: The critic's, None without one.

    >>> TrainerSignals(None, torch.zeros(1, 2)).values.shape
    torch.Size([1, 2])
    """

    kl: Tensor | None
    values: Tensor | None
