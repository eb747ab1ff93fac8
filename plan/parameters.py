"""Which parameters a plan trains and shares, in its model; and which statistics its strategy wants of them.

Which arrays a plan's strategy wants beside the deltas, by name and shape: the client makes them, the server checks them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cotune.data.inputs.chat_template import check_chat_template
from cotune.errors import PrivacyError
from cotune.models.config import ModelConfig
from cotune.models.multi_head import head_prefix
from cotune.models.trainable import TrainableModel, get_model, open_model
from cotune.plan.local_training import Stage
from cotune.plan.public import SCORES
from cotune.plan.schema import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.strategies.plugins import is_code


def get_plan_model(plan: Plan, device: str) -> TrainableModel:
    """The plan's base model with its head, and its adapters where a stage trains them: one per process, shared by all callers.

    Raises ModelError when it cannot be loaded, or cannot write the plan's chats, PrivacyError when it mixes records.
    """
    lora = plan.lora if plan.uses_lora else None
    model = get_model(plan.model, plan.labels, lora, plan.seed, device, plan.task, "adapter" in plan.personal.parts)
    if plan.data.messages is not None:
        check_chat_template(model.loaded.reader)
    if isinstance(plan.privacy, RecordPrivacy):
        _refuse_batch_norm(model)
    return model


_open_own_model = lru_cache(maxsize=4)(open_model)  # simulated organizations take turns with theirs


def own_model_config(plan: Plan, base: str) -> ModelConfig:
    """Return the plan's `model` table for another base model."""
    return plan.model.model_copy(update={"base": base, "base_hash": None, "revision": None, "feature": None})


def get_own_model(plan: Plan, device: str, base: str) -> TrainableModel:
    """The plan's model on another base model, as an organization has one where predictions alone are shared.

    Raises ModelError when it cannot be loaded, PrivacyError when it mixes records.
    """
    model = _open_own_model(
        own_model_config(plan, base), plan.labels, plan.lora if plan.uses_lora else None, plan.seed, device, plan.task
    )
    if isinstance(plan.privacy, RecordPrivacy):
        _refuse_batch_norm(model)
    return model


def trained_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """The parameters that organizations train in a round, in the model's order."""
    return stage_names(plan, plan.get_stage(round), model, round)


def stage_names(plan: Plan, stage: Stage, model: TrainableModel, round: int = 1) -> list[str]:
    """The parameters that a stage of the plan trains, in the model's order: those of its mode, and personal ones beside them."""
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings, round=round, layers=stage.layers)
    if "norm" not in plan.personal.parts:
        return names
    both = {*names, *model.norm_names()}
    return [name for name, _ in model.parameters() if name in both]


def shared_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """Those that travel: all that organizations train in a round, unless the plan lets them keep some to themselves.

    Where predictions travel in their place, the one array of these.
    """
    if plan.shares_predictions:
        return [SCORES]
    names = trained_names(plan, model, round)
    if not plan.keeps_parts:
        return names
    personal = _personal_names(plan, model)
    return [name for name in names if name not in personal]


def held_names(plan: Plan, names: Iterable[str], tasks: Collection[str]) -> list[str]:
    """Those of some parameters that an organization with records of these tasks trains: no head of another task."""
    others = tuple(head_prefix(task.name) for task in plan.tasks if task.name not in tasks)
    return [name for name in names if not name.startswith(others)]


def heads_of(plan: Plan, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Task -> those of some parameters that are its head's; empty where the plan has one task."""
    names = list(names)
    return {task.name: frozenset(n for n in names if n.startswith(head_prefix(task.name))) for task in plan.tasks}


def personal_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """Those that organizations have trained up to a round and kept to themselves; of a copy all that it has of its own."""
    if not plan.keeps_personal and not plan.shares_predictions:
        return []
    whole = plan.personal.keeps_copy or plan.shares_predictions
    personal = {name for name, _ in model.parameters()} if whole else _personal_names(plan, model)
    trained = {name for number in _rounds_that_differ(plan, round) for name in trained_names(plan, model, number)}
    return [name for name, _ in model.parameters() if name in trained & personal]


def _personal_names(plan: Plan, model: TrainableModel) -> set[str]:
    """Every parameter of the model that stays with the organization where it is trained."""
    found = set[str]()
    if plan.lora.keep == "b" or "head" in plan.personal.parts:
        found |= {name for name, _ in model.parameters() if not name.startswith(model.prefix)}
    if plan.lora.keep == "b":
        found |= {name for name, _ in model.parameters() if ".lora_B." in name}
    if "norm" in plan.personal.parts:
        found |= set(model.norm_names())
    if "adapter" in plan.personal.parts:
        found |= set(model.own_adapter_names())
    return found


def rewritten_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """What the fusion may change beside what organizations train: other factors of adapters, or the weights that they adapt.

    A fusion that is code is not opened here, so that it may be any of them.
    """
    if plan.get_stage(round).mode != "lora":
        return []
    fusion = plan.strategy.fusion
    kinds = ("a", "b", "weight") if is_code(fusion.name) else fusion.info("fusion").needs.rewrites
    return [getattr(adapter, kind) for adapter in model.adapters() for kind in kinds]


def state_shapes(plan: Plan, model: TrainableModel, round: int) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape, of all that the state may hold in a round: what rounds up to it share, and what their fusions change.

    Everything else is the base model's, on which everybody has agreed.
    """
    own = dict(model.parameters())
    names = (
        name
        for number in _rounds_that_differ(plan, round)
        for name in [*shared_names(plan, model, number), *rewritten_names(plan, model, number)]
    )
    return {name: tuple(own[name].shape) for name in names}


def scores_shape(plan: Plan) -> tuple[int, int]:
    """Return (answers, classes) of the predictions that travel where no parameters do."""
    return plan.public.answers, len(plan.labels)


def student_shapes(plan: Plan, model: TrainableModel, round: int) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape, of what the model that learns from all predictions may have trained up to a round."""
    own = dict(model.parameters())
    names = {name for number in _rounds_that_differ(plan, round) for name in trained_names(plan, model, number)}
    return {name: tuple(own[name].shape) for name in own if name in names}


def _rounds_that_differ(plan: Plan, round: int) -> Iterator[int]:
    """Of each stage up to a round its first two: which factors of adapters are trained may depend on whether a round is odd."""
    first = 1
    for stage in plan.stages:
        yield from range(first, min(first + min(stage.rounds, 2), round + 1))
        first += stage.rounds


def _refuse_batch_norm(model: TrainableModel) -> None:
    found = [name for name, layer in model.layers if isinstance(layer, _BatchNorm)]
    if found:
        raise PrivacyError(
            f"the base model normalizes over the batch in {found[0]}, which mixes records, so that their privacy cannot be"
            " bounded: expected a model without batch norm, such as a ViT; use another base model, or privacy = none",
            code="privacy.batch_norm",
        )


def statistic_shapes(plan: Plan, model: TrainableModel, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Array -> shape, for a round that trains `names`: "fisher/<parameter>" like the parameter, "gram/<weight>" (d, d)."""
    names = list(names)
    own = dict(model.parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    if "fisher" in plan.strategy.sends:
        shapes |= {f"fisher/{name}": tuple(own[name].shape) for name in names}
    if "gram" in plan.strategy.sends:
        sizes = {name: layer.in_features + with_bias for name, (layer, with_bias) in gram_layers(model, names).items()}
        shapes |= {f"gram/{name}": (size, size) for name, size in sizes.items()}
    return shapes


def gram_layers(model: TrainableModel, names: Iterable[str]) -> dict[str, tuple[nn.Linear, bool]]:
    """Weight -> its linear layer, where it is trained, and whether its bias is trained with it."""
    wanted = set(names)
    own = {id(parameter): name for name, parameter in model.parameters()}
    linear = [layer for layer in model.module.modules() if isinstance(layer, nn.Linear)]
    trained = {own[id(layer.weight)]: layer for layer in linear if own.get(id(layer.weight)) in wanted}
    return {name: (layer, layer.bias is not None and own[id(layer.bias)] in wanted) for name, layer in trained.items()}
