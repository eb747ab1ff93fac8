"""Options and arguments that several commands have, so that they read the same everywhere. Imports nothing slow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from pydantic import ValidationError

from cotune.data.config import DataConfig
from cotune.errors import DataError

Command = Callable[..., None]
Choice = TypeVar("Choice", bound=str)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
FederationPath = Annotated[Path, typer.Argument(metavar="FED", help="The federation's folder.")]
SitePath = Annotated[Path, typer.Argument(help="The organization's site: a folder that `cotune client init` made.")]


@dataclass(frozen=True)
class SiteOptions:
    """Where an organization's records and base model are, of `cotune client check` and `join`; kept in the site."""

    data: Annotated[str | None, typer.Option(help="Where the records are: a file, or a folder of images. Kept in the site.")] = (
        None
    )
    text: Annotated[str | None, typer.Option(help="The column that holds the text (or image), where it is not the plan's.")] = (
        None
    )
    label: Annotated[str | None, typer.Option(help="The column that holds the label, where it is not the plan's.")] = None
    tasks: Annotated[
        str | None,
        typer.Option(help="Of several tasks, those that there are labels of, such as topic,language=COLUMN; default: all."),
    ] = None
    unit: Annotated[str | None, typer.Option(help="The column that says whose a record is, where it is not the plan's.")] = None
    collection: Annotated[
        str | None, typer.Option(help="The collection that the records of --data are in, with an ε total of its own.")
    ] = None
    model: Annotated[Path | None, typer.Option(help="A folder with the plan's base model, where it has another place here.")] = (
        None
    )
    public: Annotated[Path | None, typer.Option(help="The plan's public inputs, where predictions for them are shared.")] = None
    own_model: Annotated[
        str | None, typer.Option(help="The base model to train here, where predictions are shared: a folder or a hub id.")
    ] = None


@dataclass(frozen=True)
class RecordOptions:
    """How labeled records are read, of `cotune evaluate` and `fuse`."""

    text: Annotated[str | None, typer.Option(help='Column with the text, or with its words; default: "text".')] = None
    image: Annotated[str | None, typer.Option(help='Column with the image; default: "image".')] = None
    label: Annotated[str | None, typer.Option(help='Column with the class, or with the words\' tags; default: "label".')] = None
    prompt: Annotated[str | None, typer.Option(help="Column with the prompt, for a language model; with --target.")] = None
    target: Annotated[str | None, typer.Option(help="Column with what a language model is to write.")] = None
    messages: Annotated[str | None, typer.Option(help="Column with a chat, for a language model, in place of these two.")] = None
    context: Annotated[str | None, typer.Option(help='Column with the text of a question; default: "context".')] = None
    question: Annotated[str | None, typer.Option(help='Column with the question; default: "question".')] = None
    answers: Annotated[str | None, typer.Option(help='Column with the answers to it; default: "answers".')] = None
    instruction: Annotated[
        str | None, typer.Option(help="What a chat model is to do with each prompt, as in training (data.instruction).")
    ] = None
    system: Annotated[
        str | None, typer.Option(help="System message that each chat begins with, as in training (data.system).")
    ] = None
    separator: Annotated[
        str | None, typer.Option(help="What stands between prompt and target, as in training; default: a line break.")
    ] = None
    unit: Annotated[str | None, typer.Option(help="Column that says whose a record is: intervals then count persons.")] = None
    encoding: Annotated[str, typer.Option(help="Of a CSV, TSV or JSON file.")] = "utf-8"

    @property
    def chats(self) -> bool:
        """Whether the records are chats, or become chats."""
        return any(given is not None for given in (self.messages, self.instruction, self.system))

    def config(self, data: str) -> DataConfig:
        """Return the description of the records in a file or package. Raises DataError for one that cannot be."""
        source = data if data.startswith("package:") else str(Path(data).expanduser())
        given = {key: value for key, value in asdict(self).items() if value is not None}
        try:
            return DataConfig.model_validate({"source": source, **given})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DataError(f"the records cannot be read so: {reason}", code="data.invalid_description") from None


def parse_choice(option: str, value: str, known: Sequence[Choice]) -> Choice:
    """Return the known value that an option names.

    Args:
        option: Such as "--engine", for the error.
        value: As given.
        known: Valid values.

    Raises:
        BadParameter: If the value is not among them.
    """
    for each in known:
        if each == value:
            return each
    raise typer.BadParameter(f"{option} {value} is not known: expected one of {', '.join(known)}")


def with_options(group: type[Any], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Let a command take a dataclass of options in place of each of them.

    Args:
        group: A frozen dataclass whose fields have typer's annotations and defaults.
        without: Fields that the command does not take; they keep their defaults.

    Returns:
        A decorator for a command with one parameter, `options`, that is an instance of the dataclass.
    """
    taken = [field for field in fields(group) if field.name not in without]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(**given: Any) -> None:
            options = group(**{field.name: given.pop(field.name) for field in taken})
            command(options=options, **given)

        parameters = _parameters(command, {field.name: field.default for field in taken}, group)
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        return call

    return decorate


def _parameters(command: Command, defaults: dict[str, Any], group: type[Any]) -> list[inspect.Parameter]:
    """Return the parameters of a command, those of the group in the place of `options`."""
    hints = get_type_hints(command, include_extras=True)
    group_hints = get_type_hints(group, include_extras=True)
    found = []
    for each in inspect.signature(command).parameters.values():
        if each.name == "options":
            found += [_parameter(name, default, group_hints[name]) for name, default in defaults.items()]
        else:
            found.append(_parameter(each.name, each.default, hints[each.name]))
    return found


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
