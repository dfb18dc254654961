"""Messages in a chat template: all of their text, the run's date, and models without a template."""

from datetime import datetime
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from fuchsia_pl.envs import ConfigError, ToolSpec
from fuchsia_pl.envs.tools.convention import PLAIN
from fuchsia_pl.rollouts.chat import Chat
from tests.doubles import EOS, TEMPLATE

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SYSTEM, QUESTION = {"role": "system", "content": "be brief"}, {"role": "user", "content": "2 plus 2?"}


def base_model(tiny_model, folder, **changes):
    """The tiny model's tokenizer without a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_base_model_continues_the_messages_text(tiny_model, tmp_path):
    folder = base_model(tiny_model, tmp_path)
    with pytest.raises(ConfigError, match=r"has no chat template.*model\.policy\.chat_template"):
        Chat(folder)
    chat = Chat(folder, "none")
    assert chat.raw_text(chat.render([SYSTEM, QUESTION])) == "be brief\n\n2 plus 2?"
    assert chat.stop_token_ids == (EOS,)
    # the policy or a stop string ended the turn: a blank line and the response follow, without an invented end
    for last_id in (EOS, 11):
        assert chat.raw_text(chat.bridge([QUESTION], [QUESTION, SYSTEM], last_id)) == "\n\n2 plus 2?\n\nbe brief"
    assert not chat.rewrites_earlier_turns
    assert chat.encode_turn("4") == [8, EOS]
    tools = [ToolSpec("add", "adds", {})]
    assert chat.convention(tools) is PLAIN
    assert chat.raw_text(chat.render([QUESTION], tools, PLAIN)).endswith("\n\n2 plus 2?")


def test_without_a_template_the_ends_are_the_tokenizers_own(tiny_model, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    folder = base_model(tiny_model, tmp_path)
    assert Chat(folder, TEMPLATE).stop_token_ids == (2, 3)
    assert Chat(folder, "none").stop_token_ids == (2,)
    with pytest.raises(ConfigError, match="has no end id"):
        Chat(base_model(tiny_model, tmp_path / "endless", eos_token=None), "none")


def test_without_a_template_the_tokenizers_own_beginning_comes_first(tiny_model, tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = base_model(tiny_model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save_pretrained(folder)
    chat = Chat(folder, "none")
    ids = chat.render([QUESTION])
    assert ids == chat._tokenizer.encode("2 plus 2?")
    assert ids.count(1) == 1
    assert 1 not in chat.bridge([QUESTION], [QUESTION], EOS)


def test_a_given_template_takes_the_place_of_the_tokenizers(tiny_model):
    chat = Chat(tiny_model, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert chat._tokenizer.chat_template == TEMPLATE
    assert chat.template([QUESTION], True, ()) == "[2 plus 2?]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}a:",
        # the same without a warning
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}:{{ m['content'] }}\n{% endif %}{% endfor %}a:",
    ],
    ids=["raises", "drops"],
)
def test_where_there_is_no_system_role_its_text_comes_before_the_question(tiny_model, template):
    chat = Chat(tiny_model, template)
    assert chat.raw_text(chat.render([SYSTEM, QUESTION])) == "user:be brief\n\n2 plus 2?\na:"
    assert chat.raw_text(chat.bridge([SYSTEM, QUESTION], [QUESTION], None)) == "\nuser:2 plus 2?\na:"


def test_a_template_that_leaves_text_out_is_refused(tiny_model):
    first_only = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="leaves out the text of messages of the role 'assistant'"):
        Chat(tiny_model, first_only).render([QUESTION, {"role": "assistant", "content": "4"}])
    short = "{% for m in messages %}{{ m['content'][:30] }}{% endfor %}"
    with pytest.raises(
        ConfigError, match="leaves out the text of a message of the role 'user', which begins with 'which"
    ):
        Chat(tiny_model, short).render([{**QUESTION, "content": "which number is " + 8 * "two plus "}])


def test_text_that_a_template_trims_escapes_or_moves_is_there(tiny_model):
    escaping = "{% for m in messages | reverse %}{{ m['content'] | trim | tojson }}{% endfor %}"
    chat = Chat(tiny_model, escaping)
    messages = [SYSTEM, {"role": "user", "content": ' a "b"\n'}]
    assert chat.template(messages, True, ()) == '"a \\"b\\"""be brief"'
    chat.render(messages)
    thoughtless = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    thought = {"role": "assistant", "content": "<think>hm</think>4"}
    assert (
        Chat(tiny_model, thoughtless).raw_text(Chat(tiny_model, thoughtless).render([QUESTION, thought]))
        == "2 plus 2?4"
    )


def test_a_template_writes_the_runs_date(tiny_model):
    source = "{{ strftime_now('%d %m %Y') }} {{ messages[0]['content'] }}"
    chat = Chat(tiny_model, source, datetime(2024, 2, 29))
    assert chat.raw_text(chat.render([QUESTION])) == "29 02 2024 2 plus 2?"
    assert chat.template.has_read_date
    undated = Chat(tiny_model)
    undated.render([QUESTION])
    assert not undated.template.has_read_date


def test_llamas_date_is_the_runs(tiny_model):
    chat = Chat(tiny_model, (TEMPLATES / "llama3_2.jinja").read_text(), datetime(2023, 1, 5))
    assert "Today Date: 05 Jan 2023\n" in chat.template([QUESTION], True, ())
