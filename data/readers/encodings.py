"""The bytes of a text file as text, and what to advise where they are none in the encoding that was named."""

from __future__ import annotations

import re
from codecs import lookup, register_error
from contextlib import suppress

from cotune.errors import DataError

_MARKS = (b"\xff\xfe", b"\xfe\xff")  # with which UTF-16 begins
_WIDE_MARKS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")  # and UTF-32; as UTF-16, the first would be a mark and a NUL
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_HALF = "cotune.half"  # half a character: surrogateescape cannot stand for half of a pair of UTF-16
_WINDOWS = re.compile("[\x80-\x9f]")  # control characters in ISO 8859, and quotes, dashes and the euro sign in Windows' pages

register_error(_HALF, lambda error: ("\udc00", getattr(error, "end")))  # noqa: B009


def decode_text(name: str, kind: str, raw: bytes, encoding: str, *, lenient: bool = False) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        name: What to call the file.
        kind: Its suffix.
        raw: Its bytes.
        encoding: As the plan names it.
        lenient: Whether a byte that is none of the text becomes half a character, by which its record is left out.

    Raises:
        DataError: For bytes that are no text in the encoding, with the encoding that they seem to be in; no byte is quoted.
    """
    wide = lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if lenient and (wide or (_wide_encoding(raw) is None and not raw.startswith((*_MARKS, *_WIDE_MARKS)))):
        with suppress(UnicodeError):
            text = raw.decode(encoding, _HALF if wide else "surrogateescape")
            return text.replace("\0", "\udc00").removeprefix("\ufeff")
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        raise DataError(_describe_failure(name, kind, raw, encoding, error), code="data.encoding") from error
    if "\0" in text:
        raise DataError(_describe_nul_bytes(name, kind, raw, encoding, text), code="data.encoding")
    if not lenient and _takes_any_byte(encoding) and not raw.isascii() and _can_decode(raw, "utf-8"):
        raise DataError(
            f"{name} is utf-8 text, which {encoding} reads as other characters: where other files of the folder are {encoding},"
            " save all of them as utf-8, else use --set data.encoding=utf-8",
            code="data.encoding",
        )
    if not lenient and _is_latin(encoding) and (found := _WINDOWS.search(text)) and _can_decode(raw, "cp1252"):
        raise DataError(
            f"{name} holds control characters as {encoding} text (line {_line_number(text[: found.start()])}), which are"
            " quotation marks, dashes and the like in Windows' encodings: use --set data.encoding=cp1252, or save it as utf-8",
            code="data.encoding",
        )
    return text.removeprefix("\ufeff")


def _takes_any_byte(encoding: str) -> bool:
    """Whether it is an encoding of single bytes, as which UTF-8 is read without an error, and wrongly."""
    return lookup(encoding).name.startswith(("cp125", "iso8859", "mac-"))


def _describe_failure(name: str, kind: str, raw: bytes, encoding: str, error: UnicodeError) -> str:
    if raw.startswith(_WIDE_MARKS):
        return f"{name} is utf-32 text, not {encoding}: use --set data.encoding=utf-32"
    if raw.startswith(_MARKS):
        return f"{name} is utf-16 text, not {encoding}: use --set data.encoding=utf-16"
    if wide := _wide_encoding(raw):
        return _wide_without_mark(name, encoding, wide)
    if b"\0" in raw:
        return _not_text(name, kind)
    where = _locate_failure(raw, error)
    if _can_decode(raw, "utf-8"):
        return f"{name} is not {encoding} text ({where}), and it is utf-8 text: use --set data.encoding=utf-8"
    return f"{name} is not {encoding} text ({where}): save it as utf-8, {_suggest_encodings(raw)}"


def _suggest_encodings(raw: bytes) -> str:
    if _can_decode(raw, "cp1252"):
        return (
            "or name its encoding: --set data.encoding=cp1252 if it comes from Windows in Western Europe or America, cp1250 from"
            " Central Europe, cp1251 with Cyrillic letters"
        )
    return (
        "or name its encoding, such as --set data.encoding=cp1250 (Windows in Central Europe), cp1251 (Cyrillic) or cp932"
        " (Japan); latin-1 takes any byte, and may take a wrong character for it"
    )


def _locate_failure(raw: bytes, error: UnicodeError) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    line = 1 + raw.count(b"\n", 0, error.start)
    return f"line {line}: byte {error.start} cannot be decoded"


def _describe_nul_bytes(name: str, kind: str, raw: bytes, encoding: str, text: str) -> str:
    if wide := _wide_encoding(raw):
        return _wide_without_mark(name, encoding, wide)
    count = text.count("\0")
    if count > max(1, len(text) // 1000) or _looks_binary(text):
        return _not_text(name, kind)
    line = _line_number(text[: text.index("\0")])
    return (
        f"{name} holds NUL bytes ({count}, the first in line {line}): expected none in {kind} text; remove them, or export the"
        " file again"
    )


def _not_text(name: str, kind: str) -> str:
    return f"{name} is not text (it holds NUL bytes): expected {kind} content, so export it again"


def _wide_without_mark(name: str, encoding: str, wide: str) -> str:
    return f"{name} is {wide} text without a byte order mark, not {encoding}: use --set data.encoding={wide}"


def _wide_encoding(raw: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: the first characters, a column's name or a bracket, are ASCII beside zero bytes."""
    start = raw[:8]
    patterns = {"utf-32-le": (1, 0, 0, 0), "utf-32-be": (0, 0, 0, 1), "utf-16-le": (1, 0), "utf-16-be": (0, 1)}
    for encoding in _WIDE:
        pattern = patterns[encoding] * (8 // len(patterns[encoding]))
        if len(start) == 8 and all(bool(byte) == bool(some) for byte, some in zip(start, pattern, strict=True)):
            return encoding
    return None


def _looks_binary(text: str) -> bool:
    """Whether the first NUL is among other control characters."""
    near = text[max(0, text.index("\0") - 8) : text.index("\0") + 8]
    return any(ord(char) < 9 and char != "\0" for char in near) or near.count("\0") > 2


def _is_latin(encoding: str) -> bool:
    return lookup(encoding).name in ("iso8859-1", "iso8859-15")


def _can_decode(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeError:
        return False
    return True


def _line_number(before: str) -> int:
    return 1 + before.count("\n")
