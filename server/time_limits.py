"""Timeouts and polling intervals of the server that are not in the plan, as one value for rounds and transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimeLimits:
    """Times in seconds. The defaults apply to every run; tests pass shorter ones.

    Attributes:
        poll: Shortest interval between two polls for replies.
        max_poll: Longest interval between two polls for replies.
        watch: Interval between two checks of who is connected.
        first_look: Time for the first check of who is connected, however short the wait.
        silent: Time without any answer after which the SuperLink counts as unreachable.
        away: Time without any answer from the SuperLink after which replies in transfer may be lost.
        slow: Time without a chunk of a reply after which its transfer may have been interrupted.
        held_up: Time after which others no longer wait for a call that hangs.
        look_backoff: Longest time before a failed poll is repeated.
        retry_backoff: Time before a lost request is sent again; doubled each time.
        approval_backoff: Time before an organization that has yet to approve the plan is asked again; doubled each time.
        max_approval_backoff: Upper limit of `approval_backoff`.
        export: Time for an organization to write its model.
        notice: Time for an excluded organization to confirm the notice of its exclusion.
        close: Time for threads to end with a run; a call after the end of a run would be refused.
    """

    poll: float = 0.1
    max_poll: float = 1.0
    watch: float = 0.5
    first_look: float = 10.0
    silent: float = 10.0
    away: float = 5.0
    slow: float = 20.0
    held_up: float = 30.0
    look_backoff: float = 2.0
    retry_backoff: float = 2.0
    approval_backoff: float = 5.0
    max_approval_backoff: float = 300.0
    export: float = 600.0
    notice: float = 10.0
    close: float = 1.0


TIME_LIMITS = TimeLimits()
