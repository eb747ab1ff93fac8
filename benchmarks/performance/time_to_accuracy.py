"""How long is it until four organizations with tweets have a model of accuracy .70 at ε = 8?

The data, the split, the frozen encoder (all-MiniLM-L6-v2) and the head of the preset `tweets` for both; ε = 8 at δ = n^-1.5 for
every record over 20 rounds for both.

The peer is what Flower's and Opacus' examples show, in process: in every round every client wraps model, optimizer and loader
by a fresh PrivacyEngine, trains one epoch in Poisson batches of 256 through encoder and head, and the server averages. It is
given what the examples do not do: a noise that is calibrated to all rounds (an engine per round reports the ε of its round
alone), and the best of three learning rates. Opacus trains its head on features that were computed before, as a frozen encoder
gives the same ones in every epoch, and the passes through the encoder, one for each record of each epoch, are charged at what
such a batch takes: measured on batches of the same size, in random order, in inference mode, padded to their longest.

cotune is a run of the preset by its public API until the event of the first round that is that good. Its features are cached
while this is measured; encoding each record once is charged at what its own encoder takes, as measured on a sample. "Warm" is
without it. Time is CPU time of one thread.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import inputs
from encoding import new_cache
from harness import Benchmark, Contender, Figure, Meter, Results, Row

TARGET = 0.70
EPSILON = 8.0
ROUNDS, BATCH = 20, 256
RATES = (0.5, 2.0, 8.0)
SAMPLED = 256  # texts by which an encoder's cost is measured


def changes(folder: Path, smoke: bool) -> list[str]:
    """Of the preset."""
    found = ["simulation.baselines=[]", f"privacy.epsilon={EPSILON:g}"]
    if smoke:
        base = inputs.write_encoder(folder / "base", 16)
        source = inputs.write_records(folder / "records.csv", 400, classes=2)
        found += [f'model.base="{base}"', "model.pooling=mean", "model.max_length=16", f'data.source="{source}"', "rounds=2"]
        found += ["data.label=label", "simulation.min_examples=20"]
    return found


class _Enough(Exception):
    """Ends a simulation once its model is good enough."""


def cotune(meter: Meter, folder: Path, smoke: bool) -> None:
    """Once to fill the cache, where it is empty; then measured."""
    from cotune import load_plan, simulate
    from cotune.server.runs.events import observe_run

    target = 0.0 if smoke else TARGET
    reached: list[int] = []

    def until(most: float, event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished" and fields["metrics"]["accuracy"] >= most:
            reached.append(fields["round"])
            raise _Enough

    plan = load_plan(inputs.NARROW, changes(folder, smoke))
    for most in (0.0, target):
        with tempfile.TemporaryDirectory(dir=folder) as out, observe_run(partial(until, most)):
            cpu, wall = time.process_time(), time.perf_counter()
            with suppress(_Enough):
                simulate(plan, Path(out) / "run", device="cpu")
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if len(reached) < 2:
        raise RuntimeError(f"no round has reached {target}")
    records, each = _encoding(plan, folder, smoke)
    meter.add(cpu=cpu, wall=wall, label="warm", rounds=reached[-1])
    meter.add(cpu=cpu + records * each, label="cold", encoding=records * each)


def _encoding(plan: Any, folder: Path, smoke: bool) -> tuple[int, float]:
    """How many different records the source has, and CPU seconds for each of a sample, by cotune's own encoder."""
    from cotune.data.record_reading import read_records
    from cotune.models.features.cached import get_features
    from cotune.models.features.precision import feature_dtype
    from cotune.plan.trained_parameters import get_plan_model

    source = list(dict.fromkeys(read_records(plan.data).inputs))
    plan = plan.model_copy(update={"labels": ("0", "1", "2")})
    model = get_plan_model(plan, "cpu")
    model.load({})
    feature_dtype(model, plan.model.precision)  # is found out once for a machine
    sample = source[:: max(1, len(source) // SAMPLED)][: 8 if smoke else SAMPLED]
    with new_cache(folder):
        feature_dtype(model, plan.model.precision)
        began = time.process_time()
        get_features(model, sample, {}, plan.model.precision)
        return len(source), (time.process_time() - began) / len(sample)


def peer(meter: Meter, folder: Path, smoke: bool, rate: float) -> None:
    """FedAvg over Opacus, round by round until the accuracy is reached."""
    import torch
    from opacus.accountants.utils import get_noise_multiplier

    from cotune import load_plan

    plan = load_plan(inputs.NARROW, changes(folder, smoke))
    clients, test, texts = _split(plan)
    passed = _pass_cost(plan, texts, 16 if smoke else BATCH)
    classes = int(max(labels.max() for _, labels in clients)) + 1
    torch.manual_seed(0)
    state = torch.nn.Linear(test[0].shape[1], classes).state_dict()
    total = sum(len(labels) for _, labels in clients)
    rounds = 2 if smoke else ROUNDS
    noise = [
        get_noise_multiplier(
            target_epsilon=EPSILON,
            target_delta=len(labels) ** -1.5,
            sample_rate=1 / len(_loader(features, labels)),
            steps=rounds * len(_loader(features, labels)),
            accountant="prv" if not smoke else "rdp",
        )
        for features, labels in clients
    ]
    began = time.process_time()
    spent = 0.0
    for number in range(1, rounds + 1):
        mean = {name: torch.zeros_like(value) for name, value in state.items()}
        for (features, labels), sigma in zip(clients, noise, strict=True):
            trained, epsilon = _epoch(state, features, labels, sigma, rate)
            for name, value in trained.items():
                mean[name] += value * (len(labels) / total)
            spent += passed * len(labels)
        state = mean
        scores = test[0] @ state["weight"].T + state["bias"]
        accuracy = float((scores.argmax(1) == test[1]).float().mean())
        if accuracy >= (0.0 if smoke else TARGET):
            trained_for = time.process_time() - began
            meter.add(cpu=trained_for + spent, rounds=number, head=trained_for, own_epsilon=epsilon, accuracy=accuracy)
            return
    raise RuntimeError(f"{accuracy:.3f} after {rounds} rounds, expected {TARGET}")


def _loader(features: Any, labels: Any) -> Any:
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(features, labels), batch_size=min(BATCH, len(labels)))


def _epoch(state: Any, features: Any, labels: Any, sigma: float, rate: float) -> tuple[Any, float]:
    """One client's epoch, and the ε that its engine reports."""
    import torch
    from opacus import PrivacyEngine
    from torch.nn import functional

    model = torch.nn.Linear(features.shape[1], len(state["bias"]))
    model.load_state_dict(state)
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        data_loader=_loader(features, labels),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(private(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict(), float(engine.get_epsilon(len(labels) ** -1.5))


def _split(plan: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, Any], list[str]]:
    """The organizations' (features, labels), those of the test, and the texts: as the simulation of the plan splits them."""
    import torch

    from cotune.models.features.cached import get_features
    from cotune.plan.trained_parameters import get_plan_model
    from cotune.simulations.prepare import prepare

    prepared = prepare(plan, "cpu")
    (records,) = prepared.records.values()
    model = get_plan_model(prepared.plan, "cpu")
    model.load({})
    features = get_features(model, records.inputs, {}, plan.model.precision)
    number = {name: i for i, name in enumerate(prepared.plan.labels)}
    labels = torch.tensor([number[str(label)] for label in records.labels])
    rows = [torch.as_tensor(share.rows) for share in prepared.shares]
    tested = torch.as_tensor(prepared.test[0][1])
    return [(features[r], labels[r]) for r in rows], (features[tested], labels[tested]), [str(each) for each in records.inputs]


def _pass_cost(plan: Any, texts: list[str], size: int) -> float:
    """CPU seconds of a record in a batch of random texts through the encoder, without gradients."""
    import torch

    from cotune.plan.trained_parameters import get_plan_model

    model = get_plan_model(plan.model_copy(update={"labels": ("0", "1", "2")}), "cpu")
    encoder: Any = inputs.bare_encoder(model)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:size]
    tokens = model.loaded.reader([texts[i] for i in order], truncation=True, max_length=plan.model.max_length)["input_ids"]
    batch = model.loaded.reader.pad({"input_ids": tokens}, return_tensors="pt")
    with torch.inference_mode():
        encoder(**{key: value[:4] for key, value in batch.items()})
        began = time.process_time()
        encoder(**batch)
        return (time.process_time() - began) / size


def _peer(rate: float) -> str:
    return f"Flower + Opacus pattern, learning rate {rate:g}"


def rows(results: Results) -> list[Row]:
    what = f"time to {TARGET:.2f} at ε = {EPSILON:g}"
    times = {name: results.median(name) for name in map(_peer, RATES)}
    best = min(times, key=lambda name: times[name] or float("inf"))
    found = [results.row(what, _peer(rate), Figure("cpu", "s CPU", 1.0)) for rate in RATES]
    cold, warm = Figure("cpu", "s CPU", 1.0, "cold"), Figure("cpu", "s CPU", 1.0, "warm")
    faster: Any = {"goal": "≥ 10 × faster", "reached": lambda _, ratio: ratio <= 0.1}
    found += [
        results.row(what, "cotune", cold, against=best, against_label="", note="each record encoded once", **faster),
        results.row(what, "cotune", warm, against=best, against_label="", note="features cached"),
        results.row("rounds until then", best, Figure("rounds", "", 1.0)),
        results.row("rounds until then", "cotune", Figure("rounds", "", 1.0, "warm")),
        results.row("ε that a round's own engine reports", best, Figure("own_epsilon", "", 1.0), note="over all rounds it is 8"),
    ]
    return found


BENCHMARK = Benchmark(
    name="time_to_accuracy",
    number=8,
    title="Time to a good model under privacy",
    contenders=(
        Contender("cotune", cotune, users_cache=True),
        *(Contender(_peer(rate), partial(peer, rate=rate), in_smoke=rate == RATES[0], users_cache=True) for rate in RATES),
    ),
    rows=rows,
    repeats=1,
)
