"""What quantization is calibrated with: a folder's stories, and their pictures as the vision transformer reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seed_story.bundle import Prompt
from seed_story.errors import UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.tokenizer import StoryTokenizer
from training.data import TRAIN_FILE, StoryEncoder, StoryRecord, check_pictures, read_stories, text_encoders

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

STORIES = "stories.jsonl"

MOST_PICTURES = 256
"""A data set's thousands took more than 12 minutes and 7 GB before the first graph was quantized."""


def calibration_stories(folder: Path, *, shown: bool = True) -> list[StoryRecord]:
    """The stories of a folder.

    Args:
        folder: has a `stories.jsonl` in StoryStream's format, or a data set's `train.jsonl`, and the pictures that it
            names.
        shown: whether the pictures have to be there.

    Raises:
        UsageError: there is no such folder or file, or it isn't in that format.
        PictureError: a picture is missing.
    """
    file = next((folder / name for name in (STORIES, TRAIN_FILE) if (folder / name).is_file()), None)
    if file is None:
        raise UsageError("there is nothing to calibrate with", got=folder,
                         expected=f"a folder with {STORIES} and its pictures",
                         hint="Leave out --calibration to use the project's own.")  # fmt: skip
    stories = read_stories(file)
    if shown:
        check_pictures(stories)
    return stories


def calibration_rows(
    folder: Path,
    tokenizer: StoryTokenizer,
    prompt: Prompt,
    queries: int,
    embed: Callable[[Ids], Floats],
    look: Callable[[Path], Floats] | None,
    tokens: int,
) -> Iterator[Floats]:
    """The stories as a decoder is fed them, float32 `[t, hidden]` each, `tokens` rows together at most.

    Args:
        queries: embeddings of a picture.
        embed: ids `[t]` to embeddings `[t, hidden]`.
        look: a picture's file to its embeddings `[queries, hidden]`; None where they say nothing: stories are text
            alone then, every other one without the prompt's words.

    Raises:
        UsageError, PictureError: as `calibration_stories`; or a picture can't be read.
    """
    encoders = (StoryEncoder(tokenizer, prompt, queries),) if look else text_encoders(tokenizer, prompt, queries)
    for encoder, story in zip(cycle(encoders), calibration_stories(folder, shown=look is not None), strict=False):
        example = encoder.encode(story, "all" if look else "none", ends=False)
        places = example.ids < 0
        rows = embed(np.where(places, 0, example.ids))
        if look and places.any():
            rows[places] = np.concatenate([look(picture) for picture in example.pictures])
        yield rows[:tokens]
        tokens -= len(rows)
        if tokens <= 0:
            return


def calibration_pictures(folder: Path, size: int) -> list[Floats]:
    """The pictures of a folder's stories, each once, the first `MOST_PICTURES`: float32 `[1, size, size, 3]` in 0..1.

    Raises:
        UsageError, PictureError: as `calibration_stories`; or a picture can't be read.
    """
    pictures = dict.fromkeys(page.picture for story in calibration_stories(folder) for page in story.pages)
    return [load_and_preprocess_image(picture, size) for picture in islice(pictures, MOST_PICTURES)]
