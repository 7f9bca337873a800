"""Mode "full" in stage 3: the same as mode "salient" with k = the vocabulary, whatever the micro-batches; other tokenizers beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import metrics, sharding
from a1jax import params as param_specs
from a1jax.config import ConfigError, bind
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import distill, full, scoring
from a1jax.stages.distill import DistillConfig


def descent(specs, steps):
    """Plain steps along the gradient, which turn no rounding into a step."""
    return optax.sgd(0.5)


CFG = DistillConfig(
    steps=1, prompts=2, lengths=(1,), rows=2, max_length=96, k=640, optimizer=bind(descent), limits=Limits(max_length=96), vocab_block=256
)


@pytest.fixture()
def setting(setting):
    """One layer of attention: what is tested here comes after it."""
    return dataclasses.replace(setting, model=dataclasses.replace(setting.model, num_layers=1, full_attention_interval=1))


@pytest.fixture()
def runs(runs, monkeypatch):
    """Experts' runs, two a domain, which every engine returns."""
    monkeypatch.setattr(Engine, "run", lambda *_, **__: (runs, {}))
    return runs


@pytest.fixture()
def models(setting):
    """The student, and a teacher of its tokenizer for every domain."""
    student = setting.init_params()
    noisy = [jax.tree.map(lambda p, i=i: p + 0.1 * jax.random.normal(jax.random.key(i), p.shape), student) for i in (1, 2)]
    return student, {d: scoring.Teacher(p, setting.model, setting.tokenizer) for d, p in zip(setting.domains, noisy, strict=True)}


def test_a_step_is_mode_salient_with_the_whole_vocabulary(setting, models, runs):
    student, teachers = models
    model = dataclasses.replace(setting.model, load_balance_coef=0.0)  # a router's loss is a mean per micro-batch
    setting = dataclasses.replace(setting, model=model)
    settings = {"salient": CFG, "full": dataclasses.replace(CFG, mode="full", microbatches=2)}
    after = {name: distill.run(cfg, student, teachers, setting, name) for name, cfg in settings.items()}
    lines = {line["stage"]: line for line in metrics.read(setting.workdir)}
    for name in ("loss", "grad_norm", "distill/kl", "distill/teacher_entropy", "distill/tokens"):
        assert lines["full"][name] == pytest.approx(lines["salient"][name], rel=1e-4), name
    assert "distill/coverage" not in lines["full"] and lines["full"]["distill/kl"] > 0.01
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after["salient"], student)
    for a, b, far in zip(*map(jax.tree.leaves, (after["full"], after["salient"], moved)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * far + 1e-7)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_a_step_under_a_mesh_is_that_of_one_device(setting, models, runs):
    student, teachers = models
    model = dataclasses.replace(setting.model, load_balance_coef=0.0)
    cfg = dataclasses.replace(CFG, mode="full", rows=4)
    plain = distill.run(cfg, student, teachers, dataclasses.replace(setting, model=model), "plain")
    here = dataclasses.replace(setting, model=model, mesh=sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4]))
    placed = param_specs.shardings(here.specs, here.mesh)
    with here.on_mesh():
        mine = {d: dataclasses.replace(t, params=jax.device_put(t.params, placed)) for d, t in teachers.items()}
        meshed = distill.run(cfg, jax.device_put(student, placed), mine, here, "meshed")
    lines = {line["stage"]: line for line in metrics.read(setting.workdir)}
    for name in ("loss", "grad_norm", "distill/kl", "distill/tokens"):
        assert lines["meshed"][name] == pytest.approx(lines["plain"][name], rel=1e-5), name
    for a, b, c in zip(*map(jax.tree.leaves, (meshed, plain, student)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b - c).max()) + 1e-7)


def test_the_matrices_of_teachers_are_arguments_and_no_logits_are_made(setting, models, runs, largest):
    student, teachers = models
    cfg = dataclasses.replace(CFG, mode="full")
    made = scoring.make_scorers(teachers, setting.tokenizer, 1, 256, False, False, 96, True)[0]
    source = distill.OnPolicy(cfg, setting, Engine(setting.model, setting.tokenizer, cfg.limits), made)
    state = distill.TrainState(np.int32(0), student, None, None)
    data = distill.weigh(source.next(state)[0], 2, "domain_mean")
    assert [x["hidden"].shape for x in data["full"]] == [(2, 96, setting.model.d_model)] * 2

    def loss(params, data, frozen):
        return distill.loss(params, data, 1.0, setting.model, cfg, frozen=frozen)[0]

    frozen = full.frozen(list(teachers.values()), 64)
    traced = jax.make_jaxpr(jax.grad(loss))(student, data, frozen)
    assert sum(np.size(x) for x in traced.consts) < 640
    cut = dataclasses.replace(cfg, vocab_block=64)
    small = jax.make_jaxpr(jax.grad(lambda p: distill.loss(p, data, 1.0, setting.model, cut, frozen=frozen)[0]))(student)
    assert largest(small.jaxpr) < 4 * 96 * 640 // 2


def test_what_it_cannot_do_is_one_line(setting, models):
    with pytest.raises(ConfigError, match="rows is 3 and microbatches 2"):
        DistillConfig(mode="full", rows=3, microbatches=2)
    student, teachers = models
    stranger = {d: dataclasses.replace(t, vocab_map=object()) for d, t in teachers.items()}
    with pytest.raises(ConfigError, match="another tokenizer, which mode full compares on one device only"):
        full.check(stranger, True)
    full.check(stranger, False)
    full.check(teachers, True)
