import os

from fuchsia_pl.engines.vllm_arguments import changed_environment, worker_environment


def test_ranks_on_one_machine_have_cores_or_a_gpu_each(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {4, 5, 6, 7})
    name = "VLLM_CPU_OMP_THREADS_BIND"
    assert [worker_environment(rank, 2, None)[name] for rank in (0, 1)] == ["4,6", "5,7"]
    assert name not in worker_environment(0, 1, None)
    assert name not in worker_environment(0, 8, None)  # fewer cores than ranks: vLLM's own choice
    monkeypatch.setenv(name, "0-1")
    assert name not in worker_environment(0, 2, None)  # the user's choice
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert worker_environment(1, 2, 3)["CUDA_VISIBLE_DEVICES"] == "3"
    assert worker_environment(0, 1, 2)["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,3")
    assert worker_environment(1, 2, 1)["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_environment_is_changed_for_a_while(monkeypatch):
    monkeypatch.setenv("FIRST", "1")
    monkeypatch.delenv("SECOND", raising=False)
    with changed_environment({"FIRST": None, "SECOND": "2"}):
        assert ("FIRST" in os.environ, os.environ["SECOND"]) == (False, "2")
    assert (os.environ["FIRST"], "SECOND" in os.environ) == ("1", False)
