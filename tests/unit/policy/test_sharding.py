from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.sharding import FSDP2Strategy, check_sharded, local, total_norm, whole
from fuchsia_pl.types import ConfigError


def test_the_bound_of_an_exchange_is_that_of_the_setting():
    assert FSDP2Strategy(timeout_s=5.0)._timeout == timedelta(seconds=5)
    with pytest.raises(ConfigError, match=r"timeout_s must be above 0, got 0"):
        FSDP2Strategy(timeout_s=0)


def test_what_is_not_sharded_is_whole_and_local_as_it_is():
    tensor = torch.tensor([3.0, 4.0])
    assert whole(tensor) is tensor
    assert local(tensor) is tensor
    # sqrt(3^2 + 4^2 + 12^2) = 13
    assert total_norm([tensor, torch.tensor([[12.0]])]).item() == pytest.approx(13.0)


def test_what_is_written_is_kept_by_the_rank_that_writes(monkeypatch):
    strategy, tensor = FSDP2Strategy(), torch.ones(3)
    for writes, num_kept in ((True, 3), (False, 0)):
        monkeypatch.setattr(FSDP2Strategy, "is_global_zero", writes)
        assert strategy._on_writer(tensor).numel() == num_kept


def test_weights_of_four_bits_are_not_sharded():
    sharded, copied = (SimpleNamespace(strategy=strategy) for strategy in (FSDP2Strategy(), DDPStrategy()))
    with pytest.raises(
        ConfigError, match=r'quantization="nf4" does not work with FSDP2Strategy.*constants\. Leave it out'
    ):
        check_sharded(sharded, PolicyConfig("", quantization="nf4"))
    check_sharded(copied, PolicyConfig("", quantization="nf4"))
    check_sharded(sharded, PolicyConfig(""))
