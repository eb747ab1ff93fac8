"""The map of a feature is fitted for half a minute: every command says so, on standard error."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.cli.preparation_progress import Waiting
from cotune.models.features import public_map
from tests.support.console import Cotune


def test_fitting_a_map_is_said_once(cotune: Cotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    public_map._get_map.cache_clear()
    check = ("plan", "check", "toy.toml", "--set", "model.pooling=auto", "--set", "model.feature={layers=[1]}", "--json")
    first, second = (cotune(*check) for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert first.err.startswith("fitting the map of ")
    assert "4,000 texts" in first.err.splitlines()[0]
    assert first.err.splitlines()[-1].endswith("4,000 done")
    assert "fitting" not in first.out + second.err


def test_a_line_is_not_said_for_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = Waiting()
    for done in range(0, 4001, 100):
        waiting("map", {"base": "bert", "done": done, "total": 4000})
    waiting("other", {})
    assert len(capsys.readouterr().err.splitlines()) == 2
