"""Byte tables of output matrices: kinds, canonical ids, control roles by table and by the user's word."""

import json

import numpy as np
import pytest

from a1jax.align import byte_table, roles
from a1jax.config import ConfigError

PIECES = {"<s>": 0, "</s>": 1, "<|im_end|>": 2, "<think>": 3, "<plan>": 4}


def test_roles_come_from_the_table_the_tokenizer_and_the_user_in_this_order():
    assert roles.find(PIECES) == {"turn_end": (2,), "eos": (1,), "bos": (0,), "think_open": (3,)}
    assert roles.find(PIECES, turn_end=1, pad=1, bos=4) == {"turn_end": (1, 2), "bos": (0, 4), "think_open": (3,)}  # the named end first
    own = {"x_plan": ["<plan>"], "none": ["<think>"], "pad": [1]}
    assert roles.find(PIECES, own=own) == {"turn_end": (2,), "bos": (0,), "pad": (1,), "x_plan": (4,)}


def test_similar_spellings_have_no_role():
    assert roles.find({"<|think|>": 0, "<THINK>": 1, "think": 2, " </s>": 3}) == {}


@pytest.mark.parametrize(("own", "message"), [({"turnend": [1]}, "role 'turnend' is not known"), ({"eos": ["</t>"]}, "'</t>' is not one")])
def test_a_bad_table_is_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        roles.find(PIECES, own=own)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos": 3}', '{"eos": [1.5]}', None])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match="role table .*r.json") as error:
        roles.read(tmp_path / "r.json")
    assert "\n" not in str(error.value)
    (tmp_path / "r.json").write_text(json.dumps({"eos": [1, "</s>"]}))
    assert roles.find(PIECES, own=roles.read(tmp_path / "r.json"))["eos"] == (1,)


def test_kinds_and_padding():
    made = byte_table.make([b"a", None, None, b"b", b""], {1: "<s>"}, vocab_size=7)
    assert made.kind.tolist() == [byte_table.TEXT, byte_table.CONTROL, byte_table.INVALID, byte_table.TEXT, byte_table.CONTROL, 2, 2]
    assert made.bytes == (b"a", b"", b"", b"b", b"", b"", b"") and len(made) == 7
    with pytest.raises(ConfigError, match="more than vocab_size 4"):
        byte_table.make([b"a"] * 5, vocab_size=4)
    for table in ({"eos": (2,)}, {"eos": (9,)}, {"eos": (-1,)}):
        with pytest.raises(ConfigError, match="is no token"):
            byte_table.make([b"a", None, None], {1: "<s>"}, table)
    with pytest.raises(ConfigError, match="both have id 1"):
        byte_table.make([b"a", None], {1: "<s>"}, {"eos": (1,), "bos": (1,)})


def test_the_canonical_of_equal_ids_is_the_one_the_encoder_writes():
    table = [b"a", b"b", b"a", b"\xff", b"\xff", b"b"]
    made = byte_table.make(table, encode=lambda text: {"a": [2], "b": [1, 5]}[text])
    assert made.canonical.tolist() == [2, 1, 2, 3, 3, 1]  # two ids are not one spelling; no text at all: the lowest
    assert byte_table.make(table).canonical.tolist() == [0, 1, 0, 3, 3, 1]


def test_a_hash_tells_every_difference():
    table, spelling = [b"a", None, b"b", b"b"], {1: "<s>"}
    same = byte_table.make(table, spelling, name="x").hash
    assert byte_table.make(tuple(table), spelling, name="y").hash == same
    others = [
        byte_table.make([b"c", None, b"b", b"b"], spelling), byte_table.make(table), byte_table.make(table, spelling, {"eos": (1,)}),
        byte_table.make(table, spelling, {"bos": (1,)}), byte_table.make(table, spelling, vocab_size=5),
        byte_table.make(table, spelling, encode=lambda _: [3]),
        byte_table.make(table, spelling, {"think_open": (1,)}), byte_table.make(table, {1: "<r>"}, {"think_open": (1,)}),
    ]  # fmt: skip
    assert len({same, *(made.hash for made in others)}) == 1 + len(others)


def test_a_table_of_a_table_is_itself():
    made = byte_table.make([b"a"])
    assert byte_table.of(made) is made and np.array_equal(made.canonical, [0])
