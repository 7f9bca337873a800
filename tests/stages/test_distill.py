"""Stage 3: who scores what, what the loss does to the student, and that a killed run goes on bitwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import metrics, optim, params, sharding, train
from a1jax.config import ConfigError, bind
from a1jax.data import packing
from a1jax.models import transformer
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import distill, scoring
from a1jax.stages.distill import DistillConfig
from a1jax.types import ABORTED, FAILED, TRUNCATED, Rollout

LIMITS = Limits(slots=4, max_turns=3, max_turn_tokens=8, max_length=80, temperature=1.0)
CFG = DistillConfig(
    steps=4,
    prompts=3,
    lengths=(1, 2),
    rows=3,
    max_length=80,
    k=8,
    optimizer=bind(optim.muon, learning_rate=0.1, table_learning_rate=0.05),
    limits=LIMITS,
    save_every=2,
    vocab_block=256,
)


@pytest.fixture()
def models(setting):
    return student_and_teachers(setting)


def student_and_teachers(setting):
    """The student and two teachers that differ from it and from each other."""
    student = setting.init_params()
    noisy = [jax.tree.map(lambda p, i=i: p + 0.1 * jax.random.normal(jax.random.key(i), p.shape), student) for i in (1, 2)]
    return student, dict(zip(setting.domains, noisy, strict=True))


def taught(setting, teachers):
    """The teachers as ``distill.run`` takes them, of the setting's own model and tokenizer."""
    return {d: scoring.Teacher(p, setting.model, setting.tokenizer) for d, p in teachers.items()}


def on_policy(cfg, setting, teachers):
    """The source of ``distill.run``."""
    engine = Engine(setting.model, setting.tokenizer, cfg.limits)
    made = scoring.make_scorers(
        taught(setting, teachers), setting.tokenizer, cfg.k, cfg.vocab_block, cfg.mode == "sampled", False, cfg.max_length
    )
    return distill.OnPolicy(cfg, setting, engine, made[0])


def rollout(status=FAILED, n=20, domain="search"):
    sampled = np.r_[np.zeros(n // 2), np.ones(n - n // 2)].astype(np.float32)
    return Rollout("t", domain, np.arange(n, dtype=np.int32), sampled, -sampled, status, 0.0, 1)


def test_aborted_runs_are_left_out_truncated_ones_kept_and_overflow_counted():
    placed = distill.pack_domain([rollout(), rollout(TRUNCATED), rollout(ABORTED)], 1, rows=2, max_length=24)
    batch = placed.batch
    assert (
        batch.tokens.shape == (2, 24)
        and placed.left_out == 0
        and batch.mask.sum() == 20
        and set(batch.domains[batch.segment_ids > 0]) == {1}
    )
    assert [run.status for run in placed.runs] == [FAILED, TRUNCATED] and set(placed.row) == {0, 1} and placed.start == (0, 0)
    placed = distill.pack_domain([rollout() for _ in range(5)], 0, rows=2, max_length=24)
    assert placed.left_out == 3 and (placed.batch.segment_ids > 0).sum() == 40
    placed = distill.pack_domain([rollout(n=n) for n in (9, 5, 10, 4)], 0, rows=2, max_length=16)
    for run, row, start in zip(placed.runs, placed.row, placed.start, strict=True):
        np.testing.assert_array_equal(placed.batch.tokens[row, start : start + len(run.tokens)], run.tokens)
    lengths = [
        len(run.tokens) for n in range(8, 12) for run in distill.pack_domain([rollout(n=m) for m in [22] * 4 + [10] * n], 0, 2, 24).runs
    ]
    assert 0.3 < lengths.count(10) / len(lengths) < 1  # by lot: the longest first would have kept no short one
    placed = distill.pack_domain([], 0, rows=2, max_length=24)
    assert placed.batch.mask.sum() == 0 and placed.left_out == 0 and placed.runs == ()


def test_every_run_is_scored_by_the_teacher_of_its_domain_only(setting, models):
    student, teachers = models
    source = on_policy(CFG, setting, teachers)
    data, out = source.next(train.init_state(student, optim.adamw(setting.specs, 1), 0))
    batch = data["batch"]
    assert out["rollout/left_out"] == 0 and set(np.unique(batch.domains)) == {0, 1}
    for index, domain in enumerate(setting.domains):
        rows = slice(index * CFG.rows, (index + 1) * CFG.rows)
        assert (batch.domains[rows][batch.segment_ids[rows] > 0] == index).all()
        own, other = teachers[domain], teachers[setting.domains[1 - index]]
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        logits = {name: dense(p, part, setting.model) for name, p in (("own", own), ("other", other))}
        values, ids = jax.lax.top_k(logits["own"], CFG.k)
        np.testing.assert_array_equal(data["support"][rows], ids)
        np.testing.assert_allclose(data["teacher_logits"][rows], values, atol=1e-5)
        assert np.abs(np.asarray(values - jax.lax.top_k(logits["other"], CFG.k)[0])).max() > 0.1


def test_domains_may_have_rows_of_their_own(setting, models):
    student, teachers = models
    cfg = dataclasses.replace(CFG, prompts=6, rows_of={setting.domains[0]: 1})
    data, out = on_policy(cfg, setting, teachers).next(train.init_state(student, optim.adamw(setting.specs, 1), 0))
    batch = data["batch"]
    assert batch.tokens.shape == (1 + CFG.rows, 80) == data["teacher_logits"].shape[:2]
    assert [set(np.unique(batch.domains[rows][batch.segment_ids[rows] > 0])) for rows in (slice(0, 1), slice(1, None))] == [{0}, {1}]
    assert out["rollout/left_out"] > 0 and out["tokens"] == (batch.segment_ids > 0).sum()
    with pytest.raises(ConfigError, match="rows_of.search is 0; it must be at least 1"):
        dataclasses.replace(CFG, rows_of={"search": 0})
    with pytest.raises(ConfigError, match="rows_of is set in mode 'full'"):
        dataclasses.replace(CFG, mode="full", rows_of={"search": 1})


@functools.partial(jax.jit, static_argnums=2)
def dense(params, batch, model):
    hidden, _ = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model)
    return transformer.head(params, hidden, model)


def test_loss_is_the_papers_formula_in_float64(setting, models):
    student, teachers = models
    model = dataclasses.replace(setting.model, load_balance_coef=0.0)
    batches = [
        distill.pack_domain([rollout(n=20 + 6 * i, domain=d) for i in range(2)], j, 2, 80).batch for j, d in enumerate(setting.domains)
    ]
    batches = jax.tree.map(jnp.asarray, batches)
    pieces = [{"batch": b, **scoring.native(teachers[d], b, model, CFG.k, 256)} for b, d in zip(batches, setting.domains, strict=True)]
    data = distill.weigh(jax.tree.map(lambda *x: jnp.concatenate(x), *pieces), 2, "domain_mean")
    value, out = distill.loss(student, data, 1.0, model, CFG)

    expected = []
    for piece, domain in zip(batches, setting.domains, strict=True):
        s, t = (np.asarray(dense(p, piece, model), np.float64) for p in (student, teachers[domain]))
        per_sample = []
        for row in range(piece.tokens.shape[0]):
            for segment in range(1, int(piece.segment_ids[row].max()) + 1):
                terms = []
                for position in np.flatnonzero((piece.segment_ids[row] == segment) & (piece.mask[row] > 0)):
                    support = np.argsort(-t[row, position], kind="stable")[: CFG.k]
                    p, q = (np.exp(x[row, position][support]) / np.exp(x[row, position][support]).sum() for x in (s, t))
                    terms.append((p * np.log(p / q)).sum())
                per_sample.append(np.mean(terms))
        expected.append(np.mean(per_sample))
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-4)
    assert 0.0 < distill.finish(out)["distill/coverage"] < 1.0


def test_scores_and_loss_on_a_mesh_are_those_of_one_device(setting):
    """Rows cut over fsdp and their length over context: tokens are scored shard after shard and must come back to their places."""
    setting = dataclasses.replace(setting, model=dataclasses.replace(setting.model, num_experts=8))  # one a device
    student, teachers = student_and_teachers(setting)
    mesh, batch = (
        sharding.make_mesh({"fsdp": 2, "context": 4}),
        distill.pack_domain([rollout(n=45 + 9 * i) for i in range(4)], 0, 4, 80).batch,
    )
    assert (batch.segment_ids > 0).any(1).all()  # two rows a device: one row after the other is not shard after shard

    def evaluate(student, teacher, batch):
        data = distill.weigh({"batch": batch, **scoring.native(teacher, batch, setting.model, CFG.k, 256)}, 2, "domain_mean")
        return distill.loss(student, data, 1.0, setting.model, CFG)[0], data

    expected = jax.jit(evaluate)(student, teachers[setting.domains[0]], jax.tree.map(jnp.asarray, batch))
    placed = params.shardings(setting.specs, mesh)
    with jax.set_mesh(mesh):
        arguments = [*(jax.device_put(p, placed) for p in (student, teachers[setting.domains[0]])), sharding.put_batch(batch, mesh)]
        got = jax.jit(evaluate)(*arguments)
    np.testing.assert_array_equal(got[1]["support"], expected[1]["support"])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_distillation_brings_the_student_to_its_teachers(setting, models):
    """That a cut run goes on bitwise: tests/test_interruption.py, and tests/stages/test_scoring.py with a teacher of other ids."""
    student, teachers = models
    distill.run(dataclasses.replace(CFG, steps=16), student, taught(setting, teachers), setting, "whole")
    kl = [line["distill/kl"] for line in metrics.read(setting.workdir) if line["stage"] == "whole"]
    assert len(kl) == 16 and np.mean(kl[-4:]) < 0.88 * np.mean(kl[:4])


@pytest.fixture()
def routing(setting):
    """The setting with a router that has something to choose, and a configuration that records and replays."""
    model = dataclasses.replace(setting.model, num_experts=6, load_balance_coef=0.0)
    return dataclasses.replace(setting, model=model), dataclasses.replace(
        CFG, replay_routes=True, limits=dataclasses.replace(LIMITS, record_routes=True)
    )


def test_recorded_routes_are_replayed(routing):
    """A rollout, packed: the loss is the one without replay as long as the router is the one that sampled. When it is another one, the
    experts stay those of the record."""
    setting, cfg = routing
    student = setting.init_params()
    other = jax.tree_util.tree_map_with_path(
        lambda path, p: p + jax.random.normal(jax.random.key(5), p.shape) if path[-1].key == "gate" else p, student
    )
    teachers = {d: other for d in setting.domains}
    source = on_policy(cfg, setting, teachers)
    data, _ = source.next(train.init_state(student, optim.adamw(setting.specs, 1), 0))
    data = distill.weigh(data, 2, "domain_mean")
    routes, valid = np.array(data["batch"].routes), np.asarray(data["batch"].segment_ids) > 0
    last = valid & np.pad(np.diff(np.asarray(data["batch"].segment_ids)) != 0, ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal((routes >= 0).all((2, 3)), valid & ~last)
    loss = jax.jit(lambda p, data: distill.loss(p, data, 1.0, setting.model, cfg))
    free = {**data, "batch": data["batch"].replace(routes=None)}
    np.testing.assert_allclose(loss(student, data)[0], loss(student, free)[0], rtol=1e-6)
    own = jax.jit(lambda p, b: scoring.native(p, b, setting.model, cfg.k, cfg.vocab_block))(other, free["batch"])[
        "teacher_logits"
    ]  # whole batch at once: one teacher has both domains here
    np.testing.assert_allclose(data["teacher_logits"], own, atol=1e-4)

    routes[last] = np.arange(2)  # so that every expert used is known
    data = {**data, "batch": data["batch"].replace(routes=jnp.asarray(routes))}
    (value, out), (unforced, moved) = loss(other, data), loss(other, free)
    counts = np.stack([np.bincount(routes[:, :, i][valid].ravel(), minlength=6) for i in range(setting.model.num_layers)])
    np.testing.assert_allclose(out["router/load"], counts / counts.sum(1, keepdims=True), rtol=1e-5)
    assert np.abs(moved["router/load"] - out["router/load"]).max() > 0.05
    assert abs(value - unforced) > 1e-4 and abs(value - loss(student, data)[0]) > 1e-4


def test_training_with_replay_runs_and_reports_the_load_of_every_expert(routing):
    setting, cfg = routing
    student = setting.init_params()
    cfg = dataclasses.replace(cfg, steps=1, microbatches=2, optimizer=bind(optim.adamw, learning_rate=1e-3))
    distill.run(cfg, student, taught(setting, dict.fromkeys(setting.domains, student)), setting)
    for line in metrics.read(setting.workdir):
        load = np.array(line["router/load"])
        assert load.shape == (setting.model.num_layers, 6)
        np.testing.assert_allclose(load.sum(1), 1, atol=0.01)
        assert {"router/load_balance", "router/z", "router/entropy", "router/max_load"} <= set(line)


def test_replay_without_a_record_is_refused(setting):
    with pytest.raises(ConfigError, match="set limits.record_routes"):
        DistillConfig(replay_routes=True)
    with pytest.raises(ConfigError, match="run t has no recorded routes"):
        distill.pack_domain([rollout()], 0, 1, 24, setting.model)
    with pytest.raises(ConfigError, match="2 different experts below 2"):
        wrong = np.full((20, setting.model.num_layers, 2), 7, np.int16)
        distill.pack_domain([dataclasses.replace(rollout(), routes=wrong)], 0, 1, 24, setting.model)


def test_a_domain_without_a_teacher_and_rows_too_short_are_refused(setting, models):
    with pytest.raises(ConfigError, match="no teacher for domain tool_calling"):
        distill.run(CFG, models[0], taught(setting, {"search": models[0]}), setting)
    with pytest.raises(ConfigError, match="max_length"):
        DistillConfig(max_length=100, limits=Limits(max_length=200))


def test_packed_rows_of_rollouts_mask_what_the_student_did_not_write():
    batch = distill.pack_domain([rollout(n=10)], 0, 1, 16).batch
    example = packing.Example(np.arange(10, dtype=np.int32), np.r_[np.zeros(5), np.ones(5)].astype(np.float32))
    np.testing.assert_array_equal(batch.mask[0, :10], np.r_[example.mask[1:], 0])
