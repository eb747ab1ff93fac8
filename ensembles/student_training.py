"""Distillation: a student model learns to predict what one or several teachers predict on public inputs.

The loss of an answer is α · CE(y, q) + (1 − α) · T² · KL(p_T ‖ q_T), with p_T and q_T the teacher's and the student's
probabilities at temperature T (Hinton, Vinyals & Dean, 2015, https://arxiv.org/abs/1503.02531, section 2), or with the mean
squared difference of centered scores in place of the second term (Ba & Caruana, NeurIPS 2014, equation 1; Kim et al., IJCAI 2021,
https://arxiv.org/abs/2105.08919).

Teachers may have other architectures and tokenizers than the student. Where they were trained with differential privacy and the
inputs are public, the student is post-processing of what was released, and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.config import DistillationConfig
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.evaluation.predictor import compute_answer_scores
from cotune.models.trainable import State, TrainableModel

Score = Callable[[Sequence[int]], Tensor]  # of the inputs at some rows, (answers, classes), with gradients

_MIN_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Lessons:
    """What a student learns from.

    Attributes:
        inputs: Public inputs.
        taught: (answers, classes) the teacher's probabilities for each input; rows of NaN where it could not read.
        truth: (answers,) class numbers for each input; None without labels.
    """

    inputs: Sequence[Input]
    taught: Sequence[Floats]
    truth: Sequence[Numbers] | None = None

    def select(self, rows: Sequence[int]) -> Lessons:
        """Those of some inputs."""
        truth = None if self.truth is None else [self.truth[row] for row in rows]
        return Lessons([self.inputs[row] for row in rows], [self.taught[row] for row in rows], truth)


def distillation_loss(scores: Tensor, taught: Tensor, truth: Tensor | None, config: DistillationConfig) -> Tensor:
    """Return the mean loss of some answers, as in the head of this module.

    Args:
        scores: (n, classes) of the student.
        taught: (n, classes) the teacher's probabilities.
        truth: (n,) class numbers; needed where `label_weight` is above 0.
        config: Loss, temperature and weight.
    """
    return answer_losses(scores, taught.clamp(min=_MIN_PROBABILITY).log(), truth, config).mean()


def answer_losses(scores: Tensor, logs: Tensor | None, truth: Tensor | None, config: DistillationConfig) -> Tensor:
    """Return the loss of each answer, (n,), as in the head of this module.

    Args:
        scores: (n, s) of the student. Where s is above the number of classes, no answer is ever one of those behind.
        logs: (n, classes) logarithms of the teacher's probabilities; None where only the truth is learned.
        truth: (n,) class numbers; needed where `label_weight` is above 0.
        config: Loss, temperature and weight.
    """
    if logs is None:
        assert truth is not None, "something to learn from"
        return functional.cross_entropy(scores, truth, reduction="none")
    matched = _match(scores, logs, config)
    if truth is None or not config.label_weight:
        return matched
    crossed = functional.cross_entropy(scores, truth, reduction="none")
    return config.label_weight * crossed + (1 - config.label_weight) * matched


def _match(scores: Tensor, logs: Tensor, config: DistillationConfig) -> Tensor:
    """How far the student's scores are from the teacher's, (n,)."""
    classes = logs.shape[1]
    if config.loss == "mse":
        theirs = logs - logs.mean(dim=1, keepdim=True)
        ours = scores[:, :classes] - scores[:, :classes].mean(dim=1, keepdim=True)
        return (ours - theirs).square().mean(dim=1)
    t = config.temperature
    theirs = functional.log_softmax(logs / t, dim=1)
    ours = functional.log_softmax(scores / t, dim=1)[:, :classes]
    return t * t * functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


def train_student(
    student: TrainableModel,
    lessons: Lessons,
    config: DistillationConfig,
    *,
    start: State,
    done: int,
    keep: Callable[[int, State], None] = lambda done, state: None,
    names: Sequence[str] | None = None,
    score: Score | None = None,
) -> State:
    """Train a student, pass by pass; the same lessons, settings and start give the same student.

    Args:
        student: The model, which is left in the final state.
        lessons: What to learn from.
        config: How.
        start: The state to go on from.
        done: Passes that this state has behind it.
        keep: Called after each pass with its number, from 1, and the state.
        names: The parameters that are trained; None: those of `config.train`.
        score: Gives the student's scores of inputs; None: by the whole model.

    Returns:
        The trained parameters.
    """
    names = student.names(config.train) if names is None else names
    score = score or score_by_model(student, student.loaded.encode_unlabeled(lessons.inputs))

    def add_gradients(rows: Sequence[int]) -> bool:
        loss = _batch_loss(score(rows), lessons.select(rows), config)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss is not None

    return train_in_passes(student, len(lessons.inputs), config, add_gradients, names=names, start=start, done=done, keep=keep)


def train_in_passes(
    student: TrainableModel,
    count: int,
    config: DistillationConfig,
    add_gradients: Callable[[Sequence[int]], bool],
    *,
    names: Sequence[str],
    start: State,
    done: int,
    keep: Callable[[int, State], None],
) -> State:
    """Train a student by AdamW, each pass over all rows in an order of its own.

    Args:
        student: The model, which is left in the final state.
        count: How many rows there are.
        config: Passes, steps and rate.
        add_gradients: Adds the gradients of the loss on some rows to those of the parameters; False where there is no loss.
        names: The parameters that are trained.
        start: The state to go on from.
        done: Passes that this state has behind it.
        keep: Called after each pass with its number, from 1, and the state.

    Returns:
        The trained parameters.
    """
    student.load(start)
    state = start
    for epoch in range(done, config.epochs):
        parameters = student.train_only(names)
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        batches = list(_shuffled(count, config, epoch))
        for step, rows in enumerate(batches):
            _set_rate(optimizer, config, 1 - (epoch + step / len(batches)) / config.epochs)
            optimizer.zero_grad()
            if add_gradients(rows):
                optimizer.step()
        state = student.state(names)
        keep(epoch + 1, state)
    return state


def score_by_model(student: TrainableModel, examples: Sequence[Example]) -> Score:
    """Return what gives the scores of some examples by the whole model, in the state that it then has."""
    return lambda rows: torch.cat(compute_answer_scores(student, [examples[row] for row in rows]))


def _batch_loss(scores: Tensor, lessons: Lessons, config: DistillationConfig) -> Tensor | None:
    """The mean over the answers that both teacher and student can give; None where there is none."""
    taught = torch.from_numpy(np.concatenate(lessons.taught)).to(scores)
    truth = None if lessons.truth is None else torch.from_numpy(np.concatenate(lessons.truth)).to(scores.device)
    both = ~(scores.detach().isnan().any(dim=1) | taught.isnan().any(dim=1))
    if not bool(both.any()):
        return None
    return distillation_loss(scores[both], taught[both], None if truth is None else truth[both], config)


def _shuffled(count: int, config: DistillationConfig, epoch: int) -> Iterator[list[int]]:
    """The rows of each batch of a pass, in an order of its own."""
    generator = torch.Generator().manual_seed(parameter_seed(config.seed, f"distillation/{epoch}"))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return (order[start : start + config.batch_size] for start in range(0, count, config.batch_size))


def _set_rate(optimizer: torch.optim.Optimizer, config: DistillationConfig, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * share
