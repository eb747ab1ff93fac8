"""The strategy of a plan: names and parameters of its parts, checked against the parts' own signatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cotune.strategies.parts import FOLDERS, Kind, PartInfo, Payload
from cotune.strategies.plugins import NO_TERM, is_code, is_file, load_code, part_named


class Part(BaseModel):
    """A part of a strategy: its name and its parameters, as in `{ name = "sgd", lr = 0.5 }`, or the name alone.

    sha256: of the file, where the name is `file.py:function`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(description="of a part (`cotune strategies` lists them), or file.py:function")
    sha256: str | None = Field(None, description="of the file, where the name is file.py:function")

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def info(self, kind: Kind) -> PartInfo:
        """What the part says of itself. Runs the code that it names. Raises PlanError for a file that is not the plan's."""
        return load_code(kind, self.name, self.sha256 or "") if is_code(self.name) else part_named(kind, self.name)


_DEFAULT_PARTS: dict[Kind, Part] = {
    "weighting": Part(name="examples", cap=0),
    "fusion": Part(name="mean"),
    "server_optimizer": Part(name="sgd", lr=1.0, momentum=0.0, schedule="constant", warmup=0),
}


def _complete(kind: Kind, part: Any) -> Any:
    """A part with all its parameters, so that a plan says everything. Code is not opened: see `plugins`."""
    table = {"name": part} if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else part
    if isinstance(table, Part):
        table = table.model_dump()
    if isinstance(table, dict) and kind in _DEFAULT_PARTS:
        table.setdefault("name", _DEFAULT_PARTS[kind].name)  # parameters alone are those of the default
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        words = kind.replace("_", " ").replace("optimizer", "optimiser")
        raise ValueError(f"expected the name of a {words}, or a table with its name and parameters, got {part!r:.80}")
    name, sha256 = table.pop("name"), table.pop("sha256", None)
    if not is_code(name):
        return {"name": name, **part_named(kind, name).check(table)}
    if kind == "client_term":
        raise ValueError(f'"{name}" names code: {NO_TERM}')
    if is_file(name) and sha256 is None:
        raise ValueError(f'"{name}" came without the SHA-256 of the file: expected a plan that was read from its own file')
    return {"name": name, "sha256": sha256, **table}


class StrategyConfig(BaseModel):
    """weighting → fusion → server optimiser (the `strategy` table of a plan); the default is FedAvg on deltas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weighting: Part = Field(_DEFAULT_PARTS["weighting"], description="who counts how much")
    fusion: Part = Field(_DEFAULT_PARTS["fusion"], description="how the deltas become one")
    server_optimizer: Part = Field(
        _DEFAULT_PARTS["server_optimizer"],
        description="how the one delta moves the model",
    )
    client_term: Part | None = Field(None, description="what organisations add to their gradients; absent: nothing")
    sends: tuple[Payload, ...] = Field((), description="what organisations send beside their deltas; found from the parts")

    @field_validator(*FOLDERS, mode="before")
    @classmethod
    def _parts(cls, part: Any, info: Any) -> Any:
        return None if part is None and info.field_name == "client_term" else _complete(info.field_name, part)

    @model_validator(mode="before")
    @classmethod
    def _weights_that_are_used(cls, table: Any) -> Any:
        """Who names a fusion that uses no weights need not name the uniform weighting beside it."""
        if isinstance(table, Mapping) and "weighting" not in table and "fusion" in table:
            fusion = table["fusion"]
            name = fusion.get("name") if isinstance(fusion, Mapping) else fusion
            if isinstance(name, str) and not is_code(name) and not part_named("fusion", name).needs.weights:
                return {**table, "weighting": "uniform"}
        return table

    @model_validator(mode="after")
    def _sends(self) -> Self:
        """Those of known parts; those of code are in the plan, which was made where the code could be run.

        The default parts send nothing; to skip them spares a process that only reads tables the import of all parts.
        """
        others = [(kind, part) for kind, part in self.parts() if part != _DEFAULT_PARTS.get(kind) and not is_code(part.name)]
        asked = {payload for kind, part in others for payload in part.info(kind).needs.sends}
        object.__setattr__(self, "sends", tuple(sorted(asked | set(self.sends))))
        return self

    def parts(self) -> list[tuple[Kind, Part]]:
        """The parts that the strategy has."""
        found: list[tuple[Kind, Part | None]] = [
            ("weighting", self.weighting),
            ("fusion", self.fusion),
            ("server_optimizer", self.server_optimizer),
            ("client_term", self.client_term),
        ]
        return [(kind, part) for kind, part in found if part is not None]

    def known_parts(self) -> list[tuple[Kind, Part, PartInfo]]:
        """Without those that are code, which must be run to be known."""
        return [(kind, part, part.info(kind)) for kind, part in self.parts() if not is_code(part.name)]

    @property
    def files(self) -> dict[str, str]:
        """Parts in files: `file.py:function` -> SHA-256 of the file."""
        return {part.name: part.sha256 or "" for _, part in self.parts() if is_file(part.name)}

    @property
    def compares_noise(self) -> bool:
        """Whether the weights depend on the noise that updates state."""
        return "noise" in self.sends

    @property
    def keeps_state(self) -> bool:
        """Whether organisations keep tensors from round to round."""
        return self.client_term is not None and self.client_term.info("client_term").needs.client_state
