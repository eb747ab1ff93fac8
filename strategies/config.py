"""The strategy of a plan as data: names and parameters of its components, and named recipes.

A recipe is what the literature calls a strategy, as components: `strategy = "fedadam"` in a plan stands for its line in
`RECIPES`. A component that a recipe does not name keeps its default (weighting examples, fusion mean, server optimizer sgd, no
client term). `lora` is merged into the plan's table of that name; `cite` is the source of a recipe if no component has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cotune.errors import nearest
from cotune.strategies.plugins import CLIENT_TERM_ADVICE, get_component, is_code, is_file, load_code
from cotune.strategies.registry import FOLDERS, ComponentInfo, Kind, Payload, get_builtin_components, get_kind_label

COMPLETE = {"complete": True}  # validation context: the strategy was dumped from a valid plan; do not import its components


def is_complete(info: ValidationInfo) -> bool:
    """Return whether the plan being read was dumped from a valid one."""
    return bool(info.context and info.context.get("complete"))


class Component(BaseModel):
    """A part of a strategy: its name and its parameters, as in `{ name = "sgd", lr = 0.5 }`, or the name alone.

    sha256: of the file, where the name is `file.py:function`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(description="name of a component (`cotune strategies` lists them), or file.py:function")
    sha256: str | None = Field(None, description="SHA-256 of the file, if the name is file.py:function")

    @property
    def parameters(self) -> dict[str, Any]:
        """The component's parameters: all keys but its name and hash."""
        return dict(self.model_extra or {})

    def info(self, kind: Kind) -> ComponentInfo:
        """Return the component's declaration; executes its code if the name is `file.py:function`.

        Raises:
            PlanError: If the file's content is not what the plan pins, or the code cannot be used.
            ValueError: If no component has the name.
        """
        return load_code(kind, self.name, self.sha256 or "") if is_code(self.name) else get_component(kind, self.name)


_DEFAULT_COMPONENTS: dict[Kind, Component] = {
    "weighting": Component(name="examples", cap=0),
    "fusion": Component(name="mean"),
    "server_optimizer": Component(name="sgd", lr=1.0, momentum=0.0, nesterov=False, schedule="constant", warmup=0),
}


def _complete(kind: Kind, part: Any) -> Any:
    """Fill in all parameters of a component, so that a plan states everything. Files are not opened: see `plugins`."""
    table = {"name": part} if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else part
    if isinstance(table, Component):
        table = table.model_dump()
    if isinstance(table, dict) and kind in _DEFAULT_COMPONENTS:
        table.setdefault("name", _DEFAULT_COMPONENTS[kind].name)  # parameters alone are those of the default
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        words = get_kind_label(kind)
        raise ValueError(f"expected the name of a {words}, or a table with its name and parameters, got {part!r:.80}")
    name = table.pop("name")
    sha256 = table.pop("sha256", None)
    if not is_code(name):
        return {"name": name, **get_component(kind, name).check(table)}
    if kind == "client_term":
        raise ValueError(f'"{name}" names code: {CLIENT_TERM_ADVICE}')
    if is_file(name) and sha256 is None:
        raise ValueError(f'"{name}" has no SHA-256 of its file: expected a plan that was read from its own file')
    return {"name": name, "sha256": sha256, **table}


class StrategyConfig(BaseModel):
    """weighting → fusion → server optimizer (the `strategy` table of a plan); the default is FedAvg on deltas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weighting: Component = Field(_DEFAULT_COMPONENTS["weighting"], description="how much each update counts")
    fusion: Component = Field(_DEFAULT_COMPONENTS["fusion"], description="how deltas are fused into one")
    server_optimizer: Component = Field(
        _DEFAULT_COMPONENTS["server_optimizer"],
        description="how the fused delta moves the model",
    )
    client_term: Component | None = Field(None, description="what organizations add to their gradients; absent: nothing")
    sends: tuple[Payload, ...] = Field((), description="what organizations send beside their deltas; follows from the components")

    @field_validator(*FOLDERS, mode="before")
    @classmethod
    def _parts(cls, part: Any, info: Any) -> Any:
        if is_complete(info):
            return part
        return None if part is None and info.field_name == "client_term" else _complete(info.field_name, part)

    @model_validator(mode="before")
    @classmethod
    def _weights_that_are_used(cls, table: Any) -> Any:
        """Default to the uniform weighting if the fusion uses no weights."""
        if isinstance(table, Mapping) and "weighting" not in table and "fusion" in table:
            fusion = table["fusion"]
            name = fusion.get("name") if isinstance(fusion, Mapping) else fusion
            if isinstance(name, str) and not is_code(name) and not get_component("fusion", name).needs.weights:
                return {**table, "weighting": "uniform"}
        return table

    @model_validator(mode="after")
    def _sends(self, info: ValidationInfo) -> Self:
        """Add what known components ask organizations to send.

        What components in files ask for is in the plan already: it was made where their code could be executed. The default
        components ask for nothing, and skipping them spares a process that only reads tables the import of all components.
        """
        if is_complete(info):
            return self
        others = [
            (kind, part) for kind, part in self.components() if part != _DEFAULT_COMPONENTS.get(kind) and not is_code(part.name)
        ]
        asked = {payload for kind, part in others for payload in part.info(kind).needs.sends}
        object.__setattr__(self, "sends", tuple(sorted(asked | set(self.sends))))
        return self

    def components(self) -> list[tuple[Kind, Component]]:
        """Return the components of the strategy with their kinds; no client term if there is none."""
        found: list[tuple[Kind, Component | None]] = [
            ("weighting", self.weighting),
            ("fusion", self.fusion),
            ("server_optimizer", self.server_optimizer),
            ("client_term", self.client_term),
        ]
        return [(kind, part) for kind, part in found if part is not None]

    def known_components(self) -> list[tuple[Kind, Component, ComponentInfo]]:
        """Return the components with their declarations, without those in files, which would have to be executed."""
        return [(kind, part, part.info(kind)) for kind, part in self.components() if not is_code(part.name)]

    @property
    def files(self) -> dict[str, str]:
        """Components in files: `file.py:function` -> SHA-256 of the file."""
        return {part.name: part.sha256 or "" for _, part in self.components() if is_file(part.name)}

    @property
    def compares_noise(self) -> bool:
        """Whether weights depend on the noise variance that organizations report."""
        return "noise" in self.sends

    @property
    def keeps_state(self) -> bool:
        """Whether organizations store tensors between rounds."""
        return self.client_term is not None and self.client_term.info("client_term").needs.client_state


RECIPES: dict[str, dict[str, Any]] = {
    # averaging
    "fedavg": {},
    "fedavgm": {"server_optimizer": {"name": "sgd", "momentum": 0.9}},
    # averaging that corrects for different numbers of local steps, or favors organizations with a high loss
    "fednova": {"fusion": "fednova"},
    "qfedavg": {"weighting": "uniform", "fusion": "q_fedavg"},
    "tilted": {"weighting": "tilted"},
    # robust to a few wrong or hostile organizations
    "median": {"weighting": "uniform", "fusion": "median"},
    "trimmed_mean": {"weighting": "uniform", "fusion": "trimmed_mean"},
    "krum": {"weighting": "uniform", "fusion": "krum"},
    "multi_krum": {"weighting": "uniform", "fusion": "multi_krum"},
    "bulyan": {"weighting": "uniform", "fusion": "bulyan"},
    "robust": {"fusion": "robust"},
    "rfa": {"fusion": "geometric_median"},
    "norm_bound": {"fusion": "norm_bound"},
    "centered_clipping": {"weighting": "uniform", "fusion": "centered_clipping"},
    # model merging
    "soup": {"weighting": "uniform"},
    "greedy_soup": {"weighting": "uniform", "fusion": "greedy_soup"},
    "task_arithmetic": {"weighting": "uniform", "fusion": "task_arithmetic"},
    "ties": {"weighting": "uniform", "fusion": "ties"},
    "dare": {"fusion": "dare"},
    "model_stock": {"weighting": "uniform", "fusion": "model_stock"},
    "consensus": {"weighting": "uniform", "fusion": "consensus"},
    "fisher": {"fusion": "fisher"},
    "regmean": {"fusion": "regmean"},
    # fusion of predictions
    "feddf": {"fusion": "ensemble_distillation"},
    # adapters
    "fedit": {"fusion": "fedit", "lora": {"factors": "ab"}},
    "ffa_lora": {"lora": {"factors": "b"}, "cite": "Sun et al., ICLR 2024, https://arxiv.org/abs/2403.12313"},
    "rolora": {"lora": {"factors": "alternate"}, "cite": "Chen et al., NeurIPS 2025, https://arxiv.org/abs/2502.01755"},
    "fedsvd": {"fusion": "fedsvd", "lora": {"factors": "b"}},
    "fedex": {"fusion": "fedex", "lora": {"factors": "ab"}},
    "flora": {"fusion": "flora", "lora": {"factors": "ab"}},
    "flexlora": {"fusion": "flexlora", "lora": {"factors": "ab"}},
    "fedsa": {"lora": {"factors": "ab", "keep": "b"}, "cite": "Guo et al., ICLR 2025, https://arxiv.org/abs/2410.01463"},
    "hetlora": {"weighting": "uniform", "fusion": "hetlora", "lora": {"factors": "ab"}},
    # server optimizers
    "fedadam": {"server_optimizer": "adam"},
    "fedyogi": {"server_optimizer": "yogi"},
    "fedadagrad": {"server_optimizer": "adagrad"},
    "fedexp": {"server_optimizer": "fedexp"},
    "diloco": {
        "server_optimizer": {"name": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True},
        "cite": "Douillard et al., 2023, https://arxiv.org/abs/2311.08105",
    },
    # client terms
    "fedprox": {"client_term": "proximal"},
    "scaffold": {"weighting": "uniform", "client_term": "scaffold"},
    "feddyn": {"weighting": "uniform", "client_term": "feddyn"},
}


def get_recipe_components(name: str) -> dict[str, Any]:
    """Return the components that a recipe names, as a plan's `strategy` table would."""
    return {key: value for key, value in RECIPES[name].items() if key not in ("lora", "cite")}


def expand(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's table with its recipe replaced by components.

    Keys that the plan gives beside the recipe take precedence. Code in place of a recipe, `file.py:function` or
    `flwr.serverapp.strategy:Krum`, becomes the fusion.

    Raises:
        ValueError: If no recipe has the name, or the plan contradicts it.
    """
    given = table.get("strategy")
    given = {"recipe": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or "recipe" not in given:
        return dict(table)
    name = str(given["recipe"])
    if name not in RECIPES and ":" not in name:
        for kind in FOLDERS:
            if name in get_builtin_components(kind):
                raise ValueError(f'"{name}" is a part and no strategy: expected strategy.{kind} = "{name}"')
        raise ValueError(f'unknown strategy "{name}"{nearest(name, RECIPES)}')
    wanted = {"fusion": "mean", **get_recipe_components(name)} if name in RECIPES else {"fusion": {"name": name}}
    strategy = {**wanted, **{key: _with_name(wanted.get(key), value) for key, value in given.items() if key != "recipe"}}
    lora = _lora(name, RECIPES.get(name, {}).get("lora", {}), table)
    return {**table, "strategy": strategy, **({"lora": lora} if lora else {})}


def _with_name(recipe: Any, given: Any) -> Any:
    """Complete a table of parameters without a name with the name of the recipe's component."""
    if not isinstance(given, Mapping) or "name" in given or recipe is None:
        return given
    return {**({"name": recipe} if isinstance(recipe, str) else recipe), **given}


def _lora(name: str, wanted: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """Return the plan's `lora` table with the recipe's values.

    Raises:
        ValueError: If the plan trains no adapters, so that the recipe would do nothing, or has other values.
    """
    given = table.get("lora", {})
    train = table.get("train", "head")
    modes = [each.get("mode") if isinstance(each, Mapping) else each for each in (train if isinstance(train, list) else [train])]
    if wanted and all(mode != "lora" for mode in modes):
        raise ValueError(f'the strategy "{name}" is for adapters, and no stage of the plan trains any: expected train = lora')
    if not isinstance(given, Mapping):
        return given
    for key, value in wanted.items():
        if given.get(key, value) != value:
            raise ValueError(
                f'the strategy "{name}" is for lora.{key} = "{value}", and the plan has "{given[key]}": leave it out'
            )
    return {**given, **wanted}
