"""The folder of a run: everything that is needed to continue it, to repeat it and to report on it.

plan.toml               the resolved plan, and beside it the files of its own rules, if it has any
run.json                who takes part, when and how it was started
events.jsonl            what happened, line by line
changes/                with wire_down: what the newest rounds have changed, as it travels
checkpoints/            one file per finished round: model, server optimizer, where its history ends
history.jsonl           the history: one line per finished round
client-privacy.jsonl    with client-level privacy: its account; of a real run it is in the federation's folder
selection.key           with amplification by sampling: the secret that draws who takes part
stopped.json            why the run ended before its last round, if it did
trail.jsonl             of a real run: requests and answers with their signatures (deployment/trail.py)
inbox/                  during a round: updates that arrived before their turn
quarantine/             rejected updates, as received (rounds/updates/buffers.py)
delivered.json          who has confirmed the finished model (rounds/model_delivery.py)
test/data.json          the common test set (validation/data.json: of the strategies that need one)
sites/<organization>/   the simulated organizations (only in simulations)
model/ summary.json report.html    at the end (adapter/ in place of model/: without the base model's weights)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from cotune.errors import RunError, reason_of
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.runs.events import Events
from cotune.server.runs.history_file import HistoryFile, HistoryMark
from cotune.server.runs.state_headers import CheckpointHeader
from cotune.storage.files import atomic_write, exclusive_lock, remove_parts
from cotune.storage.json_documents import JsonDocument, parse_json, parse_toml
from cotune.strategies.plugins import get_content, register_file

if TYPE_CHECKING:
    from torch import Tensor

    from cotune.models.trainable import State


def manifest_file(run: Path, which: Literal["test", "validation"]) -> Path:
    """Return the file in a run's folder that says which records form its common test set, or its validation set."""
    return run / which / "data.json"


class Participant(BaseModel):
    """An organization of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="Its name.")
    site: str = Field("", description="In simulations: its folder within the run's.")


class RunFile(BaseModel):
    """run.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    run: str = Field(description="Name of the run.")
    id: str = Field("", description="Drawn when the run is made: accounts know the run by it, as a name may be given twice.")
    created: str = Field(description="When the run was made (UTC).")
    engine: str = Field(description="`in-process`, `ray`, `flower` or `superlink`.")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    participants: tuple[Participant, ...] = Field(description="Organizations, in the order in which updates are added.")
    data: str = Field("", description="Simulation: fingerprint of the records.")
    federation: str = Field("", description="Real run: folder of the federation.")
    base: str = Field("", description="Folder of the base model, if the plan gives members only its name; empty: as in the plan.")
    weights: bool = Field(True, description="False: the server may lack the base model's weights, and evaluates nothing.")
    silent: bool = Field(False, description="Whether it is a baseline, whose events are written and not shown.")


class StoppedFile(BaseModel):
    """stopped.json."""

    reason: str = Field(description="Why the run ended before its last round.")


@dataclass(frozen=True)
class Progress:
    """A run after its last finished round: what a checkpoint holds."""

    round: int = 0
    state: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)  # of the server optimizer
    history: tuple[RoundEntry, ...] = ()  # one entry per round, as in summary.json
    clip_norm: float | None = None  # of the next round, under client-level privacy

    def last_admitted(self, organizations: Iterable[str]) -> dict[str, int]:
        """Return organization -> the last round whose update of it is in the model; those of which there is none are left out.

        From the newest round back, until all are found: most were there not long ago.
        """
        sought = set(organizations)
        found: dict[str, int] = {}
        for entry in reversed(self.history):
            if not sought:
                break
            if entry.applied:
                there = sought.intersection(entry.participants)
                found |= dict.fromkeys(there, entry.round)
                sought -= there
        return found


class RunFolder:
    """The folder, with its plan.

    Args:
        path: The folder.
        imports_parts: Whether the plan's strategy is checked against the parts that it names, which loads PyTorch. False where
            the folder is only looked at.

    Raises:
        RunError: When it is not the folder of a run.
    """

    def __init__(self, path: Path, *, imports_parts: bool = True) -> None:
        self.path = path
        try:
            table = parse_toml((path / "plan.toml").read_text(encoding="utf-8"))
            self.plan: Plan = parse_plan(table, complete=not imports_parts)
            found = JsonDocument(path / "run.json", RunFile).read()
        except (OSError, ValueError, RunError):
            found = None
        if found is None:
            raise RunError(
                f"{path} is not the folder of a run: expected one with plan.toml and run.json", code="run.not_a_run"
            ) from None
        self.file = found
        for name in self.plan.strategy.files:
            if (path / name.rpartition(":")[0]).exists():
                register_file(name, path)
        self.events = Events(path / "events.jsonl", silent=self.file.silent)
        self._history = HistoryFile(path / "history.jsonl")

    @classmethod
    def create(cls, path: Path, plan: Plan, file: RunFile) -> RunFolder:
        """Draw the run's id, and write plan.toml and, last, run.json, which makes it the folder of a run.

        Args:
            path: An existing folder.
            plan: Of the run; the files of its components must be registered.
            file: The content of run.json, without the id.
        """
        named = file.model_copy(update={"id": secrets.token_hex(16)})
        for name, sha256 in plan.strategy.files.items():
            atomic_write(path / name.rpartition(":")[0], get_content(name, sha256))
        atomic_write(path / "plan.toml", dump_plan(plan).encode())
        JsonDocument(path / "run.json", RunFile).write(named)
        return cls(path)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, or the run was stopped with what it had."""
        return self.last_round >= self.plan.rounds or self.stopped is not None

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last round; None if it did not."""
        found = self._stopped_file.read()
        return None if found is None else found.reason

    def stop(self, reason: str) -> None:
        """End the run before its last round, for good."""
        self._stopped_file.write(StoppedFile(reason=reason))

    @property
    def _stopped_file(self) -> JsonDocument[StoppedFile]:
        advice = "expected a JSON object with a reason; remove it"
        return JsonDocument(self.path / "stopped.json", StoppedFile, advice=advice)

    def _checkpoints(self) -> dict[int, Path]:
        found = (self.path / "checkpoints").glob("round-*.safetensors")
        numbers = {path: path.stem.removeprefix("round-") for path in found}
        return {int(number): path for path, number in numbers.items() if number.isdecimal()}

    @property
    def last_round(self) -> int:
        """The last finished round; 0 where none is."""
        return max(self._checkpoints(), default=0)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint: when this returns, the round is durable and never repeated.

        The history comes first: without its checkpoint a line of it counts for nothing.
        """
        from safetensors.torch import save  # loads PyTorch, which `cotune server status` does without

        tensors = {f"state/{n}": t.contiguous() for n, t in progress.state.items()}
        tensors |= {  # copies: a rule may remember a tensor of the state, and safetensors writes none twice
            f"memory/{n}": t.contiguous().clone() for n, t in progress.memory.items()
        }
        clip_norm = {} if progress.clip_norm is None else {"clip_norm": progress.clip_norm}
        end = self._history.write(progress.history)
        header = CheckpointHeader(
            round=progress.round,
            plan_id=self.plan.plan_id,
            history_bytes=end.length,
            history_sha256=end.sha256,
            **clip_norm,
        )
        content = save(tensors, metadata={"checkpoint": json.dumps(header.as_json())})
        file = self.path / "checkpoints" / f"round-{progress.round:05d}.safetensors"
        remove_parts(file)
        atomic_write(file, content)
        for round, path in sorted(self._checkpoints().items()):
            if self.plan.keep_checkpoints and round <= progress.round - self.plan.keep_checkpoints:
                path.unlink(missing_ok=True)

    def load(self) -> Progress:
        """Read the last checkpoint; an empty progress where there is none. Raises RunError for a damaged or foreign one."""
        from cotune.models.trainable import strip_prefix  # loads PyTorch, which `cotune server status` does without

        checkpoints = self._checkpoints()
        if not checkpoints:
            return Progress()
        path = checkpoints[max(checkpoints)]
        try:
            with safe_open(path, framework="pt") as file:
                header = CheckpointHeader.model_validate(parse_json(file.metadata()["checkpoint"]))
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint {path} is damaged ({reason_of(error)}): remove it to go on from the round before",
                code="run.damaged_checkpoint",
            ) from None
        if header.plan_id != self.plan.plan_id:
            raise RunError(
                f"the checkpoint {path} belongs to another plan: expected {self.plan.plan_id[:12]}, as in plan.toml;"
                " a run goes on with the version of cotune that began it",
                code="run.foreign_checkpoint",
            )
        state = strip_prefix("state/", tensors)
        memory = strip_prefix("memory/", tensors)
        return Progress(header.round, state, memory, self._history.read(_end_of_history(header)), header.clip_norm)

    def history(self) -> tuple[RoundEntry, ...]:
        """Read the finished rounds without tensors, also while another process trains. Raises RunError as `load` does."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return ()
        path = checkpoints[max(checkpoints)]
        try:
            with safe_open(path, framework="np") as file:
                header = CheckpointHeader.model_validate(parse_json(file.metadata()["checkpoint"]))
        except FileNotFoundError:
            return self.history()  # a newer one has taken its place
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint {path} is damaged ({reason_of(error)}): remove it to go on from the round before",
                code="run.damaged_checkpoint",
            ) from None
        return HistoryFile(self._history.path).read(_end_of_history(header))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process off the same run during the block. Raises RunError."""
        with lock_folder(self.path):
            yield


def _end_of_history(header: CheckpointHeader) -> HistoryMark:
    return HistoryMark(header.history_bytes, header.history_sha256)


def pick_run_folder(name: str, runs: Path = Path("runs")) -> Path:
    """Return a path that is not yet taken: runs/<time>-<plan>."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}"
    candidates = [runs / stem, *(runs / f"{stem}-{i}" for i in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def check_run_folder(path: Path) -> Path:
    """Return the folder of a new run as an absolute path. Raises RunError where something is in it already."""
    path = path.expanduser().resolve()
    if (path / "run.json").exists():
        raise RunError(
            f"{path} holds a run already: expected a new folder; continue that run with --resume, or choose another --out",
            code="run.folder_exists",
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(
            f"{path} is not an empty folder: expected a new one for the run; choose another --out", code="run.folder_exists"
        )
    return path


@contextmanager
def lock_folder(path: Path, timeout: float = 0.5) -> Iterator[None]:
    """Keep a second process off a folder during the block.

    Args:
        path: The folder.
        timeout: Seconds to wait for the lock: a process that only looks holds it for a moment.

    Raises:
        RunError: Another process holds it, or the folder cannot be written.
    """
    with exclusive_lock(path / ".lock", f"another process is working on {path}: wait for it, or stop it first", timeout=timeout):
        yield
