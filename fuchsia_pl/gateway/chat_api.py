"""Requests and answers of `/v1/chat/completions`, as OpenAI defines them.

What would change the distribution that the policy samples from is refused: training takes the probabilities of the ids from it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs.conversation import checked_messages
from fuchsia_pl.envs.self_driven import TurnRequest, WrittenTurn
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.types import ConfigError, Message

# Fields with the only value that they may have; null is as if the field were left out.
NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "logprobs": False,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
# Fields that change nothing about the answer.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"})
READ = frozenset(
    {"model", "messages", "tools", "stop", "temperature", "max_tokens", "max_completion_tokens", "stream"}
    | {"stream_options"}
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
FOREIGN_FIELDS = ("function_call", "audio")  # of messages, which a template cannot show
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_STOPS = 4
MAX_TOOLS = 128
MAX_MESSAGES = 2000
CHUNK_CHARS = 24  # of a text that is streamed
DONE = "data: [DONE]\n\n"


class ApiError(RuntimeError):
    """An answer with an error.

    Args:
        status: The HTTP status.
        code: A name of the reason for programs.
        message: The reason.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """A request that was read.

    Attributes:
        turn: What is asked of the policy.
        model: Name of a model; the answer repeats it.
        stream: Whether the answer comes as events.
        include_usage: Whether the last event has the counts of tokens.

    >>> ChatRequest(TurnRequest(({"role": "user", "content": "2 + 2?"},)), "policy", False, False).stream
    False
    """

    turn: TurnRequest
    model: str
    stream: bool
    include_usage: bool


def read_request(raw: bytes, temperature: float) -> ChatRequest:
    """Reads the body of a request.

    Args:
        raw: The body.
        temperature: The only temperature that may be asked for.

    Raises:
        ApiError: It is not JSON, has a field that is not supported, or a value that is not allowed.
    """
    body = _json_object(raw)
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(set(given) - READ - IGNORED - set(NEUTRAL) - {"seed"})
    if unknown:
        raise _refused(f"the fields {unknown} are not supported: leave them out")
    if "seed" in given:
        raise _refused("seed must be left out: the seeds of the run are used, so that it can be repeated")
    for name, neutral in NEUTRAL.items():
        if given.get(name, neutral) != neutral:
            raise _refused(_must_be(name, neutral, given[name]))
    if given.get("temperature", temperature) != temperature:
        raise _refused(_must_be("temperature", temperature, given["temperature"]))
    if not isinstance(given.get("stream", False), bool):
        raise _refused(f"stream must be true or false, got {json.dumps(given['stream'])[:80]}")
    options = given.get("stream_options", {})
    include_usage = isinstance(options, Mapping) and options.get("include_usage") is True
    turn = TurnRequest(_messages(given), _tools(given), _stop(given), _max_tokens(given))
    return ChatRequest(turn, _text(given, "model"), given.get("stream", False), include_usage)


def completion(asked: ChatRequest, written: WrittenTurn, number: str, created: int) -> dict[str, Any]:
    """The whole answer.

    Args:
        asked: The request.
        written: The turn.
        number: Id of the answer.
        created: Seconds since 1970.
    """
    calls, content = _calls(written), written.message["content"]
    message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    choice = {"index": 0, "message": message | ({"tool_calls": calls} if calls else {}), "logprobs": None}
    return {
        "id": number,
        "object": "chat.completion",
        "created": created,
        "model": asked.model,
        "choices": [{**choice, "finish_reason": finish_reason(written)}],
        "usage": _usage(written),
    }


def events(asked: ChatRequest, written: WrittenTurn, number: str, created: int) -> Iterator[str]:
    """The answer as events. The turn is complete by then: what is streamed is never sampled again.

    Args:
        asked: The request.
        written: The turn.
        number: Id of the answer.
        created: Seconds since 1970.
    """
    head = {"id": number, "object": "chat.completion.chunk", "created": created, "model": asked.model}

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**head, "choices": [choice], **({"usage": None} if asked.include_usage else {})})

    content = written.message["content"]
    yield event({"role": "assistant", "content": ""})
    for start in range(0, len(content), CHUNK_CHARS):
        yield event({"content": content[start : start + CHUNK_CHARS]})
    for place, call in enumerate(_calls(written)):
        yield event({"tool_calls": [{"index": place, **call}]})
    yield event({}, finish_reason(written))
    if asked.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(written)})
    yield DONE


def finish_reason(written: WrittenTurn) -> str:
    """Why the turn ended, by OpenAI's names.

    >>> finish_reason(WrittenTurn({"role": "assistant", "content": "7"}, is_cut=True, num_prompt_tokens=1, num_tokens=1))
    'length'
    """
    if written.is_cut:
        return "length"
    return "tool_calls" if _calls(written) else "stop"


def models() -> dict[str, Any]:
    """The answer of `/v1/models`. There is one model, and it has every name that a request gives it."""
    return {"object": "list", "data": [{"id": "policy", "object": "model", "created": 0, "owned_by": "fuchsia"}]}


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        # Half of a surrogate pair, which no tokenizer accepts.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise ApiError(400, "invalid_json", f"the body is not JSON that can be read: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", f"the body must be a JSON object, got a {type(body).__name__}")
    return body


def _messages(given: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise _refused(f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    try:
        return tuple(checked_messages([_message(message, n) for n, message in enumerate(messages)], "messages"))
    except ConfigError as error:
        raise _refused(str(error)) from error


def _message(message: Any, number: int) -> dict[str, Any]:
    """A message with the fields that a template reads. Names of participants are not among them."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise _refused(f"message {number} must be an object with a role of {sorted(ROLES)}")
    foreign = [name for name in FOREIGN_FIELDS if message.get(name) is not None]
    if foreign:
        raise _refused(f"message {number} has {foreign}, which are not supported")
    found: dict[str, Any] = {"role": ROLES[role], "content": message.get("content")}
    if role == "assistant" and found["content"] is None:
        found["content"] = ""
    if role == "assistant" and message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise _refused(f"message {number}: its tool_calls must be a list")
        found["tool_calls"] = [_call(call, f"message {number}, call {place}") for place, call in enumerate(calls)]
    if role == "tool":
        found["tool_call_id"] = str(message.get("tool_call_id", ""))
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _refused(f'{where} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}')
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise _refused(f"{where}: its arguments are not JSON") from error
    if not isinstance(arguments, dict):
        raise _refused(f"{where}: its arguments must be a JSON object")
    name = function["name"]
    return {"id": str(call.get("id", "")), "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(given: Mapping[str, Any]) -> tuple[ToolSpec, ...]:
    tools = given.get("tools", [])
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise _refused(f"tools must be a list of at most {MAX_TOOLS} tools")
    specs = tuple(_tool(tool, number) for number, tool in enumerate(tools))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise _refused(f"two tools have the same name: {sorted(names)}")
    return specs


def _tool(tool: Any, number: int) -> ToolSpec:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise _refused(f'tool {number} must be {{"type": "function", "function": {{"name": …}}}} with a plain name')
    description, parameters = function.get("description") or "", function.get("parameters") or {"type": "object"}
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise _refused(f"tool {number} ({name}): its description must be a text and its parameters a JSON schema")
    return ToolSpec(name, description, parameters)


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise _refused(f"stop must be a text or a list of at most {MAX_STOPS} texts")
    return tuple(stops)


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    limits = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if not all(isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 for limit in limits):
        raise _refused(f"max_tokens and max_completion_tokens must be whole numbers above 0, got {limits}")
    return min(limits, default=None)


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise _refused(f"{name} must be a text: any name, since there is one policy")
    return value


def _must_be(name: str, allowed: Any, value: Any) -> str:
    shown, needed = json.dumps(value)[:80], json.dumps(allowed)
    return f"{name} must be {needed} or left out, got {shown}: other values change the distribution that is trained on"


def _refused(message: str) -> ApiError:
    return ApiError(400, "invalid_request", message)


def _calls(written: WrittenTurn) -> list[dict[str, Any]]:
    """The calls of a turn with their arguments as JSON text, as OpenAI has them."""
    calls: Any = written.message.get("tool_calls") or []
    return [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])},
        }
        for call in calls
    ]


def _usage(written: WrittenTurn) -> dict[str, int]:
    prompt, own = written.num_prompt_tokens, written.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": prompt + own}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
