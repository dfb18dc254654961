"""Tests on a GPU: both sync modes, compiled; two GPUs; turns; offloading; quantization. This file has never been run."""

import asyncio
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.callbacks.hotswap import HOST, move_to_device, move_to_host
from fuchsia_pl.engines.base import EngineSpec
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.policy.config import CheckpointingSettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ServedModel
from tests.doubles import denominators, make_sample

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


def run_three_steps(folder: Path, *overrides: str) -> list[float]:
    """The mean gap between engine and trainer at each of three steps of the quickstart."""
    fuchsia = Path(sys.executable).parent / "fuchsia"
    command = [
        fuchsia,
        "fit",
        "--config",
        "quickstart.yaml",
        "--trainer.max_steps",
        "3",
        "--trainer.accelerator",
        "gpu",
    ]
    done = subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (folder / "runs/quickstart/0/metrics.csv").open() as stream:
        gaps = [float(row["train/logprob_gap"]) for row in csv.DictReader(stream) if row["train/logprob_gap"]]
    assert len(gaps) == 3
    return gaps


@pytest.mark.parametrize("sync_mode", ["lora", "merge"])
def test_three_steps_agree_with_the_engine(tmp_path, sync_mode):
    engine = ["--data.engine.init_args.sync_mode", sync_mode, "--data.engine.init_args.enforce_eager", "false"]
    assert max(run_three_steps(tmp_path, *engine)) < 0.15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("overlay", [[], ["--config", "overlays/fsdp.yaml"]], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("sync_mode", ["lora", "merge"])
def test_three_steps_on_two_gpus_agree_with_their_engines(tmp_path, overlay, sync_mode):
    engine = ["--data.engine.init_args.sync_mode", sync_mode]
    assert max(run_three_steps(tmp_path, *overlay, "--trainer.devices", "2", *engine)) < 0.15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_one_engine_over_two_gpus_agrees_with_the_trainer(tmp_path):
    assert max(run_three_steps(tmp_path, "--data.engine.init_args.tensor_parallel_size", "2")) < 0.15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("trained", ["adapter", "all weights"])
def test_three_steps_agree_with_a_server_on_another_gpu(tmp_path, trained):
    """All weights go from GPU to GPU through vLLM's weight transfer."""
    port = find_free_network_port()
    whole = ["--model.policy.lora.enabled", "false"] if trained == "all weights" else []
    command = [Path(sys.executable).parent / "fuchsia", "serve", "--config", "quickstart.yaml", "--port", str(port)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    server = subprocess.Popen([*command, *whole], cwd=tmp_path, env=environment)
    try:
        urls = ["--data.engine.init_args.urls", f"[http://127.0.0.1:{port}]"]
        assert max(run_three_steps(tmp_path, "--config", "overlays/server.yaml", *urls, *whole)) < 0.15
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("sync_mode", ["lora", "merge"])
def test_three_steps_in_turns_agree_with_the_engine(tmp_path, sync_mode):
    assert (
        max(run_three_steps(tmp_path, "--data.engine.init_args.sync_mode", sync_mode, "--hotswap.enabled", "true"))
        < 0.15
    )


@pytest.mark.parametrize("sync_mode", ["lora", "merge"])
def test_an_engine_that_sleeps_leaves_the_gpu(model_folder, tmp_path, sync_mode):
    engine = VLLMColocatedEngine(sync_mode, kv_cache_gb=2.0, enforce_eager=True)
    served = ServedModel(str(model_folder), "bfloat16", 8, Path)
    engine.start(EngineSpec(served, 320, seed=0, log_file=tmp_path / "engine.log", sleeps=True))
    try:
        free = [torch.cuda.mem_get_info()[0]]
        for order in (engine.sleep, engine.wake, engine.sleep):
            asyncio.run(order())
            free.append(torch.cuda.mem_get_info()[0])
    finally:
        engine.close()
    awake, asleep, awake_again, asleep_again = free
    assert asleep - awake > 2 * 2**30  # the keys and values, and the weights
    assert abs(awake_again - awake) < 2**28
    assert abs(asleep_again - asleep) < 2**28


@pytest.mark.parametrize("fused", [True, False])
def test_the_trainer_leaves_the_gpu_and_comes_back_the_same(model_folder, fused):
    """A fused optimizer keeps its step counter on the GPU, another optimizer on the host."""
    policy = gpu_policy(model_folder)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), fused=fused)

    def step() -> None:
        policy.output(batch_on_gpu()).logprobs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[torch.Tensor]:
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [*policy.parameters(), *policy.buffers(), *states]

    step()
    objects, places = [id(parameter) for parameter in policy.parameters()], [tensor.device for tensor in everything()]
    values, taken = [tensor.detach().cpu().clone() for tensor in everything()], torch.cuda.memory_allocated()
    moved = move_to_host(policy, [optimizer], HOST)
    assert {tensor.device for tensor in everything()} == {HOST}
    assert torch.cuda.memory_allocated() < 0.05 * taken
    move_to_device(policy, moved, torch.device("cuda", 0))
    assert [id(parameter) for parameter in policy.parameters()] == objects
    assert [tensor.device for tensor in everything()] == places
    assert all(torch.equal(tensor.cpu(), value) for tensor, value in zip(everything(), values, strict=True))
    step()


def test_offloaded_activations_leave_the_gpu(model_folder):
    policy, where = gpu_policy(model_folder, checkpointing=CheckpointingSettings(enabled=True, cpu_offloading=True)), []
    original = torch.autograd.graph.save_on_cpu.__init__

    class Counting(torch.autograd.graph.save_on_cpu):
        def __init__(self, **settings) -> None:
            original(self, **settings)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: where.append(pack(tensor)[1].device.type) or pack(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
        policy.output(batch_on_gpu()).logprobs.sum().backward()
    assert len(where) >= 30
    assert set(where) == {"cpu"}


def test_four_bit_weights_take_a_third_and_say_nearly_the_same(model_folder):
    whole, four_bit = gpu_policy(model_folder), gpu_policy(model_folder, quantization="nf4")
    sizes = [
        sum(p.numel() * p.element_size() for p in policy.model.model.layers.parameters())
        for policy in (whole, four_bit)
    ]
    assert sizes[1] < 0.4 * sizes[0]
    batch = batch_on_gpu()
    first, second = (policy.output(batch).logprobs[batch.loss_mask] for policy in (whole, four_bit))
    assert (first - second).abs().mean() < 0.5
    second.sum().backward()
    assert all(p.grad is not None for p in four_bit.trainable_parameters())


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_engine_serves_the_adapter(tmp_path, quantization):
    gaps = run_three_steps(tmp_path, "--data.engine.init_args.quantization", quantization)
    assert max(gaps) < 0.3


def gpu_policy(folder, **settings) -> Policy:
    return Policy(PolicyConfig("", **settings), folder, with_reference=False).to("cuda").train()


def batch_on_gpu():
    samples = [make_sample([5, 6, 7], [8 + row, 9, 10, 2], 1.0) for row in range(4)]
    return make_batches(split_balanced(samples, 1, True), StepInfo(0, denominators(1), 0))[0].to("cuda")
