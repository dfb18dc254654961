"""Detects number formats that a CPU computes slowly."""

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)


def has_bfloat16(capabilities: Mapping[str, object]) -> bool:
    """Whether a CPU multiplies bfloat16 matrices about as fast as float32 ones, or faster.

    With AVX2 only, oneDNN has no kernels for bfloat16: measured 0.9 GFLOP/s, against 85 in float32.

    Args:
        capabilities: Names of instruction sets, as in `torch.cpu.get_capabilities()`.

    >>> has_bfloat16({"avx2": True, "avx512_bf16": False}), has_bfloat16({"amx_bf16": True}), has_bfloat16({"avx512_bw": True})
    (False, True, True)
    """
    return any(bool(is_there) and ("bf16" in name or name == "avx512_bw") for name, is_there in capabilities.items())


def warn_of_slow_bfloat16(device: torch.device, dtype: str, precision: str | int) -> None:
    """Logs a warning if a run computes in bfloat16 on a CPU without instructions for it.

    Args:
        device: The trainer's device.
        dtype: `model.policy.dtype`, of the frozen weights and of the engine.
        precision: `trainer.precision`.
    """
    if device.type != "cpu" or has_bfloat16(torch.cpu.get_capabilities()):
        return
    if dtype != "float32" or "32" not in str(precision):
        logger.warning(
            "this CPU has no instructions for bfloat16, and with model.policy.dtype=%s and trainer.precision=%s a run takes "
            "about 90 times as long as in float32: add --config overlays/float32.yaml (or --model.policy.dtype float32 "
            "--trainer.precision 32-true; in Python, PolicyConfig(dtype='float32') and Trainer(precision='32-true'))",
            dtype,
            precision,
        )
