import asyncio
from collections import Counter
from itertools import groupby

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from fuchsia_pl import datamodule
from fuchsia_pl.batch import Denominators, StaleBatchError
from fuchsia_pl.envs import SingleTurnEnvironment, ToolServerError
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts import batcher
from fuchsia_pl.rollouts.collector import PromptTooLongError
from fuchsia_pl.rollouts.phases import PhaseDataset
from fuchsia_pl.rollouts.ranks import ranks_of
from fuchsia_pl.types import ConfigError
from tests.doubles import Spread, TinyEngine, TinyEnvironment, even, make_data, make_module, make_sample, make_trainer


def fit(tiny_model, root, **settings):
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = make_trainer(root, **settings)
    trainer.fit(module, datamodule=make_data(module, engine))
    return engine


def test_step_k_is_sampled_after_the_sync_of_the_step_before_it(tiny_model, tmp_path):
    engine = fit(tiny_model, tmp_path, accumulate_grad_batches=2)
    # 5 items with 4 siblings are 20 requests a step; version 0 is loaded before the first.
    order = [call for call, _ in groupby(engine.calls)]
    assert order == [
        ("load", 0),
        ("generate", 0),
        ("load", 1),
        ("generate", 1),
        ("load", 2),
        ("generate", 2),
        ("load", 3),
    ]
    assert engine.calls.count(("generate", 1)) == 20


def test_the_length_of_the_dataset_is_what_keeps_that_order(tiny_model, tmp_path, monkeypatch):
    class WithoutLength(PhaseDataset):
        __len__ = None

    monkeypatch.setattr(datamodule, "PhaseDataset", WithoutLength)
    with pytest.raises(
        StaleBatchError,
        match=r"step 0 received rollouts of policy version -1 for step 0 of their phase.*the data loader sampled before",
    ):
        fit(tiny_model, tmp_path)


def test_a_phase_is_produced_when_its_first_batch_is_requested():
    produced = []

    def produce():
        produced.append(len(produced))
        return ["a", "b"]

    dataset = PhaseDataset(produce, num_phases=2, batches_per_phase=2)
    batches = iter(dataset)
    assert produced == []
    assert [next(batches), next(batches)] == ["a", "b"]
    assert produced == [0]
    next(batches)
    assert produced == [0, 1]
    assert len(dataset) == 4


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(tiny_model, tmp_path):
    def rollouts(seed):
        module, seen = make_module(tiny_model), []
        data = make_data(module, seed=seed)
        original = data._train_phase

        def record():
            batches = original()
            seen.append([sample.rollout.token_ids for batch in batches for sample in batch.samples])
            return batches

        data._train_phase = record
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        return seen

    assert rollouts(0) == rollouts(0) != rollouts(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "data.batch_size must be 1 or more, got 0"),
        ({"steps_per_epoch": 0}, "data.steps_per_epoch must be 1 or more, got 0"),
    ],
)
def test_sizes_below_one_are_refused(tiny_model, settings, words):
    with pytest.raises(ValueError, match=words):
        make_data(make_module(tiny_model), **settings)


def test_more_items_than_there_are_is_refused_before_the_engine_starts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    data = make_data(module, engine, TinyEnvironment(num_items=3))
    with pytest.raises(ValueError, match=r"has 3 training items, fewer than data\.batch_size=5"):
        make_trainer(tmp_path).fit(module, datamodule=data)
    assert not hasattr(engine, "spec")


def test_a_prompt_that_is_too_long_is_found_before_the_engine_starts(tiny_model, tmp_path):
    class Wordy(TinyEnvironment):
        def messages(self, item):
            return [{"role": "user", "content": "x" * (50 if item["n"] == 13 else 5)}]

    module, engine = make_module(tiny_model), TinyEngine()
    with pytest.raises(PromptTooLongError, match="prompt of item 13 has 58 tokens"):
        make_trainer(tmp_path).fit(module, datamodule=make_data(module, engine, Wordy()))
    assert not hasattr(engine, "spec")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", r"^training item 1 \(\S+rows\.jsonl, line 2\): field 'prompt' is null"),
        ("validation", r"^held-out item 1 \(\S+rows\.jsonl, line 2\): field 'prompt' is null"),
    ],
)
def test_an_item_without_a_prompt_is_found_before_the_engine_starts(tiny_model, tmp_path, split, words):
    class FromFiles(SingleTurnEnvironment):
        def __init__(self) -> None:
            whole, broken = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
            whole.write_text('{"prompt": "a"}\n' * 5)
            broken.write_text('{"prompt": "a"}\n{"prompt": null}\n' * 5)
            super().__init__(**{"train_file": str(whole), "validation_file": str(whole), f"{split}_file": str(broken)})
            self.reward_functions = [even]

    module, engine = make_module(tiny_model), TinyEngine()
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, limit_val_batches=1.0).fit(module, datamodule=make_data(module, engine, FromFiles()))
    assert engine.calls == []
    assert not hasattr(engine, "spec")  # never started


def test_the_held_out_split_is_checked_before_the_engine_starts(tiny_model, tmp_path):
    class Wordy(TinyEnvironment):
        def validation_items(self):
            return [{"n": 1}, {"n": 10**40}, {"n": 2}]

    module, engine = make_module(tiny_model), TinyEngine()
    with pytest.raises(PromptTooLongError, match="prompt of item 1 has"):
        make_trainer(tmp_path, limit_val_batches=1.0).fit(module, datamodule=make_data(module, engine, Wordy()))
    assert not hasattr(engine, "spec")
    seen = []

    class Keep(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, *args):
            seen.extend(rollout.item["n"] for rollout in batch.rollouts)

    data = make_data(module, engine, Wordy(), sampling={"long_prompts": "drop"})
    make_trainer(tmp_path, Keep(), limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert seen == [1, 2]


def test_limits_that_would_cut_an_optimizer_step_are_refused(tiny_model, tmp_path):
    words = r"limit_train_batches=3 would cut a phase: it has 2 micro-batches"
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model, tmp_path, accumulate_grad_batches=2, limit_train_batches=3)
    fit(tiny_model, tmp_path, accumulate_grad_batches=2, limit_train_batches=4)
    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, GradientAccumulationScheduler({0: 2}))
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler would cut"):
        trainer.fit(module, datamodule=make_data(module))


class Tokens(Callback):
    """Keeps the number of tokens that each micro-batch computes."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        shared = sum((group.num_rows - 1) * group.prefix_length for group in batch.groups)
        self.counts.append(sum(batch.lengths) - shared * pl_module.shares_prefix)


@pytest.mark.parametrize("shared_prefix", ["auto", "never"])
def test_a_budget_of_tokens_takes_the_place_of_the_number_of_micro_batches(tiny_model, tmp_path, shared_prefix):
    # prompts of 10 or 11 tokens and 6 of a completion: a row takes 16, a group of 4 takes 11 + 4 x 5 = 31
    expected = {"auto": 3, "never": 5}[shared_prefix]  # two groups of 5 in 62, or 4 rows of 20 in 64
    module, tokens = make_module(tiny_model), Tokens()
    module.policy_config.shared_prefix, module.policy_config.max_tokens_per_micro_batch = shared_prefix, 64
    trainer = make_trainer(tmp_path, tokens, max_steps=2)
    trainer.fit(module, datamodule=make_data(module))
    assert trainer.accumulate_grad_batches == expected
    assert trainer.global_step == 2
    assert len(tokens.counts) == 2 * expected
    assert max(tokens.counts) <= 64
    assert module.shares_prefix == (shared_prefix == "auto")
    # the same trainer again: its number was computed, not set by the user
    trainer.fit(module, datamodule=trainer.datamodule)


def test_with_several_turns_the_longest_row_is_the_longest_that_is_allowed(tiny_model, tmp_path):
    class Chatty(TinyEnvironment):
        def __init__(self):
            super().__init__()
            self.max_steps = 2

        def step_rollout(self, rollout):
            rollout.respond("and?")

    module = make_module(tiny_model)
    data = make_data(module, environment=Chatty())
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert data.longest_batch().lengths[0] == 39  # of max_length 40 the last token is no input
    assert data.longest_batch().groups[0].prefix_length == 10  # the shortest prompt


def test_a_budget_and_a_number_of_micro_batches_are_refused_together(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    module.policy_config.max_tokens_per_micro_batch = 64
    with pytest.raises(
        ConfigError, match=r"accumulate_grad_batches=2 and model\.policy\.max_tokens_per_micro_batch=64 both set"
    ):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, datamodule=make_data(module, engine))
    assert not hasattr(engine, "spec")


@pytest.mark.parametrize(("loss", "num_left_out"), [({}, 2), ({"beta": 0.1}, 0), ({"entropy_weight": 0.1}, 0)])
def test_rows_that_move_no_weight_do_not_enter_the_forward_but_count_in_the_mean(
    tiny_model, tmp_path, loss, num_left_out
):
    """Some of five items have siblings with equal rewards."""
    module = make_module(tiny_model, LossConfig("grpo", reduction="token_mean", **loss))
    seen = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    make_trainer(tmp_path, Keep(), max_steps=1).fit(module, datamodule=make_data(module, environment=Spread()))
    (batch,) = seen
    scored = sum(sample.rollout.num_sampled_tokens for sample in batch.samples)
    left_out = sum(sample.rollout.num_sampled_tokens for sample in batch.step.zero_advantage)
    assert batch.step.unused == ()
    assert len(batch.step.zero_advantage) == 4 * num_left_out
    assert not any(any(sample.advantages) for sample in batch.step.zero_advantage)
    assert all(any(sample.advantages) for sample in batch.samples) or num_left_out == 0
    assert batch.step.denominators.num_tokens == scored + left_out
    assert batch.step.denominators.num_rollouts == 20
    assert batch.step.denominators.num_forward_tokens == scored == int(batch.loss_mask.sum())
    assert batch.step.metrics["rollout/zero_advantage"] == 4 * num_left_out


def test_an_empty_held_out_split_is_an_error(tiny_model, tmp_path):
    class Unchecked(TinyEnvironment):
        def validation_items(self):
            return []

    module = make_module(tiny_model)
    with pytest.raises(ConfigError, match=r"Unchecked.validation_items has 0 items.*limit_val_batches to 0"):
        make_trainer(tmp_path, limit_val_batches=1.0).validate(
            module, datamodule=make_data(module, environment=Unchecked())
        )


def test_the_engine_starts_with_the_settings_of_the_run(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    data = make_data(module, engine, seed=5, sampling={"max_length": 33})
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    spec = engine.spec
    assert (spec.model.lora_rank, spec.model.dtype, spec.max_length, spec.seed) == (4, "float32", 33, 5)
    assert (spec.num_ranks, spec.log_file) == (1, tmp_path / "engine.log")
    assert spec.log_file == tmp_path / "engine.log"


def test_training_samples_at_the_temperature_of_the_settings(tiny_model, tmp_path):
    asked = []

    class AskedEngine(TinyEngine):
        async def generate(self, prompt_ids, sampling):
            asked.append(sampling.temperature)
            return await super().generate(prompt_ids, sampling)

    module = make_module(tiny_model)
    data = make_data(module, AskedEngine(), sampling={"temperature": 0.6})
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert set(asked) == {0.6}


def test_validation_draws_every_held_out_item_once_and_greedily(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    first = trainer.validate(module, datamodule=make_data(module, engine, seed=0), verbose=False)
    second = trainer.validate(module, datamodule=make_data(module, engine, seed=1), verbose=False)
    assert first == second  # greedy: the seed does not matter
    assert engine.calls.count(("generate", 0)) == 2 * 4
    assert "validation/reward/even" in first[0]
    sampled = make_data(module, engine, seed=1, sampling={"validation_temperature": 2.0})
    assert trainer.validate(module, datamodule=sampled, verbose=False) != first


def test_token_counts_beyond_the_range_of_float32_are_exact(tmp_path, monkeypatch):
    counted = Denominators(num_tokens=2**24 + 1, num_rollouts=3, max_completion_tokens=8, num_forward_tokens=2**24 + 1)
    monkeypatch.setattr(batcher, "count_denominators", lambda samples, longest: counted)
    add_up = ranks_of(make_trainer(tmp_path)).add_up
    sample = make_sample([1], [5], advantage=1.0)
    found, reason = batcher.count_over_ranks([sample], [sample], 8, add_up)
    assert (found.num_tokens, found.num_rollouts, found.num_forward_tokens, reason) == (2**24 + 1, 3, 1, None)


def test_items_with_long_prompts_are_left_out_and_counted(tiny_model, tmp_path):
    # "user:10?\n" and "a:" are 11 tokens, with one digit 10: of 20 items those above 9 do not fit into 16 - 6
    sampling = {"max_length": 16, "long_prompts": "drop"}
    module = make_module(tiny_model)
    data = make_data(module, sampling=sampling)
    seen = []
    data.environment.reward_functions = [
        lambda_named("even", lambda rollouts: seen.extend(r.item_index for r in rollouts) or [1.0, 0.0, 0.0, 0.0])
    ]
    data.environment.reward_weights = {}
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    assert sorted(set(seen)) == list(range(10))  # three steps of five items: exactly those that fit
    assert trainer.callback_metrics["rollout/dropped_prompts"] == 10
    too_few = make_data(module, environment=TinyEnvironment(num_items=30), sampling=sampling, batch_size=11)
    with pytest.raises(ConfigError, match=r"has 10 training items, fewer than data\.batch_size=11"):
        make_trainer(tmp_path).fit(module, datamodule=too_few)


def lambda_named(name, function):
    function.__name__ = name
    return function


def test_an_environment_is_prepared_before_every_phase_and_closed_once_also_after_a_failure(tiny_model, tmp_path):
    class Prepared(TinyEnvironment):
        def __init__(self, fails: bool) -> None:
            super().__init__()
            self.loops, self.closed, self.fails = [], [], fails

        async def prepare(self):
            self.loops.append(asyncio.get_running_loop())
            if self.fails and len(self.loops) == 3:
                raise ToolServerError("gone")

        async def close(self):
            self.closed.append(asyncio.get_running_loop())

    module, environment = make_module(tiny_model), Prepared(fails=False)
    make_trainer(tmp_path).fit(module, datamodule=make_data(module, environment=environment))
    assert len(environment.loops) == 1 + 3  # at the start, and before each of three steps
    assert len({id(loop) for loop in [*environment.loops, *environment.closed]}) == 1  # connections belong to one loop
    assert len(environment.closed) == 1

    failing = Prepared(fails=True)
    with pytest.raises(ToolServerError, match="gone"):
        make_trainer(tmp_path).fit(make_module(tiny_model), datamodule=make_data(module, environment=failing))
    assert len(failing.closed) == 1


def test_rewards_are_weighted_by_the_step_they_are_sampled_for(tiny_model, tmp_path):
    module = make_module(tiny_model)
    environment = TinyEnvironment()
    environment.initial_reward_weights, environment.ramp_steps = {"even": 3.0}, 2
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for sample in batch.samples:
                rollout = sample.rollout
                seen.append((rollout.step, rollout.reward - 0.5 * rollout.rewards["ended"], rollout.rewards["even"]))

    make_trainer(tmp_path, Watch()).fit(module, datamodule=make_data(module, environment=environment))
    # from 3 to 1 in two steps; the weight of `ended` stays at 0.5
    weight = {0: 3.0, 1: 2.0, 2: 1.0}
    assert {step for step, *_ in seen} == {0, 1, 2}
    assert all(rest == pytest.approx(weight[step] * even) for step, rest, even in seen)
    assert any(even for *_, even in seen)


class Random(TinyEnvironment):
    """Returns another text at each call of `messages`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def messages(self, item):
        self.asked.append(item["n"])
        return [{"role": "user", "content": f"{item['n']} number {len(self.asked)}?"}]


def test_a_prompt_is_made_once_per_item_and_phase_and_its_text_is_that_of_the_trained_ids(tiny_model, tmp_path):
    class Phases(Callback):
        """Keeps the rollouts of each phase and the calls of `messages` before it."""

        def __init__(self):
            self.trained, self.held_out, self.after_check = [], [], None

        def on_fit_start(self, trainer, pl_module):
            self.after_check = len(environment.asked)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.trained += [sample.rollout for sample in [*batch.samples]]

        def on_validation_batch_start(self, trainer, pl_module, batch, *args):
            self.held_out += batch.rollouts

    environment, seen, module = Random(), Phases(), make_module(tiny_model, LossConfig(beta=0.1))
    trainer = make_trainer(tmp_path, seen, max_steps=2, accumulate_grad_batches=2, limit_val_batches=1.0)
    data = make_data(module, environment=environment, steps_per_epoch=2, sampling={"max_length": 60})
    trainer.fit(module, datamodule=data)
    # Before the engine starts, each of 20 + 4 items is rendered once.
    # Once for the lengths, once for the comparison of the splits.
    assert Counter(environment.asked[: seen.after_check]) == dict.fromkeys([*range(20), *range(100, 104)], 2)
    # Then once per item in two phases of 5 items and in one pass over 4 held-out items, for any number of siblings.
    assert len(environment.asked) == seen.after_check + 2 * 5 + 4
    assert sorted(environment.asked[-4:]) == [100, 101, 102, 103]
    assert (len(seen.trained), len(seen.held_out)) == (2 * 5 * 4, 4)
    chat = data.make_chat()
    for rollout in [*seen.trained, *seen.held_out]:
        assert rollout.prompt == chat.raw_text(rollout.token_ids[: rollout.num_prompt_tokens])
        assert rollout.messages[0]["content"] in rollout.prompt
    for step in range(2):
        texts = {(r.item_index, r.prompt) for r in seen.trained if r.step == step}
        assert len(texts) == 5  # all siblings of an item have one text
