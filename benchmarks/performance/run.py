"""Run the performance benchmarks, and write what they found.

    python benchmarks/performance/run.py [NAME ...] [--smoke] [--repeats N] [--profile FOLDER] [--out FOLDER]

Writes performance.json and, from it, performance.md into the folder (docs/results). Benchmarks that are not named keep what the
JSON holds of them, with its date. --smoke: in the smallest form, to see that everything runs; its figures say nothing and are
not written unless --out is given. --profile: every contender's measured blocks under cProfile, as text; figures are not
written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import HERE, Results, all_benchmarks, load_benchmark, measure
from page import write_page

ROOT = HERE.parents[1]
PACKAGES = ("cotune", "torch", "transformers", "opacus", "flwr", "ray", "pfl", "numpy", "pydantic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {file.stem: file for file in all_benchmarks()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    unknown = set(given.names) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    out = given.out or (None if given.smoke or given.profile else ROOT / "docs" / "results")
    profile = given.profile.resolve() if given.profile else None
    for name in given.names or known:
        print(f"{name} …", file=sys.stderr, flush=True)
        entry = run_one(known[name], smoke=given.smoke, repeats=given.repeats, profile=profile)
        for row in entry["rows"]:
            print(_line(row), flush=True)
        if out is not None:
            store(out, name, entry)


def run_one(
    file: Path, *, smoke: bool, repeats: int | None = None, profile: Path | None = None, isolated: bool = True
) -> dict[str, Any]:
    """Run one benchmark; its entry in the JSON."""
    load = os.getloadavg()[0]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as folder:
        results = measure(file, Path(folder), smoke=smoke, repeats=repeats, profile=profile, isolated=isolated)
    benchmark = load_benchmark(file)
    return {
        "number": benchmark.number,
        "title": benchmark.title,
        "about": sys.modules[file.stem].__doc__,
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "seconds": round(time.monotonic() - began),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "commit": commit(),
        "smoke": smoke,
        "rows": [asdict(row) for row in benchmark.rows(results)],
        "curves": [asdict(curve) for curve in benchmark.curves(results)] if benchmark.curves else [],
        "failed": results.failed,
        "samples": _samples(results),
    }


def _samples(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Of every contender at most 30, so that the file stays readable; medians are over all."""
    return {name: [_rounded(asdict(sample)) for sample in samples[:30]] for name, samples in results.samples.items()}


def _rounded(sample: dict[str, Any]) -> dict[str, Any]:
    flat = {**sample, **sample["other"]}
    del flat["other"]
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in flat.items() if value not in ("", 0.0)
    }


def store(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Store the entry in the JSON file and regenerate the page."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "performance.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"benchmarks": {}}
    found["machine"] = machine()
    found["versions"] = versions()
    found["benchmarks"][name] = entry
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    write_page(file, out / "performance.md")


def machine() -> str:
    """The machine in general words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({platform.machine()}, shared), {memory:.0f} GiB of memory, {platform.system()}, no GPU used"


def versions() -> dict[str, str]:
    """Of Python and the packages that are compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured; "" outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _line(row: dict[str, Any]) -> str:
    figure = "–" if row["figure"] is None else f"{row['figure']:.3g} {row['unit']}"
    ratio = "" if row["ratio"] is None else f"  {row['ratio']:.3g} × {row['against']}"
    goal = f"  [{row['goal']}: {'yes' if row['reached'] else 'no' if row['reached'] is False else '?'}]" if row["goal"] else ""
    return f"  {row['what']:45.45}  {row['contender']:30.30}  {figure}{ratio}{goal}  {row['note']}"


if __name__ == "__main__":
    main()
