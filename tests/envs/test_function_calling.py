"""The real interpreter: a server over stdin and stdout, and processes that try to escape."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.golds import bad_golds
from fuchsia_pl.envs.tools.convention import PLAIN
from fuchsia_pl.envs.tools.mcp import ROLLOUT_KEY, STATUS_KEY
from fuchsia_pl.library.function_calling import sandbox, server
from fuchsia_pl.library.function_calling.environment import FunctionCalling, InterpreterLimits, correct, well_formed
from fuchsia_pl.library.function_calling.items import KINDS
from fuchsia_pl.types import Rollout
from tests.doubles import written
from tests.interpreters import COMMAND, MARKER, ROOT, Interpreter, descendants, marked, runs
from tests.server_double import wait_until

CAN_LEAVE = sandbox.find_offer().is_apart
IS_ROOT = os.getuid() == 0


@pytest.fixture(scope="module")
def interpreter():
    before = descendants()
    made = Interpreter()
    yield made
    made.stop()
    _, alive = psutil.wait_procs(descendants() - before, timeout=5)
    assert not alive
    assert not marked()


@pytest.fixture
def key(interpreter, request):
    yield request.node.name
    interpreter.end(request.node.name)


def test_state_lasts_within_a_rollout_and_never_reaches_another(interpreter):
    assert interpreter.cells("x = 5\nprint('hi')", "x * 2", key="one") == [("hi", "ok"), ("10", "ok")]
    assert "NameError" in interpreter.cells("x", key="two")[0][0]
    interpreter.end("one")
    assert "NameError" in interpreter.cells("x", key="one")[0][0]  # the same key, another session
    interpreter.end("one")
    interpreter.end("two")


def test_what_a_cell_shows(interpreter, key):
    found = interpreter.cells(
        "print(1)\n2", "import sys; print('e', file=sys.stderr)", "1/0", "y = 3", "!echo shell", key=key
    )
    assert [text for text, _ in found[:2]] == ["1\n2", "e"]
    assert "ZeroDivisionError: division by zero" in found[2][0]
    assert found[3] == ("(no output)", "ok")
    assert [status for _, status in found] == ["ok", "ok", "error", "ok", "ok"]


def test_the_server_stays_as_it_is_over_300_sessions(interpreter):
    modules = (COMMAND[3], "fuchsia_pl.library.function_calling.zygote")
    mine = [psutil.Process(), *(p for p in descendants() if any(runs(p, module) for module in modules))]
    assert len(mine) == 3
    (zygote,) = (p for p in mine[1:] if runs(p, modules[1]))

    def state() -> tuple[list[tuple[int, int, int]], float]:
        return (
            [(p.num_fds(), p.num_threads(), len(p.children())) for p in mine],
            sum(p.memory_full_info().uss for p in mine[1:]) / 2**20,
        )

    interpreter.sessions(40)
    wait_until(lambda: not zygote.children())
    counts, memory_mb = state()
    interpreter.sessions(300)
    wait_until(lambda: not zygote.children())  # the supervisor of an ended session may still be clearing up
    assert state()[0] == counts
    assert state()[1] < memory_mb + 4  # a session that is kept would take 13 KiB or less


# code -> the status, and words of the result
HOSTILE = {
    "hangs": ("import time; time.sleep(99)", "timeout", "longer than 1.5 s"),
    "computes for ever": ("9**9**9", "timeout", "longer than 1.5 s"),
    "computes for ever in python": ("while True: pass", "timeout", "longer than 1.5 s"),
    "catches everything": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "timeout",
        "1.5 s",
    ),
    "ignores signals": ("import signal\nfor s in (2, 15): signal.signal(s, 1)\nwhile True: pass", "timeout", "1.5 s"),
    "floods": ("while True: print('x' * 1000)", "output_limit", "too long"),
    "floods and hides it": (
        "while True:\n  try: print('x' * 1000)\n  except Exception: pass",
        "output_limit",
        "too long",
    ),
    "returns much": ("'x' * 10**7", "output_limit", "xxx"),
    "kills itself": ("import os; os._exit(1)", "killed", "died"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "killed", "died"),
    "eats memory": ("b = bytearray(3 * 10**9)", "error", "MemoryError"),
    "writes a large file": ("open('f', 'wb').write(b'x' * 10**8)", "error", "File too large"),
    "10000 brackets": ("(" * 10_000, "output_limit", "((("),
    "null bytes": ("1\x00", "error", "null bytes"),
    "unicode digits": ("print(int('\u0667\u0662'))", "ok", "72"),
    "1 MB": ("x = '" + "a" * 2**20 + "'\nlen(x)", "ok", "1048576"),
    "exits": ("exit()", "ok", ""),
    "raises SystemExit": ("raise SystemExit", "error", "SystemExit"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_code_ends_within_its_limit_under_its_own_status(interpreter, key, case):
    code, status, words = HOSTILE[case]
    start = time.perf_counter()
    ((text, found),) = interpreter.cells(code, key=key)
    assert time.perf_counter() - start < 20
    assert found == status, text
    assert words in text
    assert len(text) <= 4200
    assert interpreter.cells("1 + 1", key=key) == [
        ("2", "ok")
    ]  # and the next cell runs, in a new interpreter if need be


ESCAPES = {
    "a child": f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {MARKER}'])",
    "a daemon": (
        "import os, subprocess, sys\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
        f"    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)  # {MARKER}'])\n  os._exit(0)"
    ),
    "a fork bomb": "import os\nwhile True: os.fork()",
    "many sleepers": (
        f"import subprocess, sys\nfor _ in range(50):\n  "
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {MARKER}'])"
    ),
}


@pytest.mark.parametrize("end", ["the rollout ends", "the interpreter dies", "the time is up"])
@pytest.mark.parametrize("case", ESCAPES)
def test_no_process_is_left_behind(interpreter, key, case, end):
    before = descendants()
    interpreter.cells("import os", ESCAPES[case], key=key)
    if end == "the interpreter dies":
        interpreter.cells("os._exit(0)", key=key)
    elif end == "the time is up":
        interpreter.cells("while True: pass", key=key)
    interpreter.end(key)
    _, alive = psutil.wait_procs(descendants() - before, timeout=5)
    assert not alive
    assert not marked()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_server_is_killed_its_interpreters_end_too(how):
    before = descendants()
    made = Interpreter()
    made.cells(ESCAPES["a daemon"])
    mine = descendants() - before
    (process,) = [p for p in mine if runs(p, COMMAND[3])]
    assert len(mine) >= 4  # server, zygote, supervisor, interpreter
    process.send_signal(how)
    _, alive = psutil.wait_procs(mine, timeout=10)
    assert not alive
    assert not marked()
    assert made.cells("1 + 1", key="b") == [("The tool's server has died (Connection closed).", "server_died")]
    assert made.cells("1 + 1", key="c") == [("2", "ok")]
    made.stop()


def test_when_the_process_that_forks_is_killed_the_server_ends_and_is_started_again():
    before = descendants()
    made = Interpreter()
    (zygote,) = [p for p in descendants() - before if runs(p, "fuchsia_pl.library.function_calling.zygote")]
    zygote.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(runs(p, COMMAND[3]) for p in descendants() - before):
        time.sleep(0.05)
    statuses = [made.cells("1 + 1", key=key)[0][1] for key in ("a", "b")]
    assert statuses == ["server_died", "ok"]
    made.stop()


@pytest.mark.skipif(not CAN_LEAVE, reason="the system lets this process make no namespaces")
def test_there_is_no_network_and_nobody_else_to_see(interpreter, key):
    found = interpreter.cells(
        "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
        "import os\nos.getppid()",
        f"os.kill({os.getpid()}, 0)",
        key=key,
    )
    assert "Network is unreachable" in found[0][0]
    assert found[1] == ("0", "ok")
    assert "ProcessLookupError" in found[2][0] or "PermissionError" in found[2][0]


@pytest.mark.skipif(not (CAN_LEAVE and IS_ROOT), reason="files are hidden only where the server runs as root")
def test_files_of_others_are_neither_written_nor_seen(interpreter, key, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    found = interpreter.cells(
        f"import os\nos.getuid() > 1000, os.path.exists({str(tmp_path)!r})",
        f"open({str(secret)!r}).read()",
        "open('/etc/shadow').read()",
        "open('/etc/hostname', 'a')",
        f"open({sandbox.__file__!r}, 'a')",
        "open('mine', 'w').write('fine')",
        key=key,
    )
    assert found[0] == ("(True, False)", "ok")
    assert [status for _, status in found[1:]] == ["error"] * 4 + ["ok"]


def test_descendants_are_ended_without_namespaces_too():
    """Runs a supervisor in a separate process on a system without namespaces."""
    code = (
        "import os, subprocess, sys, time\nfrom fuchsia_pl.library.function_calling import sandbox\nsandbox.adopt_orphans()\n"
        f"sleeper = [sys.executable, '-c', 'import time; time.sleep(600)  # {MARKER}']\n"
        "if os.fork() == 0:\n  os.setsid()\n  subprocess.Popen(sleeper, start_new_session=True)\n  os._exit(0)\n"
        "subprocess.Popen(sleeper)\ntime.sleep(0.5)\nsandbox.end_descendants()\n"
        "print(len(sandbox.descendants(os.getpid())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr
    assert not marked()


def test_the_server_knows_the_keys_of_the_client():
    assert (server.ROLLOUT_KEY, server.STATUS_KEY) == (ROLLOUT_KEY, STATUS_KEY)


def talked(*texts: str, counts=(), answer="46908330") -> Rollout:
    rollout = Rollout({"answer": answer}, item_index=0, sibling=0, temperature=1.0, prompt="")
    for text in texts:
        rollout.append(written(text))
    rollout.counts.update(counts)
    rollout.finish()
    return rollout


def test_rewards_by_hand():
    call, answer = '<tool_call>{"name": "python"}</tool_call>', "<answer>46,908,330</answer>"
    rollouts = [
        talked(call, answer, counts=["tool_calls", "tool_ok"]),
        talked(answer),  # correct without a call: half of the form reward
        talked(call, "<answer>1</answer>", counts=["tool_calls", "tool_ok"]),
        talked(call, answer, counts=["tool_calls", "tool_invalid_call"]),
        talked(call + answer, "nothing", counts=["tool_calls", "tool_ok"]),  # only an answer in the last turn counts
        talked(""),
        talked(),
    ]
    assert correct(rollouts) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert well_formed(rollouts) == [1.0, 0.5, 1.0, 0.5, 0.5, 0.0, 0.0]


def test_only_what_stands_outside_of_the_thinking_is_an_answer_and_its_value_counts():
    called = ["tool_calls", "tool_ok"]
    texts = [
        "<think><answer>46908330</answer></think>",
        "<think><answer>46908330</answer>",
        "<answer>**46908330**</answer>",
    ]
    rollouts = [talked(text, counts=called) for text in texts]
    assert correct(rollouts) == [0.0, 0.0, 1.0]
    assert well_formed(rollouts) == [0.5, 0.5, 0.5]  # the form is a bare number
    items = [{"answer": "1"}, {"answer": None}, {"question": ""}, {"answer": "many"}]
    assert bad_golds(FunctionCalling(num_train=1, num_validation=1), items) == [
        "item 1: the gold answer None in 'answer' is neither text nor a number",
        "item 2: there is no field 'answer', the fields are ['question']",
        "item 3: the gold answer 'many' is not a number",
    ]


def test_every_gold_answer_is_what_its_code_computes(interpreter, key):
    environment = FunctionCalling(num_train=40, num_validation=10)
    items = [*environment.train_items(), *environment.validation_items()]
    assert len({item["question"] for item in items}) == 50
    found = interpreter.cells(*(item["code"] for item in items), key=key)
    assert found == [(item["answer"], "ok") for item in items]
    # no mental arithmetic: large operands, or a search
    assert all(len(item["question"]) > 20 and len(item["answer"]) >= 1 for item in items)


def test_the_questions_and_the_settings():
    environment = FunctionCalling(num_train=5, num_validation=2, kinds=["product"], num_examples=2, format_weight=0.3)
    assert (len(environment.train_items()), len(environment.validation_items())) == (5, 2)
    assert environment.reward_weights == {"well_formed": 0.3}
    item = environment.train_items()[0]
    messages = environment.messages(item)
    assert [message["role"] for message in messages] == [
        "system",
        *["user", "assistant", "user", "assistant"] * 2,
        "user",
    ]
    assert messages[-1]["content"] == item["question"]
    assert PLAIN.read(messages[2]["content"], tools=[]).calls[0].name == "python"
    asked = {i["question"] for i in [*environment.train_items(), *environment.validation_items()]}
    assert not asked & {message["content"] for message in messages[:-1]}
    assert {FunctionCalling(num_train=1, kinds=[kind]).train_items()[0]["question"].split()[0] for kind in KINDS} == {
        "What",
        "How",
    }
    config = FunctionCalling(num_train=1, limits=InterpreterLimits(time_s=9.0, memory_mb=300)).servers[0]
    assert config.command[-4:] == ["--time-limit-s", "9.0", "--memory-mb", "300"]
    assert config.env == {"PYTHONPATH": str(ROOT)}  # a checkout's server also starts if the package is not installed
    for wrong in ({"time_s": 0.0}, {"memory_mb": 10}):
        with pytest.raises(ConfigError, match="an interpreter takes"):
            InterpreterLimits(**wrong)
    for wrong in ({"num_train": 0}, {"kinds": []}, {"num_examples": -1}):
        with pytest.raises(ConfigError, match="FunctionCalling takes"):
            FunctionCalling(**wrong)
