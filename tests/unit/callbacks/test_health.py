"""Warnings in words: runs with an illness, a healthy run, and the file of warnings."""

import json
import logging
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.health import HealthWarnings
from fuchsia_pl.evaluation.health import Finding
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.schedules import TransformersSchedule
from fuchsia_pl.types import Completion, ConfigError
from tests.doubles import (
    EOS,
    Constant,
    RecordedEngine,
    TinyEngine,
    TinyEnvironment,
    make_data,
    make_module,
    make_trainer,
)

LUCKY = 10  # a token


class Scripted(RecordedEngine):
    """Random completions, which depend on the number of syncs in the way of a subclass."""

    def length(self, numbers: random.Random, longest: int) -> int:
        return numbers.randrange(2, longest)

    def logprob(self) -> float:
        return -3.7

    def token(self, numbers: random.Random) -> int:
        return numbers.randrange(4, 40)

    async def generate(self, prompt_ids, sampling):
        numbers = random.Random(f"{list(prompt_ids)} {sampling.seed}")
        length = self.length(numbers, sampling.max_tokens)
        ids = [self.token(numbers) for _ in range(length)]
        is_cut = length >= sampling.max_tokens
        ids = ids if is_cut else [*ids[:-1], EOS]
        reason = "length" if is_cut else "stop"
        return Completion(tuple(ids), (self.logprob(),) * len(ids), reason, None, self._version)


class Endless(Scripted):
    def length(self, numbers, longest):
        return longest


class Older(Scripted):
    """Reports weights that are five steps old: how far sampling really runs ahead depends on the machine."""

    async def generate(self, prompt_ids, sampling):
        return replace(await super().generate(prompt_ids, sampling), policy_version=max(0, self._version - 5))


class Growing(Scripted):
    def length(self, numbers, longest):
        return min(1 + self._version, longest)


class Drifting(Scripted):
    def logprob(self):
        return -3.7 - 4.0 * self._version


class Lucky(Scripted):
    def token(self, numbers):
        return LUCKY if numbers.random() < 0.5 else numbers.randrange(4, 40)


class Ending(TinyEngine):
    """Ends at every fourth token or so: the tiny model hardly ever writes its end token."""

    async def generate(self, prompt_ids, sampling):
        return await super().generate(prompt_ids, replace(sampling, stop_token_ids=tuple(range(2, 14))))


def by_sibling(rollouts, *args, **kwargs):
    return [r.sibling / 4 for r in rollouts]


def hundred(rollouts, *args, **kwargs):
    return [100.0 * r.sibling for r in rollouts]


def lucky(rollouts, *args, **kwargs):
    return [0.5 * sum(t == LUCKY for t in r.turns[0].completion.token_ids) / r.num_sampled_tokens for r in rollouts]


class Rewarded(TinyEnvironment):
    def __init__(self, *functions) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = list(functions), {}


def fit(folder, root, health, engine, environment=None, steps=4, loss=None, lr=1e-2, ckpt_path=None, **sampling):
    """Trains all weights (so the engine needs no adapter), in windows of 2 steps. Returns the lines of warnings.jsonl."""
    module = make_module(folder, loss, optimizer=partial(torch.optim.AdamW, lr=lr), enabled=False)
    data = make_data(module, engine, environment, batch_size=2, steps_per_epoch=steps, sampling=sampling)
    trainer = make_trainer(root, health, sync=AdapterSync(tolerance=1e6), max_epochs=-1, max_steps=steps)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / "x.ckpt")
    return lines_of(root)


def lines_of(root) -> list[dict]:
    file = root / "warnings.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logged(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fuchsia_pl.callbacks.health"]


MANY_UPDATES = LossConfig(num_policy_updates=4, clip_low=1e-4, clip_high=1e-4)
ILL = {
    "no_spread": {"engine": Scripted(), "environment": Constant(), "steps": 3},
    "reward_flat": {"engine": Scripted(), "environment": Rewarded(by_sibling), "steps": 6},
    "gap_growing": {"engine": Drifting(), "environment": Rewarded(by_sibling), "steps": 4},
    "entropy_collapsed": {"engine": Lucky(), "environment": Rewarded(lucky), "steps": 30},
    "all_truncated": {"engine": Endless(), "environment": Rewarded(by_sibling), "steps": 3},
    "lengths_exploding": {"engine": Growing(), "environment": Rewarded(by_sibling), "steps": 6},
    "reward_dominates": {"engine": Scripted(), "environment": Rewarded(hundred, by_sibling), "steps": 2},
    "clip_fraction_high": {
        "engine": Scripted(),
        "environment": Rewarded(by_sibling),
        "steps": 4,
        "loss": MANY_UPDATES,
    },
    "staleness_high": {
        "engine": Older(),
        "environment": Rewarded(by_sibling),
        "steps": 8,
        "max_staleness": 20,
    },
}


@pytest.mark.parametrize("name", ILL)
def test_a_run_with_an_illness_is_told(tiny_model, tmp_path, caplog, name):
    # Rewards that no policy learns are flat, and a policy moves away from an engine that does not load its weights.
    ignore = {"reward_flat", "gap_growing"} - {name}
    lines = fit(tiny_model, tmp_path, HealthWarnings(window=2, flat_steps=6, ignore=sorted(ignore)), **ILL[name])
    assert [line["name"] for line in lines] == [name]
    (line,) = lines
    assert list(line) == ["step", "name", "metric", "text", "advice"]
    assert logged(caplog) == [f"step {line['step']}: {line['text']}. {line['advice']}"]


def test_equal_siblings_are_no_illness_where_they_are_not_compared(tiny_model, tmp_path):
    loss = LossConfig("reinforce")
    ill = {"engine": Scripted(), "environment": Constant(), "steps": 3, "loss": loss}
    assert fit(tiny_model, tmp_path, HealthWarnings(window=2, flat_steps=6), **ill) == []


def test_a_growing_kl_is_told(tiny_model, tmp_path):
    """Against the frozen weights; an adapter with a rate that is much too high."""
    module = make_module(tiny_model, LossConfig(beta=1e-6), optimizer=partial(torch.optim.AdamW, lr=0.2))
    data = make_data(
        module, TinyEngine(), Rewarded(by_sibling), batch_size=2, steps_per_epoch=6, sampling={"group_size": 2}
    )
    health = HealthWarnings(window=2, flat_steps=6, ignore=["reward_flat", "all_truncated"])
    make_trainer(tmp_path, health, sync=AdapterSync(tolerance=1e6), max_steps=6).fit(module, datamodule=data)
    assert {"learning_rate", "kl_growing"} <= {line["name"] for line in lines_of(tmp_path)}


def test_a_run_that_learns_is_told_nothing(tiny_model, tmp_path, caplog):
    module = make_module(tiny_model)
    data = make_data(module, Ending(), batch_size=3, steps_per_epoch=14)
    make_trainer(tmp_path, HealthWarnings(window=4, flat_steps=12), max_steps=14).fit(module, datamodule=data)
    assert logged(caplog) == []
    assert not (tmp_path / "warnings.jsonl").exists()


@pytest.mark.parametrize(("lr", "enabled", "is_far"), [(9e-7, True, True), (1e-6, True, False), (9e-7, False, False)])
def test_a_rate_far_from_that_of_an_adapter_is_told(tiny_model, tmp_path, caplog, lr, enabled, is_far):
    """With all weights trained, such rates are usual. A warm-up begins at 0, which does not count as a low rate."""
    module = make_module(tiny_model, optimizer=partial(torch.optim.AdamW, lr=lr), enabled=enabled)
    module.lr_scheduler = partial(TransformersSchedule, name="constant_with_warmup", num_warmup_steps=2)
    make_trainer(tmp_path, HealthWarnings(), max_steps=1).fit(module, datamodule=make_data(module, batch_size=2))
    told = ["step 0: the learning rate is 9e-07, and an adapter hardly learns below 1e-06"] if is_far else []
    assert [line.partition(". ")[0] for line in logged(caplog)] == told


def test_a_resumed_run_continues_the_file_and_repeats_no_warning(tiny_model, tmp_path):
    settings = {"engine": Endless(), "environment": Rewarded(by_sibling)}
    before = fit(tiny_model, tmp_path / "a", HealthWarnings(window=2, flat_steps=8), steps=5, **settings)
    assert [line["name"] for line in before] == ["all_truncated"]
    whole = fit(tiny_model, tmp_path / "b", HealthWarnings(window=2, flat_steps=8), steps=9, **settings)
    checkpoint = tmp_path / "a" / "x.ckpt"
    resumed = fit(
        tiny_model, tmp_path / "c", HealthWarnings(window=2, flat_steps=8), steps=9, ckpt_path=checkpoint, **settings
    )
    assert resumed == whole
    assert [line["name"] for line in resumed] == ["all_truncated", "reward_flat"]


def test_settings_turn_warnings_off(tiny_model, tmp_path):
    ill = ILL["all_truncated"]
    assert fit(tiny_model, tmp_path / "a", HealthWarnings(enabled=False, window=2), **ill) == []
    assert fit(tiny_model, tmp_path / "b", HealthWarnings(window=2, ignore=["all_truncated"]), **ill) == []
    assert fit(tiny_model, tmp_path / "c", HealthWarnings(window=10), **ill) == []  # 3 steps are not yet half a window


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "health.window must be 2 or more, got 1"),
        ({"window": 5, "flat_steps": 9}, r"health.flat_steps must be at least two windows \(10\), got 9"),
        ({"ignore": ["kl"]}, "health.ignore has kl, and the warnings are no_spread, "),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        HealthWarnings(**settings)


def test_a_warning_is_repeated_only_when_it_is_twice_as_bad(tmp_path, caplog):
    health = HealthWarnings()
    trainer = SimpleNamespace(global_step=1, is_global_zero=True, default_root_dir=tmp_path, fast_dev_run=False)
    with caplog.at_level(logging.WARNING):
        for level in (2.0, 3.9, 1.0, 4.0, 7.9, 8.0):
            health._tell(trainer, Finding("kl_growing", "train/kl", f"{level}", "Stop", level))
        trainer.is_global_zero = False  # only the first rank writes
        health._tell(trainer, Finding("no_spread", "reward/mean", "0", "Stop"))
    assert [line["text"] for line in lines_of(tmp_path)] == ["2.0", "4.0", "8.0"]
    assert logged(caplog) == [f"step 1: {level}. Stop" for level in (2.0, 4.0, 8.0)]
