"""The tables of a plan about the model and its trained parameters.

They are pure data, validated by pydantic: no module that this one imports loads PyTorch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cotune.storage.config_table import ConfigTable

TrainMode = Literal["head", "lora", "blocks", "full"]
Quantization = Literal["none", "nf4"]
Factors = Literal["b", "ab", "alternate"]
Method = Literal["vote", "average", "weighted", "stacking"]  # how the predictions of several models become one
TextMethod = Literal["average", "weighted"]  # those of language models

_PREPENDED = "its vectors stand before every text of a batch, so that Opacus finds no gradient per record for them"
_UNCHECKED = "nobody has checked here that its gradients are clipped record by record"
_WHY_NOT = {  # adapters that are known, and why they are not to be had
    "dora": "DoRA divides by the norm of the adapted weight, for which Opacus finds no gradient per record",
    "ia3": "Opacus finds no gradient per record for IA3's scaling vectors",
    "adalora": "AdaLoRA prunes ranks by the records' gradients, which no accounting covers",
    "vera": "Opacus finds no gradient per record for VeRA's scaling vectors",
    "prompt": _PREPENDED,
    "prompt_tuning": _PREPENDED,
    "prefix_tuning": _PREPENDED,
    "p_tuning": _PREPENDED,
    "loha": _UNCHECKED,
    "lokr": _UNCHECKED,
    "oft": _UNCHECKED,
}


class FeatureConfig(ConfigTable):
    """What a new head reads of the frozen encoder, instead of the vector that is made for it (the `model.feature` table)."""

    layers: tuple[int, ...] = Field(
        min_length=1,
        max_length=64,
        description="layers whose mean token vectors are concatenated, in ascending order; 0: the embeddings",
    )
    cls: bool = Field(True, description="whether the vector of the first token in the last layer is added")
    whiten: Literal["public", "none"] = Field(
        "public",
        description="public: center, scale and whiten the feature by a map that is fitted to texts of random tokens; "
        "none: use it unchanged",
    )
    map_hash: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of that map, which every participant computes identically; checked when given",
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or value[0] < 0:
            raise ValueError(f"expected different layers in ascending order, from 0 on, got {list(value)}")
        return value


class MemberConfig(ConfigTable):
    """What is promised about the records that a member of a fused base model has learned from (`[[model.members]]`).

    A member is used at every organization, and a model that was trained without privacy may reveal single records.
    """

    name: str = Field(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="whose model it is, such as an organization's",
    )
    epsilon: float | None = Field(None, gt=0, lt=1e6, description="ε of the run that it comes from, as its model card says")
    delta: float | None = Field(None, gt=0, lt=1, description="δ of that run")
    handed_over: bool = Field(
        False, description="whether it was trained without privacy, and its organization hands it to all others as it is"
    )

    @model_validator(mode="after")
    def _says_one_of_both(self) -> MemberConfig:
        stated = self.epsilon is not None and self.delta is not None
        if (self.epsilon is None) != (self.delta is None) or stated == self.handed_over:
            raise ValueError(
                f"member {self.name}: its records are protected by ε and δ, or it is handed over without: expected epsilon and"
                " delta, or handed_over = true"
            )
        return self


class ModelConfig(ConfigTable):
    """Which pretrained model, and how it reads records (the `model` table of a plan)."""

    base: str = Field(description='a folder, a Hugging Face hub id, or "package:NAME" for a model shipped in a Python package')
    base_hash: str | None = Field(
        None,
        description="SHA-256 of the base model's weights, configuration, tokenizer and chat templates, and of the settings of"
        " quantization, if there is one; checked when given",
    )
    config_hash: str | None = Field(
        None,
        description="SHA-256 of the base model's files but its weights; checked when given, and all that a server without"
        " the weights can check",
    )
    revision: str | None = Field(
        None, description="for a hub id, the commit, tag or branch that is fetched; the plan of a federation pins the commit"
    )
    pooling: Literal["auto", "mean", "native"] = Field(
        "auto",
        description="how token vectors are pooled into one: as the architecture does, or their mean (auto: as the model's"
        " folder says)",
    )
    target_range: tuple[float, float] | None = Field(
        None,
        description="regression: the smallest and the largest target, such as [0.0, 5.0]; targets outside are clipped to "
        "it; public, chosen before anyone looks at records and never computed from them",
    )
    feature: FeatureConfig | None = Field(
        None,
        description="train = head alone: a wider feature for a linear head; absent or none: what the architecture's own head"
        " reads",
    )
    members: tuple[MemberConfig, ...] = Field(
        (),
        max_length=64,
        description="of a base model that `cotune fuse` has written: one entry for each of its models, in their order; what is"
        " trained is a meta-model on what they predict",
    )
    max_length: int = Field(128, ge=2, le=32768, description="tokens per text; the rest is cut off")
    max_target_length: int | None = Field(
        None,
        ge=1,
        le=32768,
        description="causal-lm: the most tokens of a target, its end token included; the rest is cut off. Scores over the"
        " vocabulary, the most expensive part, are computed only at that many positions of a record",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="arithmetic of frozen parts (auto: bfloat16 where the hardware has it); trained parameters are float32",
    )

    quantization: Quantization = Field(
        "none",
        description="nf4: the linear layers of the base model's blocks are kept in 4 bits (QLoRA), with blocks of 64 weights;"
        " for train = lora and head, with the extra qlora (bitsandbytes); none: as the files have them",
    )

    @field_validator("feature", mode="before")
    @classmethod
    def _none_is_absent(cls, value: Any) -> Any:
        """So that `--set model.feature=none` takes a preset's feature away."""
        return None if value == "none" else value

    @model_validator(mode="after")
    def _quantizes_a_single_model(self) -> ModelConfig:
        other = "feature" if self.feature is not None else "members" if self.members else None
        if self.quantization != "none" and other:
            raise ValueError(
                f'quantization = "{self.quantization}" is not supported with model.{other}: expected quantization = none, or no'
                f" model.{other}"
            )
        return self

    @field_validator("members")
    @classmethod
    def _members_are_distinct(cls, value: tuple[MemberConfig, ...]) -> tuple[MemberConfig, ...]:
        if len({member.name for member in value}) < len(value):
            raise ValueError(f"expected a name of its own for each member, got {[member.name for member in value]}")
        return value

    @field_validator("target_range")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (all(map(math.isfinite, value)) and value[0] < value[1]):
            raise ValueError(f"target_range = {list(value)}: expected two numbers, the smaller one first")
        return value


class LoraConfig(ConfigTable):
    """Low-rank adapters (Hu et al., ICLR 2022): W + s·B·A, through peft."""

    method: Literal["lora", "rslora"] = Field(
        "lora", description="lora: s = α/r; rslora: s = α/√r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)"
    )
    rank: int = Field(8, ge=1, le=512, description="rank r of the adapters")
    alpha: float = Field(16.0, gt=0, le=4096, description="scaling α of the adapters")
    factors: Factors = Field(
        "b",
        description="the factors that are trained: b (A stays as drawn from the plan's seed: FFA-LoRA, Sun et al., ICLR "
        "2024), ab (both), or alternate (B in odd rounds, A in even ones: RoLoRA)",
    )
    keep: Literal["nothing", "b"] = Field(
        "nothing",
        description="what organizations train and do not share; b: B and the head, so that each has a model of its own around"
        " a common A (FedSA-LoRA, Guo et al., ICLR 2025)",
    )
    targets: tuple[str, ...] | Literal["auto"] = Field(
        "auto",
        description="names of the linear modules that get an adapter (auto: what peft adapts in this architecture)",
    )
    smaller_ranks: bool = Field(
        False, description="whether organizations may train only the first components of the rank, as their policy says"
    )
    layers: int | None = Field(
        None, ge=1, description="number of transformer layers, counted from the last, that get adapters; default: all"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _possible(cls, value: Any) -> Any:
        reason = _WHY_NOT.get(str(value).lower().replace("-", "_"))
        if reason:
            raise ValueError(f"expected lora or rslora: {reason}")
        return value
