"""A bundle whose graphs are empty paper: enough for all that only opens and verifies it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from seed_story.bundle import MANIFEST, TOKENIZER, Manifest, Prompt, graph_file
from seed_story.config import CacheConfig, StoryConfig
from seed_story.contract import GRAPHS, Steps
from seed_story.files import file_sha256

_TOKENS = [
    ("<|endoftext|>", 0, True),
    ("<|picture|>", 2, True),
    ("<|/picture|>", 1, True),
    ("plain", 3, False),
]


def write_paper_bundle(folder: Path, **changes: object) -> Path:
    """Writes one; `changes` are fields of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, graph in enumerate(GRAPHS, start=1):
        (folder / graph_file(graph)).write_bytes(bytes(size * 1000))
    tokens = [{"id": id_, "content": content, "special": special} for content, id_, special in _TOKENS]
    (folder / TOKENIZER).write_text(json.dumps({"added_tokens": tokens}))
    manifest = Manifest(
        name="paper",
        story=StoryConfig.tiny(),
        cache=CacheConfig.tiny(),
        steps=Steps((4,), (), attention=False),
        prompt=Prompt(opening="", request="Tell me a story.", end_tokens=("<|endoftext|>",)),
        special_tokens={},
        files={path.name: (file_sha256(path), path.stat().st_size) for path in sorted(folder.iterdir())},
        recipe="int8",
        qformer_trained=False,
        parity={"decoder": {"kl": 0.01234567, "steps": 64}},
        versions={"tensorflow": "2.21.0"},
        licences={"decoder": "Apache-2.0"},
    )
    text = json.dumps(replace(manifest, **changes).to_dict())  # type: ignore[arg-type]
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder
