"""What frozen blocks of the ViT see in every picture, computed once and kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops
from tqdm import tqdm

from model.vit import VisionTransformer
from seed_story.image import load_and_preprocess_image

Half = npt.NDArray[np.float16]
_BATCH = 16


class FeatureStore:
    """Hidden states of a ViT after some of its blocks, float16 `[pictures, tokens, hidden]`, on disk.

    Pictures that are there already aren't computed again; an interrupted computation goes on where it stopped.

    Args:
        folder: where they are kept: the states of one picture after the other, and the pictures' names.
        root: the folder that the names are relative to.
        end: after how many blocks.
        source: a store of the same ViT after fewer blocks, from which to go on; None to begin with the pictures.
    """

    def __init__(
        self, folder: Path, root: Path, vision: VisionTransformer, end: int, source: FeatureStore | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.end, self._root, self._vision, self._source = end, root, vision, source
        self._data, self._names = folder / f"after_{end}.f16", folder / f"after_{end}.json"
        self._shape = (vision.config.tokens, vision.config.hidden_size)
        names = json.loads(self._names.read_text(encoding="utf-8")) if self._names.is_file() else []
        whole = self._data.stat().st_size // (2 * math.prod(self._shape)) if self._data.is_file() else 0
        self._rows = {name: row for row, name in enumerate(names[:whole])}  # a crash may have lost the last states

    def fill(self, pictures: Sequence[Path]) -> None:
        """Computes what is missing.

        Raises:
            PictureError: a picture can't be read.
        """
        missing = [p for p in dict.fromkeys(pictures) if self._name(p) not in self._rows]
        if self._source is not None:
            self._source.fill(missing)
        run = _compiled(self._step)
        label = f"features after block {self.end}"
        with tqdm(total=len(missing), desc=label, unit="picture", disable=not missing) as bar:
            for start in range(0, len(missing), _BATCH):
                some = missing[start : start + _BATCH]
                self._append(some, np.asarray(ops.convert_to_numpy(run(self._given(some))), np.float16))
                bar.update(len(some))

    def _given(self, pictures: Sequence[Path]) -> npt.NDArray[Any]:
        if self._source is not None:
            return self._source[pictures].astype(np.float32)
        return np.concatenate([load_and_preprocess_image(p, self._vision.config.image_size) for p in pictures])

    def _step(self, given: Any) -> Any:
        if self._source is not None:
            return self._vision.encoder(given, first=self._source.end, end=self.end)
        return self._vision.hidden(given, self.end)

    def _append(self, pictures: Sequence[Path], hidden: Half) -> None:
        with self._data.open("r+b" if self._data.exists() else "w+b") as file:
            file.seek(len(self._rows) * hidden[0].nbytes)  # over what an interrupted write left behind
            file.write(hidden.tobytes())
        for picture in pictures:
            self._rows[self._name(picture)] = len(self._rows)
        fresh = self._names.with_suffix(".new")
        fresh.write_text(json.dumps(list(self._rows)), encoding="utf-8")
        fresh.replace(self._names)

    def __getitem__(self, pictures: Sequence[Path]) -> Half:
        """The states of some pictures, `[len(pictures), tokens, hidden]`; raises KeyError for one that isn't there."""
        rows = [self._rows[self._name(p)] for p in pictures]
        if not rows:
            return np.zeros((0, *self._shape), np.float16)
        everything = np.memmap(self._data, np.float16, "r", shape=(len(self._rows), *self._shape))
        return np.stack([everything[row] for row in rows])

    def _name(self, picture: Path) -> str:
        return picture.relative_to(self._root).as_posix()


def _compiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function as a graph where Keras runs on TensorFlow: half the time of eager calls on a CPU."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, autograph=False, reduce_retracing=True)  # type: ignore[no-any-return]
