"""Attempts of user code to end the process."""

import asyncio
import os
import subprocess
import sys

import pytest

from fuchsia_pl.envs.user_code import StrayError, contained, ends_by_itself, user_code


class ReallyEndedError(Exception):
    """Raised instead of ending this process."""


@pytest.fixture
def ends(monkeypatch):
    """Prevents code from ending the test process; collects the exit codes that it would have had."""
    codes = []

    def end(*arguments):
        codes.append(arguments)
        raise ReallyEndedError

    for name in ("_exit", "execv", "execve"):
        monkeypatch.setattr(os, name, end)
    return codes


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: os._exit(0), r"SystemExit: os\._exit\(0\)"),
        (lambda: os._exit(status=3), r"SystemExit: os\._exit\(3\)"),
        (lambda: os.execv("/bin/true", ["true"]), r"SystemExit: os\.execv"),
        (lambda: os.execlp("true", "true"), r"SystemExit: os\.execv"),
        (lambda: os.execve("/bin/true", ["true"], {}), r"SystemExit: os\.execve"),
        (lambda: sys.exit(0), "SystemExit: 0"),
    ],
)
def test_user_code_cannot_end_the_process(ends, attempt, words):
    async def in_a_coroutine():
        attempt()

    with pytest.raises(StrayError, match=f"^Mine raised {words}"), user_code("Mine"):
        attempt()
    with pytest.raises(StrayError, match=f"^{words}"):
        asyncio.run(contained(in_a_coroutine()))
    assert ends == []
    with pytest.raises(ReallyEndedError):  # code that is not the user's may
        os._exit(7)
    assert ends == [(7,)]


def test_a_child_that_user_code_forks_ends_as_it_likes():
    with user_code():
        child = os.fork() or os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_plain_errors_and_ctrl_c_pass():
    for error in (LookupError, KeyboardInterrupt, TimeoutError):
        with pytest.raises(error), user_code():
            raise error


def test_a_process_that_must_end_by_itself_turns_success_into_failure(ends, capsys):
    with ends_by_itself():
        for status in (0, 256, 3):
            with pytest.raises(ReallyEndedError):
                os._exit(status)
    assert "called os._exit(0) before the run ended, so the exit code is 1" in capsys.readouterr().err
    with pytest.raises(ReallyEndedError):
        os._exit(0)
    assert ends == [(1,), (1,), (3,), (0,)]


THREAD = """
import os, threading, time
from fuchsia_pl.envs.user_code import ends_by_itself
with ends_by_itself():
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(60)
"""


def test_a_thread_of_a_real_process_cannot_make_a_success_of_it():
    done = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: some code called os._exit(0) before the run ended")
