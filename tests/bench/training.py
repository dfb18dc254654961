"""Forward and backward: shared prefixes against plain rows, tensors saved for backward, and memory by vocabulary size."""

import random
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fuchsia_pl.batch import Batch, StepInfo
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.samples import Sample
from tests.bench.work import MARK, MODEL, model_folder, report
from tests.doubles import make_sample

NUM_ROUNDS, GROUP, VOCABULARY = 5, 8, 150_000


def rows(num_prompts: int, prompt_tokens: int, own_tokens: int, vocabulary: int = 49_000) -> list[Sample]:
    """Siblings with random ids and given lengths."""
    rng = random.Random(0)
    samples = []
    for item in range(num_prompts):
        prompt = [rng.randrange(3, vocabulary) for _ in range(prompt_tokens)]
        for _ in range(GROUP):
            sample = make_sample(prompt, [rng.randrange(3, vocabulary) for _ in range(own_tokens)], 1.0)
            sample.rollout.item_index = item
            samples.append(sample)
    return samples


def make_policy(shares_prefix: bool, dtype: str = "bfloat16", folder: str | None = None, **settings: object) -> Policy:
    torch.manual_seed(0)
    config = PolicyConfig(MODEL, dtype, shared_prefix="always" if shares_prefix else "never", **settings)
    policy = Policy(config, folder or model_folder(), with_reference=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy.train()


def batches_of(policy: Policy, samples: list[Sample], number: int) -> list[Batch]:
    parts = split_balanced(samples, number, policy.shares_prefix)
    return make_batches(parts, StepInfo(0, count_denominators(samples, 1), 0))


def run(policy: Policy, batches: list[Batch], precision: torch.dtype = torch.bfloat16) -> dict[int, Tensor]:
    """Runs forward and backward; returns the logprobs of each rollout by its id."""
    found = {}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            logprobs = policy.output(batch).logprobs
        (logprobs * batch.loss_mask).sum().backward()
        for sample, row, mask in zip(batch.samples, logprobs.detach(), batch.loss_mask, strict=True):
            found[id(sample)] = row[mask]
    return found


def seconds(rows_by_name: dict[str, list[Sample]], num_micro_batches: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds for some rows, measured alternately: with shared prefixes under the name "shared", else as plain rows."""
    found: dict[str, list[float]] = {name: [] for name in rows_by_name}
    policies = {shares: make_policy(shares, str(dtype).removeprefix("torch.")) for shares in (True, False)}
    for _ in range(NUM_ROUNDS + 1):
        for name, samples in rows_by_name.items():
            policy = policies[name == "shared"]
            batches, start = batches_of(policy, samples, num_micro_batches), time.perf_counter()
            run(policy, batches, dtype)
            found[name].append(time.perf_counter() - start)
    return {name: median(each[1:]) for name, each in found.items()}


def prefix_figures(dtype: torch.dtype, ending: str) -> dict[str, float]:
    """Seconds for short and long completions, and for plain rows of as many tokens as the short ones have with shared prefixes.

    Products are slower per token the fewer tokens there are: the last rows show what this machine allows.
    """
    short, long = rows(8, 40, 24), rows(1, 150, 200)
    of_short = seconds({"shared": short, "plain": short, "as_many": rows(8, 40 // GROUP, 24)}, 2, dtype)
    of_long = seconds({"shared": long, "plain": long}, 1, dtype)
    parts = {"short": of_short, "long": of_long}
    return {f"{name}_{size}{ending}": value for size, found in parts.items() for name, value in found.items()}


def differences() -> tuple[float, float]:
    """Largest difference of logprobs, and relative difference of the whole gradient, in float32."""
    samples = rows(2, 40, 24)
    logprobs, gradients = [], []
    for shares in (True, False):
        policy = make_policy(shares, "float32")
        logprobs.append(run(policy, batches_of(policy, samples, 1), torch.float32))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]))
    largest = max((logprobs[0][key] - logprobs[1][key]).abs().max().item() for key in logprobs[0])
    return largest, ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def kept_bytes(enabled: bool) -> int:
    """Bytes that autograd saves for the backward of one micro-batch."""
    policy = make_policy(True, checkpointing=CheckpointingSettings(enabled=enabled))
    (batch,) = batches_of(policy, rows(4, 40, 24), 1)
    kept = KeptBytes(policy)
    with kept, torch.autocast("cpu", torch.bfloat16):
        policy.output(batch)
    return kept.num_bytes


def vocabulary_peak(num_tokens: int) -> float:
    """Peak memory in GB of a process that trains a small model with a large vocabulary on a number of tokens."""
    command = [sys.executable, "-m", "tests.bench.training", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return float(next(line for line in done.stdout.splitlines() if line.startswith(MARK)).removeprefix(MARK))


def train_with_large_vocabulary(num_tokens: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        policy = Policy(PolicyConfig("", lora=LoRASettings(r=4, alpha=8)), folder, with_reference=False)
    run(policy, batches_of(policy, rows(1, 16, num_tokens // GROUP, VOCABULARY), 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(f"{MARK}{peak}\n")


def main() -> None:
    if len(sys.argv) > 1:
        train_with_large_vocabulary(int(sys.argv[1]))
        return
    figures = prefix_figures(torch.bfloat16, "") | prefix_figures(torch.float32, "_float32")
    logprob_difference, gradient_difference = differences()
    report(
        **figures,
        logprob_difference=logprob_difference,
        gradient_difference=gradient_difference,
        kept_gb=kept_bytes(False) / 2**30,
        kept_checkpointed_gb=kept_bytes(True) / 2**30,
        peak_1024_gb=vocabulary_peak(1024),
        peak_8192_gb=vocabulary_peak(8192),
    )


if __name__ == "__main__":
    main()
