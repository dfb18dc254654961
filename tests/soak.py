"""A long run of small steps. Its memory, descriptors and threads must not grow: `python -m tests.soak [steps]`.

Trainer, engine process and tool server are measured separately, and so are the files in RAM-backed and temporary folders.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuchsia_pl import scratch
from tests.chaos import CONFIG, TOOL_SERVER
from tests.doubles import save_tiny_model
from tests.process_engine import SAMPLER

MB = 2**20
LOOK_S = 0.5
# Allowed growth from the second to the last third of a run.
MAX_GROWTH_MB = 8.0
MAX_GROWTH = 2.0


@dataclass(frozen=True)
class Look:
    """Resources of a run at one moment: megabytes, descriptors and threads by role, and bytes in scratch folders."""

    megabytes: dict[str, float]
    descriptors: dict[str, float]
    threads: dict[str, float]
    scratch: float


def roles_of(trainer: psutil.Process) -> dict[str, psutil.Process]:
    """The processes of a run, by role, that live until its end."""
    roles = {"trainer": trainer}
    for child in trainer.children(recursive=True):
        words = child.cmdline()
        if SAMPLER in words:
            roles["engine"] = child
        elif TOOL_SERVER in words:
            roles["tool server"] = child
    return roles


def look_at(trainer: psutil.Process) -> Look:
    """Measures a run in progress."""
    roles = roles_of(trainer)
    mine = scratch.NAME.match
    folders = [
        file for file in scratch.RAM_BACKED.iterdir() if (found := mine(file.name)) and int(found["pid"]) == trainer.pid
    ]
    return Look(
        {role: process.memory_info().rss / MB for role, process in roles.items()},
        {role: float(process.num_fds()) for role, process in roles.items()},
        {role: float(process.num_threads()) for role, process in roles.items()},
        float(sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())),
    )


def growth(looks: list[Look]) -> list[tuple[str, float, float, float]]:
    """Name, median of the second third of the looks, median of the last third, and allowed growth of each quantity."""
    third = len(looks) // 3
    rows = []
    for what, allowed in (("megabytes", MAX_GROWTH_MB), ("descriptors", MAX_GROWTH), ("threads", MAX_GROWTH)):
        for role in sorted(looks[-1].megabytes):
            values = [getattr(look, what).get(role) for look in looks]
            middle, last = (
                statistics.median([value for value in part if value is not None])
                for part in (values[third : 2 * third], values[2 * third :])
            )
            rows.append((f"{role}: {what}", middle, last, allowed))
    sizes = [look.scratch / MB for look in looks]
    rows.append(("/dev/shm: megabytes", max(sizes[third : 2 * third]), max(sizes[2 * third :]), 1.0))
    return rows


def soak(root: Path, num_steps: int) -> list[tuple[str, float, float, float]]:
    """Trains `num_steps` steps and measures the processes meanwhile; see `growth` for the result."""
    model = save_tiny_model(root / "model")
    (root / "soak.yaml").write_text(CONFIG.format(model=model, steps=num_steps))
    words = [
        "fit",
        "--config",
        str(root / "soak.yaml"),
        "--trainer.default_root_dir",
        str(root),
        "--checkpoint.every_n_steps",
        "20",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (root / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "fuchsia_pl", *words],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        looks, trainer = [], psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(LOOK_S)
            try:
                looks.append(look_at(trainer))
            except (psutil.Error, OSError):  # a process or a file that has just ended or gone
                continue
    assert run.returncode == 0, (root / "log").read_text()[-3000:]
    return growth([each for each in looks if len(each.megabytes) == 3])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        rows = soak(Path(made), int(sys.argv[1]) if sys.argv[1:] else 600)
    for name, middle, last, allowed in rows:
        sys.stdout.write(
            f"{name:28s} {middle:9.1f} -> {last:9.1f}   {'GROWS' if last > middle + allowed else 'flat'}\n"
        )
    sys.exit(any(last > middle + allowed for _, middle, last, allowed in rows))
