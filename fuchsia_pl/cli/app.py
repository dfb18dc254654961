"""LightningCLI with the classes of this project."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from fuchsia_pl import orphans
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.console_progress import RunConsole, shown_progress
from fuchsia_pl.callbacks.defaults import DEFAULT_CALLBACKS, default_callbacks
from fuchsia_pl.callbacks.evaluation_log import EvaluationLog
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.callbacks.run_metrics import Row, RunMetrics
from fuchsia_pl.callbacks.run_state import RunState
from fuchsia_pl.callbacks.stop_signals import await_ranks
from fuchsia_pl.cli.chatter import chatter_to
from fuchsia_pl.cli.checkpoints import (
    check_checkpoint,
    check_resume,
    earlier_evaluations,
    earlier_metrics,
    find_checkpoint,
    read_given,
)
from fuchsia_pl.cli.class_change import fresh_arguments
from fuchsia_pl.cli.failures import refused_by
from fuchsia_pl.cli.launch import agreed_checkpoint, is_first_rank
from fuchsia_pl.cli.parser import SuggestingParser
from fuchsia_pl.cli.run_folder import (
    DEFAULT_ROOT,
    SAVED_CONFIG,
    SAVED_OBJECTIVE,
    find_configs,
    nearest_existing,
    new_run_folder,
    remove_unused,
    run_name,
)
from fuchsia_pl.cli.run_loggers import check_packages, placed, running
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.envs.user_code import FAILED, is_success
from fuchsia_pl.evaluation.held_out import HeldOut
from fuchsia_pl.files import writing
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.adapter import check_adapter
from fuchsia_pl.policy.loading import check_quantization, trained_shapes
from fuchsia_pl.policy.model_folder import blank_model
from fuchsia_pl.policy.schedules import check_optimization
from fuchsia_pl.policy.targets import check_targets
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError

DEFAULT_SEED = 0


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config to the run folder, with any loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on the first rank."""
        file = Path(trainer.default_root_dir) / SAVED_CONFIG
        with writing(file):
            self.parser.save(self.config, str(file), skip_unset=False, overwrite=True, multifile=False)
        # The objective with all parts of its preset. As an additional --config, it fixes every part.
        loss = cast(GRPOModule, pl_module).loss_config.resolved()
        objective = Path(trainer.default_root_dir) / SAVED_OBJECTIVE
        with writing(objective):
            objective.write_text(yaml.safe_dump({"model": {"loss": loss}}, sort_keys=False))


class FuchsiaCLI(LightningCLI):
    """`fuchsia fit | validate | test | predict`. `settings_table` writes their help pages."""

    def __init__(self, args: ArgsType = None) -> None:
        self._given = sys.argv[1:] if args is None else args
        self.arguments: list[str] = []
        self.run_folder = Path()
        self._kept_folder = Path()  # the lowest folder above the run's that existed before it
        self._earlier: list[Row] = []  # metrics of the run that this one resumes
        self._earlier_evaluations: list[HeldOut] = []
        self._state: RunState | None = None
        super().__init__(
            GRPOModule,
            RolloutDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=DEFAULT_SEED,
            trainer_defaults={
                "accelerator": "auto",
                "devices": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            parser_class=SuggestingParser,
            parser_kwargs={"prog": "fuchsia"},
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that the command line starts with, or all: the parser of each has every setting and takes long to make."""
        commands = LightningCLI.subcommands()
        first = self._given[0] if isinstance(self._given, list) and self._given else ""
        return {first: commands[first]} if first in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds a section for each default callback, and links what two parts share."""
        for section, callback in DEFAULT_CALLBACKS.items():
            parser.add_lightning_class_args(callback, section)
        # The run's one seed determines item order and sampling seeds.
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_run_seed)
        # Links model folder, dtype, adapter rank and objective, so that engine and trainer use the same ones.
        parser.link_arguments("model.learner", "data.learner", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Looks configs up by name before anything is parsed."""
        self.arguments = self.found_configs(parser, sys.argv[1:] if args is None else args)
        with fresh_arguments():
            try:
                self.config = parser.parse_args(self.arguments)
            except ValueError as error:  # from the system, for a value that is tried as the path of a further config
                parser.error(f"a setting of the configs or of the command line cannot be read: {error}", error)

    def found_configs(self, parser: LightningArgumentParser, args: ArgsType) -> list[str]:
        """The command line with each config name replaced by the path of its file."""
        assert isinstance(args, list), "a command line is a list of words"
        try:
            return find_configs(args)
        except ConfigError as error:
            parser.error(str(error), error)

    def _parse_ckpt_path(self) -> None:
        """Replaces Lightning's method, which unpacks the checkpoint and uses its settings instead of the config's."""

    @property
    def kind(self) -> str:
        """The command that names the folder of the run."""
        return str(self.subcommand)

    def instantiate_classes(self) -> None:
        """Makes the run folder and all objects of the config; reports settings that they refuse as configuration errors."""
        root = self._get(self.config, "trainer.default_root_dir") or DEFAULT_ROOT
        is_quiet = self._get(self.config, "trainer.enable_progress_bar") is False or not is_first_rank()
        with self._refusals(), shown_progress(RunConsole(highlight=False, quiet=is_quiet)):
            check_packages(self._get(self.config, "trainer").logger)
            checkpoint = self._find_checkpoint(Path(root) / run_name(self.arguments))
            self._kept_folder = nearest_existing(Path(root))
            self.run_folder = new_run_folder(root, run_name(self.arguments), self.kind)
            if checkpoint is not None and self.subcommand == "fit" and is_first_rank():
                self._earlier = earlier_metrics(Path(self.config.fit.ckpt_path), checkpoint)
                self._earlier_evaluations = earlier_evaluations(Path(self.config.fit.ckpt_path), checkpoint)
            with self._new_state().recorded():
                self._instantiate_checked(checkpoint)

    def _new_state(self) -> RunState:
        max_steps = self._get(self.config, "trainer.max_steps") if self.subcommand == "fit" else None
        limit = max_steps if max_steps is not None and max_steps >= 0 else None
        given = self.config[self.subcommand].get("ckpt_path")
        self._state = RunState(self.run_folder, self.kind, limit, given, is_first_rank())
        return self._state

    def _instantiate_checked(self, checkpoint: dict[str, Any] | None) -> None:
        """Makes all objects of the config and checks that they fit together."""
        chatter_to(self.run_folder)
        with refused_by("the trainer does not take its settings"):
            super().instantiate_classes()
        if self.subcommand == "fit":
            check_optimization(self.model.optimizer, self.model.lr_scheduler, self.trainer)
        check_quantization(self.model.policy_config.quantization)
        check_adapter(self.model.policy_config.lora)
        # Last, since it may download or convert a model.
        check_targets(blank_model(self.model.learner.served_model.folder), self.model.policy_config.lora)
        self._check_weights(checkpoint)
        self._announce()

    def _find_checkpoint(self, runs: Path) -> dict[str, Any] | None:
        """The checkpoint of `--ckpt_path`, read before the run has a folder; None without that option."""
        arguments = self.config[self.subcommand]
        given = arguments.get("ckpt_path")
        if any(arguments.resume.as_dict().values()) and (self.subcommand != "fit" or given is None):
            raise ConfigError(
                "resume.optimizer and resume.scheduler decide what `fit --ckpt_path` continues with, and do nothing here: leave "
                "them out"
            )
        if given is None:
            return None
        if arguments.get("weights_only") is False:
            raise ConfigError(
                "--weights_only false would let a checkpoint run code, and those of Fuchsia-PL need none: leave it out"
            )
        console = Console(highlight=False, quiet=not is_first_rank())
        path = agreed_checkpoint(lambda: find_checkpoint(str(given), runs, console))
        arguments.ckpt_path = str(path)
        return read_given(path)

    def _check_weights(self, checkpoint: dict[str, Any] | None) -> None:
        """Compares the headers of the files of model, adapter and checkpoint, before anything is loaded."""
        policy, folder = self.model.policy_config, self.model.learner.served_model.folder
        shapes = trained_shapes(policy, folder, with_critic=self.model.loss_config.parts.advantage == "gae")
        if checkpoint is not None:
            path = self.config[self.subcommand].ckpt_path
            check_checkpoint(checkpoint, path, shapes, self.trainer.strategy)
            if self.subcommand == "fit":
                self.model.resume_choice = self._get(self.config_init, "resume").choice
                check_resume(checkpoint, path, self.model)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; reports settings that the model, the data or the devices refuse as configuration errors."""
        orphans.watch()  # before a launcher starts other ranks
        assert self._state is not None, "instantiate_classes comes first"
        try:
            with self._refusals(), self._state.recorded(), running(self.trainer):
                super()._run_subcommand(subcommand)
        except BaseException:
            if stopping.signum is not None:  # after an error, other ranks may wait for this one forever
                await_ranks(self.trainer)
            raise
        await_ranks(self.trainer)
        self._state.end("finished")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Inside the `with` block, a refused setting ends the program with one line, and the folder is removed if nothing ran."""
        try:
            yield
        except (ConfigError, MisconfigurationException) as error:
            if is_first_rank() and self.run_folder != Path():
                remove_unused(self.run_folder, self._kept_folder)
            self._parser(self.subcommand).error(str(error), error)
        except SystemExit as end:
            if type(end) is not SystemExit or not is_success(end.code):
                raise
            where = traceback.extract_tb(end.__traceback__)[-1]
            called = f"some code called sys.exit({end.code}) ({where.filename}, line {where.lineno})"
            sys.stderr.write(f"error: {called} before the run ended\n")
            raise SystemExit(FAILED) from end

    def _announce(self) -> None:
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, ConsoleReport) and is_first_rank():
            bar.announce(self.model.learner.served_model.name, self.datamodule.engine.name, str(self.run_folder))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run folder as its root, and a CSV log in it beside any logger of the config.

        Callbacks that every run has are left out if flags of the trainer disable them.
        """
        trainer = self._get(self.config_init, "trainer")
        loggers: list[Logger] = [] if trainer.logger is False else [RunMetrics(self.run_folder, self._earlier)]
        given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        configs = self._get(self.config, "trainer").logger
        own = [logger for logger in given if isinstance(logger, Logger)]
        loggers += placed(own, configs if isinstance(configs, list) else [configs] * len(own), self.run_folder)
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        strategy_writes = isinstance(trainer.strategy, Strategy) and trainer.strategy._checkpoint_io is not None
        if not strategy_writes and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        fixed = {
            "default_root_dir": str(self.run_folder),
            "logger": loggers,
            "plugins": plugins,
            "callbacks": self._callbacks(),
        }
        return self._instantiate_trainer({**trainer, **fixed, **kwargs}, [])

    def _callbacks(self) -> list[Callback]:
        """The default callbacks as their sections configure them, with those of `trainer.callbacks`."""
        trainer = self._get(self.config_init, "trainer")
        given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        given = [callback for callback in [*given, self._state] if callback is not None]
        without: set[type[Callback]] = set()
        if trainer.enable_progress_bar is False:
            without.add(ConsoleReport)
        if trainer.enable_checkpointing is False:
            without.add(RunCheckpoint)
        for section, kind in DEFAULT_CALLBACKS.items():
            if kind not in without and not self._is_replaced(section, given):
                given.append(self._get(self.config_init, section))
        callbacks = default_callbacks(*given, without=without)
        for callback in callbacks:
            if isinstance(callback, EvaluationLog):
                callback.earlier = self._earlier_evaluations
        return callbacks

    def _is_replaced(self, section: str, given: list[Callback]) -> bool:
        """Whether a callback of `trainer.callbacks` replaces that of a section.

        Raises:
            ConfigError: The section has settings, which would have no effect.
        """
        kind = DEFAULT_CALLBACKS[section]
        replacement = next((callback for callback in given if isinstance(callback, kind)), None)
        if replacement is None:
            return False
        if self._get(self.config, section) != self._parser(self.subcommand).get_defaults().get(section):
            raise ConfigError(
                f"{section} has settings, and trainer.callbacks has {type(replacement).__name__}, which replaces that callback: "
                f"set init_args there and leave {section} out"
            )
        return True


def _run_seed(seed_everything: bool | int) -> int:
    if isinstance(seed_everything, bool):
        raise ConfigError(
            f"seed_everything must be a number, got {seed_everything}: rollouts are addressed by the run's seed"
        )
    return seed_everything
