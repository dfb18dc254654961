"""LightningCLI with this project's parts wired in."""

import sys
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import Strategy

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.baseline_validation import BaselineValidation
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.lost_rank import LostRank
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.callbacks.step_timer import StepTimer
from fuchsia_pl.cli.chatter import chatter_to
from fuchsia_pl.cli.launch import is_first_rank
from fuchsia_pl.cli.parser import SuggestingParser
from fuchsia_pl.cli.run_folder import DEFAULT_ROOT, SAVED_CONFIG, find_configs, new_run_folder, remove_unused, run_name
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.adapter import check_adapter
from fuchsia_pl.policy.loading import check_quantization
from fuchsia_pl.types import ConfigError

DEFAULT_SEED = 0


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config to the run folder, whatever the loggers are."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on the first rank."""
        file = Path(trainer.default_root_dir) / SAVED_CONFIG
        self.parser.save(self.config, str(file), skip_unset=False, overwrite=True, multifile=False)
        # What the preset made of it; given as one more --config, it pins every part.
        loss = cast(GRPOModule, pl_module).loss_config.resolved()
        objective = Path(trainer.default_root_dir) / "objective.yaml"
        objective.write_text(yaml.safe_dump({"model": {"loss": loss}}, sort_keys=False))


class FuchsiaCLI(LightningCLI):
    """`fuchsia fit | validate | test | predict`, see `fuchsia fit --help`."""

    def __init__(self, args: ArgsType = None) -> None:
        self.arguments: list[str] = []
        self.run_folder = Path()
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
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, in the order in which Lightning calls them, and links what two parts share."""
        parser.add_lightning_class_args(StepTimer, "step_timer")
        # The longest rows are rehearsed while the trainer has the device, which it then leaves to the engine that syncs.
        parser.add_lightning_class_args(Preflight, "preflight")
        parser.add_lightning_class_args(HotSwap, "hotswap")
        parser.add_lightning_class_args(AdapterSync, "adapter_sync")
        parser.add_lightning_class_args(BaselineValidation, "baseline_validation")
        parser.add_lightning_class_args(RolloutLog, "rollout_log")
        parser.add_lightning_class_args(LostRank, "lost_rank")
        parser.add_lightning_class_args(ConsoleReport, "console")
        parser.add_lightning_class_args(AdapterExport, "adapter_export")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        # Item order and sampling seeds come from the run's one seed.
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_run_seed)
        # Model folder, dtype, adapter rank and objective: the engine serves what the trainer trains, and how.
        parser.link_arguments("model.learner", "data.learner", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Looks configs up by name before anything is parsed."""
        given = sys.argv[1:] if args is None else args
        assert isinstance(given, list), "a command line is a list of words"
        try:
            self.arguments = find_configs(given)
        except ValueError as error:
            parser.error(str(error))
        self.config = parser.parse_args(self.arguments)

    def instantiate_classes(self) -> None:
        """Makes the run folder and all parts; what a part refuses is told like any other mistake in a config."""
        root = self._get(self.config, "trainer.default_root_dir") or DEFAULT_ROOT
        try:
            self.run_folder = new_run_folder(root, run_name(self.arguments))
        except ConfigError as error:
            self._parser(self.subcommand).error(str(error))
        chatter_to(self.run_folder)
        try:
            super().instantiate_classes()
            check_quantization(self.model.policy_config.quantization)
            check_adapter(self.model.policy_config.lora)
            self._announce()
            # Last, since it may download or convert: every setting has been accepted by now.
            _ = self.model.learner.served_model.folder
        except ConfigError as error:
            if is_first_rank():
                remove_unused(self.run_folder)
            self._parser(self.subcommand).error(str(error))

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; what only the model, the data or the devices show to be a mistake in a config is told like any other."""
        try:
            super()._run_subcommand(subcommand)
        except ConfigError as error:
            self._parser(subcommand).error(str(error))

    def _announce(self) -> None:
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, ConsoleReport):
            bar.announce(
                self.model.learner.served_model.name, type(self.datamodule.engine).__name__, str(self.run_folder)
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run folder as its root, and a CSV log in it beside any logger of the config.

        Callbacks that every run has are left out where the trainer's own flags say so.
        """
        trainer = self._get(self.config_init, "trainer")
        needless = {
            "console": trainer.enable_progress_bar is False,
            "checkpoint": trainer.enable_checkpointing is False,
        }
        keys = self._parser(self.subcommand).callback_keys
        keys[:] = [key for key in keys if not needless.get(key)]
        given = trainer.logger
        csv = CSVLogger(
            save_dir=self.run_folder.parent.parent, name=self.run_folder.parent.name, version=self.run_folder.name
        )
        loggers: list[Logger] = [] if given is False else [csv]
        if isinstance(given, Logger):
            loggers.append(given)
        elif isinstance(given, list):
            loggers.extend(given)
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        strategy_writes = isinstance(trainer.strategy, Strategy) and trainer.strategy._checkpoint_io is not None
        if not strategy_writes and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(
            default_root_dir=str(self.run_folder), logger=loggers, plugins=plugins, **kwargs
        )


def _run_seed(seed_everything: bool | int) -> int:
    if isinstance(seed_everything, bool):
        raise ConfigError(
            f"seed_everything must be a number, got {seed_everything}: rollouts are addressed by the run's seed"
        )
    return seed_everything
