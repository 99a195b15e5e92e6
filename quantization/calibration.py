"""What quantization is calibrated with: a folder's stories, and their pictures as the vision transformer reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from seed_story.errors import UsageError
from seed_story.image import load_and_preprocess_image
from training.data import StoryRecord, check_pictures, read_stories

STORIES = "stories.jsonl"


def calibration_stories(folder: Path) -> list[StoryRecord]:
    """The stories of a folder.

    Args:
        folder: has a `stories.jsonl` in StoryStream's format, and the pictures that it names.

    Raises:
        UsageError: there is no such folder or file, or it isn't in that format.
        PictureError: a picture is missing.
    """
    file = folder / STORIES
    if not file.is_file():
        raise UsageError("there is nothing to calibrate with", got=folder,
                         expected=f"a folder with {STORIES} and its pictures",
                         hint="Leave out --calibration to use the project's own.")  # fmt: skip
    stories = read_stories(file)
    check_pictures(stories)
    return stories


def calibration_pictures(folder: Path, size: int) -> list[npt.NDArray[np.float32]]:
    """The pictures of a folder's stories, each once, float32 `[1, size, size, 3]` in 0..1.

    Raises:
        UsageError, PictureError: as `calibration_stories`; or a picture can't be read.
    """
    pictures = dict.fromkeys(page.picture for story in calibration_stories(folder) for page in story.pages)
    return [load_and_preprocess_image(picture, size) for picture in pictures]
