"""How long the server waits, and how often it looks, beside what a plan says: one value, handed to rounds and transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimeLimits:
    """All in seconds. The defaults are those of every run; tests pass shorter ones.

    Attributes:
        poll: Between two looks for replies, at least.
        max_poll: Between two looks for replies, at most.
        watch: Between two looks at who is connected.
        first_look: For the first look at who is connected, however short the wait.
        silent: A SuperLink that has answered nothing for so long is unreachable.
        away: Without an answer from the SuperLink for so long, replies that it was handing over may be lost.
        slow: Without a chunk of a reply for so long, it may have been cut off while it was sent.
        held_up: A call that hangs for so long is overtaken.
        look_backoff: Before a look for replies that failed is made again, at most.
        retry_backoff: Before a request that was lost is sent again; doubled each time.
        approval_backoff: Before an organization is asked again that has yet to approve the plan; doubled each time.
        max_approval_backoff: The same, at most.
        export: An organization may take so long to write its model.
        notice: An organization that was excluded is waited for so long to confirm that it was told.
        close: Threads may take so long to end with a run: a call after its end would be refused.
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
