"""Where commands print: lines are left whole, and tables are cut to a terminal's width only where there is a terminal."""

from __future__ import annotations

from rich.console import Console

__all__ = ["screen"]

_ANY_WIDTH = 10_000  # columns


def screen() -> Console:
    """For logs and pipes as wide as what is printed: a line that is broken cannot be searched for."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_ANY_WIDTH)
