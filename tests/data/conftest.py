"""What several data tests share: the real files, the real tokenizers (loaded once) and a small trained vocabulary."""

import gzip
import json

import pytest

from a1jax.data import examples, tokenizer, trajectories

CALL = '<tool_call>\n{"name": "read_page", "arguments": {"title": "'
SYMBOLS = (CALL, '"}}\n</tool_call>', "<think>", "</think>", "a, \"b\" 'c'")


@pytest.fixture(scope="session")
def qwen3(shared_data):
    return tokenizer.load(shared_data / "tokenizers" / "qwen3")


@pytest.fixture(scope="session")
def mistral(shared_data):
    return tokenizer.load(shared_data / "tokenizers" / "mistral")


@pytest.fixture(scope="session")
def pages(shared_data):
    with gzip.open(shared_data / "corpora/python-docs/python3.11_pages.jsonl.gz", "rt") as file:
        return [json.loads(next(file))["text"] for _ in range(20)]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A vocabulary trained on a few made-up lines; needs no shared data."""
    texts = [f"the {w} page of {w} said 'yes, {n}' to <think>a {w}</think>\n" for n in range(40) for w in ("search", "tool", "graph")]
    return tokenizer.train_sentencepiece(texts, tmp_path_factory.mktemp("sp") / "small.model", 400, SYMBOLS)


@pytest.fixture(scope="session")
def real(shared_data):
    """All real trajectories and the report of reading them."""
    return trajectories.read_all(shared_data / "trajectories")


@pytest.fixture(scope="session")
def real_examples(real, qwen3):
    """(trajectory, example) of all real runs with the Qwen3 tokenizer: 2.8M tokens, made once."""
    return list(examples.tokenized(real[0], qwen3, real[1], strict=True))
