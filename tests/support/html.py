"""A page of HTML, read as a browser reads it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br"}  # the elements of the page that HTML does not close
LOADS = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}  # attributes that may fetch something


class Page(HTMLParser):
    """The page as a parser sees it: its elements, its words, and whether every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self._words.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, name: str) -> list[str]:
        """The first row of a table whose heading starts with `name`."""
        return next(row[1:] for row in self.rows if row[0].startswith(name))

    def count(self, tag: str, **attributes: str) -> int:
        return sum(1 for found, attrs in self.elements if found == tag and attributes.items() <= attrs.items())
