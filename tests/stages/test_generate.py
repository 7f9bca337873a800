"""Generated files: the asked mean length, only accepted tasks, careless runs among them, one line for what cannot be."""

import statistics

import pytest

from a1jax import main
from a1jax.config import ConfigError
from a1jax.data import trajectories
from a1jax.domains import DOMAINS, solve
from a1jax.stages import generate
from a1jax.types import FAILED, FINISHED


@pytest.mark.parametrize("name", ("search", "science", "tool_calling", "instruction_following", "long_context"))
@pytest.mark.parametrize("horizon", (700, 3000))
def test_the_mean_hits_the_horizon(tmp_path, name, horizon):
    generate.generate(name, 6, horizon, tmp_path / "runs.jsonl.gz")
    runs, _ = trajectories.read_all(tmp_path / "runs.jsonl.gz", strict=True)
    assert len(runs) == 6 and all(run.status == FINISHED for run in runs)
    assert statistics.mean(map(generate.counter(None), runs)) == pytest.approx(horizon, rel=0.07)


def test_a_share_of_runs_is_careless_and_failed(tmp_path):
    generate.generate("tool_calling", 8, 700, tmp_path / "runs.jsonl", failures=0.5)
    runs, _ = trajectories.read_all(tmp_path / "runs.jsonl", strict=True)
    failed = [run for run in runs if run.status == FAILED]
    assert len(failed) == 4 and all(run.reward == 0.0 and run.metadata["careless"] in generate.CARELESS for run in failed)


def test_same_seed_same_file(tmp_path):
    for name in ("a", "b"):
        generate.generate("search", 3, 800, tmp_path / f"{name}.jsonl", seed=5, failures=0.4)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_long_tasks_come_evenly():
    made = generate.Plan(DOMAINS["search"], 2, 3, 0.25)
    assert sum(made.steps(i) == 3 for i in range(100)) == 25


@pytest.mark.parametrize("name", DOMAINS)
def test_a_careless_run_fails(name):
    task = DOMAINS[name].propose(1, 3)
    assert all(generate.careless(task, solve(task), seed).status == FAILED for seed in range(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"name": "x"}, "no such family"), ({"horizon": 20}, "shortest"), ({"failures": 2.0}, "between"), ({"out": "x.txt"}, "jsonl")],
)
def test_what_cannot_be_is_one_line(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says) as error:
        generate.generate(**{"name": "search", "tasks": 2, "horizon": 700, "out": tmp_path / "x.jsonl", **change})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_writes_the_file_and_prints_statistics(tmp_path, capsys):
    out = str(tmp_path / "runs.jsonl")
    assert main.main(["generate", "--domain", "search", "--tasks", "2", "--horizon", "900", "--out", out, "--set", "degree=2"]) == 0
    assert "2 runs, 2 finished" in capsys.readouterr().out
