"""One encoder with a head for each of several tasks: classifiers of transformers that share their encoder.

A head is the complete classifier of its task, whose encoder is replaced by a stub that returns the shared encoder's output for
the batch. So everything between encoder and scores is that of the architecture, and each task is exported as a plain
classifier.

Beside tasks with a tag for each word, the scores of a whole text stand at every position, so that all have one shape. What only
one kind of classifier has of the encoder, such as BERT's pooler, is shared by those that have it, and exported with them alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from cotune.data.config import TaskName
from cotune.data.multi_task import MULTI_TASK, split_labels
from cotune.data.tasks.classes import logits
from cotune.data.tasks.multi_task import MultiTask
from cotune.data.tasks.task import get_task
from cotune.errors import ModelError
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.architecture import encoder_name
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig

_HEAD = "head_"
_TAGS = "token-classification"


class _StandIn(nn.Module):
    """In place of the encoder: answers with what the shared one has answered."""

    answer: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the shared encoder's output."""
        return self.answer


class MultiHead(nn.Module):
    """An encoder and the heads of several tasks; the scores of all of them side by side.

    Attributes:
        base_model_prefix: The attribute that holds the encoder.
        config: Of the first task's classifier, with the classes of all.
        tasks: In the order of the scores.
    """

    def __init__(self, classifiers: Mapping[str, Any], labels: Sequence[str], *, by_position: bool = False) -> None:
        """Take classifiers of one architecture apart; the encoder is that of the first which has all of its parts.

        Args:
            classifiers: Task -> its classifier, which becomes its head.
            labels: Qualified class names of all tasks, in their order.
            by_position: Whether there are scores for each token of a text, (b, l, classes), and not for each record.

        Raises:
            ModelError: If the classifiers do not have the same encoder.
        """
        super().__init__()
        first = next(iter(classifiers.values()))
        self.base_model_prefix = encoder_name(first)
        self.tasks = tuple(classifiers)
        self.by_position = by_position
        encoders = {task: getattr(each, self.base_model_prefix, None) for task, each in classifiers.items()}
        self._parts = {task: frozenset(_parts_of(encoder)) for task, encoder in encoders.items()}
        whole = max(encoders, key=lambda task: len(self._parts[task]))  # the first of those with most
        _check_same_encoder(encoders, whole, first.config.model_type)
        setattr(self, self.base_model_prefix, encoders[whole])
        for task, classifier in classifiers.items():
            setattr(classifier, self.base_model_prefix, _StandIn())
            self.add_module(f"{_HEAD}{task}", classifier)
        self.config = copy.deepcopy(first.config)
        self.config.id2label = dict(enumerate(labels))
        self.config.label2id = {label: i for i, label in enumerate(labels)}
        self.training = False  # of its own there is nothing to train

    def head(self, task: str) -> Any:
        """Return the classifier of a task, without its encoder."""
        return getattr(self, f"{_HEAD}{task}")

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """Return the scores of all tasks side by side."""
        answer = getattr(self, self.base_model_prefix)(**inputs)
        scores = [self._scores(self.head(task), answer, inputs) for task in self.tasks]
        if self.by_position:
            length = inputs["input_ids"].shape[1]
            scores = [each if each.dim() == 3 else each[:, None].expand(-1, length, -1) for each in scores]
        return SequenceClassifierOutput(logits=cast(Any, torch.cat(scores, dim=-1)))

    def _scores(self, head: Any, answer: Any, inputs: Mapping[str, Any]) -> Tensor:
        stand_in = getattr(head, self.base_model_prefix)
        stand_in.answer = answer
        try:
            return cast(Tensor, head(**inputs).logits.float())
        finally:
            stand_in.answer = None

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of tokens, as models of transformers do."""
        return cast(nn.Module, getattr(self, self.base_model_prefix).get_input_embeddings())

    def classifier(self, task: str) -> Any:
        """Return the classifier of a task with the encoder, whose parameters it shares: a plain model of transformers."""
        whole = copy.copy(self.head(task))
        whole.__dict__["_modules"] = dict(whole._modules)
        setattr(whole, self.base_model_prefix, self._encoder_of(task))
        return whole

    def _encoder_of(self, task: str) -> Any:
        """The shared encoder, without the parts that the classifier of a task does not have."""
        shared = getattr(self, self.base_model_prefix)
        others = set(_parts_of(shared)) - self._parts[task]
        if not others:
            return shared
        encoder = copy.copy(shared)
        encoder.__dict__["_modules"] = {name: part for name, part in shared._modules.items() if name not in others}
        for name in others:
            setattr(encoder, name, None)
        return encoder


def _parts_of(encoder: Any) -> list[str]:
    """Its children with parameters; none of an encoder that is not there."""
    children = () if encoder is None else encoder.named_children()
    return [name for name, part in children if any(True for _ in part.parameters())]


def _check_same_encoder(encoders: Mapping[str, Any], whole: str, kind: str) -> None:
    """Raise ModelError unless all encoders are of one class, and none has a part that the whole one lacks."""
    for encoder in encoders.values():
        if type(encoder) is not type(encoders[whole]) or not set(_parts_of(encoder)) <= set(_parts_of(encoders[whole])):
            raise ModelError(
                f"the classifiers of texts and of words of the architecture {kind} have unlike encoders and cannot share one:"
                " expected an encoder such as bert, distilbert or roberta; use another base model, or a plan for each kind",
                code="model.no_shared_encoder",
            )


def head_prefix(task: str) -> str:
    """Return what the names of the parameters of a task's head begin with."""
    return f"{_HEAD}{task}."


def load_multi_task(
    config: ModelConfig,
    labels: tuple[str, ...],
    seed: int,
    task: TaskName,
    tags: tuple[str, ...] = (),
    *,
    needs_weights: bool = True,
) -> LoadedModel:
    """Load a base model with a head for each task.

    Args:
        config: Of the base model.
        labels: Qualified class names, which name the tasks.
        seed: From which each head's own seed is derived.
        task: The task with several tasks.
        tags: The tasks that have a tag for each word. Beside them the others read the architecture's own vector of a text: mean
            pooling is a layer of the encoder, which tags would be read above, too.
        needs_weights: As for `load_model`.

    Raises:
        ModelError: If the base model cannot be used, or its classifiers read more of the encoder than its output.
    """
    kind = next(one for one, several in MULTI_TASK.items() if several == task)
    by_position = kind == _TAGS
    if by_position and config.pooling == "auto":
        config = config.model_copy(update={"pooling": "native"})
    parts = {
        name: load_model(config, classes, parameter_seed(seed, name), _kind_of(name, kind, tags), needs_weights=needs_weights)
        for name, classes in split_labels(labels).items()
    }
    first = next(iter(parts.values()))
    does = cast(MultiTask, get_task(task)).for_labels(labels, tags)
    module = MultiHead({name: part.module for name, part in parts.items()}, labels, by_position=by_position)
    if first.folder.has_weights:
        _check_heads(module, first, does)
    return LoadedModel(cast(Any, module), first.reader, first.folder, first.frozen, first.max_length, does)


def _kind_of(name: str, kind: str, tags: Collection[str]) -> TaskName:
    if kind == _TAGS and name not in tags:
        return "sequence-classification"
    return cast(TaskName, kind)


@torch.no_grad()
def _check_heads(module: MultiHead, first: LoadedModel, does: MultiTask) -> None:
    """What a head makes of the shared answer must be what its classifier makes of the input."""
    task = first.task
    batch = task.collator(module.head(module.tasks[0]), first.reader, torch.device("cpu"))(task.samples(first.reader))
    found = logits(module, batch)
    for block in does.blocks:
        expected = logits(module.classifier(block.task), batch)
        own = found[..., block.start : block.stop]
        if not torch.allclose(own if own.dim() == expected.dim() else own[:, 0], expected, rtol=1e-4, atol=1e-5):
            raise ModelError(
                f"the classifier of the architecture {module.config.model_type} reads more than what its encoder answers, so that"
                " several tasks cannot share it: expected an encoder such as bert, distilbert, roberta or vit; use another base"
                " model",
                code="model.no_shared_encoder",
            )
