"""A sequence-classification model in this process."""

import os
from typing import Any, Literal

from fuchsia_pl.envs.rewards.transcript import source, words_of
from fuchsia_pl.types import ConfigError

Dtype = Literal["float32", "bfloat16"]
GIB = 2**30


def find_device(setting: str) -> str:
    """The device of a setting: "auto" is the rank's GPU, the CPU if torch sees none.

    Raises:
        ConfigError: torch does not see the GPU.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return f"cuda:{rank % found}" if found else "cpu"
    if setting != "cpu" and int(setting.partition(":")[2]) >= found:
        raise ConfigError(
            f'RewardModel has device={setting!r}, and torch sees {found} GPUs: give "auto", "cpu" or another one'
        )
    return setting


class Classifier:
    """Computes the outputs of a sequence-classification model.

    Args:
        name: Folder or hub id.
        revision: Revision on the hub.
        dtype: Type of weights and computation.
        device: A device of torch.

    Raises:
        ConfigError: The model is missing or broken, has no score head, or its files and its weights do not match.
    """

    def __init__(self, name: str, revision: str | None, dtype: Dtype, device: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                **source(name, revision),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are then in the report
                output_loading_info=True,
            )
        except Exception as error:  # the libraries may raise anything on a missing or broken file
            raise ConfigError(
                f"the reward model {name!r} cannot be loaded ({words_of(error)}): it must be a "
                "sequence-classification model with .safetensors weights"
            ) from error
        _check_report(name, report)
        self.max_tokens: int | None = model.config.get_text_config().to_dict().get("max_position_embeddings")
        self._has_pad_id = model.config.get_text_config().pad_token_id is not None
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)

    def device_gb(self, device_index: int) -> float:
        """Memory of the weights on a GPU, in GiB."""
        if self._device.type != "cuda" or self._device.index != device_index:
            return 0.0
        return sum(weight.numel() * weight.element_size() for weight in self._model.parameters()) / GIB

    def logits(self, rows: list[list[int]], batch_size: int) -> list[list[float]]:
        """The outputs of some rows of ids, which are batched by length. Shape [rows, labels].

        Which rows share a batch depends on the rows of this call alone, so that a repeated call has the same bits.
        """
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        found: list[list[float]] = [[] for _ in rows]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for index, outputs in zip(part, self._forward([rows[index] for index in part]), strict=True):
                found[index] = outputs
        return found

    def _forward(self, rows: list[list[int]]) -> list[list[float]]:
        """The outputs of one batch, padded on the right."""
        import torch

        width, pad = max(map(len, rows)), self._pad_id(rows)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        with torch.inference_mode():
            outputs: list[list[float]] = self._model(input_ids=ids, attention_mask=mask).logits.float().tolist()
        return outputs

    def _pad_id(self, rows: list[list[int]]) -> int:
        """The id after the end of a row.

        Causal classifiers of transformers read the last token that is not the config's pad id. Without one, they read the last
        token of a single row and refuse several: an id that no row has is then the config's, with the same result.
        """
        config, text_config = self._model.config, self._model.config.get_text_config()
        if not self._has_pad_id:
            used = {token for row in rows for token in row}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            config.pad_token_id = text_config.pad_token_id = pad
        return int(text_config.pad_token_id)


def _check_report(name: str, report: dict[str, Any]) -> None:
    """Rejects faults that transformers only warns of. A weight without a tensor has random numbers."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ConfigError(
            f"{name!r} is no reward model: its files lack {len(missing)} of the weights of a sequence classifier, the first is "
            f"{missing[0]}, and random numbers would take their place. Give a model that was trained to score"
        )
    reshaped = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in report["mismatched_keys"])
    for faults, what in ((unexpected, "are none of its weights"), (reshaped, "have another shape than its weights")):
        if faults:
            raise ConfigError(
                f"the files of the reward model {name!r} do not match its config.json: {len(faults)} tensors {what}, the first "
                f"is {faults[0]}. Download or save it again"
            )
