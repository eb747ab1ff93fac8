"""What one stage of local training sees of an organization's records: rows, batches of them, and the loss of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cotune.models.physical_batch import PhysicalBatch
from cotune.models.synthetic_batches import PerSlot
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
        A function from a batch to [scores, losses, gradients of each parameter with one row for each slot].
    """

    def answer(batch: Batch) -> Sequence[Tensor]:
        with torch.no_grad():
            seen = scores(batch)
        with per_example(module, loss) as of:
            losses, gradients = of.gradients(batch)
        return [seen, losses, *gradients]

    return answer
