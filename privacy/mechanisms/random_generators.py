"""Random generators: cryptographic ones, seeded by the operating system, for private randomness; reproducible ones for the rest.

torch's CPU generator keeps only 32 bits of any seed (`manual_seed(5)` and `manual_seed(5 + 2**32)` give the same stream), so that
noise drawn from it could be found by trying all seeds. Noise and Poisson sampling under differential privacy are drawn from
ChaCha20 keyed with 256 bits of OS entropy instead. `noise` deals with what floating point would reveal.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator

import numpy as np
from randomgen import ChaCha
from torch.utils.data import Sampler


def private_generator() -> np.random.Generator:
    """Return a generator that nobody can predict: ChaCha20 under a fresh 256-bit key from the operating system."""
    return np.random.Generator(ChaCha(key=secrets.randbits(256)))


def keyed_generator(key: str, *parts: int | str) -> np.random.Generator:
    """Return a generator that only the holder of a secret key can repeat: ChaCha20 under SHA-256 of the key and the parts."""
    text = "\x1f".join([key, *(f"{type(p).__name__}:{p}" for p in parts)])
    return np.random.Generator(ChaCha(key=int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")))


def seeded_generator(*parts: int | str) -> np.random.Generator:
    """Return a reproducible generator for everything that is not private: its stream depends on all the parts, in order."""
    return np.random.default_rng(derive_seed(*parts))


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts, the same on every machine.

    >>> derive_seed(7, "round", 1) == derive_seed(7, "round", 1) != derive_seed(7, "round", 2)
    True
    """
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class PoissonSampler(Sampler[list[int]]):
    """Poisson sampling: in each batch every record is present independently; batches may be empty.

    Args:
        examples: How many records (or units) there are.
        sample_rate: Probability in (0, 1] with which each is present.
        steps: How many batches to draw.
        generator: One uniform number per record and batch is drawn from it.

    Raises:
        ValueError: For a sample rate outside of (0, 1].
    """

    def __init__(self, examples: int, sample_rate: float, steps: int, generator: np.random.Generator) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"expected 0 < sample_rate <= 1, got {sample_rate}")
        self.examples = examples
        self.sample_rate = sample_rate
        self.steps = steps
        self.generator = generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield np.flatnonzero(self.generator.random(self.examples) < self.sample_rate).tolist()
