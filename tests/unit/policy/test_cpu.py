"""A warning at the start on a CPU that is slow in bfloat16."""

import logging

import pytest
import torch

from fuchsia_pl.policy.cpu import warn_of_slow_bfloat16

AVX2 = {"avx2": True, "avx512_bf16": False, "avx512_bw": False}


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "capabilities", "warns"),
    [
        ("cpu", "bfloat16", "bf16-mixed", AVX2, True),
        ("cpu", "float32", "bf16-mixed", AVX2, True),
        ("cpu", "bfloat16", "32-true", AVX2, True),
        ("cpu", "float32", "32-true", AVX2, False),
        ("cuda", "bfloat16", "bf16-mixed", AVX2, False),
        ("cpu", "bfloat16", "bf16-mixed", {"avx2": True, "avx512_bf16": True}, False),
        ("cpu", "bfloat16", "bf16-mixed", {"bf16": True}, False),  # the name on ARM
    ],
)
def test_where_it_is_told(monkeypatch, caplog, device, dtype, precision, capabilities, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with caplog.at_level(logging.WARNING):
        warn_of_slow_bfloat16(torch.device(device), dtype, precision)
    assert ("overlays/float32.yaml" in caplog.text) == warns
