"""A bundle on disk: `manifest.json`, three graphs and a tokenizer in one folder. Opened, verified, or refused.

`docs/bundle-format.md` describes the manifest field by field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from seed_story.checked import checked_sha256
from seed_story.config import CACHE_DTYPES, FLOAT32, CacheConfig, StoryConfig
from seed_story.contract import GRAPHS, SCHEMA_VERSION, Signature, Steps, signatures
from seed_story.errors import BundleError, ConfigError
from seed_story.files import cache_dir, file_sha256

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
BUNDLE_VARIABLE = "SEED_STORY_BUNDLE"
_EXPORT_HINT = "Make one with `make export`, or give the path of a bundle."


def graph_file(graph: str) -> str:
    """A graph's file name in the bundle."""
    return f"{graph}.tflite"


@dataclass(frozen=True)
class Prompt:
    """How a story is put to the model.

    Args:
        opening: before everything else; control tokens count in it (a chat template's first words).
        request: after the pictures that come before any text: asks for the story and opens its turn.
        end_tokens: control tokens that end a story.
    """

    opening: str
    request: str
    end_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says, checked.

    Args:
        story: sizes of the networks.
        steps: which signatures the decoder has.
        special_tokens: names to ids of the tokens around a picture and of those that end a story.
        files: file name to its sha256 and size in bytes.
        recipe: how the graphs were quantized.
        qformer_trained: whether pictures mean anything to the story yet.
        parity: figures of the export's gate.
        versions: of everything that made the bundle.
        licences: of the weights.
        weights: sha256 of the float32 weights that the graphs were made from; empty in a bundle from before.
        missed_bounds: figures of the gate outside their recipe's bounds, `got` and `bound` of each: of a bundle that
            was written all the same (`export --force`).
        cache_dtype: of the keys and values in the cache, one of `CACHE_DTYPES`.
    """

    name: str
    story: StoryConfig
    cache: CacheConfig
    steps: Steps
    prompt: Prompt
    special_tokens: Mapping[str, int]
    files: Mapping[str, tuple[str, int]]
    recipe: str
    qformer_trained: bool
    parity: Mapping[str, Any]
    versions: Mapping[str, str]
    licences: Mapping[str, str]
    weights: str = ""
    missed_bounds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cache_dtype: str = FLOAT32

    @property
    def contract(self) -> dict[str, tuple[Signature, ...]]:
        """The signatures that its graphs must have, by graph."""
        return signatures(self.story, self.cache.slots, self.steps, self.sink_rows)

    @property
    def sink_rows(self) -> int | None:
        """The float32 rows beside an int8 cache; fixed, whatever a session's geometry is."""
        return self.cache.sink_rows(self.cache_dtype)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "architecture": self.story.to_dict(),
            "cache": self.cache.to_dict(),
            "cache_dtype": self.cache_dtype,
            "prefill_sizes": list(self.steps.prefill),
            "begin_sizes": list(self.steps.begin),
            "attention": self.steps.attention,
            "verify": self.steps.verify,
            "prompt": {
                "opening": self.prompt.opening,
                "request": self.prompt.request,
                "end_tokens": list(self.prompt.end_tokens),
            },
            "special_tokens": dict(self.special_tokens),
            "recipe": self.recipe,
            "qformer_trained": self.qformer_trained,
            "files": {name: {"sha256": sha, "bytes": size} for name, (sha, size) in self.files.items()},
            "contract": {g: {s.name: s.to_dict() for s in entries} for g, entries in self.contract.items()},
            "parity": dict(self.parity),
            "missed_bounds": dict(self.missed_bounds),
            "weights": self.weights,
            "versions": dict(self.versions),
            "licences": dict(self.licences),
        }

    @property
    def missed(self) -> str:
        """The missed bounds in words; empty where there are none."""
        return ", ".join(f"{name} {v['got']:.4g} (bound {v['bound']:g})" for name, v in self.missed_bounds.items())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a manifest.

        Raises:
            BundleError: another schema version, a missing field, a contract that isn't the one its own
                architecture implies, or a file name that leaves the folder.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise BundleError("the manifest has another schema version", got=version, expected=SCHEMA_VERSION,
                              hint="Update seed-story." if newer else "Export the bundle again.")  # fmt: skip
        try:
            made = cls(
                name=str(values["name"]),
                story=StoryConfig.from_dict(values["architecture"]),
                cache=CacheConfig.from_dict(values["cache"]),
                steps=_steps(values),
                prompt=_prompt(values["prompt"]),
                special_tokens={str(name): int(id_) for name, id_ in values["special_tokens"].items()},
                files={_safe(name): (str(f["sha256"]), int(f["bytes"])) for name, f in values["files"].items()},
                recipe=str(values["recipe"]),
                qformer_trained=bool(values["qformer_trained"]),
                parity=values["parity"],
                versions=values["versions"],
                licences=values["licences"],
                weights=str(values.get("weights", "")),
                missed_bounds=_missed(values.get("missed_bounds", {})),
                cache_dtype=_cache_dtype(values.get("cache_dtype", FLOAT32)),  # a bundle from before there were others
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, ConfigError) as error:
            raise BundleError("the manifest is damaged", got=f"{type(error).__name__}: {error}",
                              hint="Export the bundle again.") from error  # fmt: skip
        missing = sorted({TOKENIZER, *map(graph_file, GRAPHS)} - set(made.files))
        if missing:
            raise BundleError("the manifest lists too few files", got=sorted(made.files), expected=missing)
        if values.get("contract") != json.loads(json.dumps(made.to_dict()["contract"])):
            raise BundleError("the manifest's contract isn't the one this version knows",
                              hint="Export the bundle again with this version.")  # fmt: skip
        return made


def _steps(values: Mapping[str, Any]) -> Steps:
    """A bundle from before there was a kind of step has none of that kind."""
    prefill, begin = (tuple(int(size) for size in sizes)
                      for sizes in (values["prefill_sizes"], values.get("begin_sizes", ())))  # fmt: skip
    return Steps(prefill, begin, bool(values.get("attention", False)), int(values.get("verify", 0)))


def _missed(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {str(name): {end: float(one[end]) for end in ("got", "bound")} for name, one in values.items()}


def _cache_dtype(value: object) -> str:
    if value not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is {value!r}, and none of {', '.join(CACHE_DTYPES)}")
    return str(value)


def _prompt(values: Mapping[str, Any]) -> Prompt:
    return Prompt(str(values["opening"]), str(values["request"]), tuple(map(str, values["end_tokens"])))


def _safe(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or ":" in name:
        raise BundleError("the manifest names a file outside its folder", got=repr(name), expected="a plain name")
    return name


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        path: its folder.
        manifest: what it says of itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, *, afresh: bool = False) -> Self:
        """Opens a bundle and checks every file's size and sha256.

        Args:
            path: its folder; by default `$SEED_STORY_BUNDLE`, else `build/story` here, else the one in the
                user's cache folder.
            afresh: hash every file, those too that were hashed before and that nobody has touched since.

        Raises:
            BundleError: there is none, it is damaged, or it is of another version.
        """
        folder = _find(path)
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            values = json.loads(text)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} isn't a bundle", got=f"no {MANIFEST}", hint=_EXPORT_HINT) from error
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{folder / MANIFEST} can't be read", got=error, expected="JSON in UTF-8",
                              hint="Export the bundle again.") from error  # fmt: skip
        if not isinstance(values, dict):
            raise BundleError(f"{folder / MANIFEST} is damaged", got=type(values).__name__, expected="an object")
        bundle = cls(folder, Manifest.from_dict(values))
        for name in bundle.manifest.files:
            bundle._verify(name, file_sha256 if afresh else checked_sha256)
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the manifest's files."""
        return self.path / name

    def _verify(self, name: str, sha256_of: Callable[[Path], str]) -> None:
        sha256, size = self.manifest.files[name]
        file = self.file(name)
        hint = "Copy or export the bundle again."
        try:
            if not file.is_file() or file.is_symlink():
                raise BundleError(f"the bundle lacks {name}", expected=f"{size} bytes at {file}", hint=hint)
            found = file.stat().st_size
            if found != size:
                raise BundleError(f"{name} has another size", got=f"{found} bytes", expected=f"{size} bytes", hint=hint)
            digest = sha256_of(file)
        except OSError as error:
            raise BundleError(f"{name[:100]} can't be read", got=error.strerror or error, hint=hint) from error
        if digest != sha256:
            raise BundleError(f"{name} is damaged", got=f"sha256 {digest}", expected=sha256, hint=hint)


def _find(path: str | os.PathLike[str] | None) -> Path:
    if path is not None or (path := os.environ.get(BUNDLE_VARIABLE)):
        folder = Path(os.path.expanduser(path))  # noqa: PTH111 - an unknown ~user stays as it is, without an error
        if not os.path.isdir(folder):  # noqa: PTH112 - unlike Path's, never an error
            raise BundleError("there is no such bundle", got=folder, expected="a folder", hint=_EXPORT_HINT)
        return folder
    places = (Path("build/story"), cache_dir() / "bundles" / "story")
    for place in places:
        if (place / MANIFEST).is_file():
            return place
    raise BundleError("there is no default bundle", got=f"nothing in {' or '.join(map(str, places))}",
                      hint=_EXPORT_HINT)  # fmt: skip
