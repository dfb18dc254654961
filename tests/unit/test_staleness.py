import random
import time

import pytest

from fuchsia_pl.batch import StaleBatchError
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.types import Completion, ConfigError
from tests.doubles import RecordedEngine, TinyEngine, make_data, make_module, make_trainer


class Watch(AdapterSync):
    """Records the versions that each step trains on and the time of its end; can slow training down."""

    def __init__(self, seconds: float = 0.0, tolerance: float = 100.0) -> None:
        super().__init__(tolerance)
        self.seconds = seconds
        self.versions: list[tuple[int, int]] = []
        self.ends: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        time.sleep(self.seconds)
        tokens = [v for sample in batch.samples for v in sample.rollout.policy_versions if v >= 0]
        if tokens:
            self.versions += [(trainer.global_step, version) for version in (min(tokens), max(tokens))]
        self.metrics.append(dict(batch.step.metrics))

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        self.ends.append(time.perf_counter())


def fit(tiny_model, root, engine, watch, num_steps=4, module=None, **sampling):
    module = module or make_module(tiny_model)
    data = make_data(module, engine, batch_size=2, steps_per_epoch=num_steps, sampling=sampling)
    trainer = make_trainer(root, sync=watch, max_epochs=-1, max_steps=num_steps)
    trainer.fit(module, datamodule=data)
    return module


def test_one_step_of_staleness_samples_each_batch_with_the_weights_before(tiny_model, tmp_path):
    watch = Watch()
    fit(tiny_model, tmp_path, TinyEngine(), watch, max_staleness=1)
    # Phase 1 is begun with phase 0, phase 2 once version 1 is loaded, and so on.
    assert watch.versions == [(0, 0)] * 2 + [(1, 0)] * 2 + [(2, 1)] * 2 + [(3, 2)] * 2
    assert [m["rollout/staleness"] for m in watch.metrics] == [0.0, 1.0, 1.0, 1.0]
    assert [m["rollout/stale"] for m in watch.metrics] == [0.0] * 4


def test_the_next_phase_is_sampled_while_this_one_is_trained(tiny_model, tmp_path):
    """`make bench` measures the duration."""
    began: list[float] = []

    class Noting(RecordedEngine):
        async def generate(self, prompt_ids, sampling):
            began.append(time.perf_counter())
            return await super().generate(prompt_ids, sampling)

    watch = Watch(seconds=0.3)
    fit(tiny_model, tmp_path, Noting(seconds=0.05), watch, num_steps=3, max_staleness=1)
    phases = [began[8 * phase] for phase in range(3)]  # 2 items, 4 siblings
    assert phases[1] < watch.ends[0]
    assert watch.ends[0] < phases[2] < watch.ends[1]


@pytest.mark.parametrize("staleness", [2, 3])
def test_no_version_is_older_than_allowed_however_long_things_take(tiny_model, tmp_path, staleness):
    """Random durations of sampling and training."""
    numbers = random.Random(staleness)

    class Uneven(RecordedEngine):
        async def generate(self, prompt_ids, sampling):
            self.seconds = numbers.choice([0.0, 0.02, 0.1])
            return await super().generate(prompt_ids, sampling)

    class UnevenWatch(Watch):
        def on_train_batch_start(self, *args):
            self.seconds = numbers.choice([0.0, 0.05, 0.15])
            super().on_train_batch_start(*args)

    watch = UnevenWatch()
    fit(tiny_model, tmp_path, Uneven(), watch, num_steps=12, max_staleness=staleness)
    lags = {step - version for step, version in watch.versions}
    assert min(lags) >= 0
    assert 1 <= max(lags) <= staleness


@pytest.mark.parametrize("staleness", [2, 3])
def test_the_bound_is_met_where_training_is_the_slower_side(tiny_model, tmp_path, staleness):
    watch = Watch(seconds=0.2)
    fit(tiny_model, tmp_path, RecordedEngine(), watch, num_steps=8, max_staleness=staleness)
    assert max(step - version for step, version in watch.versions) == staleness


class Older(TinyEngine):
    """Reports a policy version some steps older for every third completion."""

    def __init__(self, steps: int, every: int = 3) -> None:
        super().__init__()
        self.steps, self.every, self.number = steps, every, 0

    async def generate(self, prompt_ids, sampling) -> Completion:
        found = await super().generate(prompt_ids, sampling)
        self.number += 1
        version = found.policy_version - (self.steps if self.number % self.every == 0 else 0)
        return Completion(found.token_ids, found.logprobs, found.finish_reason, found.stop_reason, version)


def test_rows_that_are_too_old_are_dropped_and_counted(tiny_model, tmp_path):
    watch = Watch()
    fit(tiny_model, tmp_path, Older(steps=5), watch, num_steps=2, max_staleness=2)
    assert all(step - version <= 2 for step, version in watch.versions)
    # 8 completions a phase: the 3rd and the 6th of the first, the 9th, 12th and 15th of the second
    assert [m["rollout/stale"] for m in watch.metrics] == [2.0, 3.0]
    assert [m["rollout/untrained"] for m in watch.metrics] == [2.0, 3.0]


@pytest.mark.parametrize("in_flight", ["finish", "continue"])
def test_rollouts_in_flight_end_before_new_weights_come_or_go_on_with_them(tiny_model, tmp_path, in_flight):
    num_in_flight, at_loads = [0], []

    class Counting(RecordedEngine):
        def start(self, spec):
            self.spec = spec

        async def generate(self, prompt_ids, sampling):
            num_in_flight[0] += 1
            found = await super().generate(prompt_ids, sampling)
            num_in_flight[0] -= 1
            return found

        async def load_weights(self, path, version):
            at_loads.append(num_in_flight[0])
            await super().load_weights(path, version)

    engine = Counting(seconds=0.5)
    fit(tiny_model, tmp_path, engine, Watch(), num_steps=3, max_staleness=1, in_flight=in_flight)
    assert engine.spec.loads_in_flight == (in_flight == "continue")
    # Version 0 is loaded before sampling, 1 and 2 while the next phase is sampled, and 3 after the last phase.
    assert [number > 0 for number in at_loads] == [False, *[in_flight == "continue"] * 2, False]


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_that_never_gets_new_weights_ends_the_run(tiny_model, tmp_path, staleness):
    with pytest.raises(StaleBatchError, match=rf"the largest allowed lag is {staleness} steps"):
        fit(tiny_model, tmp_path, Older(steps=5, every=1), Watch(), max_staleness=staleness)


def test_settings_that_do_nothing_are_refused(tiny_model):
    module = make_module(tiny_model)
    with pytest.raises(ConfigError, match='in_flight is "continue", and max_staleness is 0'):
        make_data(module, sampling={"in_flight": "continue"})
    with pytest.raises(ConfigError, match="max_staleness must be 0 or more, got -1"):
        make_data(module, sampling={"max_staleness": -1})
