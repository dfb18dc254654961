from types import SimpleNamespace

import pytest
import torch

from fuchsia_pl.callbacks.lost_rank import LostRank

GLOO = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1")


def notes(root, exception: BaseException, world_size: int = 2) -> str:
    trainer = SimpleNamespace(world_size=world_size, global_rank=1, default_root_dir=str(root))
    LostRank().on_exception(trainer, None, exception)
    return "".join(exception.__dict__.get("__notes__", []))


@pytest.mark.parametrize("make", [lambda: RuntimeError(*GLOO.args), lambda: torch.distributed.DistBackendError("NCCL")])
def test_a_lost_exchange_is_explained(tmp_path, make):
    assert "Rank 1 of 2 lost another" in notes(tmp_path, make())
    assert "no checkpoint was saved yet" in notes(tmp_path, make())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert "continue with --ckpt_path" in notes(tmp_path, make())


def test_other_errors_and_single_ranks_are_left_alone(tmp_path):
    assert notes(tmp_path, RuntimeError("shapes differ")) == ""
    assert notes(tmp_path, RuntimeError(*GLOO.args), world_size=1) == ""
