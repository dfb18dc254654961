"""The configuration of `fuchsia fit` for commands that train nothing."""

from abc import abstractmethod

from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.types import ConfigError


class ConfigOnlyCLI(FuchsiaCLI):
    """Parses the settings of `fuchsia fit` and makes module and data module, without a run folder or a trainer."""

    @abstractmethod
    def use_config(self) -> None:
        """Runs the command on `self.model` and `self.datamodule`. A ConfigError is reported as a configuration error."""

    def instantiate_classes(self) -> None:
        """Makes module and data module; neither loads anything."""
        with self._refusals():
            given = {
                word.partition("=")[0] for word in self.arguments
            }  # the saved config of a resumed run has them too
            for name in ("ckpt_path", "resume.optimizer", "resume.scheduler"):
                if f"--{name}" in given:
                    raise ConfigError(f"--{name} does nothing in this command, which loads no checkpoint: leave it out")
            self.config_init = self.parser.instantiate(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")

    def _run_subcommand(self, subcommand: str) -> None:
        with self._refusals():
            self.use_config()
