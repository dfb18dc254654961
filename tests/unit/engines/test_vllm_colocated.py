import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.outputs import WeightVersionSpan

from fuchsia_pl.engines import vllm_kv_cache
from fuchsia_pl.engines.base import VERSION_FILE, EngineError, EngineSpec, SamplingParams, check_version_file
from fuchsia_pl.engines.vllm_arguments import GIB, VLLM_QUANTIZATION
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.types import ConfigError, ServedModel


@pytest.fixture
def gpu(monkeypatch):
    """torch finds a GPU that multiplies fp8, with 80 GiB of which 60 are free and the trainer holds 10."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (60 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda index: 10 * GIB)


@pytest.mark.parametrize("name", ["kv_cache_gb", "max_num_seqs", "tensor_parallel_size", "timeout_s"])
def test_sizes_and_bounds_are_above_zero(name):
    with pytest.raises(ValueError, match=rf"{name} must be above 0, got 0"):
        VLLMColocatedEngine(**{name: 0})


def test_lora_mode_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'sync_mode is "lora", but model.policy.lora.enabled is false'):
        VLLMColocatedEngine(sync_mode="lora").start(make_spec(tmp_path, lora_rank=0))


def test_devices_share_a_copy_of_the_weights(monkeypatch):
    engines = [VLLMColocatedEngine(), VLLMColocatedEngine(tensor_parallel_size=4)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [engine.weights_share for engine in engines] == [1.0, 0.25]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [engine.weights_share for engine in engines] == [1.0, 1.0]


def test_tensor_parallelism_needs_a_trainer_of_one_rank(tmp_path, monkeypatch):
    assert started_with(monkeypatch, tmp_path, tensor_parallel_size=2)["tensor_parallel_size"] == 2
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 needs a trainer of one rank, got 4.*fuchsia serve"):
        VLLMColocatedEngine(tensor_parallel_size=2).start(make_spec(tmp_path, num_ranks=4))
    started_with(monkeypatch, tmp_path, make_spec(tmp_path, num_ranks=4))


def test_quantized_weights_are_refused_where_they_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match='quantization="fp8" needs a GPU: vLLM has no kernels for it on a CPU'):
        VLLMColocatedEngine(quantization="fp8", sync_mode="lora").start(make_spec(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match='quantization="fp8" needs sync_mode "lora", got "merge"'):
        VLLMColocatedEngine(quantization="fp8", sync_mode="merge").start(make_spec(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    with pytest.raises(
        ConfigError, match=r'quantization="fp8_per_channel" needs a GPU that multiplies fp8 .* use "fp8"'
    ):
        VLLMColocatedEngine(quantization="fp8_per_channel", sync_mode="lora").start(make_spec(tmp_path))


def test_a_quantization_that_leaves_dense_layers_as_they_are_is_refused():
    with pytest.raises(
        ConfigError, match=r'must be one of fp8, fp8_per_channel, got "int8": .* all layers but experts'
    ) as caught:
        VLLMColocatedEngine(quantization="int8")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "name"), [("fp8", "fp8_per_tensor"), ("fp8_per_channel", "fp8_per_channel"), (None, None)]
)
def test_the_quantization_reaches_vllm_by_its_own_name(tmp_path, monkeypatch, gpu, quantization, name):
    args = started_with(monkeypatch, tmp_path, quantization=quantization, sync_mode="lora")
    assert args["quantization"] == name


def test_vllm_quantizes_dense_layers_by_these_names():
    """By the table of vLLM itself: a name without a `linear` entry would change nothing in a dense model."""
    from vllm.config.quantization import _ONLINE_SHORTHANDS

    assert all(_ONLINE_SHORTHANDS[name].linear is not None for name in VLLM_QUANTIZATION.values())
    assert _ONLINE_SHORTHANDS["int8_per_channel_weight_only"].linear is None


def test_on_a_gpu_prefill_is_chunked_and_a_batch_has_8192_tokens(tmp_path, monkeypatch, gpu):
    args = started_with(monkeypatch, tmp_path, make_spec(tmp_path, max_length=20_000))
    assert (args["enable_chunked_prefill"], args["max_num_batched_tokens"]) == (True, 8192)
    assert args["block_size"] is None  # vLLM's own choice
    assert started_with(monkeypatch, tmp_path, max_num_seqs=9000)["max_num_batched_tokens"] == 9000


def test_on_a_cpu_a_batch_holds_the_longest_prompt(tmp_path, monkeypatch):
    assert started_with(monkeypatch, tmp_path)["max_num_batched_tokens"] == 2048
    args = started_with(monkeypatch, tmp_path, make_spec(tmp_path, max_length=20_000))
    assert (args["enable_chunked_prefill"], args["max_num_batched_tokens"]) == (False, 20_000)


def test_the_cache_gets_what_the_gpu_has_left(tmp_path, monkeypatch, gpu):
    """60 free and 10 held by the trainer, less its 20 (those 10 among them), weights 8, other memory 3 and 5 % of 80: 35."""
    monkeypatch.setattr(vllm_kv_cache, "blank_model", lambda folder: folder)
    monkeypatch.setattr(vllm_kv_cache, "weights_gb", lambda blank, dtype, is_quantized: 8.0)
    monkeypatch.setattr(vllm_kv_cache, "overhead_gb", lambda *arguments: 3.0)
    spec = make_spec(tmp_path, reserved_gb=20.0, device_index=0)
    engine = VLLMColocatedEngine()
    assert engine.kv_cache_bytes == 0
    assert started_with(monkeypatch, tmp_path, spec, engine)["kv_cache_memory_bytes"] == 35 * GIB
    assert engine.kv_cache_bytes == 35 * GIB
    engine.close()  # a training after a validation plans anew
    assert engine.kv_cache_bytes == 0
    assert started_with(monkeypatch, tmp_path, spec, kv_cache_gb=2.5)["kv_cache_memory_bytes"] == 2.5 * GIB
    shared = make_spec(tmp_path, reserved_gb=20.0, device_index=1)
    args = started_with(monkeypatch, tmp_path, shared, kv_cache_gb="auto", tensor_parallel_size=2)
    assert args["kv_cache_memory_bytes"] == 39 * GIB  # half of the weights; the trainer's GPU has least
    with pytest.raises(
        ConfigError, match=r'kv_cache_gb is "auto", and nothing is left for it: of 70\.0 GiB the trainer needs 60'
    ):
        VLLMColocatedEngine().start(make_spec(tmp_path, reserved_gb=60.0, device_index=0))


def test_the_cache_has_four_gib_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert VLLMColocatedEngine().kv_cache_bytes == 4 * GIB
    assert started_with(monkeypatch, tmp_path, kv_cache_gb="auto")["kv_cache_memory_bytes"] == 4 * GIB


def test_on_a_cpu_siblings_share_blocks_and_no_core_is_kept_back(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU", raising=False)
    assert started_with(monkeypatch, tmp_path)["block_size"] == 32
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"


def make_spec(root, lora_rank: int = 5, max_length: int = 64, **changes) -> EngineSpec:
    model = ServedModel("/m", "float16", lora_rank, Path)
    return EngineSpec(model, max_length, seed=3, log_file=root / "engine.log", **changes)


class StoppedStartError(Exception):
    """Raised instead of a start, once the arguments are known."""


def started_with(monkeypatch, root, spec=None, engine=None, **settings):
    """The arguments that vLLM would be started with, and the variable of its caches."""
    seen = {}

    def capture(args):
        seen.update(vars(args), cache=os.environ.get("VLLM_CACHE_ROOT"))
        raise StoppedStartError

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", capture)
    engine = engine or VLLMColocatedEngine(**{"kv_cache_gb": 4.0, **settings})
    with pytest.raises(EngineError, match="StoppedStartError"):
        engine.start(spec or make_spec(root))
    return seen


def test_each_rank_has_a_compile_cache_of_its_own_at_every_start(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    specs = [make_spec(tmp_path, rank=rank, local_rank=rank % 2, num_ranks=4, num_local_ranks=2) for rank in range(4)]
    caches = [started_with(monkeypatch, tmp_path, spec)["cache"] for spec in specs]
    assert caches == [None, *(str(tmp_path / f"vllm/rank-{rank}") for rank in (1, 2, 3))]
    assert [started_with(monkeypatch, tmp_path, spec)["cache"] for spec in specs] == caches
    assert "VLLM_CACHE_ROOT" not in os.environ
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/fast")
    assert [started_with(monkeypatch, tmp_path, spec)["cache"] for spec in specs[:2]] == ["/fast", "/fast/rank-1"]


def test_arguments_of_vllm_are_passed_on_as_they_are(tmp_path, monkeypatch):
    given = {"cpu_offload_gb": 2, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    args = started_with(monkeypatch, tmp_path, engine_args={**given, "max_num_batched_tokens": 4096})
    assert {name: args[name] for name in given} == given
    assert args["max_num_batched_tokens"] == 4096
    assert started_with(monkeypatch, tmp_path)["cpu_offload_gb"] == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention_config": {"bakend": "FLASH_ATTN"}}, "ValidationError: .*bakend"),
        ({"max_num_batched_tokens": 3}, "ValueError: 3 is too small"),
    ],
    ids=["names in it", "a value"],
)
def test_values_that_vllm_does_not_accept_are_one_line(tmp_path, monkeypatch, given, reason):
    def refuse(args):
        raise ValueError("3 is\n  too small")

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", refuse)
    with pytest.raises(
        ConfigError, match=rf"^vLLM refuses its arguments, among them data.engine.init_args.engine_args .*\({reason}"
    ) as caught:
        VLLMColocatedEngine(engine_args=given).start(make_spec(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="vLLM did not start"):  # not the fault of arguments that were not given
        VLLMColocatedEngine().start(make_spec(tmp_path))


def test_what_the_run_says_reaches_vllm_and_nothing_of_the_models_own(monkeypatch, tmp_path):
    args = started_with(monkeypatch, tmp_path)
    assert (args["model"], args["dtype"], args["max_model_len"], args["seed"]) == ("/m", "float16", 64, 3)
    assert args["max_lora_rank"] == 8  # the adapter has 5, and vLLM has buffers for 8
    assert args["generation_config"] == "vllm"
    assert args["logprobs_mode"] == "processed_logprobs"
    assert not args["enable_chunked_prefill"]


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ({"kv_cache_gb": 0.5}, "kv_cache_memory_bytes", 2**29),
        ({"max_num_seqs": 7}, "max_num_seqs", 7),
        ({"enforce_eager": True}, "enforce_eager", True),
        ({"sync_mode": "lora"}, "enable_lora", True),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", 2),
    ],
    ids=str,
)
def test_every_setting_reaches_vllm(monkeypatch, tmp_path, setting, name, value):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert started_with(monkeypatch, tmp_path)[name] != value
    assert started_with(monkeypatch, tmp_path, **setting)[name] == value
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_merge_is_the_way_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not started_with(monkeypatch, tmp_path)["enable_lora"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert started_with(monkeypatch, tmp_path)["enable_lora"]
    assert not started_with(monkeypatch, tmp_path, make_spec(tmp_path, lora_rank=0))["enable_lora"]


def test_a_start_that_takes_too_long_is_an_error_and_what_comes_up_late_is_shut_down(monkeypatch, tmp_path):
    late, goes_on = threading.Event(), threading.Event()

    def slow(args):
        goes_on.wait(30)
        return SimpleNamespace(shutdown=late.set)

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", slow)
    with pytest.raises(EngineError, match=r"vLLM did not start within 0\.1 s"):
        VLLMColocatedEngine(timeout_s=0.1).start(make_spec(tmp_path))
    assert not late.is_set()
    goes_on.set()
    assert late.wait(10)


def test_an_engine_that_was_not_started_says_so():
    with pytest.raises(EngineError, match="does not run: call start first"):
        asyncio.run(VLLMColocatedEngine().generate([1], SamplingParams(1.0, 4, seed=0)))


def test_an_adapter_folder_of_another_version_is_refused(tmp_path):
    with pytest.raises(EngineError, match="contains version none, and version 3 is required"):
        check_version_file(tmp_path, 3)
    (tmp_path / VERSION_FILE).write_text("2")
    with pytest.raises(EngineError, match="contains version 2, and version 3 is required"):
        check_version_file(tmp_path, 3)


class FakeLLM:
    """The calls of `AsyncLLM` that the engine uses. The logprob of an id is -id / 10, and `versions` overrides the newest."""

    errored = False

    def __init__(self) -> None:
        self.calls: list = []
        self.version = "-1"
        self.versions: list[str] = []

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def update_weight_version(self, version: str) -> None:
        self.version = version

    async def collective_rpc(self, method: str, args=()) -> None:
        self.calls.append(method)

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        return True

    async def add_lora(self, request) -> bool:
        self.calls.append(("add_lora", request.lora_name))
        return True

    async def generate(self, prompt, params, request_id, lora_request=None):
        self.calls.append((prompt["prompt_token_ids"], params, lora_request and lora_request.lora_name))
        version = self.versions.pop(0) if self.versions else self.version
        await asyncio.sleep(0.1)
        ids = [*prompt["prompt_token_ids"][1:], *params.logprob_token_ids]
        *entries, last = ({token: SimpleNamespace(logprob=-token / 10)} for token in ids)
        sampled = SimpleNamespace(logprobs=[last], finish_reason="length")
        sampled.weight_versions = [WeightVersionSpan(version, 0, 1)]
        yield SimpleNamespace(prompt_logprobs=[None, *entries], outputs=[sampled])

    def shutdown(self) -> None: ...


@pytest.fixture(params=["merge", "lora"])
def faked(request, monkeypatch, tmp_path):
    """An engine on `FakeLLM` that has loaded version 7."""
    llm = FakeLLM()
    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", lambda args: llm)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_colocated.log_to", lambda file: None)
    engine = VLLMColocatedEngine(sync_mode=request.param, timeout_s=20)
    engine.start(make_spec(tmp_path))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / VERSION_FILE).write_text("7")
    (folder / "adapter_config.json").write_text('{"r": 4}')
    asyncio.run(engine.load_weights(folder, 7))
    llm.calls.clear()
    yield engine, llm
    engine.close()


@pytest.fixture
def on_gpu(faked, monkeypatch):
    """The engine has started; from now on torch finds a GPU, so that an adapter may be scored too."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_an_adapter_on_a_cpu_is_not_scored(faked):
    engine, llm = faked
    if not engine.serves_lora:
        assert asyncio.run(engine.score([4, 5])) == (-0.5,)
        return
    with pytest.raises(EngineError, match='on a CPU: use sync_mode "merge" there'):
        asyncio.run(engine.score([4, 5]))
    assert not [call for call in llm.calls if isinstance(call, tuple)]


def test_a_score_is_of_the_served_adapter_and_has_a_logprob_for_each_id_after_the_first(faked, on_gpu):
    engine, llm = faked
    assert asyncio.run(engine.score([4, 5, 6])) == (-0.5, -0.6)
    ((prompt, params, adapter),) = [call for call in llm.calls if isinstance(call, tuple)]
    assert (prompt, params.logprob_token_ids) == ([4, 5], [6])
    assert adapter == ("policy" if engine.serves_lora else None)
    assert asyncio.run(engine.score([4])) == ()


def test_a_row_is_scored_again_if_older_weights_answered(faked, on_gpu):
    engine, llm = faked
    llm.versions = ["6"]
    assert asyncio.run(engine.score([4, 5])) == (-0.5,)
    assert len([call for call in llm.calls if isinstance(call, tuple)]) == 2


def test_requests_that_arrive_together_are_scheduled_together(faked, on_gpu):
    engine, llm = faked

    async def gather():
        return await asyncio.gather(*(engine.score([4, token]) for token in (5, 6, 7)))

    assert asyncio.run(gather()) == [(-0.5,), (-0.6,), (-0.7,)]
    assert llm.calls[0] == "pause"
    assert llm.calls.count("pause") == 1
