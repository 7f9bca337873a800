"""The vocabulary map: hand-computed on a small pair, and equal to its definition on random ones; stored, guarded, refused."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import byte_table, vocab_map, vocab_map_build
from a1jax.config import ConfigError

SEEDS = st.integers(0, 2**32 - 1)
MODES = ("two_sided", "one_sided", "shared")

# The student has a three-digit number and a word that no teacher token reaches; the teacher writes digit by digit.
STUDENT = [b"1", b"2", b"12", b"123", b"th", b"t", b"h", b"the", None, None, b"xy", b"1"]
TEACHER = [b"1", b"2", b"3", b"then", b"t", b"thx", b"e", None, None, None, None, b"<", b"12x"]


@pytest.fixture(scope="module")
def tables():
    student = byte_table.make(STUDENT, {8: "<stop>"}, {"turn_end": (8,)}, vocab_size=14)
    teacher = byte_table.make(TEACHER, {7: "<end>", 8: "<bos>", 9: "<eos>"}, {"turn_end": (7,), "bos": (8,), "eos": (9,)})
    return student, teacher


def test_small_map_by_hand(tables):
    made = vocab_map.build(*tables)
    assert made.mode == "two_sided"
    #       1  2   3  then t  thx  e   end bos eos hole <  12x
    assert made.unit_of_teacher.tolist() == [0, 1, -1, 7, 5, 4, -1, 8, -1, 8, -1, -1, 2]
    #       1  2  12 123 th t   h  the stop hole xy  1' padding
    assert made.unit_of_student.tolist() == [0, 1, 2, 2, 4, 5, -1, 7, 8, -1, -1, 0, -1, -1]
    at = made.teacher_starts
    assert made.suffix[at[3] : at[4]].tolist() == [7, -1, -1, -1]  # then, hen (h is no unit), en, n
    assert made.suffix[at[12] : at[13]].tolist() == [2, 1, -1]  # 12x, 2x, x
    texts = [TEACHER[i] for i in made.order[: made.text_count]]
    assert texts == sorted(b for b in TEACHER if b) and sorted(made.order) == list(range(13))
    assert made.order[made.rank].tolist() == list(range(13)) and made.rank[7] >= made.text_count
    ids, units = made.starting_with(3, 1)  # after "t": t itself ends there, hen and hx begin with h, which is no unit
    assert ([TEACHER[i] for i in ids], units.tolist()) == ([b"t", b"then", b"thx"], [-1, -1, -1])
    ids, units = made.starting_with(12, 1)
    assert ([TEACHER[i] for i in ids], units.tolist()) == ([b"1", b"12x"], [-1, 1])
    assert made.roles == {"stop": ((8,), (7, 9))}
    assert made.teacher_valid.tolist() == [i != 10 for i in range(13)] and not made.student_valid[[9, 12, 13]].any()


def test_stats_by_hand(tables):
    assert vocab_map.build(*tables).stats() == {
        "mode": "two_sided", "student_ids": 11, "teacher_ids": 12, "exact": 3, "prefix": 3, "residual": 3, "units": 7, "folded": 2,
        "unmatched": 2, "controls": 2, "controls_residual": 1, "fan_in_max": 2, "fan_in_p50": 1, "fan_in_p90": 2, "fan_in_p99": 2,
    }  # fmt: skip


def test_other_modes_by_hand(tables):
    one, shared = vocab_map.build(*tables, "one_sided"), vocab_map.build(*tables, "shared")
    assert one.unit_of_student.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, 10, 0, -1, -1]  # only equal bytes are one unit
    assert np.array_equal(one.unit_of_teacher, vocab_map.build(*tables).unit_of_teacher)
    assert one.suffix[one.teacher_starts[3] + 1] == 6  # h is its own unit here
    assert shared.unit_of_teacher.tolist() == [0, 1, -1, -1, 5, -1, -1, 8, -1, 8, -1, -1, -1]
    assert shared.unit_of_student.tolist() == [0, 1, -1, -1, -1, 5, -1, -1, 8, -1, -1, 0, -1, -1]


def _longest(rest, words):
    fit = [b for b in words if b and rest.startswith(b)]
    return words[max(fit, key=len)] if fit else -1


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(MODES))
def test_a_map_is_its_definition(pair, seed, mode):
    made = pair(seed, mode)
    student, teacher, got = made.student, made.teacher, made.map
    atomic = {side: {i for ours, theirs in got.roles.values() for i in (ours, theirs)[side]} for side in (0, 1)}
    never = [set(table.roles["bos"]) for table in (student, teacher)]
    usable = [i for i, b in enumerate(student.bytes) if b and i not in atomic[0] | never[0]]
    words = {student.bytes[i]: i for i in reversed(usable)}  # the lowest id, where the canonical one is not text here
    words |= {student.bytes[i]: i for i in usable if student.canonical[i] == i}
    theirs = [b if i not in atomic[1] | never[1] else b"" for i, b in enumerate(teacher.bytes)]

    def unit(rest):
        return words.get(rest, -1) if mode == "shared" else _longest(rest, words)

    role = {i: ours[0] for ours, ids in got.roles.values() for i in ids}
    expected = [role[i] if i in role else unit(b) for i, b in enumerate(theirs)]
    assert got.unit_of_teacher.tolist() == expected
    units = {b: u for b, u in words.items() if u in expected}
    own_role = {i: ours[0] for ours, _ in got.roles.values() for i in ours}
    fold = []
    for i, b in enumerate(student.bytes):
        b = b if i not in never[0] else b""
        text = {"one_sided": words.get, "shared": units.get, "two_sided": lambda b, _: _longest(b, units)}[mode](b, -1)
        fold.append(own_role.get(i, text))
    assert got.unit_of_student.tolist() == fold
    for t, b in enumerate(theirs):
        assert got.teacher_starts[t + 1] - got.teacher_starts[t] == (1 if t in role else len(b))
        for d in range(len(b)):
            at, raw = got.teacher_starts[t] + d, unit(b[d:])
            assert got.suffix[at] == (fold[raw] if raw >= 0 else -1)
            slice_ = got.order[got.low[at] : got.high[at]]
            assert sorted(slice_) == [i for i, other in enumerate(theirs) if other and other.startswith(b[:d])]
    texts = [theirs[i] for i in got.order[: got.text_count]]
    assert texts == sorted(b for b in theirs if b)
    for _, ids in got.roles.values():
        for at in got.teacher_starts[list(ids)]:
            assert sorted(got.order[got.low[at] : got.high[at]]) == sorted(ids)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_same_tokenizer_is_the_identity(pair, seed):
    made = pair(seed, same=True)
    valid = made.student.kind != byte_table.INVALID
    assert made.map.mode == "identity"
    assert np.array_equal(made.map.unit_of_teacher, np.where(valid, np.arange(len(valid)), -1))
    assert np.array_equal(made.map.unit_of_student, made.map.unit_of_teacher)
    two = vocab_map.build(made.student, made.teacher, "two_sided")  # aliases apart it is the same
    texts = made.student.kind == byte_table.TEXT
    assert np.array_equal(two.unit_of_teacher[texts], made.student.canonical[texts])


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_permuting_ids_changes_labels_only(pair, permuted, seed):
    made = pair(seed)
    ours, theirs = (made.rng.permutation(len(t)) for t in (made.student, made.teacher))  # new id of every old one
    moved = vocab_map.build(permuted(made.student, ours), permuted(made.teacher, theirs))
    relabel = np.append(ours, -1)
    assert np.array_equal(moved.unit_of_teacher[theirs], relabel[made.map.unit_of_teacher])
    assert np.array_equal(moved.unit_of_student[ours], relabel[made.map.unit_of_student])
    assert moved.stats() == made.map.stats()


def test_roles_decide_and_spelling_does_not():
    student = [b"<th", b"ink>", None, None, None, b"<think>"]
    teacher = [b"<think>", None, b"x", None]

    def units(own, others, spelled="[THINK]"):
        ours = byte_table.make(student, {2: spelled, 3: "<stop>", 4: "[CALL]"}, own)
        return vocab_map.build(ours, byte_table.make(teacher, {1: "<stop>", 3: "<tool_call>"}, others))

    both = units({"think_open": (2,)}, {"think_open": (0,)})  # spelled differently: by role, though 5 has its bytes
    assert both.unit_of_teacher.tolist() == [2, -1, -1, -1] and both.unit_of_student[2] == 2
    one = units({}, {"think_open": (0,)})  # text for the student
    assert one.unit_of_teacher[0] == 5 and one.unit_of_student[2] == -1
    other = units({"think_open": (2,)}, {}, spelled="<think>")  # atomic for the student, and the teacher's bytes are text
    assert other.unit_of_teacher[0] in (2, 5) and other.unit_of_student[2] == other.unit_of_teacher[0]
    same = units({"turn_end": (3,)}, {"x_mine": (1,)})  # equal spelling, different roles
    assert same.unit_of_teacher[1] == -1 and same.unit_of_student[3] == -1
    call = units({"tool_call_open": (4,)}, {"tool_call_open": (3,), "turn_end": (1,)})
    assert call.unit_of_teacher.tolist()[1:] == [-1, -1, 4]  # no stop on the student's side: residual


@pytest.mark.parametrize("mode", MODES)
def test_bos_and_padding_are_aligned_with_nothing(mode):
    roles, spelling = {"bos": (1,), "pad": (2,), "eos": (3,)}, {1: "<s>", 3: "</s>"}
    ours, theirs = (byte_table.make([first, None, b"<pad>", None], spelling, roles) for first in (b"a", b"ab"))
    made = vocab_map.build(ours, theirs, mode)  # the padding, though a text token on both sides, too
    assert made.unit_of_teacher.tolist() == [-1 if mode == "shared" else 0, -1, -1, 3]
    assert made.unit_of_student.tolist() == [-1 if mode == "shared" else 0, -1, -1, 3]


def test_a_text_token_spelled_like_an_atomic_role_stays_text():
    ours = byte_table.make([None, b"<t>", b"<t>", b"<"], {0: "<t>"}, {"think_open": (0,)})
    assert ours.canonical.tolist() == [0, 0, 0, 3]
    made = vocab_map.build(ours, byte_table.make([b"<t>", None], {1: "[T]"}, {"think_open": (1,)}))  # the role is spelled otherwise there
    assert made.unit_of_teacher.tolist() == [1, 0] and made.unit_of_student.tolist() == [0, 1, 1, -1]
    same = vocab_map.build(ours, byte_table.make([b"<t>", b"<"], roles={"think_open": (0,)}))
    assert same.unit_of_teacher.tolist() == [0, 3] and same.unit_of_student.tolist() == [0, 0, 0, 3]


def test_equal_bytes_match_whatever_their_spelling():
    pieces = ["\u2581the", "<0x0A>", "\u2581", "\u00e9", "<0xC3>"]
    gpt2 = ["\u0120the", "\u010a", "\u0120", "\u00c3\u00a9", "\u00c3"]
    one = byte_table.make([byte_table.sentencepiece_bytes(p) for p in pieces])
    two = byte_table.make([byte_table.gpt2_bytes(p) for p in gpt2])
    assert one.hash == two.hash and vocab_map.build(one, two).mode == "identity"


def test_a_map_is_stored_and_comes_back(tables, tmp_path):
    made = vocab_map.build(*tables)
    vocab_map.save(made, tmp_path / "map.npz")
    vocab_map.save(made, tmp_path / "again.npz")
    assert (tmp_path / "map.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    back = vocab_map.load(tmp_path / "map.npz", *tables)
    for field in dataclasses.fields(made):
        one, two = getattr(made, field.name), getattr(back, field.name)
        assert type(one) is type(two) and np.array_equal(one, two), field.name
        assert not isinstance(one, np.ndarray) or one.dtype == two.dtype


@pytest.mark.parametrize(
    "change",
    [
        {"table": [b"7", *STUDENT[1:]]},
        {"roles": {"eos": (8,)}},
        {"vocab_size": 15},
        {"encode": lambda text: [11]},  # the other of the two ids with equal bytes is canonical
    ],
)
def test_a_map_of_other_tokenizers_is_refused(tables, tmp_path, change):
    student, teacher = tables
    vocab_map.save(vocab_map.build(student, teacher), tmp_path / "map.npz")
    parts = {"table": STUDENT, "spelling": {8: "<stop>"}, "roles": {"turn_end": (8,)}, "vocab_size": 14} | change
    other = byte_table.make(**parts, name="other.model")
    with pytest.raises(ConfigError, match=r"map.npz is of another student .14 ids. than other.model .*build it again") as error:
        vocab_map.load(tmp_path / "map.npz", other, teacher)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="another student"):  # student and teacher the wrong way round
        vocab_map.load(tmp_path / "map.npz", teacher, student)


def test_files_that_are_no_map_and_old_ones_are_refused(tables, tmp_path):
    with pytest.raises(ConfigError, match="no vocabulary map at .*none.npz: make one"):
        vocab_map.load(tmp_path / "none.npz", *tables)
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    vocab_map.save(vocab_map.build(*tables), tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:900])
    for name in ("text.npz", "other.npz", "cut.npz"):
        with pytest.raises(ConfigError, match="is no vocabulary map") as error:
            vocab_map.load(tmp_path / name, *tables)
        assert "\n" not in str(error.value)
    vocab_map.save(dataclasses.replace(vocab_map.build(*tables), builder="0"), tmp_path / "old.npz")
    with pytest.raises(ConfigError, match="of builder '0'"):
        vocab_map.load(tmp_path / "old.npz", *tables)


def test_modes_are_checked(tables):
    with pytest.raises(ConfigError, match="choose one of identity, two_sided"):
        vocab_map.build(*tables, "twosided")
    with pytest.raises(ConfigError, match="identity needs one tokenizer"):
        vocab_map.build(*tables, "identity")


def test_another_builder_has_another_version(pair):
    """Maps are keyed by the version: whoever changes what is built raises it, and then this digest."""
    digest = hashlib.sha256()
    for seed, mode in ((1, None), (2, "one_sided"), (3, "shared")):
        made = pair(seed, mode).map
        for name in ("unit_of_teacher", "unit_of_student", "suffix", "low", "high", "order", "student_symbols", "teacher_symbols"):
            digest.update(getattr(made, name).tobytes())
    assert (vocab_map_build.VERSION, digest.hexdigest()[:16]) == ("1", "669c23431c192e4c")
