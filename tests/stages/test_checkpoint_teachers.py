"""The pipeline with a teacher that exists already: stage 2 passes it by; it acts in its own tokens, and is not stored."""

import dataclasses
import pathlib

import jax
import pytest

from a1jax import checkpoint, config, metrics
from a1jax import params as param_specs
from a1jax.config import ConfigError
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import QUICKSTART
from a1jax.models import transformer
from a1jax.stages import cross_tokenizer, experts, folders, pipeline, scoring

SMOKE = str(pathlib.Path(__file__).resolve().parents[2] / "experiments/quickstart.py") + ":smoke"


@pytest.fixture(scope="module")
def cfg(small_model, tmp_path_factory):
    """The smoke quickstart on a small model; search has a teacher of another tokenizer and no stage 2."""
    folder = tmp_path_factory.mktemp("teacher")
    families = tuple(QUICKSTART.values())
    train_sentencepiece(
        experts.tokenizer_texts(families, 0), folder / "tokenizer.model", vocab_size=608, symbols=cross_tokenizer.digits(families)
    )
    model = dataclasses.replace(small_model, vocab_size=608, d_model=24)
    checkpoint.save_params(folder / "params", param_specs.init(transformer.specs(model), jax.random.key(3)))
    folders.write_model(folder, model, {})
    cfg = config.load(SMOKE)
    return dataclasses.replace(
        cfg,
        model=small_model,
        teachers={"tool_calling": cfg.teachers["tool_calling"]},
        checkpoints={"search": scoring.Checkpoint(str(folder))},
        distill=dataclasses.replace(cfg.distill, teacher_max_length=200),
    )


@pytest.fixture()
def acts(monkeypatch):
    """What is trained, who is evaluated with which engine, and who teaches; nothing is computed."""
    seen = {"trained": [], "evaluated": [], "taught": None}

    def train(cfg, params, source, setting, stage="sft"):
        seen["trained"].append(stage)
        return {"name": stage}

    def train_teacher(cfg, params, data, setting, domain, show_tools):
        return train(cfg, params, data, setting, f"teacher_{domain}")

    def evaluate(cfg, params, engine, domains, name, path, use="heldout"):
        seen["evaluated"].append((name, params, engine, tuple(domains)))
        return {d: {"success": float(name.startswith("teacher")), "n": 1} for d in domains}

    def distil(cfg, params, teachers, setting, stage="distill"):
        seen["taught"] = teachers
        return {"name": stage}

    monkeypatch.setattr(pipeline.sft, "run", train)
    monkeypatch.setattr(pipeline.teacher, "run", train_teacher)
    monkeypatch.setattr(pipeline.evaluate, "run", evaluate)
    monkeypatch.setattr(pipeline.distill, "run", distil)
    monkeypatch.setattr(pipeline.Setting, "facts", lambda self, stage: {"stage": stage})
    return seen


def test_a_checkpoint_takes_the_place_of_stage_two(cfg, acts, tmp_path):
    results = pipeline.run(cfg, tmp_path)
    assert acts["trained"] == ["sft", "teacher_tool_calling", "sft_continued"] and "teacher_search" not in results["stages"]
    own, foreign = acts["taught"]["tool_calling"], acts["taught"]["search"]
    assert own.params == {"name": "teacher_tool_calling"} and own.vocab_map is None and own.model == cfg.model
    assert foreign.vocab_map.mode == "two_sided" and foreign.model.d_model == 24
    assert {d: results["domains"][d]["taught_by"] for d in cfg.domains} == {d: f"teacher_{d}" for d in cfg.domains}
    actors = {name: (params, engine) for name, params, engine, _ in acts["evaluated"]}
    for name in ("teacher_search (admission)", "teacher_search"):
        params, engine = actors[name]
        assert params is foreign.params and engine.tokenizer is foreign.tokenizer and engine.cfg == foreign.model
        turn = -(-cfg.limits.max_turn_tokens * 200 // cfg.limits.max_length)
        assert turn > cfg.limits.max_turn_tokens  # its tokens are other ones, and more of them
        assert engine.limits == dataclasses.replace(cfg.limits, max_length=200, max_turn_tokens=turn)
    assert actors["student"][1].limits == cfg.limits and actors["student"][1].cfg == cfg.model
    assert not list(tmp_path.glob("stages/*"))  # no copy of what it was given


def test_a_checkpoint_that_is_not_better_does_not_teach(cfg, acts, monkeypatch, tmp_path):
    def evaluate(cfg, params, engine, domains, name, path, use="heldout"):
        return {d: {"success": float("tool_calling" in name), "n": 1} for d in domains}

    monkeypatch.setattr(pipeline.evaluate, "run", evaluate)
    with metrics.Writer(tmp_path) as writer:
        setting = pipeline.open_setting(cfg, tmp_path, writer)
        _, chosen = pipeline.train_all(cfg, setting, pipeline.open_checkpoints(cfg, setting))
    assert chosen == {"search": "sft", "tool_calling": "teacher_tool_calling"}
    assert acts["taught"]["search"].params == {"name": "sft"} and acts["taught"]["search"].vocab_map is None


def test_configs_of_checkpoints_that_do_not_fit_are_refused(cfg, acts, tmp_path):
    source = cfg.checkpoints["search"]
    with pytest.raises(ConfigError, match="checkpoints has 'chess', which is not among domains"):
        dataclasses.replace(cfg, checkpoints={"search": source, "chess": source})
    with pytest.raises(ConfigError, match="teachers has nothing for domain 'search'"):
        dataclasses.replace(cfg, checkpoints={})
    missing = dataclasses.replace(cfg, checkpoints={"search": dataclasses.replace(source, params=str(tmp_path / "none"))})
    with pytest.raises(ConfigError, match="none: no such folder"):
        pipeline.run(missing, tmp_path / "run")
    other = config.override(cfg, ["checkpoints.search.alignment='shared'"])
    assert other.checkpoints["search"].alignment == "shared"
    with pytest.raises(ConfigError, match="cannot be cut over tensor 3"):  # 608 ids of that teacher's
        pipeline.run(config.override(cfg, ["mesh.shape={'tensor': 3}"]), tmp_path / "mesh")
    assert acts["trained"] == []  # all of it before anything is trained
