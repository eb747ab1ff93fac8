"""The affine map of a wide feature, fitted to texts that nobody wrote: rows of random tokens of the base model's own vocabulary.

Frequent tokens are drawn often. With tokens that are all as frequent, features of real texts had a mean far from 0, which takes
a part of every clipped gradient and tells no classes apart.

No record has a part in it, so that it costs no ε. It is the same for everybody who has the base model: every organization
makes it by itself, and the plan holds its hash. For that, the encoder and the fit compute in float64, in which processors and
numbers of threads differ by some 1e-13, and the result is rounded to a grid of about 1e-4.

Of millions of numbers, one may lie so near the middle between two points of the grid that two processors round it apart. So the
grid can lie in sixteen ways: the coordinator, who pins a map, takes the one in which the nearest number is farthest from any
middle, and an organization that is given a hash takes the one that has it.

Whitening is partial (covariance^(-3/8)): with the whole of it (-1/2) the smallest directions, which are mostly noise, would weigh
as much as the largest. Measured in docs/results/tweets.md.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel

from cotune.data.inputs.token_limits import find_max_length
from cotune.data.tasks.task import get_task
from cotune.errors import ModelError, reason_of
from cotune.models.base.bounded_parts import bounded_parts, count_entries
from cotune.models.base.lookup import BaseModelFolder
from cotune.models.check_cache import cache_folder, is_own
from cotune.models.config import FeatureConfig, ModelConfig
from cotune.models.features.layer_reading import check_layers, read_layers
from cotune.models.features.random_texts import LONGEST, draw_texts
from cotune.models.local_events import notify
from cotune.storage.files import atomic_write

_RECIPE = 3  # counts changes of anything below that changes the map
_TEXTS = 4000
_POWER = 0.75  # of the inverse standard deviation along each direction
_FLOOR = 1e-2  # added to the variances, whose mean is 1
_NORM = 2.0  # root mean square of a feature's norm
_GRID = 2.0**13  # points of the grid per unit, for the matrix between standardized coordinates
_CENTER_BITS = 20
_SHIFTS = 16  # ways in which the grid can lie
_DEAD = 1e-6  # of the largest standard deviation: a coordinate that never moves


@dataclass(frozen=True)
class AffineMap:
    """x ↦ matrix · (x - center).

    Attributes:
        center: (d,) in float32.
        matrix: (d, d) in float32.
    """

    center: Tensor
    matrix: Tensor

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the numbers."""
        digest = hashlib.sha256()
        for tensor in (self.center, self.matrix):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class FittedMap:
    """A map before it is rounded.

    Attributes:
        center: (d,) in float64.
        matrix: (d, d) between standardized coordinates, in float64.
        inverse: (d,) 1 / standard deviation, rounded; 0 for a coordinate that never moves.
        shifts: Ways in which the grid can lie, in sixteenths of its step; the best one first.
    """

    center: Tensor
    matrix: Tensor
    inverse: Tensor
    shifts: Tensor

    def choose(self, expected: str | None) -> AffineMap | None:
        """Return the map with a hash, or None where it has another one in every way; without a hash, the best one."""
        found = (self._round(shift / _SHIFTS) for shift in self.shifts.tolist())
        return next((map for map in found if expected in (None, map.hash)), None)

    def _round(self, shift: float) -> AffineMap:
        matrix = ((self.matrix * _GRID + shift).round() - shift) / _GRID
        center = (self.center * 2.0**_CENTER_BITS).round() / 2.0**_CENTER_BITS
        return AffineMap(center.float().contiguous(), (matrix * self.inverse).float().contiguous())


def pin_model(config: ModelConfig, folder: BaseModelFolder) -> ModelConfig:
    """Return the model's table of a plan with everything that fixes the model: the hashes of its files and of its map.

    Raises:
        ModelError: As `get_public_map`.
    """
    pinned = config.model_copy(update=folder.pins)
    if config.feature is None or config.feature.whiten == "none":
        return pinned
    if not folder.has_weights:
        _check_hash_given(config.feature)
        return pinned
    found = get_public_map(folder, config.feature)
    return pinned.model_copy(update={"feature": config.feature.model_copy(update={"map_hash": found.hash})})


def unknown_map(feature: FeatureConfig, hidden: int) -> AffineMap:
    """Return a map of the right shape on the meta device, where there are no weights to fit it to.

    Args:
        feature: What is read, and the hash of its map.
        hidden: Width of a layer.

    Raises:
        ModelError: The plan does not say the map's hash, so that organizations could use different maps.
    """
    _check_hash_given(feature)
    width = (len(feature.layers) + feature.cls) * hidden
    return AffineMap(torch.empty(width, device="meta"), torch.empty(width, width, device="meta"))


def _check_hash_given(feature: FeatureConfig) -> None:
    if feature.map_hash is None:
        raise ModelError(
            "the plan does not say the hash of the map of model.feature, and without the base model's weights it cannot be"
            " fitted: expected model.feature.map_hash; let `cotune plan pin` write it on a machine with the whole model",
            code="model.unpinned_base",
        )


def get_public_map(folder: BaseModelFolder, feature: FeatureConfig) -> AffineMap:
    """Return the map of a base model's feature: kept on disk once it is fitted.

    Raises:
        ModelError: It is another one than the plan states, or the encoder does not run.
    """
    try:
        return _get_map(folder, feature.layers, feature.cls, feature.map_hash)
    except ModelError:
        raise
    except Exception as error:  # an encoder without hidden states, or one that wants other inputs: each fails in its own way
        raise ModelError(
            f"the layers of the base model {folder.name} cannot be read for model.feature ({reason_of(error)[:160]}): expected an"
            " encoder of texts, such as bert, distilbert or roberta",
            code="model.no_layers",
        ) from None


@lru_cache(maxsize=2)
def _get_map(folder: BaseModelFolder, layers: tuple[int, ...], cls: bool, expected: str | None) -> AffineMap:
    found = _get_fitted(folder, layers, cls).choose(expected)
    if found is None:
        raise ModelError(
            "the map of model.feature that is fitted here is another one than the plan's, whose hash is"
            f" {str(expected)[:16]}…: use the versions of cotune, torch and transformers that the coordinator uses",
            code="model.other_map",
        )
    return found


def _get_fitted(folder: BaseModelFolder, layers: tuple[int, ...], cls: bool) -> FittedMap:
    decides = (_RECIPE, folder.content_hash, layers, cls, torch.__version__, transformers.__version__)
    file = cache_folder() / "maps" / f"{hashlib.sha256(repr(decides).encode()).hexdigest()}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, TypeError):
        if is_own(file):
            return FittedMap(**load_file(file))
    notify("map", base=folder.name, done=0, total=_TEXTS)
    fitted = fit_map(torch.cat(list(_features(folder, layers, cls))))
    with contextlib.suppress(OSError):  # nowhere to write: it is fitted again the next time
        atomic_write(file, save(asdict(fitted)))
    return fitted


def _features(folder: BaseModelFolder, layers: tuple[int, ...], cls: bool) -> Iterator[Tensor]:
    """What the encoder's layers say of texts of random tokens, in float64; rows of one length at a time, without padding."""
    reader = get_task("sequence-classification").reader(folder.path)
    with bounded_parts(count_entries(folder.path)):
        base: Any = AutoModel.from_pretrained(
            str(folder.path), use_safetensors=True, trust_remote_code=False, dtype=torch.float64
        )
    base.eval()
    check_layers(base.config, layers)
    table = base.get_input_embeddings().weight.shape[0]
    done = 0
    for rows in draw_texts(reader, table, _TEXTS, _RECIPE, find_max_length(reader, base, LONGEST)):
        with torch.no_grad():
            yield read_layers(base, layers, cls, torch.tensor(rows), None)
        done += len(rows)
        notify("map", base=folder.name, done=done, total=_TEXTS)


def fit_map(rows: Tensor) -> FittedMap:
    """Return the map that centers, scales and partly whitens rows (n, d), not rounded yet.

    matrix = s · (C + floor)^(-power/2), C being the correlation of the rows' coordinates; s brings the root mean square of the
    norm to 2.
    """
    rows = rows.double()
    deviations = rows.std(dim=0)
    alive = deviations > _DEAD * deviations.max()
    inverse = torch.where(alive, 1 / _round_mantissa(torch.where(alive, deviations, torch.ones_like(deviations))), 0.0)
    center = rows.mean(dim=0)
    standard = (rows - center) * inverse
    values, directions = torch.linalg.eigh(standard.T @ standard / len(rows))
    matrix = (directions * (values.clamp(min=0) + _FLOOR).pow(-_POWER / 2)) @ directions.T
    matrix *= _NORM / (standard @ matrix).square().sum(dim=1).mean().sqrt()
    return FittedMap(center, matrix, inverse, _order_shifts(matrix))


def _order_shifts(matrix: Tensor) -> Tensor:
    """The ways in which the grid can lie, that first which leaves every number farthest from a middle."""
    distances = [((matrix * _GRID + shift / _SHIFTS).frac().abs() - 0.5).abs().min() for shift in range(_SHIFTS)]
    return torch.stack(distances).argsort(descending=True)


def _round_mantissa(values: Tensor) -> Tensor:
    """Round to 12 significant bits, exactly."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**12).round() / 2.0**12, exponent)
