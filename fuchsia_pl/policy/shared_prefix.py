"""Computes a prefix shared by several rows once, followed by the own tokens of each row.

A micro-batch becomes one sequence without padding, `prefix | branch | branch | … | prefix | branch | …`, in which positions
restart after the prefix and a branch attends to its prefix and to itself. All layers but attention act on single tokens. The
model gets its own attention function through transformers' `AttentionInterface`. A dense 4-D mask over the whole sequence would
be equivalent, but computes every pair of branches only to mask it: with 8 completions of 200 tokens it gains nothing.

`prefix_kernels` computes it without a mask. A mask [M, 1, L, P + L] remains where no such kernel fits: on a CPU for short rows
in bfloat16 and for a sliding window that is shorter than the rows, with dropout of attention, for values of another width than
the keys (latent attention), and on a GPU in float32 or without flash attention.

Shape letters: S tokens of the sequence, R groups, P tokens of the longest prefix, M branches, L tokens of the longest branch,
A attention heads, D width of a head.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.prefix_kernels import joined_attention, pick_rows, varlen_attention, varlen_works
from fuchsia_pl.policy.prefix_layout import SharedPrefixLayout, lay_out

ATTENTION_NAME = "shared_prefix"
BASE_ATTENTION = "sdpa"
# Longest row for which a CPU computes attention in bfloat16 with a mask and torch's math kernel, which is faster for few keys:
# 24 tokens over 64 keys took 3.8 ms against 8.0 of flash attention. So the mask has at most this many entries per token. In
# float32 the parts without a mask are faster at any length: 32 rows of 24 tokens over 64 keys took 29 ms against 44.
MASKED_ON_CPU = 128
MASKED_TYPES = (torch.bfloat16, torch.float16)
# Largest error of the check, relative to the error of a branch without its prefix; rounding in bfloat16 is far below.
ALLOWED_ERROR = 0.2
# Largest change of a branch, relative to the change of the branch before it. Attention alone gives 0; with experts, whose
# products have as many rows as tokens chose them, another rounding. A convolution in one of three layers gave 0.20.
ALLOWED_LEAK, ALLOWED_LEAK_OF_EXPERTS = 0.001, 0.02


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: SharedPrefixLayout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention over a layout: of the prefixes over themselves, and of the branches over prefix and branch.

    Args:
        module: The model's attention layer.
        query: [1, A, S, D]; key and value may have fewer heads.
        key: [1, A', S, D].
        value: [1, A', S, D].
        attention_mask: None; transformers makes no mask for a custom function.
        shared_prefix: The layout; None for plain rows, which are causal and padded on the right.
        **settings: Passed by transformers to every attention function: scale, dropout, window.

    Returns:
        [1, S, A, D] and no attention weights.
    """
    window, scale = settings.get("sliding_window"), settings.get("scaling")
    if shared_prefix is None:
        mask = _window_mask(query.shape[2], window, query.device)
        return ALL_ATTENTION_FUNCTIONS[BASE_ATTENTION](module, query, key, value, mask, **settings)
    shared_prefix.windows.append(window)
    query, key, value = _as_autocast((query, key, value))
    kernel = _kernel(shared_prefix, query, key, value, window, settings.get("dropout", 0.0))
    if kernel == "joined":
        return joined_attention(query, key, value, shared_prefix, scale), None
    if kernel == "varlen":
        return varlen_attention(query, key, value, shared_prefix, scale, window), None
    return _masked_attention(module, (query, key, value), shared_prefix, settings), None


def _as_autocast(states: Sequence[Tensor]) -> list[Tensor]:
    """Under autocast, the states in its type, as torch does for its own attention function."""
    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [each.to(dtype or each.dtype) for each in states]


def _kernel(
    layout: SharedPrefixLayout, query: Tensor, key: Tensor, value: Tensor, window: int | None, dropout: float
) -> Literal["joined", "varlen", "masked"]:
    if layout.uses_mask or dropout or value.shape[-1] != query.shape[-1]:
        return "masked"
    if query.is_cuda:
        works = varlen_works(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1])
        return "varlen" if works else "masked"
    sees_whole_rows = not window or layout.longest_row <= window
    mask_is_faster = layout.uses_mask is None and query.dtype in MASKED_TYPES and layout.longest_row <= MASKED_ON_CPU
    return "joined" if query.device.type == "cpu" and sees_whole_rows and not mask_is_faster else "masked"


def _masked_attention(
    module: nn.Module, states: Sequence[Tensor], layout: SharedPrefixLayout, settings: dict[str, Any]
) -> Tensor:
    """Attention in two calls, of the prefixes and of the branches, each padded to a rectangle; [1, S, A, D]."""
    attend = ALL_ATTENTION_FUNCTIONS[BASE_ATTENTION]
    padded, window = layout.padded, settings.get("sliding_window")
    of_prefix = [_pick(each, padded.prefix_places) for each in states]
    mask = _window_mask(padded.prefix_places.shape[1], window, states[0].device)
    with _fast_kernel(of_prefix[1]):
        computed = attend(module, *of_prefix, mask, **settings)[0].flatten(0, 1)
    if len(padded.branch_groups):
        of_branch = [_pick(each, padded.branch_places) for each in states]
        keys, values = (
            torch.cat([pick_rows(prefix, padded.branch_groups), branch], dim=2)
            for prefix, branch in zip(of_prefix[1:], of_branch[1:], strict=True)
        )
        visible = padded.mask(window, states[0].dtype)
        with _fast_kernel(keys):
            own = attend(module, of_branch[0], keys, values, visible, **settings)[0].flatten(0, 1)
        computed = torch.cat([computed, own])
    return pick_rows(computed, padded.outputs).unsqueeze(0)


def _fast_kernel(keys: Tensor) -> AbstractContextManager[None]:
    """Selects torch's math attention for few keys: the backward of flash attention in bfloat16 is slow on a CPU."""
    is_short = keys.device.type == "cpu" and keys.shape[2] <= MASKED_ON_CPU
    return sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext()


def _pick(states: Tensor, places: Tensor) -> Tensor:
    """[1, A, S, D] at places [R, P] as [R, A, P, D]."""
    return pick_rows(states[0].transpose(0, 1), places).transpose(1, 2)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of plain rows if a window is shorter than they are; else None, and attention is causal."""
    if not window or length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at.unsqueeze(1) - at
    return ((distance >= 0) & (distance < window)).reshape(1, 1, length, length)


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether a model uses the attention of this module."""
    return model.config._attn_implementation == ATTENTION_NAME


def set_shared_prefix(model: PreTrainedModel) -> None:
    """Sets the attention of this module on a model that has passed the check of `enable_shared_prefix` on another rank."""
    AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
    model.set_attn_implementation(ATTENTION_NAME)


def enable_shared_prefix(model: PreTrainedModel) -> bool:
    """Sets the attention of this module on a model if its outputs stay the same, with and without a shared prefix.

    The check runs the model on a few tokens. It detects operations besides attention that mix tokens: recurrence, convolutions,
    distance biases that ignore `position_ids`. Windows wider than these few tokens are detected by the windows that the
    layers pass to the attention function, and layers without attention by the number of its calls.

    Returns:
        Whether the outputs stay the same. If not, the model is unchanged.
    """
    if model.config._attn_implementation != BASE_ATTENTION:
        return False
    AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
    was_training = model.training
    model.eval()
    try:
        agrees = _agrees(model)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # a model that takes other arguments
        agrees = False
    finally:
        model.train(was_training)
    if not agrees:
        model.set_attn_implementation(BASE_ATTENTION)
    return agrees


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Compares the hidden states of two branches with those of plain rows under the model's own attention."""
    vocab_size = model.config.get_text_config().vocab_size
    # From the whole vocabulary. The first ids are often special tokens that were never trained: their vectors are so small that
    # rounding decides their hidden states. For the quickstart's model in bfloat16 their error was 0.78, that of others 0.03.
    ids = torch.arange(24, device=model.device) * max(vocab_size // 25, 1) + vocab_size // 50
    ids = ids.reshape(2, 12) % vocab_size
    ids[1, :8] = ids[0, :8]
    body = model.base_model
    own = body(input_ids=ids, use_cache=False).last_hidden_state[:, 8:].float()
    alone = body(input_ids=ids[:, 8:], use_cache=False).last_hidden_state.float()
    model.set_attn_implementation(ATTENTION_NAME)
    plain = body(input_ids=ids, use_cache=False).last_hidden_state[:, 8:].float()

    def packed(rows: Tensor, uses_mask: bool) -> tuple[Tensor, list[int | None]]:
        layout = replace(lay_out(rows, (12, 12), (PrefixGroup(2, 8),)), uses_mask=uses_mask)
        hidden = body(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, shared_prefix=layout
        ).last_hidden_state[0]
        return hidden[layout.places][:, 8:].float(), layout.windows

    masked, windows = packed(ids, uses_mask=True)
    unmasked, _ = packed(ids, uses_mask=False)
    other_ids = ids.clone()
    other_ids[0, 8:] = (other_ids[0, 8:] + 9) % vocab_size
    changes = (packed(other_ids, uses_mask=False)[0] - unmasked).norm(dim=(1, 2))
    has_experts = any("expert" in name for name, _ in body.named_modules())
    # Error relative to that of a branch without its prefix.
    errors = [((found - own).norm() / (alone - own).norm()).item() for found in (plain, masked, unmasked)]
    return (
        max(errors) < ALLOWED_ERROR
        and (changes[1] / changes[0]).item() < (ALLOWED_LEAK_OF_EXPERTS if has_experts else ALLOWED_LEAK)
        and len(windows) == model.config.get_text_config().num_hidden_layers
        and _asks_for_its_windows(model, set(windows))
    )


def _asks_for_its_windows(model: PreTrainedModel, asked: set[int | None]) -> bool:
    """Whether layers pass every window of the config to the attention function: transformers puts some into masks only."""
    config = model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or [])
    if "chunked_attention" in kinds:
        return False
    has_window = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    return not (has_window and window) or window in asked
