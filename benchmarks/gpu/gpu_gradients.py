"""Whether clipped sums are right, and a step of a model that writes."""

from __future__ import annotations

import itertools

import torch
from gpu_bench import Bench, Row, Skipped
from gpu_steps import private_steps, timed
from made_up import LENGTH, Case, build_model, build_setup

from cotune.data.tasks.task import get_task
from cotune.privacy.mechanisms.dp_sgd import check_clipping


def measure_clipped_sums(bench: Bench) -> None:
    for weights, checkpointing in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        case = Case("1.5 B", weights, checkpointing, 4)
        bench.attempt(lambda case=case: clipped_sum_of(bench, case), **case.named)  # type: ignore[misc]


def clipped_sum_of(bench: Bench, case: Case) -> Row:
    """The relative distance of the clipped sum of three records from that of one record at a time, without padding."""
    model = build_model(bench, case)
    setup = build_setup(bench, case, model, 3).samples()
    exact = case.weights == torch.float32
    error = check_clipping(
        setup.module,
        setup.exact if exact else setup.loss,
        batches=setup.batches,
        alone=[setup.alone(row) for row in range(setup.rows)],
        clip_norm=1.0,
    )
    return {"arithmetic": "float32" if exact else "bfloat16", "relative error": error}


def measure_writing(bench: Bench) -> None:
    """A step of a model that writes."""
    try:
        get_task("causal-lm")
    except KeyError:
        raise Skipped("this version of cotune has no task causal-lm") from None
    for checkpointing in (True, False):
        case = Case("1.5 B", torch.bfloat16, checkpointing, 4 if bench.tiny else 16)
        bench.attempt(lambda case=case: writing_of(bench, case), **case.named)  # type: ignore[misc]


def writing_of(bench: Bench, case: Case) -> Row:
    model = build_model(bench, case, "causal-lm")
    rows = case.physical - 1
    setup = build_setup(bench, case, model, rows, task="causal-lm", labels=[])
    private = timed(bench, private_steps(setup, rows))
    return {"tokens/s": rows * LENGTH / private.seconds, "peak GiB": private.gib}
