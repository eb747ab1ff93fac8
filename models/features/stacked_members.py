"""Stacking as a model: a linear head, the *meta-model*, on what several frozen models predict (Wolpert, Neural Networks 1992).

What the head reads of a text are the logarithms of all members' probabilities, those of each member less their mean: its scores
at its temperature, up to a constant that says nothing. So whatever trains a head on a frozen encoder trains the meta-model of
stacking, under the same privacy and the same ledger.

A record's feature depends on its own row alone, as far as the members' answers do: `record_independence` tries it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, SequenceClassifierOutput

from cotune.models.architecture import AlignedRows
from cotune.models.features.member_reader import HOLE

_FLOOR = math.log(1e-6)  # of a probability, as where predictions are fused without training


@dataclass(frozen=True)
class Member:
    """One of the models that are stacked.

    Attributes:
        module: A classifier of transformers, frozen.
        pad: Its padding token.
        order: Where the stacked classes are among its own.
        temperature: By which its scores are divided.
    """

    module: Any
    pad: int
    order: tuple[int, ...]
    temperature: float


class StackedMembers(nn.Module):
    """The members as one encoder, whose pooled output is what they predict.

    Attributes:
        members: The modules.
        facts: What else is known of each.
        width: Numbers of a feature: members · classes.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = nn.ModuleList(member.module for member in members)
        self.facts = tuple(members)
        self.width = sum(len(member.order) for member in members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Return the features (b, members · classes); input_ids and attention_mask are (b, t) as `MemberReader` makes them."""
        shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids = self._columns(input_ids)
        mask = self._columns(shown.to(ids)) * ids.ne(HOLE)
        mask[:, 0] = 1  # a row that shows none would have no attention
        each = [self._read(member, ids[:, :, k], mask[:, :, k]) for k, member in enumerate(self.facts)]
        feature = torch.cat(each, dim=1)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=cast(Any, feature[:, None, :]), pooler_output=cast(Any, feature)
        )

    def _columns(self, rows: Tensor) -> Tensor:
        """(b, t) -> (b, ⌈t / members⌉, members)."""
        lacking = -rows.shape[1] % len(self.facts)
        return functional.pad(rows, (0, lacking)).reshape(len(rows), -1, len(self.facts))

    def _read(self, member: Member, ids: Tensor, mask: Tensor) -> Tensor:
        """What one member predicts, (b, classes); numbers that are no token of it, which no text has, become its last one."""
        known = member.module.get_input_embeddings().weight.shape[0]
        tokens = torch.where(ids.eq(HOLE), member.pad, (ids - 1).clamp(0, known - 1)).contiguous()
        with AlignedRows():
            scores = member.module(input_ids=tokens, attention_mask=mask.contiguous()).logits.float()
        with torch.autocast(scores.device.type, enabled=False):
            logs = functional.log_softmax(scores[:, list(member.order)] / member.temperature, dim=1).clamp(min=_FLOOR)
            return logs - logs.mean(dim=1, keepdim=True)


class StackedConfig(PretrainedConfig):  # type: ignore[misc]
    """The configuration of stacked members, which no class of transformers is loaded by."""

    model_type = "cotune-stacked"


class StackedClassifier(nn.Module):
    """The meta-model on its members: what the rest of the program takes for a classifier of transformers.

    Attributes:
        encoder: The members.
        classifier: (classes, members · classes) weights, and the biases: all that is trained.
        config: With the label names.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: StackedMembers, labels: Sequence[str], tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        names = dict(enumerate(labels))
        numbers = {label: number for number, label in names.items()}
        self.config = StackedConfig(id2label=names, label2id=numbers, pad_token_id=HOLE, vocab_size=tokens)
        self.classifier = nn.Linear(encoder.width, len(labels))
        self._init_weights(self.classifier)

    def get_input_embeddings(self) -> None:
        """There is no common table of tokens."""

    def padded_tables(self) -> Iterator[tuple[nn.Module, int]]:
        """Yield each member's table of tokens, and the number of its padding token."""
        for member in self.encoder.facts:
            yield member.module.get_input_embeddings(), member.pad

    @torch.no_grad()
    def _init_weights(self, layer: nn.Linear) -> None:
        """Begin with the geometric mean of the members' probabilities, which needs no records."""
        classes = layer.out_features
        count = layer.in_features // classes
        layer.weight.copy_(torch.eye(classes).repeat(1, count) / count)
        layer.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Return the scores (b, classes); input_ids and attention_mask are (b, t)."""
        feature = self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(feature))
