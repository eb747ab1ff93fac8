"""What does it cost to simulate one client in one round, beside its training?

Softmax regression of 784 features and 10 classes: 1,000 clients with 60 records each, 10 of them drawn in every round; a client
takes 5 steps of SGD on batches of 12 of its records, the server averages, and the new model is tested on 600 further records.
All contenders do this work; the model is so small that most of what they take is overhead.

Without privacy: a bare PyTorch loop, pfl's simulator, Flower's simulation runtime (Ray, two workers; wall time, as the work is
done in other processes), and cotune's engine in process. With ε = 8 for every record: DP-SGD with per-example norms in closed
form (for a linear layer ‖p − y‖ · √(‖x‖² + 1), exact; the fastest that there can be), Opacus as its tutorials show it, with a
fresh PrivacyEngine for every client and round, and cotune, which also charges a durable ledger before a record is touched.

The peers get features and a random partition from memory. cotune reads texts from a file, whose features an encoder without
layers computes once; what that and all else before the first round takes is in a row of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import inputs
import torch
from harness import Benchmark, Contender, Figure, Meter, Results, Row
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CLASSES = 784, 10
EXAMPLES, COHORT, STEPS, BATCH, TESTED = 60, 10, 5, 12, 600
RATE, CLIP, SIGMA = 0.1, 1.0, 1.0  # σ has no influence on time
WARM = 2  # rounds that are not counted: caches are filled


@dataclass(frozen=True)
class Size:
    clients: int
    rounds: int


def size_of(smoke: bool) -> Size:
    return Size(20, 4) if smoke else Size(1000, 32)


def data_of(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (clients, examples, d) and classes of all clients, and those of the test."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size.clients, EXAMPLES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (size.clients, EXAMPLES), generator=generator)
    tested = torch.randn(TESTED, WIDTH, generator=generator)
    return features, labels, tested, torch.randint(CLASSES, (TESTED,), generator=generator)


Train = Callable[[nn.Linear, Tensor, Tensor], None]  # (model, a client's features, its classes): trains in place


def run_loop(meter: Meter, smoke: bool, train: Train) -> None:
    """FedAvg by hand: the cohort in turn, the mean of the models, the test."""
    size = size_of(smoke)
    features, labels, tested, answers = data_of(size)
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(size.rounds):
        chosen = torch.randperm(size.clients)[:COHORT]
        if number < WARM:
            state = _round(model, state, train, features[chosen], labels[chosen])
            continue
        with meter.measure(COHORT):
            state = _round(model, state, train, features[chosen], labels[chosen])
            with torch.inference_mode():
                float((functional.linear(tested, state["weight"], state["bias"]).argmax(1) == answers).float().mean())


def _round(model: nn.Linear, state: dict[str, Tensor], train: Train, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value) for name, value in state.items()}
    for own, answers in zip(features, labels, strict=True):
        model.load_state_dict(state)
        train(model, own, answers)
        for name, value in model.state_dict().items():
            total[name] += value / COHORT
    return total


def _plain(model: nn.Linear, features: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    order = torch.randperm(EXAMPLES)
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        functional.cross_entropy(model(features[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def _closed_form(model: nn.Linear, features: Tensor, labels: Tensor) -> None:
    for _ in range(STEPS):
        rows = (torch.rand(EXAMPLES) < BATCH / EXAMPLES).nonzero()[:, 0]
        x = features[rows]
        error = functional.softmax(functional.linear(x, model.weight, model.bias), dim=1)
        error[torch.arange(len(rows)), labels[rows]] -= 1
        norms = error.norm(dim=1) * (x.pow(2).sum(dim=1) + 1).sqrt()
        error *= (CLIP / norms.clamp(min=1e-12)).clamp(max=1.0)[:, None]
        for parameter, gradient in ((model.weight, error.T @ x), (model.bias, error.sum(dim=0))):
            parameter -= RATE / BATCH * (gradient + SIGMA * CLIP * torch.randn_like(gradient))


def _opacus(model: nn.Linear, features: Tensor, labels: Tensor) -> None:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    own = nn.Linear(WIDTH, CLASSES)
    own.load_state_dict(model.state_dict())
    optimizer: Any = torch.optim.SGD(own.parameters(), lr=RATE)
    loader: Any = DataLoader(TensorDataset(features, labels), batch_size=BATCH)
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=own, optimizer=optimizer, data_loader=loader, noise_multiplier=SIGMA, max_grad_norm=CLIP
    )
    for x, y in loader:  # one pass: 1 / q steps of Poisson samples, which are 5
        optimizer.zero_grad()
        functional.cross_entropy(private(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.load_state_dict(own.state_dict())


def bare(meter: Meter, folder: Path, smoke: bool) -> None:
    run_loop(meter, smoke, _plain)


def exact(meter: Meter, folder: Path, smoke: bool) -> None:
    run_loop(meter, smoke, _closed_form)


def opacus(meter: Meter, folder: Path, smoke: bool) -> None:
    run_loop(meter, smoke, _opacus)


class _Softmax(nn.Linear):
    """With the two methods that pfl wants of a module."""

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        from pfl.metrics import Weighted

        return {"accuracy": Weighted(float((self(x).argmax(1) == y).sum()), len(y))}


def pfl(meter: Meter, folder: Path, smoke: bool) -> None:
    """By pfl's own algorithm and backend. The central test is made in every round, as everywhere."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.callback.central_evaluation import CentralEvaluationCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    size = size_of(smoke)
    features, labels, tested, answers = data_of(size)
    np.random.seed(0)
    sampler = get_user_sampler("random", list(range(size.clients)))
    federated = FederatedDataset(lambda user: Dataset([features[user], labels[user]], user_id=str(user)), sampler)
    module = _Softmax(WIDTH, CLASSES)
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, torch.optim.SGD, central)
    hyper = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH, local_max_grad_norm=None, local_num_steps=None
    )
    clock = RoundClock(meter)

    class Rounds(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
            clock.round_ends()
            return False, Metrics()

    evaluation = CentralEvaluationCallback(Dataset([tested, answers]), NNEvalHyperParams(local_batch_size=TESTED), frequency=1)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=size.rounds,
            evaluation_frequency=size.rounds + 1,
            train_cohort_size=COHORT,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=federated, val_data=federated),
        model,
        hyper,
        callbacks=[evaluation, Rounds()],
    )


class RoundClock:
    """Turns the ends of rounds into samples; the first rounds are left out."""

    def __init__(self, meter: Meter, clients: int = COHORT) -> None:
        self.meter = meter
        self.clients = clients
        self.seen = 0
        self.at = (time.process_time(), time.perf_counter())

    def round_ends(self) -> None:
        now = (time.process_time(), time.perf_counter())
        self.seen += 1
        if self.seen > WARM:
            self.meter.add(cpu=now[0] - self.at[0], wall=now[1] - self.at[1], units=self.clients)
        self.at = now


def flower(meter: Meter, folder: Path, smoke: bool) -> None:
    """By Flower's own strategy and simulation runtime, two workers. Samples hold wall time alone."""
    import logging

    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    size = Size(1000, 12) if not smoke else size_of(smoke)
    file = folder / "flower.pt"
    torch.save(data_of(size), file)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        features, labels = _memory(file)
        own = int(context.node_config["partition-id"])
        model = nn.Linear(WIDTH, CLASSES)
        arrays: Any = message.content["arrays"]
        model.load_state_dict(arrays.to_torch_state_dict())
        _plain(model, features[own], labels[own])
        metrics = MetricRecord({"num-examples": EXAMPLES})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    server = ServerApp()
    ends: list[float] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        _, _, tested, answers = torch.load(file)

        def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
            state = arrays.to_torch_state_dict()
            right = functional.linear(tested, state["weight"], state["bias"]).argmax(1) == answers
            ends.append(time.perf_counter())
            return MetricRecord({"accuracy": float(right.float().mean())})

        strategy = FedAvg(fraction_train=COHORT / size.clients, fraction_evaluate=0.0, min_available_nodes=size.clients)
        arrays = ArrayRecord(nn.Linear(WIDTH, CLASSES).state_dict())
        strategy.start(grid, arrays, num_rounds=size.rounds, train_config=ConfigRecord({}), evaluate_fn=evaluate)

    began = time.perf_counter()
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, app, num_supernodes=size.clients, backend_config=resources)
    meter.add(wall=ends[1] - began, label="start")  # ends[0]: the test before the first round, as Ray starts
    for before, after in list(pairwise(ends))[WARM:]:
        meter.add(wall=after - before, units=COHORT)


_held: dict[Path, tuple[Tensor, Tensor]] = {}


def _memory(file: Path) -> tuple[Tensor, Tensor]:
    """Read once in every worker."""
    if file not in _held:
        features, labels, _, _ = torch.load(file)
        _held[file] = (features, labels)
    return _held[file]


def setup(folder: Path, smoke: bool) -> None:
    size = size_of(smoke)
    base = inputs.write_encoder(folder / "base", WIDTH)
    records = size.clients * EXAMPLES
    source = inputs.write_records(folder / "records.csv", records + TESTED)
    for name, privacy in (("plain", "none"), ("private", {"epsilon": 8.0})):
        inputs.write_plan(
            folder / f"{name}.toml",
            rounds=size.rounds,
            train="head",
            privacy=privacy,
            test_fraction=TESTED / (records + TESTED),
            keep_checkpoints=1,
            model={"base": str(base), "max_length": 16, "pooling": "mean"},
            data={"source": str(source)},
            local={"learning_rate": RATE, "batch_size": BATCH / EXAMPLES, "steps": STEPS},
            server={"sample_size": COHORT},
            personalize={"methods": []},
            simulation={"clients": size.clients, "partition": "iid", "min_examples": 10, "baselines": []},
        )


class _Enough(Exception):
    """Ends a simulation after its last round: reports are not what is measured."""


@contextmanager
def rounds_measured(meter: Meter, clients: int) -> Iterator[None]:
    """Measure the rounds of simulations in the block: from the end of a round to that of the next, without the first ones."""
    from cotune.server.runs.events import observe_run

    began = (time.process_time(), time.perf_counter())
    clock: list[RoundClock] = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "round_started" and not clock:
            meter.add(cpu=time.process_time() - began[0], wall=time.perf_counter() - began[1], label="start")
            clock.append(RoundClock(meter, clients))
        if event == "round_finished":
            clock[0].round_ends()
            if fields["round"] == WARM:
                meter.start_profile()
        if event == "run_finished":
            meter.stop_profile()
            raise _Enough

    with observe_run(listener), suppress(_Enough):
        yield


def cotune(meter: Meter, folder: Path, smoke: bool, plan: str) -> None:
    """A whole simulation by the public API; what is counted of it are its rounds."""
    import tempfile

    from cotune import load_plan, simulate

    with tempfile.TemporaryDirectory(dir=folder) as out, rounds_measured(meter, COHORT):
        simulate(load_plan(folder / f"{plan}.toml"), Path(out) / "run", device="cpu")


def rows(results: Results) -> list[Row]:
    client = Figure("cpu", "ms CPU", 1000.0, "")
    wall = Figure("wall", "ms wall", 1000.0, "")
    start = Figure("wall", "s wall", 1.0, "start")
    plain = "no privacy, per client and round"
    private = "ε = 8, per client and round"
    base, exact_ = (results.median(name, label="") or 0.0 for name in ("bare loop", "exact DP-SGD"))
    return [
        results.row(plain, "bare loop", client),
        results.row(plain, "pfl", client, against="bare loop"),
        results.row(plain, "cotune", client, against="bare loop", goal="≤ 1.5 × bare + 1 ms",
                    reached=lambda ms, _: ms <= 1500 * base + 1),
        results.row(plain, "cotune", client, against="pfl", goal="≤ 1.1 × pfl", reached=lambda _, ratio: ratio <= 1.1),
        results.row(plain, "Flower (Ray)", wall, against="bare loop"),
        results.row(plain, "cotune", wall, against="Flower (Ray)"),
        results.row(private, "exact DP-SGD", client),
        results.row(private, "Opacus, fresh engine", client, against="exact DP-SGD"),
        results.row(private, "cotune, ε = 8", client, against="exact DP-SGD", goal="≤ 2 × exact + 1 ms",
                    reached=lambda ms, _: ms <= 2000 * exact_ + 1),
        results.row("first round after start", "cotune", start, goal="≤ 5 s", reached=lambda s, _: s <= 5),
        results.row("first round after start", "cotune, ε = 8", start, goal="≤ 5 s", reached=lambda s, _: s <= 5),
        results.row("first round after start", "Flower (Ray)", start, note="until it has ended"),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    name="simulation",
    number=1,
    title="Simulation: overhead per client and round",
    contenders=(
        Contender("bare loop", bare),
        Contender("pfl", pfl, needs=("pfl",)),
        Contender("cotune", lambda meter, folder, smoke: cotune(meter, folder, smoke, "plain"), repeats=2),
        Contender("exact DP-SGD", exact),
        Contender("Opacus, fresh engine", opacus),
        Contender("cotune, ε = 8", lambda meter, folder, smoke: cotune(meter, folder, smoke, "private"), repeats=2),
        Contender("Flower (Ray)", flower, needs=("ray",), repeats=1, in_smoke=False),
    ),
    rows=rows,
    setup=setup,
)
