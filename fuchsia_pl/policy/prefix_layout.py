"""Layout of a micro-batch whose rows share prefixes: one sequence without padding, `prefix | branch | branch | … | prefix | …`.

Shape letters: B rows, T input positions of the longest row, S tokens of the sequence, R groups, P tokens of the longest prefix,
M branches, L tokens of the longest branch, N pieces (prefixes and branches), K keys of all pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fuchsia_pl.batch import PrefixGroup


@dataclass(frozen=True)
class PackedGroup:
    """Places in the sequence of rows that share a prefix.

    Attributes:
        prefix: The common tokens.
        branches: The own tokens of each row that has some. They directly follow the prefix and each other.
    """

    prefix: slice
    branches: tuple[slice, ...]

    @property
    def own(self) -> slice:
        """The tokens of all branches."""
        return slice(self.prefix.stop, self.branches[-1].stop if self.branches else self.prefix.stop)

    @property
    def pieces(self) -> tuple[slice, ...]:
        """The prefix and the branches."""
        return (self.prefix, *self.branches)


@dataclass(frozen=True)
class Pieces:
    """All prefixes and branches as sequences of their own, in the order of the packed sequence.

    Attributes:
        keys: int64 [K], the tokens that the last token of each piece sees: a prefix itself, a branch its prefix and itself.
        query_ends: int32 [N + 1], 0 and the end of each piece among the tokens.
        key_ends: int32 [N + 1], 0 and the end of each piece among `keys`.
        longest: Tokens of the longest piece, and the largest number of keys of a piece.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]


@dataclass(frozen=True)
class PaddedPieces:
    """Prefixes and branches padded to two rectangles, for attention with a mask.

    Attributes:
        prefix_places: int64 [R, P], index in the sequence of each prefix token; 0 beyond its end.
        branch_places: int64 [M, L], index in the sequence of each branch token; 0 beyond its end.
        branch_groups: int64 [M], the prefix of each branch.
        prefix_lengths: int64 [M], tokens of each branch's prefix.
        outputs: int64 [S], index of each token among the R * P and M * L outputs of attention.
        masks: Attention masks by window and type, made on first use and shared by all layers.
    """

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
                torch.full((), value, dtype=dtype, device=self.outputs.device) for value in (0.0, -torch.inf)
            )
            self.masks[window, dtype] = torch.where(self._visible(window), seen, hidden)
        return self.masks[window, dtype]

    def _visible(self, window: int | None) -> Tensor:
        num_branches, num_tokens = self.branch_places.shape
        at = torch.arange(num_tokens, device=self.outputs.device).unsqueeze(1)
        keys = torch.arange(self.prefix_places.shape[1], device=self.outputs.device)
        lengths = self.prefix_lengths.reshape(-1, 1, 1)
        to_prefix, to_branch = keys < lengths, at >= at.T
        if window:
            to_prefix = to_prefix & (lengths + at - keys < window)
            to_branch = to_branch & (at - at.T < window)
        sides = [side.expand(num_branches, num_tokens, -1) for side in (to_prefix, to_branch)]
        return torch.cat(sides, dim=2).unsqueeze(1)


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Positions of a micro-batch's tokens in the packed sequence.

    Attributes:
        input_ids: int64 [1, S].
        position_ids: int64 [1, S], of each token in its own row.
        places: int64 [B, T], index in the sequence of each input position of a row; 0 for padding.
        groups: The R groups, in the order of the sequence.
        uses_mask: Whether attention is computed with a mask; None: where that is faster, or the only way.
        windows: Sliding window of each attention layer that has run on this layout, in order; None for a layer without.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    groups: tuple[PackedGroup, ...]
    uses_mask: bool | None = None
    windows: list[int | None] = field(default_factory=list)

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return max(_length(group.prefix) + max(map(_length, group.branches), default=0) for group in self.groups)

    @cached_property
    def pieces(self) -> Pieces:
        """The pieces for kernels that take sequences of different lengths."""
        keys = [
            _indices(piece) if piece is group.prefix else torch.cat([_indices(group.prefix), _indices(piece)])
            for group in self.groups
            for piece in group.pieces
        ]
        query_lengths = [_length(piece) for group in self.groups for piece in group.pieces]
        key_lengths = [len(each) for each in keys]
        device = self.places.device
        ends = [
            torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (query_lengths, key_lengths)
        ]
        return Pieces(torch.cat(keys).to(device), ends[0], ends[1], (max(query_lengths), max(key_lengths)))

    @cached_property
    def padded(self) -> PaddedPieces:
        """The pieces for attention with a mask."""
        prefixes = [_indices(group.prefix) for group in self.groups]
        branches = [_indices(branch) for group in self.groups for branch in group.branches]
        branch_groups = [number for number, group in enumerate(self.groups) for _ in group.branches]
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        computed = torch.cat([_filled(prefixes), _filled(branches)])
        outputs = torch.empty(self.input_ids.shape[1], dtype=torch.int64)
        outputs[torch.cat([*prefixes, *branches])] = computed.nonzero().squeeze(1)
        device = self.places.device
        return PaddedPieces(
            _padded(prefixes).to(device),
            _padded(branches).to(device),
            torch.tensor(branch_groups, dtype=torch.int64).to(device),
            lengths[branch_groups].to(device),
            outputs.to(device),
        )


def lay_out(input_ids: Tensor, lengths: Sequence[int], groups: Sequence[PrefixGroup]) -> SharedPrefixLayout:
    """Computes the layout of a micro-batch, on the device of its ids.

    Args:
        input_ids: int64 [B, T], padded on the right.
        lengths: Number of input positions of each row without padding.
        groups: Adjacent rows that share a prefix, and its length.
    """
    ids, positions, places, packed = [], [], [], []
    first_row, num_tokens = 0, 0

    def add(row: int, start: int, stop: int) -> slice:
        nonlocal num_tokens
        ids.append(input_ids[row, start:stop])
        positions.append(torch.arange(start, stop))
        num_tokens += stop - start
        return slice(num_tokens - (stop - start), num_tokens)

    for group in groups:
        prefix = add(first_row, 0, group.prefix_length)
        rows = range(first_row, first_row + group.num_rows)
        branches = [add(row, group.prefix_length, lengths[row]) for row in rows]
        places += [torch.cat([_indices(prefix), _indices(branch)]) for branch in branches]
        packed.append(PackedGroup(prefix, tuple(branch for branch in branches if _length(branch))))
        first_row += group.num_rows
    device = input_ids.device
    return SharedPrefixLayout(
        torch.cat(ids).unsqueeze(0),
        torch.cat(positions).unsqueeze(0).to(device),
        nn.functional.pad(_padded(places), (0, input_ids.shape[1] - max(lengths))).to(device),
        tuple(packed),
    )


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _indices(piece: slice) -> Tensor:
    return torch.arange(piece.start, piece.stop)


def _padded(pieces: list[Tensor]) -> Tensor:
    return pad_sequence(pieces, batch_first=True) if pieces else torch.zeros(0, 0, dtype=torch.int64)


def _filled(pieces: Sequence[Tensor]) -> Tensor:
    """Whether each position of the padded pieces holds a token; bool, row by row."""
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    return (torch.arange(int(lengths.max()) if pieces else 0) < lengths.unsqueeze(1)).flatten()
