import dataclasses

import numpy as np
import pytest

from a1jax.data import chat, examples, trajectories
from a1jax.data.errors import DataError
from a1jax.data.trajectories import ReadReport, SourceReport
from a1jax.types import TRUNCATED, Trajectory

MESSAGES = ({"role": "user", "content": "page"}, {"role": "assistant", "content": "the tool"})


def run(n, **more):
    meta = {"source": "s", "file": "f", "line": n}
    return dataclasses.replace(Trajectory("science", str(n), MESSAGES, metadata=meta), **more)


def test_streams_in_order_with_domains(small, monkeypatch):
    monkeypatch.setattr(examples, "CHUNK", 3)
    taken = []

    def stream():
        for n in range(8):
            taken.append(n)
            yield run(n)

    pairs = examples.tokenized(stream(), small)
    assert next(pairs)[0].task_id == "0" and taken == [0, 1, 2]
    rest = list(pairs)
    assert [t.task_id for t, _ in rest] == [str(n) for n in range(1, 8)]
    tokens, mask = chat.tokenize(small, MESSAGES)
    np.testing.assert_array_equal(rest[0][1].tokens, tokens)
    np.testing.assert_array_equal(rest[0][1].mask, mask)
    assert rest[0][1].domain == 2


def test_a_truncated_run_ends_with_what_was_written(small):
    ((_, example),) = examples.tokenized([run(0, status=TRUNCATED)], small)
    assert small.decode(example.tokens).endswith("assistant\nthe tool") and example.mask[-1] == 1


def test_runs_that_cannot_be_rendered_are_counted(small):
    report = ReadReport({"s": SourceReport(runs=3)})
    robot = run(2, messages=({"role": "robot", "content": "x"},))
    pairs = list(examples.tokenized([run(0), run(1, domain="cooking"), robot, run(3)], small, report))
    assert [t.task_id for t, _ in pairs] == ["0", "3"]
    assert report.sources["s"].runs == 1 and dict(report.sources["s"].skipped) == {"unknown domain": 1, "cannot be rendered": 1}
    assert report.lines()[1].startswith("f:2: cannot be rendered: message 0 has role 'robot'")
    for arguments in ((report, True), (None, False)):
        with pytest.raises(DataError, match="unknown domain 'cooking'"):
            list(examples.tokenized([run(1, domain="cooking")], small, *arguments))


def test_written_and_read_back_tokenises_the_same(small, tmp_path):
    trajectories.write(tmp_path / "x.jsonl", [run(0)])
    again = trajectories.read(tmp_path / "x.jsonl")[0]
    ((_, one),) = examples.tokenized(again, small)
    np.testing.assert_array_equal(one.tokens, chat.tokenize(small, MESSAGES)[0])
