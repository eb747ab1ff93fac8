"""Build a model without its weights: on the meta device a parameter has a name, a shape and a type, and takes no memory.

A server that evaluates nothing needs no more of what is frozen. What is trained and does not begin with the base model's values
(adapters, a new head) is on the CPU, and has the same values as with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cotune.models.base.bounded_parts import bounded_parts, count_entries
from cotune.models.base.lookup import BaseModelFolder

if TYPE_CHECKING:  # takes seconds to import, which commands that load no model need not wait for
    from transformers import PreTrainedModel

_COMPLETE: Mapping[str, Sequence[Any]] = {"missing_keys": (), "mismatched_keys": ()}


def read_weights(kind: Any, folder: BaseModelFolder, config: Any) -> tuple[Any, Mapping[str, Sequence[Any]]]:
    """Return a model of transformers with the folder's weights (see `stored_precision`), and the report on what was missing.

    Without weights in the folder it is a skeleton, of which nothing is missing.

    Args:
        kind: Its class, such as `AutoModel`.
        folder: Of the base model.
        config: Of the model.

    Raises:
        ModelError: If the configuration describes more than any model has.
    """
    if not folder.has_weights:
        with bounded_parts(None):
            return build_skeleton(kind, config), _COMPLETE
    with bounded_parts(count_entries(folder.path)):
        found: tuple[Any, Mapping[str, Sequence[Any]]] = kind.from_pretrained(
            str(folder.path),
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced by a new one
            dtype=torch.float32,
            output_loading_info=True,
        )
    return found


def build_skeleton(kind: Any, config: Any) -> PreTrainedModel:
    """Return a model whose parameters are all on the meta device, and whose buffers (positions, masks) are on the CPU.

    Args:
        kind: Its class, such as `AutoModel`.
        config: Of the model.
    """
    from transformers.initialization import no_init_weights

    with _EmptyOnMeta(), no_init_weights():
        module: PreTrainedModel = kind.from_config(config, trust_remote_code=False, dtype=torch.float32)
    module.tie_weights()
    _move_to_meta(module)
    return module


class _EmptyOnMeta(TorchFunctionMode):
    """For the time of the block, `torch.empty`, with which layers make their parameters, makes them on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what was called, with another device where it is `torch.empty`."""
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


class CheckedLookups(TorchFunctionMode):
    """For the time of the block, a number beyond a table of embeddings on the meta device is an IndexError, as it is elsewhere.

    So the longest row that a model reads is found without its weights, too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what was called, unless it is a lookup in such a table, or asks whether a mask without values is all ones."""
        given = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return (_look_up if func is functional.embedding else func)(*args, **given)


def _look_up(input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    if input.is_meta or not weight.is_meta:
        return functional.embedding(input, weight, *rest, **options)
    if int(input.max()) >= len(weight):
        raise IndexError(f"expected numbers below {len(weight)}, got {int(input.max())}")
    return torch.empty(*input.shape, weight.shape[1], device="meta")


def _move_to_meta(module: nn.Module) -> None:
    """Parameters that were made otherwise (the ones of a norm), too; those that are shared stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and not parameter.is_meta:
                there = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                layer._parameters[name] = moved.setdefault(id(parameter), there)


def materialize(layer: nn.Module) -> list[nn.Parameter]:
    """Give a layer's own parameters memory on the CPU if they have none, filled with NaN, and return all of them."""
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter.is_meta:
            layer._parameters[name] = nn.Parameter(_unset(parameter), parameter.requires_grad)
    return list(layer.parameters(recurse=False))


def _unset(parameter: Tensor) -> Tensor:
    return torch.full(parameter.shape, torch.nan, dtype=parameter.dtype)
