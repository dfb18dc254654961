"""Logprobs of given tokens from hidden states, computed in chunks so that the logits of a sequence never exist as a whole.

Shape letters: N selected positions, H hidden size, V vocabulary.

torch's chunked `linear_cross_entropy` is not used: it returns no entropy, cannot soft-cap or scale logits, and warns outside
its reference path. Autograd over a recomputed chunk would need twice the passes over the logits, and its memory grows on a
CPU (see `_Chunk`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 32 * 2**20
DEVICE_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class OutputHead:
    """A language model's map from hidden states to logits: cap(scale * (W h + b)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: Logits become softcap * tanh(logits / softcap) (Gemma 2). None: no cap.
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


def fastest_chunk_tokens(head: OutputHead) -> int:
    """Number of positions whose logits fill 32 MB in float32 on a CPU, where larger chunks are not faster, else 256 MB."""
    budget = CPU_CHUNK_BYTES if head.weight.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(budget // (4 * head.weight.shape[0]), 1)


def chunked_logprobs(
    head: OutputHead, hidden: Tensor, labels: Tensor, temperatures: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Computes log softmax(logits / temperature)[label] and the entropy of that softmax per position, chunk by chunk.

    Softmax and its gradient are computed in float32. The logits of a chunk are freed after use and recomputed in backward.

    Args:
        head: The model's output head.
        hidden: [N, H], with gradient.
        labels: int64 [N].
        temperatures: float32 [N], above 0.
        chunk_tokens: Positions whose logits exist at the same time.

    Returns:
        Logprobs and entropies in nats, float32 [N] each. With N = 0 they are empty but part of the graph, so that backward
        reaches every parameter.
    """
    return _ChunkedLogprobs.apply(head, chunk_tokens, hidden, head.weight, head.bias, labels, temperatures)


class _Chunk:
    """Buffers for one chunk, which all chunks reuse.

    They are allocated once. Allocating and freeing blocks of this size repeatedly fragments the heap of a CPU process, which
    then grows with the number of tokens as if all logits were kept.
    """

    def __init__(self, head: OutputHead, num_rows: int, dtype: torch.dtype) -> None:
        self.head = head
        self.weight = head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        shape, device = (num_rows, head.weight.shape[0]), head.weight.device
        exact = torch.promote_types(dtype, torch.float32)
        self.product = torch.empty(shape, dtype=dtype, device=device)
        self.logits, self.log_p = (torch.empty(shape, dtype=exact, device=device) for _ in range(2))
        self.cap_slope = None if head.softcap is None else torch.empty(shape, dtype=exact, device=device)

    def log_softmax(self, hidden: Tensor, temperatures: Tensor) -> Tensor:
        """Log softmax(logits / temperature), [n, V]."""
        rows = slice(hidden.shape[0])
        product, logits = self.product[rows], self.logits[rows]
        torch.mm(hidden.detach().to(product.dtype), self.weight.t(), out=product)
        if self.bias is not None:
            product.add_(self.bias)
        logits.copy_(product)
        if self.head.scale != 1.0:
            logits.mul_(self.head.scale)
        if self.head.softcap is not None and self.cap_slope is not None:
            logits.div_(self.head.softcap).tanh_()
            torch.square(logits, out=self.cap_slope[rows]).neg_().add_(1.0)
            logits.mul_(self.head.softcap)
        return torch.log_softmax(logits.div_(temperatures.unsqueeze(1)), dim=1, out=self.log_p[rows])

    def probabilities(self, log_p: Tensor) -> Tensor:
        """Exp(log_p), written into the buffer of the logits."""
        return torch.exp(log_p, out=self.logits[: log_p.shape[0]])

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Maps the gradient of the logits [n, V] to that of W h + b, in the type of the product."""
        rows = slice(gradient.shape[0])
        if self.cap_slope is not None:
            gradient.mul_(self.cap_slope[rows])
        if self.head.scale != 1.0:
            gradient.mul_(self.head.scale)
        return self.product[rows].copy_(gradient)


def _product_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the product: that of autocast if it is enabled, else that of the weight."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _ranges(num_rows: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, num_rows)) for start in range(0, num_rows, chunk_tokens)]


class _ChunkedLogprobs(torch.autograd.Function):
    """Logprobs and entropies, with a backward that recomputes the chunks.

    With z = logits / temperature, p = softmax(z) and H = -sum_v p_v log p_v:
    d log p_label / d z_v = [v = label] - p_v and d H / d z_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        head: OutputHead,
        chunk_tokens: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = torch.empty(2, hidden.shape[0], device=hidden.device).unbind()
        chunk = _Chunk(head, min(chunk_tokens, hidden.shape[0]), _product_type(hidden, weight))
        for at in _ranges(hidden.shape[0], chunk_tokens):
            log_p = chunk.log_softmax(hidden[at], temperatures[at])
            logprobs[at] = log_p.gather(1, labels[at].unsqueeze(1)).squeeze(1)
            entropies[at] = -chunk.probabilities(log_p).mul_(log_p).sum(dim=1)
        return logprobs, entropies

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        head, chunk_tokens, hidden, weight, _, labels, temperatures = inputs
        # Backward runs outside autocast.
        ctx.head, ctx.chunk_tokens, ctx.dtype = head, chunk_tokens, _product_type(hidden, weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, labels, temperatures, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_logprobs, of_entropies = gradients
        hidden, labels, temperatures, entropies = ctx.saved_tensors
        head = ctx.head
        wanted = ctx.needs_input_grad[2:5]
        to_hidden = torch.zeros_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(head.weight) if wanted[1] else None
        to_bias = torch.zeros_like(head.bias) if wanted[2] else None
        chunk = _Chunk(head, min(ctx.chunk_tokens, hidden.shape[0]), ctx.dtype)
        for at in _ranges(hidden.shape[0], ctx.chunk_tokens):
            log_p = chunk.log_softmax(hidden[at], temperatures[at])
            result = chunk.probabilities(log_p)
            inverse = 1.0 / temperatures[at].unsqueeze(1)
            own = torch.zeros_like(inverse) if of_logprobs is None else of_logprobs[at].unsqueeze(1)
            if of_entropies is None:
                result.mul_(-own * inverse)
            else:
                factor = log_p.add_(entropies[at].unsqueeze(1)).mul_(-of_entropies[at].unsqueeze(1)).sub_(own)
                result.mul_(factor.mul_(inverse))
            result.scatter_add_(1, labels[at].unsqueeze(1), (own * inverse).to(result.dtype))
            product = chunk.pull_back(result)
            if to_hidden is not None:
                to_hidden[at] = (product @ chunk.weight).to(hidden.dtype)
            if to_weight is not None:
                to_weight += product.t() @ hidden[at].to(product.dtype)
            if to_bias is not None:
                to_bias += product.sum(dim=0)
        return None, None, to_hidden, to_weight, to_bias, None, None
