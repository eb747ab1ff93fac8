"""Names and help of commands are known without their modules, and are those of the modules."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from cotune.cli.lazy_commands import LazyCommand
from cotune.cli.main import build_command


def lazy_commands(group: click.Group) -> Iterator[LazyCommand]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from lazy_commands(command)
        else:
            assert isinstance(command, LazyCommand)
            yield command


@pytest.mark.parametrize("command", list(lazy_commands(build_command())), ids=lambda command: command.target)
def test_help_is_the_docstring_of_the_command(command: LazyCommand) -> None:
    loaded = command.load()
    assert loaded.name == command.name
    assert loaded.help is not None
    assert command.help == loaded.help.split("\n\n")[0]
    assert command.hidden == loaded.hidden
