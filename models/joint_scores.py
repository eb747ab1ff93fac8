"""Scores of the next token by several language models that read the same tokens, for `generate` of the first of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor

from cotune.models.trainable import TrainableModel

Mix = Callable[[Sequence[Tensor]], Tensor]  # scores of each model, (b, v_k) in float32 -> those of all together, (b, v)


class JointScores(LogitsProcessor):  # type: ignore[misc]
    """Takes the scores of the model that generates, and gives those of all models together.

    Args:
        others: The models beside that one, with its tokenizer; encoder and decoder, as it, or neither of them.
        mix: Makes one of all scores, the first of which are those of the model that generates.
        ids: (b, l) prompts, as `generate` is given them.
        mask: (b, l) 0 where a prompt is padded.
    """

    def __init__(self, others: Sequence[TrainableModel], mix: Mix, ids: Tensor, mask: Tensor) -> None:
        self._mix = mix
        self._followers = [Follower(other.loaded.module, ids, mask) for other in others]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return (b, v) scores; of tokens that are in the first model's table alone −∞."""
        mixed = self._mix([scores.float(), *(follower.read(input_ids) for follower in self._followers)])
        return functional.pad(mixed, (0, scores.shape[1] - mixed.shape[1]), value=-torch.inf)  # type: ignore[return-value]


class Follower:
    """A model that reads the tokens which another one has generated: each of them once, where it keeps what it has read.

    Args:
        module: The model of transformers.
        ids: (b, l) prompts.
        mask: (b, l) 0 where a prompt is padded.
    """

    def __init__(self, module: Any, ids: Tensor, mask: Tensor) -> None:
        self._module = module
        self._mask = mask
        self._kept: Any = None
        self._done = 0
        has_encoder = bool(getattr(module.config, "is_encoder_decoder", False))
        self._encoded = module.get_encoder()(input_ids=ids, attention_mask=mask) if has_encoder else None
        takes = inspect.signature(module.forward).parameters
        self._tells_positions = "position_ids" in takes and not bool(mask.all())  # without padding a model knows its own
        self._keeps_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # not (b, l, v) scores of a prompt

    def read(self, tokens: Tensor) -> Tensor:
        """Return the scores of the token after all of `tokens`, (b, v); a decoder's begin with the start token of any model."""
        found = self._module(**self._inputs(tokens), **self._keeps_last, past_key_values=self._kept, use_cache=True)
        self._kept = getattr(found, "past_key_values", None)
        self._done = 0 if self._kept is None else tokens.shape[1]
        last: Tensor = found.logits[:, -1].float()
        return last

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        if self._encoded is not None:
            own = torch.full_like(tokens[:, :1], int(self._module.config.decoder_start_token_id))
            new = torch.cat([own, tokens[:, 1:]], dim=1)[:, self._done :]
            return {"encoder_outputs": self._encoded, "attention_mask": self._mask, "decoder_input_ids": new}
        mask = functional.pad(self._mask, (0, tokens.shape[1] - self._mask.shape[1]), value=1)
        inputs = {"input_ids": tokens[:, self._done :], "attention_mask": mask}
        if self._tells_positions:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, self._done :]
        return inputs
