"""Comparisons played by several processes: that they find what one finds, and that nobody outlives them."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from cotune.simulations.comparison.workers import import_all
from tests.support.simulations import rounds_played, table

ROUNDS = 5
WEIGHTINGS = parse_variation("strategy.weighting=examples,uniform")


def test_workers_match_one_process_with_an_own_module_too(plan_file: Path, tmp_path: Path) -> None:
    module = tmp_path / "registers.py"
    module.write_text("import os, pathlib\npathlib.Path(__file__).with_name(f'seen-{os.getpid()}').touch()\n", encoding="utf-8")
    alone = compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path / "alone-", jobs=1, device="cpu")
    both = compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path / "beside", jobs=2, device="cpu", imports=[str(module)])
    assert table(alone.folder, "seconds") == table(both.folder, "seconds")
    assert len(list(tmp_path.glob("seen-*"))) == 3  # here, and in two workers


def processes_in(folder: Path) -> set[int]:
    """Those that work in a folder: a test's own, and what they have started, also where a server forked it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.add(int(process.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt(start: Callable[..., BaseProcess], plan_file: Path, out: Path, rounds: int, how: signal.Signals) -> int | None:
    """Starts a comparison of four cells with two workers, ends it after so many rounds, and returns its exit code.

    By then the workers must be gone.
    """
    vary = ("--vary", "strategy.weighting=examples,uniform", "--seeds", "2", "--set", f"rounds={ROUNDS}")
    process = start("compare", plan_file, *vary, "--jobs", "2", "--device", "cpu", "--out", out)
    assert process.pid is not None
    until(lambda: rounds_played(out) > rounds)
    workers = processes_in(out.parent) - {process.pid}
    assert len(workers) == 2
    os.kill(process.pid, how)
    process.join(600)
    until(lambda: not any(alive(pid) for pid in workers), 600)
    assert rounds < rounds_played(out) < 4 * ROUNDS
    return process.exitcode


in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")


@in_proc
@pytest.mark.crash
def test_a_killed_comparison_leaves_nobody_and_goes_on(
    plan_file: Path, tmp_path: Path, cotune: Callable[..., BaseProcess]
) -> None:
    assert interrupt(cotune, plan_file, tmp_path / "killed", ROUNDS, signal.SIGKILL) == -signal.SIGKILL
    given: dict[str, Any] = {"seeds": 2, "overrides": [f"rounds={ROUNDS}"], "jobs": 1, "device": "cpu"}
    again = compare(plan_file, [WEIGHTINGS], out=tmp_path / "killed", **given)
    assert rounds_played(again.folder) <= 4 * ROUNDS  # a round that was saved and not told before the kill is not told again
    assert [len(list(cell.glob("checkpoints/round-*"))) for cell in (again.folder / "cells").iterdir()] == [ROUNDS] * 4
    whole = compare(plan_file, [WEIGHTINGS], out=tmp_path / "played", **given)
    assert table(again.folder, "seconds") == table(whole.folder, "seconds")


@in_proc
@pytest.mark.long
def test_an_interrupt_ends_the_workers_too(plan_file: Path, tmp_path: Path, cotune: Callable[..., BaseProcess]) -> None:
    assert interrupt(cotune, plan_file, tmp_path / "out", 0, signal.SIGINT) == 130
    told = (tmp_path / "cotune.log").read_text(encoding="utf-8").splitlines()
    assert told[-1] == "cotune: stopped; finished runs are kept: the same command again goes on from there"


@pytest.mark.crash
def test_a_process_that_dies_costs_its_cell_only(plan_file: Path, tmp_path: Path) -> None:
    """Here one of two workers, as it starts."""
    module = tmp_path / "dies_once.py"
    code = """
        import multiprocessing, os, pathlib
        if multiprocessing.parent_process():
            try:
                pathlib.Path(__file__).with_name("died").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(3)
    """
    module.write_text(textwrap.dedent(code), encoding="utf-8")
    found = compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path / "out", jobs=2, device="cpu", imports=[str(module)])
    assert sorted(cell.status for cell in found.cells) == ["failed", "finished"]
    assert found.failed[0].reason == "its process ended with 3: perhaps memory ran out; try fewer --jobs"


def test_modules_are_imported_once_and_take_nobodys_name(tmp_path: Path) -> None:
    module = tmp_path / "counts_itself.py"
    module.write_text("import pathlib\npathlib.Path(__file__).with_suffix('.txt').touch(exist_ok=False)\n", encoding="utf-8")
    import_all([str(module), str(module), "json"])
    assert module.with_suffix(".txt").exists()
    (tmp_path / "json.py").touch()
    with pytest.raises(ImportError, match="cannot be imported as json: expected a file with a name that no other module has"):
        import_all([str(tmp_path / "json.py")])
