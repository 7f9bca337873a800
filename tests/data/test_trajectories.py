import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import trajectories
from a1jax.data.errors import DataError
from a1jax.types import Record, Trajectory

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text())
JSON = st.recursive(VALUES, lambda v: st.dictionaries(st.text(), v, max_size=2), max_leaves=3)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()})
TRAJECTORY = st.builds(
    Trajectory,
    domain=st.text(),
    task_id=st.text(),
    messages=st.lists(MESSAGE, max_size=3).map(tuple),
    tools=st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=2).map(tuple),
    records=st.lists(
        st.builds(Record, st.lists(st.text()).map(tuple), st.one_of(st.none(), st.dictionaries(st.text(), JSON)), st.none() | st.text()),
        max_size=2,
    ).map(tuple),
    reward=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    status=st.none() | st.sampled_from(["FINISHED", "TRUNCATED", "ABORTED", "FAILED"]),
    metadata=st.dictionaries(st.text(), JSON, max_size=2),
)
RUN = Trajectory("search", "t", ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a\u2028\n"}), reward=0.5)


@settings(max_examples=100, deadline=None)
@given(TRAJECTORY)
def test_json_round_trip(trajectory):
    line = trajectories.to_json(trajectory)
    assert "\n" not in line and line.isascii()
    assert trajectories.from_json(line) == trajectory == trajectories.from_json(json.loads(line))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"messages": 3}', "nonsense", '{"messages": [], "domain": "x"}'])
def test_from_json_refuses(text):
    with pytest.raises(DataError, match="not a trajectory") as error:
        trajectories.from_json(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"status": "DONE"}, {"messages": [{"role": "robot"}]}, {"reward": "1"}, {"records": [{"x": 1}]}])
def test_from_json_checks_values(change):
    with pytest.raises(DataError, match="not a trajectory"):
        trajectories.from_json(json.loads(trajectories.to_json(RUN)) | change)


def test_to_json_refuses_what_json_cannot_hold():
    with pytest.raises(DataError, match="trajectory 't'"):
        trajectories.to_json(Trajectory("d", "t", (), metadata={"x": object()}))


@pytest.mark.parametrize("name", ["runs.jsonl", "deep/runs.jsonl.gz"])
def test_write_and_read(tmp_path, name):
    file = tmp_path / name
    assert trajectories.write(file, [RUN, RUN]) == 2
    runs, report = trajectories.read_all(file)
    assert [run.messages for run in runs] == [RUN.messages] * 2
    assert runs[1].metadata == {"source": file.parent.name, "file": file.name, "line": 2}
    assert (report.runs, report.skipped) == (2, 0)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def broken():
        yield RUN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectories.write(tmp_path / "x.jsonl", broken())
    assert not list(tmp_path.iterdir())


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
BAD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "?"}]}
ROBOT = {"messages": [{"role": "robot", "content": "q"}]}


def lines(*records):
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records) + b"\n"


MIXED = lines(CHAT, b'{"messages": [', b"", BAD, CHAT, ROBOT, b"\xff\xfe{}", {"x": 1}, b"[1]", CHAT, b"[" * 100_000)
EXPECTED = [
    (2, "broken JSON"), (4, "call without result"), (6, "unknown role"), (7, "not UTF-8"), (8, "no known trajectory format"),
    (9, "no known trajectory format"), (11, "broken JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_bad_records_are_reported_by_line_and_skipped(tmp_path, suffix, pack):
    file = tmp_path / "src" / f"runs.jsonl{suffix}"
    file.parent.mkdir()
    file.write_bytes(pack(MIXED))
    runs, report = trajectories.read_all(tmp_path)
    assert [run.metadata["line"] for run in runs] == [1, 5, 10]
    source = report.sources["src"]
    assert source.runs == 3 and [(line, reason) for _, line, reason, _ in source.where] == EXPECTED
    assert {file for file, *_ in source.where} == {str(file)}
    assert source.skipped["broken JSON"] == 2 and source.skipped.total() == report.skipped == 7
    assert report.lines()[1] == f"{file}:4: call without result: f (1), 1 in all"
    assert all("\n" not in line for line in report.lines())
    assert "src: 3 runs, 7 skipped (2 x broken JSON; 2 x no known trajectory format; " in str(report)


def test_strict_raises_on_the_first(tmp_path):
    (tmp_path / "runs.jsonl").write_bytes(MIXED)
    with pytest.raises(DataError, match=r"runs\.jsonl:2: broken JSON") as error:
        trajectories.read_all(tmp_path, strict=True)
    assert "\n" not in str(error.value)


def test_arrays_single_objects_and_lines_in_json_files(tmp_path):
    (tmp_path / "a.json").write_text("[" + json.dumps(CHAT, indent=1) + ",\n\n" + json.dumps(BAD) + ",\n" + json.dumps(CHAT) + "]")
    (tmp_path / "b.traj").write_text(json.dumps({"history": CHAT["messages"]}, indent=1))
    (tmp_path / "c.json").write_bytes(lines(CHAT, b"{", CHAT))
    (tmp_path / "d.json").write_text("[" + json.dumps(CHAT) + ",\n{broken")
    (tmp_path / "e.json").write_text("")
    (tmp_path / "LICENSE").write_text("no runs here")
    runs, report = trajectories.read_all(tmp_path)
    first = json.dumps(CHAT, indent=1).count("\n") + 1
    assert [(run.metadata["file"], run.metadata["line"]) for run in runs] == [
        ("a.json", 1), ("a.json", first + 3), ("b.traj", 1), ("c.json", 1), ("c.json", 3), ("d.json", 1),
    ]  # fmt: skip
    found = [(file[-6:], line, reason) for file, line, reason, _ in report.sources[tmp_path.name].where]
    assert found == [("a.json", first + 2, "call without result"), ("c.json", 2, "broken JSON"), ("d.json", 2, "broken JSON")]


def test_damaged_archives_do_not_stop_reading(tmp_path):
    packed = gzip.compress(lines(*[CHAT] * 200))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.xz").write_bytes(b"no archive")
    (tmp_path / "c.json.gz").write_bytes(b"")
    (tmp_path / "d.jsonl").write_bytes(lines(CHAT))
    runs, report = trajectories.read_all(tmp_path)
    assert runs[-1].metadata["file"] == "d.jsonl"
    assert report.sources[tmp_path.name].skipped["unreadable file"] == 2


def test_paths(tmp_path):
    for name in ("a/x.jsonl", "a/b/y.jsonl", "z.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(CHAT))
    (tmp_path / "odd.txt").write_bytes(lines(CHAT))
    assert len(trajectories.files_of([tmp_path])) == 3
    assert len(trajectories.files_of([tmp_path / "a", tmp_path / "**" / "*.jsonl", tmp_path / "odd.txt"])) == 4  # none twice
    runs, report = trajectories.read_all([tmp_path / "a", str(tmp_path / "z.jsonl")], domain="science")
    assert {run.domain for run in runs} == {"science"} and set(report.sources) == {"a", "b", tmp_path.name}
    for nothing in (tmp_path / "none", tmp_path / "*.parquet"):
        with pytest.raises(DataError, match="no trajectory files"):
            trajectories.read(nothing)


def test_a_forced_format(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(CHAT))
    assert len(trajectories.read_all(tmp_path, format="tagged")[0]) == 1
    assert trajectories.read_all(tmp_path, format="responses")[1].skipped == 1
    with pytest.raises(DataError, match="unknown trajectory format 'csv': use one of a1jax, chat"):
        trajectories.read(tmp_path, format="csv")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(trajectories.FORMATS), JSON, st.sampled_from(["messages", "traj", "history", "trajectory", "response", "input"]))
def test_no_record_crashes_a_reader(tmp_path_factory, format, value, key):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    odd = {key: [value, {"role": "assistant", "content": value, "tool_calls": value}], "info": value, "reward": value, "tools": value}
    file.write_text(json.dumps(odd) + "\n" + json.dumps({"responses_create_params": value, "response": {"output": value}}))
    runs, report = trajectories.read_all(file, format=format)
    assert len(runs) + report.skipped == 2


def test_the_real_runs(real):
    runs, report = real
    counts = {name: (source.runs, dict(source.skipped)) for name, source in report.sources.items()}
    assert counts == {
        "nemo-gym": (
            355,
            {"call without result": 10, "no known trajectory format": 5, "no model turn": 5, "no response output": 5},
        ),
        "swe-agent": (19, {}),
        "tau-bench": (200, {"no known trajectory format": 91}),  # 88 few-shot displays, 3 data bases
        "webdancer": (200, {}),
    }
    assert len(runs) == 774 and len({run.domain for run in runs}) == 6
    assert sum(run.reward == 1.0 for run in runs if run.metadata["source"] == "tau-bench") == 84  # 0.42 of 200
    for run in runs[::20]:
        assert trajectories.from_json(trajectories.to_json(run)) == run
        calls = [call["function"] for m in run.messages for call in m.get("tool_calls", ())]
        results = [m["content"] for m in run.messages if m["role"] == "tool"]
        if calls:
            actions = [r for r in run.records if r.action]
            assert [r.action for r in actions] == calls
            assert sorted(r.observation for r in actions if r.observation is not None) == sorted(results)
