"""A setting small enough to run stages in seconds."""

import pytest

from a1jax import metrics
from a1jax.domains import DOMAINS
from a1jax.stages import experts
from a1jax.stages.setting import Setting

NAMES = tuple(DOMAINS)


@pytest.fixture(scope="session")
def tokenizer(domain_tokenizer):
    return domain_tokenizer


@pytest.fixture()
def setting(tokenizer, small_model, tmp_path):
    with metrics.Writer(tmp_path) as writer:
        yield Setting(small_model, tokenizer, NAMES, None, tmp_path, writer, 0)


@pytest.fixture(scope="session")
def data(tokenizer):
    """Pairs of steps and example of both domains, lengths 1 and 2."""
    runs = experts.Runs({1: 12, 2: 12})
    return [pair for i, name in enumerate(NAMES) for pair in experts.examples(name, i, runs, "sft", 0, tokenizer, False)]
