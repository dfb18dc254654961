"""Hostile cells: attacks on their channel, on the machine and on each other."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.envs import ToolServerError
from fuchsia_pl.library.function_calling import sandbox, server, syscalls, wire
from fuchsia_pl.library.function_calling.environment import FunctionCalling
from tests.interpreters import AS_USER, AS_WEAK_USER, COMMAND, ROOT, Interpreter

IS_ROOT = os.getuid() == 0
OFFER = sandbox.find_offer()
LONG = [*COMMAND, "--time-limit-s", "30"]


@pytest.fixture(scope="module")
def interpreter():
    made = Interpreter()
    yield made
    made.stop()


@pytest.fixture
def key(interpreter, request):
    yield request.node.name
    interpreter.end(request.node.name)


# code -> result for the policy; half a surrogate pair is always written as an escape
UNENCODABLE = {
    "print('a\\ud800b')": ("a\\ud800b", "ok"),
    "'\\udfff'": ("'\\udfff'", "ok"),
    "import sys; sys.stderr.write('\\ud83d'); None": ("\\ud83d", "ok"),
    "print('\\ud83d\\ude00')": ("\\ud83d\\ude00", "ok"),  # two halves are still no character
    "print('\\ud800' * 700)": ("(the output was too long", "output_limit"),  # 4,200 characters as they are read
    "raise ValueError('\\ud800')": ("\\ud800", "error"),
    "raise KeyboardInterrupt('\\udc80')": ("\\udc80", "error"),
    "exec('\\ud800')": ("surrogates not allowed", "error"),
    "!printf '\\377\\200'": ("\\udcff", "ok"),
}


@pytest.mark.parametrize("code", UNENCODABLE)
def test_what_utf8_does_not_know_costs_neither_the_call_nor_the_server(interpreter, key, code):
    words, status = UNENCODABLE[code]
    interpreter.cells("x = 5", key="bystander")
    ((text, found),) = interpreter.cells(code, key=key)
    assert (words in text or words == "\\udcff", found) == (True, status), text
    text.encode()
    assert interpreter.cells("x", key="bystander") == [("5", "ok")]
    assert interpreter.server.num_starts == 1


# Needed to write to the cell's own channel: the descriptor, the nonce of the request (in the frames above), the format.
FORGE = """
import os, socket, struct, sys, time
def channel():
    frame = sys._getframe()
    while 'channel' not in frame.f_locals or frame.f_code.co_name != 'serve': frame = frame.f_back
    return frame.f_locals['channel'], frame.f_locals['nonce']
s, nonce = channel()
def fake(text, nonce=nonce, failed=False, size=None):
    body = text.encode()
    s.sendall(struct.pack('>16s?I', nonce, failed, len(body) if size is None else size) + body)
"""
FORGED = ("The code wrote to the interpreter's own channel and was stopped. Its variables are lost.", "error")
DIED = ("The interpreter died (memory, or the code ended it). Its variables are lost.", "killed")
TIMED_OUT = ("The code took longer than 1.5 s and was stopped. Its variables are lost.", "timeout")
# Code of a cell -> its result, and the result of the next cell, `print("next")`.
FORGERIES = {
    "a result before the end is what it might have printed, and shifts nothing": (
        "fake('42'); print('real')", ("42", "ok"), FORGED),
    "two results": ("fake('1'); fake('2')", ("1", "ok"), FORGED),
    "a failure": ("fake('no', failed=True)", ("no", "error"), FORGED),
    "another nonce": ("fake('42', nonce=bytes(16))", FORGED, ("next", "ok")),
    "a line of JSON": ("s.sendall(b'{\"output\": \"1\", \"status\": \"server_died\"}\\n')", FORGED, ("next", "ok")),
    "names of statuses": ("fake('server_died\\ntimeout\\nkilled')", ("server_died\ntimeout\nkilled", "ok"), FORGED),
    "half a header": ("s.sendall(nonce); time.sleep(9)", TIMED_OUT, ("next", "ok")),
    "half a result": ("fake('1', size=100); time.sleep(9)", TIMED_OUT, ("next", "ok")),
    "half a result and the end": ("fake('1', size=100); os._exit(0)", DIED, ("next", "ok")),
    "binary garbage": ("s.sendall(bytes(range(256)) * 64)", FORGED, ("next", "ok")),
    "no UTF-8": ("s.sendall(struct.pack('>16s?I', nonce, False, 2) + b'\\xff\\xfe')", ("\ufffd\ufffd", "ok"), FORGED),
    "4 GB announced": ("fake('1', size=2**32 - 1)", FORGED, ("next", "ok")),
    "100 MB": ("while True: s.sendall(b'x' * 10**8)", FORGED, ("next", "ok")),
    "a descriptor that is closed": ("os.close(s.fileno()); time.sleep(9)", DIED, ("next", "ok")),
    "a descriptor that is shut down": ("s.shutdown(2); time.sleep(9)", DIED, ("next", "ok")),
    "every descriptor is written to": (
        "for fd in range(1, 128):\n  try: os.write(fd, b'{\"output\": \"1\", \"status\": \"timeout\"}\\n')\n"
        "  except OSError: pass", FORGED, ("next", "ok")),
    "a thread that answers the next call": (
        "import threading\ndef late():\n  time.sleep(0.3); fake('late')\nthreading.Thread(target=late).start()",
        ("(no output)", "ok"), ("next", "ok")),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_a_cell_that_writes_to_its_channel_gets_no_status_but_ok_and_error(interpreter, key, case):
    code, first, second = FORGERIES[case]
    start = time.perf_counter()
    assert interpreter.cells(FORGE + code, "print('next')", key=key) == [first, second]
    assert time.perf_counter() - start < 10
    # after any result, replies still match their requests
    assert interpreter.cells("print(3)", "print(4)", key=key)[1] == ("4", "ok")
    assert interpreter.server.num_starts == 1


def test_the_interpreter_holds_no_descriptor_but_its_channel(interpreter, key):
    code = """
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
[fd for fd in range(128) if is_open(fd)] == [0, 1, 2, s.fileno()]"""
    assert interpreter.cells(FORGE + code, key=key) == [("True", "ok")]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_forgery_or_a_channel_that_ended(data):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        await wire.read_reply(reader, b"n" * 16, 10)

    with pytest.raises((wire.ForgedReply, asyncio.IncompleteReadError)):
        asyncio.run(read())


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(st.characters(), max_size=20), st.booleans())
def test_any_text_crosses_the_channel_and_is_encodable(text, failed):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(wire.reply(b"n" * 16, failed, text))
        return await wire.read_reply(reader, b"n" * 16, 120)

    found, output = asyncio.run(read())
    output.encode()
    assert found == failed
    assert output == "".join(c if not 0xD800 <= ord(c) < 0xE000 else f"\\u{ord(c):x}" for c in text)


@pytest.fixture(scope="module", params=["root", "user"])
def sandboxed(request):
    """A server with a long time limit, as this user and as an unprivileged one."""
    if not all(astuple(OFFER)):
        pytest.skip(f"the system does not offer {OFFER.missing()}")
    if request.param == "user" and not IS_ROOT:
        pytest.skip("only root can start it as another user")
    made = Interpreter(LONG if request.param == "root" else [*AS_USER, *LONG])
    yield made
    made.stop()


PREPARE = """
import ctypes, glob, mmap, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno(), name)
def wipe():
    for path in glob.glob('/tmp/*'): shutil.rmtree(path, True) if os.path.isdir(path) else os.unlink(path)
def hold(mb):
    kept = [b'x' * 2**20 for _ in range(mb)]
    time.sleep(60)
def forks(number, work, *args):
    for _ in range(number):
        if os.fork() == 0: work(*args)
def without_first_thread(mb):
    threading.Thread(target=hold, args=[mb]).start()
    libc.syscall(60 if os.uname().machine == 'x86_64' else 93, 0)
def open_sockets():
    kept = [socket.socketpair() for _ in range(60)]
    time.sleep(60)
"""
HERE = os.getpid()
NUMBERS = {name: found[os.uname().machine == "aarch64"] for name, found in syscalls.DENIED.items()}
# A guarantee of sandbox.py -> cells that try to break it, each with words of the refusal.
BROKEN = {
    "files: the host's are read-only or hidden": {
        "open('/var/lock/x', 'w')": "Error",
        "open('/run/lock/x', 'w')": "No such file",
        "open('/etc/hostname', 'a')": "Error",
        "open('/usr/local/x', 'w')": "Error",
        "open('/x', 'w')": "Error",
        "os.mkdir('/var/x')": "Error",
        "open('/proc/sysrq-trigger', 'w')": "Error",
        "open('/proc/sys/kernel/hostname', 'w')": "Error",
        f"open({sandbox.__file__!r}, 'a')": "No such file",
        f"open({str(ROOT / 'README.md')!r})": "No such file",
        "open(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')": "Error",
        "os.listdir('/home')[0]": "IndexError",
        "os.listdir('/run')[0]": "IndexError",
        "[name for name in os.listdir('/') if os.path.isfile('/' + name)][0]": "IndexError",
        "open('/etc/shadow').read()": "PermissionError",
        "os.chmod('/etc', 0)": "Error",
    },
    "files: their sum is bounded": {
        "for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(2**22))": "No space left",
        "wipe()\nfor p in ('/tmp', '/dev/shm', '/var/tmp'): open(p + '/x' + p[1], 'wb').write(bytes(7 * 2**20))": "No space left",
        "wipe()\nfor i in range(10**5): open(f'/tmp/{i}', 'w').close()": "No space left",
    },
    "devices": {
        "open('/dev/kvm')": "No such file",
        "open('/dev/zero')": "No such file",
        "open('/dev/vda')": "No such file",
        "open('/dev/net/tun')": "No such file",
        "call('mknod', b'/tmp/disk', 0o060666, 0xfe00)": "Error",
        "[os.openpty() for _ in range(50)]": "No space left",
    },
    "network": {
        "socket.create_connection(('127.0.0.1', 22), 1)": "unreachable",
        "socket.create_connection(('1.1.1.1', 53), 1)": "unreachable",
        "socket.socket(socket.AF_UNIX)": "PermissionError",
        "socket.socket(40)": "PermissionError",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)": "PermissionError",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)": "PermissionError",
    },
    "processes": {
        f"os.kill({HERE}, 9)": "ProcessLookupError",
        f"open('/proc/{HERE}/cmdline')": "No such file",
        f"call('ptrace', 16, {HERE}, 0, 0)": "ProcessLookupError",
        "signal.pidfd_send_signal(s.getsockopt(socket.SOL_SOCKET, 77), 9)": "Error",  # the peer of its channel is the server
        "call('syscall', 438, s.getsockopt(socket.SOL_SOCKET, 77), 0, 0)": "Error",  # a descriptor of that process
        "call('prctl', 1, 0)": "PermissionError",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))": "Error",
        "resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))": "Error",
        "resource.setrlimit(resource.RLIMIT_CORE, (2, 2))": "Error",
        "forks(99, time.sleep, 60)": "BlockingIOError",
    },
    "rights": {
        "os.setuid(0)": "Error",
        "subprocess.run(['su', '-c', 'id'], check=True, stdin=-3, capture_output=True)": "Error",
        "call('sethostname', b'x', 1)": "PermissionError",
        "call('chroot', b'/tmp')": "PermissionError",
    },
    "namespaces": {
        "call('unshare', 0x10000000)": "PermissionError",
        "call('unshare', 0x00020000)": "PermissionError",
        "call('setns', 0, 0)": "PermissionError",
        "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)": "PermissionError",
        "call('umount2', b'/tmp', 2)": "PermissionError",
        "call('syscall', 435, 0, 0)": "Errno 38",
        "call('syscall', 56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0)": "PermissionError",
        "subprocess.run(['unshare', '-U', 'true'], check=True, capture_output=True)": "Error",
    },
    "memory that nobody counts": {
        "os.memfd_create('x')": "PermissionError",
        "mmap.mmap(-1, 2**20)": "PermissionError",
        "mmap.mmap(-1, 2**21, flags=0x40022)": "PermissionError",  # private huge pages
        "call('shmget', 0, 2**20, 0o1600)": "PermissionError",
        "call('msgget', 0, 0o1600)": "PermissionError",
        "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10**8)": "PermissionError",
    },
    "system calls": {
        f"call('syscall', {number}, 0, 0, 0, 0)  # {name}": "[Errno 1]" for name, number in NUMBERS.items()
    },
}


@pytest.mark.parametrize("what", BROKEN)
def test_every_statement_of_the_sandbox(sandboxed, what):
    ready, *found, after = sandboxed.cells(FORGE + PREPARE, *BROKEN[what], "print('next')", key=what)
    sandboxed.end(what)
    assert (ready, after) == (("(no output)", "ok"), ("next", "ok"))
    wrong = {
        code: (text, status)
        for (code, words), (text, status) in zip(BROKEN[what].items(), found, strict=True)
        if status != "error" or words not in text
    }
    assert not wrong
    assert sandboxed.server.num_starts == 1


TOO_MUCH = ("The code used too much memory and was stopped. Its variables are lost.", "killed")
HUNGRY = {  # each process stays below the limit of 512 MiB
    "processes": "forks(4, hold, 300)",
    "processes whose first thread has ended": "forks(4, without_first_thread, 300)",
    "sockets, full or not": "forks(15, open_sockets)",  # 1,800 of 312 KiB
    "a supervisor that does not look": "os.kill(0, signal.SIGSTOP); forks(4, hold, 300)",
}


@pytest.mark.parametrize("case", HUNGRY)
def test_memory_is_bounded_by_the_sum_of_all_processes(sandboxed, case):
    assert sandboxed.cells(PREPARE, HUNGRY[case] + "; time.sleep(25)", key=case)[1] == TOO_MUCH
    assert sandboxed.cells("print('next')", key=case) == [("next", "ok")]
    sandboxed.end(case)


def test_memory_below_the_limit_and_pages_that_forks_share_cost_nothing(sandboxed):
    cells = ["forks(4, hold, 40); time.sleep(0.5); 1", "forks(12, time.sleep, 60); time.sleep(0.5)", "7"]
    assert sandboxed.cells(PREPARE, *cells, key="little")[1:] == [("1", "ok"), ("(no output)", "ok"), ("7", "ok")]
    sandboxed.end("little")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_to_a_cells_own_group_reaches_no_process_of_ours(sandboxed, number):
    """A process of the same user may signal it: namespaces do not limit process groups."""
    key = number.name
    cells = [f"os.kill(0, {int(number)})", f"os.killpg(os.getpgrp(), {int(number)})", "1 + 1"]
    assert sandboxed.cells("import os", *cells, key=key)[3] == ("2", "ok")
    start = time.perf_counter()
    sandboxed.end(key)  # the supervisor does it
    assert time.perf_counter() - start < 4  # after 5 the server gives up


def test_what_a_rollout_writes_is_gone_and_what_programs_need_is_there(sandboxed):
    write = "for p in ('/tmp/x', '/var/tmp/y', '/dev/shm/z'): open(p, 'w').write('state')"
    assert sandboxed.cells(PREPARE + write, key="first") == [("(no output)", "ok")]
    found = sandboxed.cells(
        "import glob; glob.glob('/tmp/[xyz]') + glob.glob('/var/tmp/[xyz]') + glob.glob('/dev/shm/[xyz]')",
        "!echo shell",
        "import multiprocessing; multiprocessing.get_context('fork').Pool(2).map(abs, [-1, -2])",
        "import asyncio, tempfile; asyncio.run(asyncio.sleep(0)); tempfile.TemporaryFile().write(b'12')",
        key="second",
    )
    assert found == [("[]", "ok"), ("shell", "ok"), ("[1, 2]", "ok"), ("2", "ok")]


@pytest.mark.skipif(not IS_ROOT, reason="only root can start a server as another user")
def test_a_weak_sandbox_is_refused_in_one_line_unless_it_is_allowed():
    with pytest.raises(ToolServerError) as refused:
        Interpreter([*AS_WEAK_USER, *COMMAND])
    last = str(refused.value).split("The end of its log:\n")[1].strip()
    assert last.count("\n") == 0
    assert last.startswith(
        "the interpreter's sandbox does not cover here: network, other processes; number of processes; files"
    )
    assert last.endswith("or set allow_weak_sandbox: true (--allow-weak-sandbox)")
    made = Interpreter([*AS_WEAK_USER, *LONG, "--allow-weak-sandbox"])
    assert made.cells("1 + 1") == [("2", "ok")]
    for case in ("processes", "processes whose first thread has ended"):  # without namespaces too
        assert made.cells(PREPARE, HUNGRY[case] + "; time.sleep(25)", key=case)[1] == TOO_MUCH
    made.stop()


def test_the_environment_passes_the_setting_on():
    (strict,), (weak,) = (FunctionCalling(num_train=1, allow_weak_sandbox=weak).servers for weak in (False, True))
    assert [*strict.command, "--allow-weak-sandbox"] == weak.command


def test_a_call_that_is_given_up_costs_its_own_rollout_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    async def scenario():
        interpreters = server.Interpreters(sandbox.Limits(memory_mb=512), 10.0, 1000, OFFER)
        await interpreters.start()
        assert await interpreters.run("other", "x = 5") == ("(no output)", "ok")
        assert await interpreters.run("given up", "import time; x = 6") == ("(no output)", "ok")
        call = asyncio.create_task(interpreters.run("given up", "time.sleep(0.3); print('late')"))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # its reply would be that of another cell
        assert [await interpreters.run(key, "print(1)") for key in ("given up", "other")] == [("1", "ok")] * 2
        assert await interpreters.run("other", "x") == ("5", "ok")
        for key in ("given up", "other"):
            await interpreters.end(key)
        assert sorted(interpreters.numbers) == list(range(sandbox.UIDS_PER_SERVER))
        await interpreters.stop()

    asyncio.run(scenario())


def test_an_interpreter_that_cannot_enter_its_sandbox_is_told_to_the_log_and_not_to_the_policy(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    async def scenario():
        # Too many open files are refused after the standard streams are redirected to /dev/null.
        interpreters = server.Interpreters(sandbox.Limits(memory_mb=512, num_files=2**40), 10.0, 1000, OFFER)
        await interpreters.start()
        found = await interpreters.run("a", "1"), await interpreters.run("a", "2")
        await interpreters.stop()
        return found, interpreters.numbers

    found, numbers = asyncio.run(scenario())
    assert found == (("The interpreter did not start.", "server_died"),) * 2
    assert sorted(numbers) == list(range(sandbox.UIDS_PER_SERVER))
    logged = capfd.readouterr().err
    assert logged.count("an interpreter did not start: NotStartedError: Traceback") == 2
    assert "in apply" in logged


ROOT_ALONE = """
from fuchsia_pl.library.function_calling import sandbox
assert sandbox.LIBC.unshare(sandbox.CLONE_NEWUSER) == 0
open('/proc/self/setgroups', 'w').write('deny')
for name in ('uid_map', 'gid_map'): open(f'/proc/self/{name}', 'w').write('0 0 1')
print(sandbox.find_offer().gives_up_rights)
"""


@pytest.mark.skipif(not (IS_ROOT and OFFER.is_apart), reason="only root can be root of few users")
def test_root_that_can_become_nobody_else_is_refused():
    done = subprocess.run([sys.executable, "-c", ROOT_ALONE], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "False\n", done.stderr
    weak = sandbox.Offer(is_apart=True, hides_files=True, is_filtered=True, gives_up_rights=False)
    found = server.refusal_of(weak, allows_weak=True)
    assert found is not None
    assert found.startswith("the interpreter must not run as root, and here root cannot become another user")
    assert "\n" not in found
