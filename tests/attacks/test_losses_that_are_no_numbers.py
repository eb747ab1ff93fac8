"""A poisoned language model whose losses are no numbers: what stands in the history is JSON all the same."""

from __future__ import annotations

import json
import math

import pytest

from cotune.data.metrics.metrics import compute_text_metrics


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3e38])
def test_metrics_of_a_model_that_overflows_can_be_written(loss: float) -> None:
    written = json.dumps(compute_text_metrics([(loss, 2, 0), (1.0, 2, 1)]).as_dict(), allow_nan=False)
    assert json.loads(written)["accuracy"] == 0.25
