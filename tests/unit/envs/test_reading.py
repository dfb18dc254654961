"""Calls in a turn's text: forms of published models, written by hand, and hostile or generated ones."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.envs import ToolConvention, ToolSpec
from fuchsia_pl.envs.thinking import ends_in_thinking, without_thinking
from fuchsia_pl.envs.tools.convention import PLAIN
from fuchsia_pl.envs.tools.reading import (
    MAX_CALL_CHARS,
    MAX_CALL_DEPTH,
    MAX_CALLS,
    MAX_NUMBER_DIGITS,
    MAX_OBJECTS,
    unsendable,
)

GOOD = '{"name": "add", "arguments": {"a": 1}}'
CATS = '{"name": "search", "parameters": {"query": "cats"}}'
DOGS = '{"name": "search", "parameters": {"query": "dogs"}}'
LISTS = ToolConvention("[TOOL_CALLS]", "", "arguments", role="tool", is_native=True)
BARE = ToolConvention("", "", "parameters", role="tool", is_native=True)
SCHEMA = {"type": "object", "properties": {"query": {"type": "string", "default": "x"}}}
TOOLS = [ToolSpec("search", "Searches.", SCHEMA), ToolSpec("now", "The time.", {"type": "object"})]


def read(convention, text):
    """(name, arguments) of each valid call, the error of each other call."""
    calls = convention.read(text, TOOLS).calls
    return [call.error or (call.name, call.arguments) for call in calls]


def answered(convention, text, starts_in_thinking=False):
    """A turn without its thinking, as the collector passes it to the reader."""
    return without_thinking(text, starts_in_thinking=starts_in_thinking, opaque=convention.opaque(TOOLS))


ADD, SEARCH_CATS, SEARCH_DOGS = ("add", {"a": 1}), ("search", {"query": "cats"}), ("search", {"query": "dogs"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"I add. <tool_call>{GOOD}</tool_call>", [ADD]),
        (f"<tool_call>\n{GOOD}\n</tool_call><tool_call>{GOOD}</tool_call>", [ADD, ADD]),
        (f"<tool_call>{GOOD}\n{CATS}</tool_call>", [ADD, SEARCH_CATS]),
        (f"<tool_call>[{GOOD}, {CATS}]</tool_call>", [ADD, SEARCH_CATS]),
        ("no call", []),
        (f"</tool_call>{GOOD}", []),
        # a string may hold the tags
        (
            '<tool_call>{"name": "search", "arguments": {"query": "a</tool_call>b<tool_call>c"}}</tool_call>',
            [("search", {"query": "a</tool_call>b<tool_call>c"})],
        ),
        # both keys, and arguments as a string
        (f"<tool_call>{CATS}</tool_call>", [SEARCH_CATS]),
        (
            '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"cats\\"}"}</tool_call>',
            [SEARCH_CATS],
        ),
        ('<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", {})]),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', [("search", {})]),
    ],
)
def test_calls_between_tags(text, found):
    assert read(PLAIN, text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CATS, [SEARCH_CATS]),
        (f"<|python_tag|>{CATS}", [SEARCH_CATS]),
        (f"<|python_tag|>{CATS}<|eom_id|>", [SEARCH_CATS]),
        (f"I look for cats.\n{CATS}", [SEARCH_CATS]),
        (f"```json\n{CATS}\n```", [SEARCH_CATS]),
        (f"{CATS}; {DOGS}", [SEARCH_CATS, SEARCH_DOGS]),
        (f"{CATS}\n{DOGS}", [SEARCH_CATS, SEARCH_DOGS]),
        (f"[{CATS}, {DOGS}]", [SEARCH_CATS, SEARCH_DOGS]),
        ('{"type": "function", "name": "search", "parameters": {"query": "cats"}}', [SEARCH_CATS]),
        ('{"name": "search", "arguments": {"query": "cats"}}', [SEARCH_CATS]),
        ('{"parameters": {"query": "cats"}, "name": "search"}', [SEARCH_CATS]),
        ('{"name": "now"}', [("now", {})]),
        ('{"name": "nothing", "parameters": {"a": 1}}', [("nothing", {"a": 1})]),  # the environment refuses it
        ('{"type": "function", "function": {"name": "search", "parameters": {"query": "cats"}}}', [SEARCH_CATS]),
        ('{"function": {"name": "now"}, "id": "1"}', [("now", {})]),
        # answers
        ('{"a": 1}' * (MAX_OBJECTS + 1), []),
        ('{"name": "Alice"}\n' * (MAX_OBJECTS + 9), []),
        ('{"parameters": {"a": 1}}', []),
        ('{"function": {"name": "sine", "period": 6.28}}', []),
        ('{"function": "sine", "type": "function"}', []),
        ('{"name": "Alice", "age": 3}', []),
        ('{"answer": 3}', []),
        ("The answer is 3.", []),
        ('The set {"a", "b"} has two members.', []),
        (f'{{"result": {CATS}}}', []),
        (f'{{"text": {json.dumps(CATS)}}}', []),
        (f'The set {{"a"}}. {CATS}', [SEARCH_CATS]),
        ('{"age": 1e999}', []),
    ],
)
def test_calls_without_tags(text, found):
    assert read(BARE, text) == found


def search(query, key="arguments"):
    return f'{{"name": "search", "{key}": {{"query": "{query}"}}}}'


@pytest.mark.parametrize(
    "query", ["<think>x</think>b", "a </think> b", "a <think> b", "<thinking></think>", 'say \\"</think>\\" twice']
)
def test_thinking_marks_in_strings_of_a_call_are_text(query):
    call = ("search", {"query": query.replace('\\"', '"')})
    for convention, text in (
        (PLAIN, f"<tool_call>{search(query)}</tool_call>"),
        (LISTS, f"[TOOL_CALLS][{search(query)}]"),
        (BARE, search(query, "parameters")),
    ):
        for said in (text, f"<think>a call?</think>{text}", f"I look. {text}<think>and"):
            assert read(convention, answered(convention, said)) == [call]
        assert read(convention, answered(convention, f"3?</think>{text}", starts_in_thinking=True)) == [call]
        assert not ends_in_thinking(text, opaque=convention.opaque(TOOLS))
    two = f"<tool_call>{search('x')}\n{search(query)}</tool_call>"
    assert read(PLAIN, answered(PLAIN, two)) == [("search", {"query": "x"}), call]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # a call inside thinking is not a call
        (f"<think><tool_call>{search('a')}</tool_call></think>4", []),
        (f"<tool_call>{search('a')}</tool_call>? No.</think>4", []),  # thinking without an opening mark
        # a tag or brackets in prose hide no mark
        ("The tag <tool_call> <think>is</think>", ["it is not JSON"]),
        (f"<tool_call>{{oops <think><tool_call>{search('a')}</tool_call>", ["it is not JSON"]),
        # thinking between the tag and the JSON, or between its parts
        (f"<tool_call><think>now</think>{search('a')}</tool_call>", [("search", {"query": "a"})]),
        # malformed strings hide marks and tags like any other: the call gets an error, and there is no other call
        (f"<tool_call>{search('a' + chr(10) + '</think>')}</tool_call>", ["Invalid control character"]),
        (f"<tool_call>{search(chr(92) + 'd </think> <tool_call>')}</tool_call>", ["Invalid"]),
        (f'<tool_call>{{"q": "{chr(92)}d}}</tool_call><think><tool_call>{search("a")}</tool_call>', ["Invalid"]),
    ],
)
def test_thinking_marks_outside_of_strings_count(text, found):
    calls = read(PLAIN, answered(PLAIN, text))
    assert len(calls) == len(found)
    for call, expected in zip(calls, found, strict=True):
        assert expected in call if isinstance(expected, str) else call == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "search", "parameters": {"query": cats}}', "it is not JSON"),
        ('{"name": "nothing", "parameters": {"query": cats}}', "it is not JSON"),
        ('{"name": "search"}', "it has no \"arguments\", but search takes ['query']"),
        ('{"name": "search", "query": "cats"}', 'it has no "arguments"'),
        ('{"name": "search", "parameters": {"query": NaN}}', "a number that is not finite"),
        ('{"parameters": {"query": 1e999}, "name": "search"}', "a number that is not finite"),
        ("<|python_tag|>search(query='cats')", 'after <|python_tag|> there is no JSON object with a "name"'),
        ('{"a": ' + "[" * 5000, "nested too deeply"),
        ('{"a": "' + "x" * MAX_CALL_CHARS, f"more than {MAX_CALL_CHARS} characters"),
        ('{"a": 1}' * MAX_OBJECTS + CATS, f"only the first {MAX_OBJECTS} JSON objects"),
        ('{"a": 1}' * MAX_OBJECTS + '{"id": 3, "name": "now"}', f"only the first {MAX_OBJECTS} JSON objects"),
        # the arguments first, and OpenAI's form
        ('{"parameters": {"query": "ca', "it is not JSON"),
        ('{"parameters": {"query": cats}, "name": "search"}', "it is not JSON"),
        ('{"arguments": {"query": cats}, "name": "nothing"}', "it is not JSON"),
        ('{"type": "function", "function": {"name": "search", "parameters": {"query": "ca', "it is not JSON"),
        ('{"function": {"arguments": {"query": cats}}}', "it is not JSON"),
    ],
)
def test_an_unreadable_call_without_tags_has_an_error(text, words):
    (error,) = read(BARE, text)
    assert words in error


def test_a_list_of_calls_requires_no_closing_tag():
    assert read(LISTS, f"[TOOL_CALLS] [{GOOD}, {GOOD}]") == [ADD, ADD]
    assert read(LISTS, f"[TOOL_CALLS]{GOOD}\n{CATS} I wait.") == [ADD, SEARCH_CATS]
    assert read(LISTS, f"[{GOOD}]") == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{name: add}", "it is not JSON"),
        ('{"arguments": {}}', 'not a JSON object with a "name"'),
        ('{"name": 3}', 'not a JSON object with a "name"'),
        ("17", 'not a JSON object with a "name"'),
        ("[]", 'not a JSON object with a "name"'),
        ('{"name": "add", "arguments": "1"}', '"arguments" are not a JSON object'),
        ('{"name": "add", "arguments": "{} {}"}', '"arguments" are not a JSON object'),
        ('{"name": "add", "parameters": [1]}', '"parameters" are not a JSON object'),
        ('{"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}', "that differ"),
        ('{"name": "search"}', "it has no \"arguments\", but search takes ['query']"),
        ('{"name": "search", "arguments": null}', 'it has no "arguments"'),
        ("[" * 50_000, "nested too deeply"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ('{"name": "add", "arguments": {"a": ' + "[" * 300 + "]" * 300 + "}}", "nested too deeply"),
        (
            f'{{"name": "add", "arguments": {json.dumps(json.dumps({"a": json.loads("[" * 300 + "]" * 300)}))}}}',
            "not a JSON object",
        ),
        ("x" * (MAX_CALL_CHARS + 1), "it is not JSON"),
        ('"' + "x" * (MAX_CALL_CHARS + 1), f"it has more than {MAX_CALL_CHARS} characters"),
        (json.dumps([1] * MAX_CALL_CHARS), f"it has more than {MAX_CALL_CHARS} characters"),
        ("\x00", "it is not JSON"),
        (r'{"name": "add", "arguments": {"a": "\ud83d"}}', "it is not JSON of Unicode text"),
        (r'{"name": "add", "arguments": {"\ud83d": 1}}', "it is not JSON of Unicode text"),
        ('{"name": "add", "arguments": {"a": NaN}}', "a number that is not finite"),
        ('{"name": "add", "arguments": {"a": -Infinity}}', "a number that is not finite"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "a number that is not finite"),
        ('{"name": "add", "arguments": {"a": ' + "9" * (MAX_NUMBER_DIGITS + 1) + "}}", "more than 4000 digits"),
        (f"{GOOD} and more", "it does not end with </tool_call>"),
    ],
)
def test_an_unreadable_call_has_an_error(body, words):
    for convention in (PLAIN, ToolConvention("<tool_call>", "</tool_call>", "parameters", role="tool", is_native=True)):
        (call,) = convention.read(f"<tool_call>{body}</tool_call>", TOOLS).calls
        assert call.name == ""
        assert words in call.error


def test_a_call_without_its_closing_tag_is_not_run():
    (error,) = read(PLAIN, f"<tool_call>{GOOD}")
    assert "does not end with </tool_call>" in error


def test_long_numbers_and_odd_keys_are_read():
    number = 10 ** (MAX_NUMBER_DIGITS - 1)
    arguments = {"": number, "a b": {"__class__": None}, "é": [True, -1.5e-300]}
    assert read(PLAIN, PLAIN.call("add", arguments)) == [("add", arguments)]


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": "</tool_call>', True),
        ('<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"', True),  # the quote was in the same token
        ('<tool_call>{"name": "add", "arguments": {"a": "\\"</tool_call>', True),
        (f'<tool_call>{GOOD}</tool_call><tool_call>{{"name": "</tool_call>', True),
        (f"<tool_call>{GOOD}</tool_call>", False),
        ('<tool_call>{"name": add}</tool_call>', False),
        # a line break does not end a JSON string
        ('<tool_call>{"name": "add", "arguments": {"a": "x\n</tool_call>', False),
        ('<tool_call>{"name": "add"</tool_call>', False),
        ("</tool_call>", False),
        ('<tool_call>"' + "x" * MAX_CALL_CHARS + "</tool_call>", False),
    ],
)
def test_a_text_that_ends_inside_the_json_of_a_call_is_cut(text, is_cut):
    assert PLAIN.read(text, TOOLS).is_cut is is_cut


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ('{"name": "search", "parameters": {"query": "</answer>', True),
        ('I look. {"name": "now"</answer>', False),
        ('{"name": "search", "parameters": {"query": "</answer>"', True),
        ('{"parameters": {"query": "</answer>', True),
        ('{"type": "function", "function": {"name": "search", "arguments": "</answer>', True),
        (f"{CATS} [{DOGS}, {search('</answer>', 'parameters')[:-3]}", True),
        (f"{CATS}</answer>", False),
        ('{"result": "</answer>', False),
        ('{"name": "Alice", "says": "</answer>', False),
        ('{"result": {"name": "search", "parameters": {"query": "</answer>', False),
        ('{"name": "search", "parameters": {"query": "x\n</answer>', False),
        ('{"name": "search", "parameters": {"query": cats}} </answer>', False),
    ],
)
def test_a_text_that_ends_inside_a_call_without_tags_is_cut(text, is_cut):
    assert BARE.read(text, TOOLS).is_cut is is_cut


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "object"}, None),
        ({"$ref": "#/$defs/q", "$defs": {"q": SCHEMA}}, ["query"]),
        ({"$ref": "#/$defs/q", "$defs": {"q": {"type": "object"}, "unused": SCHEMA}}, None),
        ({"anyOf": [{"type": "object"}, SCHEMA]}, ["query"]),
        ({"oneOf": [{"properties": {"a": {}}}, SCHEMA]}, ["a", "query"]),
        ({"allOf": [{"allOf": [SCHEMA]}, {"properties": {"a": {"properties": {"inner": {}}}}}]}, ["a", "query"]),
        ({"properties": {"a": {}}, "$ref": "#"}, ["a"]),
        ({"$ref": "#/nowhere"}, None),
    ],
)
def test_a_call_without_arguments_of_a_tool_that_has_some_is_refused_however_its_schema_is_written(schema, names):
    tools = [ToolSpec("look", "Looks.", schema)]
    for convention, text in ((PLAIN, '<tool_call>{"name": "look"}</tool_call>'), (BARE, '{"name": "look"}')):
        (call,) = convention.read(text, tools).calls
        assert call.error == (names and f'the call cannot be read: it has no "arguments", but look takes {names}')


def test_openais_form_is_a_call_in_every_convention():
    form = '{"id": "1", "type": "function", "function": {"name": "search", "arguments": "{\\"query\\": \\"cats\\"}"}}'
    texts = [(PLAIN, f"<tool_call>{form}</tool_call>"), (LISTS, f"[TOOL_CALLS][{form}]"), (BARE, form)]
    assert [read(convention, text) for convention, text in texts] == [[SEARCH_CATS]] * 3


def test_the_number_of_calls_per_turn_is_limited():
    for convention, text in (
        (PLAIN, f"<tool_call>{GOOD}</tool_call>" * 1000),
        (PLAIN, "<tool_call>" + json.dumps([json.loads(GOOD)] * 1000) + "</tool_call>"),
        (BARE, f"{CATS}\n" * 500),
        (LISTS, "[TOOL_CALLS]" + GOOD * 1000),
    ):
        found = read(convention, text)
        assert len(found) == MAX_CALLS + 1
        assert f"only the first {MAX_CALLS} calls of a turn are read" in found[-1]
    found = read(PLAIN, "<tool_call>" * 1000)
    assert len(found) == MAX_CALLS + 1


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>",
        "<tool_call>{",
        '<tool_call>{"',
        "<tool_call>[]</tool_call>",
        f"<tool_call>{GOOD}</tool_call>",
        '{"',
        '{"a":[',
        '{"a":',
        '{"a":1}',
        '{"a":1,',
        '{"a":"\\"',
        "[",
        "1,",
        "{" + " " * 100,
        CATS,
        "<|python_tag|>",
        "[TOOL_CALLS][",
        " ",
        "\\",
        "\ud83d",
    ],
)
@pytest.mark.parametrize("convention", [PLAIN, BARE, LISTS], ids=["plain", "bare", "lists"])
def test_four_megabytes_of_anything_are_read_in_linear_time(convention, piece):
    """A time bound: quadratic time would be minutes here. It is ten times the time of the slowest CPU tested."""
    text = piece * (4_000_000 // len(piece))
    start = time.process_time()
    convention.read(text, TOOLS)
    convention.read(f"<tool_call>[{text}", TOOLS)
    assert time.process_time() - start < 5.0  # two readings of at most 0.1 s each
    start = time.process_time()
    answered(convention, text)
    answered(convention, f"[TOOL_CALLS]<tool_call>[{text}")
    assert time.process_time() - start < 20.0  # 0.6 to 2.3 s


def test_values_that_cannot_be_sent_as_json():
    nested = 1
    for _ in range(MAX_CALL_DEPTH - 1):
        nested = [nested]
    assert unsendable(nested) is None
    assert "64 levels are allowed" in unsendable([nested])
    assert unsendable({"a": math.nan}) is not None
    assert unsendable({"a": ["\udc00"]}) is not None


# --- over generated inputs ---

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "</tool_call>",
        "<tool_call>",
        '<tool_call>{"name": "search"',
        '"',
        "\\",
        "<think>",
        "</think>",
        "{",
        "}",
        GOOD,
        "\n",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES, ARGUMENTS = st.sampled_from(["search", "now", "else"]), st.dictionaries(TEXTS, VALUES, max_size=2)
CALLS = st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS})
# the first closing mark ends the thinking, at any place
THOUGHT_CALLS = CALLS.filter(lambda call: "</think>" not in json.dumps(call)).map(
    lambda call: {**call, "name": "thought"}
)


def tagged(call):
    return f"<tool_call>{json.dumps(call)}</tool_call>"


SAID = st.sampled_from(["I look. ", "", "\n", "no, "])
PIECES = st.one_of(
    SAID.map(lambda text: (text, None)),
    CALLS.map(lambda call: (tagged(call), call)),
    st.tuples(SAID, THOUGHT_CALLS).map(lambda pair: (f"<think>{pair[0]}{tagged(pair[1])}</think>", None)),
    st.just(("<thinking>shall I write <tool_call> now?</thinking>", None)),
)


@given(st.lists(PIECES, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_calls_outside_of_thinking_are_read_at_any_truncation(pieces):
    text = "".join(piece for piece, _ in pieces)
    said = [(call["name"], call["arguments"]) for _, call in pieces if call is not None]
    assert read(PLAIN, answered(PLAIN, text)) == said
    for end in range(len(text)):
        calls = PLAIN.read(answered(PLAIN, text[:end]), TOOLS).calls
        made = [(call.name, call.arguments) for call in calls if call.error is None]
        assert made == said[: len(made)]  # those that were complete, and no other
        assert len(calls) - len(made) <= 1


@given(st.lists(CALLS, min_size=1, max_size=2), st.sampled_from(["; ", "\n", ", ", "\nand\n"]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_calls_without_tags_are_read_at_any_truncation(calls, joint):
    text = "<|python_tag|>" + joint.join(json.dumps(call) for call in calls)
    said = [(call["name"], call["arguments"]) for call in calls]
    assert read(BARE, answered(BARE, text)) == said
    for end in range(len(text)):
        made = [
            (call.name, call.arguments)
            for call in BARE.read(answered(BARE, text[:end]), TOOLS).calls
            if call.error is None
        ]
        assert made == said[: len(made)]


TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "<|python_tag|>"]
JSON = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    '"name"',
    ":",
    '"search"',
    '"arguments"',
    ",",
    "1",
    "1e999",
    "NaN",
    "null",
    "\\ud83d",
]
HOSTILE = st.lists(st.sampled_from([*TAGS, *JSON, "\ud83d", "\x00", " ", "\n"]) | st.text(max_size=5), max_size=25).map(
    "".join
)


@given(HOSTILE)
@settings(derandomize=True, deadline=None, max_examples=500)
def test_no_text_raises_and_every_call_can_be_sent(text):
    for convention in (PLAIN, BARE, LISTS):
        for call in convention.read(answered(convention, text), TOOLS).calls:
            assert call.error is not None or unsendable(call.arguments) is None
