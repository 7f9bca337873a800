import pytest

from a1jax.data import readers
from a1jax.data.linking import Unusable
from a1jax.data.readers import Place
from a1jax.types import FAILED, FINISHED, TRUNCATED, Record

AT = Place("math_env__rollouts", 7)
USER = {"role": "user", "content": "q"}


def message(text):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def reasoning(text):
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}


def call(id, name="f"):
    return {"type": "function_call", "call_id": id, "name": name, "arguments": '{"x": 1}'}


def output(id, text="r"):
    return {"type": "function_call_output", "call_id": id, "output": text}


def responses(*items, **more):
    return {"responses_create_params": {"input": [USER]}, "response": {"output": list(items)}, **more}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"format": "a1jax.trajectory/1"}, "a1jax"),
        (responses(), "responses"),
        (responses(trajectory=[{"action": "x"}]), "responses"),  # a gym record may carry its own log
        ({"trajectory": [{"action": "ls", "observation": ""}]}, "swe-agent"),
        ({"history": [{"role": "user", "content": ""}]}, "swe-agent"),
        ({"traj": [USER]}, "chat"),
        ({"messages": [USER, {"role": "assistant", "content": "<think>a</think>b"}]}, "tagged"),
        ({"messages": [USER, {"role": "assistant", "content": "<think>", "tool_calls": [1]}]}, "chat"),
        ({"messages": [{"role": "user", "content": "<tool_call>"}, {"role": "assistant", "content": "x"}]}, "chat"),
        ({"messages": []}, None),
        ({"messages": ["x"]}, None),
        ({"question": 1}, None),
        ([], None),
        ("x", None),
    ],
)
def test_formats_are_told_by_structure(record, kind):
    assert readers.recognise(record) == kind


def test_chat():
    record = {"task_id": 4, "trial": 2, "reward": 1.0, "traj": [USER, {"role": "assistant", "content": "a"}]}
    run = readers.read_chat(record, AT)
    assert (run.domain, run.task_id, run.reward, run.status, run.metadata) == ("general", "4", 1.0, FINISHED, {"trial": 2})
    assert run.records == (Record(outcome="reward 1"),)
    assert readers.read_chat(record | {"reward": 0.0}, AT).status == FAILED
    assert readers.read_chat(record | {"reward": 0.5}, AT).status is None
    other = readers.read_chat({"messages": record["traj"], "domain": "science", "tools": [{"name": "f", "strict": True}]}, AT)
    assert (other.domain, other.task_id, other.reward, other.records) == ("science", "math_env__rollouts:7", None, ())
    assert other.tools == ({"type": "function", "function": {"name": "f"}},)


def test_responses():
    tools = [{"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}]
    record = responses(reasoning("t"), message("look"), call("1"), call("2"), output("2", "two"), output("1", "one"), message("end"))
    record["responses_create_params"] |= {"tools": tools, "instructions": "S"}
    run = readers.read_responses(record | {"reward": 0.25, "_ng_task_index": 9}, AT)
    assert [m["role"] for m in run.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert run.messages[2]["reasoning_content"] == "t" and run.messages[2]["content"] == "look"
    assert [r.observation for r in run.records] == ["one", "two", None]
    assert run.records[-1] == Record(("observation:0", "observation:1"), None, None, "reward 0.25")
    assert run.tools == ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
    assert (run.domain, run.task_id, run.reward, run.status) == ("science", "math_env/9", 0.25, None)
    text_input = readers.read_responses({"responses_create_params": {"input": "hello"}, "response": {"output": [message("x")]}}, AT)
    assert text_input.messages[0] == {"role": "user", "content": "hello"}


def test_turns_of_responses():
    def shape(*items):
        return [(m["role"], m.get("reasoning_content"), m["content"], len(m.get("tool_calls", ()))) for m in readers.turns(items)]

    assert shape(message("a"), message("b")) == [("assistant", None, "a", 0), ("assistant", None, "b", 0)]
    assert shape(reasoning("r"), reasoning("s"), call("1")) == [("assistant", "r\ns", "", 1)]
    assert shape(call("1"), message("late"), output("1"))[0] == ("assistant", None, "late", 1)  # the call was written down first
    assert shape(call("1"), reasoning("r"), output("1"), reasoning("s"), call("2"))[0] == ("assistant", "r", "", 1)
    assert shape(call("1"), message("next"))[1] == ("assistant", None, "next", 0)
    assert shape(reasoning("r")) == [("assistant", "r", "", 0)]
    assert shape({"role": "user", "content": "x"}, message("a"))[0] == ("user", None, "x", 0)
    with pytest.raises(Unusable, match="unknown item"):
        readers.turns([{"type": "web_search_call"}])


def test_responses_that_were_cut_or_say_nothing():
    cut = responses(reasoning("t"))
    cut["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
    assert readers.read_responses(cut, AT).status == TRUNCATED
    assert readers.read_responses(responses(message("x"), truncated=True), AT).status == TRUNCATED
    with pytest.raises(Unusable, match="no response output"):
        readers.read_responses(responses() | {"response": {}}, AT)
    with pytest.raises(Unusable, match="no model turn"):
        readers.read_responses(responses(), AT)


def test_swe_agent_history_with_actions_as_text():
    steps = [{"action": "ls\n", "observation": "a.py"}, {"action": "submit", "observation": ""}]
    history = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "demo", "is_demo": True},
        USER,
        {"role": "assistant", "content": "I look\n```\nls\n```", "action": "ls\n"},
        {"role": "user", "content": "a.py (open file)"},
        {"role": "assistant", "content": "done", "action": "submit"},
    ]
    run = readers.read_swe_agent({"history": history, "trajectory": steps, "info": {"exit_status": "submitted"}, "_path": "p"}, AT)
    assert [m["content"] for m in run.messages] == ["S", "q", "I look\n```\nls\n```", "a.py (open file)", "done"]
    assert run.records == (
        Record((), {"name": "shell", "arguments": {"command": "ls\n"}}, "a.py"),
        Record((), {"name": "shell", "arguments": {"command": "submit"}}, ""),
    )
    assert (run.status, run.domain, run.task_id) == (FINISHED, "engineering", "p")
    alone = readers.read_swe_agent({"history": history}, AT)
    assert [r.observation for r in alone.records] == ["a.py (open file)", None] and alone.status is None
    assert readers.read_swe_agent({"history": history, "info": {"exit_status": "exit_cost"}}, AT).status == TRUNCATED


def test_swe_agent_with_function_calls_and_without_history():
    history = [
        USER,
        {"role": "assistant", "content": "t", "tool_calls": [{"id": "1", "function": {"name": "open", "arguments": '{"path": "a"}'}}]},
        {"role": "tool", "content": "text", "tool_call_ids": ["1"]},
    ]
    run = readers.read_swe_agent({"history": history}, AT)
    assert run.records == (Record((), {"name": "open", "arguments": {"path": "a"}}, "text"),)
    steps = [{"action": "ls", "response": "look: ls", "observation": "a.py"}]
    assert [m["role"] for m in readers.read_swe_agent({"trajectory": steps}, AT).messages] == ["assistant", "user"]


def tagged(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


CALL = '<tool_call>\n{"name": "search", "arguments": {"q": "x"}}\n</tool_call>'


def test_tagged_text():
    quoting = "<tool_response>\nsee </tool_response> here\n</tool_response>"
    run = readers.read_tagged(tagged("q", f"<think>\nt\n</think>\n{CALL}", quoting, "<think>u</think>\n<answer>\n42\n</answer>"), AT)
    assert [m["role"] for m in run.messages] == ["user", "assistant", "tool", "assistant"]
    assert run.messages[1]["reasoning_content"] == "t" and run.messages[1]["content"] == ""
    assert run.messages[2] == {"role": "tool", "content": "see </tool_response> here", "tool_call_id": "call_0", "name": "search"}
    assert run.messages[3]["content"] == "<answer>\n42\n</answer>"
    assert run.records == (Record((), {"name": "search", "arguments": {"q": "x"}}, "see </tool_response> here"),)
    assert run.domain == "search" and run.tools == ()


def test_tagged_text_with_two_calls():
    both = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    run = readers.read_tagged(tagged("q", CALL + "\n" + CALL, both, "x"), AT)
    assert [r.observation for r in run.records] == ["1", "2"]


@pytest.mark.parametrize("texts", [("q", "<think>open"), ("q", CALL, "<tool_response>x</tool_response> and more", "x")])
def test_tags_that_do_not_parse(texts):
    with pytest.raises(Unusable, match="tags do not parse"):
        readers.read_tagged(tagged(*texts), AT)
