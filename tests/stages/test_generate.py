"""Generated files: the asked mean length, only accepted tasks, careless runs among them, one line for what cannot be."""

import collections
import dataclasses
import itertools
import json
import os
import statistics

import pytest

from a1jax import main
from a1jax.config import ConfigError
from a1jax.data import trajectories
from a1jax.domains import DOMAINS, solve
from a1jax.domains.acceptance import turns_of
from a1jax.domains.base import in_split
from a1jax.domains.science_words import WordProblems, parse
from a1jax.stages import generate
from a1jax.stages.horizon import Counter, Plan
from a1jax.types import FAILED, FINISHED


def read(path):
    return trajectories.read_all(path, strict=True)[0]


def spent():
    """Seconds of CPU of this process and of the programs it has run."""
    return sum(os.times()[:4])


NAMES = sorted({*DOMAINS, "long_context", "store"} - {"engineering"})
CASES = [*((horizon, name) for horizon in (200, 700, 3000) for name in NAMES), (700, "engineering")]  # code is run: one length shows it
CASES.append(pytest.param(200, "engineering", marks=pytest.mark.slow))
FLOORS = {"science": "Science", "engineering": "Engineering"}  # whose shortest runs have 225 tokens or so


@pytest.mark.parametrize(("horizon", "name"), CASES)
def test_the_mean_hits_the_horizon(tmp_path, name, horizon):
    text = generate.generate(name, 8, horizon, tmp_path / "runs.jsonl.gz")
    runs = read(tmp_path / "runs.jsonl.gz")
    assert len(runs) == 8 and all(run.status == FINISHED for run in runs)
    mean = statistics.mean(map(Counter(), runs))
    ends = horizon == 200 and name in FLOORS
    assert mean == pytest.approx(horizon, rel=0.15 if ends else 0.05) and f"finished mean {mean:.0f} (asked {horizon})" in text
    said = [line for line in text.splitlines() if "cannot be" in line]
    assert said == [f"the mean cannot be 200: the shortest runs of {FLOORS.get(name)} have {mean:.0f} tokens"] * ends


@pytest.mark.parametrize("name", [*NAMES, pytest.param("engineering", marks=pytest.mark.slow)])
def test_two_runs_of_45000_tokens_in_seconds(tmp_path, name):
    """Of engineering, with a process for every program, in minutes: pytest -m slow tests/stages/test_generate.py -k 45000"""
    began = spent()
    text = generate.generate(name, 2, 45_000, tmp_path / "runs.jsonl.gz")
    assert spent() - began < (120 if name == "engineering" else 6)
    runs = read(tmp_path / "runs.jsonl.gz")
    assert len(runs) == 2 and all(run.status == FINISHED for run in runs) and "cannot be" not in text
    assert statistics.mean(map(Counter(), runs)) == pytest.approx(45_000, rel=0.1)


@pytest.mark.slow
def test_two_runs_of_45000_tokens_over_a_real_corpus(tmp_path, shared_data):
    pages = shared_data / "corpora/python-docs/python3.11_pages.jsonl.gz"
    generate.generate("search_corpus", 2, 45_000, tmp_path / "runs.jsonl", assignments=[f"corpus={str(pages)!r}"])
    assert statistics.mean(map(Counter(), read(tmp_path / "runs.jsonl"))) == pytest.approx(45_000, rel=0.1)


def test_no_run_is_written_twice(tmp_path):
    generate.generate("instruction_following", 120, 60, tmp_path / "runs.jsonl")
    runs = read(tmp_path / "runs.jsonl")
    assert len({str(run.messages) for run in runs}) == 120


@pytest.mark.parametrize("share", (0.0, 0.25, 0.5, 1.0))
def test_a_share_of_runs_is_careless_and_failed_and_the_others_hit_the_horizon(tmp_path, share):
    generate.generate("store", 16, 2000, tmp_path / "runs.jsonl", failures=share)
    runs = read(tmp_path / "runs.jsonl")
    failed = [run for run in runs if run.status == FAILED]
    assert len(failed) == 16 * share and all(run.reward == 0.0 and run.metadata["careless"] in generate.CARELESS for run in failed)
    finished = [Counter()(run) for run in runs if run.status == FINISHED]
    assert len(finished) == 16 - len(failed) and (not finished or statistics.mean(finished) == pytest.approx(2000, rel=0.02))
    assert all("careless" not in run.metadata for run in runs if run.status == FINISHED)


def test_a_careless_run_that_is_accepted_counts_as_no_failure(tmp_path, monkeypatch):
    tried = itertools.count()
    real = generate.careless
    monkeypatch.setattr(generate, "careless", lambda *args: real(*args) if next(tried) % 2 else None)
    text = generate.generate("search", 8, 700, tmp_path / "runs.jsonl", failures=0.5)
    assert sum(run.status == FAILED for run in read(tmp_path / "runs.jsonl")) == 4 and "4 x never failed" in text
    monkeypatch.setattr(generate, "careless", lambda *args: None)
    with pytest.raises(ConfigError, match="x never failed"):
        generate.generate("search", 2, 700, tmp_path / "none.jsonl", failures=1.0)
    assert not (tmp_path / "none.jsonl").exists()


def test_each_careless_way_is_what_it_says():
    task = DOMAINS["search"].propose(1, 4)
    run = solve(task)
    right = turns_of(task, run)
    by_kind = {failed.metadata["careless"]: turns_of(task, failed) for failed in (generate.careless(task, run, s) for s in range(3))}
    assert set(by_kind) == set(generate.CARELESS)
    skipped, early, wrong = by_kind["skipped step"], by_kind["early stop"], by_kind["wrong value"]
    assert len(skipped) == len(right) - 1 and [t for t in right if t not in skipped] == [right[len(right[:-1]) // 2]]
    assert early[:-1] == right[: len(right[:-1]) // 2] and early[-1].answer == right[-1].answer
    changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
    assert len(changed) == 1 and changed[0][0].call.name == changed[0][1].call.name and changed[0][0].thought == changed[0][1].thought


def test_where_no_value_can_be_mixed_up_the_answer_is_wrong():
    task = DOMAINS["instruction_following"].propose(1, 3)
    failed = generate.careless(task, solve(task), 0)
    assert failed.metadata["careless"] == "wrong value" and failed.messages[-1]["content"] == "none of these is it"


def test_where_the_answer_alone_is_judged_the_answer_is_wrong(tmp_path):
    row = {"question": "Two boxes of 3 and one of 4?", "answer": "2*3=<<2*3=6>>6\n6+4=<<6+4=10>>10\n#### 10"}
    (tmp_path / "words.jsonl").write_text(json.dumps(row))
    split = "train" if in_split(parse(row).key, "10", "train") else "heldout"
    task = WordProblems(path=str(tmp_path / "words.jsonl")).propose(0, 2, split)
    assert all(generate.careless(task, solve(task), seed).metadata["careless"] == "wrong value" for seed in range(3))


def test_reasons_are_grouped_by_what_stands_before_the_colon():
    runs = [generate.Written(10, 1, 0, None), *(generate.Written(20, 2, 1, f"state: {i} is wrong") for i in range(3))]
    runs.append(generate.Written(30, 3, 2, "answer: wrong"))
    text = generate.report(Plan(DOMAINS["search"], 12, 1, 2, 9.0, 15.0), runs, collections.Counter({"valid": 2}))
    assert text.splitlines() == [
        "Search: 5 runs, 1 finished; steps 1 to 2",
        "tokens: finished mean 10 (asked 12); all: mean 20, median 20, p10 10, p90 30, max 30",
        "turns per run 2.0, tool calls per run 1.0",
        "refused tasks: 2 x valid",
        "failed runs: 3 x state; 1 x answer",
    ]


def test_only_accepted_tasks_are_written(tmp_path, monkeypatch):
    real, asked = generate.accept, []

    def every_second(task):
        asked.append(task.task_id)
        found = real(task)
        return found if len(asked) % 2 else dataclasses.replace(found, accepted=False, rule="valid", reason="test")

    monkeypatch.setattr(generate, "accept", every_second)
    text = generate.generate("search", 3, 700, tmp_path / "runs.jsonl")
    assert [run.task_id for run in read(tmp_path / "runs.jsonl")] == asked[::2] and "2 x valid" in text


@pytest.mark.parametrize("suffix", (".jsonl", ".jsonl.gz"))
def test_a_broken_run_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    out = tmp_path / f"runs{suffix}"
    generate.generate("store", 1, 200, out)
    old = out.read_bytes()

    def breaks(*args):
        yield from itertools.islice(real(*args), 2)
        raise KeyboardInterrupt

    real = generate.runs
    monkeypatch.setattr(generate, "runs", breaks)
    with pytest.raises(KeyboardInterrupt):
        generate.generate("store", 5, 200, out)
    assert out.read_bytes() == old and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_heldout_runs_and_a_file_of_word_problems(tmp_path):
    rows = [
        {"question": f"What is {i} + {j}?", "answer": f"{i}+{j}=<<{i}+{j}={i + j}>>{i + j}\n#### {i + j}"}
        for i in range(9)
        for j in range(9)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = generate.generate("science_words", 3, 80, tmp_path / "runs.jsonl", seed=3, split="heldout", assignments=[f"path={path}"])
    runs = read(tmp_path / "runs.jsonl")
    assert "3 finished" in made and all(run.metadata["split"] == "heldout" and "heldout" in run.task_id for run in runs)
    with pytest.raises(ConfigError, match="repeated"):
        generate.generate("science_words", 80, 80, tmp_path / "more.jsonl", assignments=[f"path={path}"])


def test_same_seed_same_file(tmp_path):
    for name in ("a", "b"):
        generate.generate("search", 3, 800, tmp_path / f"{name}.jsonl", seed=5, failures=0.4)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("name", DOMAINS)
def test_a_careless_run_fails(name):
    task = DOMAINS[name].propose(1, 3)
    assert all(generate.careless(task, solve(task), seed).status == FAILED for seed in range(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "x"}, "no such family"),
        ({"horizon": 20}, "shortest"),
        ({"horizon": 0}, "between 1 and"),
        ({"horizon": 10**9}, "between 1 and"),
        ({"name": "long_context", "horizon": 50}, "the rules alone take"),
        ({"failures": 2.0}, "between"),
        ({"failures": float("nan")}, "between"),
        ({"seed": -1}, "at least 0"),
        ({"tasks": 0}, "at least 1"),
        ({"out": "x.txt"}, "jsonl"),
        ({"name": "science_words"}, "no file ''"),
        ({"name": "science_words", "assignments": [f"path={__file__}"]}, "not a JSON object"),
        ({"assignments": ["degree=0"]}, "degree"),
        ({"assignments": ["colour=red"]}, "no such field"),
        ({"out": f"{__file__}/x.jsonl"}, "cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says) as error:
        generate.generate(**{"name": "search", "tasks": 2, "horizon": 700, "out": tmp_path / "x.jsonl", **change})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_writes_the_file_and_prints_statistics(tmp_path, capsys):
    out = str(tmp_path / "runs.jsonl")
    assert main.main(["generate", "--domain", "search", "--tasks", "2", "--horizon", "900", "--out", out, "--set", "degree=2"]) == 0
    assert "2 runs, 2 finished" in capsys.readouterr().out


def test_the_commands_help_names_every_family(capsys):
    with pytest.raises(SystemExit):
        main.main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"domains: {', '.join(generate.FAMILIES)};" in told and "search_corpus needs --set corpus=FILE" in told
    assert set(generate.NEEDS) == {name for name in generate.FAMILIES if not proposes(generate.FAMILIES[name])}


def proposes(domain):
    try:
        return bool(domain.propose(0, 1))
    except ConfigError:
        return False
