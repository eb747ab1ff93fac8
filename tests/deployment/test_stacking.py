"""Stacking through real processes: members that each organization holds itself, kills, and the model that everybody gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cotune.client.site import Site
from cotune.ensembles.predictor import open_model
from tests.support.deployment import Deployment, bring_back, deployment, weights
from tests.support.exported_models import export_random
from tests.support.loopback import write_model
from tests.support.stacked import stated, write_together

pytestmark = [pytest.mark.long, pytest.mark.crash]

EVERYTHING = ("trainer:north", "south", "serverapp", "run", "server")
ROUNDS = len(EVERYTHING)


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("stacking")
    orders = (("bad", "good"), ("good", "bad"))
    base = write_model(folder / "encoder")
    members = [export_random(base, folder / f"member-{n}", order, seed=n) for n, order in enumerate(orders)]
    together = write_together(folder / "together", members, orders[0])
    model = {"base": str(together), "pooling": "auto", "members": stated("north", "south")}
    options = {name: ("--model", str(together)) for name in ("north", "south")}
    with deployment(folder, "north", "south", plan={"model": model, "rounds": ROUNDS}, options=options) as made:
        yield made


def test_kills_change_nothing_of_the_meta_model(fed: Deployment) -> None:
    fed.run()
    expected = weights(fed.finish().load())
    assert expected.keys() == {"classifier.weight", "classifier.bias"}
    fed.run("--set", "seed=7", "--set", f"rounds={ROUNDS}")
    for round, what in enumerate(EVERYTHING, start=1):
        fed.wait(fed.reached("round_started", round))
        fed.kill(what)
        bring_back(fed, what)
    assert weights(fed.finish().load()) == expected


def test_every_member_gets_the_fused_model(fed: Deployment) -> None:
    fed.wait(lambda: len(fed.events("delivered")) >= 2)
    served = open_model(str(fed.newest().path), "cpu").content_hash
    for name in ("north", "south"):
        folders = [path for path in (fed.site(name) / "models").iterdir() if path.is_dir()]
        assert served in [open_model(str(folder), "cpu").content_hash for folder in folders]
    assert Site(fed.site("north")).ledger_file.exists()
