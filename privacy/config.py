"""The privacy tables of a plan: what is promised to each record or unit of an organization, and to whole organizations.

Data only, checked by pydantic: no module that this one imports loads PyTorch or SciPy.
"""

from __future__ import annotations

import math
import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cotune.errors import PrivacyError
from cotune.storage.config_table import ConfigTable


class PateConfig(ConfigTable):
    """Noisy votes of teachers in place of noise in training (the `privacy.pate` table)."""

    teachers: int = Field(
        100, ge=2, le=10_000, description="models that each organization trains, each on a part of its records that no other sees"
    )
    answers: int = Field(ge=1, le=10_000_000, description="noisy votes that each organization releases at most")
    threshold: float = Field(
        0.6, gt=0, le=1, description="part of the teachers that must agree, by a count with noise, or nothing is released"
    )
    threshold_noise: float = Field(3.0, ge=1, le=100, description="noise of that count, in multiples of that of the votes")

    def charged_steps(self, inputs: int) -> int:
        """Return as how many answers a release counts: of n checks with c times the noise, n / c² do (their μ² add up).

        Args:
            inputs: That are asked about at most.
        """
        return min(self.answers, inputs or self.answers) + math.ceil(inputs / self.threshold_noise**2)


class RecordPrivacy(ConfigTable):
    """What every organization promises each of its records (the `privacy` table of a plan)."""

    mode: Literal["record"] = Field("record", description="promised within each organization, by noise in its training")
    unit: str = Field(
        "record", min_length=1, max_length=100, description="whom it is promised to: each record, or each value of a column"
    )
    max_records: int | None = Field(
        None, ge=1, le=10_000, description="records of a unit that count at most; only for another unit than record"
    )
    epsilon: float = Field(8.0, gt=0, le=100, description="ε allowed per organization over the whole run")
    delta: float | str = Field("1/n^1.5", description='δ: a number, or "1/n^p" with n the organization\'s records')
    clip_norm: float = Field(1.0, ge=1e-6, le=1e3, description="C, bound on the L2 norm of one record's gradient")
    clipping: Literal["flat", "per_layer"] = Field(
        "flat", description="the gradient as a whole, or each parameter tensor to C/√L; per_layer: head and lora only"
    )

    pate: PateConfig | None = Field(
        None,
        description="absent: noise is in the training; else models are trained without any, and what leaves is their vote, with"
        " noise (Papernot et al., ICLR 2018, https://arxiv.org/abs/1802.08908)",
    )

    @field_validator("delta")
    @classmethod
    def _delta_is_usable(cls, value: float | str) -> float | str:
        return check_delta(value)

    @model_validator(mode="after")
    def _unit_is_bounded(self) -> Self:
        if (self.unit == "record") != (self.max_records is None):
            raise ValueError(
                f'unit = "{self.unit}" with max_records = {self.max_records}: expected a number for a unit from a column,'
                " as by --set privacy.max_records=3, and none for a record"
            )
        return self

    def delta_for(self, examples: int) -> float:
        """Return δ for an organization with that many records.

        Raises:
            PrivacyError: When δ is larger than 1/n, where the guarantee would be empty (publishing one whole record at random
            would
                satisfy it), and for fewer than 2 records.
        """
        delta = compute_delta(self.delta, examples)
        if examples < 2 or delta * examples > 1:
            raise PrivacyError(
                f"privacy.delta = {self.delta} gives δ = {delta:.2g} for {examples} examples; expected at most 1/{examples}"
                ' = one over the number of examples: choose a smaller δ, such as "1/n^1.5"',
                code="privacy.delta_too_large",
            )
        return delta


def check_delta(rule: float | str) -> float | str:
    """Return the rule for δ: a number, also where it was given as text, or a text such as "1/n^1.5".

    Raises:
        ValueError: For anything else, and for a number outside of (0, 1).
    """
    if isinstance(rule, str):
        if _delta_exponent(rule) is not None:
            return rule
        try:
            rule = float(rule)
        except ValueError:
            raise ValueError(f'expected a number or "1/n^p" with p >= 1, got "{rule}"') from None
    if not 0 < rule < 1:
        raise ValueError(f"expected 0 < delta < 1, got {rule}")
    return rule


def compute_delta(rule: float | str, examples: int) -> float:
    """Return δ for that many records by a rule, a number or "1/n^p".

    >>> compute_delta("1/n^1.5", 100), compute_delta(1e-5, 100)
    (0.001, 1e-05)
    """
    exponent = _delta_exponent(rule) if isinstance(rule, str) else None
    return float(rule) if exponent is None else float(max(examples, 1) ** -exponent)


def _delta_exponent(rule: str) -> float | None:
    """Return p of the rule "1/n^p" (or "1/n"); None for any other text, and for p < 1."""
    match = re.fullmatch(r"1\s*/\s*n(?:\s*(?:\^|\*\*)\s*(\d+(?:\.\d+)?))?", rule.strip())
    exponent = float(match[1] or 1) if match else 0.0
    return exponent if exponent >= 1 else None


class ClientPrivacy(ConfigTable):
    """What every organization is promised about its participation (the `client_privacy` table of a plan)."""

    epsilon: float = Field(8.0, gt=0, le=100, description="ε allowed over the whole run")
    epsilon_total: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="ε allowed over all runs of a federation, fixed by the first; default: that of one run",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ, below one over the number of organizations")
    clip_norm: float = Field(
        1.0, ge=1e-6, le=1e6, description="C, bound on an organization's update, in L2 norm; adaptive: at first"
    )
    clipping: Literal["fixed", "adaptive"] = Field("fixed", description="adaptive: C follows a quantile of the norms")
    target_quantile: float = Field(0.5, gt=0, lt=1, description="γ, fraction of the updates that adaptive clipping leaves as is")
    clip_learning_rate: float = Field(0.2, gt=0, le=2, description="η of adaptive clipping")
    bit_noise: float | None = Field(
        None, gt=0, le=1e6, description="σ_b; default: K/20, but z at least, for at most 16 % more noise"
    )
    amplification: bool = Field(
        False, description="account for server.sample_rate: holds only against who does not learn who took part"
    )
