"""Checks of the policy's numbers on the device: its start-up checks, logprobs, gradients and objectives."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, PolicyOutput
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.objectives.presets import PRESETS
from fuchsia_pl.policy.loading import load_base
from fuchsia_pl.policy.policy import Policy, _check_head
from fuchsia_pl.policy.shared_prefix import enable_shared_prefix
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import here
from tests.gpu_check.models import (
    KINDS,
    backward,
    gradient,
    make_batch,
    make_policy,
    make_rows,
    relative,
    save_model,
)

HOST = torch.device("cpu")
EXACT = 1e-4  # largest difference between two computations in float32
ROUNDED = 0.05  # mean difference of logprobs in bfloat16, and one less the cosine of the gradients


def startup(findings: Findings) -> None:
    """Runs the checks of a policy's start with the weights on the device, and compares the verdicts with the CPU's."""
    machine = here(findings)
    with TemporaryDirectory() as folder:
        for kind in KINDS:
            model = save_model(Path(folder) / kind, machine, kind)
            verdicts = []
            for device in {HOST, machine.device}:
                base = load_base(model, getattr(torch, machine.dtype)).to(device)
                verdicts.append(enable_shared_prefix(base))
                _check_head(base)
            words = "its prefixes are shared" if all(verdicts) else f"shares prefixes: {verdicts} (CPU, device)"
            findings.require(len(set(verdicts)) == 1, f"{kind}: head as assumed, {words}")


def plain_logprobs(policy: Policy, batch: Batch) -> Tensor:
    """Logprobs of the sampled tokens by transformers' own forward and a whole log-softmax; computes the gradient."""
    policy.zero_grad(set_to_none=True)
    logits = policy.causal_lm(input_ids=batch.input_ids, use_cache=False).logits.float()
    every = torch.log_softmax(logits / batch.temperatures[:, None, None], dim=-1)
    logprobs = every.gather(2, batch.labels.unsqueeze(2)).squeeze(2)[batch.loss_mask]
    logprobs.sum().backward()
    return logprobs.detach()


def logprobs(findings: Findings) -> None:
    """Logprobs and gradients of the policy with shared prefixes, against a plain forward on the CPU."""
    machine = here(findings)
    rows = make_rows(2, 96, 32, 512)
    for number, row in enumerate(rows):
        row.rollout.temperature = 1.0 if number % 2 else 0.7
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder), machine, "qwen3")
        reference = make_policy(model, HOST, "float32", shared_prefix="never")
        expected = plain_logprobs(reference, make_batch(rows, False, HOST))
        slope = gradient(reference)
        policy = make_policy(model, machine.device, "float32", shared_prefix="always")
        found = backward(policy, make_batch(rows, True, machine.device), machine, "float32").cpu()
        findings.bar("float32: largest difference of logprobs", (found - expected).abs().max().item(), "<=", EXACT)
        findings.bar("float32: relative difference of gradients", relative(gradient(policy), slope), "<=", EXACT)
        if machine.dtype == "float32":
            findings.note("bfloat16: left out, this device computes in float32")
            return
        policy = make_policy(model, machine.device, "bfloat16", shared_prefix="always")
        found = backward(policy, make_batch(rows, True, machine.device), machine).cpu()
        cosine = torch.nn.functional.cosine_similarity(gradient(policy), slope, dim=0).item()
        findings.bar("bfloat16: mean difference of logprobs", (found - expected).abs().mean().item(), "<=", ROUNDED)
        findings.bar("bfloat16: cosine of gradients", cosine, ">=", 1 - ROUNDED)


def objectives(findings: Findings) -> None:
    """Loss and gradient of each preset from the same logprobs: on the device, and on the CPU in float64."""
    machine = here(findings)
    worst, worst_name = 0.0, ""
    for name in PRESETS:
        for beta in (0.0, 0.05):
            config = LossConfig(name, beta=beta)
            expected, slope = loss_on(config, HOST, torch.float64)
            loss, found = loss_on(config, machine.device, torch.float32)
            difference = max(abs(loss - expected) / max(abs(expected), 1e-3), relative(found, slope))
            if difference >= worst:
                worst, worst_name = difference, name
    text = f"{len(PRESETS)} presets, with and without KL: largest relative difference, that of {worst_name},"
    findings.bar(text, worst, "<=", EXACT)


def loss_on(config: LossConfig, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss of a micro-batch of 16 rows, and its gradient by logprob."""
    batch = make_batch(make_rows(2, 8, 24, 512), False, HOST)
    generator = torch.Generator().manual_seed(0)
    own, old, ref, entropies = (
        -torch.rand(batch.labels.shape, generator=generator).to(device, dtype) for _ in range(4)
    )
    own.requires_grad_(True)
    output = PolicyOutput(own, -entropies, None)
    loss = policy_loss(config, batch.to(device), output, old, old, ref).loss
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad.cpu().double().flatten()
