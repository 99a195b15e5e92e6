"""`seed-story certify`: tells a long story and certifies that its last page costs what its fifth did.

Beside the story, a second process tells a short one, a token for a token (`yardstick.py`); the two divided are what
`certificate.py` judges. A page is some tokens, told and timed one by one, after a new picture every few pages.
"""

from __future__ import annotations

import colorsys
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from seed_story.bundle import Bundle, graph_file
from seed_story.certificate import (
    FIRST_PAGE,
    LEAST_PAGES,
    MOST_PAGES,
    PASS,
    Finding,
    Page,
    memory_finding,
    per_token,
    time_findings,
    verdict,
)
from seed_story.certificate_plot import save_plot
from seed_story.chart import check_plot
from seed_story.config import CacheConfig
from seed_story.contract import DECODER
from seed_story.device import cpu_model
from seed_story.errors import SeedStoryError, UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.output import note, table, write, write_json
from seed_story.resident import Resident, resident
from seed_story.story import Pixels, SEEDStory, Story
from seed_story.telling import cache_config, versions
from seed_story.yardstick import BEGINNING, Yardstick, timed_token

_PARAGRAPH = "\n\n"
_LEAST_TURNS = 2  # a story that hardly fills the cache proves nothing
_WARM_UP_IDS = 2048  # vocabulary read at a time


class ShortStory(Protocol):
    """What the long story is measured against; see `Yardstick`."""

    def begin(self) -> None: ...  # noqa: D102

    def token_ms(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """The story to tell.

    Args:
        pages: how many.
        tokens: told on each, and timed, besides the first one after what the page gives to read.
        picture_every: pages from one picture to the next, the first page has one.
        pictures: pixels, shown in turn; none: each one drawn, no two alike.
        seed: of the story.
        cache: what it keeps; by default what the bundle says.
    """

    pages: int
    tokens: int
    picture_every: int
    pictures: tuple[Pixels, ...] = ()
    seed: int = 0
    cache: CacheConfig | None = None

    def check(self, slots: int) -> None:
        """Raises UsageError when the story is too short for a certificate of a cache of `slots`, or too long."""
        if not LEAST_PAGES <= self.pages <= MOST_PAGES:
            expected = f"{LEAST_PAGES} to {MOST_PAGES}"
            raise UsageError("the number of pages is impossible", got=self.pages, expected=expected)
        if self.pages * self.tokens < _LEAST_TURNS * slots:
            raise UsageError(f"the story is too short to fill a cache of {slots} slots {_LEAST_TURNS} times",
                             got=f"{self.pages} pages of {self.tokens} tokens",
                             hint="Give more --pages or --tokens.")  # fmt: skip

    def picture(self, page: int) -> Pixels | Image.Image | None:
        """What page `page`, from 1 on, shows; None for nothing."""
        index, rest = divmod(page - 1, self.picture_every)
        if rest:
            return None
        return self.pictures[index % len(self.pictures)] if self.pictures else drawn_picture(index)


def certify(
    *,
    bundle: str,
    pages: int,
    tokens: int,
    images: Sequence[str],
    picture_every: int,
    seed: int,
    threads: int | None,
    backend: str,
    policy: str | None = None,
    picture_eviction: str | None = None,
    plot: str,
    as_json: bool,
) -> int:
    """Measures, judges, draws, and prints the certificate.

    Args:
        pages, tokens, picture_every, seed: see `Plan`.
        images: picture files, shown in turn; none: drawn ones.
        policy, picture_eviction: what the cache keeps; by default what the bundle says.
        plot: the PNG file to write.

    Returns:
        The exit code: 0 for PASS, 1 for FAIL.

    Raises:
        UsageError: too few pages or tokens, or a file name that isn't a PNG's.
        SeedStoryError: memory can't be read here, or the plot can't be written; and see `SEEDStory`.
    """
    file = Path(plot)
    check_plot(file)
    _memory()
    opened = Bundle.open(bundle)
    size = opened.manifest.story.vision.image_size
    cache = cache_config(opened.manifest.cache, policy, picture_eviction)
    plan = Plan(pages, tokens, picture_every, tuple(load_and_preprocess_image(i, size) for i in images), seed, cache)
    plan.check(cache.slots)
    with SEEDStory(opened, threads=threads, backend=backend) as model:
        warm_up(model)
        with Yardstick(opened.path, threads=model.threads, backend=backend) as short:
            measured = measure(model, short, plan)
        findings = judge(measured)
        result = {**summary(model, plan, measured, findings), "plot": str(file)}
    unsaved = None
    try:
        save_plot(file, measured, findings, caption(result))
    except SeedStoryError as error:  # the minutes of measuring aren't lost for it
        result["plot"], unsaved = None, error
    if as_json:
        write_json(result)
    else:
        write(render(result, findings))
    if unsaved:
        raise unsaved
    return 0 if result["verdict"] == PASS else 1


def warm_up(model: SEEDStory) -> None:
    """Reads and decodes the whole vocabulary, shows a picture, and fills the cache, in stories that don't count.

    A mapped file comes into memory page by page as its rows are looked up, and the tokenizer remembers each
    token it has decoded: both end with the vocabulary, but look like a leak as long as new words come.
    """
    count = model.tokenizer.vocab_size
    for start in range(0, count, _WARM_UP_IDS):
        if text := model.tokenizer.decode(range(start, min(start + _WARM_UP_IDS, count))):
            model.begin().add_text(text)
    story = model.begin().add_picture(drawn_picture(0)).add_text(BEGINNING)
    while story.stats.prompt_tokens < model.cache.slots:
        story.add_text(BEGINNING)
    for _ in story.tell(max_tokens=8):
        pass


def drawn_picture(index: int) -> Image.Image:
    """A disc on a ground: a picture for where none is given. No two numbers give the same."""
    size = 224
    hue = index * 0.618034 % 1  # the golden ratio keeps neighbours apart
    ground, disc = (
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(h % 1, s, v))
        for h, s, v in ((hue, 0.35, 0.95), (hue + 0.45, 0.8, 0.7))
    )
    image = Image.new("RGB", (size, size), ground)
    x, y, radius = 40 + index * 37 % 144, 40 + index * 53 % 144, 24 + index * 11 % 40
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=disc)
    return image


def measure(
    model: SEEDStory,
    short: ShortStory,
    plan: Plan,
    *,
    clock: Callable[[], float] = time.perf_counter,
    memory: Callable[[], Resident] | None = None,
) -> list[Page]:
    """Tells the story, and notes what each page took.

    Args:
        clock: seconds.
        memory: of this process.
    """
    story = model.begin(seed=plan.seed, policy=plan.cache)
    times_ms = np.empty((2, plan.tokens))  # one for all pages: what measures must not grow itself
    pages = []
    for number in range(1, plan.pages + 1):
        short.begin()
        started, picture = clock(), plan.picture(number)
        _read(story, picture, BEGINNING if number == 1 else _PARAGRAPH, clock)
        reading_ms = 1e3 * (clock() - started)
        for index in range(plan.tokens):
            times_ms[:, index] = timed_token(story, clock), short.token_ms()
        gc.collect()
        own, other = (float(ms) for ms in per_token(times_ms))
        held = (memory or _memory)()
        pages.append(Page(number, picture is not None, reading_ms, own, other, own / other,
                          held.total_mib, held.private_mib))  # fmt: skip
        if number % 10 == 0:
            note(f"page {number} of {plan.pages}: {own:.2f} ms/token, x {own / other:.3f} of a short story's; "
                 f"{held.total_mib:.1f} MiB")  # fmt: skip
    return pages


def _read(story: Story, picture: Pixels | Image.Image | None, text: str, clock: Callable[[], float]) -> None:
    """Up to the first token after it."""
    if picture is not None:
        story.add_picture(picture)
    story.add_text(text)
    timed_token(story, clock)


def _memory() -> Resident:
    held = resident()
    if held is None:
        raise SeedStoryError("this process's memory can't be read", expected="/proc/self/smaps_rollup",
                             hint="Certify on Linux or Android.")  # fmt: skip
    return held


def judge(pages: Sequence[Page]) -> list[Finding]:
    """The changes of time and memory from page 5 to the last."""
    return [
        *time_findings(np.array([page.ratio for page in pages])),
        memory_finding("resident memory", np.array([page.resident_mib for page in pages])),
        memory_finding("private memory", np.array([page.private_mib for page in pages])),
    ]


def summary(model: SEEDStory, plan: Plan, pages: Sequence[Page], findings: Sequence[Finding]) -> dict[str, Any]:
    """The certificate as JSON values."""
    manifest, cache = model.bundle.manifest, plan.cache or model.cache
    decided, reason = verdict(findings)
    return {
        "verdict": decided,
        "reason": reason,
        "first_page": FIRST_PAGE,
        "pages": plan.pages,
        "tokens_per_page": plan.tokens,
        "pictures": sum(page.picture for page in pages),
        "cache": cache.to_dict(),
        "cache_slots": cache.slots,
        "policy": cache.policy,
        "findings": [{**asdict(finding), "outcome": finding.outcome} for finding in findings],
        "series": [asdict(page) for page in pages],
        "seed": plan.seed,
        "threads": model.threads,
        "cpu": cpu_model(),
        "bundle": str(model.bundle.path),
        "name": manifest.name,
        "recipe": manifest.recipe,
        "decoder_sha256": manifest.files[graph_file(DECODER)][0],
        "versions": versions(),
    }


def render(result: dict[str, Any], findings: Sequence[Finding]) -> str:
    """A `summary` for a reader."""
    rows = list(zip(("bundle", "machine", "story"), caption(result), strict=True))
    for page in (FIRST_PAGE, result["pages"]):
        of = result["series"][page - 1]
        figures = f"{of['ms_per_token']:.2f} ms/token, x {of['ratio']:.3f} of a short story's"
        memory = f"{of['resident_mib']:.1f} MiB, of them {of['private_mib']:.1f} private"
        rows.append((f"page {page}", f"{figures}; {memory}"))
    rows += [(finding.name, f"{finding.text()}: {finding.outcome}") for finding in findings]
    rows.append(("plot", result["plot"] or "none"))
    return table(rows) + f"{result['verdict']}: {result['reason']}\n"


def caption(result: dict[str, Any]) -> tuple[str, str, str]:
    """What was measured: bundle, machine, story."""
    cache = f"{result['cache_slots']} slots, {result['policy']}"
    return (
        f"{result['name']} {result['recipe']}, {cache}, from {result['bundle']}",
        f"{result['cpu'] or 'CPU unavailable'}, threads {result['threads']}",
        f"{result['pages']} pages of {result['tokens_per_page']} tokens, {result['pictures']} pictures, "
        f"seed {result['seed']}",
    )
