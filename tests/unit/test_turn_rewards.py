"""A run whose reward function scores turns, from sampling to the files."""

import json
from dataclasses import replace

import pytest
import torch

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.evaluation_log import EvaluationLog
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.envs import MultiTurnEnvironment
from fuchsia_pl.objectives.config import LossConfig
from tests.doubles import EOS, RecordedEngine, TinyEnvironment, make_data, make_module, make_trainer

FIRST, SECOND = (4, EOS), (5, 6, EOS)


def by_turn(rollouts, *args, **kwargs):
    """Siblings get the same in all. Where they have two turns, each second one gets it in the first turn."""
    return [[float(r.sibling % 2), float(1 - r.sibling % 2)] if len(r.turns) == 2 else [1.0] for r in rollouts]


class Trade(MultiTurnEnvironment, TinyEnvironment):
    """Items with an odd number have one turn, the others two."""

    def __init__(self) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights, self.max_steps = [by_turn], {"by_turn": 2.0}, 3

    def step_rollout(self, rollout):
        if rollout.item["n"] % 2 or len(rollout.turns) == 2:
            rollout.finish()
        else:
            rollout.respond("more?")


class TwoTurns(RecordedEngine):
    """Writes FIRST, and SECOND if the prompt has an end of turn."""

    async def generate(self, prompt_ids, sampling):
        ids = SECOND if EOS in prompt_ids else FIRST
        return replace(await super().generate(prompt_ids, sampling), token_ids=ids, logprobs=(-1.5,) * len(ids))


def run(tiny_model, root, **loss):
    """One step; returns the lines of the rollouts, the trained weights, and the step's metrics."""
    torch.manual_seed(0)
    module = make_module(tiny_model, LossConfig("rloo", **loss))
    sync = AdapterSync(tolerance=100.0)  # the logprobs of the engine are not those of the model
    trainer = make_trainer(root, RolloutLog(), EvaluationLog(), sync=sync, max_steps=1, limit_val_batches=1.0)
    sampling = {"group_size": 2, "max_completion_tokens": 8, "max_length": 80}
    trainer.fit(module, datamodule=make_data(module, TwoTurns(), Trade(), sampling=sampling, steps_per_epoch=1))
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    return lines, [p.detach().clone() for p in module.policy.trainable_parameters()], trainer.callback_metrics


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    names = ("turn_group", "leave_one_out")
    return {name: run(tiny_model, tmp_path_factory.mktemp(name), advantage=name, max_refills=1) for name in names}


def test_equal_rewards_from_different_turns_are_trained_and_not_refilled(runs):
    lines, weights, metrics = runs["turn_group"]
    trained = [line for line in lines if line["advantage"] is not None]
    assert trained
    assert all(line["item"]["n"] % 2 == 0 for line in trained)
    for line in trained:
        # The second turn's reward has the weight 2, and the return of the first is the same for both.
        assert line["advantages"] == [0.0, 0.0, *([2.0, -2.0][line["sibling"]],) * 3]
    num_odd = sum(line["item"]["n"] % 2 for line in lines) / 2
    assert metrics["rollout/zero_variance_groups"] == metrics["rollout/dropped_groups"] == num_odd > 0
    assert not all(torch.equal(one, other) for one, other in zip(weights, runs["leave_one_out"][1], strict=True))


def test_with_another_advantage_they_are_as_equal_as_ever(runs):
    lines, _, metrics = runs["leave_one_out"]
    assert all(not line["advantage"] for line in lines)
    assert metrics["train/skipped"] == 1
    assert metrics["rollout/zero_variance_groups"] == len(lines) / 2


def test_the_logs_have_the_numbers_of_the_turns_and_metrics_their_sum(runs):
    lines, _, metrics = runs["turn_group"]
    line = next(line for line in lines if line["item"]["n"] % 2 == 0 and line["sibling"] == 1)
    assert (line["rewards"], line["turn_rewards"], line["reward"]) == ({"by_turn": 1.0}, {"by_turn": [1.0, 0.0]}, 2.0)
    assert metrics["reward/by_turn"] == 1.0


def test_held_out_samples_have_the_numbers_of_their_turns(tiny_model, tmp_path):
    run(tiny_model, tmp_path, advantage="turn_group")
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        turns = [1.0] if line["item"]["n"] % 2 else [0.0, 1.0]
        assert line["samples"][0]["turn_rewards"] == {"by_turn": turns}
