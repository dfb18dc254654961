"""Conversations of several turns through the collector: ids, masks, bounds, and rollouts that do not wait for each other."""

import asyncio
import random
import threading
import time

import pytest

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.envs import MultiTurnEnvironment
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw, EnvironmentStepError, PromptTooLongError
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.metrics import reward_fractions
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import RolloutStatus, RunEndingConfigError
from tests.doubles import EOS, SayingEngine, TinyEnvironment, constant


class Talk(MultiTurnEnvironment, TinyEnvironment):
    """Asks "more?" until the last turn. Its items are the tiny environment's."""

    def __init__(self, max_steps: int = 4, finish_at: int = 4) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights = [constant], {}
        self.max_steps, self.finish_at = max_steps, finish_at
        self.opened, self.closed = [], []

    async def open_rollout(self, rollout):
        self.opened.append(id(rollout))

    async def close_rollout(self, rollout):
        self.closed.append(id(rollout))

    def step_rollout(self, rollout):
        if len(rollout.turns) == self.finish_at:
            rollout.finish()
        else:
            rollout.respond("more?")


def collect(
    folder, environment, say=lambda ids, sampling: ([11, 12, EOS], "stop"), siblings=2, items=(4, 11), **config
):
    engine, chat = SayingEngine(say), Chat(folder)
    sampling = SamplingConfig(**{"max_completion_tokens": 40, "max_length": 200, **config})
    collector = Collector(engine, environment, chat, sampling)
    draw = Draw(environment.train_items(), list(items), siblings, temperature=0.7, address=("run", 5), step=5)
    groups = asyncio.run(collector.collect(draw))
    return [rollout for group in groups for rollout in group], engine, chat


def test_over_four_turns_the_ids_trained_are_the_ids_sampled(tiny_model):
    rollouts, engine, chat = collect(tiny_model, Talk(), siblings=1, items=[4])
    (rollout,) = rollouts
    prompt = chat.render([{"role": "user", "content": "4?"}])
    # the tiny template ends no turn: an answer is "\nuser:more?\n", then the policy's header "a:"
    bridge = chat._tokenizer.encode("\nuser:more?\na:", add_special_tokens=False)
    turn = [11, 12, EOS]
    assert rollout.token_ids == [*prompt, *turn, *bridge, *turn, *bridge, *turn, *bridge, *turn]
    answered = [False] * len(bridge)
    assert rollout.loss_mask == [False] * len(prompt) + 3 * ([True] * 3 + answered) + [True] * 3
    own, none = [-0.1, -0.2, pytest.approx(-0.3)], [0.0] * len(bridge)
    assert rollout.sampling_logprobs == [0.0] * len(prompt) + 3 * (own + none) + own
    assert (rollout.status, len(rollout.turns), rollout.completion) == (RolloutStatus.COMPLETED, 4, "78" * 4)
    assert [m["role"] for m in rollout.messages] == ["user", "assistant"] * 4

    sample = Sample(rollout, (1.0,) * 12)
    batch = make_batches(split_balanced([sample], 1), StepInfo(0, count_denominators([sample], 40), 0))[0]
    assert batch.labels[0][batch.loss_mask[0]].tolist() == [token for said in engine.said for token in said] == turn * 4


def test_every_prompt_starts_with_the_one_before_and_what_was_sampled_after_it(tiny_model):
    rng = random.Random(0)

    def say(ids, sampling):
        return [*(rng.randrange(4, 40) for _ in range(rng.randrange(4))), EOS], "stop"

    rollouts, engine, _ = collect(tiny_model, Talk(), say, siblings=4)
    for rollout in rollouts:
        own = [
            (ids, said)
            for (ids, _), said in zip(engine.requests, engine.said, strict=True)
            if rollout.token_ids[: len(ids)] == ids and rollout.token_ids[len(ids) : len(ids) + len(said)] == said
        ]
        assert len(own) >= 4
        own.sort(key=lambda pair: len(pair[0]))
        assert own[-1][0] + own[-1][1] == rollout.token_ids


def test_each_turn_has_its_own_seed_and_the_tokens_that_are_left(tiny_model):
    _, engine, _ = collect(tiny_model, Talk(), siblings=1, items=[4])
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert seeds == [derived_seed("run", 5, 4, 0), *(derived_seed("run", 5, 4, 0, turn) for turn in (1, 2, 3))]
    # 40 tokens; each turn needs three
    assert [sampling.max_tokens for _, sampling in engine.requests] == [40, 37, 34, 31]


@pytest.mark.parametrize(
    ("environment", "config", "turns"),
    [
        (Talk(max_steps=3), {}, 3),  # out of turns
        (Talk(), {"max_completion_tokens": 6}, 2),  # out of sampled tokens
        # out of room: the prompt has 10 tokens, a turn 3, an answer 14; after two turns and two answers 44 are taken
        (Talk(), {"max_length": 44, "max_completion_tokens": 30}, 2),
    ],
)
def test_a_conversation_that_runs_out_is_truncated(tiny_model, environment, config, turns):
    rollouts, *_ = collect(tiny_model, environment, siblings=1, items=[4], **config)
    assert (rollouts[0].status, len(rollouts[0].turns)) == (RolloutStatus.TRUNCATED, turns)
    assert rollouts[0].reward == 0.3
    fractions = reward_fractions(rollouts, environment, world_size=1)
    assert fractions["rollout/truncated_fraction"] == (1, 1.0)
    assert fractions["rollout/turns"] == (turns, 1.0)


class Wordy(Talk):
    """Responds to each turn with two texts; the first one is long."""

    def __init__(self, text: str) -> None:
        super().__init__(max_steps=2, finish_at=2)
        self.text = text

    def step_rollout(self, rollout):
        super().step_rollout(rollout)
        if rollout.status is None:
            rollout.respond(self.text)


def test_the_middle_of_a_long_answer_is_left_out_and_the_policy_reads_how_much(tiny_model):
    environment = Wordy("abcde" + 10**7 * "x" + "vwxyz")
    environment.max_response_chars = 8
    (rollout,), engine, chat = collect(tiny_model, environment, siblings=1, items=[4])
    # 10,000,010 characters; 4 at each end are kept
    shown = "abcd… (10000002 characters left out) …wxyz"
    assert [m["content"] for m in rollout.messages] == ["4?", "78", "more?", shown, "78"]
    (first, _), (second, _) = engine.requests
    read = chat._tokenizer.encode(f"\nuser:more?\nuser:{shown}\na:", add_special_tokens=False)
    assert second == [*first, 11, 12, EOS, *read]
    environment.max_response_chars = 10**7 + 10
    environment.text = environment.text[:20]
    (rollout,), *_ = collect(tiny_model, environment, siblings=1, items=[4])
    assert rollout.messages[3]["content"] == environment.text
    assert Wordy("").max_response_chars == 65_536


def test_the_last_turns_end_is_asked_of_the_engine_and_never_guessed_from_ids(tiny_model):
    cases = {  # sampled ids, finish reason -> status
        ((11, EOS), "stop"): RolloutStatus.COMPLETED,
        ((11,), "stop"): RolloutStatus.COMPLETED,  # a stop string
        ((), "stop"): RolloutStatus.COMPLETED,
        ((11, EOS), "length"): RolloutStatus.TRUNCATED,
        ((11,), "length"): RolloutStatus.TRUNCATED,
    }
    for (ids, reason), status in cases.items():
        rollouts, *_ = collect(
            tiny_model, TinyAnswer(), lambda *_, said=(list(ids), reason): said, siblings=1, items=[4]
        )
        assert rollouts[0].status is status


class TinyAnswer(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [constant], {}


class Meeting(Talk):
    """All rollouts are in their first tool call at once; the first rollout then waits until all others have ended."""

    def __init__(self, num_rollouts: int) -> None:
        super().__init__()
        self.all_called = threading.Barrier(num_rollouts)
        self.num_others, self.others_ended, self.lock = num_rollouts - 1, threading.Event(), threading.Lock()

    def step_rollout(self, rollout):
        is_first = (rollout.item_index, rollout.sibling) == (0, 0)
        if len(rollout.turns) == 1:
            self.all_called.wait(timeout=60)
        if is_first and len(rollout.turns) == 2 and not self.others_ended.wait(60):
            raise RuntimeError("the others wait for the first rollout")
        super().step_rollout(rollout)
        if rollout.status is not None and not is_first:
            with self.lock:
                self.num_others -= 1
            if self.num_others == 0:
                self.others_ended.set()


def test_no_conversation_waits_for_a_turn_of_another(tiny_model):
    rollouts, *_ = collect(tiny_model, Meeting(64), siblings=8, items=range(8), max_length=400)
    assert len(rollouts) == 64
    assert all(rollout.status is RolloutStatus.COMPLETED for rollout in rollouts)


class Faulty(Talk):
    """Fails on item 11 only."""

    def step_rollout(self, rollout):
        if rollout.item_index == 11:
            raise KeyError("tool")
        super().step_rollout(rollout)


def test_a_step_that_raises_stops_the_run_or_leaves_its_rollouts_unscored_and_counted(tiny_model):
    with pytest.raises(EnvironmentStepError, match=r"Faulty\.step_rollout on item 11 raised KeyError: 'tool'"):
        collect(tiny_model, Faulty())
    environment = Faulty()
    environment.on_error = "unscored"
    rollouts, *_ = collect(tiny_model, environment)
    assert [r.status for r in rollouts] == [RolloutStatus.COMPLETED] * 2 + [RolloutStatus.ENV_ERROR] * 2
    assert [r.reward for r in rollouts] == [0.3, 0.3, None, None]
    assert reward_fractions(rollouts, environment, world_size=1)["rollout/env_error_fraction"] == (2, 4.0)


def test_a_wrong_setting_that_only_a_rollout_shows_ends_the_run_whatever_on_error_is(tiny_model):
    class Wrong(Faulty):
        def step_rollout(self, rollout):
            raise RunEndingConfigError("set x")

    def wrong(rollouts):
        raise RunEndingConfigError("set y")

    for environment, words in ((Wrong(), "set x"), (Talk(), "set y")):
        environment.on_error = "unscored"
        if words == "set y":
            environment.reward_functions = [wrong]
        with pytest.raises(RunEndingConfigError, match=words):
            collect(tiny_model, environment)


@pytest.mark.parametrize("environment", [Talk(), Faulty()], ids=["ends", "raises"])
def test_every_rollout_is_opened_and_closed_once_however_it_ends(tiny_model, environment):
    environment.on_error = "unscored"
    rollouts, *_ = collect(tiny_model, environment)
    assert sorted(environment.opened) == sorted(environment.closed) == sorted(id(r) for r in rollouts)


def test_where_one_rollout_fails_the_others_are_cancelled_and_waited_for(tiny_model):
    class Slow(Faulty):
        async def step_rollout(self, rollout):
            if rollout.item_index != 11:
                await asyncio.sleep(60)
            raise ToolServerError("gone")

    environment, start = Slow(), time.perf_counter()
    with pytest.raises(ToolServerError, match="gone"):
        collect(tiny_model, environment)
    assert time.perf_counter() - start < 10
    assert sorted(environment.opened) == sorted(environment.closed)


def test_a_prompt_that_is_too_long_is_refused_or_left_out(tiny_model):
    environment = TinyEnvironment()
    chat = Chat(tiny_model)

    def fitting(long_prompts):
        # "user:4?\n" and "a:" are 10 tokens, with two digits 11; 15 - 5 leaves 10
        config = SamplingConfig(max_completion_tokens=5, max_length=15, long_prompts=long_prompts)
        return Collector(SayingEngine(None), environment, chat, config).fitting(environment.train_items(), "training")

    assert fitting("drop") == dict.fromkeys(range(10), 10)
    with pytest.raises(PromptTooLongError, match="prompt of item 10 has 11 tokens"):
        fitting("refuse")


def test_the_item_is_what_every_sibling_sees_and_texts_have_no_special_tokens(tiny_model):
    seen = []

    def look(rollouts, *args, **kwargs):
        seen.append([(r.item["n"], r.sibling, r.completion, r.turns[0].completion.token_ids) for r in rollouts])
        return [0.0 for _ in rollouts]

    environment = TinyAnswer()
    environment.reward_functions = [look]
    collect(tiny_model, environment, siblings=3)
    assert sorted(seen) == [[(n, sibling, "78", (11, 12, EOS)) for sibling in range(3)] for n in (4, 11)]
