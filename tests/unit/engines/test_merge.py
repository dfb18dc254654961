import json

import pytest
import torch
from safetensors.torch import save_file

from fuchsia_pl.engines.merge import checkpoint_weights, merged_weights
from fuchsia_pl.engines.vllm_worker import WorkerExtension

# W = identity, A = (1 2), B = (3, 4)^T: BA = [[3, 6], [4, 8]]
WEIGHT = torch.eye(2)
FACTORS = {"lora_A.weight": torch.tensor([[1.0, 2.0]]), "lora_B.weight": torch.tensor([[3.0], [4.0]])}


def write(tmp_path, layer: str = "model.layers.0.q_proj", **config):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(
        {"model.layers.0.q_proj.weight": WEIGHT.bfloat16(), "model.norm.weight": torch.ones(2)}, base / "m.safetensors"
    )
    factors = {f"base_model.model.{layer}.{name}": tensor for name, tensor in FACTORS.items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 2, "use_rslora": False, **config}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


@pytest.mark.parametrize(
    ("use_rslora", "scale"),
    [(False, 0.5), (True, 1.0)],  # 2 / 4, and 2 / sqrt(4)
)
def test_merged_by_hand(tmp_path, use_rslora, scale):
    merged = dict(merged_weights(*write(tmp_path, use_rslora=use_rslora)))
    expected = torch.tensor([[1 + 3 * scale, 6 * scale], [4 * scale, 1 + 8 * scale]])
    assert merged["model.layers.0.q_proj.weight"].dtype == torch.float32  # the engine rounds it
    assert torch.equal(merged["model.layers.0.q_proj.weight"].float(), expected)
    assert torch.equal(merged["model.norm.weight"], torch.ones(2))


def test_a_block_that_the_adapter_reaches_is_whole_and_others_can_be_left_out(tmp_path):
    base, adapter = write(tmp_path)
    names = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.10.q_proj", "embed_tokens"]
    save_file({f"model.{name}.weight": WEIGHT.clone() for name in names}, base / "m.safetensors")
    found = dict(merged_weights(base, adapter, only_reached=True))
    assert found.keys() == {"model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight"}
    whole = dict(merged_weights(base, adapter))
    assert whole.keys() == {f"model.{name}.weight" for name in names}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def test_an_adapted_weight_outside_of_the_blocks_is_reached(tmp_path):
    base, adapter = write(tmp_path, layer="model.project_in")
    save_file({f"model.{name}.weight": WEIGHT.clone() for name in ("project_in", "norm")}, base / "m.safetensors")
    assert dict(merged_weights(base, adapter, only_reached=True)).keys() == {"model.project_in.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_checkpoint_is_left_as_it_is(tmp_path, monkeypatch, dtype):
    base, adapter = write(tmp_path)
    held = {"model.layers.0.q_proj.weight": WEIGHT.to(dtype, copy=True)}  # as if every pass found the same memory
    monkeypatch.setattr("fuchsia_pl.engines.merge.checkpoint_weights", lambda folder: iter(held.items()))
    for _ in range(2):
        merged = dict(merged_weights(base, adapter))
    assert torch.equal(held["model.layers.0.q_proj.weight"], WEIGHT.to(dtype))
    assert merged["model.layers.0.q_proj.weight"][0, 1] == 3.0  # once merged, not twice


def test_an_adapter_for_a_layer_that_the_checkpoint_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no weights for these parts of the adapter.*k_proj"):
        list(merged_weights(*write(tmp_path, layer="model.layers.0.k_proj")))


def test_whole_weights_pass_as_they_are(tmp_path):
    base, _ = write(tmp_path)
    merged = dict(merged_weights(tmp_path / "unused", base))
    assert torch.equal(merged["model.layers.0.q_proj.weight"], WEIGHT.bfloat16())


def test_files_that_the_index_does_not_list_are_left_alone(tmp_path):
    base, _ = write(tmp_path)
    save_file({"tok_embeddings.weight": torch.ones(1)}, base / "consolidated.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "m.safetensors"}})
    )
    assert "tok_embeddings.weight" not in dict(checkpoint_weights(base))


def test_transposed_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        list(merged_weights(*write(tmp_path, fan_in_fan_out=True)))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        list(checkpoint_weights(tmp_path))


def test_sums_are_on_the_given_device_and_other_weights_where_they_are(tmp_path):
    merged = dict(merged_weights(*write(tmp_path), device="meta"))
    places = {name: (tensor.device.type, tensor.dtype) for name, tensor in merged.items()}
    assert places == {
        "model.layers.0.q_proj.weight": ("meta", torch.float32),
        "model.norm.weight": ("cpu", torch.float32),
    }


def test_a_worker_computes_on_its_own_device(tmp_path):
    class Worker(WorkerExtension):
        device = torch.device("meta")

        def reload_weights(self, weights_iterator):
            self.loaded = {name: tensor.device.type for name, tensor in weights_iterator}

    worker, (base, adapter) = Worker(), write(tmp_path)
    worker.load_trained_weights(str(base), str(adapter), only_reached=True)
    assert worker.loaded == {"model.layers.0.q_proj.weight": "meta"}
