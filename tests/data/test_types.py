from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from cotune.data.readers.images import open_image
from cotune.data.types import (
    Label,
    _normalize_any,
    class_names_in,
    content_bytes,
    get_stratum,
    normalize_text,
    record_identity,
)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Fine.", "fine"),
        ("«Fine»!", "fine"),
        ("fi\u00adne\u200b", "fine"),
        ("\ufb01ne", "fine"),  # the ligature
        ("STRASSE", "stra\u00dfe"),
        ("a\x07b\u2060", "ab"),
        ("a\u0085b", "a b"),
        ("\u2764\ufe0f", "\u2764"),
        ("(a) b", "a) b"),
        ("a.b", "a.b"),
        ("...", "..."),
        ("?", "?"),
        ("", ""),
    ],
)
def test_the_plain_form_is_what_a_reader_sees(text: str, same: str) -> None:
    assert normalize_text(text) == normalize_text(same)
    assert record_identity(text) == record_identity(same)


@pytest.mark.parametrize(("one", "other"), [("a.b", "ab"), ("fine", "fines"), ("...", "?"), ("a b", "ab"), ("1.5 mg", "15 mg")])
def test_what_a_reader_tells_apart_stays_apart(one: str, other: str) -> None:
    assert record_identity(one) != record_identity(other)


@given(text=st.text(max_size=40))
def test_the_plain_form_is_plain(text: str) -> None:
    assert normalize_text(normalize_text(text)) == normalize_text(text)
    assert normalize_text(f" {text}\u200b") == normalize_text(text)


def test_an_identity_survives_spaces_and_unicode_forms() -> None:
    expected = hashlib.sha256("café au lait".encode()).digest()[:16]
    for text in ("café au lait", "  cafe\u0301  au\tlait\n", ("café", "au", "lait"), ("cafe\u0301", " au ", "lait")):
        assert record_identity(text) == expected
    assert record_identity("cafe au lait") != expected


def test_the_identity_of_an_image_is_that_of_its_pixels(tmp_path: Path) -> None:
    pixels = Pillow.linear_gradient("L").resize((20, 10)).convert("RGB")
    for name, options in (("a.png", {}), ("b.png", {"compress_level": 0})):
        pixels.save(tmp_path / name, **options)
    pixels.rotate(90, expand=True).save(tmp_path / "turned.png")
    first, again, turned = (open_image(tmp_path / name) for name in ("a.png", "b.png", "turned.png"))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert record_identity(first) == record_identity(again) == record_identity(open_image((tmp_path / "b.png").read_bytes()))
    assert len(record_identity(first)) == 16
    assert record_identity(first) != record_identity(turned)
    assert first == again  # equal images have equal features
    assert "a.png" not in repr(first)


def test_contents_differ_where_inputs_do() -> None:
    different = ["a b", ("a", "b"), ("a b",), ("a", "b", ""), "", (), "é", "e\u0301"]
    assert len({content_bytes(value) for value in different}) == len(different)
    assert content_bytes("é") == "é".encode()


@pytest.mark.parametrize(
    ("label", "stratum"),
    [
        ("good", "good"),
        (("O", "O", "B-LOC", "O"), "B-LOC"),
        (("B-PER", "O", "B-LOC", "B-PER"), "B-PER"),
        (("B-PER", "B-LOC"), "B-LOC"),  # as frequent: the alphabetically first
        (("O", "O"), "O"),
        ((), "O"),
    ],
)
def test_the_stratum_is_the_most_frequent_tag_but_o(label: Label, stratum: str) -> None:
    assert get_stratum(label) == stratum


def test_names_in_a_label() -> None:
    assert class_names_in("good") == ("good",)
    assert class_names_in(("O", "B-LOC")) == ("O", "B-LOC")


@given(st.text(st.characters(codec="ascii")))
def test_ascii_has_the_plain_form_that_any_text_has(text: str) -> None:
    assert normalize_text(text) == _normalize_any(text)
