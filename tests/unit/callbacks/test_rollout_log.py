"""What the log of rollouts states about single tokens."""

import json

import pytest
import torch

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.callbacks.rollout_log import RolloutLog, gap_lines, log_files, token_fields
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.batcher import make_batches
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.types import Completion, Turn
from tests.doubles import EOS, denominators, make_data, make_module, make_sample, make_trainer


def fit(tiny_model, root, log: RolloutLog, **loss) -> None:
    module = make_module(tiny_model, LossConfig(**loss))
    trainer = make_trainer(root, log, max_steps=2, accumulate_grad_batches=2, limit_val_batches=1.0, max_epochs=-1)
    trainer.fit(module, datamodule=make_data(module, batch_size=4, steps_per_epoch=2))


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_sampled_token_has_its_text_and_logprob_and_each_trained_one_its_gap(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, RolloutLog())
    chat = Chat(tiny_model)
    lines = lines_of(tmp_path / "rollouts.jsonl")
    for line in [*lines, *lines_of(tmp_path / "rollouts-validation.jsonl")]:
        (pieces,) = line["tokens"]
        # Each id of the tiny model is a character or a special token.
        assert pieces == [chat.raw_text([token]) for token in line["completion_ids"]]
        assert len(line["logprobs"]) == len(pieces)
        assert all(logprob <= 0 for logprob in line["logprobs"])
        assert "advantages" not in line  # those of a row are equal
    gaps = {
        (line["step"], line["item_index"], line["sibling"]): line["gaps"] for line in lines_of(tmp_path / "gaps.jsonl")
    }
    trained = {(line["step"], line["item_index"], line["sibling"]): line for line in lines if line["advantage"]}
    assert gaps.keys() == trained.keys()
    assert {key[0] for key in gaps} == {0, 1}
    for key, line in trained.items():
        assert len(gaps[key]) == len(line["completion_ids"])
        assert max(map(abs, gaps[key])) < 1e-4  # the engine has the trainer's weights


def test_the_gaps_of_a_row_are_those_of_its_sample():
    """Rows of different lengths, siblings with a common prompt, and a row whose advantages differ."""
    samples = [
        make_sample([5, 6], [7, 8, EOS], 1.0, logprob=-1.0),
        make_sample([5, 6], [9], -1.0, logprob=-2.0),
        make_sample([10, 11, 12], [13, EOS], 0.5, logprob=-3.0),
    ]
    for sibling, sample in enumerate(samples):
        sample.rollout.sibling = sibling
    (batch,) = make_batches([[samples[:2], samples[2:]]], StepInfo(4, denominators(6), policy_version=4))
    # The trainer's logprobs are minus the position of the label; position t predicts token t + 1.
    logprobs = -torch.arange(1.0, 1.0 + batch.labels.shape[1]).expand(batch.labels.shape)
    found = gap_lines(batch, logprobs)
    assert [line["gaps"] for line in found] == [[-2 + 1, -3 + 1, -4 + 1], [-2 + 2], [-3 + 3, -4 + 3]]
    assert [(line["step"], line["item_index"], line["sibling"]) for line in found] == [(4, 0, 0), (4, 0, 1), (4, 0, 2)]


def test_a_gap_that_is_not_finite_is_none(tiny_model):
    sample = make_sample([5], [7, 8], 1.0, logprob=-float("inf"))
    (batch,) = make_batches([[[sample]]], StepInfo(0, denominators(2), policy_version=0))
    assert gap_lines(batch, torch.zeros_like(batch.sampling_logprobs))[0]["gaps"] == [None, None]
    fields = token_fields(sample.row, (1.0, float("nan")), Chat(tiny_model))
    assert (fields["logprobs"], fields["advantages"]) == ([None, None], [1.0, None])


def test_each_turn_has_its_own_tokens(tiny_model):
    chat = Chat(tiny_model)
    rollout = make_sample([5], [15, EOS], 1.0).rollout
    rollout.status = None
    rollout.append_environment([16, 17])
    rollout.append(Turn(Completion((18,), (-0.5,), "stop", None, 0), "", "", "", ""))
    fields = token_fields(rollout.rows[-1], (0.1, 0.2, 0.123456), chat)
    assert fields == {
        "tokens": [[chat.raw_text([15]), "<eos>"], [chat.raw_text([18])]],
        "logprobs": [-1.0, -1.0, -0.5],
        "advantages": [0.1, 0.2, 0.12346],
    }


@pytest.mark.parametrize("text", ["27 + 35 = 62", "日本語 🎉🎉 é", ""])
def test_pieces_are_together_the_text(tiny_model, text):
    """A tokenizer of bytes: each character of several bytes is of several ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = Chat(tiny_model)
    chat._tokenizer.backend_tokenizer.model = tokenizer.model
    chat._tokenizer.backend_tokenizer.decoder = tokenizer.decoder
    ids = tokenizer.encode(text).ids
    pieces = chat.pieces(ids)
    assert (len(pieces), "".join(pieces)) == (len(text.encode()), text)
    if "🎉" in text:
        cut = chat.pieces(ids[: len("日本語 🎉".encode()) - 1])
        assert "".join(cut) == "日本語 \N{REPLACEMENT CHARACTER}"


def test_without_tokens_the_log_has_none_of_it(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, RolloutLog(tokens=False))
    assert not (tmp_path / "gaps.jsonl").exists()
    assert not lines_of(tmp_path / "rollouts.jsonl")[0].keys() & {"tokens", "logprobs", "advantages"}


def test_the_second_update_of_a_phase_is_not_logged_again(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, RolloutLog(), num_policy_updates=2)
    for name in ("rollouts.jsonl", "gaps.jsonl"):
        assert {line["step"] for line in lines_of(tmp_path / name)} == {0}


def test_gaps_are_a_file_of_the_log(tmp_path):
    for name in (
        "gaps.jsonl",
        "gaps.jsonl.rank1",
        "rollouts.jsonl",
        "rollouts-test.jsonl.rank0",
        "my-gaps.jsonl",
        "held_out.jsonl",
    ):
        (tmp_path / name).touch()
    names = [file.name for file in log_files(tmp_path)]
    assert names == ["gaps.jsonl", "gaps.jsonl.rank1", "rollouts-test.jsonl.rank0", "rollouts.jsonl"]
