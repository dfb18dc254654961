"""Between our nouns and vLLM's."""

import math
from typing import Any

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.types import Completion


def to_vllm(sampling: SamplingParams) -> Any:
    """A `vllm.SamplingParams` in which every value is said, so that none is taken from anywhere else."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        n=1,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
        ignore_eos=False,
        logprobs=0,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_completion(output: Any, version: int) -> Completion:
    """Checks and converts a `vllm.CompletionOutput`: a sampled id without its logprob must never train.

    Args:
        output: What vLLM returned.
        version: The policy version that sampled it.

    Raises:
        EngineError: It was aborted, or an id has no logprob, or one that is no number.
    """
    token_ids = tuple(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}: stop or length was expected")
    if output.logprobs is None or len(output.logprobs) != len(token_ids):
        raise EngineError(f"vLLM returned {len(output.logprobs or ())} logprobs for {len(token_ids)} sampled ids")
    logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True))
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise EngineError(f"vLLM returned logprobs that are no numbers for ids that it sampled: {logprobs}")
    return Completion(token_ids, logprobs, output.finish_reason, output.stop_reason, version)
