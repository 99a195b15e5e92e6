"""Multimodal stories on the device: pictures and text in, a story out, without TensorFlow.

    from seed_story import SEEDStory, load_and_preprocess_image
    model = SEEDStory()
    image = load_and_preprocess_image("example.jpg")
    print(model((image, "Once upon a time,")))

A name is imported when it is first used: `seed-story --help` needs none of NumPy, Pillow and the engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seed_story.bundle import Bundle
    from seed_story.config import CacheConfig
    from seed_story.errors import (
        BackendError,
        BundleError,
        ContractError,
        PictureError,
        PromptError,
        SeedStoryError,
        SnapshotError,
        UsageError,
    )
    from seed_story.image import load_and_preprocess_image
    from seed_story.sampling import SamplingConfig
    from seed_story.session import Story
    from seed_story.stats import StoryStats
    from seed_story.story import SEEDStory

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CacheConfig",
    "ContractError",
    "PictureError",
    "PromptError",
    "SEEDStory",
    "SamplingConfig",
    "SeedStoryError",
    "SnapshotError",
    "Story",
    "StoryStats",
    "UsageError",
    "load_and_preprocess_image",
]
__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle",
    "CacheConfig": "config",
    "load_and_preprocess_image": "image",
    "SamplingConfig": "sampling",
    "SEEDStory": "story",
    "Story": "session",
    "StoryStats": "stats",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
