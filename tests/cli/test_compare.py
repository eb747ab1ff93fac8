from __future__ import annotations

import io
import json
import re
from pathlib import Path

from rich.console import Console

from cotune.cli.comparison_progress import showing_cells
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from tests.support.console import Cotune

VARY = ("--vary", "strategy.weighting=examples,uniform")
QUICK = ("--jobs", "1", "--device", "cpu")


def test_strategies_side_by_side(cotune: Cotune, folder: Path) -> None:
    shown = cotune("compare", "toy.toml", *VARY, "--vary", "partition=iid,dirichlet:1", "--seeds", "2", *QUICK)
    assert (shown.code, shown.err) == (0, "")
    lines = [line for line in shown.out.splitlines() if not line.startswith("left out: ")]
    assert lines[0].startswith("checking 4 combinations, each under 2 seeds")
    assert lines[1] == f"8 runs, 0 of them finished before, in {folder / 'compare' / 'toy'}"
    told = [
        line
        for line in lines
        if re.match(r"\d/8 strategy.weighting=\w+, partition=\S+, seed=[78]: test accuracy 0\.\d{3}, ", line)
    ]
    assert len(told) == 8
    assert [line.strip() for line in lines if line.startswith("partition = ")] == ["partition = iid", "partition = dirichlet:1"]
    number = r"\d+\.\d"
    interval = r"\d+\.\d ± \d+\.\d"
    rest = rf" +{interval} +{interval} +{number} kB +{number} kB +{number} s +2 of 2"
    assert len(re.findall(rf"^examples +{interval} +baseline +–{rest}$", shown.out, re.MULTILINE)) == 2
    differing = rf"^uniform +{interval} +[+−]?{interval} +(–|< 0\.001|\d\.\d+){rest}$"
    assert len(re.findall(differing, shown.out, re.MULTILINE)) == 2
    results = json.loads((folder / "compare" / "toy" / "results.json").read_bytes())
    assert results["vary"] == {"strategy.weighting": ["examples", "uniform"], "partition": ["iid", "dirichlet:1"]}
    again = cotune("compare", "toy.toml", *VARY, "--vary", "partition=iid,dirichlet:1", "--seeds", "2", *QUICK)
    assert "\n8 runs, 8 of them finished before" in again.out
    assert "test accuracy" not in again.out


def test_one_seed_has_no_error_bars(cotune: Cotune, folder: Path) -> None:
    options = ("--seeds", "1", "--baseline", "uniform", "--data", "reviews.csv", "--set", "local.steps=1", "--out", "there")
    shown = cotune("compare", "toy.toml", *VARY, *options, *QUICK)
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"^examples +\d+\.\d +[+−]?\d+\.\d +– ", shown.out, re.MULTILINE)
    assert re.search(r"^uniform +\d+\.\d +baseline +– ", shown.out, re.MULTILINE)
    assert (folder / "there" / "compare.html").exists()


def test_gain_on_own_records_is_shown_without_epsilon(cotune: Cotune, folder: Path) -> None:
    given = ("--seeds", "1", "--gain", "--set", "privacy={epsilon=8}", *QUICK)
    shown = cotune("compare", "toy.toml", "--vary", "strategy.weighting=examples", *given)
    assert (shown.code, shown.err) == (0, "")
    results = json.loads((folder / "compare" / "toy" / "results.json").read_bytes())
    [cell] = results["cells"]
    summary = json.loads((folder / "compare" / "toy" / cell["folder"] / "summary.json").read_bytes())
    own = [each["own"] for each in summary["organizations"]]
    gains = [each["adapted"]["accuracy"] - each["alone_without_privacy"]["accuracy"] for each in own]
    assert abs(cell["gain"] - sum(gains) / 2) < 1e-9
    told = [each["worth"]["answer"] for each in summary["organizations"]]
    assert cell["answers"] == [told.count("yes"), told.count("no"), told.count("too close to tell")]
    assert results["epsilon_together"] is None  # alone is trained without privacy
    lines = [line for line in shown.out.splitlines() if not line.startswith("left out: ")]
    assert "gain" in lines[3]


def test_a_failed_run_is_said_and_is_the_exit_code(cotune: Cotune, folder: Path) -> None:
    shown = cotune("compare", "toy.toml", "--vary", "server.max_update_norm=1000,1e-30", "--seeds", "1", *QUICK)
    assert (shown.code, shown.err) == (1, "")
    assert "2/2 server.max_update_norm=1e-30, seed=7 failed: round 1 got 0 of 2 updates" in shown.out
    assert "failed: server.max_update_norm = 1e-30, seed 7: round 1 got 0 of 2 updates" in shown.out
    assert re.search(r"^1e-30 +– +– +– .* 0 of 1$", shown.out, re.MULTILINE)


def test_mistakes_are_one_sentence(cotune: Cotune, folder: Path) -> None:
    for arguments, words in (
        ((), "there is nothing to compare: expected at least one --vary"),
        (("--vary", "partition"), 'the variation "partition" is not understood: expected KEY=V1,V2'),
        (("--vary", "partition=iid,zipf"), "partition=zipf, seed=7: "),
        (("--vary", "partition=iid", "--baseline", "shards"), 'the baseline "shards" is no value of partition'),
    ):
        shown = cotune("compare", "toy.toml", *arguments)
        assert shown.code == 2
        assert all(line.startswith("checking ") for line in shown.out.splitlines())
        assert shown.err.startswith("cotune: ")
        assert words in shown.err
        assert shown.err.count("\n") == 1
    assert not (folder / "compare").exists()


def test_plan_typo_is_refused_before_data_and_model_are_read(cotune: Cotune, folder: Path) -> None:
    (folder / "reviews.csv").unlink()
    (folder / "base").unlink()
    shown = cotune("compare", "toy.toml", "--vary", "strategy.weighting=examples,unifrom", "--data", "toy.toml", *QUICK)
    assert (shown.code, shown.out) == (2, "")
    assert "strategy.weighting=unifrom: " in shown.err


def test_the_rows_are_told_apart_in_words(cotune: Cotune, folder: Path) -> None:
    shown = cotune("compare", "toy.toml", "--vary", "local.steps=1,2", "--seeds", "2", "--set", "rounds=1", *QUICK)
    assert shown.code == 0
    [said] = [line for line in shown.out.splitlines() if line.startswith("better than 1: ")]
    assert sum(part.endswith(": 2") for part in said.split("; ")) == 1
    assert any("--seeds 5" in line and "3 further" in line for line in shown.out.splitlines())


def test_a_live_display_shows_the_same_lines(folder: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160, highlight=False, color_system=None)
    with showing_cells(console) as listener:
        rates = parse_variation("server.max_update_norm=1000,1e-30")
        compare("toy.toml", [rates], seeds=1, out=folder / "out", jobs=1, device="cpu", listener=listener)
    shown = stream.getvalue()
    assert shown.count("checking 2 combinations against") == 1
    assert "2 runs, 0 of them finished before" in shown
    assert re.search(r"1/2 server.max_update_norm=1000, seed=7: test accuracy 0\.\d{3}", shown)
    assert "2/2 server.max_update_norm=1e-30, seed=7 failed" in shown


def test_a_private_selection_shows_one_plan_and_its_epsilon(cotune: Cotune, folder: Path) -> None:
    chosen = ("--vary", "local.steps=1,2", "--set", "privacy={epsilon=8}", "--set", "simulation.min_examples=10")
    shown = cotune("compare", "toy.toml", *chosen, "--private-selection", "1", *QUICK)
    assert (shown.code, shown.err) == (0, "")
    results = json.loads((folder / "selected" / "toy" / "released" / "results.json").read_bytes())
    assert str(folder / "selected" / "toy" / "released") in shown.out
    assert f"{results['delta']:.1e}" in shown.out
    assert "local.steps" in shown.out
    assert "run 0" not in shown.out
    again = cotune("compare", "toy.toml", *chosen, "--private-selection", "1", *QUICK)
    assert again.code == 0
    assert again.out.splitlines()[0].startswith("local.steps")


def test_a_private_selection_that_cannot_be_had_is_one_sentence(cotune: Cotune, folder: Path) -> None:
    for arguments, words in (
        (("--seeds", "3"), "--seeds"),
        (("--baseline", "examples"), "--baseline"),
        (("--set", "privacy='none'"), "no record-level privacy"),
    ):
        shown = cotune("compare", "toy.toml", *VARY, *arguments, "--private-selection", "3", *QUICK)
        assert shown.code == 2
        assert words in shown.err
    assert not (folder / "selected").exists()
