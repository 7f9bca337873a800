import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import chat_builtin
from a1jax.data.chat_builtin import ToolCallError, parse_turn, turn_text
from a1jax.data.errors import DataError

GOOD = '<tool_call>\n{"name": "search", "arguments": {"q": "x"}}\n</tool_call>'


def test_parse_a_whole_turn():
    message = parse_turn("<think>\nfirst\nthen\n</think>\n\nHere:\n" + GOOD + "\n" + GOOD.replace("search", "read") + "<|im_end|>")
    assert message == {
        "role": "assistant",
        "reasoning_content": "first\nthen",
        "content": "Here:",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "search", "arguments": {"q": "x"}}},
            {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": {"q": "x"}}},
        ],
    }


def test_parse_plain_and_empty():
    assert parse_turn("just text") == {"role": "assistant", "content": "just text"}
    assert parse_turn("") == {"role": "assistant", "content": ""}
    assert parse_turn("<think>\n\n</think>\n\nx") == {"role": "assistant", "reasoning_content": "", "content": "x"}
    assert parse_turn("<b>1 < 2</b>")["content"] == "<b>1 < 2</b>"


def test_json_decides_where_a_call_ends():
    arguments = {"text": 'a </tool_call> <tool_call> "}} <|im_end|> <think>'}
    message = parse_turn(f'<tool_call>\n{{"name": "write", "arguments": {json.dumps(arguments)}}}\n</tool_call>')
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>no end", "not closed"),
        ("<think>a<think>b</think>", "inside"),
        ("a</think>b", "stray </think>"),
        ("answer <think>late</think>", "stray <think>"),
        ("<think>a</think>b</think>", "stray </think>"),
        ("a</tool_call>", "stray </tool_call>"),
        ("<tool_response>x</tool_response>", "stray <tool_response>"),
        ("a<|im_start|>user", "stray <|im_start|>"),
        ("a<|im_end|>b", "stray <|im_end|>"),
        ("<think><|endoftext|></think>", "stray <|endoftext|>"),
        ("<tool_call>", "not valid JSON"),
        ("<tool_call>{</tool_call>", "not valid JSON"),
        ("<tool_call>{'name': 'a', 'arguments': {}}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "a", "arguments": {}}', "not closed"),
        ('<tool_call>{"name": "a", "arguments": {}} and</tool_call>', "not closed"),
        ('<tool_call>[{"name": "a", "arguments": {}}]</tool_call>', "not a JSON object"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "a"}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "a", "arguments": "{}"}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "a", "arguments": null}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "a", "arguments": {}, "id": 1}</tool_call>', "unknown key"),
        ('<tool_call>{"name": "a", "name": "b", "arguments": {}}</tool_call>', "twice"),
        ('<tool_call>{"name": "a", "arguments": {"x": 1, "x": 2}}</tool_call>', "twice"),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN"),
        ('<tool_call>{"name": "a", "arguments": {"x": 1e999}}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "a", "arguments": {"x": ' + "[" * 100_000 + "</tool_call>", "nested too deeply"),
        ('<tool_call>{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        (GOOD + "and then", "text after tool call 1"),
        (GOOD + "and then" + GOOD, "text after tool call 1"),
    ],
)
def test_every_bad_turn_gets_one_clear_line(text, reason):
    with pytest.raises(ToolCallError) as error:
        parse_turn(text)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>"]
FRAGMENTS = st.sampled_from([*TAGS, "\n", '{"name": "a", "arguments": {}}', GOOD, '{"name"', "x", " ", '"'])
STRINGS = st.one_of(
    st.text(st.characters()),
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.lists(st.one_of(FRAGMENTS, st.text()), max_size=8).map("".join),
)


@settings(max_examples=500, deadline=None)
@given(STRINGS)
def test_any_string_is_read_or_refused(text):
    try:
        message = parse_turn(text)
    except ToolCallError as error:
        assert "\n" not in str(error)
    else:
        assert parse_turn(turn_text(message)) == message  # one reading: what it means says the same again


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda t: "<" not in t)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), PLAIN)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=2) | st.dictionaries(PLAIN, v, max_size=2), max_leaves=4)
CALLS = st.fixed_dictionaries({"name": PLAIN.filter(bool), "arguments": st.dictionaries(PLAIN, VALUES, max_size=3)})


@settings(max_examples=100, deadline=None)
@given(PLAIN, st.one_of(st.none(), PLAIN), st.lists(CALLS, max_size=3))
def test_a_rendered_message_is_read_back(content, thinking, calls):
    message = {"role": "assistant", "content": content}
    if thinking is not None:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [{"id": f"call_{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
    assert parse_turn(turn_text(message)) == message
    assert parse_turn(turn_text(message) + "<|im_end|>") == message


def test_rendering_by_hand():
    tool = {"type": "function", "function": {"name": "f", "description": "é"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r1", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "r2", "tool_call_id": "2", "name": "f"},
        {"role": "assistant", "content": "done", "reasoning_content": "t"},
    ]
    pieces = chat_builtin.render(messages, [tool], "<|im_end|>", True)
    assert "".join(p.text for p in pieces) == (
        "<|im_start|>system\nS\n\n" + chat_builtin.TOOLS_HEAD
        + '\n{"type": "function", "function": {"name": "f", "description": "é"}}' + chat_builtin.TOOLS_TAIL + "<|im_end|>\n"
        "<|im_start|>user\nU<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt\n</think>\n\ndone<|im_end|>\n"
        "<|im_start|>assistant\n"
    )  # fmt: skip
    assert [p.text for p in pieces if p.supervised] == [
        '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>',
        "<think>\nt\n</think>\n\ndone<|im_end|>",
    ]
    assert [p.message for p in pieces if p.supervised] == [2, 5]


def test_unknown_role_is_refused():
    with pytest.raises(DataError, match="role 'robot'"):
        chat_builtin.render([{"role": "robot", "content": "x"}], [], "<|im_end|>", False)
