"""Counts of a run's rollouts: they never fall, and reach the total of their step."""

import asyncio
import signal
import threading

import pytest

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.stop_signals import StopSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.progress import HELD_OUT, SAMPLING, TRAINING, Activity, progress
from fuchsia_pl.stopping import Stopped
from tests.doubles import Spread, TinyEngine, TinyEnvironment, make_data, make_module, make_trainer


class Watch:
    """Records the ends of activities, and every count of each in order."""

    def __init__(self, monkeypatch) -> None:
        self.ends: list[tuple[str, int, int | None, bool]] = []
        self.counts: dict[Activity, list[tuple[int, int]]] = {}
        advance = Activity.advance

        def counting(activity: Activity, number: int = 1) -> None:
            advance(activity, number)
            self.counts.setdefault(activity, []).append((activity.done, activity.total))

        monkeypatch.setattr(Activity, "advance", counting)

    def started(self, activity: Activity) -> None:
        pass

    def ended(self, activity: Activity, is_complete: bool) -> None:
        self.ends.append((activity.name, activity.done, activity.total, is_complete))

    def of(self, name: str) -> list[tuple[int, int | None, bool]]:
        return [end[1:] for end in self.ends if end[0] == name]


@pytest.fixture
def watch(monkeypatch):
    watch = Watch(monkeypatch)
    progress.watch(watch)
    yield watch
    progress.unwatch(watch)
    assert progress.current == ()
    for counts in watch.counts.values():
        assert [done for done, _ in counts] == list(range(1, len(counts) + 1))
        assert all(done <= total for done, total in counts)


class Unsteady(TinyEnvironment):
    """Every third rollout of a group ends by an error of the environment."""

    def __init__(self) -> None:
        super().__init__()
        self.on_error = "unscored"

    def open_rollout(self, rollout):
        if rollout.sibling == 2:
            raise LookupError("no database")


def run(tiny_model, tmp_path, environment=None, engine=None, loss=None, sampling=None, **settings):
    module = make_module(tiny_model, loss)
    callbacks = [ConsoleReport(every_n_steps=0)]
    callbacks[0].disable()
    trainer = make_trainer(
        tmp_path, *callbacks, StopSignals(), enable_progress_bar=True, **{"max_steps": 3, **settings}
    )
    trainer.fit(module, datamodule=make_data(module, engine, environment, sampling=sampling or {}))
    return trainer


def test_every_step_counts_its_rollouts_and_its_micro_batches(tiny_model, tmp_path, watch):
    run(tiny_model, tmp_path, accumulate_grad_batches=3, num_sanity_val_steps=-1, limit_val_batches=1.0)
    assert watch.of(SAMPLING) == [(5 * 4, 5 * 4, True)] * 3
    assert watch.of(TRAINING) == [(3, 3, True)] * 3
    assert watch.of(HELD_OUT) == [(4, 4, True)] * 2  # before training, and at the end of the epoch
    assert watch.of("rendering training prompts") == [(20, 20, True)]
    assert watch.of("rendering held-out prompts") == [(4, 4, True)]
    assert len(watch.of("starting TinyEngine")) == len(watch.of("loading the model")) == 1


def test_groups_that_are_replaced_raise_the_total_of_the_same_step(tiny_model, tmp_path, watch):
    run(tiny_model, tmp_path, Spread(), loss=LossConfig("dapo", max_refills=3), max_steps=2)
    ends = watch.of(SAMPLING)
    assert len(ends) == 2
    assert all(done == total and is_complete for done, total, is_complete in ends)
    # Half of the items have no spread, so of five groups some are replaced.
    assert any(total > 5 * 4 for _, total, _ in ends)
    assert all(total % 4 == 0 for _, total, _ in ends)


def test_rollouts_that_fail_count_too(tiny_model, tmp_path, watch):
    run(tiny_model, tmp_path, Unsteady())
    assert watch.of(SAMPLING) == [(20, 20, True)] * 3


def test_phases_ahead_of_training_count_apart(tiny_model, tmp_path, watch):
    run(tiny_model, tmp_path, sampling={"max_staleness": 2}, sync=AdapterSync(tolerance=100.0))
    ends = watch.of(SAMPLING)
    assert ends == [(20, 20, True)] * 3
    assert watch.of(TRAINING) == [(1, 1, True)] * 3


def test_a_signal_ends_the_count_without_completing_it(tiny_model, tmp_path, watch):
    class Stopping(TinyEngine):
        number = 0

        async def generate(self, prompt_ids, sampling):
            self.number += 1
            if self.number == 30:  # in the second step
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            if self.number >= 30:
                await asyncio.sleep(20)
            return await super().generate(prompt_ids, sampling)

    with pytest.raises(Stopped):
        run(tiny_model, tmp_path, engine=Stopping())
    first, second = watch.of(SAMPLING)
    assert first == (20, 20, True)
    assert second[0] < second[1] == 20
    assert not second[2]
