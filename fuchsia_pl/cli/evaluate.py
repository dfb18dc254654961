"""`fuchsia eval`: measures a policy on held-out items, and compares it with another one item by item."""

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from fuchsia_pl.callbacks.access import callbacks_of
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.evaluation_log import EvaluationLog
from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.evaluated_policy import Rival, choose_temperature, find_rival, run_arguments
from fuchsia_pl.cli.evaluation_table import comparison_lines, evaluation_table
from fuchsia_pl.cli.failures import refused_by
from fuchsia_pl.cli.options import eval_options
from fuchsia_pl.cli.run_folder import find_config
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.engines.kept import KeptEngine
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.evaluation.measures import HeldOutEvaluation
from fuchsia_pl.evaluation.paired import Difference, differences
from fuchsia_pl.files import replacing
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.adapter import check_adapter
from fuchsia_pl.types import ConfigError

COMPARISON_FILE = "comparison.json"
RIVAL_FOLDER = "against"
SUBCOMMAND = "validate"


class EvalCLI(FuchsiaCLI):
    """Validates with the settings of `fuchsia validate`, once per environment and policy, on one engine.

    The run folder has the files of the policy, and `against/` those of the policy that it is compared with.
    """

    def __init__(self, given: argparse.Namespace, arguments: list[str]) -> None:
        self.given = given
        self.console = Console(highlight=False)
        self.rival: Rival | None = None
        self.others: list[Environment] = []
        self._kept: KeptEngine | None = None
        super().__init__([SUBCOMMAND, *arguments])

    @property
    def kind(self) -> str:
        """The command that names the folder of the run."""
        return "eval"

    def before_instantiate_classes(self) -> None:
        """Chooses the temperature of several samples, which a greedy policy would make all alike."""
        choose_temperature(self.config[SUBCOMMAND].data.sampling, self.given.temperature)

    def instantiate_classes(self) -> None:
        """Makes all objects, the other environments, and the policy to compare with, before anything is loaded."""
        super().instantiate_classes()
        with self._refusals():
            self.others = [_environment_of(config) for config in self.given.also]
            _check_names([self.datamodule.environment, *self.others])
            if self.given.against is not None:
                self.rival = find_rival(self.given.against, self.model.policy_config, self.arguments)
                check_adapter(self.rival.policy.lora)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs all evaluations and ends the engine, also after an error."""
        try:
            super()._run_subcommand(subcommand)
        finally:
            if self._kept is not None:
                self._kept.end()

    def before_validate(self) -> None:
        """Keeps the engine for all evaluations, whose figures are printed as tables. LightningCLI calls this."""
        for report in callbacks_of(self.trainer, ConsoleReport):
            report.lists_figures = False
        lora = [self.model.policy_config.lora] + ([self.rival.policy.lora] if self.rival else [])
        rank = max(settings.r if settings.enabled else 0 for settings in lora)
        self._kept = self.datamodule.engine = KeptEngine(self.datamodule.engine, rank)

    def after_validate(self) -> None:
        """Evaluates the rest, and prints and writes the results. LightningCLI calls this after the first evaluation."""
        found = [self._latest()]
        self.trainer.loggers = []  # they have the metrics of the first evaluation, and names hold one value
        found += [self._evaluated(self.model, environment) for environment in self.others]
        rivals = self._evaluated_rival() if self.rival is not None else []
        if not self.trainer.is_global_zero:
            return
        for evaluation in found:
            self.console.print(evaluation_table(evaluation, self.datamodule.sampling))
        if self.rival is not None:
            pairs = list(zip(found, rivals, strict=True))
            compared = {own.held_out.environment: _compared(own, rival) for own, rival in pairs}
            for line in comparison_lines(self.rival.name, compared):
                self.console.print(line, soft_wrap=True, markup=False)
            write_comparison(self.run_folder / COMPARISON_FILE, self.rival.name, compared)
        self.console.print(f"done: {self.run_folder}", soft_wrap=True, markup=False)

    def _evaluated(
        self, module: GRPOModule, environment: Environment, checkpoint: Path | None = None
    ) -> HeldOutEvaluation:
        given = self.datamodule
        assert self._kept is not None
        data = RolloutDataModule(
            environment, self._kept, module.learner, given.sampling, given.batch_size, given.steps_per_epoch, given.seed
        )
        path = None if checkpoint is None else str(checkpoint)
        self.trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False)
        return self._latest()

    def _evaluated_rival(self) -> list[HeldOutEvaluation]:
        """Evaluates the other policy on the same items with the same seeds."""
        assert self.rival is not None
        if self.trainer.is_global_zero:
            self.console.print(f"against {self.rival.name}:", soft_wrap=True, markup=False)
        self.model.policy = None  # the device may not have room for two
        gc.collect()
        module = GRPOModule(self.rival.policy, self.model.loss_config, self.model.optimizer, self.model.lr_scheduler)
        # Lightning has no setter; the callbacks write to this folder.
        self.trainer._default_root_dir = str(self.run_folder / RIVAL_FOLDER)  # type: ignore[attr-defined]
        environments = [self.datamodule.environment, *self.others]
        return [self._evaluated(module, environment, self.rival.checkpoint) for environment in environments]

    def _latest(self) -> HeldOutEvaluation:
        logs = callbacks_of(self.trainer, EvaluationLog)
        assert logs[0].latest is not None, "an evaluation covers all of its items"
        return logs[0].latest


def _compared(own: HeldOutEvaluation, rival: HeldOutEvaluation) -> list[Difference]:
    return differences(own.table, rival.table, own.held_out.num_samples)


def _check_names(environments: Sequence[Environment]) -> None:
    """Refuses two environments of one class: files and figures name them by it."""
    names = [type(environment).__name__ for environment in environments]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(
            f"--also names another {repeated}, and figures are named by the class of their environment: evaluate it in a second "
            "`fuchsia eval`"
        )


def _environment_of(config: str) -> Environment:
    """The environment of a config.

    Raises:
        ConfigError: There is no such config, or it has no environment that can be made.
    """
    path = find_config(config)
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        settings = loaded["data"]["environment"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"--also {config}: the config has no data.environment ({type(error).__name__})") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--environment", type=Environment)
    with refused_by(f"--also {config}: its data.environment cannot be made"):
        environment: Environment = parser.instantiate(parser.parse_object({"environment": settings})).environment
    return environment


def write_comparison(path: Path, name: str, compared: dict[str, list[Difference]]) -> None:
    """Writes the differences of each environment as JSON, atomically.

    Raises:
        DiskError: The file cannot be written.
    """
    environments = {
        environment: {
            one.name: {
                "value": one.first,
                "against": one.second,
                "difference": one.value,
                "low": one.low if math.isfinite(one.low) else None,
                "high": one.high if math.isfinite(one.high) else None,
                "items_higher": one.num_higher,
                "items_lower": one.num_lower,
                "p_value": one.p_value,
            }
            for one in found
        }
        for environment, found in compared.items()
    }
    with replacing(path) as partial:
        partial.write_text(
            json.dumps({"against": name, "environments": environments}, indent=1) + "\n", encoding="utf-8"
        )


def evaluate(arguments: Sequence[str]) -> int:
    """Runs `fuchsia eval`; returns the exit code."""
    given, words = eval_options().parse_known_args(list(arguments))
    try:
        run = run_arguments(given, words)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    EvalCLI(given, run)
    return 0
