"""The packed sequence of rows that share prefixes, drawn with letters."""

import torch

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.prefix_layout import lay_out

# rows P Q A B | P Q C: one prefix of two, branches of two and one; then a row alone, which is all prefix: X Y Z
IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [7, 8, 9, 0]])


def layout():
    return lay_out(IDS, (4, 3, 3), (PrefixGroup(2, 2), PrefixGroup(1, 3)))


def test_tokens_and_places():
    drawn = layout()
    assert drawn.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9]]
    assert drawn.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert drawn.places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [5, 6, 7, 0]]
    assert drawn.longest_row == 4
    first, second = drawn.groups
    assert (first.prefix, first.branches, first.own) == (slice(0, 2), (slice(2, 4), slice(4, 5)), slice(2, 5))
    assert (second.prefix, second.branches, second.own) == (slice(5, 8), (), slice(8, 8))


def test_pieces_as_sequences_of_their_own():
    pieces = layout().pieces
    # P Q | A B with keys P Q A B | C with keys P Q C | X Y Z
    assert pieces.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert pieces.query_ends.tolist() == [0, 2, 4, 5, 8]
    assert pieces.key_ends.tolist() == [0, 2, 6, 9, 12]
    assert pieces.longest == (3, 4)


def test_pieces_padded_to_rectangles():
    padded = layout().padded
    assert padded.prefix_places.tolist() == [[0, 1, 0], [5, 6, 7]]
    assert padded.branch_places.tolist() == [[2, 3], [4, 0]]
    assert padded.branch_groups.tolist() == [0, 0]
    # Keys P Q and one of padding, then the branch itself: 2 1 - 0 - tokens before its first token, 3 2 - 1 0 before the second.
    seen = {window: (padded.mask(window, torch.float32)[:, 0] == 0).int().tolist() for window in (None, 2)}
    assert seen[None] == [[[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]] * 2
    assert seen[2] == [[[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]] * 2
    assert padded.mask(None, torch.float32).unique().tolist() == [-torch.inf, 0.0]
    # computed are P Q - X Y Z, then A B, C -
    assert padded.outputs.tolist() == [0, 1, 6, 7, 8, 3, 4, 5]
