"""Methods that run in vLLM's worker process."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fuchsia_pl.engines.merge import merged_weights

NICENESS = 19


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`).

    vLLM repacks loaded linear weights for the device, so they cannot be written in place. Its `reload_weights` takes weights
    in checkpoint format and repacks them.
    """

    if TYPE_CHECKING:
        device: torch.device

        def reload_weights(self, **kwargs: Any) -> None:
            """The worker's own method."""

    def give_way(self) -> None:
        """Gives the trainer priority on shared cores.

        For a second after each request vLLM's worker polls its queue without a pause, on a core that the trainer needs by
        then. This costs no sampling speed, since the trainer waits while vLLM samples.
        """
        os.nice(NICENESS)

    def device_uuid(self) -> str:
        """The id of this worker's GPU; see `gpu_uuid`."""
        return gpu_uuid(torch.cuda.current_device())

    def load_trained_weights(self, model_folder: str, trained_folder: str, only_reached: bool) -> None:
        """Rebuilds the served weights from the pristine checkpoint and the trained weights, on the worker's device.

        See `merged_weights`. The memory of the sums, of one layer at a time, is returned to the device. Untested on a GPU.
        """
        if only_reached:  # vLLM warns about every layer that is not reloaded
            logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        weights = merged_weights(Path(model_folder), Path(trained_folder), only_reached, self.device)
        self.reload_weights(weights_iterator=weights)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def gpu_uuid(index: int) -> str:
    """Id of a GPU, the same in all processes and containers.

    Args:
        index: Its index among the GPUs that this process sees.
    """
    return str(torch.cuda.get_device_properties(index).uuid)
