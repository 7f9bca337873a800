"""A run in another tokenizer: the same conversation, the same turns, the same bytes."""

import dataclasses

import numpy as np
import pytest

from a1jax.align import byte_table
from a1jax.data import chat
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import QUICKSTART, solve
from a1jax.stages import cross_tokenizer, experts, views
from a1jax.types import FINISHED, Rollout

FAMILIES = tuple(QUICKSTART.values())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tokenizer that writes numbers digit by digit."""
    path = tmp_path_factory.mktemp("digits") / "tokenizer.model"
    return train_sentencepiece(experts.tokenizer_texts(FAMILIES, 0), path, vocab_size=608, symbols=cross_tokenizer.digits(FAMILIES))


def expert_run(tokenizer, domain="tool_calling", seed=3, steps=3):
    """An expert's run as a rollout would leave it; nothing after its last turn."""
    run = solve(QUICKSTART[domain].propose(seed, steps))
    tokens, mask = chat.tokenize(tokenizer, list(run.messages))
    end = int(np.flatnonzero(mask)[-1]) + 1
    return Rollout(run.task_id, domain, tokens[:end], mask[:end], -mask[:end], FINISHED, 1.0, steps, run)


@pytest.mark.parametrize("domain", list(QUICKSTART))
def test_a_view_is_what_the_other_tokenizer_makes_of_the_run(tokenizer, digits, domain):
    run = expert_run(tokenizer, domain)
    (view,) = views.view_all([run], tokenizer, digits, False)
    expected = expert_run(digits, domain)
    np.testing.assert_array_equal(view.tokens, expected.tokens)  # canonical turns: nothing differs from the run written by that tokenizer
    assert list(view.theirs) == views.turns(expected.sampled) and list(view.ours) == views.turns(run.sampled)
    assert len(view.tokens) > len(run.tokens)
    tables = [byte_table.of(t).bytes for t in (tokenizer, digits)]
    for (a, b), (c, d) in zip(view.ours, view.theirs, strict=True):
        ours, theirs = (byte_table.join(t, ids) for t, ids in zip(tables, (run.tokens[a:b], view.tokens[c:d]), strict=True))
        assert ours == theirs and ours
        assert run.tokens[b - 1] == tokenizer.eos_id and view.tokens[d - 1] == digits.eos_id


def test_what_was_sampled_is_kept_and_a_cut_turn_has_no_end(tokenizer, digits):
    """Another segmentation of the same text, a byte that is no character, and a last turn that a budget cut."""
    run = expert_run(tokenizer)
    start, stop = views.turns(run.sampled)[-1]
    space, odd = tokenizer.encode("~")[0], tokenizer.encode("é")[-1]
    ids = [*run.tokens[: start + 1], odd, space, *run.tokens[start + 1 : stop - 1]]
    sampled = np.zeros(len(ids), np.float32)
    sampled[: len(run.sampled)] = run.sampled[: len(ids)]
    sampled[start:] = 1
    kept = dataclasses.replace(run.trajectory, messages=run.trajectory.messages[:-1])  # a turn that did not end is no message
    cut = Rollout(run.task_id, run.domain, np.asarray(ids, np.int32), sampled, -sampled, "TRUNCATED", 0.0, 3, kept)
    (view,) = views.view_all([cut], tokenizer, digits, False)
    assert view.ours[-1] == (start, len(ids)) and view.theirs[-1][1] == len(view.tokens)
    assert digits.decode(view.tokens[slice(*view.theirs[-1])].tolist()) == tokenizer.decode(ids[start:])
    assert view.tokens[-1] != digits.eos_id
    earlier = views.view_all([run], tokenizer, digits, False)[0]
    np.testing.assert_array_equal(view.tokens[: view.theirs[-1][0]], earlier.tokens[: earlier.theirs[-1][0]])


def test_a_models_turn_in_the_prompt_is_not_a_turn_of_the_run(tokenizer, digits):
    """An example that the prompt shows is rendered; only what was sampled is aligned."""
    run = expert_run(tokenizer, steps=2)
    shown = ({"role": "user", "content": "3?"}, {"role": "assistant", "content": "12", "reasoning_content": ""})
    ours, theirs = (chat.tokenize(t, list(shown))[0] for t in (tokenizer, digits))
    longer = dataclasses.replace(
        run,
        tokens=np.concatenate([ours, run.tokens]),
        sampled=np.concatenate([np.zeros(len(ours), np.float32), run.sampled]),
        trajectory=dataclasses.replace(run.trajectory, messages=(*shown, *run.trajectory.messages)),
    )
    plain, view = (views.view_all([r], tokenizer, digits, False)[0] for r in (run, longer))
    np.testing.assert_array_equal(view.tokens, np.concatenate([theirs, plain.tokens]))
    assert view.theirs == tuple((a + len(theirs), b + len(theirs)) for a, b in plain.theirs)


TEMPLATE = (
    "{% for m in messages %}[{{ loop.index }} {{ m.role }}]"
    "{% if m.role == 'assistant' %}{% if loop.last %}{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% else %}{{ m.content }}|\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[{{ messages|length + 1 }} assistant]{% endif %}"
)


def test_a_teacher_with_a_template_reads_the_frame_of_that_template_and_the_students_own_words(tokenizer, digits):
    """The template numbers messages and drops the thoughts of earlier turns; what the student wrote stays."""
    run, teacher = expert_run(tokenizer, steps=2), digits.with_template(TEMPLATE)
    (view,) = views.view_all([run], tokenizer, teacher, False)
    spelled, start = "", 0
    for a, b in view.theirs:
        assert view.tokens[b - 1] == digits.eos_id
        spelled += digits.decode(view.tokens[start:a].tolist()) + "{" + digits.decode(view.tokens[a : b - 1].tolist()) + "}"
        start = b
    assert start == len(view.tokens)
    expected, turn = "", 0
    for number, message in enumerate(run.trajectory.messages, 1):
        expected += f"[{number} {message['role']}]"
        if message["role"] == "assistant":
            a, b = views.turns(run.sampled)[turn]
            expected, turn = expected + "{" + tokenizer.decode(run.tokens[a : b - 1].tolist()) + "}\n", turn + 1
        else:
            expected += message["content"] + "|\n"
    assert spelled == expected.removesuffix("\n")


REFUSES = (
    "{% for m in messages %}{% if '@' in m.content %}{{ raise_exception('no @ here') }}{% endif %}"
    "[{{ m.role }}]{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>\n{% else %}{{ m.content }}|\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_conversation_that_the_teachers_template_refuses_has_no_turns_from_there_on(tokenizer, digits):
    run, teacher = expert_run(tokenizer, steps=3), digits.with_template(REFUSES)
    messages = [{**m, "content": m["content"].replace("@", "")} for m in run.trajectory.messages]
    fine = dataclasses.replace(run, trajectory=dataclasses.replace(run.trajectory, messages=tuple(messages)))
    whole = views.view_all([fine], tokenizer, teacher, False)[0]
    assert not whole.refused and all(b > a for a, b in whole.theirs) and len(whole.theirs) >= 3
    results = [n for n, m in enumerate(messages) if m["role"] == "tool"]
    for kept, place in ((0, 0), (1, results[0]), (2, results[1])):
        odd = [{**m, "content": m["content"] + "@" * (n == place)} for n, m in enumerate(messages)]
        odd = dataclasses.replace(run, trajectory=dataclasses.replace(run.trajectory, messages=tuple(odd)))
        (view,) = views.view_all([odd], tokenizer, teacher, False)
        assert "no @ here" in view.refused and view.ours == whole.ours and view.theirs[:kept] == whole.theirs[:kept]
        assert view.theirs[kept:] == ((len(view.tokens),) * 2,) * (len(whole.ours) - kept)
        np.testing.assert_array_equal(view.tokens, whole.tokens[: len(view.tokens)])


def test_turns_of_a_mask():
    assert views.turns(np.array([0, 1, 1, 0, 0, 1], np.float32)) == [(1, 3), (5, 6)]
    assert views.turns(np.zeros(3, np.float32)) == [] and views.turns(np.ones(2, np.float32)) == [(0, 2)]
