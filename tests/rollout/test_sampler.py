import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params
from a1jax.config import ConfigError
from a1jax.models import decode, transformer
from a1jax.rollout.sampler import invert, make_step, run_uniforms, sample, seed_of


def test_inverse_distribution_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]] * 5))
    ids, logp = sample(logits, jnp.array([0.0, 0.0999, 0.11, 0.31, 0.9999999]), 1.0)
    assert ids.tolist() == [0, 0, 1, 2, 2]
    np.testing.assert_allclose(logp, np.log([0.1, 0.1, 0.2, 0.7, 0.7]), rtol=1e-5)


def test_temperature_sharpens_and_logp_is_of_what_was_sampled_from():
    logits = jnp.log(jnp.array([[0.2, 0.8]]))
    ids, logp = sample(logits, jnp.array([0.05]), 0.5)  # (.04, .64) / .68 = (.0588, .9412)
    assert ids.tolist() == [0]
    np.testing.assert_allclose(logp, np.log([0.04 / 0.68]), rtol=1e-5)


def test_greedy_takes_the_lowest_of_equal_ids_and_ignores_the_numbers():
    ids, logp = sample(jnp.array([[0.0, 2.0, 2.0]]), jnp.array([0.99]), 0.0)
    assert ids.tolist() == [1]
    np.testing.assert_allclose(logp, jax.nn.log_softmax(jnp.array([0.0, 2.0, 2.0]))[1], rtol=1e-6)


def test_frequencies_follow_the_distribution():
    p = np.array([0.05, 0.15, 0.3, 0.5])
    ids, _ = sample(jnp.log(jnp.tile(jnp.array(p)[None], (20_000, 1))), jnp.asarray(run_uniforms(0, 0, 0, 20_000)), 1.0)
    np.testing.assert_allclose(np.bincount(ids, minlength=4) / 20_000, p, atol=0.012)


def test_impossible_ids_are_never_sampled():
    ids, _ = sample(jnp.tile(jnp.array([[-jnp.inf, 0.0, -jnp.inf]]), (3, 1)), jnp.array([0.0, 0.5, 0.99999994]), 1.0)
    assert ids.tolist() == [1, 1, 1]


def test_inversion_equals_the_running_sum_at_any_vocabulary():
    rng = np.random.default_rng(0)
    for v in (1, 65, 3001):
        weights = rng.exponential(size=(400, v)).astype(np.float32) * (rng.random((400, v)) < 0.3)
        weights[np.arange(400), rng.integers(0, v, 400)] = 1.0
        uniforms = rng.random(400, dtype=np.float32)
        ids = np.asarray(jax.jit(invert)(weights, uniforms))
        ends = np.cumsum(weights.astype(np.float64), axis=1)
        target, rows = uniforms * ends[:, -1], np.arange(400)
        assert np.all(weights[rows, ids] > 0)
        slack = 1e-5 * ends[:, -1]  # an id next door is right where the number hits the border between them
        assert np.all((ends[rows, ids] >= target - slack) & (ends[rows, ids] - weights[rows, ids] <= target + slack))


def test_numbers_of_a_run_are_its_own():
    assert (run_uniforms(1, 2, 0, 8) == run_uniforms(1, 2, 0, 8)).all()
    assert not (run_uniforms(1, 2, 0, 8) == run_uniforms(1, 2, 1, 8)).any()


def test_no_stage_seed_or_step_samples_with_the_numbers_of_another():
    assert seed_of(3, "123456789", 7) == (3 << 64) + (0xCBF43926 << 32) + 7  # the check value of crc32
    asked = [(seed, use, number) for seed in (0, 1, 2) for use in ("distill", "teacher_search_2_grpo", "") for number in (0, 1, 2**32 - 1)]
    assert len({seed_of(*one) for one in asked}) == 27
    drawn = {run_uniforms(seed_of(*one), run, attempt, 4).tobytes() for one in asked for run in (0, 1) for attempt in (0, 1)}
    assert len(drawn) == 4 * 27
    for seed, number in ((-1, 0), (2**32, 0), (0, -1), (0, 2**32)):
        with pytest.raises(ConfigError, match=f"distill: seed {seed} and number {number}"):
            seed_of(seed, "distill", number)


def test_bfloat16_hidden_states_are_sampled_from_float32_logits(small_model):
    """As the losses see them: logits rounded to bfloat16 would be off by a percent of a nat. In the program, as this compiler may keep
    more bits than it is asked for."""
    cfg = dataclasses.replace(small_model, compute_dtype="bfloat16")
    weights, cache = params.abstract(transformer.specs(cfg)), jax.eval_shape(lambda: decode.init_cache(cfg, 3, 4))
    on = np.ones(3, bool)
    text = make_step(cfg, 1.0).lower(weights, cache, np.ones(3, np.int32), on, on, np.ones(3, np.float32)).as_text()
    logits = [line for line in text.splitlines() if "dot_general" in line and f"-> tensor<3x{cfg.vocab_size}x" in line]
    assert len(logits) == 1 and logits[0].split("->")[1].startswith(f" tensor<3x{cfg.vocab_size}xf32>")
