"""A fused model as a folder, with the rule that fuses what its members predict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cotune.data.config import TaskName
from cotune.data.readers.sources import check_new
from cotune.ensembles.fusion import MetaModel, PredictionFusion
from cotune.models.base.folder import FUSION_FILE, META_MODEL
from cotune.models.base.fused_folder import FusionDocument, read_fusion_document, read_meta_model, write_fused_folder


def fusion_hash(folder: Path) -> str:
    """Return SHA-256 (hex) over the rule of a fused model, which states the hashes of its members."""
    total = hashlib.sha256()
    for name in (FUSION_FILE, META_MODEL):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def write_fused(folder: Path, fusion: PredictionFusion, members: Sequence[Path], task: TaskName, labels: tuple[str, ...]) -> None:
    """Write a rule with copies of its members.

    Args:
        folder: A new folder.
        fusion: The fitted rule.
        members: Folders of finished models, in the order of the rule's weights.
        task: Of all members.
        labels: In the order of the fused probabilities.

    Raises:
        RunError: The folder is there already.
        ModelError: A member is a fused model itself.
    """
    check_new(folder)
    meta = fusion.meta_model
    fields = {
        "method": fusion.method,
        "task": task,
        "labels": labels,
        "temperatures": fusion.temperatures,
        "weights": fusion.weights,
    }
    arrays = None if meta is None else {"coefficients": meta.coefficients, "intercepts": meta.intercepts}
    write_fused_folder(folder, members, fields, arrays)


def read_fused(folder: Path) -> tuple[FusionDocument, PredictionFusion]:
    """Read the rule of a fused model, and check that its members are those that it was fitted for.

    Raises:
        ModelError: A file is damaged, or a member is not the stated one.
    """
    document = read_fusion_document(folder)
    meta = MetaModel(**read_meta_model(folder, document)) if document.method == "stacking" else None
    return document, PredictionFusion(document.method, document.temperatures, document.weights, meta)
