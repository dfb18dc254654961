import pytest

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules has \['lm_head'\], which vLLM cannot serve"),
        ({"target_modules": ["model.embed_tokens"]}, r"has \['model.embed_tokens'\]"),
        ({"target_modules": "lm_head"}, r"has \['lm_head'\]"),
        ({"target_modules": ".*(lm_head|q_proj)"}, r"has \['lm_head'\]"),
        ({"r": 0}, "lora.r must be 1 or more, got 0"),
        ({"alpha": 0}, "lora.alpha must be above 0, got 0"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_what_cannot_be_trained_or_served_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        LoRASettings(**setting)


@pytest.mark.parametrize("name", ["logprob_chunk_tokens", "max_tokens_per_micro_batch"])
def test_sizes_need_a_token(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        PolicyConfig(name="m", **{name: 0})


def test_a_chat_template_must_be_there():
    with pytest.raises(ValueError, match=r"model\.policy\.chat_template='no.jinja' is not a template"):
        PolicyConfig(name="m", chat_template="no.jinja")
