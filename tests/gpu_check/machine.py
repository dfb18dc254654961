"""The device, the number type that suits it, and measurements of time and memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fuchsia_pl.callbacks.memory import return_freed
from fuchsia_pl.policy.cpu import has_bfloat16
from fuchsia_pl.policy.memory import is_out_of_memory
from tests.gpu_check.findings import Findings, NotHereError

GIB = 2**30
NUM_ROUNDS = {"cuda": 3, "cpu": 1}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """The device of the checks.

    Attributes:
        device: The first GPU, or the CPU.
        dtype: Type of frozen weights: bfloat16 unless the device computes it slowly.
    """

    device: torch.device
    dtype: Literal["bfloat16", "float32"]

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def label(self) -> str:
        """The device's column in the table."""
        return f"{self.device.type}, {self.dtype}"

    @property
    def precision(self) -> Literal["bf16-mixed", "32-true"]:
        """`trainer.precision`."""
        return "bf16-mixed" if self.dtype == "bfloat16" else "32-true"

    def autocast(self, dtype: str | None = None) -> AbstractContextManager[None]:
        """The precision of a training step."""
        is_mixed = (dtype or self.dtype) == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed)

    def wait(self) -> None:
        """Returns when the device has finished all work."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes of the tensors on the GPU; 0 on a CPU."""
        self.wait()
        return torch.cuda.memory_allocated() if self.is_gpu else 0


def here(findings: Findings) -> Machine:
    """The machine of this process; its label goes into the table."""
    if torch.cuda.is_available():
        machine = Machine(torch.device("cuda", 0), "bfloat16" if torch.cuda.is_bf16_supported(False) else "float32")
    else:
        fast = has_bfloat16(torch.cpu.get_capabilities())
        machine = Machine(torch.device("cpu"), "bfloat16" if fast else "float32")
    findings.device(machine.label)
    return machine


def gpu_here(findings: Findings, num_devices: int = 1) -> Machine:
    """The machine, if it has enough GPUs.

    Raises:
        NotHereError: It has fewer.
    """
    machine = here(findings)
    if torch.cuda.device_count() < num_devices:
        raise NotHereError("needs a GPU" if num_devices == 1 else f"needs {num_devices} GPUs")
    return machine


@dataclass(frozen=True)
class Cost:
    """Seconds of the fastest of several runs, and the memory that one run takes beside what was there before."""

    seconds: float
    peak_bytes: int

    @property
    def peak(self) -> str:
        """The memory in GiB."""
        return f"{self.peak_bytes / GIB:.2f} GiB"


def cost(machine: Machine, work: Callable[[], object]) -> Cost:
    """Runs `work` once to warm up, then measures it."""
    work()
    seconds, peaks = [], []
    for _ in range(NUM_ROUNDS[machine.device.type]):
        machine.wait()
        with Peak(machine) as peak:
            start = time.perf_counter()
            work()
            machine.wait()
            seconds.append(time.perf_counter() - start)
        peaks.append(peak.num_bytes)
    return Cost(min(seconds), max(peaks))


class Peak:
    """Largest memory inside a `with` block beside what was in use before: of the GPU's tensors, or of this process.

    On a CPU memory is counted in pages of the whole process, and is 0 where the kernel does not tell.
    """

    def __init__(self, machine: Machine) -> None:
        self.num_bytes = 0
        self._machine = machine
        self._before = 0

    def __enter__(self) -> "Peak":
        if self._machine.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            return_freed()
            with suppress(OSError):
                CLEAR.write_text("5")
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        after = torch.cuda.max_memory_allocated() if self._machine.is_gpu else _status("VmHWM")
        self.num_bytes = max(after - self._before, 0)


def _status(name: str) -> int:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


@contextmanager
def room(machine: Machine, findings: Findings, what: str) -> Iterator[None]:
    """Within this context, running out of memory is a figure and no failure; the rest of the check goes on."""
    try:
        yield
    except Exception as error:  # torch has a class for a GPU only
        if not is_out_of_memory(error):
            raise
        findings.note(f"{what}: out of memory")
    finally:
        if machine.is_gpu:
            torch.cuda.empty_cache()
