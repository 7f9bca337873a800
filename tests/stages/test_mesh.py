"""Stage 3 with teachers of other tokenizers under a mesh: the targets, the loss and its gradient are those of one device."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import params as param_specs
from a1jax import sharding, train
from a1jax.config import ConfigError
from a1jax.models import transformer
from a1jax.stages import distill, scoring
from a1jax.stages.distill import DistillConfig

NAMES = ("search", "tool_calling")
K, LENGTH, ROWS, THEIRS = 5, 192, 4, 140
MESHES = [
    {"data": 2, "fsdp": 2},
    {"expert": 2, "tensor": 2},
    *(pytest.param(m, marks=pytest.mark.slow) for m in ({"context": 8}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2})),
]
CASES = (("salient", 2), ("sampled", 2))  # mode, micro-batches


@pytest.fixture(scope="module")
def model(small_model):
    return dataclasses.replace(small_model, num_layers=1, full_attention_interval=1, num_experts=4, load_balance_coef=0.0)


@pytest.fixture(scope="module")
def computed(tokenizer, model, foreign_runs, foreign_teachers):
    """computed(mesh) -> {case: (data as the step gets it, its metrics, the gradient)}."""

    @functools.cache
    def on(shape):
        mesh = sharding.make_mesh(dict(shape), jax.devices()[: int(np.prod([n for _, n in shape]))]) if shape else None
        student = param_specs.init(transformer.specs(model), jax.random.key(7))
        teachers = foreign_teachers
        if mesh is not None:
            student = jax.device_put(student, param_specs.shardings(transformer.specs(model), mesh))
            teachers = {
                d: dataclasses.replace(t, params=jax.device_put(t.params, param_specs.shardings(transformer.specs(t.model), mesh)))
                for d, t in teachers.items()
            }
        with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
            return {case: stepped(*case, mesh, student, teachers) for case in CASES}

    def stepped(mode, microbatches, mesh, student, teachers):
        scorers, members = scoring.make_scorers(teachers, tokenizer, K, 256, mode == "sampled", False, THEIRS)
        pieces = []
        for index, domain in enumerate(NAMES):
            placed = distill.pack_domain([r for r in foreign_runs if r.domain == domain], index, ROWS, LENGTH)
            batch = jax.tree.map(jnp.asarray, placed.batch) if mesh is None else sharding.put_batch(placed.batch, mesh)
            import time; t0=time.time()
            batch, scores, _ = scorers[domain].score(placed, batch)
            jax.block_until_ready(scores); print("score", time.time()-t0)
            pieces.append({"batch": batch, **scores})
        if mesh is not None:
            where = pieces[0]["batch"].tokens.sharding
            assert all(x.sharding.is_equivalent_to(where, 2) or x.ndim > 2 for p in pieces for x in jax.tree.leaves(p))
        data = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
        cfg = DistillConfig(k=K, vocab_block=256, mode=mode)
        loss = functools.partial(distill.loss, model=model, cfg=cfg, members=members)
        weigh = functools.partial(distill.weigh, num_domains=2, reduction="domain_mean")
        tx = optax.trace(0.0)  # keeps the gradient
        t0=time.time()
        state, out = jax.jit(train.make_train_step(loss, tx, microbatches, weigh, distill.finish))(train.init_state(student, tx, 0), data)
        jax.block_until_ready(state); print('step', mode, time.time()-t0)
        return jax.device_get((data, out, state.opt_state.trace))

    return lambda shape: on(tuple(shape.items()))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "-".join(f"{k}{v}" for k, v in m.items()))
def test_targets_loss_and_gradient_are_those_of_one_device(computed, mesh):
    import time
    t=time.time(); computed({}); print("none", time.time()-t)
    t=time.time(); computed(mesh); print("mesh", time.time()-t)
    for case, (data, out, grads) in computed(mesh).items():
        plain, expected, plain_grads = computed({})[case]
        print(case, {k: (float(out[k]), float(expected[k])) for k in ("loss","grad_norm")})
        for name in data:
            if name!="batch":
                a,b=np.asarray(data[name],np.float64),np.asarray(plain[name],np.float64)
                assert (np.isinf(a)==np.isinf(b)).all(); print(name, np.abs(a-b, where=np.isfinite(a), out=np.zeros_like(a)).max() if 0 else np.max(np.abs(a[np.isfinite(a)]-b[np.isfinite(a)])))
        worst=max((float(np.abs(a-b).max()/np.abs(b).max()), p) for (p,a),b in zip(jax.tree_util.tree_leaves_with_path(grads),jax.tree.leaves(plain_grads)))
        print(worst)
