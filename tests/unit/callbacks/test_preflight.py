"""The rehearsal of the longest rows has no side effects, and the memory plan counts the memory of the run."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.memory import device_memory, memory_plan
from fuchsia_pl.policy.policy import Policy
from tests.doubles import TinyEngine, make_data, make_module, make_trainer

GB = 2**30


class Order(Callback):
    """Keeps the trained weights, their gradients and the state of torch's generator at the start of the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.generator = torch.get_rng_state()
            self.gradients = [p.grad for p in pl_module.policy.trainable_parameters()]
            self.metrics = dict(pl_module.step_metrics)


def fit(tiny_model, root, *callbacks, loss=None, policy=None, **data):
    torch.manual_seed(0)
    module = make_module(tiny_model, loss, dropout=0.2)
    for name, value in (policy or {}).items():
        setattr(module.policy_config, name, value)
    engine = TinyEngine()
    trainer = make_trainer(root, *callbacks, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=make_data(module, engine, **data))
    return module, engine, trainer


def test_the_longest_rows_run_before_anything_is_sampled(tiny_model, tmp_path, monkeypatch):
    rows, sampled = [], []
    original = Policy.output

    def record(self, batch):
        rows.append(batch)
        sampled.append(len(engine_calls()))
        return original(self, batch)

    engines: list[TinyEngine] = []
    monkeypatch.setattr(Policy, "output", record)
    start = TinyEngine.start
    monkeypatch.setattr(TinyEngine, "start", lambda self, spec: engines.append(self) or start(self, spec))

    def engine_calls():
        return [call for call in engines[0].calls if call[0] == "generate"]

    fit(tiny_model, tmp_path, Preflight())
    assert sampled[0] == 0 < sampled[1]
    # 5 items of 4 siblings in 2 micro-batches: three groups of prompts of 11 tokens and completions of 6
    assert rows[0].input_ids.shape == (12, 16)
    assert max(batch.input_ids.shape[1] for batch in rows[1:]) <= 16
    assert max(sum(group.num_rows for group in batch.groups) for batch in rows[1:]) <= 12


def test_it_leaves_nothing_behind(tiny_model, tmp_path):
    found = []
    for callbacks in ([Preflight()], []):
        order = Order()
        module, *_ = fit(tiny_model, tmp_path, *callbacks, order, loss=LossConfig(beta=0.01))
        found.append((order, [p.detach().clone() for p in module.policy.trainable_parameters()]))
    (first, weights), (second, expected) = found
    assert torch.equal(first.generator, second.generator)
    assert first.gradients == second.gradients == [None] * len(weights)
    assert first.metrics == second.metrics == {}
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))


def test_it_can_be_left_out(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.rehearse", lambda self, batch: seen.append(batch.input_ids.shape))
    off, on = Preflight(enabled=False), Preflight()
    fit(tiny_model, tmp_path, off)
    assert not seen
    fit(tiny_model, tmp_path, on)
    assert len(seen) == 1
    assert off.plan.activations == 0


def test_the_plan_counts_what_there_is(tiny_model, tmp_path):
    flight = Preflight()
    module, *_ = fit(tiny_model, tmp_path, flight)
    trained = sum(p.numel() for p in module.policy.trainable_parameters())
    whole = sum(p.numel() for p in module.policy.parameters())
    assert flight.plan.base_weights == 4 * (whole - trained)  # float32
    assert flight.plan.trained == 4 * 4 * trained  # weight, gradient, two moments
    assert flight.plan.kv_cache == 0  # the engine of the tests has no cache
    assert flight.plan.engine_weights == 4 * whole
    elsewhere = memory_plan(module.policy, VLLMServerEngine(["http://127.0.0.1:1"]), 0, torch.device("cpu"))
    assert (elsewhere.engine_weights, elsewhere.kv_cache, elsewhere.base_weights) == (0, 0, flight.plan.base_weights)
    assert flight.plan.available == device_memory(torch.device("cpu")) > GB
    checkpointed = Preflight()
    fit(tiny_model, tmp_path, checkpointed, policy={"checkpointing": CheckpointingSettings(enabled=True)})
    assert 0 < checkpointed.plan.activations < flight.plan.activations


def test_an_out_of_memory_error_names_the_three_settings_that_would_save_most(tiny_model, tmp_path, monkeypatch):
    def fail(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.training_step", lambda self, batch, batch_idx: fail(self, batch))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tiny_model, tmp_path, Preflight())
    (note,) = caught.value.__notes__
    assert note.startswith("Memory: weights ")
    settings = note.split("Settings that save most: ")[1].split("; ")
    assert len(settings) == 3
    assert all(setting.startswith("--") for setting in settings)
    assert "--model.policy.checkpointing.enabled true" in note


def test_the_plan_of_a_shared_device(tiny_model, tmp_path):
    flights = [Preflight(), Preflight()]
    for flight, enabled in zip(flights, (False, True), strict=True):
        fit(tiny_model, tmp_path, flight, HotSwap(enabled))
    assert [flight.plan.shares_device for flight in flights] == [False, True]
    assert flights[1].plan == replace(flights[0].plan, shares_device=True)
    assert flights[1].plan.activations > 0
