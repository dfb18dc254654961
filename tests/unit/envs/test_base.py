from functools import partial

import pytest

from fuchsia_pl.envs.base import check_environment
from tests.doubles import TinyEnvironment, ended, even


def environment(functions, weights=None) -> TinyEnvironment:
    made = TinyEnvironment()
    made.reward_functions, made.reward_weights = functions, weights or {}
    return made


@pytest.mark.parametrize(
    ("functions", "weights", "words"),
    [
        ([], {}, "TinyEnvironment.reward_functions is empty"),
        ([even, even], {}, r"two functions of one name in \['even', 'even'\]"),
        ([even, ended], {"evne": 1.0}, r"reward_weights has \['evne'\]; the reward functions are \['even', 'ended'\]"),
        ([lambda rollouts: [0.0]], {}, "has no name to log it by"),
        ([partial(even)], {}, "has no name to log it by"),
    ],
)
def test_an_environment_that_could_not_be_trained_on_is_refused(functions, weights, words):
    with pytest.raises(ValueError, match=words):
        check_environment(environment(functions, weights))
