import numpy as np
import pytest

from a1jax.config import ConfigError
from a1jax.data import chat
from a1jax.domains import QUICKSTART, solve
from a1jax.stages import experts

NAMES = ("search", "tool_calling")


@pytest.mark.parametrize("name", NAMES)
def test_uses_never_meet(name):
    ids = {use: {t.task_id for t in experts.tasks(QUICKSTART[name], {1: 30, 3: 30}, use, 0)} for use in experts.STARTS}
    assert all(len(found) == 60 for found in ids.values())
    uses = sorted(ids)
    assert not any(ids[a] & ids[b] for i, a in enumerate(uses) for b in uses[i + 1 :])
    train = {p for use in ("sft", "teacher", "prompts") for t in experts.tasks(QUICKSTART[name], {1: 30, 3: 30}, use, 0) for p in t.chain}
    judged = {p for use in ("heldout", "admission") for t in experts.tasks(QUICKSTART[name], {1: 30, 3: 30}, use, 0) for p in t.chain}
    assert not train & judged


def test_prompts_are_unique_over_steps_and_equally_long_in_turn():
    steps = [experts.prompts(QUICKSTART["search"], (1, 2, 4), 9, step, 0) for step in range(5)]
    ids = [t.task_id for batch in steps for t in batch]
    assert len(set(ids)) == len(ids) == 45
    assert all(sorted(t.steps for t in batch) == [1] * 3 + [2] * 3 + [4] * 3 for batch in steps)


def test_lengths_come_in_turn_also_where_a_step_has_room_for_some():
    sources = (experts.Prompts((1, 2, 3, 4)),) * 2 + (experts.Prompts((5,)),)
    steps = [[t.steps for t in experts.mixed_prompts(QUICKSTART["search"], sources, 9, step, 0)] for step in range(4)]
    assert all(sorted(lengths)[-3:] == [5] * 3 for lengths in steps)
    assert [sum(lengths.count(n) for lengths in steps) for n in (1, 2, 3, 4)] == [6] * 4
    assert [sorted(steps[0][at : at + 3]) for at in (0, 3)] == [[1, 2, 3], [1, 2, 4]] and sorted(steps[1][:3]) == [1, 2, 4]


def test_a_stage_of_reinforcement_draws_no_task_of_the_next_one():
    def drawn(place, lane):
        return experts.drawn(QUICKSTART["search"], (experts.Prompts((1, 2)),), [place], 0, lane)[0]

    last, first = (int(task.task_id.rpartition("-")[2]) for task in (drawn(experts.LANE - 1, 3), drawn(0, 4)))
    assert last + 1 == first
    for place in (experts.LANE, experts.LANE + 7, -1):
        with pytest.raises(ConfigError, match=f"search: a stage of reinforcement has tasks 0 to 99999 and wants {place}"):
            drawn(place, 3)


@pytest.mark.parametrize("name", NAMES)
def test_examples_supervise_what_the_expert_wrote(name, tokenizer):
    (steps, example), *_ = experts.examples(QUICKSTART[name], 1, experts.Runs({2: 1}), "sft", 0, tokenizer, False)
    run = solve(experts.tasks(QUICKSTART[name], {2: 1}, "sft", 0)[0])
    written = tokenizer.decode(example.tokens[example.mask > 0].tolist())
    turns = [chat.turn_text(m) for m in run.messages if m["role"] == "assistant"]
    assert steps == 2 and example.domain == 1 and written == "".join(t + "<|im_end|>" for t in turns)


def test_the_small_tokenizer_spells_runs_without_bytes(tokenizer):
    for name in NAMES:
        for task in experts.tasks(QUICKSTART[name], {8: 5}, "heldout", 0):
            tokens = chat.tokenize(tokenizer, list(solve(task).messages))[0]
            text = [tokenizer.spelling[t] for t in tokens]
            assert len(tokens) < 45 * 8 and not any(s.startswith("<0x") for s in text)
            assert np.mean([len(s) for s in text]) > 4


def test_bad_counts_are_refused():
    with pytest.raises(ConfigError, match="not negative"):
        experts.Runs({1: -1})
