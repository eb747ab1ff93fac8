"""The commands and the script of docs/use.md, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cotune.client.finished import keep_finished
from cotune.models.export import export_model
from cotune.plan.model import model_of
from cotune.privacy.policy import Policy
from cotune.strategies.wire import Request
from tests.cli.conftest import Cotune, _logging_as_it_was, cotune, folder  # noqa: F401
from tests.conftest import sentences, write_csv
from tests.support import clinic

__all__ = ["cotune", "folder"]  # fixtures

PAGE = Path(__file__).parents[2] / "docs" / "use.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_what_the_page_says_can_be_done(cotune: Cotune, folder: Path) -> None:
    plan = clinic.make_plan(folder / "base", folder / "reviews.csv")
    site = clinic.make_site(folder / "SITE", folder / "reviews.csv", range(60), Policy.permissive())
    state = clinic.state_of(plan)
    model = model_of(plan, "cpu")
    model.load(state)
    export_model(model, folder / "runs" / "X" / "model")
    keep_finished(Request(plan.canonical(), 3, "clinic", state, 0), plan, site)
    write_csv(folder / "new.csv", sentences(10))
    write_csv(folder / "labeled.csv", sentences(40))
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 5
    for words in commands:
        done = cotune(*words[1:])
        assert done.code == 0, (words, done.err)
    assert (folder / "told.csv").exists()
    [script] = blocks("python")
    exec(compile(script, str(PAGE), "exec"), {})
