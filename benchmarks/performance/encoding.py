"""How far is encoding a source from the best loop, and how much of the demo's rounds is training?

Encoding: tweets through all-MiniLM-L6-v2, once each, as before the first round of `make demo`. The best loop that one would
write sorts them by length, pads every batch of 64 to its longest text, and runs the encoder as it lies in its folder in inference
mode; it is measured in float32 and in bfloat16. cotune is measured with the arithmetic that `precision = "auto"` picks on this
machine, and in float32. Its batches have fixed shapes, so that a record's feature depends on no other record.

Rounds: the preset `tweets` on a part of its records, with features that are cached (a warm start), round by round. Training is
what is spent inside `DPSGD.run`, clocked from outside at every step; the other functions are found by running this
benchmark with `--profile`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import inputs
from harness import Benchmark, Contender, Figure, Meter, Results, Row

COUNT = 512  # tweets
RECORDS = 3000  # of the rounds
ROUNDS = 8
WARM = 2
MAX_LENGTH, BATCH = 64, 64


def texts_of(smoke: bool) -> list[str]:
    return inputs.tweets(16 if smoke else COUNT)


def bare(meter: Meter, folder: Path, smoke: bool, bfloat16: bool) -> None:
    import torch

    from cotune import load_plan
    from cotune.plan.trained_parameters import get_plan_model

    model = get_plan_model(load_plan(inputs.NARROW, ['labels=["0", "1", "2"]']), "cpu")  # for the same folder and tokenizer
    tokenizer = model.loaded.reader
    encoder: Any = inputs.bare_encoder(model)
    texts = texts_of(smoke)

    @torch.inference_mode()
    def encode(texts: list[str]) -> Any:
        tokens = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        found = torch.empty(len(texts), encoder.config.hidden_size)
        for start in range(0, len(texts), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                hidden = encoder(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None]
            found[rows] = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return found

    encode(texts[:8])
    with meter.measure(len(texts)):
        encode(texts)


def cotune(meter: Meter, folder: Path, smoke: bool, precision: str) -> None:
    """As a simulation or a node encodes its source, the file of features included."""
    from cotune import load_plan
    from cotune.models.features.cached import get_features
    from cotune.models.features.precision import feature_dtype
    from cotune.plan.trained_parameters import get_plan_model

    plan = load_plan(inputs.NARROW, [f"model.precision={precision}", 'labels=["0", "1", "2"]'])
    model = get_plan_model(plan, "cpu")
    model.load({})
    texts = texts_of(smoke)
    feature_dtype(model, precision)  # which arithmetic can be used is found out once per machine, and kept
    with new_cache(folder):
        feature_dtype(model, precision)
        get_features(model, texts[:8], {}, precision)
        with meter.measure(len(texts)):
            get_features(model, texts, {}, precision)
    meter.add(label="arithmetic", bfloat16=float(str(feature_dtype(model, precision)) == "torch.bfloat16"))


@contextmanager
def new_cache(folder: Path) -> Iterator[None]:
    """Keep features in a new folder inside the block."""
    before = os.environ.get("COTUNE_CACHE")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        os.environ["COTUNE_CACHE"] = place
        try:
            yield
        finally:
            del os.environ["COTUNE_CACHE"]
            os.environ |= {} if before is None else {"COTUNE_CACHE": before}


class _Enough(Exception):
    """Ends a simulation after its last round."""


def demo(meter: Meter, folder: Path, smoke: bool) -> None:
    """The rounds of the preset, and the part of them that is training."""
    import cotune.client.training.charged_steps
    from cotune import load_plan, simulate
    from cotune.server.runs.events import observe_run

    client_steps: Any = cotune.client.training.charged_steps
    training = {"cpu": 0.0, "wall": 0.0}
    original: Any = client_steps.DPSGD

    def clocked(self: Any, setup: Any) -> Iterator[Any]:
        steps = original(self.config).run(setup)
        while True:
            cpu, wall = time.process_time(), time.perf_counter()
            report = next(steps, None)
            training["cpu"] += time.process_time() - cpu
            training["wall"] += time.perf_counter() - wall
            if report is None:
                return
            yield report

    marks: list[tuple[float, float, float, float]] = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished":
            marks.append((time.process_time(), training["cpu"], time.perf_counter(), training["wall"]))
            if len(marks) == WARM:
                meter.start_profile()
        if event == "run_finished":
            meter.stop_profile()
            raise _Enough

    changes = [f"rounds={3 if smoke else ROUNDS}", "simulation.baselines=[]", "simulation.min_examples=20"]
    if smoke:
        base = inputs.write_encoder(folder / "base", 16)
        changes += [f'model.base="{base}"', "model.pooling=mean", "model.max_length=16"]
    changes += [f'data.source="{folder / "tweets.csv"}"', "data.encoding=utf-8", "data.label=label", "privacy.epsilon=8"]
    client_steps.DPSGD = type("Clocked", (original,), {"run": clocked})
    try:
        with tempfile.TemporaryDirectory(dir=folder) as out, observe_run(listener), suppress(_Enough):
            simulate(load_plan(inputs.NARROW, changes), Path(out) / "run", device="cpu")
    finally:
        client_steps.DPSGD = original
    for before, after in list(pairwise(marks))[WARM - 1 :]:
        cpu, trained, wall, trained_wall = (b - a for a, b in zip(before, after, strict=True))
        meter.add(cpu=cpu, wall=wall, units=4, share=trained / cpu, share_wall=trained_wall / wall, label="rounds")


def setup(folder: Path, smoke: bool) -> None:
    """A part of the tweets, and their features, so that the rounds begin warm."""
    import csv

    from cotune import load_plan
    from cotune.data.record_reading import read_records

    found = read_records(load_plan(inputs.NARROW).data)
    count = 300 if smoke else RECORDS
    step = len(found.inputs) // count
    rows = dict(zip(found.inputs[::step], found.labels[::step], strict=True))
    with (folder / "tweets.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(rows.items())


def rows(results: Results) -> list[Row]:
    record = Figure("cpu", "ms CPU per record", 1000.0, "")
    fast = bool(results.median("cotune, precision auto", "bfloat16", "arithmetic"))
    best = "bare loop, bfloat16" if fast else "bare loop, float32"
    note = f"computes in {'bfloat16' if fast else 'float32'} here"
    slow = "bare loop, float32"
    most = "≤ 1.1 ×"
    share = Figure("share", "%", 100.0, "rounds")
    training = "share of training in the rounds"
    return [
        results.row("encoding", slow, record),
        results.row("encoding", "bare loop, bfloat16", record, against=slow),
        results.row("encoding", "cotune, float32", record, against=slow, goal=most, reached=lambda _, ratio: ratio <= 1.1),
        results.row("encoding", "cotune, precision auto", record, against=best, goal=most,
                    reached=lambda _, ratio: ratio <= 1.1, note=note),
        results.row("rounds of the demo, per client", "cotune", Figure(label="rounds")),
        results.row(training, "cotune", share, goal="≥ 60 %", reached=lambda part, _: part >= 60),
        results.row(f"{training}, by wall time", "cotune", Figure("share_wall", "%", 100.0, "rounds")),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    name="encoding",
    number=2,
    title="Encoding a source, and the rounds of the demo",
    contenders=(
        Contender("bare loop, float32", partial(bare, bfloat16=False)),
        Contender("bare loop, bfloat16", partial(bare, bfloat16=True), in_smoke=False),
        Contender("cotune, float32", partial(cotune, precision="float32")),
        Contender("cotune, precision auto", partial(cotune, precision="auto"), in_smoke=False),
        Contender("cotune", demo, repeats=2),
    ),
    rows=rows,
    setup=setup,
    repeats=2,
)
