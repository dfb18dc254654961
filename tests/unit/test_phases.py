"""Phases of rollouts: several updates, a skipped step, refills, and the trainer's signals."""

import json
from itertools import groupby

import pytest
import torch

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.credit import CriticSettings
from fuchsia_pl.rollouts.phases import num_phases
from tests.doubles import Constant, Spread, TinyEngine, TinyEnvironment, make_data, make_module, make_trainer


class Record(AdapterSync):
    """Keeps what each optimizer step logged and trained."""

    def __init__(self, tolerance: float = 1e-3) -> None:
        super().__init__(tolerance=tolerance)
        self.rows, self.batches, self.metrics, self.weights = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.batches.append(batch)
        self.rows.append([tuple(sample.rollout.token_ids) for sample in batch.samples])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.metrics.append({name: value.item() for name, value in pl_module.step_metrics.items()})
        self.weights.append([p.detach().clone() for p in pl_module.policy.trainable_parameters()])


def fit(tiny_model, root, loss: LossConfig, *callbacks, environment=None, data=None, lora=None, **settings):
    torch.manual_seed(0)
    module, sync, engine = make_module(tiny_model, loss, **(lora or {})), Record(), TinyEngine()
    trainer = make_trainer(root, *callbacks, sync=sync, **{"log_every_n_steps": 1, **settings})
    trainer.fit(module, datamodule=make_data(module, engine, environment, **(data or {})))
    return module, sync, engine, trainer


@pytest.mark.parametrize("old_logprobs", ["trainer", "sampler"])
def test_a_batch_is_used_for_several_updates_and_sampled_again_after_a_sync(tiny_model, tmp_path, old_logprobs):
    loss = LossConfig("ppo", num_policy_updates=3, old_logprobs=old_logprobs)
    data = {"steps_per_epoch": 6, "batch_size": 4}
    _, sync, engine, trainer = fit(tiny_model, tmp_path, loss, data=data, accumulate_grad_batches=2)
    assert trainer.global_step == 6
    order = [call for call, _ in groupby(engine.calls)]
    assert order == [("load", 0), ("generate", 0), ("load", 3), ("generate", 3), ("load", 6)]
    assert sync.rows[:2] == sync.rows[2:4] == sync.rows[4:6] != sync.rows[6:8]
    # every update's metrics are divided by the tokens of its own phase that enter the forward
    for first in (0, 2, 6):
        tokens = sum(int(batch.loss_mask.sum()) for batch in sync.batches[first : first + 2])
        assert {batch.step.denominators.num_forward_tokens for batch in sync.batches[first : first + 2]} == {tokens}
    # at the first update the policy is the one that sampled; then the ratio shows that it has changed
    fractions = [step["train/clip_fraction"] for step in sync.metrics]
    assert fractions[0] == fractions[3] == 0.0
    assert fractions[2] > 0.0
    # the gap is that of the policy that sampled, at every update
    gaps = [step["train/logprob_gap"] for step in sync.metrics]
    assert gaps[0] == pytest.approx(gaps[2])


def test_the_samplers_logprobs_as_denominator_clip_where_it_disagrees_and_the_trainers_do_not(tiny_model, tmp_path):
    class Biased(TinyEngine):
        """Reports twice the true probability for every token."""

        async def generate(self, prompt_ids, sampling):
            from dataclasses import replace

            completion = await super().generate(prompt_ids, sampling)
            return replace(completion, logprobs=tuple(logprob + 0.69314718 for logprob in completion.logprobs))

    found = {}
    for old_logprobs in ("trainer", "sampler"):
        module = make_module(tiny_model, LossConfig("ppo", old_logprobs=old_logprobs))
        sync = Record(tolerance=1.0)
        trainer = make_trainer(tmp_path, sync=sync, max_steps=1)
        trainer.fit(module, datamodule=make_data(module, Biased()))
        found[old_logprobs] = sync.metrics[0]
    assert found["trainer"]["train/clip_fraction"] == 0.0
    assert found["trainer"]["train/sampler_weight"] == pytest.approx(0.5, abs=1e-4)
    assert found["sampler"]["train/clip_fraction"] > 0.1  # those with a negative advantage: their ratio is 1/2
    assert found["sampler"]["train/sampler_weight"] == 1.0


def test_with_dropout_the_first_ratio_is_still_one(tiny_model, tmp_path):
    loss = LossConfig("ppo", num_policy_updates=2)
    _, sync, *_ = fit(tiny_model, tmp_path, loss, data={"steps_per_epoch": 4}, lora={"dropout": 0.5})
    assert sync.metrics[0]["train/clip_fraction"] == sync.metrics[2]["train/clip_fraction"] == 0.0
    assert all(step["train/sampler_ratio"] == pytest.approx(1.0, abs=1e-3) for step in sync.metrics)


def test_a_run_with_several_updates_resumes_at_a_phase_bit_for_bit(tiny_model, tmp_path):
    loss = LossConfig("ppo", num_policy_updates=2)
    data = {"steps_per_epoch": 6}
    settings = {"enable_checkpointing": True, "max_epochs": -1, "data": data}
    straight, *_ = fit(tiny_model, tmp_path / "a", loss, max_steps=6, **settings)
    checkpoint = RunCheckpoint(every_n_steps=1)
    fit(tiny_model, tmp_path / "b", loss, checkpoint, max_steps=4, **settings)
    assert checkpoint._every_n_train_steps == 2  # rounded up to whole phases
    module, sync = make_module(tiny_model, loss), Record()
    trainer = make_trainer(tmp_path / "c", sync=sync, max_steps=6, max_epochs=-1)
    saved = tmp_path / "b/checkpoints/last.ckpt"
    trainer.fit(module, datamodule=make_data(module, TinyEngine(), **data), ckpt_path=saved)
    odd = make_module(tiny_model, LossConfig("ppo", num_policy_updates=3))
    again = make_trainer(tmp_path / "d", max_steps=6, max_epochs=-1)
    with pytest.raises(ValueError, match=r"checkpoint is of step 4, .*the 3 steps of a phase"):
        again.fit(odd, datamodule=make_data(odd, TinyEngine(), **data), ckpt_path=saved)
    pairs = zip(module.policy.trainable_parameters(), straight.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        ({"steps_per_epoch": 3}, {}, r"steps_per_epoch=3 is no multiple of the 2 opt.*num_policy_updates=2"),
        ({"steps_per_epoch": 4}, {"max_steps": 3}, "max_steps=3 is no multiple of the 2 optimizer steps of a phase"),
        ({"steps_per_epoch": 4}, {"limit_train_batches": 3}, "limit_train_batches=3 would cut a phase: it has 2 micro"),
    ],
)
def test_what_would_end_within_a_phase_is_refused(tiny_model, tmp_path, data, settings, words):
    with pytest.raises(ValueError, match=words):
        fit(tiny_model, tmp_path, LossConfig("ppo", num_policy_updates=2), data=data, **settings)


@pytest.mark.parametrize(
    ("settings", "num_updates", "expected"),
    [
        ({"max_steps": 6, "max_epochs": -1}, 2, 3),
        ({"max_steps": -1, "max_epochs": -1}, 1, None),
        ({"max_steps": -1, "max_epochs": 2}, 1, 8),
        ({"max_steps": 9, "max_epochs": 2}, 1, 8),  # whichever comes first
        ({"max_steps": 3, "max_epochs": 2}, 1, 3),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4}, 1, 4),  # two steps of an epoch's four
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.25}, 1, 2),
    ],
)
def test_the_number_of_phases_of_a_run_by_hand(tmp_path, settings, num_updates, expected):
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, **settings)
    assert num_phases(trainer, steps_per_epoch=4, steps_per_phase=num_updates) == expected


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "rloo"])
def test_a_step_without_any_spread_is_skipped_with_a_reason(tiny_model, tmp_path, loss_type, caplog):
    # in DAPO a completion of full length costs, but siblings do not differ by that alone
    loss = LossConfig(loss_type, truncated="keep", max_refills=1 if loss_type == "dapo" else None)
    with caplog.at_level("WARNING", logger="fuchsia_pl.module"):
        module, sync, engine, trainer = fit(
            tiny_model, tmp_path, loss, environment=Constant(), accumulate_grad_batches=2, gradient_clip_val=1.0
        )
    assert trainer.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(sync.weights[0], module.policy.trainable_parameters(), strict=True))
    assert not trainer.optimizers[0].state  # the optimizer never ran, so no momentum moves anything later
    assert float(trainer.callback_metrics["train/skipped"]) == 1.0
    assert float(trainer.callback_metrics["train/loss"]) == 0.0
    said = [record.message for record in caplog.records if "skipped" in record.message]
    reason = (
        "none of the step's rollouts can be trained on" if loss_type == "dapo" else "every advantage of the step is 0"
    )
    assert said[0].startswith(f"step 1 is skipped, the weights stay as they are: {reason}")
    sampled = sum(call[0] == "generate" for call in engine.calls)
    assert sampled == 3 * 5 * 4 * (2 if loss_type == "dapo" else 1)  # and no more than one refill


def test_momentum_and_weight_decay_do_not_move_a_skipped_step(tiny_model, tmp_path):
    class Later(TinyEnvironment):
        """Rewards differ in the first step only."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

            def first_only(rollouts, *args, **kwargs):
                self.calls += 1
                return [float(r.sibling if self.calls <= 5 else 1) for r in rollouts]

            self.reward_functions, self.reward_weights = [first_only], {}

    module, sync, _, trainer = fit(tiny_model, tmp_path, LossConfig(beta=0.1), environment=Later())
    first, second, third = sync.weights
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(third, module.policy.trainable_parameters(), strict=True))
    assert trainer.optimizers[0].state


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_groups_without_spread_are_refilled_counted_and_logged(tiny_model, tmp_path, loss_type):
    loss = LossConfig(loss_type, max_refills=6)
    _, sync, engine, trainer = fit(
        tiny_model, tmp_path, loss, RolloutLog(), environment=Spread(num_items=40), max_steps=2
    )
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for step in (0, 1):
        own = [line for line in lines if line["step"] == step]
        trained = {line["item_index"] for line in own if line["advantage"] is not None}
        dropped = {line["item_index"] for line in own if line["advantage"] is None}
        assert len(trained) == 5  # the whole batch
        assert all(index % 2 == 0 for index in trained)
        assert all(index % 2 == 1 for index in dropped)
        assert len(own) == 4 * (len(trained) + len(dropped))
        for index in trained | dropped:  # no group was split: four siblings with one prompt
            siblings = [line for line in own if line["item_index"] == index]
            assert sorted(line["sibling"] for line in siblings) == [0, 1, 2, 3]
            assert len({tuple(line["prompt_ids"]) for line in siblings}) == 1
    metrics = trainer.callback_metrics
    assert float(metrics["rollout/dropped_groups"]) == len(dropped) > 0
    assert float(metrics["rollout/refilled_groups"]) == len(dropped)
    assert float(metrics["rollout/zero_variance_groups"]) == len(dropped)
    assert len(engine.calls) == 3 + len(lines)  # every rollout that was sampled is in the log
    again = fit(tiny_model, tmp_path / "again", loss, environment=Spread(num_items=40), max_steps=2)[1]
    assert again.rows == sync.rows


def test_truncated_completions_are_not_trained_on_where_they_are_masked(tiny_model, tmp_path):
    # completions of the tiny model seldom end by themselves, so most rows are masked
    loss, data = LossConfig("grpo", truncated="mask"), {"sampling": {"max_completion_tokens": 20}}
    _, sync, _, trainer = fit(tiny_model, tmp_path, loss, RolloutLog(), data=data, max_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    trained = [line for line in lines if line["advantage"] is not None]
    assert {line["status"] for line in lines if line["advantage"] is None} == {"truncated"}
    assert {line["status"] for line in trained} <= {"completed"}
    assert sum(len(rows) for rows in sync.rows) == len(trained) < 20
    assert float(trainer.callback_metrics["rollout/untrained"]) == 20 - len(trained)


def test_a_length_penalty_is_one_more_reward(tiny_model, tmp_path):
    *_, trainer = fit(tiny_model, tmp_path, LossConfig("dapo", max_refills=0), max_steps=1)
    metrics = trainer.callback_metrics
    assert -1.0 <= float(metrics["reward/overlong"]) < 0.0
    named = float(metrics["reward/even"]) + 0.5 * float(metrics["reward/ended"]) + float(metrics["reward/overlong"])
    assert float(metrics["reward/mean"]) == pytest.approx(named, abs=1e-6)


def test_the_name_of_the_length_penalty_is_taken(tiny_model):
    def overlong(rollouts):
        return [0.0 for _ in rollouts]

    environment = TinyEnvironment()
    environment.reward_functions = [overlong]
    environment.reward_weights = {}
    with pytest.raises(ValueError, match="has a reward function 'overlong': the name is taken"):
        make_data(make_module(tiny_model), environment=environment)


@pytest.mark.parametrize("loss_type", ["rloo", "reinforce_pp", "reinforce"])
def test_a_kl_in_the_reward_lowers_what_is_learned_from_and_is_logged(tiny_model, tmp_path, loss_type):
    with_kl = fit(tiny_model, tmp_path / "a", LossConfig(loss_type, beta=0.5))
    without = fit(tiny_model, tmp_path / "b", LossConfig(loss_type))
    assert float(with_kl[3].callback_metrics["train/kl"]) != 0.0
    assert "train/kl" not in without[3].callback_metrics
    # at step 0 the policy is the reference: the same update; afterwards the weights differ
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(with_kl[1].weights, without[1].weights, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs[1])
    assert not all(torch.equal(a, b) for a, b in pairs[2])


def test_a_critic_learns_beside_the_policy_is_saved_and_enters_the_advantages(tiny_model, tmp_path):
    loss = LossConfig("ppo", advantage="gae", critic=CriticSettings(value_clip=0.5))
    data = {"steps_per_epoch": 12, "sampling": {"group_size": 1}, "batch_size": 16}
    module, sync, _, trainer = fit(tiny_model, tmp_path, loss, data=data, accumulate_grad_batches=2)
    losses = [step["train/value_loss"] for step in sync.metrics]
    assert losses[-1] < 0.6 * losses[0]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert any("critic" in name for name in state)
    module.policy.save_trained(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names


@pytest.mark.parametrize(
    "change", [{"gamma": 0.5}, {"lam": 0.2}, {"whiten": False}, {"value_clip": 0.001}, {"value_weight": 5.0}]
)
def test_every_setting_of_the_critic_changes_the_run(tiny_model, tmp_path, change):
    def weights(critic):
        loss = LossConfig("ppo", advantage="gae", critic=critic, num_policy_updates=2)
        module, *_ = fit(tiny_model, tmp_path, loss, data={"steps_per_epoch": 2}, max_steps=2, gradient_clip_val=0.5)
        return torch.cat([p.detach().flatten() for p in module.policy.trainable_parameters()])

    assert not torch.equal(weights(CriticSettings()), weights(CriticSettings(**change)))


def test_a_group_of_one_is_refused_where_siblings_are_compared_and_only_there(tiny_model):
    for loss_type in ("grpo", "dapo", "rloo", "dr_grpo"):
        with pytest.raises(ValueError, match=r"group_size must be 2 or more, got 1: advantage .* compares siblings"):
            make_data(make_module(tiny_model, LossConfig(loss_type)), sampling={"group_size": 1})
    for loss_type in ("reinforce", "reinforce_pp"):
        make_data(make_module(tiny_model, LossConfig(loss_type)), sampling={"group_size": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"advantage": "group_mean"},
        {"truncated": "mask"},
        {"truncated": "penalise"},
        {"truncated": "penalise", "overlong_buffer": 1.0},
        {"reward_aggregation": "normalize_then_sum"},
        {"kl_in": "reward", "beta": 0.3, "kl_estimator": "k1"},
        {"num_policy_updates": 2},
        {"mini_batches": 2},
        {"sampler_correction": SamplerCorrection(mode="disabled")},
    ],
    ids=str,
)
def test_every_setting_of_the_data_side_changes_the_run(tiny_model, tmp_path, change):
    def weights(**settings):
        data = {"steps_per_epoch": 2, "batch_size": 4, "sampling": {"max_completion_tokens": 10}}
        module, *_ = fit(tiny_model, tmp_path, LossConfig("grpo", **settings), data=data, max_steps=2)
        return torch.cat([p.detach().flatten() for p in module.policy.trainable_parameters()])

    base = {"truncated": "penalise"} if "overlong_buffer" in change else {}
    assert not torch.equal(weights(**base), weights(**change))
