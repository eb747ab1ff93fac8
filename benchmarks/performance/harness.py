"""Measure contenders side by side: interleaved, each in a fresh process with one thread, by CPU seconds.

A benchmark is a module with a `BENCHMARK`. Its contenders do the same work in different ways. The harness runs them in turn (A
B C, A B C, …), so that what else the machine does hits all of them alike, each time in a new process, so that memory and
imports of one contender are never those of another. Inside, a contender marks what is to be measured:

    def bare_loop(meter: Meter, folder: Path, smoke: bool) -> None:
        model = build()
        with meter.measure(units=100):  # 100 rounds
            train(model)

The main figure is CPU time per unit: of all threads of the process, without its children. Wall time and peak resident memory
above the level at the beginning of the block stand beside it. Medians are over all blocks of all repetitions.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import io
import json
import math
import os
import pstats
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_COLOR": "1",
}
_MAX_SECONDS = 1200.0  # of one contender in one repetition
_PROFILED_LINES = 25


@dataclass(frozen=True)
class Sample:
    """What one measured block took, in all: not yet divided by its units.

    Attributes:
        cpu: Seconds of user and system time of this process.
        wall: Seconds.
        peak: Bytes of resident memory above the level before the block.
        units: How many of what the benchmark counts were done.
        other: Further figures by name, as they are.
    """

    cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0
    units: float = 1.0
    label: str = ""
    other: Mapping[str, float] = field(default_factory=dict)

    def figure(self, name: str) -> float:
        """Return cpu or wall per unit, the peak, or one of the others."""
        if name in ("cpu", "wall"):
            return float(getattr(self, name)) / self.units
        return self.peak if name == "peak" else self.other[name]

    def with_label(self, label: str) -> Sample:
        """Return the same sample with another label."""
        return replace(self, label=label)

    def has(self, name: str) -> bool:
        """Return whether the sample holds that figure."""
        return name in ("cpu", "wall", "peak") or name in self.other


class Meter:
    """What a contender measures itself with."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.samples: list[Sample] = []
        self._profile = profile

    @contextmanager
    def measure(self, units: float = 1.0, label: str = "") -> Iterator[None]:
        """Measure the block, which does `units` of the benchmark's work. The label tells blocks of one contender apart."""
        before = _resetpeak_memory()
        cpu = time.process_time()
        wall = time.perf_counter()
        with self._profile or nullcontext():
            yield
        wall = time.perf_counter() - wall
        cpu = time.process_time() - cpu
        self.samples.append(Sample(cpu, wall, max(0.0, peak_memory() - before), units, label))

    def start_profile(self) -> None:
        """Profile from here on, where that is wanted: for contenders whose blocks begin and end in callbacks."""
        if self._profile:
            self._profile.enable()

    def stop_profile(self) -> None:
        """End what `start_profile` began."""
        if self._profile:
            self._profile.disable()

    def add(self, *, cpu: float = 0.0, wall: float = 0.0, units: float = 1.0, label: str = "", **other: float) -> None:
        """Add a sample that the contender has measured itself, such as that of other processes."""
        self.samples.append(Sample(cpu, wall, 0.0, units, label, other))


def _resetpeak_memory() -> float:
    """Let the kernel forget the peak of resident memory, where it can, and return the present level in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return peak_memory()


def peak_memory() -> float:
    """Return the peak of resident memory in bytes, since the process or the last measured block began."""
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


Run = Callable[[Meter, Path, bool], None]
"""(meter, the benchmark's folder, whether in the smallest form): does the work of one contender once."""


@dataclass(frozen=True)
class Contender:
    """One way to do a benchmark's work.

    Attributes:
        needs: Modules that must be installed; where one is not, the contender is left out and the page says so.
        repeats: Own number of repetitions, where one takes long.
        in_smoke: Whether it takes part in the smallest form.
        users_cache: Whether features are looked up where the user keeps them, and not in a new folder.
    """

    name: str
    run: Run
    needs: tuple[str, ...] = ()
    repeats: int | None = None
    in_smoke: bool = True
    users_cache: bool = False

    @property
    def missing(self) -> str | None:
        """The first module that it needs and that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


@dataclass(frozen=True)
class Figure:
    """Which figure of the samples a line shows.

    Attributes:
        name: cpu, wall, peak, or one that the contender has added.
        scale: From seconds, bytes, … to the unit.
        label: Of the samples that count; None: all.
    """

    name: str = "cpu"
    unit: str = "ms CPU"
    scale: float = 1000.0
    label: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: What was measured.
        contender: Whose figure it is.
        figure: The median, in `unit`.
        spread: Half of the range over the median.
        ratio: The figure over that of `against`.
        goal: In words, where there is one.
        reached: Whether it is.
    """

    what: str
    contender: str
    figure: float | None
    unit: str
    spread: float | None = None
    ratio: float | None = None
    against: str = ""
    goal: str = ""
    reached: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A figure against a size, for a picture with logarithmic axes.

    Attributes:
        what: The figure, such as CPU.
        unit: Of the figure.
        against: What grows.
        series: Tells curves of one plot apart.
        points: (size, figure), both above 0, in the order of sizes.
    """

    what: str
    unit: str
    against: str
    series: str
    points: tuple[tuple[float, float], ...]

    @property
    def line(self) -> tuple[float, float]:
        """Exponent k and factor c of c · size^k, by least squares of the logarithms."""
        found = statistics.linear_regression(
            *([math.log(value) for value in values] for values in zip(*self.points, strict=True))
        )
        return found.slope, math.exp(found.intercept)

    @property
    def slope(self) -> float:
        """The exponent of the line."""
        return self.line[0]

    @property
    def last_slope(self) -> float:
        """The exponent between the last two points."""
        return replace(self, points=self.points[-2:]).slope


@dataclass
class Results:
    """All samples of a benchmark, by contender."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # contender -> why it has no samples

    def values(self, contender: str, name: str = "cpu", label: str | None = None) -> list[float]:
        """Return a figure of every sample (with that label)."""
        found = self.samples.get(contender, [])
        return [each.figure(name) for each in found if each.has(name) and label in (None, each.label)]

    def median(self, contender: str, name: str = "cpu", label: str | None = None) -> float | None:
        """Return the median of a figure; None where the contender has none."""
        values = self.values(contender, name, label)
        return statistics.median(values) if values else None

    def row(
        self,
        what: str,
        contender: str,
        figure: Figure,
        *,
        against: str = "",
        against_label: str | None = None,
        goal: str = "",
        reached: Callable[[float, float], bool] | None = None,
        note: str = "",
    ) -> Row:
        """Return the line for one figure of a contender.

        Args:
            against: The contender that the ratio is taken to, with `against_label` (default: the same label).
            reached: (figure in its unit, ratio) -> whether the goal is reached.
        """
        values = self.values(contender, figure.name, figure.label)
        if not values:
            return Row(what, contender, None, figure.unit, goal=goal, note=note or self.failed.get(contender, "not measured"))
        median = statistics.median(values)
        spread = (max(values) - min(values)) / 2 / median if len(values) > 1 and median else None
        base = self.median(against, figure.name, figure.label if against_label is None else against_label) if against else None
        ratio = median / base if base else None
        verdict = reached(median * figure.scale, ratio or 0.0) if reached and (ratio is not None or not against) else None
        return Row(what, contender, median * figure.scale, figure.unit, spread, ratio, against, goal, verdict, note)


@dataclass(frozen=True)
class Benchmark:
    """A question, its contenders, and how their samples become lines of the table.

    Attributes:
        number: Of the line in the table of goals.
        rows: The samples -> lines.
        setup: Called once in a process of its own: (folder, whether in the smallest form); writes what all contenders read.
        curves: The samples -> what the picture beside the table shows; None: there is none.
    """

    name: str
    number: int
    title: str
    contenders: tuple[Contender, ...]
    rows: Callable[[Results], list[Row]]
    setup: Callable[[Path, bool], None] | None = None
    repeats: int = 3
    curves: Callable[[Results], list[Curve]] | None = None

    def contender(self, name: str) -> Contender:
        """Return one by its name."""
        return next(each for each in self.contenders if each.name == name)


def load_benchmark(file: Path) -> Benchmark:
    """Return the `BENCHMARK` of a module, most often of this folder."""
    for folder in (HERE, file.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    module = importlib.import_module(file.stem)
    found: Benchmark = module.BENCHMARK
    return found


def measure(
    file: Path,
    folder: Path,
    *,
    smoke: bool = False,
    isolated: bool = True,
    repeats: int | None = None,
    profile: Path | None = None,
) -> Results:
    """Run all contenders of a benchmark in turn.

    Args:
        file: The module.
        folder: An empty one, for what the contenders share and write.
        smoke: In the smallest form, once.
        isolated: Each in a process of its own; False: in this one, for a test.
        repeats: Instead of the benchmark's own number.
        profile: A folder for what cProfile finds in each contender's measured blocks. Figures are then not to be used.
    """
    benchmark = load_benchmark(file)
    results = Results()
    present = []
    for contender in benchmark.contenders:
        if contender.missing:
            results.failed[contender.name] = f"{contender.missing} is not installed"
        elif not smoke or contender.in_smoke:
            present.append(contender)
    if benchmark.setup:
        if isolated:
            _run_child(file, "", folder, smoke, None)
        else:
            benchmark.setup(folder, smoke)
    most = 1 if smoke else repeats or benchmark.repeats
    for turn in range(most):
        for contender in present:
            if contender.name in results.failed or turn >= min(most, contender.repeats or most):
                continue
            began = time.monotonic()
            try:
                found = (
                    _run_isolated(file, contender, folder, smoke, profile) if isolated else _run_here(contender, folder, smoke)
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                results.failed[contender.name] = f"failed: {error}"[:300]
                print(f"  {contender.name}: {results.failed[contender.name]}", file=sys.stderr, flush=True)
                continue
            results.samples.setdefault(contender.name, []).extend(found)
            print(f"  {contender.name}, run {turn + 1}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return results


def _run_here(contender: Contender, folder: Path, smoke: bool) -> list[Sample]:
    meter = Meter()
    with warnings.catch_warnings():  # of peers' libraries
        warnings.simplefilter("ignore")
        contender.run(meter, folder, smoke)
    return meter.samples


def _run_isolated(file: Path, contender: Contender, folder: Path, smoke: bool, profile: Path | None) -> list[Sample]:
    return [Sample(**each) for each in _run_child(file, contender.name, folder, smoke, profile)]


def _run_child(file: Path, contender: str, folder: Path, smoke: bool, profile: Path | None) -> list[dict[str, Any]]:
    """One contender, or the setup where the name is empty, in a process of its own. Raises RuntimeError with its last words."""
    out = folder / "samples.json"
    out.unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__).resolve()), str(file), contender, str(folder), str(out)]
    words += ["--smoke"] * smoke + (["--profile", str(profile)] if profile else [])
    env = {**os.environ, **ONE_THREAD, **QUIET}
    if not (contender and load_benchmark(file).contender(contender).users_cache):
        env["COTUNE_CACHE"] = str(folder / "cache")
    done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=_MAX_SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1])
    samples: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return samples


def _main() -> None:
    """The child: one contender (or the setup), its samples to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("contender")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--profile", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    benchmark = load_benchmark(given.file)
    profile = cProfile.Profile(time.process_time) if given.profile else None
    meter = Meter(profile)
    if given.contender:
        benchmark.contender(given.contender).run(meter, given.folder, given.smoke)
    elif benchmark.setup:
        benchmark.setup(given.folder, given.smoke)
    given.out.write_text(json.dumps([asdict(sample) for sample in meter.samples]), encoding="utf-8")
    if profile and given.contender:
        given.profile.mkdir(parents=True, exist_ok=True)
        name = f"{benchmark.name}-{given.contender}".replace(" ", "-").replace(",", "")
        (given.profile / f"{name}.txt").write_text(_profile_text(profile), encoding="utf-8")


def _profile_text(profile: cProfile.Profile) -> str:
    """The functions that take most by themselves, and those that take most with what they call."""
    stream = io.StringIO()
    stats = pstats.Stats(profile, stream=stream)
    for order in ("tottime", "cumulative"):
        stats.sort_stats(order).print_stats(_PROFILED_LINES * (1 if order == "tottime" else 3))
    return stream.getvalue()


def all_benchmarks() -> Sequence[Path]:
    """Return the modules of this folder that hold a benchmark, by their numbers in the table of goals."""
    files = [file for file in sorted(HERE.glob("*.py")) if "\nBENCHMARK = " in file.read_text(encoding="utf-8")]
    return sorted(files, key=lambda file: load_benchmark(file).number)


if __name__ == "__main__":
    sys.modules["harness"] = sys.modules["__main__"]  # benchmarks import it by its name
    _main()
