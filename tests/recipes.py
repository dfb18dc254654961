"""Local files in place of the data sets of the recipes, and the options that name them."""

import json
from pathlib import Path

MATH = [
    {"problem": f"What is {n} times 2?", "answer": str(2 * n), "solution": f"It is ${2 * n}$."} for n in range(1, 41)
]
GSM8K = [
    {"question": f"How much is {n} times 6?", "answer": f"{n} times 6 is {6 * n}.\n#### {6 * n}"} for n in range(1, 41)
]
TEXTS = [{"prompt": f"the text of number {n}"} for n in range(1, 101)]
ROWS = {"gsm8k_qwen2.5_0.5b": GSM8K, "gsm8k_qwen2.5_1.5b": GSM8K, "r1_zero": MATH, "reverse_text": TEXTS}


def local_data(recipe: str, folder: Path) -> list[str]:
    """Writes rows for a recipe; returns the options with which it reads them. Some environments make their items."""
    init = "--data.environment.init_args."
    if recipe == "countdown_3b":
        return [f"{init}num_train", "20", f"{init}num_validation", "5"]
    if recipe == "reasoning_gym":
        return [f"{init}num_items", "40", f"{init}num_validation", "12"]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS[recipe]))
    held_out = [] if recipe == "reverse_text" else [f"{init}validation_file", str(file)]
    return [f"{init}train_file", str(file), *held_out]
