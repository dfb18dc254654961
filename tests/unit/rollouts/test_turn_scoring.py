"""Reward functions that return a number per turn: what they leave in a rollout, and what is refused."""

import asyncio

import pytest
import torch

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.envs.base import check_environment
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.credit import credit_inputs, make_groups
from fuchsia_pl.rollouts.scoring import RewardError, score_group
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn
from tests.doubles import TinyEnvironment


def played(sibling: int, sizes) -> Rollout:
    """A rollout with turns of these numbers of tokens."""
    rollout = Rollout({"n": 7}, item_index=3, sibling=sibling, temperature=1.0, prompt="")
    rollout.start([1])
    for size in sizes:
        completion = Completion((5,) * size, (-1.0,) * size, "stop", None, policy_version=0)
        rollout.append(Turn(completion, "", "", "", ""))
    return rollout


def score(*functions, weights=None, on_error="stop", sizes=((2, 1), (1,))) -> list[Rollout]:
    environment = TinyEnvironment()
    environment.reward_functions, environment.reward_weights = list(functions), weights or {}
    environment.on_error = on_error
    check_environment(environment)
    rollouts = [played(sibling, turns) for sibling, turns in enumerate(sizes)]
    asyncio.run(score_group(environment, rollouts))
    return rollouts


def each_turn(rollouts, *args, **kwargs):
    return [[1.0, -0.25], [True]]


def whole(rollouts, *args, **kwargs):
    return [0.5, 0.0]


async def too(rollouts):
    return [[0, 2], [4]]


def test_the_reward_of_a_function_that_scores_turns_is_their_sum_and_its_turns_are_kept_by_name():
    first, second = score(each_turn, whole, too, weights={"each_turn": 2.0, "too": 0.5})
    assert first.rewards == {"each_turn": 0.75, "whole": 0.5, "too": 2.0}
    assert first.turn_rewards == {"each_turn": [1.0, -0.25], "too": [0.0, 2.0]}
    # 2 * 1 + 0.5 * 0 and 2 * -0.25 + 0.5 * 2; in all 0.5 more
    assert (first.weighted_turn_rewards, first.reward) == ([2.0, 0.5], 3.0)
    assert (second.turn_rewards, second.weighted_turn_rewards) == ({"each_turn": [1.0], "too": [4.0]}, [4.0])


def test_without_a_function_that_scores_turns_there_are_no_rewards_of_turns():
    assert [(r.turn_rewards, r.weighted_turn_rewards) for r in score(whole)] == [({}, []), ({}, [])]


def test_none_leaves_a_rollout_unscored_beside_lists():
    def sometimes(rollouts):
        return [None, [3.0]]

    first, second = score(sometimes)
    assert (first.rewards, first.turn_rewards, first.weighted_turn_rewards, first.reward) == (
        {"sometimes": None},
        {},
        [],
        None,
    )
    assert (second.turn_rewards, second.reward) == ({"sometimes": [3.0]}, 3.0)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (
            [[1.0], [1.0]],
            r"a list of 1 for sibling 0, which has 2 turns, on item 3, .*: it must have one number per turn",
        ),
        ([[1.0, 2.0], []], r"a list of 0 for sibling 1, which has 1 turns, on item 3"),
        (
            [[1.0, 2.0], 1.0],
            r"1\.0 for sibling 1 and lists for others on item 3, .*: it must return a number for each rollout, or",
        ),
        ([1.0, [1.0]], r"1\.0 for sibling 0 and lists for others"),
        ([(1.0, 2.0), [1.0]], r"\(1\.0, 2\.0\) for sibling 0 and lists for others"),
        ([[1.0, float("nan")], [1.0]], r"nan on item 3, .*: rewards are finite numbers"),
        ([[1.0, None], [1.0]], r"None on item 3"),
        ([[1.0, [2.0]], [1.0]], r"\[2\.0\] on item 3"),
    ],
)
def test_a_wrong_form_is_refused_in_one_line_that_names_the_function(returned, words):
    def wrong(rollouts):
        return returned

    with pytest.raises(RewardError, match=rf"^the reward function 'wrong' returned {words}") as caught:
        score(wrong)
    assert "\n" not in str(caught.value)
    unscored = score(wrong, on_error="unscored")
    assert [(rollout.reward, rollout.counts["reward_errors"]) for rollout in unscored] == [(None, 1), (None, 1)]


def test_numbers_of_turns_that_are_too_large_are_refused_although_their_sum_is_not():
    def huge(rollouts):
        return [[3e38, -3e38], [0.0]]

    with pytest.raises(
        RewardError, match=r"sibling 0 is 0 on item 3, .*: huge 0 \(turns \[3e\+38, -3e\+38\]\) x weight 2"
    ):
        score(huge, weights={"huge": 2.0})
    assert score(huge)[0].reward == 0.0


def inputs_of(rollouts: list[Rollout]):
    return credit_inputs(LossConfig("rloo"), make_groups([rollouts]), {}, TrainerSignals(None, None))


def test_rewards_of_turns_are_at_the_last_tokens_of_their_turns():
    inputs = inputs_of(score(each_turn))
    assert inputs.turn_rewards.tolist() == [[0.0, 1.0, -0.25], [1.0, 0.0, 0.0]]
    assert inputs.turn_rewards.dtype == torch.float64


def test_the_reward_of_a_turn_without_tokens_belongs_to_the_token_before_it_and_nothing_is_lost():
    def ones(rollouts):
        return [[1.0] * len(rollout.turns) for rollout in rollouts]

    rollouts = score(ones, sizes=((2, 0, 1), (0, 1), (0,), ()))
    # The second starts with such a turn, which no token is before. The last two have no token, so they are no rows.
    assert inputs_of(rollouts).turn_rewards.tolist() == [[0.0, 2.0, 1.0], [2.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert [rollout.reward for rollout in rollouts] == [3.0, 2.0, 1.0, 0.0]


def test_turns_of_a_rollout_that_is_not_scored_do_not_count():
    def broken(rollouts):
        raise ValueError("by hand")

    rollouts = score(each_turn, broken, on_error="unscored")
    assert [rollout.turn_rewards for rollout in rollouts] == [{"each_turn": [1.0, -0.25]}, {"each_turn": [1.0]}]
    assert not inputs_of(rollouts).turn_rewards.any()


def test_a_rollout_whose_tool_server_died_has_no_rewards_of_turns():
    environment = TinyEnvironment()
    environment.reward_functions, environment.reward_weights = [one_each], {}
    lost, whole_one = played(0, (1, 1)), played(1, (1,))
    lost.finish(RolloutStatus.TOOL_ERROR)
    asyncio.run(score_group(environment, [lost, whole_one]))
    assert (lost.turn_rewards, lost.reward, whole_one.turn_rewards) == ({}, None, {"one_each": [1.0]})


def one_each(rollouts):
    return [[1.0] for _ in rollouts]
