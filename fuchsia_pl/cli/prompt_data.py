"""The data module of `fuchsia predict --input`: answers to the rows of a file in the place of held-out items."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch.utils.data import DataLoader

from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.objectives.config import Learner
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.in_order import Answers, InOrder
from fuchsia_pl.rollouts.phases import PhaseDataset, phase_loader
from fuchsia_pl.types import Item

SPLIT = "predict"


class PromptData(RolloutDataModule):
    """Samples the rows of a file in order. They are not scored.

    Args:
        given: The data module of the config.
        learner: Model and objective.
        environment: Conversations of the rows. An error in its code ends one rollout and not the run.
        items: One item per row.
        num_done: Rows that were answered earlier.
    """

    def __init__(
        self,
        given: RolloutDataModule,
        learner: Learner,
        environment: Environment,
        items: Sequence[Item],
        num_done: int,
    ) -> None:
        environment.reward_functions = []
        environment.reward_weights, environment.initial_reward_weights = {}, {}
        environment.on_error = "unscored"
        super().__init__(
            environment, given.engine, learner, given.sampling, given.batch_size, given.steps_per_epoch, given.seed
        )
        self.items = items
        self.num_done = num_done
        self._left: list[int] = []  # rows without an answer
        self._fits: set[int] = set()  # rows whose prompts leave room for a completion
        self._stream: InOrder | None = None
        self._sampling = ExitStack()  # progress, from the first row to the last

    def setup(self, stage: str) -> None:
        """Checks the rows and starts the engine, see RolloutDataModule. All ranks begin at the first rank's next row."""
        self.num_done = self._trainer.strategy.broadcast(self.num_done)
        super().setup(stage)

    def predict_dataloader(self) -> DataLoader[Answers]:
        """A batch per row of this rank. All ranks have the same number of batches."""
        own, size = self._ranks.share(self._left), self._trainer.world_size
        indices = [index for index in own if index in self._fits]
        sampling = self.sampling
        number = sampling.validation_samples
        activity = self._sampling.enter_context(
            progress.activity("sampling answers", len(indices) * number, "rollouts")
        )
        draw = Draw(self.items, indices, number, sampling.validation_temperature, (self.seed, SPLIT), activity=activity)
        self._stream = InOrder(self.engine, self._row_collector, draw)
        rows = [*own, None] if len(own) * size < len(self._left) else own
        waiting = iter(rows)
        return phase_loader(PhaseDataset(lambda: [self._answered(next(waiting))], len(rows), 1))

    def teardown(self, stage: str) -> None:
        """Ends the display of progress, and closes all else, see RolloutDataModule."""
        self._sampling.close()
        super().teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Does the same after a failure."""
        self._sampling.close()
        super().on_exception(exception)

    @property
    def _row_collector(self) -> Collector:
        assert self._held_out_collector is not None, "setup is called first"
        return self._held_out_collector

    def _check_prompts(self) -> None:
        """Renders all prompts and raises an error for the first one that cannot be used."""
        items, collector = self.items, self._row_collector
        collector.check_template(items, 0)
        self._fits = set(collector.fitting(items, "input"))
        self._left = self._taken.first_held_out(list(range(len(items))), 1)[self.num_done :]

    def _answered(self, index: int | None) -> Answers:
        """The answers to a row; without rollouts if its prompt is too long or if there is no row."""
        assert self._stream is not None, "predict_dataloader is called first"
        if index is None or index not in self._fits:
            self._waited(lambda: None)  # the other ranks wait too
            return Answers((), {}, index)
        stream = self._stream
        rollouts = self._waited(lambda: self._run(stream.take()))
        return Answers(tuple(rollouts), {}, index, stream.seeds(index), self.environment.max_steps)
