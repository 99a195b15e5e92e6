"""A boat with a lantern sails home under the moon."""

from __future__ import annotations

import math
import random

from brush import Canvas, Point, mirrored, smooth

from scenes.props import cloud


def boat() -> Canvas:
    """A boat with a lantern sails home under the moon."""
    c = Canvas("#0d1740", "#1c2f68", "#3a5590", "#7d8fb8", "#c9b9bd")
    c.dots(3, 170, (0, 0, 640, 250), (0.5, 1.7), "#fffbe8")
    for x, y in ((92, 70), (232, 40), (590, 64), (318, 118), (40, 168), (560, 170)):
        c.glow(x, y, 11, "#fffbe8", 0.8)
        c.oval(x, y, 1.7, 1.7, "#ffffff")
    c.glow(462, 116, 190, "#fdf3cf", 0.75)
    c.oval(462, 116, 48, 48, ("#fffdf0", "#fbe9bd"))
    for x, y, r in ((448, 104, 10), (478, 126, 13), (455, 138, 6), (482, 98, 5)):
        c.oval(x, y, r, r * 0.9, "#f0d9a4", alpha=0.55, blur=1.5)
    cloud(c, 170, 176, 36, ("#8a97c6", "#5f70a8"), 1)
    cloud(c, 560, 214, 30, ("#9aa5cd", "#7585b5"), 1)
    c.blob(
        [(-40, 318), (-30, 280), (50, 248), (110, 268), (168, 292), (230, 310), (230, 330), (-40, 330)],
        ("#4a5d92", "#56689a"),
    )
    c.shape([(70, 258), (74, 212), (86, 212), (90, 260)], ("#f6efe6", "#cfc3cc"))
    c.shape([(72, 236), (88, 236), (88.6, 246), (71.4, 246)], "#c2564f")
    c.shape([(72, 212), (80, 200), (88, 212)], "#c2564f")
    c.shape([(80, 206), (300, 176), (300, 226)], "#ffe9a8", alpha=0.2, blur=8)
    c.glow(80, 207, 34, "#ffe9a0", 0.95)
    c.shape([(0, 306), (640, 306), (640, 480), (0, 480)], ("#6b83b5", "#2b4680", "#142657", "#0d1a42"))
    dice = random.Random(5)
    for i in range(46):  # the moon on the water
        y = 309 + (i / 46) ** 1.3 * 165
        half = (8 + (y - 306) * 0.33) * dice.uniform(0.5, 1)
        c.oval(
            462 + dice.uniform(-0.2, 0.2) * (y - 290),
            y,
            half,
            1.2 + (y - 306) * 0.011,
            "#fdf1cc",
            alpha=0.55,
            blur=0.7,
        )
    for _ in range(90):
        y = 312 + dice.random() ** 1.4 * 160
        c.oval(
            dice.uniform(0, 640),
            y,
            dice.uniform(8, 18) * (0.4 + (y - 300) / 120),
            0.9 + (y - 306) * 0.006,
            "#9fb5dc",
            alpha=0.28,
            blur=0.6,
        )
    _sailing_boat(c)
    for low, fill, phase in ((432, ("#2c4a86", "#16295c"), 0.0), (458, ("#1d3569", "#0b173d"), 37.0)):
        wave: list[Point] = [(x - phase, low + (-7 if k % 2 else 5)) for k, x in enumerate(range(-40, 760, 46))]
        c.shape([*smooth(wave, closed=False), (700, 500), (-60, 500)], fill, alpha=0.94)
        c.line(wave, 1.4, "#a8bde4", alpha=0.55)
    return c


def _sailing_boat(c: Canvas) -> None:
    c.blob([(170, 424), (400, 424), (370, 446), (296, 474), (210, 446)], "#0d1a40", alpha=0.5, blur=5)
    c.oval(214, 432, 40, 20, "#ffc978", alpha=0.35, blur=9)
    c.line([(283, 156), (284, 280), (285, 388)], 6, "#6d4630")
    main_sail = smooth([(292, 168), (338, 236), (380, 318), (392, 356), (344, 366), (292, 362), (297, 262)])
    c.shape(main_sail, ("#fff9ea", "#f3d9b4"))
    for y, right in ((228, 330), (276, 356), (322, 379)):
        c.line([(296, y), ((296 + right) / 2, y + 6), (right, y)], 1.2, "#c9a27c", alpha=0.6)
    c.blob(
        [(275, 184), (246, 262), (206, 340), (196, 358), (236, 366), (276, 356), (270, 270)],
        ("#e2736a", "#b9434d"),
    )
    star = [
        (math.sin(k * math.pi / 5) * r, -math.cos(k * math.pi / 5) * r) for k in range(10) for r in (17 - k % 2 * 10,)
    ]
    c.shape([(248 + x, 325 + y) for x, y in star], "#f9d98f")
    c.shape([(286, 156), (322, 148), (308, 158), (324, 170), (286, 168)], "#f2b84e")
    c.blob(
        [
            (162, 378),
            (190, 386),
            (290, 392),
            (390, 386),
            (424, 374),
            (404, 414),
            (372, 436),
            (212, 436),
            (182, 414),
        ],
        ("#a8663f", "#6a3a2c", "#4b2825"),
    )
    c.line([(166, 382), (220, 391), (290, 395), (366, 391), (420, 379)], 4.6, "#f2ddb6")
    for y, left, right in ((406, 182, 404), (420, 194, 392)):
        c.line([(left, y - 3), (290, y + 3), (right, y - 3)], 1.2, "#45231f", alpha=0.6)
    for x in (256, 294, 332):
        c.oval(x, 411, 8, 8, "#4b2825")
        c.oval(x, 411, 6, 6, ("#fff0b0", "#f7b85a"))
    c.line([(178, 380), (176, 352), (186, 342)], 3, "#5a382b")
    c.glow(190, 356, 62, "#ffd27a", 0.9)
    c.blob(mirrored([(190, 345), (197, 352), (196, 364), (190, 367)], 190), ("#fff7cf", "#ffbe55"))
    c.line([(184, 345), (190, 342), (196, 345)], 3, "#4b2825")
