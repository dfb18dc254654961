"""What this machine computes in: bfloat16 as the configs have it, float32 where the CPU has no instructions for that."""

import torch

from fuchsia_pl.policy.cpu import has_bfloat16

HAS_BFLOAT16 = torch.cuda.is_available() or has_bfloat16(torch.cpu.get_capabilities())
DTYPE = "bfloat16" if HAS_BFLOAT16 else "float32"
FLOAT32_VARIABLE = "FUCHSIA_TEST_FLOAT32"  # 1 runs tests with engines where it is slow
# Added to the commands of real models.
OVERLAY = [] if HAS_BFLOAT16 else ["--config", "overlays/float32.yaml"]
