"""Attention over a layout of shared prefixes without a mask, against rows computed one by one."""

import logging
import sys
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.prefix_kernels import joined_attention, varlen_attention, varlen_works
from fuchsia_pl.policy.prefix_layout import lay_out

# Branches of 3, 7, 0 and 1 tokens after a prefix of 5; a row of 3 alone; branches of 2 and 4 after a prefix of 1.
GROUPS = (PrefixGroup(4, 5), PrefixGroup(1, 3), PrefixGroup(2, 1))
LENGTHS = (8, 12, 5, 6, 3, 3, 5)
ROWS = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14],
    [0, 1, 2, 3, 4, 15],
    [16, 17, 18],
    [19, 20, 21],
    [19, 22, 23, 24, 25],
]
CPU = torch.device("cpu")


def layout_of(lengths=LENGTHS, groups=GROUPS):
    return lay_out(torch.zeros(len(lengths), max(lengths), dtype=torch.int64), lengths, groups)


def states_of(num_tokens: int, heads: int, kv_heads: int, dtype=torch.float32, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, num_tokens, width) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_rows(query, key, value, rows, scale=None, window=None):
    """Each row alone: softmax over the keys that are not later, in float64. A token of several rows has one output."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    outputs = [None] * query.shape[2]
    for row in rows:
        for number, token in enumerate(row):
            seen = row[max(0, number + 1 - window) if window else 0 : number + 1]
            scores = (query[0, :, token, None] * key[0, :, seen]).sum(-1) * (scale or query.shape[-1] ** -0.5)
            outputs[token] = (scores.softmax(-1).unsqueeze(-1) * value[0, :, seen]).sum(1)
    return torch.stack(outputs).unsqueeze(0)


def with_gradients(attend, states):
    """Output and gradients of a sum with fixed random weights."""
    inputs = [each.clone().requires_grad_() for each in states]
    output = attend(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def largest_error(found, expected) -> float:
    """Relative to the largest number."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["own keys", "two share", "six share"])
def test_the_parts_of_a_branch_are_joined_to_what_the_row_alone_has(heads, scale):
    states = states_of(26, *heads)
    found = with_gradients(lambda *inputs: joined_attention(*inputs, layout_of(), scale), states)
    expected = with_gradients(lambda *inputs: by_rows(*inputs, ROWS, scale), [each.double() for each in states])
    assert largest_error(found, expected) < 1e-5


def test_long_pieces_that_the_kernel_cuts_into_blocks():
    lengths, prefix = (1000, 733, 701), 700
    layout, states = layout_of(lengths, (PrefixGroup(3, prefix),)), states_of(1034, 2, 1)
    starts = [prefix, 1000, 1033, 1034]
    rows = [[*range(prefix), *range(start, stop)] for start, stop in pairwise(starts)]

    def plain(query, key, value):
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, row], key[:, :, row], value[:, :, row], is_causal=True, enable_gqa=True
            )
            for row in rows
        ]
        return torch.cat([outputs[0], *(each[:, :, prefix:] for each in outputs[1:])], dim=2).transpose(1, 2)

    expected = with_gradients(plain, [each.double() for each in states])
    assert (
        largest_error(with_gradients(lambda *inputs: joined_attention(*inputs, layout, None), states), expected) < 1e-5
    )


def test_bfloat16_is_as_near_to_the_exact_result_as_torch_is_on_plain_rows():
    states = states_of(26, 4, 4, torch.bfloat16)
    exact = with_gradients(lambda *inputs: by_rows(*inputs, ROWS), [each.double() for each in states])

    def plain(query, key, value):
        outputs = {}
        for row in ROWS:
            of_row = (each[:, :, row] for each in (query, key, value))
            output = torch.nn.functional.scaled_dot_product_attention(*of_row, is_causal=True)
            outputs |= dict(zip(row, output.unbind(2), strict=True))
        return torch.stack([outputs[token] for token in range(26)], dim=1)

    found = with_gradients(lambda *inputs: joined_attention(*inputs, layout_of(), None), states)
    assert all(each.dtype is torch.bfloat16 for each in found)
    assert largest_error(found, exact) < max(1.5 * largest_error(with_gradients(plain, states), exact), 0.01)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            each.untyped_storage().nbytes() // each.itemsize
            for each in tree_leaves(result)
            if isinstance(each, torch.Tensor)
        ]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("size", [64, 256])
def test_no_tensor_is_larger_than_the_queries(size):
    """A mask of branches would have 4 * size * 5 * size elements."""
    layout = layout_of((5 * size,) * 4, (PrefixGroup(4, 4 * size),))
    states = states_of(8 * size, 4, 2)
    with LargestTensor() as largest:
        with_gradients(lambda *inputs: joined_attention(*inputs, layout, None), states)
    assert largest.num_elements == 8 * size * 4 * 8


def test_nothing_but_inputs_output_and_one_number_per_head_is_kept_for_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(tuple(each.shape)) or each, lambda each: each
    ):
        joined_attention(*[each.requires_grad_() for each in states_of(26, 4, 2)], layout_of(), None)
    assert sorted(kept) == sorted([(1, 4, 26, 8), (1, 2, 26, 8), (1, 2, 26, 8), (1, 4, 26, 8), (1, 4, 26)])


def reference_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`varlen_attn` by its documentation: the last query of a sequence is at the place of its last key."""
    outputs = []
    assert enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = []
    for (first, last), (first_key, last_key) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        lengths.append((last - first, last_key - first_key))
        shift = (
            torch.arange(last_key - first_key) - (torch.arange(last - first) + lengths[-1][1] - lengths[-1][0])[:, None]
        )
        left, right = window_size
        visible = ((shift <= right) | (right < 0)) & ((shift >= -left) | (left < 0))
        parts = (query[first:last], key[first_key:last_key], value[first_key:last_key])
        output = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), attn_mask=visible, scale=scale, enable_gqa=True
        )
        outputs.append(output.transpose(0, 1))
    assert (max_q, max_k) == tuple(map(max, zip(*lengths, strict=True)))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_one_call_over_pieces_of_different_lengths(monkeypatch, window):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    states = states_of(26, 4, 2)
    found = with_gradients(lambda *inputs: varlen_attention(*inputs, layout_of(), 0.7, window), states)
    doubles = [each.double() for each in states]
    expected = with_gradients(lambda *inputs: by_rows(*inputs, ROWS, 0.7, window), doubles)
    assert largest_error(found, expected) < 1e-5


def upper_left(query, key, value, cu_seq_q, cu_seq_k, *lengths, **settings):
    """A kernel that aligns the first query with the first key."""
    ends = [
        first + (stop - start)
        for first, (start, stop) in zip(cu_seq_k.tolist(), pairwise(cu_seq_q.tolist()), strict=False)
    ]
    pieces = [torch.arange(first, end) for first, end in zip(cu_seq_k.tolist(), ends, strict=False)]
    keys = torch.cat(pieces)
    return reference_varlen(query, key[keys], value[keys], cu_seq_q, cu_seq_q, lengths[0], lengths[0], **settings)


def no_window(*inputs, window_size, **settings):
    return reference_varlen(*inputs, window_size=(-1, 0), **settings)


def wrong_gradient(query, *inputs, **settings):
    return reference_varlen(query.detach(), *inputs, **settings) + 0 * query


@pytest.mark.parametrize("kernel", [reference_varlen, upper_left, no_window, wrong_gradient])
def test_a_kernel_is_used_only_if_its_results_are_right(monkeypatch, caplog, kernel):
    varlen_works.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    is_right = kernel is reference_varlen
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        assert varlen_works(CPU, torch.float32, 4, 2, 8) == is_right
    assert torch.equal(torch.get_rng_state(), state)
    assert ("its results differ by" in caplog.text) != is_right
    varlen_works.cache_clear()


def test_a_machine_without_the_kernel_gets_the_mask_and_a_warning(monkeypatch, caplog):
    varlen_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not varlen_works(CPU, torch.float32, 4, 2, 8)  # it has no kernel for a CPU
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
        assert not varlen_works(CPU, torch.float32, 4, 4, 8)
    assert [record.getMessage().partition("heads of width 8: ")[2].partition(":")[0] for record in caplog.records] == [
        "NotImplementedError",
        "ModuleNotFoundError",
    ]
    varlen_works.cache_clear()
