"""The training that an audit attacks: the organization's own rounds, with canaries and held-out records among its own.

Anyone who attacks sees every delta, and the model that each round began with; who sees more, the noised sum of every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.client.training.personal.ditto_pfedme import followed, pulled
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import held_names, personal_names, trained_names
from cotune.privacy.auditing.canaries import Coins, PlantedCanaries, build_canaries, plant
from cotune.privacy.auditing.drawn_noise import DrawnNoise
from cotune.privacy.auditing.stepwise import log_likelihood_ratios
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.simulations.auditing.adversarial import Probe, probe_states
from cotune.simulations.auditing.released import Subject, draw_noise, watch
from cotune.strategies.types import Delta, difference

Losses = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Attach = Callable[[torch.optim.Optimizer, dict[str, nn.Parameter]], AbstractContextManager[None]]  # what belongs to steps
_IDLE = 4096  # coordinates in which nobody has a gradient
_STEP = 1e-2  # of the delta, to either side, in the difference quotient of the losses


@dataclass(frozen=True)
class Targets:
    """Who is in by a coin: all canaries, and the units numbered `records` and `sentences`."""

    canaries_in: Coins
    records: Numbers
    records_in: Coins
    sentences: Numbers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    sentences_in: Coins = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def present(self, units: int) -> Coins:
        """(n,), which of all units are in: those without a coin are."""
        everybody = np.ones(units, dtype=bool)
        everybody[self.records] = self.records_in
        everybody[self.sentences] = self.sentences_in
        return everybody

    @property
    def added(self) -> int:
        """How many units the organization does not have."""
        return len(self.canaries_in) + len(self.sentences)


class AuditedTraining:
    """The organization's rounds with the targets among its records, and the attacks' scores, round by round.

    Every record enters a batch with the q, and noise is added with the σ, of the organization's real run. Canaries are rows on
    top: B, by which sums are divided, grows with them, and nothing else.
    """

    def __init__(
        self,
        plan: Plan,
        privacy: RecordPrivacy,
        dataset: Dataset,
        organization: str,
        targets: Targets,
        sigma: float,
        model: TrainableModel,
        error: float,
        examples: int,
    ) -> None:
        self.plan = plan
        self.privacy = privacy
        self.dataset = dataset
        self.organization = organization
        self.targets = targets
        self.sigma = sigma
        self.model = model
        self.examples = examples
        self.error = error / len(plan.stages)  # allowed for the test of the noise, in each stage
        self.canaries = build_canaries(len(targets.canaries_in), model.device)
        self.state: State = {}
        self.copy: State = {}  # of a plan in which each organization has one
        self.record_scores = np.zeros(len(targets.records))
        self.step_scores = np.zeros(len(targets.canaries_in))  # log-likelihood ratios, of who sees every step
        self.noise: list[DrawnNoise] = []  # of each stage
        self.probes: list[Probe] = []
        self._looked_at: Stage | None = None
        self.taken: Counter[float] = Counter()  # sample rate -> steps that were taken with it

    def canary_scores(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """How far each canary's parameter went down its line, over all rounds."""
        moved: np.ndarray[Any, np.dtype[np.float64]] = self.canaries.weight.detach()[1:, 0].double().cpu().numpy()
        return -moved

    def play(self, round: int) -> None:
        stage = self.plan.get_stage(round)
        model = self.model
        model.load(self.state)
        names = held_names(self.plan, trained_names(self.plan, model, round), self.dataset.tasks)
        model.train_only(names)
        batch = stage.local.sample_rate(self.examples) * self.examples
        setting = build_setup(self.plan, stage, model, self.dataset, self.state, self.organization, expected_batch=batch)
        before = model.state(names)
        if stage != self._looked_at:
            self._look_inside(stage, setting, names)
            self._looked_at = stage
        for trained, steps in self._in_order(stage, names, round):
            self._train(stage, setting, trained, steps, self._attach)
        after = model.state(names)
        everything = dict(zip(names, model.train_only(names), strict=True))
        self.record_scores += self._alignment(setting, everything, before, difference(after, before))
        if self.plan.personal.method == "ditto" and self.plan.personal.noise:
            self._train_copy(stage, setting, before)
        self.state |= after

    def _in_order(self, stage: Stage, names: list[str], round: int) -> list[tuple[list[str], int]]:
        """What is trained one after the other, and in how many steps: own parts first, where the plan says so."""
        steps = stage.local.steps_per_round(self.examples)
        if self.plan.personal.order != "own_first":
            return [(names, steps)]
        own = set(personal_names(self.plan, self.model, round))
        count = self.plan.personal.count_own_steps(steps)
        return [([n for n in names if n in own], count), ([n for n in names if n not in own], steps)]

    @contextmanager
    def _attach(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """During the block a copy trains that the shared model follows, where the plan says so; it is the model afterwards."""
        if self.plan.personal.method != "pfedme":
            yield
            return
        shared = {name: p.detach().clone() for name, p in parameters.items()}
        with followed(optimizer, parameters, shared, self.plan.personal):
            yield
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(shared[name])

    def _train_copy(self, stage: Stage, setting: TrainingSetup, received: State) -> None:
        """The steps of an own copy, which are charged as those of the shared model are."""
        self.model.load({**self.state, **received, **self.copy})

        def attach(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> AbstractContextManager[None]:
            toward = {name: received[name].to(p.device, p.dtype) for name, p in parameters.items()}
            return pulled(optimizer, parameters, toward, self.plan.personal.pull)

        self._train(stage, setting, list(received), stage.local.steps_per_round(self.examples), attach)
        self.copy |= self.model.state(received)

    def _planted(self, setting: TrainingSetup, canaries: nn.Embedding, canaries_in: Coins) -> PlantedCanaries:
        return plant(
            setting.module,
            setting.units,
            setting.batches,
            setting.loss,
            canaries=canaries,
            canaries_in=canaries_in,
            units_in=self.targets.present(len(setting.units)),
            clip_norm=self.privacy.clip_norm,
            rows_each=self.privacy.max_records or 1,
        )

    def _mechanism(self, stage: Stage, steps: int | None = None) -> DPSGDConfig:
        """B counts canaries and sentences too, and nothing else follows them."""
        rate = stage.local.sample_rate(self.examples)
        batch = rate * (self.examples + self.targets.added)
        steps = steps or stage.local.steps_per_round(self.examples)
        return DPSGDConfig(self.sigma, self.privacy.clip_norm, rate, batch, steps, self.privacy.clipping)

    def _look_inside(self, stage: Stage, setting: TrainingSetup, names: list[str]) -> None:
        """Once in each stage: the noise of its steps, and what adversarial states do."""
        mechanism = self._mechanism(stage)
        idle = build_canaries(_IDLE, self.model.device)  # more coordinates to draw noise in
        planted = self._planted(setting, idle, np.zeros(_IDLE, dtype=bool))
        subject = Subject(DPSGD, planted.module, planted.loss, setting.units, planted.batches)
        self.noise.append(draw_noise(subject, mechanism, self.error))
        self.probes += probe_states(DPSGD, self.plan, stage, self.model, names, self.state, self.dataset, mechanism)

    def _train(self, stage: Stage, setting: TrainingSetup, names: list[str], count: int, attach: Attach) -> None:
        parameters = self.model.train_only(names)
        planted = self._planted(setting, self.canaries, self.targets.canaries_in)
        mechanism = self._mechanism(stage, count)
        optimizer = build_optimizer(stage.local, self.model, names, parameters)
        optimizer.add_param_group({"params": [planted.canaries], "lr": optimizer.param_groups[-1]["lr"]})  # as the head
        watch(optimizer, planted.canaries, mechanism.expected_batch, lambda sums: self._see(sums, mechanism))
        steps = DPSGDSetup(planted.module, optimizer, planted.loss, planted.units, planted.batches)
        with attach(optimizer, dict(zip(names, parameters, strict=True))):
            for _ in DPSGD(mechanism).run(steps):
                self.taken[mechanism.sample_rate] += 1

    def _see(self, sums: Tensor, mechanism: DPSGDConfig) -> None:
        """The sums of one step in the canaries' coordinates."""
        seen = sums[1:, 0].cpu().numpy() / mechanism.clip_norm
        self.step_scores += log_likelihood_ratios(seen, mechanism.noise_multiplier, mechanism.sample_rate)

    def find_losses(self, dataset: Dataset) -> Losses:
        """(n,), the loss of each record of a data set under the model as it is trained so far."""
        stage = self.plan.get_stage(self.plan.rounds)
        model = self.model
        model.load(self.state)
        model.train_only(trained_names(self.plan, model, self.plan.rounds))
        setting = build_setup(self.plan, stage, model, dataset, self.state, self.organization, expected_batch=1.0)
        return _find_losses(setting, range(len(dataset)))

    @torch.no_grad()
    def _alignment(
        self, setting: TrainingSetup, parameters: dict[str, nn.Parameter], before: State, delta: Delta
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """<Δ, −∇ℓ_i(θ)> for each target unit, θ being what the round began with: how much Δ was to its liking.

        By a central difference of the losses along Δ, which asks nothing of the architecture.
        """
        targets = [setting.units[int(i)] for i in self.targets.records]
        rows = [row for unit in targets for row in unit]
        owners = np.repeat(np.arange(len(targets)), [len(unit) for unit in targets])

        def losses(along: float) -> np.ndarray[Any, np.dtype[np.float64]]:
            for name, parameter in parameters.items():
                parameter.copy_(before[name] + along * delta[name])
            found = _find_losses(setting, rows)
            return np.asarray(np.bincount(owners, weights=found, minlength=len(targets)), dtype=np.float64)

        return (losses(-_STEP) - losses(_STEP)) / (2 * _STEP)


@torch.no_grad()
def _find_losses(setting: TrainingSetup, rows: Sequence[int]) -> Losses:
    """The losses of rows, in float32 arithmetic."""
    found = np.zeros(len(rows))
    for positions, batch in setting.batches(rows):
        found[list(positions)] = setting.exact(batch)[: len(positions)].double().cpu().numpy()
    return found
