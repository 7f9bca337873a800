"""What runs have in common is trained once: which settings make another folder, who waits for whom, what is read back."""

import dataclasses
import pathlib
import threading
import time

import pytest

from a1jax import config
from a1jax.stages import pipeline, shared_stages

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path("shared")


@pytest.fixture(scope="module")
def base():
    return config.load(f"{ROOT}/experiments/quickstart.py:smoke")


def folders(cfg):
    return {judged: shared_stages.folder_of(cfg, judged, HERE) for judged in ("sft", "teachers", "sft_continued", "student")}


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ("distill.k=8", {"student"}),
        ("distill.own_weight=0.5", {"student", "sft_continued"}),  # scoring by all costs more, so the control trains longer
        ("control.steps=7", {"sft_continued"}),
        ("admission.seed=1", {"teachers", "student"}),
        ("teachers.search.recipe.0.sft.steps=7", {"teachers", "student"}),
        ("sft.steps=13", {"sft", "teachers", "sft_continued", "student"}),
        ("model.num_experts=4", {"sft", "teachers", "sft_continued", "student"}),
        ("seed=1", {"sft", "teachers", "sft_continued", "student"}),
        ("evaluation.seed=1", set()),
        ("name=other", set()),
    ],
)
def test_a_model_stands_in_a_folder_of_all_that_it_depends_on(base, change, others):
    cfg = dataclasses.replace(base, control=None) if change.startswith("distill") else base
    before, after = folders(cfg), folders(config.override(cfg, [change]))
    assert {name for name in before if before[name] != after[name]} == others
    assert folders(cfg) == before and len(set(before.values())) == 4


def test_only_one_trains_in_a_folder(tmp_path):
    order = []

    def other():
        with shared_stages.alone(tmp_path / "model"):
            order.append("other")

    with shared_stages.alone(tmp_path / "model"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.5)
        order.append("first")
        with shared_stages.alone(tmp_path / "another"):  # which nobody has
            order.append("another")
    thread.join(10)
    assert order == ["first", "another", "other"]


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ("sft", {"sft", "teachers", "sft_continued", "student"}),
        ("teachers", {"teachers", "student"}),
        ("sft_continued", {"sft_continued"}),
        ("student", {"student"}),
    ],
)
def test_a_model_is_busy_while_somebody_is_at_it_or_at_what_it_is_trained_from(base, held, expected, tmp_path):
    def busy():
        return {judged for judged in folders(base) if shared_stages.busy(base, judged, tmp_path)}

    assert busy() == set() and not list(tmp_path.iterdir())
    with shared_stages.alone(shared_stages.folder_of(base, held, tmp_path)):
        assert busy() == expected
    assert busy() == set()


@pytest.mark.slow
def test_stages_are_those_of_the_pipeline_and_are_read_back(small_experiment, tmp_path, monkeypatch):
    """Bit for bit the models of ``pipeline.run``; a second call trains nothing."""
    import jax
    import numpy as np

    from a1jax import metrics

    made = {judged: shared_stages.train(small_experiment, judged, tmp_path / "shared") for judged in ("student", "sft_continued")}
    with metrics.Writer(tmp_path / "whole") as writer:
        setting = pipeline.open_setting(small_experiment, tmp_path / "whole", writer)
        models, chosen = pipeline.train_all(small_experiment, setting, {})
    assert made["student"].chosen == chosen
    for name, params in models.items():
        if name != "base":
            found = made["sft_continued" if name == "sft_continued" else "student"].models[name]
            jax.tree.map(np.testing.assert_array_equal, found, params)
    monkeypatch.setattr(pipeline.sft.train, "fit", None)  # whatever trains calls it
    monkeypatch.setattr(pipeline, "stage_data", None)
    again = shared_stages.train(small_experiment, "student", tmp_path / "shared")
    jax.tree.map(np.testing.assert_array_equal, again.models, made["student"].models)
    assert list(again.stages) == ["sft", "teacher_search", "teacher_tool_calling", "distill"]
