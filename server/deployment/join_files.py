"""Write the files that organizations receive: federation.toml, and JOIN.md, which explains how to join and what will leave.

The text of JOIN.md is in templates/join.md.j2.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from cotune.plan.personal import describe_parts
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.federation_file import Invitation
from cotune.reporting.pages import render_text
from cotune.server.deployment.federation import ServerConfig, get_public_address
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys.signing import public_hex, read_signing_key
from cotune.server.deployment.layout import FederationFiles
from cotune.storage.files import atomic_write


def write_handout(folder: Path, plan: Plan, config: ServerConfig) -> None:
    """Write federation.toml and JOIN.md with the current keys.

    Args:
        folder: The federation's folder.
        plan: The plan in the invitation.
        config: The content of server.toml.
    """
    files = FederationFiles(folder)
    authority = certificates.read_authority_pem(files.certificates.path)
    key = public_hex(read_signing_key(files.certificates.path))
    invitation = Invitation(config.name, get_public_address(config), authority, plan, id=config.id, signing_key=key)
    atomic_write(files.invitation, invitation.to_toml().encode())
    atomic_write(files.join_page, render_join_page(invitation).encode())


_TRAINED_PARTS = {
    "head": "the classification head",
    "lora": "the adapters and the classification head",
    "blocks": "the last blocks of the encoder and the classification head",
    "full": "the whole model",
}
_SENT_PAYLOADS = {
    "noise": "how much privacy noise is in the update",
    "loss": "the received model's mean loss on your records",
    "fisher": "squared gradients of your records, summed, **without noise**",
    "gram": "products of the layers' inputs, summed over your records, **without noise**",
}


def render_join_page(invitation: Invitation) -> str:
    """Return JOIN.md for an invitation, as Markdown."""
    return render_text(
        "join.md.j2",
        invitation=invitation,
        plan=invitation.plan,
        version=version("cotune"),
        leaves=list(list_disclosures(invitation.plan)),
    )


def list_disclosures(plan: Plan) -> Iterator[str]:
    """Yield a phrase for everything that a plan asks organizations to send."""
    trained = " then ".join(dict.fromkeys(_TRAINED_PARTS[stage.mode] for stage in plan.stages))
    if plan.personal.parts:
        trained = f"{trained}, but for {describe_parts(plan.personal)}: that stays with you"
    if plan.lora.keep == "b":
        trained = "one half of the adapters (the other half and the head stay with you)"
    if plan.shares_predictions:
        what = "scores of each class" if plan.public.share == "scores" else "most probable class"
        trained = f"the {what} that a model of your own gives for {plan.public.answers} public inputs, and no parameter of it"
        yield f"in each of {plan.rounds} rounds, {trained}: {_describe_protection(plan)}"
    else:
        yield f"in each of {plan.rounds} rounds, how your training changed {trained}: {_describe_protection(plan)}"
    yield "beside it a number of records, as your rule `disclosures.example_count` has it, the number of steps, and at most its ε"
    yield from (_SENT_PAYLOADS[payload] for payload in plan.strategy.sends)
    if plan.disclosures.local_metrics:
        yield "how many of your records the received model classifies rightly, every round"
    if plan.disclosures.label_histogram:
        yield "how many of your records each class has, once"


def _describe_protection(plan: Plan) -> str:
    if not isinstance(plan.privacy, RecordPrivacy):
        return "**without differential privacy**, so that single records may show in it"
    return f"with differential privacy for every single record, ε at most {plan.privacy.epsilon:g} at δ = {plan.privacy.delta}"
