"""How near the answers to questions are to the true ones, as SQuAD has it (Rajpurkar et al., EMNLP 2016, https://arxiv.org/abs/1606.05250)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerMetrics:
    """Of answers to questions, each in [0, 1]: means over the questions.

    Attributes:
        token_f1: F1 of the words of an answer and of a true one, that which it is nearest to.
        exact_answer: Share of the answers that are equal to a true one but for case, punctuation and articles.
    """

    token_f1: float
    exact_answer: float

    @property
    def score(self) -> float:
        return self.token_f1

    def as_dict(self) -> dict[str, float]:
        """Return the figures by their names."""
        return asdict(self)


def compute_answer_metrics(judged: Sequence[tuple[float, float]]) -> AnswerMetrics:
    """Return the means of what `judge_answer` says of each question."""
    count = max(1, len(judged))
    return AnswerMetrics(math.fsum(f1 for f1, _ in judged) / count, math.fsum(exact for _, exact in judged) / count)


def judge_answer(given: str, true: Sequence[str]) -> tuple[float, float]:
    """Return F1 of the words of an answer, and 1 where it is a true one; of several true ones the best.

    >>> judge_answer("the Tall mountain.", ["tall mountain", "hill"])
    (1.0, 1.0)
    """
    words = _words(given)
    pairs = [(_f1(words, _words(each)), float(words == _words(each))) for each in true]
    return max((f1 for f1, _ in pairs), default=0.0), max((exact for _, exact in pairs), default=0.0)


def _words(text: str) -> list[str]:
    """As SQuAD's script normalizes: lower case, no ASCII punctuation, no articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(given: Sequence[str], true: Sequence[str]) -> float:
    if not given or not true:
        return float(given == true)
    common = sum((Counter(given) & Counter(true)).values())
    return 2 * common / (len(given) + len(true))
