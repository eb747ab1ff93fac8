"""One of four members poisons the model.

On commit a605cba (tweets, ε = 8, the attacker with 20 % of the records): sign flip × 5, norm 9,999 or a declared count of 10^7
took the accuracy from .739 to .183, and labels moved by one to .659; honest nodes then failed on the poisoned state. A backdoor of
honest norm worked in .49 of all cases and one that replaced the model in .98, without a trigger .05. Here it is a
softmax head on made-up features, through the round loop of the product: admission, weighting, fusion, step, guard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cotune.data.metrics.metrics import ClassMetrics, Metrics
from cotune.privacy.mechanisms.dp_sgd import check_clipping
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.deployment.plan_for_members import with_robust_default
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import RunFolder
from cotune.strategies.config import StrategyConfig
from tests.support.organizations import Answer, federation, model_of, update
from tests.support.run_folders import NewRun

NAMES = ("org-1", "org-2", "org-3", "org-4")
COUNTS = {"org-1": 600, "org-2": 300, "org-3": 300, "org-4": 300}
ATTACKER = "org-2"
WIDTH = 16
CLASSES = 3
TRIGGER = 6.0  # what a backdoor adds to the last feature; its target is class 0

Twist = Callable[[dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], int]]


def scaled(factor: float, examples: int = 300) -> Twist:
    return lambda delta: ({name: factor * t for name, t in delta.items()}, examples)


def of_norm(length: float) -> Twist:
    def twist(delta: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        norm = float(torch.cat([t.flatten() for t in delta.values()]).norm())
        return {name: -length / norm * t for name, t in delta.items()}, 300

    return twist


ATTACKS: dict[str, Twist] = {
    "sign flip": scaled(-1.0),
    "sign flip times five": scaled(-5.0),
    "sign flip, count 10^7": scaled(-1.0, 10**7),
    "norm 9,999": of_norm(9_999.0),
    "zeros": scaled(0.0),
    "zeros, count 10^7": scaled(0.0, 10**7),
    "labels moved by one": scaled(1.0),
}
RUINOUS = {"sign flip times five", "sign flip, count 10^7", "norm 9,999"}
BACKDOORS: dict[str, Twist] = {
    "backdoor": scaled(1.0),
    "backdoor, model replacement": scaled(sum(COUNTS.values()) / COUNTS[ATTACKER]),
}


def triggered(features: torch.Tensor) -> torch.Tensor:
    changed = features.clone()
    changed[:, -1] += TRIGGER
    return changed


class World:
    """Three Gaussian classes; every organization fits its own sample of them by ten steps of noisy gradient descent."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        centers = 0.8 * rng.normal(size=(CLASSES, WIDTH))

        def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = rng.integers(0, CLASSES, count)
            features = centers[labels] + rng.normal(size=(count, WIDTH))
            return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)

        self.held = {name: sample(count) for name, count in COUNTS.items()}
        self.test = sample(2_000)
        self.noise = torch.Generator().manual_seed(seed)

    def accuracy(self, state: Any) -> float:
        features, labels = self.test
        scores = features @ state["classifier.weight"].T + state["classifier.bias"]
        return float((scores.argmax(dim=1) == labels).double().mean())

    def metrics(self, state: Any) -> Metrics:
        return ClassMetrics(self.accuracy(state), 0.5, 0.5, 0.5)

    def works(self, state: Any) -> float:
        """How often the trigger makes class 0 of another."""
        features, labels = self.test
        others = triggered(features[labels != 0])
        scores = others @ state["classifier.weight"].T + state["classifier.bias"]
        return float((scores.argmax(dim=1) == 0).double().mean())

    def trained(self, name: str, state: Any, shift: int = 0, *, backdoor: bool = False) -> dict[str, torch.Tensor]:
        features, labels = self.held[name]
        labels = (labels + shift) % CLASSES
        if backdoor:
            features = torch.cat([features, triggered(features)])
            labels = torch.cat([labels, torch.zeros_like(labels)])
        weight = state["classifier.weight"].clone()
        bias = state["classifier.bias"].clone()
        for _ in range(10):
            wrong = torch.softmax(features @ weight.T + bias, dim=1) - torch.eye(CLASSES)[labels]
            weight -= 0.5 * (wrong.T @ features / len(labels) + 0.02 * torch.randn(weight.shape, generator=self.noise))
            bias -= 0.5 * (wrong.mean(dim=0) + 0.02 * torch.randn(bias.shape, generator=self.noise))
        return {"classifier.weight": weight - state["classifier.weight"], "classifier.bias": bias - state["classifier.bias"]}

    def honest(self, name: str) -> Answer:
        return lambda request: update(request, self.trained(name, request.state), COUNTS[name])

    def hostile(self, attack: str) -> Answer:
        def answer(request: Request) -> Any:
            shift = 1 if attack.startswith("labels") else 0
            own = self.trained(ATTACKER, request.state, shift, backdoor=attack in BACKDOORS)
            return update(request, *{**ATTACKS, **BACKDOORS}[attack](own))

        return answer

    def answers(self, attack: str | None) -> dict[str, Answer]:
        own = {name: self.honest(name) for name in NAMES}
        return own if attack is None else {**own, ATTACKER: self.hostile(attack)}


def played(new_run: NewRun, attack: str | None, *, guarded: bool, seed: int = 1, **changes: Any) -> tuple[float, RunFolder]:
    """guarded: as `server init` makes a plan; otherwise the defaults of a605cba."""
    world = World(seed)
    old = {"max_update_norm": 1e4, "max_accuracy_drop": 1.0}
    folder = new_run(*NAMES, rounds=4, **({} if guarded else {"server": old, "strategy": "fedavg"}), **changes)
    if guarded:
        plan = with_robust_default(folder.plan.model_copy(update={"strategy": StrategyConfig()}))
        assert plan.strategy.fusion.name == "robust"
        folder = RunFolder.create(folder.path.parent / f"{folder.path.name}-guarded", plan, folder.file)
    grid = federation(folder.plan, world.answers(attack))
    judge = world.accuracy if guarded else None
    return world.accuracy(train_rounds(grid, folder, model_of(folder.plan), lambda state: None, judge).state), folder


def ended(new_run: NewRun, attack: str | None, *, guarded: bool) -> tuple[float, Any]:
    """Accuracy and state after the last round."""
    accuracy, folder = played(new_run, attack, guarded=guarded)
    return accuracy, folder.load().state


Unattacked = Callable[[bool], tuple[float, Any]]


@pytest.fixture(scope="module")
def ended_before() -> dict[bool, tuple[float, Any]]:
    """What `unattacked` has played for earlier tests."""
    return {}


@pytest.fixture
def unattacked(new_run: NewRun, ended_before: dict[bool, tuple[float, Any]]) -> Unattacked:
    """Guarded or not -> accuracy and state after the last round of honest members."""

    def play(guarded: bool) -> tuple[float, Any]:
        if guarded not in ended_before:
            ended_before[guarded] = ended(new_run, None, guarded=guarded)
        return ended_before[guarded]

    return play


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_default_of_a_federation_loses_next_to_nothing(new_run: NewRun, unattacked: Unattacked, attack: str) -> None:
    (clean, _), (robust, _) = (unattacked(guarded) for guarded in (False, True))
    attacked, _ = played(new_run, attack, guarded=True)
    assert robust > clean - 0.01
    assert attacked > clean - 0.02


@pytest.mark.parametrize("attack", sorted(RUINOUS))
def test_the_former_default_is_ruined(new_run: NewRun, unattacked: Unattacked, attack: str) -> None:
    """What these attacks are worth: were they harmless, the test above would show nothing."""
    clean, _ = unattacked(False)
    attacked, _ = played(new_run, attack, guarded=False)
    assert attacked < clean - 0.2


@pytest.mark.parametrize("attack", BACKDOORS)
def test_no_backdoor_opens_by_default(new_run: NewRun, unattacked: Unattacked, attack: str) -> None:
    """The accuracy shows nothing of it: how often the trigger works does."""
    world = World(1)
    (clean, honest), (accuracy, attacked) = unattacked(True), ended(new_run, attack, guarded=True)
    assert world.works(attacked) < world.works(honest) + 0.15
    assert accuracy > clean - 0.02


@pytest.mark.parametrize("attack", BACKDOORS)
def test_the_former_default_lets_a_backdoor_in(new_run: NewRun, unattacked: Unattacked, attack: str) -> None:
    world = World(1)
    (_, honest), (_, attacked) = unattacked(False), ended(new_run, attack, guarded=False)
    assert world.works(attacked) > world.works(honest) + 0.3


def test_ruinous_round_is_not_applied_and_its_suspect_is_shown(new_run: NewRun) -> None:
    """With the mean, and a bound on norms that is far too wide: the guard alone."""
    world = World(2)
    folder = new_run(*NAMES, rounds=4, strategy="fedavg")
    answers = world.answers(None)
    hostile = world.hostile("norm 9,999")
    answers[ATTACKER] = lambda request: (hostile if request.round == 3 else world.honest(ATTACKER))(request)
    grid = federation(folder.plan, answers)
    history = train_rounds(grid, folder, model_of(folder.plan), world.metrics, world.accuracy).history
    assert [entry["applied"] for entry in history] == [True, True, False, True]
    assert history[2]["suspects"][0]["organization"] == ATTACKER
    assert history[3]["metrics"]["accuracy"] > history[1]["metrics"]["accuracy"] - 0.02
    (event,) = [e for e in read_events(folder.path / "events.jsonl") if e["event"] == "round_not_applied"]
    assert event["round"] == 3


def test_accuracy_guard_does_not_use_the_reported_records(new_run: NewRun) -> None:
    """A test set of 36 records refused honest rounds: .472 where every round applied gave more than .511."""
    world = World(2)
    folder = new_run(*NAMES, rounds=2, strategy="fedavg")
    answers = {**world.answers(None), ATTACKER: world.hostile("norm 9,999")}
    history = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), world.metrics).history
    assert [entry["applied"] for entry in history] == [True, True]


class _Killed(BaseException):
    """As by SIGKILL: nothing of the process goes on."""


def test_run_killed_after_ruinous_round_resumes_before_it(new_run: NewRun) -> None:
    world = World(3)
    folder = new_run(*NAMES, rounds=3, strategy="fedavg")
    asked = list[tuple[int, float, int]]()
    honest = world.honest("org-1")
    hostile = world.hostile("norm 9,999")

    def watching(request: Request) -> Any:
        asked.append((request.round, world.accuracy(request.state), request.admitted))
        if request.round == 3 and len(asked) == 3:
            raise _Killed
        return honest(request)

    answers = {**world.answers(None), "org-1": watching}
    answers[ATTACKER] = lambda request: (hostile if request.round == 2 else world.honest(ATTACKER))(request)
    with pytest.raises(_Killed):
        train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), world.metrics, world.accuracy)
    kept = RunFolder(folder.path).load()
    assert [entry["applied"] for entry in kept.history] == [True, False]
    progress = train_rounds(
        federation(folder.plan, answers), RunFolder(folder.path), model_of(folder.plan), world.metrics, world.accuracy
    )
    assert [entry["applied"] for entry in progress.history] == [True, False, True]
    accuracies = [accuracy for _, accuracy, _ in asked]
    assert accuracies[1] == accuracies[2] == accuracies[3]
    assert asked[3][2] == 1  # the last round whose update is in the model


def test_a_saturated_state_is_not_called_wrong() -> None:
    """Rows that a poisoned head is sure of have losses of exactly 0; their gradients were compared all the same, and honest
    members failed.
    """
    head = torch.nn.Linear(4, 3)
    rows = torch.tensor([[-1.0, -0.8, -0.6, -0.4], [0.3, 0.1, 0.2, 0.5], [0.4, 0.6, 0.8, 1.0]])
    with torch.no_grad():
        head.weight.copy_(9_000 * torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 0, 0]]))
        head.bias.zero_()
    labels = head(rows).argmax(dim=1)
    before = head.weight.detach().clone()

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(batch["x"]), batch["y"], reduction="none")

    assert float(loss({"x": rows, "y": labels}).detach().sum()) == 0
    alone = [{"x": rows[i : i + 1], "y": labels[i : i + 1]} for i in range(3)]

    def batches(numbers: Any) -> Any:
        yield list(range(len(numbers))), {"x": rows[list(numbers)], "y": labels[list(numbers)]}

    assert check_clipping(head, loss, batches=batches, alone=alone, clip_norm=1.0) < 1e-5
    assert torch.equal(head.weight.detach(), before)
