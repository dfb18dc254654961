"""Shared prefixes against plain rows: numbers, time, memory, and the attention kernels that torch chose."""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fuchsia_pl.batch import Batch
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.policy import Policy
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import Cost, Machine, cost, here, room
from tests.gpu_check.model import EXACT, ROUNDED
from tests.gpu_check.models import GROUP, backward, gradient, make_batch, make_policy, make_rows, relative, save_model

# Tokens of the sequence in which a prompt of half of them is computed once, and eight completions of an eighth of the rest each.
TOKENS = {"cuda": (512, 4096, 16_384), "cpu": (512, 1024, 2048)}
SIZES = {
    "cuda": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
}
WISHES = {"shared": "always", "plain": "never"}
ATTENTION = re.compile(r"attention|attn|flash|fmha|sdpa|flex|softmax", re.IGNORECASE)
OTHER = re.compile(r"log_?softmax|Backward0$", re.IGNORECASE)  # of the output head; autograd's frame around a kernel
NUM_KERNELS = 4


@dataclass(frozen=True)
class Measured:
    """What one way of computing the rows takes and gives; its attention kernels with their milliseconds, longest first."""

    cost: Cost
    logprobs: Tensor
    gradient: Tensor
    kernels: dict[str, float]

    @property
    def text(self) -> str:
        """Time and memory."""
        return f"{self.cost.seconds:.3f} s, {self.cost.peak}"


def shared_prefix(findings: Findings) -> None:
    """Compares both ways at three sizes. A size at which one runs out of memory is noted."""
    machine = here(findings)
    kind = machine.device.type
    with TemporaryDirectory() as folder:
        sizes = {**SIZES[kind], "num_hidden_layers": 4 if machine.is_gpu else 2}
        model = save_model(Path(folder), machine, "qwen3", **sizes)
        settings = {"checkpointing": CheckpointingSettings(enabled=True)}
        policies = {
            name: make_policy(model, machine.device, machine.dtype, shared_prefix=wish, **settings)
            for name, wish in WISHES.items()
        }
        kernels_before: dict[str, set[str]] = {}
        for tokens in TOKENS[kind]:
            rows = make_rows(1, tokens // 2, tokens // (2 * GROUP), 512)
            found: dict[str, Measured] = {}
            for name, policy in policies.items():
                with room(machine, findings, f"{tokens} tokens, {name} rows"):
                    batch = make_batch(rows, policy.shares_prefix, machine.device)
                    found[name] = measured(policy, batch, machine)
            report(findings, tokens, found, machine)
            for name, each in found.items():
                if each.kernels.keys() != kernels_before.get(name):  # another size may take other kernels
                    kernels_before[name] = set(each.kernels)
                    shown = ", ".join(f"{kernel} {time:.1f} ms" for kernel, time in each.kernels.items())
                    findings.note(f"attention kernels from {tokens} tokens on, {name}: {shown or 'none by name'}")


def measured(policy: Policy, batch: Batch, machine: Machine) -> Measured:
    """Time, memory, results and kernels of forward and backward."""
    taken = cost(machine, lambda: backward(policy, batch, machine))
    logprobs = backward(policy, batch, machine).cpu()
    return Measured(taken, logprobs, gradient(policy), kernels(policy, batch, machine))


def report(findings: Findings, tokens: int, found: dict[str, Measured], machine: Machine) -> None:
    """Adds the figures of one size."""
    if len(found) < len(WISHES):
        for name, each in found.items():
            findings.note(f"{tokens} tokens, {name}: {each.text}")
        return
    shared, plain = found["shared"], found["plain"]
    ratio = plain.cost.seconds / shared.cost.seconds
    # A plain row computes the prompt again: 8 (1/2 + 1/16) = 4.5 times the tokens.
    findings.require(
        ratio >= 1,
        f"{tokens} tokens: {shared.text}; plain rows {plain.text}: {ratio:.2f} times (>= 1; the tokens allow 4.5)",
        **{f"{name}_{tokens}_seconds": each.cost.seconds for name, each in found.items()},
        **{f"{name}_{tokens}_peak_bytes": each.cost.peak_bytes for name, each in found.items()},
    )
    difference = (shared.logprobs - plain.logprobs).abs()
    if machine.dtype == "float32":
        largest, slopes = difference.max().item(), relative(shared.gradient, plain.gradient)
        text = (
            f"{tokens} tokens: logprobs differ by {largest:.2g} at most, gradients by {slopes:.2g} (each <= {EXACT:g})"
        )
        findings.require(max(largest, slopes) <= EXACT, text, logprobs=largest, gradients=slopes)
    else:
        findings.bar(f"{tokens} tokens: mean difference of logprobs", difference.mean().item(), "<=", ROUNDED)


def kernels(policy: Policy, batch: Batch, machine: Machine) -> dict[str, float]:
    """The attention kernels with the most time in one forward and backward, and their milliseconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_gpu else [])]
    with profile(activities=activities) as profiler:
        backward(policy, batch, machine)
        machine.wait()
    kind = DeviceType.CUDA if machine.is_gpu else DeviceType.CPU
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        is_attention = ATTENTION.search(event.key) and not OTHER.search(event.key)
        if event.device_type == kind and is_attention:
            name = short(event.key)
            microseconds = event.self_device_time_total if machine.is_gpu else event.self_cpu_time_total
            times[name] = times.get(name, 0.0) + microseconds / 1000
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:NUM_KERNELS]
    return {name: times[name] for name in longest}


def short(name: str) -> str:
    """A kernel's name without templates, arguments and namespaces.

    >>> short("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4> >(Params)")
    'flash_fwd_kernel'
    >>> short("aten::_scaled_dot_product_flash_attention_for_cpu")
    '_scaled_dot_product_flash_attention_for_cpu'
    """
    return re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1].strip()
