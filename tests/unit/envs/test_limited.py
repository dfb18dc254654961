import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from fuchsia_pl.envs import limited
from fuchsia_pl.envs.limited import LimitedWorkers, WorkerDied, WorkerError, WorkersNotStarted, WorkerTimeout
from fuchsia_pl.scratch import started_at
from fuchsia_pl.types import ConfigError

FUNCTIONS = "tests.limited_functions."


def called(name: str, argument=None, timeout_s: float = 5.0, **settings):
    with closing(LimitedWorkers(FUNCTIONS + name, **settings)) as workers:
        return workers.call(argument, timeout_s)


def ends_soon(pid: int) -> bool:
    until = time.monotonic() + 10
    while started_at(pid) is not None and time.monotonic() < until:
        time.sleep(0.02)
    return started_at(pid) is None


def test_argument_and_result_are_those_of_json():
    value = {"a": [1, 2.5, None, True, "\u00e9\ud800"], "b": {"c": 10**30}}
    assert called("same", value) == value
    assert math.isnan(called("same", float("nan")))
    text = "x" * 5_000_000  # more than the buffers of a socket
    assert called("same", text) == text


def test_a_call_that_computes_too_long_ends_at_its_limit():
    start = time.perf_counter()
    with pytest.raises(WorkerTimeout, match=r"0\.2 s of CPU time"):
        called("spins", 0, timeout_s=0.2)
    assert time.perf_counter() - start < 15


def test_a_call_that_waits_ends_at_a_limit_of_wall_clock_time(monkeypatch):
    monkeypatch.setattr(limited, "WALL_EXTRA_S", 0.0)
    with pytest.raises(WorkerTimeout):
        called("sleeps", 60, timeout_s=0.05)
    with pytest.raises(ValueError, match="above 0, got 0"):
        called("same", timeout_s=0)


@pytest.mark.parametrize(
    ("name", "argument", "failure", "text"),
    [
        ("exits", 3, WorkerError, "SystemExit: 3"),
        ("exits_at_once", 4, WorkerDied, "exit code 4"),
        ("kills_itself", signal.SIGSEGV, WorkerDied, "SIGSEGV"),
        ("kills_itself", signal.SIGKILL, WorkerDied, "SIGKILL"),
        ("kills_itself", signal.SIGRTMIN + 6, WorkerDied, "ended by signal 40"),
        ("takes_memory", 4096, WorkerError, "MemoryError"),
        ("nests", 0, WorkerError, "RecursionError"),
        ("returns_no_json", 0, WorkerError, "not JSON serializable"),
        ("returns_text", 70 * 2**20, WorkerDied, "more than 67108864"),
        ("forges", "ff" * 64, WorkerDied, "more than 67108864"),
        ("forges", "0000000000000003" + b"no!".hex(), WorkerDied, "not valid"),
        ("forges", "0000000000000002" + b"[]".hex(), WorkerDied, "not valid"),
        ("forges", "00", WorkerDied, "exit code 0"),
    ],
)
def test_a_call_without_a_result_is_a_failure_and_the_next_one_works(name, argument, failure, text):
    with closing(LimitedWorkers(FUNCTIONS + name)) as workers:
        for _ in range(2):  # the second time after the process was replaced
            with pytest.raises(failure, match=text):
                workers.call(argument, 5.0)


def test_the_limit_of_memory_is_the_given_one():
    assert called("takes_memory", 100, memory_mb=200) == 100 * 2**20
    with pytest.raises(WorkerError, match="MemoryError"):
        called("takes_memory", 300, memory_mb=200)


def test_nothing_is_written_to_a_file_or_to_the_streams_of_the_run(tmp_path, capfd):
    with pytest.raises(WorkerError, match="File too large"):
        called("writes_file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == ""
    assert called("prints", "hidden") is True
    assert capfd.readouterr() == ("", "")


def test_a_result_depends_on_the_argument_and_the_seed_alone():
    with closing(LimitedWorkers(FUNCTIONS + "draws")) as workers:
        first = workers.call(0, 5.0)
        assert workers.call(0, 5.0) == first
    assert called("draws") == first  # of another server
    other = called("draws", seed=1)
    assert other[0] != first[0]
    assert other[1] != first[1]
    with closing(LimitedWorkers(FUNCTIONS + "numpy_draws", opening={})) as workers:
        (number,) = {workers.call(0, 5.0) for _ in range(2)}
    assert called("numpy_draws", opening={}) == number
    assert called("numpy_draws", opening={}, seed=1) != number
    with closing(LimitedWorkers(FUNCTIONS + "remembers")) as workers:
        assert [workers.call(n, 5.0) for n in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("has_own_session", [False, True])
def test_processes_that_a_call_leaves_are_killed(has_own_session):
    with closing(LimitedWorkers(FUNCTIONS + "forks")) as workers:
        left = workers.call(has_own_session, 5.0)
        assert ends_soon(left)


def test_processes_that_a_call_leaves_are_killed_also_while_others_run():
    with (
        closing(LimitedWorkers(FUNCTIONS + "forks_or_sleeps", num_workers=2)) as workers,
        ThreadPoolExecutor(1) as threads,
    ):
        other = threads.submit(workers.call, 5.0, 60.0)
        left = workers.call(0.0, 5.0)
        assert ends_soon(left)
        assert not other.done()


def test_calls_run_at_the_same_time_up_to_the_number_of_workers(monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    call = limited._Server.call

    def counted(server, body, timeout_s):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return call(server, body, timeout_s)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(limited._Server, "call", counted)
    with (
        closing(LimitedWorkers(FUNCTIONS + "pids", num_workers=3)) as workers,
        ThreadPoolExecutor(8) as threads,
    ):
        found = list(threads.map(lambda _: workers.call(0.2, 5.0), range(9)))
    assert most == 3
    assert len({own for own, _ in found}) == 9  # a process for each call
    assert len({server for _, server in found}) == 1


def test_a_server_that_ends_during_a_call_is_replaced_a_bounded_number_of_times(tmp_path):
    with pytest.raises(WorkerDied, match="3 times"):
        called("ends_its_server")
    (tmp_path / "mark").touch()
    assert called("slow_server", str(tmp_path / "mark")) == "done"


def test_close_ends_the_processes_and_a_later_call_starts_them_again():
    workers = LimitedWorkers(FUNCTIONS + "pids")
    _, server = workers.call(0, 5.0)
    workers.close()
    assert started_at(server) is None
    _, other = workers.call(0, 5.0)
    assert other != server
    workers.close()


def test_the_processes_end_with_the_run():
    code = (
        "import os, signal, sys; from fuchsia_pl.envs.limited import LimitedWorkers\n"
        "print(*LimitedWorkers('tests.limited_functions.pids').call(0, 5.0), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(ends_soon(pid) for pid in pids)


def test_a_function_may_be_made_by_another_one_that_loads_data_once():
    assert called("opened", 7, opening=6) == 42


def test_the_process_of_a_call_loads_no_torch():
    assert "torch" not in called("modules")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="dotted path"):
        LimitedWorkers("score")
    with pytest.raises(ConfigError, match="got 0 and 2048"):
        LimitedWorkers("a.b", num_workers=0)
    with pytest.raises(ConfigError, match="got 1 and 0"):
        LimitedWorkers("a.b", memory_mb=0)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("no_such_module.score", "ModuleNotFoundError: No module named 'no_such_module'"),
        (FUNCTIONS + "missing", "AttributeError"),
        (FUNCTIONS + "exits", "SystemExit: 3"),  # in the opening
        (FUNCTIONS + "exits_at_once", "exit code 3"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_that_is_no_failure_of_a_call(function, text):
    with closing(LimitedWorkers(function, opening=3)) as workers:
        for _ in range(2):
            with pytest.raises(WorkersNotStarted, match=text):
                workers.call(0, 5.0)


def test_a_function_that_is_not_loaded_in_time_is_an_error(monkeypatch):
    monkeypatch.setattr(limited, "START_TIMEOUT_S", 0.2)
    with pytest.raises(WorkersNotStarted, match=r"not loaded within 0\.2 s"):
        called("sleeps", opening=60)
