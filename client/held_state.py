"""The newest version of the shared state that an organization holds, on which requests can build (a plan's `wire_down`).

kept/<plan>/received/state.safetensors    what the last request held, written before it is trained

The server knows from answered rounds what an organization should hold, and relies on nothing: where it is missing, damaged or
older than the request allows, the organization asks for the whole state. What is built has the digest that the request names, or
is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cotune.client.site_folder import SiteFolder
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.changes import add_change
from cotune.protocol.messages import Request, state_digest
from cotune.protocol.refusals import VersionLost
from cotune.storage.files import atomic_write, remove_parts


def complete(request: Request, plan: Plan, site: SiteFolder) -> Request:
    """Return a request with its whole state, built on the version that the site holds.

    Args:
        request: As decoded; one that holds the whole state is returned as it is.
        plan: Of the request.
        site: Of the organization.

    Raises:
        VersionLost: If the site holds none of the versions that the request names, or the request does not build what it names.
    """
    if not request.versions:
        return request
    held = _read(_file(plan, site))
    digest = state_digest(held)
    if digest not in request.versions:
        raise VersionLost(
            f"the site holds no version that the request for round {request.round} builds on: it asks for the whole"
        )
    state = _build(held, request, since=_last_index(request.versions, digest))
    if state_digest(state) != request.versions[-1]:
        raise VersionLost(
            f"the request for round {request.round} builds another state than it names: the site asks for the whole"
        )
    return replace(request, state=state, versions=(), changes=())


def hold(request: Request, plan: Plan, site: SiteFolder) -> None:
    """Store the state of a request that was verified, in place of the version before, if requests of the plan build on it."""
    if plan.wire_down == "float32" or request.round >= plan.rounds:
        return
    file = _file(plan, site)
    remove_parts(file)
    # safetensors refuses tensors that share memory
    content = save({name: tensor.contiguous().clone() for name, tensor in request.state.items()})
    atomic_write(file, content, durable=not site.file.simulated)


def release(plan: Plan, site: SiteFolder) -> None:
    """Remove the version that a site holds of a run that is over."""
    _file(plan, site).unlink(missing_ok=True)


def _file(plan: Plan, site: SiteFolder) -> Path:
    return site.kept_folder(plan.plan_id, "received") / "state.safetensors"


def _read(file: Path) -> State:
    """Return what the site holds; empty if it is missing or damaged in any way."""
    try:
        with safe_open(file, framework="pt") as held:
            found = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return {}
    return found if all(tensor.dtype == torch.float32 for tensor in found.values()) else {}


def _last_index(versions: tuple[str, ...], digest: str) -> int:
    """A round that changed nothing has the same digest before and after."""
    return len(versions) - 1 - versions[::-1].index(digest)


def _build(held: State, request: Request, since: int) -> Mapping[str, Tensor]:
    state: Mapping[str, Tensor] = held
    try:
        for change in request.changes[since:]:
            state = add_change(state, change, whole=request.state)
    except ValueError as error:
        problem = f"the request for round {request.round} cannot be built ({error}): the site asks for the whole"
        raise VersionLost(problem) from None
    return {**state, **request.state}
