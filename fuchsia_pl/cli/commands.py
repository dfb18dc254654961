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
    "predict": "completions of held-out items, or of a file: --input FILE",
}
OTHER_COMMANDS = {
    "chat": "talk to a trained adapter or a model in the terminal",
    "eval": "figures with intervals: --run quickstart/0 --against base",
    "check-env": "test an environment with known and hostile texts, without a model",
    "serve": "start the vLLM server of a run, here or on another machine",
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
    "unknown command 'trian': the commands are fit, validate, test, predict, chat, eval, check-env, serve, replay, completion"
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
    parser.add_argument("--run", help="a run: its config and its newest weights; a path, NAME/N or NAME under runs/")
    parser.add_argument("--ckpt_path", help="a checkpoint of the config: a path, last or best")
    parser.add_argument("--adapter", help="folder of a PEFT adapter")
    parser.add_argument("--against", help="the policy to compare with: base, a run, or the folder of an adapter")
    parser.add_argument("--samples", type=int, help="samples per item (default: data.sampling.validation_samples)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: data.sampling.validation_temperature)")
    parser.add_argument("--max_completion_tokens", type=int, help="most tokens of a sample (default: as in training)")
    parser.add_argument("--num_items", type=int, help="first items only (default: all held-out items)")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="CONFIG",
        help="evaluate on the environment of this config too; repeatable",
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
    parser.add_argument(
        "--samples", type=int, metavar="INT", help="completions per row (default: data.sampling.validation_samples)"
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
    parser.add_argument("--run", metavar="RUN", help="a run: its config and its newest weights; a path, NAME/N or NAME")
    parser.add_argument("--adapter", metavar="FOLDER", help="folder of a PEFT adapter")
    parser.add_argument("--ckpt_path", help=argparse.SUPPRESS)  # among the settings
    return parser


# Commands with the settings of a run and options of their own.
RUN_OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {"predict": predict_options}
OPTIONS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "chat": chat_options,
    "eval": eval_options,
    "check-env": check_env_options,
    "serve": serve_options,
    "replay": replay_options,
    "completion": completion_options,
}
