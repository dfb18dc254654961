"""Reductions of a loss per token to one number. The denominators are arguments: they count the whole optimizer step."""

from typing import Literal

import torch
from torch import Tensor

from fuchsia_pl.batch import Denominators

Reduction = Literal["token_mean", "sequence_mean", "constant"]


def token_mean(values: Tensor, loss_mask: Tensor, num_tokens: int) -> Tensor:
    """This micro-batch's share of sum_t m_t v_t / num_tokens (DAPO, arXiv:2503.14476, equation 8).

    Args:
        values: [B, T]; positions with the mask False may hold anything, NaN included.
        loss_mask: bool [B, T].
        num_tokens: Tokens of the whole step with the mask True.

    >>> token_mean(torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]]), num_tokens=4)
    tensor(0.2500)
    """
    return torch.where(loss_mask, values, 0.0).sum() / max(num_tokens, 1)


def sequence_mean(values: Tensor, loss_mask: Tensor, num_rollouts: int, other_tokens: Tensor | None = None) -> Tensor:
    """This micro-batch's share of sum_i (sum_t m_it v_it / sum_t m_it) / num_rollouts (GRPO, arXiv:2402.03300, equation 3).

    A rollout i of several rows is one sequence: the mean is over the tokens of all its rows, so an agent that rewrites its
    history has no more weight.

    Args:
        values: [B, T].
        loss_mask: bool [B, T].
        num_rollouts: Rollouts of the whole step with at least one token with the mask True.
        other_tokens: int64 [B], see `Batch.other_tokens`.

    >>> sequence_mean(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[True, True], [True, False]]), num_rollouts=2)
    tensor(3.)
    """
    lengths = loss_mask.sum(dim=1) if other_tokens is None else loss_mask.sum(dim=1) + other_tokens
    return (torch.where(loss_mask, values, 0.0).sum(dim=1) / lengths.clamp(min=1)).sum() / max(num_rollouts, 1)


def constant(values: Tensor, loss_mask: Tensor, num_rollouts: int, length: int) -> Tensor:
    """This micro-batch's share of sum_it m_it v_it / (num_rollouts * length).

    It does not depend on the length of a completion, so long wrong answers are not favoured (Dr.GRPO, arXiv:2503.20783,
    section 3.2). With a length of 1 it is the sum over each rollout's tokens, the policy gradient of REINFORCE and RLOO.

    >>> constant(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]), num_rollouts=1, length=8)
    tensor(0.5000)
    """
    return torch.where(loss_mask, values, 0.0).sum() / max(num_rollouts * length, 1)


def reduce(
    values: Tensor,
    loss_mask: Tensor,
    reduction: Reduction,
    denominators: Denominators,
    constant_length: int | None,
    other_tokens: Tensor | None = None,
) -> Tensor:
    """Reduces a loss per token to this micro-batch's share of the step's value.

    Args:
        values: [B, T].
        loss_mask: bool [B, T].
        reduction: The reduction.
        denominators: Counts of the whole step.
        constant_length: Length of "constant"; None is the longest completion allowed.
        other_tokens: int64 [B], see `Batch.other_tokens`.
    """
    match reduction:
        case "token_mean":
            return token_mean(values, loss_mask, denominators.num_tokens)
        case "sequence_mean":
            return sequence_mean(values, loss_mask, denominators.num_rollouts, other_tokens)
        case "constant":
            length = constant_length or denominators.max_completion_tokens
            return constant(values, loss_mask, denominators.num_rollouts, length)
