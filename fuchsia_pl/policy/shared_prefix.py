"""Computes a prefix shared by several rows once, followed by the own tokens of each row.

A micro-batch becomes one sequence without padding, `prefix | branch | branch | … | prefix | branch | …`, in which positions
restart after the prefix and a branch attends to its prefix and to itself. All layers but attention act on single tokens. The
model gets its own attention function through transformers' `AttentionInterface`. A dense 4-D mask over the whole sequence would
be equivalent, but computes every pair of branches only to mask it: with 8 completions of 200 tokens it gains nothing.

Shape letters: B rows, T input positions of the longest row, S tokens of the sequence, R groups, P tokens of the longest prefix,
M branches, L tokens of the longest branch, A attention heads, D width of a head.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuchsia_pl.batch import PrefixGroup

ATTENTION_NAME = "shared_prefix"
BASE_ATTENTION = "sdpa"
# Largest error of the check, relative to the error of a branch without its prefix; rounding in bfloat16 is far below.
ALLOWED_ERROR = 0.2
# Keys up to which the plain kernel is faster: 24 tokens over 64 keys took 3.8 ms against 8.0, 200 over 350 took 48 against 45.
SHORT_ON_CPU = 128


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Positions of a micro-batch's tokens in the packed sequence, and the attention pattern.

    Attributes:
        input_ids: int64 [1, S].
        position_ids: int64 [1, S], of each token in its own row.
        places: int64 [B, T], index in the sequence of each input position of a row; 0 for padding.
        prefix_places: int64 [R, P], index in the sequence of each prefix token; 0 beyond its end.
        branch_places: int64 [M, L], index in the sequence of each branch token; 0 beyond its end.
        branch_groups: int64 [M], the prefix of each branch.
        prefix_lengths: int64 [M], tokens of each branch's prefix.
        outputs: int64 [S], index of each token among the R * P and M * L outputs of attention.
        masks: Attention masks by window and type, made on first use and shared by all layers.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    prefix_places: Tensor
    branch_places: Tensor
    branch_groups: Tensor
    prefix_lengths: Tensor
    outputs: Tensor
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive attention mask of branches, [M, 1, L, P + L]: 0 where a key is visible, -inf where not."""
        if (window, dtype) not in self.masks:
            seen, hidden = (
                torch.full((), value, dtype=dtype, device=self.places.device) for value in (0.0, -torch.inf)
            )
            self.masks[window, dtype] = torch.where(self._visible(window), seen, hidden)
        return self.masks[window, dtype]

    def _visible(self, window: int | None) -> Tensor:
        num_branches, num_tokens = self.branch_places.shape
        at = torch.arange(num_tokens, device=self.places.device).unsqueeze(1)
        keys = torch.arange(self.prefix_places.shape[1], device=self.places.device)
        lengths = self.prefix_lengths.reshape(-1, 1, 1)
        to_prefix, to_branch = keys < lengths, at >= at.T
        if window:
            to_prefix = to_prefix & (lengths + at - keys < window)
            to_branch = to_branch & (at - at.T < window)
        sides = [side.expand(num_branches, num_tokens, -1) for side in (to_prefix, to_branch)]
        return torch.cat(sides, dim=2).unsqueeze(1)


def lay_out(input_ids: Tensor, lengths: Sequence[int], groups: Sequence[PrefixGroup]) -> SharedPrefixLayout:
    """Computes the layout of a micro-batch, on the device of its ids.

    Args:
        input_ids: int64 [B, T], padded on the right.
        lengths: Number of input positions of each row without padding.
        groups: Adjacent rows that share a prefix, and its length.
    """
    ids, positions, places, prefixes, branches = [], [], [], [], []
    branch_groups: list[int] = []
    first_row, num_tokens = 0, 0

    def add(row: int, start: int, stop: int) -> Tensor:
        nonlocal num_tokens
        ids.append(input_ids[row, start:stop])
        positions.append(torch.arange(start, stop))
        num_tokens += stop - start
        return torch.arange(num_tokens - (stop - start), num_tokens)

    for number, group in enumerate(groups):
        prefixes.append(add(first_row, 0, group.prefix_length))
        for row in range(first_row, first_row + group.num_rows):
            branch = add(row, group.prefix_length, lengths[row])
            places.append(torch.cat([prefixes[-1], branch]))
            if len(branch):
                branches.append(branch)
                branch_groups.append(number)
        first_row += group.num_rows
    device = input_ids.device
    prefix_places, branch_places = _padded(prefixes), _padded(branches)
    prefix_lengths = torch.tensor([group.prefix_length for group in groups])
    computed = torch.cat([_filled(prefixes), _filled(branches)])
    outputs = torch.empty(num_tokens, dtype=torch.int64)
    outputs[torch.cat([*prefixes, *branches])] = computed.nonzero().squeeze(1)
    return SharedPrefixLayout(
        torch.cat(ids).unsqueeze(0),
        torch.cat(positions).unsqueeze(0).to(device),
        nn.functional.pad(_padded(places), (0, input_ids.shape[1] - max(lengths))).to(device),
        prefix_places.to(device),
        branch_places.to(device),
        torch.tensor(branch_groups, dtype=torch.int64).to(device),
        prefix_lengths[branch_groups].to(device),
        outputs.to(device),
    )


def _padded(pieces: list[Tensor]) -> Tensor:
    return pad_sequence(pieces, batch_first=True) if pieces else torch.zeros(0, 0, dtype=torch.int64)


def _filled(pieces: Sequence[Tensor]) -> Tensor:
    """Whether each position of the padded pieces holds a token; bool, row by row."""
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    return (torch.arange(int(lengths.max()) if pieces else 0) < lengths.unsqueeze(1)).flatten()


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: SharedPrefixLayout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention over a layout in two calls: of the prefixes, and of the branches over prefix and branch.

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
    attend = ALL_ATTENTION_FUNCTIONS[BASE_ATTENTION]
    window = settings.get("sliding_window")
    if shared_prefix is None:
        mask = _window_mask(query.shape[2], window, query.device)
        return attend(module, query, key, value, mask, **settings)
    layout = shared_prefix
    of_prefix = [_pick(states, layout.prefix_places) for states in (query, key, value)]
    mask = _window_mask(layout.prefix_places.shape[1], window, query.device)
    with _fast_kernel(of_prefix[1]):
        computed = attend(module, *of_prefix, mask, **settings)[0].flatten(0, 1)
    if len(layout.branch_groups):
        of_branch = [_pick(states, layout.branch_places) for states in (query, key, value)]
        keys, values = (
            torch.cat([prefix[layout.branch_groups], branch], dim=2)
            for prefix, branch in zip(of_prefix[1:], of_branch[1:], strict=True)
        )
        visible = layout.mask(window, query.dtype)
        with _fast_kernel(keys):
            own = attend(module, of_branch[0], keys, values, visible, **settings)[0].flatten(0, 1)
        computed = torch.cat([computed, own])
    return _rows(computed, layout.outputs).unsqueeze(0), None


def _fast_kernel(keys: Tensor) -> AbstractContextManager[None]:
    """Selects torch's math attention for few keys: the backward of flash attention in bfloat16 is slow on a CPU."""
    is_short = keys.device.type == "cpu" and keys.shape[2] <= SHORT_ON_CPU
    return sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext()


def _pick(states: Tensor, places: Tensor) -> Tensor:
    """[1, A, S, D] at places [R, P] as [R, A, P, D]."""
    return _rows(states[0].transpose(0, 1), places).transpose(1, 2)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """`states[places]` for states [S, A, D], as an embedding: its backward sums rows much faster than that of indexing."""
    picked = nn.functional.embedding(places, states.flatten(1))
    return picked.unflatten(-1, states.shape[1:])


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
    layers pass to the attention function.

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
    except (TypeError, ValueError, RuntimeError, IndexError):  # a model that takes other arguments
        agrees = False
    finally:
        model.train(was_training)
    if not agrees:
        model.set_attn_implementation(BASE_ATTENTION)
    return agrees


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Compares the hidden states of two branches with those of plain rows under the model's own attention."""
    ids = torch.arange(3, 27, device=model.device).reshape(2, 12) % model.config.get_text_config().vocab_size
    ids[1, :8] = ids[0, :8]
    body = model.base_model
    own = body(input_ids=ids, use_cache=False).last_hidden_state[:, 8:].float()
    alone = body(input_ids=ids[:, 8:], use_cache=False).last_hidden_state.float()
    model.set_attn_implementation(ATTENTION_NAME)
    plain = body(input_ids=ids, use_cache=False).last_hidden_state[:, 8:].float()
    layout = lay_out(ids, (12, 12), (PrefixGroup(2, 8),))
    packed = (
        body(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, shared_prefix=layout)
        .last_hidden_state[0, layout.places][:, 8:]
        .float()
    )
    # Error relative to that of a branch without its prefix.
    errors = [((found - own).norm() / (alone - own).norm()).item() for found in (plain, packed)]
    return max(errors) < ALLOWED_ERROR and _asks_for_its_windows(model, {window for window, _ in layout.masks})


def _asks_for_its_windows(model: PreTrainedModel, asked: set[int | None]) -> bool:
    """Whether layers pass every window of the config to the attention function: transformers puts some into masks only."""
    config = model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or [])
    if "chunked_attention" in kinds:
        return False
    has_window = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    return not (has_window and window) or window in asked
