"""Rank files, tiktoken's format: a line ``<base64 of the token's bytes> <rank>`` per token, the rank being both its id and its age.

A text is cut into words by a pattern, and each word is merged from its bytes: always the neighbours whose join has the lowest rank.
What the file does not say is looked for in ``tokenizer_config.json`` beside it: special tokens in ``added_tokens_decoder`` (id ->
content, special), as Hugging Face writes it, and the pattern in ``pat_str``. Without the latter it is the one of the vocabulary that the
file is named after, else cl100k's.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from a1jax.data.errors import DataError
from a1jax.data.tokenizer_formats import Tokenizer, finish

PATTERNS = {
    "o200k": "|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]),
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}  # fmt: skip
"""Known patterns by a part of the file's name (r50k and p50k are gpt2's)."""

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) +(\d+)\s*\Z")
_REMEMBERED = 1 << 16  # words whose ids are kept


def is_rank_file(raw: bytes) -> bool:
    """Whether the first line is one of a rank file."""
    return bool(_LINE.match(raw.lstrip()[:4096].splitlines()[0])) if raw.strip() else False


def rank_file(file: pathlib.Path, raw: bytes, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a rank file; ``tokenizer.load`` calls it. Raises DataError for a bad line, a rank or token given twice, a pattern
    that is none, a byte that is no token, and when no token ends a turn."""
    ranks = _parse(file, raw)
    special = _special(file, config)
    size = max([*ranks.values(), *special], default=-1) + 1
    table: list[bytes | None] = [None] * size
    for token, i in ranks.items():
        table[i] = token
    clash = [i for i in special if table[i] is not None]
    if clash:
        raise DataError(f"id {clash[0]} is a token of {file} and a special token of its tokenizer_config.json: correct the latter")
    spelling = ["" if b is None else b.decode("utf-8", "replace") for b in table]
    for i, entry in special.items():
        spelling[i] = entry["content"]
        table[i] = None if entry.get("special", True) else entry["content"].encode()
    pieces = {entry["content"]: i for i, entry in special.items()}
    encode = _encoder(_words(file, config), ranks, pieces)
    return finish(file, config, spelling, table, pieces, {}, encode, lambda texts: [encode(text) for text in texts])


def _parse(file: pathlib.Path, raw: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.match(line)
        try:
            token, rank = base64.b64decode(found[1], validate=True), int(found[2])
        except (TypeError, binascii.Error):
            raise DataError(f"{file}:{number} is no `<base64> <rank>` line: fetch the file again") from None
        if token in ranks:
            raise DataError(f"{file}:{number} gives token {token!r} a second rank: fetch the file again")
        ranks[token] = rank
    if len(set(ranks.values())) < len(ranks):
        raise DataError(f"{file} gives one rank to several tokens: fetch the file again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DataError(f"{file} has no token for byte {missing}, so not every text can be written: fetch the file again")
    return ranks


def _special(file: pathlib.Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        return {int(i): dict(entry, content=str(entry["content"])) for i, entry in config.get("added_tokens_decoder", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"added_tokens_decoder in tokenizer_config.json beside {file} has another form: write {{id: {{content, special}}}}"
        ) from None


def _words(file: pathlib.Path, config: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Text -> its words, by the pattern."""
    name = file.name.replace("r50k", "gpt2").replace("p50k", "gpt2")
    pattern = config.get("pat_str") or next((p for key, p in PATTERNS.items() if key in name), PATTERNS["cl100k"])
    try:
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"pat_str in tokenizer_config.json beside {file} is no regular expression ({error})") from None
    return lambda text: [word for word, _ in cut.pre_tokenize_str(text)]


def _encoder(words: Callable[[str], list[str]], ranks: Mapping[bytes, int], pieces: Mapping[str, int]) -> Callable[[str], list[int]]:
    marks = re.compile("|".join(f"({re.escape(text)})" for text in sorted(pieces, key=len, reverse=True))) if pieces else None
    known: dict[str, list[int]] = {}

    def of_word(word: str) -> list[int]:
        ids = known.get(word)
        if ids is None:
            ids = merge(word.encode("utf-8"), ranks)
            if len(known) < _REMEMBERED:
                known[word] = ids
        return ids

    def encode(text: str) -> list[int]:
        parts = [part for part in marks.split(text) if part] if marks else [text]
        return [i for part in parts for i in ([pieces[part]] if part in pieces else (i for word in words(part) for i in of_word(word)))]

    return encode


def merge(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of one word: its bytes, of which the neighbours whose join has the lowest rank (the first of them) are joined until none can.
    Every single byte has to have a rank. Time n log n."""
    if word in ranks:
        return [ranks[word]]
    end = list(range(1, len(word) + 1))  # end[a]: where the part that begins at a ends; 0 for one that was joined to the left
    left = list(range(-1, len(word) - 1))
    queue: list[tuple[int, int, int]] = []  # (rank, where the join begins, where it ends)

    def offer(a: int) -> None:
        if a >= 0 and end[a] < len(word):
            stop = end[end[a]]
            rank = ranks.get(word[a:stop])
            if rank is not None:
                heapq.heappush(queue, (rank, a, stop))

    for a in range(len(word)):
        offer(a)
    while queue:
        _, a, stop = heapq.heappop(queue)
        middle = end[a]
        if not middle or middle >= stop or end[middle] != stop:
            continue  # one of the two has changed since
        end[a], end[middle] = stop, 0
        if stop < len(word):
            left[stop] = a
        offer(left[a])
        offer(a)
    ids, a = [], 0
    while a < len(word):
        ids.append(ranks[word[a : end[a]]])
        a = end[a]
    return ids
