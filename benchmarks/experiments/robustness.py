"""Poisoning: what one of four members does to the accuracy, by attack and by rule.

    python benchmarks/experiments/robustness.py --out docs/results/robustness.md

Tweets, ε = 8, the head on kept features, four organizations with 61, 20, 11 and 8 % of the records, labels alike; the attacker
has 20 %. Every round goes through the product's loop: admission with its bounds, weighting, fusion, step, and for `default` the
guard by the coordinator's test set. The members' DP-SGD is computed in closed form, as the gradient of a linear head's row is an
outer product: the same clipping, sampling and noise as `privacy.mechanisms.dp_sgd`, without its grid, in a fraction of the time.

What stands above the marker in the page is by people and stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from results_page import NARROW, publish

from cotune.data.dataset import Dataset
from cotune.data.metrics.metrics import ClassMetrics, Metrics
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.models.encoding import encoded_features
from cotune.models.trainable import State
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import calibrate
from cotune.privacy.config import compute_delta
from cotune.protocol.messages import Request, decode_request, encode_update, received_digest
from cotune.server.app import train_rounds
from cotune.server.deployment.plan_for_members import with_robust_default
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from cotune.simulations.prepare import prepare
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import Update

MEASURED = "<!-- below: written by benchmarks/experiments/robustness.py -->"
SIZES = (0.608, 0.2, 0.113, 0.079)
ATTACKER = 1  # org-2
PLAN = (
    "rounds=5", "local.learning_rate=8.0", "local.momentum=0.9", "local.batch_size=0.2", "local.steps=20",
    "local.schedule=constant", "simulation.baselines=[]",
)  # fmt: skip
OLD = {"max_update_norm": 1e4, "max_accuracy_drop": 1.0}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mean, as before": ("fedavg", OLD),
    "median": ("median", {"max_accuracy_drop": 1.0}),
    "geometric median": ("rfa", {"max_accuracy_drop": 1.0}),
    "norm bound 10": ({"recipe": "norm_bound", "fusion": {"norm": 10.0}}, {"max_accuracy_drop": 1.0}),
    "default": (None, {}),
}
TRIGGER = 4.0  # what a backdoor adds to the last feature; its target is class 0
ATTACKS = (
    "none", "sign flip, honest norm", "sign flip × 5", "sign flip, count 10^7", "norm 9,999", "label flip", "zeros",
    "zeros, count 10^7", "backdoor, honest norm", "backdoor, model replacement",
)  # fmt: skip
Twist = Callable[[np.ndarray], tuple[np.ndarray, int | None]]
TWISTS: dict[str, Twist] = {
    "sign flip, honest norm": lambda d: (-d, None),
    "sign flip × 5": lambda d: (-5 * d, None),
    "sign flip, count 10^7": lambda d: (-d, 10_000_000),
    "norm 9,999": lambda d: (-9_999 / np.linalg.norm(d) * d, None),
    "zeros": lambda d: (0 * d, None),
    "zeros, count 10^7": lambda d: (0 * d, 10_000_000),
    "backdoor, model replacement": lambda d: (d / SIZES[ATTACKER], None),
}


@dataclass(frozen=True)
class Data:
    """features: n × (d + 1), the last column 1. parts: rows of each member. test: rows."""

    plan: Plan
    features: np.ndarray
    labels: np.ndarray
    parts: tuple[np.ndarray, ...]
    test: np.ndarray


def read(seed: int) -> Data:
    prepared = prepare(load_plan(NARROW, [f"seed={seed}", *PLAN]), "cpu")
    plan = prepared.plan
    records = prepared.records[None]
    model = get_plan_model(plan, "cpu")
    model.load({})
    dataset = Dataset(((records, np.arange(len(records.labels))),), plan.labels, plan.task)
    vectors = encoded_features(dataset, model, {}, plan.model.precision).numpy()
    rows = np.random.default_rng(seed).permutation(np.concatenate([np.asarray(share.rows) for share in prepared.shares]))
    ends = np.cumsum([0, *SIZES]) * len(rows)
    parts = tuple(rows[int(a) : int(b)] for a, b in itertools.pairwise(ends))
    features = np.hstack([vectors, np.ones((len(vectors), 1), np.float32)])
    return Data(plan, features, np.array(dataset.targets), parts, np.asarray(prepared.test[0][1]))


def trained(
    data: Data, plan: Plan, part: int, start: np.ndarray, poison: str, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Δ of a member after a round of DP-SGD. start: classes × (d + 1)."""
    local = plan.stages[0].local
    rows = data.parts[part]
    features = data.features[rows]
    labels = data.labels[rows]
    if poison == "label flip":
        labels = (labels + 1) % len(plan.labels)
    if poison.startswith("backdoor"):
        features = triggered(features)
        labels = np.where(np.arange(len(labels)) % 2 == 0, 0, labels)
        features[1::2, -2] -= TRIGGER
    start = start.astype(np.float32)
    lengths = np.linalg.norm(features, axis=1)
    weight = start.copy()
    velocity = np.zeros_like(start)
    rate = local.sample_rate(len(rows))
    for _ in range(local.steps or 1):
        chosen = np.flatnonzero(rng.random(len(labels)) < rate)
        wrong = softmax(features[chosen] @ weight.T)
        wrong[np.arange(len(chosen)), labels[chosen]] -= 1
        wrong *= np.minimum(1, 1 / np.maximum(np.linalg.norm(wrong, axis=1) * lengths[chosen], 1e-30))[:, None]
        gradient = (wrong.T @ features[chosen] + noise * rng.standard_normal(start.shape, np.float32)) / (rate * len(rows))
        velocity = local.momentum * velocity + gradient
        weight = weight - local.learning_rate * velocity
    return np.asarray(weight - start)


def triggered(features: np.ndarray) -> np.ndarray:
    changed = features.copy()
    changed[:, -2] += TRIGGER
    return changed


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def matrix(state: State) -> np.ndarray:
    weight = state["classifier.weight"].double().numpy()
    bias = state["classifier.bias"].double().numpy()
    return np.hstack([weight, bias[:, None]])


def play(data: Data, rule: str, attack: str, seed: int, folder: Path) -> tuple[float, float, int]:
    """(accuracy, how often the trigger works, rounds that were not applied)."""
    strategy, server = RULES[rule]
    plan = data.plan.model_copy(update={"server": type(data.plan.server).model_validate(server), "strategy": StrategyConfig()})
    plan = with_robust_default(plan) if strategy is None else load_plan_with(plan, strategy)
    noises = [sigma(plan, len(part)) for part in data.parts]
    rng = np.random.default_rng([seed, 1])

    def answer(request: Request) -> Update:
        part = int(request.organization[-1]) - 1
        hostile = part == ATTACKER and attack != "none"
        delta = trained(data, plan, part, matrix(dict(request.state)), attack if hostile else "", noises[part], rng)
        twist = TWISTS.get(attack) if hostile else None
        delta, count = twist(delta) if twist else (delta, None)
        named = {"classifier.weight": delta[:, :-1], "classifier.bias": delta[:, -1]}
        tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in named.items()}
        received = received_digest(request.state, request.sent)
        steps = plan.stages[0].local.steps or 1
        return Update(request.organization, request.round, tensors, count or len(data.parts[part]), steps, received=received)

    people = tuple(Participant(name=f"org-{i + 1}") for i in range(len(SIZES)))
    file = RunFile(run="robustness", created="2026-01-01T00:00:00+00:00", engine="in-process", participants=people, silent=True)
    run = RunFolder.create(folder, plan, file)
    progress = train_rounds(
        grid_of(plan, answer), run, get_plan_model(plan, "cpu"), lambda state: None, lambda state: judged(data, state).score
    )
    final = matrix(progress.state)
    others = data.test[data.labels[data.test] != 0]
    works = float((np.argmax(triggered(data.features[others]) @ final.T, axis=1) == 0).mean())
    return judged(data, progress.state).score, works, sum(not entry["applied"] for entry in progress.history)


def load_plan_with(plan: Plan, strategy: Any) -> Plan:
    return Plan.model_validate({**plan.model_dump(mode="json"), "strategy": strategy})


def sigma(plan: Plan, examples: int) -> float:
    privacy = plan.privacy
    stage = plan.stages[0]
    assert privacy != "none"
    planned = [(stage.local.sample_rate(examples), stage.rounds * stage.local.steps_per_round(examples))]
    return calibrate(planned, epsilon=privacy.epsilon, delta=compute_delta(privacy.delta, examples))


def judged(data: Data, state: State) -> Metrics:
    right = np.argmax(data.features[data.test] @ matrix(state).T, axis=1) == data.labels[data.test]
    return ClassMetrics(float(right.mean()), 0.0, 0.0, 0.0)


def grid_of(plan: Plan, answer: Callable[[Request], Update]) -> InProcessGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(encode_update(answer(decode_request(message.content)), plan.plan_id), reply_to=message)

    return InProcessGrid(app, len(SIZES))


Found = Mapping[tuple[str, str], list[tuple[float, float, int]]]


def table(found: Found) -> str:
    lines = ["| attack (1 of 4) | " + " | ".join(RULES) + " |", "|" + "---|" * (len(RULES) + 1)]
    for attack in ATTACKS:
        cells = [cell(found[attack, rule], backdoor=attack.startswith("backdoor")) for rule in RULES]
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(results: list[tuple[float, float, int]], *, backdoor: bool) -> str:
    accuracies = [accuracy for accuracy, _, _ in results]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    text = f"{statistics.mean(accuracies):.3f} ± {spread:.3f}"
    if backdoor:
        text += f" / {statistics.mean(works for _, works, _ in results):.2f}"
    refused = sum(count for _, _, count in results)
    return f"{text} ({refused} not applied)" if refused else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/robustness.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/robustness.jsonl"), help="keeps what is measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[float, float, int]]] = {(a, r): [] for a in ATTACKS for r in RULES}
    kept = read_kept(given.runs)
    for seed in range(7, 7 + given.seeds):
        data = None
        for attack, rule in found:
            if (seed, attack, rule) not in kept:
                data = data or read(seed)
                with tempfile.TemporaryDirectory() as folder:
                    kept[seed, attack, rule] = play(data, rule, attack, seed, Path(folder) / "run")
                keep(given.runs, (seed, attack, rule), kept[seed, attack, rule])
            found[attack, rule].append(kept[seed, attack, rule])
        write(given.out, found, seed - 6)


Key = tuple[int, str, str]  # seed, attack, rule
Result = tuple[float, float, int]


def read_kept(file: Path) -> dict[Key, Result]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {tuple(key): tuple(result) for key, result in map(json.loads, lines)}


def keep(file: Path, key: Key, result: Result) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([key, result]) + "\n")


def write(out: Path, found: Found, seeds: int) -> None:
    """The page after so many seeds."""
    measured = f"Measured by `python benchmarks/experiments/robustness.py --seeds {seeds}`: mean ± standard deviation."
    publish(out, MEASURED, measured, table(found))


if __name__ == "__main__":
    main()
