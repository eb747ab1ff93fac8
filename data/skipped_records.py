"""What of an organization's records does not count, in one line that anyone who checks, simulates or reports shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cotune.data.types import Input

if TYPE_CHECKING:  # takes seconds to import, which commands that load no model need not wait for
    from cotune.models.trainable import TrainableModel


UNREADABLE = "unreadable"  # of a line, or of what stands in it
KEPT = "duplicate that is trained on"  # where nothing leaves out copies: no promise to records, and no data.deduplicate
ELSEWHERE = "held out, and trained on elsewhere"  # a person, or a text, that is in the files of several organizations
_CUT = "cut at "
_LOST = "target cut off"
_REFUSED = "refused by the chat template"
_NAMED = {  # reason: (of one record, of several)
    "blank text": ("blank text", "blank texts"),
    "blank prompt": ("blank prompt", "blank prompts"),
    "blank context": ("blank context", "blank contexts"),
    "blank question": ("blank question", "blank questions"),
    "missing answer": ("missing answer", "missing answers"),
    "answer that is not in its context": ("answer that is not in its context", "answers that are not in their contexts"),
    "blank target": ("blank target", "blank targets"),
    _LOST: ("text that loses all of its target, and contributes nothing", "texts that lose all of it, and contribute nothing"),
    _REFUSED: (
        "chat that its template cannot write, and that contributes nothing",
        "chats that their template cannot write, and that contribute nothing",
    ),
    "blank chat": ("blank chat", "blank chats"),
    "unreadable chat": ("chat that is no list of roles and contents", "chats that are no lists of roles and contents"),
    "chat with more than roles and contents": ("chat with other keys, too", "chats with other keys, too"),
    "chat without an answer": ("chat without a message of the assistant", "chats without a message of the assistant"),
    "blank word": ("text with a blank word", "texts with blank words"),
    "blank image": ("blank image", "blank images"),
    "missing label": ("missing label", "missing labels"),
    "label that is no number": ("label that is no number", "labels that are no numbers"),
    "missing tag": ("text with a missing tag", "texts with missing tags"),
    "broken Unicode": ("text in broken Unicode", "texts in broken Unicode"),
    UNREADABLE: ("unreadable record", "unreadable records"),
    "repeated header": ("repeated header", "repeated headers"),
    "duplicate": ("duplicate", "duplicates"),
    "copies": ("duplicate", "duplicates"),
    "copies that differ": ("duplicate with another label or spelling", "duplicates with other labels or spellings"),
    "conflicting labels": ("text with conflicting labels", "texts with conflicting labels"),
    "label unknown to the plan": ("label unknown to the plan", "labels unknown to the plan"),
    "more than max_records of their unit": ("record beyond max_records of its unit", "records beyond max_records of their unit"),
    "in another collection": ("record of another collection", "records of another collection"),
    ELSEWHERE: (
        "test record whose text or person is in another organization's file, too",
        "test records whose text or person is in another organization's file, too",
    ),
    KEPT: ("duplicate (trained on; data.deduplicate drops it)", "duplicates (trained on; data.deduplicate drops them)"),
}


def cut_reason(tokens: int) -> str:
    """Return the reason under which texts are counted that are longer than the model reads."""
    return f"{_CUT}{tokens} tokens"


def count_cut_texts(model: TrainableModel, inputs: Sequence[Input]) -> dict[str, int]:
    """Return how many of the inputs are not read as they are: cut, without all that is to be learned, or not at all."""
    loaded = model.loaded
    task = loaded.task
    found = {
        cut_reason(loaded.text_length): task.cut(loaded.reader, loaded.max_length, inputs),
        _LOST: task.lost(loaded.reader, loaded.max_length, inputs),
        _REFUSED: task.refused(loaded.reader, inputs),
    }
    return {reason: count for reason, count in found.items() if count}


def format_left_out(reasons: Mapping[str, int], records: int, source: str = "") -> str | None:
    """Return "left out: 75 blank texts; 517 texts cut at 128 tokens (8 %)"; None where nothing is.

    Args:
        reasons: How many records there are for each reason.
        records: How many can be used, to which the share of cut ones refers.
        source: Of which file or files, where there are several.

    >>> format_left_out({"blank text": 75, cut_reason(128): 517, "duplicate": 1500}, 6500)
    'left out: 75 blank texts; 517 texts cut at 128 tokens (8 %); 1,500 duplicates'
    """
    parts = [_part(reason, count, records) for reason, count in reasons.items() if count]
    of = f" of {source}" if source else ""
    return f"left out{of}: {'; '.join(parts)}" if parts else None


def _part(reason: str, count: int, records: int) -> str:
    if reason.startswith(_CUT):
        share = 100 * count / max(records, count)
        percent = "under 1" if share < 1 else f"{share:.0f}"
        return f"{count:,} {'text' if count == 1 else 'texts'} {reason} ({percent} %)"
    one, several = _NAMED.get(reason, (f"record: {reason}", f"records: {reason}"))
    return f"{count:,} {one if count == 1 else several}"
