"""All strategies side by side: a small MLP on digits without privacy, and adapters on tweets with and without it.

    python benchmarks/experiments/strategies.py --out docs/results/strategies.md

Digits: ten organizations, labels by Dirichlet 0.1 and 0.5, all of them or three in a round, five seeds. A knob that decides over
success or failure is chosen from a few candidates on other seeds, with all ten at Dirichlet 0.1, and kept for all that is
reported. Tweets: the preset `tweets-lora` cut down to what a laptop can train, from a fresh head.

Runs are kept under --runs and not repeated (see `cotune compare`). What stands above the marker in the page is by people and
stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from results_page import publish

from cotune.reporting.comparison_statistics import Combination, Variation
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.workers import import_all

DIGITS = str(Path(__file__).resolve().parents[2] / "examples" / "digits.py")
import_all([DIGITS])  # its architecture is registered by this import, and by the workers'
from digits import write_digits  # noqa: E402

MEASURED = "<!-- below: written by benchmarks/experiments/strategies.py -->"
TUNING = ("seed=1001", 2)  # the first seed, and how many: none of those that are reported
SERVER_DATA = "validation_fraction=0.1"  # for all strategies alike, as a few judge updates by it


def _with(recipe: str, table: str, **values: Sequence[float]) -> tuple[str, ...]:
    ((key, candidates),) = values.items()
    return tuple(f'{{recipe = "{recipe}", {table} = {{{key} = {value:g}}}}}' for value in candidates)


# A strategy and the overrides that may stand for it; where there are several, one is chosen.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "fedavg": ("fedavg",),
    "soup": ("soup",),
    "fedavgm": _with("fedavgm", "server_optimizer", lr=(0.2, 0.5, 1.0)),
    "fedadam": _with("fedadam", "server_optimizer", lr=(0.01, 0.03, 0.1)),
    "fedyogi": _with("fedyogi", "server_optimizer", lr=(0.01, 0.03, 0.1)),
    "fedadagrad": _with("fedadagrad", "server_optimizer", lr=(0.03, 0.1, 0.3)),
    "fedexp": ("fedexp",),
    "fedprox": _with("fedprox", "client_term", mu=(0.001, 0.01, 0.1)),
    "scaffold": ("scaffold",),
    "feddyn": _with("feddyn", "client_term", alpha=(0.03, 0.1, 0.3)),
    "fednova": ("fednova",),
    "qfedavg": _with("qfedavg", "fusion", q=(0.1, 1.0)),
    "tilted": _with("tilted", "weighting", t=(0.1, 1.0)),
    "inverse_loss": ('{weighting = "inverse_loss"}',),
    "validation": ('{weighting = "validation"}',),
    "median": ("median",),
    "trimmed_mean": ("trimmed_mean",),
    "krum": ("krum",),
    "multi_krum": ("multi_krum",),
    "bulyan": ("bulyan",),
    "rfa": ("rfa",),
    "norm_bound": _with("norm_bound", "fusion", norm=(0.3, 1.0, 3.0)),
    "centered_clipping": _with("centered_clipping", "fusion", norm=(0.3, 1.0, 3.0)),
    "task_arithmetic": _with("task_arithmetic", "fusion", scale=(0.1, 0.2, 0.4)),
    "ties": _with("ties", "fusion", density=(0.2, 0.5, 0.8)),
    "dare": _with("dare", "fusion", drop=(0.5, 0.9)),
    "model_stock": ("model_stock",),
    "consensus": _with("consensus", "fusion", threshold=(0.2, 0.4)),
    "greedy_soup": ("greedy_soup",),
    "regmean": ("regmean",),
    "fisher": ("fisher",),
}
NEEDS_MANY = {"trimmed_mean", "krum", "multi_krum", "bulyan"}  # more updates than three: refused there, with the reason
PARTITIONS = {"dirichlet:0.1": "Dirichlet 0.1", "dirichlet:0.5": "Dirichlet 0.5"}
PARTICIPATION = {"0": "all ten in every round", "3": "three of ten in every round"}
EXPECTED = [  # what the literature says: (the better, the worse, where)
    ("feddyn", "fedavg", "dirichlet:0.1", "0"), ("scaffold", "fedavg", "dirichlet:0.1", "0"),
    ("fedadam", "fedavg", "dirichlet:0.1", "0"), ("fedavg", "median", "dirichlet:0.1", "0"),
    ("fedavg", "model_stock", "dirichlet:0.1", "0"), ("fedavg", "ties", "dirichlet:0.1", "0"),
    ("feddyn", "fedavg", "dirichlet:0.5", "0"), ("scaffold", "fedavg", "dirichlet:0.5", "0"),
    ("feddyn", "fedavg", "dirichlet:0.1", "3"), ("scaffold", "fedavg", "dirichlet:0.1", "3"),
    ("fedadam", "fedavg", "dirichlet:0.1", "3"), ("fedavg", "median", "dirichlet:0.1", "3"),
]  # fmt: skip

ADAPTERS = ("fedit", "ffa_lora", "fedsvd", "rolora")
TWEETS = (
    "train=lora", "rounds=3", "lora.layers=1", "lora.targets=auto", "model.max_length=32", "test_fraction=0.04",
    "validation_fraction=0.9", "simulation.min_examples=200", "local.momentum=0.0", "local.batch_size=0.2", "local.steps=6",
    "local.physical_batch_size=128",
)  # fmt: skip
PRIVACY = {  # heading -> what it overrides; gradients that are not clipped let 2.0 diverge
    "Without privacy": ("privacy=none", "local.learning_rate=0.5"),
    "ε = 8": ("privacy={epsilon = 8.0}", "local.learning_rate=2.0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of the digits; 0: leave them out")
    parser.add_argument("--adapter-seeds", type=int, default=3, help="of the tweets; 0: leave them out")
    parser.add_argument("--strategies", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"), help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results/strategies.md"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sections = list(digits(given.runs, given.strategies, given.seeds, given.jobs)) if given.seeds else []
    if given.adapter_seeds:
        sections.append(tweets(given.runs, given.adapter_seeds, given.jobs))
    command = f"python benchmarks/experiments/strategies.py --seeds {given.seeds} --adapter-seeds {given.adapter_seeds}"
    publish(given.out, MEASURED, f"Measured by `{command}`.", *sections)


def digits(runs: Path, names: Sequence[str], seeds: int, jobs: int | None) -> Iterator[str]:
    """The sections on digits: what was chosen, a table for each facet, and whether what was expected holds."""
    plan = write_digits(runs / "digits")
    chosen, tuned = choose(plan, runs, names, jobs)
    yield chosen
    found: dict[tuple[str, str], dict[str, Combination]] = {}
    for sample, among in PARTICIPATION.items():
        able = {name: value for name, value in tuned.items() if sample == "0" or name not in NEEDS_MANY}
        comparison = compare(
            plan,
            [Variation("strategy", tuple(able.values())), Variation("partition", tuple(PARTITIONS))],
            seeds=seeds,
            overrides=[SERVER_DATA, f"server.sample_size={sample}", "seed=1"],
            out=runs / f"digits-{sample}",
            jobs=jobs,
            imports=(DIGITS,),
            listener=progress,
        )
        by_value = {value: name for name, value in able.items()}
        for partition, words in PARTITIONS.items():
            rows = {by_value[row.value]: row for row in comparison.rows if dict(row.facet)["partition"] == partition}
            found[partition, sample] = rows
            yield "\n\n".join([f"## Digits, {words}, {among}", table(rows)])
    yield expectations(found)


def choose(plan: Path, runs: Path, names: Sequence[str], jobs: int | None) -> tuple[str, dict[str, str]]:
    """The best candidate of each strategy by mean accuracy under the tuning seeds, all ten organizations, Dirichlet 0.1."""
    several = {name: CANDIDATES[name] for name in names if len(CANDIDATES[name]) > 1}
    values = tuple(value for candidates in several.values() for value in candidates)
    accuracy: dict[str, float] = {}
    if values:
        seed, count = TUNING
        overrides = [SERVER_DATA, "simulation.partition=dirichlet:0.1", seed]
        tried = compare(
            plan, [Variation("strategy", values)], seeds=count, overrides=overrides, out=runs / "digits-tuning", jobs=jobs,
            imports=(DIGITS,), listener=progress,
        )  # fmt: skip
        accuracy = {row.value: row.score.mean if row.score else 0.0 for row in tried.rows}
    best = {name: max(CANDIDATES[name], key=lambda value: accuracy.get(value, 0.0)) for name in names}
    lines = [
        "## What was chosen",
        "",
        "By mean accuracy on two seeds that are not used below.",
        "",
        "| strategy | tried | chosen |",
    ]
    lines.append("|---|---|---|")
    for name, candidates in several.items():
        tries = ", ".join(f"{_short(value)}: {accuracy[value]:.3f}" for value in candidates)
        lines.append(f"| {name} | {tries} | {_short(best[name])} |")
    return "\n".join(lines), best


def _short(value: str) -> str:
    """The innermost table of an override."""
    return value.rpartition("{")[2].split("}")[0] if "{" in value else value


def table(rows: Mapping[str, Combination]) -> str:
    """One facet, the best first; differences are to the strategy that was given first."""
    baseline = next(iter(rows))
    headings = (
        "strategy", "accuracy, mean ± 95 %", f"difference to {baseline}, points (95 %)", "p (Holm)", "worst"
        " organization", "spread",
        "kB up", "s",
    )  # fmt: skip
    ranked = sorted(rows.items(), key=lambda item: -(item[1].score.mean if item[1].score else 0.0))
    head = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return "\n".join([*head, *(_line(name, row) for name, row in ranked)])


def _line(name: str, row: Combination) -> str:
    if row.score is None:
        return f"| {name} | failed: {row.cells[0].reason} | | | | | | |"
    gap = ""
    p = ""
    if row.difference is not None:
        away = row.difference.estimate
        half = "" if away.half is None else f" ± {100 * away.half:.1f}"
        gap = f"{100 * away.mean:+.1f}{half}"
        p = "" if row.difference.holm is None else f"{row.difference.holm:.3f}"
    half = "" if row.score.half is None else f" ± {row.score.half:.3f}"
    worst, spread = (f"{e.mean:.3f}" if e else "" for e in (row.worst, row.spread))
    failed = f" ({len(row.failed)} failed)" if row.failed else ""
    return (
        f"| {name}{failed} | {row.score.mean:.3f}{half} | {gap} | {p} | {worst} | {spread} |"
        f" {(row.bytes_up or 0) / 1000:.0f} | {row.seconds or 0:.1f} |"
    )


def expectations(found: Mapping[tuple[str, str], Mapping[str, Combination]]) -> str:
    """Whether the orderings of the literature are seen here, means over the seeds."""
    lines = ["## What was expected", "", "| expected | where | seen | holds |", "|---|---|---|---|"]
    for better, worse, partition, sample in EXPECTED:
        rows = found[partition, sample]
        pair = [rows[name].score for name in (better, worse) if name in rows]
        if len(pair) == 2 and pair[0] and pair[1]:
            where = f"{PARTITIONS[partition]}, {PARTICIPATION[sample]}"
            holds = "yes" if pair[0].mean >= pair[1].mean else "**no**"
            lines.append(f"| {better} ≥ {worse} | {where} | {pair[0].mean:.3f}, {pair[1].mean:.3f} | {holds} |")
    return "\n".join(lines)


def tweets(runs: Path, seeds: int, jobs: int | None) -> str:
    """The section on adapters."""
    parts = ["## Adapters on tweets", f"Preset `tweets-lora` with {', '.join(f'`{change}`' for change in TWEETS)}."]
    for number, (heading, overrides) in enumerate(PRIVACY.items()):
        found = compare(
            "tweets-lora",
            [Variation("strategy", ADAPTERS)],
            seeds=seeds,
            overrides=[*TWEETS, *overrides, "seed=1"],
            out=runs / f"tweets-{number}",
            jobs=jobs,
            listener=progress,
        )
        parts += [f"### {heading}, `{overrides[1]}`", table({row.value: row for row in found.rows})]
    return "\n\n".join(parts)


def progress(event: str, fields: Mapping[str, object]) -> None:
    if event in ("comparison_started", "cell_finished", "cell_failed"):
        print(event, {key: value for key, value in fields.items() if key != "folder"}, flush=True)


if __name__ == "__main__":
    main()
