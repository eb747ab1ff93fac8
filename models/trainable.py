"""The model that is trained through the stages of a plan, and the groups of parameters that it trains and shares.

A stage trains one group of parameters: the `head`; `lora` factors and the head; the last `blocks` of the encoder and the head; or
`full`, the encoder and the head. The *state* is every tensor that any stage so far has trained, by name: with it and the base
model, all organizations have the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from cotune.bounded_cache import BoundedCache
from cotune.data.config import TaskName
from cotune.data.multi_task import is_multi_task
from cotune.data.tasks.text import Example
from cotune.errors import ModelError
from cotune.models.adapters.adapter import Adapter, parameter_seed
from cotune.models.adapters.lora import OWN, get_adapters, inject_adapters
from cotune.models.architecture import encoder_prefixes
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.base.quantized_layers import count_parameters
from cotune.models.base.stored_precision import use_plain_layers, widen
from cotune.models.config import Factors, LoraConfig, ModelConfig, TrainMode
from cotune.models.device import pick_device
from cotune.models.features.stacked_folder import is_stack, load_stack
from cotune.models.multi_head import load_multi_task
from cotune.models.transformer_blocks import last_blocks

State = dict[str, Tensor]  # parameter name -> float32 tensor on the CPU


class TrainableModel:
    """A loaded model with the bookkeeping of what is trained, and how to set it to any state.

    One instance is kept per process; `load` makes its parameters a function of the base model and the given state alone, so that
    simulated clients can take turns with it.

    Attributes:
        layers: All modules with their names; the module gets none after it was loaded.
    """

    def __init__(
        self, loaded: LoadedModel, lora: LoraConfig | None, seed: int, device: torch.device, *, own_adapters: bool = False
    ) -> None:
        self.loaded = loaded
        self.lora = lora
        self.seed = seed
        whole = loaded.folder.has_weights
        self.device = device if whole else torch.device("cpu")
        self.module: nn.Module = loaded.module.to(device) if whole else loaded.module  # on its device before peft wraps it
        self.prefix = encoder_prefixes(loaded.module)
        if lora is not None:
            inject_adapters(loaded, lora, seed, own=own_adapters)
        named = self.module.named_parameters()
        self._own = {name.replace(".base_layer.", "."): parameter for name, parameter in named}  # walking a module is slow
        self.layers = tuple(self.module.named_modules())
        self._initial: State = {}
        # answers of `names`; with factors of adapters in turns, each round has its own
        self._names: BoundedCache[tuple[object, ...], list[str]] = BoundedCache(max_entries=64)

    @cached_property
    def samples(self) -> Sequence[Example]:
        """The made-up records of the task, as the model reads them; nobody may change them."""
        return tuple(self.loaded.task.samples(self.loaded.reader))

    def names(self, mode: TrainMode, *, freeze_embeddings: bool = True, round: int = 1, layers: int | None = None) -> list[str]:
        """Return the parameters that a stage trains and shares, in the model's order.

        Args:
            mode: What the stage trains.
            freeze_embeddings: Whether the tables of embeddings stay as they are.
            round: From 1; which factors of adapters are trained may depend on it.
            layers: With "blocks", how many of the last ones.

        Raises:
            ModelError: When there are none, or fewer blocks.
            ValueError: For blocks without a number of them.
        """
        question = mode, freeze_embeddings, round, layers
        return list(self._names.find(question, lambda: self._find_names(*question)))

    def _find_names(self, mode: TrainMode, freeze_embeddings: bool, round: int, layers: int | None) -> list[str]:
        blocks = self._last_blocks(layers) if mode == "blocks" else frozenset[str]()
        chosen = [n for n, _ in self.parameters() if n in blocks or self._belongs(n, mode, freeze_embeddings, round)]
        if not chosen:
            raise ModelError(
                f"the model has no parameters to train for train = {mode}: expected at least a head",
                code="model.nothing_to_train",
            )
        return chosen

    def _belongs(self, name: str, mode: TrainMode, freeze_embeddings: bool, round: int) -> bool:
        if mode == "full" and freeze_embeddings and self.loaded.task.keeps_head and _is_embedding(name):
            return False
        if not name.startswith(self.prefix):
            return mode == "full" or not self.loaded.task.keeps_head  # a new head is part of every stage
        if mode == "head" or name.startswith(self.loaded.frozen):
            return False
        if ".lora_" in name:
            return mode == "lora" and self.lora is not None and _is_trained(name, self.lora.factors, round)
        return mode == "full" and not (freeze_embeddings and _is_embedding(name))

    def _last_blocks(self, layers: int | None) -> frozenset[str]:
        if layers is None:
            raise ValueError("expected layers with blocks, got none")
        inside = [n for n, _ in self.parameters() if n.startswith(self.prefix) and ".lora_" not in n]
        declared = getattr(self.module.config, "num_hidden_layers", None)
        trainable = [name for name in inside if not name.startswith(self.loaded.frozen)]
        return frozenset(last_blocks(trainable, layers, declared))

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters by their stable names: the same with and without adapters around a layer."""
        return self._own.items()

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers as they are now, by the names of PyTorch."""
        for path, module in self.layers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{path}.{name}" if path else name, buffer

    def train_only(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Makes the named parameters trainable and freezes all others; returns them in the model's order."""
        wanted = set(names)
        self._remember(self._own, wanted)
        chosen = []
        for name, parameter in self.parameters():
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                chosen.append(parameter)
        return chosen

    def state(self, names: Iterable[str]) -> State:
        """Copies of the named parameters, in float32 on the CPU. Raises ModelError for one whose value is not here."""
        return {name: _copy(name, self._own[name]).float() for name in names}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Sets the model to the base model with `state` on top. Raises ModelError for a name or shape that it does not have."""
        own = self._own
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                got = f"{name} {tuple(tensor.shape)}"
                raise ModelError(
                    f"a state holds {got}, expected a parameter of this model: it was made with another plan or model",
                    code="model.foreign_state",
                )
        self._remember(own, state)
        for name, initial in self._initial.items():
            own[name].copy_(state.get(name, initial))

    @contextmanager
    def with_random_weights(self, names: Iterable[str], seed: int = 0) -> Iterator[None]:
        """For the time of the block: the base model with random weights in the named parameters, whatever state it is in.

        Weights are normal, with the standard deviation that keeps the size of what a layer is given, and follow from the seed.
        """
        own = self._own
        chosen = list(names)
        self._remember(own, chosen)
        before = {name: own[name].detach().clone() for name in self._initial}
        self.load({})
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for name in chosen:
                    shape = own[name].shape
                    own[name].copy_(torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:])))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    own[name].copy_(tensor)

    def _remember(self, own: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Keeps the base value of every tensor that is about to be changed for the first time; it is float32 from then on."""
        for name in names:
            if name not in self._initial:
                self._initial[name] = _copy(name, own[name])
                if own[name].dtype != torch.float32:
                    widen(own[name])
                    use_plain_layers(layer for _, layer in self.layers)

    def base_state(self, names: Iterable[str]) -> State:
        """Copies of the named parameters as the base model has them, in float32 on the CPU."""
        values: Mapping[str, Tensor] = {**self._own, **self._initial}
        return {name: _copy(name, values[name]).float() for name in names}

    def names_without_value(self) -> frozenset[str]:
        """The parameters whose values are those of a base model without weights here."""
        return frozenset(name for name, parameter in self._own.items() if parameter.is_meta)

    def norm_names(self) -> list[str]:
        """The parameters of the encoder's normalization layers (LayerNorm, RMSNorm), but for those that are never trained."""
        layers = [name for name, layer in self.module.named_modules() if type(layer).__name__.endswith("Norm")]
        found = {f"{name}.{own}" for name in layers for own, _ in self.module.get_submodule(name).named_parameters(recurse=False)}
        encoder = (name for name, _ in self.parameters() if name.startswith(self.prefix))
        return [name for name in encoder if name in found and not name.startswith(self.loaded.frozen)]

    def adapter_names(self) -> list[str]:
        """The parameters of its adapters, trained or not."""
        return [name for name, _ in self.parameters() if ".lora_" in name]

    def own_adapter_names(self) -> list[str]:
        """The parameters of the adapters beside the shared ones; none where the model has no such ones."""
        return [name for name in self.adapter_names() if f".{OWN}." in name]

    def adapters(self) -> tuple[Adapter, ...]:
        """Its LoRA layers, by the names of what is shared."""
        return get_adapters(self.loaded.module)

    def parameter_count(self) -> int:
        """All parameters of the model, adapters included."""
        return count_parameters(self.module)


def _copy(name: str, tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    if tensor.is_meta:
        raise ModelError(
            f"the values of {name} begin with the base model's, whose weights are not on this machine: expected the base model's"
            " *.safetensors here, or a plan that trains adapters or a new head (train = lora or head)",
            code="model.weights_needed",
        )
    if not tensor.is_floating_point():
        raise ModelError(
            f"{name} is kept in 4 bits (model.quantization), which nobody trains, shares or changes: expected train = lora or"
            " head, or model.quantization = none",
            code="model.quantized_parameter",
        )
    return tensor.detach().to("cpu", copy=True)


def _is_trained(name: str, factors: Factors, round: int) -> bool:
    """Whether a factor of an adapter is trained in a round."""
    if factors == "alternate":
        return (".lora_B." in name) == (round % 2 == 1)
    return ".lora_B." in name or factors == "ab"


_EMBEDDINGS = frozenset(
    {"embeddings", "wte", "wpe", "embed_tokens", "embed_positions", "shared", "relative_attention_bias", "word_embeddings"}
)


def _is_embedding(name: str) -> bool:
    """Tables of tokens and positions, of distances (T5) too; of a ViT, its class token and patches."""
    return any(part in _EMBEDDINGS for part in name.split("."))


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    """Those whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def open_model(
    model: ModelConfig,
    labels: tuple[str, ...],
    lora: LoraConfig | None,
    seed: int,
    device: str,
    task: TaskName = "sequence-classification",
    own_adapters: bool = False,
    needs_weights: bool = True,
    tags: tuple[str, ...] = (),
) -> TrainableModel:
    """Load a new model, which is not shared with other callers.

    Args:
        model: The base model.
        labels: Class names.
        lora: Of the adapters; None: no adapters.
        seed: Of the head and the adapters.
        device: Such as "cpu" or "cuda:0".
        task: Of the model.
        own_adapters: Whether organizations may have adapters of their own rank.
        needs_weights: False: where the base model's folder has no weights, the model does without (see `load_model`).
        tags: Of several tasks, those with a tag for each word.

    Raises:
        ModelError: If it cannot be loaded.
    """
    head_seed = parameter_seed(seed, "head")
    if model.members or is_stack(model, needs_weights=needs_weights):
        loaded = load_stack(model, labels, task)
    elif is_multi_task(task):
        loaded = load_multi_task(model, labels, head_seed, task, tags, needs_weights=needs_weights)
    else:
        loaded = load_model(model, labels, head_seed, task, needs_weights=needs_weights)
    return TrainableModel(loaded, lora, seed, pick_device(device), own_adapters=own_adapters)


get_model = lru_cache(maxsize=1)(open_model)  # the one model that a process keeps, shared by all who take turns in it
