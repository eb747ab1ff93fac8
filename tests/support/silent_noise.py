"""A generator that draws no noise."""

from __future__ import annotations

from typing import Any, cast

import numpy as np


class Silent:
    """A noise generator that draws zeros."""

    def standard_normal(self, size: Any = None) -> Any:
        return 0.0 if size is None else np.zeros(size)


SILENT = cast(np.random.Generator, Silent())
