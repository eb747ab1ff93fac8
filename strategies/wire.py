"""What travels, as Flower records: requests to train, and updates. Arrays and plain values only; never code or pickles.

A request holds the plan (canonical JSON) and the state of the shared model; an update holds the delta, the declared weight, and
what ties both to plan, round and organisation. Every field has one name and one type, checked on arrival.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from cotune.models.errors import RunError
from cotune.strategies.updates import Update

__all__ = [
    "PROTOCOL",
    "Receipt",
    "Recipient",
    "Request",
    "decode_receipt",
    "decode_request",
    "decode_update",
    "encode_receipt",
    "encode_requests",
    "encode_update",
    "payload_bytes",
    "received_digest",
    "state_digest",
]

PROTOCOL = 5
_MOST_TOLD = 10_000  # values beside an update: a number per class and a few more
_FLOATS = {"float32": torch.float32}


@dataclass(frozen=True)
class Request:
    """The server's request to train: one round of a plan, from a state, by one organisation.

    admitted: the last round whose update of this organisation is in the model; 0: none. sent: what the plan's client term sends
    beside the state. site: only in simulations, the folder of the simulated organisation.
    """

    plan: str
    round: int
    organisation: str
    state: Mapping[str, Tensor]
    admitted: int = 0
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    site: str = ""


@dataclass(frozen=True)
class Recipient:
    """Whom a request is for. admitted, site: as in the request."""

    organisation: str
    admitted: int = 0
    site: str = ""


def encode_requests(
    plan: str,
    round: int,
    state: Mapping[str, Tensor],
    recipients: Sequence[Recipient],
    sent: Mapping[str, Tensor] | None = None,
) -> list[RecordDict]:
    """One request per recipient; they share one copy of the arrays."""
    arrays, beside = _arrays(state), _arrays(sent or {})
    return [RecordDict({"state": arrays, "sent": beside, "request": _header(plan, round, who)}) for who in recipients]


def _header(plan: str, round: int, who: Recipient) -> ConfigRecord:
    return ConfigRecord({"protocol": PROTOCOL, "plan": plan, "round": round, **asdict(who)})


def decode_request(content: RecordDict) -> Request:
    """Raises RunError, in one sentence, for anything but a well-formed request of this protocol."""
    fields = _fields(content, "request", {"plan": str, "round": int, "organisation": str, "admitted": int, "site": str})
    return Request(**fields, state=_tensors(content, "state"), sent=_tensors(content, "sent"))


def encode_update(update: Update, plan_id: str) -> RecordDict:
    record: dict[str, Any] = {
        "protocol": PROTOCOL,
        "plan_id": plan_id,
        "round": update.round,
        "organisation": update.organisation,
        "examples": update.examples,
        "steps": update.steps,
        "epsilon": -1.0 if update.epsilon is None else update.epsilon,
        "received": update.received,
    }
    told = ConfigRecord({name: float(value) for name, value in update.told.items()})
    content = RecordDict({"delta": _arrays(update.delta), "update": ConfigRecord(record), "told": told})
    if update.statistics:
        content["statistics"] = _arrays(update.statistics)
    if update.noise_variance is not None:
        content["noise_variance"] = MetricRecord({name: float(v) for name, v in update.noise_variance.items()})
    return content


def decode_update(content: RecordDict, plan_id: str) -> Update:
    """Raises RunError for an update that is malformed or belongs to another plan."""
    types = {"plan_id": str, "round": int, "organisation": str, "examples": int, "steps": int, "epsilon": float, "received": str}
    fields = _fields(content, "update", types)
    if fields["plan_id"] != plan_id:
        raise RunError(f"an update for plan {str(fields['plan_id'])[:12]} came, expected one for {plan_id[:12]}")
    stated = fields["epsilon"]
    if not math.isfinite(stated):
        raise RunError(f"an update states ε = {stated}: expected a finite number")
    return Update(
        organisation=fields["organisation"],
        round=fields["round"],
        delta=_tensors(content, "delta"),
        examples=fields["examples"],
        steps=fields["steps"],
        epsilon=None if stated < 0 else stated,
        told=_told(content),
        noise_variance=_variances(content),
        statistics=_tensors(content, "statistics") if "statistics" in content else {},
        received=fields["received"],
    )


@dataclass(frozen=True)
class Receipt:
    """What an organisation answers when it has been given the finished model. received: `received_digest` of what it got."""

    organisation: str
    plan_id: str
    received: str


def encode_receipt(receipt: Receipt) -> RecordDict:
    return RecordDict({"receipt": ConfigRecord({"protocol": PROTOCOL, **asdict(receipt)})})


def decode_receipt(content: RecordDict) -> Receipt:
    """Raises RunError for anything but a well-formed receipt of this protocol."""
    return Receipt(**_fields(content, "receipt", {"organisation": str, "plan_id": str, "received": str}))


def _variances(content: RecordDict) -> dict[str, float] | None:
    """The noise that an update states; None where it states none. Whether its names are right is for admission to say."""
    if "noise_variance" not in content:
        return None
    record = content["noise_variance"]
    if not isinstance(record, MetricRecord):
        raise RunError("a message states its noise in another form: expected a MetricRecord named noise_variance")
    for name, value in record.items():
        if type(value) is not float or not 0 <= value < math.inf:
            raise RunError(
                f"an update states the noise variance {value!r:.60} for {name[:80]}: expected a finite number, 0 or more"
            )
    return {name: value for name, value in record.items() if isinstance(value, float)}


def _told(content: RecordDict) -> dict[str, float]:
    """What an organisation says beside its update: few names, finite numbers; without the record, nothing."""
    record = content.get("told", ConfigRecord())
    if not isinstance(record, ConfigRecord) or len(record) > _MOST_TOLD:
        raise RunError(f"an update tells something strange: expected a ConfigRecord named told, of at most {_MOST_TOLD} values")
    for name, value in record.items():
        if type(value) is not float or not math.isfinite(value):
            raise RunError(f"an update tells {name[:80]!r} = {value!r:.60}: expected a finite number")
    return {name: value for name, value in record.items() if isinstance(value, float)}


def _arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def _tensors(content: RecordDict, key: str) -> dict[str, Tensor]:
    record = content.get(key)
    if not isinstance(record, ArrayRecord):
        raise RunError(f"a message came without its arrays: expected an ArrayRecord named {key}")
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype not in _FLOATS or array.stype != "numpy.ndarray":
        raise RunError(f"the array {name[:80]} has the type {array.dtype}/{array.stype}: expected float32/numpy.ndarray")
    try:
        values = np.asarray(array.numpy())  # numpy.load with allow_pickle=False; an archive is not an array
    except Exception:
        raise RunError(f"the array {name[:80]} cannot be read: expected a NumPy array of float32") from None
    if values.dtype != np.float32 or tuple(values.shape) != tuple(array.shape):
        raise RunError(f"the array {name[:80]} is not what its header says: expected float32 of shape {tuple(array.shape)}")
    return torch.from_numpy(values.copy())


def _fields(content: RecordDict, key: str, types: Mapping[str, type]) -> dict[str, Any]:
    record = content.get(key)
    if not isinstance(record, ConfigRecord):
        raise RunError(f"a message came without its header: expected a ConfigRecord named {key}")
    if record.get("protocol") != PROTOCOL:
        raise RunError(
            f"a message of protocol {record.get('protocol')!r:.20} came, expected {PROTOCOL}: use the same cotune everywhere"
        )
    for name, kind in types.items():
        if type(record.get(name)) is not kind:
            raise RunError(f"a message has {name} = {record.get(name)!r:.60}: expected {kind.__name__}")
    return {name: record[name] for name in types}


def payload_bytes(content: RecordDict) -> int:
    """Bytes of names, arrays and values of a message, before Flower's own framing.

    Counted here: Flower's `ConfigRecord.count_bytes` raises for an empty text.
    """
    return sum(_record_bytes(record) for record in content.values())


def _record_bytes(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(name.encode()) + len(array.data) for name, array in record.items())
    return sum(len(name.encode()) + _value_bytes(value) for name, value in record.items())


def _value_bytes(value: object) -> int:
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    return len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 8


def received_digest(state: Mapping[str, Tensor], sent: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of what an organisation trains from: the state, and what is sent beside it."""
    return state_digest({**state, **{f"sent/{name}": tensor for name, tensor in (sent or {}).items()}})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: the same for the same state on every machine."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
