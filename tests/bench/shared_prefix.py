"""Shared prefixes: what arithmetic allows, the speed at a long prompt, and the memory of attention by the number of tokens.

A CPU without bfloat16 emulates it about 90 times slower, so all of this is in float32.
"""

import tempfile
import time

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.prefix_kernels import joined_attention
from fuchsia_pl.policy.prefix_layout import lay_out
from tests.bench.training import GROUP, batches_of, make_policy, rows, run
from tests.bench.work import model_folder, report

PROMPT, OWN, NUM_ROUNDS, NUM_LAYERS = 2000, 500, 3, 2


def allowed_speedup(config: LlamaConfig, prompt_tokens: int, own_tokens: int) -> float:
    """Products of plain rows / products with a shared prompt, in blocks and head. The last token of a row is no input."""
    width, keys = config.hidden_size, config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    block = config.num_hidden_layers * width * (2 * width + 2 * keys + 3 * config.intermediate_size)
    head = GROUP * own_tokens * width * config.vocab_size
    plain, shared = GROUP * (prompt_tokens + own_tokens - 1), prompt_tokens + GROUP * (own_tokens - 1)
    return (plain * block + head) / (shared * block + head)


def compared(config: LlamaConfig, num_prompts: int, prompt_tokens: int, own_tokens: int) -> dict[str, float]:
    """Seconds of the processor for forward and backward, the fastest of some rounds, and the differences of the results."""
    samples = rows(num_prompts, prompt_tokens, own_tokens, config.vocab_size)
    seconds: dict[str, list[float]] = {"always": [], "never": []}
    logprobs = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        policies = {wish: make_policy(wish == "always", "float32", folder) for wish in seconds}
    for _ in range(NUM_ROUNDS):
        for wish, policy in policies.items():
            batches, start = batches_of(policy, samples, 1), time.process_time()
            found = run(policy, batches, torch.float32)
            seconds[wish].append(time.process_time() - start)
            logprobs[wish] = torch.cat([found[id(sample)] for sample in samples])
    shared, plain = (
        torch.cat([weight.grad.flatten() for weight in policy.trainable_parameters() if weight.grad is not None])
        for policy in policies.values()
    )
    return {
        "shared": min(seconds["always"]),
        "plain": min(seconds["never"]),
        "logprob_difference": (logprobs["always"] - logprobs["never"]).abs().max().item(),
        "gradient_difference": ((shared - plain).norm() / plain.norm()).item(),
    }


def with_fewer_layers(config: LlamaConfig) -> LlamaConfig:
    """The same model with two layers, and a vocabulary that is smaller by the same factor, so that the head keeps its share."""
    words = config.vocab_size * NUM_LAYERS // config.num_hidden_layers
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": NUM_LAYERS, "vocab_size": words, "pad_token_id": 0})


def attention_bytes(num_tokens: int, config: LlamaConfig) -> float:
    """Bytes per token that attention needs at most beyond its inputs, its output, and their gradients.

    Half of the tokens are the prompt, the rest eight branches.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    own = num_tokens // 2 // GROUP
    length = num_tokens // 2 + own
    layout = lay_out(
        torch.zeros(GROUP, length, dtype=torch.int64), (length,) * GROUP, (PrefixGroup(GROUP, num_tokens // 2),)
    )
    shapes = [(1, count, num_tokens, config.hidden_size // heads) for count in (heads, kv_heads, kv_heads)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grad = torch.randn(1, num_tokens, heads, shapes[0][-1])
    tracker = MemTracker()
    tracker.track_external(*states, grad)
    with tracker:
        joined_attention(*states, layout, None).backward(grad)
    known = 2 * sum(each.nbytes for each in (*states, grad))
    return (tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - known) / num_tokens


def main() -> None:
    config = AutoConfig.from_pretrained(model_folder())
    report(
        allowed_short=allowed_speedup(config, 40, 24),
        **{f"{name}_2000": each for name, each in compared(with_fewer_layers(config), 1, PROMPT, OWN).items()},
        **{f"attention_bytes_{tokens}": attention_bytes(tokens, config) for tokens in (1024, 2048, 4096)},
    )


if __name__ == "__main__":
    main()
