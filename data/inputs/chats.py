"""Chats as they stand in a file: a list of messages with a role and a content, or JSON of one."""

from __future__ import annotations

import json
from typing import Any

from cotune.data.readers.data_file import is_unicode
from cotune.data.types import ASSISTANT, Chat

_KEYS = {"role", "content"}
BLANK = "blank chat"
UNREADABLE = "unreadable chat"
OTHER_KEYS = "chat with more than roles and contents"
NO_ANSWER = "chat without an answer"


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
