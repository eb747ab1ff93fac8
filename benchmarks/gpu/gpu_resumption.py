"""A run that is killed and resumed gives the same model to the bit."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_bench import Bench
from made_up import plan_for, records, tokenizer, write_base
from transformers import BertConfig

from cotune.client.training import charged_steps as client_steps
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms import dp_sgd
from cotune.privacy.mechanisms.random_generators import seeded_generator
from cotune.server.runs.events import observe_run
from cotune.simulations.run import resume, simulate


def measure_resumption(bench: Bench) -> None:
    """A run under ε = 8 that was killed in its third round, against one that was not: the same bits."""
    folder = bench.work("runs")
    plan = plan_of_a_small_run(folder)
    began = time.monotonic()
    with repeatable_noise():
        whole = simulate(plan, folder / "whole", device=str(bench.device))
    seconds = time.monotonic() - began
    file = folder / "plan.toml"
    file.write_text(dump_plan(plan), encoding="utf-8")
    command = [
        sys.executable,
        str(Path(__file__).parent),
        str(folder / "other"),
        "--device",
        str(bench.device),
        "--killed",
        str(file),
    ]
    ended = subprocess.run(command, timeout=200).returncode
    with repeatable_noise():
        other = resume(folder / "other")
    same = model_bytes(whole.folder) == model_bytes(other.folder)
    bench.add(
        **{"ended by": ended, "bit-equal": same, "seconds of the whole run": seconds},
        **{"spent ε": max(float(o.epsilon_spent or 0) for o in whole.summary.organizations)},
    )
    if not same or ended != -signal.SIGKILL:
        raise AssertionError("expected a process that killed itself, and the same model after it")


def plan_of_a_small_run(folder: Path) -> Plan:
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    local = {"learning_rate": 0.5, "steps": 4, "batch_size": 0.5, "physical_batch_size": 16}
    return plan_for(
        str(write_base(folder / "base", config)),
        train=[{"mode": "head", "rounds": 2}, {"mode": "lora", "rounds": 2}],
        rounds=4,
        model={"max_length": 16},
        lora={"targets": ["query", "value"]},
        data={"source": str(records(folder / "records.csv", 240))},
        local=local,
    )


def simulate_until_killed(plan: Path, folder: Path, device: str) -> None:
    """Play a run that ends with SIGKILL when the first update of its third round has come."""

    def look(what: str, fields: Mapping[str, Any]) -> None:
        if what == "update_received" and fields.get("round") == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with observe_run(look), repeatable_noise():
        simulate(parse_plan(tomllib.loads(plan.read_text(encoding="utf-8"))), folder, device=device)


@contextmanager
def repeatable_noise() -> Iterator[None]:
    """Let organizations draw noise that a second run draws again: for comparing two runs bit for bit, and for nothing else."""
    real = client_steps._private_training

    def drawing(*parts: object) -> Callable[[], Any]:
        drawn = itertools.count()

        def draw() -> Any:
            return seeded_generator(*map(str, parts), next(drawn))

        return draw

    def training(prepared: Any) -> int:
        context = prepared.context
        with mock.patch.object(dp_sgd, "private_generator", drawing(context.site.organization, context.round)):
            return real(prepared)

    counts = mock.patch("cotune.client.run_account.private_generator", drawing("counts"))
    with mock.patch.object(client_steps, "_private_training", training), counts:
        yield


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()
