"""A page is played: its commands, plans and scripts, in a folder that holds what the page takes for granted."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cotune.plan.load import parse_plan
from tests.support.console import Cotune
from tests.support.pages import Block, commands_of

_SMALL = ("rounds=1", "simulation.min_examples=5", "model.max_length=16", "simulation.baselines=[]")


def _set(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


# what is put after a command, so that it takes a second: the last --set counts; calibrating noise takes most of the time
SHORTER: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("simulate",): _set(*_SMALL, "privacy=none"),
    ("plan", "check"): _set("simulation.min_examples=5", "simulation.clients=2"),
    ("compare",): (*_set(*_SMALL, "simulation.clients=2"), "--seeds", "1", "--jobs", "1", "--device", "cpu"),
    ("audit",): (*_set("simulation.min_examples=5", "simulation.clients=2"), "--canaries", "40", "--rounds", "1"),
}
# commands whose answer may be no, which is no fault of the page
ANSWERS = {("client", "check"): {0, 1}, ("audit",): {0, 1}}


@dataclass
class Player:
    """cotune: the command line in this process. replaced: placeholders of the page, as patterns, and what stands for them.

    plan: the tables of every plan, over which those on the page are laid. arguments: of the page's scripts.
    """

    cotune: Cotune
    replaced: Mapping[str, str | Callable[[], str]] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def play(self, block: Block) -> None:
        """Raises AssertionError, with the place on the page."""
        play = {"bash": self._bash, "python": self._python, "toml": self._toml}[block.language]
        play(block)

    def _bash(self, block: Block) -> None:
        for command in commands_of(block):
            self.command(block, command)

    def command(self, block: Block, command: str) -> str:
        """Play one command; returns what it printed."""
        words, file = self._words(command)
        assert words[0] == "cotune", f"{block.where}: {command}"
        named = next((key for key in {**SHORTER, **ANSWERS} if tuple(words[1 : 1 + len(key)]) == key), ())
        after = () if "--resume" in words or "runs/done" in words else SHORTER.get(named, ())
        if named == ("compare",) and "--private-selection" not in words:
            after += _set("privacy=none")
        done = self.cotune(*words[1:], *after)
        assert done.code in ANSWERS.get(named, {0}), f"{block.where}: {command}\n{done.out}\n{done.err}"
        if file is not None:
            Path(file).write_text(done.out, encoding="utf-8")
        return done.out

    def _words(self, command: str) -> tuple[list[str], str | None]:
        command, _, file = command.partition(" > ")
        return shlex.split(self._filled(command)), self._filled(file) or None

    def _filled(self, text: str) -> str:
        for pattern, what in self.replaced.items():
            if re.search(pattern, text):
                text = re.sub(pattern, (what if isinstance(what, str) else what()).replace("\\", r"\\"), text)
        return text

    def _python(self, block: Block) -> None:
        with patch.object(sys, "argv", [block.page, *self.arguments]):
            exec(compile(self._filled(block.text), block.where, "exec"), {"__name__": "__main__"})

    def _toml(self, block: Block) -> None:
        """The tables and keys of a plan, over those that every plan needs."""
        table: dict[str, Any] = dict(self.plan)
        for key, value in tomllib.loads(block.text).items():
            table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
        parse_plan(table)
