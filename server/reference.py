"""docs/run-folder.md, from the models of the documents: `python -m cotune.server.reference docs` writes it; a test compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from cotune.reporting.documents.events import Event, known_events
from cotune.reporting.documents.rounds import RoundEntry
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.documents.trail_lines import ReplySigned, RequestSigned
from cotune.server.deployment.execution.submission import Submission
from cotune.server.rounds.selection import WaitingFile
from cotune.server.runs.run_folder import RunFile, StoppedFile
from cotune.server.runs.state_headers import ChangeHeader, CheckpointHeader, QuarantineHeader
from cotune.storage.config_table import models_in

_WRITTEN = "<!-- Written by `python -m cotune.server.reference docs`: change the models instead. -->"


@dataclass(frozen=True)
class File:
    """A file, or a folder, that a run leaves.

    Attributes:
        name: Its path within the folder of the run.
        written: When.
        meaning: What it is.
        model: The model of its JSON.
        where: Where that JSON is in it.
    """

    name: str
    written: str
    meaning: str
    model: type[BaseModel] | None = None
    where: str = ""


EVERY_RUN = (
    File(
        "plan.toml",
        "when the run is made",
        'The resolved plan: nothing is left to defaults or to "auto" labels. `cotune simulate plan.toml` repeats the run (bit'
        " for bit"
        " without privacy, on the same hardware and number of threads; with it, up to the noise).",
    ),
    File("my_rules.py", "when the run is made", "A copy of each file of rules that the plan's strategy names."),
    File("run.json", "when the run is made, last", "Who takes part, and how the run was started.", RunFile),
    File("events.jsonl", "while it goes on", "What happened, one object per line; see below."),
    File(
        "checkpoints/round-00001.safetensors",
        "after every round",
        "The model (`state/…`), what rules remember (`memory/…`), and where the history ends. Written atomically and synced to"
        " disk.",
        CheckpointHeader,
        "in the metadata, under `checkpoint`",
    ),
    File(
        "changes/round-00001.safetensors",
        "after every round but the last, before its checkpoint, with `wire_down`",
        "What the round has changed of the shared state, packed as it travels; of the newest rounds alone, together never larger"
        " than the state. Only the size of requests depends on it.",
        ChangeHeader,
        "in the metadata, under `change`",
    ),
    File(
        "history.jsonl",
        "after every round, before its checkpoint",
        "One line per finished round, as in `rounds[]` of summary.json. Lines that no checkpoint counts on are of a round that"
        " was interrupted.",
    ),
    File(
        "client-privacy.jsonl",
        "before the noise of a round is drawn",
        "With client-level privacy: one line per round that was charged (`round`, `noise_multiplier` z, `sample_rate` q,"
        " `count`);"
        " without it the run is not continued. Of a federation's runs it is in the federation's folder, where the first line"
        " fixes"
        " `epsilon_total` and `delta` for all of them, and `run` is the `id` in run.json.",
    ),
    File(
        "selection.key",
        "before the first round",
        "With `client_privacy.amplification`: the secret that draws who is asked in which round; keep it from everybody else.",
    ),
    File(
        "inbox/",
        "during a round",
        "Updates that arrived before their turn, as safetensors; emptied after every round and at every start.",
    ),
    File(
        "quarantine/round-00003-<organization>.safetensors",
        "when an update is rejected",
        "The update as received: the bytes of every array as `uint8`. The last ten of an organization stay; of one whose"
        " arrays have"
        " more than 64 MiB only the description.",
        QuarantineHeader,
        "in the metadata, under `quarantine`",
    ),
    File(
        "strikes.json",
        "when a round fails",
        "Organization → its strikes in rounds that failed; those of finished rounds are in the checkpoints.",
    ),
    File(
        "cohort.json",
        "when a round fails",
        "Only where organizations declined it by their rule `training.min_cohort` alone: they count when it is repeated.",
        WaitingFile,
    ),
    File(
        "stopped.json",
        "when the run ends before its last round",
        "Only where the next round would have exceeded the client-level ε.",
        StoppedFile,
    ),
    File(
        "test/", "when the run is made", "Which records form the common test set: `data.json`, and `.npy` files with row numbers."
    ),
    File(
        "model/",
        "after the last round",
        'The fine-tuned model: `transformers.pipeline(task, "runs/X/model")` loads it, label names included,'
        " but for a plan with `model.feature` ([use.md](use.md)) or of stacking ([fuse.md](fuse.md));"
        " adapters are merged. With personal parts there is no common model, and each organization's is in"
        " `sites/<organization>/model/`.",
    ),
    File(
        "adapter/",
        "after the last round",
        "In place of `model/` where the server does not hold the base model's weights"
        " ([coordinate.md](coordinate.md#a-server-without-the-base-models-weights)): the adapters as a PEFT folder, with the"
        " tokenizer, if they are of use without a new head.",
    ),
    File("summary.json", "at the end", "The results; see below."),
    File("report.html", "at the end", "The same as one self-contained page."),
)
SIMULATION = (
    File(
        "sites/<organization>/",
        "while it goes on",
        "A simulated organization: which records it holds, `policy.toml` where it has its own ε or rank, `outbox/` with its last"
        " finished update, `kept/` with what it keeps from round to round.",
    ),
    File(
        "ledger.sqlite",
        "while it goes on",
        "The ledgers of the organizations, each a chain of its own ([ledger.md](ledger.md)); their key is in `ledger.key`."
        " `cotune client ledger sites/<organization>` shows one.",
    ),
    File(
        "baselines/",
        "after the last round",
        "The runs that the federated model is compared with, each a folder of its own."
        " Heads that are fitted for comparison are not kept.",
    ),
)
REAL_RUN = (
    File(
        "superlink.json",
        "when the run is submitted",
        "What the SuperLink was asked for last.",
        Submission,
    ),
    File(
        "trail.jsonl",
        "while it goes on",
        "What the server has asked for and what was answered, each under the signature of whose it is; `cotune server"
        " verify-trail`"
        " compares it with an organization's log. See below.",
    ),
    File("delivered.json", "when a model is confirmed", "Organization → when it confirmed the finished model (UTC)."),
    File("refused-before.json", "when the run is first played", "What the TLS proxy had refused of each member when it began."),
    File(".lock", "while it goes on", "Held by the process that plays the run; while it is, no other one does."),
)


def page() -> str:
    """Return the content of docs/run-folder.md."""
    return "\n".join([*_head(), *_files(), *_summary(), *_events(), *_trail()]) + "\n"


def _head() -> Iterator[str]:
    yield from ("# The folder of a run", "", _WRITTEN, "")
    yield (
        "`cotune simulate` writes one folder, `runs/<time>-<plan>/` or `--out DIR`; a run of real organizations (`cotune"
        " server run`)"
        " is one in `FED/runs/`. Everything in it is plain: TOML, JSON, JSON lines, safetensors, HTML. Records are not copied."
        " `cotune simulate --resume runs/X` continues after the last finished round, and so does `cotune server run FED"
        " --resume`;"
        " how a round goes is described in [rounds.md](rounds.md)."
    )


def _files() -> Iterator[str]:
    for title, files in (("Every run", EVERY_RUN), ("Simulations", SIMULATION), ("Real runs", REAL_RUN)):
        yield from ("", f"## {title}", "", "| file | written | what it is |", "|---|---|---|")
        yield from (f"| `{file.name}` | {file.written} | {file.meaning} |" for file in files)
        for file in files:
            if file.model is not None:
                where = f" ({file.where})" if file.where else ""
                yield from ("", f"### {file.name}{where}", "", *_table(file.model))


def _summary() -> Iterator[str]:
    yield from ("", "## summary.json", "")
    yield "What was not measured, and in a real run what the coordinator does not know, is `null`. Numbers in [0, 1] are shares."
    for place, model in _places(RunSummary, ""):
        yield from ("", f"### {place or 'Top level'}", "")
        if place:
            yield from (_first_line(model), "")
        yield from _table(model)
    yield ""
    yield (
        "Own held-out records: where every organization has a file, or a column names it, the test part of its own. Where one"
        " file is"
        " split, each class of the test set is dealt to the organizations in the proportions in which they hold it: what an"
        " organization holds out is like what it trains on. No ε covers `examples`, `labels`, `test.majority`, `own`,"
        " `test.pooled`,"
        " and the columns `alone_without_privacy` and `adapted`."
    )


def _events() -> Iterator[str]:
    yield from ("", "## events.jsonl", "")
    yield "Every line has `at` (UTC) and `event`. A line that a crash cut short is not JSON; skip it."
    yield from ("", "| event | when | fields |", "|---|---|---|")
    for model in known_events():
        yield f"| `{_name_of(model)}` | {_first_line(model)} | {_fields(model)} |"
    yield ""
    yield (
        "`cotune server run` also shows `superlink_lost`, `superlink_back`, `run_lost` and `run_stopping`, which are not in"
        " the file:"
        " the SuperLink does not answer, or does again; the run is submitted again; it is being stopped."
    )


def _trail() -> Iterator[str]:
    yield from ("", "## trail.jsonl", "", "| event | when | fields |", "|---|---|---|")
    for model in (RequestSigned, ReplySigned):
        yield f"| `{_name_of(model)}` | {_first_line(model)} | {_fields(model)} |"


def _name_of(model: type[Event]) -> str:
    return str(model.model_fields["event"].default)


def _fields(model: type[Event]) -> str:
    """The fields beside time and name; of a finished round where they are described."""
    if issubclass(model, RoundEntry):
        return "those of `rounds[]` of summary.json"
    fields = [(field.alias or name, field) for name, field in model.model_fields.items() if name not in ("at", "event")]
    return "; ".join(f"`{name}` ({_type(field.annotation)}): {_plain(field.description)}" for name, field in fields) or "none"


def _plain(description: str | None) -> str:
    """As a part of a sentence."""
    text = (description or "").rstrip(".")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield from ("| key | type | meaning |", "|---|---|---|")
    for name, field in model.model_fields.items():
        yield f"| `{field.alias or name}` | {_type(field.annotation)} | {(field.description or '').replace('|', chr(92) + '|')} |"


def _places(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Where models are in a document: the document itself first; metrics, which are in many places, once."""
    seen = set[type[BaseModel]]()

    def walk(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
        if model in seen:
            return
        seen.add(model)
        yield path, model
        for name, field in model.model_fields.items():
            for inner in dict.fromkeys(models_in(field.annotation)):
                ending = "[]" if get_origin(field.annotation) is list else ""
                yield from walk(inner, f"{path}.{name}{ending}".lstrip("."))

    yield from walk(model, path)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    parts = get_args(annotation)
    if origin in (Union, UnionType):
        named = " or ".join(_type(part) for part in parts if part is not NoneType)
        return f"{named} or null" if NoneType in parts else named
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (list, tuple):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"object of {_type(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def main(folder: Path) -> None:
    """Write the page into the folder of the documentation."""
    (folder / "run-folder.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
