"""What vLLM's worker process runs for us."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuchsia_pl.engines.merge import merged_weights


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`).

    Loaded linear weights are repacked for the device, so they cannot be written in place; vLLM's own `reload_weights`
    takes them in checkpoint format and repacks them again.
    """

    if TYPE_CHECKING:

        def reload_weights(self, **kwargs: Any) -> None:
            """The worker's own method."""

    def load_trained_weights(self, model_folder: str, trained_folder: str) -> None:
        """Rebuilds the served weights from the pristine checkpoint and what was trained."""
        self.reload_weights(weights_iterator=merged_weights(Path(model_folder), Path(trained_folder)))
