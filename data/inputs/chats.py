"""Chats as they stand in a file: a list of messages with a role and a content, or JSON of one. And prompts that become chats."""

from __future__ import annotations

import json
from typing import Any

from cotune.data.readers.data_file import is_unicode
from cotune.data.types import ASSISTANT, USER, Chat

_KEYS = {"role", "content"}
BLANK = "blank chat"
UNREADABLE = "unreadable chat"
OTHER_KEYS = "chat with more than roles and contents"
NO_ANSWER = "chat without an answer"
_BELOW = "\n\n"  # between an instruction and its prompt


def read_chat(value: object) -> Chat | str:
    """Return the chat up to the last message of the assistant, which is the target; or the reason why there is none.

    Args:
        value: What a file holds: a list of objects, or JSON of one.
    """
    chat = _parse(value)
    if isinstance(chat, str):
        return chat
    answers = [number for number, (role, _) in enumerate(chat.messages) if role == ASSISTANT]
    if not answers:
        return NO_ANSWER
    if answers[-1] == 0:
        return "blank prompt"
    found = Chat(chat.messages[: answers[-1] + 1])
    return found if (found.answer or "").strip() else "blank target"


def read_asked(value: object) -> Chat | str:
    """Return the chat that a model is to answer, without an answer that stands at its end; or the reason why there is none.

    Args:
        value: What a file holds: as of `read_chat`.
    """
    chat = _parse(value)
    if isinstance(chat, str):
        return chat
    return Chat(chat.asked) if chat.asked else "blank prompt"


def instruct(instruction: str, prompt: str, answer: str | None = None) -> Chat:
    """Return the chat in which a user says what is to be done with a prompt.

    Args:
        instruction: What is to be done.
        prompt: With what; it stands below the instruction.
        answer: What the assistant says to it; None: not known.
    """
    asked = (USER, f"{instruction}{_BELOW}{prompt}")
    if answer is None:
        return Chat((asked,), (prompt,))
    return Chat((asked, (ASSISTANT, answer)), (prompt, answer))


def prompt_of(chat: Chat, instruction: str | None) -> str:
    """Return what was said last before the answer; without the instruction, if there is one, that `instruct` put above it."""
    said = chat.asked[-1][1]
    return said if instruction is None else said.removeprefix(instruction + _BELOW)


def _parse(value: object) -> Chat | str:
    if isinstance(value, str):
        if not value.strip():
            return BLANK
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return UNREADABLE
    if value is None or value != value or value == []:  # NaN, where a column has no value
        return BLANK
    if not isinstance(value, list | tuple):
        return UNREADABLE
    messages = [_message(each) for each in value]
    if any(isinstance(message, str) for message in messages):
        return next(message for message in messages if isinstance(message, str))
    return Chat(tuple(message for message in messages if not isinstance(message, str)))


def _message(value: Any) -> tuple[str, str] | str:
    """Role and content, or the reason why they are none. Keys without a value are those of other rows of a table."""
    if not isinstance(value, dict):
        return UNREADABLE
    given = {key: each for key, each in value.items() if each is not None}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or not role.strip():
        return UNREADABLE
    if given.keys() - _KEYS:
        return OTHER_KEYS
    return (role, content) if is_unicode(role) and is_unicode(content) else "broken Unicode"
