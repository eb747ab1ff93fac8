"""A reader for several models of texts at once: each has its own tokenizer, and a row holds the tokens of all.

Token j of member k stands at position j · K + k of a row, with K members. So a row that is padded is padded for every member, and
a batch of one shape has one shape for each. Where a member has no token any more, there is a *hole*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cotune.data.tasks.text import encode

HOLE = 0  # token v of a member is the number v + 1
_FEWEST = 4  # tokens of a text for each member in rows of any length: no tokenizer cuts off its own frame


class MemberReader:
    """What the task takes for a tokenizer.

    Attributes:
        pad_token_id: The hole.
        limits: The most tokens that each member reads of a text.
    """

    pad_token_id = HOLE

    def __init__(self, readers: Sequence[Any], limits: Sequence[int]) -> None:
        self._readers = tuple(readers)
        self.limits = tuple(limits)

    @property
    def longest(self) -> int:
        """The length of the longest row."""
        return len(self.limits) * max(self.limits)

    @property
    def all_special_ids(self) -> list[int]:
        """The hole, and every number that is a special token to some member."""
        return sorted({HOLE, *(int(token) + 1 for reader in self._readers for token in reader.all_special_ids)})

    def __len__(self) -> int:
        """How many numbers there are."""
        return 1 + max(len(reader) for reader in self._readers)

    def convert_ids_to_tokens(self, number: int) -> str:
        """Return a token as the first member writes it."""
        return str(self._readers[0].convert_ids_to_tokens(number - 1))

    def __call__(self, texts: Any, *, max_length: int | None = None, **_: Any) -> dict[str, Any]:
        """Return the rows of texts, or that of a single one, as `input_ids`.

        Args:
            texts: One text, or several.
            max_length: Of a row; texts are cut off in any case where their members stop reading.
        """
        if isinstance(texts, str):
            return {"input_ids": self([texts], max_length=max_length)["input_ids"][0]}
        limits = self._limits_in(self.longest if max_length is None else max_length)
        columns = [encode(reader, texts, limit) for reader, limit in zip(self._readers, limits, strict=True)]
        return {"input_ids": [_interleave(parts) for parts in zip(*columns, strict=True)]}

    def _limits_in(self, length: int) -> list[int]:
        """Tokens for each member in rows of a length; in longer ones than all, one more, which shows what is cut off."""
        each = max(_FEWEST, -(-length // len(self.limits)))
        return [min(each, limit + (length > self.longest)) for limit in self.limits]


def _interleave(parts: Sequence[Sequence[int]]) -> list[int]:
    """One member's token after the other's."""
    most = max(map(len, parts))
    return [part[j] + 1 if j < len(part) else HOLE for j in range(most) for part in parts]
