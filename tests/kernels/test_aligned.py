"""Aligned top-k, blocked and by the kernel's body in interpret mode, against the dense form; what the certificate must catch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import aligned, blocks, kernel, kernel_gpu, layout, ops, reference, tuning

N, D, V, R = 37, 16, 701, 64
VALID = np.random.default_rng(1).random(V) > 0.05
TILES = tuning.Tiles(tokens=16, width=16, bins=32, depth=3, rows=16, lanes=32)

run = jax.jit(aligned.aligned_topk, static_argnames=("k", "soft_cap", "temperature", "implementation", "tiles"))
blocked = functools.partial(run, implementation="xla")
interpreted = functools.partial(run, implementation="interpret", tiles=TILES)
FORMS = pytest.mark.parametrize("form", [blocked, interpreted], ids=["blocked", "kernel"])


def every_kind(vocab=V, seed=0):
    """A map with units of every fan-in from 1 to over 100, a residual, and unit numbers that no teacher id reaches."""
    rng = np.random.default_rng(seed)
    units = np.concatenate([np.arange(0, 400, 2), np.full(100, 7), np.full(30, 9), np.full(40, 11), np.full(50, -1)])
    return rng.choice(np.concatenate([units, np.repeat(np.arange(400, 430), 9)]), vocab).astype(np.int32)


def arrays(seed=0, tokens=N, width=D, vocab=V):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32), jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)


def slices(vocab=V, seed=3):
    """Ranks, and a slice per token; the first holds nothing, the second all."""
    rng = np.random.default_rng(seed)
    lower = rng.integers(0, vocab // 2, N).astype(np.int32)
    upper = lower + rng.integers(0, vocab, N).astype(np.int32)
    upper[0], lower[1], upper[1] = lower[0], 0, vocab
    return rng.permutation(vocab).astype(np.int32), (lower, upper)


def dense(hidden, unembed, units, k, valid=None, rank=None, between=None, soft_cap=None, temperature=1.0):
    """The reference in float64."""
    with jax.enable_x64(True):
        hidden, unembed = (jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, unembed))
        logits = reference.logits(hidden, unembed, None if valid is None else jnp.asarray(valid))
        if soft_cap is not None:
            logits = jnp.where(jnp.isneginf(logits), logits, soft_cap * jnp.tanh(logits / soft_cap))
        return [np.asarray(x) for x in reference.aligned_topk(logits / temperature, units, k, rank, between)]


def assert_equal(got, expected, exact=False):
    values, units, *ends = expected
    np.testing.assert_array_equal(got.units, units)
    for a, b in zip((got.values, got.residual, got.logsumexp, got.everything), (values, *ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 2e-5)


@FORMS
def test_every_kind_of_unit_equals_the_dense_form(form):
    units, (hidden, unembed) = every_kind(), arrays()
    planned = layout.build(units, R, valid=VALID)
    assert {kind for kind, *_ in planned.runs} == {layout.RESIDUAL, 1, 2, 4, 8, 16, layout.FAT} and V % 128 and not planned.ordered
    got = form(hidden, layout.arrange(unembed, planned), k=20)
    assert_equal(got, dense(hidden, unembed, units, 20, VALID))
    total = jnp.logaddexp(jax.nn.logsumexp(form(hidden, layout.arrange(unembed, planned), k=20).values, axis=1), got.residual)
    assert (total <= got.logsumexp + 1e-5).all()


@FORMS
def test_slices_cap_and_temperature_equal_the_dense_form(form):
    units, (hidden, unembed) = every_kind(seed=5), arrays(seed=5)
    rank, between = slices()
    options = {"soft_cap": 5.0, "temperature": 0.7}
    arranged = layout.arrange(unembed, layout.build(units, R, rank))
    got = form(hidden, arranged, k=20, between=between, **options, **({} if form is blocked else {"tiles": TWO_WIDTHS}))
    expected = dense(hidden, unembed, units, 20, None, rank, between, **options)
    assert_equal(got, expected)
    assert np.isneginf(got.logsumexp[0]) and (got.units[0] == -1).all()  # a slice of nothing
    np.testing.assert_allclose(got.logsumexp[1], got.everything[1], rtol=1e-6)


TWO_WIDTHS = tuning.Tiles(tokens=16, width=8, bins=32, depth=3, rows=8, lanes=32)


def test_logits_in_equals_hidden_in():
    units, (hidden, unembed) = every_kind(seed=6), arrays(seed=6)
    rank, between = slices()
    planned = layout.build(units, R, rank)
    got = jax.jit(lambda x, b: aligned.aligned_topk_logits(x, planned, 20, between=b))(hidden @ unembed.T, between)
    assert_equal(got, dense(hidden, unembed, units, 20, None, rank, between))


def test_same_tokenizer_is_the_plain_topk_bitwise():
    hidden, unembed = arrays()
    planned = layout.identity(V, R)
    assert planned.runs == ((1, 0, 11),) and planned.ordered and planned.padding == 11 * R / V - 1
    arranged = layout.arrange(unembed, planned)
    np.testing.assert_array_equal(arranged.matrix[:V], unembed)
    values, ids, total = jax.jit(ops.topk, static_argnames=("k", "block"))(hidden, unembed, k=20, block=R)
    got = blocked(hidden, arranged, k=20)
    np.testing.assert_array_equal(got.values, values)
    np.testing.assert_array_equal(got.units, ids)
    np.testing.assert_allclose(got.logsumexp, total, rtol=1e-6)
    assert np.isneginf(got.residual).all()
    got = interpreted(hidden, arranged, k=20)
    np.testing.assert_array_equal(got.units, ids)
    np.testing.assert_allclose(got.values, values, rtol=1e-6)


def whole_numbers(seed, low=-1, high=2, tokens=N, vocab=V):
    """Logits that are exact and full of ties."""
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.integers(low, high, (size, 16)), jnp.float32) for size in (tokens, vocab))


@FORMS
@pytest.mark.parametrize("kinds", ["identity", "doubles"])
def test_ties_go_to_the_lower_unit(form, kinds):
    for seed in range(3):  # one compilation
        hidden, unembed = whole_numbers(seed)
        # Doubles: the lower half of the units has two rows each, so the order of the layout is not that of the units.
        units = np.arange(V) if kinds == "identity" else np.random.default_rng(0).permutation(np.r_[np.arange(500), np.arange(V - 500)])
        got = form(hidden, layout.arrange(unembed, layout.build(units, R)), k=20)
        expected = dense(hidden, unembed, units, 20)
        tied = np.sum(expected[0][:, 1:] == expected[0][:, :-1])
        assert tied > 5 * N and (form is blocked and kinds == "identity" or got.recomputed > 0)
        assert_equal(got, expected)


@pytest.mark.parametrize("many", [3, 4, 20])
def test_a_row_whose_best_share_a_bin_is_computed_again(many):
    """Adversarial columns: the best ``many`` of every second token all stand in bin 5, which keeps three."""
    rng = np.random.default_rng(many)
    logits = rng.permuted(np.tile(np.arange(V, dtype=np.float32), (N, 1)), axis=1) / V
    same_bin = np.arange(5, V, TILES.bins)[:many]
    logits[::2, same_bin] += np.float32(10)
    hidden, unembed = jnp.eye(N, 48), jnp.asarray(np.pad(logits, ((0, 11), (0, 0))).T)
    arranged = layout.arrange(unembed, layout.identity(V, R))
    k = 4
    tiles = tuning.Tiles(tokens=16, width=48, bins=32, depth=3, rows=16, lanes=32)
    got = interpreted(hidden, arranged, k=k, tiles=tiles)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got.units, best)
    np.testing.assert_array_equal(got.values, np.take_along_axis(logits, best, axis=1))
    # What the kernel itself kept is wrong for exactly the rows that were computed again.
    raw = kernel.candidates(jnp.pad(hidden, ((0, 11), (0, 0))), arranged, tiles, None, None, 1.0, True)
    kept = np.asarray(jax.lax.top_k(raw.values, k)[0])[:N]
    wrong = (kept != np.take_along_axis(logits, best, axis=1)).any(axis=1)
    assert wrong[::2].all() == (many > 3) and got.recomputed == N - np.count_nonzero(kept[:, -1] > raw.evicted[:N])
    assert got.recomputed >= wrong.sum() >= (19 if many > 3 else 0)


def test_bins_take_turns_so_that_large_units_do_not_collide():
    starts = kernel.first_bins(((16, 0, 20), (1, 20, 2), (4, 22, 3)), 64, 32)
    assert (starts < 32).all() and (starts % 4 == 0).all() and starts[20:22].tolist() == [0, 0] and starts[22:].tolist() == [0, 16, 0]
    assert np.bincount(starts[:20], minlength=32)[::4].tolist() == [3, 3, 3, 3, 2, 2, 2, 2]


@FORMS
def test_infinite_logits_and_padding_rows(form):
    units = every_kind()
    rng = np.random.default_rng(4)
    hidden, unembed = np.zeros((N, D), np.float32), np.zeros((V, D), np.float32)
    hidden[:, 1], unembed[:, 1] = rng.uniform(0.5, 2, N), rng.normal(size=V)
    hidden[3:6, 0] = 1e30  # these tokens meet infinite logits, the other tokens do not
    up, down = np.flatnonzero(units == 20)[:1], np.flatnonzero(np.isin(units, [40, 11]))
    unembed[up, 0], unembed[down, 0] = 1e30, -1e30
    unembed[50:60, 2] = -np.inf  # rows that are padding by their value
    got = form(jnp.asarray(hidden), layout.arrange(jnp.asarray(unembed), layout.build(units, R, valid=VALID)), k=20)
    with np.errstate(over="ignore"):
        logits = np.where((np.arange(V) // 10 == 5) | ~VALID, -np.inf, (hidden[:, :1] * unembed[:, 0]) + hidden[:, 1:2] * unembed[:, 1])
    values, best, *ends = [np.asarray(x) for x in reference.aligned_topk(jnp.asarray(logits, jnp.float32), units, 20)]
    assert np.isposinf(values[3:6, 0]).all() and (best[3:6, 0] == 20).all() and np.isposinf(ends[1][3:6]).all()
    assert_equal(got, (values, best, *ends))
    assert np.isfinite(got.logsumexp[6:]).all()


@FORMS
def test_more_places_than_units_stay_empty(form):
    units = np.where(np.arange(V) % 3 == 0, -1, np.arange(V) % 17).astype(np.int32)
    hidden, unembed = arrays()
    planned = layout.build(units, R)
    got = form(hidden, layout.arrange(unembed, planned), k=40)
    assert planned.num_units == 17 and (got.units[:, 17:] == -1).all() and np.isneginf(got.values[:, 17:]).all()
    assert_equal(got, dense(hidden, unembed, units, 40))
    mass = jnp.logaddexp(jax.nn.logsumexp(got.values, axis=1), got.residual)
    np.testing.assert_allclose(mass, got.logsumexp, rtol=1e-6)  # k = all units: nothing is lost
    assert got.recomputed == 0


@FORMS
def test_one_bfloat16_token_many_rows(form):
    """Fewer tokens than a tile, inputs in bfloat16, sums in float32."""
    units, (hidden, unembed) = np.arange(300) // 2, arrays(tokens=1, vocab=300)
    hidden, unembed = hidden.astype(jnp.bfloat16), unembed.astype(jnp.bfloat16)
    got = form(hidden, layout.arrange(unembed, layout.build(units, R)), k=5)
    assert_equal(got, dense(hidden, unembed, units, 5))
    assert got.values.dtype == jnp.float32


def test_the_gpu_kernel_equals_the_dense_form_and_lowers():
    """Its body in interpret mode, with slices and a run that XLA does; and Triton's text for a GPU that is not here."""
    units, (hidden, unembed) = every_kind(), arrays(tokens=32)
    rank, between = slices()
    between = tuple(x[:32] for x in between)
    arranged = layout.arrange(unembed, layout.build(units, R, rank))
    find = jax.jit(lambda h, a, b: aligned._with_kernel(h, a, 20, b, None, 0.7, TILES, True, kernel_gpu))
    got = find(hidden, arranged, between)
    expected = dense(hidden, unembed, units, 20, None, rank, between, temperature=0.7)
    sure = np.asarray(got.certain)
    assert sure.sum() > 8
    np.testing.assert_array_equal(got.units[sure], expected[1][sure])
    np.testing.assert_allclose(got.values[sure], expected[0][sure], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(jnp.logaddexp(got.aligned, got.residual), expected[3], rtol=1e-5)
    np.testing.assert_allclose(got.everything, expected[4], rtol=1e-5)

    wide = layout.arrange(jnp.zeros((V, 256), jnp.bfloat16), layout.build(units, 2048))
    program = jax.jit(lambda h, a: aligned.aligned_topk(h, a, 128, implementation="triton"))
    traced = program.trace(jnp.zeros((64, 256), jnp.bfloat16), wide)
    assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_tokens_in_several_calls(monkeypatch):
    monkeypatch.setattr(aligned, "TOGETHER", 16)
    hidden, unembed = arrays(vocab=100)
    fresh = jax.jit(functools.partial(aligned.aligned_topk, k=5, implementation="interpret", tiles=TILES))
    got = fresh(hidden, layout.arrange(unembed, layout.identity(100, R)))
    assert_equal(got, dense(hidden, unembed, np.arange(100), 5))


def test_no_array_of_all_tokens_over_all_ids(largest):
    units, (hidden, unembed) = every_kind(vocab=3000), arrays(tokens=512, vocab=3000)
    arranged = layout.arrange(unembed, layout.build(units, R))
    for form in (blocked, interpreted):
        assert largest(jax.make_jaxpr(lambda h, a, f=form: f(h, a, k=20))(hidden, arranged).jaxpr) < 512 * 3000 // 8
    assert largest(jax.make_jaxpr(lambda h: reference.aligned_topk(h @ unembed.T, units, 20))(hidden).jaxpr) >= 512 * 3000


def test_what_makes_no_sense_is_refused():
    hidden, unembed = arrays()
    planned = layout.identity(V, R)
    arranged = layout.arrange(unembed, planned)
    for bad, match in (
        ({"hidden": hidden[:, 1:]}, "must be .N, 16."),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"between": (np.zeros(3), np.zeros(3))}, "one slice per token"),
        ({"implementation": "interpret", "tiles": TILES, "k": 96}, "32 bins of 3 hold no more than 96"),
    ):
        with pytest.raises(ValueError, match=match):
            aligned.aligned_topk(**{"hidden": hidden, "arranged": arranged, "k": 5, **bad})
    with pytest.raises(ValueError, match="V above 700"):
        layout.arrange(unembed[:-1], planned)
    with pytest.raises(ValueError, match="V above 700"):
        aligned.aligned_topk_logits(jnp.zeros((3, 700)), planned, 5)


def test_blocked_sums_take_infinities():
    running = blocks.add_logsumexp(blocks.start_logsumexp(2), jnp.asarray([[jnp.inf, 1.0], [-jnp.inf, -jnp.inf]]))
    again = blocks.add_logsumexp(running, jnp.asarray([[3.0, jnp.inf], [2.0, -jnp.inf]]))
    np.testing.assert_array_equal(blocks.finish_logsumexp(again), [np.inf, 2.0])
