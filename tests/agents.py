"""Agents as their authors write them: each solves an item with an OpenAI client and knows nothing of this project."""

import asyncio
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request

from fuchsia_pl.types import Rollout

ECHO = {
    "type": "function",
    "function": {
        "name": "echo",
        "description": "Repeats a text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}


def question(item) -> list[dict]:
    return [{"role": "user", "content": item["prompt"]}]


def post(base_url: str, api_key: str, body: dict) -> dict:
    """One request without any library."""
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def talk(item, base_url, api_key):
    """Four turns with the sync client."""
    from openai import OpenAI

    messages = question(item)
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        for turn in range(4):
            answer = client.chat.completions.create(model="gpt-4o", messages=messages)
            messages.append(answer.choices[0].message)
            if turn < 3:
                messages.append({"role": "user", "content": "more?"})
    return messages[-1].content


async def talk_streamed(item, base_url, api_key):
    """The same with the async client, streamed."""
    from openai import AsyncOpenAI

    messages, usages = question(item), []
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for turn in range(4):
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            text = ""
            async for chunk in stream:
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                usages += [chunk.usage] if chunk.usage else []
            messages.append({"role": "assistant", "content": text})
            if turn < 3:
                messages.append({"role": "user", "content": "more?"})
    return {"text": text, "tokens": [usage.completion_tokens for usage in usages]}


def with_tool(item, base_url, api_key):
    """A loop with a tool, as OpenAI's documentation has it."""
    from openai import OpenAI

    messages = question(item)
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        while True:
            answer = client.chat.completions.create(model="gpt-4o", messages=messages, tools=[ECHO])
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                return {"text": message.content, "reason": answer.choices[0].finish_reason}
            for call in message.tool_calls:
                text = json.loads(call.function.arguments)["text"]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})


async def with_langgraph(item, base_url, api_key):
    """LangGraph's ReAct agent."""
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    @tool
    def echo(text: str) -> str:
        """Repeats a text."""
        return text

    model = ChatOpenAI(model="gpt-4o", base_url=base_url, api_key=api_key)
    state = await create_react_agent(model, [echo]).ainvoke({"messages": [("user", item["prompt"])]})
    return state["messages"][-1].content


async def with_openai_agents(item, base_url, api_key):
    """An agent of the `openai-agents` SDK."""
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    @function_tool
    def echo(text: str) -> str:
        """Repeats a text."""
        return text

    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        model = OpenAIChatCompletionsModel(model="gpt-4o", openai_client=client)
        agent = Agent(name="Echo", instructions="Use the tool.", tools=[echo], model=model)
        return (await Runner.run(agent, item["prompt"])).final_output


def rewriting(item, base_url, api_key):
    """Asks the same again, and then forgets its first answer."""
    body = {"model": "m", "messages": question(item)}
    first = post(base_url, api_key, body)["choices"][0]["message"]["content"]
    post(base_url, api_key, body)
    summary = [*question(item), {"role": "user", "content": "forget it"}]
    post(base_url, api_key, {"model": "m", "messages": summary})
    return first


def once(item, base_url, api_key, **more):
    return post(base_url, api_key, {"model": "m", "messages": question(item), **more})["choices"][0]


def short(item, base_url, api_key):
    return once(item, base_url, api_key, max_tokens=2)["finish_reason"]


def endless(item, base_url, api_key):
    """Asks as long as it is answered."""
    messages = question(item)
    while True:
        answer = post(base_url, api_key, {"model": "m", "messages": messages})
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "more?"}]


async def parallel(item, base_url, api_key):
    """Four questions at once."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:

        async def ask(number: int) -> str:
            messages = [*question(item), {"role": "user", "content": str(number)}]
            answer = await client.chat.completions.create(model="m", messages=messages)
            return answer.choices[0].message.content

        return await asyncio.gather(*(ask(number) for number in range(4)))


def misbehaving(item, base_url, api_key):
    """Does what its item names."""
    match item.get("act"):
        case "raise":
            raise KeyError("no such answer")
        case "exit":
            sys.exit(0)
        case "end":
            os._exit(0)
        case "hang":
            threading.Event().wait(5)
        case "flood":
            while True:
                try:
                    post(base_url, api_key, {"model": "m", "messages": []})
                except urllib.error.HTTPError as error:
                    error.close()
                except OSError:
                    time.sleep(0.001)
    return once(item, base_url, api_key)["message"]["content"]


def silent(item, base_url, api_key):
    """Never asks."""
    return "nothing"


def longest(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    """The length of what the agent returned."""
    return [float(len(str(rollout.state["result"]))) for rollout in rollouts]


def branching(item, base_url, api_key):
    """A question and another one after its answer, then a new conversation."""
    messages = question(item)
    first = post(base_url, api_key, {"model": "m", "messages": messages, "max_tokens": 3})
    messages += [first["choices"][0]["message"], {"role": "user", "content": "more?"}]
    post(base_url, api_key, {"model": "m", "messages": messages, "max_tokens": 3})
    other = [{"role": "user", "content": f"again {item['prompt']}"}]
    return post(base_url, api_key, {"model": "m", "messages": other, "max_tokens": 3})["choices"][0]["message"][
        "content"
    ]


def even_ids(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    """The share of even ids among the sampled ones."""
    ids = [[token for turn in rollout.all_turns for token in turn.completion.token_ids] for rollout in rollouts]
    return [sum(token % 2 == 0 for token in of) / max(len(of), 1) for of in ids]
