"""The settings of a base model in 4 bits, and the hash that stands for its files and these settings together.

They are fixed, so that the same files give the same bytes everywhere; who has other ones has another base model, by its hash.
NF4 is the type of 4 bits of QLoRA (Dettmers et al., NeurIPS 2023, https://arxiv.org/abs/2305.14314, section 3). The maxima of
blocks are not quantized themselves, as that takes a mean, which depends on the order in which a machine adds up.
"""

from __future__ import annotations

import hashlib

from cotune.models.config import Quantization

BLOCK = 64  # weights with a common scale, in the order of memory
# linear layers outside the blocks of the supported architectures, which are not quantized here; transformers' quantizer skips
# them only if they are listed (llm_int8_skip_modules)
EXACT = ("lm_head", "embed_out", "project_in", "project_out", "pooler")
_SETTINGS: dict[Quantization, str] = {
    "nf4": f"nf4; weights of the linear layers of the blocks; {BLOCK} weights to a maximum in float32; from float32, on the CPU",
}


def bind_settings(files: str, quantization: Quantization) -> str:
    """Return the hash of a base model: that of its files, with the settings by which their weights are quantized.

    Args:
        files: SHA-256 (hex) over its files.
        quantization: As in the plan.

    Returns:
        A SHA-256 as hex; without quantization that of the files.
    """
    if quantization == "none":
        return files
    return hashlib.sha256(f"{files}\n{_SETTINGS[quantization]}\n".encode()).hexdigest()


def find_bound(files: str, expected: str) -> Quantization | None:
    """Return with which quantization files have an expected hash; None if with none."""
    return next((each for each in ("none", *_SETTINGS) if bind_settings(files, each) == expected), None)


def explain_quantization(quantization: Quantization) -> str:
    """Return the quantization in words, to follow the name of a base model; "" without quantization.

    Args:
        quantization: As in the plan.

    >>> explain_quantization("nf4")
    ', in 4 bits (nf4)'
    """
    return "" if quantization == "none" else f", in 4 bits ({quantization})"
