from types import SimpleNamespace

import pytest
from vllm.outputs import WeightVersionSpan

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.engines.vllm_convert import logprobs_of_output, to_completion, to_vllm, to_vllm_scoring


def test_every_sampling_parameter_is_set_and_neutral_unless_it_is_ours():
    params = to_vllm(SamplingParams(0.7, max_tokens=9, seed=5, stop=("</a>",), stop_token_ids=(2, 3)))
    assert (params.temperature, params.max_tokens, params.seed) == (0.7, 9, 5)
    assert (params.stop, params.stop_token_ids, params.detokenize) == (["</a>"], [2, 3], True)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not to_vllm(SamplingParams(1.0, max_tokens=9, seed=5)).detokenize


def output(**changes):
    logprobs = [{5: SimpleNamespace(logprob=-0.5)}, {2: SimpleNamespace(logprob=-0.1)}]
    fields = {"token_ids": [5, 2], "logprobs": logprobs, "finish_reason": "stop", "stop_reason": None}
    return SimpleNamespace(**{**fields, "weight_versions": [WeightVersionSpan("3", 0, 2)], **changes})


def test_the_logprob_taken_is_the_sampled_ids():
    extra = [{9: SimpleNamespace(logprob=-0.01), 5: SimpleNamespace(logprob=-0.5)}, {2: SimpleNamespace(logprob=-0.1)}]
    completion = to_completion(output(logprobs=extra))
    assert (completion.token_ids, completion.logprobs, completion.policy_version) == ((5, 2), (-0.5, -0.1), 3)


def test_versions_are_those_of_each_token():
    spans = [WeightVersionSpan("3", 0, 1), WeightVersionSpan("4", 1, 2)]
    completion = to_completion(output(weight_versions=spans))
    assert (completion.policy_version, completion.earlier_versions, completion.policy_versions) == (4, (3,), (3, 4))


@pytest.mark.parametrize("spans", [None, [], [WeightVersionSpan("3", 0, 1)]])
def test_a_token_without_a_version_is_an_error(spans):
    with pytest.raises(EngineError, match=r"versions of [01] tokens for 2 sampled ids"):
        to_completion(output(weight_versions=spans))


@pytest.mark.parametrize("logprobs", [None, [], [{5: SimpleNamespace(logprob=-0.5)}]])
def test_a_missing_logprob_is_an_error_and_never_zero(logprobs):
    with pytest.raises(EngineError, match=r"logprobs for 2 sampled ids"):
        to_completion(output(logprobs=logprobs))


def test_a_logprob_that_is_no_number_is_an_error():
    unknown = [{5: SimpleNamespace(logprob=float("nan"))}, {2: SimpleNamespace(logprob=-0.1)}]
    with pytest.raises(EngineError, match=r"logprobs for sampled ids that are not finite numbers: \(nan, -0.1\)"):
        to_completion(output(logprobs=unknown))


def test_a_logprob_above_zero_is_an_error():
    logits = [{5: SimpleNamespace(logprob=17.5)}, {2: SimpleNamespace(logprob=-0.1)}]
    with pytest.raises(
        EngineError, match=r"17.5 as the logprob of one of the sampled ids.*--logprobs-mode raw_logprobs"
    ):
        to_completion(output(logprobs=logits))
    certain = [{5: SimpleNamespace(logprob=1e-7)}, {2: SimpleNamespace(logprob=0.0)}]
    assert to_completion(output(logprobs=certain)).logprobs == (1e-7, 0.0)


def test_an_aborted_completion_is_an_error():
    with pytest.raises(EngineError, match="ended a request with 'abort'"):
        to_completion(output(finish_reason="abort"))
    nothing = {"token_ids": [], "logprobs": [], "weight_versions": []}
    with pytest.raises(EngineError, match="ended a request with 'error'"):
        to_completion(output(finish_reason="error", **nothing))


def test_scoring_parameters_request_the_prompts_logprobs_and_that_of_the_last_id():
    params = to_vllm_scoring([4, 5, 6])
    assert (params.prompt_logprobs, params.logprob_token_ids, params.max_tokens) == (0, [6], 1)
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert params.num_logprobs == 1
    assert params.skip_reading_prefix_cache  # vLLM computes no logprobs for cached ids


def scored(**changes):
    prompt = [None, {5: SimpleNamespace(logprob=-0.5)}]
    last = [{9: SimpleNamespace(logprob=-0.01), 6: SimpleNamespace(logprob=-2.0)}]
    fields = {"logprobs": last, "token_ids": [9], "finish_reason": "length", **changes}
    spans = fields.pop("weight_versions", [WeightVersionSpan("3", 0, 1)])
    sampled = SimpleNamespace(**fields, weight_versions=spans)
    return SimpleNamespace(prompt_logprobs=changes.get("prompt_logprobs", prompt), outputs=[sampled])


def test_the_logprobs_of_a_row_are_those_of_its_own_ids():
    assert logprobs_of_output(scored(), [4, 5, 6]) == ((-0.5, -2.0), 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_logprobs": None}, "0 logprobs for 2 given ids"),
        ({"prompt_logprobs": [None, {7: SimpleNamespace(logprob=-0.5)}]}, "1 logprobs for 2 given ids"),
        ({"logprobs": None}, "1 logprobs for 2 given ids"),
        ({"prompt_logprobs": [None, {5: SimpleNamespace(logprob=float("nan"))}]}, "given ids that are not finite"),
        ({"weight_versions": None}, "no version of the weights"),
        ({"finish_reason": "abort"}, "ended a request with 'abort'"),
    ],
)
def test_a_row_without_all_its_logprobs_is_an_error(changes, words):
    with pytest.raises(EngineError, match=words):
        logprobs_of_output(scored(**changes), [4, 5, 6])
