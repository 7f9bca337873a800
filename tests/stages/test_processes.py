"""Two real processes of four devices each, joined by jax.distributed over gloo: all stages, as one process of eight devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from a1jax import checkpoint, config, metrics
from a1jax import params as param_specs
from a1jax.models import transformer
from a1jax.stages import kept_runs, pipeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "tests/stages/three_stages.py"
CLOCKS = ("time", "seconds", "per_second")  # what differs from run to run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_two(words: list[str], seconds: float, script: str = "one_of_several.py") -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of both. A process that hangs is killed and the test fails: subprocess.TimeoutExpired."""
    told = {"A1JAX_COORDINATOR": f"127.0.0.1:{free_port()}", "A1JAX_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "4"}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/stages" / script), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **told, "A1JAX_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def compare(alone: pathlib.Path, both: pathlib.Path, model) -> None:
    """Metrics, evaluations, sampled runs and the student's parameters of two runs."""
    ours, theirs = metrics.read(alone), metrics.read(both)
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage"}:
            if not name.endswith(CLOCKS):
                np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-5, err_msg=f"{a['stage']} {a['step']} {name}")
    for file in sorted(alone.glob("evaluations/*.json")):
        assert json.loads(file.read_text()) == json.loads((both / "evaluations" / file.name).read_text())
    for file in sorted(alone.glob("rollouts/*/*.jsonl.gz")):
        for a, b in zip(kept_runs.read(file), kept_runs.read(both / file.relative_to(alone)), strict=True):
            assert a.metadata["rollout"]["tokens"] == b.metadata["rollout"]["tokens"]
    shapes = param_specs.abstract(transformer.specs(model))
    for stage in ("sft", "teacher_search", "distill"):
        a, b = (checkpoint.load_params(folder / "stages" / stage / "params", shapes) for folder in (alone, both))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(np.asarray(y), np.asarray(x), rtol=1e-5, atol=1e-5)


def play(spec: str, folder: pathlib.Path, seconds: float) -> list[tuple[int, str, str]]:
    cfg = config.load(spec)
    pipeline.run(cfg, folder / "alone")
    ended = run_two(["run", spec, "--workdir", str(folder / "both")], seconds)
    for code, out, err in ended:
        assert code == 2 and "all checks passed" in out, err[-3000:]
    compare(folder / "alone", folder / "both", cfg.model)
    return ended


def test_two_processes_do_what_one_does(tmp_path):
    ended = play(str(EXPERIMENT), tmp_path, 240)
    nearest = "mesh.shape={'fsdp': 2, 'expert': 2, 'context': 2}"
    refusal = f"a1jax: mesh fsdp 2 x expert 2 needs 4 devices, here are 8; nearest possible: {nearest}"
    for i, (_, out, err) in enumerate(ended):
        lines = [line for line in err.splitlines() if line.startswith("a1jax: ")]
        assert lines == [refusal], err[-2000:]
        assert ("evaluate student: 2/2" in err) == (i == 0)  # the first process's bars, nobody else's
        assert "Traceback" not in err + out
    told = json.loads((tmp_path / "both/run.json").read_text())
    assert told["outcome"] == "finished" and told["devices"] == "8 x cpu in 2 processes" and not (tmp_path / "both-impossible").exists()
    assert {p.name for p in (tmp_path / "alone").iterdir()} | {"config.py", "run.json"} == {p.name for p in (tmp_path / "both").iterdir()}


@pytest.mark.slow
def test_two_processes_with_a_teacher_by_reinforcement(tmp_path):
    play(f"{EXPERIMENT}:long", tmp_path, 580)
