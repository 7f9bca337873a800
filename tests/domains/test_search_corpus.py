"""Search over real pages: chains by hand, experts, the five rules, evidence, splits, broken files, wrong calls, speed."""

import dataclasses
import gzip
import json
import lzma
import pathlib
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import Call, solve
from a1jax.domains.acceptance import accept, play, turns_of
from a1jax.domains.base import Turn, consulted, in_split
from a1jax.domains.corpus import load
from a1jax.domains.search_corpus import CorpusSearch, CorpusSearchTask, question
from a1jax.stages.generate import generate
from a1jax.types import FAILED, FINISHED

GOOD = {"id": "a", "title": "A", "text": "some words here", "links": []}


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """60 pages, each of 30 words out of 300; numeric ids, hubs, dead ends, twins, unknown links, an empty page, some titles alike."""
    rng, pages = np.random.default_rng(0), []
    syllables = [a + b for a in "bcdfghklmn" for b in "aeiou"]
    vocabulary = [syllables[i % 50] + syllables[(7 * i) % 50] + syllables[(i // 50) % 50] for i in range(300)]
    for i in range(60):
        own = [vocabulary[int(j)] for j in rng.choice(300, 30, replace=False)]
        text = " ".join(w for k, w in enumerate(own) for _ in range(1 + k % 5))
        links = [str(int(j)) for j in rng.choice(60, 14, replace=False)] + ["nowhere", str(i)]
        pages.append({"id": str(i), "title": f"Topic {i - i % 2 if i < 30 else i}", "text": text, "links": links})
    for i in range(10):
        pages[40 + i]["text"] = pages[30 + i]["text"] + " 0 1 2" * 30  # never the first hit
        pages[6 * i]["links"] = pages[6 * i]["links"][:1]
    pages[7]["text"] = ""
    pages[9]["links"] = [str(i) for i in range(60)]
    return write(tmp_path_factory.mktemp("corpus") / "pages.jsonl", pages)


@pytest.fixture(scope="module")
def manual(shared_data):
    return str(shared_data / "corpora" / "python-docs" / "python3.11_pages.jsonl.gz")


@pytest.fixture(params=["small", "manual"])
def family(request):
    return CorpusSearch(corpus=request.getfixturevalue(request.param), most_links=32)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_at_every_length(family, steps, split):
    task = family.propose(11, steps, split)
    run = solve(task)
    assert (run.status, run.reward) == (FINISHED, 1.0)
    assert len(task.chain) == steps == task.steps and all(in_split(a, b, split) for a, b in task.chain)
    assert set(task.evidence) <= consulted(run)
    calls = [r for r in run.records if r.action]
    assert len(calls) == 2 * steps + 1 and not any(r.outcome for r in calls)
    assert task == family.propose(11, steps, split) and solve(family.propose(11, steps, split)) == run
    assert len(repr(task)) < 400 + 250 * (steps + 1)  # holds the path, not the pages


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_five_rules_hold(family, steps):
    for split in ("train", "heldout"):
        assert accept(family.propose(steps, steps, split)).reason == "accepted"


def test_walks_keep_their_rules_and_words_their_proof(family):
    corpus = load(family.corpus)
    for seed in range(20):
        task = family.propose(seed, 5)
        walk = [a for a, _ in task.chain] + [task.answer]
        assert tuple(walk) == task.evidence and len(set(walk)) == 6
        assert not any(corpus.alike(a, b) for i, a in enumerate(walk) for b in walk[:i])
        assert all(2 <= len(corpus.pages[page].links) <= 32 for page in walk[:-1])
        assert corpus.search(task.queries[0], 5)[0].id == walk[0]
        for (page, link), query in zip(task.chain, task.queries[1:], strict=True):
            assert [hit.id for hit in corpus.search(query, 5) if hit.id in corpus.pages[page].links] == [link]
        for page, query in zip(walk, task.queries, strict=True):
            text = f" {' '.join(corpus.pages[page].title.lower().split())} "
            assert all(f" {w} " not in text and w in corpus.pages[page].text.lower() for w in query.split())
        words = task.question.split()
        assert all(page not in words for page in walk)


def test_at_its_turn_limit_a_run_is_asked_for_the_id(small):
    assert "the id of the page" in CorpusSearch(corpus=small).propose(0, 1).final_request


def test_question_is_written_backwards():
    asked = question(("one two three", "four five", "six seven"))
    assert asked.startswith(
        "Which page has the words six seven that is a link of a page that has the words four five "
        "that is a link of the page found by: one two three?"
    )


def test_heldout_shares_no_pair_with_training(small):
    family = CorpusSearch(corpus=small)
    train, heldout = ({p for s in range(60) for p in family.propose(s, 1 + s % 9, split).chain} for split in ("train", "heldout"))
    assert len(train) > 100 and len(heldout) > 50 and not train & heldout


def test_runs_are_refused_for_their_reason(small):
    task = CorpusSearch(corpus=small).propose(3, 4)
    *turns, answer = turns_of(task, solve(task))

    def reason(kept):
        run = play(task, kept)
        assert run.status == FAILED
        return run.records[-1].outcome

    assert reason([*turns, Turn("", answer="none")]) == "answer: wrong"
    assert reason(turns) == "answer: none given"
    assert reason([*turns[:1], *turns[2:], answer]) == f"evidence: {task.evidence[0]} was never read"
    refused = dataclasses.replace(turns[1], call=Call("read_page", {"page": task.evidence[0], "piece": 99}))
    assert reason([turns[0], refused, *turns[2:], answer]) == f"evidence: {task.evidence[0]} was never read"
    last = [t for t in turns if t.call.name == "read_page"]
    assert reason([*last, answer]) == f"evidence: {task.answer} was never found"


def test_pages_are_read_in_pieces_and_by_programs(tmp_path):
    text = "abc def " * 10
    path = write(tmp_path / "p.jsonl", [GOOD, {"id": "b", "title": " B \n", "text": text, "links": ["a", "gone", "b", "a"]}])
    task = CorpusSearchTask("search", "t", 1, "q", "a", ("b", "a"), (("b", "a"),), corpus=path, queries=("abc", "some"), piece=50)
    assert load(path).dropped == 1
    state, seen = task.step("", Call("read_page", {"page": "b", "piece": 1}))
    assert (state, seen.refs, seen.text) == ("b", ("b",), f"B | piece 1 of 2\nlinks: a\n{text[:50]}")
    assert task.step(state, Call("read_page", {"page": "b", "piece": 2}))[1].text == f"B | piece 2 of 2\n{text[50:]}"
    assert task.step(state, Call("read_page", {"page": "b", "piece": 3}))[1].text == "error: b has pieces 1 to 2"
    assert task.step(state, Call("search", {"query": "DEF, nothing"}))[1].text.startswith("b | B | abc def abc")
    assert task.step(state, Call("search", {"query": "?!"}))[1].error
    count = "print(open('page.txt').read().count('def'))"
    assert task.blocking and task.step(state, Call("code", {"program": count}))[1].text == "10"
    assert task.step("", Call("code", {"program": count}))[1].text == "0"
    assert task.step(state, Call("code", {"program": "1/0"}))[1].text.startswith("error: ZeroDivisionError")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([GOOD, {**GOOD, "id": "b", "title": 3}], "line 2: 'title' is no text"),
        ([GOOD, "", {"id": "b", "title": "B", "text": ""}], "line 3: no 'links'"),
        ([GOOD, "{broken"], "line 2: not JSON"),
        ([GOOD, "[" * 100_000], "line 2: not JSON"),
        (["[1]"], "line 1: no JSON object"),
        ([GOOD, GOOD], "line 2: the id 'a' was given"),
        ([{**GOOD, "id": "a|b"}], r"line 1: the id 'a\|b'"),
        ([{**GOOD, "links": [3]}], "line 1: 'links' holds"),
        ([], "no page with any text"),
        ([GOOD], "no chain of 1 links"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, records, message):
    path = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(ConfigError, match=message) as found:
        CorpusSearch(corpus=path).propose(0, 1)
    assert path in str(found.value) and "\n" not in str(found.value)


def test_no_file_no_gzip_no_end_no_text(tmp_path):
    for name, content in (
        ("a.jsonl.gz", b"plain"),
        ("b.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]),
        ("c.xz", b"plain"),
        ("d.jsonl", b"\xff\xfe"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}, after line 0: cannot be read"):
            load(str(tmp_path / name))
    for path in (str(tmp_path / "none.jsonl"), "a\0b", ""):
        with pytest.raises(ConfigError, match="corpus"):
            CorpusSearch(corpus=path).propose(0, 1)


def test_packed_files_are_the_same_and_loading_is_kept(small, tmp_path):
    content = pathlib.Path(small).read_bytes()
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "p.jsonl.xz").write_bytes(lzma.compress(content))
    pages = [load(str(path)).pages for path in (small, tmp_path / "p.jsonl.gz", tmp_path / "p.jsonl.xz")]
    assert pages[0] == pages[1] == pages[2] and load(small) is load(small)


def test_knobs_out_of_range_are_refused(small):
    with pytest.raises(ConfigError, match="at least 1 step"):
        CorpusSearch(corpus=small).propose(0, 0)
    with pytest.raises(ConfigError, match="no chain of 70 links"):
        CorpusSearch(corpus=small).propose(0, 70)
    for knob in ({"hits": 0}, {"piece": 0}, {"least_links": 0}, {"most_links": 1}, {"most_links": 999}):
        with pytest.raises(ConfigError, match=f"search.{next(iter(knob))}"):
            CorpusSearch(**knob)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v, max_size=2), max_leaves=3)
calls = st.one_of(
    st.builds(lambda q: Call("search", {"query": q}), st.text()),
    st.builds(lambda p, n: Call("read_page", {"page": p, "piece": n}), st.sampled_from(["3", "7"]) | st.text(), st.integers()),
    st.builds(Call, st.sampled_from(["search", "read_page", "code"]) | st.text(), st.dictionaries(st.text() | st.just("query"), values)),
)


@given(call=calls)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tools_answer_whatever_they_are_asked(small, call):
    task = CorpusSearch(corpus=small).propose(1, 2)
    state, seen = task.step("3", call)
    assert isinstance(seen.text, str) and (not seen.error or state == "3")


@given(program=st.text() | st.text(alphabet=st.characters(codec=None)))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_programs_never_raise(small, program):
    task = CorpusSearch(corpus=small).propose(1, 2)
    assert isinstance(task.step("3", Call("code", {"program": program}))[1].text, str)


def test_two_thousand_steps_a_second(family):
    tasks = [family.propose(seed, 6) for seed in range(20)]
    made = [(task, [Call(r.action["name"], r.action["arguments"]) for r in solve(task).records if r.action]) for task in tasks]
    load(family.corpus).search.cache_clear()
    start, count = time.process_time(), 0
    for _ in range(4):  # a group of four runs of every task, as in training
        for task, acted in made:
            state = task.reset()
            for call in acted:
                state, _ = task.step(state, call)
                count += 1
    assert count / (time.process_time() - start) > 2000


def test_generate_reaches_it(small, tmp_path):
    out = tmp_path / "runs.jsonl"
    text = generate("search_corpus", 4, 1000, out, assignments=[f"corpus={small}", "piece=400"])
    assert "4 runs, 4 finished" in text and len(out.read_text(encoding="utf-8").splitlines()) == 4
    with pytest.raises(ConfigError, match="search.corpus is not set"):
        generate("search_corpus", 4, 1000, out)
