"""Commands whose modules are imported when they are called: `cotune --help` names all of them and imports none."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


class LazyCommand(TyperCommand):
    """The name and the one-line help of a command, or of a group of commands, in place of its module.

    Args:
        name: What it is called by.
        target: `module:attribute` of a function with typer's annotations, or of a `typer.Typer` for a group.
        help: The first line of the function's docstring; a test compares them.
        hidden: Whether `--help` leaves it out.
    """

    def __init__(self, name: str, target: str, help: str, *, hidden: bool = False) -> None:
        super().__init__(name, help=help, hidden=hidden)
        self.target = target

    def load(self) -> click.Command:
        """Import the module, and return the command that it describes."""
        module, _, attribute = self.target.partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(self.name)(found)
            found = app
        command = get_command(found)
        command.name = self.name
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Return the context of the real command, which parses its options and runs instead of this one.

        Args:
            info_name: See click's `Command.make_context`, as for all arguments.
            args: Of the command line.
            parent: The context of the group.
            **extra: Passed on.
        """
        return self.load().make_context(info_name, args, parent, **extra)


def lazy_group(name: str, help: str, commands: Mapping[str, tuple[str, str]]) -> TyperGroup:
    """Build a group of lazy commands.

    Args:
        name: What the group is called by.
        help: What its commands are for, in one line.
        commands: Name -> target and help, as of `LazyCommand`.
    """
    lazy: dict[str, click.Command] = {key: LazyCommand(key, target, line) for key, (target, line) in commands.items()}
    return TyperGroup(name=name, help=help, commands=lazy, no_args_is_help=True)
