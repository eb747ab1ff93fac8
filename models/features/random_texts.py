"""Texts that nobody wrote: rows of random tokens of a tokenizer's vocabulary, the frequent ones often.

Tokens are drawn about as often as words are in a language, by Zipf's law in Mandelbrot's form, f(r) ∝ 1 / (r + 2.7) for the r-th
(Piantadosi, "Zipf's word frequency law in natural language", Psychonomic Bulletin & Review 21, 2014, equation 2,
https://doi.org/10.3758/s13423-014-0585-6), as vocabularies list frequent tokens first.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from cotune.data.tasks.text import frame_tokens

LONGEST = 31  # tokens of a text, special ones included
_SHORTEST = 4  # without them
_ROWS = 128  # of a batch
_OFFSET = 2.7  # of Zipf's law


def draw_texts(reader: Any, table: int, count: int, seed: int, longest: int = LONGEST) -> Iterator[list[list[int]]]:
    """Yield batches of random tokens between the special tokens that every text has; of one length in each batch.

    They are the same on every machine.

    Args:
        reader: The tokenizer.
        table: How many tokens the model knows.
        count: Number of texts.
        seed: Decides them.
        longest: Tokens that the model reads of a text, special ones included.
    """
    ranked = rank_tokens(reader, table)
    shares = list(accumulate(1 / (rank + _OFFSET) for rank in range(1, len(ranked) + 1)))
    before, after = frame_tokens(reader, ranked[0])
    draw = random.Random(seed).random
    most = max(1, longest - len(before) - len(after))
    least = min(_SHORTEST, most)

    def token() -> int:
        return ranked[bisect_right(shares, draw() * shares[-1], hi=len(ranked) - 1)]

    lengths = sorted(least + int(draw() * (most - least + 1)) for _ in range(count))
    rows = [[*before, *(token() for _ in range(length)), *after] for length in lengths]
    start = 0
    while start < len(rows):
        batch = [row for row in rows[start : start + _ROWS] if len(row) == len(rows[start])]
        yield batch
        start += len(batch)


def rank_tokens(reader: Any, table: int) -> list[int]:
    """Return the tokens that texts consist of, about from frequent to rare.

    Vocabularies list tokens of several characters by frequency, or by merges or scores that go by it, but single characters by
    their code points, and placeholders such as [unused7] and <0x0A> first: these two kinds come last.

    Args:
        reader: The tokenizer.
        table: How many tokens the model knows.
    """
    special = set(reader.all_special_ids)
    named = [(number, token) for token, number in reader.get_vocab().items() if number < table and number not in special]
    return [number for _, number in sorted((_is_unranked(token), number) for number, token in named)]


def _is_unranked(token: str) -> bool:
    return len(token) < 2 or token[0] + token[-1] in ("[]", "<>")
