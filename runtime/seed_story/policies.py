"""The names of what a cache may keep; `CacheConfig` in `config.py` says what they mean for its slots."""

from __future__ import annotations

WINDOW, TEXT_SINK, MULTIMODAL_SINK = POLICIES = ("window", "text-sink", "multimodal-sink")
"""What a cache keeps beside the newest tokens: nothing, the story's first tokens, or these and pictures' anchors."""

OLDEST, FIRST_AND_LAST, ATTENTION_MASS = PICTURE_EVICTIONS = ("oldest", "first-and-last", "attention-mass")
"""Whose anchors go when there is no room for more: the oldest picture's; the oldest's but never the first's; or those
that got the least attention lately."""
