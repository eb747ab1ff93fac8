"""The plan's public inputs at the server: what the models of a round predict for them, and training on such predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cotune.data.tasks.text import Example
from cotune.data.types import Input, answer_count
from cotune.data.unlabeled import inputs_hash, read_unlabeled
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.distillation import Lessons, Score, score_by_model, train_student
from cotune.errors import DataError
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.features.cached import encode_batch
from cotune.models.features.head import feature_head
from cotune.models.trainable import State, TrainableModel
from cotune.plan.schema import Plan
from cotune.strategies.types import Delta, PublicInputs, apply_delta, difference

_BATCH = 64  # inputs at a time, where the whole model predicts


def read_public_inputs(plan: Plan, folder: Path) -> tuple[Input, ...]:
    """Return the plan's public inputs, without those that cannot be used; nothing where it names none.

    Args:
        plan: The plan.
        folder: That `public.source` is relative to.

    Raises:
        DataError: They cannot be read, there are none, or they are others than those that the plan was made with.
    """
    public = plan.public
    if not public.source:
        return ()
    path = folder / Path(public.source).expanduser()
    rows = read_unlabeled(path, plan.task, column=public.column, encoding=public.encoding)
    found = tuple(row.given for row in rows if row.given is not None)
    if not found:
        raise DataError(f"{path} holds no inputs that can be used: expected public inputs", code="data.no_records")
    if public.sha256 and (digest := inputs_hash(found)) != public.sha256:
        raise DataError(
            f"the public inputs in {path} have the hash {digest[:12]}…, expected {public.sha256[:12]}… (public.sha256): restore"
            " the file, or start a new run",
            code="data.changed",
        )
    return found


class PublicPredictions:
    """What models that differ in trained parameters predict for public inputs. The last encoder's features are kept."""

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
        """Return the trained parameters after training a model on what was taught, see `strategies.types.PublicInputs`."""
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
            self._features = encode_batch(self._model, self._examples, self._precision)
            self._encoder = encoder
        return self._features


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
