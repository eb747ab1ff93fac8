"""What a record is made of, whatever the task: its input, its label, and how a ledger and a cache know it again.

An input is a text, the words of one, an image, a prompt with what is to follow it, a chat, or a question about a text; a label is
one class, one tag for each word, the names of several labels, a number, or nothing where the input holds all.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cotune.data.readers.images import Image
from cotune.printable import IGNORABLE


@dataclass(frozen=True)
class Passage:
    """What a model is to write, and what it is given before: "" where the whole text is to be written.

    Attributes:
        prompt: What is given.
        target: What is to be written.
        own: The texts that an organization holds of it, where a plan adds to them; None: prompt and target.
    """

    prompt: str
    target: str
    own: tuple[str, ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Chat:
    """What was said in turn. A model is to write the last message where that is the assistant's, and is given those before.

    Attributes:
        messages: (role, content) of each.
        own: The texts that an organization holds of it, where a plan adds to them; None: all contents.
    """

    messages: tuple[tuple[str, str], ...]
    own: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def answer(self) -> str | None:
        """What a model is to write; None where it is not known."""
        role, content = self.messages[-1]
        return content if role == ASSISTANT else None

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The messages that a model is given."""
        return self.messages if self.answer is None else self.messages[:-1]


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        question: What is asked.
        context: The text.
        answers: Parts of the text that are true answers; empty where they are not known.
        start: Where the first of them begins.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


Input = str | tuple[str, ...] | Image | Passage | Chat | Question
Label = str | tuple[str, ...] | float
ASSISTANT = "assistant"  # the role of what a model writes
USER = "user"  # the role of whom it answers
SYSTEM = "system"  # the role of the message that tells it how to behave
_NO_TAG = "O"  # outside of any entity, in the IOB schemes
_NO_TAG_OF_TASK = "/O"  # the same, of one of several tasks


def answer_count(given: Input) -> int:
    """Return how many answers a record of this input has: one, or one for each word."""
    return len(given) if isinstance(given, tuple) else 1


def content_bytes(value: Input | Label) -> bytes:
    """Bytes that are equal for equal inputs or labels and for no others of the same kind."""
    if isinstance(value, Image):
        return value.digest
    if isinstance(value, Passage):
        value = (value.prompt, value.target)
    if isinstance(value, Chat):
        return json.dumps(value.messages).encode()
    if isinstance(value, Question):
        return json.dumps([value.question, value.context, value.answers, value.start]).encode()
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def record_identity(given: Input) -> bytes:
    """Return 16 bytes that stay the same when a file is shuffled, exported again, relabeled or retyped a little.

    SHA-256 over the plain form of a text (see `normalize_text`), whether it is kept as one or as its words; over the decoded
    pixels and the size of an image. A corrected label is still the same record; a prompt with another target is another one, as
    many records may have one prompt, and so is a chat with another message. A chat of a prompt and its answer is the record that
    they are in two columns. What a plan puts beside them, a system message, an instruction or a separator, makes no other record
    of them: else a record in two collections could spend the totals of both. Anyone who can guess a text can recognize its
    identity: what is stored or exported is keyed first (see `privacy.ledger`).
    """
    if isinstance(given, Image):
        return given.digest[:16]
    if isinstance(given, Passage):
        return _hashed_parts(given.own or (given.prompt, given.target))
    if isinstance(given, Chat):
        return _hashed_parts(given.own or [content for _, content in given.messages])
    if isinstance(given, Question):  # whatever its answers: those are the label
        return _hashed("\0".join(map(normalize_text, (given.question, given.context))))
    return _hashed(normalize_text(given if isinstance(given, str) else " ".join(given)))


def _hashed_parts(parts: Sequence[str]) -> bytes:
    return _hashed("\0".join(normalize_text(part) for part in parts if part))


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def normalize_text(text: str) -> str:
    """A text without what a reader does not see or would not call a difference.

    Compatibility forms are unified (NFKC), case is folded, control and format characters (zero-width ones, directions, soft
    hyphens, variation selectors) are dropped, white space becomes single spaces, and punctuation at both ends goes, unless
    nothing else is there.
    """
    return _normalize_ascii(text) if text.isascii() else _normalize_any(text)


def _normalize_ascii(text: str) -> str:
    """What `_normalize_any` makes of ASCII, where no form is another's and letters have one lower case: without a loop."""
    words = " ".join(text.lower().translate(_INVISIBLE_ASCII).split())
    return words.strip(_AROUND_ASCII) or words


def _normalize_any(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    seen = "".join(" " if char.isspace() else char for char in folded if char.isspace() or not _is_invisible(char))
    words = " ".join(unicodedata.normalize("NFKC", seen).split())
    return words.strip("".join({char for char in words if _is_punctuation(char)} | {" "})) or words


def _is_invisible(char: str) -> bool:
    """Control and format characters, and those that Unicode says are ignored where they cannot be shown."""
    return unicodedata.category(char) in ("Cc", "Cf") or char in IGNORABLE


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


_ASCII = [chr(code) for code in range(128)]
_INVISIBLE_ASCII = {ord(char): None for char in _ASCII if _is_invisible(char) and not char.isspace()}
_AROUND_ASCII = "".join(char for char in _ASCII if _is_punctuation(char)) + " "


def class_names_in(label: Label) -> tuple[str, ...]:
    """The class names that a label consists of: one, one for each word, or several; none of a number."""
    if isinstance(label, float):
        return ()
    return (label,) if isinstance(label, str) else label


def get_stratum(label: Label) -> str:
    """The one class by which a record is split over organizations and held out for testing.

    Of tags, and of the names of several labels, it is the most frequent one that is not O, and of equally frequent ones the
    alphabetically first; O where there is no other. Numbers are all of one kind.
    """
    if isinstance(label, str):
        return label
    if isinstance(label, float):
        return ""
    counts = Counter(tag for tag in label if tag != _NO_TAG and not tag.endswith(_NO_TAG_OF_TASK))
    return min(counts, key=lambda tag: (-counts[tag], tag), default=_NO_TAG)
