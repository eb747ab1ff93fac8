"""Find the parameters of a plan's model that are trained, shared or personal, and the statistics that its strategy needs.

The client uses names and shapes to build its update, and the server to validate it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cotune.data.inputs.chat_template import check_chat_template
from cotune.data.inputs.chat_wording import wording_of
from cotune.errors import ModelError, PrivacyError
from cotune.models.config import ModelConfig
from cotune.models.multi_head import head_prefix
from cotune.models.trainable import TrainableModel, get_model, open_model
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.privacy.config import RecordPrivacy
from cotune.strategies.plugins import is_code


def get_plan_model(plan: Plan, device: str, *, needs_weights: bool = True) -> TrainableModel:
    """Return the plan's base model with its head, and with adapters if a stage trains them.

    There is one per process, which all callers share.

    Args:
        plan: The plan.
        device: Such as "cpu" or "cuda:0".
        needs_weights: False: where the base model's folder has no weights, the model does without (see `load_model`).

    Raises:
        ModelError: If it cannot be loaded, or cannot write the plan's chats, or has no room for them.
        PrivacyError: If it mixes records of a batch, which record-level privacy rules out.
    """
    lora = plan.lora if plan.uses_lora else None
    own_adapters = "adapter" in plan.personal.parts
    model = get_model(plan.model, plan.labels, lora, plan.seed, device, plan.task, own_adapters, needs_weights, plan.data.tags)
    if plan.data.chats:
        check_chat_template(model.loaded.reader, plan.data.system)
        _check_room(plan, model)
    if isinstance(plan.privacy, RecordPrivacy):
        _refuse_batch_norm(model)
    return model


def _check_room(plan: Plan, model: TrainableModel) -> None:
    """Raises ModelError where what stands in every chat leaves no room for an answer, so that all of them would be cut off."""
    loaded = model.loaded
    if loaded.task.lost(loaded.reader, loaded.max_length, [wording_of(plan.data).ask("a", "b")]):
        raise ModelError(
            f"the chat template, data.system and data.instruction take more than the {loaded.max_length} tokens that the model"
            " reads of a chat (model.max_length), so that no record below them has an answer left: expected room for it;"
            " shorten these, or raise model.max_length",
            code="model.no_room_for_chats",
        )


_open_own_model = lru_cache(maxsize=4)(open_model)  # simulated organizations train their own models one after the other


def own_model_config(plan: Plan, base: str) -> ModelConfig:
    """Return the plan's `model` table for another base model."""
    return plan.model.model_copy(update={"base": base, "base_hash": None, "config_hash": None, "revision": None, "feature": None})


def get_own_model(plan: Plan, device: str, base: str) -> TrainableModel:
    """Return the plan's model on an organization's own base model, which it may have if only predictions are shared.

    Args:
        plan: The plan.
        device: Such as "cpu" or "cuda:0".
        base: Name or folder of the base model.

    Raises:
        ModelError: If it cannot be loaded.
        PrivacyError: If it mixes records of a batch, which record-level privacy rules out.
    """
    model = _open_own_model(
        own_model_config(plan, base), plan.labels, plan.lora if plan.uses_lora else None, plan.seed, device, plan.task
    )
    if isinstance(plan.privacy, RecordPrivacy):
        _refuse_batch_norm(model)
    return model


def trained_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """Return the names of the parameters that organizations train in a round, in the model's order.

    Args:
        plan: The plan.
        model: Of the plan.
        round: Number of the round, from 1.

    Raises:
        PlanError: If the plan has no such round.
        ModelError: If a stage trains no parameter of the model.
    """
    return stage_names(plan, plan.get_stage(round), model, round)


def stage_names(plan: Plan, stage: Stage, model: TrainableModel, round: int = 1) -> list[str]:
    """Return the names of the parameters that a stage trains, in the model's order.

    Args:
        plan: The plan.
        stage: Its mode selects the parameters; personal normalization layers are added.
        model: Of the plan.
        round: Its parity matters if the factors of adapters alternate.
    """
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings, round=round, layers=stage.layers)
    if "norm" not in plan.personal.parts:
        return names
    both = {*names, *model.norm_names()}
    return [name for name, _ in model.parameters() if name in both]


def shared_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """Return the names of the arrays that organizations send in a round.

    These are the parameters that they train, without personal ones. If only predictions are shared, it is the single array of
    predictions, for which the model is not asked.

    Args:
        plan: Decides what is shared, and what stays with the organizations.
        model: Of the plan, whose order the names have.
        round: From 1; see `trained_names`, which raises what this raises.
    """
    if plan.shares_predictions:
        return [SCORES]
    names = trained_names(plan, model, round)
    if not plan.keeps_parts:
        return names
    personal = _personal_names(plan, model)
    return [name for name in names if name not in personal]


def held_names(plan: Plan, names: Iterable[str], tasks: Collection[str]) -> list[str]:
    """Return the parameters that an organization trains, without the heads of tasks that it does not have.

    Args:
        plan: The plan.
        names: Parameters that are trained in the round.
        tasks: Tasks of which the organization has records.
    """
    others = tuple(head_prefix(task.name) for task in plan.tasks if task.name not in tasks)
    return [name for name in names if not name.startswith(others)]


def heads_of(plan: Plan, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return task -> the parameters among `names` that belong to its head; empty if the plan has only one task."""
    names = list(names)
    return {task.name: frozenset(n for n in names if n.startswith(head_prefix(task.name))) for task in plan.tasks}


def personal_names(plan: Plan, model: TrainableModel, round: int) -> list[str]:
    """Return the names of the personal parameters that organizations have trained up to a round.

    For a personal copy of the model, these are all parameters that it has trained.

    Args:
        plan: Decides what is personal.
        model: Of the plan, whose order the names have.
        round: The last of these rounds.

    Returns:
        The names; empty if the plan keeps nothing personal.
    """
    if not plan.keeps_personal and not plan.shares_predictions:
        return []
    whole = plan.personal.keeps_copy or plan.shares_predictions
    personal = {name for name, _ in model.parameters()} if whole else _personal_names(plan, model)
    trained = {name for number in _rounds_that_differ(plan, round) for name in trained_names(plan, model, number)}
    return [name for name, _ in model.parameters() if name in trained & personal]


def _personal_names(plan: Plan, model: TrainableModel) -> set[str]:
    """Return the names of all parameters that stay with the organization if they are trained."""
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
    """Return the names of parameters that the fusion may change besides the trained ones.

    These are other factors of adapters, or the weights that they adapt. A fusion in a file is not executed here, so it may change
    any of them.

    Args:
        plan: The plan.
        model: Of the plan.
        round: Number of the round, from 1.

    Returns:
        The names; empty in a stage without adapters.
    """
    if plan.get_stage(round).mode != "lora":
        return []
    fusion = plan.strategy.fusion
    kinds = ("a", "b", "weight") if is_code(fusion.name) else fusion.info("fusion").needs.rewrites
    if plan.model.quantization != "none":
        kinds = tuple(kind for kind in kinds if kind != "weight")  # of 4 bits
    return [getattr(adapter, kind) for adapter in model.adapters() for kind in kinds]


def state_shapes(plan: Plan, model: TrainableModel, round: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of everything that the state may contain in a round.

    These are the parameters that rounds up to it share, and those that their fusions change. All others are those of the base
    model, which all organizations have.

    Args:
        plan: Decides what is shared and how it is fused.
        model: Of the plan.
        round: The last round that may have changed the state.
    """
    own = dict(model.parameters())
    names = (
        name
        for number in _rounds_that_differ(plan, round)
        for name in [*shared_names(plan, model, number), *rewritten_names(plan, model, number)]
    )
    return {name: tuple(own[name].shape) for name in names}


def scores_shape(plan: Plan) -> tuple[int, int]:
    """Return the shape (answers, classes) of shared predictions."""
    return plan.public.answers, len(plan.labels)


def student_shapes(plan: Plan, model: TrainableModel, round: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the parameters that the student may have trained up to a round.

    Args:
        plan: One whose organizations share predictions.
        model: Of the plan, which the student is.
        round: The last round that the student has learned from.
    """
    own = dict(model.parameters())
    names = {name for number in _rounds_that_differ(plan, round) for name in trained_names(plan, model, number)}
    return {name: tuple(own[name].shape) for name in own if name in names}


def _rounds_that_differ(plan: Plan, round: int) -> Iterator[int]:
    """Yield the first two rounds of each stage up to a round, as the trained factors may depend on the parity of the round."""
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
    """Return the shapes of the statistics that the plan's strategy asks for.

    Args:
        plan: The plan.
        model: Of the plan.
        names: Parameters that are trained in the round.

    Returns:
        "fisher/<parameter>" -> the parameter's shape, "gram/<weight>" -> (d, d) for d inputs of the layer, bias included.
    """
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
    """Return weight -> (its linear layer, whether its bias is trained, too), for the linear layers that are trained."""
    wanted = set(names)
    own = {id(parameter): name for name, parameter in model.parameters()}
    linear = [layer for layer in model.module.modules() if isinstance(layer, nn.Linear)]
    trained = {own[id(layer.weight)]: layer for layer in linear if own.get(id(layer.weight)) in wanted}
    return {name: (layer, layer.bias is not None and own[id(layer.bias)] in wanted) for name, layer in trained.items()}
