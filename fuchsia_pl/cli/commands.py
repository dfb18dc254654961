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
    "report": "write report.html of a run, or lay runs over each other",
    "replay": "compute a recorded optimizer step again",
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
    "unknown command 'trian': the commands are fit, validate, test, predict, check-env, serve, report, replay, completion"
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


OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "check-env": check_env_options,
    "serve": serve_options,
    "report": report_options,
    "replay": replay_options,
    "completion": completion_options,
}
