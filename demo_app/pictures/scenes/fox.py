"""A fox sits in the snow at the edge of a wood; the sun goes down."""

from __future__ import annotations

import random

from brush import Canvas, Point, flipped, mirrored, smooth

from scenes.props import eyes, pine


def fox() -> Canvas:
    """A fox sits in the snow at the edge of a wood; the sun goes down."""
    c = Canvas("#4c5a94", "#8b86b8", "#f0b9a8", "#fbdcb4", "#fbe6cc")
    c.glow(478, 236, 210, "#fff1c4", 0.95)
    c.oval(478, 236, 30, 30, "#fff8e2", blur=1)
    c.blob(
        [
            (-40, 300),
            (60, 214),
            (150, 262),
            (250, 190),
            (360, 268),
            (470, 226),
            (590, 272),
            (690, 230),
            (700, 420),
            (-40, 420),
        ],
        ("#9a93bd", "#cbb4c6"),
    )
    dice = random.Random(4)
    for i in range(26):
        pine(
            c,
            i * 27 - 20 + dice.uniform(-8, 8),
            318 + dice.uniform(-6, 8),
            dice.uniform(62, 112),
            ("#8583ab", "#a99cba"),
        )
    c.shape([(0, 290), (640, 290), (640, 350), (0, 350)], "#f3d4c8", alpha=0.55, blur=14)
    c.blob(
        [(-60, 330), (120, 304), (330, 322), (520, 300), (700, 326), (700, 520), (-60, 520)],
        ("#f2e3ea", "#c9cfec"),
    )
    for x, foot, height in ((52, 366, 216), (588, 372, 236), (132, 344, 140), (505, 340, 122), (8, 392, 250)):
        c.oval(x - 34, foot + 2, height * 0.26, 8, "#8f97c8", alpha=0.5, blur=5)
        pine(c, x, foot, height, ("#2f4a5e", "#24394f"), "#eef0fb")
    c.blob(
        [(-60, 392), (140, 362), (320, 384), (500, 366), (700, 394), (700, 540), (-60, 540)],
        ("#fbf6f8", "#dfe3f6", "#b9c3ea"),
    )
    for i, (x, y) in enumerate(((560, 458), (524, 447), (490, 441), (456, 432), (424, 428))):
        c.oval(x, y, 9 - i * 0.5, 3.6, "#a9b3de", angle=-8, alpha=0.85, blur=0.8)
    c.oval(282, 428, 124, 15, "#7f8ac4", alpha=0.62, blur=8)
    _fox_figure(c)
    c.dots(7, 130, (0, 0, 640, 480), (0.9, 2.6), "#ffffff", blur=0.3)
    c.dots(9, 16, (0, 0, 640, 480), (3, 5), "#ffffff", blur=1.6)
    return c


def _fox_figure(c: Canvas) -> None:
    coat, sock, cream = ("#f39a4a", "#dd6a2c"), ("#5b3430", "#3b2226"), ("#fffaf2", "#f3e3da")
    c.blob(
        [
            (336, 416),
            (392, 428),
            (442, 408),
            (466, 362),
            (458, 308),
            (434, 282),
            (424, 318),
            (408, 352),
            (366, 372),
        ],
        ("#f4a253", "#cf5a28"),
    )
    c.blob(
        [(434, 278), (458, 304), (466, 342), (452, 334), (443, 345), (432, 330), (418, 336), (426, 308)],
        cream,
    )
    c.blob(mirrored([(300, 268), (338, 288), (362, 346), (370, 398), (346, 424), (300, 428)], 300), coat)
    for side in (-1, 1):
        c.oval(300 + side * 46, 396, 27, 31, ("#ee8d40", "#d8632a"), angle=side * -14)
        c.oval(300 + side * 54, 423, 20, 8, sock)
    c.blob(mirrored([(300, 284), (326, 300), (330, 332), (317, 352), (309, 366), (300, 378)], 300), cream)
    for side in (-1, 1):
        x = 300 + side * 15
        c.blob([(x - 12, 350), (x + 12, 350), (x + 11, 420), (x - 11, 420)], ("#f09545", "#d8652b"))
        c.blob([(x - 11, 384), (x, 378), (x + 11, 384), (x + 12, 422), (x, 427), (x - 12, 422)], sock)
    c.oval(300, 300, 54, 12, "#a8481f", alpha=0.35, blur=6)
    for ear in ([(314, 208), (336, 160), (360, 128), (370, 168), (364, 226)],):
        for points in (ear, flipped(ear, 300)):
            c.shape(smooth(points, steps=8), coat)
    inner: list[Point] = [(328, 208), (342, 172), (357, 147), (362, 178), (357, 214)]
    tip: list[Point] = [(344, 150), (360, 127), (367, 152), (357, 148)]
    for points in (inner, flipped(inner, 300)):
        c.blob(points, ("#5b3430", "#f6c9a4"))
    for points in (tip, flipped(tip, 300)):
        c.blob(points, sock)
    c.blob(
        mirrored(
            [(300, 190), (338, 198), (364, 228), (392, 266), (366, 277), (340, 292), (316, 304), (300, 307)],
            300,
        ),
        ("#f7a857", "#e57a33"),
    )
    cheek: list[Point] = [
        (303, 262),
        (324, 258),
        (344, 250),
        (370, 262),
        (391, 267),
        (366, 277),
        (340, 292),
        (316, 304),
        (300, 307),
    ]
    for points in (cheek, flipped(cheek, 300)):
        c.blob(points, cream)
    c.blob(mirrored([(300, 236), (308, 252), (322, 268), (318, 290), (300, 304)], 300), cream)
    c.blob(
        mirrored([(300, 196), (310, 216), (309, 244), (300, 262)], 300),
        ("#f9b568", "#ef9447"),
        alpha=0.9,
        blur=2,
    )
    eyes(c, 300, 248, 33, 9.5)
    for side in (-1, 1):
        c.oval(300 + side * 50, 272, 13, 7, "#f59a86", alpha=0.5, blur=4)
    c.blob(mirrored([(300, 272), (309, 273), (308, 280), (300, 285)], 300), "#2b1d1a")
    c.oval(297, 275.5, 3, 1.5, "#ffffff", alpha=0.6)
    c.line([(289, 292), (295, 294), (300, 289), (305, 294), (311, 292)], 1.7, "#6b4038")
    c.blob(mirrored([(300, 300), (330, 306), (352, 316), (336, 330), (300, 336)], 300), ("#4f8fa8", "#35708c"))
    for x in (262, 281, 300, 319, 338):
        c.line([(x - 5, 309), (x - 2, 320), (x - 4, 331)], 2.4, "#f6ead2", alpha=0.8)
    c.blob([(322, 322), (346, 324), (352, 374), (342, 384), (326, 380)], ("#4588a3", "#2f6681"))
    for y in (340, 356):
        c.line([(326, y), (338, y + 2), (349, y)], 2.4, "#f6ead2", alpha=0.8)
    for x in (329, 335, 341, 347):
        c.line([(x, 378), (x + 1, 388)], 2, "#2f6681")
