"""What does a wider frozen feature gain at the same ε? The preset `tweets` beside what it was before.

    python benchmarks/experiments/tweets.py --out docs/results/tweets.md

Both are trained with the same ε per organization, on the same records and partition for each seed. What was trained is kept under
--runs, and not trained again: the command can be stopped and started again. The table has what is finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from results_page import NARROW, cell, publish

from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

SEEDS = (8, 9, 10)  # none of those that settings were chosen on
EPSILONS = (8.0, 3.0)
PLANS: dict[str, str | Path] = {"tweets-narrow": NARROW, "tweets": "tweets"}
BEFORE = "tweets-narrow"
AFTER = "tweets"
MEASURED = "<!-- below: written by benchmarks/experiments/tweets.py -->"
Row = tuple[str, float]  # plan, ε


def play(runs: Path, plan: str, epsilon: float, seed: int) -> float:
    """Train, go on, or read what is finished: the accuracy on the common test set."""
    settings = [f"privacy.epsilon={epsilon}", f"seed={seed}", "simulation.baselines=[]", "personalize.methods=[]"]
    out = runs / f"{plan}-{epsilon:g}-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(load_plan(PLANS[plan], settings), out))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return float(summary["test"]["federated"]["accuracy"])


def table(found: dict[Row, dict[int, float]]) -> str:
    """Mean and spread over the seeds, and what the preset gains on each seed."""
    lines = ["| plan | ε | accuracy | by seed |", "|---|---|---|---|"]
    for (plan, epsilon), values in found.items():
        each = ", ".join(f"{seed}: {value:.4f}" for seed, value in values.items())
        lines.append(f"| `{plan}` | {epsilon:g} | {cell(list(values.values()), 4)} | {each} |")
    for epsilon in dict.fromkeys(epsilon for _, epsilon in found):
        before = found.get((BEFORE, epsilon), {})
        after = found.get((AFTER, epsilon), {})
        gains = {seed: after[seed] - before[seed] for seed in before if seed in after}
        each = ", ".join(f"{seed}: {gain:+.4f}" for seed, gain in gains.items())
        if gains:
            lines.append(f"| gain | {epsilon:g} | {cell(list(gains.values()), 4)} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/tweets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[Row, dict[int, float]] = {}
    for seed in chosen.seeds:
        for epsilon in chosen.epsilons:
            for plan in chosen.plans:
                accuracy = play(chosen.runs, plan, epsilon, seed)
                found.setdefault((plan, epsilon), {})[seed] = accuracy
                print(f"{plan}, ε = {epsilon:g}, seed {seed}: {accuracy:.4f}", flush=True)
                note = "Test accuracy, mean ± sd (number of seeds), by `python benchmarks/experiments/tweets.py`."
                publish(chosen.out, MEASURED, note, table(dict(sorted(found.items(), key=lambda row: -row[0][1]))))
    print(table(found))


if __name__ == "__main__":
    main()
