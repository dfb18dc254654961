import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fuchsia_pl.engines import vllm_kv_cache
from fuchsia_pl.engines.vllm_arguments import GIB, VLLMSettings
from fuchsia_pl.engines.vllm_kv_cache import auto_kv_cache_gb, blank_model, overhead_gb, weights_gb
from fuchsia_pl.types import ConfigError


def test_what_is_left_goes_to_keys_and_values():
    """5 % of 24 GiB are 1.2: 20 - 9 - 3 - 2.5 - 1.2 = 4.3."""
    assert auto_kv_cache_gb(20.0, 24.0, reserved_gb=9.0, weights_gb=3.0, overhead_gb=2.5) == 4.3
    assert auto_kv_cache_gb(20.0, 24.0, reserved_gb=9.06, weights_gb=3.0, overhead_gb=2.5) == 4.2


def test_a_full_device_is_one_line_with_what_fills_it():
    with pytest.raises(ConfigError) as caught:
        auto_kv_cache_gb(20.0, 24.0, reserved_gb=13.2, weights_gb=3.0, overhead_gb=2.5)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "of 20.0 GiB the trainer needs 13.2, vLLM's weights 3.0 and its other memory 2.5, and 1.2 stay free" in message
    )


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return blank_model(str(folder))


# A block: q 8 x 8, k and v 4 x 8 each, o 8 x 8, gate and up 24 x 8 each, down 8 x 24; two of them.
IN_BLOCKS = 2 * (64 + 32 + 32 + 64 + 3 * 192)


def test_weights_are_counted_once_and_those_of_blocks_are_quantized(model):
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    copies = 1 if model.config.tie_word_embeddings else 2
    rest = copies * 100 * 8 + 5 * 8  # embeddings, and two norms per block and the last one
    assert weights_gb(model, "bfloat16", is_quantized=False) * GIB == 2 * (IN_BLOCKS + rest)
    assert weights_gb(model, "float32", is_quantized=False) * GIB == 4 * (IN_BLOCKS + rest)
    assert weights_gb(model, "bfloat16", is_quantized=True) * GIB == IN_BLOCKS + 2 * rest


def test_other_memory_is_of_context_graphs_buffers_and_activations(model, monkeypatch):
    for name in ("CONTEXT_GB", "WORKSPACE_GB", "GRAPHS_GB"):
        monkeypatch.setattr(vllm_kv_cache, name, 0.0)
    settings = VLLMSettings("auto", max_num_seqs=16, enforce_eager=False, quantization=None, tensor_parallel_size=1)
    logits = 16 * 100 * 3 * 4
    activations = 50 * (3 * 24 + 2 * 8) * 2
    assert overhead_gb(model, "bfloat16", 0, 50, settings) * GIB == pytest.approx(logits + activations)
    # Inputs plus outputs: q and o 16, k and v 12, gate, up and down 32.
    buffers = 4 * 2 * (2 * 16 + 2 * 12 + 3 * 32) * 2
    assert overhead_gb(model, "bfloat16", 4, 50, settings) * GIB == pytest.approx(logits + activations + buffers)
    monkeypatch.setattr(vllm_kv_cache, "GRAPHS_GB", 1.0)
    eager = VLLMSettings("auto", 16, enforce_eager=True, quantization=None, tensor_parallel_size=1)
    assert overhead_gb(model, "bfloat16", 0, 50, settings) - overhead_gb(
        model, "bfloat16", 0, 50, eager
    ) == pytest.approx(1.0)
