"""A setting small enough to run stages in seconds."""

import pytest

from a1jax import metrics
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.models import config as models
from a1jax.stages import experts
from a1jax.stages.setting import Setting

NAMES = ("search", "tool_calling")
MODEL = models.tiny(
    vocab_size=640,
    d_model=16,
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=2,
    expert_width=8,
    shared_expert_width=8,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_sentencepiece(experts.tokenizer_texts(NAMES, 0), path, vocab_size=640, symbols=experts.symbols(NAMES, 24))


@pytest.fixture()
def setting(tokenizer, tmp_path):
    with metrics.Writer(tmp_path) as writer:
        yield Setting(MODEL, tokenizer, NAMES, None, tmp_path, writer, 0)


@pytest.fixture(scope="session")
def data(tokenizer):
    """Pairs of steps and example of both domains, lengths 1 and 2."""
    return [
        pair for i, name in enumerate(NAMES) for pair in experts.examples(name, i, experts.Runs({1: 12, 2: 12}), "sft", 0, tokenizer, False)
    ]
