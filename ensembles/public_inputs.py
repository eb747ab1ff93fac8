"""A plan's public inputs: predictions for them, the form in which these are shared, and training on combined predictions.

If predictions are shared instead of parameters (`collaboration = "predictions"`), they are one array, (answers, classes):

- `scores`: s = log p − mean over the classes of log p, cut to ±`public.max_score`. They are fused by the rules for parameters:
  the weighted mean is Σ w_k s_k, whose softmax is the normalized geometric mean of the probabilities.
- `votes`: 1 for the most probable class and 0 for all others; the weighted mean is each class's share of the votes.

A row of zeros has no effect: the model could not read the input, or abstains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cotune.data.config import TaskName
from cotune.data.tasks.text import Example
from cotune.data.types import Input, answer_count
from cotune.data.unlabeled import inputs_hash, read_unlabeled
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.student_training import Lessons, Score, score_by_model, train_student
from cotune.errors import DataError
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.features.cached import encode_batch, get_features
from cotune.models.features.head import feature_head
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.public import PublicConfig
from cotune.strategies.types import Delta, PublicInputs, apply_delta, difference

_ROUNDING = 2**-5
_BATCH = 64  # inputs at a time, where the whole model predicts


def read_public_inputs(plan: Plan, folder: Path) -> tuple[Input, ...]:
    """Return the plan's public inputs; nothing where it names none.

    Args:
        plan: The plan.
        folder: That `public.source` is relative to.

    Raises:
        DataError: See `read_inputs`.
    """
    if not plan.public.source:
        return ()
    return read_inputs(plan.public, plan.task, folder / Path(plan.public.source).expanduser())


def read_inputs(public: PublicConfig, task: TaskName, path: Path) -> tuple[Input, ...]:
    """Return the usable public inputs in a file or folder.

    Args:
        public: The plan's table.
        task: Of the plan.
        path: Of the file or folder.

    Raises:
        DataError: If they cannot be read, there are none, or they are not those of the plan.
    """
    rows = read_unlabeled(path, task, column=public.column, encoding=public.encoding)
    found = tuple(row.given for row in rows if row.given is not None)
    if not found:
        raise DataError(f"{path} holds no inputs that can be used: expected public inputs", code="data.no_records")
    if public.sha256 and (digest := inputs_hash(found)) != public.sha256:
        raise DataError(
            f"the public inputs in {path} have the hash {digest[:12]}…, expected {public.sha256[:12]}… (public.sha256): restore"
            " the file, or start a new run",
            code="data.changed",
        )
    if public.answers and (count := sum(map(answer_count, found))) != public.answers:
        raise DataError(
            f"the public inputs in {path} ask for {count} predictions, expected {public.answers} (public.answers): ask the"
            " coordinator for a plan that states both alike",
            code="data.changed",
        )
    return found


def pin_public(plan: Plan, folder: Path) -> Plan:
    """Return the plan with hash and number of its public inputs. Raises DataError where they cannot be read, or are others."""
    found = read_public_inputs(plan, folder)
    if not found:
        return plan
    pinned = {"sha256": inputs_hash(found), "answers": sum(map(answer_count, found))}
    return plan.model_copy(update={"public": plan.public.model_copy(update=pinned)})


def to_shared(scores: Tensor, public: PublicConfig) -> Tensor:
    """Return what travels of a model's scores, in float32.

    Args:
        scores: (answers, classes); rows of NaN where the model could not read an input.
        public: Says what travels, and how large it may be.
    """
    unread = scores.isnan().any(dim=1, keepdim=True)
    if public.share == "votes":
        shared = functional.one_hot(scores.nan_to_num().argmax(dim=1), scores.shape[1]).double()
    else:
        logs = functional.log_softmax(scores.double(), dim=1)
        shared = (logs - logs.mean(dim=1, keepdim=True)).clamp(-public.max_score, public.max_score)
    return shared.masked_fill(unread, 0.0).float()


def to_taught(shared: Tensor, public: PublicConfig) -> Tensor:
    """Return the probabilities (answers, classes) of fused predictions, in float64; rows of NaN without any prediction.

    Args:
        shared: (answers, classes), as fused.
        public: Says what travels.
    """
    values = shared.double()
    if public.share == "scores":
        silent = (values == 0).all(dim=1, keepdim=True)
        return functional.softmax(values, dim=1).masked_fill(silent, torch.nan)
    counts = values.clamp(min=0)
    return counts / counts.sum(dim=1, keepdim=True)  # 0 / 0 is NaN


def find_extreme_score(received: Tensor, delta: Tensor, public: PublicConfig) -> float | None:
    """Return the largest prediction that is out of bounds, as it was before the received ones were taken off; None: none is.

    Args:
        received: (answers, classes), what was fused in the round before.
        delta: The same shape, as it travels: bfloat16 moves a value by less than 2⁻⁷ of it, which is at most twice the bound.
        public: Says how large a prediction may be.
    """
    largest = float((received.double() + delta.double()).abs().max())
    return None if largest <= public.bound * (1 + _ROUNDING) else largest


def learning_config(public: PublicConfig) -> DistillationConfig:
    """Return how models learn what all predict together."""
    return DistillationConfig(
        temperature=public.temperature,
        learning_rate=public.learning_rate,
        epochs=public.epochs,
        batch_size=public.batch_size,
        weight_decay=0.0,
    )


class PublicPredictions:
    """Predicts public inputs with models that differ in trained parameters, and caches the features of the last encoder."""

    def __init__(self, model: TrainableModel, inputs: Sequence[Input], precision: str, seed: int) -> None:
        """Create it; nothing is computed yet.

        Args:
            model: The plan's.
            inputs: Public inputs, in a fixed order.
            precision: Of features, as `model.precision`.
            seed: The plan's.
        """
        self._model = model
        self._inputs = inputs
        self._precision = precision
        self._seed = seed
        self._encoder: list[Tensor] | None = None  # what was trained of the encoder that the features are of
        self._features = torch.empty(0)
        self._ends = np.cumsum([answer_count(given) for given in inputs])

    @cached_property
    def _examples(self) -> list[Example]:
        return self._model.loaded.encode_unlabeled(self._inputs)

    def of_round(self, number: int, state: State, names: Sequence[str]) -> PublicInputs:
        """Return the inputs as a round's strategy sees them.

        Args:
            number: The round.
            state: θ, as everybody received it.
            names: What is trained and shared in the round.
        """
        return _RoundInputs(self, number, state, names)

    def predict(self, state: State, names: Sequence[str]) -> Tensor:
        """Return the scores (answers, classes) in float64 of a model in a state that differs in `names` from others."""
        score = self._score(state, names)
        with torch.no_grad():
            parts = [score(range(start, end)) for start, end in self._ranges()]
        return torch.cat(parts).double().cpu()

    def distill(self, number: int, state: State, names: Sequence[str], taught: Tensor, config: DistillationConfig) -> State:
        """Train a model on target probabilities; see `strategies.types.PublicInputs.distill`.

        Args:
            number: Of the round, for the seed.
            state: Parameters to start from.
            names: Parameters to train.
            taught: Target probabilities (answers, classes); rows of NaN are left out.
            config: Of the training.

        Returns:
            The trained parameters.
        """
        score = self._score(state, names)
        lessons = Lessons(self._inputs, np.split(taught.numpy(), self._ends[:-1]))
        seeded = parameter_seed(self._seed, f"public/{number}")
        return train_student(self._model, lessons, replace(config, seed=seeded), start=state, done=0, names=names, score=score)

    def _ranges(self) -> list[tuple[int, int]]:
        count = len(self._inputs)
        return [(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]

    def _score(self, state: State, names: Sequence[str]) -> Score:
        """By the head alone, where nothing else is trained and it reads one vector; else by the whole model."""
        self._model.load(state)
        reader = feature_head(self._model)
        if reader is None or set(names) - set(self._model.names("head")):
            return score_by_model(self._model, self._examples)
        features = self._get_features(state)

        def score(rows: Sequence[int]) -> Tensor:
            chosen = [features[int(self._ends[row]) - answer_count(self._inputs[row]) : int(self._ends[row])] for row in rows]
            scores: Tensor = reader(torch.cat(chosen).to(self._model.device)).logits
            return scores

        return score

    def _get_features(self, state: State) -> Tensor:
        """The models of a round hold the very tensors that their encoders have in common."""
        encoder = [tensor for name, tensor in state.items() if name.startswith(self._model.prefix)]
        held = self._encoder
        if held is None or len(held) != len(encoder) or any(a is not b for a, b in zip(held, encoder, strict=True)):
            self._features = self._encode(state, is_trained=bool(encoder))
            self._encoder = encoder
        return self._features

    def _encode(self, state: State, *, is_trained: bool) -> Tensor:
        """Of an unchanged encoder they are kept on disk, for the next round, run and organization."""
        if is_trained:
            return encode_batch(self._model, self._examples, self._precision)
        return get_features(self._model, self._inputs, state, self._precision)


class _RoundInputs:
    """See `strategies.types.PublicInputs`."""

    def __init__(self, public: PublicPredictions, number: int, state: State, names: Sequence[str]) -> None:
        self._public = public
        self._number = number
        self._state = state
        self._names = names

    def predict(self, delta: Delta) -> Tensor:
        return self._public.predict(apply_delta(self._state, delta), self._names)

    def distill(
        self, delta: Delta, taught: Tensor, *, temperature: float, learning_rate: float, epochs: int, batch_size: int
    ) -> Delta:
        config = DistillationConfig(
            temperature=temperature, learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, weight_decay=0.0
        )
        names = list(delta)
        moved = self._public.distill(self._number, apply_delta(self._state, delta), names, taught, config)
        before = {name: self._state[name] for name in names}
        return {name: tensor.double() for name, tensor in difference({n: moved[n].double() for n in names}, before).items()}
