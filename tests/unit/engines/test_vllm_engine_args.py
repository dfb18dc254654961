"""Arguments of vLLM that a user gives: their names, and those that are refused because they would change what is sampled."""

import dataclasses
import subprocess
import sys

import pytest

from fuchsia_pl.engines import vllm_engine_args
from fuchsia_pl.engines.vllm_arguments import VLLMSettings, vllm_arguments
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.engines.vllm_engine_args import REFUSED, argument_names, check_engine_args
from fuchsia_pl.types import ConfigError, ServedModel

PASSED_ON = {
    "attention_backend": "FLASH_ATTN",
    "async_scheduling": False,
    "block_size": 64,
    "compilation_config": {"cudagraph_mode": "PIECEWISE"},
    "cpu_offload_gb": 4,
    "cudagraph_capture_sizes": [1, 2, 4],
    "kv_cache_dtype": "fp8",
    "max_num_batched_tokens": 4096,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}


def refused(**engine_args) -> str:
    with pytest.raises(ConfigError) as caught:
        check_engine_args(engine_args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_names_are_the_fields_of_vllms_class():
    from vllm import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert argument_names() == {name for name in fields if not name.startswith("_")}
    assert fields >= REFUSED.keys() | PASSED_ON.keys()


def test_the_names_are_found_without_an_import_of_vllm():
    code = (
        "import sys; from fuchsia_pl.engines.vllm_engine_args import argument_names; "
        "assert len(argument_names()) > 200; sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_people_need_is_passed_on():
    check_engine_args(PASSED_ON)


def test_an_unknown_name_is_answered_with_near_ones():
    assert refused(speculative_confg={}) == (
        "data.engine.init_args.engine_args.speculative_confg is no argument of vLLM: did you mean speculative_config or "
        "compilation_config?"
    )
    assert refused(qqqq=1).endswith("qqqq is no argument of vLLM: see `vllm.AsyncEngineArgs` for the names")
    assert "dtype is decided by" in refused(dtype="float16")
    assert " dtype" not in refused(dtypes="float16"), "a refused name is no advice"


def test_without_vllm_only_the_refused_names_are_checked(monkeypatch):
    monkeypatch.setattr(vllm_engine_args, "argument_names", frozenset)
    check_engine_args({"qqqq": 1})
    assert "is decided by seed_everything: leave it out" in refused(seed=3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("quantization", "is decided by data.engine.init_args.quantization"),
        ("logits_processors", "would make the engine sample from another distribution than the policy's"),
        ("override_generation_config", "would make the engine sample from another distribution than the policy's"),
        ("hf_overrides", "would make the engine load another model than the trainer"),
        ("kv_transfer_config", "would keep keys and values of older weights"),
        ("data_parallel_size", "would use devices of other ranks"),
        ("trust_remote_code", "would run a checkpoint's own code"),
        ("enable_prefix_caching", "has one value that works here"),
    ],
)
def test_what_would_change_the_run_is_refused_with_the_reason(name, reason):
    assert refused(**{name: 1}).startswith(f"data.engine.init_args.engine_args.{name} {reason}")
    with pytest.raises(ConfigError, match=f"engine_args.{name}"):
        VLLMColocatedEngine(engine_args={name: 1})


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "cpu_offload_gb"])
@pytest.mark.parametrize("value", ["8k", None, True])
def test_a_size_is_a_number(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a number, got {value!r}"):
        check_engine_args({name: value})


def test_drafts_are_verified_exactly():
    for method in ("standard", "block"):
        check_engine_args({"speculative_config": {"method": "ngram", "rejection_sample_method": method}})
    assert "must be one of standard, block, got 'synthetic'" in refused(
        speculative_config={"rejection_sample_method": "synthetic"}
    )


def test_every_argument_that_is_set_here_is_refused_but_two_sizes(tmp_path):
    settings = VLLMSettings(1.0, 8, enforce_eager=True, quantization=None, tensor_parallel_size=1)
    model = ServedModel("m", "float32", 4, lambda name: tmp_path)
    own = vllm_arguments(settings, model, max_length=64, seed=0, kv_cache_gb=1.0).keys()
    own |= {"enable_lora", "max_loras", "worker_extension_cls", "enable_sleep_mode", "weight_transfer_config"}
    assert own - REFUSED.keys() == {"max_num_batched_tokens", "block_size"}
