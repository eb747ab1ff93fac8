"""What an option that does not exist may have meant: another one, or a key that --set takes, of which there are many more."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cotune.models.errors import DataError
from cotune.models.table import keys_called, keys_like
from cotune.models.terminal import printable
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy

if TYPE_CHECKING:
    from pydantic import BaseModel


_ALIKE = 0.75  # of difflib's ratio: a slip of the finger, and no other word


def meant_option(error: click.NoSuchOption, arguments: Sequence[str]) -> str:
    """Return the sentence about an unknown option. arguments: of the command line, to repeat the value that was given."""
    name = error.option_name
    document = _document(error)
    if document is not None:
        word = name.lstrip("-")
        keys = keys_called(word, document[1]) or ([] if _options_like(error) else keys_like(word, document[1]))
        if keys:
            value = _value(name, arguments)
            written = " or ".join(f"--set {key}={value}" for key in keys)
            return f"no such option {printable(name)}: it is a {document[0]}; did you mean {printable(written)}?"
    near = _options_like(error)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no such option {printable(name)}{hint}"


@contextmanager
def own_options() -> Iterator[None]:
    """Lets what readers of records advise be an option of a command that takes no plan: `--text`, and not `--set data.text`."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("--set data.", "--")) from None


def _document(error: click.NoSuchOption) -> tuple[str, type[BaseModel]] | None:
    """What --set of the command changes, in words, and its schema; None where there is no such option."""
    takes = {str(option.metavar) for option in error.ctx.command.params} if error.ctx is not None else set()
    if "KEY=VALUE" in takes:
        return "key of the plan", Plan
    if "RULE=VALUE" in takes:
        return "rule of the policy", Policy
    return None


def _options_like(error: click.NoSuchOption) -> list[str]:
    """Options of the command that are spelled almost like it."""
    own = [name for option in error.ctx.command.params for name in option.opts] if error.ctx is not None else []
    return difflib.get_close_matches(error.option_name, own, n=2, cutoff=_ALIKE)


def _value(name: str, arguments: Sequence[str]) -> str:
    """What was given to the option: after it, or behind an equals sign."""
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if here.startswith(f"{name}="):
            return here.partition("=")[2] or "…"
        if here == name:
            return following if following and not following.startswith("--") else "…"
    return "…"
