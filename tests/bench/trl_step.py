"""The same work by TRL's `GRPOTrainer` through its public API: transformers samples, since its vLLM mode does not sync on a CPU.

Its reward is the quickstart's for correct answers. It computes every row, with any rewards. Which micro-batch is the fastest
depends on the machine: two steps of 32 tokens are tried with each of `MICRO_BATCHES`, and the fastest is measured. Each
measurement has a process of its own.

python -m tests.bench.trl_step
python -m tests.bench.trl_step 32 16 2   # completions of 32 tokens, micro-batches of 16 rows, 2 steps after the first
"""

import json
import resource
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from fuchsia_pl.library.arithmetic import Arithmetic, last_integer
from tests.bench.work import MARK, NUM_STEPS, model_folder, report

MICRO_BATCHES = (8, 16, 32)
NUM_ROWS = 64
LENGTHS = (32, 64)


def correct(completions: list[Any], a: list[int], b: list[int], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(last_integer(text) == x + y) for text, x, y in zip(texts, a, b, strict=True)]


def seconds_per_step(max_tokens: int, micro_batch: int, num_steps: int) -> float:
    """Median seconds of the steps after the first."""
    environment = Arithmetic()
    rows = [
        {"prompt": environment.messages(item), "a": item["a"], "b": item["b"]}
        for item in environment.train_items()[:512]
    ]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=NUM_ROWS // micro_batch,
        num_generations=8,
        max_completion_length=max_tokens,
        max_steps=num_steps + 1,
        learning_rate=2e-4,
        logging_steps=1,
        report_to=[],
        bf16=True,
        use_cpu=True,
        beta=0.0,
        temperature=1.0,
        save_strategy="no",
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(
        model=str(model_folder()),
        reward_funcs=correct,
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
    )
    trainer.train()
    seconds = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry][1:]
    sys.stderr.write(f"{micro_batch} rows: {seconds}\n")
    return median(seconds)


def measured(max_tokens: int, micro_batch: int, num_steps: int) -> dict[str, float]:
    """Seconds of a step and peak memory, of a process of its own."""
    command = [sys.executable, "-m", "tests.bench.trl_step", *map(str, (max_tokens, micro_batch, num_steps))]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return next(json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK))


def main() -> None:
    if arguments := list(map(int, sys.argv[1:])):
        seconds = seconds_per_step(*arguments)
        report(seconds=seconds, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    tried = {rows: measured(LENGTHS[0], rows, num_steps=1)["seconds"] for rows in MICRO_BATCHES}
    best = min(tried, key=lambda rows: tried[rows])
    figures = {f"trl_{rows}_rows": seconds for rows, seconds in tried.items()}
    for tokens in LENGTHS:
        found = measured(tokens, best, NUM_STEPS)
        figures |= {f"trl_step_{tokens}": found["seconds"], f"trl_peak_{tokens}_gb": found["peak_gb"]}
    report(**figures, trl_rows=best)


if __name__ == "__main__":
    main()
