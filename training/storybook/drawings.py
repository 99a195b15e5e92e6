"""The drawings of every concept, from all packages, as transparent pictures cut to what they show."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from seed_story.errors import DownloadError, UsageError
from seed_story.files import cache_dir
from training.storybook.concepts import Concept
from training.storybook.icons import icons_of
from training.storybook.packages import ICONS, PACKAGES

SIDE = 256
"""The longer side of a rendered drawing, in pixels."""
_LEAST_SHARE = 0.04  # of its pixels, or the drawing is empty or a mere line
_MOST_CLIP_ART = 14
"""Of one concept."""
_NOT_CLIP_ART = ("star", "map", "computer", "hotel", "orange", "pen", "city", "man", "woman", "cloud", "window", "key")
"""Words whose clip art is icons, charts and colours."""
_EMOJI_TABLES = ("noto", "twemoji", "fluent-flat")  # packages that say which code points an icon draws
_EMOJI_ICONS = ("fluent-high-contrast", "emojione-monotone")  # icons that are named like the emoji they draw
_ALL = {**PACKAGES, **ICONS}


@dataclass(frozen=True)
class Drawing:
    """One picture of one concept.

    Args:
        concept: its name.
        style: a key of `PACKAGES` or `ICONS`.
        source: the picture's name in its package.
        file: a PNG with an alpha channel, relative to `folder()`.
    """

    concept: str
    style: str
    source: str
    file: str

    def open(self) -> Image.Image:
        """The picture, RGBA."""
        return Image.open(folder() / self.file).convert("RGBA")


def folder() -> Path:
    """Where the rendered drawings are kept."""
    return cache_dir() / "drawings" / "rendered"


def render_drawings(concepts: Iterable[Concept], styles: Iterable[str] = tuple(PACKAGES)) -> list[Drawing]:
    """Every drawing there is of the concepts; rendered at the first call, read from the cache afterwards.

    Raises:
        DownloadError: a package can't be had.
    """
    concepts, found = tuple(concepts), []
    for style in styles:
        listing = folder() / f"{style}-{_ALL[style].sha256[:12]}-{_fingerprint(concepts)}.json"
        if not listing.is_file():
            made = [asdict(drawing) for drawing in _render_style(style, concepts)]
            fresh = listing.with_suffix(".new")
            fresh.write_text(json.dumps(made), encoding="utf-8")
            fresh.replace(listing)
        found += [Drawing(**entry) for entry in json.loads(listing.read_text(encoding="utf-8"))]
    return found


def _fingerprint(concepts: tuple[Concept, ...]) -> str:
    return hashlib.sha256("|".join(f"{c.name};{c.emoji}" for c in concepts).encode()).hexdigest()[:12]


def _render_style(style: str, concepts: tuple[Concept, ...]) -> Iterator[Drawing]:
    (folder() / style).mkdir(parents=True, exist_ok=True)
    sources = dict(_sources(style, concepts))
    for (concept, source), data in tqdm(sources.items(), desc=f"drawings: {style}", unit="drawing"):
        picture = _render(data)
        if picture is None:
            continue
        name = f"{style}/{re.sub('[^a-z0-9]+', '_', concept.lower())}-{re.sub('[^A-Za-z0-9]+', '_', source)[-60:]}.png"
        picture.save(folder() / name)
        yield Drawing(concept, style, source, name)


def _sources(style: str, concepts: tuple[Concept, ...]) -> Iterator[tuple[tuple[str, str], str | bytes]]:
    """`((concept, name in the package), SVG text or the bytes of a raster picture)`."""
    if style == "openclipart":
        yield from _clip_art(concepts)
    elif style == "fluent-3d":
        files = _archive(style)
        for concept in concepts:
            for emoji in concept.emoji.split():
                data = files.get(f"package/assets/{_code(emoji, keep_selector=True)}.webp")
                data = data or files.get(f"package/assets/{_code(emoji)}.webp")
                if data:
                    yield (concept.name, _code(emoji)), data
    else:
        icons = json.loads(_archive(style)["package/icons.json"])
        for drawn in _icons(style, icons, concepts):
            yield drawn, _svg(icons, drawn[1])


def _icons(style: str, icons: Mapping[str, Any], concepts: tuple[Concept, ...]) -> Iterator[tuple[str, str]]:
    """`(concept, icon)` of a set."""
    if style in ICONS and style not in _EMOJI_ICONS:
        yield from icons_of(icons["icons"], (c.name for c in concepts if c.name not in _NOT_CLIP_ART))
        return
    for concept in concepts:
        for emoji in concept.emoji.split():
            if (name := _icon(icons, emoji)) is not None:
                yield concept.name, name


def _icon(icons: Mapping[str, Any], emoji: str) -> str | None:
    """The icon of a set that draws an emoji, by any of the names that the emoji has elsewhere."""
    for name in _emoji_names().get(_code(emoji), ()):
        for spelling in (name, name.replace("-", "")):
            if spelling in icons["icons"]:
                return spelling
            if spelling in icons.get("aliases", {}) and set(icons["aliases"][spelling]) == {"parent"}:
                return str(icons["aliases"][spelling]["parent"])
    return None


def _svg(icons: Mapping[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" ' \
           f'width="{width}" height="{height}">{icon["body"]}</svg>'  # fmt: skip


@cache
def _emoji_names() -> Mapping[str, list[str]]:
    names: dict[str, list[str]] = {}
    for style in _EMOJI_TABLES:
        for code, name in json.loads(_archive(style)["package/chars.json"]).items():
            plain = code.replace("-fe0f", "")
            names.setdefault(plain, [])
            if name not in names[plain]:
                names[plain].append(name)
    return names


def _code(emoji: str, *, keep_selector: bool = False) -> str:
    return "-".join(f"{ord(c):x}" for c in emoji if keep_selector or c != "\ufe0f")


def _archive(style: str) -> Mapping[str, bytes]:
    """The files of an npm archive."""
    with tarfile.open(_ALL[style].fetch()) as archive:
        members = (m for m in archive if m.isfile() and m.name.endswith((".json", ".webp")))
        return {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def _clip_art(concepts: tuple[Concept, ...]) -> Iterator[tuple[tuple[str, str], str]]:
    """Clip art of which its title, its file's name or its keywords say that it shows one of the concepts."""
    names = {concept.name.lower(): concept.name for concept in concepts if concept.name not in _NOT_CLIP_ART}
    names |= {f"{name}s": concept for name, concept in names.items() if not name.endswith("s")}
    left = dict.fromkeys(names.values(), _MOST_CLIP_ART)
    for path, data in _debian_files(PACKAGES["openclipart"].fetch()):
        text = data.decode("utf-8", errors="replace")
        concept = _titled(text, path, names) or _described(text, names)
        if concept is not None and left[concept]:
            left[concept] -= 1
            yield (concept, Path(path).stem), text


def _titled(svg: str, path: str, names: Mapping[str, str]) -> str | None:
    """The concept in which a title of at most four words ends; else the first word of the file's name."""
    title = re.search(r"<dc:title>([^<]*)<", svg)
    words = re.findall(r"[a-z]+(?:-[a-z]+)*", title[1].lower() if title else "")
    if len(words) <= 4:
        for length in (3, 2, 1):
            if found := names.get(" ".join(words[-length:])):
                return found
    return names.get(re.split("[^a-z]", Path(path).stem.lower())[0])  # its author's name follows


def _described(svg: str, names: Mapping[str, str]) -> str | None:
    """The one concept among a few keywords."""
    keywords = [word.strip().lower() for word in re.findall(r"<rdf:li>([^<]*)</rdf:li>", svg)]
    found = {names[word] for word in keywords if word in names}
    return found.pop() if len(found) == 1 and len(keywords) <= 5 and "icon" not in keywords else None


def _debian_files(package: Path) -> Iterator[tuple[str, bytes]]:
    try:
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise DownloadError("dpkg-deb can't unpack the clip art", got=error,
                            hint="Install dpkg, or leave the style out.") from error  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".svg") and member.size < 400_000:
                yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]


def _render(data: str | bytes) -> Image.Image | None:
    """A drawing cut to its opaque part, its longer side `SIDE`; None if it can't be read or shows next to nothing."""
    try:
        import resvg_py
    except ImportError as error:
        raise UsageError("resvg_py isn't installed, and draws the storybook's SVG files", got=error,
                         hint="Run `make storybook`, or `pip install -e '.[train]'`.") from error  # fmt: skip

    if isinstance(data, str):
        try:
            data = bytes(resvg_py.svg_to_bytes(svg_string=data, width=2 * SIDE, skip_system_fonts=True))
        except ValueError:
            return None
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    if not 0.2 < picture.width / picture.height < 5:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    opaque = sum(picture.getchannel("A").histogram()[128:]) / (picture.width * picture.height)
    return picture if opaque > _LEAST_SHARE else None
