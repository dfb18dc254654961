"""Credit of single turns: returns from each turn on, and their comparison among siblings.

Shape letters: N groups, G siblings of a group, R = N x G rollouts, T sampled tokens of the longest rollout, K turns of the
rollout with the most turns.
"""

import torch
from torch import Tensor

from fuchsia_pl.objectives.advantages import has_spread, leave_one_out_advantages


def turn_numbers(turn_ends: Tensor) -> Tensor:
    """Number of the turn of each sampled token.

    Args:
        turn_ends: bool [R, T], True at the last token of each turn.

    Returns:
        int64 [R, T], from 0. Behind the last turn it is the number of turns.

    >>> turn_numbers(torch.tensor([[False, True, False, True], [True, False, False, False]]))
    tensor([[0, 0, 1, 1],
            [0, 1, 1, 1]])
    """
    return turn_ends.cumsum(dim=1) - turn_ends.long()


def sum_by_turn(values: Tensor, turn_ends: Tensor) -> Tensor:
    """Sum of values over the tokens of each turn.

    Args:
        values: [R, T]; 0 behind the last turn.
        turn_ends: bool [R, T], True at the last token of each turn.

    Returns:
        [R, K], at least one column.

    >>> sum_by_turn(torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]]), torch.tensor([[False, True, True], [True, False, False]]))
    tensor([[3., 4.],
            [8., 0.]])
    """
    num_turns = max(turn_ends.sum(dim=1).tolist(), default=0)
    places = turn_numbers(turn_ends).clamp(max=max(num_turns - 1, 0))
    return values.new_zeros(len(values), max(num_turns, 1)).scatter_add(1, places, values)


def turn_returns(totals: Tensor, turn_rewards: Tensor, num_turns: Tensor) -> Tensor:
    """R_k = total reward less the rewards of the turns before k. Behind the last turn it is that of the last turn.

    Args:
        totals: Total rewards [N, G], NaN where a rollout was not scored.
        turn_rewards: Rewards of single turns, parts of the totals, [N, G, K]. What they leave of a total is at its end.
        num_turns: Turns of each rollout, int64 [N, G].

    Returns:
        [N, G, K].

    >>> turn_returns(torch.tensor([[4.0, 1.0]]), torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]), torch.tensor([[2, 1]]))
    tensor([[[4., 3.],
             [1., 1.]]])
    """
    before = turn_rewards.cumsum(dim=2) - turn_rewards
    last = (num_turns - 1).clamp(min=0).unsqueeze(2)
    places = torch.minimum(torch.arange(turn_rewards.shape[2]), last)
    return totals.unsqueeze(2) - before.gather(2, places)


def differ_by_turn(returns: Tensor) -> Tensor:
    """Whether the siblings of each group have different returns from some turn on.

    Args:
        returns: [N, G, K], see `turn_returns`.

    Returns:
        bool [N].

    >>> differ_by_turn(torch.tensor([[[1.0, 0.5], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]))
    tensor([ True, False])
    """
    by_turn = returns.transpose(1, 2)
    return has_spread(by_turn.flatten(0, 1)).reshape(by_turn.shape[:2]).any(dim=1)


def turn_group_advantages(returns: Tensor) -> Tensor:
    """A_ik = R_ik - mean of the other siblings' R_jk, where a sibling that ended earlier has the return of its last turn.

    Source: MT-GRPO, arXiv:2505.11821, for a given number of turns. There each turn's reward less the mean of the siblings that
    reached this turn is summed from each turn on. Where the policy chooses when to stop, what a rollout subtracts in all depends
    on its own number of turns, and each further turn costs the mean of that turn's reward. Here the baseline of a turn is one
    number that depends on the other siblings alone, so E[b grad log pi] = 0.

    Args:
        returns: [N, G, K], see `turn_returns`; NaN where a rollout was not scored.

    Returns:
        float64 [N, G, K]; over the siblings each turn sums to 0, with those that ended earlier.

    Raises:
        ValueError: A group has fewer than two siblings.

    >>> turn_group_advantages(torch.tensor([[[4.0, 3.0], [1.0, 1.0], [1.0, 0.5]]])).tolist()
    [[[3.0, 2.25], [-1.5, -0.75], [-1.5, -1.5]]]
    """
    by_turn = returns.transpose(1, 2)
    compared = leave_one_out_advantages(by_turn.flatten(0, 1))
    return compared.reshape(by_turn.shape).transpose(1, 2)


def at_tokens(values: Tensor, turn_ends: Tensor) -> Tensor:
    """Values of turns at each of their tokens.

    Args:
        values: [R, K].
        turn_ends: bool [R, T], True at the last token of each turn.

    Returns:
        [R, T]; behind the last turn it may be anything.

    >>> at_tokens(torch.tensor([[3.0, 4.0]]), torch.tensor([[False, True, True]]))
    tensor([[3., 3., 4.]])
    """
    return values.gather(1, turn_numbers(turn_ends).clamp(max=values.shape[1] - 1))
