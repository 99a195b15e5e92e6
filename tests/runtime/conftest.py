"""The model that the story tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from seed_story.story import SEEDStory


@pytest.fixture(scope="module")
def model(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as made:
        yield made
