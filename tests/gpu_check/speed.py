"""Seconds and memory of an optimizer step of models with the shapes of published ones and random weights."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import GIB, cost, here
from tests.gpu_check.models import GROUP, backward, make_batch, make_policy, make_rows, save_shape

# Prompts, tokens of a prompt, tokens of a completion. With eight completions a prompt: 16,384 tokens in all; on a CPU 128.
WORK = {"cuda": (8, 256, 224), "cpu": (1, 32, 12)}
# On a CPU the widths are those of the shape, and layers and vocabulary are fewer.
CPU_SIZES = {"num_hidden_layers": 1, "vocab_size": 8192}
ANCHOR = "13.3k tokens per second and 5.1 GiB were measured for 0.6B with LoRA on an H100, 16k tokens"


def speed(findings: Findings, shape: str) -> None:
    """One micro-batch forward and backward with checkpointing, and a step of AdamW."""
    machine = here(findings)
    num_prompts, prompt, own = WORK[machine.device.type]
    sizes = {} if machine.is_gpu else CPU_SIZES
    with TemporaryDirectory() as folder:
        settings = {"checkpointing": CheckpointingSettings(enabled=True), "lora": LoRASettings(r=16, alpha=32)}
        model = save_shape(Path(folder), machine, shape, **sizes)
        policy = make_policy(model, machine.device, machine.dtype, shared_prefix="always", **settings)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5)
    rows = make_rows(num_prompts, prompt, own, sizes.get("vocab_size", 150_000))
    batch = make_batch(rows, True, machine.device)

    def step() -> None:
        backward(policy, batch, machine)
        optimizer.step()

    taken = cost(machine, step)
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    tokens = num_prompts * (prompt + GROUP * own)
    findings.note(
        f"{tokens} tokens ({num_prompts} x {GROUP} rows, prompt {prompt}, completion {own}) in {taken.seconds:.2f} s: "
        f"{tokens / taken.seconds:,.0f} tokens per second",
        tokens_per_second=tokens / taken.seconds,
    )
    findings.note(
        f"{sum(p.numel() for p in policy.parameters()) / 1e6:.0f} M weights, {weights / GIB:.2f} GiB; "
        f"beside them at the peak {taken.peak}",
        weights_bytes=weights,
        peak_bytes=taken.peak_bytes,
    )
    if machine.is_gpu and shape == "0.6B":
        findings.note(ANCHOR)
    if not machine.is_gpu:
        findings.note(f"scaled down: layers {CPU_SIZES['num_hidden_layers']}, vocabulary {CPU_SIZES['vocab_size']}")
