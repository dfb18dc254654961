"""Conversion between the project's types and those of vLLM."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.types import Completion

# Every parameter that we do not set is sent with its neutral value, so that vLLM takes none from another source.
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
# JSON has no infinity: vLLM's OpenAI server raises every lower logprob to this value.
JSON_FLOOR = -9999.0
MAX_LOGPROB = 1e-3  # rounding may raise the logprob of a certain token above 0
# Prefix of the keys of `top_logprobs` where `return_tokens_as_token_ids` is set.
TOKEN_KEY = "token_id:"


def to_vllm(sampling: SamplingParams) -> Any:
    """The same as `vllm.SamplingParams`, with a value for every parameter."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        **NEUTRAL,
        **_ours(sampling),
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_request(model: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
    """The body of an equivalent request to `/v1/completions`.

    Args:
        model: Name of the model or adapter.
        prompt_ids: The prompt.
        sampling: How the completion is sampled.
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


def to_vllm_scoring(token_ids: Sequence[int]) -> Any:
    """The `vllm.SamplingParams` with which the prompt `token_ids[:-1]` returns the logprobs of `token_ids[1:]`.

    A prompt has to be shorter than vLLM's longest row, so the last id is not in the prompt: its logprob is requested at the one
    position that is sampled. vLLM reads no cached prefix for such a request.

    Args:
        token_ids: One row of at least two ids.
    """
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        **{**NEUTRAL, "logprobs": None},  # vLLM returns those of `logprob_token_ids` without it
        **_scoring(token_ids[-1]),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_scoring_request(model: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """The body of an equivalent request to `/v1/completions`.

    Args:
        model: Name of the model or adapter.
        token_ids: One row of at least two ids.
    """
    return {
        **NEUTRAL,
        "logprobs": 1,  # the server requires it beside `logprob_token_ids`
        **_scoring(token_ids[-1]),
        "model": model,
        "prompt": list(token_ids[:-1]),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "echo": False,
        "stream": False,
    }


def to_completion(output: Any) -> Completion:
    """Checks and converts a `vllm.CompletionOutput` of an engine whose weights have a version.

    Raises:
        EngineError: It was aborted, or an id has no version, or no finite logprob.
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


def logprobs_of_output(output: Any, token_ids: Sequence[int]) -> tuple[tuple[float, ...], int]:
    """Checks and converts a `vllm.RequestOutput` to the parameters of `to_vllm_scoring`.

    Args:
        output: The final output.
        token_ids: The row. The prompt of the request is all of it but the last id.

    Returns:
        The logprobs of `token_ids[1:]`, and the version of the weights that computed them.

    Raises:
        EngineError: It was aborted, or has no version, or an id has no finite logprob.
    """
    (sampled,) = output.outputs
    _check_finished(sampled.finish_reason)
    entries = [*(output.prompt_logprobs or ()), *(sampled.logprobs or ())][1:]  # the first id has none
    logprobs = [entry[token].logprob for token, entry in zip(token_ids[1:], entries, strict=False) if token in entry]
    if not sampled.weight_versions:
        raise EngineError("vLLM returned no version of the weights for the logprobs of a row")
    return _checked_logprobs(logprobs, len(token_ids) - 1, "given ids"), int(sampled.weight_versions[-1].version)


def from_response(answer: dict[str, Any], model: str, version: int) -> Completion:
    """Checks and converts an answer of `/v1/completions`.

    Args:
        answer: The decoded JSON.
        model: Name of the model or adapter of the request.
        version: The policy version of that name.

    Raises:
        EngineError: As with `to_completion`; or another model answered, or the answer has another shape.
    """
    _check_model(answer, model)
    try:
        (choice,) = answer["choices"]
        token_ids, logprobs = choice["token_ids"], choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        finish_reason, stop_reason = choice["finish_reason"], choice["stop_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise _shape_error(error) from error
    if token_ids is None:
        raise EngineError("vLLM's answer has no token ids: is it a vLLM of 0.32 or newer?")
    return _checked(token_ids, logprobs, finish_reason, stop_reason, version)


def logprobs_from_response(answer: dict[str, Any], model: str, token_ids: Sequence[int]) -> tuple[float, ...]:
    """Checks and converts an answer of `/v1/completions` to a request of `to_scoring_request`.

    Args:
        answer: The decoded JSON.
        model: Name of the model or adapter of the request.
        token_ids: The row of the request.

    Returns:
        The logprobs of `token_ids[1:]`.

    Raises:
        EngineError: As with `logprobs_of_output`; or another model answered, or the answer has another shape.
    """
    _check_model(answer, model)
    try:
        (choice,) = answer["choices"]
        _check_finished(choice["finish_reason"])
        pairs = zip(token_ids[1:-1], choice["prompt_logprobs"][1:], strict=True)
        logprobs = [entry[str(token)]["logprob"] for token, entry in pairs]
        (last,) = choice["logprobs"]["top_logprobs"]
        logprobs.append(last[f"{TOKEN_KEY}{token_ids[-1]}"])
    except (KeyError, TypeError, ValueError) as error:
        raise _shape_error(error) from error
    return _checked_logprobs(logprobs, len(token_ids) - 1, "given ids")


def _ours(sampling: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def _scoring(last_id: int) -> dict[str, Any]:
    """Parameters of a request for the logprobs of its prompt and of one id after it, at temperature 1."""
    return {
        "temperature": 1.0,
        "max_tokens": 1,
        "seed": 0,
        "stop": [],
        "stop_token_ids": [],
        "prompt_logprobs": 0,  # that of the prompt's own id and no alternatives
        "logprob_token_ids": [last_id],
    }


def _checked(
    token_ids: Sequence[int],
    logprobs: Sequence[Any] | None,
    finish_reason: Any,
    stop_reason: str | int | None,
    version: int,
) -> Completion:
    """A completion in which every id has its logprob: a sampled id without one must never train."""
    _check_finished(finish_reason)
    values = _checked_logprobs(logprobs, len(token_ids), "sampled ids")
    return Completion(tuple(token_ids), values, finish_reason, stop_reason, version)


def _checked_logprobs(logprobs: Sequence[Any] | None, number: int, of: str) -> tuple[float, ...]:
    if logprobs is None or len(logprobs) != number:
        raise EngineError(f"vLLM returned {len(logprobs or ())} logprobs for {number} {of}")
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > JSON_FLOOR for value in logprobs):
        raise EngineError(f"vLLM returned logprobs for {of} that are not finite numbers: {tuple(logprobs)}")
    if max(logprobs, default=0.0) > MAX_LOGPROB:
        raise EngineError(
            f"vLLM returned {max(logprobs):g} as the logprob of one of the {of}, which cannot be above 0: run it with "
            "--logprobs-mode raw_logprobs (its default) or processed_logprobs"
        )
    return tuple(cast(Sequence[float], logprobs))


def _check_finished(finish_reason: Any) -> None:
    if finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a request with {finish_reason!r}: stop or length was expected")


def _check_model(answer: dict[str, Any], model: str) -> None:
    if answer.get("model") != model:
        raise EngineError(f"the request to vLLM named {model!r}, and {answer.get('model')!r} answered")


def _shape_error(error: Exception) -> EngineError:
    return EngineError(
        f"vLLM's answer does not have the expected shape ({type(error).__name__}: {error}): is it a vLLM of 0.32 or newer?"
    )
