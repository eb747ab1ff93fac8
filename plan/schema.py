"""The plan: all its tables, its strategy, and what they must be together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationInfo, model_validator

from cotune.data.class_names import is_shown, shown
from cotune.data.config import has_classes, has_labels, keeps_head
from cotune.data.multi_task import is_multi_task, task_of
from cotune.errors import nearest
from cotune.plan.local_training import Stage
from cotune.plan.several_tasks import find_problems
from cotune.plan.tables import PlanTables
from cotune.privacy.config import RecordPrivacy
from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig, expand, is_complete


class Plan(PlanTables):
    """What everybody agrees on. `plan_id` is the hash of its canonical form."""

    strategy: StrategyConfig = StrategyConfig()

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, table: Any) -> Any:
        """`strategy = "fedadam"` is written out."""
        return expand(table) if isinstance(table, Mapping) else table

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: expected distinct class names, got {list(self.labels)}")
        return self

    @model_validator(mode="after")
    def _task_has_what_is_asked(self) -> Self:
        problems = {
            "labels": bool(self.labels) and not has_labels(self.task),
            "class_weights": bool(self.class_weights) and not has_labels(self.task),
            "tell.label_histogram": self.tell.label_histogram and not has_classes(self.task),
            "public.source": bool(self.public.source) and not has_classes(self.task),
        }
        for key, given in problems.items():
            if given:
                raise ValueError(f"{key} is for classes, and the records of task = {self.task} have none: leave it out")
        if keeps_head(self.task) and any(stage.mode == "head" for stage in self.stages):
            raise ValueError(
                f"train = head trains a new head, and task = {self.task} keeps that of its base model: expected train = lora"
            )
        return self

    @model_validator(mode="after")
    def _translations_have_prompts(self) -> Self:
        if self.task == "seq2seq" and self.data.prompt is None:
            raise ValueError("task = seq2seq reads a text and writes another one: expected data.prompt and data.target")
        return self

    @model_validator(mode="after")
    def _only_prompts_leave_targets(self) -> Self:
        if self.task != "causal-lm" and self.model.max_target_length is not None:
            raise ValueError(f"model.max_target_length is for task = causal-lm, and this is {self.task}: leave it out")
        return self

    @model_validator(mode="after")
    def _numbers_have_a_range(self) -> Self:
        if self.task == "regression" and self.model.target_range is None:
            raise ValueError(
                "task = regression needs the least and the largest number, which no records may decide: expected"
                " model.target_range = [LOW, HIGH]"
            )
        if self.task != "regression" and self.model.target_range is not None:
            raise ValueError(f"model.target_range is for task = regression, and this is {self.task}: leave it out")
        return self

    @model_validator(mode="after")
    def _feature_can_be_had(self) -> Self:
        if self.model.feature is None:
            return self
        if self.task != "sequence-classification":
            raise ValueError(f"model.feature is for task = sequence-classification, got {self.task}: leave it out")
        if any(stage.mode != "head" for stage in self.stages):
            raise ValueError(
                "model.feature is of an encoder that nobody trains: expected train = head in all rounds, or leave it out"
            )
        if self.model.pooling != "auto":
            raise ValueError(
                f"model.feature says what a head reads, and so does model.pooling = {self.model.pooling}: expected one"
            )
        return self

    @model_validator(mode="after")
    def _tasks_can_share(self) -> Self:
        if is_multi_task(self.task) != bool(self.tasks):
            raise ValueError(f"task = {self.task} is for plans with [[tasks]]: expected both, or neither")
        if not self.tasks:
            if self.simulation.tasks or self.data.tasks:
                raise ValueError("simulation.tasks and data.tasks are for plans with [[tasks]]: expected neither")
            return self
        problem = next(find_problems(self.tasks, [stage.mode for stage in self.stages], self.simulation.tasks), None)
        if problem:
            raise ValueError(problem)
        cannot = {
            "a [personal] table, or lora.keep": self.keeps_personal,
            "client_privacy, which divides by a number of organizations, while some train a head": bool(self.client_privacy),
            'server.late = "fold"': self.server.late == "fold",
            "tell.label_histogram, which counts one class of a record": self.tell.label_histogram,
        }
        for what, found in cannot.items():
            if found:
                raise ValueError(f"[[tasks]] is not supported with {what}: leave out one of the two")
        return self

    @model_validator(mode="after")
    def _writing_needs_prompts(self) -> Self:
        if self.generate is not None and (self.task != "causal-lm" or self.data.prompt is None):
            raise ValueError(
                f"generate is for a task that writes after prompts, and this plan has task = {self.task} without data.prompt:"
                " expected task = causal-lm with data.prompt and data.target, or leave the table out"
            )
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
        if self.personal.keeps_copy and self.mixed_ranks:
            raise ValueError("an own copy of the model has the plan's rank: expected no smaller ranks, or personal.parts")
        return self

    @model_validator(mode="after")
    def _shared_part_reads_nothing_without_noise(self) -> Self:
        """Gradients of the shared part follow from personal parts: one record in them would move all gradients of a batch."""
        if self.keeps_parts and not self.personal.noise and isinstance(self.privacy, RecordPrivacy):
            raise ValueError(
                "personal.noise = false, and the gradients of what is shared follow from the personal parts, so that a single"
                " record would show in all of them, past clip norm and noise: expected personal.noise = true, or"
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
        if per_layer and any(stage.mode == "full" for stage in self.stages):
            raise ValueError("privacy.clipping: per_layer is not supported with train = full, expected flat")
        return self

    def weights_of_classes(self) -> tuple[float, ...] | None:
        """Return `class_weights` in the order of the labels, times the weight of their task; None where all count the same.

        Raises:
            ValueError: For a weight of a class that is none of the labels.
        """
        unknown = [name for name in self.class_weights if name not in self.labels]
        if unknown:
            raise ValueError(
                f"class_weights: there is no class {shown(unknown[0])}{nearest(unknown[0], filter(is_shown, self.labels))}"
            )
        found = tuple(self.class_weights.get(label, 1.0) for label in self.labels)
        if self.tasks:
            of_task = {task.name: task.weight for task in self.tasks}
            found = tuple(weight * of_task[task_of(label)] for weight, label in zip(found, self.labels, strict=True))
        return None if set(found) <= {1.0} else found

    @property
    def stages(self) -> tuple[Stage, ...]:
        if isinstance(self.train, tuple):
            return self.train
        return (Stage(mode=self.train, rounds=self.rounds, local=self.local),)

    def get_stage(self, round: int) -> Stage:
        """Return the stage that a round (from 1) belongs to, its local training with the learning rates of that round."""
        last = 0
        for stage in self.stages:
            done = round - 1 - last
            last += stage.rounds
            if 1 <= round <= last:
                return stage.model_copy(update={"local": stage.local.in_round(done, stage.rounds)})
        raise ValueError(f"expected a round from 1 to {last}, got {round}")

    @property
    def facts(self) -> PlanFacts:
        """What decides which strategies the plan can have."""
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
        )

    @property
    def uses_lora(self) -> bool:
        return any(stage.mode == "lora" for stage in self.stages)

    @property
    def mixed_ranks(self) -> bool:
        """Whether organizations may train smaller ranks than the plan's."""
        return self.uses_lora and (self.lora.smaller_ranks or any(rank < self.lora.rank for rank in self.simulation.ranks))

    @property
    def keeps_personal(self) -> bool:
        """Whether each organization has a model of its own."""
        return self.keeps_parts or self.personal.keeps_copy

    @property
    def keeps_parts(self) -> bool:
        """Whether organizations keep parts of what they train to themselves, so that there is no common model."""
        return self.lora.keep != "nothing" or bool(self.personal.parts)

    def charged_steps(self, stage: Stage, examples: int) -> int:
        """Return how many steps of DP-SGD a round of a stage takes at an organization, those of a copy with noise included."""
        steps = stage.local.steps_per_round(examples)
        return 2 * steps if self.personal.keeps_copy and self.personal.noise else steps

    def canonical(self) -> str:
        """The plan as JSON with sorted keys: the same text for the same plan."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @property
    def plan_id(self) -> str:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()
