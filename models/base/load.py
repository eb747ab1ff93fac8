"""Find, check and load the base model, from safetensors only. It is identified by the hash of its files and never sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModel

from cotune.data.config import TaskName
from cotune.data.inputs.declared_counts import check_declared_counts
from cotune.data.tasks.task import Task, get_task
from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.errors import ModelError, reason_of
from cotune.models.architecture import add_mean_pooling, can_pool_mean, encoder_name, encoder_prefixes, wants_mean_pooling
from cotune.models.base.folder import (
    ENCODER,
    find_damage,
    is_fused,
    read_base_labels,
    read_settings,
)
from cotune.models.base.quantized_layers import check_quantization, quantized_blocks
from cotune.models.base.silence import silence_transformers
from cotune.models.base.skeleton import CheckedLookups, materialize, read_weights
from cotune.models.base.stored_precision import find_stored_type, narrow_weights, use_narrow_layers
from cotune.models.config import FeatureConfig, ModelConfig
from cotune.models.features.layer_features import build_on_layers
from cotune.models.features.layer_folder import read_layer_model
from cotune.models.features.public_map import AffineMap, get_public_map, unknown_map

if TYPE_CHECKING:  # takes seconds to import, which commands that load no model need not wait for
    from transformers import PreTrainedModel
from cotune.models.base.load_checks import (
    check_complete,
    check_files_are_wide,
    check_finite,
    check_no_code_is_named,
    check_padding_row,
    make_deterministic,
)
from cotune.models.base.lookup import BaseModelFolder, check_plain_folder, find_base


@dataclass(frozen=True)
class LoadedModel:
    """A model for a task.

    Attributes:
        module: The model of transformers.
        reader: Its tokenizer or image processor.
        folder: Where it came from.
        frozen: Prefixes of parameters that are never trained.
        max_length: Tokens of its longest row.
        task: What it is for.
        feature: What decides the feature that its head reads, beside the folder; empty where the architecture does.
        members: Of stacked models, how many have their tokens in a row.
    """

    module: PreTrainedModel
    reader: Any
    folder: BaseModelFolder
    frozen: tuple[str, ...]
    max_length: int
    task: Task
    feature: tuple[str, ...] = ()
    members: int = 1

    @property
    def text_length(self) -> int:
        """Tokens that it reads of a text; of stacked models, the one that reads most."""
        return self.max_length // self.members

    def encode_unlabeled(self, inputs: Sequence[Input]) -> list[Example]:
        """Return what the collator takes for inputs without labels."""
        return self.task.examples(self.reader, self.max_length, inputs, list(map(self.task.missing_target, inputs)))


def load_model(
    config: ModelConfig,
    labels: tuple[str, ...],
    seed: int,
    task: TaskName = "sequence-classification",
    *,
    finished: bool = False,
    needs_weights: bool = True,
) -> LoadedModel:
    """Load the base model with a head of the task for the labels.

    A head that the folder has for this task and these labels, in their order, is kept. Dropout is off: under a fixed seed,
    nothing in training is random but the sampling and the noise.

    Args:
        config: Which base model.
        labels: Class names in the order of the head.
        seed: That a new head is drawn from.
        task: What the model is for.
        finished: Whether the folder must hold a trained head; that of a task that keeps the base model's it must in any case.
        needs_weights: False: from a folder without weights the model is built, too, its frozen parameters on the meta device
            (see `skeleton`); a new head is the same as with them.

    Raises:
        ModelError: For a base model that cannot be used.
    """
    folder = find_base(config, needs_weights=needs_weights)
    if is_fused(folder.path):
        raise ModelError(
            f"the base model {config.base} is a fused model, of which nothing can be trained but a meta-model: expected a plan"
            ' with train = "head" and [[model.members]], or a single model',
            code="model.fused_base",
        )
    does = get_task(task).suited(config.target_range, labels, config.max_target_length)
    names = does.head_names(labels)
    try:
        model_config = _configure(folder.path, names)
        check_quantization(folder.quantization, model_config.model_type, config.base)
        reader = does.reader(folder.path)
        with silence_transformers(), torch.random.fork_rng(devices=[]):
            map = None if config.feature is None else _get_map(folder, config.feature, model_config)
            torch.manual_seed(seed)  # of a pooler that the folder lacks
            kept = finished or does.keeps_trained_head
            if config.feature is None:
                mean = _use_mean_pooling(config, model_config, folder.path, does)
                module, frozen = _build(folder, model_config, mean, does, finished or does.keeps_head)
            else:
                module, frozen = _build_on_layers(folder, model_config, config.feature, map)
                kept = False
            if not (does.keeps_head or (kept and _head_is_for(folder.path, names, type(module).__name__))):
                draw_head(module, seed)  # whatever has been drawn before
                if not folder.has_weights:
                    check_finite(module)  # of what is drawn; the rest is checked where it is read
            does.fit(reader, module)
            with CheckedLookups():
                longest = does.longest(reader, module, config.max_length)
    except ModelError:
        raise
    except Exception as error:
        damage = find_damage(folder.path)
        if damage is not None:
            raise ModelError(
                f"the base model {config.base} has {damage}: download the folder again, or save it again",
                code="model.damaged_file",
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(
            f"the base model {config.base} cannot be loaded as {_with_article(does.described)} ({reason}): expected an"
            f" architecture with a {does.model_class().__name__.removeprefix('AutoModel')} class in"
            f" transformers, its safetensors and {does.needs}",
            code="model.not_loadable",
        ) from None
    return LoadedModel(module, reader, folder, frozen, longest, does, _describe_feature(config.feature, map))


def load_layer_model(folder: BaseModelFolder, task: TaskName, max_length: int) -> LoadedModel:
    """Load a model that `layer_folder` has written: an encoder, and a trained head on its layers.

    Args:
        folder: Of the model.
        task: Of the model.
        max_length: Longest input, in tokens.

    Raises:
        ModelError: If it cannot be loaded.
    """
    document, tensors = read_layer_model(folder.path)
    path = folder.path / ENCODER
    check_plain_folder(path, f"{folder.name} (its encoder)")
    does = get_task(task)
    try:
        config = _configure(path, tuple(document.id2label.values()))
        reader = does.reader(path)
        with silence_transformers(), torch.random.fork_rng(devices=[]):
            map = AffineMap(tensors["center"], tensors["matrix"]) if "matrix" in tensors else None
            feature = FeatureConfig(layers=document.layers, cls=document.cls)
            module, _ = _build_on_layers(replace(folder, path=path), config, feature, map)
            cast(Any, module).classifier.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
            does.fit(reader, module)
            longest = does.longest(reader, module, max_length)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model in {folder.path} cannot be loaded ({reason_of(error)[:200]}): expected the folder as `cotune` has written"
            " it; get it again",
            code="model.not_loadable",
        ) from None
    return LoadedModel(module, reader, folder, (), longest, does, _describe_feature(feature, map))


def _get_map(folder: BaseModelFolder, feature: FeatureConfig, config: Any) -> AffineMap | None:
    if feature.whiten == "none":
        return None
    return get_public_map(folder, feature) if folder.has_weights else unknown_map(feature, int(config.hidden_size))


def _build_on_layers(
    folder: BaseModelFolder, config: Any, feature: FeatureConfig, map: AffineMap | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    stored = find_stored_type(folder, config.model_type)
    with narrow_weights(stored):
        base, report = read_weights(AutoModel, folder, config)
    if stored is not None:
        use_narrow_layers(base)
    module = build_on_layers(base, feature.layers, feature.cls, map, config.num_labels)
    check_complete(report, ("",), (), finished=False)
    check_finite(module)
    module.requires_grad_(False)
    make_deterministic(module)
    return cast("PreTrainedModel", module), ()


def _describe_feature(feature: FeatureConfig | None, map: AffineMap | None) -> tuple[str, ...]:
    if feature is None:
        return ()
    return (str(feature.layers), str(feature.cls), "" if map is None else feature.map_hash or map.hash)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _head_is_for(path: Path, labels: tuple[str, ...], architecture: str) -> bool:
    """Whether a head in the folder, if there is one, was trained for these labels; if it does not say, their number decides."""
    trained = read_settings(path).get("architectures") or [architecture]
    return architecture in trained and read_base_labels(path) in ((), labels)


def draw_head(module: PreTrainedModel, seed: int) -> None:
    """Put a new head, drawn from a seed, in place of the one that is there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _draw_head(module)


@torch.no_grad()
def _draw_head(module: PreTrainedModel) -> None:
    """A new head in place of one for other labels that happens to have the same shape."""
    encoder = encoder_name(module)
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if own and not f"{name}.".startswith(f"{encoder}."):
            for parameter in materialize(layer):
                cast(Any, parameter)._is_hf_initialized = False  # transformers leaves alone what it has loaded
            module._init_weights(layer)


def _configure(path: Path, labels: tuple[str, ...]) -> Any:
    settings = read_settings(path)
    check_no_code_is_named(settings)
    check_declared_counts(settings)
    check_files_are_wide(settings)
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    check_padding_row(config)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    config.return_dict = True  # answers are read by name
    config.problem_type = None  # how another task's labels were read, such as regression
    for key in dropout_settings(config):
        setattr(config, key, 0.0)
    return config


def dropout_settings(config: Any) -> dict[str, float]:
    """Return the probabilities of a configuration with which training leaves something out, by their keys.

    Dropout (`hidden_dropout_prob`, `attn_pdrop`), stochastic depth (`drop_path_rate`) and whole layers (`layerdrop`).
    """
    found = config.to_dict().items()
    return {key: value for key, value in found if ("drop" in key) and isinstance(value, float)}


def _use_mean_pooling(config: ModelConfig, model_config: Any, path: Path, task: Task) -> bool:
    if not task.pools:
        if config.pooling == "mean":
            raise ModelError(
                f"model.pooling = mean is not for {_with_article(task.described)}, which reads every vector: use auto",
                code="model.no_mean_pooling",
            )
        return False
    if config.pooling == "mean" and not can_pool_mean(model_config):
        raise ModelError(
            f"model.pooling = mean is not supported for the architecture {model_config.model_type}: expected bert or distilbert;"
            " use native",
            code="model.no_mean_pooling",
        )
    return config.pooling == "mean" or (config.pooling == "auto" and can_pool_mean(model_config) and wants_mean_pooling(path))


def _build(
    folder: BaseModelFolder, config: Any, mean_pooling: bool, task: Task, finished: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    frozen = add_mean_pooling(config, None) if mean_pooling else ()
    stored = find_stored_type(folder, config.model_type)
    with quantized_blocks(folder.quantization if folder.has_weights else "none"), narrow_weights(stored):
        module, report = read_weights(task.model_class(), folder, config)
    if stored is not None:
        use_narrow_layers(module, () if task.keeps_head else encoder_prefixes(module))
    if mean_pooling:
        frozen = add_mean_pooling(config, module)
    check_complete(report, encoder_prefixes(module), frozen, finished)
    check_finite(module)
    module.requires_grad_(False)
    make_deterministic(module)
    return module, frozen
