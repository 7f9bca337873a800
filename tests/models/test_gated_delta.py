import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params
from a1jax.models import gated_delta

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def layer(cfg):
    return jit(lambda key: params.init(gated_delta.specs(cfg), key))(jax.random.key(2))


def test_a_packed_row_equals_its_segments_alone_at_every_border(cfg, layer):
    """Row i: a segment of i tokens, one of one token, one of two (shorter than the convolution), the rest; borders at every offset of
    three chunks of 8. In value, and in the gradient of every segment's output by the input."""
    length = 24
    x = jax.random.normal(jax.random.key(3), (length, length, cfg.d_model))
    cuts = [[0, i, i + 1, i + 3, length] for i in range(1, length - 3)]
    runs = np.stack([np.searchsorted(c, np.arange(length), side="right") for c in cuts]).astype(np.int32)
    x = x[: len(cuts)]

    def outputs(x, runs, weight):
        y = gated_delta.apply(layer, x, runs, cfg)
        return jnp.sum(jnp.sin(y) * weight), y

    run = jit(jax.value_and_grad(outputs, has_aux=True))
    one = jnp.ones((len(cuts), length, 1))
    (_, packed), gradient = run(x, jnp.asarray(runs), one)
    for part in range(4):
        alone = np.zeros_like(x)
        for row, c in enumerate(cuts):
            alone[row, : c[part + 1] - c[part]] = x[row, c[part] : c[part + 1]]
        lengths = np.array([c[part + 1] - c[part] for c in cuts])
        inside = np.arange(length)[None] < lengths[:, None]
        padding = jnp.asarray(~inside, jnp.int32)
        (_, values), gradients = run(jnp.asarray(alone), padding, jnp.asarray(inside[..., None], jnp.float32))
        for row, c in enumerate(cuts):
            np.testing.assert_allclose(packed[row, c[part] : c[part + 1]], values[row, : lengths[row]], atol=1e-5)
            np.testing.assert_allclose(gradient[row, c[part] : c[part + 1]], gradients[row, : lengths[row]], atol=1e-5)


def test_initial_decay(cfg, layer):
    np.testing.assert_allclose(np.exp(layer["A_log"]), [0.002, 0.2], rtol=1e-5)
    np.testing.assert_array_equal(layer["dt_bias"], 0)
    assert -0.5 <= layer["conv1d"].min() < -0.4
