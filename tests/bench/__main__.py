"""`make bench`: every figure of the tables in tests/README.md, measured in one run; one line per ratio at the end.

    python -m tests.bench [tests/README.md]      # with a file: writes the tables into it

Each part runs in a separate process, one after the other. Run nothing else on the machine meanwhile; it takes an hour.
"""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.work import MARK

PARTS = (
    "step",
    "trl_step",
    "training",
    "shared_prefix",
    "probe",
    "sampling",
    "overlap",
    "packing",
    "plan",
    "gateway",
    "verifiers",
)
TIMEOUT_S = 3600
TABLE = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)

NOTES = """\
The quickstart's work with `beta: 0`, as TRL's. Under its own rewards, groups whose siblings score alike move no weight and
stay out of the forward; with `every row in the forward` the rewards are such that there are none. TRL computes every row
either way, in the fastest of micro-batches of 8, 16 and 32 rows. Checkpoints come every fifth step and are in none of the
medians. In the first nine steps the sync is probed four times, for which the reference runs on 128 sampled tokens; at a
`beta` above 0 it has run anyway.""".splitlines()


@dataclass(frozen=True)
class Ratio:
    """A figure with its bar, and whether it must be above or below the bar."""

    name: str
    value: float
    sign: str
    bar: float

    @property
    def verdict(self) -> str:
        """The bar, and whether it was missed."""
        is_met = self.value >= self.bar if self.sign == ">=" else self.value <= self.bar
        return f"{self.sign} {self.bar:g}" + ("" if is_met else ", missed")

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g} ({self.verdict})"


def measure() -> dict[str, float]:
    """Runs every part and collects its figures."""
    figures: dict[str, float] = {}
    for part in PARTS:
        sys.stderr.write(f"{part} …\n")
        command = [sys.executable, "-m", f"tests.bench.{part}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                figures |= json.loads(line.removeprefix(MARK))
    return figures


def ratios(f: dict[str, float]) -> list[Ratio]:
    """The bars."""
    linear = {name: f[f"scaling_{name}"] / f["scaling_4x8"] for name in ("8x8", "16x8", "4x16", "4x32")}
    return [
        Ratio("step of TRL / ours, quickstart's rewards, 32 tokens", f["trl_step_32"] / f["own_step_32"], ">=", 5),
        Ratio("step of TRL / ours, quickstart's rewards, 64 tokens", f["trl_step_64"] / f["own_step_64"], ">=", 6),
        Ratio(
            "step of TRL / ours, every row in the forward, 32 tokens", f["trl_step_32"] / f["every_step_32"], ">=", 5
        ),
        Ratio(
            "step of TRL / ours, every row in the forward, 64 tokens", f["trl_step_64"] / f["every_step_64"], ">=", 6
        ),
        *prefix_ratios(f),
        Ratio(
            "bytes of attention per token at 4,096 tokens / at 1,024, besides inputs, output, gradients",
            f["attention_bytes_4096"] / f["attention_bytes_1024"],
            "<=",
            1.1,
        ),
        Ratio("largest difference of logprobs, float32", f["logprob_difference"], "<=", 1e-4),
        Ratio("relative difference of gradients, float32", f["gradient_difference"], "<=", 1e-4),
        Ratio("difference of logprobs, prompt 2,000, float32", f["logprob_difference_2000"], "<=", 1e-4),
        Ratio("relative difference of gradients, prompt 2,000, float32", f["gradient_difference_2000"], "<=", 1e-4),
        Ratio(
            "share of the step outside sampling and training, quickstart's rewards", f["own_rest_share_32"], "<=", 0.08
        ),
        Ratio("share of the step outside sampling and training, every row", f["every_rest_share_32"], "<=", 0.08),
        Ratio("the same from the tenth step on, quickstart's rewards", f["later_rest_share"], "<=", 0.08),
        Ratio("probe of a sync / forward and backward of a step", f["probe_share"], "<=", 0.05),
        Ratio("sampling / bare AsyncLLM", f["sampling_tokens_per_s"] / f["bare_tokens_per_s"], ">=", 0.95),
        Ratio("sampling / bare AsyncLLM, 4 turns", f["turns_tokens_per_s"] / f["bare_turns_tokens_per_s"], ">=", 0.9),
        Ratio(
            "64 agents / bare AsyncLLM, 4 turns", f["agents_tokens_per_s"] / f["bare_agents_tokens_per_s"], ">=", 0.9
        ),
        Ratio(
            "GB more for 8,192 tokens than for 1,024 at 150,000 words", f["peak_8192_gb"] - f["peak_1024_gb"], "<=", 0.3
        ),
        Ratio("kept activations with / without checkpointing", f["kept_checkpointed_gb"] / f["kept_gb"], "<=", 0.3),
        Ratio("seconds of a sync", f["every_sync_32"], "<=", 1.0),
        Ratio("step in turns / (sampling + training)", f["overlap_sum"], "<=", 1.1),
        Ratio("step at staleness 1 / longer of sampling and training", f["overlap_max"], "<=", 1.1),
        Ratio("cost at 2 x the prompts", linear["8x8"], "<=", 2.2),
        Ratio("cost at 4 x the prompts", linear["16x8"], "<=", 4.4),
        Ratio("cost at 2 x the completions", linear["4x16"], "<=", 2.2),
        Ratio("cost at 4 x the completions", linear["4x32"], "<=", 4.4),
        *packing_ratios(f),
        Ratio("planned / real kept activations, relative error, 4 cases", f["plan_error"], "<=", 0.1),
        Ratio("milliseconds a turn of verifiers on top of a native port", f["verifiers_ms_a_turn"], "<=", 5),
        Ratio("GPU configs that exceed the card of their first comment", f["plan_misfits"], "<=", 0),
    ]


def prefix_ratios(f: dict[str, float]) -> list[Ratio]:
    """The bars of shared prefixes. In float32, products of the blocks and the head take a larger share of the time."""
    allowed = f["allowed_short"]
    found = []
    for key, words in (("", "bfloat16"), ("_float32", "float32")):
        long, short = (f[f"plain_{size}{key}"] / f[f"shared_{size}{key}"] for size in ("long", "short"))
        name = f"the same, prompt 40, completion 24, {words}: share of the {allowed:.3g} that tokens and head allow"
        found += [
            Ratio(f"plain rows / shared prefix, prompt 150, completion 200, {words}", long, ">=", 1.3),
            Ratio(name, short / allowed, ">=", 0.95),
            Ratio(
                f"plain rows with as many tokens / shared prefix, prompt 40, completion 24, {words}",
                f[f"as_many_short{key}"] / f[f"shared_short{key}"],
                ">=",
                0.95,
            ),
        ]
    name = "plain rows / shared prefix, prompt 2,000, completion 500, float32, 2 of 30 layers"
    return [*found, Ratio(name, f["plain_2000"] / f["shared_2000"], ">=", 2.2)]


def packing_ratios(f: dict[str, float]) -> list[Ratio]:
    """The bars of packing: 512 rows of 4,000 tokens, twice as many, and the micro-batches of a budget of 16,384 tokens."""
    return [
        Ratio("seconds to pack 512 rows by a budget", f["packing_filled_s"], "<=", 0.3),
        Ratio("the same for twice the rows / once", f["packing_filled_growth"], "<=", 2.3),
        Ratio("seconds to split 512 rows into 512 micro-batches", f["packing_balanced_s"], "<=", 0.3),
        Ratio("the same for twice the rows / once", f["packing_balanced_growth"], "<=", 2.3),
        Ratio("seconds to make their tensors", f["packing_tensors_s"], "<=", 1.0),
        Ratio("the same for twice the rows / once", f["packing_tensors_growth"], "<=", 2.3),
        Ratio("share of the budget that is used", f["packing_used"], ">=", 0.85),
        Ratio("groups split although they fit", f["packing_split"], "<=", 0),
    ]


def table(f: dict[str, float]) -> str:
    """The tables, in Markdown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GiB"
    lines = [
        f"{machine}; medians of 5 steps or more, all in one run.",
        "",
        "| seconds per step, 8 prompts x 8 completions | sampling | forward and backward | sync | the rest | whole step | TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {"own": "quickstart's rewards", "every": "every row in the forward"}
    for tokens in (32, 64):
        for name, words in rows.items():
            seconds = [f[f"{name}_{part}_{tokens}"] for part in ("sampling", "training", "sync", "rest", "step")]
            cells = [
                f"{tokens} tokens, {words}",
                *(f"{value:.2f}" for value in seconds),
                f"{f[f'trl_step_{tokens}']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *NOTES,
        "",
        f"TRL's second step of 32 tokens took {f['trl_8_rows']:.1f} s at 8 rows, {f['trl_16_rows']:.1f} s at 16 and "
        f"{f['trl_32_rows']:.1f} s at 32; its steps are measured at {f['trl_rows']:.0f} rows.",
        "",
        f"Peak memory at 32 tokens: the trainer's process {f['trainer_peak_gb']:.1f} GB, vLLM's worker, which samples, "
        f"{f['worker_peak_gb']:.1f} GB; TRL, which samples itself, {f['trl_peak_32_gb']:.1f} GB.",
        "",
        "| seconds of sampling and training, every row in the forward | 4 x 8 | twice as many | four times as many |",
        "|---|---|---|---|",
        scaling_row(f, "prompts", "4x8", "8x8", "16x8"),
        scaling_row(f, "completions of a prompt", "4x8", "4x16", "4x32"),
        "",
        "| ratio | value | bar |",
        "|---|---|---|",
        *(f"| {ratio.name} | {ratio.value:.3g} | {ratio.verdict} |" for ratio in ratios(f)),
        "",
    ]
    return "\n".join(lines)


def scaling_row(f: dict[str, float], what: str, *sizes: str) -> str:
    """A row of the table of the growth of the cost."""
    seconds = [f"{f[f'scaling_{size}']:.2f}" for size in sizes]
    return f"| {' | '.join([what, *seconds])} |"


def processor() -> str:
    """The processor's name."""
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    return names[0].strip() if names else platform.processor()


def main() -> None:
    figures = measure()
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        file.write_text(TABLE.sub(lambda found: found[1] + table(figures) + found[2], file.read_text()))
    sys.stdout.write("\n".join([table(figures), *map(str, ratios(figures)), ""]))


if __name__ == "__main__":
    main()
