"""What do adapters give, with privacy and without? Measured on real tweets with the preset `tweets-lora`.

    python benchmarks/experiments/tweets_lora.py --out docs/results/tweets-lora.md

Every row is trained with the same total ε per organization, on the same partition for each seed. What was trained is kept under
--runs, and not trained again: the command can be stopped and started again. The table has what is finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from results_page import cell, publish

from cotune.errors import CotuneError
from cotune.plan.load import load_plan
from cotune.simulations.run import resume, simulate

SEEDS = (7, 8, 9)
EPSILONS = ("8", "3", "none")
RECIPES = {
    "head alone": ("train=head", "rounds=10"),
    "staged: head, then LoRA (`tweets-lora`)": (),
    "LoRA from a fresh head": ("train=lora", "rounds=2", *(f"local.{key}" for key in (
        "learning_rate=2.0", "head_learning_rate=8.0", "momentum=0.0", "batch_size=0.1", "steps=4", "physical_batch_size=128"))),
}  # fmt: skip
WITHOUT_PRIVACY = {  # unclipped gradients want other rates; the bound is trained with Adam
    "head alone": ("local.optimizer=adam", "local.learning_rate=0.02"),
    "staged: head, then LoRA (`tweets-lora`)": (
        "local.optimizer=adam", "local.learning_rate=0.02", "train.1.local.optimizer=adam",
        "train.1.local.learning_rate=0.002", "train.1.local.head_learning_rate=0.002"),
    "LoRA from a fresh head": ("local.optimizer=adam", "local.learning_rate=0.002", "local.head_learning_rate=0.02"),
}  # fmt: skip
MEASURED = "<!-- below: written by benchmarks/experiments/tweets_lora.py -->"


def accuracy(runs: Path, recipe: str, epsilon: str, seed: int) -> float:
    """Test accuracy of one run: trained, continued, or read where it is finished."""
    privacy = ('privacy="none"', *WITHOUT_PRIVACY[recipe]) if epsilon == "none" else (f"privacy.epsilon={epsilon}",)
    plan = load_plan("tweets-lora", [*RECIPES[recipe], *privacy, f"seed={seed}"])
    out = runs / f"{list(RECIPES).index(recipe)}-{epsilon}-{seed}"
    if not (out / "summary.json").exists():
        (resume(out) if (out / "run.json").exists() else simulate(plan, out))
    return float(json.loads((out / "summary.json").read_text())["test"]["federated"]["accuracy"])


def table(found: dict[tuple[str, str], list[float]]) -> str:
    rows = ["| trained | no privacy | ε = 8 | ε = 3 |", "|---|---|---|---|"]
    for recipe in RECIPES:
        cells = [cell(found.get((recipe, epsilon), [])) for epsilon in ("none", "8", "3")]
        rows.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file; what stands above its mark is kept.")
    parser.add_argument("--runs", type=Path, default=Path("runs/tweets-lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epsilons", nargs="+", default=EPSILONS, choices=EPSILONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[tuple[str, str], list[float]] = {}
    for seed in chosen.seeds:
        for recipe in RECIPES:
            for epsilon in chosen.epsilons:
                try:
                    found.setdefault((recipe, epsilon), []).append(accuracy(chosen.runs, recipe, epsilon, seed))
                except CotuneError as error:
                    print(f"{recipe}, ε = {epsilon}, seed {seed}: {error}")
                    continue
                print(f"{recipe}, ε = {epsilon}, seed {seed}: {found[recipe, epsilon][-1]:.4f}", flush=True)
                _write(chosen.out, table(found))
    print(table(found))


def _write(out: Path | None, text: str) -> None:
    note = "Test accuracy, mean ± sd (number of seeds), by `python benchmarks/experiments/tweets_lora.py`."
    publish(out, MEASURED, note, text)


if __name__ == "__main__":
    main()
