from functools import partial
from pathlib import Path

import pytest
import torch

from fuchsia_pl.callbacks.adapter_sync import PROBED_TOKENS, AdapterSync, SyncError
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.agreement import Agreement
from fuchsia_pl.policy.policy import Policy
from tests.doubles import RecordedEngine, TinyEngine, make_data, make_module, make_trainer


def fit(tiny_model, root, engine, sync=None, data=None, **settings):
    module = make_module(tiny_model)
    trainer = make_trainer(root, sync=sync, **settings)
    trainer.fit(module, datamodule=data or make_data(module, engine))
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 5])
def test_one_sync_per_optimizer_step_with_rising_versions(tiny_model, tmp_path, accumulate):
    engine = TinyEngine()
    fit(tiny_model, tmp_path, engine, accumulate_grad_batches=accumulate)
    assert [version for kind, version in engine.calls if kind == "load"] == [0, 1, 2, 3]


def test_the_first_step_after_a_resume_is_synced_before_it_is_sampled(tiny_model, tmp_path):
    _, trainer = fit(tiny_model, tmp_path, TinyEngine(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module, engine = make_module(tiny_model), TinyEngine()
    sync = AdapterSync(tolerance=1e-3)
    trainer = make_trainer(tmp_path, sync=sync, max_steps=3, max_epochs=-1)
    trainer.fit(module, datamodule=make_data(module, engine), ckpt_path=tmp_path / "x.ckpt")
    assert engine.calls[:2] == [("load", 2), ("generate", 2)]
    assert sync.agreement is not None
    assert sync.agreement.slope == pytest.approx(1.0, abs=0.05)


def test_an_engine_that_ignores_the_adapter_is_found_at_once(tiny_model, tmp_path):
    """The gap of one small step is far within the tolerance: only the probe detects the fault."""
    engine = TinyEngine(applied=0.0)
    with pytest.raises(SyncError, match=r"applies -?0.0\d of the adapter .* policy version 1\b"):
        fit(tiny_model, tmp_path, engine, AdapterSync(tolerance=10.0))


def test_an_engine_that_applies_it_twice_is_found_at_once(tiny_model, tmp_path):
    with pytest.raises(SyncError, match=r"applies (1\.[5-9]|2\.)\d* of the adapter"):
        fit(tiny_model, tmp_path, TinyEngine(applied=2.0), AdapterSync(tolerance=10.0))


@pytest.mark.parametrize(("beta", "num_forwards"), [(0.0, 2), (0.1, 2 * 5)])
def test_an_adapter_without_effect_is_probed_a_bounded_number_of_times(
    tiny_model, tmp_path, monkeypatch, caplog, beta, num_forwards
):
    """A probe runs the reference on one micro-batch, or not at all if the loss runs it on every one."""
    monkeypatch.setattr("fuchsia_pl.callbacks.adapter_sync.MAX_PROBES", 2)
    probes = []
    original = Policy.evaluated_output
    monkeypatch.setattr(Policy, "evaluated_output", lambda self, batch: probes.append(1) or original(self, batch))
    still = partial(torch.optim.SGD, lr=0.0)
    module, sync = make_module(tiny_model, LossConfig(beta=beta), optimizer=still), AdapterSync(tolerance=1e-3)
    make_trainer(tmp_path, sync=sync, accumulate_grad_batches=2).fit(
        module, datamodule=make_data(module, steps_per_epoch=5)
    )
    assert sync.agreement is None
    assert len(probes) == num_forwards
    assert caplog.text.count("2 probes found no effect of the adapter") == 1


@pytest.fixture
def forwards(monkeypatch):
    """(number of sampled tokens, number of input positions, whether it is a probe) of each forward."""
    found: list[tuple[int, int, bool]] = []
    original = Policy.output

    def output(self, batch):
        found.append((int(batch.loss_mask.sum()), sum(batch.lengths), not torch.is_grad_enabled()))
        return original(self, batch)

    monkeypatch.setattr(Policy, "output", output)
    return found


def many_tokens(tiny_model, root, sync, loss=None, **settings):
    """Steps of 16 x 8 rows with up to 100 tokens, in two micro-batches. Their logprobs are arbitrary."""
    module = make_module(tiny_model, loss or LossConfig(beta=0.0), optimizer=partial(torch.optim.SGD, lr=0.0))
    sampling = {"group_size": 8, "max_completion_tokens": 100, "max_length": 120}
    data = make_data(module, RecordedEngine(), batch_size=16, sampling=sampling)
    make_trainer(root, sync=sync, **{"accumulate_grad_batches": 2, **settings}).fit(module, datamodule=data)


def test_a_probe_computes_a_few_percent_of_a_step(tiny_model, tmp_path, forwards):
    """Without a KL the reference is computed for the probe alone."""
    many_tokens(tiny_model, tmp_path, AdapterSync(tolerance=100.0))
    kinds = [is_probe for _, _, is_probe in forwards]
    # The probe follows the last micro-batch, since others may be empty. The first step has no trained weights.
    assert kinds == [False, False, False, False, True, False, False, True]
    for first in (2, 5):
        step, (num_tokens, num_inputs, _) = forwards[first : first + 2], forwards[first + 2]
        assert num_tokens == PROBED_TOKENS
        assert num_inputs < 0.05 * sum(inputs for _, inputs, _ in step)


def test_after_a_probe_with_an_effect_on_too_few_tokens_the_next_one_has_more(
    tiny_model, tmp_path, monkeypatch, forwards
):
    clear, rounded = (Agreement(1.0, 0.01, noise, num_effective=5) for noise in (0.1, 0.9))
    answers = [rounded, clear, clear, clear]
    monkeypatch.setattr("fuchsia_pl.callbacks.adapter_sync.adapter_agreement", lambda *args: answers.pop(0))
    monkeypatch.setattr("fuchsia_pl.callbacks.adapter_sync.PROBED_TOKENS", 8)
    many_tokens(tiny_model, tmp_path, AdapterSync(tolerance=100.0), max_epochs=3)
    assert [num_tokens for num_tokens, _, is_probe in forwards if is_probe] == [8, 8, 32, 128]


def test_a_gap_above_the_tolerance_stops_the_run_before_the_update(tiny_model, tmp_path):
    class OtherLogprobs(TinyEngine):
        async def generate(self, prompt_ids, sampling):
            completion = await super().generate(prompt_ids, sampling)
            shifted = tuple(logprob - 0.5 for logprob in completion.logprobs)
            return type(completion)(completion.token_ids, shifted, completion.finish_reason, None, self._version)

    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, sync=AdapterSync(tolerance=0.4))
    with pytest.raises(SyncError, match=r"disagree at step 0.*is 0\.500, and adapter_sync.tolerance allows 0\.4"):
        trainer.fit(module, datamodule=make_data(module, OtherLogprobs()))
    assert trainer.global_step == 0
    assert all((p == 0).all() for name, p in module.named_parameters() if "lora_B" in name)
    fit(tiny_model, tmp_path, OtherLogprobs(), AdapterSync(tolerance=0.6), max_steps=1)


def test_a_gap_that_is_not_a_number_stops_the_run(tiny_model, tmp_path):
    class NoNumbers(TinyEngine):
        async def generate(self, prompt_ids, sampling):
            completion = await super().generate(prompt_ids, sampling)
            return type(completion)(
                completion.token_ids, (float("nan"),) * len(completion.logprobs), completion.finish_reason, None, 0
            )

    with pytest.raises(SyncError, match="is nan"):
        fit(tiny_model, tmp_path, NoNumbers())


def test_a_failed_load_stops_the_run(tiny_model, tmp_path):
    class Refusing(TinyEngine):
        async def load_weights(self, path, version):
            if version == 1:
                raise EngineError("no room")
            await super().load_weights(path, version)

    with pytest.raises(EngineError, match="no room"):
        fit(tiny_model, tmp_path, Refusing())


def test_the_engines_logprobs_follow_the_trainers_and_the_base_stays(tiny_model, tmp_path):
    before = {name: p.clone() for name, p in make_base(tiny_model).items()}
    gaps = []

    class Record(AdapterSync):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            gaps.append(pl_module.step_metrics["train/logprob_gap"].item())

    module, _ = fit(tiny_model, tmp_path, TinyEngine(), Record(tolerance=1e-3))
    assert max(gaps) < 1e-4
    for name, parameter in base_of(module).items():
        assert torch.equal(parameter, before[name])


def make_base(tiny_model):
    module = make_module(tiny_model)
    module.configure_model()
    return base_of(module)


def base_of(module):
    return {name: p for name, p in module.policy.named_parameters() if "lora_" not in name}


def test_no_adapter_folder_is_left_behind(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.scratch.RAM_BACKED", tmp_path / "ram")
    (tmp_path / "ram").mkdir()
    seen: list[list[str]] = []

    class Listing(TinyEngine):
        async def load_weights(self, path: Path, version):
            seen.append(sorted(entry.name for entry in path.parent.iterdir()))
            await super().load_weights(path, version)

    fit(tiny_model, tmp_path, Listing())
    assert seen == [["version-0"], ["version-1"], ["version-2"], ["version-3"]]
    assert list((tmp_path / "ram").iterdir()) == []


def test_a_tolerance_of_zero_is_refused():
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        AdapterSync(tolerance=0)
