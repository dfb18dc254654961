import pytest

from fuchsia_pl.envs import ConfigError, SingleTurnEnvironment
from fuchsia_pl.envs.conversation import conversation, prompt_messages

QUESTION = {"role": "user", "content": "3 plus 4?"}


class Plain(SingleTurnEnvironment):
    """Returns the prompt of the item unchanged."""


def test_a_text_becomes_a_user_message_and_a_list_is_used_unchanged():
    assert Plain().messages({"prompt": "3 plus 4?"}) == [QUESTION]
    asked = [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "assistant", "content": "8"}, QUESTION]
    assert Plain().messages({"prompt": asked}) == asked  # and not "[{'role': …"
    assert Plain(prompt_field="question").messages({"question": tuple(asked)}) == asked
    assert conversation(Plain().messages, {"prompt": asked}) == asked


def test_text_parts_are_joined_and_null_keys_are_dropped():
    parts = [{"type": "text", "text": "3 plus "}, {"type": "text", "text": "4?"}]
    assert prompt_messages({"p": [{"role": "user", "content": parts, "tool_calls": None}]}, "p") == [QUESTION]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert prompt_messages({"p": [QUESTION, call, {"role": "tool", "content": "7"}]}, "p")[1] == call | {"content": ""}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "field 'p' is null: a prompt is a text or a list of messages"),
        ("", "field 'p' is empty"),
        (" \n", "field 'p' is empty"),
        ([], "field 'p' is empty"),
        (7, "field 'p' is the number 7"),
        (0.5, "field 'p' is the number 0.5"),
        (10**400, "field 'p' is a number"),
        (True, "field 'p' is true"),
        ({"role": "user", "content": "a"}, "field 'p' is an object"),
        (b"a", "field 'p' is of type bytes"),
        (["3 plus 4?"], "field 'p', message 0 is a text: a message is"),
        ([{"from": "human", "value": "a"}], r"message 0 has no 'role', it has \['from', 'value'\]"),
        ([{"role": "user"}], r"message 0 has no 'content', it has \['role'\]"),
        ([{"role": None, "content": "a"}], "message 0: its role is null"),
        ([QUESTION, {"role": "user", "content": None}], r"message 1 \(user\): its content is null, but must be a text"),
        ([{"role": "user", "content": 7}], "its content is the number 7"),
        ([{"role": "user", "content": ""}], r"message 0 \(user\) is empty: it must contain text"),
        ([{"role": "user", "content": []}], r"message 0 \(user\) is empty"),
        ([{"role": "user", "content": ["a"]}], r"message 0 \(user\), part 0 is a text: the policy reads only text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "part 0 is of type 'image_url': the policy reads only text",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "part 0 is of type 'text'"),
        ([QUESTION, {"role": "assistant", "content": "7"}], "field 'p' ends with a message of the assistant"),
        ([{"role": "", "content": "a"}], 'message 0: its role is empty, but must be a text such as "user"'),
        ([{"role": " ", "content": "a"}], "message 0: its role is empty"),
        ("a \ud83d", "its content: character 2 is half of a surrogate pair, which no tokenizer can encode"),
        (
            [{"role": "us\udc00er", "content": "a"}],
            "message 0: its field 'role': character 2 is half of a surrogate pair",
        ),
        ([{**QUESTION, "name": "a\ud83d"}], "its field 'name': character 1 is half"),
        ([{**QUESTION, "\ud83d": "a"}], "the name of a field: character 0 is half"),
        (
            [{**QUESTION, "tool_calls": [{"function": {"name": "add", "arguments": {"a": [1, "\udfff"]}}}]}],
            "its field 'tool_calls': character 0 is half",
        ),
        ([{**QUESTION, "tool_calls": [{"\ud800": 1}]}], "its field 'tool_calls': character 0 is half"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "its content: character 0 is half"),
    ],
)
def test_invalid_prompts_are_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        prompt_messages({"p": value}, "p")


def test_a_complete_surrogate_pair_is_text():
    asked = {**QUESTION, "name": "\U0001f600"}
    assert prompt_messages({"p": [asked]}, "p") == [asked]


def test_the_error_for_a_missing_field_lists_the_existing_ones():
    with pytest.raises(
        ConfigError, match=r"has no field 'q', it has \['\(0, 1\)', 'n', 'prompt'\]: set \S+prompt_field"
    ):
        Plain(prompt_field="q").messages({"n": 1, "prompt": "a", (0, 1): "b"})


def leaves(item):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (lambda item: "3 plus 4?", r"messages\(item\) returned a text: it must return a list of messages"),
        (lambda item: None, r"messages\(item\) returned null"),
        (lambda item: [], r"messages\(item\) returned an empty list"),
        (lambda item: QUESTION, r"messages\(item\) returned an object"),
        (lambda item: [{"role": "user", "content": item["answer"]}], r"messages\(item\) raised KeyError: 'answer'"),
        (lambda item: ["a"], r"messages\(item\), message 0 is a text"),
        (leaves, r"messages\(item\) raised SystemExit: 0"),
    ],
)
def test_the_result_of_messages_is_checked(messages, words):
    with pytest.raises(ConfigError, match=words):
        conversation(messages, {"prompt": "a"})


def test_an_item_that_is_not_a_mapping_is_refused():
    with pytest.raises(ConfigError, match="it is a text, but an item must be a mapping"):
        conversation(Plain().messages, "3 plus 4?")


def test_messages_are_copied():
    shared = [dict(QUESTION)]
    conversation(lambda item: shared, {})[0]["content"] = "changed"
    assert shared == [QUESTION]
