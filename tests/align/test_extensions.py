"""Which tokens begin with which: against the definition, on random words and random pairs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import extensions

WORDS = st.lists(st.binary(max_size=3).map(lambda b: bytes(97 + x % 3 for x in b)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_slices_of_ranks_are_the_tokens_that_begin_so(words):
    rank, low, high = extensions.by_bytes(words)
    assert sorted(rank.tolist()) == list(range(len(words)))
    for token, word in enumerate(words):
        inside = {v for v in range(len(words)) if low[token] <= rank[v] < high[token]}
        assert inside == ({v for v, other in enumerate(words) if other.startswith(word)} if word else set())


def test_by_hand():
    rank, low, high = extensions.by_bytes([b"ab", b"", b"a", b"b", b"a", b"abc"])
    assert rank.tolist() == [2, 5, 0, 4, 1, 3]  # a a ab abc b, then the empty one
    assert low.tolist() == [2, 0, 0, 4, 0, 3] and high.tolist() == [4, 0, 4, 5, 4, 4]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_set_apart_on_either_side(pair, seed):
    made = pair(seed)
    unit, starts, symbols = made.map.unit_of_student, made.map.student_starts, made.map.student_symbols
    words = [
        bytes(min(x, 255) for x in symbols[a:b]) if a < b and symbols[a] < 256 else b"" for a, b in zip(starts, starts[1:], strict=False)
    ]
    for token, word in enumerate(words):
        expected = [v for v, other in enumerate(words) if word and other.startswith(word) and unit[v] == unit[token]]
        assert extensions.shares_unit(made.map, token).tolist() == expected
    texts = made.map.order[: made.map.text_count]
    teacher = {int(t): made.teacher.bytes[t] for t in texts}
    for t in made.rng.choice(texts, min(6, len(texts)), replace=False).tolist():
        for offset in range(1, len(teacher[t])):
            for token in made.rng.choice(len(words), 4).tolist():
                if not words[token]:
                    continue
                begin = teacher[t][:offset] + words[token]
                expected = [o for o in teacher if teacher[o].startswith(begin)]
                expected = {o for o in expected if made.map.suffix[made.map.teacher_starts[o] + offset] == unit[token]}
                assert set(extensions.continuing(made.map, t, offset, token).tolist()) == expected


def test_ids_without_text_have_no_extensions(pair):
    made = pair(1)
    _, low, high = extensions.prefixes(made.map)
    stop = made.student.roles["turn_end"][0]
    assert low[stop] == high[stop] and not len(extensions.shares_unit(made.map, stop))
    assert isinstance(low, np.ndarray)
