"""Run as a script, not a test: one of several processes. Its words are those after ``a1jax``, the last one the folder of the run.

Runs them; then makes batches on meshes that cut rows and lengths over the processes in other ways; then starts a run that cannot be, which
ends this process with code 2.
"""

import sys

import jax
import numpy as np

from a1jax import distributed, main, sharding
from a1jax.data import batches
from a1jax.data.packing import Example

SHAPES = ({"fsdp": 4, "context": 2}, {"context": 8}, {"data": 2, "tensor": 4}, {"context": 4, "tensor": 2})


def check_batches() -> None:
    """What the processes build together is the batch that one builds alone, and none builds rows that its devices do not hold."""
    data = [Example(tokens=np.arange(n, dtype=np.int32), mask=np.ones(n, np.float32)) for n in range(3, 60)]
    options = {"batch_size": 8, "max_length": 64, "seed": 1}
    for shape in SHAPES:
        mesh, alone = sharding.make_mesh(shape), batches.loader(data, **options)
        rows = sharding.rows_here(mesh, 8)
        together = batches.loader(data, **options, places=rows)
        for _ in range(3):
            whole, part = next(alone), next(together)
            assert part.tokens.shape[0] == len(rows) == (8 if shape.get("context", 1) > 2 else 4), (shape, rows)
            assert together.tokens == alone.tokens == int((whole.segment_ids > 0).sum())
            for placed in (sharding.put_batch(part, mesh, rows, 8), sharding.put_batch(whole, mesh)):
                for mine, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
                    assert mine.shape == wanted.shape and not mine.is_fully_addressable
                    for shard in mine.addressable_shards:
                        np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index])
            beside = sharding.put_tokens(whole.mask, mesh)
            assert float(beside.sum()) == float(whole.mask.sum()) and beside.sharding == placed.mask.sharding


if __name__ == "__main__":
    code = main.main(sys.argv[1:])
    assert code == 0 and distributed.several(), code
    check_batches()
    try:
        distributed.check_same(np.full(3, jax.process_index()), "an array")
    except RuntimeError as error:
        assert "process 1 has another one than process 0" in str(error)
    else:
        raise AssertionError("the processes have different arrays and nobody says so")
    print("all checks passed", flush=True)
    impossible = ["--workdir", f"{sys.argv[-1]}-impossible", "--set", "mesh.shape={'fsdp': 2, 'expert': 2}"]
    sys.exit(main.main([*sys.argv[1:], *impossible]))
