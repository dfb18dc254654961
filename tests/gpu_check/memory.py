"""Checks of the policy's memory on the device: its output head, kept activations, weights in 4 bits."""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.logprobs import OutputHead, chunked_logprobs, fastest_chunk_tokens
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.policy import Policy
from tests.gpu_check.findings import Findings, NotHereError
from tests.gpu_check.machine import GIB, Cost, Machine, cost, gpu_here, here
from tests.gpu_check.model import EXACT, ROUNDED
from tests.gpu_check.models import (
    VOCABULARY,
    backward,
    gradient,
    make_batch,
    make_policy,
    make_rows,
    relative,
    save_model,
)

HEAD_TOKENS = {"cuda": 16_384, "cpu": 1024}


def head(findings: Findings) -> None:
    """Time, memory and numbers of the chunked output head."""
    machine = here(findings)
    number, width = HEAD_TOKENS[machine.device.type], 1024 if machine.is_gpu else 16
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, width, dtype=getattr(torch, machine.dtype)).mul_(width**-0.5).to(machine.device)
    hidden = torch.randn(number, width).to(machine.device, weight.dtype).requires_grad_(True)
    labels, ones = torch.arange(number, device=machine.device), torch.ones(number, device=machine.device)
    output = OutputHead(weight)
    chunk = fastest_chunk_tokens(output)

    found = torch.empty(number)

    def work() -> None:
        hidden.grad = None
        logprobs, entropies = chunked_logprobs(output, hidden, labels, ones, chunk)
        (logprobs.sum() + 0.1 * entropies.sum()).backward()
        found.copy_(logprobs.detach())

    taken, logits_bytes = cost(machine, work), 4 * number * VOCABULARY
    few = slice(0, 128)
    expected = torch.log_softmax(output.logits(hidden.detach()[few]), dim=1).gather(1, labels[few, None]).squeeze(1)
    findings.note(
        f"{number} tokens, width {width}: {taken.seconds:.2f} s, {taken.peak} beside weights; all logits "
        f"once in float32 would take {logits_bytes / GIB:.1f} GiB",
        seconds=taken.seconds,
        peak_bytes=taken.peak_bytes,
    )
    findings.bar("memory / one copy of all logits", taken.peak_bytes / logits_bytes, "<=", 0.5)
    allowed = EXACT if machine.dtype == "float32" else ROUNDED
    findings.bar("largest difference of logprobs", (found[few] - expected.cpu()).abs().max().item(), "<=", allowed)


def checkpointing(findings: Findings) -> None:
    """Kept bytes, memory, time and gradients with activations kept, recomputed and offloaded."""
    machine = here(findings)
    prompt, own = (1024, 384) if machine.is_gpu else (48, 16)
    rows, width = make_rows(1, prompt, own, 512), 1024 if machine.is_gpu else 96
    found: dict[str, tuple[Cost, int, Tensor]] = {}
    with TemporaryDirectory() as folder:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 12}
        model = save_model(Path(folder), machine, "qwen3", **sizes)
        for name, settings in {
            "off": CheckpointingSettings(),
            "on": CheckpointingSettings(enabled=True),
            "offloaded": CheckpointingSettings(enabled=True, cpu_offloading=True),
        }.items():
            policy = make_policy(model, machine.device, machine.dtype, checkpointing=settings)
            batch = make_batch(rows, policy.shares_prefix, machine.device)
            taken = cost(machine, lambda policy=policy, batch=batch: backward(policy, batch, machine))
            slope = gradient(policy)
            kept = resident(policy, batch, machine)
            found[name] = taken, kept, slope
            # A CPU has one memory, and two of autograd's hooks do not count the same tensors.
            shown = f"{kept / 2**20:.1f} MiB kept for backward, " if machine.is_gpu or name != "offloaded" else ""
            findings.note(
                f"{name}: {taken.seconds:.3f} s, {shown}peak {taken.peak}",
                seconds=taken.seconds,
                kept_bytes=kept,
                peak_bytes=taken.peak_bytes,
            )
    off, on, offloaded = found["off"], found["on"], found["offloaded"]
    findings.bar("kept with / without checkpointing", on[1] / off[1], "<=", 0.35)
    for name, each in (("on", on), ("offloaded", offloaded)):
        findings.bar(f"{name}: relative difference of gradients", relative(each[2], off[2]), "<=", 1e-3)
    if machine.is_gpu:
        findings.bar("kept on the GPU with / without offloading", offloaded[1] / on[1], "<=", 0.5)


def resident(policy: Policy, batch: Batch, machine: Machine) -> int:
    """Bytes on the GPU that a forward leaves for its backward; on a CPU, bytes that autograd saves."""
    policy.zero_grad(set_to_none=True)
    before, kept = machine.allocated(), KeptBytes(policy)
    with machine.autocast():
        if not machine.is_gpu:
            with kept:
                policy.output(batch)
            return kept.num_bytes
        output = policy.output(batch)
    taken = machine.allocated() - before
    del output
    return taken


def four_bits(findings: Findings) -> None:
    """Size, logprobs and gradients of a policy whose frozen weights have 4 bits."""
    machine = gpu_here(findings)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHereError("needs bitsandbytes, which is not installed")
    rows = make_rows(1, 96, 32, 512)
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder), machine, "qwen3", hidden_size=512, intermediate_size=1536)
        plain = make_policy(model, machine.device, machine.dtype)
        packed = make_policy(model, machine.device, machine.dtype, quantization="nf4")
        sizes = [sum(p.nbytes for p in policy.parameters() if not p.requires_grad) for policy in (plain, packed)]
        found = [
            backward(policy, make_batch(rows, policy.shares_prefix, machine.device), machine)
            for policy in (plain, packed)
        ]
        findings.bar("frozen weights in 4 bits / 16 bits, embeddings included", sizes[1] / sizes[0], "<=", 0.5)
        findings.bar("mean difference of logprobs", (found[0] - found[1]).abs().mean().item(), "<=", 0.5)
        has_all = all(p.grad is not None for p in packed.trainable_parameters())
        findings.require(has_all, "every factor of the adapter has a gradient")
