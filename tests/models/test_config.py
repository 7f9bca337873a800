import dataclasses

import pytest

from a1jax.config import ConfigError
from a1jax.models import transformer
from a1jax.models.config import NAMED, ModelConfig, one_billion, qwen3_5_35b_a3b, tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("full_attention",)}, "layer_types has 1 entries: give one for each of num_layers = 2"),
        ({"layer_types": ("full_attention", "window")}, "layer_types has 'window': choose from linear_attention, full_attention"),
        ({"num_heads": 3}, "num_heads is 3: make it a multiple of num_kv_heads = 2"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads is 3"),
        ({"num_experts_active": 9}, "num_experts_active is 9: at most num_experts = 8"),
        ({"delta_chunk": 12}, "delta_chunk is 12: make it a power of two"),
        ({"rotary_fraction": 0.1}, "rotary width 3 of head_dim 32 must be even"),
        ({"rotary_fraction": 0.0}, "rotary width 0"),
        ({"moe": "sparse"}, "moe is 'sparse': choose one of dense, ragged, blocked, grouped"),
        ({"attention": "fast"}, "attention is 'fast': choose one of auto, chunked, splash, flash, flash_triton"),
        ({"remat": "all"}, "remat is 'all'"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
        ({"d_model": 0}, "d_model is 0: give a number of at least 1"),
        ({"attention_chunk": -1}, "attention_chunk is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("ModelConfig.")


def test_every_third_layer_and_every_name():
    assert [ModelConfig().is_full_attention(i) for i in range(8)] == [False, False, False, True] * 2
    for name, make in NAMED.items():
        cfg = make(vocab_size=100)
        assert cfg.vocab_size == 100 and dataclasses.replace(cfg) == cfg and hash(cfg) == hash(make(vocab_size=100)), name


def test_the_35b_model_has_35b_parameters_of_which_3b_are_active():
    """Counted by hand from the published sizes."""
    d, layers, vocabulary = 2048, 40, 248_320
    expert = 3 * d * 512
    moe = 256 * expert + 3 * d * 512 + d + d * 256  # experts, shared expert, its gate, router
    key, value = 16 * 128, 32 * 128
    delta = d * (2 * key + value) + d * value + 2 * d * 32 + 4 * (2 * key + value) + 2 * 32 + 128 + value * d
    attention = d * 16 * 256 * 2 + 2 * d * 2 * 256 + 16 * 256 * d + 2 * 256
    total = layers * (moe + 2 * d) + 30 * delta + 10 * attention + 2 * vocabulary * d + d
    active = total - layers * (256 - 8) * expert
    assert transformer.parameter_counts(qwen3_5_35b_a3b()) == (total, active)
    assert 34.5e9 < total < 35.5e9
    assert 2.9e9 < active - vocabulary * d < 3.0e9  # the embedding is looked up, not multiplied
    assert transformer.parameter_counts(qwen3_5_35b_a3b(tie_embeddings=True))[0] == total - vocabulary * d


def test_the_one_billion_member_counted_by_hand():
    d, layers, vocabulary, expert = 1024, 16, 32_768, 3 * 1024 * 512
    moe = 32 * expert + expert + d + d * 32
    key, value = 8 * 128, 16 * 128
    delta = d * (2 * key + value) + d * value + 2 * d * 16 + 4 * (2 * key + value) + 2 * 16 + 128 + value * d
    attention = d * 8 * 256 * 2 + 2 * d * 2 * 256 + 8 * 256 * d + 2 * 256
    total = layers * (moe + 2 * d) + 12 * delta + 4 * attention + vocabulary * d + d  # one table, tied
    assert transformer.parameter_counts(one_billion()) == (total, total - layers * 28 * expert) == (995_218_304, 290_575_232)
    assert [one_billion().is_full_attention(i) for i in range(16)] == [False, False, False, True] * 4
