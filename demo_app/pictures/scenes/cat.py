"""A cat on the window sill; behind it the first snow falls on the town."""

from __future__ import annotations

import random

from brush import Canvas, Point, flipped, mirrored, smooth


def cat() -> Canvas:
    """A cat on the window sill; behind it the first snow falls on the town."""
    c = Canvas("#7a4a58", "#8f5a5c", "#6e4350")
    for x in range(20, 640, 40):
        c.line([(x, 0), (x, 420)], 1.4, "#a8706a", alpha=0.35)
    _window(c)
    c.shape([(0, 392), (640, 392), (640, 432), (0, 432)], ("#f3dcc0", "#c99f80"))
    c.shape([(0, 430), (640, 430), (640, 480), (0, 480)], ("#5a3542", "#6d414c"))
    c.shape([(0, 426), (640, 426), (640, 440), (0, 440)], "#3f2534", alpha=0.5, blur=4)
    _flower_pot(c)
    _cat_figure(c)
    for side in (0, 640):
        folds: list[Point] = [
            (0, -20),
            (128, -20),
            (120, 120),
            (96, 240),
            (58, 300),
            (74, 372),
            (84, 486),
            (0, 486),
        ]
        curtain = smooth(folds, steps=8) if not side else flipped(smooth(folds, steps=8), 320)
        c.shape([(x + (10 if not side else -10), y + 6) for x, y in curtain], "#2a1830", alpha=0.35, blur=8)
        c.shape(curtain, ("#d9736b", "#b44c56", "#8c3a4c"))
        for x in (22, 48, 76, 102):
            fold: list[Point] = [
                (x, 0),
                (x * 0.95, 140),
                (x * 0.7, 250),
                (x * 0.52, 302),
                (x * 0.62, 390),
                (x * 0.7, 484),
            ]
            c.line(fold if not side else flipped(fold, 320), 3.4, "#7a2f42", alpha=0.35)
        tie: list[Point] = [(0, 296), (34, 304), (62, 298)]
        c.line(tie if not side else flipped(tie, 320), 11, "#f2c879")
    return c


def _window(c: Canvas) -> None:
    c.shape([(92, 20), (548, 20), (548, 396), (92, 396)], "#2a1830", alpha=0.5, blur=9)
    c.shape([(98, 14), (542, 14), (542, 396), (98, 396)], ("#fbeed8", "#e2c3a2"))
    c.shape([(114, 30), (526, 30), (526, 394), (114, 394)], ("#16244f", "#2f4a86", "#6d84b8", "#b9bcd6"))
    c.dots(31, 60, (116, 32, 524, 200), (0.5, 1.5), "#fff8e0")
    c.glow(424, 104, 84, "#fdf3cf", 0.75)
    c.oval(424, 104, 28, 28, ("#fffdf0", "#fbe9bd"))
    dice = random.Random(17)
    for low, fill, roof in (
        (300, ("#51689f", "#5f77ac"), "#c9d4ec"),
        (338, ("#34487f", "#40558c"), "#e9eefa"),
    ):
        x = 114.0
        while x < 522:
            wide, top = min(dice.uniform(38, 60), 526 - x), low - dice.uniform(0, 46)
            c.shape([(x, top), (x + wide, top), (x + wide, 394), (x, 394)], fill)
            c.shape([(x, top), (x + wide / 2, top - wide * 0.5), (x + wide, top)], roof)
            for row in range(3):
                for at in (0.28, 0.68):
                    if wide > 24 and dice.random() < 0.6:
                        wx, wy = x + wide * at, top + 14 + row * 22
                        c.glow(wx, wy, 11, "#ffd879", 0.55)
                        c.shape(
                            [(wx - 3.5, wy - 5), (wx + 3.5, wy - 5), (wx + 3.5, wy + 5), (wx - 3.5, wy + 5)],
                            "#ffe39a",
                        )
            x += wide
    c.blob([(114, 384), (200, 372), (320, 380), (440, 370), (526, 382), (526, 394), (114, 394)], "#f2f5fd")
    c.dots(33, 150, (118, 34, 522, 388), (0.8, 2.4), "#ffffff", blur=0.3)
    for x, y, wide, high in ((314, 28, 12, 368), (112, 176, 416, 10)):
        c.shape(
            [(x + 3, y + 3), (x + wide + 3, y + 3), (x + wide + 3, y + high), (x + 3, y + high)],
            "#14204a",
            alpha=0.3,
            blur=3,
        )
        c.shape([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)], ("#fbeed8", "#e2c3a2"))


def _flower_pot(c: Canvas) -> None:
    c.oval(462, 414, 46, 8, "#7a5140", alpha=0.55, blur=5)
    for tip_x, tip_y, bend in (
        (426, 322, 438),
        (448, 296, 450),
        (474, 300, 472),
        (496, 324, 486),
        (462, 282, 460),
    ):
        c.line([(460, 372), (bend, (372 + tip_y) / 2 + 8), (tip_x, tip_y)], 3, "#4f8a5c")
        for dx, dy in ((0, -8), (8, -2), (5, 7), (-5, 7), (-8, -2)):
            c.oval(tip_x + dx, tip_y + dy, 7, 7, ("#ffc4cf", "#ee7f98"))
        c.oval(tip_x, tip_y, 5, 5, "#ffdf85")
    for x, y, angle in ((434, 358, 35), (488, 358, -35), (446, 346, 60), (478, 344, -60)):
        c.oval(x, y, 20, 8, ("#7fbf7f", "#4a8a5c"), angle=angle)
    c.shape([(430, 372), (494, 372), (484, 412), (440, 412)], ("#6fb0b8", "#3f7f8e"))
    c.shape([(426, 364), (498, 364), (496, 378), (428, 378)], ("#85c4c8", "#5a9fa8"))


def _cat_figure(c: Canvas) -> None:
    coat, stripe, cream = ("#f0b070", "#cf8040"), "#a85c2c", ("#fff6e8", "#f3ddc6")
    c.oval(250, 416, 96, 10, "#7a5140", alpha=0.6, blur=6)
    c.line([(300, 402), (342, 412), (352, 440), (334, 462), (312, 456)], 21, "#cf8040")
    for (ax, ay), (bx, by) in (((338, 400), (332, 418)), ((361, 432), (341, 432)), ((342, 470), (332, 452))):
        c.line([(ax, ay), (bx, by)], 5, stripe, alpha=0.75)
    c.oval(313, 456, 11, 11, cream)
    c.blob(mirrored([(248, 250), (284, 274), (312, 330), (322, 384), (300, 414), (248, 418)], 248), coat)
    c.blob(mirrored([(248, 284), (272, 298), (276, 330), (264, 360), (248, 372)], 248), cream)
    for side in (-1, 1):
        for y, reach in ((320, 34), (346, 40), (372, 44)):
            c.line(
                [
                    (248 + side * (reach + 22), y - 4),
                    (248 + side * (reach + 10), y + 2),
                    (248 + side * reach, y),
                ],
                5,
                stripe,
                alpha=0.7,
            )
        c.oval(248 + side * 48, 408, 22, 10, ("#eeae6e", "#d48a4c"))
        x = 248 + side * 16
        c.blob([(x - 12, 350), (x + 12, 350), (x + 12, 408), (x, 417), (x - 12, 408)], ("#f0b272", "#dd9550"))
        c.oval(x, 409, 14, 9, cream)
    c.oval(248, 282, 46, 11, "#8a4a22", alpha=0.35, blur=6)
    ear: list[Point] = [(262, 190), (280, 160), (302, 136), (312, 172), (310, 216)]
    inner: list[Point] = [(276, 190), (288, 168), (301, 152), (306, 178), (302, 204)]
    for points, fill in ((ear, coat), (flipped(ear, 248), coat)):
        c.shape(smooth(points, steps=8), fill)
    for points in (inner, flipped(inner, 248)):
        c.blob(points, ("#f3a596", "#f6c3ae"))
    c.blob(
        mirrored([(248, 178), (288, 184), (318, 212), (326, 244), (306, 276), (248, 290)], 248),
        ("#f6bc80", "#e09a58"),
    )
    for x, top, low in ((248, 182, 206), (232, 185, 203), (264, 185, 203)):
        c.line([(x, top), (x + (x - 248) * 0.05, low)], 5.4, stripe, alpha=0.75)
    for side in (-1, 1):
        for y in (236, 250):
            c.line([(248 + side * 74, y - 2), (248 + side * 58, y + 1)], 4.4, stripe, alpha=0.7)
        c.oval(248 + side * 15, 264, 20, 16, cream)
        c.oval(248 + side * 50, 262, 13, 8, "#f08f80", alpha=0.5, blur=4)
        at = 248 + side * 34
        c.oval(at, 236, 13, 14, ("#7fae5a", "#cfe08a"))
        c.oval(at, 236, 7.5, 12, "#2b1d1a")
        c.oval(at + 4, 230, 3.6, 4, "#ffffff")
        c.oval(at - 4, 242, 1.8, 1.8, "#ffffff", alpha=0.7)
        for y, end in ((262, 256), (268, 270)):
            c.line(
                [(248 + side * 30, y), (248 + side * 60, (y + end) / 2 - 1), (248 + side * 92, end)],
                1.3,
                "#fff6e8",
                alpha=0.9,
            )
    c.blob(mirrored([(248, 250), (256, 250), (254, 256), (248, 260)], 248), "#e0707a")
    c.line([(236, 266), (242, 269), (248, 264), (254, 269), (260, 266)], 1.8, "#7a4528")
    c.blob(mirrored([(248, 288), (276, 284), (284, 292), (268, 300), (248, 302)], 248), ("#5a7fc0", "#3f5f9f"))
    c.oval(248, 305, 8, 8, ("#ffe69a", "#e0a83a"))
