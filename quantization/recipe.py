"""Recipes: which tensors of which graph become what, and the bounds that the result must hold.

A recipe is a JSON file: `graphs` maps each graph to a list of `litert-quantizer` entries (regular expression over
layers, operation, algorithm, number formats; the last match counts, an empty list leaves the graph in float32), and
`bounds` maps a figure of the parity gate to its limit and the reason for it. `rotated`, if it is there and true, has
the residual streams of the decoder (`export/rotation.py`) and of a vision transformer that isn't integers alone
(`export/vit_rotation.py`) turned before they are quantized. `cache` is what the cache's keys and values are, `float32`
(where nothing is said) or `int8`. `extends` names a recipe of the project, whose fields count where the file has none.

A decoder's operators are named `decode/layers_11_down/product`, by signature and weight (`export/decoder_weights.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_story.config import CACHE_DTYPES, FLOAT32
from seed_story.contract import GRAPHS
from seed_story.errors import ConfigError, UsageError

FOLDER = Path(__file__).parent / "recipes"
CALIBRATION = Path(__file__).parent / "calibration_data"
"""Stories with pictures of the training set, for recipes that look at what a graph is given."""
BOUNDS = ("vit_cosine_min", "qformer_cosine_min", "decoder_mean_kl_nat", "decoder_top1")
"""The figures that every recipe bounds; see `export/parity.py`."""
OPTIONAL_BOUNDS = ("decoder_perplexity_ratio",)
"""Those that a recipe may bound."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize a bundle.

    Args:
        graphs: graph to its `litert-quantizer` entries.
        bounds: figure to its limit; a cosine or agreement is a least value, a divergence or ratio a greatest.
        rotated: whether residual streams are turned first, so that no channel stands out.
        cache: what the cache's keys and values are, one of `seed_story.config.CACHE_DTYPES`.
        scales: which of a checkpoint's learned scales the rounded matrices get (`export/learned_scales.py`); None for
            those that rounding chose.
    """

    name: str
    summary: str
    graphs: Mapping[str, list[dict[str, Any]]]
    bounds: Mapping[str, float]
    rotated: bool = False
    cache: str = FLOAT32
    scales: str | None = None


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a user's own file (a path that ends in `.json`).

    Raises:
        UsageError: there is no such recipe.
        ConfigError: the file isn't a recipe.
    """
    own = str(name).endswith(".json")
    if not own and name not in recipe_names():
        raise UsageError("there is no such recipe", got=name, expected=", ".join(recipe_names()) + ", or a .json file")
    path = Path(name) if own else FOLDER / f"{name}.json"
    try:
        values = _fields(path)
        graphs = {graph: list(values["graphs"][graph]) for graph in GRAPHS}
        wanted = [*BOUNDS, *(figure for figure in OPTIONAL_BOUNDS if figure in values["bounds"])]
        bounds = {figure: float(values["bounds"][figure]["bound"]) for figure in wanted}
        if not all(map(math.isfinite, bounds.values())):
            raise ValueError(f"a bound isn't a number: {bounds}")
        rotated = values.get("rotated", False)
        if not isinstance(rotated, bool):
            raise ValueError(f"rotated is neither true nor false: {rotated!r}")
        cache = values.get("cache", FLOAT32)
        if cache not in CACHE_DTYPES:
            raise ValueError(f"cache is none of {', '.join(CACHE_DTYPES)}: {cache!r}")
        scales = values.get("scales")
        if not (scales is None or (isinstance(scales, str) and scales.isidentifier())):
            raise ValueError(f"scales is no plain name: {scales!r}")
        return Recipe(str(values["name"]), str(values["summary"]), graphs, bounds, rotated, cache, scales)
    except OSError as error:
        raise UsageError("the recipe can't be read", got=error, expected="a JSON file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path.name} isn't a recipe", got=f"{type(error).__name__}: {error}",
                          expected=f"graphs {', '.join(GRAPHS)} and bounds {', '.join(BOUNDS)}",
                          hint="See quantization/recipes/int8.json.") from error  # fmt: skip


def entry_of(entries: Sequence[dict[str, Any]], operation: str, scope: str) -> dict[str, Any] | None:
    """The entry that counts for an operation: the last whose expression is found in its scope, its outputs' names."""
    meant = [e for e in entries if e["operation"] in (operation, "*") and re.search(e["regex"], scope)]
    return meant[-1] if meant else None


def _fields(path: Path) -> dict[str, Any]:
    """What the file says, and what the recipe says that it extends, if it does; only one that extends no other."""
    values: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    base = values.pop("extends", None)
    if base is None:
        return values
    plain = [name for name in recipe_names() if "extends" not in json.loads((FOLDER / f"{name}.json").read_text())]
    if base not in plain:
        raise ValueError(f"extends is none of {', '.join(plain)}: {base!r}")
    return {**_fields(FOLDER / f"{base}.json"), **values}
