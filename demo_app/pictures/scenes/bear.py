"""A bear on a meadow with more balloons than paws."""

from __future__ import annotations

import random

from brush import Canvas, mirrored

from scenes.props import cloud, eyes


def bear() -> Canvas:
    """A bear on a meadow with more balloons than paws."""
    c = Canvas("#6fb7e6", "#a5d8f2", "#d9f1f5", "#fdf4dc")
    c.glow(96, 76, 190, "#fff6c8", 0.9)
    c.oval(96, 76, 34, 34, ("#fff8cf", "#ffe38a"))
    cloud(c, 190, 150, 40, ("#ffffff", "#e6f0fa"))
    cloud(c, 566, 96, 44, ("#ffffff", "#e3eefa"))
    cloud(c, 40, 250, 26, ("#ffffff", "#eaf3fa"), 0.8)
    c.blob(
        [
            (-60, 330),
            (60, 280),
            (190, 318),
            (330, 272),
            (480, 312),
            (600, 268),
            (720, 320),
            (720, 520),
            (-60, 520),
        ],
        ("#b4dba0", "#93c98a"),
    )
    for x, y, r in ((70, 292, 24), (104, 300, 17), (548, 286, 22), (584, 278, 28), (622, 290, 20)):
        c.line([(x, y), (x, y + r * 1.3)], 4, "#84694c")
        c.oval(x, y - r * 0.3, r, r * 1.1, ("#7fbf83", "#579e6c"))
    c.blob(
        [(-60, 372), (120, 340), (320, 362), (500, 338), (700, 372), (700, 520), (-60, 520)],
        ("#a6d57c", "#77b860", "#5a9f52"),
    )
    dice = random.Random(12)
    for _ in range(240):
        x, y = dice.uniform(0, 640), dice.uniform(380, 478)
        c.line(
            [(x, y), (x + dice.uniform(-3, 3), y - dice.uniform(5, 11))],
            1.4,
            dice.choice(("#4f9a4e", "#8fcb69")),
            alpha=0.6,
        )
    c.oval(262, 447, 96, 12, "#35733f", alpha=0.55, blur=7)
    _balloons(c)
    _bear_figure(c)
    for _ in range(44):
        x, y = dice.uniform(0, 640), dice.uniform(385, 474)
        if not 170 < x < 352 or y > 460:
            petal, size = dice.choice(("#ffffff", "#ffe27a", "#f58fa8", "#c7a4ee")), (y - 330) / 34
            for dx, dy in ((0, -1), (0.95, -0.3), (0.6, 0.8), (-0.6, 0.8), (-0.95, -0.3)):
                c.oval(x + dx * size, y + dy * size, size * 0.75, size * 0.75, petal)
            c.oval(x, y, size * 0.6, size * 0.6, "#f7b733")
    return c


def _balloons(c: Canvas) -> None:
    colours = (
        ("#ff9c8f", "#e4574f"),
        ("#ffe08a", "#f2ae2e"),
        ("#9fdcf0", "#3f9fd0"),
        ("#c9b0f2", "#8a68cc"),
        ("#b2e5a3", "#5bb567"),
        ("#ffb7d3", "#ea6f9f"),
        ("#ffc48a", "#f0853a"),
    )
    places = ((352, 92), (418, 74), (478, 108), (366, 172), (414, 146), (454, 176), (506, 196))
    for (x, y), _ in zip(places, colours, strict=True):
        c.line([(x, y + 36), ((x + 360) / 2 - 6, y + 110), (352, 304)], 1.3, "#7b6a62", alpha=0.85)
    for (x, y), fill in zip(places, colours, strict=True):
        c.shape([(x - 5, y + 43), (x + 5, y + 43), (x, y + 34)], fill[1])
        c.blob(
            mirrored([(x, y - 38), (x + 24, y - 28), (x + 32, y - 4), (x + 22, y + 22), (x, y + 38)], x),
            fill,
            alpha=0.97,
        )
        c.oval(x - 12, y - 16, 6, 11, "#ffffff", angle=25, alpha=0.6, blur=1.6)
        c.oval(x + 8, y + 18, 12, 8, "#ffffff", angle=-30, alpha=0.14, blur=3)


def _bear_figure(c: Canvas) -> None:
    coat, dark, cream = ("#b57b4c", "#8d5833"), "#7a4a2c", ("#f6e2c2", "#e8c99c")
    for side in (-1, 1):
        c.blob(
            [
                (262 + side * 18, 390),
                (262 + side * 56, 392),
                (262 + side * 60, 438),
                (262 + side * 36, 450),
                (262 + side * 14, 440),
            ],
            coat,
        )
        c.oval(262 + side * 38, 441, 26, 11, ("#9a6239", "#7a4a2c"))
    c.blob(mirrored([(262, 268), (306, 286), (330, 340), (330, 396), (300, 428), (262, 434)], 262), coat)
    c.blob(mirrored([(262, 304), (290, 318), (302, 356), (294, 394), (262, 406)], 262), cream)
    c.blob([(200, 300), (180, 330), (164, 366), (172, 384), (192, 380), (212, 346), (220, 314)], coat)
    c.blob([(304, 296), (330, 304), (346, 292), (360, 288), (368, 304), (358, 322), (332, 338), (306, 332)], coat)
    c.oval(355, 303, 15, 14, ("#b57b4c", "#99643c"))
    c.oval(262, 294, 52, 12, "#6b3f24", alpha=0.35, blur=6)
    for side in (-1, 1):
        c.oval(262 + side * 52, 180, 24, 24, coat)
        c.oval(262 + side * 52, 182, 14, 14, ("#f3c9a4", "#dba478"))
    c.blob(
        mirrored([(262, 164), (306, 172), (336, 206), (342, 246), (318, 280), (262, 294)], 262),
        ("#c48a59", "#a06a40"),
    )
    c.oval(262, 256, 37, 28, cream)
    eyes(c, 262, 224, 34, 8.5)
    for side in (-1, 1):
        c.oval(262 + side * 56, 252, 14, 9, "#f2937c", alpha=0.55, blur=4)
    c.blob(mirrored([(262, 238), (273, 240), (271, 250), (262, 255)], 262), "#35221a")
    c.oval(258.5, 242, 3.6, 1.8, "#ffffff", alpha=0.6)
    c.line([(262, 255), (262, 263)], 2, dark)
    c.line([(247, 263), (254, 269), (262, 264), (270, 269), (277, 263)], 2.2, dark)
    for side in (-1, 1):
        c.blob(
            [(262, 298), (262 + side * 28, 286), (262 + side * 32, 300), (262 + side * 26, 312)],
            ("#e4574f", "#c23f45"),
        )
    c.oval(262, 298, 8, 8, ("#f0736a", "#c23f45"))
