"""Targets that teachers write for public prompts (sequence-level knowledge distillation, Kim & Rush 2016, section 3.2).

A teacher's distribution over whole texts is stood in for by the text that it finds best, by greedy decoding; of several teachers
each writes one. A text that its teacher has not ended is no target: the student would learn to stop there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cotune.data.types import ASSISTANT, Chat, Passage
from cotune.errors import RunError
from cotune.models.generation import WrittenText, write_after
from cotune.models.trainable import TrainableModel
from cotune.storage.files import atomic_write

_BLOCK = 256  # prompts whose texts are kept together

Text = Passage | Chat


def write_targets(
    part: Path, teachers: Sequence[TrainableModel], prompts: Sequence[Text], most: int
) -> tuple[list[tuple[int, Text]], dict[str, int]]:
    """Let each teacher write a target for each prompt, or read what was kept of that.

    Args:
        part: The folder of what is kept.
        teachers: In order.
        prompts: Without targets.
        most: Most tokens of a text.

    Returns:
        (number of the prompt, prompt with its target) for each text that can be learned, and how many cannot, by the reason.
    """
    written = [_written(part, number, teacher, prompts, most) for number, teacher in enumerate(teachers, 1)]
    found: list[tuple[int, Text]] = []
    left_out: Counter[str] = Counter()
    for row, prompt in enumerate(prompts):
        for texts in written:
            text = texts[row]
            reason = _reason(text)
            if text is None or reason:
                left_out[reason] += 1
            else:
                found.append((row, _with_target(prompt, text.text)))
    return found, dict(left_out)


def _written(part: Path, number: int, teacher: TrainableModel, prompts: Sequence[Text], most: int) -> list[WrittenText | None]:
    found: list[WrittenText | None] = []
    for start in range(0, len(prompts), _BLOCK):
        file = part / f"written-{number:02d}-{start:08d}.json"
        if not file.exists():
            texts = write_after(teacher, prompts[start : start + _BLOCK], most, "auto")
            plain = [None if each is None else [each.text, each.is_ended] for each in texts]
            atomic_write(file, json.dumps(plain).encode())
        found += _read(file, len(prompts[start : start + _BLOCK]))
    return found


def _read(file: Path, count: int) -> list[WrittenText | None]:
    """Raises RunError for a file that holds something else."""
    try:
        plain = json.loads(file.read_bytes())
        found = [None if each is None else WrittenText(str(each[0]), is_ended=bool(each[1])) for each in plain]
    except (ValueError, TypeError, LookupError):
        found = []
    if len(found) != count:
        raise RunError(f"{file} is damaged: remove it, and run the same command again", code="run.damaged_file")
    return found


def _reason(text: WrittenText | None) -> str:
    """Why a text is no target; "" where it is one."""
    if text is None:
        return "prompt too long"
    if not text.text:
        return "blank text"
    return "" if text.is_ended else "text not ended"


def _with_target(prompt: Text, text: str) -> Text:
    if isinstance(prompt, Chat):
        return Chat((*prompt.asked, (ASSISTANT, text)))
    return Passage(prompt.prompt, text)
