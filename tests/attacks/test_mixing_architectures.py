"""Architectures that let records reach each other through padding, even in float32.

FNet (.19 of the gradient), YOSO (.02–.07) and CANINE (.002) passed the clipping check, because its single records carried the padding
of their common batch, and in head mode only the head was checked. FNet with an honest random head: 1.32 clip norms. On tiny models,
adding one record moved the clipped sum of FNet, YOSO, ConvBERT and MobileBERT by 2 to 21 clip norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.client.training.checks.gradient_checks import check_stages
from cotune.errors import PrivacyError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from tests.support.architectures import REFUSED, folder_of
from tests.support.datasets import sentences, write_csv
from tests.support.matrix import crossed


def plan_for(kind: str, mode: str, tmp_path: Path, **tables: Any) -> Plan:
    base = folder_of(kind, tmp_path / kind)
    data = write_csv(tmp_path / "records.csv", sentences(60))
    return parse_plan(
        {
            "name": "attack",
            "labels": ["bad", "good", "so"],
            "rounds": 1,
            "train": mode,
            "model": {"base": str(base), "max_length": 32, "precision": "float32"},
            "data": {"source": str(data)},
            "privacy": {"epsilon": 8.0, "delta": 1e-3},
            "local": {"physical_batch_size": 4},
            **tables,
        }
    )


@pytest.mark.parametrize(("mode", "kind"), crossed(["head", "full"], REFUSED))
def test_architecture_that_reads_padding_is_refused(kind: str, mode: str, tmp_path: Path) -> None:
    plan = plan_for(kind, mode, tmp_path)
    with pytest.raises(PrivacyError):
        check_stages(plan, get_plan_model(plan, "cpu"))


@pytest.mark.parametrize("mode", ["head", "full"])
def test_one_that_hides_it_is_admitted(mode: str, tmp_path: Path) -> None:
    plan = plan_for("roberta", mode, tmp_path)
    check_stages(plan, get_plan_model(plan, "cpu"))
