"""The commands of `fuchsia`, the page that lists them, and the options of the commands that define their own.

This module imports no libraries, so that `fuchsia --help` does not load torch.
"""

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path

DEBUG_OPTION = "--debug"
HELP_OPTIONS = ("-h", "--help")
HELP_ALL_OPTION = "--help-all"
# The commands that take the settings of a run, by LightningCLI.
RUN_COMMANDS = {
    "fit": "train a policy: fuchsia fit --config quickstart.yaml",
    "validate": "measure a policy on the held-out items: --ckpt_path last",
    "test": "the same, to rollouts-test.jsonl and metrics named test/",
    "predict": "write completions of the held-out items, without metrics",
}
OTHER_COMMANDS = {
    "check-env": "test an environment with known and hostile texts, without a model",
    "serve": "start the vLLM server of a run, here or on another machine",
    "replay": "compute a recorded optimizer step again",
    "runs": "list the runs; `runs diff A B` compares two",
    "doctor": "check this machine, a config on it, and a first step",
    "completion": 'shell completion: eval "$(fuchsia completion bash)"',
}
COMMANDS = {**RUN_COMMANDS, **OTHER_COMMANDS}
LIKE_FIT = f"All other options are those of `fuchsia fit`; {DEBUG_OPTION} prints the traceback of an error."


def is_help(word: str) -> bool:
    """Whether a word of a command line is a request for help.

    >>> is_help("--help-all"), is_help("--config")
    (True, False)
    """
    return word in HELP_OPTIONS or word == HELP_ALL_OPTION


def overview() -> str:
    """The text of `fuchsia --help`: at most 24 lines of 80 characters."""
    listed = "\n".join(f"  {name:<11} {summary}" for name, summary in COMMANDS.items())
    return f"""usage: fuchsia COMMAND [options]

Reinforcement learning of language models on PyTorch Lightning.

commands:
{listed}

options:
  --help      this page; `fuchsia COMMAND --help` lists the options of a command
  --version   the version
  --debug     with any command: the traceback of an error
"""


def unknown_command(name: str) -> str:
    """The error message for a command that does not exist.

    >>> unknown_command("trian")
    "unknown command 'trian': the commands are fit, validate, test, predict, check-env, serve, replay, runs, doctor, completion"
    >>> unknown_command("fti")
    "unknown command 'fti'. Did you mean 'fit'?"
    """
    similar = difflib.get_close_matches(name, COMMANDS, n=1)
    if similar:
        return f"unknown command {name!r}. Did you mean {similar[0]!r}?"
    return f"unknown command {name!r}: the commands are {', '.join(COMMANDS)}"


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
    return parser


def serve_options() -> argparse.ArgumentParser:
    """The options of `fuchsia serve`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia serve",
        description="Starts the stock vLLM OpenAI server with the configs of a run. Model, type, longest completion, rank of "
        "the adapter and seed are those of the run. Memory and parallelism are those of the config's VLLMColocatedEngine, or "
        "its defaults if the config has another engine.",
        epilog=LIKE_FIT,
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--api_key", help="key that requests must contain (default: environment variable VLLM_API_KEY)")
    parser.add_argument("--allow_open", action="store_true", help="accept requests of other machines without a key too")
    return parser


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


OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "check-env": check_env_options,
    "serve": serve_options,
    "replay": replay_options,
    "runs": runs_options,
    "doctor": doctor_options,
    "completion": completion_options,
}
