"""An engine whose processes end is started again with the newest weights, and the phase is sampled again."""

import asyncio
import json
import logging
import threading

import pytest
import torch

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.engines import restarts as restarts_module
from fuchsia_pl.engines.base import EngineError, EngineLostError, EngineSpec
from fuchsia_pl.engines.restarts import Restarts
from fuchsia_pl.engines.vllm_processes import while_alive
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ConfigError, ServedModel
from tests.doubles import TinyEngine, make_data, make_module, make_trainer


class MortalEngine(TinyEngine):
    """Dies once at each of the given request numbers. After a restart it has no weights until it loads the kept ones."""

    def __init__(self, *deaths: int) -> None:
        super().__init__()
        self.deaths, self.num_requests = set(deaths), 0
        self.restarts = Restarts(super().start, self.load_now, super().close, abort=lambda: None)

    def start(self, spec):
        self.restarts.start(spec)

    def close(self):
        self.restarts.close()

    def load_now(self, path, version):
        run_blocking(TinyEngine.load_weights(self, path, version))

    async def load_weights(self, path, version):
        await super().load_weights(path, version)
        self.restarts.loaded(path, version)

    async def generate(self, prompt_ids, sampling):
        self.num_requests += 1
        if self.num_requests in self.deaths:
            self._model = None
        if self._model is None:
            raise EngineLostError("killed", self.restarts.num_starts)
        return await super().generate(prompt_ids, sampling)

    async def restart(self, lost):
        self.restarts.restart(lost)


def fit(folder, root, engine, **sampling):
    torch.manual_seed(0)
    module = make_module(folder)
    trainer = make_trainer(root, RolloutLog(), sync=AdapterSync(), max_steps=3)
    trainer.fit(module, datamodule=make_data(module, engine, sampling=sampling))
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    weights = {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}
    return [line["completion_ids"] for line in lines], weights


def test_a_run_whose_engine_dies_ends_with_the_weights_of_one_whose_engine_lives(tiny_model, tmp_path, caplog):
    """It dies in the middle of the second phase: at the seventh of its 20 rollouts."""
    ids, weights = fit(tiny_model, tmp_path / "lives", MortalEngine())
    with caplog.at_level(logging.WARNING):
        again, same = fit(tiny_model, tmp_path / "dies", MortalEngine(27))
    assert again == ids
    assert len(ids) == 60
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    assert "the engine has ended: restart 1 of 1" in caplog.text
    assert "killed" in caplog.text


@pytest.mark.parametrize(("num_restarts", "deaths"), [(0, [5]), (1, [5, 30]), (2, [5, 30, 60])])
def test_it_stops_after_as_many_restarts_as_allowed(tiny_model, tmp_path, num_restarts, deaths):
    engine = MortalEngine(*deaths)
    with pytest.raises(EngineLostError, match="killed"):
        fit(tiny_model, tmp_path, engine, engine_restarts=num_restarts)
    assert engine.restarts.num_starts == num_restarts + 1


def test_a_negative_number_is_refused():
    with pytest.raises(ConfigError, match="engine_restarts must be 0 or more, got -1"):
        SamplingConfig(engine_restarts=-1)


def test_of_several_requests_that_fail_one_restarts_it(tmp_path):
    calls = []
    spec = EngineSpec(ServedModel("m", "float32", 0, lambda name: tmp_path), 8, 0, tmp_path / "log", max_restarts=1)
    restarts = Restarts(
        lambda spec: calls.append("start"),
        lambda path, version: calls.append(version),
        lambda: calls.append("end"),
        abort=lambda: calls.append("abort"),
    )
    restarts.start(spec)
    for version in (0, 1):
        folder = tmp_path / f"version-{version}"
        folder.mkdir()
        (folder / "weights").write_text(str(version))
        restarts.loaded(folder, version)
    first, second = EngineLostError("one", 1), EngineLostError("two", 1)
    restarts.restart(first)
    restarts.restart(second)
    assert calls == ["start", "end", "start", 1]
    assert (tmp_path / ".kept.rank0/weights").read_text() == "1"
    with pytest.raises(EngineLostError, match="three"):
        restarts.restart(EngineLostError("three", 2))
    restarts.close()
    restarts.restart(EngineLostError("four", 2))  # it is not needed any more
    assert calls == ["start", "end", "start", 1, "end"]


def test_an_engine_that_cannot_restart_raises_what_happened(tiny_model, tmp_path):
    class Dead(TinyEngine):
        async def generate(self, prompt_ids, sampling):
            raise EngineLostError("gone", 1)

    with pytest.raises(EngineError, match="gone"):
        fit(tiny_model, tmp_path, Dead())


def spec_of(folder, max_restarts):
    return EngineSpec(
        ServedModel("m", "float32", 0, lambda name: folder), 8, 0, folder / "log", max_restarts=max_restarts
    )


def kept_folder(folder):
    (folder / "version-0").mkdir()
    (folder / "version-0/weights").write_text("0")
    return folder / "version-0"


def test_an_engine_that_ends_again_while_it_loads_is_started_as_often_as_allowed(tmp_path):
    loads = []

    def load(path, version):
        loads.append(version)
        if len(loads) < 3:
            raise EngineLostError("again", len(loads) + 1)

    restarts = Restarts(lambda spec: None, load, lambda: None, abort=lambda: None)
    restarts.start(spec_of(tmp_path, max_restarts=3))
    restarts.loaded(kept_folder(tmp_path), 0)
    restarts.restart(EngineLostError("first", 1))
    assert (len(loads), restarts.num_starts, restarts.is_busy) == (3, 4, False)
    loads.clear()
    with pytest.raises(EngineLostError, match="last"):
        restarts.restart(EngineLostError("last", 4))


def test_a_run_that_ends_during_a_restart_leaves_no_engine(tmp_path):
    started, aborted, calls = threading.Event(), threading.Event(), []

    def start(spec):
        calls.append("start")
        if len(calls) > 1:
            started.set()
            assert aborted.wait(30)

    restarts = Restarts(start, lambda path, version: calls.append("load"), lambda: calls.append("end"), aborted.set)
    restarts.start(spec_of(tmp_path, max_restarts=1))
    other = threading.Thread(target=restarts.restart, args=(EngineLostError("killed", 1),))
    other.start()
    assert started.wait(30)
    assert restarts.is_busy
    restarts.close()
    other.join(30)
    assert not other.is_alive()
    assert calls[-1] == "end"
    assert not restarts.is_busy


def test_a_run_that_is_told_to_end_restarts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts_module.stopping, "signum", 15)
    restarts = Restarts(lambda spec: None, lambda path, version: None, lambda: None, abort=lambda: None)
    restarts.start(spec_of(tmp_path, max_restarts=1))
    with pytest.raises(EngineLostError, match="killed"):
        restarts.restart(EngineLostError("killed", 1))
    assert restarts.num_starts == 1


def test_orders_that_a_dead_engine_leaves_unanswered_end(tmp_path):
    class DeadError(RuntimeError):
        pass

    class Dead:
        errored = False
        dead_error = DeadError("gone")

    async def scenario():
        llm = Dead()
        asyncio.get_running_loop().call_later(0.05, setattr, llm, "errored", True)
        await while_alive(llm, lambda: asyncio.sleep(600))

    with pytest.raises(DeadError):
        asyncio.run(scenario())
    assert asyncio.run(while_alive(Dead(), lambda: asyncio.sleep(0, "done"))) == "done"
