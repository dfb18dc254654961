"""The options of the commands that define their own. This module imports no libraries."""

import argparse
from collections.abc import Callable
from pathlib import Path

from fuchsia_pl.cli.commands import DEBUG_OPTION, LIKE_FIT

# Memory of GPUs in GiB, as torch reports it: with less than their names promise, since ECC and the driver take a part.
GPU_GIB = {
    "h100": 79.1,
    "h200": 139.8,
    "b200": 178.3,
    "a100": 79.2,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a6000": 47.4,
    "l4": 22.0,
    "a10g": 22.0,
    "rtx4090": 23.5,
    "rtx3090": 23.6,
    "v100": 31.7,
    "t4": 14.6,
}
DTYPES = ("bfloat16", "float16", "float32")


def check_env_options() -> argparse.ArgumentParser:
    """The options of `fuchsia check-env`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia check-env",
        description="Tests an environment. Known answers and hostile texts take the place of the policy's output, in the code "
        "that collects rollouts in training, so prompts, tools, reward functions and time limits are the real ones. Reports "
        "texts that stop the run, that get no reward, or that get as much as the gold answer. Loads the tokenizer, no model.",
        epilog=LIKE_FIT,
        allow_abbrev=False,
    )
    parser.add_argument("--num-items", type=int, default=4, help="number of items to test on (default: 4)")
    parser.add_argument(
        "--all-tasks",
        action="store_true",
        help="audit the reward of every task that the environment could be configured with (of an environment without tasks: its "
        "rewards), in processes with limits, and nothing else",
    )
    return parser


def serve_options() -> argparse.ArgumentParser:
    """The options of `fuchsia serve`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia serve",
        description="With a run (or the folder of an adapter): serves its trained weights beside their base on the stock vLLM "
        "OpenAI server, as NAME-N and as the base's name. Without: starts the server that a training samples on "
        "(`fuchsia serve --config …`; model, type, longest completion, rank of the adapter and seed are those of the config, "
        "memory and parallelism those of its VLLMColocatedEngine, and the options of this page up to --allow_open apply).",
        epilog=f"With --config, all other options are those of `fuchsia fit`. {DEBUG_OPTION} prints the traceback of an error.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run (runs/NAME/0, NAME/0, or NAME for its newest), or the folder of an adapter")
    _add_listener(parser)
    parser.add_argument(
        "--max_model_len",
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt plus completion in tokens (default: the model's limit, or as much as the cache holds)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the base's weights (default: that of the run)")
    parser.add_argument("--kv_cache_gb", type=float, default=1.0, help="memory for keys and values in GiB (default: 1)")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where its name in the run does not lead to it")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    return parser


def serve_config_options() -> argparse.ArgumentParser:
    """The own options of `fuchsia serve --config`."""
    parser = argparse.ArgumentParser(prog="fuchsia serve", epilog=LIKE_FIT, allow_abbrev=False)
    _add_listener(parser)
    return parser


def _add_listener(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--api_key", help="key that requests must contain (default: environment variable VLLM_API_KEY)")
    parser.add_argument("--allow_open", action="store_true", help="accept requests of other machines without a key too")


def replay_options() -> argparse.ArgumentParser:
    """The options of `fuchsia replay`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia replay",
        description="Computes losses and gradients of a recorded step again. A run records the steps that it skips because a "
        "loss or a gradient is not finite, and those of finite_guard.record_steps. The file contains the trained weights and the "
        "tokens; the model is found by its name.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="a recorded step, such as runs/NAME/0/recorded/step-7.pt")
    return parser


def completion_options() -> argparse.ArgumentParser:
    """The options of `fuchsia completion`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia completion",
        description="Prints a script that completes commands, settings and names of configs. Put "
        '`eval "$(fuchsia completion bash)"` into ~/.bashrc. In zsh, run `autoload -U bashcompinit && bashcompinit` first.',
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=["bash"], help="the shell")
    return parser


def chat_options() -> argparse.ArgumentParser:
    """The options of `fuchsia chat`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia chat",
        description="A conversation in the terminal, with the tools of the run's environment. Model and adapter are loaded in "
        "this process. Lines of standard input are answered too. Commands: /base, /system, /reset, /help, /quit.",
        allow_abbrev=False,
    )
    parser.add_argument("target", help="a run (quickstart/0), the folder of an adapter, or a model")
    parser.add_argument("--config", help="config with the model and the environment (default: the run's)")
    parser.add_argument("--system", default="", help="system message of the conversation")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--max_tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first answer (default: 0)")
    return parser


def export_options() -> argparse.ArgumentParser:
    """The options of `fuchsia export`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia export",
        description="Writes the trained weights of a run in the format of another tool, with a model card. peft: the adapter. "
        "merged: a model folder of transformers and vLLM. gguf: one file for llama.cpp. ollama: that file with a Modelfile.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run (runs/NAME/0, NAME/0, or NAME for its newest), or the folder of an adapter")
    formats = ["peft", "merged", "gguf", "ollama"]
    parser.add_argument("--to", choices=formats, default="peft", help="the format (default: peft)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="new folder for the files (default: RUN/export/FORMAT)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in that folder")
    parser.add_argument("--dtype", choices=DTYPES, help="merged: type of the weights (default: that of the run)")
    kinds = ["f32", "f16", "bf16", "q8_0"]
    parser.add_argument("--quantize", choices=kinds, help="gguf, ollama: type of the weights (default: f16)")
    parser.add_argument("--temperature", type=float, help="ollama: sampling temperature (default: Ollama's)")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where its name in the run does not lead to it")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the files to this repository on the hub too")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    return parser


def eval_options() -> argparse.ArgumentParser:
    """The options of `fuchsia eval`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia eval",
        description="Measures a policy on the held-out items: rewards, accuracy, pass@k and maj@k, each with its 95 % interval "
        "over items. Without --run, --ckpt_path and --adapter it is the model of the config. With --against both policies answer "
        "the same items with the same seeds, and every figure is compared item by item.",
        epilog=LIKE_FIT,
        allow_abbrev=False,
    )
    _add_held_out_policy(parser)
    parser.add_argument("--ckpt_path", help="a checkpoint of the config: a path, last or best")
    parser.add_argument("--against", help="the policy to compare with: base, a run, or the folder of an adapter")
    parser.add_argument("--num_items", type=int, help="first items only (default: all held-out items)")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="CONFIG",
        help="evaluate on the environment of this config too; repeatable",
    )
    return parser


def report_options() -> argparse.ArgumentParser:
    """The options of `fuchsia report`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia report",
        description="Writes report.html: status, curves, evaluations, settings and rollouts of a run, in one file that opens "
        "without a network. A run writes it by itself while it trains; this command makes it of a run that was killed, copied or "
        "of an older version. With several runs, the curves of the others are laid over those of the first.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run: runs/quickstart/0, quickstart/0, or quickstart")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the folder of the first run"
    )
    parser.add_argument("--root", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument(
        "--max_rollouts",
        type=int,
        default=10_000,
        metavar="N",
        help="rollouts that the page shows at most (default: 10000)",
    )
    return parser


def predict_options() -> argparse.ArgumentParser:
    """The own options of `fuchsia predict`. Its help page lists them before the settings."""
    parser = argparse.ArgumentParser(prog="fuchsia predict", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines with a {"prompt": "…"} or {"messages": […]} each, and an "id" if wanted; - reads all of standard '
        "input. Without it, the held-out items are completed.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="a line per row in the order of the input; the same command continues it. - is standard output.",
    )
    parser.add_argument(
        "--as_items", "--as-items", action="store_true", help="rows are items of the config's environment"
    )
    _add_held_out_policy(parser)
    parser.add_argument("--ckpt_path", help=argparse.SUPPRESS)  # among the settings
    return parser


def _add_held_out_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a policy, and how it samples held-out items or rows."""
    parser.add_argument("--run", metavar="RUN", help="a run: its config and its newest weights; a path, NAME/N or NAME")
    parser.add_argument("--adapter", metavar="FOLDER", help="folder of a PEFT adapter")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="INT",
        help="completions per item or row (default: data.sampling.validation_samples)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="NUMBER",
        help="0 is greedy (default: data.sampling.validation_temperature; with several samples that of training)",
    )
    parser.add_argument(
        "--max_completion_tokens", type=int, metavar="INT", help="most tokens of a completion (default: as in training)"
    )


# Commands with the settings of a run and options of their own.
RUN_OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {"predict": predict_options}


def runs_options() -> argparse.ArgumentParser:
    """The options of `fuchsia runs`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia runs",
        description="Lists the trainings under a root, the newest first: steps, best held-out figure, last mean reward, start, "
        "duration, size on the disk, and how each ended. `fuchsia runs diff A B` compares two.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "root", nargs="?", default="runs", help="folder of the runs, or of one config (default: ./runs)"
    )
    parser.add_argument("--all", action="store_true", help="evaluations, tests and predictions too")
    parser.add_argument("--name", help="only runs whose name or config matches, such as 'gsm8k*'")
    outcomes = ["running", "finished", "stopped", "failed", "killed", "unknown"]
    parser.add_argument("--ended", choices=outcomes, help="only runs that ended so")
    parser.add_argument("--limit", type=int, help="the newest N only")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    return parser


def runs_diff_options() -> argparse.ArgumentParser:
    """The options of `fuchsia runs diff`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia runs diff",
        description="Prints the settings of two runs that differ, and their figures. A run is a folder, NAME/N under the root, "
        "or NAME for the newest training of that config.",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help="a run, such as quickstart/0")
    parser.add_argument("b", metavar="B", help="another run")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: ./runs)")
    parser.add_argument("--json", action="store_true", help="JSON in place of the tables")
    return parser


def doctor_options() -> argparse.ArgumentParser:
    """The options of `fuchsia doctor`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia doctor",
        description="Checks the machine: versions, devices, the build of vLLM, the hub, shared memory, disk, memory, limits. "
        "With --config also whether the model, tokenizer, chat template, adapter and environment of the config fit together. "
        "Prints a table with what to do for each finding. The exit code is 1 if one of them is a problem.",
        epilog=LIKE_FIT,
        allow_abbrev=False,
    )
    parser.add_argument("--step", action="store_true", help="also run one small training step of the config")
    parser.add_argument("--step-bound", type=float, default=900.0, help="seconds that it may take (default: 900)")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    return parser


def plan_options() -> argparse.ArgumentParser:
    """The options of `fuchsia plan`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia plan",
        description="Prints where the memory of a GPU goes in a training with a config, at the peaks of trainer and engine, and "
        "whether it fits; if not, settings with which it does. Needs neither weights nor a GPU: forward and backward of the "
        "largest micro-batch run on tensors without memory. Of a model on the hub only its config.json is needed. All figures "
        "are estimates; `fuchsia fit` measures the trainer's part before its first step. Exit code 1: it does not fit.",
        epilog=LIKE_FIT,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu", required=True, metavar="GIB", help=f"memory of a GPU in GiB, or its name: {', '.join(GPU_GIB)}"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs, each with a rank (default: trainer.devices)")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    return parser


OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "chat": chat_options,
    "eval": eval_options,
    "check-env": check_env_options,
    "export": export_options,
    "serve": serve_options,
    "report": report_options,
    "replay": replay_options,
    "runs": runs_options,
    "plan": plan_options,
    "doctor": doctor_options,
    "completion": completion_options,
}
