import asyncio
from functools import partial

import pytest

from fuchsia_pl.envs.base import check_environment, check_rewards, weights_at
from fuchsia_pl.types import Rollout
from tests.doubles import TinyEnvironment, ended, even, said


def environment(functions, weights=None) -> TinyEnvironment:
    made = TinyEnvironment()
    made.reward_functions, made.reward_weights = functions, weights or {}
    return made


@pytest.mark.parametrize(
    ("functions", "weights", "words"),
    [
        ([even, even], {}, r"two functions with the same name in \['even', 'even'\]"),
        ([even, ended], {"evne": 1.0}, r"reward_weights has \['evne'\]; the reward functions are \['even', 'ended'\]"),
        ([even], {"even": float("inf")}, r"reward_weights must be finite numbers, got \{'even': inf\}"),
        ([lambda rollouts: [0.0]], {}, "has no name for logs"),
        ([partial(even)], {}, "has no name for logs"),
    ],
)
def test_invalid_environments_are_refused(functions, weights, words):
    with pytest.raises(ValueError, match=words):
        check_environment(environment(functions, weights))


def test_an_environment_without_rewards_is_refused_where_they_are_needed():
    check_environment(environment([]))
    check_rewards(environment([even]))
    with pytest.raises(ValueError, match=r"TinyEnvironment\.reward_functions is empty"):
        check_rewards(environment([]))


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("on_error", "ignore", 'on_error must be "stop" or "unscored", got \'ignore\''),
        ("max_steps", 0, "max_steps must be 1 or more, got 0"),
        ("timeout_s", 0.0, "timeout_s must be above 0, got 0.0"),
        ("max_response_chars", 0, "max_response_chars must be a whole number, 1 or more, got 0"),
        ("max_response_chars", 9.5, "max_response_chars must be a whole number, 1 or more, got 9.5"),
        ("initial_reward_weights", {"odd": 1.0}, r"initial_reward_weights has \['odd'\]"),
        ("thinking_marks", [("<think>", "")], r"thinking_marks is \[\('<think>', ''\)\]: it must be pairs"),
        ("thinking_marks", "<think>", "thinking_marks is '<think>': it must be pairs"),
        ("thinking_marks", [("<t>", "</t>"), ("<t>", "</u>")], "without repeated opening marks"),
        ("initial_reward_weights", {"even": 1.0}, "needs ramp_steps of 1 or more, got 0"),
    ],
)
def test_invalid_attributes_are_refused(attribute, value, words):
    made = environment([even])
    setattr(made, attribute, value)
    with pytest.raises(ValueError, match=words):
        check_environment(made)


def test_reward_weights_change_linearly_and_held_out_rollouts_use_the_final_ones():
    made = environment([even, ended], {"ended": 0.1})
    made.initial_reward_weights, made.ramp_steps = {"ended": 0.5}, 4
    check_environment(made)
    # from 0.5 to 0.1 in four steps: 0.1 a step
    found = [weights_at(made, step)["ended"] for step in (0, 1, 4, 9, None)]
    assert found == pytest.approx([0.5, 0.4, 0.1, 0.1, 0.1])
    assert weights_at(made, 0)["even"] == 1.0


def test_a_reward_function_is_closed_with_its_environment():
    class Reward:
        __name__ = "counted"
        counters = ("seen",)
        closed = 0

        def __call__(self, rollouts, *args, **kwargs):
            return [0.0 for _ in rollouts]

        def close(self):
            self.closed += 1

    reward = Reward()
    made = environment([reward, even])
    made.counters = ["own"]
    assert made.counter_names() == ["own", "seen"]
    asyncio.run(made.close())
    assert reward.closed == 1


def test_a_rollout_is_answered_only_while_it_runs():
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    with pytest.raises(RuntimeError, match="has no turn yet"):
        rollout.respond("a")
    finished = said("b")
    with pytest.raises(RuntimeError, match="has ended"):
        finished.respond("a")
    finished.status = None
    with pytest.raises(TypeError, match="takes a string, got int"):
        finished.respond(3)
