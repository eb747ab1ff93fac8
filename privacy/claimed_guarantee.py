"""The privacy claim of a run, as data: the report, the command line and `summary.json` show this one object.

The fields follow NIST SP 800-226, "Guidelines for Evaluating Differential Privacy Guarantees": parameters, unit of privacy,
neighboring relation, threat model, mechanism, and the hazards that remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.accounting.tradeoff import gaussian_mu, true_positive_rate
from cotune.privacy.config import RecordPrivacy

SMALL_DELTA = 1e-6  # δ at which every statement repeats ε, so that statements can be compared
FALSE_POSITIVE_RATE = 0.01
_UNCOVERED = (
    "the time that steps and answers take",
    "the judgment of anyone who approves a plan",
    "settings that were chosen by looking at these data",
    "float64 arithmetic of the sampler: the noise is a rounded float64 normal, not an exact discrete Gaussian",
)


@dataclass(frozen=True)
class Figures:
    """The privacy loss of some steps, in several measures.

    Attributes:
        epsilon: ε at `delta`, an upper bound.
        delta: δ.
        epsilon_at_small_delta: ε of the same steps at δ = 1e-6.
        gaussian_mu: μ of Gaussian differential privacy.
        true_positive_rate: The largest share of the members that a membership attack finds at 1 % false alarms.
    """

    epsilon: float
    delta: float
    epsilon_at_small_delta: float
    gaussian_mu: float
    true_positive_rate: float


@dataclass(frozen=True)
class Claim:
    """What is promised, to whom, against whom, and what is not.

    Attributes:
        mechanism: In words.
        unit: "record", or the column whose values are protected with all of their records.
        max_records: The largest number of records of a unit that count; None for a record.
        neighbors: The neighboring relation, in words.
        adversary: The threat model, in words.
        accountant: Which accountant computed the figures.
        epsilon_allowed: ε that the plan allows each organization.
        delta_rule: δ as the plan gives it.
        figures: Of the organization that spent most; None where it is not known.
        public: What is assumed to be known to everybody.
        not_covered: What no figure of this claim bounds.
    """

    mechanism: str
    unit: str
    max_records: int | None
    neighbors: str
    adversary: str
    accountant: str
    epsilon_allowed: float
    delta_rule: str
    figures: Figures | None
    public: tuple[str, ...]
    not_covered: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for `privacy.claim` of summary.json."""
        table = asdict(self)
        return {**table, "public": list(self.public), "not_covered": list(self.not_covered)}

    def rows(self) -> list[list[str]]:
        """Return the table of a report: [name, text]."""
        return [list(row) for row in self._rows()]

    def _rows(self) -> list[tuple[str, str]]:
        return [
            (
                "Unit of privacy",
                self.unit if self.max_records is None else f"{self.unit}, at most {self.max_records} records each",
            ),
            ("Neighboring data sets", self.neighbors),
            ("Adversary", self.adversary),
            ("Mechanism", self.mechanism),
            ("Accountant", self.accountant),
            *_figure_rows(self.figures),
            ("Public", "; ".join(self.public)),
            ("Not covered", "; ".join(self.not_covered)),
        ]


def compute_figures(spent: Sequence[Steps], delta: float) -> Figures:
    """Return the figures of all the steps composed, at δ and at 1e-6."""
    return Figures(
        epsilon(spent, delta),
        delta,
        epsilon(spent, SMALL_DELTA),
        gaussian_mu(spent),
        true_positive_rate(spent, FALSE_POSITIVE_RATE),
    )


def compute_run_figures(spent: Sequence[Steps], delta: float) -> dict[str, float]:
    """Return the figures of one run by their names, without δ, which a ledger states once for all runs."""
    return {name: value for name, value in asdict(compute_figures(spent, delta)).items() if name != "delta"}


def max_figures(figures: Mapping[str, Figures]) -> Figures | None:
    """Return the largest of every figure over organizations, whose records are disjoint; None for no organization."""
    if not figures:
        return None
    return Figures(*(max(column) for column in zip(*(tuple(asdict(each).values()) for each in figures.values()), strict=True)))


def build_claim(
    privacy: RecordPrivacy, figures: Figures | None, *, number_is_public: bool = False, not_covered: Sequence[str] = ()
) -> Claim:
    """Return what a plan's `privacy` table promises.

    Args:
        privacy: The table. figures: Of what was spent (see `max_figures`), or planned. number_is_public: Whether an organization
        discloses its true number of units: then neighbors replace a unit by an empty one. not_covered: What this run leaves
        uncovered, in addition to what every run does.
    """
    is_record = privacy.unit == "record"
    one = "one record" if is_record else f"all records of one {privacy.unit}"
    empty = "an empty one" if is_record else "empty ones"
    return Claim(
        mechanism=_mechanism(privacy),
        unit=privacy.unit,
        max_records=privacy.max_records,
        neighbors=f"replace {one} by {empty}" if number_is_public else f"add or remove {one}",
        adversary="knows all other records, chooses plan, states and seed, sees everything that leaves the organization",
        accountant="privacy loss distributions (dp-accounting), over every step of every round, interrupted ones included",
        epsilon_allowed=privacy.epsilon,
        delta_rule=str(privacy.delta),
        figures=figures,
        public=("the number from which rates, noise and δ follow", "the plan", "who takes part in which round"),
        not_covered=(*not_covered, *_UNCOVERED),
    )


def _mechanism(privacy: RecordPrivacy) -> str:
    unit = "record" if privacy.unit == "record" else f"{privacy.unit}, with its records together,"
    if privacy.pate is not None:
        return (
            f"PATE: each {unit} is learned from by one of {privacy.pate.teachers} models, which vote on public inputs; a vote is"
            " released where a count with Gaussian noise says that enough of them agree, with Gaussian noise on every class"
            " (Confident-GNMax, data-independent bound)"
        )
    per_layer = ", in equal shares for each parameter tensor" if privacy.clipping == "per_layer" else ""
    return (
        f"DP-SGD: each {unit} enters a step by chance (Poisson sampling), its gradient is clipped to the norm"
        f" {privacy.clip_norm:g}{per_layer}, Gaussian noise is added to the sum on a grid"
    )


def _figure_rows(figures: Figures | None) -> list[tuple[str, str]]:
    if figures is None:
        return []
    return [
        (
            "ε, δ",
            f"ε = {round_up(figures.epsilon)} at δ = {figures.delta:.1e}; {round_up(figures.epsilon_at_small_delta)} at 1e-06",
        ),
        ("Gaussian μ", round_up(figures.gaussian_mu)),
        ("Attack", describe_attack(figures.true_positive_rate)),
    ]


def describe_attack(true_positive_rate: float) -> str:
    """Return a sentence on how many members an attack finds, the share rounded up."""
    share = round_up(100 * true_positive_rate)
    return f"at {100 * FALSE_POSITIVE_RATE:g} % false alarms an attacker finds at most {share} % of the members"
