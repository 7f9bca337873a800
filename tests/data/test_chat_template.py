import json

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from a1jax.data import chat, chat_template
from a1jax.data.chat_builtin import Piece
from a1jax.data.errors import DataError

TURNS = [
    {"role": "user", "content": "u0"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a3"},
]
LOOK_ALIKE = "<|im_start|>assistant\nI would love that<|im_end|>\n<tool_call>\n{}\n</tool_call>"


def plain(source):
    """Plain Jinja with the settings chat templates are written for, built here independently."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return env.from_string(source)


def render(source, messages=TURNS, tools=(), turn_end="<end>", add=False) -> list[Piece]:
    return chat_template.render(source, messages, tools, {"eos_token": turn_end}, turn_end, add)


def supervised(pieces):
    return [piece.text for piece in pieces if piece.supervised]


def test_qwen3_renders_all_real_runs_like_plain_jinja(real, qwen3):
    reference = plain(qwen3.chat_template)
    seen = set()
    for n, run in enumerate(real[0]):
        multi_turn = sum(m["role"] == "assistant" for m in run.messages) > 2
        if n % 4 and not (multi_turn and run.tools):
            continue
        add = bool(n % 2)
        pieces = chat.render(run.messages, run.tools, qwen3, add)
        expected = reference.render(messages=list(run.messages), tools=list(run.tools) or None, add_generation_prompt=add)
        assert "".join(piece.text for piece in pieces) == expected
        turns = [i for i, m in enumerate(run.messages) if m["role"] == "assistant"]
        assert [piece.message for piece in pieces if piece.supervised] == turns
        for piece in pieces:
            if piece.supervised:
                message = run.messages[piece.message]
                assert piece.text.endswith("<|im_end|>") and message["content"].strip() in piece.text
                assert piece.text.count("</tool_call>") >= len(message.get("tool_calls", ())) and not piece.text.startswith("<|im_start|>")
        seen.add((run.metadata["source"], multi_turn))
    assert {source for source, _ in seen} == {"nemo-gym", "swe-agent", "tau-bench", "webdancer"}
    assert {(s, True) for s in ("nemo-gym", "swe-agent", "tau-bench")} <= seen


def test_look_alikes_are_not_supervised(qwen3):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": LOOK_ALIKE}}}
    messages = [
        {"role": "system", "content": LOOK_ALIKE},
        {"role": "user", "content": LOOK_ALIKE},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": LOOK_ALIKE, "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": f"it said {LOOK_ALIKE}"},
    ]
    for style in (qwen3, qwen3.with_template(None)):
        texts = supervised(chat.render(messages, (), style))
        assert len(texts) == 2 and json.dumps({"x": LOOK_ALIKE}) in texts[0] and LOOK_ALIKE in texts[1]
        assert texts[1].removeprefix("<think>\n\n</think>\n\n") == f"it said {LOOK_ALIKE}<|im_end|>"


def test_markers_in_the_text_are_text():
    messages = [{"role": "user", "content": "\U000f0000(1\U000f0000"}, {"role": "assistant", "content": "\U000f0000)\U000f0000"}]
    pieces = render("{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}", messages)
    assert "".join(p.text for p in pieces) == "[user]\U000f0000(1\U000f0000<end>\n[assistant]\U000f0000)\U000f0000<end>\n"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        # another name, a sliced copy, the first message apart
        "[user]{{ messages[0].content }}<end>\n{% set rest = messages[1:] %}{% for turn in rest %}"
        "[{{ turn['role'] }}]{{ turn['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        # loop controls leave an iteration early; a silent loop runs before; an inner loop looks at messages again
        "{% for x in messages[::-1] %}{% if x.role == 'user' %}{% break %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% for o in messages %}{% if o is sameas m %}[{{ m.role }}]{% else %}{% continue %}{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n{% continue %}{% endif %}{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        # through a macro, and the loop variable is bound again
        "{% macro show(m) %}[{{ m.role }}]{{ m.content }}<end>\n{% endmacro %}"
        "{% for m in messages %}{{ show(m) }}{% set m = none %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_the_loop_over_messages_is_found_however_it_is_written(source):
    pieces = render(source)
    assert "".join(p.text for p in pieces) == "[user]u0<end>\n[assistant]a1<end>\n[user]u2<end>\n[assistant]a3<end>\n"
    assert supervised(pieces) == ["a1<end>", "a3<end>"]
    assert [p.message for p in pieces if p.supervised] == [1, 3]
    assert render(source, add=True)[-1] == Piece("[assistant]", False, -1)


def test_a_prompt_that_opens_the_thinking():
    source = (
        "{% for m in messages %}[{{ m.role }}]\n{% if m.thought %}<think>\n{{ m.thought }}</think>{% endif %}{{ m.content }}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]\n<think>\n{% endif %}"
    )
    with_thought = [TURNS[0], {"role": "assistant", "content": "a1", "thought": "hm"}, TURNS[2], {"role": "assistant", "content": "<thus>"}]
    assert supervised(render(source, with_thought)) == ["hm</think>a1<end>", "<thus><end>"]


def test_a_template_without_prompt_or_turn_end():
    source = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %} {{ m.content }}{% endif %}{% endfor %}"
    assert supervised(render(source)) == [" a1", " a3"]


def test_generation_blocks_are_believed():
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}note:{% generation %}{{ m.content }}{% endgeneration %}<end>"
        "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    pieces = render(source)
    assert "".join(p.text for p in pieces) == "[user]u0\n[assistant]note:a1<end>\n[user]u2\n[assistant]note:a3<end>\n"
    assert [(p.text, p.message) for p in pieces if p.supervised] == [("a1", 1), ("a3", 3)]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}", "chat template, line"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content }}{{ messages[1].content }}", "outside a loop"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "fails on these messages"),
        ("{% for m in messages %}{{ m.content }}{{ m.__class__.__mro__ }}{% endfor %}", "refuses"),
        ("{% if add_generation_prompt %}x{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}", "add_generation_prompt"),
    ],
)
def test_bad_templates_in_one_line(source, reason):
    with pytest.raises(DataError, match=reason) as error:
        render(source)
    assert "\n" not in str(error.value)


def test_environment_follows_the_convention():
    messages = [{"role": "user", "content": "é<b>"}, {"role": "assistant", "content": None}]
    source = (
        "{{ tools | tojson }}{{ messages[0] | tojson(indent=1) }}{{ strftime_now('%%') }}\n"
        "    {% for m in messages %}\n{{ m.content }}<end>\n    {% endfor %}\n"
    )
    text = "".join(p.text for p in render(source, messages, [{"a": "é<"}]))
    assert text == '[{"a": "é<"}]{\n "role": "user",\n "content": "é<b>"\n}%\né<b><end>\n<end>\n'


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    render("{% for m in messages %}{{ m.content }}<end>{% endfor %}", messages)
    assert messages[1]["content"] is None
