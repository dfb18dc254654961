"""`fuchsia predict`: completions of the held-out items, or of the prompts in a file."""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback

from fuchsia_pl.callbacks.answer_log import AnswerLog
from fuchsia_pl.callbacks.rollout_log import log_files
from fuchsia_pl.cli.answer_file import STARTED_AT, AnswerFile, StandardOutput, weights_digest
from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.chat_session import conversation_environment
from fuchsia_pl.cli.evaluated_policy import choose_temperature, policy_words, sampling_words
from fuchsia_pl.cli.launch import is_first_rank
from fuchsia_pl.cli.options import predict_options
from fuchsia_pl.cli.prompt_data import PromptData
from fuchsia_pl.cli.prompt_file import STANDARD, Prompts, read_prompts
from fuchsia_pl.cli.run_folder import remove_unused
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError

SUBCOMMAND = "predict"


class PredictCLI(FuchsiaCLI):
    """Runs `predict` of LightningCLI, on the rows of a file if one is given.

    Args:
        given: The options of `fuchsia predict`.
        arguments: All other options.
        prompts: The rows; None for the held-out items.
        stream: Standard output, for answers that go there.
    """

    def __init__(
        self, given: argparse.Namespace, arguments: list[str], prompts: Prompts | None, stream: TextIO
    ) -> None:
        self.given = given
        self.prompts = prompts
        self.output = StandardOutput(stream) if given.output in (None, STANDARD) else AnswerFile(Path(given.output))
        super().__init__([SUBCOMMAND, *arguments])

    def before_instantiate_classes(self) -> None:
        """Chooses the temperature of several samples."""
        choose_temperature(self.config[SUBCOMMAND].data.sampling, self.given.temperature)

    def instantiate_classes(self) -> None:
        """Makes all objects, and checks the output of an earlier call."""
        super().instantiate_classes()
        if self.prompts is None:
            return
        with self._refusals():
            started_at = self._begin(self.prompts)
            given = self.datamodule.environment
            environment = given if self.given.as_items else conversation_environment(given)
            data = PromptData(
                self.datamodule, self.model.learner, environment, self.prompts.items, self.output.num_done
            )
            data.load_state_dict({STARTED_AT: started_at})
            self.datamodule = data

    def _begin(self, prompts: Prompts) -> str:
        """Checks the output and begins it; returns the date that a chat template writes."""
        settings = self._settings(prompts)
        if isinstance(self.output, AnswerFile):
            settings = self.output.check(settings, prompts.ids)
            if is_first_rank() and not self._is_done:
                self.output.begin(settings)
                stopping.continued = self.output.path
        return str(settings[STARTED_AT])

    def _settings(self, prompts: Prompts) -> dict[str, Any]:
        """All that the answers depend on. The engine's settings of memory and parallelism are left out."""
        config, policy, data = self.config[SUBCOMMAND], self.model.policy_config, self.datamodule
        weights = config.get("ckpt_path") or policy.lora.init_from
        sampling = data.sampling
        return {
            "input": prompts.digest,
            "as_items": bool(self.given.as_items),
            "model": policy.name,
            "dtype": policy.dtype,
            "weights": weights,
            "weights_digest": None if weights is None else weights_digest(Path(weights)),
            "chat_template": data.served_model.chat_template,
            "samples": sampling.validation_samples,
            "temperature": sampling.validation_temperature,
            "max_completion_tokens": sampling.held_out.max_completion_tokens,
            "max_length": sampling.max_length,
            "special_tokens_in_text": sampling.special_tokens_in_text,
            "seed": data.seed,
            # A hash, since settings of an environment may be secret.
            "environment": _hash_of(config.data.environment.as_dict()),
            STARTED_AT: data.state_dict()[STARTED_AT],
        }

    @property
    def _is_done(self) -> bool:
        return self.prompts is not None and self.output.num_done == len(self.prompts.ids)

    def _callbacks(self) -> list[Callback]:
        """The callbacks of every run, and the one that writes the answers."""
        callbacks = super()._callbacks()
        return callbacks if self.prompts is None else [*callbacks, AnswerLog(self.prompts.ids, self.output.write)]

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command, unless all rows have been answered."""
        if not self._is_done:
            try:
                super()._run_subcommand(subcommand)
            finally:
                self.output.end()
            return
        if is_first_rank():
            remove_unused(self.run_folder, self._kept_folder)
        self._tell(f"{self.given.output} has the answers to all {self.output.num_done} rows: nothing is left to do")

    def after_predict(self) -> None:
        """Prints where the completions are. LightningCLI calls this."""
        if self.prompts is None:
            files = [str(path) for path in log_files(self.run_folder) if path.name.startswith("rollouts-predict")]
            self._tell(f"completions of the held-out items: {', '.join(files)}")
            return
        name = "standard output" if self.given.output == STANDARD else self.given.output
        earlier = f", {self.output.num_done} of them from an earlier call" if self.output.num_done else ""
        number = self.output.num_done + self.output.num_written
        number_text = str(number) if number == len(self.prompts.ids) else f"{number} of {len(self.prompts.ids)}"
        self._tell(f"answers to {number_text} rows: {name}{earlier}; whole rollouts: {self.run_folder}")

    def _tell(self, line: str) -> None:
        """Prints a line on the first rank; on standard error if answers may go to standard output."""
        if is_first_rank():
            sys.stdout.write(f"{line}\n")


def predict(arguments: Sequence[str]) -> int:
    """Runs `fuchsia predict`; returns the exit code."""
    given, words = predict_options().parse_known_args(list(arguments))
    try:
        configs, found = policy_words(given, words)
        found += sampling_words(given)
        prompts = _prompts(given)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if prompts is not None:  # an answer per row would stay in memory
        found += ["--return_predictions", "false"]
    with _told_on_stderr(prompts is not None) as stream:
        # A config changes what options before it have set.
        PredictCLI(given, [*configs, *words, *found], prompts, stream)
    return 0


def _prompts(given: argparse.Namespace) -> Prompts | None:
    """The rows of `--input`; None without it.

    Raises:
        ConfigError: The rows or the options cannot be used.
    """
    if given.input is None:
        idle = [f"--{name}" for name in ("output", "as_items") if vars(given)[name]]
        if idle:
            raise ConfigError(
                f"{idle[0]} needs --input FILE: without it the completions of the held-out items are written to the run folder"
            )
        return None
    if given.output is None:
        raise ConfigError("--input needs --output: give a file, which a later call continues, or - for standard output")
    if (
        given.output != STANDARD
        and given.input != STANDARD
        and Path(given.output).resolve() == Path(given.input).resolve()
    ):
        raise ConfigError(f"--output {given.output} is the input: give another file")
    return read_prompts(given.input, given.as_items)


@contextlib.contextmanager
def _told_on_stderr(is_told: bool) -> Iterator[TextIO]:
    """Inside the `with` block, all messages and progress go to standard error. Yields standard output."""
    stream = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if is_told else contextlib.nullcontext():
        yield stream


def _hash_of(settings: object) -> str:
    """A number that differs for other settings, without the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
