"""Metrics: what is written is read back, a resumed run leaves no line twice, and progress is visible without a terminal."""

import contextlib
import io
import json
import os
import pty

import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import metrics


def _rows(workdir):
    return [(line["stage"], line["step"], line["loss"]) for line in metrics.read(workdir)]


def test_lines_are_read_back_as_floats(tmp_path):
    with metrics.Writer(tmp_path / "run") as writer:
        writer.write(1, "sft", {"loss": jnp.float32(0.25), "grad/norm": np.ones((1,)), "count": 3})
        assert _rows(tmp_path / "run") == [("sft", 1, 0.25)]  # before closing: a killed run keeps its lines
        writer.write(np.int64(2), "teacher/search", {"loss": float("nan")})
    first, second = metrics.read(tmp_path / "run")
    assert first == {"stage": "sft", "step": 1, "time": first["time"], "loss": 0.25, "grad/norm": 1.0, "count": 3.0}
    assert type(first["count"]) is float and type(second["step"]) is int and np.isnan(second["loss"])
    assert first["time"] <= second["time"]
    with pytest.raises(ValueError, match=r"'loss'.*\(2,\)"), metrics.Writer(tmp_path / "bad") as writer:
        writer.write(1, "sft", {"loss": np.zeros((2,))})
    with pytest.raises(ValueError, match="'step'"), metrics.Writer(tmp_path / "bad") as writer:
        writer.write(1, "sft", {"step": 3})
    assert metrics.read(tmp_path / "bad") == [] == metrics.read(tmp_path / "nowhere")


def test_rewind_drops_the_later_lines_of_its_stage_only(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        for stage in ("sft", "distill"):
            for step in (1, 2, 3):
                writer.write(step, stage, {"loss": step})
    with metrics.Writer(tmp_path) as writer:
        writer.rewind("distill", 1)
        writer.write(2, "distill", {"loss": 20})
    assert _rows(tmp_path) == [("sft", 1, 1.0), ("sft", 2, 2.0), ("sft", 3, 3.0), ("distill", 1, 1.0), ("distill", 2, 20.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("half", ['{"stage": "sft", "st', '{"stage": "sft", "step": 2, "time": 0.0, "loss": 2.0}', "\x00"])
def test_a_half_written_last_line_is_repaired(tmp_path, half):
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, "sft", {"loss": 1})
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write(half)
    with metrics.Writer(tmp_path) as writer:
        writer.write(2, "sft", {"loss": 3})
    assert _rows(tmp_path) == [("sft", 1, 1.0), ("sft", 2, 3.0)]
    for line in (tmp_path / metrics.FILE).read_text().splitlines():
        json.loads(line)


def test_reading_alone_leaves_a_half_written_line_out_and_reports_a_broken_one(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text('{"stage": "sft", "step": 1, "loss": 1.0}\n{"stage')
    assert _rows(tmp_path) == [("sft", 1, 1.0)]
    assert path.read_text().endswith('{"stage')  # reading changes nothing
    path.write_text('{"stage": "sft", "step": 1, "loss": 1.0}\n{"stage\n{"stage": "sft", "step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        metrics.read(tmp_path)


def _scalars(folder):
    """(name, step, value) of every TensorBoard event in a folder, and the steps from which older events are to be forgotten."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found, purged = [], []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body, crc = data[12 : 12 + length], int.from_bytes(data[12 + length : 16 + length], "little")
            assert masked_crc32c(body) == crc
            event = event_pb2.Event.FromString(body)
            if event.HasField("session_log"):
                purged.append(event.step)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found, purged


def test_tensorboard_gets_every_value_in_a_folder_a_stage(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, "sft", {"loss": 0.5, "grad_norm": 2})
        writer.write(2, "sft", {"loss": 0.25})
        writer.write(1, "distill", {"loss": 4})
    assert _scalars(tmp_path / "tensorboard" / "sft")[0] == [("loss", 1, 0.5), ("grad_norm", 1, 2.0), ("loss", 2, 0.25)]
    assert _scalars(tmp_path / "tensorboard" / "distill")[0] == [("loss", 1, 4.0)]
    with metrics.Writer(tmp_path) as writer:
        writer.rewind("sft", 1)
        writer.write(2, "sft", {"loss": 0.125})
    found, purged = _scalars(tmp_path / "tensorboard" / "sft")
    assert ("loss", 2, 0.125) in found and purged == [2]  # TensorBoard forgets the first step 2


def test_arrays_are_nested_lists_and_histograms(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, "sft", {"loss": 0.5}, {"router/load": jnp.array([[0.123456, 0.5], [1.0, 0.0]])})
    assert metrics.read(tmp_path)[0]["router/load"] == [[0.123, 0.5], [1.0, 0.0]]
    assert [tag for tag, *_ in _scalars(tmp_path / "tensorboard" / "sft")[0]] == ["loss", "router/load"]


def test_progress_without_a_terminal_prints_plain_lines():
    stream = io.StringIO()
    with metrics.progress("sft", total=10, done=4, every=1e9, stream=stream) as bar:
        bar.update(5, loss=1.23456, tokens_per_second=51234.0)
        bar.update(6, loss=1.0)
        bar.update(9)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first, so that something is seen, and where it ended; not one a step
    assert lines[0].startswith("sft: 5/10, loss 1.235, tokens/s 51,234, 00:0") and lines[0].endswith("left")
    assert lines[1].startswith("sft: 9/10, loss 1, ")
    stream = io.StringIO()
    with metrics.progress("sft", total=3, every=0.0, stream=stream) as bar:
        for step in (1, 2, 3):
            bar.update(step)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["sft: 1/3", "sft: 2/3", "sft: 3/3"]
    assert stream.getvalue().splitlines()[-1].endswith("00:00 left")
    stream = io.StringIO()
    with metrics.progress("runs", total=6, done=1, every=0.0, stream=stream) as bar:
        bar.add(2)
        bar.add(3)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["runs: 3/6", "runs: 6/6"]


def test_progress_on_a_terminal_is_a_bar():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, metrics.progress("sft", total=4, done=1, stream=terminal) as bar:
        bar.update(3, loss=0.5, tokens_per_second=10)
        bar.update(4)
    shown = b""
    with contextlib.suppress(OSError):  # what a closed terminal ends with
        while piece := os.read(ours, 100_000):
            shown += piece
    os.close(ours)
    shown = shown.decode()
    assert "sft" in shown and "4/4" in shown and "loss=0.5" in shown and "100%" in shown
