"""`fuchsia export`: every format loads back to the trained policy, and nothing names a folder of this machine."""

import json

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fuchsia_pl.cli.export import export
from fuchsia_pl.cli.gguf_file import interleaved
from fuchsia_pl.cli.gguf_tokenizer import SPLITS
from fuchsia_pl.cli.modelfile import chatml_system, modelfile
from tests.exported import CONFIGS, TEXTS, greedy_ids, save_base, save_run, save_tokenizer

MESSAGES = [{"role": "user", "content": "3 plus 4?"}]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def trained(request, tmp_path_factory):
    """Base folder, run folder and the trained model of PEFT, of each architecture that GGUF files are written of."""
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "a base", request.param, tie_word_embeddings=request.param == "llama")
    run = save_run(root / "runs", base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
    return base, run, model.eval()


@pytest.fixture
def llama(tmp_path):
    base = save_base(tmp_path / "base")
    return base, save_run(tmp_path / "runs", base)


def exported(capsys, *words) -> str:
    assert export([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert export([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def prompt_ids(folder) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]


def load_gguf(file):
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=settings, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def test_merged_weights_are_those_of_peft(trained, capsys):
    base, run, model = trained
    out = exported(capsys, run, "--to", "merged")
    folder = run / "export" / "merged"
    assert out.splitlines() == [
        f"exported: {folder}",
        f'load it:  AutoModelForCausalLM.from_pretrained("{folder}")',
        f"serve it: python -m vllm.entrypoints.openai.api_server --model {folder}",
    ]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # safetensors lets only the owner read its file
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    ids = prompt_ids(folder)
    assert (
        greedy_ids(loaded.eval(), ids)
        == greedy_ids(model, ids)
        != greedy_ids(AutoModelForCausalLM.from_pretrained(base), ids)
    )
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
    for name, tensor in again.merge_and_unload().state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-6), name


def test_a_gguf_file_loads_back_to_the_same_policy(trained, capsys):
    base, run, model = trained
    exported(capsys, run, "--to", "gguf", "--quantize", "f32", "--overwrite")
    file = run / "export" / "gguf" / "tiny-0.gguf"
    loaded, tokenizer = load_gguf(file)
    own = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == own.chat_template
    assert [tokenizer.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        own.eos_token,
        own.bos_token,
        own.pad_token,
    )
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
    found = loaded.state_dict()
    for name, tensor in merged.merge_and_unload().state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    ids = prompt_ids(base)
    assert greedy_ids(loaded, ids) == greedy_ids(model, ids)


@pytest.mark.parametrize(("kind", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_types_of_gguf_round_within_their_step(llama, capsys, kind, step):
    """A weight is at most half a step of its type away; a block of q8_0 has 127 steps up to its largest weight."""
    base, run = llama
    exported(capsys, run, "--to", "gguf", "--quantize", kind)
    loaded, _ = load_gguf(run / "export" / "gguf" / "tiny-0.gguf")
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(run / "adapter")
    ).merge_and_unload()
    differs = False
    for name, tensor in merged.state_dict().items():
        blocks = tensor.reshape(-1, 32) if kind == "q8_0" else tensor.reshape(-1, 1)
        allowed = blocks.abs().amax(1, keepdim=True) * step + 1e-7
        gap = (loaded.state_dict()[name] - tensor).reshape(blocks.shape).abs()
        assert (gap <= allowed).all(), name
        differs |= bool(gap.any())
    assert differs


def test_nothing_names_a_folder_of_this_machine(llama, capsys, tmp_path):
    base, run = llama
    for to in ("peft", "merged", "gguf", "ollama"):
        exported(capsys, run, "--to", to)
        for file in (run / "export" / to).iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    config = json.loads((run / "export" / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "export" / "peft"))
    given = load_file(run / "adapter" / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert given.keys() == found.keys()
    assert all(torch.equal(given[name], found[name]) for name in given)


def test_the_chat_template_of_the_run_goes_along(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    run = save_run(tmp_path / "runs", base, chat_template="none")
    exported(capsys, run, "--to", "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "export" / "merged")
    assert tokenizer.apply_chat_template(MESSAGES * 2, tokenize=False) == "3 plus 4?\n\n3 plus 4?"


def test_ollama_gets_a_modelfile(llama, capsys):
    _, run = llama
    exported(capsys, run, "--to", "ollama", "--temperature", "0.5")
    text = (run / "export" / "ollama" / "Modelfile").read_text()
    assert text.startswith('FROM ./tiny-0.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n')
    assert text.endswith('SYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.5\n')
    assert (run / "export" / "ollama" / "tiny-0.gguf").is_file()


def test_another_template_is_left_to_the_file(tmp_path):
    other = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    assert modelfile(save_tokenizer(tmp_path, other), "a.gguf") == 'FROM ./a.gguf\nPARAMETER stop "<|im_end|>"\n'
    plain = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    plain += "{{ '<|im_start|>assistant\n' }}"
    assert chatml_system(save_tokenizer(tmp_path, plain)) == ""


def test_rows_are_interleaved_head_by_head():
    """Two heads of four rows: the halves of a head (0 1 | 2 3) are rotated together, so they become neighbours."""
    rows = torch.arange(8).unsqueeze(1)
    assert interleaved(rows, num_heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", SPLITS.values())
def test_known_ways_to_split_keep_the_ids(name, tmp_path, capsys):
    regex = next(regex for regex, own in SPLITS.items() if own == name)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base = save_base(tmp_path / "base")
    tokenizer = save_tokenizer(base, split=split)
    run = save_run(tmp_path / "runs", base)
    exported(capsys, run, "--to", "gguf")
    _, loaded = load_gguf(run / "export" / "gguf" / "tiny-0.gguf")
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_an_adapter_without_a_run_needs_its_base(llama, capsys, tmp_path):
    base, run = llama
    adapter = tmp_path / "my adapter"
    (run / "adapter").rename(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    assert "Or name it with --base" in refused(capsys, adapter, "--to", "merged")
    exported(capsys, adapter, "--to", "merged", "--base", base, "--dtype", "float32")
    assert (tmp_path / "my-adapter-merged" / "model.safetensors").is_file()


def test_whole_weights_are_exported_too(llama, capsys):
    base, run = llama
    model = AutoModelForCausalLM.from_pretrained(base)
    for file in (run / "adapter").iterdir():
        file.unlink()
    model.model.norm.weight.data += 1.0
    model.save_pretrained(run / "adapter")
    assert "is a whole model, since all weights were trained" in refused(capsys, run)
    exported(capsys, run, "--to", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_an_existing_folder_is_kept(llama, capsys, tmp_path):
    _, run = llama
    exported(capsys, run)
    before = (run / "export" / "peft" / "README.md").stat().st_mtime_ns
    assert "exists: give another --output, or replace it with --overwrite" in refused(capsys, run)
    assert (run / "export" / "peft" / "README.md").stat().st_mtime_ns == before
    exported(capsys, run, "--overwrite")
    assert (run / "export" / "peft" / "README.md").stat().st_mtime_ns > before
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "README.md").write_text("years of work")
    assert "is not an export of this command" in refused(capsys, run, "--output", own, "--overwrite")
    assert (own / "README.md").read_text() == "years of work"


def test_a_failed_export_leaves_nothing(llama, capsys):
    _, run = llama
    weights = run / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({name: tensor * 1e30 for name, tensor in load_file(weights).items()}, weights)
    assert "is not finite in torch.float16" in refused(capsys, run, "--to", "merged", "--dtype", "float16")
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--dtype", "float32"], "--dtype does nothing with --to peft (only with merged): leave it out"),
        (["--to", "merged", "--quantize", "f16"], "--quantize does nothing with --to merged (only with gguf, ollama)"),
        (["--to", "gguf", "--temperature", "1"], "--temperature does nothing with --to gguf (only with ollama)"),
        (["--private"], "--private does nothing without --push-to-hub"),
        (["--push-to-hub", "a/b/c"], "--push-to-hub='a/b/c' is not the id of a repository"),
    ],
)
def test_options_without_effect_are_refused(llama, capsys, words, error):
    assert error in refused(capsys, llama[1], *words)
    assert not (llama[1] / "export").exists()


def test_a_missing_run_and_one_without_weights_are_told(llama, capsys, tmp_path):
    assert "is no run" in refused(capsys, "nowhere", "--root", tmp_path / "runs")
    (llama[1] / "adapter" / "adapter_config.json").unlink()
    assert "has no trained weights" in refused(capsys, llama[1])
    (llama[1] / "config.yaml").write_text(yaml.safe_dump({"model": 3}))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "a model with rope_type='linear'",
        ),
        ({"mlp_bias": True}, "a model with mlp_bias=True cannot be written as GGUF here"),
    ],
)
def test_a_model_that_the_file_could_not_hold_is_refused(tmp_path, capsys, settings, error):
    run = save_run(tmp_path / "runs", save_base(tmp_path / "base", **settings))
    told = refused(capsys, run, "--to", "gguf")
    assert error in told
    assert "llama.cpp's convert_hf_to_gguf.py" in told


def test_a_tokenizer_of_another_kind_is_refused(tiny_model, tmp_path, capsys):
    run = save_run(tmp_path / "runs", tiny_model)
    assert "a tokenizer of the kind 'WordLevel' cannot be written as GGUF here" in refused(capsys, run, "--to", "gguf")
