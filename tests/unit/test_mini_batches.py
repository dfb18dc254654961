"""Mini-batches in whole runs: old logprobs, gradients by brute force, resume, and settings that are refused."""

import json
from itertools import groupby

import pytest
import torch
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from tests.doubles import RecordedEngine, TinyEngine, TinyEnvironment, make_data, make_module, make_trainer
from tests.unit.test_cli import config, refused

__all__ = ["config"]  # the fixture

PLAIN = {"sampler_correction": SamplerCorrection(mode="disabled")}


class Watch(Callback):
    """Keeps, for each optimizer step, the weights before it, rows, trainer logprobs, gradients and metrics."""

    def __init__(self) -> None:
        self.weights, self.batches, self.logprobs, self.gradients, self.metrics = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.weights.append([p.detach().clone() for p in pl_module.policy.trainable_parameters()])
            self.batches.append([])
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.logprobs.append([logprobs.clone() for logprobs in pl_module.trainer_logprobs])
        self.gradients.append([p.grad.clone() for p in pl_module.policy.trainable_parameters()])
        self.metrics.append({name: float(value) for name, value in pl_module.step_metrics.items()})

    def rows(self, step: int) -> list:
        """The rows of a step, with those that do not enter the forward because their advantages are 0."""
        batches = self.batches[step]
        return [*(sample for batch in batches for sample in batch.samples), *batches[0].step.zero_advantage]


def fit(
    tiny_model, root, loss: LossConfig, *callbacks, engine=None, environment=None, lora=None, data=None, **settings
):
    torch.manual_seed(0)
    module, watch = make_module(tiny_model, loss, **(lora or {})), Watch()
    trainer = make_trainer(root, watch, *callbacks, **{"max_epochs": -1, **settings})
    given = {"batch_size": 4, "steps_per_epoch": loss.steps_per_phase, **(data or {})}
    trainer.fit(module, datamodule=make_data(module, engine or TinyEngine(), environment, **given))
    return module, watch, trainer


def final(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.trainable_parameters()])


def with_weights(module, weights, compute):
    """The result of `compute` with other trained weights."""
    trained = module.policy.trainable_parameters()
    kept = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, other in zip(trained, weights, strict=True):
            p.copy_(other)
    result = compute()
    with torch.no_grad():
        for p, own in zip(trained, kept, strict=True):
            p.copy_(own)
    return result


def row_logprobs(module, sample) -> torch.Tensor:
    """Logprobs of the sampled tokens of one row, by the transformers model alone."""
    ids, rollout = torch.tensor([sample.rollout.token_ids]), sample.rollout
    logprobs = torch.log_softmax(module.policy.causal_lm(input_ids=ids).logits[0, :-1], dim=-1)
    own = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return own[torch.tensor(rollout.loss_mask[1:])]


def test_old_logprobs_are_those_of_the_phases_start_bit_for_bit(tiny_model, tmp_path):
    loss = LossConfig("ppo", mini_batches=2, num_policy_updates=2)
    module, watch, trainer = fit(
        tiny_model, tmp_path, loss, max_steps=8, accumulate_grad_batches=2, lora={"dropout": 0.2}
    )
    assert trainer.global_step == 8
    for step in range(8):
        start = 4 * (step // 4)
        for batch, kept in zip(watch.batches[step], watch.logprobs[step], strict=True):
            at_start, now = (
                with_weights(module, watch.weights[of], lambda batch=batch: module.policy.evaluated_output(batch))
                for of in (start, step)
            )
            assert torch.equal(kept, at_start.logprobs)
            assert step == start or not torch.equal(kept, now.logprobs)
    # The gap to the engine is that of the weights that sampled, at every step.
    assert all(step["train/logprob_gap"] < 1e-4 for step in watch.metrics)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_change_of_weights_every_ratio_is_exactly_one(tiny_model, tmp_path, checkpointing):
    """So logprobs without gradient, before the phase, are bit for bit those of the forward that trains."""

    class Ratio(Callback):
        def on_after_backward(self, trainer, pl_module):
            place = len(watched)
            watched.append((pl_module.trainer_logprobs[place % 2], outputs[-1]))

    watched, outputs = [], []
    torch.manual_seed(0)
    loss = LossConfig("gspo", clip_low=1e-9, clip_high=1e-9, mini_batches=2, num_policy_updates=2)
    module = make_module(tiny_model, loss, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0))
    module.policy_config.checkpointing.enabled = checkpointing
    module.configure_model()
    compute = module.policy.output

    def output(batch):
        found = compute(batch)
        if torch.is_grad_enabled():
            outputs.append(found.logprobs.detach())
        return found

    module.policy.output = output
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, Ratio(), max_steps=4, max_epochs=-1, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=make_data(module, TinyEngine(), batch_size=4, steps_per_epoch=4))
    assert len(watched) == 8
    assert all(torch.equal(old, new) for old, new in watched)
    assert [step["train/clip_fraction"] for step in watch.metrics] == [0.0] * 4


def test_gradients_and_clip_fractions_are_those_of_the_formula(tiny_model, tmp_path):
    """Row by row from the rewards: group mean and deviation, ratio to the phase's start, bounds, means over the step's rows."""
    loss = LossConfig("grpo", mini_batches=2, num_policy_updates=2, clip_low=0.02, clip_high=0.05, **PLAIN)
    module, watch, _ = fit(tiny_model, tmp_path, loss, max_steps=4, accumulate_grad_batches=3)
    for step in range(4):
        rows = watch.rows(step)
        groups = {
            item: [s for s in rows if s.rollout.item_index == item] for item in {s.rollout.item_index for s in rows}
        }
        assert [len(group) for group in groups.values()] == [4, 4]
        olds = with_weights(
            module, watch.weights[0], lambda rows=rows: [row_logprobs(module, s).detach() for s in rows]
        )

        def gradient_by_hand(rows=rows, groups=groups, olds=olds):
            total, num_clipped, num_tokens = torch.zeros(()), 0, 0
            for sample, old in zip(rows, olds, strict=True):
                rewards = torch.tensor([s.rollout.reward for s in groups[sample.rollout.item_index]])
                advantage = (sample.rollout.reward - rewards.mean()) / (rewards.std() + 1e-4)
                ratio = (row_logprobs(module, sample) - old).exp()
                bounded = ratio.clamp(0.98, 1.05)
                total = total - torch.minimum(ratio * advantage, bounded * advantage).mean() / len(rows)
                if any(sample.advantages):  # metrics are means over the tokens in the forward, the loss over all rows
                    num_clipped += int((bounded * advantage < ratio * advantage).sum())
                    num_tokens += len(old)
            gradients = torch.autograd.grad(total, module.policy.trainable_parameters())
            return gradients, num_clipped / num_tokens

        expected, clipped = with_weights(module, watch.weights[step], gradient_by_hand)
        for one, other in zip(watch.gradients[step], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        assert watch.metrics[step]["train/clip_fraction"] == pytest.approx(clipped, abs=1e-6)
        assert (clipped > 0) == (step > 0)


def test_the_rollouts_of_a_phase_are_split_once_synced_once_and_logged_once(tiny_model, tmp_path):
    loss, engine = LossConfig("ppo", mini_batches=2), TinyEngine()
    _, watch, _ = fit(tiny_model, tmp_path, loss, RolloutLog(), engine=engine, max_steps=4)
    whole = fit(tiny_model, tmp_path / "whole", LossConfig("ppo"), max_steps=1)[1]
    order = [call for call, _ in groupby(engine.calls)]
    assert order == [("load", 0), ("generate", 0), ("load", 2), ("generate", 2), ("load", 4)]
    found = [[tuple(row.rollout.token_ids) for row in watch.rows(step)] for step in (0, 1)]
    assert [len(rows) for rows in found] == [8, 8]
    assert sorted(found[0] + found[1]) == sorted(tuple(row.rollout.token_ids) for row in whole.rows(0))
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    items = [{line["item_index"] for line in lines if line["step"] == step} for step in range(4)]
    assert [len(of) for of in items] == [2] * 4
    assert not items[0] & items[1]
    gaps = [json.loads(line) for line in (tmp_path / "gaps.jsonl").read_text().splitlines()]
    in_forward = [(step, sample.rollout) for step in range(4) for b in watch.batches[step] for sample in b.samples]
    assert [(g["step"], g["item_index"], g["sibling"]) for g in gaps] == [
        (step, rollout.item_index, rollout.sibling) for step, rollout in in_forward
    ]
    assert max(abs(gap) for line in gaps for gap in line["gaps"]) < 1e-3


def test_a_run_resumes_between_phases_bit_for_bit(tiny_model, tmp_path):
    loss = LossConfig("ppo", mini_batches=2, num_policy_updates=2, beta=0.1)
    settings = {"lora": {"dropout": 0.1}, "accumulate_grad_batches": 2, "data": {"steps_per_epoch": 12}}
    straight, *_ = fit(tiny_model, tmp_path / "a", loss, max_steps=12, **settings)
    checkpoint = RunCheckpoint(every_n_steps=5)
    fit(tiny_model, tmp_path / "b", loss, checkpoint, max_steps=8, enable_checkpointing=True, **settings)
    assert checkpoint._every_n_train_steps == 8  # rounded up to whole phases of four steps
    module = make_module(tiny_model, loss, dropout=0.1)
    trainer = make_trainer(tmp_path / "c", max_steps=12, max_epochs=-1, accumulate_grad_batches=2)
    data = make_data(module, TinyEngine(), batch_size=4, steps_per_epoch=12)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "b/checkpoints/last.ckpt")
    assert torch.equal(final(module), final(straight))


def test_a_mini_batch_without_spread_is_skipped_and_the_next_one_trains(tiny_model, tmp_path):
    class Alike(TinyEnvironment):
        """Siblings of some items do not differ."""

        def __init__(self, items: set[int]) -> None:
            super().__init__()

            def of_others(rollouts, *args, **kwargs):
                return [float(r.item["n"] in items or r.sibling) for r in rollouts]

            self.reward_functions, self.reward_weights = [of_others], {}

    loss = LossConfig("ppo", mini_batches=2)
    drawn = fit(tiny_model, tmp_path / "drawn", loss, max_steps=2)[1]
    environment = Alike({row.rollout.item["n"] for row in drawn.rows(0)})
    module, watch, trainer = fit(tiny_model, tmp_path, loss, environment=environment, max_steps=2)
    assert trainer.global_step == 2
    assert all(torch.equal(a, b) for a, b in zip(watch.weights[0], watch.weights[1], strict=True))
    assert watch.batches[0][0].step.skip_reason == "every advantage of the step is 0: the rewards do not differ"
    assert watch.batches[1][0].step.skip_reason is None
    assert not torch.equal(final(module), torch.cat([w.flatten() for w in watch.weights[1]]))


def test_the_critics_old_values_are_those_of_the_phases_start(tiny_model, tmp_path):
    loss = LossConfig("ppo", advantage="gae", mini_batches=2)
    module, watch, _ = fit(tiny_model, tmp_path, loss, max_steps=2)
    (batch,) = watch.batches[1]
    at_start, now = (
        with_weights(module, watch.weights[step], lambda: module.policy.evaluated_output(batch).values)
        for step in (0, 1)
    )
    mask = batch.loss_mask
    torch.testing.assert_close(batch.old_values[mask], at_start[mask], rtol=0, atol=1e-5)
    assert not torch.allclose(batch.old_values[mask], now[mask], rtol=0, atol=1e-4)


def test_with_a_shared_device_the_result_is_the_same(tiny_model, tmp_path):
    loss = LossConfig("ppo", mini_batches=2)
    runs = [fit(tiny_model, tmp_path, loss, HotSwap(enabled), max_steps=4)[0] for enabled in (True, False)]
    assert torch.equal(*map(final, runs))


def test_sampling_ahead_counts_whole_phases(tiny_model, tmp_path):
    loss, data = LossConfig("ppo", mini_batches=2), {"sampling": {"max_staleness": 2}}
    engine, sync = RecordedEngine(), AdapterSync(tolerance=100.0)  # its logprobs are not those of the model
    _, watch, _ = fit(tiny_model, tmp_path, loss, engine=engine, sync=sync, data=data, max_steps=6)
    infos = [batches[0].step for batches in watch.batches]
    ages = [info.step - info.phase_step - info.policy_version for info in infos]
    assert ages[:2] == [0, 0]
    assert set(ages[2:]) <= {0, 2}
    with pytest.raises(ValueError, match=r"max_staleness=1 is no multiple of the 2 optimizer steps of a phase"):
        fit(tiny_model, tmp_path, loss, data={"sampling": {"max_staleness": 1}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.loss.mini_batches", "2"],
            "data.batch_size=5 is no multiple of model.loss.mini_batches=2 x 1 rank(s), which use equal shares of the items: "
            "set it to a multiple of 2",
        ),
        (
            ["--model.loss.mini_batches", "5"],
            "data.steps_per_epoch=2 is no multiple of the 5 optimizer steps of a phase (model.loss.mini_batches=5 x "
            "num_policy_updates=1): an epoch would end within one",
        ),
        (["--model.loss.mini_batches", "0"], "model.loss.mini_batches must be 1 or more, got 0"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused_in_one_line(config, capsys, monkeypatch, words, message):
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
    error = refused(capsys, "fit", "--config", str(config), *words)
    assert message in " ".join(error.split())
    assert "Traceback" not in error
