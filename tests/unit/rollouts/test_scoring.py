import asyncio
import time

import pytest

from fuchsia_pl.rollouts.scoring import RewardError, score_group
from fuchsia_pl.types import Rollout
from tests.doubles import TinyEnvironment


def score(*functions, weights=None, timeout_s=5.0) -> list[Rollout]:
    environment = TinyEnvironment()
    environment.reward_functions = list(functions)
    environment.reward_weights = weights or {}
    environment.timeout_s = timeout_s
    rollouts = [Rollout({"n": 7}, item_index=3, sibling=s, temperature=1.0, prompt="") for s in range(2)]
    asyncio.run(score_group(environment, rollouts))
    return rollouts


def first(rollouts, *args, **kwargs):
    return [1.0, 0.0]


async def second(rollouts):
    return [0.5, True]


def test_sync_and_async_rewards_are_weighted_and_kept_by_name():
    rollouts = score(first, second, weights={"second": 0.2})
    assert [rollout.rewards for rollout in rollouts] == [{"first": 1.0, "second": 0.5}, {"first": 0.0, "second": 1.0}]
    assert [rollout.reward for rollout in rollouts] == pytest.approx([1.1, 0.2])


def test_a_function_that_raises_is_told_with_its_name_its_item_and_its_own_error():
    def broken(rollouts):
        raise ZeroDivisionError("by hand")

    with pytest.raises(
        RewardError, match=r"'broken' raised ZeroDivisionError: by hand on item 3, \{\"n\": 7\}"
    ) as caught:
        score(broken)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned a list of 1 for 2 rollouts"),
        ([1.0, 2.0, 3.0], "returned a list of 3 for 2 rollouts"),
        (1.0, "returned a float for 2 rollouts"),
        (None, "returned a NoneType for 2 rollouts"),
        ([1.0, float("nan")], "returned nan"),
        ([1.0, "x"], "returned 'x'"),
        ([1.0, 10**400], "returned 1000"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned, words):
    def wrong(rollouts):
        return returned

    with pytest.raises(RewardError, match=words):
        score(wrong)


def test_a_function_that_hangs_is_told():
    def slow(rollouts):
        time.sleep(1.0)

    with pytest.raises(RewardError, match=r"'slow' took longer than 0.1 s on item 3"):
        score(slow, timeout_s=0.1)


def test_none_is_not_scored_and_counts_for_nothing():
    def sometimes(rollouts):
        return [2.0, None]

    def never(rollouts):
        return [None, None]

    rollouts = score(sometimes, first, weights={"sometimes": 0.5})
    assert [rollout.rewards["sometimes"] for rollout in rollouts] == [2.0, None]
    assert [rollout.reward for rollout in rollouts] == [2.0, 0.0]  # 0.5 * 2 + 1, and the other function's 0 alone
    assert [rollout.reward for rollout in score(sometimes)] == [2.0, None]
    assert [rollout.reward for rollout in score(never)] == [None, None]
