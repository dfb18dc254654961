"""Between our nouns and vLLM's."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.types import Completion

# Every value that is not ours is said, so that none is taken from anywhere else.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "logprobs": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}
# vLLM's OpenAI server writes this, or more, for every logprob: JSON has no infinity.
JSON_FLOOR = -9999.0


def to_vllm(sampling: SamplingParams) -> Any:
    """A `vllm.SamplingParams` in which every value is said."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        **NEUTRAL,
        **_ours(sampling),
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_request(model: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
    """The body of a request to `/v1/completions` that means the same.

    Args:
        model: Name of the model or adapter that is asked.
        prompt_ids: The prompt.
        sampling: How it is sampled.
    """
    return {
        **NEUTRAL,
        **_ours(sampling),
        "model": model,
        "prompt": list(prompt_ids),
        "return_token_ids": True,
        "echo": False,
        "stream": False,
    }


def to_completion(output: Any) -> Completion:
    """Checks and converts a `vllm.CompletionOutput` of an engine that was told the version of its weights.

    Raises:
        EngineError: It was aborted, or an id has no logprob, or one that is no number, or no version.
    """
    token_ids, logprobs = tuple(output.token_ids), output.logprobs
    if logprobs is not None and len(logprobs) == len(token_ids):
        logprobs = [entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True)]
    versions = [int(span.version) for span in output.weight_versions or () for _ in range(span.start, span.end)]
    newest = versions[-1] if versions else -1
    completion = _checked(token_ids, logprobs, output.finish_reason, output.stop_reason, newest)
    if len(versions) < max(len(token_ids), 1):
        raise EngineError(f"vLLM returned the versions of {len(versions)} tokens for {len(token_ids)} sampled ids")
    earlier = tuple(version for version in versions[: len(token_ids)] if version != newest)
    return replace(completion, earlier_versions=earlier)


def from_response(answer: dict[str, Any], model: str, version: int) -> Completion:
    """Checks and converts an answer of `/v1/completions`.

    Args:
        answer: The decoded JSON.
        model: Name of the model or adapter that was asked.
        version: The policy version of that name.

    Raises:
        EngineError: As with `to_completion`; or another model answered, or the answer has another shape.
    """
    if answer.get("model") != model:
        raise EngineError(f"vLLM was asked for {model!r}, and {answer.get('model')!r} answered")
    try:
        (choice,) = answer["choices"]
        token_ids, logprobs = choice["token_ids"], choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        finish_reason, stop_reason = choice["finish_reason"], choice["stop_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"vLLM's answer has not the shape of a completion with token ids ({type(error).__name__}: {error}): is it a vLLM "
            "of 0.32 or newer?"
        ) from error
    if token_ids is None:
        raise EngineError("vLLM's answer has no token ids: is it a vLLM of 0.32 or newer?")
    return _checked(token_ids, logprobs, finish_reason, stop_reason, version)


def _ours(sampling: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def _checked(
    token_ids: Sequence[int],
    logprobs: Sequence[Any] | None,
    finish_reason: Any,
    stop_reason: str | int | None,
    version: int,
) -> Completion:
    """A completion of which every id has its logprob: a sampled id without one must never train."""
    if finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {finish_reason!r}: stop or length was expected")
    if logprobs is None or len(logprobs) != len(token_ids):
        raise EngineError(f"vLLM returned {len(logprobs or ())} logprobs for {len(token_ids)} sampled ids")
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > JSON_FLOOR for value in logprobs):
        raise EngineError(f"vLLM returned logprobs that are no numbers for ids that it sampled: {tuple(logprobs)}")
    return Completion(tuple(token_ids), tuple(cast(Sequence[float], logprobs)), finish_reason, stop_reason, version)
