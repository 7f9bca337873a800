"""The smoke pipeline as a user runs it: all three stages, killed and started again, finished and started once more."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from a1jax import config, main
from a1jax.config import ConfigError
from a1jax.domains import Search
from a1jax.models import hf
from a1jax.stages import experts, pipeline, teacher

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE = ["run", "experiments/quickstart.py:smoke"]


def command(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "a1jax.main", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished smoke run that was killed once, in the middle of distillation."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    process = command(*SMOKE, "--workdir", str(workdir))
    lines = workdir / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and '"stage": "distill", "step": 2' in lines.read_text()):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workdir / "results.json").exists() and (workdir / "stages/teacher_search/done.json").exists()
    process = command(*SMOKE, "--workdir", str(workdir))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return workdir, out


def test_smoke_runs_all_stages_and_goes_on_after_a_kill(smoke):
    workdir, out = smoke
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["domains"]) == {"search", "tool_calling"} and results["wall_seconds"] > 0
    for row in results["domains"].values():
        assert set(row) >= {"base", "sft", "sft_continued", "teacher", "student", "n"} and row["n"] == 16
    assert set(results["stages"]) == {"sft", "teacher_search", "teacher_tool_calling", "distill", "sft_continued"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "distill"]
    assert steps == sorted(set(steps)) == [1, 2, 3]  # the lines of the killed step were not kept twice
    assert "tool_calling" in out and "Wall clock" in out
    assert json.loads((workdir / "run.json").read_text())["outcome"] == "finished"


def test_a_run_leaves_its_report_picture_board_and_config(smoke):
    workdir, _ = smoke
    assert (workdir / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| domain | n | base | sft |" in (workdir / "report.md").read_text()
    assert any((workdir / "tensorboard").rglob("events.out.*"))
    assert config.load(str(workdir / "config.py")) == config.load(str(ROOT / "experiments/quickstart.py") + ":smoke")


def test_a_finished_run_says_so_and_prints_its_table(smoke):
    workdir, out = smoke
    before = (workdir / "results.json").read_bytes()
    process = command(*SMOKE, "--workdir", str(workdir))
    again, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "is finished" in again and again.split("Success on")[1] == out.split("Success on")[1]
    assert (workdir / "results.json").read_bytes() == before


def test_a_stage_of_a_run_can_be_exported(smoke, tmp_path):
    """The quickstart's model scales its embedding, which theirs does not: it is written as two tables."""
    assert main.main(["export", str(smoke[0]), str(tmp_path / "out"), "--stage", "distill"]) == 0
    params, cfg = hf.load(tmp_path / "out")
    assert not cfg.tie_embeddings and cfg.d_model**0.5 * abs(params["lm_head"] - params["embed_tokens"] / cfg.d_model**0.5).max() < 1e-5


def quickstart():
    return config.load(str(ROOT / "experiments/quickstart.py"))


def test_control_costs_what_distillation_costs():
    cfg = quickstart()
    d, s = cfg.distill, cfg.sft
    flops = d.steps * len(cfg.domains) * d.rows * d.max_length * 10  # 6 to train, 2 to score, 2 to sample
    control = pipeline.control_config(cfg)
    assert abs(control.steps * s.rows * s.max_length * 6 - flops) <= 6 * s.rows * s.max_length
    assert control.phases == () and control.optimizer == s.optimizer


def test_a_teacher_is_admitted_only_where_it_is_better():
    better, same = {"search": {"success": 0.6}}, {"search": {"success": 0.5}}
    assert teacher.admitted(better, same, "search") and not teacher.admitted(same, same, "search")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("domains=('search', 'chess')", "domains has 'chess'"),
        ("tokenizer.vocab_size=500", "make them equal"),
        ("distill.max_length=64", "DistillConfig.max_length"),
    ],
)
def test_configs_that_do_not_fit_together_are_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        config.override(quickstart(), [assignment])


def test_every_family_that_tasks_are_drawn_from_is_known():
    cfg, families = quickstart(), [Search(degree=degree) for degree in (2, 4, 6)]
    both = {
        name: dataclasses.replace(getattr(cfg, name), of={"search": (experts.Runs({1: 1}, family),)})
        for name, family in zip(("evaluation", "admission"), families, strict=False)
    }
    distil = dataclasses.replace(cfg.distill, of={"search": (experts.Prompts((1,), families[2]),)})
    found = dataclasses.replace(cfg, distill=distil, **both).every_family()
    assert found == [*cfg.every_family(), *families]


def test_teachers_are_judged_elsewhere_only_where_asked(setting, monkeypatch):
    cfg = config.load(str(ROOT / "experiments/quickstart.py"))
    monkeypatch.setattr(pipeline.evaluate, "run", lambda cfg, params, engine, families, name, path: sorted(families))
    models = dict.fromkeys(("sft", "teacher_search", "teacher_tool_calling", "student"))
    everything = ["search", "tool_calling"]
    assert pipeline.judge_all(cfg, setting, models, {}) == dict.fromkeys(models, everything)
    found = pipeline.judge_all(dataclasses.replace(cfg, elsewhere=False), setting, models, {})
    assert found == {"sft": everything, "teacher_search": ["search"], "teacher_tool_calling": ["tool_calling"], "student": everything}
