"""A teacher's settings, the rows that it reads, and the credit and the metrics made of its logprobs."""

import math
from dataclasses import replace

import pytest
import torch

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.credit import CriticSettings
from fuchsia_pl.rollouts.credit import make_groups, make_samples
from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.scoring import RewardError
from fuchsia_pl.rollouts.teacher import Teacher, TeacherConfig, teacher_fractions, with_prompt
from fuchsia_pl.rollouts.training_phase import Forward
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Completion, ConfigError, Rollout, Turn
from tests.unit.rollouts.test_credit import rollout
from tests.unit.rollouts.test_training_phase import LATER, SPLIT, make_phase

QUESTION = {"role": "user", "content": "2 plus 3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
EXAMPLE = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs one of name, adapter and prompt, got none"),
        ({"adapter": "a", "prompt": "b"}, "got adapter and prompt"),
        ({"name": "a"}, "name='a' and url=None belong together"),
        ({"adapter": "a", "url": "http://b"}, "name=None and url='http://b' belong together"),
        ({"name": "a", "url": "b:8000"}, "url must be like http://host:8000, got 'b:8000'"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [{"role": "user"}]}, "data.teacher.prompt"),
        ({"prompt": "a", "weight": 0.0}, "weight must be above 0 and finite, got 0.0"),
        ({"prompt": "a", "weight": math.inf}, "weight must be above 0 and finite, got inf"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        TeacherConfig(**settings)


def test_a_text_becomes_the_system_message_and_examples_come_after_it():
    text, examples = TeacherConfig(prompt="You add."), TeacherConfig(prompt=EXAMPLE)
    assert text.before([QUESTION]) == [{"role": "system", "content": "You add."}, QUESTION]
    assert text.before([SYSTEM, QUESTION]) == [{"role": "system", "content": "You add.\n\nBe brief."}, QUESTION]
    assert examples.before([QUESTION]) == [*EXAMPLE, QUESTION]
    assert examples.before([SYSTEM, QUESTION]) == [SYSTEM, *EXAMPLE, QUESTION]


def two_turns() -> Rollout:
    """Prompt 1 2, turn 5 6, environment 7, turn 8."""
    made = Rollout({"n": 4}, item_index=4, sibling=0, temperature=1.0, prompt="", rewards={}, reward=1.0)
    made.start([1, 2])
    for ids, after in (((5, 6), [7]), ((8,), [])):
        made.append(Turn(Completion(ids, (-0.5,) * len(ids), "stop", None, policy_version=0), "", "", "", ""))
        made.append_environment(after)
    made.finish()
    return made


def test_another_prompt_moves_no_turn_and_no_answer_of_the_environment():
    original = two_turns()
    longer = with_prompt(original, 2, [9, 9, 9, 2])
    assert longer.token_ids == [9, 9, 9, 2, 5, 6, 7, 8]
    assert longer.loss_mask == [False] * 4 + [True, True, False, True]
    assert longer.sampling_logprobs == [0.0] * 4 + [-0.5, -0.5, 0.0, -0.5]
    assert original.token_ids == [1, 2, 5, 6, 7, 8]


def test_a_teacher_on_a_server_gives_the_logprobs_of_the_sampled_tokens_alone():
    asked = []

    def score(rows):
        asked.extend(rows)
        return [[-float(token) for token in row[1:]] for row in rows]

    silent = rollout(0, 0.0)
    (group,) = make_groups([[two_turns(), silent]])
    found = Teacher(1.0, score=score).scores([group])
    assert found.tolist() == [[-5.0, -6.0, -8.0], [0.0, 0.0, 0.0]]
    assert asked == [[1, 2, 5, 6, 7, 8]]  # nothing was sampled in the other


def credit(config, policy, teacher, rewards=(0.0, 1.0), weight=1.0, values=None):
    """Advantages of a group of rollouts of one and two tokens."""
    signals = TrainerSignals(None, values, torch.tensor(policy), torch.tensor(teacher))
    groups = make_groups([[rollout(1, rewards[0]), rollout(2, rewards[1])]])
    samples = make_samples(config, groups, {}, signals, lambda values: values, weight)
    return [pytest.approx(sample.advantages, abs=1e-6) for sample in samples], samples


# Teacher less policy: 0.5 for the one token of the first, -0.25 and 1 for those of the second. 9 stands behind its end.
P, Q = [[-1.0, 9.0], [-1.0, -2.0]], [[-0.5, -9.0], [-1.25, -1.0]]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("teacher", [(1.0,), (-0.5, 2.0)]),
        ("group_mean", [(-0.5 + 1.0,), (0.5 - 0.5, 0.5 + 2.0)]),
        ("reward", [(1.0,), (1.0 - 0.5, 1.0 + 2.0)]),
        ("group_norm", [(-0.707007 + 1.0,), (0.707007 - 0.5, 0.707007 + 2.0)]),
    ],
)
def test_a_teacher_alone_or_beside_rewards_by_hand(advantage, expected):
    found, _ = credit(LossConfig("ppo", advantage=advantage), P, Q, weight=2.0)
    assert found == expected


def test_a_teacher_beside_a_critic_changes_advantages_and_no_target():
    # values 0: rewards of 0 and 1 at the last tokens, lambda 1, not whitened
    config = LossConfig("ppo", advantage="gae", critic=CriticSettings(lam=1.0, whiten=False))
    found, samples = credit(config, P, Q, values=torch.zeros(2, 2))
    assert found == [(0.5,), (1.0 - 0.25, 1.0 + 1.0)]
    assert [sample.value_targets for sample in samples] == [(0.0,), (1.0, 1.0)]


def test_groups_without_spread_learn_from_the_teacher_and_unscored_rollouts_do_not():
    assert credit(LossConfig("grpo"), P, Q, rewards=(1.0, 1.0))[0] == [(0.5,), (-0.25, 1.0)]
    assert credit(LossConfig(advantage="teacher"), P, Q, rewards=(None, 1.0))[0] == [(-0.25, 1.0)]


def test_a_teacher_that_finds_a_token_impossible_is_named():
    with pytest.raises(RewardError, match=r"is -inf, .*lowest logprob of the teacher -inf"):
        credit(LossConfig(advantage="teacher"), P, [[-math.inf, 0.0], [-1.0, -1.0]])


def test_the_metrics_are_means_over_sampled_tokens():
    signals = TrainerSignals(None, None, torch.tensor(P), torch.tensor(Q))
    # -(0.5 - 0.25 + 1) and 2 * (0.5 + 0.25 + 1)
    assert teacher_fractions(signals, torch.tensor([1, 2]), weight=2.0) == {
        "teacher/kl": (pytest.approx(-1.25), 3.0),
        "teacher/advantage": (pytest.approx(3.5), 3.0),
    }


def phase_with(teacher, loss=None):
    """The micro-batches of a phase whose policy gives every token -1, and the rows that the teacher was asked for."""
    asked = []

    def teacher_logprobs(batches):
        asked.extend(batch.input_ids.shape for batch in batches)
        return [torch.full(batch.labels.shape, -0.25) for batch in batches]

    def signals(batches):
        return [TrainerSignals(None, None, torch.full(batch.labels.shape, -1.0)) for batch in batches]

    forward = Forward(2, False, signals, compute_teacher=teacher_logprobs)
    phase = replace(make_phase(loss or LossConfig(advantage="teacher")), teacher=teacher)
    return phase.batches(Sampled([SPLIT, LATER], [], 0, 1.0), 3, 3, forward), asked


def test_a_phase_has_the_advantages_and_the_metrics_of_its_teacher():
    batches, _ = phase_with(Teacher(weight=2.0))
    for batch in batches:
        torch.testing.assert_close(
            batch.advantages[batch.loss_mask], torch.tensor(1.5).expand(int(batch.loss_mask.sum()))
        )
    assert batches[0].step.metrics["teacher/kl"] == pytest.approx(-0.75)
    assert batches[0].step.metrics["teacher/advantage"] == pytest.approx(1.5)
    without, _ = phase_with(None, loss=LossConfig("grpo"))
    assert not any(name.startswith("teacher/") for name in without[0].step.metrics)


def test_a_phase_asks_a_teacher_with_a_longer_prompt_for_longer_rows():
    plain, asked = phase_with(Teacher(weight=1.0))
    longer, asked_longer = phase_with(Teacher(1.0, prompt_ids=lambda rollout: (1, [3] * 6)))
    assert [(rows, length + 5) for rows, length in asked] == asked_longer
    assert all(torch.equal(a.advantages, b.advantages) for a, b in zip(plain, longer, strict=True))


def test_rows_of_a_teacher_stay_in_their_groups():
    teacher = Teacher(1.0, prompt_ids=lambda rollout: (1, [rollout.item_index] * 2))
    rows = teacher.rows([SPLIT, LATER])
    assert [[r.token_ids[:2] for r in group.rollouts] for group in rows] == [
        [[group.rollouts[0].item_index] * 2] * 2 for group in (SPLIT, LATER)
    ]
    assert isinstance(rows[0], RolloutGroup)
    assert Teacher(1.0).rows([SPLIT])[0] is SPLIT
