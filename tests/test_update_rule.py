"""bfloat16 parameters under float32 masters and under stochastic rounding; where the optimizer's state lies, before and after steps."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import checkpoint, optim, params, sharding, train, update_rule
from a1jax.config import ConfigError, bind

SPECS = {
    "w": params.ParamSpec((8, 16), ("embed", "heads"), params.normal(0.1), "bfloat16"),
    "experts": params.ParamSpec((8, 6, 8), ("experts", "expert_in", "expert_out"), params.normal(0.1), "bfloat16"),
    "A_log": params.ParamSpec((16,), ("norm",), params.constant(1.0)),  # a parameter that stays float32
}
KEY = jax.random.key(7)
BATCH = {"x": jax.random.normal(jax.random.key(1), (16, 8)), "y": jax.random.normal(jax.random.key(2), (16, 16))}
MESH = {"fsdp": 2, "expert": 2, "context": 2}


def loss(tree, batch, share):
    error = batch["x"] @ tree["w"].astype(jnp.float32) * tree["A_log"][None] - batch["y"]
    return 0.01 * jnp.sum(error**2) + share * jnp.sum(tree["experts"].astype(jnp.float32) ** 2), {}


def bits(x):
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


def same(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), one, two)


def made(mesh, microbatches=1, **options):
    """(state, jitted step) of AdamW on SPECS, on one device or on a mesh."""
    tx = optim.adamw(SPECS, 10, learning_rate=1e-2, **options)
    places = None if mesh is None else params.shardings(SPECS, mesh)
    tree = jax.jit(lambda key: params.init(SPECS, key), out_shardings=places)(jax.random.key(0))
    step = jax.jit(train.make_train_step(loss, tx, microbatches, specs=SPECS), donate_argnums=(0,))
    return train.init_state(tree, tx, 0), step


def on(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


# ------------------------------------------------------------------------------------------------------------------- rounding


def test_rounding_by_hand():
    # between the bfloat16 neighbours 1 and 1 + 2^-7: a quarter of the way up, so a quarter of the draws go up
    x = jnp.full((40_000,), 1 + 2**-9, jnp.float32)
    drawn = update_rule.round_by_chance(x, KEY).astype(jnp.float32)
    assert {*np.unique(drawn)} == {1.0, 1 + 2**-7}
    assert float((drawn > 1).mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 40_000) ** 0.5)
    same(update_rule.round_by_chance(-x, KEY), (-drawn).astype(jnp.bfloat16))  # the sign is no part of the chance
    exact = jnp.array([0.0, -0.0, 1.5, -(2.0**-120), jnp.inf, -jnp.inf], jnp.float32)
    same(update_rule.round_by_chance(exact, KEY), exact.astype(jnp.bfloat16))
    odd = jax.lax.bitcast_convert_type(jnp.uint32([0x7FFFFFFF, 0xFFFFFFFF]), jnp.float32)  # their bits would overflow to -0 and 0
    assert jnp.isnan(update_rule.round_by_chance(odd, KEY)).all()


def test_rounding_is_the_sum_of_bits_and_chance():
    x = jax.random.normal(KEY, (64,))
    chance = np.asarray(jax.random.bits(KEY, (64,), jnp.uint16)).astype(np.uint32)
    np.testing.assert_array_equal(bits(update_rule.round_by_chance(x, KEY)), (bits(x) + chance) >> 16)


def test_stochastic_updates_arrive_on_average_and_plain_ones_do_not():
    """1,000 updates of 2^-12 of the parameter: plain bfloat16 stays, the mean over parameters moves as float32 does."""
    tree = {"w": jnp.ones((4096,), jnp.bfloat16)}
    down = {"w": jnp.full((4096,), 2.0**-12)}
    ends = {}
    for precision in ("plain", "stochastic"):
        made = update_rule.rule(optax.sgd(1.0), precision, offload=precision == "plain")  # plain as a rule, to be called alike

        def body(_, carry, made=made):
            return made.step(down, carry[1], carry[0], KEY)

        ends[precision] = jax.jit(lambda made=made, body=body: jax.lax.fori_loop(0, 1000, body, (tree, made.init(tree))))()[0]["w"]
    assert (ends["plain"] == 1).all()
    moved = np.asarray(ends["stochastic"], np.float64)
    assert len(np.unique(moved)) > 3
    np.testing.assert_allclose(moved.mean(), 1 - 1000 * 2.0**-12, atol=4 * moved.std() / 64)


def test_one_stochastic_step_is_unbiased_in_every_element_and_its_key_says_all():
    tx = optim.adamw(SPECS, 10, learning_rate=1e-3, warmup=0.0, precision="stochastic")
    tree = params.init(SPECS, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), tree)
    state = tx.init(tree)
    step = jax.jit(jax.vmap(lambda key: tx.step(grads, state, tree, key)[0]))
    keys = jax.random.split(KEY, 2000)
    drawn = step(keys)
    inner = optim.adamw(SPECS, 10, learning_rate=1e-3, warmup=0.0)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), tree)
    exact = optax.apply_updates(wide, inner.update(grads, inner.init(wide), wide)[0])
    for name in ("w", "experts"):
        some = np.asarray(drawn[name], np.float64)
        spacing = 2.0 ** (np.floor(np.log2(np.abs(np.asarray(exact[name], np.float64)))) - 7)  # between neighbours of 8 bits
        assert np.ptp(some, axis=0).max() > 0
        assert (np.abs(some.mean(0) - exact[name]) < 5 * 0.5 * spacing / 2000**0.5 + 1e-9).all()
    np.testing.assert_allclose(drawn["A_log"][5], exact["A_log"], rtol=1e-6)
    assert drawn["A_log"].dtype == jnp.float32
    same(step(keys), drawn)
    again = tx.step(grads, state._replace(count=state.count + 1), tree, KEY)[0]
    assert (bits(again["w"]) != bits(tx.step(grads, state, tree, KEY)[0]["w"])).any()  # another update, other chances
    twins = {"a": tree["w"], "b": tree["w"]}
    plain = update_rule.stochastic(optax.sgd(1e-4))
    both = plain.step({"a": grads["w"], "b": grads["w"]}, plain.init(twins), twins, KEY)[0]
    assert (bits(both["a"]) != bits(both["b"])).any()  # another path, other chances


# --------------------------------------------------------------------------------------------------------------------- master


@pytest.mark.parametrize("optimizer", [optim.adamw, optim.muon])
def test_masters_run_as_float32_parameters_do_and_parameters_are_the_masters_rounded(optimizer):
    build = functools.partial(optimizer, SPECS, 30, learning_rate=1e-3, weight_decay=0.1)
    tx, reference = build(precision="master"), build()
    tree = params.init(SPECS, jax.random.key(0))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), tree)
    state, other = tx.init(tree), reference.init(wide)

    @jax.jit
    def both(tree, state, wide, other, key):
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), wide)
        tree, state = tx.step(grads, state, tree, KEY)
        updates, other = reference.update(grads, other, wide)
        return tree, state, optax.apply_updates(wide, updates), other

    start = tree
    for i in range(30):
        tree, state, wide, other = both(tree, state, wide, other, jax.random.key(i))
        same({k: state.master[k] for k in ("w", "experts")}, {k: wide[k] for k in ("w", "experts")})
        same(tree, jax.tree.map(lambda w, p: w.astype(p.dtype), wide, tree))
    assert isinstance(state.master["A_log"], optax.MaskedNode)  # float32 is its own master
    assert (bits(tree["w"]) != bits(start["w"])).mean() > 0.5


def test_small_updates_are_lost_without_a_master():
    tree, down = {"w": jnp.ones((4,), jnp.bfloat16)}, {"w": jnp.full((4,), 2.0**-12)}
    ends = []
    for made in (update_rule.plain(optax.sgd(1.0)), update_rule.master(optax.sgd(1.0))):
        now, state = tree, made.init(tree)
        for _ in range(64):
            now, state = made.step(down, state, now, KEY)
        ends.append(float(now["w"][0]))
    assert ends == [1.0, 1 - 64 * 2.0**-12]


# -------------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize(("b2", "error"), [(0.95, 0.06), (0.99, 0.35)])
def test_what_a_bfloat16_second_moment_costs(b2, error):
    """Gradients whose size falls tenfold: the stored root mean square beside float32's. The share by which it is wrong, on average."""
    grads = jax.random.normal(KEY, (600, 512)) * jnp.where(jnp.arange(600) < 200, 1.0, 0.1)[:, None]
    ends = []
    for stored in ("as_parameter", "bfloat16"):
        specs = {"w": params.ParamSpec((512,), ("norm",), params.constant(0.0))}
        tx = optim.adamw(specs, 600, b2=b2, clip=1e9, second_moment=stored)
        tree = params.init(specs, KEY)
        run = jax.jit(lambda state, tx=tx, tree=tree: jax.lax.scan(lambda s, g: (tx.update({"w": g}, s, tree)[1], None), state, grads)[0])
        end = run(tx.init(tree))
        nu = optax.tree.get(end, "nu")["w"]
        assert nu.dtype == (jnp.bfloat16 if stored == "bfloat16" else jnp.float32)
        ends.append(np.sqrt(np.asarray(nu, np.float64)))
    off = np.mean(np.abs(ends[1] / ends[0] - 1))
    assert 0 < off < error


def test_moments_have_the_types_asked_for_and_impossible_ones_are_refused():
    tree = params.init(SPECS, KEY)
    tx = optim.adamw(SPECS, 5, precision="master", first_moment="bfloat16", second_moment="bfloat16")
    state = tx.init(tree)
    for _ in range(2):
        types = jax.tree.map(lambda x: str(x.dtype), (optax.tree.get(state.inner, "mu"), optax.tree.get(state.inner, "nu")))
        assert {*jax.tree.leaves(types)} == {"bfloat16"}
        tree, state = tx.step(jax.tree.map(lambda p: p.astype(jnp.float32), tree), state, tree, KEY)
    state = optim.adamw(SPECS, 5, precision="stochastic").init(tree)
    assert {str(x.dtype) for x in jax.tree.leaves(optax.tree.get(state.inner, "nu"))} == {"float32"}
    with pytest.raises(ConfigError, match="second_moment is bfloat16 with b2 0.999: it would never fall"):
        optim.adamw(SPECS, 5, b2=0.999, second_moment="bfloat16")
    with pytest.raises(ConfigError, match="choose plain, master or stochastic"):
        optim.adamw(SPECS, 5, precision="fast")


def test_a_program_knows_the_precision_but_not_the_rate():
    names = [optim.program(bind(optim.adamw, learning_rate=rate, precision=p), 5) for rate, p in ((1.0, "master"), (2.0, "master"))]
    assert names[0] == names[1] != optim.program(bind(optim.adamw, precision="stochastic"), 5) != optim.program(bind(optim.adamw), 5)


# ---------------------------------------------------------------------------------------------------- places, resume, slices


@pytest.mark.parametrize(("precision", "offload"), [("plain", False), ("master", False), ("stochastic", False), ("master", True)])
def test_state_lies_where_its_parameters_do_and_a_mesh_changes_nothing(precision, offload, tmp_path):
    """Made, after steps and restored: moments and masters are cut as their parameter (on the host with offload); the run is that of one
    device, and goes on from a checkpoint bit for bit."""
    mesh = sharding.make_mesh(MESH)
    ends = []
    for where in (None, mesh):
        with on(where):
            state, step = made(where, 2, precision=precision, offload=offload)
            if where is not None:
                check_places(state, offload)
            for _ in range(2):
                state, _ = step(state, BATCH)
            if where is not None:
                check_places(state, offload)
                manager = checkpoint.open_manager(tmp_path, keep=1, save_every=1)
                checkpoint.save(manager, 2, state, {})
                restored, _, _ = checkpoint.restore(manager, made(where, 2, precision=precision, offload=offload)[0])
                manager.close()
                check_places(restored, offload)
            state, _ = step(state, BATCH)
            if where is not None:
                same(step(restored, BATCH)[0].params, state.params)
        ends.append(jax.device_get(state.params))
    if precision == "stochastic":  # the same chances; a sum in another order may land on the other side of one
        for name in ("w", "experts"):
            assert (bits(ends[0][name]) == bits(ends[1][name])).mean() > 0.98
        np.testing.assert_allclose(ends[0]["A_log"], ends[1]["A_log"], rtol=1e-5)  # float32: no chance
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-6), *ends)


def check_places(state, offload):
    for name in SPECS:
        sizes = {"w": (1, 16), "experts": (1, 6, 8), "A_log": (16,)}
        assert state.params[name].addressable_shards[0].data.shape == sizes[name]
    seen = []

    def check(leaf, owner):
        if owner is None:
            assert leaf.sharding.is_fully_replicated and leaf.sharding.memory_kind == "device"
            return
        seen.append(leaf)
        assert leaf.sharding.with_memory_kind("device").is_equivalent_to(owner.sharding, leaf.ndim), (leaf.sharding, owner.sharding)
        assert leaf.sharding.memory_kind == ("pinned_host" if offload else "device") and owner.sharding.memory_kind == "device"

    params.with_owners(check, state.opt_state, state.params)
    assert len(seen) == 6 + 2 * isinstance(state.opt_state, update_rule.Mastered)  # two moments each; masters of the narrow ones


def test_rounding_does_not_depend_on_how_arrays_are_cut():
    mesh, tx = sharding.make_mesh(MESH), update_rule.stochastic(optax.sgd(1e-3))
    tree = params.init(SPECS, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), tree)
    whole = jax.jit(tx.step)(grads, tx.init(tree), tree, KEY)[0]
    places = params.shardings(SPECS, mesh)
    with jax.set_mesh(mesh):
        cut = jax.device_put(tree, places)
        same(jax.device_get(jax.jit(tx.step)(jax.device_put(grads, places), tx.init(cut), cut, KEY)[0]), whole)


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_micro_batches_add_up_in_float32(precision):
    """Value and gradient are those of the whole batch, up to the rounding of each slice's bfloat16 gradient (2^-9)."""
    ends = []
    for count in (1, 2, 4):
        state, step = made(None, count, precision=precision)
        state, out = step(state, BATCH)
        ends.append((out["loss"], out["grad_norm"], optax.tree.get(state.opt_state.inner, "mu")))
        assert out["grad_norm"].dtype == jnp.float32
    for other in ends[1:]:
        np.testing.assert_allclose(other[0], ends[0][0], rtol=1e-5)
        np.testing.assert_allclose(other[1], ends[0][1], rtol=2e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2**-8 * np.abs(b).max()), other[2], ends[0][2])


def test_the_sum_of_gradients_is_cut_as_the_parameters():
    """In the compiled step no device holds a whole gradient: 256 x 384 float32 appears only as its eighth."""
    mesh = sharding.make_mesh(MESH)
    wide = {"w": params.ParamSpec((256, 384), ("embed", "heads"), params.normal(0.1), "bfloat16")}
    tx = optim.adamw(wide, 10, precision="master")
    rows = jax.ShapeDtypeStruct((16, 256), jnp.float32, sharding=sharding.batch_shardings(mesh).tokens)

    def square(tree, batch, share):
        return jnp.sum(jnp.square(batch.astype(jnp.bfloat16) @ tree["w"]).astype(jnp.float32)), {}

    with jax.set_mesh(mesh):
        shapes, places = params.abstract(wide), params.shardings(wide, mesh)
        tree = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
        state = train.abstract_state(tree, tx)
        step = jax.jit(train.make_train_step(square, tx, 2, specs=wide))
        compiled = step.lower(state, rows).compile()
    places = jax.tree.leaves(compiled.output_shardings[0].opt_state)
    for got, wanted in zip(places, jax.tree.leaves(state.opt_state), strict=True):
        assert got.is_equivalent_to(wanted.sharding, wanted.ndim)
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert loops and all("f32[256,384]" not in line for line in loops) and any("f32[32,384]" in line for line in loops)
