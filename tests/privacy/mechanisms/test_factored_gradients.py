"""Gradients that are held as factors: the same gradients, and the same contributions to a sum, as those that exist as a whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cotune.errors import PrivacyError
from cotune.privacy.mechanisms import factored_gradients
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.exact_sum import ClippingMode
from cotune.privacy.mechanisms.factored_gradients import FactoredGradients, RowGradients, Scratch, has_fewer_factors, pieces_of
from cotune.privacy.mechanisms.grid_noise import grid_step
from cotune.privacy.mechanisms.per_example import Batch, per_example

ROWS, POSITIONS, INPUTS, OUTPUTS = 8, 3, 24, 20
both = pytest.mark.parametrize("clipping", ["flat", "per_layer"])


def factored(
    rows: int = ROWS, *, uses: int = 1, seed: int = 0, inputs: int = INPUTS, outputs: int = OUTPUTS
) -> FactoredGradients:
    generator = torch.Generator().manual_seed(seed)
    factors = [
        (torch.randn(ROWS, POSITIONS, inputs, generator=generator), torch.randn(ROWS, POSITIONS, outputs, generator=generator))
        for _ in range(uses)
    ]
    return FactoredGradients(rows, torch.float32, factors)


def summed(found: RowGradients, clipping: ClippingMode = "flat", clip: float = 1.0) -> Tensor:
    [total] = _sums([found], clipping, clip)
    return total


def _sums(found: list[RowGradients], clipping: ClippingMode, clip: float) -> list[Tensor]:
    shapes = [piece.shape[1:] for _, piece in (next(pieces_of(each)) for each in found)]
    total = ClippedSum([torch.zeros(shape) for shape in shapes], clip, 1.0, clipping)
    total.add([each.clone() if isinstance(each, Tensor) else each for each in found])
    return total.totals()


@pytest.fixture(params=[1, 2 * INPUTS * OUTPUTS, 2**19])
def piece_entries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, two, and all of them."""
    monkeypatch.setitem(factored_gradients._PIECE_ENTRIES, "cpu", request.param)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, ROWS),
    uses=st.integers(1, 3),
    seed=st.integers(0, 99),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
)
def test_the_gradients_are_sums_of_products(rows: int, uses: int, seed: int, inputs: int, outputs: int) -> None:
    given_ = factored(rows, uses=uses, seed=seed, inputs=inputs, outputs=outputs)
    products = [torch.einsum("nto,nti->noi", above.double(), x.double()) for x, above in given_.factors]
    torch.testing.assert_close(given_.whole(), sum(products)[:rows].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("piece_entries")
def test_pieces_cover_each_row_once() -> None:
    for rows in range(1, ROWS + 1):
        found = [range(ROWS)[which] for which, _ in factored(rows).pieces()]
        assert list(itertools.chain(*found)) == list(range(rows))
        assert all(len(which) == len(piece) for which, piece in zip(found, (g for _, g in factored(rows).pieces()), strict=True))


@both
@pytest.mark.usefixtures("piece_entries")
def test_contributions_are_those_of_whole_gradients(clipping: ClippingMode) -> None:
    found = factored(uses=2)
    bias = torch.randn(ROWS, OUTPUTS)
    expected = _sums([found.whole(), bias], clipping, 2.0)
    for sums, same in zip(_sums([factored(uses=2), bias], clipping, 2.0), expected, strict=True):
        assert torch.equal(sums, same)


@pytest.mark.usefixtures("piece_entries")
@pytest.mark.parametrize("sigma", [0.0, 1 / 16, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("clip", [1.0, 1.9])
def test_sums_are_exact_where_every_row_adds_all_it_can_to_one_entry(sigma: float, clip: float) -> None:
    """More rows than float32 could add: against whole numbers of Python."""
    rows, repeats = 64, 5
    inputs = torch.zeros(rows, 1, INPUTS)
    inputs[:, 0, 3] = 1.0
    above = torch.zeros(rows, 1, OUTPUTS)
    above[:, 0, 7] = 10.0
    above[:, 0, 8] = torch.linspace(-1.0, 1.0, rows)
    total = ClippedSum([torch.zeros(OUTPUTS, INPUTS)], clip, sigma, "flat")
    alone = []
    for row in range(rows):
        one = ClippedSum([torch.zeros(OUTPUTS, INPUTS)], clip, sigma, "flat")
        one.add([FactoredGradients(1, torch.float32, [(inputs[row : row + 1], above[row : row + 1])])])
        alone.append(one.totals()[0])
    for _ in range(repeats):
        total.add([FactoredGradients(rows, torch.float32, [(inputs, above)])])
    step = grid_step(clip, sigma)
    [found] = total.totals()
    for place in ((7, 3), (8, 3), (0, 0)):
        expected = repeats * sum(int(each[place].item() / step) for each in alone)
        assert int(found[place].item() / step) == expected
    assert float(alone[0].norm()) > 0.98 * clip


def test_pieces_share_their_memory_and_nothing_of_gradients_is_kept() -> None:
    """A step of all layers had taken 2 GB for pieces of 2 MB."""
    found = factored(inputs=400, outputs=400)
    places = [piece.data_ptr() for _, piece in found.pieces()]
    assert len(places) > 1
    assert len(set(places)) == 1
    given_: list[RowGradients] = [found, torch.randn(ROWS, OUTPUTS)]
    ClippedSum([torch.zeros(400, 400), torch.zeros(OUTPUTS)], 1.0, 1.0, "flat").add(given_)
    assert given_ == []


@pytest.mark.usefixtures("piece_entries")
def test_a_row_changes_the_sum_by_what_it_contributes() -> None:
    """To the bit, as the last of several and alone, and by no more than the clip norm."""
    found = factored()
    alone = FactoredGradients(
        1, torch.float32, [(x[-1:].repeat(ROWS, 1, 1), above[-1:].repeat(ROWS, 1, 1)) for x, above in found.factors]
    )
    difference = summed(found) - summed(found.first(ROWS - 1))
    assert torch.equal(difference, summed(alone))
    assert 0.9 < float(difference.norm()) <= 1.0


@both
@pytest.mark.usefixtures("piece_entries")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_finite_gradients_adds_nothing(clipping: ClippingMode, bad: float) -> None:
    """In no parameter: its bias, which is finite, does not count either."""
    found = factored()
    found.factors[0][0][2, 1, 5] = bad
    bias = torch.randn(ROWS, OUTPUTS)
    others = [row for row in range(ROWS) if row != 2]
    expected = _sums([found.whole()[others], bias[others]], clipping, 1.0)
    for sums, same in zip(_sums([found, bias], clipping, 1.0), expected, strict=True):
        assert torch.equal(sums, same)


@pytest.mark.usefixtures("piece_entries")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, ROWS - 1), output=st.integers(0, OUTPUTS - 1), inward=st.integers(0, INPUTS - 1))
def test_fingerprints_tell_rows_apart_by_any_bit(row: int, output: int, inward: int) -> None:
    """The same gradients have the same ones at every place; the last bit of one entry changes them."""
    one = torch.randn(1, 1, INPUTS)
    above = torch.randn(1, 1, OUTPUTS)
    equal = FactoredGradients(ROWS, torch.float32, [(one.repeat(ROWS, 1, 1), above.repeat(ROWS, 1, 1))])
    norms, hashes = equal.fingerprints()
    assert len(set(hashes.tolist())) == len(set(norms.tolist())) == 1
    position = [one.repeat(ROWS, 1, 1), above.repeat(ROWS, 1, 1)]
    extra = [torch.zeros(ROWS, 1, INPUTS), torch.zeros(ROWS, 1, OUTPUTS)]
    entry = float(one[0, 0, inward] * above[0, 0, output])
    extra[0][row, 0, inward] = 1.0
    extra[1][row, 0, output] = abs(entry) * 2.0**-22
    changed = FactoredGradients(ROWS, torch.float32, [(position[0], position[1]), (extra[0], extra[1])])
    _, other = changed.fingerprints()
    assert [int(hash_) != int(hashes[0]) for hash_ in other] == [number == row for number in range(ROWS)]


def test_fingerprints_show_what_is_not_finite() -> None:
    found = factored()
    found.factors[0][0][2, 1, 5] = float("inf")
    norms, _ = found.fingerprints()
    assert norms.isfinite().tolist() == [row != 2 for row in range(ROWS)]


def test_gradients_that_do_not_repeat_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that adds in another order each time: their norms would not be those of what is added."""
    numbers = itertools.count()
    original = factored_gradients.multiply

    def unsteady(inputs: Tensor, above: Tensor, scratch: Scratch | None = None) -> Tensor:
        found = original(inputs, above, scratch)
        found[0, 0, 0] += next(numbers) * 1e-6
        return found

    monkeypatch.setattr(factored_gradients, "multiply", unsteady)
    with pytest.raises(PrivacyError) as caught:
        summed(factored())
    assert caught.value.code == "privacy.not_repeatable"


@given(rows=st.integers(1, 5), positions=st.integers(1, 50), inputs=st.integers(1, 50), outputs=st.integers(1, 50))
def test_factors_are_held_where_they_are_fewer_numbers(rows: int, positions: int, inputs: int, outputs: int) -> None:
    x = torch.empty(rows, positions, inputs, device="meta")
    above = torch.empty(rows, positions, outputs, device="meta")
    assert has_fewer_factors(x, above) == (positions * (inputs + outputs) < inputs * outputs)


def test_a_wide_layer_holds_factors_and_no_graph() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 2))

    def loss(batch: Batch) -> Tensor:
        return module(batch["x"]).sin().sum(dim=(1, 2))

    rows = torch.randn(4, POSITIONS, 24)
    with per_example(module, loss) as of:
        _, found = of.factors({"x": rows})
        _, whole = of.gradients({"x": rows})
    assert isinstance(found, list)
    wide, *others = found
    assert isinstance(wide, FactoredGradients)
    assert all(isinstance(each, Tensor) for each in others)
    assert not any(factor.requires_grad for factor in itertools.chain(*wide.factors))
    for row in range(4):
        alone = torch.autograd.grad(loss({"x": rows[row : row + 1]}).sum(), tuple(module.parameters()))
        for gradients, expected in zip(whole, alone, strict=True):
            torch.testing.assert_close(gradients[row], expected)


@pytest.mark.parametrize("positions", [5, 13])
def test_a_wide_layer_that_is_used_twice_has_the_sum(positions: int) -> None:
    """Also where the one use has fewer factors, and the other (13 · 48 > 24 · 24) has not."""
    torch.manual_seed(0)
    module = nn.Linear(24, 24)

    def loss(batch: Batch) -> Tensor:
        x = batch["x"]
        once = module(x).tanh()
        return module(once[:, :1]).sin().sum(dim=(1, 2)) + module(once).cos().sum(dim=(1, 2))

    rows = torch.randn(4, positions, 24)
    with per_example(module, loss) as of:
        _, found = of.factors({"x": rows})
    assert isinstance(found, list)
    whole = factored_gradients.whole_of(found[0])
    for row in range(4):
        weight, _ = torch.autograd.grad(loss({"x": rows[row : row + 1]}).sum(), tuple(module.parameters()))
        torch.testing.assert_close(whole[row], weight)
