"""Named recipes: what the literature calls a strategy, as parts. `strategy = "fedadam"` in a plan stands for its line here.

A part that a recipe does not name keeps its default (weighting examples, fusion mean, server optimiser sgd, no client term).
`lora` goes to the plan's table of that name; `cite` is the source of a recipe that is no part's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.models.errors import nearest
from cotune.strategies.parts import FOLDERS, builtin

RECIPES: dict[str, dict[str, Any]] = {
    # averaging
    "fedavg": {},
    "fedavgm": {"server_optimizer": {"name": "sgd", "momentum": 0.9}},
    # averaging that corrects for local steps, or for who is worse off
    "fednova": {"fusion": "fednova"},
    "qfedavg": {"weighting": "uniform", "fusion": "q_fedavg"},
    "tilted": {"weighting": "tilted"},
    # robust to a few wrong or hostile organisations
    "median": {"weighting": "uniform", "fusion": "median"},
    "trimmed_mean": {"weighting": "uniform", "fusion": "trimmed_mean"},
    "krum": {"weighting": "uniform", "fusion": "krum"},
    "multi_krum": {"weighting": "uniform", "fusion": "multi_krum"},
    "bulyan": {"weighting": "uniform", "fusion": "bulyan"},
    "robust": {"fusion": "robust"},
    "rfa": {"fusion": "geometric_median"},
    "norm_bound": {"fusion": "norm_bound"},
    "centred_clipping": {"weighting": "uniform", "fusion": "centred_clipping"},
    # model merging
    "soup": {"weighting": "uniform"},
    "greedy_soup": {"weighting": "uniform", "fusion": "greedy_soup"},
    "task_arithmetic": {"weighting": "uniform", "fusion": "task_arithmetic"},
    "ties": {"weighting": "uniform", "fusion": "ties"},
    "dare": {"fusion": "dare"},
    "model_stock": {"weighting": "uniform", "fusion": "model_stock"},
    "consensus": {"weighting": "uniform", "fusion": "consensus"},
    "fisher": {"fusion": "fisher"},
    "regmean": {"fusion": "regmean"},
    # adapters
    "fedit": {"fusion": "fedit", "lora": {"factors": "ab"}},
    "ffa_lora": {"lora": {"factors": "b"}, "cite": "Sun et al., ICLR 2024, https://arxiv.org/abs/2403.12313"},
    "rolora": {"lora": {"factors": "alternate"}, "cite": "Chen et al., NeurIPS 2025, https://arxiv.org/abs/2502.01755"},
    "fedsvd": {"fusion": "fedsvd", "lora": {"factors": "b"}},
    "fedex": {"fusion": "fedex", "lora": {"factors": "ab"}},
    "flora": {"fusion": "flora", "lora": {"factors": "ab"}},
    "flexlora": {"fusion": "flexlora", "lora": {"factors": "ab"}},
    "fedsa": {"lora": {"factors": "ab", "keep": "b"}, "cite": "Guo et al., ICLR 2025, https://arxiv.org/abs/2410.01463"},
    "hetlora": {"weighting": "uniform", "fusion": "hetlora", "lora": {"factors": "ab"}},
    # server optimisers
    "fedadam": {"server_optimizer": "adam"},
    "fedyogi": {"server_optimizer": "yogi"},
    "fedadagrad": {"server_optimizer": "adagrad"},
    "fedexp": {"server_optimizer": "fedexp"},
    # client terms
    "fedprox": {"client_term": "proximal"},
    "scaffold": {"weighting": "uniform", "client_term": "scaffold"},
    "feddyn": {"weighting": "uniform", "client_term": "feddyn"},
}


def parts_of(name: str) -> dict[str, Any]:
    """The parts that a recipe names, as a plan would have them."""
    return {key: value for key, value in RECIPES[name].items() if key not in ("lora", "cite")}


def expand(table: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with its recipe written out; what the plan gives beside it wins. Raises ValueError for an unknown recipe.

    Code in a recipe's place, `file.py:function` or `flwr.serverapp.strategy:Krum`, is the fusion.
    """
    given = table.get("strategy")
    given = {"recipe": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or "recipe" not in given:
        return dict(table)
    name = str(given["recipe"])
    if name not in RECIPES and ":" not in name:
        for kind in FOLDERS:
            if name in builtin(kind):
                raise ValueError(f'"{name}" is a part and no strategy: expected strategy.{kind} = "{name}"')
        raise ValueError(f'unknown strategy "{name}"{nearest(name, RECIPES)}')
    wanted = {"fusion": "mean", **parts_of(name)} if name in RECIPES else {"fusion": {"name": name}}
    strategy = {**wanted, **{key: _with_name(wanted.get(key), value) for key, value in given.items() if key != "recipe"}}
    lora = _lora(name, RECIPES.get(name, {}).get("lora", {}), table)
    return {**table, "strategy": strategy, **({"lora": lora} if lora else {})}


def _with_name(recipe: Any, given: Any) -> Any:
    """Parameters alone are those of the recipe's part."""
    if not isinstance(given, Mapping) or "name" in given or recipe is None:
        return given
    return {**({"name": recipe} if isinstance(recipe, str) else recipe), **given}


def _lora(name: str, wanted: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """The plan's table `lora` with what the recipe wants of adapters. Where none are trained, the recipe would do nothing."""
    given, train = table.get("lora", {}), table.get("train", "head")
    modes = [each.get("mode") if isinstance(each, Mapping) else each for each in (train if isinstance(train, list) else [train])]
    if wanted and all(mode in ("head", "full") for mode in modes):
        raise ValueError(f'the strategy "{name}" is for adapters, and no stage of the plan trains any: expected train = lora')
    if not isinstance(given, Mapping):
        return given
    for key, value in wanted.items():
        if given.get(key, value) != value:
            raise ValueError(
                f'the strategy "{name}" is for lora.{key} = "{value}", and the plan has "{given[key]}": leave it out'
            )
    return {**given, **wanted}
