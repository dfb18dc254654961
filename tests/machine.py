"""Number format of tests on this machine: bfloat16 as in the configs, float32 on a CPU without instructions for it."""

import torch

from fuchsia_pl.policy.cpu import has_bfloat16

HAS_BFLOAT16 = torch.cuda.is_available() or has_bfloat16(torch.cpu.get_capabilities())
DTYPE = "bfloat16" if HAS_BFLOAT16 else "float32"
# With AMX, vLLM rounds products in bfloat16 differently with the number and the order of the rows that it computes together.
ROUNDS_BY_BATCH = bool(torch.cpu.get_capabilities().get("amx_bf16")) and not torch.cuda.is_available()
FLOAT32_VARIABLE = "FUCHSIA_TEST_FLOAT32"  # "1" also runs tests with engines where bfloat16 is slow
# Options that are added to commands with real models.
OVERLAY = [] if HAS_BFLOAT16 else ["--config", "overlays/float32.yaml"]
