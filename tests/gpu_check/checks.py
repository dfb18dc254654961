"""The list of checks. Nothing here imports torch, so that a list or a wrong name costs no time."""

from dataclasses import dataclass
from typing import Any

PACKAGE = "tests.gpu_check"


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: Its name in the table, and for `--only`.
        title: What it shows.
        place: Module of the package, and function in it, as "model:startup".
        arguments: Arguments of the function, after the findings.
        limit_s: After this time it is ended, and has failed.
        is_named: Whether the user chose it by name.
        package: The package of its module.
    """

    name: str
    title: str
    place: str
    arguments: tuple[Any, ...] = ()
    limit_s: float = 120.0
    is_named: bool = False
    package: str = PACKAGE

    @property
    def module(self) -> str:
        """The module of the function."""
        return f"{self.package}.{self.place.partition(':')[0]}"

    @property
    def function(self) -> str:
        """Name of the function."""
        return self.place.partition(":")[2]


CHECKS = (
    Check("environment", "versions, card, memory", "environment:environment"),
    Check("startup", "start-up checks of four architectures on the device", "model:startup"),
    Check("logprobs", "logprobs and gradients against a plain forward in float32 on the CPU", "model:logprobs"),
    Check("objectives", "loss and gradient of every preset against the CPU", "model:objectives"),
    Check("head", "chunked output head at a vocabulary of 152k", "memory:head"),
    Check("checkpointing", "activations off, checkpointed, offloaded", "memory:checkpointing"),
    Check("nf4", "frozen weights in 4 bits", "memory:four_bits"),
    Check("prefix", "shared prefix against plain rows, with kernels", "prefix:shared_prefix", limit_s=240),
    Check("fit", "ten steps with a scripted engine, and a resume", "training:fit"),
    Check("turns", "hotswap: memory of the trainer while the engine has the device", "training:turns"),
    Check("fsdp2", "FSDP2 with one rank against one device", "training:fsdp2"),
    Check("speed-0.6b", "a step of a 0.6B shape with LoRA", "speed:speed", ("0.6B",), limit_s=240),
    Check("speed-1.5b", "a step of a 1.5B shape with LoRA", "speed:speed", ("1.5B",), limit_s=240),
    Check("merge", "merge of an adapter on the device", "merge:merge"),
    Check("sync", "start, burst, three syncs, sleep and wake twice: scripted engine", "engine:scripted"),
    Check("vllm-lora", "the same with vLLM, adapters served, compiled", "engine:vllm", ("lora", False), limit_s=300),
    Check("vllm-merge", "the same with vLLM, adapters merged, eager", "engine:vllm", ("merge", True), limit_s=300),
    Check("vllm-fp8", "the same with vLLM, weights in fp8", "engine:vllm", ("lora", True, "fp8"), limit_s=300),
    Check("command", "`fuchsia fit`, three steps, scripted engine", "commands:scripted"),
    Check("vllm-command", "`fuchsia fit`, three steps, vLLM", "commands:with_vllm", ((),), limit_s=300),
    Check(
        "vllm-turns",
        "`fuchsia fit`, three steps, vLLM and trainer in turns",
        "commands:with_vllm",
        (("--hotswap.enabled", "true"),),
        limit_s=300,
    ),
    Check(
        "vllm-ahead",
        "`fuchsia fit`, three steps, sampling beside training",
        "commands:with_vllm",
        (("--data.sampling.max_staleness", "1"),),
        limit_s=300,
    ),
    Check("ranks-ddp", "`fuchsia fit` on two devices, DDP", "commands:on_two_devices", ("ddp",), limit_s=300),
    Check("ranks-fsdp", "`fuchsia fit` on two devices, FSDP2", "commands:on_two_devices", ("fsdp",), limit_s=300),
    Check("tensor-parallel", "one vLLM over two devices", "commands:on_two_devices", ("tensor",), limit_s=300),
    Check("server-lora", "vLLM server on another device, adapters", "commands:with_server", (True,), limit_s=300),
    Check("server-whole", "vLLM server on another device, all weights", "commands:with_server", (False,), limit_s=300),
)
