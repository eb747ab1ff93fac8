"""Quiet libraries: what they print about a model that is loaded is not for users."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, which says that it did without kernels of the hub


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Without transformers' progress bar and its report on the new head, which is expected."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
