"""Rewards of turns as tensors: at the tokens of a rollout, and as returns of a group.

Shape letters: N groups, G siblings, K turns of the rollout with the most turns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fuchsia_pl.objectives.turns import turn_returns
from fuchsia_pl.types import Rollout


def turn_end_positions(rollout: Rollout) -> Tensor:
    """Position of the last token of each turn among the rollout's sampled tokens, int64 [turns].

    A turn without tokens has the position of the turn before it; it is -1 at the start.
    """
    sizes = [len(turn.completion.token_ids) for turn in rollout.all_turns]
    return torch.tensor(sizes, dtype=torch.int64).cumsum(dim=0) - 1


def add_turn_rewards(row: Tensor, rollout: Rollout) -> None:
    """Adds the weighted rewards of a rollout's turns to the last tokens of the turns.

    Args:
        row: float64, one number per sampled token, or more.
        rollout: A rollout. One that is not scored or has no sampled token adds nothing.
    """
    if rollout.reward is None or not rollout.weighted_turn_rewards or not rollout.num_sampled_tokens:
        return
    places = turn_end_positions(rollout).clamp(min=0)
    row.index_add_(0, places, torch.tensor(rollout.weighted_turn_rewards, dtype=torch.float64))


def group_returns(siblings: Sequence[Sequence[Rollout]], totals: Tensor) -> Tensor:
    """Returns of the siblings from each turn on, float64 [N, G, K].

    Args:
        siblings: The rollouts of each group.
        totals: Their rewards, float64 [N, G], NaN where a rollout was not scored or a group has fewer siblings.
    """
    num_turns = torch.zeros(totals.shape, dtype=torch.int64)
    most = max((len(rollout.all_turns) for group in siblings for rollout in group), default=1)
    turn_rewards = torch.zeros(*totals.shape, most, dtype=torch.float64)
    for place, group in enumerate(siblings):
        for sibling, rollout in enumerate(group):
            values = rollout.weighted_turn_rewards
            num_turns[place, sibling] = len(rollout.all_turns)
            turn_rewards[place, sibling, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return turn_returns(totals, turn_rewards, num_turns)
