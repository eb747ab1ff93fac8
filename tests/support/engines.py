"""Other implementations of `DPSGD`: functions in place of its `run`, for tests that watch it, break it or let it crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport

Steps = Callable[[DPSGDConfig, DPSGDSetup], Iterator[StepReport]]


def take_steps(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """Take the steps as `DPSGD` does."""
    return DPSGD(config).run(setup)


def engine(steps: Steps) -> type[DPSGD]:
    """Return a class like `DPSGD` whose run is the function."""

    class Engine(DPSGD):
        def run(self, setup: DPSGDSetup) -> Iterator[StepReport]:
            return steps(self.config, setup)

    return Engine
