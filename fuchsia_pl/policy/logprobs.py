"""Logprobs of given tokens from hidden states, without the logits of a whole sequence ever existing.

Shape letters: N selected positions, H hidden size, V vocabulary.

torch's own chunked `linear_cross_entropy` is not used: it computes gradients inside its forward, cannot soft-cap or
scale logits, and warns outside its reference path. Recomputing a chunk in backward needs only public autograd parts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class OutputHead:
    """A language model's map from hidden states to logits: cap(scale * (W h + b)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: Logits become softcap * tanh(logits / softcap) (Gemma 2); None leaves them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32 [N, V]. The product accumulates in float32 and is rounded to the weights' type once."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def chunked_scores(
    head: OutputHead, hidden: Tensor, labels: Tensor, temperatures: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log softmax(logits / temperature)[label] and the entropy of that softmax for each position, a chunk at a time.

    Softmax and its gradient are computed in float32. A chunk's logits are freed after it and computed again in backward.

    Args:
        head: The model's output head.
        hidden: [N, H], gradient flows through it.
        labels: int64 [N].
        temperatures: float32 [N], above 0.
        chunk_tokens: Positions whose logits exist at the same time.

    Returns:
        Logprobs and entropies in nats, float32 [N] each. With N = 0 they are empty but still part of the graph, so that
        backward reaches every parameter.
    """
    if hidden.shape[0] == 0:
        weights = [weight for weight in (head.weight, head.bias) if weight is not None]
        empty = hidden.sum(dim=1).float() + sum(0.0 * weight.float().sum() for weight in weights)
        return empty, empty
    pieces = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), temperatures.split(chunk_tokens), strict=True)
    scored = [checkpoint(_scores, head, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat([logprobs for logprobs, _ in scored]), torch.cat([entropies for _, entropies in scored])


def _scores(head: OutputHead, hidden: Tensor, labels: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden) / temperatures.unsqueeze(1)
    normaliser = torch.logsumexp(logits, dim=1)
    logprobs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normaliser
    # H = log Z - sum_v p_v logit_v
    entropies = normaliser - (torch.softmax(logits, dim=1) * logits).sum(dim=1)
    return logprobs, entropies
