"""Credit of turns: the exact gradient of a policy that chooses when to stop, the bias of MT-GRPO's form, and numbers by hand.

The policy of the exact gradient plays at most two turns of one token each. In the first turn it stops (token 0) or goes on in one
of two ways (1, 2); in the second turn it writes one of three tokens. Its parameters are a row of logits per state: the start, and
the two ways. A mean is over all groups of G rollouts with their probabilities: there is no sampling error.
"""

import itertools
import random

import pytest
import torch

from fuchsia_pl.batch import PolicyOutput, StepInfo, TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.credit import CriticSettings
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.objectives.turns import turn_group_advantages
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.rollouts.credit import make_groups, make_samples, penalise_overlong
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, Rollout, Turn

NO_SIGNALS, STOP = TrainerSignals(None, None), 0
BY_TURN = LossConfig("rloo", advantage="turn_group", sampler_correction=SamplerCorrection(mode="disabled"))
PATHS = [(STOP,), *itertools.product((1, 2), (0, 1, 2))]
LOGITS = torch.tensor([[0.4, -0.3, 0.2], [0.1, 0.5, -0.6], [-0.2, 0.3, 0.0]], dtype=torch.float64)
# Going on earns nothing at first, and much in the second turn: the better policy goes on more often.
FIRST = {STOP: 0.3, 1: 0.0, 2: -0.1}
SECOND = {(1, 0): 1.0, (1, 1): 0.6, (1, 2): 1.4, (2, 0): 0.7, (2, 1): 1.1, (2, 2): 0.3}
# What a reward function without turns gives to the whole rollout.
WHOLE = dict(zip(PATHS, (0.5, -0.4, 0.9, 0.0, 1.3, -0.7, 0.2), strict=True))


def rollout(sizes, reward: float | None, by_turn=(), tokens=None) -> Rollout:
    """A rollout with turns of these numbers of tokens and these rewards of turns. `reward` is the total."""
    made = Rollout({}, 0, 0, 1.0, "", weighted_turn_rewards=list(by_turn), reward=reward)
    made.start([0])
    ids = iter(tokens or [5] * sum(sizes))
    for number, size in enumerate(sizes):
        if number and tokens is None:
            made.append_environment([7, 7])
        completion = Completion(tuple(itertools.islice(ids, size)), (-1.0,) * size, "stop", None, policy_version=0)
        made.append(Turn(completion, "", "", "", ""))
    made.finish()
    return made


def rows_of(config: LossConfig, *groups, signals=NO_SIGNALS) -> list[Sample]:
    return make_samples(config, make_groups(groups, config.compares_turns), {}, signals, lambda values: values)


def credit(config: LossConfig, *groups, signals=NO_SIGNALS) -> list[list[float]]:
    """Advantages per token of each row, rounded to 6 places."""
    return [[round(value, 6) + 0.0 for value in row.advantages] for row in rows_of(config, *groups, signals=signals)]


def turns_of(path) -> list[float]:
    return [FIRST[path[0]], *(SECOND[path] for _ in path[1:])]


def mean_of(logits, value):
    """The mean of value(path) over the policy's paths."""
    start, *later = torch.log_softmax(logits, dim=1)
    chances = [(start[first] + sum(later[first - 1][token] for token in rest)).exp() for first, *rest in PATHS]
    return sum(chance * value(path) for chance, path in zip(chances, PATHS, strict=True))


def gradient_of(value) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(mean_of(logits, value), logits)[0]


def mean_gradient(groups, rows: list[Sample]) -> torch.Tensor:
    """The mean of minus the gradient of `policy_loss` over groups of paths, given the rows of all of them in order."""
    logits = LOGITS.clone().requires_grad_()
    logprobs, total, left = torch.log_softmax(logits, dim=1), 0.0, iter(rows)
    chance = {path: float(mean_of(LOGITS, lambda other, path=path: other == path)) for path in PATHS}
    for group in groups:
        own = list(itertools.islice(left, len(group)))
        (batch,) = make_batches(split_balanced(own, 1), StepInfo(0, count_denominators(own, 2), 0))
        of_batch = logprobs[batch.input_ids, batch.labels]  # the token before, 0 at the start, is the state
        known = of_batch.detach()
        output = PolicyOutput(of_batch, torch.zeros(batch.loss_mask.shape), None)
        loss = policy_loss(BY_TURN, batch, output, known, known, None).loss
        total = total + torch.tensor([chance[path] for path in group]).prod() * loss
    return -torch.autograd.grad(total, logits)[0]


def same(mean, expected) -> bool:
    return torch.allclose(mean, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_gradient_of_a_policy_that_chooses_when_to_stop_is_the_exact_one(size):
    groups = list(itertools.product(PATHS, repeat=size))
    rollouts = [
        [rollout([1] * len(path), sum(turns_of(path)) + WHOLE[path], turns_of(path), path) for path in group]
        for group in groups
    ]
    exact = gradient_of(lambda path: sum(turns_of(path)) + WHOLE[path])
    assert same(mean_gradient(groups, rows_of(BY_TURN, *rollouts)), exact)


def per_turn_index(paths) -> list[list[float]]:
    """The naive form: each turn's reward less the mean of the others that reached the turn, summed from each turn on."""
    found = []
    for own, path in enumerate(paths):
        others = [turns_of(other) for number, other in enumerate(paths) if number != own]
        centred = []
        for k, value in enumerate(turns_of(path)):
            reached = [turns[k] for turns in others if k < len(turns)]
            centred.append(value - sum(reached) / max(len(reached), 1))
        found.append([sum(centred[k:]) for k in range(len(centred))])
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_comparing_each_turn_with_those_that_reached_it_punishes_every_further_turn(size):
    # A rollout that goes on subtracts the second turn's mean m of the others, one that stops does not. m does not depend on its
    # own choice: the bias is -E[m] grad P(go on). m is 0 if no other goes on, else the mean of independent second rewards:
    # E[m] = (1 - P(stop)^(G-1)) E[second reward | go on]. Here it turns the gradient against going on.
    groups = list(itertools.product(PATHS, repeat=size))
    rows = [
        Sample(rollout([1] * len(path), 0.0, (), path), tuple(advantages))
        for group in groups
        for path, advantages in zip(group, per_turn_index(group), strict=True)
    ]
    naive, exact = mean_gradient(groups, rows), gradient_of(lambda path: sum(turns_of(path)))
    goes_on, second = (
        float(mean_of(LOGITS, of)) for of in (lambda path: len(path) > 1, lambda p: sum(turns_of(p)[1:]))
    )
    more = gradient_of(lambda path: len(path) > 1)
    bias = -(1 - (1 - goes_on) ** (size - 1)) * second / goes_on * more
    assert same(naive, exact + bias)
    assert (exact * more).sum() > 0.03 > -0.003 > (naive * more).sum()


def three() -> list[Rollout]:
    """Returns from turn 1 on 4, 1, 1; from turn 2 on 3 and 0.5, and 1 from the only turn of the second."""
    return [rollout([2, 1], 4.0, (1.0, 2.0)), rollout([5], 1.0, (1.0,)), rollout([1, 2], 1.0, (0.5, 0.5))]


def test_each_turn_is_compared_with_the_other_siblings_by_hand():
    # turn 1: 4 - (1 + 1) / 2, 1 - (4 + 1) / 2 twice.   turn 2: 3 - (1 + 0.5) / 2 and 0.5 - (3 + 1) / 2
    assert credit(BY_TURN, three()) == [[3.0, 3.0, 2.25], [-1.5] * 5, [-1.5, -1.5, -1.5]]
    assert credit(LossConfig("rloo"), three()) == [[3.0] * 3, [-1.5] * 5, [-1.5] * 3]


def test_groups_are_on_their_own_and_one_that_is_not_scored_is_no_sibling():
    other = [rollout([1], 2.0, (2.0,)), rollout([1, 1], None, (5.0, 6.0)), rollout([1], 0.0)]
    assert credit(BY_TURN, three(), other)[3:] == [[2.0], [-2.0]]


def test_a_kl_in_the_reward_is_paid_in_the_turn_that_it_arises_in():
    kl = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5, 0.0], [0.0] * 5])
    config = LossConfig("rloo", advantage="turn_group", beta=0.1)
    # costs 0.1 and 0.2; 0.1; none. returns: 3.7 and 2.8; 0.9; 1 and 0.5
    # turn 1: 3.7 - 0.95, 0.9 - 2.35, 1 - 2.3.   turn 2: 2.8 - 0.7 and 0.5 - 1.85
    expected = [[2.75, 2.75, 2.1], [-1.45] * 5, [-1.3, -1.35, -1.35]]
    assert credit(config, three(), signals=TrainerSignals(kl, None)) == expected


def test_rewards_of_turns_are_at_the_ends_of_turns_for_what_counts_the_rewards_to_come():
    # at the tokens: 0, 1, 2 + 1;   1 at the last of 5;   0.5, 0, 0.5
    expected = [[4.0, 4.0, 3.0], [1.0] * 5, [1.0, 0.5, 0.5]]
    assert credit(LossConfig("reinforce"), three()) == expected
    critic = CriticSettings(lam=1.0, whiten=False)
    nothing = TrainerSignals(None, torch.zeros(3, 5))
    assert credit(LossConfig("ppo", advantage="gae", critic=critic), three(), signals=nothing) == expected


def test_equal_rewards_from_different_turns_have_spread_and_advantages():
    trade = [rollout([1, 1], 1.0, (1.0, 0.0)), rollout([1, 1], 1.0, (0.0, 1.0))]
    assert [make_groups([trade], by_turn)[0].has_spread for by_turn in (False, True)] == [False, True]
    assert credit(BY_TURN, trade) == [[0.0, -1.0], [0.0, 1.0]]
    alike = [rollout([1, 1], 0.3, (0.1, 0.2)), rollout([1, 1], 0.1 + 0.2, (0.1, 0.2))]
    assert not make_groups([alike], by_turn=True)[0].has_spread
    assert credit(BY_TURN, alike) == [[0.0, 0.0], [0.0, 0.0]]


def test_a_length_alone_is_no_spread_of_turns_and_counts_where_turns_differ():
    config = LossConfig("dapo", advantage="turn_group", overlong_buffer=0.4)  # the slope is from 6 to 10 tokens
    alike = [rollout([3, 3], 1.0, (1.0, 0.0)), rollout([5, 5], 1.0, (1.0, 0.0))]
    # The penalty of -0.5 belongs to the end: returns 1 and 0 against 0.5 and 0.5
    trade = [rollout([3, 3], 1.0, (1.0, 0.0)), rollout([4, 4], 1.0, (0.0, 1.0))]
    groups = make_groups([alike, trade], by_turn=True)
    penalise_overlong(config, groups, max_completion_tokens=10)
    found = make_samples(config, groups, {}, NO_SIGNALS, lambda values: values)
    assert [row.advantages for row in found[:2]] == [(0.0,) * 6, (0.0,) * 10]
    assert [row.advantages for row in found[2:]] == [(0.5,) * 3 + (-0.5,) * 3, (-0.5,) * 4 + (0.5,) * 4]


def drawn_group(rng: random.Random, most_turns: int, scores_turns: bool) -> list[Rollout]:
    group = []
    for _ in range(rng.randrange(2, 6)):
        sizes = [rng.randrange(1, 4) for _ in range(rng.randrange(1, most_turns + 1))]
        by_turn = [rng.uniform(-2, 2) for _ in sizes] if scores_turns else []
        total = None if rng.random() < 0.1 else sum(by_turn) + rng.choice([0.0, 0.0, 1.0])
        group.append(rollout(sizes, total, by_turn))
    return group


@pytest.mark.parametrize(("most_turns", "scores_turns"), [(1, True), (1, False), (4, False)])
def test_with_one_turn_or_without_rewards_of_turns_it_is_leave_one_out(most_turns, scores_turns):
    rng = random.Random(0)
    for _ in range(30):
        group = drawn_group(rng, most_turns, scores_turns)
        expected = credit(LossConfig("rloo"), group)
        assert credit(BY_TURN, group) == [pytest.approx(row, abs=2e-6) for row in expected]


def test_the_order_of_siblings_does_not_matter_and_their_advantages_sum_to_zero():
    rng = random.Random(1)
    for _ in range(30):
        group = drawn_group(rng, 4, scores_turns=True)
        turned = group[1:] + group[:1]
        found = {id(row.rollout): row.advantages for row in rows_of(BY_TURN, group)}
        assert {id(row.rollout): pytest.approx(row.advantages) for row in rows_of(BY_TURN, turned)} == found
        assert sum(advantages[0] for advantages in found.values()) == pytest.approx(0.0, abs=1e-9)


def test_a_rollout_without_a_token_is_a_sibling_and_ranks_without_groups_have_no_rows():
    assert credit(BY_TURN, [rollout([], 3.0), rollout([1, 1], 1.0, (1.0, 0.0))]) == [[-2.0, -3.0]]
    assert credit(BY_TURN) == []


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="a group needs at least 2 siblings to compare, got 1"):
        turn_group_advantages(torch.zeros(1, 1, 2))
