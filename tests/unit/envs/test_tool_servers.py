"""Real tool servers: processes over stdin and stdout, one over HTTP, and functions of this process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolResult

from fuchsia_pl.envs import ConfigError, MCPServer, ToolResult, ToolServerError, ToolStatus
from fuchsia_pl.envs.tools.mcp import ToolServer, serve_functions

SCRIPT = str(Path(__file__).parents[2] / "tool_server.py")
COMMAND = [sys.executable, SCRIPT]


def with_server(scenario, config: MCPServer | None = None, in_process=None):
    """Runs a scenario against a server that is stopped after it, and checks that no process is left behind."""

    async def run():
        server = ToolServer(config or MCPServer(command=COMMAND), in_process)
        try:
            return await scenario(server)
        finally:
            await server.stop()

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    result = asyncio.run(run())
    gone = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(gone, timeout=5)
    assert not alive
    return result


def test_tools_are_listed_and_called():
    async def scenario(server):
        specs = {spec.name: spec for spec in await server.ensure_running()}
        assert specs["add"].description == "Adds two numbers."
        assert specs["add"].parameters["required"] == ["a", "b"]
        result = await server.call("k", "add", {"a": 1, "b": 2})
        assert (result.text, result.status) == ("3", ToolStatus.OK)
        assert server.num_starts == 1

    with_server(scenario)


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "words"),
    [
        ("fail", {}, ToolStatus.ERROR, "by hand"),
        ("sleep", {"seconds": 60}, ToolStatus.TIMEOUT, "gave no result within 0.5 s"),
        ("block", {"seconds": 2}, ToolStatus.TIMEOUT, "gave no result within 0.5 s"),
        ("flood", {"num_chars": 3_000_000}, ToolStatus.OUTPUT_LIMIT, "(2999800 characters left out)"),
        ("die", {}, ToolStatus.SERVER_DIED, "has died"),
    ],
)
def test_a_failed_call_ends_within_its_time_limit_with_its_own_status(tool, arguments, status, words):
    async def scenario(server):
        await server.ensure_running()
        start = time.perf_counter()
        result = await server.call("k", tool, arguments)
        assert time.perf_counter() - start < 60
        assert result.status is status
        assert words in result.text
        assert len(result.text) < 300
        again = await server.call("other", "add", {"a": 1, "b": 2})
        assert again.text == "3"  # for the others the server continues, or was restarted

    # Only calls that hang must reach the limit: a flood may be slow on a busy machine.
    limit = 0.5 if status is ToolStatus.TIMEOUT else 30.0
    with_server(scenario, MCPServer(command=COMMAND, call_timeout_s=limit, max_result_chars=200))


def test_the_state_of_rollouts_is_separate_and_cleared_at_their_end():
    async def scenario(server):
        assert "forget" not in [spec.name for spec in await server.ensure_running()]
        calls = [await server.call(key, "count", {}) for key in ("a", "a", "b", "a")]
        assert [call.text for call in calls] == ["1", "2", "1", "3"]
        await server.end_session("a")
        assert (await server.call("a", "count", {})).text == "1"

    with_server(scenario, MCPServer(command=COMMAND, end_session_tool="forget"))


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return {"value": value}


async def fail_alone(server, status, calls):
    """Checks the messages of failed calls, and that states and calls in flight of other rollouts are kept."""
    await server.ensure_running()
    assert (await server.call("other", "count", {})).text == "1"
    in_flight = asyncio.create_task(server.call("third", "sleep", {"seconds": 0.3}))
    await asyncio.sleep(0.05)
    for _ in range(2):
        for name, arguments, words in calls:
            result = await server.call("k", name, arguments)
            assert (result.status, words in result.text) == (status, True), result
            assert len(result.text) < 2000
    assert (await in_flight).text == "slept"
    assert (await server.call("other", "count", {})).text == "2"
    await server.ensure_running()
    assert server.num_starts == 1


STATEFUL = MCPServer(command=COMMAND, end_session_tool="forget", max_restarts=0)


def test_a_call_that_cannot_be_sent_does_not_restart_the_server():
    calls = [
        ("echo", nested(300), "the call cannot be sent: it is nested too deeply"),
        ("echo", {"value": "\ud83d"}, "the call cannot be sent: it is not JSON of Unicode text"),
        ("echo", {"\ud83d": 1}, "the call cannot be sent: it is not JSON of Unicode text"),
        ("echo", {"value": float("nan")}, "the call cannot be sent: it contains a number that is not finite"),
    ]
    with_server(lambda server: fail_alone(server, ToolStatus.INVALID_CALL, calls), STATEFUL)


def test_a_malformed_reply_is_the_servers_fault_and_not_the_calls(monkeypatch):
    async def scenario(server):
        await server.ensure_running()

        async def misread(*args, **kwargs):
            return CallToolResult.model_validate({"content": 3})

        monkeypatch.setattr(server._client, "call_tool", misread)
        result = await server.call("k", "add", {"a": 1, "b": 2})
        assert (result.status, "sent a malformed reply" in result.text) == (ToolStatus.ERROR, True)

    with_server(scenario, MCPServer(command=COMMAND))


def test_errors_found_by_the_client_or_the_server_do_not_restart_the_server(monkeypatch):
    monkeypatch.setattr("fuchsia_pl.envs.tools.mcp.unsendable", lambda arguments: None)

    async def scenario(server):
        await fail_alone(server, ToolStatus.INVALID_CALL, [("echo", nested(300), "serialization depth exceeded")])
        # deeper than the server's parser allows: this call gets no answer, all others do
        server.config = replace(STATEFUL, call_timeout_s=0.5)
        assert (await server.call("k", "echo", nested(220))).status is ToolStatus.TIMEOUT
        assert (await server.call("other", "count", {})).text == "3"

    with_server(scenario, STATEFUL)


def test_a_refused_call_or_an_unreadable_reply_does_not_restart_the_server():
    calls = [
        ("misfit", {}, "Error: the call failed (Invalid structured content"),
        ("subtract", {}, "subtract"),
        ("add", {"a": 1}, "Missing required argument"),
        ("add", {"a": 1, "b": 2, "self": 3, "": None, "__class__": "x", "timeout": 0}, "Unexpected keyword argument"),
    ]
    with_server(lambda server: fail_alone(server, ToolStatus.ERROR, calls), STATEFUL)


@pytest.mark.parametrize("is_here", [True, False], ids=["a function", "a server"])
def test_half_a_surrogate_pair_in_a_result_affects_one_call(is_here):
    """mcp 2.3 answers with an error. With mcp 2.0, which verifiers pins, our functions escape it, and another server ends."""

    def half() -> str:
        return "a\ud800b"

    def whole() -> str:
        return "ab"

    async def scenario(server):
        await server.ensure_running()
        result = await server.call("k", "half", {})
        assert result.text.encode().decode()
        if is_here:
            assert result.status is ToolStatus.ERROR or result.text == r"a\ud800b"
        else:
            assert result.status is not ToolStatus.OK
            await server.ensure_running()
        assert (await server.call("k", *sound)).status is ToolStatus.OK

    if is_here:
        sound = ("whole", {})
        with_server(scenario, MCPServer(url="functions"), serve_functions([half, whole], 30.0))
    else:
        sound = ("add", {"a": 1, "b": 2})
        with_server(scenario, MCPServer(command=COMMAND, max_restarts=1, call_timeout_s=3.0))


def test_a_protocol_error_of_a_live_server_is_a_refusal():
    async def scenario(server):
        await server.ensure_running()

        async def refuse(*args, **kwargs):
            raise MCPError(INVALID_PARAMS, "not like this")

        server._client.call_tool = refuse
        result = await server.call("k", "add", {"a": 1, "b": 2})
        assert result == ToolResult("Error: the tool's server refused the call (not like this)", ToolStatus.ERROR)
        assert server.num_starts == 1

    def add(a: int, b: int) -> int:
        return a + b

    with_server(scenario, MCPServer(url="functions"), serve_functions([add], 30.0))


def test_values_at_the_limits_are_sent():
    async def scenario(server):
        await server.ensure_running()
        for value, kind in ((nested(60)["value"], "list"), (10**3999, "int"), ({"": {"a b": None}}, "dict")):
            result = await server.call("k", "echo", {"value": value})
            assert (result.text, result.status) == (kind, ToolStatus.OK)

    with_server(scenario)


def test_per_rollout_starts_one_process_per_rollout():
    async def scenario(server):
        await server.ensure_running()
        calls = [await server.call(key, "count_all", {}) for key in ("a", "a", "b")]
        assert [call.text for call in calls] == ["1", "2", "1"]
        pids = [int((await server.call(key, "process", {})).text) for key in ("a", "b")]
        await server.end_session("a")
        assert psutil.pid_exists(pids[1])
        assert not psutil.pid_exists(pids[0])
        assert (await server.call("b", "die", {})).status is ToolStatus.SERVER_DIED
        assert (await server.call("b", "count_all", {})).status is ToolStatus.SERVER_DIED  # its state is lost
        assert (await server.call("c", "count_all", {})).text == "1"

    with_server(scenario, MCPServer(command=COMMAND, per_rollout=True))


def test_a_rollout_with_lost_state_is_reported_and_the_next_one_has_fresh_state():
    async def scenario(server):
        await server.ensure_running()
        await server.call("a", "count", {})
        in_flight = asyncio.create_task(server.call("b", "sleep", {"seconds": 60}))
        await asyncio.sleep(0.1)
        assert (await server.call("c", "die", {})).status is ToolStatus.SERVER_DIED
        assert (await in_flight).status is ToolStatus.SERVER_DIED
        lost = await server.call("a", "count", {})
        assert (lost.status, lost.text) == (ToolStatus.SERVER_DIED, "The tool's state was lost: its server has died.")
        assert (await server.call("new", "count", {})).text == "1"
        assert server.num_starts == 2

    with_server(scenario, MCPServer(command=COMMAND, end_session_tool="forget"))


def test_a_server_is_restarted_a_bounded_number_of_times_and_then_ends_the_run_with_its_words():
    async def scenario(server):
        for _ in range(3):
            await server.ensure_running()
            await server.call("k", "die", {})
        with pytest.raises(ToolServerError, match=r"died 3 times, but max_restarts allows 2 restarts"):
            await server.ensure_running()

    with_server(scenario, MCPServer(command=COMMAND, max_restarts=2))


def test_a_health_check_restarts_an_unresponsive_server():
    async def scenario(server):
        await server.ensure_running()
        pid = int((await server.call("k", "process", {})).text)
        os.kill(pid, signal.SIGSTOP)
        start = time.perf_counter()
        await server.ensure_running()
        assert time.perf_counter() - start < 60
        assert server.num_starts == 2
        assert int((await server.call("k", "process", {})).text) != pid
        assert not psutil.pid_exists(pid)

    with_server(scenario, MCPServer(command=COMMAND, start_timeout_s=8))


def test_a_server_that_does_not_want_to_die_is_gone_within_a_bound():
    """It continues after its input is closed and after SIGTERM; `with_server` checks that no process is left."""
    words = f"import runpy, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); runpy.run_path({SCRIPT!r}, run_name="
    stubborn = [
        sys.executable,
        "-c",
        words + "'__main__'); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    ]

    async def scenario(server):
        await server.ensure_running()
        start = time.perf_counter()
        await server.stop()
        return time.perf_counter() - start

    assert with_server(scenario, MCPServer(command=stubborn)) < 40


@pytest.mark.parametrize(
    "command",
    [
        ["/there/is/no/program"],
        [sys.executable, "-c", "import sys; sys.exit('no licence')"],
        [sys.executable, "-c", "import time; time.sleep(60)"],
    ],
    ids=["no program", "ends at once", "never answers"],
)
def test_a_server_that_does_not_start_ends_the_run_within_the_time_limit(command):
    async def scenario(server):
        start = time.perf_counter()
        with pytest.raises(ToolServerError, match="did not start") as caught:
            await server.ensure_running()
        assert time.perf_counter() - start < 15
        return str(caught.value)

    words = with_server(scenario, MCPServer(command=command, start_timeout_s=3))
    assert command[-1] in words or command[0] in words
    if "licence" in command[-1]:
        assert "The end of its log:\nno licence" in words


def test_tools_are_selected_by_name_and_a_missing_name_is_reported():
    async def scenario(server):
        assert [spec.name for spec in await server.ensure_running()] == ["add"]

    with_server(scenario, MCPServer(command=COMMAND, tools=["add"]))

    async def missing(server):
        with pytest.raises(ConfigError, match=r"has no tools \['subtract'\], it has \['add', 'block'"):
            await server.ensure_running()

    with_server(missing, MCPServer(command=COMMAND, tools=["add", "subtract"]))


def test_a_server_behind_a_url_is_used_and_left_running():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)

        async def scenario(server):
            await server.ensure_running()
            return [(await server.call(key, "count", {})).text for key in ("a", "b", "a")]

        config = MCPServer(url=f"http://127.0.0.1:{port}/mcp")
        assert with_server(scenario, config) == ["1", "1", "2"]
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_python_functions_are_tools_and_a_hanging_one_ends_at_its_time_limit():
    def shout(text: str, times: int = 1) -> str:
        """Says it loudly.

        Args:
            text: What.
            times: How often.
        """
        return text.upper() * times

    async def wait(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "waited"

    goes_on = threading.Event()

    def hang() -> str:
        goes_on.wait(60)
        return "never read"

    async def scenario(server):
        specs = {spec.name: spec for spec in await server.ensure_running()}
        assert specs["shout"].parameters["required"] == ["text"]
        assert (await server.call("k", "shout", {"text": "hi", "times": 2})).text == "HIHI"
        assert (await server.call("k", "wait", {"seconds": 0.01})).text == "waited"
        start = time.perf_counter()
        results = await asyncio.gather(server.call("k", "hang", {}), server.call("l", "shout", {"text": "x"}))
        assert [result.status for result in results] == [ToolStatus.TIMEOUT, ToolStatus.OK]
        assert time.perf_counter() - start < 30
        goes_on.set()

    config = MCPServer(url="functions", call_timeout_s=0.5)
    with_server(scenario, config, serve_functions([shout, wait, hang], 30.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either a command or a url"),
        ({"command": ["a"], "url": "b"}, "either a command or a url"),
        ({"command": "python server.py"}, "must be a list of words"),
        ({"command": []}, "must be a list of words"),
        ({"command": ["a"], "call_timeout_s": 0}, "call_timeout_s must be above 0, got 0"),
        ({"command": ["a"], "max_restarts": -1}, "max_restarts must be 0 or more, got -1"),
    ],
)
def test_invalid_server_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        MCPServer(**settings)


def test_a_server_gets_only_the_configured_variables(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    code = (
        "import os\nfrom fastmcp import FastMCP\ns = FastMCP('e')\n"
        "@s.tool\ndef variables() -> str:\n    return f\"{os.environ.get('A_SECRET')} {os.environ.get('GIVEN')}\"\n"
        "s.run(show_banner=False)"
    )

    async def scenario(server):
        await server.ensure_running()
        return (await server.call("k", "variables", {})).text

    assert with_server(scenario, MCPServer(command=[sys.executable, "-c", code], env={"GIVEN": "yes"})) == "None yes"


def test_a_function_that_exits_becomes_an_error_that_the_policy_reads():
    def leave(code: int) -> str:
        raise SystemExit(code)

    async def leave_later(code: int) -> str:
        raise KeyboardInterrupt

    def end(code: int) -> str:
        os._exit(code)

    def add(a: int, b: int) -> int:
        return a + b

    async def scenario(server):
        await server.ensure_running()
        for name, words in (("leave", "SystemExit: 0"), ("leave_later", "KeyboardInterrupt"), ("end", "os._exit(0)")):
            result = await server.call("k", name, {"code": 0})
            assert (result.status, words in result.text) == (ToolStatus.ERROR, True), result
        assert (await server.call("k", "add", {"a": 3, "b": 4})).text == "7"
        assert server.num_starts == 1

    with_server(
        scenario, MCPServer(url="functions", call_timeout_s=20), serve_functions([leave, leave_later, end, add], 20)
    )
