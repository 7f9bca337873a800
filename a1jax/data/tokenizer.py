"""Loading and training tokenizers."""

from __future__ import annotations

import gzip
import json
import lzma
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from a1jax.data import tokenizer_formats, tokenizer_ranks
from a1jax.data.errors import DataError
from a1jax.data.sentencepiece_training import train_model
from a1jax.data.tokenizer_formats import Tokenizer

__all__ = ["Tokenizer", "load", "train_sentencepiece"]


def load(path: str | pathlib.Path) -> Tokenizer:
    """Tokenizer from a SentencePiece model, a ``tokenizer.json``, a tiktoken-style rank file (each plain, .gz or .xz), or a folder that
    holds one of them.

    A ``tokenizer_config.json`` beside the file gives the chat template and the end, pad and begin tokens, and for a rank file its
    special tokens and its pattern (see ``tokenizer_ranks``); a ``chat_template.jinja`` beside it gives the template.
    Raises DataError when the file is missing or none of the three formats.
    """
    file = _find(pathlib.Path(path))
    raw = _read(file)
    config = _config(file.parent)
    if raw.lstrip()[:1] == b"{":
        return tokenizer_formats.hugging_face(file, raw, config)
    if tokenizer_ranks.is_rank_file(raw):
        return tokenizer_ranks.rank_file(file, raw, config)
    return tokenizer_formats.sentencepiece_model(file, raw, config)


def train_sentencepiece(
    texts: Iterable[str],
    path: str | pathlib.Path,
    vocab_size: int,
    symbols: Sequence[str] = (),
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    split_digits: bool = True,
) -> Tokenizer:
    """Train on ``texts``, write the model to ``path`` and load it. The same texts give the same file, byte for byte.

    Ids: ``<|endoftext|>`` (padding) 0, ``<|im_start|>`` 1, ``<|im_end|>`` (turn end) 2, then ``symbols`` in their order, then newline
    and tab, ``<unk>``, 256 bytes, learned pieces. Every symbol, whatever characters it has, is one id wherever it occurs (the longest
    wins). ``vocab_size`` is an upper bound: a small text may not have that many pieces. model_type is "bpe" or "unigram".
    character_coverage: share of characters that get a piece of their own; the rest is spelled in bytes.
    Raises DataError when the vocabulary is too small for its symbols and characters, when there is no text, or for a bad symbol.
    """
    raw = train_model(texts, vocab_size, symbols, model_type, character_coverage, split_digits)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return load(path)


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir():
        for pattern in ("tokenizer.json", "tokenizer.json.xz", "tokenizer.json.gz", "*.model", "*.model.v*", "*.tiktoken"):
            found = sorted(path.glob(pattern))
            if found:
                return found[0]
        raise DataError(f"no tokenizer in folder {path}: expected tokenizer.json (also .xz, .gz), a SentencePiece *.model or a *.tiktoken")
    if not path.is_file():
        raise DataError(f"no tokenizer file at {path}: give a tokenizer.json, a SentencePiece model, a rank file, or a folder with one")
    return path


def _read(file: pathlib.Path) -> bytes:
    raw = file.read_bytes()
    try:
        if raw[:6] == b"\xfd7zXZ\x00":
            return lzma.decompress(raw)
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise DataError(f"tokenizer {file} is a damaged archive ({error}): fetch it again") from None


def _config(folder: pathlib.Path) -> dict[str, Any]:
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}): repair it or remove it") from None
    if isinstance(config.get("chat_template"), list):  # several named templates: the one called default
        named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
        config["chat_template"] = named.get("default", next(iter(named.values()), None))
    if template.is_file():
        config["chat_template"] = template.read_text("utf-8")
    for key in ("eos_token", "bos_token", "pad_token"):
        if isinstance(config.get(key), dict):
            config[key] = config[key].get("content")
    return config
