"""Made-up pairs of tokenizers with a turn written in both, and the two real tokenizers (loaded once, by one file of tests)."""

import dataclasses

import numpy as np
import pytest

from a1jax.align import byte_table, target, vocab_map

LETTERS = (b"a", b"b", b" ", b"<", b"t", b">", b"\xc3", b"\xa9", b"\n")


@dataclasses.dataclass
class Pair:
    """Two tokenizers, one turn in both, and a teacher's log-probabilities of its tokens."""

    student: byte_table.ByteTable
    teacher: byte_table.ByteTable
    map: vocab_map.VocabMap
    text: bytes
    student_ids: list[int]
    teacher_ids: list[int]
    log_p: np.ndarray
    rng: np.random.Generator


def _table(rng, words, letters):
    """Random words over ``letters``, all of those alone, some twice, controls, a hole, in random order of ids."""
    drawn = {b"".join(letters[k] for k in rng.integers(0, len(letters), rng.integers(1, 6))) for _ in range(words)}
    entries = [*sorted(drawn | set(letters)), None, None, None, None, None, None]
    entries += [entries[k] for k in rng.integers(0, len(entries) - 6, 3)]  # aliases
    place = rng.permutation(len(entries))
    table = [entries[k] for k in place]
    hole, stop, start, eos, bos, free = (int(i) for i in np.flatnonzero([b is None for b in table]))
    roles = {"turn_end": (stop,), "turn_start": (start,), "eos": (eos,), "bos": (bos,)}
    if rng.random() < 0.5:
        roles["think_open"] = (free,)
    spelling = {stop: "<stop>", start: "<start>", eos: "<eos>", bos: "<bos>", free: "<t>"}
    return byte_table.make(table, spelling, roles, len(table) + int(rng.integers(0, 3)))


def written(rng, table, text):
    """Ids that spell ``text``, at random among all ways."""
    ids, at = [], 0
    while at < len(text):
        fit = [i for i, b in enumerate(table.bytes) if b and text.startswith(b, at)]
        ids.append(int(rng.choice(fit)))
        at += len(table.bytes[ids[-1]])
    return ids


def make_pair(seed, mode=None, stop=True, same=False):
    rng = np.random.default_rng(seed)
    letters = LETTERS[: int(rng.choice([2, 3, len(LETTERS)]))]  # few letters make tokens that often begin alike
    student = _table(rng, int(rng.integers(0, 40)), letters)
    teacher = student if same else _table(rng, int(rng.integers(0, 40)), letters)
    text = b"".join(letters[k] for k in rng.integers(0, len(letters), rng.integers(0, 30)))
    ours, theirs = written(rng, student, text), written(rng, teacher, text)
    theirs = ours if same else theirs
    if stop:
        ours = [*ours, student.roles["turn_end"][0]]
        theirs = [*theirs, teacher.roles["eos" if rng.random() < 0.5 and not same else "turn_end"][0]]
    made = vocab_map.build(student, teacher, mode)
    log_p = target.log_softmax(rng.normal(0, 2, (len(theirs), len(teacher))), made.teacher_valid)
    return Pair(student, teacher, made, text, ours, theirs, log_p, rng)


def with_ids(table, new):
    """The same table with other ids: ``new`` [V] is the new id of every old one."""
    old = np.argsort(new)
    roles = {role: tuple(int(new[i]) for i in ids) for role, ids in table.roles.items()}
    spelled, canonical = tuple(table.bytes[i] for i in old), new[table.canonical[old]].astype(np.int32)
    return dataclasses.replace(table, bytes=spelled, kind=table.kind[old], canonical=canonical, roles=roles)


@pytest.fixture(scope="session")
def permuted():
    """permuted(table, new ids): see ``with_ids``."""
    return with_ids


@pytest.fixture(scope="session")
def pair():
    """pair(seed, mode, stop, same) -> Pair: a different one for every seed."""
    return make_pair


@pytest.fixture(scope="session")
def write():
    """write(rng, table, text): see ``written``."""
    return written


@pytest.fixture(scope="session")
def tokenizers(shared_data):
    """{"qwen3": ..., "mistral": ...}: the real ones."""
    from a1jax.data import tokenizer

    return {name: tokenizer.load(shared_data / "tokenizers" / name) for name in ("qwen3", "mistral")}
