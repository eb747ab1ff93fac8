"""What a plan says in each chat beside its records: a system message at the beginning, and an instruction above each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.data.config import DataConfig
from cotune.data.types import ASSISTANT, SYSTEM, USER, Chat

_BELOW = "\n\n"  # between an instruction and its prompt


@dataclass(frozen=True)
class ChatWording:
    """The words of a plan, which are the same in every chat and belong to no record.

    Attributes:
        system: The first message, of the role system, of each chat that has none; "": an empty one, by which a template is kept
            from adding its own; None: whatever the template does without one.
        instruction: Instruction that precedes a prompt from a column of its own; None: the user's message is the prompt alone.
    """

    system: str | None = None
    instruction: str | None = None

    def ask(self, prompt: str, answer: str | None = None) -> Chat:
        """Return the chat in which a user says a prompt, below the instruction.

        Args:
            prompt: What a record holds.
            answer: What the assistant says to it; None: not known.
        """
        said = prompt if self.instruction is None else f"{self.instruction}{_BELOW}{prompt}"
        if answer is None:
            return self.begin(Chat(((USER, said),), (prompt,)))
        return self.begin(Chat(((USER, said), (ASSISTANT, answer)), (prompt, answer)))

    def begin(self, chat: Chat) -> Chat:
        """Return a chat with the system message at its beginning, unless it begins with one of its own.

        Args:
            chat: With at least one message.
        """
        if self.system is None or chat.messages[0][0] == SYSTEM:
            return chat
        own = chat.own or tuple(content for _, content in chat.messages)
        return Chat(((SYSTEM, self.system), *chat.messages), own)

    def prompt_of(self, chat: Chat) -> str:
        """Return what was said last before the answer, without the instruction that `ask` put above it."""
        said = chat.asked[-1][1]
        return said if self.instruction is None else said.removeprefix(self.instruction + _BELOW)


def wording_of(config: DataConfig) -> ChatWording:
    """Return the system message and instruction that a plan adds to its records.

    Args:
        config: Of the records.
    """
    return ChatWording(config.system, config.instruction)
