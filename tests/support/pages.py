"""What the pages for users say to do: the fenced blocks and the commands in their sentences, read as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = {str(file.relative_to(ROOT)): file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
_MARK = re.compile(r"<!-- not played: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block. reason: why no test plays it, from the HTML comment `<!-- not played: … -->` right before it."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page in order. text: what stands on it, where that is not the file's."""
    source = PAGES[page].read_text(encoding="utf-8") if text is None else text
    found = []
    before: Token | None = None
    for token in MarkdownIt().parse(source):
        if token.type == "fence" and token.map is not None:
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, _reason(before)))
        before = token
    return found


def _reason(before: Token | None) -> str | None:
    if before is None or before.type != "html_block":
        return None
    marked = _MARK.search(before.content)
    return None if marked is None else marked.group(1)


def commands_of(block: Block) -> list[str]:
    """Return the commands of a block, continued lines as one, without comments."""
    return commands_in(block.text)


def commands_in(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    without = (re.sub(r"(^|\s)#.*$", "", line) for line in lines)
    return [" ".join(line.split()) for line in without if line.strip()]


def spoken_in(page: str) -> Iterator[list[str]]:
    """The words of each command of cotune that a sentence or a table of a page names, such as `cotune server list`."""
    for token in MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and re.match(r"cotune [a-z]", child.content):
                yield shlex.split(child.content.partition(" > ")[0])
