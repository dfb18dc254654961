"""An abandoned start of vLLM leaves no process behind."""

import multiprocessing
import tempfile
import time

from fuchsia_pl import scratch
from fuchsia_pl.engines.vllm_processes import end_engine_processes, socket_environment


def test_the_processes_of_an_engine_are_killed_and_no_others():
    fork = multiprocessing.get_context("fork")
    engine = fork.Process(target=time.sleep, args=(600,), name="EngineCore_DP0")
    other = fork.Process(target=time.sleep, args=(600,), name="worker")
    engine.start()
    other.start()
    try:
        end_engine_processes()
        assert engine.exitcode == -9
        assert scratch.started_at(engine.pid) is None
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_sockets_are_made_in_a_folder_of_the_run_where_that_can_be(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory() as short, tempfile.TemporaryDirectory(dir=tmp_path, prefix="x" * 80) as long:
        folders = {name: tempfile.TemporaryDirectory(dir=name) for name in (short, long)}
        assert socket_environment(folders[short]) == {"VLLM_RPC_BASE_PATH": folders[short].name}
        assert socket_environment(folders[long]) == {}
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/elsewhere")
        assert socket_environment(folders[short]) == {}
        for folder in folders.values():
            folder.cleanup()
