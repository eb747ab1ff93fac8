"""The plan: all its tables, its strategy, and the conditions between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from pydantic import ValidationInfo, model_validator

from cotune.data.class_names import is_shown, shown
from cotune.data.multi_task import task_of
from cotune.errors import nearest
from cotune.plan.local_training import Stage
from cotune.plan.public import find_problems as find_prediction_problems
from cotune.plan.public import find_strategy_problem
from cotune.plan.several_tasks import weigh_tasks
from cotune.plan.tables import PlanTables
from cotune.plan.task_rules import find_task_problems
from cotune.privacy.config import RecordPrivacy
from cotune.strategies.compatibility import PlanFacts, find_problem, is_plain
from cotune.strategies.config import StrategyConfig, expand, is_complete


class Plan(PlanTables):
    """What everybody agrees on. `plan_id` is the hash of its canonical form."""

    strategy: StrategyConfig = StrategyConfig()

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, table: Any) -> Any:
        """Replace a recipe such as `strategy = "fedadam"` by its components."""
        return expand(table) if isinstance(table, Mapping) else table

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: expected distinct class names, got {list(self.labels)}")
        return self

    @model_validator(mode="after")
    def _suits_its_task(self) -> Self:
        problem = next(find_task_problems(self, self.stages, keeps_personal=self.keeps_personal), None)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _weights_are_of_classes(self) -> Self:
        if self.labels:
            self.weights_of_classes()
        return self

    @model_validator(mode="after")
    def _sampling_fits_client_privacy(self) -> Self:
        if self.client_privacy and self.server.sample_size:
            raise ValueError(
                "client_privacy accounts for organizations that are asked by chance, independently, which server.sample_size does"
                " not do: expected server.sample_rate instead"
            )
        if self.client_privacy and self.client_privacy.amplification and self.server.sample_rate >= 1:
            raise ValueError(
                "client_privacy.amplification has nothing to account for where everybody is asked in every round: expected"
                " server.sample_rate below 1, or amplification = false"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_be_trained(self) -> Self:
        ranks = list(self.simulation.ranks)
        if ranks and not self.uses_lora:
            raise ValueError(f"simulation.ranks = {ranks} is for adapters, and no stage trains any: expected train = lora")
        if not all(1 <= rank <= self.lora.rank for rank in ranks):
            raise ValueError(f"simulation.ranks = {ranks}: expected each from 1 to lora.rank = {self.lora.rank}")
        return self

    @model_validator(mode="after")
    def _something_is_shared(self) -> Self:
        modes = tuple(stage.mode for stage in self.stages)
        problem = next(self.personal.find_problems(modes), None)
        if problem:
            raise ValueError(problem)
        if self.lora.keep == "nothing":
            return self
        if self.personal.any:
            raise ValueError('lora.keep = "b" keeps B and the head already: expected it, or a [personal] table')
        if self.lora.factors != "ab":
            raise ValueError(f'lora.keep = "b" shares A alone, and lora.factors = "{self.lora.factors}": expected "ab"')
        if any(stage.mode != "lora" for stage in self.stages):
            raise ValueError('lora.keep = "b" keeps the head of every organization apart: expected train = lora in all rounds')
        return self

    @model_validator(mode="after")
    def _copy_can_be_had(self) -> Self:
        personal = self.personal
        if (personal.keeps_copy or "adapter" in personal.parts) and self.mixed_ranks:
            kept = "copy of the model" if personal.keeps_copy else "adapter"
            raise ValueError(f"an own {kept} has the plan's rank: expected no smaller ranks, or other personal.parts")
        if personal.method == "pfedme" and self.strategy.client_term is not None:
            raise ValueError(
                'personal.method = "pfedme" trains a copy that the shared model follows, and a client term is about the'
                " gradients of the shared model: expected one of the two"
            )
        return self

    @model_validator(mode="after")
    def _shared_part_reads_nothing_without_noise(self) -> Self:
        """Refuse personal parts without noise whose values enter shared gradients: one record could change all of a batch's."""
        reads = self.keeps_parts or self.personal.read_by_shared
        if reads and not self.personal.noise and isinstance(self.privacy, RecordPrivacy):
            raise ValueError(
                "personal.noise = false, and what is shared follows from what is personal, so that a single record would show in"
                " it past clip norm and noise: expected personal.noise = true, or"
                ' personal.method = "ditto", whose copy the shared model never reads'
            )
        return self

    @model_validator(mode="after")
    def _strategy_fits(self, info: ValidationInfo) -> Self:
        if is_complete(info):
            return self
        problem = find_problem(self.strategy, self.facts)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _votes_can_have_noise(self) -> Self:
        pate = self.privacy.pate if isinstance(self.privacy, RecordPrivacy) else None
        if pate is None:
            return self
        problems = {
            'collaboration = "predictions" and public.share = "votes", as votes are all that leaves': (
                self.shares_predictions and self.public.share == "votes"
            ),
            "rounds = 1, as teachers learn nothing from each other": self.rounds == 1,
        }
        for expected, found in problems.items():
            if not found:
                raise ValueError(f"privacy.pate is for votes with noise, released once: expected {expected}")
        return self

    @model_validator(mode="after")
    def _predictions_can_be_shared(self) -> Self:
        if not self.shares_predictions:
            if self.simulation.bases:
                raise ValueError('simulation.bases is for collaboration = "predictions": leave it out')
            return self
        others = {
            "client_privacy, which bounds updates of parameters": self.client_privacy is not None,
            "a [personal] table or lora.keep, as every model is an organization's own": self.keeps_personal,
            "adapters of different ranks": self.mixed_ranks,
            'server.late = "fold", as what all predict changes from round to round': self.server.late == "fold",
            "disclosures.local_metrics, which are of a common model": self.disclosures.local_metrics,
            "wire = int8 or int4, as predictions are small already": self.wire in ("int8", "int4"),
            "wire_down, as what all predict is no change of a model": self.wire_down != "float32",
            "[[tasks]]": bool(self.tasks),
        }
        problem = next(find_prediction_problems(self.public, others), None) or find_strategy_problem(
            self.strategy.weighting.name,
            self.strategy.fusion.name,
            plain=is_plain(self.strategy.server_optimizer),
            client_term=self.strategy.client_term is not None,
        )
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _late_updates_can_be_folded(self) -> Self:
        if self.server.late != "fold":
            return self
        problems = {
            "client_privacy, which bounds what an organization adds to one round": self.client_privacy is not None,
            "several stages, as an update may come in the next one": len(self.stages) > 1,
            "personal parts, as what is kept is tied to a round": self.keeps_personal,
            "adapters of different ranks, as a rank may change in between": self.mixed_ranks,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f'server.late = "fold" is not supported with {problem}: expected late = "ignore"')
        return self

    @model_validator(mode="after")
    def _clipping_can_be_had(self) -> Self:
        per_layer = isinstance(self.privacy, RecordPrivacy) and self.privacy.clipping == "per_layer"
        whole = [stage.mode for stage in self.stages if stage.mode in ("blocks", "full")]
        if per_layer and whole:
            raise ValueError(f"privacy.clipping: per_layer is not supported with train = {whole[0]}, expected flat")
        return self

    def weights_of_classes(self) -> tuple[float, ...] | None:
        """Return `class_weights` in the order of the labels, times the weight of their task; None if all are equal.

        Raises:
            ValueError: If a weight is given for a class that is not among the labels.
        """
        unknown = [name for name in self.class_weights if name not in self.labels]
        if unknown:
            raise ValueError(
                f"class_weights: there is no class {shown(unknown[0])}{nearest(unknown[0], filter(is_shown, self.labels))}"
            )
        found = tuple(self.class_weights.get(label, 1.0) for label in self.labels)
        if self.tasks:
            of_task = weigh_tasks(self.tasks, self.labels, self.balance)
            found = tuple(weight * of_task[task_of(label)] for weight, label in zip(found, self.labels, strict=True))
        return None if set(found) <= {1.0} else found

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in their order; a plan with a single `train` mode has one."""
        if isinstance(self.train, tuple):
            return self.train
        return (Stage(mode=self.train, rounds=self.rounds, local=self.local, layers=self.layers),)

    def get_stage(self, round: int) -> Stage:
        """Return the stage of a round (from 1), with the learning rates of that round."""
        number, stage = self._last_stage
        if number != round:
            stage = self._find_stage(round)
            self.__dict__["_last_stage"] = round, stage
        return stage

    @cached_property
    def _last_stage(self) -> tuple[int, Stage]:
        """Cache of the last requested round and its stage, as the same round is requested many times."""
        return 1, self._find_stage(1)

    def _find_stage(self, round: int) -> Stage:
        last = 0
        for stage in self.stages:
            done = round - 1 - last
            last += stage.rounds
            if 1 <= round <= last:
                return stage.model_copy(update={"local": stage.local.in_round(done, stage.rounds)})
        raise ValueError(f"expected a round from 1 to {last}, got {round}")

    @property
    def physical_rows(self) -> int | None:
        """Records that the last stage holds in memory at a time; None where each device finds them."""
        rows = self.stages[-1].local.physical_batch_size
        return None if rows == "auto" else rows

    @property
    def facts(self) -> PlanFacts:
        """What the plan demands of its strategy."""
        locals_ = [stage.local for stage in self.stages]
        return PlanFacts(
            record_privacy=self.privacy != "none",
            client_privacy=self.client_privacy is not None,
            sums_only=self.server.visibility == "sum",
            participation=self.server.sample_rate,
            organizations=self.server.sample_size or None,
            optimizers=tuple(local.optimizer for local in locals_),
            momentum=any(local.optimizer == "sgd" and local.momentum > 0 for local in locals_),
            same_steps=all(local.epochs is None for local in locals_),
            one_rate=all(local.head_learning_rate in (None, local.learning_rate) for local in locals_),
            modes=tuple(stage.mode for stage in self.stages),
            factors=self.lora.factors if self.uses_lora else None,
            mixed_ranks=self.mixed_ranks,
            personal=self.keeps_parts,
            server_data=self.validation_fraction > 0,
            public_inputs=bool(self.public.source),
            folds_late=self.server.late == "fold",
            several_tasks=bool(self.tasks),
            quantized=self.model.quantization != "none",
            plain_steps=not any(local.base_decay for local in locals_) and self.personal.method != "pfedme",
        )

    @property
    def shares_predictions(self) -> bool:
        """Whether organizations train separate models and share predictions for public inputs instead of parameters."""
        return self.collaboration == "predictions"

    @property
    def uses_lora(self) -> bool:
        """Whether a stage trains adapters."""
        return any(stage.mode == "lora" for stage in self.stages)

    @property
    def mixed_ranks(self) -> bool:
        """Whether organizations may train smaller ranks than the plan's."""
        return self.uses_lora and (self.lora.smaller_ranks or any(rank < self.lora.rank for rank in self.simulation.ranks))

    @property
    def keeps_personal(self) -> bool:
        """Whether each organization has a personal model."""
        return self.keeps_parts or self.personal.keeps_copy

    @property
    def keeps_parts(self) -> bool:
        """Whether organizations keep parts of what they train to themselves, so that there is no common model."""
        return self.lora.keep != "nothing" or bool(self.personal.parts)

    def charged_steps(self, stage: Stage, examples: int) -> int:
        """Return the number of DP-SGD steps that a round is charged for, including steps on personal parts only.

        Noisy votes are charged as an equivalent number of steps (see `charged_rate`).

        Args:
            stage: Of the round.
            examples: Number of the organization's records.
        """
        if isinstance(self.privacy, RecordPrivacy) and self.privacy.pate is not None:
            return self.privacy.pate.charged_steps(self.public.answers)
        return self.personal.count_charged_steps(stage.local.steps_per_round(examples))

    def charged_rate(self, stage: Stage, examples: int) -> float:
        """Return the sample rate of a charged step; 1 for noisy votes, as every record has a teacher that votes."""
        if isinstance(self.privacy, RecordPrivacy) and self.privacy.pate is not None:
            return 1.0
        return stage.local.sample_rate(examples)

    def canonical(self) -> str:
        """Return the plan as JSON with sorted keys; equal plans give the same text."""
        return self._text

    @property
    def plan_id(self) -> str:
        """SHA-256 of the canonical form."""
        return self._hash

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    def __copy__(self) -> Self:
        """Return a copy without cached values, as `model_copy` changes it afterwards."""
        copied = super().__copy__()
        for name in ("_text", "_hash", "_last_stage", "stages"):
            copied.__dict__.pop(name, None)
        return copied
