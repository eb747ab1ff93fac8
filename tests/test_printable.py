"""What strangers say reaches a terminal as characters that it shows, and obeys none of them."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune import printable as terminal
from cotune.printable import Clean, clean_output, lines_of, printable

TEXT = st.text(st.characters(codec=None), max_size=40)


def is_harmless(text: str) -> bool:
    """An oracle of its own: by Unicode's categories alone."""
    return all(unicodedata.category(c)[0] not in "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in text)


@given(TEXT)
def test_cleaned_line_holds_no_control_codes_and_is_stable(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert printable(shown) == shown


@given(TEXT)
def test_lines_keep_their_ends_and_tabs_and_nothing_else(text: str) -> None:
    assert is_harmless(lines_of(text).replace("\n", "").replace("\t", ""))


@given(st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)))
def test_json_means_the_same_when_it_is_clean(value: object) -> None:
    assert json.loads(lines_of(json.dumps(value, ensure_ascii=False, indent=1))) == value


@pytest.mark.parametrize("text", ["Tumöre, λ = 0.5", "情緒 分析", "12\u00a0MB", "a\u3000b", "ε → ∞", "😀"])
def test_text_of_every_script_stays(text: str) -> None:
    assert printable(text) == text == lines_of(text)


@pytest.mark.parametrize(
    "char", ["\u202e", "\u2066", "\u200b", "\u200d", "\u00ad", "\u3164", "\u034f", "\ufe0f", "\U000e0041", "\x9b"]
)
def test_directions_and_invisible_characters_are_written_out(char: str) -> None:
    assert char not in printable(f"a{char}b")
    assert char not in lines_of(f"a{char}b")


def test_a_return_hides_no_line() -> None:
    assert lines_of("paid 5\rpaid 0") == "paid 5\npaid 0"


def piped() -> tuple[io.BytesIO, Clean]:
    below = io.BytesIO()
    return below, Clean(io.TextIOWrapper(below, encoding="utf-8"))


@given(TEXT)
def test_nothing_passes_a_stream_that_is_no_terminal(text: str) -> None:
    below, stream = piped()
    assert stream.write(text) == len(text)
    found = below.getvalue().decode()
    assert is_harmless(found.replace("\n", "").replace("\t", ""))


def on_terminal(text: str) -> bytes:
    """What arrives at the other end of a real terminal."""
    outer, inner = pty.openpty()
    try:
        with open(inner, "w", encoding="utf-8", closefd=True) as slave:
            stream = Clean(slave)
            assert stream.isatty()
            stream.write(text)
            stream.flush()
            return os.read(outer, 4096)
    finally:
        os.close(outer)


def test_terminal_gets_colors_but_no_hiding_or_cursor_moves() -> None:
    assert on_terminal("\x1b[1;31mred\x1b[0m") == b"\x1b[1;31mred\x1b[0m"
    for hostile in (
        "\x1b[8mx",
        "\x1b[30;40mx",
        "\x1b[2J",
        "\x1b[1A",
        "\x1b]0;title\x07",
        "\x1b]8;;http://x\x1b\\",
        "\x1bc",
        "\x1bPq",
    ):
        found = on_terminal(hostile)
        assert b"\x1b" not in found, hostile
        assert b"\x07" not in found, hostile


def test_a_pipe_gets_no_styles() -> None:
    below, stream = piped()
    stream.write("\x1b[1mbold\x1b[0m")
    assert below.getvalue() == b"bold"


def test_both_streams_keep_the_order_of_lines() -> None:
    below, stream = piped()
    stream.write("one\n")
    stream.inner.write("two\n")
    stream.write("three\n")
    assert below.getvalue() == b"one\ntwo\nthree\n"


def test_character_outside_the_encoding_is_replaced() -> None:
    below = io.BytesIO()
    stream = Clean(io.TextIOWrapper(below, encoding="ascii"))
    stream.write("ε = 1\udc80")
    assert below.getvalue() == b"? = 1\\udc80"


def test_cleaned_output_covers_stdout_and_earlier_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(below, encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    log = logging.getLogger("tests.terminal")
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    try:
        clean_output()
        first = sys.stderr
        clean_output()
        assert sys.stderr is first
        log.error("\x1b[2Jgone")
        print("\x1b]0;x\x07", file=sys.stderr)
    finally:
        log.removeHandler(handler)
    assert b"\x1b" not in below.getvalue()
    assert b"gone" in below.getvalue()


def test_a_filter_that_goes_leaves_the_stream_open() -> None:
    below, stream = piped()
    inner = stream.inner
    del stream
    inner.write("still here")
    inner.flush()
    assert below.getvalue() == b"still here"


def test_every_ignorable_character_is_written_out() -> None:
    assert all(printable(char) != char for char in terminal.IGNORABLE)
