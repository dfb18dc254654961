"""The merge of an adapter, as vLLM's worker does it on its device, against PEFT's on the CPU."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fuchsia_pl.engines.vllm_worker import WorkerExtension
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import here
from tests.gpu_check.models import make_policy, save_model

EXACT = 1e-5


class Worker(WorkerExtension):
    """Takes the place of vLLM's worker: has a device, and keeps the weights that it gets."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: dict[str, Tensor] = {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.weights = dict(weights_iterator)


def merge(findings: Findings) -> None:
    """W + scale B A of every adapted weight."""
    machine = here(findings)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192} if machine.is_gpu else {}
    worker = Worker(machine.device)
    with TemporaryDirectory() as made:
        model, adapter = Path(made) / "model", Path(made) / "adapter"
        save_model(model, machine, **sizes)
        policy = make_policy(model, torch.device("cpu"), "float32")
        policy.save_trained(adapter)
        worker.load_trained_weights(str(model), str(adapter), False)
        start = time.perf_counter()
        worker.load_trained_weights(str(model), str(adapter), True)
        machine.wait()
        seconds = time.perf_counter() - start
    adapted = {name.replace(".lora_A.default", "") for name in policy.state_dict() if "lora_A" in name}
    adapted = {name.removeprefix("model.base_model.model.") for name in adapted}
    expected = policy.model.merge_and_unload().state_dict()
    missing = sorted(adapted - set(worker.weights))
    findings.require(
        not missing, f"{len(adapted)} adapted weights, all merged" + (f" but {missing[:3]}" if missing else "")
    )
    found = {name: worker.weights[name] for name in adapted if name in worker.weights}
    places = sorted({tensor.device.type for tensor in found.values()})
    size = sum(tensor.nbytes for tensor in found.values()) / 2**20
    findings.note(f"{size:.0f} MiB in float32 on {', '.join(places)} in {seconds:.3f} s", seconds=seconds)
    largest = max((tensor.cpu() - expected[name]).abs().max().item() for name, tensor in found.items())
    findings.bar("largest difference of a weight", largest, "<=", EXACT)
    findings.require(places == [machine.device.type], f"the sums are on {machine.device.type}")
