"""The rehearsal of the longest rows has no side effects, and the memory plan counts the memory of the run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoConfig

from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.planned_run import planned_engine
from fuchsia_pl.callbacks.preflight import Preflight, run_parts
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.memory import device_memory
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module, make_trainer

GB = 2**30


class OnGPU:
    """A trainer whose device seems to be a GPU."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self.strategy = SimpleNamespace(root_device=torch.device("cuda", 0))

    def __getattr__(self, name):
        return getattr(self._trainer, name)


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
    assert off.plan.size("trainer", "kept activations") == 0


def test_the_plan_counts_what_there_is(tiny_model, tmp_path):
    flight = Preflight()
    module, *_ = fit(tiny_model, tmp_path, flight)
    trained = sum(p.numel() for p in module.policy.trainable_parameters())
    whole = sum(p.numel() for p in module.policy.parameters())
    sizes = {(part.side, part.name): part.num_bytes for part in flight.plan.parts}
    assert sizes["trainer", "frozen weights"] == 4 * (whole - trained)  # float32
    assert sizes["trainer", "LoRA, gradients, optimizer"] == 4 * 4 * trained  # weight, gradient, two moments
    assert sizes["engine", "weights"] == 4 * (whole - trained)
    assert set(sizes) == {
        *(
            ("trainer", name)
            for name in ("frozen weights", "LoRA, gradients, optimizer", "kept activations", "logits of a chunk")
        ),
        ("engine", "weights"),  # the engine of the tests has no cache, and a CPU has no contexts
    }
    assert flight.plan.available == device_memory(torch.device("cpu")) > GB
    checkpointed = Preflight()
    fit(tiny_model, tmp_path, checkpointed, policy={"checkpointing": CheckpointingSettings(enabled=True)})
    assert 0 < checkpointed.plan.size("trainer", "kept activations") < sizes["trainer", "kept activations"]


def test_an_engine_elsewhere_is_not_in_the_plan(tiny_model):
    module = make_module(tiny_model)
    architecture = AutoConfig.from_pretrained(tiny_model)
    elsewhere = VLLMServerEngine(["http://127.0.0.1:1"])
    assert planned_engine(elsewhere, module, architecture, max_length=40, is_gpu=True) is None


@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_the_plan_before_the_run_is_what_the_rehearsal_measures(tiny_model, tmp_path, is_checkpointed):
    """`fuchsia plan` and the rehearsal, on the same run: the rest of the plan is computed by the same code."""
    flight, planned = Preflight(), []

    class Before(Callback):
        def setup(self, trainer, pl_module, stage):
            parts = run_parts(trainer)
            planned.append(parts.planner(GB, shares_prefix=True).plan(parts.run()))

    checkpointing = CheckpointingSettings(enabled=is_checkpointed)
    fit(tiny_model, tmp_path, Before(), flight, policy={"checkpointing": checkpointing})
    for part in flight.plan.parts:
        assert planned[0].size(part.side, part.name) == pytest.approx(part.num_bytes, rel=0.1), part.name


def test_the_engine_is_told_what_the_trainer_needs(tiny_model, tmp_path, monkeypatch):
    """On a CPU nothing is reserved; a GPU is pretended."""
    specs = []
    start = TinyEngine.start
    monkeypatch.setattr(TinyEngine, "start", lambda self, spec: specs.append(spec) or start(self, spec))
    fit(tiny_model, tmp_path, Preflight())
    trainer_gb = Preflight.trainer_gb
    monkeypatch.setattr("fuchsia_pl.callbacks.preflight.device_memory", lambda device: 24 * GB)
    monkeypatch.setattr(Preflight, "trainer_gb", lambda self, trainer, sleeps: trainer_gb(self, OnGPU(trainer), sleeps))
    fit(tiny_model, tmp_path, Preflight())
    fit(tiny_model, tmp_path, Preflight(), HotSwap(True))  # the trainer is elsewhere while the engine runs
    monkeypatch.setattr("fuchsia_pl.policy.plan_simulation.chunked_logprobs", None)
    fit(tiny_model, tmp_path, Preflight())
    cpu, gpu, swapped, unplanned = (spec.reserved_gb for spec in specs)
    assert cpu == swapped == 0.0
    assert 0.0 < gpu < 0.1
    assert unplanned == 12.0


def test_rows_beyond_the_memory_of_the_machine_are_refused_before_the_engine_starts(tiny_model, tmp_path, monkeypatch):
    module, engine = make_module(tiny_model), TinyEngine()
    many = {"batch_size": 4, "sampling": {"group_size": 4, "max_length": 40}}
    monkeypatch.setattr("fuchsia_pl.callbacks.preflight.MIN_CHECKED_TOKENS", 100)
    monkeypatch.setattr("fuchsia_pl.callbacks.preflight.device_memory", lambda device: GB // 2048)
    monkeypatch.setattr(TinyEngine, "start", None)  # a call would raise another error
    trainer = make_trainer(tmp_path, Preflight(), max_steps=1)
    with pytest.raises(
        ConfigError, match=r"do not fit into the memory of this machine: .*Settings that save most: --"
    ) as error:
        trainer.fit(module, datamodule=make_data(module, engine, **many))
    assert "\n" not in str(error.value)


def test_an_out_of_memory_error_names_the_three_settings_that_would_save_most(tiny_model, tmp_path, monkeypatch):
    def fail(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.training_step", lambda self, batch, batch_idx: fail(self, batch))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tiny_model, tmp_path, Preflight())
    (note,) = caught.value.__notes__
    assert note.startswith("Memory: trainer: frozen weights ")
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
    assert flights[1].plan.size("trainer", "kept activations") > 0
