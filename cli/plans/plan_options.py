"""The options by which a command selects its plan, the same for `simulate`, `plan check`, `compare` and `audit`.

For an unknown option, this module suggests another option, or a key for --set, of which there are many more.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from cotune.data.readers.sources import check_base, check_source
from cotune.errors import DataError
from cotune.plan.load import check_key, check_tables, load_plan, read_document
from cotune.plan.plan import Plan
from cotune.printable import printable
from cotune.privacy.policy import Policy
from cotune.storage.config_table import keys_called, keys_like

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cotune.plan.plan import Plan


PlanArgument = Annotated[str | None, typer.Argument(help="A preset or a TOML file; default: tweets, or text with --data.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")]

_KEYS = {
    "data": "data.source",
    "task": "task",
    "text": "data.text",
    "prompt": "data.prompt",
    "target": "data.target",
    "messages": "data.messages",
    "label": "data.label",
    "model": "model.base",
    "clients": "simulation.clients",
    "partition": "simulation.partition",
}


_RECORDS = frozenset({".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx"})  # suffixes


@dataclass(frozen=True)
class PlanOptions:
    """What a command line says of a plan. Options are short for overrides; what is given with --set wins.

    Raises typer.BadParameter for --by beside what it stands for.
    """

    plan: PlanArgument = None
    data: Annotated[
        str | None,
        typer.Option(help="Your records: a CSV, TSV, JSON lines or Parquet file, or a folder with one per organization."),
    ] = None
    task: Annotated[
        str | None, typer.Option(help="sequence-, token- or image-classification, multi-label, regression, causal-lm or seq2seq.")
    ] = None
    text: Annotated[str | None, typer.Option(help="Column with the text, or with its words.")] = None
    prompt: Annotated[str | None, typer.Option(help="causal-lm, seq2seq: column with what the model is given.")] = None
    target: Annotated[str | None, typer.Option(help="causal-lm, seq2seq: column with what it is to write.")] = None
    messages: Annotated[str | None, typer.Option(help="causal-lm: column with a chat, a list of {role, content}.")] = None
    label: Annotated[str | None, typer.Option(help="Column with the class, the words' tags, the labels or the number.")] = None
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a Hugging Face hub id or package:NAME.")] = None
    clients: Annotated[int | None, typer.Option(help="How many organizations the file is split over.")] = None
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA, quantity:ALPHA, shards:K or column:NAME.")] = None
    by: Annotated[
        str | None, typer.Option(help="Column that names each record's organization: short for --partition column:NAME.")
    ] = None
    override: Set = None

    def __post_init__(self) -> None:
        if self.plan is not None and _holds_records(Path(self.plan)):
            raise typer.BadParameter(f"{self.plan} holds records and is no plan: name it with --data {self.plan}")
        if self.by is not None and (self.partition is not None or self.clients is not None):
            raise typer.BadParameter("--by says who holds which records: it goes without --partition and --clients")

    @property
    def given(self) -> bool:
        """Return whether the command line overrides anything in the plan."""
        return bool(self.overrides)

    @property
    def source(self) -> str:
        """The preset or file."""
        return self.plan or ("tweets" if self.data is None else "text")

    @property
    def overrides(self) -> list[str]:
        """As of `load_plan`."""
        options = {key: getattr(self, name) for name, key in _KEYS.items()}
        if self.by is not None:
            options["simulation.partition"] = f"column:{self.by}"
        short = [f"{key}={_quoted(value)}" for key, value in options.items() if value is not None]
        return [*short, *(self.override or [])]

    def check_files(self, vary: Iterable[str] = ()) -> None:
        """Name what is missing or mistyped before anybody waits for torch: the plan, its keys, the records, the base model.

        Args:
            vary: Keys, with values or without, that the plan has only an example for.

        Raises:
            PlanError, DataError, ModelError: In one sentence.
        """
        vary = tuple(vary)
        table = self.check_tables()
        whole = [key.partition("=")[0] for key in vary if "." in key.partition("=")[0]]  # a short name stands for one of them
        for key in whole:
            check_key(key)
        varied = {key.partition("=")[0].strip().partition(".")[0] for key in vary}
        if "data" not in varied:
            check_source(_entry(table, "data", "source"))
        if "model" not in varied:
            check_base(_entry(table, "model", "base"))

    def check_tables(self) -> dict[str, Any]:
        """Return the plan as it is written, with the overrides. Raises PlanError for what is wrong in its tables."""
        table = read_document(self.source, self.overrides)
        check_tables(table, partial=True)
        return table

    def without_data(self) -> PlanOptions:
        """The same; a plan that does not say where records are gets a name for them, as nobody will look."""
        table = read_document(self.source, self.overrides)
        if _entry(table, "data", "source") is not None:
            return self
        return replace(self, override=[*(self.override or []), 'data.source="records.csv"'])

    def load(self) -> Plan:
        """The plan. Raises PlanError."""
        return load_plan(self.source, self.overrides)


def _holds_records(path: Path) -> bool:
    """Return whether the path given as a plan is a file of records, or a folder other than that of a run."""
    if path.is_dir():
        return not (path / "plan.toml").exists()
    return path.suffix.lower() in _RECORDS


def _entry(table: dict[str, Any], name: str, key: str) -> object:
    within = table.get(name)
    return within.get(key) if isinstance(within, dict) else None


def _quoted(value: str | int) -> str:
    """Quote the value of a text option, so that it stays a text even if it looks like a number."""
    return json.dumps(value) if isinstance(value, str) else str(value)


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
        raise DataError(str(error).replace("--set data.", "--"), code=error.code) from None


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
