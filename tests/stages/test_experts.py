import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from a1jax import config
from a1jax.config import ConfigError
from a1jax.data import chat
from a1jax.domains import DOMAINS, QUICKSTART, Domain, LongContext, Task, solve
from a1jax.domains.engineering import Engineering
from a1jax.domains.instruction_following import InstructionFollowing, kind
from a1jax.domains.science import Science
from a1jax.domains.science_words import WordProblems
from a1jax.stages import experts
from a1jax.stages.evaluate import Evaluation
from a1jax.stages.experts import Runs

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("search", "tool_calling")


@pytest.fixture(scope="module")
def six():
    return config.load(str(ROOT / "experiments/six_domains.py"))


def contents(tasks):
    return [t.content for t in tasks]


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_what_is_judged_is_distinct_whatever_the_other_use_asks_for(six, domain):
    """Of every family and length of six_domains; where seeds repeat a task, or give one of the other use, the next seeds are taken."""
    family, sources = six.families[domain], six.evaluation.of[domain]
    number = 12 if domain == "engineering" else 25
    asked = {
        use: Evaluation({}, of={domain: tuple(Runs(dict.fromkeys(s.counts, number), s.family) for s in sources)}) for use in experts.JUDGED
    }
    held, admit = (contents(asked[use].tasks(domain, family, use)) for use in experts.JUDGED)
    assert len(set(held)) == len(held) == len(set(admit)) == len(admit) == number * sum(len(s.counts) for s in sources)
    assert not set(held) & set(admit)
    trained = {
        task.content
        for source in sources
        for use in ("sft", "teacher", "prompts", "reinforce")
        for task in experts.tasks(source.family or family, dict.fromkeys(source.counts, number), use, 0)
    }
    assert not trained & {*held, *admit}


def test_a_task_drawn_twice_is_judged_once(six):
    family = six.families["instruction_following"]
    start = experts.STARTS["heldout"]
    plain = contents(family.propose(start + i, 1, "heldout") for i in range(60))
    found = experts.tasks(family, {1: 60}, "heldout", 0)
    assert len(set(plain)) < 55 and len(set(contents(found))) == 60
    wanted = [c for c in dict.fromkeys(plain) if experts.use_of(family.propose(start + plain.index(c), 1, "heldout")) == "heldout"]
    assert contents(found)[: len(wanted)] == wanted  # in the order of seeds, the others follow
    again = Evaluation({}, of={"instruction_following": (Runs({1: 20}), Runs({1: 20}))}).tasks("instruction_following", family, "heldout")
    assert contents(again) == contents(found)[:40]  # two sources of one family do not repeat each other


def test_both_judged_uses_are_fair_samples(six):
    """The hash that shares contents out looks at no part of a task: each use has its share of every kind of constraint."""
    family = six.families["instruction_following"]
    different = {t.content: t for t in (family.propose(i, 2, "heldout") for i in range(1500))}.values()
    of = collections.Counter((kind(r), experts.use_of(t)) for t in different for r in t.rules)
    for name in family.kinds:
        admit, held = of[name, "admission"], of[name, "heldout"]
        assert abs(admit - (admit + held) / 3) < 3.5 * ((admit + held) * 2 / 9) ** 0.5 and held > admit > 5
    drawn = [experts.use_of(QUICKSTART["search"].propose(i, 3, "heldout")) for i in range(600)]
    assert abs(drawn.count("admission") - 200) < 50


def test_training_keeps_its_seeds():
    for use in ("sft", "teacher", "prompts", "reinforce", "tokenizer"):
        found = [t.task_id for t in experts.tasks(QUICKSTART["search"], {1: 2, 3: 2}, use, 3, skip=7)]
        at = experts.STARTS[use] + 3 * experts.LANE + 7
        assert found == [f"search-train-{steps}-{at + i}" for steps in (1, 3) for i in (0, 1)]


def test_a_small_file_gives_each_of_its_problems_once_and_a_warning(tmp_path, caplog):
    rows = [{"question": f"{a} and {b}?", "answer": f"<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"} for a in range(20) for b in range(5)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    family = WordProblems(path=str(tmp_path / "words.jsonl"))
    every = {family.propose(i, 1, "heldout").content for i in range(2000)}
    found = {use: experts.tasks(family, {1: 60}, use, 0) for use in experts.JUDGED}
    assert 10 < len(every) < 60 and {c for use in found for c in contents(found[use])} == every
    assert sum(map(len, found.values())) == len(every) and min(map(len, found.values())) > 0
    assert [r.getMessage() for r in caplog.records] == [
        f"WordProblems: {len(found[use])} distinct {use} tasks of 1 steps were found, not 60; so many are judged" for use in experts.JUDGED
    ]


@dataclasses.dataclass(frozen=True)
class Same(Domain):
    """A family of one task, with a field that cannot be hashed."""

    words: list = dataclasses.field(default_factory=list)

    def propose(self, seed, steps, split="train"):
        assert seed < experts.STARTS["heldout"] + 4 * experts.PATIENCE, "the search has no bound"
        return Task("same", f"same-{seed}", steps, "Say it.", "it", (), (("a", "b"),))


def test_a_family_of_one_task_is_judged_by_one(caplog):
    found = experts.judged(Same(), (Runs({1: 5}), Runs({1: 5})), "heldout", 0)
    assert [t.task_id for t in found] == [f"same-{experts.STARTS['heldout']}"] and len(caplog.records) == 2


def test_the_runs_of_held_out_tasks_are_those_of_the_evaluation():
    runs = (Runs({1: 4, 2: 3}), Runs({2: 5}))
    found = experts.expert_runs(QUICKSTART["tool_calling"], runs, "heldout", 0)
    tasks = experts.judged(QUICKSTART["tool_calling"], runs, "heldout", 0)
    assert [run.task_id for _, run in found] == [t.task_id for t in tasks] and len(tasks) == len(set(contents(tasks))) == 12


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (QUICKSTART["search"], {"chain": (("@A", "@B"),)}),
        (QUICKSTART["tool_calling"], {"store": (("$amber", "#1"),)}),
        (DOMAINS["tool_calling"], {"chain": (("@A", "@B"),)}),
        (DOMAINS["general"], {"orders": ()}),
        (DOMAINS["general"], {"wishes": ()}),
        (Science(), {"first": 5}),
        (Engineering(), {"stages": ()}),
        (InstructionFollowing(), {"subject": "moon"}),
        (LongContext(tokens=150, distractors=0), {"question": "How many?"}),
    ],
)
def test_content_is_what_a_task_asks_and_hides_and_nothing_of_its_seed(family, changes):
    task = family.propose(0, 2)
    assert dataclasses.replace(task, task_id="other").content == task.content != dataclasses.replace(task, **changes).content


def test_constraints_in_another_order_are_the_same_task():
    task = InstructionFollowing().propose(0, 3)
    other = dataclasses.replace(task, rules=task.rules[::-1], question="other words")
    assert other.content == task.content != dataclasses.replace(task, rules=task.rules[1:]).content


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
