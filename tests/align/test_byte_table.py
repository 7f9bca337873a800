from a1jax.align import byte_table


def test_sentencepiece_spellings():
    assert byte_table.sentencepiece_bytes("\u2581the") == b" the"
    assert byte_table.sentencepiece_bytes("<0x0A>") == b"\n"
    assert byte_table.sentencepiece_bytes("<0xFF>") == b"\xff"
    assert byte_table.sentencepiece_bytes("<0x0A>x") == b"<0x0A>x"  # a byte piece is the whole piece or none
    assert byte_table.sentencepiece_bytes("é") == "é".encode()


def test_gpt2_alphabet_is_a_bijection_of_bytes():
    table = byte_table.gpt2_characters()
    assert sorted(table.values()) == list(range(256))
    assert table["Ġ"] == 0x20 and table["Ċ"] == 0x0A and table["A"] == 0x41 and table["ÿ"] == 0xFF


def test_gpt2_bytes():
    assert byte_table.gpt2_bytes("ĠtheĊ") == b" the\n"
    assert byte_table.gpt2_bytes("Ã©") == "é".encode()
    assert byte_table.gpt2_bytes("<tool call>") == b"<tool call>"  # a space is not of the alphabet: an added token, plain text


def test_fingerprint_tells_every_difference():
    tables = [[b"a", b"b"], [b"b", b"a"], [b"ab"], [b"a", b"b", None], [b"a", None], [b"a", b""], [b"a", b"\x00"], []]
    assert len({byte_table.fingerprint(t) for t in tables}) == len(tables)
    assert byte_table.fingerprint([b"a", None]) == byte_table.fingerprint((b"a", None))


def test_join_leaves_out_control_and_unknown_ids():
    assert byte_table.join([b"a", None, b"c"], [0, 1, 2, 99, -1]) == b"ac"
