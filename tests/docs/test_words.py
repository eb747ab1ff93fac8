"""The glossary's words are used: words of an older vocabulary do not come back."""

from __future__ import annotations

import re

from tests.support.project_files import TOP, find_project_files

# in two parts, so that this file does not hold them
OLD_WORDS = re.compile("|".join(("who" + "ever", "tal" + "ly", "carr" + "iers", "organi" + "sation")), re.IGNORECASE)
KINDS = (".py", ".md", ".toml", ".sh", ".j2", ".yml", ".cfg")


def test_old_words_do_not_come_back() -> None:
    texts = list(find_project_files(*KINDS))
    assert len(texts) > 500
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in texts
        for number, line in enumerate((TOP / file).read_text(encoding="utf-8").splitlines(), 1)
        if OLD_WORDS.search(line)
    ]
    assert found == []


def test_old_words_are_noticed() -> None:
    assert OLD_WORDS.search("Who" + "ever joins")
    assert not OLD_WORDS.search("Anyone who joins")
