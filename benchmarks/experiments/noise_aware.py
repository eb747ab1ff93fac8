"""Does `weighting = "noise_aware"` pay off where every organization chooses its own ε? Measured on real tweets.

    python benchmarks/experiments/noise_aware.py --out docs/results/noise-aware.md

Six organizations train the head of one frozen encoder; their ε, from 0.5 to 8, are dealt out to them by seed, so that small and
large ones draw strict and loose ones alike. Each seed has one partition and one deal, on which every weighting is run.

`persistent` is no weighting of cotune's, it is here to explain the others: 1/(v + Rτ²) for R rounds. Noise is drawn afresh in
every round and averages out over them; what is particular to an organization is not and does not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from results_page import NARROW, publish
from scipy.stats import t as student

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.plan.load import load_plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.random_generators import seeded_generator
from cotune.protocol.messages import decode_request, encode_update
from cotune.server.app import train
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.prepare import make_run, make_site, prepare
from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update
from cotune.strategies.weightings.noise_aware import random_effects

WEIGHTINGS = ("examples", "uniform", "noise_aware", "persistent")
LOCAL = ("local.learning_rate=2.0", "local.batch_size=0.05")  # what docs/results/noise-aware.md was measured with
EPSILONS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0)
MEASURED = "<!-- below: written by benchmarks/experiments/noise_aware.py -->"


@dataclass
class Seen:
    """What one run showed. accuracy: after the last round. updates: of every round, for the weights they would get."""

    accuracy: float = 0.0
    rounds: dict[int, list[Update]] = field(default_factory=dict)


@dataclass(frozen=True)
class Deal:
    """One seed of one partition: who got which ε, and how many records."""

    partition: str
    seed: int
    epsilons: Mapping[str, float]
    examples: Mapping[str, int]
    labels: Mapping[str, str]  # the fraction of each label, in the order of the head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--partitions", nargs="+", default=["dirichlet:0.5", "iid", "quantity:0.5"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS), help="one per organization")
    parser.add_argument("--repetitions", type=int, default=30, help="of the round whose variance is measured")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of the plan")
    parser.add_argument("--out", type=Path, default=Path("docs/results/noise-aware.md"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sections = [section(name, given.seeds, given.epsilons, given.overrides) for name in given.partitions]
    command = " ".join(["python", "benchmarks/experiments/noise_aware.py", *sys.argv[1:]])
    publish(given.out, MEASURED, f"Measured by `{command}`.", *sections, prediction(given.repetitions))


def prediction(repetitions: int) -> str:
    """The stated noise against the variance of repeated rounds from one state: what curvature, signal and sampling change."""
    rows = ["| ε | optimizer | parameter | stated v | measured variance | ratio |", "|---|---|---|---|---|---|"]
    optimizers = {"tweets preset": [], "adam": ["local.optimizer=adam", "local.learning_rate=0.02"]}
    for epsilon, (name, changes) in itertools.product((0.5, 8.0), optimizers.items()):
        settings = ["simulation.partition=iid", "strategy.weighting=noise_aware", f"privacy.epsilon={epsilon}", *changes]
        updates = repeated(settings, repetitions)
        for parameter, stated in (updates[0].noise_variance or {}).items():
            measured = float(torch.stack([u.delta[parameter].double() for u in updates]).var(dim=0).mean())
            rows.append(f"| {epsilon:g} | {name} | {parameter} | {stated:.3g} | {measured:.3g} | {measured / stated:.3f} |")
        print("\n".join(rows[-2:]), flush=True)
    return "\n\n".join(["## Stated noise against measured variance", "\n".join(rows)])


def repeated(settings: Sequence[str], repetitions: int) -> list[Update]:
    """The first round of one organization of four, again and again from the same state, each with a ledger of its own."""
    prepared = prepare(load_plan(NARROW, [*LOCAL, *settings]), "cpu")
    plan = prepared.plan
    share = prepared.shares[0]
    model = get_plan_model(plan, "cpu")
    model.load({})
    state = model.state(model.names("head"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repetitions):
            site = Path(folder) / str(number)
            make_site(site, share.name, plan, [share], "cpu")
            found.append(train_round(plan, Site(site), 1, state))
    return found


def section(partition: str, seeds: int, epsilons: list[float], overrides: list[str]) -> str:
    """All runs of one partition, as a part of the document."""
    runs: list[tuple[Deal, dict[str, Seen]]] = []
    for seed in range(1, seeds + 1):
        runs.append(deal_and_run(partition, seed, epsilons, overrides))
        seen = runs[-1][1]
        print(f"{partition} seed {seed}: " + ", ".join(f"{w} {seen[w].accuracy:.4f}" for w in WEIGHTINGS), flush=True)
    text = "\n\n".join([f"## {partition}", accuracies(runs), shares(runs)])
    print(text, flush=True)
    return text


def deal_and_run(partition: str, seed: int, epsilons: list[float], overrides: list[str]) -> tuple[Deal, dict[str, Seen]]:
    dealt = list(seeded_generator(seed, "epsilons").permutation(epsilons))
    common = [
        f"seed={seed}", f"simulation.clients={len(dealt)}", f"simulation.epsilons={[float(e) for e in dealt]}",
        f'simulation.partition="{partition}"', "simulation.min_examples=800",
        "simulation.baselines=[]", f"privacy.epsilon={max(dealt)}", *overrides,
    ]  # fmt: skip
    seen = {}
    for name in WEIGHTINGS:
        part = f"{Path(__file__).resolve()}:persistent" if name == "persistent" else name
        prepared = prepare(load_plan(NARROW, [*LOCAL, *common, f'strategy.weighting="{part}"']), "cpu")
        names = [share.name for share in prepared.shares]
        allowed = dict(zip(names, dealt, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            seen[name] = run(make_run(prepared, Path(folder) / "run", "in-process", "cpu"))
    sizes = {share.name: len(share.rows) for share in prepared.shares}
    labels = {
        s.name: " ".join(f"{count / len(s.rows):.2f}" for count in prepared.label_counts(s).values()) for s in prepared.shares
    }
    return Deal(partition, seed, allowed, sizes, labels), seen


@weighting("persistent", cite="of this benchmark", needs=Needs(sends=("noise",)))
def persistent(updates: Sequence[Update]) -> list[float]:
    """1/(v + Rτ²), R being the rounds of the tweets plan."""
    rounds = load_plan(NARROW).rounds
    variances = [max((u.noise_variance or {}).values()) for u in updates]  # the head: one learning rate
    between = random_effects(updates, list(updates[0].delta), variances).between
    return [1 / (v + rounds * between) for v in variances]


def run(folder: RunFolder) -> Seen:
    """Plays the rounds, and looks at the updates on their way."""
    seen = Seen()
    app = ClientApp()

    @app.train()
    def train_client(message: Message, context: Context) -> Message:
        request = decode_request(message.content)
        update = train_round(folder.plan, Site(Path(request.site)), request.round, dict(request.state))
        seen.rounds.setdefault(request.round, []).append(update)
        return Message(encode_update(update, folder.plan.plan_id), reply_to=message)

    train(InProcessGrid(app, len(folder.file.participants)), folder)
    seen.accuracy = folder.load().history[-1]["metrics"]["accuracy"]
    return seen


def accuracies(runs: list[tuple[Deal, dict[str, Seen]]]) -> str:
    """Mean ± sd, and the paired differences to example weighting with their 95 % interval (Student's t)."""
    rows = [
        "| weighting | accuracy, mean ± sd | difference to examples, points (95 % interval) | each seed |",
        "|---|---|---|---|",
    ]
    base = [seen["examples"].accuracy for _, seen in runs]
    for name in WEIGHTINGS:
        found = [seen[name].accuracy for _, seen in runs]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        gaps = [100 * (x - b) for x, b in zip(found, base, strict=True)]
        margin = student.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        mean = statistics.mean(gaps)
        gap = "" if name == "examples" else f"{mean:+.2f} ({mean - margin:+.2f} to {mean + margin:+.2f})"
        each = " ".join(f"{x:.4f}" for x in found)
        rows.append(f"| {name} | {statistics.mean(found):.4f} ± {spread:.4f} | {gap} | {each} |")
    return "\n".join(rows)


def shares(runs: list[tuple[Deal, dict[str, Seen]]]) -> str:
    """Who counts how much, and why: first and last round of the noise-aware runs, for the parameter with the most entries."""
    rows = [
        "| seed | organization | records | labels | ε | √v, first round"
        " | share by examples | noise-aware, first round | last round |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for deal, seen in runs:
        rounds = seen["noise_aware"].rounds
        first, last = (_shares(rounds[number]) for number in (min(rounds), max(rounds)))
        total = sum(deal.examples.values())
        for name, epsilon in deal.epsilons.items():
            rows.append(
                f"| {deal.seed} | {name} | {deal.examples[name]:,} | {deal.labels[name]} |"
                f" {epsilon:g} | {math.sqrt(first.variances[name]):.3f} |"
                f" {deal.examples[name] / total:.3f} | {first.shares[name]:.3f} | {last.shares[name]:.3f} |"
            )
        notes.append(
            f"seed {deal.seed}: τ = {math.sqrt(first.between):.3f} in the first round, {math.sqrt(last.between):.3f} in the last"
        )
    return "\n".join(rows) + "\n\n" + "; ".join(notes) + "."


@dataclass(frozen=True)
class _Shares:
    between: float
    variances: Mapping[str, float]
    shares: Mapping[str, float]


def _shares(updates: list[Update]) -> _Shares:
    name = max(updates[0].delta, key=lambda n: updates[0].delta[n].numel())
    variances = [(u.noise_variance or {})[name] for u in updates]
    found = random_effects(updates, [name], variances)
    total = sum(found.weights)
    people = [u.organization for u in updates]
    shares = dict(zip(people, (w / total for w in found.weights), strict=True))
    return _Shares(found.between, dict(zip(people, variances, strict=True)), shares)


if __name__ == "__main__":
    main()
