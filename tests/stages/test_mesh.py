"""Stage 3 with a teacher of another tokenizer under a mesh: the targets, the loss and its gradient are those of one device."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import optim, sharding, train
from a1jax import params as param_specs
from a1jax.config import ConfigError, bind
from a1jax.models import transformer
from a1jax.rollout.agent import Limits
from a1jax.stages import distill, scoring
from a1jax.stages.distill import DistillConfig

NAMES = ("search", "tool_calling")
K, LENGTH, ROWS, THEIRS = 5, 192, 4, 141
SALIENT, TAIL, SAMPLED = ("salient", 2), ("tail", 1), ("sampled", 2)  # mode, micro-batches; without a mesh there is one
CASES = [
    ({"data": 2, "fsdp": 2}, SALIENT),
    ({"expert": 2, "tensor": 2}, SAMPLED),
    *(
        pytest.param(shape, case, marks=pytest.mark.slow)
        for shape, case in (
            ({"data": 2, "fsdp": 2}, SAMPLED),
            ({"expert": 2, "tensor": 2}, SALIENT),
            ({"expert": 2, "tensor": 2}, TAIL),
            ({"context": 4}, SALIENT),
            ({"data": 2, "context": 2, "tensor": 2}, SALIENT),
            ({"fsdp": 2, "context": 2}, SAMPLED),
        )
    ),
]


@pytest.fixture(scope="module")
def model(small_model):
    """One layer of attention: what is compared comes after it."""
    return dataclasses.replace(small_model, num_layers=1, full_attention_interval=1, num_experts=4, load_balance_coef=0.0)


@pytest.fixture(scope="module")
def teacher(foreign_teacher):
    """The one whose tokens run on, so that positions are straddled."""
    return foreign_teacher("tool_calling")


def placed_on(mesh, model, params):
    return params if mesh is None else jax.device_put(params, param_specs.shardings(transformer.specs(model), mesh))


@pytest.fixture(scope="module")
def step(tokenizer, model, teacher, foreign_runs):
    """step(shape of a mesh or (), mode, micro-batches) -> what the step is given, its metrics, the gradient; on the host."""

    @functools.cache
    def taken(shape, mode, microbatches):
        mesh = sharding.make_mesh(dict(shape), jax.devices()[: int(np.prod([n for _, n in shape]))]) if shape else None
        student = placed_on(mesh, model, param_specs.init(transformer.specs(model), jax.random.key(7)))
        mine = dataclasses.replace(teacher, params=placed_on(mesh, teacher.model, teacher.params))
        scorers, members = scoring.make_scorers(dict.fromkeys(NAMES, mine), tokenizer, K, 256, mode == "sampled", False, THEIRS)
        cfg, pieces = DistillConfig(k=K, vocab_block=256, mode=mode), []
        with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
            for index, domain in enumerate(NAMES):
                placed = distill.pack_domain([r for r in foreign_runs if r.domain == domain], index, ROWS, LENGTH)
                batch = jax.tree.map(jnp.asarray, placed.batch) if mesh is None else sharding.put_batch(placed.batch, mesh)
                batch, scores, shares = scorers[domain].score(placed, batch)
                assert placed.left_out == 0 and shares["align/straddled"] > 0 and shares["align/chained"] > 0
                for x in jax.tree.leaves(scores) + [batch.mask] if mesh is not None else []:  # as the student's tokens lie
                    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, batch.tokens.sharding.spec), x.ndim)
                pieces.append({"batch": batch, **scores})
            assert shares["align/masked"] > 0  # of the last domain, whose longest run is cut
            data = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
            loss = functools.partial(distill.loss, model=model, cfg=cfg, members=members)
            weigh = functools.partial(distill.weigh, num_domains=2, reduction="domain_mean")
            keep = optax.trace(0.0)  # an optimizer whose state is the gradient
            run = jax.jit(train.make_train_step(loss, keep, microbatches, weigh, distill.finish))
            state, out = run(train.init_state(student, keep, 0), data)
            return jax.device_get((data, out, state.opt_state.trace))

    return taken


@pytest.mark.parametrize(("shape", "case"), CASES, ids=str)
def test_targets_loss_and_gradient_are_those_of_one_device(step, shape, case):
    mode, microbatches = case
    data, out, gradient = step(tuple(shape.items()), mode, microbatches)
    plain, expected, plain_gradient = step((), mode, 1)
    for name in data.keys() - {"batch"}:
        np.testing.assert_allclose(data[name], plain[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(data["batch"].mask, plain["batch"].mask)
    # What a sure teacher leaves over is about one rounding of 1, and mode tail is told by its logarithm.
    near = 5e-3 if mode == "tail" else 1e-5
    for name in ("loss", "grad_norm", "distill/kl", "distill/tokens", *(() if mode == "sampled" else ("distill/coverage",))):
        np.testing.assert_allclose(out[name], expected[name], rtol=near, err_msg=name)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=near, atol=near * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_under_a_mesh_goes_through_rollouts_and_updates(setting, model, teacher):
    """The stage as a whole; its runs are sampled, and under a mesh with other rounding, so they are not compared."""
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    limits = Limits(slots=4, max_turns=2, max_turn_tokens=8, max_length=96, temperature=1.0)
    cfg = DistillConfig(steps=2, prompts=2, lengths=(1,), rows=4, max_length=96, k=K, optimizer=bind(optim.adamw, learning_rate=1e-2),
                        limits=limits, vocab_block=256, coverage_every=2)  # fmt: skip
    here = dataclasses.replace(setting, mesh=mesh, model=model)
    mine = dataclasses.replace(teacher, params=placed_on(mesh, teacher.model, teacher.params))
    with here.on_mesh():
        student = here.init_params()
        after = distill.run(cfg, student, dict.fromkeys(here.domains, mine), here)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(student), strict=True)) > 1e-3


def test_a_mesh_of_several_processes_is_refused(setting, teacher):
    mesh = types.SimpleNamespace(is_multi_process=True)
    with pytest.raises(ConfigError, match="another tokenizer and the mesh spans several processes"):
        distill.run(DistillConfig(), {}, dict.fromkeys(NAMES, teacher), dataclasses.replace(setting, mesh=mesh))
    scoring.check_mesh(dataclasses.replace(teacher, vocab_map=None), mesh, "of search")  # the student's tokenizer: nothing to align
