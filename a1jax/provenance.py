"""Where a number comes from: command, commit, machine, seed, versions, kept in a run's ``run.json``."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from a1jax import __version__

FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets", "sentencepiece", "tokenizers")


def collect(argv: Sequence[str], seed: int | None) -> dict[str, Any]:
    """What is known at the start of a run. Touches no device: an experiment may still choose them. argv: the words after ``a1jax``."""
    return {
        "command": shlex.join(["a1jax", *argv]),
        "seed": seed,
        **_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count(), "memory_gib": _memory_gib()},
        "versions": {"a1jax": __version__, "python": platform.python_version(), **_versions()},
    }


def start(workdir: pathlib.Path, entry: dict[str, Any]) -> None:
    """Writes ``run.json``: this start on top, the starts of the same run before it under ``earlier``, oldest first."""
    before = read(workdir)
    earlier = [*before.pop("earlier", []), before] if before else []
    _write(workdir, {**entry, "outcome": "running", "earlier": earlier})


def finish(workdir: pathlib.Path, outcome: str) -> None:
    """Notes how the run ended and on which devices it ran. outcome: "finished", "interrupted" or "failed: <error>"."""
    entry = read(workdir)
    ended = datetime.datetime.now(datetime.UTC)
    seconds = (ended - datetime.datetime.fromisoformat(entry["started"])).total_seconds()
    _write(workdir, {**entry, "outcome": outcome, "seconds": seconds, "devices": devices() if outcome == "finished" else None})


def read(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The entry in ``run.json``, {} where there is none."""
    path = pathlib.Path(workdir) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(workdir: pathlib.Path, entry: dict[str, Any]) -> None:
    part = workdir / f".{FILE}.{os.getpid()}"
    part.write_text(json.dumps({**entry, "earlier": entry["earlier"]}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, workdir / FILE)


def _commit() -> dict[str, Any]:
    """The commit of the checkout that a1jax is imported from; None where it is installed without one."""
    here = pathlib.Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != here:  # site-packages inside somebody else's repository is not our commit
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": git("rev-parse", "--verify", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def devices() -> str | None:
    """E.g. "8 x TPU v5p in 2 processes"; None for a run that never used jax."""
    jax = sys.modules.get("jax")
    if not jax:
        return None
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}"
