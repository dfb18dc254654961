"""The machine: versions, card, memory, and what is installed beside."""

import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from fuchsia_pl.scratch import RAM_BACKED
from tests.bench.__main__ import processor
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import GIB, here

PACKAGES = ("torch", "transformers", "peft", "lightning", "vllm", "bitsandbytes", "triton")


def environment(findings: Findings) -> None:
    """Notes what the figures of the other checks depend on."""
    machine = here(findings)
    if machine.is_gpu:
        _cards(findings)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    findings.note(f"{processor()}, {cores} cores, of which torch uses {threads}, {memory:.0f} GiB", cores=cores)
    if not machine.is_gpu and machine.dtype == "float32":
        findings.note("no bfloat16 instructions: the checks compute in float32")
    findings.note(", ".join(f"{name} {installed(name)}" for name in PACKAGES), **{n: installed(n) for n in PACKAGES})
    disk = shutil.disk_usage(RAM_BACKED)
    findings.note(f"{RAM_BACKED}: {disk.free / GIB:.2f} GiB free", ram_backed_gib=disk.free / GIB)


def _cards(findings: Findings) -> None:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    findings.note(
        f"{len(names)} x {names[0]}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), compute capability {major}.{minor}",
        cards=names,
        free_gib=free / GIB,
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    runtime = torch.version.cuda or f"ROCm {torch.version.hip}"
    findings.note(f"driver {driver()}, CUDA {runtime}, NCCL {nccl}, cuDNN {torch.backends.cudnn.version()}")
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    findings.note(f"attention kernels: {', '.join(name for name, is_on in enabled.items() if is_on)}")


def driver() -> str:
    """Version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or "unknown"


def installed(name: str) -> str:
    """Version of a package, "-" without it."""
    for spelling in (name, f"{name}-cpu"):  # vLLM's build for a CPU has a name of its own
        try:
            return version(spelling)
        except PackageNotFoundError:
            continue
    return "-"
