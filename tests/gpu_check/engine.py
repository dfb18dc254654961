"""Engines against the trainer on the device: start, burst, syncs, sleep and wake."""

import asyncio
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fuchsia_pl.batch import Batch
from fuchsia_pl.engines.base import VERSION_FILE, Engine, EngineSpec, SamplingParams
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.policy.agreement import adapter_agreement
from fuchsia_pl.policy.config import LoRASettings
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, Rollout, ServedModel, Turn
from tests.doubles import TinyEngine
from tests.gpu_check.findings import Findings, NotHereError
from tests.gpu_check.machine import GIB, Machine, gpu_here, here
from tests.gpu_check.models import make_batch, make_policy, perturb, save_model
from tests.gpu_check.training import WORDS

RANK, KV_CACHE_GB, MAX_LENGTH = 8, 2.0, 512
MIN_FREED_GIB = 0.9 * KV_CACHE_GB
MAX_DRIFT_GIB = 0.25  # between the free memory of one turn and the next
NUM_SYNCS, NUM_SLEEPS, NUM_COMPARED = 3, 2, 4
PROMPT_TOKENS, OWN_TOKENS = 24, 16
# Largest mean |trainer logprob - sampling logprob|.
GAPS = {"float32": 1e-3, "bfloat16": 0.1}
FP8_GAP = 0.3


def scripted(findings: Findings) -> None:
    """The cycle with an engine of the unit tests, which samples on the CPU from merged weights."""
    machine = here(findings)
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", machine, **WORDS)
        Cycle(findings, machine, TinyEngine(), model, GAPS[machine.dtype]).run(burst=4)


def vllm(findings: Findings, mode: str, is_eager: bool, quantization: str | None = None) -> None:
    """The cycle with vLLM beside the trainer."""
    machine = here(findings) if quantization is None else gpu_here(findings)
    check_vllm()
    if not machine.is_gpu and not findings.is_named:
        raise NotHereError("on a CPU tests/integration/test_engine.py does this; named with --only it is run here too")
    engine = VLLMColocatedEngine(
        mode,
        kv_cache_gb=KV_CACHE_GB,
        max_num_seqs=64,
        enforce_eager=is_eager,
        quantization=quantization,
        timeout_s=240,
    )
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", machine, **WORDS)
        allowed = GAPS[machine.dtype] if quantization is None else FP8_GAP
        Cycle(findings, machine, engine, model, allowed).run(burst=64)


def check_vllm() -> None:
    """Ends a check that needs vLLM where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise NotHereError("vLLM is not installed")


class Cycle:
    """An engine and the policy that is synced to it, through all that a run does with an engine.

    Args:
        findings: Where the figures go.
        machine: The trainer's device.
        engine: An engine that does not run yet.
        model: Folder of the model.
        allowed_gap: Largest mean difference of logprobs between trainer and engine.
    """

    def __init__(self, findings: Findings, machine: Machine, engine: Engine, model: Path, allowed_gap: float) -> None:
        self.findings, self.machine, self.engine = findings, machine, engine
        self.model, self.allowed_gap = model, allowed_gap
        lora = LoRASettings(r=RANK, alpha=2 * RANK)
        self.policy: Policy = make_policy(model, machine.device, machine.dtype, lora=lora).eval()
        self.version = 0

    def run(self, burst: int) -> None:
        """Starts the engine, takes it through the cycle, and closes it."""
        index = 0 if self.machine.is_gpu else None
        served = ServedModel(str(self.model), self.machine.dtype, RANK, Path)
        log, start = self.model.with_name("engine.log"), time.perf_counter()
        self.engine.start(EngineSpec(served, MAX_LENGTH, 0, log, device_index=index, sleeps=True))
        try:
            self.findings.note(f"start {time.perf_counter() - start:.1f} s", start_s=time.perf_counter() - start)
            self.sync()
            self.burst(burst)
            for number in range(1, NUM_SYNCS + 1):
                self.sync()
                self.compare(f"sync {number}")
            self.sleeps()
        finally:
            self.engine.close()

    def sync(self) -> None:
        """Changes the adapter and loads it into the engine."""
        self.version += 1
        perturb(self.policy, self.version, scale=0.05)
        folder = self.model.with_name(f"version-{self.version}")
        self.policy.save_trained(folder)
        (folder / VERSION_FILE).write_text(str(self.version))
        asyncio.run(self.engine.load_weights(folder, self.version))

    def sample(self, number: int) -> list[tuple[list[int], Completion]]:
        """Completions of random prompts, requested together."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = WORDS["vocab_size"]
        prompts = torch.randint(4, vocabulary, (number, PROMPT_TOKENS), generator=generator).tolist()

        async def gather() -> Sequence[Completion]:
            params = (SamplingParams(1.0, OWN_TOKENS, seed) for seed in range(number))
            return await asyncio.gather(*map(self.engine.generate, prompts, params))

        return list(zip(prompts, asyncio.run(gather()), strict=True))

    def burst(self, number: int) -> None:
        """Requests many completions at the same time."""
        start = time.perf_counter()
        counts = [len(completion.token_ids) for _, completion in self.sample(number)]
        seconds = time.perf_counter() - start
        rate = sum(counts) / seconds
        text = f"burst: {sum(counts)} tokens of {number} requests, {rate:,.0f} per second"
        self.findings.require(min(counts) > 0, text, tokens_per_second=rate)

    def compare(self, when: str) -> None:
        """Compares the engine's logprobs, and the adapter's effect on them, with the trainer's."""
        pairs = self.sample(NUM_COMPARED)
        versions = {completion.policy_version for _, completion in pairs}
        batch = batch_of(pairs).to(self.machine.device)
        mask = batch.loss_mask
        with torch.no_grad(), self.machine.autocast():
            own, reference = self.policy.output(batch).logprobs[mask], self.policy.reference_logprobs(batch)[mask]
        sampled = batch.sampling_logprobs[mask]
        agreement = adapter_agreement(own, reference, sampled)
        gap = (own - sampled).abs().mean().item()
        self.findings.require(
            gap <= self.allowed_gap and agreement.holds and versions == {self.version},
            f"{when}: logprobs differ by {gap:.2g} on average (<= {self.allowed_gap:g}), {agreement.slope:.3f} of the adapter's "
            f"effect (0.5 to 1.5), version {', '.join(map(str, versions))} (must be {self.version})",
            gap=gap,
            slope=agreement.slope,
        )

    def sleeps(self) -> None:
        """Sleeps and wakes; the device's free memory must come and go by the same amount each time."""
        awake, asleep = [self.free()], []
        for number in range(1, NUM_SLEEPS + 1):
            start = time.perf_counter()
            asyncio.run(self.engine.sleep())
            asleep.append(self.free())
            asyncio.run(self.engine.wake())
            awake.append(self.free())
            seconds = time.perf_counter() - start
            self.sync()
            self.compare(f"after sleep and wake {number} ({seconds:.2f} s)")
        if self.machine.is_gpu:
            self.findings.bar("GiB freed by a sleep", min(asleep) - awake[0], ">=", MIN_FREED_GIB)
            drift = max(max(each) - min(each) for each in (awake, asleep))
            self.findings.bar("GiB of drift between turns", drift, "<=", MAX_DRIFT_GIB)

    def free(self) -> float:
        """Free GiB of the device; 0 on a CPU, where vLLM keeps its memory."""
        self.machine.wait()
        return torch.cuda.mem_get_info()[0] / GIB if self.machine.is_gpu else 0.0


def batch_of(pairs: Sequence[tuple[list[int], Completion]]) -> Batch:
    """Completions as a micro-batch of plain rows."""
    samples = []
    for number, (prompt, completion) in enumerate(pairs):
        rollout = Rollout({}, item_index=number, sibling=0, temperature=1.0, prompt="")
        rollout.start(prompt)
        rollout.append(Turn(completion, "", "", "", ""))
        rollout.finish()
        samples.append(Sample(rollout, (1.0,) * len(completion.token_ids)))
    return make_batch(samples, True, torch.device("cpu"))
