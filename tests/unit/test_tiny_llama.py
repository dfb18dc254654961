"""The numpy Llama of the tests against transformers."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tiny_llama import TinyLlama


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_its_logits_are_those_of_transformers(tiny_model, length):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(4, 40, (1, length + 5), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    llama, words = TinyLlama(model), tuple(ids[0].tolist())
    for _ in range(2):  # siblings share the prompt, and none sees the tokens of another
        logits, past = llama.begin(words[:length])
        np.testing.assert_allclose(logits, expected[length - 1], atol=2e-5)
        for position in range(length, length + 5):
            logits = llama.next(words[position : position + 1], past)
            np.testing.assert_allclose(logits, expected[position], atol=2e-5)
