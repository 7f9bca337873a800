"""Byte tables: which bytes of text every token id stands for.

A table is a list over ids: the token's bytes, or None for control tokens and for ids that no token has (both never stand for text).
Facts of spelling, once: a SentencePiece U+2581 is a space and ``<0x0A>`` is that byte; GPT-2 style vocabularies write every byte as
one printable character. ``../shared/design/vocabulary_alignment.md``, section 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

SPACE = "\u2581"
"""SentencePiece's spelling of a space."""

CONTROL_TEXT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Spellings that are control tokens wherever they are one id, though SentencePiece stores them as ordinary user symbols."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def gpt2_characters() -> dict[str, int]:
    """Character -> byte of the GPT-2 alphabet: printable Latin-1 characters are themselves, the other 68 bytes follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + n): byte for n, byte in enumerate(rest)}


_GPT2 = gpt2_characters()


def gpt2_bytes(token: str) -> bytes:
    """Bytes of a token spelled in the GPT-2 alphabet; a token with any other character is taken as plain text (an added token)."""
    try:
        return bytes([_GPT2[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: ``<0xHH>`` is one byte, U+2581 is a space, the rest is UTF-8."""
    match = _BYTE_PIECE.match(piece)
    if match:
        return bytes([int(match.group(1), 16)])
    return piece.replace(SPACE, " ").encode("utf-8")


def fingerprint(table: Sequence[bytes | None]) -> str:
    """SHA-256 (hex) of a byte table: equal exactly when size, every id's bytes and every None are equal."""
    digest = hashlib.sha256(len(table).to_bytes(8, "little"))
    for entry in table:
        digest.update(b"\x00" if entry is None else b"\x01" + len(entry).to_bytes(4, "little") + entry)
    return digest.hexdigest()


def join(table: Sequence[bytes | None], ids: Iterable[int]) -> bytes:
    """Concatenated bytes of ``ids``; control and unknown ids add nothing."""
    size = len(table)
    return b"".join(table[i] or b"" for i in ids if 0 <= i < size)
