"""The files of experiments/ablations: every cell of every one can be built; the three stages' values change what they say, and run."""

import ast
import collections
import dataclasses
import json
import pathlib
import re

import pytest

from a1jax import config
from a1jax.config import ConfigError
from a1jax.stages import ablation_cell, shared_stages, sweep
from a1jax.stages.ablation_cell import Value

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("experiments/ablations/*.py"))
THREE = ROOT / "experiments/ablations/three_stages.py"


def arguments(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"a1jax run experiments/ablations/{path.name}" in docstring
    return ["", *sorted(set(re.findall(rf"experiments/ablations/{re.escape(path.name)}:([\w,=.+-]*\w)", docstring)))]


@pytest.mark.parametrize(("path", "arg"), [(p, arg) for p in FILES for arg in arguments(p)], ids=lambda x: getattr(x, "stem", x))
def test_every_cell_of_every_file_can_be_built(path, arg, tmp_path):
    cfg = config.load(f"{path}:{arg}")
    config.check(cfg)
    config.save(cfg, tmp_path / "config.py")
    assert config.diff(config.load(str(tmp_path / "config.py")), cfg) == []
    planned = cfg.cells()
    assert planned and len({cell.name for cell in planned}) == len(planned)
    for cell in planned:
        config.check(cell.config)
        assert all(isinstance(value, str | int | float) for value in cell.axes.values())
    with pytest.raises(ConfigError, match="no argument 'no_such_arg'"):
        config.load(f"{path}:no_such_arg")


@pytest.fixture(scope="module")
def planned():
    return {cell.name: cell for cell in config.load(str(THREE)).cells()}


def test_ablations_meet_in_the_unchanged_student_and_differ_elsewhere(planned):
    folders = collections.defaultdict(list)
    for name, cell in planned.items():
        folders[shared_stages.folder_of(cell.config.experiment, cell.config.judged, pathlib.Path())].append(name)
    together = {tuple(sorted(n.removesuffix("-s1") for n in names)) for names in folders.values() if names[0].endswith("-s1") and names[1:]}
    assert together == {
        ("divergence-reverse", "modes-tail", "reduction-domain_mean", "routing-hard", "stages-student", "writers-student"),
        ("k-full", "modes-full"),
        ("active_experts-2_of_8", "experts-8_experts", "stages-sft"),
    }


def test_every_value_changes_what_it_says(planned):
    def distill(name):
        return planned[f"{name}-s0"].config.experiment.distill

    plain = distill("stages-student")
    assert (plain.mode, plain.k, plain.divergence, plain.reduction) == ("tail", 16, "reverse", "domain_mean")
    assert (plain.own_weight, plain.rollouts) == (1.0, "student")
    expected = {
        **{f"k-{k}": {"mode": "salient", "k": k} for k in (8, 32, 128)},
        **{f"modes-{mode}": {"mode": mode} for mode in ("salient", "tail", "full", "sampled")},
        **{f"divergence-{name}": {"divergence": name} for name in ("reverse", "forward", "jensen_shannon")},
        **{f"reduction-{name}": {"reduction": name} for name in ("domain_mean", "sample_mean", "token_mean")},
        **{f"routing-{name}": {"own_weight": weight} for name, weight in (("hard", 1.0), ("own_0.8", 0.8), ("uniform", 0.5))},
        **{f"writers-{name}": {"rollouts": name} for name in ("student", "teacher")},
    }
    for name, changes in expected.items():
        assert distill(name) == dataclasses.replace(plain, **changes), name
    for name, cell in planned.items():
        model = cell.config.experiment.model
        if "experts" in name:
            assert cell.config.judged == "sft" and model.num_experts_active * model.expert_width == 128
        if name.startswith("active_experts"):
            assert model.num_experts * model.expert_width == 512
        assert cell.config.experiment.seed == cell.axes["seed"]


def test_every_ablation_is_compared_with_what_leaves_the_experiment_as_it_is(planned):
    found = {(c.axes["ablation"], c.config.against, c.config.unchanged) for c in planned.values()}
    assert found == {
        ("stages", "student", True), ("k", "8", False), ("modes", "tail", True), ("divergence", "reverse", True),
        ("reduction", "domain_mean", True), ("routing", "hard", True), ("writers", "student", True), ("experts", "8_experts", True),
        ("active_experts", "2_of_8", True),
    }  # fmt: skip


def test_curves_of_what_teachers_wrote_say_nothing_of_the_writer(planned):
    line = {"step": 1, "stage": "distill", "distill/kl": 0.5, "rollout/success/search": 0.9, "rollout/entropy": 0.1, "rollout/seconds": 2.0}

    def names(cell, stage):
        return set(ablation_cell.curves([line], ablation_cell.shown(planned[cell].config.experiment, stage)))

    assert names("writers-student-s0", "distill") == {"distill/kl", "rollout/success/search", "rollout/entropy"}
    assert names("writers-teacher-s0", "distill") == {"distill/kl"}
    assert "rollout/entropy" in names("writers-teacher-s0", "teacher_search")  # a teacher's reinforcement is by its own runs


def test_a_cell_is_put_off_while_its_model_is_made_elsewhere(planned, tmp_path):
    def busy():
        return {name for name, cell in planned.items() if cell.busy(cell.config, tmp_path / "cells" / name)}

    student = planned["stages-student-s0"].config.experiment
    with shared_stages.alone(shared_stages.folder_of(student, "student", tmp_path / "shared")):
        unchanged = {"divergence-reverse", "modes-tail", "reduction-domain_mean", "routing-hard", "stages-student", "writers-student"}
        assert busy() == {f"{name}-s0" for name in unchanged}
    assert busy() == set()


def test_a_change_that_does_not_fit_names_its_value():
    base = config.load(f"{ROOT}/experiments/quickstart.py")
    with pytest.raises(ConfigError, match="ablations.k.9: distill.kk: no such field"):
        ablation_cell.cells(base, {"k": {"9": Value(("distill.kk=9",))}})
    with pytest.raises(ConfigError, match="seeds is empty"):
        ablation_cell.cells(base, {"k": {"9": Value()}}, seeds=())
    assert ablation_cell.cells(base, {"k": {}}) == []


def test_a_cell_is_trained_judged_and_read_back_where_another_asks_for_the_same(small_experiment, tmp_path, monkeypatch):
    values = {"stages": {"sft": Value(judged="sft")}, "experts": {"8_experts": Value(judged="sft"), "other": Value(("seed=1",), "sft")}}
    first, same, other = ablation_cell.cells(small_experiment, values, seeds=(0,))
    assert sweep.run_cell(first, tmp_path, {}).startswith("success search ")
    monkeypatch.setattr(shared_stages.pipeline, "train_sft", None)
    sweep.run_cell(same, tmp_path, {})
    found, again = (json.loads((tmp_path / "cells" / cell.name / "cell.json").read_text()) for cell in (first, same))
    assert [task["steps"] for task in found["tasks"]] == [1, 1] * 2 and again["tasks"] == found["tasks"]
    assert {task["domain"] for task in found["tasks"]} == {"search", "tool_calling"}
    assert found["train"]["steps"] == 2 and 0 < found["train"]["tokens"] <= 2 * 2 * 96 and found["train"]["flops"] > 0
    assert set(found["curves"]) == {"sft/ce/loss"} and found["seconds"]["train"] > found["seconds"]["shared_train"] == 0
    assert found["against"] == {"value": "sft", "unchanged": True} and found["train"]["model"] == again["train"]["model"]
    assert again["axes"] == {"ablation": "experts", "value": "8_experts", "seed": 0}
    assert "failed" in sweep.run_cell(other, tmp_path, {})  # another seed has to be trained


@pytest.mark.slow
def test_a_student_a_mixture_and_its_teachers_are_cells(small_experiment, tmp_path):
    values = {
        "stages": {"teachers": Value(judged="teachers"), "student": Value()},
        "routing": {"uniform": Value(("distill.own_weight=0.5",))},
        "writers": {"teacher": Value(('distill.rollouts="teacher"',))},
    }
    cells = {cell.name: cell for cell in ablation_cell.cells(small_experiment, values, seeds=(0,))}
    for cell in cells.values():
        assert "failed" not in sweep.run_cell(cell, tmp_path, {})
    found = {name: json.loads((tmp_path / "cells" / name / "cell.json").read_text()) for name in cells}
    assert {len(cell["tasks"]) for cell in found.values()} == {4} and len({t["task_id"] for c in found.values() for t in c["tasks"]}) == 4
    stages = ["sft", "teacher_search", "teacher_tool_calling"]
    assert list(found["stages-teachers-s0"]["train"]["stages"]) == stages
    student = found["stages-student-s0"]["train"]
    assert list(student["stages"]) == [*stages, "distill"] and set(student["taught_by"]) == {"search", "tool_calling"}
    seen = {name: {curve.partition("/")[0] for curve in cell["curves"]} for name, cell in found.items()}
    assert seen.pop("stages-teachers-s0") == set(stages[1:]) and set.union(*seen.values()) == {"distill"}
    of_student, off_policy = (set(found[f"{name}-s0"]["curves"]) for name in ("stages-student", "writers-teacher"))
    assert "distill/distill/kl" in off_policy
    assert of_student - off_policy == {f"distill/rollout/{name}" for name in ("entropy", "success/search", "success/tool_calling")}
    took = {name: sum(student["stages"][stage]["seconds"] for stage in names) for name, names in (("own", ["distill"]), ("shared", stages))}
    assert found["stages-student-s0"]["seconds"] == {"train": took["own"], "shared_train": pytest.approx(took["shared"])}
    assert found["stages-teachers-s0"]["seconds"]["shared_train"] == student["stages"]["sft"]["seconds"]
    each = [found[f"{name}-s0"]["train"]["stages"]["distill"] for name in ("stages-student", "routing-uniform")]
    rates = [one["flops"] / one["tokens"] for one in each]
    assert rates[1] > 1.15 * rates[0]  # scored by two
