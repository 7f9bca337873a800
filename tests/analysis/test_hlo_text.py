"""Reading compiled text: loops, collectives by mesh axes, bytes moved. The programs are small and really compiled, here for CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from a1jax import sharding
from a1jax.analysis import collectives, compiled, hlo_text

SHAPE = {"data": 1, "fsdp": 2, "expert": 2, "context": 2, "tensor": 1}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({name: n for name, n in SHAPE.items() if n > 1}, jax.devices()[:8])


def read(fn, *args) -> hlo_text.Module:
    return hlo_text.read(jax.jit(fn).lower(*args).compile().as_text())


def on_mesh(mesh, fn, spec_in, spec_out, shape):
    """What fn does on every device's part of a float32 array."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec_in))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)
    return collectives.of_module(read(mapped, x), SHAPE)


def test_loops_are_multiplied_in_also_inside_loops():
    def body(x, _):
        x, _ = jax.lax.scan(lambda y, _: (jnp.sin(y @ y), None), x, None, length=5)
        return jnp.cos(x), None

    module = read(lambda x: jax.lax.scan(body, x, None, length=7)[0], jnp.ones((8, 8)))
    loops = [(hlo_text.loop_trips(op, module.computations), module.trips[op.inside]) for ops in module.computations.values() for op in ops
             if op.kind == "while"]  # fmt: skip
    assert sorted(loops) == [(5, 7.0), (7, 1.0)]
    assert max(module.trips.values()) >= 35 and module.unknown == ()


def test_a_loop_is_counted_from_where_it_starts_and_one_without_a_number_is_told():
    counted = read(lambda x: jax.lax.fori_loop(3, 10, lambda i, y: jnp.sin(y) + i, x), jnp.ones(4))
    assert [t for t in counted.trips.values() if t > 1] and max(counted.trips.values()) == 7 + 0 * len(counted.unknown)
    until = read(lambda x: jax.lax.while_loop(lambda y: jnp.sum(y) < 100.0, lambda y: y * 1.5, x), jnp.ones(4))
    assert len(until.unknown) == 1 and max(until.trips.values()) <= 2


def test_trips_from_a_condition_alone():
    text = jax.jit(lambda x: jax.lax.fori_loop(3, 10, lambda i, y: jnp.sin(y) + i, x)).lower(jnp.ones(4)).compile().as_text()
    bare = re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)
    assert bare != text
    loop, module = next((op, m) for m in [hlo_text.read(bare)] for ops in m.computations.values() for op in ops if op.kind == "while")
    assert hlo_text.loop_trips(loop, module.computations) == 7


@pytest.mark.parametrize(
    "axes", [("fsdp",), ("expert",), ("context",), ("fsdp", "expert"), ("fsdp", "context"), ("fsdp", "expert", "context")]
)
def test_collectives_by_kind_and_axes(mesh, axes):
    name, n = "+".join(axes), 2 ** len(axes)
    row = P(("fsdp", "expert", "context"))
    (gathered,) = on_mesh(mesh, lambda x: jax.lax.all_gather(x, axes, tiled=True).sum(0, keepdims=True), row, row, (8, 64))
    whole = n * 64 * 4
    assert (gathered["kind"], gathered["axes"], gathered["count"], gathered["bytes"]) == ("all-gather", name, 1, whole)
    assert gathered["wire_bytes"] == (n - 1) * 64 * 4
    (summed,) = on_mesh(mesh, lambda x: jax.lax.psum(x, axes), row, row, (8, 64))
    assert (summed["kind"], summed["axes"], summed["bytes"]) == ("all-reduce", name, 256)
    assert summed["wire_bytes"] == round(2 * (n - 1) / n * 256)
    (cut,) = on_mesh(mesh, lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True), row, row, (8, 64))
    assert (cut["kind"], cut["axes"], cut["bytes"], cut["wire_bytes"]) == ("reduce-scatter", name, 256 // n, (n - 1) * 256 // n)
    if len(axes) == 1:
        (sent,) = on_mesh(mesh, lambda x: jax.lax.ppermute(x, axes, [(0, 1), (1, 0)]), row, row, (8, 64))
        assert (sent["kind"], sent["axes"], sent["bytes"], sent["wire_bytes"]) == ("collective-permute", name, 256, 256)


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    def body(x, _):
        return jnp.sin(jax.lax.psum(x, "expert")), None

    row = P(("fsdp", "expert", "context"))
    (found,) = on_mesh(mesh, lambda x: jax.lax.scan(body, x, None, length=6)[0], row, row, (8, 64))
    assert (found["kind"], found["axes"], found["count"], found["bytes"]) == ("all-reduce", "expert", 6, 6 * 256)
    assert found["largest"][0] == 256 and "psum" in found["largest"][1]


@pytest.mark.parametrize(
    ("written", "size", "axes"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", 2, "expert"),
        ("replica_groups=[4,2]<=[8]", 2, "context"),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 4, "fsdp+context"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4, "fsdp+context"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", 2, "expert"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", 2, "context"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", 8, "fsdp+expert+context"),
        ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", 2, "other"),
        ("dimensions={0}", 8, "fsdp+expert+context"),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}", 8, "fsdp"),
    ],
)
def test_groups_in_every_notation(written, size, axes):
    line = f"  %x = f32[8]{{0}} all-gather(%y), channel_id=1, {written}, use_global_device_ids=true"
    module = hlo_text.read("ENTRY %main (p: f32[1]) -> f32[8] {\n" + line + "\n}\n")
    assert collectives.groups(module.computations["%main"][0], SHAPE) == (size, axes)


def test_types_and_tuples_are_read_whole():
    line = (
        "  ROOT %w.1 = (s32[]{:T(128)}, /*index=5*/bf16[4,256]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}) while(%t.2), condition=%c, body=%b, "
        'metadata={op_name="jit(f)/a (b)/while"}'
    )
    op = hlo_text.read("ENTRY %main (p: f32[1]) -> f32[8] {\n" + line + "\n}\n").computations["%main"][0]
    assert (op.name, op.kind, op.operands, op.root, op.scope) == ("%w.1", "while", ("%t.2",), True, "jit(f)/a (b)/while")
    assert hlo_text.size(op.type) == 4 + 2048 + 24 and hlo_text.size(op.type, (0,)) == 28 and hlo_text.size(op.type, (1,)) == 2048
    assert len(hlo_text.tuple_parts(op.type)) == 3
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_text.read("nothing")


def test_bytes_moved():
    n = 1 << 16
    assert compiled.bytes_moved(read(lambda x: x * 2 + 1, jnp.ones(n))) == 2 * 4 * n
    # A loop that reads a row and writes a row moves rows, not the whole arrays at every turn.
    rows = read(lambda x: jax.lax.scan(lambda c, row: (c, jnp.sin(row)), 0.0, x)[1], jnp.ones((64, 1024)))
    assert 2 * 4 * 64 * 1024 <= compiled.bytes_moved(rows) < 4 * 4 * 64 * 1024
    np.testing.assert_equal(hlo_text.size("pred[8]{0}"), 8)
