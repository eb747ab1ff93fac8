"""The arithmetic that features are computed in: bfloat16 only where no record's feature depends on other records."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from cotune.models.check_cache import model_key, read_check, write_check
from cotune.models.device import bfloat16_is_fast, kernel_key
from cotune.models.features.feature_batches import feature_lengths, feature_rows, feature_slots
from cotune.models.features.head import encode_vectors, get_readout
from cotune.models.synthetic_batches import example_probes, mixes_records
from cotune.models.trainable import TrainableModel

_mixing: WeakKeyDictionary[TrainableModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def feature_dtype(model: TrainableModel, precision: str) -> torch.dtype:
    """Return the arithmetic that features are computed in.

    Args:
        model: The model.
        precision: float32, bfloat16, or auto for bfloat16 where it is fast and no record's feature depends on others.
    """
    if precision == "auto":
        fast = bfloat16_is_fast(model.device)
        return torch.bfloat16 if fast and not features_mix(model, torch.bfloat16) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def features_mix(model: TrainableModel, dtype: torch.dtype) -> bool:
    """Whether, in this arithmetic, on this device and with this many threads, a feature changes in any bit with the records
    beside it, in any shape of batch that there is. Found out once per model and machine: that they do not is kept on disk.

    Tried on the base model with random adapters, whatever state the model is in: see `independence`.
    """
    known = _mixing.setdefault(model, {})
    key = (dtype, *kernel_key(model.device))
    if key not in known:
        decides = (*model_key(model), get_readout(model), dtype, feature_lengths(model), feature_slots(model.device))
        known[key] = read_check("features", decides) is None and _features_mix(model, dtype)
        if not known[key]:
            write_check("features", decides, 0.0)
    return known[key]


def _features_mix(model: TrainableModel, dtype: torch.dtype) -> bool:
    slots = feature_slots(model.device)

    def mixing(length: int) -> bool:
        probes = example_probes(model, length, slots, feature_rows(model, length, slots))
        return mixes_records(lambda batch: [encode_vectors(model, batch, dtype)], probes)

    with model.with_random_weights(model.adapter_names()):
        return any(map(mixing, feature_lengths(model)))
