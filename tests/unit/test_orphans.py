"""The processes that a process started end with it, also in other sessions and if they ignore signals."""

import os
import subprocess
import sys
import time
from pathlib import Path

from fuchsia_pl import orphans, scratch

ROOT = Path(__file__).parents[2]
# Four processes: a child that ignores SIGTERM, in another session, under another title; its child; and a child of
# multiprocessing that holds shared memory; beside a folder in each place.
FAMILY = """
import os, signal, subprocess, sys, time
from multiprocessing import shared_memory
from fuchsia_pl import orphans, scratch

STUBBORN = (
    "import signal, subprocess, sys, time, setproctitle; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "setproctitle.setproctitle('VLLM::EngineCore ' * 100); "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "print(flush=True); time.sleep(600)"
)
orphans.watch()
orphans.watch()
folders = scratch.scratch_folder("a"), scratch.scratch_folder("b", place=scratch.RAM_BACKED)
child = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
segment = shared_memory.SharedMemory(create=True, size=4096)
scratch.record_segments(scratch.Path(folders[0].name), [os.getpid()])
print(folders[0].name, folders[1].name, f"/dev/shm/{segment.name}", *orphans.descendants(os.getpid()), flush=True)
sys.stdin.read()
"""
BOUND_S = 10.0


def wait_for_the_end_of(pids: list[int]) -> None:
    until = time.monotonic() + BOUND_S
    while left := [pid for pid in pids if scratch.started_at(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def test_a_family_is_gone_within_ten_seconds_of_the_kill_of_its_parent():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(scratch.OWNER_VARIABLE, None)
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        words = parent.stdout.readline().split()
        files, pids = words[:3], [int(word) for word in words[3:]]
        assert all(Path(file).exists() for file in files)
        assert (
            len(pids) == 4
        )  # the child that ignores SIGTERM, its child, the watcher (one, although started twice), and Python's own tracker
        parent.kill()
        parent.wait()
        wait_for_the_end_of(pids)
        assert not [file for file in files if Path(file).exists()]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        parent.kill()
        parent.communicate()


def test_a_rank_of_torchrun_does_not_outlive_its_agent():
    rank = "from fuchsia_pl import orphans; import os, time; orphans.watch(); print(os.getpid(), flush=True); time.sleep(600)"
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), orphans.LAUNCHED_VARIABLE: "none"}
    environment.pop(scratch.OWNER_VARIABLE, None)
    parent = subprocess.Popen([sys.executable, "-c", agent], env=environment, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert scratch.started_at(child)
    parent.kill()
    parent.wait()
    wait_for_the_end_of([child])
    parent.communicate()


def test_a_process_and_all_that_it_started_are_ended():
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        "print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert orphans.descendants(parent.pid) == [child]
    assert child in orphans.descendants(os.getpid())
    orphans.end_tree(parent.pid)
    parent.communicate(timeout=BOUND_S)
    wait_for_the_end_of([child])


def test_a_process_knows_whether_its_parent_is_of_its_run():
    """Although by then its own name has replaced that of its parent."""
    child = "from fuchsia_pl import orphans; orphans.watch(); print(orphans.parent_in_run())"
    parent = (
        f"import os, subprocess, sys; from fuchsia_pl import orphans; orphans.watch(); run = [sys.executable, '-c', {child!r}]; "
        "print(orphans.parent_in_run(), os.getpid(), flush=True); subprocess.run(run); "
        "other = {**os.environ, orphans.OWNER_VARIABLE: 'other'}; subprocess.run(run, env=other)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(orphans.OWNER_VARIABLE, None)  # of another test's run in this process
    done = subprocess.run(
        [sys.executable, "-c", parent], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    first, pid, of_child, of_other = done.stdout.split()
    assert (first, of_child, of_other) == ("None", pid, "None")
