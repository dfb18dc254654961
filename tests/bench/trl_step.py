"""The same work by TRL's `GRPOTrainer` through its public API: transformers samples, since its vLLM mode does not sync on a CPU.

Its reward is the quickstart's for correct answers. It computes every row, with any rewards.

python -m tests.bench.trl_step 32
"""

import resource
import sys
import tempfile
from statistics import median
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from fuchsia_pl.library.arithmetic import Arithmetic, last_integer
from tests.bench.work import NUM_STEPS, model_folder, report


def correct(completions: list[Any], a: list[int], b: list[int], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(last_integer(text) == x + y) for text, x, y in zip(texts, a, b, strict=True)]


def main() -> None:
    max_tokens = int(sys.argv[1])
    environment = Arithmetic()
    rows = [
        {"prompt": environment.messages(item), "a": item["a"], "b": item["b"]}
        for item in environment.train_items()[:512]
    ]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        num_generations=8,
        max_completion_length=max_tokens,
        max_steps=NUM_STEPS + 1,
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
    sys.stderr.write(f"{seconds}\n")
    report(
        **{f"trl_step_{max_tokens}": median(seconds)},
        **{f"trl_peak_{max_tokens}_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20},
    )


if __name__ == "__main__":
    main()
