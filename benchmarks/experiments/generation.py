"""What do ten teams gain from fine-tuning a language model together? Measured on Debian's package descriptions, preset `debian`.

    python benchmarks/experiments/generation.py --out docs/results/generation.md

Needs the extra text-demo and the weights that the preset names. What was trained is kept under --runs, and not trained again: the
command can be stopped and started again. The table has what is finished.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results_page import cell, publish

from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

SEEDS = (7, 8, 9)
MEASURED = "<!-- below: written by benchmarks/experiments/generation.py -->"
COLUMNS = {  # name in a row -> (where its test figures are, where its texts are)
    "first sentence of the long description": (None, "first_sentence"),
    "base model": ("majority", "base"),
    "alone, ε = 8 (mean of ten)": ("alone", "alone"),
    "alone without privacy (mean of ten)": ("alone_without_privacy", "alone_without_privacy"),
    "**federated, ε = 8**": ("federated", "federated"),
    "pooled without privacy": ("pooled", "pooled"),
}
Summary = Mapping[str, Any]


def run(runs: Path, seed: int, more: list[str]) -> Summary:
    """The summary of one run: trained, continued, or read where it is finished."""
    out = runs / f"seed-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(load_plan("debian", [*more, f"seed={seed}"]), out))
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"seed {seed}: {used.ru_utime + used.ru_stime:.0f} CPU seconds so far")
    found: Summary = json.loads((out / "summary.json").read_text())
    return found


def mean_of(test: Summary, column: str | None, key: str) -> float | None:
    """A figure of a column; of models of several organizations their mean. None where it was not measured."""
    figures = test.get(column or "")
    return float(figures.get("mean", figures)[key]) if figures else None


def table(found: list[Summary]) -> str:
    rows = ["| model | test loss, nats per token | token accuracy | ROUGE-L |", "|---|---|---|---|"]
    for name, (column, texts) in COLUMNS.items():
        tests = [each["test"] for each in found]
        figures = (
            [mean_of(test, column, "loss") for test in tests],
            [mean_of(test, column, "accuracy") for test in tests],
            [mean_of(test["written"]["figures"], texts, "rouge_l") for test in tests],
        )
        rows.append(f"| {name} | {' | '.join(cell([each for each in values if each is not None]) for values in figures)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for all runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: list[Summary] = []
    for seed in chosen.seeds:
        found.append(run(chosen.runs, seed, chosen.set))
        note = "Mean ± sd (number of seeds) on the common test set, by `python benchmarks/experiments/generation.py`."
        publish(chosen.out, MEASURED, note, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
