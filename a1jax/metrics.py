"""What a run reports: ``metrics.jsonl`` (one line a step, the numbers every table is made of), TensorBoard files, a progress bar."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from a1jax import distributed
from a1jax.types import Metrics

FILE = "metrics.jsonl"


class Writer:
    """Appends to a run's metrics; a context manager. A line that a killed process left half written is removed on opening.

    Of several processes the first one's writes, the others' do nothing."""

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self.workdir = pathlib.Path(workdir)
        self._writes = distributed.is_first()
        self._file: TextIO = io.StringIO()
        if self._writes:
            self.workdir.mkdir(parents=True, exist_ok=True)
            _repair(self.workdir / FILE)
            self._file = (self.workdir / FILE).open("a", encoding="utf-8")
        self._boards: dict[str, Any] = {}  # one a stage: steps start anew in each
        self._purge: dict[str, int] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, stage: str, metrics: Metrics, arrays: Metrics | None = None) -> None:
        """One line: stage, step, time (seconds since 1970) and every metric as a float. Raises ValueError for what is not a scalar.

        arrays: what is one on purpose (the load of every expert of every layer): nested lists of three digits, in TensorBoard a histogram.
        """
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        arrays = {name: np.asarray(value, np.float64) for name, value in (arrays or {}).items()}
        if not self._writes:
            return
        lists = {name: np.vectorize(lambda x: float(f"{x:.3g}"))(value).tolist() for name, value in arrays.items()}
        self._file.write(json.dumps({"stage": stage, "step": int(step), "time": time.time(), **values, **lists}) + "\n")
        self._file.flush()  # what is read after a kill ends at the last step, not at the last full buffer
        board = self._board(stage)
        for name, value in values.items():
            board.add_scalar(name, value, int(step))
        for name, value in arrays.items():
            board.add_histogram(name, value, int(step))

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of ``stage`` after ``step``: a run that goes on from there writes them again."""
        if not self._writes:
            return
        kept = [line for line in read(self.workdir) if line["stage"] != stage or line["step"] <= step]
        self._file.close()
        part = self.workdir / f".{FILE}.{os.getpid()}"
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.workdir / FILE)
        self._file = (self.workdir / FILE).open("a", encoding="utf-8")
        if stage in self._boards:
            self._boards.pop(stage).close()
        self._purge[stage] = step + 1

    def close(self) -> None:
        """Writes out what is pending; a second call does nothing."""
        self._file.close()
        for board in self._boards.values():
            board.close()
        self._boards = {}

    def _board(self, stage: str) -> Any:
        if stage not in self._boards:
            from tensorboardX import SummaryWriter  # half a second of protobuf, not paid by those who only read

            folder = self.workdir / "tensorboard" / stage
            self._boards[stage] = SummaryWriter(str(folder), purge_step=self._purge.get(stage))
        return self._boards[stage]


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every line of a run's metrics, in the order written; [] where there are none. A half-written last line is left out.

    Raises ValueError naming file and line for a broken line anywhere else.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # the last piece follows the last newline: it was never finished
                raise ValueError(f"{path}:{number}: not a metrics line: {line[:80]!r}") from error
    return found


class Bar:
    """Where a stage stands; made by ``progress``. On a terminal a bar, elsewhere a plain line every ``every`` seconds."""

    def __init__(self, stage: str, total: int, done: int, every: float, stream: TextIO) -> None:
        self._stage, self._total, self._first, self._done, self._shown = stage, total, done, done, None
        self._every, self._stream = every, stream
        self._began = self._last = time.monotonic()
        self._notes: dict[str, str] = {}
        self._bar = None
        if stream.isatty():
            wide = os.get_terminal_size(stream.fileno()).columns > 0  # some containers' terminals report none, and would get an empty bar
            self._bar = tqdm(total=total, initial=done, desc=stage, file=stream, dynamic_ncols=wide, ncols=None if wide else 100)

    def update(self, done: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """``done`` of the total are behind us."""
        if loss is not None:
            self._notes["loss"] = f"{float(loss):.4g}"
        if tokens_per_second is not None:
            self._notes["tokens/s"] = f"{float(tokens_per_second):,.0f}"
        step, self._done = done - self._done, done
        if self._bar is not None:
            self._bar.set_postfix(self._notes, refresh=False)
            self._bar.update(step)
        elif self._shown is None or done >= self._total or time.monotonic() - self._last >= self._every:
            self._line()

    def add(self, number: int) -> None:
        """So many more of the total are behind us."""
        self.update(self._done + number)

    def close(self) -> None:
        """Ends the bar, or prints the last line if it is still to be said."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown != self._done:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._last, self._shown = now, self._done
        new = self._done - self._first
        left = tqdm.format_interval((self._total - self._done) * (now - self._began) / new) if new else "?"
        notes = "".join(f", {name} {value}" for name, value in self._notes.items())
        print(f"{self._stage}: {self._done}/{self._total}{notes}, {left} left", file=self._stream, flush=True)


@contextlib.contextmanager
def progress(stage: str, total: int, done: int = 0, every: float = 20.0, stream: TextIO | None = None) -> Iterator[Bar]:
    """A Bar from ``done`` to ``total`` (steps, tasks, ...), closed at the end. every: seconds between the plain lines. stream: stderr, of
    several processes the first one's."""
    own = sys.stderr if distributed.is_first() else io.StringIO()
    bar = Bar(stage, total, done, every, own if stream is None else stream)
    try:
        yield bar
    finally:
        bar.close()


def _scalar(name: str, value: Any) -> float:
    if name in ("stage", "step", "time"):
        raise ValueError(f"metric {name!r}: every line has one already; choose another name")
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r}: an array of shape {array.shape}, expected a scalar")
    return float(array.reshape(()))


def _repair(path: pathlib.Path) -> None:
    """Cuts off what follows the last newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
