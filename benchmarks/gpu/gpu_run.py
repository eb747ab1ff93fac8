"""What one GPU does: models of billions of parameters in tokens per second and GiB, and whether its results are right.

    python benchmarks/gpu/gpu_run.py results            # at most 7 minutes on one H100; writes gpu.json and gpu.md there
    python benchmarks/gpu/gpu_run.py results --dry-run  # the same with tiny models, on a CPU too

It needs cotune with its dependencies, and no network: weights, words and records are made up. Both files are rewritten after each
measurement. A section that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_bench import Bench, Section, Skipped, free, machine, reason_of_failure
from gpu_evaluation import measure_evaluation, measure_features
from gpu_gradients import measure_clipped_sums, measure_writing
from gpu_memory import measure_memory_limit
from gpu_resumption import measure_resumption, simulate_until_killed
from gpu_steps import measure_steps

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "steps": measure_steps,
    "clipped sums": measure_clipped_sums,
    "killed and resumed": measure_resumption,
    "writing": measure_writing,
    "evaluation": measure_evaluation,
    "memory limit": measure_memory_limit,
    "features": measure_features,
}


def run_section(bench: Bench, name: str) -> None:
    """Whatever goes wrong in a section ends that section alone."""
    section = Section(name)
    bench.sections.append(section)
    print(f"{name}:", flush=True)
    began = time.monotonic()
    try:
        if time.monotonic() > bench.until:
            raise Skipped("the time was over")
        SECTIONS[name](bench)
    except Skipped as reason:
        section.skipped = f"Skipped: {reason}."
    except Exception as error:
        traceback.print_exc()
        section.error = f"Failed: {reason_of_failure(error)}"
    free(bench.device)
    section.seconds = time.monotonic() - began
    print(f"  {section.skipped or section.error or 'done'} ({section.seconds:.0f} s)", flush=True)
    bench.write()


def main(arguments: list[str] | None = None) -> list[Section]:
    """Measure, write, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where gpu.json and gpu.md are written")
    parser.add_argument("--dry-run", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=390, help="nothing is begun after that time")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="some of the sections")
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)  # the plan of the run that a section lets be killed
    chosen = parser.parse_args(arguments)
    if chosen.killed:
        simulate_until_killed(chosen.killed, chosen.folder, chosen.device)
    bench = Bench(torch.device(chosen.device), chosen.dry_run, chosen.folder, time.monotonic() + chosen.seconds)
    print(machine(bench.device), flush=True)
    for name in chosen.only:
        run_section(bench, name)
    return bench.sections


if __name__ == "__main__":
    main()
