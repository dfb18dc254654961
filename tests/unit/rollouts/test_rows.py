"""Rollouts of several rows: a history that was rewritten begins a new row, which shares the rollout's reward."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.batch import PolicyOutput, StepInfo, TrainerSignals
from fuchsia_pl.callbacks.rollout_log import gap_lines, row_line, token_fields
from fuchsia_pl.envs.base import check_environment
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.report.selection import Selection
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced, split_filled
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.credit import credit_inputs, make_groups, make_samples, signals_of
from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.metrics import PhaseCounts, step_fractions
from fuchsia_pl.rollouts.mini_batches import split_rows
from fuchsia_pl.rollouts.staleness import drop_stale
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, ConfigError, Rollout, RolloutStatus, Turn
from tests.doubles import TinyEnvironment

NO_SIGNALS = TrainerSignals(None, None)
P0, P1, Q0, A0, A1, B0, E0 = 1, 2, 3, 21, 22, 31, 9


def turn(*ids: int, version: int = 0) -> Turn:
    return Turn(Completion(ids, tuple(-0.1 * i for i in ids), "stop", None, version), f"<{ids[0]}>", "", "", "")


def make_rollout(*rows: tuple[list[int], list[int]], reward: float | None = 1.0, sibling: int = 0) -> Rollout:
    """A finished rollout; each row is a prompt and one sampled turn."""
    rollout = Rollout({}, item_index=0, sibling=sibling, temperature=1.0, prompt="p", step=0, reward=reward)
    for number, (prompt, sampled) in enumerate(rows):
        if number == 0:
            rollout.start(prompt)
        else:
            rollout.branch(prompt, f"p{number}", [{"role": "user", "content": str(number)}])
        rollout.append(turn(*sampled))
    rollout.finish()
    return rollout


BRANCHED = [([P0, P1], [A0, A1]), ([P0, Q0], [B0])]


def test_a_branch_closes_the_row_and_starts_another_one_drawn_with_letters():
    # row 0: P0 P1 A0 A1 E0      row 1: P0 Q0 B0
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="first")
    rollout.start([P0, P1])
    rollout.append(turn(A0, A1, version=4))
    rollout.append_environment([E0])
    rollout.branch([P0, Q0], "second", [{"role": "user", "content": "q"}])
    rollout.append(turn(B0, version=3))
    first, second = rollout.rows
    assert (first.token_ids, second.token_ids) == ([P0, P1, A0, A1, E0], [P0, Q0, B0])
    assert (first.loss_mask, second.loss_mask) == ([False, False, True, True, False], [False, False, True])
    assert second.sampling_logprobs == [0.0, 0.0, pytest.approx(-3.1)]
    assert (first.prompt, second.prompt, rollout.prompt) == ("first", "second", "second")
    assert [m["content"] for m in first.messages] == ["<21>"]
    assert [m["content"] for m in second.messages] == ["q", "<31>"]
    assert (rollout.num_prompt_tokens, rollout.num_sampled_tokens, rollout.completion) == (2, 3, "<21><31>")
    assert [t.text for t in rollout.all_turns] == ["<21>", "<31>"]
    assert [t.text for t in rollout.turns] == ["<31>"]
    assert rollout.policy_version == 3
    assert rollout.policy_versions == [-1, -1, 4, 4, -1, -1, -1, 3]


def test_a_row_of_which_nothing_was_sampled_is_replaced():
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="first")
    rollout.start([P0])
    rollout.branch([Q0], "second")
    assert [(row.prompt, row.token_ids) for row in rollout.rows] == [("second", [Q0])]


def test_a_branch_is_made_between_turns_only():
    rollout = make_rollout(([P0], [A0]))
    with pytest.raises(RuntimeError, match="has ended"):
        rollout.branch([Q0])
    rollout.status = None
    rollout.respond("go on")
    with pytest.raises(RuntimeError, match="responses that no turn follows"):
        rollout.branch([Q0])


def test_all_rows_share_the_advantage_and_a_group_counts_rollouts():
    """Rewards 1 and 0: with a baseline over rows the mean would be 2/3, and not 1/2."""
    siblings = [make_rollout(*BRANCHED, reward=1.0), make_rollout(([P0, P1], [B0]), reward=0.0, sibling=1)]
    samples = make_samples(LossConfig("dr_grpo"), make_groups([siblings]), {}, NO_SIGNALS, lambda values: values)
    assert [(s.rollout.sibling, s.row_number, s.advantages) for s in samples] == [
        (0, 0, (0.5, 0.5)),
        (0, 1, (0.5,)),
        (1, 0, (-0.5,)),
    ]
    assert [sample.is_first for sample in samples] == [True, False, True]
    inputs = credit_inputs(LossConfig("dr_grpo"), make_groups([siblings]), {}, NO_SIGNALS)
    assert inputs.lengths.tolist() == [3, 1]
    assert inputs.turn_ends.tolist() == [[False, True, True], [True, False, False]]


def test_every_sampled_id_is_trained_once():
    siblings = [make_rollout(*BRANCHED, reward=1.0), make_rollout(([P0, P1], [41, 42]), reward=0.0, sibling=1)]
    samples = make_samples(LossConfig("dr_grpo"), make_groups([siblings]), {}, NO_SIGNALS, lambda values: values)
    for shares in (False, True):
        batches = make_batches(split_balanced(samples, 2, shares), StepInfo(0, count_denominators(samples, 8), 0))
        trained = [int(token) for batch in batches for token in batch.labels[batch.loss_mask]]
        assert sorted(trained) == [A0, A1, B0, 41, 42]


def test_rows_that_begin_differently_have_no_common_prefix():
    siblings = [make_rollout(([P0], [A0]), ([P1, P0], [B0]), sibling=0), make_rollout(([P0], [A1]), ([Q0, P0], [B0]))]
    samples = [Sample(r, (1.0,), row_number=number) for r in siblings for number in (0, 1)]
    (units,) = split_balanced(samples, 1, shares_prefix=True)
    assert sorted(len(unit) for unit in units) == [1, 1, 2]
    (batch,) = make_batches([units], StepInfo(0, count_denominators(samples, 8), 0))
    first = 0
    for group in batch.groups:
        shared = batch.input_ids[first : first + group.num_rows, : group.prefix_length]
        assert (shared == shared[0]).all()
        first += group.num_rows


def test_rollouts_are_counted_once_and_tokens_of_all_rows():
    siblings = [make_rollout(*BRANCHED), make_rollout(([P0, P1], [B0, A0, A1]), sibling=1)]
    groups = make_groups([siblings])
    samples = [Sample(siblings[0], (1.0, 1.0), row_number=0), Sample(siblings[0], (1.0,), row_number=1)]
    samples.append(Sample(siblings[1], (1.0,) * 3, row_number=0))
    counted = count_denominators(samples, 8)
    assert (counted.num_tokens, counted.num_rollouts) == (6, 2)
    (rows,) = split_rows(groups, samples, 1)
    assert (rows.samples, rows.unused) == (tuple(samples), ())
    assert [len(part.samples) for part in split_rows([*groups, *groups], [*samples, *samples], 2)] == [3, 3]
    environment = TinyEnvironment()
    for sibling in siblings:
        sibling.rewards = {"even": 1.0, "ended": 1.0}
    fractions = step_fractions(PhaseCounts(Sampled(groups, [], 0, seconds=1.0), 2, 0), environment, 1)
    assert fractions["rollout/turns"] == (3, 2.0)
    assert fractions["rollout/completion_tokens"] == (6, 2.0)
    assert fractions["rollout/environment_tokens"] == (0, 2.0)
    assert fractions["rollout/untrained"] == (0.0, 1.0)


def test_a_rollout_with_an_old_row_is_dropped_whole():
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.start([P0])
    rollout.append(turn(A0, version=2))
    rollout.branch([P1])
    rollout.append(turn(A1, version=5))
    samples = [Sample(rollout, (1.0,), row_number=number) for number in (0, 1)]
    assert drop_stale(samples, step=5, max_staleness=3) == samples
    assert drop_stale(samples, step=6, max_staleness=3) == []


def test_the_trainers_signals_come_back_in_the_order_of_the_rows():
    rollout = make_rollout(*BRANCHED)
    samples = [Sample(rollout, (0.0,), row_number=1), Sample(rollout, (0.0, 0.0), row_number=0)]
    batches = make_batches([[[sample]] for sample in samples], StepInfo(0, count_denominators(samples, 8), 0))
    kl = [torch.tensor([[9.0, 0.3]]), torch.tensor([[9.0, 0.1, 0.2]])]
    found = signals_of(make_groups([[rollout]]), batches, [TrainerSignals(values, None) for values in kl])
    torch.testing.assert_close(found.kl, torch.tensor([[0.1, 0.2, 0.3]]))


def loss_by_token(config: LossConfig, samples: list[Sample], split) -> tuple[float, torch.Tensor]:
    """The step's loss and its gradient by the logprob of each sampled id; ids are unique."""
    counted = count_denominators(samples, max_completion_tokens=16)
    logprobs = (-0.5 - 0.01 * torch.arange(200)).requires_grad_()
    total = torch.zeros(())
    for batch in make_batches(split(samples), StepInfo(0, counted, 0)):
        policy = logprobs[batch.labels]
        old = policy.detach() - 0.05 * (batch.labels % 7)
        output = PolicyOutput(policy, torch.zeros_like(policy), None)
        total = total + policy_loss(config, batch, output, old, old, None).loss
    total.backward()
    return total.item(), logprobs.grad


def rollouts_of(lengths: list[list[int]]) -> list[Rollout]:
    """Siblings whose rows have these numbers of sampled ids, all unique, after a prompt of one id."""
    ids = iter(range(10, 200))
    return [
        make_rollout(*(([P0], [next(ids) for _ in range(n)]) for n in of), reward=float(place % 3), sibling=place)
        for place, of in enumerate(lengths)
    ]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=2, max_size=4),
    algorithm=st.sampled_from(["grpo", "dr_grpo", "dapo", "ppo", "cispo", "rloo"]),
    number=st.integers(1, 3),
)
def test_a_rollout_cut_into_rows_has_the_loss_and_the_gradient_of_one_row(lengths, algorithm, number):
    """With ratios per token, the cuts change nothing: neither token means, nor means over sequences, nor their counts."""
    config = LossConfig(algorithm, truncated="keep")
    found = []
    for of in (lengths, [[sum(rows)] for rows in lengths]):
        groups = make_groups([rollouts_of(of)])
        samples = make_samples(config, groups, {}, NO_SIGNALS, lambda values: values)
        found.append(loss_by_token(config, samples, lambda rows: split_balanced(rows, 1)))
        packed = loss_by_token(config, samples, lambda rows: split_balanced(rows, number, shares_prefix=True))
        found += [packed, loss_by_token(config, samples, lambda rows: split_filled(rows, 6, shares_prefix=False))]
    for loss, gradient in found[1:]:
        # rloo adds up tokens of both signs in float32: a sum of 1.3 has differed by 1.3e-6
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-5)


def test_each_row_has_a_line_in_the_logs_and_a_card_in_the_report(tiny_model):
    rollout = make_rollout(*BRANCHED)
    rollout.rewards = {"right": 1.0}
    chat = Chat(tiny_model)
    lines = []
    for number, row in enumerate(rollout.rows):
        lines.append({**row_line(rollout, number, 4, 0.5), **token_fields(row, (), chat)})
    assert [(line["row"], line["prompt"], line["completion"]) for line in lines] == [
        (0, "p", "<21>"),
        (1, "p1", "<31>"),
    ]
    assert [(line["prompt_ids"], line["completion_ids"]) for line in lines] == [([P0, P1], [A0, A1]), ([P0, Q0], [B0])]
    samples = [Sample(rollout, (0.5, 0.5), row_number=0), Sample(rollout, (0.5,), row_number=1)]
    (batch,) = make_batches([[samples]], StepInfo(4, count_denominators(samples, 8), 4))
    gaps = gap_lines(batch, batch.sampling_logprobs + 0.25)
    assert [(line["row"], line["gaps"]) for line in gaps] == [(0, [0.25, 0.25]), (1, [0.25])]
    selection = Selection(max_rollouts=10)
    for line in lines:
        selection.add(json.loads(json.dumps(line)), "train")
    for line in gaps:
        selection.add_gaps(line)
    shown = selection.rows()["rows"]
    assert [row["id"] for row in shown] == ["train-5-0-0", "train-5-0-0.1"]
    assert [part["text"] for part in shown[1]["parts"]] == ["p1", "<31>"]
    assert [json.loads(row["token_data"])[-1][2] for row in shown] == [[0.25, 0.25], [0.25]]
    assert (selection.num_rollouts, selection.num_shown) == (1, 1)


def test_a_line_of_a_rollout_of_one_row_does_not_name_the_row():
    assert "row" not in row_line(make_rollout(([P0], [A0])), 0, 4, 0.5)


def test_a_rollout_has_at_least_one_row():
    environment = TinyEnvironment()
    environment.max_rows = 0
    with pytest.raises(ConfigError, match="max_rows must be 1 or more, got 0"):
        check_environment(environment)


def test_a_truncated_rollout_keeps_its_status_over_all_rows():
    rollout = make_rollout(*BRANCHED)
    rollout.status = RolloutStatus.TRUNCATED
    samples = make_samples(
        LossConfig("dapo", truncated="mask"),
        make_groups([[rollout, make_rollout(([P0], [A0]), reward=0.0)]]),
        {},
        NO_SIGNALS,
        lambda values: values,
    )
    assert [sample.rollout is rollout for sample in samples] == [False]
