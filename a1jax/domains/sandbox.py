"""Run a program that nobody trusts: in a process of its own that can compute, and write a few files into its folder, and nothing else.

The locks are the kernel's (Linux): limits of time, memory and file size; no path outside its own folder (chroot, or a user
namespace, or Landlock, whichever the machine grants); a seccomp list of system calls, so no process, thread, socket, signal or
module that was not asked for; a session of its own, killed as a group when the time is over. Where the kernel grants no lock,
nothing is run: ConfigError. It is a strong fence for code that a model wrote by accident or for reward, not a promise against
an attacker who has a hole in the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..config import ConfigError

Status = Literal["ok", "error", "time", "memory", "disk", "killed"]
INSIDE = pathlib.Path(__file__).with_name("sandbox_inside.py")
WAYS = ("chroot", "namespace", "landlock")  # tried in this order
# What a program may import: pure computation. Only those it names are loaded, before the door closes.
MODULES = (
    *("abc", "array", "bisect", "cmath", "collections", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "graphlib", "heapq", "io", "itertools", "json", "math", "numbers", "operator", "os", "random", "re"),
    *("statistics", "string", "struct", "sys", "textwrap", "time", "traceback", "types", "typing", "warnings"),
)
LOOK = 0.05  # seconds between two looks at the size of the folder


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0  # by the clock; generous, since a busy machine must not change a verdict
    cpu_seconds: int = 2  # of computing
    memory_bytes: int = 256 << 20  # of address space, the interpreter included (about 20 MB)
    disk_bytes: int = 1 << 20  # of all files together; also of what it prints and of what it returns
    files: int = 32  # in its folder
    code_chars: int = 40_000
    output_chars: int = 2_000  # of what it printed that are kept
    modules: tuple[str, ...] = MODULES

    def __post_init__(self):
        for name in ("seconds", "cpu_seconds", "memory_bytes", "disk_bytes", "files", "code_chars", "output_chars"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"sandbox.Limits.{name} is {getattr(self, name)}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended. values: JSON, one per case that it answered; error: one line, empty when status is "ok".

    status: "error": it raised; "time", "memory", "disk": it met a limit; "killed": it ended without a report (a crash, os._exit).
    output: what it printed, cut, undecodable bytes replaced, addresses blanked. files: name -> text of what it left in its folder.
    """

    status: Status
    values: tuple[Any, ...] = ()
    error: str = ""
    output: str = ""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run(
    code: str,
    function: str | None = None,
    cases: Sequence[Any] = (),
    files: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    ways: Sequence[str] = WAYS,
) -> Result:
    """Run ``code``, then ``function(case)`` for every case (JSON in, JSON out), in one process with ``files`` in its folder.

    Never raises for what the code does. Raises ConfigError where this machine cannot lock a program in, and for a bad file name.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise ConfigError("the sandbox needs Linux: code can be run under no other system")
    if len(code) > limits.code_chars:
        return Result("error", error=f"the program has {len(code)} characters; at most {limits.code_chars} are run")
    named = [name for name in limits.modules if re.search(rf"\b{re.escape(name)}\b", code)]
    order = {
        **{"code": code, "function": function, "cases": list(cases), "modules": named, "seeded": "random" in named, "ways": list(ways)},
        **{"cpu": limits.cpu_seconds, "memory": limits.memory_bytes, "disk": limits.disk_bytes},
    }
    folder = tempfile.mkdtemp(prefix="a1jax-sandbox-")
    try:
        for name, text in (files or {}).items():
            if not re.fullmatch(r"\w[\w.-]{0,99}", name, flags=re.ASCII):
                raise ConfigError(f"sandbox: {name!r} is no file name: letters, digits, dot, hyphen and underscore")
            pathlib.Path(folder, name).write_text(text, encoding="utf-8")
        return _run(order, folder, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def check() -> None:
    """Raises ConfigError, in one line, where this machine cannot lock a program in."""
    done = run("def f(x): return x + 1", "f", [1])
    if done.values != (2,):
        raise ConfigError(f"the sandbox does not work here: {done.status}: {done.error}")


def _run(order: dict, folder: str, limits: Limits) -> Result:
    _give_away(folder)
    locked, lock = os.pipe()
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as report:
        source.write(json.dumps(order).encode("ascii"))
        source.seek(0)
        # -S -s -P: no site packages, no path beside the script; the only variable fixes the order of sets.
        command = [sys.executable, "-S", "-s", "-P", "-B", "-u", "-X", "utf8", str(INSIDE), str(report.fileno()), str(lock)]
        environment = {"PYTHONHASHSEED": "0"} | {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
        streams = {"stdin": source, "stdout": output, "stderr": output, "pass_fds": (report.fileno(), lock)}
        try:
            process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
            stopped = _wait(process, folder, limits)
            ready = bool(select.select([locked], [], [], 0)[0])
        finally:
            os.close(lock)
            os.close(locked)
        printed, said = _head(output, 4 * limits.output_chars), _head(report, limits.disk_bytes)
    printed = _clean(printed.decode("utf-8", "replace"))[: limits.output_chars]
    if not (ready or stopped):
        reason = (_report(said) or {}).get("error") or printed[-200:].replace("\n", " ") or "it ended at once"
        raise ConfigError(f"the sandbox cannot lock a program in on this machine: {reason}")
    left = {} if stopped else _files(folder)
    return _result(stopped, process.returncode, said, printed, left)


def _give_away(folder: str) -> None:
    """Root runs programs as nobody, so the folder must be nobody's."""
    if os.geteuid() == 0:
        try:
            for path in (folder, *(entry.path for entry in os.scandir(folder))):
                os.chown(path, 65534, 65534)
        except OSError:
            pass  # a root without that right: the program stays what it is, behind the other locks


def _wait(process: subprocess.Popen, folder: str, limits: Limits) -> str:
    """Wait for the end, or bring it about. Returns "", "time" or "disk"."""
    deadline, stopped = time.monotonic() + limits.seconds, ""
    watch = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        while not stopped:
            left = deadline - time.monotonic()
            if poll.poll(max(0.0, min(LOOK, left)) * 1000):
                break
            if left <= 0:
                stopped = "time"
            elif not _within(folder, limits):
                stopped = "disk"
    finally:
        os.close(watch)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
        except ProcessLookupError:
            pass
        process.wait()
    return stopped or ("" if _within(folder, limits) else "disk")


def _within(folder: str, limits: Limits) -> bool:
    size = count = 0
    for entry in os.scandir(folder):
        try:
            size, count = size + entry.stat(follow_symlinks=False).st_size, count + 1
        except OSError:
            pass  # removed since the folder was listed
    return size <= limits.disk_bytes and count <= limits.files


def _files(folder: str) -> dict[str, str]:
    """There are only plain files: the program cannot make folders, links or devices."""
    found = {entry.name: entry.path for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
    return {_clean(name): _clean(pathlib.Path(found[name]).read_bytes().decode("utf-8", "replace")) for name in sorted(found)}


def _head(file, size: int) -> bytes:
    file.seek(0)
    return file.read(size)


def _clean(text: str) -> str:
    """Text that can be encoded, without what differs from process to process."""
    return re.sub(r"\b0x[0-9a-f]{6,16}\b", "0x", text.encode("utf-8", "replace").decode("utf-8"))


def _result(stopped: str, code: int, said: bytes, output: str, files: Mapping[str, str]) -> Result:
    if stopped:
        what = {"time": "stopped: it took too long", "disk": "stopped: its files are too large or too many"}[stopped]
        return Result(stopped, error=what, output=output)
    if code == -signal.SIGXCPU:
        return Result("time", error="stopped: it computed too long", output=output)
    report = _report(said)
    if report is None or code != 0:
        return Result("killed", error="ended without a report", output=output, files=files)
    error, kind = _clean(str(report.get("error", ""))).replace("\n", " "), report.get("kind")
    values = report.get("values")
    values = tuple(values) if isinstance(values, list) else ()
    if error:
        return Result("memory" if kind == "MemoryError" else "error", values, error, output, files)
    return Result("ok", values, "", output, files)


def _report(said: bytes) -> dict | None:
    """What the process wrote, which the program may have written itself: nothing in it is believed but its values."""
    try:
        report = json.loads(said.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
