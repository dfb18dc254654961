import pytest

from fuchsia_pl.envs import ToolConvention
from fuchsia_pl.envs.tools.convention import MAX_CALL_CHARS, PLAIN

GOOD = '{"name": "add", "arguments": {"a": 1}}'
LISTS = ToolConvention("[TOOL_CALLS]", "", "arguments", role="tool", is_native=True)
BARE = ToolConvention("", "", "parameters", role="tool", is_native=True)


@pytest.mark.parametrize(
    ("convention", "text", "names"),
    [
        (PLAIN, f"I add. <tool_call>{GOOD}</tool_call>", ["add"]),
        (PLAIN, f"<tool_call>\n{GOOD}\n</tool_call><tool_call>{GOOD}</tool_call>", ["add", "add"]),
        (PLAIN, "no call", []),
        (PLAIN, f"</tool_call>{GOOD}", []),
        (LISTS, f"[TOOL_CALLS] [{GOOD}, {GOOD}]", ["add", "add"]),
        (LISTS, f"[{GOOD}]", []),
        (BARE, '{"name": "add", "parameters": {"a": 1}}', ["add"]),
        (BARE, "The answer is 3.", []),
        (BARE, '{"answer": 3}', []),
    ],
)
def test_calls_are_read_in_order(convention, text, names):
    assert [call.name for call in convention.parse(text)] == names


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{name: add}", "it is not JSON"),
        ('{"arguments": {}}', 'no JSON object with a "name"'),
        ('{"name": 3}', 'no JSON object with a "name"'),
        ("17", 'no JSON object with a "name"'),
        ('{"name": "add", "arguments": "1"}', '"arguments" are no JSON object'),
        ("[" * 50_000, "nested too deeply"),
        ("x" * (MAX_CALL_CHARS + 1), f"it has {MAX_CALL_CHARS + 1} characters"),
        ("\x00", "it is not JSON"),
        (r'{"name": "add", "arguments": {"a": "\ud83d"}}', "it is not JSON of Unicode text"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(body, words):
    (call,) = PLAIN.parse(f"<tool_call>{body}</tool_call>")
    assert call.name == ""
    assert words in call.error


def test_a_call_without_an_end_is_none():
    (call,) = PLAIN.parse(f"<tool_call>{GOOD}")
    assert "does not end in </tool_call>" in call.error


def test_results_are_marked_where_no_template_does_it():
    assert PLAIN.result("3") == "<tool_response>3</tool_response>"
    assert LISTS.result("3") == "3"
    assert PLAIN.stop == ["</tool_call>"]
    assert LISTS.stop == []
