"""What one stage of local training sees of an organization's records: rows, batches of them, and the loss of each row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cotune.models.physical_batch import PhysicalBatch
from cotune.models.synthetic_batches import PerSlot
from cotune.privacy.mechanisms.factored_gradients import FactoredGradients, RowGradients
from cotune.privacy.mechanisms.linear_gradients import OuterProducts
from cotune.privacy.mechanisms.per_example import Batch, Batches, Unit, per_example


@dataclass(frozen=True)
class TrainingSetup:
    """What a stage trains on.

    Attributes:
        rows: How many there are.
        units: The row numbers of each unit of privacy.
        batches: Row numbers -> batches, see `privacy.per_example.Batches`; under privacy of fixed shapes with blank slots.
        alone: A row number -> a batch of that row alone, without padding.
        loss: A batch -> the loss of each slot, of its row alone; zero for blank slots.
        exact: The same in float32.
        correct: A batch -> which slots the module classifies rightly.
        samples: The same setup on three made-up rows, to check gradients with.
        check_independent_rows: Raises PrivacyError where a row's numbers depend on more than the row.
        physical: The rows of a batch as they are now; `batches` follows it.
    """

    module: nn.Module
    rows: int
    units: Sequence[Unit]
    batches: Batches
    alone: Callable[[int], Batch]
    loss: Callable[[Batch], Tensor]
    exact: Callable[[Batch], Tensor]
    correct: Callable[[Batch], Tensor]
    samples: Callable[[], TrainingSetup]
    check_independent_rows: Callable[[], object]
    physical: PhysicalBatch

    def everything(self) -> Iterator[tuple[Tensor, Batch]]:
        """All rows once: what each filled slot of a batch counts for, on the CPU, so that a unit counts for one; the batch."""
        weights = torch.zeros(self.rows, dtype=torch.float64)
        for unit in self.units:
            weights[list(unit)] = 1 / len(unit)
        for positions, batch in self.batches(range(self.rows)):
            yield weights[list(positions)], batch

    def visit_all(self, begin: Callable[[], object], visit: Callable[[Tensor, Batch], object]) -> None:
        """Visit all rows once, in batches that fit into memory.

        Args:
            begin: Sets what is summed up to zero; called again where a batch did not fit and a smaller one is tried.
            visit: Takes what each filled slot counts for, and the batch, as `everything` yields them.
        """

        def visit_from_the_start() -> None:
            begin()
            for weights, batch in self.everything():
                visit(weights, batch)

        self.physical.fit(visit_from_the_start)

    def sum_over_units(self, figure: Callable[[Batch], Tensor]) -> float:
        """Sum a figure of each row over all units, in float64; of a unit it is the mean over its rows.

        Args:
            figure: A batch -> the figure of each slot, (b,); those of blank slots are left out.
        """
        sums: list[float] = []

        def add(weights: Tensor, batch: Batch) -> None:
            sums.append(float(figure(batch)[: len(weights)].double().cpu() @ weights))

        self.visit_all(sums.clear, add)
        return sum(sums)

    def set_mean_gradients(self, optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> float:
        """Set the gradients of a step without privacy: of the mean loss of some rows, which is returned."""
        return self.physical.fit(partial(self._mean_gradients, optimizer, rows))

    def _mean_gradients(self, optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> float:
        optimizer.zero_grad()
        total = 0.0
        for _, batch in self.batches(rows):
            loss = self.loss(batch).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total


def build_slot_probe(module: nn.Module, loss: Callable[[Batch], Tensor], scores: Callable[[Batch], Tensor]) -> PerSlot:
    """Return a function from a batch to all that training or disclosures may take from it.

    Args:
        module: The model, of which trained parameters require gradients.
        loss: A batch -> the loss of each slot, (b,).
        scores: A batch -> the scores of each slot, (b, ...).

    Returns:
        A function from a batch to [scores, losses, gradients of each parameter or what they are made of], each with one row for
        each slot. Of gradients that are never held as a whole, it gives norms and hashes.
    """

    def answer(batch: Batch) -> Sequence[Tensor]:
        with torch.no_grad():
            seen = scores(batch)
        with per_example(module, loss) as of:
            losses, found = of.factors(batch)
            if isinstance(found, OuterProducts):
                return [seen, losses, found.above, found.inputs]
            return [seen, losses, *itertools.chain.from_iterable(map(_per_slot, found))]

    return answer


def _per_slot(gradients: RowGradients) -> list[Tensor]:
    return gradients.fingerprints() if isinstance(gradients, FactoredGradients) else [gradients]
