"""That the performance benchmarks run, in their smallest form and in this process: what they say of time is not looked at."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from cotune.simulations.comparison.workers import import_all

FOLDER = Path(__file__).parents[2] / "benchmarks" / "performance"
import_all([str(FOLDER / f"{name}.py") for name in ("harness", "plot", "page", "run")])
GPU = FOLDER.parent / "gpu"
PARTS = ("gpu_bench", "made_up", "gpu_steps", "gpu_gradients", "gpu_resumption", "gpu_evaluation", "gpu_memory", "gpu_run")
import_all([str(GPU / f"{name}.py") for name in PARTS])

from gpu_bench import Bench, Skipped  # noqa: E402
from gpu_run import SECTIONS, main, run_section  # noqa: E402
from harness import Curve, Figure, Results, Row, Sample, all_benchmarks, load_benchmark, measure  # noqa: E402
from page import write_page  # noqa: E402
from plot import draw  # noqa: E402
from run import run_one, store  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
ALONE = """
from harness import Benchmark, Contender, Figure
def body(meter, folder, smoke):
    assert not (folder / "setup").read_text() == "in this process"
    with meter.measure(units=2, label="a"):
        data = bytearray(50_000_000)
        data[::4096] = b"x" * len(data[::4096])
def fail(meter, folder, smoke):
    raise ValueError("on purpose")
def setup(folder, smoke):
    import os
    (folder / "setup").write_text(str(os.getpid()))
BENCHMARK = Benchmark("alone", 99, "Alone", (
    Contender("one", body), Contender("two", fail), Contender("three", body, needs=("no_such_module",)),
), lambda results: [results.row("x", "one", Figure()), results.row("x", "two", Figure())], setup)
"""


def test_contenders_run_in_turn_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "alone_benchmark.py"
    file.write_text(ALONE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "work"
    folder.mkdir()
    results = measure(file, folder, repeats=2)
    assert len(results.samples["one"]) == 2
    assert all(sample.cpu > 0 and sample.units == 2 and sample.peak > 40e6 for sample in results.samples["one"])
    assert results.failed["two"].endswith("ValueError: on purpose")
    assert results.failed["three"] == "no_such_module is not installed"
    rows = load_benchmark(file).rows(results)
    assert rows[0].figure is not None
    assert rows[1].figure is None
    assert "on purpose" in rows[1].note


def test_row_compares_medians_per_unit() -> None:
    results = Results(
        {"ours": [Sample(cpu=4, units=2), Sample(cpu=6, units=2), Sample(cpu=20, units=2)], "base": [Sample(cpu=2)]}
    )
    row = results.row("w", "ours", Figure(), against="base", goal="≤ 1 ×", reached=lambda ms, ratio: ratio <= 1)
    assert (row.figure, row.ratio, row.reached) == (3000.0, 1.5, False)
    assert row.spread == pytest.approx(8 / 2 / 3)
    assert results.row("w", "absent", Figure(), goal="≤ 1 ×", reached=lambda ms, ratio: True).reached is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all benchmarks: what was found out about an encoder is not found out again."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.long
@pytest.mark.parametrize("file", all_benchmarks(), ids=lambda file: file.stem)
def test_benchmark_runs_in_its_smallest_form(file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(cache))
    uses_tests = file.stem == "deployed_round"  # whose modules are found in this process in any case
    entry = run_one(file, smoke=True, isolated=uses_tests)
    benchmark = load_benchmark(file)
    missing = {contender.name for contender in benchmark.contenders if contender.missing}
    assert set(entry["failed"]) <= missing
    ran = {contender.name for contender in benchmark.contenders if contender.in_smoke} - missing
    assert set(entry["samples"]) == ran
    figures = [row["figure"] for row in entry["rows"] if row["figure"] is not None]
    assert figures
    assert all(map(math.isfinite, figures))
    assert all(row["figure"] >= 0 for row in entry["rows"] if row["figure"] is not None and "slope" not in row["what"])
    store(tmp_path / "results", file.stem, entry)
    assert f"## {benchmark.title}" in (tmp_path / "results" / "performance.md").read_text(encoding="utf-8")


def test_page_is_made_from_the_json_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    rows = [
        Row("a step", "ours", 12.345, "ms", 0.1, 2.5, "theirs", "≤ 2 ×", False),
        Row("a step", "theirs", None, "ms", note="not measured"),
    ]
    entry = {
        "number": 1, "title": "Steps", "about": "What is a step?\n\nMore.", "at": "2026-01-01T00:00+00:00", "seconds": 3,
        "load": [1.0, 2.0], "commit": "abc", "smoke": False, "rows": [vars(row) for row in rows], "failed": {"theirs": "x | y"},
        "samples": {},
    }  # fmt: skip
    store(tmp_path, "steps", entry)
    page = tmp_path / "performance.md"
    text = page.read_text(encoding="utf-8")
    assert "| a step | ours | 12.3 ms | 10 % | 2.5 × theirs | ≤ 2 × | **no** |" in text
    assert "| a step (not measured) | theirs | – |" in text
    assert "**0 of 1 goals reached.**" in text
    page.write_text("By people.\n\n" + text[text.index("<!-- below") :], encoding="utf-8")
    write_page(tmp_path / "performance.json", page)
    assert page.read_text(encoding="utf-8").startswith("By people.\n\n<!-- below")
    assert json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["benchmarks"]["steps"]["commit"] == "abc"


def test_published_page_is_that_of_the_published_json(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    page = tmp_path / "performance.md"
    page.write_text((results / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_page(results / "performance.json", page)
    for file in tmp_path.iterdir():
        assert file.read_text(encoding="utf-8") == (results / file.name).read_text(encoding="utf-8"), file.name


def curve_of(power: float, sizes: tuple[float, ...] = (10, 100, 1000), **named: str) -> Curve:
    named = {"what": "CPU", "unit": "s", "against": "clients", "series": ""} | named
    return Curve(**named, points=tuple((size, 0.02 * size**power) for size in sizes))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_slope_is_the_exponent_of_growth(power: float) -> None:
    curve = curve_of(power)
    assert curve.line == pytest.approx((power, 0.02))
    assert curve.last_slope == pytest.approx(power)


def test_fixed_costs_flatten_all_steps_but_the_last() -> None:
    curve = Curve("CPU", "s", "clients", "", ((1, 1000.0), (10, 1000.0), (100, 1000.0), (1000, 10_000.0)))
    assert curve.last_slope == pytest.approx(1.0)
    assert curve.slope == pytest.approx(0.3)  # by hand: Σ (x − 1.5) y / Σ (x − 1.5)², y = 3, 3, 3, 4


def test_picture_places_a_dot_for_each_point() -> None:
    """Of one decade each way the dots of a linear curve are on a diagonal, and what curves are called cannot end an element."""
    curves = [curve_of(1.0, (1, 10, 100)), curve_of(0.0, (1, 100), series="a <b> & c"), curve_of(1.0, (5,), against="rounds")]
    picture = ElementTree.fromstring(draw(curves))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.iter(f"{SVG}circle")]
    assert len(dots) == 6
    (x1, y1), (x2, y2), (x3, y3) = dots[:3]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)
    assert y1 > y2
    assert dots[3][1] == dots[4][1] == y1
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert "a <b> & c: slope 0.00, last step 0.00" in words
    assert "slope 1.00, last step 1.00" in words
    assert "CPU of a run (s) against rounds" in words


def test_picture_is_beside_the_page(tmp_path: Path) -> None:
    entry = {
        "number": 1, "title": "Steps", "about": "What?", "at": "2026-01-01T00:00+00:00", "seconds": 3, "load": [1.0, 2.0],
        "commit": "abc", "smoke": False, "rows": [], "failed": {}, "samples": {}, "curves": [asdict(curve_of(1.0))],
    }  # fmt: skip
    store(tmp_path, "steps", entry)
    assert "![Steps](steps.svg)" in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (tmp_path / "steps.svg").read_text(encoding="utf-8") == draw([curve_of(1.0)])


# --- benchmarks/gpu


@pytest.mark.long
def test_measurements_of_a_gpu_run_with_tiny_models(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(cache))
    found = {section.name: section for section in main([str(tmp_path), "--dry-run", "--device", "cpu", "--seconds", "3000"])}
    assert list(found) == list(SECTIONS)
    assert {name: section.error for name, section in found.items() if section.error} == {}
    assert all(section.rows or section.skipped for section in found.values())
    assert [row for section in found.values() for row in section.rows if "failed" in row] == []
    assert all(row["relative error"] < 1e-5 for row in found["clipped sums"].rows if row["arithmetic"] == "float32")
    assert found["killed and resumed"].rows[0]["bit-equal"] is True
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [section["name"] for section in written["sections"]] == list(SECTIONS)


def test_a_section_that_fails_ends_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> None:
        bench.add(known=1.0)
        raise ValueError("on purpose")

    def skip(bench: Bench) -> None:
        raise Skipped("nothing is here")

    monkeypatch.setitem(SECTIONS, "steps", fail)
    monkeypatch.setitem(SECTIONS, "writing", skip)
    bench = Bench(torch.device("cpu"), True, tmp_path, math.inf)
    for name in ("steps", "writing"):
        run_section(bench, name)
    assert (bench.sections[0].error, bench.sections[0].rows) == ("Failed: ValueError: on purpose", [{"known": 1.0}])
    assert bench.sections[1].skipped == "Skipped: nothing is here."
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "on purpose" in page
    assert "nothing is here" in page


def test_nothing_is_measured_when_the_time_is_over(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), True, tmp_path, -math.inf)
    run_section(bench, "features")
    assert bench.sections[0].skipped == "Skipped: the time was over."
