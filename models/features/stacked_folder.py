"""A fused model's folder as the base model of a plan, and stacked models as folders.

The members are loaded frozen, and a meta-model on what they predict is what a plan trains. What comes out is the folder of a
fused model again, with `stacking` as its rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cotune.data.tasks.task import get_task
from cotune.errors import ModelError
from cotune.models.base.finished import load_single
from cotune.models.base.folder import is_fused, member_folder
from cotune.models.base.fused_folder import FusionDocument, read_fusion_document, read_meta_model, write_fused_folder
from cotune.models.base.load import LoadedModel
from cotune.models.base.load_checks import make_deterministic
from cotune.models.base.lookup import BaseModelFolder, find_base
from cotune.models.config import ModelConfig
from cotune.models.features.member_reader import MemberReader
from cotune.models.features.stacked_members import Member, StackedClassifier, StackedMembers

_TASK = "sequence-classification"


def is_stack(config: ModelConfig, *, needs_weights: bool) -> bool:
    """Whether the base model of a plan is a fused model, whose members are stacked. Raises ModelError as `find_base` does."""
    return is_fused(find_base(config, needs_weights=needs_weights).path)


def load_stack(config: ModelConfig, labels: tuple[str, ...], task: str) -> LoadedModel:
    """Load a fused model as a plan's base model: its members frozen, with a new meta-model on what they predict.

    The meta-model begins as the geometric mean of the members' calibrated probabilities.

    Args:
        config: The plan's table. It says of each member how the records are protected that it has learned from.
        labels: Class names in the order of the head.
        task: Of the plan.

    Raises:
        ModelError: The plan does not say that, or a member cannot be stacked.
    """
    folder = find_base(config)
    if not is_fused(folder.path):
        raise ModelError(
            f"the base model {config.base} is a single model, and [[model.members]] names {len(config.members)}: expected the"
            " folder of a fused model, as `cotune fuse` writes it, or a plan without members",
            code="model.no_members",
        )
    document = read_fusion_document(folder.path)
    _check_stated(config, document)
    loaded = _load(folder, document, labels, task, None)
    if loaded.text_length > config.max_length:
        raise ModelError(
            f"a member of the base model {config.base} reads {loaded.text_length} tokens of a text, and model.max_length ="
            f" {config.max_length}: expected at least {loaded.text_length}, as members read what they were trained to read",
            code="model.stacked_length",
        )
    return loaded


def load_stacked_model(folder: BaseModelFolder, max_length: int | None) -> tuple[LoadedModel, tuple[str, ...]]:
    """Load a stacked model that `write_stack` has written, and return it with its labels.

    Args:
        folder: Of the model.
        max_length: Tokens that each member reads of a text; None: as many as it was trained for.

    Raises:
        ModelError: It is damaged, or its rule is another one.
    """
    document = read_fusion_document(folder.path)
    meta = {} if document.method != "stacking" else read_meta_model(folder.path, document)
    found = {name: torch.from_numpy(values).float() for name, values in meta.items()}
    if not found or not torch.allclose(_less_means(found["coefficients"]), found["coefficients"], atol=1e-4):
        raise ModelError(
            f"{folder.path} is no model that a federation has stacked: expected the folder that a run has written; `cotune"
            " predict` and `cotune evaluate` open every fused model",
            code="model.no_stacked_model",
        )
    loaded = _load(folder, document, document.labels, document.task, max_length)
    head = cast(Any, loaded.module).classifier
    head.load_state_dict({"weight": found["coefficients"], "bias": found["intercepts"]})
    return loaded, document.labels


def load_side_by_side(sources: Sequence[str], labels: tuple[str, ...]) -> LoadedModel:
    """Load single finished models side by side, with their probabilities as they are.

    Args:
        sources: Folders of models or hub ids; at least one.
        labels: Their classes, in the order that is wanted.

    Raises:
        ModelError: One cannot be stacked.
    """
    places = [find_base(ModelConfig(base=source)) for source in sources]
    for place in places:
        if is_fused(place.path):
            raise ModelError(
                f"{place.name} is a fused model: expected single ones; name its members, which are in {place.path / 'models'}",
                code="model.nested_fusion",
            )
    digest = hashlib.sha256("\n".join(place.content_hash for place in places).encode()).hexdigest()
    together = BaseModelFolder(", ".join(sources), places[0].path, digest)
    return _stack(together, [place.path for place in places], (1.0,) * len(places), labels, None)


def write_stack(module: StackedClassifier, source: Path, folder: Path) -> None:
    """Write a stacked model as the folder of a fused one.

    Args:
        module: In the state that is to be written.
        source: The folder that its members come from.
        folder: It is there, and empty.

    Raises:
        ModelError: The members are not there any more, or others.
    """
    document = read_fusion_document(source)
    fields = {
        "method": "stacking",
        "task": document.task,
        "labels": tuple(module.config.id2label.values()),
        "temperatures": document.temperatures,
        "weights": (1 / document.count,) * document.count,
    }
    weight = _less_means(module.classifier.weight.detach().cpu().double())
    meta = {"coefficients": weight.numpy(), "intercepts": module.classifier.bias.detach().cpu().double().numpy()}
    members = [member_folder(source, number) for number in range(1, document.count + 1)]
    write_fused_folder(folder, members, fields, meta)


def _less_means(weight: Tensor) -> Tensor:
    """Weights (classes, members · classes) that make of logarithms what `weight` makes of logarithms less their means."""
    parts = weight.reshape(len(weight), -1, len(weight))
    return (parts - parts.mean(dim=2, keepdim=True)).reshape(weight.shape)


def _check_stated(config: ModelConfig, document: FusionDocument) -> None:
    if len(config.members) != document.count:
        raise ModelError(
            f"the base model {config.base} is a fused model of {document.count} members, and the plan says of"
            f" {len(config.members)} how the records are protected that they have learned from: expected one entry of"
            " [[model.members]] for each, in their order, with epsilon and delta, or with handed_over = true",
            code="model.unstated_members",
        )


def _load(
    folder: BaseModelFolder, document: FusionDocument, labels: tuple[str, ...], task: str, max_length: int | None
) -> LoadedModel:
    if task != document.task or task != _TASK:
        raise ModelError(
            f"the base model {folder.name} is a fused model for {document.task}, and stacking is for {_TASK}: expected members"
            " and a plan for that",
            code="model.stacked_task",
        )
    paths = [member_folder(folder.path, number) for number in range(1, document.count + 1)]
    return _stack(folder, paths, document.temperatures, labels, max_length)


def _stack(
    folder: BaseModelFolder, paths: Sequence[Path], temperatures: Sequence[float], labels: tuple[str, ...], max_length: int | None
) -> LoadedModel:
    loaded = [load_single(str(path)) for path in paths]
    members = [
        _member(one, names, kind, labels, temperature, path)
        for (one, names, kind), temperature, path in zip(loaded, temperatures, paths, strict=True)
    ]
    own = [one.max_length for one, _, _ in loaded]
    limits = [min(length, max_length or length) for length in own]
    reader = MemberReader([one.reader for one, _, _ in loaded], limits)
    module = StackedClassifier(StackedMembers(members), labels, len(reader))
    module.requires_grad_(False)
    make_deterministic(module)
    does = get_task("sequence-classification").suited(None, labels, None)
    feature = (str(labels), str(limits))
    return LoadedModel(cast(Any, module), reader, folder, (), reader.longest, does, feature, len(members))


def _member(one: LoadedModel, names: Sequence[str], task: str, labels: tuple[str, ...], temperature: float, path: Path) -> Member:
    if task != _TASK or set(names) != set(labels):
        raise ModelError(
            f"{path} is for {task} into {', '.join(names)[:80]}, expected {_TASK} into {', '.join(labels)[:80]}, in any order,"
            " as all members have the plan's classes",
            code="model.stacked_classes",
        )
    if getattr(one.module.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{path} has an encoder and a decoder ({one.module.config.model_type}): expected members without, such as bert,"
            " distilbert, roberta or gpt2",
            code="model.stacked_architecture",
        )
    order = tuple(names.index(label) for label in labels)
    return Member(one.module, int(one.reader.pad_token_id), order, temperature)
