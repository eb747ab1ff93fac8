"""A folder with a toy plan and its data, and the console script, called in this process or as a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cotune.cli.main import run
from tests.support.commands import Command
from tests.support.datasets import sentences, write_csv

PLAN = """
rounds = 2
privacy = "none"

[model]
base = "{base}"
max_length = 16
pooling = "mean"

[data]
source = "reviews.csv"

[local]
learning_rate = 5.0
momentum = 0.9
batch_size = 0.5
steps = 3

[personalize]
folds = 2
methods = ["prior", "mix", "alone"]

[simulation]
clients = 2
partition = "iid"
"""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line quietens cotune's log for its process; here that process goes on."""
    level = logging.getLogger("cotune").level
    yield
    logging.getLogger("cotune").setLevel(level)


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed, with plain spaces between numbers and their units."""

    code: int
    out: str
    err: str


Cotune = Callable[..., Outcome]
Started = Callable[..., Command]


def write_folder(folder: Path, base: Path) -> None:
    """Write toy.toml, reviews.csv and the base model as base/."""
    (folder / "base").symlink_to(base)
    (folder / "toy.toml").write_text(PLAN.format(base=base), encoding="utf-8")
    write_csv(folder / "reviews.csv", sentences(240))


@pytest.fixture
def folder(tmp_path: Path, base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with toy.toml, reviews.csv and the base model in base/."""
    write_folder(tmp_path, base_model("bert"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def cotune(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cotune:
    """`cotune ARGUMENTS` in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cotune", *map(str, arguments)])
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capsys.readouterr()
        return Outcome(code, out.replace("\u00a0", " "), err)

    return call


SCRIPT = Path(sys.executable).parent / "cotune"


def _environ() -> dict[str, str]:
    """That of a command that was not told to hide anything."""
    hidden = ("PYTHONWARNINGS", "PYTEST_CURRENT_TEST")
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def started(folder: Path) -> Started:
    """`cotune ARGUMENTS` in a process of its own."""
    return lambda *arguments: Command(arguments, folder, _environ())


@pytest.fixture
def script(folder: Path) -> Cotune:
    """`cotune ARGUMENTS` by the installed console script, in an interpreter of its own."""

    def call(*arguments: str | Path) -> Outcome:
        command = [str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environ(), timeout=600, check=False)
        return Outcome(done.returncode, done.stdout.replace("\u00a0", " "), done.stderr)

    return call
