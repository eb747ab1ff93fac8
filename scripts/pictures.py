"""Write the pictures of how models work together: boxes and arrows, as SVG.

python scripts/pictures.py docs
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

Box = tuple[float, float, float, str, str]  # left, top, width, text with line breaks, kind
Arrow = tuple[float, float, float, float, str]  # from, to, what travels

_HEIGHT = 46
_FILLS = {"own": "#dcebfa", "server": "#fbe9d3", "public": "#e4f3df", "out": "#f4f4f4"}

PICTURES: dict[str, tuple[int, int, list[Box], list[Arrow]]] = {
    "fuse.svg": (
        760,
        236,
        [
            (10, 10, 170, "model of hospital A\nBERT", "own"),
            (10, 90, 170, "model of hospital B\nDistilBERT", "own"),
            (10, 170, 170, "model of hospital C\nRoBERTa", "own"),
            (290, 90, 150, "calibrate\none temperature each", "server"),
            (520, 90, 150, "fuse\nvote … stacking", "server"),
            (700, 90, 50, "class", "out"),
        ],
        [
            (180, 33, 290, 103, "probabilities"),
            (180, 113, 290, 113, ""),
            (180, 193, 290, 123, ""),
            (440, 113, 520, 113, ""),
            (670, 113, 700, 113, ""),
        ],
    ),
    "predictions.svg": (
        760,
        250,
        [
            (10, 10, 190, "own model, own records, ε\nhospital A: BERT", "own"),
            (10, 94, 190, "own model, own records, ε\nhospital B: DistilBERT", "own"),
            (10, 178, 190, "public inputs\nthe same for everybody", "public"),
            (350, 52, 150, "fuse\nmean, median, …", "server"),
            (590, 52, 160, "student\nlearns what all predict", "server"),
        ],
        [
            (200, 33, 350, 66, "predictions"),
            (200, 117, 350, 84, "predictions"),
            (105, 178, 105, 140, ""),
            (200, 201, 660, 98, ""),
            (500, 75, 590, 75, ""),
        ],
    ),
    "stacking.svg": (
        760,
        240,
        [
            (10, 10, 180, "model of hospital A\nfrozen, ε of its own", "own"),
            (10, 94, 180, "model of hospital B\nfrozen, ε of its own", "own"),
            (10, 178, 180, "private record\nat a site", "own"),
            (290, 52, 190, "meta-model at the site\nDP-SGD, charged first", "own"),
            (590, 52, 160, "server\naverages meta-models", "server"),
        ],
        [
            (190, 33, 290, 66, "scores"),
            (190, 117, 290, 84, "scores"),
            (100, 178, 100, 140, ""),
            (190, 201, 385, 98, "class"),
            (480, 75, 590, 75, "noised delta"),
        ],
    ),
}


def draw(width: int, height: int, boxes: list[Box], arrows: list[Arrow]) -> str:
    """Return a picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_draw_arrow(*arrow) for arrow in arrows),
        *(_draw_box(*box) for box in boxes),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _draw_box(left: float, top: float, width: float, text: str, kind: str) -> str:
    lines = text.split("\n")
    first = top + _HEIGHT / 2 + 4 - 8 * (len(lines) - 1)
    words = "".join(
        f'<text x="{left + width / 2:g}" y="{first + 16 * row:g}" text-anchor="middle">{escape(line)}</text>'
        for row, line in enumerate(lines)
    )
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{_HEIGHT}" rx="6" fill="{_FILLS[kind]}" stroke="#888"/>{words}'
    )


def _draw_arrow(x1: float, y1: float, x2: float, y2: float, text: str) -> str:
    label = (
        f'<text x="{(x1 + x2) / 2:g}" y="{(y1 + y2) / 2 - 6:g}" text-anchor="middle" fill="#555">{escape(text)}</text>'
        if text
        else ""
    )
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#555" marker-end="url(#head)"/>{label}'


def main() -> None:
    folder = Path(sys.argv[1])
    for name, picture in PICTURES.items():
        (folder / name).write_text(draw(*picture), encoding="utf-8")


if __name__ == "__main__":
    main()
