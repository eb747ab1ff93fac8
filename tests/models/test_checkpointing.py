"""That activations which are computed again change nothing, and that a model is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cotune.data.tasks.classes import example_losses
from cotune.models.architecture import AlignedRows
from cotune.models.checkpointing import checkpointing, is_checkpointed
from cotune.models.config import LoraConfig
from cotune.models.trainable import TrainableModel
from cotune.privacy.mechanisms.per_example import Batch, per_example


def gradients_of(model: TrainableModel, *, again: bool) -> tuple[Tensor, list[Tensor], int]:
    """Losses and gradients of single records, and the bytes that the forward pass kept for the backward pass."""
    loaded = model.loaded
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(loaded.task.samples(loaded.reader))
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    def loss(given: Batch) -> Tensor:
        with (
            AlignedRows(),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            checkpointing(model.module, enabled=again),
        ):
            return example_losses(model.module, given)

    with per_example(model.module, loss) as of:
        losses, found = of.gradients(batch)
    return losses, found, kept


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "qwen2"])
def test_gradients_are_the_same_to_the_bit(shared: Callable[..., TrainableModel], kind: str, rank: int) -> None:
    model = shared(kind, lora=LoraConfig(rank=rank, factors="ab"), pooling="native")
    with model.with_random_weights(model.adapter_names()):
        model.train_only(model.names("lora"))
        losses, plain, kept = gradients_of(model, again=False)
        repeated, found, kept_again = gradients_of(model, again=True)
    assert torch.equal(losses, repeated)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert all(bool(one.any()) for one in found)
    assert kept_again < kept / 2


def test_model_is_left_as_it_was(shared: Callable[..., TrainableModel]) -> None:
    model = shared("llama")
    cached = model.loaded.module.config.use_cache
    with pytest.raises(KeyError), checkpointing(model.module):
        assert model.loaded.module.config.use_cache is False
        raise KeyError
    assert model.loaded.module.config.use_cache is cached
    assert not [layer for layer in model.module.modules() if "forward" in vars(layer)]


def test_auto_is_for_models_of_a_billion_parameters() -> None:
    with torch.device("meta"):
        large = torch.nn.Linear(100_000, 10_000)
        small = torch.nn.Linear(100, 10_000)
    assert is_checkpointed("auto", large)
    assert not is_checkpointed("auto", small)
    assert is_checkpointed("on", small)
    assert not is_checkpointed("off", large)
