"""Checkpoints: bitwise, sharded, apart from the optimizer, and whole after a kill -9 at any moment."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import checkpoint
from a1jax.config import ConfigError
from a1jax.types import TrainState


def _params(scale=1.0):
    sizes = {"embed": (32, 16), "layers": {"w": (2, 16, 8), "b": (16,)}}
    random = np.random.default_rng(1)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: jnp.asarray(scale * random.normal(size=shape), jnp.float32), sizes, is_leaf=is_shape)
    return {**params, "layers": {**params["layers"], "b": params["layers"]["b"].astype(jnp.bfloat16)}}


def _optimizer():
    """One with every kind of node: partitions, masks, schedules, injected values."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"matrix": optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)), "frozen": optax.set_to_zero()},
            lambda tree: jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "frozen", tree),
        ),
        optax.masked(optax.trace(0.9), {"embed": True, "layers": False}),
        optax.inject_hyperparams(optax.scale)(step_size=0.5),
    )


def _state(scale=1.0, impl="threefry2x32"):
    """A state after two steps, so that no part of it is still zero."""
    tx = _optimizer()

    @jax.jit
    def stepped(params):
        opt_state = tx.init(params)
        for _ in range(2):
            updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return TrainState(jnp.asarray(2, jnp.int32), params, opt_state, jax.random.key(7, impl=impl))

    return stepped(_params(scale))


def _assert_same(left, right):
    left, right = (checkpoint._without_keys(tree) for tree in (left, right))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(left), jax.tree.leaves_with_path(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_state_comes_back_bitwise(tmp_path, impl):
    state, extra = _state(impl=impl), {"loader": {"position": 12, "order": [3, 1]}, "stage": "sft"}
    manager = checkpoint.open_manager(tmp_path, keep=2, save_every=1)
    assert checkpoint.restore(manager, state) is None
    assert checkpoint.save(manager, 5, state, extra)
    manager.close()

    manager = checkpoint.open_manager(tmp_path, keep=2, save_every=1)
    for template in (_state(scale=3.0, impl=impl), jax.eval_shape(lambda: _state(impl=impl))):
        got, got_extra, step = checkpoint.restore(manager, template)
        _assert_same(got, state)
        assert (got_extra, step) == (extra, 5)
        assert got.key.dtype == state.key.dtype and jax.random.key_impl(got.key) == jax.random.key_impl(state.key)
        np.testing.assert_array_equal(jax.random.uniform(got.key, (4,)), jax.random.uniform(state.key, (4,)))
    manager.close()


def test_sharded_arrays_come_back_on_the_templates_shardings(tmp_path):
    def place(tree, mesh, spec):
        return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

    wide = jax.make_mesh((8,), ("fsdp",))
    square = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    params, P = _params(), jax.sharding.PartitionSpec
    specs = {"embed": P("fsdp"), "layers": {"w": P(None, "fsdp"), "b": P()}}
    saved = jax.tree.map(lambda leaf, spec: place(leaf, wide, spec), params, specs)
    tx = optax.adam(1e-3)
    state = TrainState(jnp.zeros((), jnp.int32), saved, tx.init(saved), place(jax.random.key(3), wide, P()))
    with checkpoint.open_manager(tmp_path, keep=1, save_every=1) as manager:
        checkpoint.save(manager, 1, state, {})

        other = {"embed": P("fsdp", "tensor"), "layers": {"w": P(None, "tensor", "fsdp"), "b": P("tensor")}}
        moved = jax.tree.map(lambda leaf, spec: place(jnp.zeros_like(leaf), square, spec), params, other)
        template = TrainState(jnp.ones((), jnp.int32), moved, tx.init(moved), place(jax.random.key(0), square, P()))
        got, _, _ = checkpoint.restore(manager, template)
    _assert_same(got, state)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(moved), strict=True):
        assert a.sharding == b.sharding
    assert got.key.sharding.is_equivalent_to(template.key.sharding, 0)
    alone = checkpoint.load_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), moved))
    assert alone["embed"].sharding == moved["embed"].sharding
    _assert_same(alone, saved)


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.arange(2_000_000, dtype=jnp.float32)}, (), jax.random.key(0))
    want = np.array(state.params["w"])
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with checkpoint.open_manager(tmp_path, keep=1, save_every=1) as manager:
        checkpoint.save(manager, 1, state, {})
        params = spoil(state.params)
        for _ in range(3):
            params = spoil(params)
        got, _, _ = checkpoint.restore(manager, TrainState(jnp.zeros((), jnp.int32), params, (), jax.random.key(0)))
    np.testing.assert_array_equal(got.params["w"], want)


def test_steps_between_are_passed_over_and_the_newest_kept(tmp_path):
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros((2,))}, (), jax.random.key(0))
    with checkpoint.open_manager(tmp_path, keep=2, save_every=4) as manager:
        begun = [step for step in range(1, 14) if checkpoint.save(manager, step, state, {"at": step})]
        assert checkpoint.save(manager, 14, state, {"at": 14}, force=True)
        assert not checkpoint.save(manager, 14, state, {"at": 14}, force=True)
        manager.wait_until_finished()
        assert begun == [1, 4, 8, 12]  # the first is always saved
        assert sorted(manager.all_steps()) == [12, 14]
        assert checkpoint.restore(manager, state)[1:] == ({"at": 14}, 14)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "14"]


def test_a_template_of_another_shape_is_refused_in_one_line(tmp_path):
    state = _state()
    with checkpoint.open_manager(tmp_path, keep=1, save_every=1) as manager:
        checkpoint.save(manager, 3, state, {})
        params = {**state.params, "embed": jnp.zeros((32, 8)), "new": jnp.zeros((1,))}
        with pytest.raises(ConfigError) as error:
            checkpoint.restore(manager, state.replace(params=params))
        assert "embed is [32, 16], wanted [32, 8]" in str(error.value) and "new is missing" in str(error.value)
        params = {**state.params, "embed": state.params["embed"].astype(jnp.bfloat16)}
        with pytest.raises(ConfigError, match="embed is float32, wanted bfloat16"):
            checkpoint.restore(manager, state.replace(params=params))
        with pytest.raises(ConfigError, match="is unknown") as error:
            checkpoint.restore(manager, state.replace(opt_state=optax.sgd(1e-3).init(state.params)))
        assert "\n" not in str(error.value)


def test_parameters_alone(tmp_path):
    state = _state()
    with checkpoint.open_manager(tmp_path / "run", keep=2, save_every=1) as manager:
        checkpoint.save(manager, 1, state, {})
        checkpoint.save(manager, 2, state.replace(params=_params(2.0)), {})
    abstract = jax.eval_shape(_params)
    _assert_same(checkpoint.load_params(tmp_path / "run", abstract), _params(2.0))
    _assert_same(checkpoint.load_params(tmp_path / "run", abstract, step=1), state.params)
    checkpoint.save_params(tmp_path / "teacher", state.params)
    checkpoint.save_params(tmp_path / "teacher", _params(3.0))
    _assert_same(checkpoint.load_params(tmp_path / "teacher", abstract), _params(3.0))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)
    _assert_same(checkpoint.load_params(tmp_path / "teacher", half), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _params(3.0)))


def test_parameters_that_do_not_fit_are_listed_in_one_line(tmp_path):
    checkpoint.save_params(tmp_path / "teacher", _params())
    abstract = jax.eval_shape(_params)
    del abstract["embed"]
    abstract["layers"]["w"] = jax.ShapeDtypeStruct((2, 16, 9), jnp.float32)
    abstract["head"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(ConfigError) as error:
        checkpoint.load_params(tmp_path / "teacher", abstract)
    for part in ("embed is unknown", "head is missing", "layers.w is [2, 16, 8], wanted [2, 16, 9]", "teacher"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        checkpoint.load_params(tmp_path / "nowhere", abstract)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        checkpoint.load_params(tmp_path / "empty", abstract)


def test_small_states_are_saved_quickly_and_quietly(tmp_path, caplog, capfd):
    state = _state()
    with checkpoint.open_manager(tmp_path, keep=1, save_every=1) as manager, caplog.at_level(logging.INFO):
        checkpoint.save(manager, 1, state, {})
        manager.wait_until_finished()
        seconds = []
        for step in range(2, 7):
            began = time.perf_counter()
            checkpoint.save(manager, step, state, {})
            manager.wait_until_finished()
            seconds.append(time.perf_counter() - began)
        checkpoint.restore(manager, state)
    assert min(seconds) < 1.0  # 0.1 s on an idle core
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
    assert capfd.readouterr() == ("", "")


# Forks a child per kill moment from a process that has imported everything, so that a kill costs no start-up.
_CHILD = textwrap.dedent("""
    import os, sys, time
    import jax, jax.numpy as jnp
    from a1jax import checkpoint
    from a1jax.types import TrainState

    def child(folder):
        def state(step):
            params = {str(i): jnp.full((256, 256), step, jnp.float32) for i in range(4)}
            return TrainState(jnp.int32(step), params, (), jax.random.key(step))
        manager = checkpoint.open_manager(folder, keep=1, save_every=1)
        checkpoint.save(manager, 1, state(1), {"at": 1})
        manager.wait_until_finished()
        print("saving", os.getpid(), flush=True)
        for step in range(2, 10_000):
            checkpoint.save(manager, step, state(step), {"at": step})
            manager.wait_until_finished()

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(line.strip())
        status = os.waitpid(pid, 0)[1]
        print("killed", os.WTERMSIG(status), flush=True)
""")


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    """Real processes, saving all the time with keep=1, SIGKILLed at moments spread over a save."""
    template = TrainState(jnp.int32(0), {str(i): jnp.zeros((256, 256)) for i in range(4)}, (), jax.random.key(0))
    interrupted = 0
    with subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        for moment in range(6):
            folder = tmp_path / str(moment)
            print(folder, file=parent.stdin, flush=True)
            word, pid = parent.stdout.readline().split()
            assert word == "saving"
            time.sleep(0.02 * moment + 0.05)  # one save takes about 0.1 s
            os.kill(int(pid), signal.SIGKILL)
            assert parent.stdout.readline().split() == ["killed", str(signal.SIGKILL.value)]
            left = [path for path in folder.rglob("*") if "tmp" in path.name]
            interrupted += bool(left) or len(list(folder.iterdir())) > 1
            with checkpoint.open_manager(folder, keep=1, save_every=1) as manager:
                state, extra, step = checkpoint.restore(manager, template)
                assert step >= 1 and int(state.step) == step and extra == {"at": step}
                for leaf in state.params.values():
                    np.testing.assert_array_equal(leaf, np.full((256, 256), step, np.float32))
                np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(step)))
                assert checkpoint.save(manager, step + 7, state, {})  # and saving goes on
            assert [path.name for path in folder.iterdir()] == [str(step + 7)]  # with nothing left of what was begun
    assert interrupted >= 3  # the kills did hit the middle of saves
