"""The quality report: what bundles keep of the float reference, and what they cost.

The reference is a float32 bundle of the same weights, run by the same runtime: so all that differs is quantization.
That it is the network itself, the parity gate saw to when it was exported (`export/parity.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantization.cost import footprint, speeds
from quantization.fidelity import Divergence, all_figures
from quantization.locate import Reading, first_bad, locate
from quantization.passages import picture_cosines, walk
from quantization.reference import check_matrices, check_reference
from quantization.sensitivity import Cost, sensitivity
from seed_story.bundle import Bundle, graph_file
from seed_story.contract import GRAPHS
from seed_story.device import cpu_model
from seed_story.errors import SeedStoryError
from seed_story.story import SEEDStory
from seed_story.threads import default_threads
from training.data import PAGES, StoryRecord, check_pictures
from training.evaluation.bootstrap import by_cluster, difference_interval, mean_interval
from training.evaluation.grounding import BEGINNING, Told, tell_all
from training.evaluation.items import PictureItem, subset


@dataclass(frozen=True)
class Material:
    """What a report is measured on.

    Args:
        stories: held out of training, with pictures.
        items: held-out pictures of known things, to tell about.
    """

    stories: Sequence[StoryRecord]
    items: Sequence[PictureItem]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        tokens: of the stories, to compare next-token distributions at.
        pictures: of the stories, to compare features of.
        told: pictures to tell about.
        seed: of the subsets, the stories and the intervals.
        threads: CPU threads of a call; by default all CPUs up to four.
    """

    tokens: int = 4000
    pictures: int = 200
    told: int = 40
    seed: int = 0
    threads: int | None = None


def make_report(reference: Bundle, bundles: Sequence[Bundle], material: Material, plan: Plan) -> dict[str, Any]:
    """Measures all bundles beside the reference.

    Returns:
        JSON values: `reference` and `bundles`, with a row of figures each.

    Raises:
        UsageError: the bundles can't be compared (see `check_reference`).
        PictureError: a picture is missing.
    """
    check_reference(reference, bundles)
    check_pictures(material.stories)
    threads = plan.threads or default_threads()
    pictures = subset(_pictures(material.stories), plan.pictures, plan.seed)
    items = subset(material.items, plan.told, plan.seed, key=lambda item: item.split)
    rows = [_identity(bundle) for bundle in (reference, *bundles)]
    with contextlib.ExitStack() as opened:
        models = [opened.enter_context(SEEDStory(bundle, threads=threads)) for bundle in (reference, *bundles)]
        places, found = walk(models[0], models[1:], material.stories, tokens=plan.tokens)
        for row, one in zip(rows[1:], found, strict=True):
            _check_numbers(row["bundle"], one)
            row |= all_figures(places, one, seed=plan.seed)
        for row, cosines in zip(rows[1:], picture_cosines(models[0], models[1:], pictures), strict=True):
            row["picture_cosine"] = cosines
        told = [tell_all(model, items, beginning=BEGINNING, seed=plan.seed) for model in models]
        for row, stories in zip(rows, told, strict=True):
            row["naming"] = _naming(stories, told[0], plan.seed)
        for row, speed in zip(rows, speeds(models), strict=True):
            row |= speed
    all_bundles = zip(rows, (reference, *bundles), strict=True)
    for row, bundle in tqdm(all_bundles, desc="loading and memory", unit="bundle", total=len(rows)):
        row |= footprint(bundle.path, pictures[0], threads=threads)
        row["size_ratio"] = row["bytes"] / rows[0]["bytes"]
    return {"cpu": cpu_model(), "threads": threads, "seed": plan.seed, "reference": rows[0], "bundles": rows[1:]}


def _check_numbers(bundle: str, found: Sequence[Divergence]) -> None:
    nonsense = sum(not math.isfinite(one.kl) for one in found)
    if nonsense:
        raise SeedStoryError(f"{bundle} computes nonsense", got=f"{nonsense} of {len(found)} figures no number",
                             hint="Find the layer with --locate.")  # fmt: skip


def _plain(reading: Reading | Cost) -> dict[str, Any]:
    """As JSON values, which have null in the place of what isn't a number."""
    return {name: None if value != value or value in (math.inf, -math.inf) else value
            for name, value in asdict(reading).items()}  # fmt: skip


def take_apart(
    reference: Bundle, bundles: Sequence[Bundle], material: Material, plan: Plan, *, ranked: bool
) -> list[dict[str, Any]]:
    """Looks at every matrix of the bundles.

    Args:
        ranked: by what it costs when it alone is quantized; else whether it computes what the reference's does.

    Returns:
        For each bundle its recipe, and `sensitivity`, a list of `Cost`; or `matrices`, a list of `Reading`, and
        `first_bad`, one of them or null.

    Raises:
        UsageError: the bundles can't be compared, or taken apart.
    """
    check_reference(reference, bundles)
    check_matrices(reference, bundles)
    check_pictures(material.stories)
    threads, rows = plan.threads or default_threads(), []
    pictures, texts = _pictures(material.stories), [page.caption for s in material.stories for page in s.pages]
    for bundle in bundles:
        row = _identity(bundle)
        with SEEDStory(reference, threads=threads) as truth, SEEDStory(bundle, threads=threads) as model:
            if ranked:
                row["sensitivity"] = list(map(_plain, sensitivity(truth, model, pictures, texts)))
            else:
                readings = locate(truth, model, pictures[0], " ".join(texts[:PAGES]))
                bad = first_bad(readings)
                row |= {"matrices": list(map(_plain, readings)), "first_bad": bad and _plain(bad)}
        rows.append(row)
    return rows


def _pictures(stories: Sequence[StoryRecord]) -> list[Path]:
    return list(dict.fromkeys(page.picture for story in stories for page in story.pages))


def _identity(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "recipe": manifest.recipe,
        "missed_bounds": dict(manifest.missed_bounds),
        "bytes": sum(size for _, size in manifest.files.values()),
        "graph_bytes": {graph: manifest.files[graph_file(graph)][1] for graph in GRAPHS},
    }


def _naming(told: Sequence[Told], reference: Sequence[Told], seed: int) -> dict[str, Any]:
    """The mission's own metric: does the beginning of the story name what is in the picture?"""
    mine, theirs = (by_cluster((one.item.concept, one.named) for one in stories) for stories in (told, reference))
    return {
        "pictures": len(told),
        "share": mine.mean,
        "share_interval": mean_interval(mine, seed=seed),
        "change": mine.mean - theirs.mean,
        "change_interval": difference_interval(mine, theirs, seed=seed),
    }
