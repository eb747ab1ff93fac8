"""Make a federation's folder, whole or not at all, with a plan that leaves nothing open; renew what organizations are given."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from cotune.data.readers.sources import check_new, get_base_path
from cotune.data.record_files import read_records
from cotune.data.records import check_labels
from cotune.errors import PlanError, RunError
from cotune.models.base_folder import read_base_labels
from cotune.models.base_lookup import find_base
from cotune.models.device import pick_device
from cotune.plan.load import dump_plan
from cotune.plan.schema import Plan
from cotune.server.deployment import certificates
from cotune.server.deployment.federation import FederationFolder, ServerConfig, get_public_address, write_config
from cotune.server.deployment.handout import write_handout
from cotune.server.deployment.plan_checks import with_robust_default
from cotune.server.deployment.signing import SIGNING_KEY, create_signing_key
from cotune.server.runs.run_model import hide_base_folder
from cotune.storage.files import atomic_write
from cotune.strategies.plugins import get_content

# of a reply, at most
_BYTES_PER_PARAMETER = 16
_BYTES_BESIDE = 256 * 2**20


def create_federation(path: Path, plan: Plan, config: ServerConfig) -> FederationFolder:
    """Makes the folder `path`, which must not be there, and its missing parents.

    Raises RunError for a folder that is there or cannot be written and for what is no host; what else is wrong with plan, base
    model, test records or device raises PlanError, ModelError, DataError or DeviceError.
    """
    path = path.expanduser().absolute()
    check_new(path)
    pick_device(config.device)
    resolved = with_robust_default(_resolved(plan, config))
    config = _with_quotas(config.model_copy(update={"base": get_base_path(plan.model.base)}), plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))  # 0700
        try:
            _fill(part, resolved, config)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(
            f"{path} cannot be made ({error.strerror}): check the permissions and the space of {path.parent}"
        ) from None
    return FederationFolder(path)


def renew_server(folder: FederationFolder, hosts: Sequence[str] = ()) -> bool:
    """A fresh certificate for the same key; hosts: other ones than before, if any are given. A federation that has no key to sign
    requests with, as it is of an older cotune, gets one.

    Returns whether organizations need the new federation.toml, as the first host or the signing key is another. Raises RunError.
    """
    certificates.renew_certificate(folder.certificates, hosts or None)
    before = folder.config
    signs = (folder.certificates / SIGNING_KEY).exists()
    folder.config = with_federation_id(before.model_copy(update={"hosts": tuple(hosts) or before.hosts}))
    write_config(folder.path, folder.config)
    if signs and before.id and get_public_address(before) == get_public_address(folder.config):
        return False
    create_signing_key(folder.certificates)
    write_handout(folder.path, folder.plan, folder.config)
    return True


def with_federation_id(config: ServerConfig) -> ServerConfig:
    """The same with an id, where it has none."""
    return config if config.id else config.model_copy(update={"id": secrets.token_hex(16)})


def _with_quotas(config: ServerConfig, plan: Plan) -> ServerConfig:
    """With the largest reply that a plan on this base model can have, where the coordinator has not set it: a change and a
    statistic of all its parameters, in float32, and some to spare.
    """
    if "reply" in config.quotas.model_fields_set:
        return config
    reply = _BYTES_PER_PARAMETER * _parameters(find_base(plan.model).path) + _BYTES_BESIDE
    return config.model_copy(update={"quotas": config.quotas.model_copy(update={"reply": reply})})


def _parameters(base: Path) -> int:
    """By the heads of its files: nothing is loaded."""
    count = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def _resolved(plan: Plan, config: ServerConfig) -> Plan:
    """The plan with the base model's hash and the class names, and without the place of the base model."""
    base = find_base(plan.model)
    labels = _labels(plan, config.test, read_base_labels(base.path))
    model = plan.model.model_copy(update=base.pins)
    return hide_base_folder(plan.model_copy(update={"labels": labels, "model": model}))


def _labels(plan: Plan, test: Path | None, of_base: tuple[str, ...]) -> tuple[str, ...]:
    """The plan's; else those of the test records, in the base model's order where it has the same."""
    if test is None and not plan.labels:
        raise PlanError(
            "the plan does not list the class names, and nobody sees the records of all organizations: expected labels ="
            ' ["no", "yes"] in the plan, or --test with records of every class'
        )
    if test is None:
        return plan.labels
    found = check_labels(read_records(plan.data.without_units(), test, plan.task), plan.labels or None)
    return plan.labels or (of_base if set(of_base) == set(found) else found)


def _fill(folder: Path, plan: Plan, config: ServerConfig) -> None:
    config = with_federation_id(config)
    certificates.create_authority(folder / "certificates", config.hosts)
    create_signing_key(folder / "certificates")
    for name, sha256 in plan.strategy.files.items():
        atomic_write(folder / name.rpartition(":")[0], get_content(name, sha256))
    atomic_write(folder / "plan.toml", dump_plan(plan).encode())
    write_handout(folder, plan, config)
    write_config(folder, config)
    for name in ("certificates", "superlink", "runs"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
        (folder / name).chmod(0o700)
