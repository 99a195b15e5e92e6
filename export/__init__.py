"""From a story model to a bundle; `python -m export` is the command line."""
