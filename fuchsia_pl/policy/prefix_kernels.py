"""Attention over a layout of shared prefixes without a mask: one kernel for a CPU, one for a GPU.

Shape letters: S tokens of the sequence, A attention heads, A' heads of keys and values, D width of a head, K keys of all pieces.

torch has no documented attention on a CPU that fits: `causal_lower_right` makes the mask there, and flex attention has to be
compiled and has no backward. On a GPU `varlen_attn` computes every piece at its own length, so nothing is sorted or padded.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.prefix_layout import PackedGroup, SharedPrefixLayout, lay_out

logger = logging.getLogger(__name__)

# Largest error of a GPU kernel, relative to the norm of what it computes; rounding in bfloat16 is about 0.005.
ALLOWED_KERNEL_ERROR = 0.03

# torch's own attention on a CPU, which is what `scaled_dot_product_attention` runs. Only these also return the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def joined_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scale: float | None
) -> Tensor:
    """Attention on a CPU, piece by piece; the two parts of a branch are joined by their log-sum-exp.

    Args:
        query: [1, A, S, D].
        key: [1, A', S, D]; A is a multiple of A'.
        value: [1, A', S, D].
        layout: The places of the pieces.
        scale: Factor of the scores; None is 1 / sqrt(D).

    Returns:
        [1, S, A, D].
    """
    output: Tensor = _JoinedAttention.apply(query, key, value, layout.groups, scale)
    return output.transpose(1, 2)


class _JoinedAttention(torch.autograd.Function):
    """Attention within each piece, and of all branches of a group over its prefix.

    Backward of flash attention recomputes the probabilities as exp(score - logsumexp). With the log-sum-exp over all keys of a
    token, and its whole output, the backward of each part yields exactly that part's share of the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[PackedGroup, ...], scale: float | None
    ) -> Tensor:
        keys, values = (_for_each_head(states, query.shape[1]) for states in (key, value))
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        total = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for group in groups:
            for at in group.pieces:
                parts = (states[:, :, at] for states in (query, keys, values))
                output[:, :, at], total[:, :, at] = _flash(*parts, 0.0, True, scale=scale)
            if group.branches:
                at, prefix = group.own, group.prefix
                seen = _flash(query[:, :, at], keys[:, :, prefix], values[:, :, prefix], 0.0, False, scale=scale)
                _join(output[:, :, at], total[:, :, at], *seen)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.groups, ctx.scale = groups, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = of_output
        query, key, value, output, total = ctx.saved_tensors
        keys, values = (_for_each_head(states, query.shape[1]) for states in (key, value))
        gradients = [torch.empty_like(states) for states in (query, keys, values)]

        def part(at: slice, seen: slice, is_causal: bool) -> list[Tensor]:
            of_queries = [states[:, :, at] for states in (grad, query)]
            of_keys = [states[:, :, seen] for states in (keys, values)]
            results = [states[:, :, at] for states in (output, total)]
            return list(_flash_backward(*of_queries, *of_keys, *results, 0.0, is_causal, scale=ctx.scale))

        for group in ctx.groups:
            for at in group.pieces:
                for gradient, own in zip(gradients, part(at, at, True), strict=True):
                    gradient[:, :, at] = own
            if group.branches:
                shares = part(group.own, group.prefix, False)
                for gradient, at, share in zip(gradients, (group.own, *[group.prefix] * 2), shares, strict=True):
                    gradient[:, :, at] += share
        heads = key.shape[1]
        return gradients[0], *(each.unflatten(1, (heads, -1)).sum(2) for each in gradients[1:]), None, None


def _for_each_head(states: Tensor, num_heads: int) -> Tensor:
    """[1, A', S, D] as [1, A, S, D]."""
    return states.repeat_interleave(num_heads // states.shape[1], dim=1) if states.shape[1] < num_heads else states


def _join(output: Tensor, total: Tensor, other: Tensor, other_total: Tensor) -> None:
    """Replaces the output and log-sum-exp over some keys by those over these and other keys."""
    both = torch.logaddexp(total, other_total)
    own_share, other_share = ((each - both).exp().unsqueeze(-1) for each in (total, other_total))
    output.copy_(output * own_share + other * other_share)
    total.copy_(both)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scale: float | None, window: int | None
) -> Tensor:
    """Attention on a GPU, by one kernel call: each piece is a sequence whose keys are its prefix and itself.

    Keys and values of a prefix are copied once per branch, so they take the memory that they would take for plain rows.

    Args:
        query: [1, A, S, D], in float16 or bfloat16.
        key: [1, A', S, D].
        value: [1, A', S, D].
        layout: The places of the pieces.
        scale: Factor of the scores; None is 1 / sqrt(D).
        window: Number of tokens that a token sees, itself included; None without a limit.

    Returns:
        [1, S, A, D].
    """
    from torch.nn.attention.varlen import varlen_attn  # torch 2.9 has none

    pieces = layout.pieces
    keys, values = (pick_rows(states[0].transpose(0, 1), pieces.keys) for states in (key, value))
    output = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        pieces.query_ends,
        pieces.key_ends,
        *pieces.longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),  # tokens to the left and right of a token's own place
        enable_gqa=True,
    )
    assert isinstance(output, Tensor), "the log-sum-exp was not requested"
    return output.unsqueeze(0)


def pick_rows(states: Tensor, places: Tensor) -> Tensor:
    """`states[places]` for states [S, …], as an embedding: its backward sums rows much faster than that of indexing."""
    picked = nn.functional.embedding(places, states.flatten(1))
    return picked.unflatten(-1, states.shape[1:])


@functools.cache
def varlen_works(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, width: int) -> bool:
    """Whether `varlen_attention` gives the right outputs and gradients on a device. Otherwise the reason is logged.

    The kernel depends on the card, the type and the width. The check of a model at the start may have run on a CPU.

    Args:
        device: The GPU.
        dtype: Type of queries, keys and values.
        num_heads: Number of attention heads.
        num_kv_heads: Number of heads of keys and values.
        width: Width of a head.
    """
    try:
        # a forward may run in inference mode or under autocast
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            error = max(_kernel_error(device, dtype, num_heads, num_kv_heads, width, window) for window in (None, 3))
        reason = f"its results differ by {error:.2g} of their norm ({ALLOWED_KERNEL_ERROR} allowed)"
    except (ImportError, TypeError, ValueError, RuntimeError) as problem:
        error, reason = torch.inf, f"{type(problem).__name__}: {problem}".splitlines()[0]
    works = error <= ALLOWED_KERNEL_ERROR
    if not works:
        logger.warning(
            "attention over shared prefixes uses a mask, whose memory grows with the square of the context, because torch's "
            "varlen_attn cannot be used on %s in %s with heads of width %d: %s",
            *(device, dtype, width, reason),
        )
    return works


def _kernel_error(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, width: int, window: int | None
) -> float:
    """Largest error of the output and the gradients of a small example, relative to their norms."""
    ids = torch.zeros(3, 40, dtype=torch.int64, device=device)
    layout = lay_out(ids, (40, 33, 20), (PrefixGroup(2, 24), PrefixGroup(1, 20)))
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, layout.input_ids.shape[1], width, generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    found = _with_gradients(lambda q, k, v: varlen_attention(q, k, v, layout, None, window), states)
    mask = _dense_mask(layout, window)

    def expected_attention(query: Tensor, *others: Tensor) -> Tensor:
        keys, values = (_for_each_head(each, num_heads) for each in others)
        return nn.functional.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2)

    expected = _with_gradients(expected_attention, [each.float() for each in states])
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def _with_gradients(attend: Callable[..., Tensor], states: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the sum of its squares."""
    inputs = [each.detach().requires_grad_() for each in states]
    output = attend(*inputs)
    return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]


def _dense_mask(layout: SharedPrefixLayout, window: int | None) -> Tensor:
    """Whether a token (row) sees another (column), bool [S, S]."""
    positions = layout.position_ids[0]
    visible = torch.zeros(len(positions), len(positions), dtype=torch.bool, device=positions.device)
    for group in layout.groups:
        visible[group.own, group.prefix] = True
        for at in group.pieces:
            visible[at, at] = True
    distance = positions.unsqueeze(1) - positions
    return visible & (distance >= 0) & (distance < (window or len(positions)))
