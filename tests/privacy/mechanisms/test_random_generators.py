from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from randomgen import ChaCha
from scipy import stats

from cotune.privacy.mechanisms.random_generators import PoissonSampler, derive_seed, private_generator, seeded_generator


def presence(examples: int, rate: float, steps: int, seed: int = 0) -> np.ndarray:
    """(steps, examples): which record is in which batch."""
    found = np.zeros((steps, examples), dtype=bool)
    for step, batch in enumerate(PoissonSampler(examples, rate, steps, np.random.default_rng(seed))):
        found[step, batch] = True
    return found


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_every_record_is_sampled_at_the_rate(rate: float) -> None:
    steps = 2000
    examples = 100
    count = presence(examples, rate, steps).sum(axis=0)
    low, high = stats.binom.ppf([1e-7, 1 - 1e-7], steps, rate)
    assert ((low <= count) & (count <= high)).all()
    total = stats.binom.ppf([1e-7, 1 - 1e-7], steps * examples, rate)
    assert total[0] <= count.sum() <= total[1]


def test_records_are_sampled_independently() -> None:
    """Batch sizes are binomial: neither fixed, as in shuffled epochs, nor more spread than chance."""
    steps = 4000
    examples = 60
    rate = 0.1
    found = presence(examples, rate, steps)
    sizes = found.sum(axis=1)
    assert sizes.mean() == pytest.approx(examples * rate, rel=0.03)
    assert sizes.var() == pytest.approx(examples * rate * (1 - rate), rel=0.12)
    successive = (found[1:] & found[:-1]).mean()  # the next batch does not avoid the records of this one
    assert successive == pytest.approx(rate**2, rel=0.05)


def test_empty_batches_occur_and_count_as_steps() -> None:
    sampler = PoissonSampler(10, 0.05, 500, np.random.default_rng(1))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 500
    empty = sum(not batch for batch in batches)
    low, high = stats.binom.ppf([1e-7, 1 - 1e-7], 500, 0.95**10)
    assert low <= empty <= high


@pytest.mark.parametrize("examples", [93, 99, 105, 117, 123, 1000])
def test_the_number_of_steps_is_exact(examples: int) -> None:
    """Opacus' own loaders lose a step at these sizes, through int(1 / sample_rate)."""
    assert len(list(PoissonSampler(examples, 10 / examples, 37, np.random.default_rng(0)))) == 37


def test_at_rate_one_every_batch_is_everything() -> None:
    assert list(PoissonSampler(5, 1.0, 3, np.random.default_rng(0))) == [[0, 1, 2, 3, 4]] * 3


def test_no_record_is_twice_in_a_batch() -> None:
    for batch in PoissonSampler(50, 0.5, 100, np.random.default_rng(0)):
        assert batch == sorted(set(batch))
        assert all(type(i) is int and 0 <= i < 50 for i in batch)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < sample_rate <= 1"):
        PoissonSampler(10, rate, 1, np.random.default_rng(0))


def test_derived_seeds_are_the_same_everywhere() -> None:
    digest = hashlib.sha256(b"int:7\x1fstr:round\x1fint:1").digest()
    assert derive_seed(7, "round", 1) == int.from_bytes(digest[:8], "big") // 2
    assert derive_seed(7, "round", 1) == 8755801437120679172
    assert derive_seed() == int.from_bytes(hashlib.sha256(b"").digest()[:8], "big") // 2


def test_derived_seed_depends_on_each_part_type_and_place() -> None:
    parts: list[tuple[int | str, ...]] = [
        (1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("ab", "c"), ("a", "bc"), ("abc",), (1, 2, ""), (-1, 2), (True, 2),
    ]  # fmt: skip
    assert len({derive_seed(*p) for p in parts}) == len(parts)


@given(st.lists(st.one_of(st.integers(), st.text())))
def test_derived_seeds_fit_63_bits(parts: list[int | str]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)


def test_seeded_generators_repeat_and_differ() -> None:
    def draw(*parts: int | str) -> list[float]:
        return list(seeded_generator(*parts).random(4))

    assert draw(7, "a") == draw(7, "a")
    assert draw(7, "a") != draw(7, "b")


def test_torch_keeps_only_32_bits_of_a_seed() -> None:
    """Why no privacy noise comes from torch: all of its streams can be tried."""
    torch_streams = [torch.randn(8, generator=torch.Generator().manual_seed(5 + high * 2**32)) for high in range(3)]
    assert torch.equal(torch_streams[0], torch_streams[1])
    assert torch.equal(torch_streams[0], torch_streams[2])
    ours = [np.random.Generator(ChaCha(key=5 + high * 2**32)).standard_normal(8).tolist() for high in range(3)]
    assert ours[0] != ours[1] != ours[2] != ours[0]


def test_private_generators_ignore_every_seed() -> None:
    drawn = []
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(tuple(private_generator().integers(2**63, size=4).tolist()))
    assert len(set(drawn)) == 3


def test_private_generators_are_cryptographic_with_a_full_key() -> None:
    generator = private_generator()
    assert isinstance(generator.bit_generator, ChaCha)
    state = generator.bit_generator.state["state"]
    assert state["rounds"] == 20
    keys = {tuple(private_generator().bit_generator.state["state"]["keysetup"]) for _ in range(50)}
    words = np.array(sorted(keys), dtype=np.uint64)
    assert len(keys) == 50
    assert (words.max(axis=0) > 0).all()  # no word of the key is always zero


def test_private_noise_is_standard_normal() -> None:
    drawn = private_generator().standard_normal(50_000)
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
