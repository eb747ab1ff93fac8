"""Calls to Flower's Fleet API whose failures are exceptions, with a sentence that says what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from cotune.printable import printable
from cotune.protocol.connectivity import describe_error

_REFUSED_NODE = {httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED}
_REFUSED_CALL = {
    httpx.codes.BAD_REQUEST,
    httpx.codes.LENGTH_REQUIRED,
    httpx.codes.REQUEST_ENTITY_TOO_LARGE,
    httpx.codes.REQUEST_HEADER_FIELDS_TOO_LARGE,
    httpx.codes.HTTP_VERSION_NOT_SUPPORTED,
}
_BUSY = {httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT}
# bytes that are looked at for a reason; characters of it that are shown
_MAX_ERROR_BYTES = 4096
_MAX_REASON_LENGTH = 300
_GENERIC_REASONS = ("Invalid SuperNode authentication",)  # of Flower; its other sentences end with a full stop
Answer = TypeVar("Answer")


class FleetError(Exception):
    """The server cannot be reached or does not accept this node. It may help to wait and to connect again."""


class NodeRejected(FleetError):
    """The server does not know this node, or it is online already."""


class RequestExpired(FleetError):
    """The server does not wait for a reply to this request any more."""


def call(method: Callable[[Any], Answer], request: Any) -> Answer:
    """Make a call to a server; raises FleetError with the cause in one sentence if it fails."""
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _build_error(error.response) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise FleetError(describe_error(error, error.request.url.netloc.decode("ascii"))) from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise FleetError(_describe_cut(error)) from None
    except httpx.HTTPError as error:
        raise FleetError(f"the server does not answer ({error or type(error).__name__})") from None
    except ValueError as error:
        raise FleetError(f"the server's answer is not Flower's ({error})") from None


def _describe_cut(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.NetworkError) or str(error).startswith("Server disconnected"):
        return (
            f"the server closed the connection ({error or type(error).__name__}): it may be stopping, or have made room for"
            " other connections"
        )
    return f"the connection to the server broke off ({error})"


def _build_error(response: httpx.Response) -> FleetError:
    """The error for a response: by its status and, where it has one of its own, the server's reason."""
    status = response.status_code
    said = _read_reason(response)
    if said and status in _REFUSED_NODE:
        return NodeRejected(f"the server does not let this node in: {said}{_describe_clock_skew(response.headers.get('date'))}")
    if said and status in _REFUSED_CALL:
        return FleetError(f"the server refuses what this node sends: {said}")
    if said and status in _BUSY:
        return FleetError(f"the server cannot take this now: {said}")
    if status == httpx.codes.UNAUTHORIZED:
        return NodeRejected(
            "the server does not accept the key: expected one that the coordinator has registered (`cotune server invite`), and"
            f" clocks that agree within 5 minutes{_describe_clock_skew(response.headers.get('date'))}"
        )
    if status == httpx.codes.PRECONDITION_FAILED:
        return NodeRejected(
            "the server does not let this node in: its key is not registered (`cotune server invite`; a server that runs"
            " follows within seconds), or a node with the same key is online already, perhaps on another machine, or was until a"
            " minute ago"
        )
    if status == httpx.codes.FORBIDDEN:
        return RequestExpired("the run is over, or not for this node")
    if status == httpx.codes.NOT_FOUND:
        return FleetError("the server has nothing at this place: expected the public port of a federation at this address")
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.INSUFFICIENT_STORAGE):
        return FleetError(
            f"the server's quota for this organization is used up (status {status}): wait, ask the coordinator,"
            " and look for another node that has this key"
        )
    return FleetError(f"the server answered with status {status}")


def _read_reason(response: httpx.Response) -> str:
    """The reason of a refusal in one line; "" where there is none, or only what every refusal of Flower's says."""
    try:
        found = json.loads(response.content[:_MAX_ERROR_BYTES])["detail"]
    except (ValueError, KeyError, TypeError, RecursionError, httpx.StreamError):
        return ""
    words = printable(" ".join(found.split())) if isinstance(found, str) else ""
    return "" if words in _GENERIC_REASONS or words.endswith(".") else words[:_MAX_REASON_LENGTH]


def _describe_clock_skew(date: str | None) -> str:
    """How far the clocks are apart, where the server states its time; otherwise ""."""
    try:
        seconds = time.time() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return ""
    direction = "ahead of" if seconds > 0 else "behind"
    return f"; this machine's is {abs(seconds) / 60:.0f} minutes {direction} the server's" if abs(seconds) > 60 else ""
