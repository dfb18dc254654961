import math

import pytest

from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.metrics import PhaseCounts, over_ranks, reward_fractions, step_fractions
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn
from tests.doubles import TinyEnvironment


def rollout(length: int, reward: float | None, truncated: bool = False) -> Rollout:
    rewards = {"even": reward, "ended": None}
    made = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="", rewards=rewards, reward=reward)
    made.append(Turn(Completion((5,) * length, (-1.0,) * length, "stop", None, policy_version=0), "", "", "", ""))
    made.finish(RolloutStatus.TRUNCATED if truncated else RolloutStatus.COMPLETED)
    return made


GROUP = RolloutGroup((rollout(1, 1.0), rollout(3, 0.0, truncated=True)), has_spread=True)
UNSCORED = RolloutGroup((rollout(2, 1.0), rollout(2, None)), has_spread=False)


def test_rewards_are_means_over_those_that_were_scored():
    # rewards 1, 0, 1 of three scored; right 2 of 4; lengths 1 + 3 + 2 + 2; 1 of 4 truncated; `ended` scored no rollout
    found = reward_fractions([*GROUP.rollouts, *UNSCORED.rollouts], TinyEnvironment(), world_size=1)
    assert found == {
        "reward/mean": (2.0, 3),
        "rollout/accuracy": (2, 4.0),
        "rollout/completion_tokens": (8, 4.0),
        "rollout/environment_tokens": (0, 4.0),
        "rollout/turns": (4, 4.0),
        "rollout/truncated_fraction": (1, 4.0),
        "rollout/tool_error_fraction": (0, 4.0),
        "rollout/env_error_fraction": (0, 4.0),
        "count/reward_errors": (0.0, 1.0),
        "reward/even": (2.0, 3),
        "reward/ended": (0, 0),
    }


def test_the_counts_of_a_step_by_hand():
    sampled = Sampled(kept=[GROUP], dropped=[UNSCORED], num_refills=1, seconds=2.0)
    counts = PhaseCounts(sampled, num_trained=1, num_zero_advantage=1, kl=(0.5, 4.0))
    found = over_ranks(step_fractions(counts, TinyEnvironment(), world_size=1), add_up=lambda values: values)
    assert found["rollout/zero_variance_groups"] == 1.0
    assert found["rollout/refilled_groups"] == 1.0
    assert found["rollout/dropped_groups"] == 1.0
    assert found["rollout/zero_advantage"] == 1.0
    assert found["rollout/untrained"] == 1.0  # one of the two kept rollouts became no row
    assert found["perf/rollout_tokens_per_s"] == 4.0  # 8 tokens in 2 s
    assert found["train/kl"] == 0.125
    assert math.isnan(found["reward/ended"])


def test_over_two_ranks_means_stay_means_and_counts_add_up():
    # the other rank has one rollout of length 4 with reward 0.5 in a kept group, sampled in 4 s
    other = RolloutGroup((rollout(4, 0.5),), has_spread=True)
    ours = step_fractions(PhaseCounts(Sampled([GROUP], [UNSCORED], 1, 2.0), 1, 0), TinyEnvironment(), world_size=2)
    theirs = step_fractions(PhaseCounts(Sampled([other], [], 0, 4.0), 1, 0), TinyEnvironment(), world_size=2)

    def add_up(values):
        import torch

        return values + torch.tensor(list(theirs.values()), dtype=torch.float64)

    found = over_ranks(ours, add_up)
    assert found["reward/mean"] == pytest.approx(2.5 / 4)
    assert found["rollout/completion_tokens"] == pytest.approx(12 / 5)
    assert found["rollout/dropped_groups"] == 1.0
    assert found["rollout/untrained"] == 1.0
    assert found["perf/rollout_tokens_per_s"] == pytest.approx(12 / 3)  # in the mean of 2 s and 4 s
