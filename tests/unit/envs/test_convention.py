from fuchsia_pl.envs import ToolConvention
from fuchsia_pl.envs.tools.convention import PLAIN

LISTS = ToolConvention("[TOOL_CALLS]", "", "arguments", role="tool", is_native=True)
BARE = ToolConvention("", "", "parameters", role="tool", is_native=True)


def test_a_call_that_a_convention_writes_is_read_by_it():
    for convention in (PLAIN, LISTS, BARE):
        (call,) = convention.read(convention.call("add", {"text": "</tool_call>"}), tools=[]).calls
        assert (call.name, call.arguments, call.error) == ("add", {"text": "</tool_call>"}, None)


def test_results_are_marked_where_no_template_does_it():
    assert PLAIN.result("3") == "<tool_response>3</tool_response>"
    assert LISTS.result("3") == "3"
    assert PLAIN.stop == ["</tool_call>"]
    assert LISTS.stop == []
