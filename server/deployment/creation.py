"""Create a federation's folder atomically, with a fully resolved plan, and renew the files that organizations receive."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from cotune.data.config import has_labels
from cotune.data.metrics.text_metrics import check_text_metrics
from cotune.data.readers.sources import check_new, get_base_path
from cotune.data.record_reading import read_records
from cotune.data.records import check_labels
from cotune.ensembles.public_inputs import pin_public
from cotune.errors import PlanError, RunError
from cotune.models.base.folder import is_fused, read_base_labels
from cotune.models.base.lookup import BaseModelFolder, find_base
from cotune.models.device import pick_device
from cotune.models.features.public_map import pin_model
from cotune.plan.load import dump_plan
from cotune.plan.plan import Plan
from cotune.server.deployment.federation import FederationFolder, ServerConfig, get_public_address, write_config
from cotune.server.deployment.join_files import write_handout
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys.signing import create_signing_key
from cotune.server.deployment.layout import FederationFiles
from cotune.server.deployment.plan_for_members import with_robust_default
from cotune.server.runs.base_weights import check_without_weights
from cotune.server.runs.run_model import hide_base_folder, open_server_model, with_base
from cotune.storage.files import atomic_write
from cotune.strategies.plugins import get_content

# of a reply, at most
_BYTES_PER_PARAMETER = 16
_MAX_OTHER_BYTES = 256 * 2**20


def create_federation(path: Path, plan: Plan, config: ServerConfig) -> FederationFolder:
    """Create a federation's folder and its missing parents; on failure nothing is left.

    Args:
        path: The folder, which must not exist.
        plan: The plan of the federation's runs.
        config: The content of server.toml; a missing id, reply quota and path of the base model are filled in. The path may be
            that of a copy of the plan's base model.

    Raises:
        RunError: If the folder exists or cannot be written, or a host name is not valid.
        PlanError, ModelError, DataError, DeviceError: If plan, base model, test records or device cannot be used.
    """
    path = path.expanduser().absolute()
    check_new(path)
    pick_device(config.device)
    place = str(config.base or get_base_path(plan.model.base) or "")
    base = find_base(with_base(plan, place).model if place else plan.model, needs_weights=False)
    resolved = with_robust_default(_with_public(_resolve_plan(plan, config, base)))
    config = config.model_copy(update={"base": Path(place) if place else None})
    if is_fused(base.path):
        parameters = open_server_model(
            resolved, place, "cpu", needs_weights=True
        ).parameter_count()  # says now what cannot be stacked
    elif base.has_weights:
        parameters = _count_parameters(base.path)
    else:
        parameters = check_without_weights(resolved, place, has_test=config.test is not None).parameter_count()
    config = _with_quotas(config, parameters)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))  # 0700
        try:
            _copy_public(plan, resolved, part)
            _write_files(part, resolved, config)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(
            f"{path} cannot be made ({error.strerror}): check the permissions and the space of {path.parent}",
            code="run.not_writable",
        ) from None
    return FederationFolder(path)


def renew_server(folder: FederationFolder, hosts: Sequence[str] = ()) -> bool:
    """Renew the server's certificate for the same key, and create a signing key if the federation has none.

    Args:
        folder: The federation.
        hosts: The hosts of the new certificate; by default those of the current one.

    Returns:
        Whether organizations need the new federation.toml, because the first host or the signing key has changed.

    Raises:
        RunError: If a file cannot be read or written, or a host name is not valid.
    """
    certificates.renew_certificate(folder.certificates, hosts or None)
    before = folder.config
    signs = folder.files.certificates.signing_key.exists()
    folder.config = with_federation_id(before.model_copy(update={"hosts": tuple(hosts) or before.hosts}))
    write_config(folder.path, folder.config)
    if signs and before.id and get_public_address(before) == get_public_address(folder.config):
        return False
    create_signing_key(folder.certificates)
    write_handout(folder.path, folder.plan, folder.config)
    return True


def with_federation_id(config: ServerConfig) -> ServerConfig:
    """Return the configuration with an id, which is drawn if it has none."""
    return config if config.id else config.model_copy(update={"id": secrets.token_hex(16)})


def _with_quotas(config: ServerConfig, parameters: int) -> ServerConfig:
    """Set the quota for replies, unless the coordinator did, to the largest reply to a plan of this number of parameters.

    That is a delta and a statistic of all its parameters in float32, with a margin.
    """
    if "reply" in config.quotas.model_fields_set:
        return config
    reply = _BYTES_PER_PARAMETER * parameters + _MAX_OTHER_BYTES
    return config.model_copy(update={"quotas": config.quotas.model_copy(update={"reply": reply})})


def _count_parameters(base: Path) -> int:
    """Count a model's parameters from the headers of its files, without loading it."""
    count = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def _resolve_plan(plan: Plan, config: ServerConfig, base: BaseModelFolder) -> Plan:
    """Return the plan with the base model's hashes and the class names, and without the path of the base model."""
    if plan.generate is not None and config.test is not None:
        check_text_metrics()
    labels = _determine_labels(plan, config.test, read_base_labels(base.path))
    model = pin_model(plan.model, base)
    return hide_base_folder(plan.model_copy(update={"labels": labels, "model": model}))


def _with_public(plan: Plan) -> Plan:
    """If predictions are shared, return the plan with hash, number and path in the folder of its public inputs."""
    if not plan.shares_predictions:
        return plan
    pinned = pin_public(plan, Path()).public
    return plan.model_copy(update={"public": pinned.model_copy(update={"source": Path(pinned.source).name})})


def _copy_public(plan: Plan, resolved: Plan, folder: Path) -> None:
    """Copy the public inputs whose predictions are shared into the folder, to be given to members."""
    if not plan.shares_predictions:
        return
    place = Path(plan.public.source).expanduser()
    if place.is_dir():
        shutil.copytree(place, folder / resolved.public.source)
    else:
        shutil.copyfile(place, folder / resolved.public.source)


def _determine_labels(plan: Plan, test: Path | None, of_base: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names: the plan's, else those of the test records, in the base model's order if it has the same.

    Members that are stacked have classes already.
    """
    if not has_labels(plan.task):
        return ()
    if test is None and not plan.labels and plan.model.members:
        return of_base
    if test is None and not plan.labels:
        raise PlanError(
            "the plan does not list the class names, and nobody sees the records of all organizations: expected labels ="
            ' ["no", "yes"] in the plan, or --test with records of every class',
            code="plan.missing_labels",
        )
    if test is None:
        return plan.labels
    found = check_labels(read_records(plan.data.without_units(), test, plan.task), plan.labels or None)
    return plan.labels or (of_base if set(of_base) == set(found) else found)


def _write_files(folder: Path, plan: Plan, config: ServerConfig) -> None:
    files = FederationFiles(folder)
    config = with_federation_id(config)
    certificates.create_authority(files.certificates.path, config.hosts)
    create_signing_key(files.certificates.path)
    for name, sha256 in plan.strategy.files.items():
        atomic_write(folder / name.rpartition(":")[0], get_content(name, sha256))
    atomic_write(files.plan, dump_plan(plan).encode())
    write_handout(folder, plan, config)
    write_config(folder, config)
    for private in (files.certificates.path, files.superlink.path, files.runs):
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)
