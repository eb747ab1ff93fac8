"""The exceptions that a user may see: one sentence each, and never a traceback unless asked for.

    CotuneError
    ├── PlanError      the plan, or an override of it, is not valid
    ├── DataError      the organization's records cannot be used as the plan says
    ├── ModelError     the base model cannot be used as the plan says
    ├── PrivacyError   the privacy that was asked for cannot be given, or would be exceeded
    │   └── PolicyError   a rule of the organization's own does not allow what a plan asks for
    ├── DeviceError    the hardware that was asked for is not there
    └── RunError       a run could not go on

A message says what was got, what was expected and what to do. A code such as `data.missing_column` names the kind of failure for
programs: it stays when the sentence is improved. `--debug` and `--json` show it, and docs/errors.md lists all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

if __name__ != "cotune.errors":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.errors`")


class CotuneError(Exception):
    """A failure that the user can fix.

    Args:
        message: One sentence: what was got, what was expected, what to do.
        code: The kind of failure, `<area>.<snake_case>`; the area is that of the class, such as `data`.

    Attributes:
        exit_code: What the command line exits with.
    """

    exit_code = 2
    code = "error"

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class PlanError(CotuneError):
    """The plan, or an override of it, is not valid."""

    code = "plan.invalid"


class DataError(CotuneError):
    """The organization's records cannot be used as the plan says."""

    code = "data.unusable"


class ModelError(CotuneError):
    """The base model cannot be used as the plan says."""

    code = "model.unusable"


class PrivacyError(CotuneError):
    """The privacy that was asked for cannot be given, or would be exceeded."""

    code = "privacy.refused"


class PolicyError(PrivacyError):
    """A rule of the organization's own does not allow what a plan asks for.

    The sentence is for the organization; `public` names the rule alone, and may be sent where the records do not decide it.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"declined by the rule {rule}: {reason}", code=f"policy.{rule}")
        self.rule = rule

    @property
    def public(self) -> str:
        """The sentence for others, which names only the rule."""
        return f"declined: its rule {self.rule} does not allow this plan"


class DeviceError(CotuneError):
    """The hardware that was asked for is not there."""

    code = "device.missing"


class RunError(CotuneError):
    """A run could not go on; what was finished is kept."""

    code = "run.failed"
    exit_code = 1


def reason_of(error: Exception) -> str:
    """The first line of what a library said, without its full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `; did you mean 'x'? Known: a, b, x` (the nearest first, if any is near).

    >>> nearest("epsilom", ["epsilon", "delta"])
    "; did you mean 'epsilon'? Known: delta, epsilon"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else "."
    return f"{guess} Known: {', '.join(names)}"
