"""A checkpoint that is damaged or of another program is refused, and no code in it is run."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.policy.checksums import damage_of
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer
from tests.unit.policy.test_adapter import Touches


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """The checkpoint of a run of one step, and the module that wrote it."""
    root, module = tmp_path_factory.mktemp("saved"), make_module(tiny_model)
    trainer = make_trainer(root, max_steps=1)
    trainer.fit(module, datamodule=make_data(module))
    trainer.save_checkpoint(root / "x.ckpt")
    return root / "x.ckpt", module


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_read_with_all_of_its_weights(saved):
    path, module = saved
    state = read_checkpoint(path)["state_dict"]
    assert len(state) == 28
    for name, weight in module.named_parameters():
        assert name not in state or torch.equal(state[name], weight)


def test_what_is_no_checkpoint_is_refused_by_what_it_is(tmp_path):
    path = tmp_path / "x.ckpt"
    assert "does not exist: give the path of a checkpoints/last.ckpt, or `last`" in refusal(path)
    path.touch()
    assert "is empty" in refusal(path)
    path.write_text("hello")
    assert "is cut off, or is not a checkpoint of this program" in refusal(path)
    torch.save([1, 2], path)
    assert "is not a checkpoint: it holds a list" in refusal(path)
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 1, "global_step": 4}, path)
    assert "is not a checkpoint of this version of Fuchsia-PL: it has no loops" in refusal(path)
    (tmp_path / "folder").mkdir()
    assert "is a folder without .metadata, which FSDP2Strategy writes last" in refusal(tmp_path / "folder")


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_bytes_that_were_overwritten_are_always_met(saved, data):
    """4 KB at a random place, as after a bad block; and single bytes, some of them unused padding."""
    raw, broken = bytearray(saved[0].read_bytes()), saved[0].with_name("overwritten.ckpt")
    length = data.draw(st.sampled_from([4096, 4096, 1]))
    place = data.draw(st.integers(0, len(raw) - length))
    filler = data.draw(st.sampled_from([b"\0", b"\xff", b"x"])) * length
    raw[place : place + length] = filler
    broken.write_bytes(raw)
    if length == 1 and damage_of(bytes(raw)) is None:
        assert same(read_checkpoint(broken), read_checkpoint(saved[0]))  # unchanged, or padding
        return
    assert refusal(broken)
    with pytest.raises(ConfigError):
        AtomicCheckpointIO().load_checkpoint(broken, weights_only=True)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_no_code_of_a_file_is_run(tmp_path, write):
    path, touched = tmp_path / "x.ckpt", tmp_path / "touched"
    write({"state_dict": Touches(touched)}, path)
    assert "holds only tensors and plain values" in refusal(path)
    for index in (pickle.dumps(Touches(touched)), pickle.dumps({"state_dict_metadata": {}}), b"", b"\x80"):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(index)
        (folder / "meta.pt").touch()
        assert "its .metadata cannot be read" in refusal(folder)
    assert not touched.exists()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_a_tensor_that_is_dropped_renamed_reshaped_or_cut_off_is_always_refused(saved, data):
    whole = saved[0]
    broken = whole.with_name("broken.ckpt")
    what = data.draw(st.sampled_from(["dropped", "renamed", "reshaped", "cut off", "added"]))
    if what == "cut off":
        raw = whole.read_bytes()
        broken.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    else:
        checkpoint = torch.load(whole, weights_only=True)
        states = checkpoint["optimizer_states"][0]["state"]
        tensors = data.draw(st.sampled_from([checkpoint["state_dict"], *states.values()]))
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name] if what == "added" else tensors.pop(name)
        if what in ("renamed", "added"):
            tensors[f"{name}.x"] = tensor
        if what == "reshaped":
            tensors[name] = tensor.unsqueeze(data.draw(st.integers(0, tensor.ndim)))
        torch.save(checkpoint, broken)
    refusal(broken)


def test_a_checkpoint_without_an_optimizers_memory_of_one_weight_is_refused(saved):
    """Adam would restart that weight without an error."""
    checkpoint = torch.load(saved[0], weights_only=True)
    del checkpoint["optimizer_states"][0]["state"][3]
    broken = saved[0].with_name("forgetful.ckpt")
    torch.save(checkpoint, broken)
    assert "optimizer_0.state.3.exp_avg is missing" in refusal(broken)


def test_a_module_is_loaded_from_a_checkpoint(saved, tiny_model, tmp_path):
    path, module = saved
    for loaded in (
        GRPOModule.load_from_checkpoint(path),
        GRPOModule.load_from_checkpoint(str(path), policy=module.policy_config, loss=module.loss_config),
    ):
        assert loaded.policy_config == module.policy_config
        assert loaded.loss_config == module.loss_config
        assert loaded.loaded_step == 1
        found = dict(loaded.named_parameters())
        assert all(torch.equal(found[name], weight) for name, weight in module.named_parameters())
    other = PolicyConfig(str(tiny_model), "float32")  # of rank 16
    with pytest.raises(ConfigError, match="names or shapes differ"):
        GRPOModule.load_from_checkpoint(path, policy=other)
    with pytest.raises(ConfigError, match="does not exist"):
        GRPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
