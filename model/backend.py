"""What must be said before TensorFlow is imported for the first time."""

from __future__ import annotations

import os


def use_tensorflow(*, accelerator: bool = False) -> None:
    """Keras runs on TensorFlow, which keeps quiet; what the environment says already stays.

    Args:
        accelerator: whether TensorFlow may look for one.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if not accelerator:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
