"""Making what a notebook needs and does not find: `a1jax` commands in a process of their own, once."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import a1jax

from .. import provenance
from ..config import ConfigError

PACKAGE = str(pathlib.Path(a1jax.__file__).resolve().parents[1])


def command(words: Sequence[str], good: Sequence[int] = (0,)) -> str:
    """What `a1jax WORDS` prints. A process of its own: devices and settings of the one that asks stay untouched, and the package it finds
    is this one, installed or not. Raises ConfigError with the last line of its errors for an exit code that is not among ``good``."""
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    line = [sys.executable, "-m", "a1jax.main", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode not in good:
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"a1jax {' '.join(words[:2])}: {told.removeprefix('a1jax: ')}")
    return done.stdout


def run(given: str | pathlib.Path | None, experiment: str, into: str | pathlib.Path, changes: Sequence[str] = ()) -> pathlib.Path:
    """The folder of a run (of a sweep: or its file): ``given``, or where that is None the one that `a1jax run EXPERIMENT --set CHANGES`
    leaves in ``into``.

    It is made or finished first where that is still to do, which takes as long as the run does. Raises ConfigError for a folder that is not
    there."""
    if given is not None:
        folder = pathlib.Path(given)
        if not folder.exists():
            raise ConfigError(f"{folder}: not there; give the folder of a run, or None to have a small one made")
        return folder
    file, _, arg = str(experiment).partition(":")
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"{file}: no such experiment from {pathlib.Path.cwd()}; start the notebook in notebooks/ of the checkout")
    changed = hashlib.sha256(repr(tuple(changes)).encode()).hexdigest()[:8] if changes else ""  # other changes are another run
    folder = pathlib.Path(into) / "-".join(filter(None, (pathlib.Path(file).stem, arg, changed)))
    if provenance.read(folder).get("outcome") == "finished":
        return folder
    print(f"a1jax run {experiment} --workdir {folder}{' --set ' + ' '.join(changes) if changes else ''}")
    began = time.perf_counter()
    command(["run", str(experiment), "--workdir", str(folder), *(["--set", *changes] if changes else [])])
    print(f"made in {time.perf_counter() - began:.0f} s")
    return folder


def saved(path: pathlib.Path, words: Sequence[str], good: Sequence[int] = (0,)) -> dict:
    """The JSON that `a1jax WORDS` prints, kept in ``path``; read back where the same command left it there."""
    try:
        kept = json.loads(path.read_text())
        if kept["command"] == list(words):
            return kept["printed"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print("a1jax " + " ".join(words))
    began = time.perf_counter()
    text = command(words, good)
    try:
        printed = json.loads(text)
    except ValueError:
        raise ConfigError(f"a1jax {' '.join(words[:2])}: no report came out; the same command in a shell says why") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"command": list(words), "printed": printed}))
    part.replace(path)
    print(f"made in {time.perf_counter() - began:.0f} s")
    return printed
