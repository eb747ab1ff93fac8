"""How near texts that a model has written are to those that it should have written.

The libraries that the field's published figures come from do the work; they are in the extra `text`. Every figure is a share in
[0, 1], and is 1 where all texts are as they should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from cotune.errors import DataError

_LIBRARIES = ("rouge_score", "sacrebleu")


@dataclass(frozen=True)
class WrittenMetrics:
    """Of written texts against their references.

    Attributes:
        exact_match: Share of the texts that are equal to their reference, but for white space.
        rouge_l: Mean F-measure of the longest common subsequence of words (Lin, 2004, https://aclanthology.org/W04-1013), as
            `rouge-score` computes it: in lower case, without stemming.
        chrf: chrF2 of the whole set, over 6-grams of characters (Popović, WMT 2015, https://aclanthology.org/W15-3049), by
            `sacrebleu`.
        bleu: BLEU of the whole set (Papineni et al., ACL 2002, https://aclanthology.org/P02-1040), by `sacrebleu` with its
            tokenizer `13a`.
    """

    exact_match: float
    rouge_l: float
    chrf: float
    bleu: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def check_text_metrics() -> None:
    """Refuse to start what needs these metrics where their libraries are not installed.

    Raises:
        DataError: Where one is not.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise DataError(
            f"written texts are judged with {' and '.join(missing)}, which is not installed: pip install 'cotune[text]'",
            code="data.no_text_metrics",
        )


def compare_texts(references: Sequence[str], written: Sequence[str]) -> WrittenMetrics:
    """Return the metrics of written texts.

    Args:
        references: What should have been written; at least one.
        written: As many, in the same order.

    Raises:
        ValueError: Without a text, or with another number of them.
        DataError: Where the libraries are not installed.
    """
    if len(references) != len(written) or not references:
        raise ValueError(f"expected as many written texts as references, and one at least: got {len(written)}, {len(references)}")
    check_text_metrics()
    from sacrebleu.metrics import BLEU, CHRF  # their imports take seconds

    return WrittenMetrics(
        exact_match=math.fsum(map(exact_match, references, written)) / len(references),
        rouge_l=math.fsum(rouge_l(references, written)) / len(references),
        chrf=_share(CHRF(), references, written),
        bleu=_share(BLEU(), references, written),
    )


def exact_match(reference: str, written: str) -> bool:
    """Return whether a text is the reference, but for white space.

    >>> exact_match("a cat", " a  cat")
    True
    """
    return reference.split() == written.split()


def rouge_l(references: Sequence[str], written: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F-measure of each text, in [0, 1].

    `rouge-score` reads only the letters a to z and digits. Here words are whatever Unicode calls letters and digits, so that
    texts in other languages have words, too; English texts have the same figures.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return "".join(char if char.isalnum() else " " for char in text.lower()).split()

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return [float(scorer.score(reference, text)["rougeL"].fmeasure) for reference, text in zip(references, written, strict=True)]


def _share(metric: Any, references: Sequence[str], written: Sequence[str]) -> float:
    return min(1.0, float(metric.corpus_score(list(written), [list(references)]).score) / 100)
