"""The base model of a plan as it is found here: under the plan's name for it, or in the folder that the organisation has named.

Its hash decides in both cases whether it is the right one.
"""

from __future__ import annotations

from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.models.base import BaseModelFolder, find_base
from cotune.models.errors import ModelError
from cotune.models.sharing import SharedModel
from cotune.plan.model import model_of
from cotune.plan.schema import Plan


def model_here(plan: Plan, site: Site) -> SharedModel:
    """The plan's model, as `plan.model.model_of` loads it, on the site's device."""
    return model_of(_with_own_base(plan, site.file), site.file.device)


def find_base_here(plan: Plan, file: SiteFile) -> BaseModelFolder:
    """Raises ModelError, which says how another folder is named."""
    try:
        return find_base(_with_own_base(plan, file).model)
    except ModelError as error:
        raise ModelError(f"{error}; a copy of it in another folder is named with --model FOLDER") from None


def _with_own_base(plan: Plan, file: SiteFile) -> Plan:
    """For loading alone: what identifies a plan is the plan as it came."""
    if file.base is None:
        return plan
    return plan.model_copy(update={"model": plan.model.model_copy(update={"base": str(file.base)})})
