"""A training phase without a trainer: draws, step records and micro-batches, derived by hand."""

import pytest
import torch

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.choice import Chooser, PhaseSizes
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.shares import Pool
from fuchsia_pl.rollouts.training_phase import Forward, TrainingPhase
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn
from tests.doubles import Spread


def make_phase(loss=None, rank=0, size=1, **sampling) -> TrainingPhase:
    sampling = SamplingConfig(**{"group_size": 2, "max_completion_tokens": 8, "max_length": 32, **sampling})
    ranks = Ranks(rank, size, reduce=lambda values, how: values)
    return TrainingPhase(Spread(), loss or LossConfig("grpo"), sampling, 7, 0, ranks)


def draw_of(phase: TrainingPhase, number: int, drawn: int, fitting=range(20)):
    """The draw of a phase of four items, and its spare items. `drawn` is the phase that determines them."""
    sizes = PhaseSizes(run_seed=7, batch_size=4, has_spare=phase.loss.parts.max_refills > 0)
    return phase.draw(number, Chooser([Pool("", 1.0, list(fitting))], sizes).choice(drawn))


def make_rollout(item: int, sibling: int, reward: float | None, num_tokens: int, version: int = 3) -> Rollout:
    rollout = Rollout({"n": item}, item, sibling, 1.0, "", step=3, rewards={"even_items": reward}, reward=reward)
    rollout.start([11, 12])
    ids = tuple(range(20, 20 + num_tokens))
    rollout.append(Turn(Completion(ids, (-1.0,) * num_tokens, "stop", None, version), "", "", "", ""))
    rollout.finish(RolloutStatus.COMPLETED)
    return rollout


def no_signals(batches):
    raise AssertionError("the objective needs no signals")


SPLIT = RolloutGroup((make_rollout(0, 0, 0.0, 2), make_rollout(0, 1, 1.0, 3)), has_spread=True)
ALIKE = RolloutGroup((make_rollout(1, 0, 1.0, 4), make_rollout(1, 1, 1.0, 1)), has_spread=False)
UNSCORED = RolloutGroup((make_rollout(2, 0, None, 2), make_rollout(2, 1, 1.0, 5)), has_spread=False)


def phase_batches(phase: TrainingPhase, groups, num_micro_batches=2, step=3):
    sampled = Sampled(list(groups), dropped=[], num_refills=0, seconds=2.0)
    return phase.batches(sampled, step, served_version=3, forward=Forward(num_micro_batches, False, no_signals))


def test_all_micro_batches_of_a_step_point_to_one_record():
    batches = phase_batches(make_phase(), [SPLIT, ALIKE, UNSCORED])
    assert len(batches) == 2
    info = batches[0].step
    assert all(batch.step is info for batch in batches)
    # Rows with tokens: 2 + 3 of item 0, 4 + 1 of item 1, 5 of item 2; the unscored rollout becomes no row. Only item 0 has
    # advantages, -1 and 1, so only its 5 tokens enter the forward.
    counted = info.denominators
    assert (counted.num_tokens, counted.num_rollouts, counted.num_forward_tokens) == (15, 5, 5)
    assert (info.step, info.policy_version, info.max_staleness, info.policy_update) == (3, 3, 0, 0)
    assert info.skip_reason is None
    assert [(r.item_index, r.sibling) for r in info.unused] == [(2, 0)]
    zero = [(sample.rollout.item_index, sample.rollout.sibling) for sample in info.zero_advantage]
    assert zero == [(1, 0), (1, 1), (2, 1)]
    assert sorted(sample.rollout.sibling for batch in batches for sample in batch.samples) == [0, 1]
    # of 6 rollouts 5 are scored, 4 with 1; 2 groups lack spread; one kept rollout became no row; 17 tokens in 2 s
    assert info.metrics["reward/mean"] == pytest.approx(4 / 5)
    assert info.metrics["rollout/zero_variance_groups"] == 2
    assert info.metrics["rollout/untrained"] == 1
    assert info.metrics["rollout/zero_advantage"] == 3
    assert info.metrics["rollout/dropped_prompts"] == 0
    assert info.metrics["perf/rollout_tokens_per_s"] == 8.5


def test_each_optimizer_step_of_a_phase_has_a_record_of_its_own():
    batches = phase_batches(make_phase(LossConfig("grpo", num_policy_updates=2)), [SPLIT], step=4)
    assert [(b.step.step, b.step.policy_update) for b in batches] == [(4, 0), (4, 0), (5, 1), (5, 1)]
    assert batches[0].step is batches[1].step
    assert batches[2].step is batches[3].step
    expected = [derived_seed(7, "dropout", 0, step, number) for step in (4, 5) for number in (0, 1)]
    assert [batch.dropout_seed for batch in batches] == expected
    assert torch.equal(batches[0].labels, batches[2].labels)


LATER = RolloutGroup((make_rollout(3, 0, 0.0, 1), make_rollout(3, 1, 1.0, 6)), has_spread=True)
TWO_BY_TWO = LossConfig("grpo", mini_batches=2, num_policy_updates=2)


def test_a_phase_is_all_mini_batches_once_and_then_all_of_them_again():
    batches = phase_batches(make_phase(TWO_BY_TWO), [SPLIT, ALIKE, UNSCORED, LATER], step=4)
    infos = [batch.step for batch in batches[::2]]
    assert [info is batch.step for info, batch in zip(infos, batches[1::2], strict=True)] == [True] * 4
    facts = [(info.step, info.phase_step, info.policy_update) for info in infos]
    assert facts == [(4, 0, 0), (5, 1, 0), (6, 2, 1), (7, 3, 1)]
    items = [sorted(s.rollout.item_index for b in batches[at : at + 2] for s in b.samples) for at in (0, 2, 4, 6)]
    assert items == [[0, 0], [3, 3]] * 2
    expected = [derived_seed(7, "dropout", 0, step, number) for step in (4, 5, 6, 7) for number in (0, 1)]
    assert [batch.dropout_seed for batch in batches] == expected
    # Items 0 and 1: rows of 2, 3, 4, 1 tokens, of which item 1 has no advantages. Items 2 and 3: 5 tokens of the scored sibling
    # of item 2, whose advantage is 0, and 1 + 6 of item 3.
    counted = [info.denominators for info in infos]
    assert [(c.num_tokens, c.num_rollouts, c.num_forward_tokens) for c in counted] == [(10, 4, 5), (12, 3, 7)] * 2
    zero = [[(s.rollout.item_index, s.rollout.sibling) for s in info.zero_advantage] for info in infos]
    assert zero == [[(1, 0), (1, 1)], [(2, 1)]] * 2
    assert [[(r.item_index, r.sibling) for r in info.unused] for info in infos] == [[], [(2, 0)]] * 2
    # All steps log the figures of the whole phase: of 8 rollouts 7 are scored, 5 with 1.
    assert [info.metrics["reward/mean"] for info in infos] == pytest.approx([5 / 7] * 4)


def test_the_first_step_has_the_micro_batches_whose_logprobs_are_needed_before_it():
    batches = phase_batches(make_phase(TWO_BY_TWO), [SPLIT, LATER])
    later = batches[0].step.later
    assert [batch.samples for batch in later] == [batch.samples for batch in batches[2:4]]
    assert all(one.labels is other.labels for one, other in zip(later, batches[2:4], strict=True))
    assert all(batch.step.later == () for batch in batches[2:])
    one = make_phase(LossConfig("grpo", num_policy_updates=3))
    assert all(batch.step.later == () for batch in phase_batches(one, [SPLIT, LATER]))


def test_a_mini_batch_without_rows_or_advantages_is_skipped_and_the_others_are_not():
    batches = phase_batches(make_phase(LossConfig("grpo", mini_batches=2)), [ALIKE, SPLIT])
    reasons = [batch.step.skip_reason for batch in batches[::2]]
    assert reasons == ["every advantage of the step is 0: the rewards do not differ", None]
    # Dynamic sampling kept one group of two. The groups that it dropped are logged with the first step.
    sampled = Sampled([SPLIT], dropped=[ALIKE], num_refills=0, seconds=2.0)
    phase = make_phase(LossConfig("dapo", mini_batches=2, truncated="keep"))  # a penalty would change the rewards
    batches = phase.batches(sampled, 3, 3, Forward(1, False, no_signals))
    first, second = (batch.step for batch in batches)
    assert first.skip_reason.startswith("none of the step's rollouts can be trained on")
    assert [rollout.item_index for rollout in first.unused] == [1, 1]
    assert second.skip_reason is None
    assert second.unused == ()


def test_the_mini_batches_of_two_ranks_are_those_of_one():
    def trained(rank: int, size: int) -> list[set[int]]:
        """Items of each step."""
        phase = make_phase(LossConfig("grpo", mini_batches=2), rank, size)
        draw, _ = draw_of(phase, 0, 0)
        groups = [
            RolloutGroup((make_rollout(item, 0, 0.0, 2), make_rollout(item, 1, 1.0, 3)), has_spread=True)
            for item in draw.indices
        ]
        batches = phase_batches(phase, groups, num_micro_batches=1)
        return [{sample.rollout.item_index for sample in batch.samples} for batch in batches]

    one, first, second = trained(0, 1), trained(0, 2), trained(1, 2)
    assert [len(items) for items in one] == [2, 2]
    assert one == [a | b for a, b in zip(first, second, strict=True)]


def test_the_signals_of_a_phase_are_computed_in_micro_batches_of_the_size_of_its_steps():
    asked = []

    def signals(batches):
        asked.append([len(batch.samples) for batch in batches])
        return [TrainerSignals(torch.full(batch.labels.shape, 0.5), None) for batch in batches]

    phase = make_phase(LossConfig("reinforce_pp", beta=0.1, mini_batches=2))
    phase.batches(Sampled([SPLIT, LATER], [], 0, 1.0), 3, 3, Forward(2, False, signals))
    assert asked == [[1, 1, 1, 1]]


def test_a_step_without_advantages_has_a_reason_to_be_skipped():
    batches = phase_batches(make_phase(), [ALIKE])
    assert batches[0].step.skip_reason == "every advantage of the step is 0: the rewards do not differ"
    assert [int(batch.loss_mask.sum()) for batch in batches] == [0, 0]
    failed = RolloutGroup((make_rollout(0, 0, None, 2), make_rollout(0, 1, None, 3)), has_spread=False)
    (batch,) = phase_batches(make_phase(), [failed], num_micro_batches=1)
    assert batch.step.skip_reason.startswith("none of the step's rollouts can be trained on")


def test_rows_of_weights_that_are_too_old_are_left_out():
    old = RolloutGroup((make_rollout(0, 0, 0.0, 2, version=0), make_rollout(0, 1, 1.0, 3, version=1)), has_spread=True)
    info = phase_batches(make_phase(max_staleness=2), [old])[0].step
    assert [(r.item_index, r.sibling) for r in info.unused] == [(0, 0)]
    assert (info.policy_version, info.max_staleness, info.metrics["rollout/stale"]) == (1, 2, 1)


def test_signals_are_computed_once_for_all_kept_rollouts():
    asked = []

    def signals(batches):
        asked.append([len(batch.samples) for batch in batches])
        return [TrainerSignals(torch.full(batch.labels.shape, 0.5), None) for batch in batches]

    phase = make_phase(LossConfig("rloo", beta=0.1))
    batches = phase.batches(Sampled([SPLIT], [], 0, 1.0), 3, 3, Forward(1, False, signals))
    assert asked == [[2]]
    assert batches[0].step.metrics["train/kl"] == pytest.approx(0.5)


def test_ranks_draw_disjoint_shares_of_the_fitting_items():
    whole, _ = draw_of(make_phase(), 2, 2)
    shares = [draw_of(make_phase(rank=rank, size=2), 2, 2)[0] for rank in range(2)]
    assert [index for pair in zip(*(s.indices for s in shares), strict=True) for index in pair] == whole.indices
    assert (whole.siblings, whole.address, whole.step) == (2, (7, "train", 2), 2)
    assert set(draw_of(make_phase(), 0, 0, fitting=range(10, 14))[0].indices) == {10, 11, 12, 13}
    assert draw_of(make_phase(TWO_BY_TWO), 2, 2)[0].step == 8  # the third phase of four steps
    repeated, _ = draw_of(make_phase(), 5, 2)
    assert (repeated.indices, repeated.address) == (whole.indices, (7, "train", 5))


def test_only_dynamic_sampling_draws_spare_items():
    draw, spare = draw_of(make_phase(LossConfig("dapo")), 0, 0)
    assert sorted([*draw.indices, *spare]) == list(range(20))
    assert draw_of(make_phase(), 0, 0)[1] == []
