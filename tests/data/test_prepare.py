import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from a1jax.data import prepare, trajectories
from a1jax.data.batches import loader
from a1jax.data.errors import DataError
from a1jax.data.examples import tokenized
from a1jax.data.prepare import open_prepared
from a1jax.types import TRUNCATED, Trajectory


@pytest.fixture(scope="module")
def runs():
    def one(n):
        messages = ({"role": "user", "content": "page " * n}, {"role": "assistant", "content": f"the tool said {n} é"})
        status = TRUNCATED if n == 3 else None
        return Trajectory(("search", "science")[n % 2], f"task-{n}", messages, reward=None if n == 2 else n / 4, status=status)

    return [one(n) for n in range(30)]


@pytest.fixture(scope="module")
def sources(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trajectories.write(folder / "runs.jsonl.gz", runs)
    (folder / "bad.jsonl").write_text("{\n")
    return folder


@pytest.fixture(scope="module")
def prepared(sources, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deep" / "set"
    return out, prepare.prepare(sources, out, small.path)


def test_what_was_prepared_is_what_was_read(prepared, runs, small):
    out, report = prepared
    source = open_prepared(out, small)
    assert len(source) == 30
    for i, (run, example) in enumerate(tokenized(runs, small)):
        read = source[i]
        np.testing.assert_array_equal(read.tokens, example.tokens)
        np.testing.assert_array_equal(read.mask, example.mask)
        assert read.domain == example.domain and read.tokens.dtype == np.int32 and read.mask.dtype == np.float32
        record = source.record(i)
        assert (record["domain"], record["task_id"], record["status"]) == (run.domain, run.task_id, run.status or "")
        assert math.isnan(record["reward"]) if run.reward is None else record["reward"] == np.float32(run.reward)
        assert (record["total"], record["supervised"]) == (len(example), int(example.mask.sum()))
        assert source.lengths[i] == len(example)
    assert (report.runs, report.domains) == (30, {"search": 15, "science": 15})
    assert report.tokens == source.lengths.sum() == source.summary["tokens"]
    assert report.read.skipped == 1 and source.summary["skipped"] == report.read.lines()
    assert "30 runs" in str(report) and "search 15, science 15" in str(report)
    with pytest.raises(IndexError):
        source[30]


def test_it_is_a_tensorflow_datasets_data_set(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared[0] / "prepared_runs" / "1.0.0")
    assert builder.info.file_format.value == "array_record" and builder.info.splits["train"].num_examples == 30
    assert set(builder.info.features) == {"domain", "task_id", "status", "tokens", "mask", "reward", "total", "supervised"}
    assert "tensorflow" not in sys.modules


def test_the_loader_reads_it(prepared, runs, small):
    from_disk = loader(open_prepared(prepared[0]), 2, 128, seed=3, threads=2)
    in_memory = loader([example for _, example in tokenized(runs, small)], 2, 128, seed=3)
    for _ in range(5):
        a, b = next(from_disk), next(in_memory)
        assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)


def test_quiet(sources, small, tmp_path, capfd):
    prepare.prepare(sources, tmp_path / "set", small.path)
    assert capfd.readouterr() == ("", "")


def test_another_vocabulary_is_refused(prepared, mistral):
    with pytest.raises(DataError, match="was tokenised with .*small.model, not with .*mistral"):
        open_prepared(prepared[0], mistral)


def test_an_occupied_folder_is_left_alone(prepared, sources, small, tmp_path):
    before = (prepared[0] / "report.json").read_bytes()
    with pytest.raises(DataError, match="is not empty"):
        prepare.prepare(sources, prepared[0], small.path)
    assert (prepared[0] / "report.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        prepare.prepare(sources, tmp_path / "file", small.path)
    (tmp_path / "empty").mkdir()
    assert prepare.prepare(sources, tmp_path / "empty", small.path).runs == 30


def test_nothing_usable(tmp_path, small):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no usable run"):
        prepare.prepare(tmp_path, tmp_path / "out", small.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]


def test_strict(sources, tmp_path, small):
    with pytest.raises(DataError, match=r"bad\.jsonl:1: broken JSON"):
        prepare.prepare(sources, tmp_path / "out", small.path, strict=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prepare_leaves_nothing(sources, small, tmp_path, monkeypatch, error):
    def broken(*arguments):
        for n, pair in enumerate(tokenized(*arguments)):
            if n == 20:
                raise error
            yield pair

    monkeypatch.setattr(prepare, "tokenized", broken)
    with pytest.raises(error):
        prepare.prepare(sources, tmp_path / "set", small.path)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from a1jax.data import prepare
whole = prepare.tokenized
def killed(*arguments):
    for n, pair in enumerate(whole(*arguments)):
        if n == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair
prepare.tokenized = killed
prepare.prepare(*sys.argv[1:])
"""


def test_a_killed_prepare_leaves_nothing_that_counts(sources, small, tmp_path):
    root = pathlib.Path(prepare.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(sources), str(tmp_path / "set"), small.path]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "set").exists() and (tmp_path / ".set.part").exists()
    for folder in (tmp_path / "set", tmp_path / ".set.part"):
        with pytest.raises(DataError, match="no complete prepared data set"):
            open_prepared(folder)
    assert prepare.prepare(sources, tmp_path / "set", small.path).runs == 30  # and the next try cleans up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_a_damaged_set_is_refused(sources, small, tmp_path):
    prepare.prepare(sources, tmp_path / "set", small.path)
    np.save(tmp_path / "set" / "lengths.npy", np.ones(3, np.int64))
    with pytest.raises(DataError, match="30 runs, its report 3"):
        open_prepared(tmp_path / "set")
    (tmp_path / "set" / "report.json").write_text(json.dumps({})[:1])
    with pytest.raises(DataError, match="no complete"):
        open_prepared(tmp_path / "set")
