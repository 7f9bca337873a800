import pytest

from a1jax.data.linking import Unusable, content_text, evidence, link, split_thinking
from a1jax.types import Record


def call(name, arguments="{}", id="c0"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "q"}


def says(*calls, content="", **more):
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(text, id="c0"):
    return {"role": "tool", "content": text, "tool_call_id": id}


def test_calls_and_results_become_records():
    messages, records = link(
        [
            {"role": "developer", "content": "S"},
            USER,
            says(call("find", '{"name": "Ada"}', "a"), call("count", None, "b")),
            result("7", "b"),
            result("user ada_1815", "a"),
            says(call("get", {"id": "ada_1815"}, "c"), content=None),
            result("ok", "c"),
            {"role": "assistant", "content": [{"type": "text", "text": "do"}, {"type": "text", "text": "ne"}]},
        ]
    )
    assert records == (
        Record((), {"name": "find", "arguments": {"name": "Ada"}}, "user ada_1815"),
        Record((), {"name": "count", "arguments": {}}, "7"),
        Record(("observation:0",), {"name": "get", "arguments": {"id": "ada_1815"}}, "ok"),
    )
    assert messages[0] == {"role": "system", "content": "S"}
    assert messages[3] == {"role": "tool", "content": "7", "tool_call_id": "b", "name": "count"}
    assert messages[5] == {"role": "assistant", "content": "", "tool_calls": [call("get", {"id": "ada_1815"}, "c")]}
    assert messages[-1]["content"] == "done"


def test_a_call_id_used_again_means_the_latest_call():
    _, records = link([USER, says(call("f")), result("one"), says(call("g")), result("two")])
    assert [(r.action["name"], r.observation) for r in records] == [("f", "one"), ("g", "two")]


def test_results_without_ids_come_in_order():
    raw = [{"role": "tool", "content": text} for text in ("one", "two")]
    messages, records = link([USER, says(call("f", id=None), call("g", id=None)), *raw])
    assert [r.observation for r in records] == ["one", "two"]
    assert [m["tool_call_id"] for m in messages[2:]] == ["call_0", "call_1"]


def test_a_call_that_ends_the_run_is_legal():
    messages, records = link([USER, says(call("submit"))])
    assert len(messages) == 2 and records == (Record((), {"name": "submit", "arguments": {}}, None),)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([USER, says(call("f")), USER], "call without result"),
        ([USER, says(call("f")), says(content="x")], "call without result"),
        ([USER, says(call("f", id="a"), call("g", id="b")), result("x", "a")], "call without result"),
        ([USER, says(call("f", id="a"), call("g", id="b")), result("x", "a"), says(content="x")], "call without result"),
        ([USER, says(content="x"), result("x")], "result without call"),
        ([USER, says(call("f")), result("x"), result("x")], "result without call"),
        ([USER, says(call("f")), result("x", "other")], "result without call"),
        ([{"role": "robot", "content": "x"}], "unknown role"),
        ([{"content": "x"}], "unknown role"),
        ([USER], "no model turn"),
        ([], "no model turn"),
        ([USER, says(call("f", "{")), result("x")], "arguments are not JSON"),
        ([USER, says(call("f", "[1]")), result("x")], "arguments are not an object"),
        ([USER, says(call("f", 3)), result("x")], "arguments are not an object"),
        ([USER, says(call("")), result("x")], "call without name"),
        ([USER, says("f"), result("x")], "call without name"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content is not text"),
        ([{"role": "user", "content": 3}], "content is not text"),
    ],
)
def test_what_cannot_be_linked(raw, reason):
    with pytest.raises(Unusable) as error:
        link(raw)
    assert error.value.reason == reason


def test_content():
    assert content_text(None) == "" and content_text("x") == "x" and content_text([]) == ""
    assert content_text(["a", {"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]) == "abc"


def test_thinking_in_the_content_is_taken_out():
    def split(text, **more):
        return split_thinking({"role": "assistant", "content": text, **more})

    assert split("<think>\nt\n</think>\n\nx") == {"role": "assistant", "content": "x", "reasoning_content": "t"}
    assert split("t</think>x") == {"role": "assistant", "content": "x", "reasoning_content": "t"}
    assert split("x <think>t</think>")["content"] == "x <think>t</think>"  # in the middle it is text
    assert split("<think>t")["content"] == "<think>t"
    assert split("<think>t</think>x", reasoning_content="r")["content"] == "<think>t</think>x"


def test_evidence_is_what_was_copied():
    earlier = [Record(observation="id ab12"), Record(observation=None), Record(observation="nothing"), Record(observation="ab12 again")]
    assert evidence({"x": ["ab12"]}, earlier) == ("observation:0", "observation:3")
    assert evidence({"x": "ab1"}, earlier) == ()  # too short to mean anything
    assert evidence({"x": {"y": 5}}, earlier) == ()
