"""Set up an organization's site: its folder with key pair, strict policy and ledger, its records, and its base model.

The base model of a plan is looked up by the plan's name for it, or in the folder that the organization has given; in both cases,
its hash must match the plan.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_ssh_private_key

from cotune.client.site import Site
from cotune.client.site_folder import SiteFile, SitePaths
from cotune.data.config import DataConfig
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.data.readers.sources import get_base_path
from cotune.data.tasks.task import get_task
from cotune.ensembles.public_inputs import read_inputs
from cotune.errors import DataError, ModelError, PlanError, RunError
from cotune.models.base.lookup import BaseModelFolder, find_base
from cotune.models.device import pick_device
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, own_model_config
from cotune.privacy.policy import Policy, dump_policy
from cotune.protocol.federation_file import check_name
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import JsonDocument


def read_private_key(file: Path) -> EllipticCurvePrivateKey:
    """Read a node's private key; raises RunError if it cannot be read, or if other users can read the file."""
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise RunError(
            f"{file} is not a key for a node: expected a private key as `ssh-keygen -t ecdsa -b 384 -N ''` makes it",
            code="run.wrong_key_file",
        )
    if file.stat().st_mode & 0o077:
        raise RunError(
            f"the private key {file} is open to others: expected a file for its owner alone; run `chmod 600 {file}`",
            code="run.exposed_key",
        )
    return key


def read_certificates(file: Path | None) -> bytes | None:
    """Read certificates in PEM; return None if no file is given. Raises RunError if the file cannot be read."""
    if file is None:
        return None
    try:
        content = file.read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (OSError, ValueError, ssl.SSLError):
        raise RunError(
            f"{file} holds no certificates: expected the server's ca.crt, in PEM", code="run.wrong_certificates"
        ) from None
    return content


def load_site_model(plan: Plan, site: Site) -> TrainableModel:
    """Return the plan's model on the site's device, and raise errors, as `plan.trained_parameters.get_plan_model` does."""
    return get_plan_model(_with_own_base(plan, site.file), site.file.device)


def find_site_base(plan: Plan, file: SiteFile) -> BaseModelFolder:
    """Find the plan's base model on this machine; raises ModelError, with advice on giving its folder, if it is missing."""
    try:
        return find_base(_with_own_base(plan, file).model)
    except ModelError as error:
        raise ModelError(f"{error}; a copy of it in another folder is named with --model FOLDER", code=error.code) from None


def _with_own_base(plan: Plan, file: SiteFile) -> Plan:
    """Return the plan with the site's own base model, only for loading; the plan's id is still that of the original."""
    if file.base is None:
        return plan
    return plan.model_copy(update={"model": plan.model.model_copy(update={"base": str(file.base)})})


def make_site(folder: Path, name: str, *, device: str = "auto", key: Path | None = None) -> Site:
    """Create a site that only its owner can read.

    site.json is written last: after a crash the folder is not a site, and can be created again with the key that exists.

    Args:
        folder: Of the site.
        name: Of the organization.
        device: auto, cpu, cuda or cuda:N.
        key: A private key from ssh-keygen, which is copied; None: create one (ECDSA, P-384).

    Raises:
        PlanError: If the name is not valid.
        DeviceError: If the device does not exist.
        RunError: If there is a site or a key already, or the folder cannot be written.
    """
    check_name(name)
    pick_device(device)
    paths = SitePaths(folder)
    if paths.description.exists() or (key is not None and paths.private_key.exists()):
        raise RunError(
            f"{folder} is a site already: expected a new folder; its key and ledger are not written over", code="run.site_exists"
        )
    own = None if key is None else read_private_key(key)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write_keys(paths, name, own)
        if not paths.policy_file.exists():
            atomic_write(paths.policy_file, dump_policy(Policy()).encode())
        JsonDocument(paths.description, SiteFile).write(SiteFile(organization=name, device=device))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RunError(
            f"{folder} cannot be made a site ({reason}): expected a folder that can be written; check it", code="run.not_writable"
        ) from None
    site = Site(folder)
    site.ledger()
    return site


def _write_keys(paths: SitePaths, name: str, own: ec.EllipticCurvePrivateKey | None) -> None:
    """Write the private key first, as a public key without it would be useless."""
    file = paths.private_key
    key = own or (read_private_key(file) if file.exists() else ec.generate_private_key(ec.SECP384R1()))
    atomic_write(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))  # with mode 0600
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    atomic_write(paths.public_key, line + f" {name}\n".encode())


def get_key_fingerprint(site: Site) -> str:
    """Return the SHA-256 (hex) of the public key (PEM, SubjectPublicKeyInfo), which the coordinator sees, too.

    Raises:
        RunError: If the key cannot be read.
    """
    public = read_private_key(site.private_key).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def set_records(
    site: Site,
    plan: Plan,
    data: str | None,
    *,
    text: str | None = None,
    label: str | None = None,
    tasks: str | None = None,
    unit: str | None = None,
    collection: str | None = None,
) -> int:
    """Read the site's records, describe them in data.json, and return their number.

    Columns that are not given are those of the plan. Unlike in a round, it is an error if none of the records is usable.

    Args:
        site: Of the organization.
        plan: The plan.
        data: A file, a folder of images, or package:NAME; None: the source in data.json.
        text: Column of the texts.
        label: Column of the labels.
        tasks: Of several tasks, those with records, such as "topic,language=COLUMN"; None: all, in the plan's columns.
        unit: Column of the privacy units.
        collection: The collection of the records (see docs/ledger.md); None: none.

    Raises:
        DataError: If the records cannot be read, or data.json gives no source, or describes another task.
        PlanError: If the name of the collection is not valid.
    """
    if collection is not None:
        check_name(collection)
    document = site.records
    if data is None and collection is not None:
        raise DataError(f"--collection {collection} says where the records of --data count: expected both", code="data.no_source")
    if data is None and document.exists():
        held = site.dataset(plan.labels)
        if held.task != plan.task:
            raise DataError(
                f"the site describes its records as for {held.task}, expected {plan.task} as in the plan: name others with"
                " --data",
                code="data.wrong_task",
            )
        return len(held)
    if data is None:
        raise DataError(f"{site.folder} does not say where the records are: name their file with --data", code="data.no_source")
    source = data if data.startswith("package:") else str(Path(data).expanduser().resolve())
    given, target = get_task(plan.task).columns(plan.data)
    columns = {**({} if plan.tasks else {target: label}), given: text, "unit": unit}
    _check_one_label(plan, label, tasks)
    config = {**plan.data.model_dump(), "source": source, **{key: name for key, name in columns.items() if name is not None}}
    if tasks is not None:
        config["tasks"] = _parse_tasks(plan, tasks)
    try:
        described = DatasetManifest(
            task=plan.task, data=DataConfig(**config), portions=(FileSlice(path=None),), collection=collection or ""
        )
    except ValueError:
        named = ", ".join(repr(name) for name in columns.values() if name is not None)
        raise DataError(f"the columns {named} conflict: expected different ones", code="data.wrong_columns") from None
    return _write_once_read(document, described, plan)


def _check_one_label(plan: Plan, label: str | None, tasks: str | None) -> None:
    """Raise DataError unless --label is used with one task, and --tasks with several."""
    if plan.tasks and label is not None:
        raise DataError(
            f"--label {label} names one column, and the plan has several tasks: expected --tasks, such as"
            f" {plan.tasks[0].name}={label}",
            code="data.wrong_columns",
        )
    if not plan.tasks and tasks is not None:
        raise DataError(f"--tasks {tasks} is for plans of several tasks: expected --label", code="data.wrong_columns")


def _parse_tasks(plan: Plan, text: str) -> tuple[tuple[str, str], ...]:
    """Parse "topic,language=COLUMN" as (task, column) in the plan's order; raises DataError for unknown tasks."""
    named = {name.strip(): column.strip() for name, _, column in (part.partition("=") for part in text.split(","))}
    known = {task.name: task.label or task.name for task in plan.tasks}
    unknown = sorted(set(named) - set(known))
    if unknown or len(named) < len(text.split(",")):
        raise DataError(
            f"--tasks {text} is not understood: expected some of the plan's tasks ({', '.join(known)}), each once, such as"
            f" {next(iter(known))}=COLUMN",
            code="data.unknown_task",
        )
    return tuple((name, named[name] or column) for name, column in known.items() if name in named)


def _write_once_read(document: Path, described: DatasetManifest, plan: Plan) -> int:
    """Write the description if the records can be read with it; else the previous one stays."""
    draft = document.with_name("data.json.draft")
    try:
        JsonDocument(draft, DatasetManifest).write(described)
        count = len(DatasetManifest.read(draft, plan.labels, lenient=True))
        if not count:
            DatasetManifest.read(draft, plan.labels)  # strict reading raises the reason
            raise DataError("none of the records is usable: expected some; look at the file", code="data.no_usable_record")
        os.replace(draft, document)
    except DataError as error:
        raise DataError(str(error).replace("--set data.", "--"), code=error.code) from None
    finally:
        draft.unlink(missing_ok=True)
    return count


def set_base_model(site: Site, plan: Plan, folder: Path) -> Site:
    """Write the base model's folder to site.json, if it is the plan's.

    Args:
        site: Of the organization.
        plan: The plan.
        folder: Of the base model.

    Returns:
        The site, opened again.

    Raises:
        ModelError: If the folder does not contain the plan's base model.
    """
    file = site.file.model_copy(update={"base": folder.expanduser().resolve()})
    find_site_base(plan, file)
    JsonDocument(site.description, SiteFile).write(file)
    return Site(site.folder)


def set_prediction_sources(site: Site, plan: Plan, public: Path | None, own_base: str | None) -> Site:
    """Write the path of the plan's public inputs, and the organization's own base model, to site.json.

    Args:
        site: Of the organization.
        plan: The plan, which must share predictions.
        public: File of the public inputs; None: unchanged.
        own_base: Base model to train instead of the plan's; None: unchanged.

    Returns:
        The site, opened again.

    Raises:
        PlanError: If the plan does not share predictions.
        DataError: If these are not the plan's public inputs.
        ModelError: If there is no such base model.
    """
    if not plan.shares_predictions:
        raise PlanError(
            '--public and --own-model are for plans with collaboration = "predictions", and this one shares parameters: leave'
            " them out",
            code="plan.no_predictions",
        )
    changes: dict[str, Any] = {}
    if public is not None:
        changes["public"] = public.expanduser().resolve()
        read_inputs(plan.public, plan.task, changes["public"])
    if own_base is not None:
        place = get_base_path(own_base)
        changes["own_base"] = own_base if place is None else str(place.resolve())
        find_base(own_model_config(plan, changes["own_base"]))
    JsonDocument(site.description, SiteFile).write(site.file.model_copy(update=changes))
    return Site(site.folder)
