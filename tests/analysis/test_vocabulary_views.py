"""Two tokenizers side by side: kinds, cuts, a teacher of counts and one position's target, by hand and against a1jax.align."""

import dataclasses

import numpy as np
import pytest

from a1jax.align import byte_table, spans, target, vocab_map
from a1jax.align.trie import NONE
from a1jax.analysis import turn_views
from a1jax.analysis import vocabulary_views as views
from a1jax.config import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class Letters:
    """A tokenizer of whole words: the longest word that fits, from the left."""

    words: tuple[bytes, ...]
    path: str = "words"

    @property
    def table(self):
        return (*self.words, None)

    @property
    def spelling(self):
        return (*(w.decode() for w in self.words), "<end>")

    @property
    def eos_id(self):
        return len(self.words)

    pad_id = property(lambda self: self.eos_id)
    bos_id = None
    pieces = property(lambda self: {"<end>": self.eos_id})
    encoder = property(lambda self: self.encode)

    def encode(self, text):
        raw, ids = text.encode(), []
        while raw:
            best = max((w for w in self.words if raw.startswith(w)), key=len)
            ids.append(self.words.index(best))
            raw = raw[len(best) :]
        return ids


@pytest.fixture(scope="module")
def digits():
    """A student with numbers of three digits, a teacher that writes 2 and 3 together and has a word the student cannot begin."""
    student, teacher = Letters((b"1", b"2", b"12", b"123", b"3")), Letters((b"1", b"2", b"3", b"23", b"x"))
    return views.Pair(student, teacher, vocab_map.build(student, teacher), ("123", "1223"))


def test_kinds_by_hand(digits):
    assert views.kinds(digits.map).tolist() == ["exact", "exact", "exact", "prefix", "residual", "control"]
    stats = digits.map.stats()
    assert [np.sum(views.kinds(digits.map) == k) for k in ("exact", "prefix", "residual")] == [
        stats[k] for k in ("exact", "prefix", "residual")
    ]


def test_examples_by_hand(digits):
    ids, folded, fan = views.examples(digits).parts
    assert (
        ("prefix", 3, "23", 1, "2") in ids.rows
        and ("residual", 4, "x", None, "") in ids.rows
        and ("control", 5, "<end>", 5, "<end>") in ids.rows
    )
    assert folded.rows == ((3, "123", 0, "1"), (2, "12", 0, "1")) and folded.note.startswith("2 of them")
    assert fan.rows[0] == (1, "2", 2, "2  23")


def test_a_teacher_of_counts_by_hand(digits):
    """1|23 and 1|2|23 end: after 1 once 23 and once 2, over six valid ids with 0.5 each."""
    p = np.exp(turn_views.counted(digits, [0, 3, 5], smoothing=0.5))
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(p[1], np.array([0.5, 1.5, 0.5, 1.5, 0.5, 0.5]) / 5)
    np.testing.assert_allclose(p[0, 0], 2.5 / 5)
    np.testing.assert_allclose(p[2, 5], 2.5 / 5)


def test_a_turn_in_both(digits):
    turn = turn_views.turn(digits, "1223")
    assert (turn.ours, turn.theirs) == ([2, 1, 4, 5], [0, 1, 3, 5]) and turn.teacher == "a teacher of counts"
    assert [turn_views.kind(turn.spans, i) for i in range(4)] == ["chained", "synchronised", "straddled", "synchronised"]
    assert [turn_views.first(turn, k) for k in ("straddled", "chained", "no such kind")] == [2, 0, 0]
    assert repr(turn_views.side_by_side(digits, turn)).splitlines() == ["12 / 1|2", "2|3 / 23", "<end> / <end>"]
    rows = turn_views.positions(digits, turn).rows
    assert rows[0] == (0, "12", "0-1", "1|2", 0, "chained") and rows[2] == (2, "3", "2", "23", 1, "straddled")
    assert rows[1][2] == "2" and "25 %" in turn_views.positions(digits, turn).note


def test_one_target_is_the_target(digits):
    turn = turn_views.turn(digits, "1223")
    exact = target.target(turn.log_p, turn.ours, turn.theirs, turn.spans, digits.map)
    for position in range(4):
        table, drawn = turn_views.one_target(digits, turn, position, k=20).parts
        (panel,) = drawn.figure.panels
        heights = {label: sum(values[i] for values in panel.parts.values()) for i, label in enumerate(panel.labels)}
        assert sum(heights.values()) == pytest.approx(1)
        assert heights["residual"] == pytest.approx(exact.residual[position]) and heights["other units"] == pytest.approx(0, abs=1e-12)
        for label, height in heights.items():
            if label.endswith(")"):
                assert height == pytest.approx(exact.q[position, int(label.rpartition("(")[2][:-1])])
        assert sum(row[2] for row in table.rows) == pytest.approx(1)


def test_a_masked_position_has_none_and_a_wrong_one_is_refused(digits):
    turn = turn_views.turn(digits, "1223")
    masked = dataclasses.replace(turn, spans=dataclasses.replace(turn.spans, masked=np.ones(4, bool)))
    assert "no target" in repr(turn_views.one_target(digits, masked, 1))
    assert turn_views.positions(digits, masked).rows[1] == (1, "2", None, "", 0, "masked")
    with pytest.raises(ConfigError, match="the turn has 4"):
        turn_views.one_target(digits, turn, 4)


def test_blocks_of_a_turn_are_all_of_it(digits):
    """Whatever is cut where, joining one side's pieces gives the text."""
    for text in ("1", "123", "12233122", "3123"):
        turn = turn_views.turn(digits, text)
        blocks = [line.split(" / ") for line in repr(turn_views.side_by_side(digits, turn)).splitlines()]
        for side in (0, 1):
            assert "".join(block[side] for block in blocks).replace("|", "") == text + "<end>"


def test_bytes_as_they_can_be_read():
    assert views.readable(b"a b\n\tc") == "a·b⏎⇥c"
    assert views.readable("é".encode()[:1]) == "<0xC3>" and views.readable(b"\x00") == "\\x00"


def test_tokenizers_are_trained_once_and_fit_the_quickstart(tmp_path):
    made = views.pair(None, None, tmp_path)
    before = (tmp_path / "student.model").read_bytes()
    assert (made.map.mode, len(made.map.unit_of_student), len(made.map.unit_of_teacher)) == ("two_sided", 640, 720)
    again = views.pair(None, None, tmp_path)
    assert (tmp_path / "student.model").read_bytes() == before and again.map.stats() == made.map.stats()
    same = views.pair(tmp_path / "teacher.model", tmp_path / "teacher.model", tmp_path)
    assert same.map.mode == "identity" and (same.map.unit_of_teacher[:5] != NONE).all()
    turn = turn_views.turn(made)
    assert {turn_views.kind(turn.spans, i) for i in range(len(turn.ours))} >= {"synchronised", "straddled", "chained"}
    assert spans.align(turn.ours, turn.theirs, made.map, turn.text).report() == turn.spans.report()
    assert byte_table.join(made.student.table, turn.ours).decode() == turn.text
