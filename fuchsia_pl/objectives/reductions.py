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


def sequence_mean(values: Tensor, loss_mask: Tensor, num_rows: int) -> Tensor:
    """This micro-batch's share of sum_i (sum_t m_it v_it / sum_t m_it) / num_rows (GRPO, arXiv:2402.03300, equation 3).

    Args:
        values: [B, T].
        loss_mask: bool [B, T].
        num_rows: Rows of the whole step with at least one token with the mask True.

    >>> sequence_mean(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[True, True], [True, False]]), num_rows=2)
    tensor(3.)
    """
    lengths = loss_mask.sum(dim=1).clamp(min=1)
    return (torch.where(loss_mask, values, 0.0).sum(dim=1) / lengths).sum() / max(num_rows, 1)


def constant(values: Tensor, loss_mask: Tensor, num_rows: int, length: int) -> Tensor:
    """This micro-batch's share of sum_it m_it v_it / (num_rows * length).

    It does not depend on the length of a completion, so long wrong answers are not favoured (Dr.GRPO, arXiv:2503.20783,
    section 3.2). With a length of 1 it is the sum over each row's tokens, the policy gradient of REINFORCE and RLOO.

    >>> constant(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]), num_rows=1, length=8)
    tensor(0.5000)
    """
    return torch.where(loss_mask, values, 0.0).sum() / max(num_rows * length, 1)


def reduce(
    values: Tensor, loss_mask: Tensor, reduction: Reduction, denominators: Denominators, constant_length: int | None
) -> Tensor:
    """Reduces a loss per token [B, T]. `constant_length` is the length of "constant"; None is the longest completion allowed."""
    match reduction:
        case "token_mean":
            return token_mean(values, loss_mask, denominators.num_tokens)
        case "sequence_mean":
            return sequence_mean(values, loss_mask, denominators.num_rows)
        case "constant":
            length = constant_length or denominators.max_completion_tokens
            return constant(values, loss_mask, denominators.num_rows, length)
