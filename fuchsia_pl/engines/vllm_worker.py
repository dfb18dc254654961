"""What vLLM's worker process runs for us."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuchsia_pl.engines.merge import merged_weights

NICENESS = 19


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`).

    Loaded linear weights are repacked for the device, so they cannot be written in place; vLLM's own `reload_weights`
    takes them in checkpoint format and repacks them again.
    """

    if TYPE_CHECKING:

        def reload_weights(self, **kwargs: Any) -> None:
            """The worker's own method."""

    def give_way(self) -> None:
        """Lets the trainer go first where both want a core.

        For a second after each request vLLM's worker asks its queue for the next without a pause, on a core that by then
        the trainer needs. While it samples, the trainer waits.
        """
        os.nice(NICENESS)

    def load_trained_weights(self, model_folder: str, trained_folder: str, only_reached: bool) -> None:
        """Rebuilds the served weights from the pristine checkpoint and what was trained; see `merged_weights`."""
        if only_reached:  # vLLM warns of every layer that is not loaded again
            logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        weights = merged_weights(Path(model_folder), Path(trained_folder), only_reached)
        self.reload_weights(weights_iterator=weights)
