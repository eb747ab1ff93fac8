"""The loss of each target token of a text between a student and its teachers, and its gradients, without all scores in memory.

Of target token t after y_<t the loss is that of an answer (`student_training`), with the tokens of the vocabulary as its classes:
α · −log q(y_t) + (1 − α) · T² · KL(p_T ‖ q_T) (word-level knowledge distillation, Kim & Rush, EMNLP 2016,
https://arxiv.org/abs/1606.07947, section 3.1). Several teachers are one, whose probability is the mean of theirs.

A teacher and a student of 49,152 tokens give 3 GB of scores in float32 for 8 records of 1,024 target tokens, before softmax and
gradients. So scores are made for some tokens at a time from the hidden states of all models, with the gradient for the student's
hidden states, and forgotten.

Tables of models are often padded to a multiple of 64 or 128: scores behind the smallest table mean no token. A teacher's are left
out, and a student's are learned to be improbable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.token_losses import has_plain_output, hidden_states
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.student_training import answer_losses
from cotune.errors import ModelError, RunError

_MAX_SCORES = 2**23  # entries of one model's scores that are in memory at a time: 32 MiB in float32


@dataclass(frozen=True)
class TokenStates:
    """What a model says of n target tokens, before it is turned into scores.

    Attributes:
        rows: (n, d) hidden states; scores themselves, of an architecture whose scores are made otherwise.
        score: (m, d) -> (m, v) scores of some rows.
    """

    rows: Tensor
    score: Callable[[Tensor], Tensor]

    def scores(self, part: slice) -> Tensor:
        """Return the scores of some rows in float32, (m, v)."""
        return self.score(self.rows[part]).float()


def read_states(module: nn.Module, batch: Batch) -> TokenStates:
    """Return the states at the positions that have a label, row after row.

    Args:
        module: A language model of transformers.
        batch: With labels (b, l); IGNORED at a position without one.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    there = batch["labels"] != IGNORED
    if has_plain_output(module):
        return TokenStates(hidden_states(module, inputs)[there], cast(Any, module).get_output_embeddings())
    return TokenStates(cast(Any, module)(**inputs, use_cache=False).logits[there], lambda rows: rows)


def add_token_gradients(
    student: TokenStates,
    teachers: Sequence[TokenStates],
    tokens: Tensor,
    weights: Tensor,
    config: DistillationConfig,
    shares: Sequence[float] = (),
    *,
    most: int = _MAX_SCORES,
) -> Tensor:
    """Add the gradients of a weighted sum of losses to the student's parameters.

    Args:
        student: With gradients.
        teachers: Without; not needed where `label_weight` is 1.
        tokens: (n,) the target tokens.
        weights: (n,) of each token's loss.
        config: Loss, temperature and weight of the target.
        shares: See `mean_logs`.
        most: Entries of one model's scores that are in memory at a time.

    Returns:
        The sum.

    Raises:
        ModelError: When a teacher's scores are no numbers.
        RunError: When the student's loss is none.
    """
    total = weights.new_zeros(())
    slopes = []
    for part in score_parts([student], len(tokens), most):
        leaf = student.rows[part].detach().requires_grad_()
        scores = student.score(leaf).float()
        said = [] if config.label_weight == 1 else [teacher.scores(part) for teacher in teachers]
        logs = mean_logs(said, scores.shape[1], shares) if said else None
        losses = answer_losses(scores, logs, tokens[part], config)
        loss = (losses * weights[part]).sum()
        _check_student(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        slopes.append(cast(Tensor, leaf.grad))
        total = total + loss.detach()
    if student.rows.requires_grad:
        student.rows.backward(torch.cat(slopes))  # type: ignore[no-untyped-call]
    return total


def mean_logs(scores: Sequence[Tensor], size: int, shares: Sequence[float] = ()) -> Tensor:
    """Return the logarithm of the mean probability that models give each token, (n, v) with the v tokens of the smallest table.

    Args:
        scores: (n, v_k) of each model, in float32.
        size: Of the student's table.
        shares: Of each model in the mean, together 1; empty: all alike.

    Raises:
        ModelError: When they are no numbers.
    """
    size = min(size, *(each.shape[1] for each in scores))
    logs = torch.stack([functional.log_softmax(each[:, :size], dim=1) for each in scores])
    if not bool(logs.isfinite().all()):
        raise ModelError(
            "a model that is learned from, or fused, gives a token a score that is no finite number: expected numbers; leave this"
            " model out",
            code="model.teacher_not_finite",
        )
    weights = logs.new_tensor(shares or [1 / len(scores)] * len(scores))
    return (logs + weights.log()[:, None, None]).logsumexp(dim=0)


@torch.no_grad()
def compare_tokens(
    student: TokenStates,
    teachers: Sequence[TokenStates],
    tokens: Tensor,
    shares: Sequence[float] = (),
    *,
    most: int = _MAX_SCORES,
) -> dict[str, Tensor]:
    """Return (n,) figures of each target token in float64.

    Args:
        student: In the state that is measured.
        teachers: Of which it learns.
        tokens: (n,) the target tokens.
        shares: See `mean_logs`.
        most: Entries of one model's scores that are in memory at a time.

    Returns:
        `student` and `teacher`: −log of the token's probability, in nats; `student_right` and `teacher_right`: 1 where it is
        the most probable one; `agreement`: 1 where both have the same most probable one; `kl`: KL(teacher ‖ student).
    """
    parts = [_compare(student, teachers, tokens[part], shares, part) for part in score_parts([student], len(tokens), most)]
    return {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}


def _compare(
    student: TokenStates, teachers: Sequence[TokenStates], tokens: Tensor, shares: Sequence[float], part: slice
) -> dict[str, Tensor]:
    own = functional.log_softmax(student.scores(part), dim=1)
    taught = mean_logs([teacher.scores(part) for teacher in teachers], own.shape[1], shares)
    place = tokens[:, None]
    return {
        "student": -own.gather(1, place)[:, 0],
        "student_right": own.argmax(dim=1) == tokens,
        "teacher": -taught.gather(1, place)[:, 0],
        "teacher_right": taught.argmax(dim=1) == tokens,
        "agreement": own.argmax(dim=1) == taught.argmax(dim=1),
        "kl": (taught.exp() * (taught - own[:, : taught.shape[1]])).sum(dim=1),
    }


@torch.no_grad()
def token_logs(model: TokenStates, tokens: Tensor, size: int, *, most: int = _MAX_SCORES) -> Tensor:
    """Return log of the probability of each target token in float64, (n,), where only the first tokens of a table mean any.

    Args:
        model: That says them.
        tokens: (n,) the target tokens.
        size: Of the smallest table.
        most: Entries of scores that are in memory at a time.
    """
    parts = score_parts([model], len(tokens), most)
    logs = [mean_logs([model.scores(part)], size).gather(1, tokens[part][:, None])[:, 0] for part in parts]
    return torch.cat(logs).double().cpu()


def score_parts(models: Sequence[TokenStates], count: int, most: int = _MAX_SCORES) -> Iterator[slice]:
    """Return the rows whose scores are made at a time.

    Args:
        models: Whose scores of the same rows are in memory together.
        count: Rows.
        most: Entries of one model's scores.
    """
    with torch.no_grad():
        size = max(model.score(model.rows[:1]).shape[1] for model in models)
    step = max(1, most // size)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _check_student(loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise RunError(
            "the student is not finite any more: expected finite scores; lower --learning-rate, and remove the unfinished folder",
            code="run.diverged",
        )
