import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import chat
from a1jax.data.errors import DataError

TEXT = st.one_of(st.sampled_from(["", "hi", "\n", " x ", "\u2581", "<|im_start|>assistant\nx", "é"]), st.text(max_size=20))
CALL = st.fixed_dictionaries({"name": st.sampled_from(["f", "read_page"]), "arguments": st.dictionaries(TEXT, TEXT, max_size=2)})


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(TEXT)})
        calls = draw(st.lists(CALL, max_size=2))
        message = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT)
        if calls:
            message["tool_calls"] = [{"id": f"c{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
        messages += [message, *({"role": "tool", "content": draw(TEXT), "tool_call_id": f"c{n}", "name": "f"} for n in range(len(calls)))]
    return messages


def rolled_out(tokenizer, messages, tools):
    """The ids of a rollout: prompt, then per turn what the model samples and what continues it."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids = chat.tokenize(tokenizer, messages[: turns[0]], tools, add_generation_prompt=True)[0].tolist()
    mask = [0.0] * len(ids)
    for n, turn in enumerate(turns):
        sampled = [*tokenizer.encode(chat.turn_text(messages[turn])), tokenizer.eos_id]
        until = turns[n + 1] if n + 1 < len(turns) else len(messages)
        more = chat.continuation(tokenizer, messages[:until], turn + 1, tools)
        ids += sampled + more
        mask += [1.0] * len(sampled) + [0.0] * len(more)
    return ids, mask


def check(tokenizer, messages, tools):
    tokens, mask = chat.tokenize(tokenizer, messages, tools, add_generation_prompt=True)
    expected = rolled_out(tokenizer, messages, tools)
    assert tokens.tolist() == expected[0] and mask.tolist() == expected[1]
    assert tokens.dtype == np.int32 and mask.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(conversations(), st.lists(st.just({"type": "function", "function": {"name": "f"}}), max_size=1))
def test_prompt_turns_and_continuations_make_the_whole(small, messages, tools):
    check(small, messages, tools)


def test_the_same_on_real_runs_with_real_vocabularies(real, qwen3, mistral):
    runs = [run for run in real[0] if sum(m["role"] == "assistant" for m in run.messages) > 3][::25]
    assert len({run.metadata["source"] for run in runs}) >= 3
    for run in runs:
        for tokenizer in (qwen3.with_template(None), mistral):
            check(tokenizer, run.messages, run.tools)


def test_continuation_of_qwen3s_own_template(qwen3):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "r"}]
    text = "\n<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert chat.continuation(qwen3, messages, 2) == qwen3.encode(text)
    with pytest.raises(DataError, match="not a turn of the assistant"):
        chat.continuation(qwen3, messages, 1)
    with pytest.raises(DataError, match="not a turn of the assistant"):
        chat.continuation(qwen3.with_template(None), messages, 3)


def test_mask_by_hand(small):
    messages = [{"role": "user", "content": "page"}, {"role": "assistant", "content": "the tool"}]
    tokens, mask = chat.tokenize(small, messages)
    before = small.encode("<|im_start|>user\npage<|im_end|>\n<|im_start|>assistant\n")
    wrote = [*small.encode("the tool"), small.eos_id]
    assert tokens.tolist() == before + wrote + small.encode("\n")
    assert mask.tolist() == [0.0] * len(before) + [1.0] * len(wrote) + [0.0]


def test_a_vocabulary_without_turn_tags_spells_them_and_ends_turns_with_its_own_end(mistral):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    tokens, mask = chat.tokenize(mistral, messages)
    assert mistral.decode(tokens) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na</s>\n"
    assert mistral.decode(tokens[mask > 0]) == "a</s>" and tokens[mask > 0][-1] == mistral.eos_id == 2


def test_supervised_tokens_of_qwen3_spell_what_the_model_wrote(real_examples, qwen3):
    for run, example in real_examples[::30]:
        pieces = chat.render(run.messages, run.tools, qwen3)
        wrote = "".join(piece.text for piece in pieces if piece.supervised)
        if run.status != "TRUNCATED":
            assert qwen3.decode(example.tokens[example.mask > 0]) == unicodedata.normalize("NFC", wrote)
            turns = sum(m["role"] == "assistant" for m in run.messages)
            assert int((example.tokens[example.mask > 0] == qwen3.eos_id).sum()) == turns


@pytest.mark.parametrize("template", [True, False])
def test_a_cut_turn_teaches_no_end(qwen3, template):
    style = qwen3 if template else qwen3.with_template(None)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    lead = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "whole"}, {"role": "user", "content": "v"}]
    for last, end in (
        ({"role": "assistant", "content": "half a sent"}, "half a sent"),
        ({"role": "assistant", "content": "", "reasoning_content": "still think"}, "still think"),
        ({"role": "assistant", "content": "x", "tool_calls": [call]}, "</tool_call>"),
    ):
        tokens, mask = chat.tokenize(style, [*lead, last], cut=True)
        full, _ = chat.tokenize(style, [*lead, last])
        assert style.decode(tokens).endswith(end) and mask[-1] == 1 and len(tokens) < len(full)
        assert (tokens[mask > 0] == style.eos_id).sum() == 1  # the first turn's
    assert chat.tokenize(style, lead, cut=True)[0].tolist() == chat.tokenize(style, lead)[0].tolist()  # no turn of the model to cut


def test_tokenize_many_equals_one_by_one(small):
    runs = [([{"role": "user", "content": "a"}], ()), ([{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], ())]
    many = chat.tokenize_many(small, runs)
    for (messages, tools), (tokens, mask) in zip(runs, many, strict=True):
        one = chat.tokenize(small, messages, tools)
        assert tokens.tolist() == one[0].tolist() and mask.tolist() == one[1].tolist()
    assert chat.tokenize(small, [])[0].shape == (0,)


def test_pieces_are_joined_before_encoding(small):
    parts = [("pa", False), ("ge", False), ("x", True), ("", True), ("y", False)]
    pieces = [chat.Piece(text, supervised, n) for n, (text, supervised) in enumerate(parts)]
    assert chat.merged(pieces) == [("page", False), ("x", True), ("y", False)]
