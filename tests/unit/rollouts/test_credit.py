import math

import pytest
import torch

from fuchsia_pl.batch import StepInfo, TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.credit import CriticSettings
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.rollouts.credit import (
    credit_inputs,
    kl_fraction,
    make_groups,
    make_samples,
    penalise_overlong,
    signals_of,
)
from fuchsia_pl.rollouts.scoring import RewardError
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Completion, ConfigError, Rollout, RolloutStatus, Turn

NO_SIGNALS = TrainerSignals(None, None)


def rollout(length: int, reward: float | None, truncated: bool = False, **rewards) -> Rollout:
    made = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="", rewards=rewards, reward=reward)
    made.start([1])
    made.append(Turn(Completion((5,) * length, (-1.0,) * length, "stop", None, policy_version=0), "", "", "", ""))
    made.finish(RolloutStatus.TRUNCATED if truncated else RolloutStatus.COMPLETED)
    return made


def credit(config: LossConfig, *siblings, signals=None, weights=None) -> list[tuple[float, ...]]:
    """Advantages per token of each row, rounded to 6 places."""
    samples = make_samples(config, make_groups(siblings), weights or {}, signals or NO_SIGNALS, lambda values: values)
    return [tuple(round(value, 6) for value in sample.advantages) for sample in samples]


def pair(first: float | None = 0.0, second: float | None = 1.0) -> list[Rollout]:
    return [rollout(1, first), rollout(2, second)]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # rewards 0 and 1 of lengths 1 and 2
        ("reward", [(0.0,), (1.0, 1.0)]),
        ("group_mean", [(-0.5,), (0.5, 0.5)]),
        # 0.5 / (0.70710678 + 0.0001)
        ("group_norm", [(-0.707007,), (0.707007, 0.707007)]),
        ("leave_one_out", [(-1.0,), (1.0, 1.0)]),
        # over the tokens 0, 1, 1: mean 2/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.57735027
        ("batch_norm", [(-1.154501,), (0.57725, 0.57725)]),
        # over the tokens -0.5, 0.5, 0.5: mean 1/6, the same deviations
        ("group_mean_batch_norm", [(-1.154501,), (0.57725, 0.57725)]),
    ],
)
def test_each_advantage_of_a_pair_by_hand(advantage, expected):
    assert credit(LossConfig("ppo", advantage=advantage), pair()) == expected


def with_turns(*rewards: float) -> Rollout:
    """A rollout of turns with one token and a reward each."""
    made = Rollout({}, 3, 0, 1.0, "", rewards={"right": sum(rewards)}, reward=sum(rewards))
    made.start([1])
    for _ in rewards:
        made.append(Turn(Completion((5,), (-1.0,), "stop", None, policy_version=0), "", "", "", ""))
    made.turn_rewards = {"right": list(rewards)}
    made.weighted_turn_rewards = list(rewards)
    made.finish(RolloutStatus.COMPLETED)
    return made


def test_rewards_of_turns_need_a_credit_of_tokens():
    turns = [with_turns(1.0, 0.0), with_turns(0.0, 0.0)]
    by_token = LossConfig("gspo", advantage="reward", ratio_level="sequence_token")
    assert credit(by_token, turns) == [(1.0, 0.0), (0.0, 0.0)]
    with pytest.raises(
        ConfigError, match=r"tokens of item 3 have advantages from 0 to 1 .* and ratio_level \"sequence\""
    ):
        credit(LossConfig("gspo", advantage="reward"), turns)
    assert credit(LossConfig("gspo", advantage="reward"), pair()) == [(0.0,), (1.0, 1.0)]


def test_every_group_is_on_its_own():
    rows = credit(LossConfig("dr_grpo"), pair(), pair(4.0, 2.0))
    assert rows == [(-0.5,), (0.5, 0.5), (1.0,), (-1.0, -1.0)]


def test_an_unscored_rollout_is_no_row_and_no_sibling():
    group = [rollout(1, 0.0), rollout(1, None), rollout(1, 1.0)]
    assert credit(LossConfig("rloo"), group) == [(-1.0,), (1.0,)]
    assert credit(LossConfig("reinforce_pp"), group) == [(-0.707007,), (0.707007,)]
    assert credit(LossConfig("rloo"), [rollout(1, None), rollout(1, None)]) == []


def test_a_truncated_rollout_that_is_masked_is_no_row_but_stays_a_sibling():
    group = [rollout(1, 0.0, truncated=True), rollout(1, 1.0), rollout(1, 2.0)]
    assert credit(LossConfig("dr_grpo", truncated="mask"), group) == [(0.0,), (1.0,)]  # mean 1 with it, 1.5 without
    assert credit(LossConfig("dr_grpo", truncated="keep"), group) == [(-1.0,), (0.0,), (1.0,)]


def test_a_rollout_without_sampled_tokens_is_no_row():
    assert credit(LossConfig("dr_grpo"), [rollout(0, 0.0), rollout(1, 1.0)]) == [(0.5,)]


def test_overlong_completions_are_punished_softly():
    # longest 10 with a slope of round(0.4 * 10) = 4: length 8 is half way, 10 at its end, 6 before it
    group = [rollout(6, 1.0), rollout(8, 1.0), rollout(10, 0.0, truncated=True), rollout(8, None)]
    config = LossConfig("dapo", overlong_buffer=0.4)
    groups = make_groups([group])
    penalise_overlong(config, groups, max_completion_tokens=10)
    assert [sibling.reward for sibling in group] == [1.0, 0.5, -1.0, None]
    assert [sibling.rewards["overlong"] for sibling in group] == [0.0, -0.5, -1.0, None]
    penalise_overlong(LossConfig("grpo"), groups, max_completion_tokens=10)
    assert [sibling.reward for sibling in group] == [1.0, 0.5, -1.0, None]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_length_alone_is_no_spread(aggregation):
    """Siblings that are all wrong get no advantages from their lengths; in a group with spread, the penalty counts."""
    config = LossConfig("dapo", reward_aggregation=aggregation)
    alike = [rollout(6, 0.0, right=0.0), rollout(10, 0.0, right=0.0)]
    differing = [rollout(6, 0.0, right=0.0), rollout(10, 1.0, right=1.0)]
    groups = make_groups([alike, differing])
    penalise_overlong(config, groups, max_completion_tokens=10)
    assert [sibling.reward for sibling in alike] == [0.0, -1.0]
    samples = make_samples(config, groups, {"right": 2.0}, NO_SIGNALS, lambda values: values)
    assert [set(sample.advantages) for sample in samples[:2]] == [{0.0}, {0.0}]
    # Summed first, 0 and 1 - 1 = 0 are alike and so 0 as well. Each for itself, the right one has 2 * 0.707 - 0.707 and the
    # wrong one the opposite; over the step's 0, 0, -0.707, 0.707 the deviation is sqrt(1 / 3), and 0.707 / 0.577 = 1.225.
    expected = 0.0 if aggregation == "sum_then_normalize" else 1.2247
    assert samples[3].advantages[0] == pytest.approx(expected, abs=2e-3)


def test_what_else_tells_siblings_apart_is_still_learned_beside_a_length_penalty():
    """A KL in the reward, and with GDPO rewards that only add up to the same: all but the lengths is as without the penalty."""
    for penalised in (True, False):
        truncated = "penalise" if penalised else "keep"
        alike = [rollout(6, 1.0), rollout(10, 1.0)]
        groups, config = make_groups([alike]), LossConfig("rloo", beta=0.1, truncated=truncated)
        penalise_overlong(config, groups, max_completion_tokens=10)
        signals = of(kl=[[0.5] * 6, [0.0] * 10])
        samples = make_samples(config, groups, {}, signals, lambda values: values)
        # 1 - 0.1 * 3 against 1
        assert [sample.advantages[0] for sample in samples] == pytest.approx([-0.3, 0.3])
        trade = [rollout(6, 1.0, a=1.0, b=0.0), rollout(10, 1.0, a=0.0, b=1.0), rollout(10, 1.0, a=0.0, b=1.0)]
        groups = make_groups([trade])
        config = LossConfig("dapo", reward_aggregation="normalize_then_sum", truncated=truncated)
        penalise_overlong(config, groups, max_completion_tokens=10)
        samples = make_samples(config, groups, {"b": 2.0}, NO_SIGNALS, lambda values: values)
        # a is 2/3, -1/3, -1/3 and b the opposite, both over 0.577: with b twice, the first has -1.155 and the others 0.577.
        # Over the step the deviation is 1, but for the 1e-4 in each division.
        assert [s.advantages[0] for s in samples] == pytest.approx([-1.1547, 0.5774, 0.5774], abs=2e-3)


def of(**rows) -> TrainerSignals:
    """Signals of rollouts in order, padded with a number that must not count."""

    def padded(name):
        longest = max(len(row) for row in rows[name])
        return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows[name]])

    return TrainerSignals(*(padded(name) if name in rows else None for name in ("kl", "values")))


def test_a_kl_in_the_reward_by_hand():
    group = pair()
    signals = of(kl=[[0.5], [0.2, 0.4]])
    # whole rollouts: 0 - 0.1 * 0.5 = -0.05 and 1 - 0.1 * 0.6 = 0.94; leave-one-out: the difference 0.99
    assert credit(LossConfig("rloo", beta=0.1), group, signals=signals) == [(-0.99,), (0.99, 0.99)]
    # per token: what is still to come, 1 - 0.02 - 0.04 and 1 - 0.04
    config = LossConfig("reinforce", beta=0.1)
    assert credit(config, group, signals=signals) == [(-0.05,), (0.94, 0.96)]


def test_gae_by_hand_with_the_values_its_targets_and_the_kl():
    # values 0.5 and (0.2, 0.6), gamma 1, lambda 0.5, rewards -0.1 kl and the total at the last token.
    # row 0: d = 0 - 0.05 - 0.5 = -0.55.   row 1: last 1 - 0.04 - 0.6 = 0.36; first -0.02 + 0.6 - 0.2 + 0.5 * 0.36 = 0.56
    group = pair()
    signals = of(kl=[[0.5], [0.2, 0.4]], values=[[0.5], [0.2, 0.6]])
    critic = CriticSettings(lam=0.5, whiten=False)
    config = LossConfig("ppo", advantage="gae", kl_in="reward", kl_estimator="k1", beta=0.1, critic=critic)
    assert credit(config, group, signals=signals) == [(-0.55,), (0.56, 0.36)]
    rows = make_samples(config, make_groups([group]), {}, signals, lambda values: values)
    assert rows[1].old_values == pytest.approx((0.2, 0.6))
    assert rows[1].value_targets == pytest.approx((0.76, 0.96))  # A + V
    critic.whiten = True
    # mean (-0.55 + 0.56 + 0.36) / 3 = 0.12333333, deviations -0.67333333, 0.43666667, 0.23666667,
    # variance (0.45337778 + 0.19067778 + 0.05601111) / 2 = 0.35003333, std 0.59163615
    first, second = credit(config, group, signals=signals)
    assert [*first, *second] == pytest.approx([-1.137896, 0.737942, 0.399956], abs=1e-5)


def test_normalising_before_summing_by_hand():
    # Two reward functions in two groups of two, weights 1 and 2.
    # a: (0, 1) -> -+0.70700679; (3, 3) -> 0, 0.      b: (0, 10) -> -+0.99998586 * 0.70710678 = -+0.70709678; the same.
    # sums: -+(0.70700679 + 2 * 0.70709678) = -+2.12120035; -+1.41419356
    # over the four rollouts: mean 0, variance 2 (4.49949092 + 1.99994343) / 3 = 4.33295623, std 2.08157542
    groups = [
        [rollout(1, 0.0, a=0.0, b=0.0), rollout(1, 21.0, a=1.0, b=10.0)],
        [rollout(1, 3.0, a=3.0, b=0.0), rollout(1, 23.0, a=3.0, b=10.0)],
    ]
    config = LossConfig("grpo", reward_aggregation="normalize_then_sum")
    rows = credit(config, *groups, weights={"b": 2.0})
    assert [row[0] for row in rows] == pytest.approx([-1.018988, 1.018988, -0.679353, 0.679353], abs=2e-6)
    after = credit(LossConfig("grpo"), *groups)
    assert [row[0] for row in after] == pytest.approx([-0.707103, 0.707103, -0.707102, 0.707102], abs=1e-5)


def test_a_function_that_did_not_score_a_rollout_leaves_it_to_the_others():
    group = [rollout(1, 0.0, a=0.0, b=None), rollout(1, 1.0, a=1.0, b=None)]
    config = LossConfig("grpo", reward_aggregation="normalize_then_sum")
    # a alone: -+0.70700679, whose std over the step is 0.99985859 ; 0.70700679 / (0.99985859 + 0.0001)
    assert [row[0] for row in credit(config, group)] == pytest.approx([-0.707036, 0.707036], abs=1e-6)


def test_the_moments_of_other_ranks_enter():
    # this rank's tokens 0, 1, 1; another rank's are the same with 2 added: count 6, sum 2 + 8, squares 2 + 4 + 9 + 9
    def over_two_ranks(values):
        assert values.tolist() == [3.0, 2.0, 2.0]
        return values + torch.tensor([3.0, 8.0, 22.0], dtype=torch.float64)

    config = LossConfig("reinforce_pp")
    samples = make_samples(config, make_groups([pair()]), {}, NO_SIGNALS, over_two_ranks)
    # mean 10/6, variance (24 - 6 * 25/9) / 5 = 1.46666667, std 1.21106014: (0 - 1.66666667) / 1.21116014
    assert samples[0].advantages[0] == pytest.approx(-1.37609, abs=1e-5)


def test_signals_of_batches_are_collected_by_rollout():
    group = pair()
    config = LossConfig("dr_grpo")
    groups = make_groups([group])
    samples = make_samples(config, groups, {}, NO_SIGNALS, lambda values: values)
    batches = make_batches(split_balanced(samples, 1), StepInfo(0, count_denominators(samples, 8), 0))
    # rows are ordered by length: row 0 is the rollout of two tokens
    kl = torch.tensor([[0.1, 0.2], [0.3, 9.0]])
    found = signals_of(groups, batches, [TrainerSignals(kl, None)])
    torch.testing.assert_close(found.kl, torch.tensor([[0.3, 0.0], [0.1, 0.2]]))
    assert found.values is None
    assert kl_fraction(groups, found) == (pytest.approx(0.6), 3.0)
    assert kl_fraction(groups, TrainerSignals(None, None)) is None


@pytest.mark.parametrize("loss_type", ["grpo", "reinforce", "reinforce_pp"])
def test_a_rank_without_groups_has_no_rows(loss_type):
    assert credit(LossConfig(loss_type)) == []


def test_normalising_before_summing_leaves_a_group_without_spread_at_zero():
    masked = rollout(1, 1.0, truncated=True, a=1.0)
    groups = [[rollout(1, 0.0, a=0.0), masked], [rollout(1, 1.0, a=1.0), rollout(1, 1.0, a=1.0)]]
    config = LossConfig("grpo", reward_aggregation="normalize_then_sum", truncated="mask")
    rows = credit(config, *groups)
    assert rows[0][0] < 0.0  # the better sibling is not a row, but still counts as a sibling
    assert rows[1:] == [(0.0,), (0.0,)]


def test_the_baseline_form_over_tokens_centres_long_rows_too():
    # group means leave -0.5, 0.5, 0.5, 0.5 and 0, 0 over the tokens: their mean 1/6 is taken from every token, as in the paper
    groups = [[rollout(1, 0.0), rollout(3, 1.0)], [rollout(1, 1.0), rollout(1, 1.0)]]
    rows = credit(LossConfig("reinforce_pp", advantage="group_mean_batch_norm"), *groups)
    assert rows[2] == rows[3] != (0.0,)


def test_a_step_on_which_only_the_critic_learns():
    # all rewards 1 and values 0: whitened advantages 0, targets 1
    group = [rollout(1, 1.0), rollout(1, 1.0)]
    config = LossConfig("ppo", advantage="gae", critic=CriticSettings(lam=1.0))
    rows = make_samples(config, make_groups([group]), {}, of(values=[[0.0], [0.0]]), lambda values: values)
    assert [row.advantages for row in rows] == [(0.0,), (0.0,)]
    assert [row.value_targets for row in rows] == [(1.0,), (1.0,)]


@pytest.mark.parametrize(
    ("config", "rewards", "word"),
    [
        # 3.4e38 - (-3.4e38) is finite in float64, and infinite in a batch's float32
        (
            LossConfig("rloo"),
            (-3.4e38, 3.4e38),
            "is -6.8e+38, from a total reward of -3.4e+38 with the parts right -3.4e+38",
        ),
        (LossConfig("dr_grpo"), (math.inf, 1.0), "with the parts right inf"),
    ],
)
def test_advantages_that_are_not_finite_are_refused_with_their_parts(config, rewards, word):
    group = RolloutGroup(tuple(rollout(1, reward, right=reward) for reward in rewards), has_spread=True)
    with pytest.raises(RewardError) as caught:
        make_samples(config, [group], {}, NO_SIGNALS, lambda values: values)
    assert word in str(caught.value)


def test_a_kl_or_a_value_that_is_not_finite_is_named():
    config = LossConfig("ppo", advantage="reward", beta=0.1, kl_in="reward")
    group = [rollout(1, 0.0, right=0.0), rollout(1, 1.0, right=1.0)]
    signals = of(kl=[[math.inf], [math.inf]])
    with pytest.raises(RewardError, match="is -inf, from a total reward of 0 with the parts right 0, KL inf"):
        make_samples(config, make_groups([group]), {}, signals, lambda values: values)
    signals = of(values=[[math.nan], [math.nan]])
    with pytest.raises(RewardError, match=r"is nan, .* largest value of the critic nan"):
        make_samples(LossConfig("ppo", advantage="gae"), make_groups([group]), {}, signals, lambda values: values)


@pytest.mark.parametrize("loss_type", ["grpo", "rloo", "reinforce", "reinforce_pp", "dapo"])
def test_a_rollout_that_failed_before_its_first_turn_is_left_out(loss_type):
    failed = Rollout({}, item_index=0, sibling=2, temperature=1.0, prompt="", rewards={}, reward=None)
    failed.start([1])
    failed.finish(RolloutStatus.ENV_ERROR)
    config = LossConfig(loss_type)
    with_it, without = (make_groups([[*pair(), *more]]) for more in ([failed], []))
    for groups in (with_it, without):
        penalise_overlong(config, groups, max_completion_tokens=8)
    made = [make_samples(config, groups, {}, NO_SIGNALS, lambda values: values) for groups in (with_it, without)]
    assert [sample.advantages for sample in made[0]] == [sample.advantages for sample in made[1]]
    assert len(made[0]) == 2


def test_the_tensors_of_credit_assignment_by_hand():
    # two turns of 2 and 1 sampled tokens with an answer between them, and a turn of 1; DAPO's slope is 2 of at most 4 tokens
    two_turns, short = rollout(2, 1.0, right=1.0, judge=None), rollout(1, None, right=None, judge=None)
    two_turns.status = None
    two_turns.append_environment([7, 7])
    two_turns.append(Turn(Completion((5,), (-1.0,), "stop", None, policy_version=0), "", "", "", ""))
    two_turns.finish(RolloutStatus.COMPLETED)
    config = LossConfig("dapo", overlong_buffer=0.5)
    groups = make_groups([[two_turns, short]])
    penalise_overlong(config, groups, max_completion_tokens=4)
    inputs = credit_inputs(config, groups, {"right": 2.0}, NO_SIGNALS)
    assert inputs.turn_ends.tolist() == [[False, True, True], [True, False, False]]
    assert (inputs.lengths.tolist(), inputs.trained.tolist()) == ([3, 1], [True, False])
    assert inputs.mask.tolist() == [[True, True, True], [True, False, False]]
    assert inputs.kept.tolist() == [[True, True, True], [False, False, False]]
    # 3 tokens are half way down the slope from 2 to 4
    assert str(inputs.rewards.tolist()) == "[[0.5, nan]]"
    assert str(inputs.penalties.tolist()) == "[[-0.5, nan]]"
    assert {name: str(values.tolist()) for name, values in inputs.rewards_by_name.items()} == {
        "right": "[[1.0, nan]]",
        "judge": "[[nan, nan]]",
    }
    assert inputs.reward_weights == {"right": 2.0}
