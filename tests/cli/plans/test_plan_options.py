"""What a plan is told by options: the same in every command; what is missing is named before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from cotune.cli.main import build_command
from cotune.plan.load import load_plan
from cotune.simulations.prepare import prepare
from tests.support.console import Cotune, write_folder
from tests.support.federations import founded

COMMANDS = (("simulate",), ("plan", "check"), ("compare",), ("audit",))
OPTIONS = ("data", "task", "text", "label", "model", "clients", "partition", "by", "override")
SHORT = ("--data", "reviews.csv", "--model", "base", "--clients", "3", "--partition", "iid", "--text", "text", "--label", "label")
QUICK = ("--set", "simulation.baselines=[]", "--set", "rounds=1", "--set", "model.max_length=16")


def command_of(path: tuple[str, ...]) -> click.Command:
    found: Any = build_command()
    for name in path:
        found = found.commands[name]
    return found.load()


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_takes_the_same_options(path: tuple[str, ...]) -> None:
    first, this = (
        {p.name: (p.opts, p.type.name, getattr(p, "help", "")) for p in command_of(each).params} for each in (COMMANDS[0], path)
    )
    assert {name: this[name] for name in OPTIONS} == {name: first[name] for name in OPTIONS}
    assert "as_json" in this


def test_plan_check_takes_them(cotune: Cotune, folder: Path) -> None:
    shown = cotune("plan", "check", *SHORT, "--set", "model.max_length=16", "--json")
    assert (shown.code, shown.err) == (0, "")
    seen = json.loads(shown.out)
    assert seen["plan"] == "text"  # the preset for one's own file
    assert [o["name"] for o in seen["organizations"]] == ["org-1", "org-2", "org-3"]
    assert seen["labels"] == ["bad", "good", "so"]


def test_compare_takes_them_and_prints_json(cotune: Cotune, folder: Path) -> None:
    vary = ("--vary", "strategy.weighting=examples,uniform", "--seeds", "1", "--jobs", "1", "--device", "cpu")
    shown = cotune("compare", "toy.toml", *SHORT, *QUICK, *vary, "--json")
    assert shown.code == 0
    found = json.loads(shown.out)
    assert found == json.loads((folder / "compare" / "toy" / "results.json").read_bytes())
    run = folder / "compare" / "toy" / found["cells"][0]["folder"]
    assert len(json.loads((run / "run.json").read_bytes())["participants"]) == 3


def test_audit_takes_them(cotune: Cotune, folder: Path) -> None:
    few = ("--canaries", "64", "--confidence", "0.9999999", "--set", "privacy={epsilon=3}", "--set", "local.steps=1", "--json")
    found = json.loads(cotune("audit", "toy.toml", *SHORT, *QUICK, *few).out)
    third = prepare(load_plan("toy.toml", ["simulation.clients=3"]), "cpu").shares[0]
    assert found["examples"] == len(third.rows)


def test_simulate_prints_its_summary_as_json(cotune: Cotune, folder: Path) -> None:
    shown = cotune("simulate", "toy.toml", *QUICK, "--out", "run", "--json")
    assert shown.code == 0
    assert json.loads(shown.out) == json.loads((folder / "run" / "summary.json").read_bytes())
    assert "round 1/1" in shown.err  # the lines of a run are not its result


# --- before torch is there

ALONE = """
import importlib, json, os, sys, tempfile
sys.modules["torch"] = sys.modules["transformers"] = None  # anyone who imports them fails
from cotune.cli.main import CLIENT, COMMANDS, PLAN, SERVER, run

for target, _ in [*COMMANDS.values(), *PLAN.values(), *CLIENT.values(), *SERVER.values()]:
    importlib.import_module(target.partition(":")[0])

def play(arguments):
    outs = [tempfile.TemporaryFile("w+") for _ in range(2)]
    if not (child := os.fork()):
        for number, out in enumerate(outs, start=1):
            os.dup2(out.fileno(), number)
        sys.argv = ["cotune", *arguments]
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code)  # an interpreter that ends takes longer than the command
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for out in outs:
        out.seek(0)
    return [code, *(out.read() for out in outs)]

print(json.dumps([play(arguments) for arguments in json.load(sys.stdin)]))
"""


class Ended(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def without_torch(*arguments: tuple[str, ...]) -> list[Ended]:
    """Commands in processes of their own, in which an import of torch fails; forked, so that one interpreter starts for all."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    program = [sys.executable, "-c", ALONE]
    done = subprocess.run(program, input=json.dumps(arguments), capture_output=True, text=True, env=environ, check=True)
    return [Ended(*each) for each in json.loads(done.stdout)]


MISSING = [
    (("simulate", "toy.toml", "--data", "nowhere.csv"), "nowhere.csv"),
    (("simulate", "--data", "nowhere.csv"), "nowhere.csv"),
    (("simulate", "toy.toml", "--set", 'data.source="nowhere.csv"'), "nowhere.csv"),
    (("simulate", "toy.toml", "--model", "./nowhere"), "./nowhere"),
    (("simulate", "nowhere.toml"), "nowhere.toml"),
    (("simulate", "tweet"), "'tweets'"),
    (("plan", "check", "toy.toml", "--data", "nowhere.csv"), "nowhere.csv"),
    (("plan", "check", "text"), "records.csv"),
    (("audit", "toy.toml", "--data", "nowhere.csv"), "nowhere.csv"),
    (("compare", "toy.toml", "--data", "nowhere.csv", "--vary", "rounds=1,2"), "nowhere.csv"),
    (("evaluate", "base", "--data", "nowhere.csv"), "nowhere.csv"),
    (("predict", "base", "--file", "nowhere.csv"), "nowhere.csv"),
    (("client", "check", "site", "toy.toml", "--data", "nowhere.csv"), "nowhere.csv"),
    (("client", "join", "site", "federation.toml", "--data", "nowhere.csv"), "nowhere.csv"),
    (("client", "evaluate", "site", "--data", "nowhere.csv"), "nowhere.csv"),
    (("server", "init", "fed", "--plan", "toy.toml", "--host", "localhost", "--test", "nowhere.csv"), "nowhere.csv"),
    (("server", "init", "fed", "--plan", "nowhere.toml", "--host", "localhost"), "nowhere.toml"),
    (("simulate", "toy.toml", "--set", "local.learnin_rate=0.1"), "'learning_rate'"),
    (("simulate", "toy.toml", "--set", "learning-rate=0.1"), "'local.learning_rate'"),
    (("simulate", "toy.toml", "--set", "train=heads"), "'head'"),
    (("simulate", "toy.toml", "--set", "privacy=nonee"), "'none'"),
    (("plan", "check", "toy.toml", "--set", "privacy.epsilom=3"), "'epsilon'"),
    (("plan", "check", "toy.toml", "--examples", "100,200", "--set", "privacy.epsilom=3"), "'epsilon'"),
    (("audit", "toy.toml", "--set", "privacy.epsilom=3"), "'epsilon'"),
    (("compare", "toy.toml", "--set", "roundss=3", "--vary", "rounds=1,2"), "'rounds'"),
    (("compare", "toy.toml", "--vary", "local.stepss=1,2"), "'steps'"),
    (("server", "run", "fed", "--set", "local.stepss=2"), "'steps'"),
    (("client", "policy", "site", "--set", "training.min_example=9"), "'training.min_examples'"),
]
QUICKLY = (
    ("--help",),
    ("plan", "list"),
    ("plan", "new", "tweets"),
    ("client", "policy"),
    ("server", "status", "founded"),
)
SIMULATE = ("simulate", "toy.toml")


@pytest.fixture(scope="module")
def ended(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Ended]:
    """What became of each command of these tests, of one interpreter."""
    commands = [*(arguments for arguments, _ in MISSING), *QUICKLY, SIMULATE]
    write_folder(folder := tmp_path_factory.mktemp("missing"), base_model("bert"))
    founded(folder / "founded", base_model("bert"), "org-1")
    with chdir(folder):
        return dict(zip(commands, without_torch(*commands), strict=True))


@pytest.mark.parametrize(("arguments", "named"), MISSING, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_what_is_missing_is_named_before_torch_is_imported(
    ended: dict[tuple[str, ...], Ended], arguments: tuple[str, ...], named: str
) -> None:
    code, out, err = ended[arguments]
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("arguments", QUICKLY, ids=" ".join)
def test_quick_commands_load_no_torch(ended: dict[tuple[str, ...], Ended], arguments: tuple[str, ...]) -> None:
    code, out, err = ended[arguments]
    assert (code, err) == (0, "")
    assert out


def test_simulate_says_something_before_torch_is_imported(ended: dict[tuple[str, ...], Ended]) -> None:
    assert ended[SIMULATE].code == 70
    assert "toy.toml" in ended[SIMULATE].out


def test_what_is_varied_need_not_be_there_in_the_plan(cotune: Cotune, folder: Path) -> None:
    """The preset for own files names an example that nobody has."""
    vary = ("--vary", "data.source=reviews.csv", "--seeds", "1", "--jobs", "1", "--device", "cpu")
    assert cotune("compare", "text", "--model", "base", *QUICK, "--set", "privacy=none", *vary).code == 0


# --- tables in pipes


@pytest.mark.parametrize("color", ["", "1"])
def test_a_table_in_a_pipe_is_not_cut(folder: Path, color: str) -> None:
    """However narrow the terminal is that the pipe was opened in, and whether colors were asked for or not."""
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTEST_CURRENT_TEST", "FORCE_COLOR")}
    environ |= {"COLUMNS": "20", **({"FORCE_COLOR": color} if color else {})}
    script = Path(sys.executable).parent / "cotune"
    shown = subprocess.run(
        [str(script), "plan", "keys", "privacy.epsilon"], capture_output=True, text=True, env=environ, check=True
    ).stdout
    assert max(map(len, shown.splitlines())) > 60


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["reviews.csv", "orgs"])
def test_records_given_as_a_plan(cotune: Cotune, folder: Path, command: tuple[str, ...], name: str) -> None:
    (folder / "orgs").mkdir(exist_ok=True)
    told = cotune(*command, name)
    assert told.code == 2
    assert f"--data {name}" in told.err
