"""The loss of every target token, without the scores of all tokens of a batch in memory at once.

Scores over a vocabulary are the largest tensor of a language model by far: 8 rows of 1,024 tokens and 49,152 words take 1.6 GB
in float32, and their gradient as much. The gradient of a loss with respect to the hidden states below a frozen output layer,
(softmax(s) − onehot(y))·W, is known as soon as the scores s are, so that scores are made for some positions at a time, turned
into losses and gradients, and forgotten (as in Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.2).

How many positions are taken at a time follows from the shape of the batch alone: what is computed for a record must not depend on
what other records hold. Positions at which no row has a label are left out, which changes nothing: their losses and gradients are
exactly 0. Batches whose rows have about as many labels (`data.tasks.classes.count_labels`) leave out the most.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.tasks.classes import IGNORED, Batch

_MAX_SCORES = 2**25  # entries that are in memory at a time: 128 MiB in float32
_MAX_SCORES_CPU = 2**23  # smaller parts leave out more positions, and keep a product fast all the same
_TOLERANCE = 1e-3  # relative, between two ways to the same scores
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def token_losses(module: nn.Module, batch: Batch, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (b, l) cross-entropies in nats, and (b, l) by how much the label's score is below the highest; 0 without a label.

    Args:
        module: A causal language model of transformers.
        batch: input_ids, attention_mask, and labels (b, l): the number of the token that follows, or IGNORED.
        most: Maximum number of labels of a row. Where a row is longer, scores are computed only at that many of its positions;
            further labels are ignored.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if not _has_frozen_output(module):
        return _losses_of_scores(cast(Any, module)(**inputs, use_cache=False).logits.float(), labels)
    hidden = hidden_states(module, inputs)
    layer = cast(Any, module).get_output_embeddings()
    if most is None or most >= labels.shape[1]:
        return _losses_of_hidden(hidden, labels, layer)
    places = (labels == IGNORED).int().argsort(dim=1, stable=True)[:, :most]  # those with labels first, in their order
    chosen = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    losses, behind = _losses_of_hidden(chosen, labels.gather(1, places), layer)
    nothing = losses.new_zeros(labels.shape)
    return nothing.scatter(1, places, losses), nothing.scatter(1, places, behind)


def _has_frozen_output(module: nn.Module) -> bool:
    layer = cast(Any, module).get_output_embeddings()
    return layer is not None and not any(p.requires_grad for p in layer.parameters()) and has_plain_output(module)


def has_plain_output(module: nn.Module) -> bool:
    """Whether the scores of a language model are those of one linear layer on its hidden states, and nothing else.

    Some architectures scale or bound their scores afterwards (Gemma 2, Cohere). That is found out once, by comparing.
    """
    layer = cast(Any, module).get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return False
    if module not in _plain:
        _plain[module] = _is_plain(module, layer)
    return _plain[module]


@torch.no_grad()
def _is_plain(module: nn.Module, layer: nn.Linear) -> bool:
    ids = torch.arange(4, device=layer.weight.device)[None] % layer.weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.autocast(ids.device.type, enabled=False):
            expected = cast(Any, module)(**inputs, use_cache=False).logits.float()
            got = layer(hidden_states(module, inputs)).float()
    except (AttributeError, TypeError, RuntimeError, ValueError):  # another kind of encoder: its own forward tells what is wrong
        return False
    return bool(torch.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())))


def hidden_states(module: nn.Module, inputs: Batch) -> Tensor:
    """Return what the output layer of a language model reads at each position, (b, l, d).

    Args:
        module: A language model with a plain output.
        inputs: A batch without its labels.
    """
    decoder = getattr(module, cast(Any, module).base_model_prefix)
    return cast(Tensor, decoder(**inputs, use_cache=False).last_hidden_state)


def _losses_of_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(scores.movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")
    there = labels != IGNORED
    own = scores.detach().gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return losses, (scores.detach().amax(dim=-1) - own) * there


def _losses_of_hidden(hidden: Tensor, labels: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    most = _MAX_SCORES_CPU if hidden.device.type == "cpu" else _MAX_SCORES
    fitting = max(1, most // (len(hidden) * layer.weight.shape[0]))
    size = 2 ** (fitting.bit_length() - 1)  # all parts but the last have a number of rows for which kernels are made
    losses, behind = _FrozenOutput.apply(hidden, labels, layer, size)  # type: ignore[no-untyped-call]
    return losses, behind


class _FrozenOutput(torch.autograd.Function):
    """Hidden states (b, l, d) -> what `token_losses` returns, with the gradient of each loss made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, layer: nn.Linear, size: int) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        losses = hidden.new_zeros(labels.shape, dtype=torch.float32)
        behind = torch.zeros_like(losses)
        gradients = torch.zeros_like(hidden) if wanted else None
        used = (labels != IGNORED).any(dim=0).tolist()
        for at in range(0, len(used), size):
            if any(used[at : at + size]):
                part = slice(at, at + size)
                losses[:, part], behind[:, part], slope = _part(hidden[:, part], labels[:, part], layer, wanted)
                if gradients is not None and slope is not None:
                    gradients[:, part] = slope
        ctx.save_for_backward(*([] if gradients is None else [gradients]))
        ctx.mark_non_differentiable(behind)
        return losses, behind

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient] = ctx.saved_tensors
        return gradient * gradients[0][..., None].to(gradient.dtype), None, None, None


def _part(hidden: Tensor, labels: Tensor, layer: nn.Linear, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `token_losses` returns, and where wanted the gradient of each loss with respect to its own hidden state.

    Scores are overwritten by their softmax: at this size each copy costs as much time as it costs memory.
    """
    made = layer(hidden.contiguous())  # a product with rows that do not follow each other is made eight times as slowly
    dtype = made.dtype
    scores = made.float()
    there = labels != IGNORED
    place = labels.clamp(min=0)[..., None]
    highest = scores.amax(dim=-1, keepdim=True)
    behind = highest - scores.gather(-1, place)
    scores.sub_(highest).exp_()
    total = scores.sum(dim=-1, keepdim=True)
    losses = (total.log() + behind)[..., 0].masked_fill(~there, 0.0)
    behind = behind[..., 0].masked_fill(~there, 0.0)
    if not wanted:
        return losses, behind, None
    scores.div_(total).scatter_add_(-1, place, -torch.ones_like(total))
    below = (scores.to(dtype) @ layer.weight.to(dtype)).to(hidden.dtype)
    return losses, behind, below.masked_fill(~there[..., None], 0.0)
