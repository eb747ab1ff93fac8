"""What keeps fine-tuning near the base model, beside weight decay: a pull toward its weights, and dropout, as a plan asks.

The pull is added to a step's gradient after clipping and noise: it reads no record. Dropout acts in the forward pass, before
clipping, so that what a record may contribute stays bounded by C. Its masks go by the slots of a batch, and which slot a record
has depends on the records beside it. So under privacy masks come from a secret generator: of independent masks any assignment to
records is as likely, and for each one the bound of DP-SGD holds. Masks that others could compute would tie records together.
Without privacy they follow from the plan's seed, so that a round that is trained again is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.client.training.gradient_hooks import adding_to_gradients
from cotune.client.training.request_context import RequestContext
from cotune.errors import ModelError
from cotune.models.checkpointing import is_checkpointed
from cotune.models.trainable import TrainableModel
from cotune.models.transformer_blocks import block_of
from cotune.plan.local_training import LocalTraining
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.random_generators import private_generator, seeded_generator


class Regularization:
    """How the steps of a round are regularized; nothing where the stage does not ask for it.

    Args:
        context: Of the round.
        names: Parameters that are trained.

    Raises:
        ModelError: See `find_dropout`.
    """

    def __init__(self, context: RequestContext, names: Sequence[str]) -> None:
        model = context.model
        self.local = context.stage.local
        self.dropout = find_dropout(self.local, model, names)
        encoder = [name for name in names if name.startswith(model.prefix)]  # a new head came from nowhere
        self.base = model.base_state(encoder) if self.local.base_decay else {}
        self._context = context

    @cached_property
    def generator(self) -> np.random.Generator:
        """Of what is dropped: one that nobody can predict, where records are protected."""
        context = self._context
        if isinstance(context.plan.privacy, RecordPrivacy):
            return private_generator()
        return seeded_generator(context.plan.seed, "dropout", context.site.organization, context.round)

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block, every step is pulled toward the base model, and dropout is on."""
        toward = {name: t.to(parameters[name].device, parameters[name].dtype) for name, t in self.base.items()}

        def pull(name: str, p: nn.Parameter) -> Tensor | None:
            return self.local.base_decay * (p.detach() - toward[name]) if name in toward else None

        with ExitStack() as stack:
            if toward:
                stack.enter_context(adding_to_gradients(optimizer, parameters, pull))
            if self.dropout:
                stack.enter_context(dropping(self.dropout, self.local.dropout, self.generator))
            yield


def find_dropout(local: LocalTraining, model: TrainableModel, names: Iterable[str]) -> list[nn.Module]:
    """Return the layers of dropout that take part: those of the blocks that are trained, and of the head; none where p is 0.

    Args:
        local: The probability p is `local.dropout`.
        model: The model.
        names: Names of the trained parameters.

    Raises:
        ModelError: Where there are none, or layers are computed again in the backward pass, with other masks.
    """
    if not local.dropout:
        return []
    if is_checkpointed(local.activation_checkpointing, model.module):
        raise ModelError(
            "local.dropout would leave other entries out where activation checkpointing computes a layer again: expected dropout"
            ' = 0, or activation_checkpointing = "off"',
            code="model.dropout_computed_again",
        )
    blocks = {block for block in map(block_of, names) if block is not None}
    layers = [(name, layer) for name, layer in model.module.named_modules() if isinstance(layer, nn.Dropout)]
    found: list[nn.Module] = [
        layer for name, layer in layers if not name.startswith(model.prefix) or block_of(f"{name}.") in blocks
    ]
    if not found:
        raise ModelError(
            "local.dropout is for models with layers of dropout in what is trained, and this one has none there: expected dropout"
            " = 0",
            code="model.no_dropout",
        )
    return found


@contextmanager
def dropping(layers: Iterable[nn.Module], probability: float, generator: np.random.Generator) -> Iterator[None]:
    """During the block, set each entry of the layers' outputs to 0 with probability p, and multiply the others by 1 / (1 − p).

    Args:
        layers: Dropout layers (`find_dropout`).
        probability: p, in [0, 1).
        generator: Draws the masks.
    """

    def drop(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        drawn = torch.from_numpy(generator.random(tuple(output.shape), dtype=np.float32))
        return output * (drawn >= probability).to(output.device) / (1 - probability)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(drop).remove)
        yield
