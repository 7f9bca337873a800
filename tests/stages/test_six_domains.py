"""The six domains' smoke run as a user starts it: `pytest -m slow -n 0 tests/stages/test_six_domains.py`, about 100 s on 2 cores."""

import json
import pathlib

import pytest

from a1jax import config, main, metrics
from a1jax.stages import kept_runs
from a1jax.types import STATUSES

SMOKE = str(pathlib.Path(__file__).resolve().parents[2] / "experiments/six_domains.py") + ":smoke"


@pytest.mark.slow
def test_six_teachers_by_six_recipes_make_one_student(tmp_path, capsys):
    cfg, workdir = config.load(SMOKE), tmp_path / "run"
    assert main.main(["run", SMOKE, "--workdir", str(workdir)]) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["domains"]) == list(cfg.domains) and len(cfg.domains) == 6 and results["wall_seconds"] > 0
    teachers = {d: f"teacher_{d}" for d in cfg.domains}
    for domain, row in results["domains"].items():
        assert row["n"] == sum(sum(runs.counts.values()) for runs in cfg.evaluation.of[domain]) > 0
        assert row["taught_by"] in ("sft", teachers[domain])
        assert all(0 <= row[column] <= 1 for column in ("base", "sft", "sft_continued", "teacher", "student"))
        for name in ("base", "sft", "sft_continued", "student", teachers[domain]):
            scored = results["scores"][name][domain]
            assert sum(scored["statuses"].values()) == scored["n"] == row["n"] and set(scored["statuses"]) <= set(STATUSES)
    assert set(results["stages"]) == {"sft", *teachers.values(), "distill", "sft_continued"}

    lines = metrics.read(workdir)
    for domain, teacher in cfg.teachers.items():
        steps = [(getattr(phase, "steps", 0) or phase.sft.steps) for phase in teacher.recipe]
        facts = results["stages"][teachers[domain]]
        assert facts["steps"] == sum(steps) and len(facts.get("phases", [""])) == len(steps)
    reinforced = {line["stage"] for line in lines if "grpo/reward" in line}
    assert reinforced == {
        "teacher_search_2_grpo",
        "teacher_engineering_2_grpo",
        "teacher_instruction_following_1_grpo",
        "teacher_instruction_following_2_grpo",
        "teacher_tool_calling_2_grpo",
        "teacher_general_2_grpo",
    }
    for stage in reinforced | {"distill"}:
        (first, *_) = sorted((workdir / "rollouts" / stage).iterdir())
        assert kept_runs.read(first)
    for name in ("report.md", "report.html", "curves.png"):
        assert (workdir / name).stat().st_size > 0
    said = capsys.readouterr().out
    assert "Wall clock" in said and all(domain in said for domain in cfg.domains)
