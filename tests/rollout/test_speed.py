"""The rollout engine beside the bare decode step, loosely: `pytest -m slow -n 0 tests/rollout/test_speed.py`, with nothing beside it."""

import jax
import pytest

from a1jax import params as param_specs
from a1jax.models import transformer
from a1jax.types import FINISHED
from experiments import bench_rollout


@pytest.mark.slow
def test_the_engine_has_half_the_raw_decode_speed():
    """The target is 0.7 in the bench's own table, compiled in full; the tests compile cheaply and may not be alone."""
    cfg, tokenizer, tasks, scripts = bench_rollout.setup(bench_rollout.QUEUE)
    params = param_specs.init(transformer.specs(cfg), jax.random.key(0))
    pairs, _, done, counts = bench_rollout.measure(cfg, tokenizer, params, bench_rollout.LIMITS, tasks, scripts, 3)
    assert bench_rollout.LIMITS.slots == 64 and len(done) == bench_rollout.QUEUE == 1024
    assert sum(run.status == FINISHED for run in done) > 0.9 * len(done)  # the work was that of real runs
    assert bench_rollout.ratio_of(pairs) >= 0.5, (pairs, counts)


@pytest.mark.parametrize(("pairs", "ratio"), [([(10.0, 7.0)], 0.7), ([(10.0, 7.0), (20.0, 10.0), (1.0, 0.9)], 0.7)])
def test_a_ratio_is_the_median_of_the_pairs(pairs, ratio):
    assert bench_rollout.ratio_of(pairs) == pytest.approx(ratio)
