"""The memory plan: its kept activations against those of the quickstart's model, and which config fits which GPU.

python -m tests.bench.plan        # also prints the table of the documentation
"""

import sys

from transformers import AutoConfig

from fuchsia_pl.callbacks.memory_table import size
from fuchsia_pl.cli.plan import PlanCLI, Planned, gpu_memory
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.plan import GIB
from fuchsia_pl.policy.plan_simulation import Simulator
from fuchsia_pl.policy.plan_sizes import MicroBatch
from tests.bench.training import batches_of, make_policy, rows
from tests.bench.work import model_folder, report

SEVEN = ("--config", "gsm8k.yaml", "--model.policy.name", "Qwen/Qwen2.5-7B-Instruct")
CONFIGS = ("gsm8k.yaml", "countdown.yaml", "function_calling.yaml")
# Options, GPU and number of GPUs.
RUNS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    *((("--config", config), gpu, 1) for config in CONFIGS for gpu in ("24", "80")),
    (SEVEN, "80", 8),
    ((*SEVEN, "--config", "overlays/fsdp.yaml"), "80", 8),
)
HEADER = (
    "| `fuchsia plan` | GPUs | trainer | engine without cache | KV cache | peak | fits |\n|---|---|---|---|---|---|---|"
)


def planned(words: tuple[str, ...], gpu: str, gpus: int) -> Planned:
    """The plan of a config."""
    found = PlanCLI(["fit", *words], gpu_memory(gpu), gpus).found
    assert found is not None
    return found


def row(words: tuple[str, ...], gpu: str, gpus: int) -> str:
    """A row of the table."""
    found = planned(words, gpu, gpus)
    plan = found.plan
    cache = plan.size("engine", "KV cache")
    sides = {side: sum(part.num_bytes for part in plan.parts if part.side == side) for side in ("trainer", "engine")}
    cells = [
        f"`{' '.join(words)}`",
        f"{gpus} x {gpu} GiB",
        size(sides["trainer"]),
        size(sides["engine"] - cache),
        f"{size(cache)}, {found.figures['KV cache'].split(':')[1].split(' of')[0].strip()} rows",
        f"{plan.total / GIB:.1f} of {plan.available / GIB:.1f}",
        "yes" if plan.fits else f"with `{found.options[0]}`" if found.options else "no",
    ]
    return f"| {' | '.join(cells)} |"


def error(is_checkpointed: bool, shares_prefix: bool) -> float:
    """Relative difference of the planned and the real kept bytes of the quickstart's model, for 8 rows of a prompt."""
    policy = make_policy(shares_prefix, "float32", checkpointing=CheckpointingSettings(enabled=is_checkpointed))
    (batch,) = batches_of(policy, rows(1, 150, 60), 1)
    kept = KeptBytes(policy)
    with kept:
        policy.output(batch)
    simulator = Simulator(AutoConfig.from_pretrained(model_folder()), is_gpu=False)
    _, activations = simulator.run(policy.config, MicroBatch.of(batch, shares_prefix))
    return abs(activations.kept / kept.num_bytes - 1)


def main() -> None:
    errors = [error(is_checkpointed, shares) for is_checkpointed in (True, False) for shares in (True, False)]
    named = (("gsm8k.yaml", "24"), ("countdown.yaml", "48"), ("function_calling.yaml", "48"))
    misfits = sum(not planned(("--config", config), gpu, 1).plan.fits for config, gpu in named)
    report(plan_error=max(errors), plan_misfits=misfits)
    sys.stdout.write(f"{HEADER}\n")
    for run in RUNS:
        sys.stdout.write(f"{row(*run)}\n")


if __name__ == "__main__":
    main()
