"""The front door: what `import cotune` offers, what it costs, and that nothing can be imported under a second name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cotune
from cotune.client.site_folder import SiteFile
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.run_folder import Progress
from tests.support.federations import founded

HEAVY = {"torch", "transformers", "opacus", "flwr", "pandas", "scipy", "numpy"}
SLOW = HEAVY - {"numpy"}
ROOMS = sorted(file.parent.name for file in Path(cotune.__file__).parent.glob("*/__init__.py"))


def calling(*words: str) -> str:
    """Return code that runs `cotune WORDS`, which must succeed."""
    return f"""
import sys
from cotune.cli.main import run
sys.argv = ["cotune", *{list(words)!r}]
try:
    run()
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded_by(code: str, folder: Path | None = None) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after the code, run in a folder."""
    shown = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True, cwd=folder)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


def test_every_public_name_can_be_imported() -> None:
    for name in cotune.__all__:
        assert getattr(cotune, name) is not None


def test_names_of_the_package_are_listed_and_no_others_are_found() -> None:
    assert set(cotune.__all__) <= set(dir(cotune))
    assert set(cotune.__all__) == {*cotune._MODULES, "__version__"}
    with pytest.raises(AttributeError):
        _ = cotune.simulate_everything


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import cotune") == set()


def test_catching_errors_loads_nothing_heavy() -> None:
    assert loaded_by("from cotune import CotuneError, PlanError") == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_cannot_be_imported_under_another_name(room: str) -> None:
    """A second copy of its classes would be made, which `except CotuneError` would miss."""
    root = Path(cotune.__file__).parent
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=root, capture_output=True, text=True)
    assert done.returncode
    assert f"cotune.{room}" in done.stderr


def test_light_commands_do_not_load_pytorch(tmp_path: Path) -> None:
    """One after the other in one interpreter: none of them does."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.json").write_text(SiteFile(organization="hospital-a").model_dump_json())
    commands = [
        ("--help",),
        ("--version",),
        ("simulate", "--help"),
        ("plan", "list"),
        ("plan", "new", "tweets"),
        ("plan", "keys", "privacy"),
        ("plan", "explain", "learning_rate"),
        ("client", "policy"),
        ("client", "policy", str(site)),
        ("client", "policy", str(site), "--set", "training.max_rounds=7"),
    ]
    assert not SLOW & loaded_by("\n".join(calling(*words) for words in commands), tmp_path)
    assert "max_rounds = 7" in (site / "policy.toml").read_text()


def test_ledger_of_which_nothing_was_spent_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text(SiteFile(organization="hospital-a").model_dump_json())
    assert loaded_by(calling("client", "ledger", str(tmp_path))) == set()


def test_server_status_loads_nothing_slow(tmp_path: Path, base_model: Callable[[str], Path]) -> None:
    """Also with a run and a checkpoint; flwr alone where a SuperLink listens, to ask it who is connected."""
    federation = founded(tmp_path / "fed", base_model("bert"), "hospital-a")
    run = create_run(federation)
    entry = {"round": 1, "stage": "head", "metrics": None, "epsilon": {}, "participants": [], "dropped": []}
    run.save(Progress(1, {"weight": torch.zeros(2)}, {}, (entry,)))
    assert not SLOW & loaded_by(calling("server", "status", str(federation.path)), tmp_path)
