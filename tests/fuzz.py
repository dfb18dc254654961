"""Mutated configs and files must give a clear error or a correct result: `python -m tests.fuzz [number] [seed]`.

Every input has its own seed, so that a failing one can be reproduced: `python -m tests.fuzz 1 SEED KIND`.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.recorded_step import read_step
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.library.gsm8k import GSM8K
from fuchsia_pl.policy.adapter import check_adapter
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.policy.config import LoRASettings
from fuchsia_pl.policy.tensor_files import shapes_in_file
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer, save_tiny_model

BOUND_S = 30  # seconds for one input; the slowest takes one second
MARK = "executed"
# Code in a file that must never run while it is read.
PICKLE = f"cposix\nsystem\n(S'touch {MARK}'\ntR.".encode()
VALUES = [
    *("", "null", "true", "-1", "0", "1e308", ".nan", ".inf", "9" * 20, "0x10", "1:2:3", "[]", "{}", "[1, [2, [3]]]"),
    *("{a: 1}", "~", "'\\ud800'", '"\\0"', "x" * 5000, "../../etc/passwd", "/dev/zero", "${HOME}", "*a", "&a b"),
    *("!!binary x", "!!python/object/apply:os.system ['touch executed']", "!!python/name:os.system", "os.system"),
    *("torch.optim.SGD", "tests.doubles.TinyEngine"),
]
CONFIG = """seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 2
  accumulate_grad_batches: 2
model:
  policy:
    name: {model}
    dtype: float32
    lora:
      r: 4
      alpha: 8
  loss:
    loss_type: grpo
    beta: 0.01
  optimizer:
    class_path: torch.optim.AdamW
    init_args:
      lr: 0.01
data:
  batch_size: 4
  steps_per_epoch: 2
  sampling:
    group_size: 2
    max_completion_tokens: 4
    max_length: 40
    temperature: 1.0
  environment:
    class_path: tests.doubles.TinyEnvironment
    init_args:
      num_items: 20
  engine:
    class_path: tests.doubles.TinyEngine
"""
ROWS = [
    {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
    for n in range(30)
]


@dataclass(frozen=True)
class Target:
    """Files to mutate, and the function that reads them.

    Attributes:
        files: The intact files, by name.
        read: Reads a folder of such files; returns the content that must be unchanged if nothing is refused, or None.
        is_text: Whether lines are mutated in addition to bytes.
        is_exact: Whether an accepted mutated file must give the content of the intact one.
    """

    files: dict[str, bytes]
    read: Callable[[Path], object]
    is_text: bool = False
    is_exact: bool = False


def mutated(content: bytes, numbers: random.Random, is_text: bool) -> bytes:
    """The content with one to three mutations."""
    for _ in range(numbers.randint(1, 3)):
        content = (changed_line if is_text and numbers.random() < 0.8 else changed_bytes)(content, numbers)
    return content


def changed_bytes(content: bytes, numbers: random.Random) -> bytes:
    """Flips bits, removes, doubles or zeroes a part, replaces it by a pickle, or removes everything."""
    place = numbers.randrange(len(content) + 1)
    end = min(len(content), place + numbers.choice([1, 16, 4096]))
    return numbers.choice(
        [
            lambda: content[:place],
            lambda: content[place:],
            lambda: content[:place] + bytes(end - place) + content[end:],
            lambda: content[:place] + numbers.randbytes(end - place) + content[end:],
            lambda: content[:place] + content[place:end] * 2 + content[end:],
            lambda: content[:place] + PICKLE + content[end:],
            lambda: PICKLE,
            lambda: b"",
        ]
    )()


def changed_line(content: bytes, numbers: random.Random) -> bytes:
    """Replaces a value, misspells a name, or removes, doubles, moves or indents a line."""
    lines = content.decode(errors="replace").split("\n")
    at = numbers.randrange(len(lines))
    line, value = lines[at], numbers.choice(VALUES)
    what = numbers.randrange(7)
    if what == 0:
        lines[at] = re.sub(r": .*|:$", lambda _: f": {value}", line)
    elif what == 1:
        lines[at] = re.sub(r"\w+", lambda found: found[0][:-1] + numbers.choice(["", "x", "é"]), line, count=1)
    elif what == 2:
        del lines[at]
    elif what == 3:
        lines.insert(numbers.randrange(len(lines)), line)
    elif what == 4:
        lines[at] = " " * numbers.randrange(1, 5) + line
    elif what == 5:
        lines[at] = re.sub(r"[-\d.]+", lambda _: numbers.choice(VALUES), line, count=1)
    else:
        lines.insert(at, f"{' ' * (len(line) - len(line.lstrip()))}{numbers.choice(['a', 'trainer', 'lr'])}: {value}")
    return "\n".join(lines).encode(errors="surrogatepass")


def make_targets(root: Path) -> dict[str, Target]:
    """The intact files of a short run."""
    model = save_tiny_model(root / "model")
    module = make_module(model)
    trainer = make_trainer(root, AdapterExport(), FiniteGuard(record_steps=(1,)), max_steps=1)
    trainer.fit(module, datamodule=make_data(module))
    trainer.save_checkpoint(root / "x.ckpt")

    def contents(folder: Path, *names: str) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in names}

    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    adapter = contents(root / "adapter", "adapter_config.json", "adapter_model.safetensors")
    return {
        "config": Target({"config.yaml": CONFIG.format(model=model).encode()}, read_config, is_text=True),
        "checkpoint": Target(contents(root, "x.ckpt"), read_weights, is_exact=True),
        "adapter": Target(adapter, read_adapter, is_text=True),
        "recorded step": Target(
            contents(root / "recorded", "step-1.pt"), lambda folder: read_step(folder / "step-1.pt") and None
        ),
        "dataset": Target({"rows.jsonl": rows}, read_rows, is_text=True),
    }


def read_config(folder: Path) -> object:
    """Runs the command up to the printed config, without training."""
    FuchsiaCLI(
        ["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder), "--print_config"]
    )
    return None


def read_weights(folder: Path) -> object:
    """The trained weights, as lists."""
    checkpoint = read_checkpoint(folder / "x.ckpt")
    return {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()}


def read_adapter(folder: Path) -> object:
    """Makes the checks of an adapter that precede the start of an engine."""
    check_adapter(LoRASettings(r=4, alpha=8, init_from=str(folder)))
    shapes_in_file(folder / "adapter_model.safetensors")
    return None


def read_recorded(folder: Path) -> object:
    """Reads a recorded step, as `fuchsia replay` does."""
    read_step(folder / "step-1.pt")
    return None


def read_rows(folder: Path) -> object:
    """Reads the rows of GSM8K and renders each prompt."""
    file = str(folder / "rows.jsonl")
    environment = GSM8K(train_file=file, validation_file=file)
    for item in environment.train_items():
        environment.messages(item)
    return None


def examine(target: Target, folder: Path, expected: object) -> str:
    """Outcome of a mutated input: "refused", "taken", or any other outcome with its traceback."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            found = target.read(folder)
    except ConfigError as error:
        return "refused" if str(error).strip() and "\n" not in str(error).strip() else f"not one line: {error!s}"
    except SystemExit as end:
        said = errors.getvalue()
        if end.code in (0, None):
            return "taken"
        return (
            "refused" if end.code == 2 and "error: " in said and "Traceback" not in said else f"exit {end.code}: {said}"
        )
    except Exception:
        return traceback.format_exc()
    if target.is_exact and found != expected:
        return "read, and its content is another one"
    return "taken"


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raises TimeoutError if the `with` block takes longer."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(root: Path, number: int, seed: int, kinds: tuple[str, ...] = ()) -> tuple[Counter[str], list[str]]:
    """Examines `number` mutated inputs of each kind.

    Returns:
        Number of inputs by outcome, and the failures, each with the seed that reproduces it.
    """
    targets, counts, faults = make_targets(root), Counter[str](), list[str]()
    folder, before = root / "mutated", Path.cwd()
    os.chdir(root)
    try:
        for kind in kinds or tuple(targets):
            target, expected = targets[kind], None
            for index in range(-1, number):  # the first one is intact
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                numbers = random.Random(f"{kind} {seed + index}")
                victim = numbers.choice(sorted(target.files))
                for name, content in target.files.items():
                    is_text = target.is_text and not name.endswith(".safetensors")
                    hit = index >= 0 and name == victim
                    (folder / name).write_bytes(mutated(content, numbers, is_text) if hit else content)
                if index < 0:
                    expected = target.read(folder) if target.is_exact else None
                with bounded(BOUND_S):
                    outcome = examine(target, folder, expected)
                if (root / MARK).exists() or (folder / MARK).exists():
                    outcome = "something was executed"
                if outcome not in ("refused", "taken") or (index < 0 and outcome != "taken"):
                    faults.append(f"{kind}, seed {seed + index}: {outcome}")
                    outcome = "WRONG"
                counts[f"{kind}: {outcome}"] += 1
    finally:
        os.chdir(before)
    return counts, faults


if __name__ == "__main__":
    words = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        found, wrong = fuzz(
            Path(made), int(words[0]) if words else 5000, int(words[1]) if words[1:] else 0, tuple(words[2:])
        )
    sys.stdout.write("\n".join(wrong[:20]) + "\n")
    for what, how_many in sorted(found.items()):
        sys.stdout.write(f"{how_many:6d}  {what}\n")
    sys.exit(bool(wrong))
