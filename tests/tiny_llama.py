"""The tests' tiny Llama in numpy: a token costs a small part of a forward pass of transformers, whose weights it has."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

Array = NDArray[np.float32]


@dataclass
class Past:
    """Keys and values of the tokens so far, per layer: shape [key-value heads, tokens, head size]."""

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[1] if self.keys else 0

    def copy(self) -> "Past":
        return Past(list(self.keys), list(self.values))  # `extended` makes new arrays

    def extended(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        if len(self.keys) == layer:
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer] = np.concatenate([self.keys[layer], keys], axis=1)
            self.values[layer] = np.concatenate([self.values[layer], values], axis=1)
        return self.keys[layer], self.values[layer]


class TinyLlama:
    """Logits of a Llama in float32, with the weights that a model has now.

    Prompts are computed once: siblings continue from the same keys and values.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        config = model.config
        self._weights = {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}
        self._num_layers, self._epsilon = config.num_hidden_layers, config.rms_norm_eps
        self._num_heads, self._num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._frequencies = model.model.rotary_emb.inv_freq.float().numpy()
        self._prompts: dict[tuple[int, ...], tuple[Array, Past]] = {}

    def begin(self, prompt_ids: tuple[int, ...]) -> tuple[Array, Past]:
        """The logits after a prompt, shape [vocabulary], and its keys and values."""
        if prompt_ids not in self._prompts:
            past = Past()
            self._prompts[prompt_ids] = self.next(prompt_ids, past), past
        logits, past = self._prompts[prompt_ids]
        return logits, past.copy()

    def next(self, ids: tuple[int, ...], past: Past) -> Array:
        """The logits after further tokens, which are added to `past`."""
        weights, start = self._weights, past.length
        angles = np.arange(start, start + len(ids), dtype=np.float32)[:, None] * self._frequencies
        cosines, sines = (np.concatenate([part, part], axis=1) for part in (np.cos(angles), np.sin(angles)))
        hidden = weights["model.embed_tokens.weight"][list(ids)]
        for layer in range(self._num_layers):
            name = f"model.layers.{layer}."
            normed = self._normed(hidden, f"{name}input_layernorm")
            hidden = hidden + self._attended(normed, layer, past, cosines, sines)
            normed = self._normed(hidden, f"{name}post_attention_layernorm")
            gate = normed @ weights[f"{name}mlp.gate_proj.weight"].T
            up = normed @ weights[f"{name}mlp.up_proj.weight"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}mlp.down_proj.weight"].T
        return self._normed(hidden[-1:], "model.norm")[0] @ weights["lm_head.weight"].T

    def _normed(self, hidden: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(hidden * hidden, axis=-1, keepdims=True) + self._epsilon)
        return hidden / scale * self._weights[f"{name}.weight"]

    def _heads(self, normed: Array, layer: int, part: str, num_heads: int) -> Array:
        """Shape [heads, tokens, head size]."""
        projected = normed @ self._weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].T
        return projected.reshape(len(normed), num_heads, -1).transpose(1, 0, 2)

    def _attended(self, normed: Array, layer: int, past: Past, cosines: Array, sines: Array) -> Array:
        queries = _turned(self._heads(normed, layer, "q", self._num_heads), cosines, sines)
        keys = _turned(self._heads(normed, layer, "k", self._num_kv_heads), cosines, sines)
        keys, values = past.extended(layer, keys, self._heads(normed, layer, "v", self._num_kv_heads))
        num_tokens, size = queries.shape[1:]
        grouped = queries.reshape(self._num_kv_heads, -1, num_tokens, size)  # query heads that share a key-value head
        scores = grouped @ keys[:, None].swapaxes(-1, -2) * np.float32(size**-0.5)
        if num_tokens > 1:
            scores += np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), k=scores.shape[-1] - num_tokens + 1)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ values[:, None]).reshape(self._num_heads, num_tokens, size)
        return (
            mixed.transpose(1, 0, 2).reshape(num_tokens, -1)
            @ self._weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        )


def _turned(heads: Array, cosines: Array, sines: Array) -> Array:
    """Rotary position embedding, as transformers pairs the two halves of a head."""
    half = heads.shape[-1] // 2
    return heads * cosines + np.concatenate([-heads[..., half:], heads[..., :half]], axis=-1) * sines
