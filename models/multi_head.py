"""One encoder with a head for each of several tasks: classifiers of transformers that share their encoder.

A head is the complete classifier of its task, whose encoder is replaced by a stub that returns the shared encoder's output for
the batch. So everything between encoder and scores is that of the architecture, and each task is exported as a plain
classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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

    def __init__(self, classifiers: Mapping[str, Any], labels: Sequence[str]) -> None:
        """Take classifiers of one architecture apart; the encoder is that of the first.

        Args:
            classifiers: Task -> its classifier, which becomes its head.
            labels: Qualified class names of all tasks, in their order.
        """
        super().__init__()
        first = next(iter(classifiers.values()))
        self.base_model_prefix = encoder_name(first)
        self.tasks = tuple(classifiers)
        setattr(self, self.base_model_prefix, getattr(first, self.base_model_prefix))
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
        setattr(whole, self.base_model_prefix, getattr(self, self.base_model_prefix))
        return whole


def head_prefix(task: str) -> str:
    """Return what the names of the parameters of a task's head begin with."""
    return f"{_HEAD}{task}."


def load_multi_task(
    config: ModelConfig, labels: tuple[str, ...], seed: int, task: TaskName, *, needs_weights: bool = True
) -> LoadedModel:
    """Load a base model with a head for each task.

    Args:
        config: Of the base model.
        labels: Qualified class names, which name the tasks.
        seed: From which each head's own seed is derived.
        task: The task with several tasks.
        needs_weights: As for `load_model`.

    Raises:
        ModelError: If the base model cannot be used, or its classifiers read more of the encoder than its output.
    """
    kind = next(one for one, several in MULTI_TASK.items() if several == task)
    parts = {
        name: load_model(config, classes, parameter_seed(seed, name), cast(TaskName, kind), needs_weights=needs_weights)
        for name, classes in split_labels(labels).items()
    }
    first = next(iter(parts.values()))
    does = cast(MultiTask, get_task(task)).for_labels(labels)
    module = MultiHead({name: part.module for name, part in parts.items()}, labels)
    if first.folder.has_weights:
        _check_heads(module, first, does)
    return LoadedModel(cast(Any, module), first.reader, first.folder, first.frozen, first.max_length, does)


@torch.no_grad()
def _check_heads(module: MultiHead, first: LoadedModel, does: MultiTask) -> None:
    """What a head makes of the shared answer must be what its classifier makes of the input."""
    task = first.task
    batch = task.collator(module.head(module.tasks[0]), first.reader, torch.device("cpu"))(task.samples(first.reader))
    found = logits(module, batch)
    for block in does.blocks:
        expected = logits(module.classifier(block.task), batch)
        if not torch.allclose(found[:, block.start : block.stop], expected, rtol=1e-4, atol=1e-5):
            raise ModelError(
                f"the classifier of the architecture {module.config.model_type} reads more than what its encoder answers, so that"
                " several tasks cannot share it: expected an encoder such as bert, distilbert, roberta or vit; use another base"
                " model",
                code="model.no_shared_encoder",
            )
