"""The commands of `fuchsia`, and the page that lists them.

This module imports no libraries, so that `fuchsia --help` does not load torch.
"""

import difflib

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
    "eval": "figures with intervals: --run quickstart/0 --against base",
    "report": "write report.html of a run, or lay runs over each other",
    "chat": "talk to a trained adapter or a model in the terminal",
    "export": "trained weights as an adapter, whole model, GGUF or for Ollama",
    "serve": "a vLLM server: of a finished run, or for one that trains",
    "runs": "list the runs; `runs diff A B` compares two",
    "check-env": "test an environment with known and hostile texts, without a model",
    "plan": "memory of a config on a GPU: --config gsm8k.yaml --gpu 24",
    "doctor": "check this machine, a config on it, and a first step",
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

    >>> unknown_command("trian").partition(",")[0]
    "unknown command 'trian': the commands are fit"
    >>> unknown_command("fti")
    "unknown command 'fti'. Did you mean 'fit'?"
    """
    similar = difflib.get_close_matches(name, COMMANDS, n=1)
    if similar:
        return f"unknown command {name!r}. Did you mean {similar[0]!r}?"
    return f"unknown command {name!r}: the commands are {', '.join(COMMANDS)}"
