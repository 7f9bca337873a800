"""Training a small SentencePiece vocabulary in which every string survives encoding exactly.

SentencePiece takes its user symbols as one comma-separated line, so a symbol with a comma, a quote or a newline cannot be passed to
its trainer. Here the trainer never sees the symbols: texts are cut at them, a plain model is trained on what lies between, and the
symbols are put into the trained model afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from a1jax.align.byte_table import CONTROL_TEXT, SPACE
from a1jax.data.errors import DataError

LAYOUT = ("\n", "\t")
"""Characters that are symbols of every trained vocabulary, so that no merge runs over a line end."""


def train_model(
    texts: Iterable[str], vocab_size: int, symbols: Sequence[str], model_type: str, character_coverage: float, split_digits: bool
) -> bytes:
    """The serialised model; arguments and errors as in ``tokenizer.train_sentencepiece``."""
    extra = list(dict.fromkeys((*CONTROL_TEXT, *symbols, *LAYOUT)))
    bad = next((s for s in symbols if not s or SPACE in s or "\0" in s), None)
    if bad is not None:
        raise DataError(f"symbol {bad!r} cannot be in a SentencePiece vocabulary: use a non-empty text without U+2581 and U+0000")
    cut = re.compile("|".join(re.escape(s) for s in sorted(extra, key=len, reverse=True)))
    # U+2581 would train as a space; NUL is refused. Both are spelled in bytes when encoding.
    parts = (part for text in texts for whole in cut.split(text) for part in re.split(f"[{SPACE}\0]", whole) if part.strip())
    trained = io.BytesIO()
    try:
        sentencepiece.set_random_generator_seed(0)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts, model_writer=trained, vocab_size=vocab_size - len(extra), model_type=model_type,
            character_coverage=character_coverage, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, split_digits=split_digits, allow_whitespace_only_pieces=True, num_threads=1,
            shuffle_input_sentence=False, max_sentence_length=1 << 24, hard_vocab_limit=False, unk_id=0, bos_id=-1, eos_id=-1,
            pad_id=-1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "sentences_.empty" in reason:
            reason = "there is no text between the symbols; give longer texts"
        elif "required_chars" in reason:
            reason = "too small for its symbols, 256 bytes and characters; raise vocab_size or lower character_coverage"
        raise DataError(f"no SentencePiece vocabulary of {vocab_size} from these texts: {reason}") from None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(trained.getvalue())
    _insert(proto, extra)
    return proto.SerializeToString(deterministic=True)


def _insert(proto: sentencepiece_model_pb2.ModelProto, extra: Sequence[str]) -> None:
    """Put ``extra`` in front of the trained pieces as user symbols; trained pieces with the same text give way."""
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    spelled = [text.replace(" ", SPACE) for text in extra]
    trained = [piece for piece in proto.pieces if piece.piece not in set(spelled)]
    symbols = [kinds(piece=text, score=0.0, type=kinds.USER_DEFINED) for text in spelled]
    del proto.pieces[:]
    proto.pieces.extend(symbols + trained)
    spec = proto.trainer_spec
    spec.vocab_size, spec.unk_id = len(proto.pieces), len(symbols)
