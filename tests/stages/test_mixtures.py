"""A mixture of teachers in stage 3: against the dense formula, with hard routing as its end; slow (``-m slow``): the loss, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params, sharding
from a1jax.config import ConfigError
from a1jax.models import transformer
from a1jax.rollout.agent import Limits
from a1jax.stages import distill, mixtures, pipeline, scoring
from a1jax.stages.distill import DistillConfig

CFG = DistillConfig(prompts=2, lengths=(1,), rows=2, max_length=96, k=6, limits=Limits(max_length=96), vocab_block=256)


@pytest.fixture()
def models(setting):
    """The student, and a teacher of its tokenizer for every domain, the second of another width."""
    student = setting.init_params()
    noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), student)
    wide = dataclasses.replace(setting.model, d_model=24)
    other = params.init(transformer.specs(wide), jax.random.key(2))
    made = (scoring.Teacher(noisy, setting.model, setting.tokenizer), scoring.Teacher(other, wide, setting.tokenizer))
    return student, dict(zip(setting.domains, made, strict=True))


def probabilities(teacher, batch):
    hidden, _ = transformer.apply(teacher.params, batch.tokens, batch.positions, batch.segment_ids, teacher.model)
    logits = np.asarray(transformer.head(teacher.params, hidden, teacher.model), np.float64)
    each = np.exp(logits - logits.max(-1, keepdims=True))
    return each / each.sum(-1, keepdims=True)


def test_weights_by_hand():
    assert mixtures.weights(0.5, 1, 3) == (0.25, 0.5, 0.25)
    assert mixtures.weights(1.0, 0, 2) == (1.0, 0.0) and mixtures.weights(0.0, 0, 2) == (0.0, 1.0)
    assert mixtures.weights(0.3, 0, 1) == (1.0,)  # the only teacher there is


def test_the_targets_are_the_weighted_mean_of_all_teachers_distributions(setting, models, runs):
    _, teachers = models
    first, second = teachers
    placed = distill.pack_domain([r for r in runs if r.domain == second], 1, 2, 96)
    batch = jax.tree.map(jnp.asarray, placed.batch)
    mean = 0.75 * probabilities(teachers[second], batch) + 0.25 * probabilities(teachers[first], batch)
    scorer = mixtures.make_scorers(teachers, 0.75, setting.tokenizer, 6, 256, False)[second]
    same, scores, shares = scorer.score(placed, batch)
    assert same is batch and shares == {} and (scores["teacher_logsumexp"] == 0).all()
    order = np.argsort(-mean, axis=-1, kind="stable")[..., :6]
    np.testing.assert_allclose(np.exp(scores["teacher_logits"]), np.take_along_axis(mean, order, -1), rtol=1e-4)
    assert (np.asarray(scores["support"]) == order).mean() > 0.99  # equal ones may be told apart by rounding
    written = mixtures.make_scorers(teachers, 0.75, setting.tokenizer, 6, 256, True)[second].score(placed, batch)[1]["score"]
    expected = np.take_along_axis(mean, np.asarray(batch.targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(written), expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["salient", "sampled"])
def test_all_weight_on_the_own_teacher_is_hard_routing(setting, models, runs, mode):
    """Exactly: the same numbers, whichever way they are asked for."""
    _, teachers = models
    sampled = mode == "sampled"
    hard, _ = distill.make_scorers(dataclasses.replace(CFG, mode=mode), teachers, setting)
    assert isinstance(hard[setting.domains[0]], scoring.Scorer)
    soft = mixtures.make_scorers(teachers, 1.0, setting.tokenizer, CFG.k, 256, sampled)
    for index, domain in enumerate(setting.domains):
        placed = distill.pack_domain([r for r in runs if r.domain == domain], index, 2, 96)
        batch = jax.tree.map(jnp.asarray, placed.batch)
        expected, got = (each[domain].score(placed, batch)[1] for each in (hard, soft))
        assert expected.keys() == got.keys()
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-6 if sampled else 0)


@pytest.mark.slow
def test_the_loss_of_a_teacher_mixed_with_itself_is_that_of_hard_routing(setting, models, runs):
    """By the path that takes the sum, in the mode that compares the rest as well: value and gradient. Another teacher's part moves them."""
    student, teachers = models
    one, cfg = dict.fromkeys(setting.domains, teachers[setting.domains[0]]), dataclasses.replace(CFG, mode="tail")
    model = dataclasses.replace(setting.model, load_balance_coef=0.0)
    step = jax.jit(jax.value_and_grad(lambda params, data: distill.loss(params, data, 1.0, model, cfg)[0]))

    def of(who, own_weight):
        scorers, members = distill.make_scorers(dataclasses.replace(cfg, own_weight=own_weight), who, setting)
        assert members is None
        pieces = []
        for index, domain in enumerate(setting.domains):
            placed = distill.pack_domain([r for r in runs if r.domain == domain], index, 2, 96)
            batch, scores, _ = scorers[domain].score(placed, jax.tree.map(jnp.asarray, placed.batch))
            pieces.append({"batch": batch, **scores})
        return step(student, distill.weigh(jax.tree.map(lambda *x: jnp.concatenate(x), *pieces), 2, "domain_mean"))

    hard, soft, other = of(one, 1.0), of(one, 0.6), of(teachers, 0.6)
    np.testing.assert_allclose(soft[0], hard[0], rtol=1e-4)
    assert abs(other[0] - hard[0]) > 0.002 * hard[0]  # twenty times what the sum may differ by
    for a, b in zip(*map(jax.tree.leaves, (soft[1], hard[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_scores_on_a_mesh_are_those_of_one_device(setting, models, runs):
    _, teachers = models
    placed = distill.pack_domain(runs[:2], 0, 2, 96)
    domain, found = setting.domains[0], []
    for mesh in (None, sharding.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        here = dataclasses.replace(setting, mesh=mesh)
        with here.on_mesh():
            mine = teachers
            if mesh is not None:
                mine = {
                    d: dataclasses.replace(t, params=jax.device_put(t.params, params.shardings(transformer.specs(t.model), mesh)))
                    for d, t in teachers.items()
                }
            scorer = mixtures.make_scorers(mine, 0.5, setting.tokenizer, CFG.k, 256, False)[domain]
            found.append(scorer.score(placed, here.put(jax.tree.map(jnp.asarray, placed.batch)))[1])
    np.testing.assert_allclose(found[1]["teacher_logits"], found[0]["teacher_logits"], atol=2e-5)
    seen = placed.batch.segment_ids > 0
    assert (np.asarray(found[1]["support"]) == np.asarray(found[0]["support"]))[seen].mean() > 0.99


def test_scoring_by_all_teachers_is_paid_for_in_the_control():
    from a1jax import config

    cfg = config.load("experiments/quickstart.py")
    soft = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, own_weight=0.5))
    assert pipeline.distill_flops_in_sft_steps(soft) == pytest.approx(1.2 * pipeline.distill_flops_in_sft_steps(cfg))


def test_what_cannot_be_mixed_is_one_line(setting, models):
    for own_weight in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="it is a share of the target, from 0 to 1"):
            DistillConfig(own_weight=own_weight)
    with pytest.raises(ConfigError, match="own_weight is 0.5 in mode 'full'"):
        DistillConfig(own_weight=0.5, mode="full")
    student, teachers = models
    stranger = {d: dataclasses.replace(t, vocab_map=object()) for d, t in teachers.items()}
    with pytest.raises(ConfigError, match="the teacher of search has another tokenizer than .*set own_weight=1.0"):
        distill.run(dataclasses.replace(CFG, own_weight=0.5), student, stranger, setting)
