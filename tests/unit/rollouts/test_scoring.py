import asyncio
import time

import pytest
import torch

from fuchsia_pl.envs.bounded import LeftThreadsError
from fuchsia_pl.envs.rewards import Judge, MathAnswer
from fuchsia_pl.envs.rewards.model_reward import ModelReward
from fuchsia_pl.rollouts.scoring import RewardError, score_group
from fuchsia_pl.types import Rollout
from tests.doubles import TinyEnvironment, said


def score(*functions, weights=None, timeout_s=5.0, item=None, on_error="stop") -> list[Rollout]:
    environment = TinyEnvironment()
    environment.reward_functions = list(functions)
    environment.reward_weights = weights or {}
    environment.timeout_s, environment.on_error = timeout_s, on_error
    rollouts = [Rollout(item or {"n": 7}, item_index=3, sibling=s, temperature=1.0, prompt="") for s in range(2)]
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


def test_none_of_a_function_that_asks_for_it_unscores_the_rollout():
    def model(rollouts):
        return [-4.0, None]

    assert [rollout.reward for rollout in score(model, first)] == [-3.0, 0.0]  # the text that was not read wins
    model.none_unscores = True
    rollouts = score(model, first)
    assert [rollout.reward for rollout in rollouts] == [-3.0, None]
    assert [rollout.rewards["first"] for rollout in rollouts] == [1.0, 0.0]
    assert [rollout.reward for rollout in score(model, first, weights={"model": 0.0})] == [1.0, 0.0]  # a mere metric
    assert Judge("m", "x", "http://127.0.0.1:9/v1").none_unscores
    assert ModelReward.none_unscores


def test_each_function_gets_a_list_of_its_own():
    def reverses(rollouts):
        rollouts.reverse()
        return [float(10 + r.sibling) for r in reversed(rollouts)]

    def filters(rollouts):
        kept = [float(r.sibling) for r in rollouts]
        del rollouts[0]
        return kept

    async def adds(rollouts):
        rollouts.append(rollouts[0])
        return [0.0, 1.0]

    rollouts = score(reverses, filters, adds, first)
    names = ["reverses", "filters", "adds", "first"]
    assert [[r.rewards[name] for r in rollouts] for name in names] == [[10.0, 11.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]


class Unprintable:
    def __repr__(self):
        raise ValueError("no text")


def cyclic():
    item = {}
    item["self"] = item
    return item


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        ({(0, 1): "a"}, r"\{\(0, 1\): 'a'\}"),
        ({"a": Unprintable()}, "<Unprintable instance at"),
        ({"a": "\ud83d"}, r"\\ud83d"),
        (cyclic(), "self"),
    ],
)
def test_an_item_that_json_cannot_hold_ends_nothing_and_is_shown_where_an_error_needs_it(item, shown):
    def broken(rollouts):
        raise ValueError("by hand")

    assert [rollout.reward for rollout in score(first, item=item)] == [1.0, 0.0]
    with pytest.raises(RewardError, match=rf"raised ValueError: by hand on item 3, .*{shown}") as caught:
        score(broken, item=item)
    str(caught.value).encode()


def huge(rollouts):
    return [1e308, -1e308]


def large(rollouts):
    return [1e308, 1.0]


@pytest.mark.parametrize(
    ("functions", "weights", "words"),
    [
        (
            (huge, large),
            {},
            r"total reward of sibling 0 is inf on item 3, \{\"n\": 7\}: huge 1e\+308 x weight 1 \+ large 1e\+308 x",
        ),
        ((huge,), {"huge": 10.0}, r"sibling 0 is inf on item 3, .*: huge 1e\+308 x weight 10\."),
        ((first,), {"first": float("nan")}, r"sibling 0 is nan .*: first 1 x weight nan"),
        # Finite as float64, infinite as the float32 of an advantage; and a difference of two such.
        (
            (first,),
            {"first": 1e39},
            r"sibling 0 is 1e\+39 .*first 1 x weight 1e\+39\. A total and its parts must be finite",
        ),
        ((huge, large), {"large": -1.0}, r"sibling 0 is 0 .*huge 1e\+308 x weight 1 \+ large 1e\+308 x weight -1"),
    ],
)
def test_a_total_that_is_not_finite_is_told_with_its_parts(functions, weights, words):
    with pytest.raises(RewardError, match=words):
        score(*functions, weights=weights)
    rollouts = score(*functions, weights=weights, on_error="unscored")
    assert [(r.reward, r.counts["reward_errors"]) for r in rollouts] == [(None, 1), (None, 1)]


class AbortError(BaseException):
    """A BaseException that is not an Exception."""


ERRORS = {
    "SystemExit: 0": SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "CancelledError": asyncio.CancelledError(),
    "AbortError: by hand": AbortError("by hand"),
    "TimeoutError: the judge is slow": TimeoutError("the judge is slow"),  # its own, not that of the bound
    "GeneratorExit": GeneratorExit(),
    "StopIteration": StopIteration(),
}


@pytest.mark.parametrize("words", ERRORS)
def test_no_exception_of_a_reward_function_ends_anything_but_its_call(words):
    def broken(rollouts):
        raise ERRORS[words]

    with pytest.raises(RewardError, match=f"raised {words} on item 3"):
        score(broken)


@pytest.mark.parametrize("words", list(ERRORS)[:5])  # in a coroutine the last two would end it
def test_no_exception_of_an_async_reward_function_does_either(words):
    async def broken(rollouts):
        raise ERRORS[words]

    with pytest.raises(RewardError, match=f"raised {words} on item 3"):
        score(broken)


@pytest.mark.parametrize(
    "value",
    [torch.tensor([1.0, 2.0]), 10**5000, 1j, Unprintable(), "1", float("-inf")],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_no_number_is_refused_whatever_it_raises(value):
    def wrong(rollouts):
        return [1.0, value]

    with pytest.raises(RewardError, match=r"'wrong' returned .* on item 3, \{\"n\": 7\}: rewards are finite numbers"):
        score(wrong)


@pytest.mark.parametrize("on_error", ["stop", "unscored"])
def test_too_many_threads_that_run_on_end_the_run_whatever_is_done_about_errors(monkeypatch, on_error):
    def scored(rollouts):
        return [1.0 for _ in rollouts]

    monkeypatch.setattr("fuchsia_pl.envs.bounded.MAX_OTHER_THREADS", 0)
    with pytest.raises(LeftThreadsError, match=r"this process has .* threads beside the bounded calls of user code"):
        score(scored, on_error=on_error)


def test_a_function_with_limits_of_its_own_may_take_longer_than_the_environment():
    def slow(rollouts):
        time.sleep(0.3)
        return [1.0, 0.0]

    with pytest.raises(RewardError, match=r"'slow' took longer than 0\.05 s"):
        score(slow, timeout_s=0.05)
    slow.min_timeout_s = 30.0
    assert [rollout.reward for rollout in score(slow, timeout_s=0.05)] == [1.0, 0.0]


def test_answers_that_use_up_their_time_in_many_groups_at_once_score_0():
    """Each waits for workers that all groups share: the wait is no fault of a group."""
    math = MathAnswer(timeout_s=0.1, num_workers=1)
    environment = TinyEnvironment()
    environment.reward_functions, environment.reward_weights = [math], {}
    environment.timeout_s = 0.2
    groups = [[said(r"\boxed{9^{9^{9^9}}}", {"answer": "7"}) for _ in range(2)] for _ in range(4)]

    async def score_all():
        await asyncio.gather(*(score_group(environment, group) for group in groups))

    try:
        asyncio.run(score_all())
    finally:
        math.close()
    assert [rollout.reward for group in groups for rollout in group] == [0.0] * 8
    assert {rollout.counts["math_timeout"] for group in groups for rollout in group} == {1}
