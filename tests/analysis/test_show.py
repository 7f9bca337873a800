import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from rich.style import Style
from rich.text import Text

from a1jax.analysis import kept, reading, show
from a1jax.analysis.kept import Kept
from a1jax.config import ConfigError
from a1jax.data import trajectories
from a1jax.data.tokenizer import Tokenizer
from a1jax.main import main
from a1jax.stages import kept_runs
from a1jax.types import FAILED, FINISHED, TRUNCATED, Record, Rollout, Trajectory

EVIL = "<script>alert(1)</script> [red]&amp; \x1b[31m \ud800"


def call(name, **arguments):
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES = (
    {"role": "user", "content": f"Find {EVIL}"},
    {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [call("search", query=EVIL)]},
    {"role": "tool", "name": "search", "content": "error: nothing", "tool_call_id": "c"},
    {"role": "assistant", "content": "{broken"},
    {"role": "tool", "name": "parser", "content": "no JSON", "tool_call_id": "c"},
    {"role": "assistant", "content": "", "tool_calls": [call("search", query="b")]},
    {"role": "tool", "name": "search", "content": "error: is the title of this page", "tool_call_id": "c"},
    {"role": "assistant", "content": "it is b"},
)
RECORDS = (
    Record((), {"name": "search", "arguments": {"query": EVIL}}, "error: nothing", "schema: refused"),
    Record(("b",), {"name": "search", "arguments": {"query": "b"}}, "error: is the title of this page"),
    Record(("b",), None, None, "answer: wrong"),
)
RUN = Trajectory(
    "search", "task-1", MESSAGES, ({"name": EVIL},), RECORDS, 0.0, FAILED, {"reward_parts": {"format": 0.1}, "rubrics": [True, False]}
)


def rollout(run=RUN, extra=0, status=FAILED):
    """Two ids a message, the last ``extra`` ids a turn that was cut."""
    sampled = np.repeat([float(m["role"] == "assistant") for m in run.messages], 2)
    sampled = np.concatenate([sampled, [0.0] * bool(extra), np.ones(extra)]).astype(np.float32)
    logp = np.where(sampled > 0, -np.arange(len(sampled)) / 10, 0).astype(np.float32)
    return Rollout(run.task_id, run.domain, np.arange(len(sampled), dtype=np.int32), sampled, logp, status, 0.0, 4, run)


def printed(one):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show.print_run(one, console)
    return console.file.getvalue()


def look(style):
    """(number of the colour, bold, italic, dim) of a style: what a terminal is told of it."""
    return style.color and style.color.number, bool(style.bold), bool(style.italic), bool(style.dim)


def styled(name):
    return look(Style.parse(name))


def styles(one):
    """words(text) -> how a terminal with colours shows the line that begins with it, without its bar; bars -> (bar, how)."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", no_color=False)
    show.print_run(one, console)
    lines = Text.from_ansi(console.file.getvalue()).split("\n")
    bars = [(line.plain[2], look(line.get_style_at_offset(console, 2))) for line in lines if line.plain[2:4] in ("┃ ", "│ ")]

    def words(text):
        found = [line.get_style_at_offset(console, line.plain.index(text)) for line in lines if line.plain.lstrip(" ┃│").startswith(text)]
        assert found and len(set(map(look, found))) == 1, (text, found)
        return look(found[0])

    return words, bars


@pytest.fixture()
def folder(tmp_path):
    def write(path, *tasks):
        runs = [Trajectory("search", task, MESSAGES, (), RECORDS, 0.0, FAILED) for task in tasks]
        kept_runs.write(tmp_path / path, [kept_runs.to_trajectory(rollout(run), stop="early") for run in runs])

    write("evaluations/base.runs.jsonl.gz", "task-1", "task-2")
    write("evaluations/student.runs.jsonl.gz", "task-1")
    write("admission/sft.runs.jsonl.gz", "other")
    write("rollouts/distill/step_000012.runs.jsonl.gz", "task-9", "task-9")
    return tmp_path


def test_turns_by_hand():
    found = reading.turns(kept_runs.to_trajectory(rollout()))
    assert [t.looked for t in found] == [m["role"] == "assistant" for m in MESSAGES] and [t.tokens for t in found] == [2] * 8
    kinds = [[kind for kind, _ in t.parts] for t in found]
    assert kinds == [["text"], ["thinking", "call"], ["error"], ["text"], ["error"], ["call"], ["observation"], ["text"]]
    np.testing.assert_allclose([t.logp for t in found if t.looked], [-0.25, -0.65, -1.05, -1.45])  # ids 2 and 3, 6 and 7, ...
    assert [t.records for t in found] == [(), (RECORDS[0],), (), (), (), (RECORDS[1],), (), ()]
    assert reading.verdict(RUN) == "answer: wrong"


def test_a_turn_that_was_cut_and_ids_that_were_not_kept():
    cut = reading.turns(kept_runs.to_trajectory(rollout(extra=3, status=TRUNCATED)))[-1]
    assert cut.looked and cut.tokens == 3 and [kind for kind, _ in cut.parts] == ["cut"]
    plain = reading.turns(RUN)
    assert len(plain) == 8 and {t.tokens for t in plain} == {None} and plain[1].looked and not plain[2].looked


def test_a_reply_of_a_simulated_user_is_the_record_of_the_turn_before():
    said = Record(("policy",), {"name": "say", "arguments": {"text": "which?"}}, "the red one")
    messages = (
        {"role": "assistant", "content": "which?"},
        {"role": "user", "content": "the red one"},
        {"role": "assistant", "content": "done"},
    )
    assert [t.records for t in reading.turns(Trajectory("general", "t", messages, records=(said,)))] == [(said,), (), ()]
    garbled = ({"role": "assistant", "content": "<tool_call>"}, {"role": "tool", "name": "parser", "content": "error: ..."})
    found = reading.turns(Trajectory("general", "t", (*garbled, *messages), records=(said,)))
    assert [t.records for t in found] == [(), (), (said,), (), ()]  # what could not be read was not said


def test_print_shows_turns_masks_records_and_rewards_and_no_control_characters():
    text = printed(Kept("student", kept_runs.to_trajectory(rollout())))
    for words in (
        "task-1",
        "FAILED, reward 0",
        "reward: format 0.1",
        "rubrics met 1 of 2",
        "→ search(",
        "schema: refused",
        "answer: wrong",
    ):
        assert words in text, words
    assert "\x1b" not in text and "[red]" in text and "\\ud800" in text
    assert re.search(r"  ┃ it is b\n", text) and re.search(r"  │ no JSON\n", text)


def test_a_terminal_shows_masks_errors_calls_and_rewards_in_colour():
    words, bars = styles(Kept("student", kept_runs.to_trajectory(rollout())))
    assert set(bars) == {("┃", styled("green")), ("│", styled("dim"))}
    assert words("2 assistant") == styled("bold green") and words("3 tool search") == styled("bold")  # headings: looked at, and not
    assert words("look") == styled("italic cyan") and words("→ search(") == styled("yellow") and words("it is b") == styled("")
    assert words("error: nothing") == words("no JSON") == styled("red")
    assert words("error: is the title of this page") == styled("")  # an observation that no schema refused is none
    assert words("record: saw nothing of the corpus; schema: refused") == styled("dim red") and words("record: saw b") == styled("dim")
    assert words("FAILED, reward 0") == styled("bold red") and words("domain search") == styled("dim")
    won = dataclasses.replace(RUN, status=FINISHED, reward=1.0)
    assert styles(Kept("m", won))[0]("FINISHED, reward 1") == styled("bold green")
    cut, _ = styles(Kept("m", kept_runs.to_trajectory(rollout(extra=3, status=TRUNCATED))))
    assert cut("TRUNCATED, reward 0") == styled("bold yellow") and cut("cut here") == styled("italic red")


def declared(page):
    """selector -> declarations, of a page's style sheet."""
    found = {}
    for names, body in re.findall(r"([^{}]+){([^{}]*)}", page.partition("<style>")[2].partition("</style>")[0]):
        for name in names.split(","):
            found[name.strip()] = found.get(name.strip(), "") + body
    return found


def test_the_page_shows_masks_errors_calls_and_rewards_in_colour(read_page):
    text = show.to_html(Kept("student", kept_runs.to_trajectory(rollout())))
    found, rules = read_page(text), declared(text)
    sections = re.findall(r'<section class="([^"]+)">', text)
    assert sections == ["turn looked" if m["role"] == "assistant" else "turn" for m in MESSAGES]
    shown = {words.strip(): classes for classes, words in found.classed if words.strip()}
    assert shown["error: nothing"] == shown["no JSON"] == "part error" and shown["error: is the title of this page"] == "part observation"
    assert shown["look"] == "part thinking" and shown["it is b"] == "part text" and shown["FAILED, reward 0"] == "status FAILED"
    assert shown["record: saw nothing of the corpus; schema: refused"] == "record refused" and shown["record: saw b"] == "record"
    won = show.to_html(Kept("m", dataclasses.replace(RUN, status=FINISHED, reward=1.0)))
    assert ("status FINISHED", "FINISHED, reward 1") in read_page(won).classed
    # What is told apart by its class has a colour of its own.
    colours = {name: re.findall(r"#[0-9a-f]{6}", body) for name, body in rules.items()}
    for several in ((".turn", ".turn.looked"), (".thinking", ".call", ".error", "body"), (".record", ".record.refused"), SHADES, STATUSES):
        assert all(colours[name] for name in several) and len({str(colours[name]) for name in several}) == len(several), several


SHADES, STATUSES = (".raw .w", ".raw .w1", ".raw .w2", ".raw .w3", ".raw .w4"), (".FINISHED", ".FAILED", ".TRUNCATED", ".ABORTED")


def test_the_page_is_well_formed_and_says_the_same_with_everything_escaped(read_page):
    one = Kept("student", kept_runs.to_trajectory(rollout()))
    found = read_page(show.to_html(one))
    assert "<script>alert(1)</script> [red]&amp; \\x1b[31m \\ud800" in found.text and "script" not in found.tags
    assert found.tags.count("section") == 8 and "answer: wrong" in found.text and "rubrics met" in found.text
    odd = Trajectory("search", "t", ({"role": "tool", "name": EVIL, "content": "x"},))
    show.to_html(Kept("", odd)).encode("utf-8")  # a file of another's may hold a tool's name that no file can hold


def test_the_ids_are_shown_shaded_where_the_tokenizer_is_theirs(domain_tokenizer: Tokenizer, read_page):
    question, answer = domain_tokenizer.encode("Find the red one"), domain_tokenizer.encode("step 1")
    run = Trajectory("search", "t", ({"role": "user", "content": "Find the red one"}, {"role": "assistant", "content": "step 1"}))
    sampled = np.asarray([0] * len(question) + [1] * len(answer), np.float32)
    logp = np.where(np.arange(len(sampled)) == len(question), -5.0, -0.01) * sampled
    one = kept_runs.to_trajectory(Rollout("t", "search", np.asarray(question + answer), sampled, logp, FAILED, 0.0, 1, run))
    pieces = reading.pieces(one, domain_tokenizer)
    assert "".join(t for t, _, _ in pieces).split() == ["Find", "the", "red", "onestep", "1"]
    assert [looked for _, looked, _ in pieces] == [False, True, True]
    assert [reading.shade(p) for _, _, p in pieces[1:]] == [4, 0]
    page = show.to_html(Kept("m", one), domain_tokenizer)
    assert 'class="w w4"' in page and "Find the red one" in read_page(page).text
    foreign = kept_runs.to_trajectory(
        Rollout("t", "search", np.asarray(answer), sampled[-len(answer) :], logp[-len(answer) :], FAILED, 0.0, 1, run)
    )
    unsaid = dataclasses.replace(one, messages=run.messages[:1])
    assert [p for p in reading.turns(unsaid, domain_tokenizer)[-1].parts if p[0] == "text"] == [("text", "step 1")]
    assert reading.pieces(foreign, domain_tokenizer) is None and reading.pieces(run, domain_tokenizer) is None


def test_shades_by_hand():
    assert [reading.shade(np.log(p)) for p in (1.0, 0.91, 0.89, 0.51, 0.49, 0.11, 0.09, 0.011, 0.009)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_the_students_run_comes_first_and_models_can_be_named(folder):
    assert list(kept.files(folder)) == ["student", "base", "admission/sft", "distill@12"]
    assert [k.model for k in kept.of_task(folder, "task-1")] == ["student", "base"]
    assert [k.model for k in kept.of_task(folder, "task-1", "base")] == ["base"]
    assert len(list(kept.every(folder))) == 6
    with pytest.raises(ConfigError, match="no runs of model 'nobody'; there are student, base"):
        kept.of_task(folder, "task-1", "nobody")


def test_the_command_lists_prints_and_writes_a_page(folder, capsys, read_page):
    assert main(["show", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "6 runs" in listed and "distill@12" in listed and "early" in listed
    assert main(["show", str(folder), "--task", "task-9#2"]) == 0
    assert "here is distill@12#2" in capsys.readouterr().out
    assert "task-9" in read_page((folder / "pages/distill_12.task-9#2.html").read_text()).text
    assert main(["show", str(folder), "--task", "task-1", "--model", "base", "--html", str(folder / "a.html")]) == 0
    assert "here is" not in capsys.readouterr().out and (folder / "a.html").is_file() and not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "words", [["--task", "task-11"], ["--task", "task-1#3"], ["--html", "x.html"], ["--task", "task-1", "--model", "no"]]
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, words):
    assert main(["show", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("task-11" not in words or "nearest are task-1," in error)


def test_plain_trajectory_files_can_be_read_too(tmp_path, capsys, caplog):
    trajectories.write(tmp_path / "runs.jsonl", [Trajectory("search", "a", MESSAGES[1:2]), Trajectory("search", "b", MESSAGES[1:2])])
    assert main(["show", str(tmp_path / "runs.jsonl"), "--list"]) == 0 and "2 runs" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "runs.jsonl"), "--task", "b"]) == 0 and "page:" not in capsys.readouterr().out
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write("{}\n")
    assert main(["show", str(tmp_path / "runs.jsonl")]) == 0 and "2 runs" in capsys.readouterr().out
    assert "could not be read: 1" in caplog.text and "runs.jsonl:3" in caplog.text
    assert main(["show", str(tmp_path / "none.jsonl"), "--task", "b"]) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({}))
    assert main(["show", str(tmp_path / "run")]) == 2 and "no runs are kept" in capsys.readouterr().err
