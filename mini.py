"""Mini streams and the tiny LLaVA: everything that lets the scripts run with nothing downloaded.

    python mini.py --sheet                    draw every picture kind into assets/contact_sheet.png
    python mini.py --stream vqacl --data DIR  draw one mini stream (the scripts do it themselves)
    python mini.py --pretrain                 pre-train assets/tiny-llava from nothing

Why it exists. Continual learning of a 7B model takes days and 125 GB of pictures; a reader needs an
answer in minutes. So this file draws small pictures (64 x 64 pixels, 8 x 8 patches) with known
content, asks questions about them, and writes both in EXACTLY the file formats of the released
benchmarks. data.py cannot tell a mini stream from a real one.

One drawing vocabulary serves every stream. A picture is a Canvas: pixels, plus three labels per
patch (what, color, state) that only pre-training uses. Picture kinds:

    scene    objects of 15 COCO classes or plain shapes, weather behind them, each doing something
    sign     words and numbers on boards      sum     a rendered arithmetic problem
    bars     bar charts                       candles candlestick charts
    slide    stained cells under a microscope aerial  land seen from above
    road     the driver's view                diagram lettered nodes joined by arrows
    window   a user interface with buttons

Everything is deterministic in its seed.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VERSION = 14  # bump it when any drawing changes: data.py then redraws its mini streams
SIDE, PATCH = 64, 8  # picture side and patch side, pixels
GRID = SIDE // PATCH  # 8 x 8 patches, one image token each
ROOT = Path(__file__).resolve().parent
TINY = ROOT / "assets" / "tiny-llava"

# ---------------------------------------------------------------------------------------------
# 1. Vocabulary: what can be drawn, and the words for it
# ---------------------------------------------------------------------------------------------

COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 30),
    "yellow": (245, 208, 40),
    "green": (46, 160, 67),
    "cyan": (40, 190, 200),
    "blue": (45, 90, 220),
    "purple": (135, 70, 180),
    "pink": (245, 130, 180),
}
# name: (COCO category id, type, what it is for). The ids make VQACL's object groups work on mini
# pictures; under the paper's reading each of the five groups holds three of these classes.
OBJECTS = {
    "car": (3, "vehicle", "drive"),
    "cat": (17, "animal", "pet"),
    "cake": (61, "food", "eat"),
    "cup": (47, "dish", "drink"),
    "apple": (53, "food", "eat"),
    "ball": (37, "toy", "play"),
    "boat": (9, "vehicle", "sail"),
    "bird": (16, "animal", "pet"),
    "bus": (6, "vehicle", "drive"),
    "glass": (46, "dish", "drink"),
    "knife": (49, "dish", "cut"),
    "couch": (63, "furniture", "sit"),
    "kite": (38, "toy", "play"),
    "banana": (52, "food", "eat"),
    "chair": (62, "furniture", "sit"),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
ACTIONS = ("resting", "moving", "falling", "sleeping")
WEATHER = ("clear", "rain", "snow", "night", "fog")
# What the tiny LLaVA's language model is taught about. Seven things, one action and two kinds of
# weather it has seen (its tower has) and never heard of: the streams have to teach it these.
FAMILIAR = ("car", "cat", "cake", "cup", "apple", "ball", "bird", "couch")
FAMILIAR_ACTIONS, FAMILIAR_WEATHER = ACTIONS[:3], WEATHER[:3]
PLACES = ("top left", "top right", "bottom left", "bottom right")
LANDS = ("water", "forest", "field", "town", "sand")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
WORDS = (  # what signs and buttons say
    "stop exit open sale cafe bank park hotel taxi pizza milk shop "
    "save copy quit help send play edit back next done"
).split()

# What a patch can show (labels of the tower's pre-training). Order is part of the recipe.
WHAT = (
    list(OBJECTS)
    + list(SHAPES)
    + [f"glyph {c}" for c in LETTERS + DIGITS + "+-="]
    + [f"weather {w}" for w in WEATHER]
    + [f"land {x}" for x in LANDS]
    + "board bar axis candle wick nucleus tissue asphalt lane sky grass light walker".split()
    + "vehicle node arrow paper frame title button desktop".split()
)
STATES = 10  # action, size, height, direction or order, by what the patch shows

# ---------------------------------------------------------------------------------------------
# 2. Sprites: each thing is drawn once, large, and kept as two 16 x 16 masks (body, ink)
# ---------------------------------------------------------------------------------------------


def _draw_object(name: str, body: ImageDraw.ImageDraw, ink: ImageDraw.ImageDraw) -> None:
    """Draw one thing on a 64 x 64 sheet: `body` takes the color, `ink` is dark detail."""
    b, i = body, ink
    if name == "car":
        b.rounded_rectangle((2, 28, 62, 48), 8, 255)
        b.polygon([(14, 30), (22, 12), (44, 12), (54, 30)], 255)
        i.polygon([(20, 28), (25, 17), (32, 17), (32, 28)], 160)
        i.polygon([(36, 28), (36, 17), (42, 17), (47, 28)], 160)
        i.ellipse((9, 40, 25, 56), 255), i.ellipse((39, 40, 55, 56), 255)
    elif name == "bus":
        b.rounded_rectangle((3, 8, 61, 50), 6, 255)
        for x in (8, 22, 36, 50):
            i.rectangle((x, 15, x + 9, 28), 160)
        i.ellipse((10, 42, 24, 57), 255), i.ellipse((40, 42, 54, 57), 255)
    elif name == "boat":
        b.polygon([(2, 40), (62, 40), (50, 58), (14, 58)], 255)
        b.polygon([(34, 4), (34, 36), (58, 36)], 255), b.polygon([(28, 12), (28, 36), (8, 36)], 255)
        i.rectangle((29, 2, 33, 41), 255)
    elif name == "cat":
        b.ellipse((10, 18, 54, 60), 255)
        b.polygon([(10, 34), (12, 4), (30, 20)], 255), b.polygon([(54, 34), (52, 4), (34, 20)], 255)
        i.ellipse((20, 32, 27, 41), 255), i.ellipse((37, 32, 44, 41), 255)
        i.polygon([(28, 45), (36, 45), (32, 50)], 255)
        for y in (46, 52):
            i.line((4, y, 20, 48), 200, 2), i.line((60, y, 44, 48), 200, 2)
    elif name == "bird":
        b.ellipse((10, 24, 48, 52), 255), b.ellipse((34, 8, 56, 32), 255)
        b.polygon([(2, 22), (22, 34), (12, 42)], 255)
        i.polygon([(54, 16), (63, 21), (54, 25)], 255), i.ellipse((43, 15, 49, 21), 255)
        i.arc((16, 24, 40, 46), 10, 170, 200, 4)
        i.line((26, 50, 26, 61), 255, 3), i.line((35, 50, 35, 61), 255, 3)
    elif name == "cake":
        b.rectangle((6, 30, 58, 58), 255)
        i.rectangle((6, 42, 58, 46), 150)
        for x in (16, 30, 44):
            i.rectangle((x, 14, x + 4, 29), 200), i.ellipse((x - 1, 4, x + 5, 13), 255)
    elif name == "apple":
        b.ellipse((6, 16, 38, 60), 255), b.ellipse((26, 16, 58, 60), 255)
        i.line((32, 22, 36, 4), 255, 5), i.ellipse((36, 4, 54, 14), 140)
    elif name == "banana":
        b.chord((-6, -34, 62, 58), 0, 180, 255)
        b.ellipse((0, -36, 58, 36), 0)
        i.ellipse((54, 6, 63, 17), 255), i.ellipse((0, 16, 8, 25), 255)
    elif name == "cup":
        b.polygon([(6, 16), (44, 16), (40, 58), (11, 58)], 255)
        b.ellipse((36, 22, 62, 48), 255), b.ellipse((43, 29, 55, 41), 0)
        i.rectangle((6, 14, 44, 19), 200)
    elif name == "glass":
        b.pieslice((12, -16, 52, 36), 0, 180, 255), b.rectangle((29, 34, 35, 54), 255)
        b.rectangle((16, 53, 48, 59), 255)
        i.arc((12, -16, 52, 36), 0, 180, 200, 3)
    elif name == "knife":
        b.polygon([(4, 8), (14, 2), (44, 32), (32, 44)], 255)
        i.polygon([(32, 44), (44, 32), (62, 52), (52, 62)], 255)
    elif name == "couch":
        b.rounded_rectangle((8, 14, 56, 40), 6, 255), b.rounded_rectangle((2, 28, 62, 52), 8, 255)
        i.line((32, 16, 32, 38), 180, 3), i.line((12, 38, 52, 38), 200, 3)
        i.rectangle((8, 52, 14, 60), 255), i.rectangle((50, 52, 56, 60), 255)
    elif name == "chair":
        b.rectangle((14, 2, 22, 60), 255), b.rectangle((14, 32, 52, 41), 255)
        b.rectangle((44, 40, 52, 60), 255)
        i.rectangle((22, 8, 26, 28), 200)
    elif name == "ball":
        b.ellipse((4, 4, 60, 60), 255)
        i.arc((-28, 4, 28, 60), -70, 70, 230, 4), i.arc((36, 4, 92, 60), 110, 250, 230, 4)
    elif name == "kite":
        b.polygon([(32, 0), (56, 24), (32, 50), (8, 24)], 255)
        i.line((32, 0, 32, 50), 220, 3), i.line((8, 24, 56, 24), 220, 3)
        i.line((32, 50, 40, 57, 34, 63), 255, 3)
    elif name == "circle":
        b.ellipse((6, 6, 58, 58), 255)
    elif name == "square":
        b.rectangle((8, 8, 56, 56), 255)
    elif name == "triangle":
        b.polygon([(32, 4), (60, 56), (4, 56)], 255)
    elif name == "star":
        turn = [k * math.pi / 5 for k in range(10)]
        far = [30 * (1, 0.42)[k % 2] for k in range(10)]
        tip = [(32 + r * math.sin(t), 34 - r * math.cos(t)) for r, t in zip(far, turn, strict=True)]
        b.polygon(tip, 255)
    elif name == "cross":
        b.rectangle((23, 4, 41, 60), 255), b.rectangle((4, 23, 60, 41), 255)
    elif name == "heart":
        b.ellipse((4, 8, 34, 38), 255), b.ellipse((30, 8, 60, 38), 255)
        b.polygon([(6, 30), (58, 30), (32, 60)], 255)
    else:
        raise KeyError(name)


def _mask(draw, size: int) -> np.ndarray:
    """Render draw(body, ink) on 64 x 64 sheets and shrink to [2, size, size] in 0..1."""
    sheets = [Image.new("L", (64, 64), 0) for _ in range(2)]
    draw(*(ImageDraw.Draw(s) for s in sheets))
    small = [np.asarray(s.resize((size, size), Image.Resampling.BOX)) for s in sheets]
    return np.stack(small).astype(np.float32) / 255


@cache
def sprite(name: str, size: int = 13) -> np.ndarray:
    """Masks [2, size, size] (body, ink) of an object or a shape."""
    return _mask(lambda body, ink: _draw_object(name, body, ink), size)


@cache
def glyph(char: str) -> np.ndarray:
    """Mask [8, 8] of one character, one patch large."""
    sheet = Image.new("L", (64, 64), 0)
    font = ImageFont.load_default(66)
    ImageDraw.Draw(sheet).text((32, 33), char, 255, font=font, anchor="mm", stroke_width=2)
    return np.asarray(sheet.resize((8, 8), Image.Resampling.BOX)).astype(np.float32) / 255


@cache
def action_mark(action: str) -> np.ndarray:
    """Mask [16, 16] of the comic-strip lines that show what an object does."""
    mark = np.zeros((16, 16), np.float32)
    if action == "moving":  # speed lines behind it
        mark[[5, 9, 13], 0:3] = 1
    elif action == "falling":  # lines above it
        mark[0:3, [5, 9, 13]] = 1
    elif action == "sleeping":  # a z at its corner
        mark[0, 0:4] = mark[3, 0:4] = 1
        mark[1, 2] = mark[2, 1] = 1
    return mark


class Canvas:
    """Pixels [64, 64, 3] and labels [3, 8, 8] (what, color + 1, state) of one picture."""

    def __init__(self, color, what: str):
        self.pixels = np.empty((SIDE, SIDE, 3), np.float32)
        self.pixels[:] = color
        self.labels = np.zeros((3, GRID, GRID), np.int64)
        self.labels[0] = WHAT.index(what)

    def label(self, y0, x0, y1, x1, what: str, color: str | None = None, state: int = 0) -> None:
        """Label the patches covered by at least half of the pixel box [y0, y1) x [x0, x1)."""
        rows, cols = (slice(round(a / PATCH), max(round(b / PATCH), round(a / PATCH) + 1))
                      for a, b in ((y0, y1), (x0, x1)))  # fmt: skip
        value = (WHAT.index(what), 0 if color is None else 1 + list(COLORS).index(color), state)
        for k in range(3):
            self.labels[k, rows, cols] = value[k]

    def stamp(self, mask: np.ndarray, y: int, x: int, color) -> None:
        """Blend `color` where mask [h, w] says, from pixel (y, x) on, cut at the picture's edge."""
        y0, x0 = max(y, 0), max(x, 0)
        y1, x1 = min(y + mask.shape[0], SIDE), min(x + mask.shape[1], SIDE)
        m = mask[y0 - y : y1 - y, x0 - x : x1 - x, None]
        view = self.pixels[y0:y1, x0:x1]
        view += m * (np.asarray(color, np.float32) - view)

    def box(self, y0, x0, y1, x1, color) -> None:
        self.pixels[max(y0, 0) : y1, max(x0, 0) : x1] = color

    def thing(self, name: str, y: int, x: int, color: str, size: int = 13, state: int = 0) -> None:
        """An object or a shape with its top left corner at (y, x), labelled."""
        body, ink = sprite(name, size)
        self.stamp(body, y, x, COLORS[color])
        self.stamp(ink * 0.9, y, x, (25, 25, 35))
        self.label(y, x, y + size, x + size, name, color, state)

    def text(self, string: str, row: int, column: int, ink=(20, 20, 30), color=None) -> None:
        """Characters from patch (row, column) on, one patch each; the state of a patch says which.

        color: the name of the color they are written on, if it matters.
        """
        for k, char in enumerate(string):
            y, x = row * PATCH, (column + k) * PATCH
            self.stamp(glyph(char), y, x, ink)
            if f"glyph {char}" in WHAT:
                self.label(y, x, y + 8, x + 8, f"glyph {char}", color, 1 + k)

    def image(self) -> np.ndarray:
        return np.clip(self.pixels + 0.5, 0, 255).astype(np.uint8)


@dataclass
class Picture:
    """A drawn picture, what the tower must see in it, and questions whose answers are known."""

    kind: str
    image: np.ndarray  # [64, 64, 3] uint8
    labels: np.ndarray  # [3, 8, 8]
    things: list = field(default_factory=list)  # scenes: the Things drawn
    questions: list[tuple[str, str, str]] = field(default_factory=list)  # (kind, question, answer)
    category: int = 0  # COCO id of the main object (scenes)


# ---------------------------------------------------------------------------------------------
# 3. Scenes: objects x colors x actions x weather, and the ten question types of VQA v2
# ---------------------------------------------------------------------------------------------

VQA_TYPES = (  # VQACL's order
    "recognition location judge commonsense count action color type subcategory causal".split()
)
BACKGROUND = {
    "clear": (236, 232, 220),
    "rain": (150, 165, 185),
    "snow": (222, 232, 242),
    "night": (38, 40, 62),
    "fog": (190, 190, 188),
}


def _weather(rng, weather: str) -> Canvas:
    canvas = Canvas(BACKGROUND[weather], f"weather {weather}")
    p = canvas.pixels
    if weather == "rain":
        for _ in range(34):
            y, x = rng.integers(0, 60), rng.integers(1, 64)
            for k in range(4):
                p[y + k, x - k // 2] = (90, 115, 165)
    elif weather == "snow":
        for _ in range(42):
            y, x = rng.integers(0, 63, 2)
            p[y : y + 2, x : x + 2] = (255, 255, 255)
            p[y + 1, x + 1] = (188, 204, 224)
    elif weather == "night":
        for _ in range(16):
            p[tuple(rng.integers(0, 64, 2))] = (250, 245, 190)
    elif weather == "fog":
        for y in range(3, 64, 8):
            p[y : y + 3] = (208, 208, 206)
    return canvas


@dataclass
class Thing:
    name: str
    color: str
    action: str
    cell: int  # 0..15 on the 4 x 4 grid

    @property
    def place(self) -> str:
        return PLACES[2 * (self.cell // 8) + (self.cell % 4) // 2]


def scene(
    rng, names=tuple(OBJECTS), everything: bool = False, n: int = 0, actions=ACTIONS, sky=WEATHER
) -> Picture:
    """n (0: 2 to 4) things, one per quadrant, of different colors; names may repeat, to be counted.

    Questions are about the first thing, whose class is the picture's category; or about everything.
    """
    n = n or int(rng.integers(2, 5))
    weather = _pick(rng, sky)
    colors = rng.permutation(list(COLORS))[:n]
    quadrants = rng.permutation(4)[:n]
    first = _pick(rng, names)
    things = []
    for k in range(n):
        repeat = k == 0 or rng.random() < 0.4
        name = first if repeat else names[rng.integers(len(names))]
        dy, dx = rng.integers(0, 2, 2)
        cell = (2 * (quadrants[k] // 2) + dy) * 4 + 2 * (quadrants[k] % 2) + dx
        action = _pick(rng, actions)
        things.append(Thing(name, str(colors[k]), action, int(cell)))
    canvas = _weather(rng, weather)
    for t in things:
        y, x = 16 * (t.cell // 4), 16 * (t.cell % 4)
        jy, jx = rng.integers(0, 2, 2)
        canvas.stamp(
            action_mark(t.action), y, x, (245, 245, 250) if weather == "night" else (40, 40, 50)
        )
        canvas.thing(t.name, y + 3 - jy, x + 3 - jx, t.color, state=ACTIONS.index(t.action))
        canvas.label(y, x, y + 16, x + 16, t.name, t.color, ACTIONS.index(t.action))
    kind = "scene" if names[0] in OBJECTS else "shapes"
    picture = Picture(kind, canvas.image(), canvas.labels, things)
    if kind == "scene":
        picture.category = OBJECTS[first][0]
    picture.questions = scene_questions(rng, things, 0, weather, names)
    for k in range(1, n if everything else 1):
        more = scene_questions(rng, things, k, weather, names)
        once = ("caption", "causal", "weather", "option-read")
        picture.questions += [q for q in more if q[0] not in once]
    return picture


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


PLURALS = {"glass": "glasses", "knife": "knives", "couch": "couches", "bus": "buses"}
PLURALS |= {"cross": "crosses"}


def scene_questions(rng, things, k: int, weather: str, names) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of every kind that the scene allows about thing number k.

    names: what could have been in the scene; wrong options are taken from it.
    """

    def one(*options):
        return _pick(rng, options)

    t, n = things[k], len(things)
    same = sum(u.name == t.name for u in things)
    here, colored = f"the object at the {t.place}", f"the {t.color} object"
    named = f"the {t.name}" if same == 1 else here  # names may repeat, colors and places do not
    q = {}
    q["recognition"] = one(f"what is {colored}?", f"what do you see at the {t.place}?"), t.name
    q["location"] = f"where is {one(f'the {t.name}' if same == 1 else colored, colored)}?", t.place
    q["color"] = f"what color is {one(named, here)}?", t.color
    many = PLURALS.get(t.name, t.name + "s")
    q["count"] = one(
        (f"how many {many} are there?", str(same)), ("how many objects are there?", str(n))
    )
    # judge asks about presence, color, place and number, half of the time truly
    true = rng.random() < 0.5
    name = t.name if true else one(*(x for x in names if x not in {u.name for u in things}))
    color = t.color if true else one(*(c for c in COLORS if c != t.color))
    place = t.place if true else one(*(p for p in PLACES if p != t.place))
    number = n if true else one(*(m for m in (2, 3, 4) if m != n))
    judge = one(
        f"is there a {name}?",
        f"is {here} {color}?",
        f"is {colored} at the {place}?",
        f"are there {number} objects?",
    )
    q["judge"] = judge, "yes" if true else "no"
    q["action"] = f"what is {one(named, colored)} doing?", t.action
    if t.name in OBJECTS:
        _, kind, purpose = OBJECTS[t.name]
        q["type"] = f"what type of thing is {one(colored, here)}?", kind
        q["commonsense"] = f"what can you do with {one(colored, here)}?", purpose
        if sum(OBJECTS[u.name][1] == kind for u in things) == same:
            ask = one(f"which {kind} is this?", f"what kind of {kind} is in the picture?")
            q["subcategory"] = ask, t.name
        q["weather"] = one("what is the weather?", "how is the weather?"), weather
        if weather != "clear":
            q["causal"] = one("why is nobody outside?", "why is the street empty?"), weather
    reading = sorted(things, key=lambda u: PLACES.index(u.place))
    q["caption"] = (
        "describe the picture.",
        ", ".join(f"{u.color} {u.name} {u.action} {u.place}" for u in reading),
    )
    y, x = divmod(t.cell, 4)
    corners = ", ".join(f"{v / 4:.2f}" for v in (x, y, x + 1, y + 1))
    q["box"] = f"give the box of {one(named, colored)}.", f"[{corners}]"
    options = [t.name, *_pick_some(rng, [x for x in names if x != t.name], 2)]
    options = _pick_some(rng, options, 3)
    q["option"] = f"what is {one(colored, here)}? {_listed(options)}", _letter(options, t.name)
    q["option-read"] = read_option(rng)
    return [(kind, *qa) for kind, qa in q.items()]


def _pick_some(rng, options, n: int) -> list:
    options = list(options)
    return [options[k] for k in rng.permutation(len(options))[:n]]


def _listed(options) -> str:
    return " ".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=False))


def _letter(options, answer) -> str:
    return LETTERS[options.index(answer)]


def read_option(rng) -> tuple[str, str]:
    """Find a word or its letter in a list: how multiple choice works, without a picture.

    It also makes the model say every word that any stage will ask for, with no hint at when.
    """
    uses = {u: 0 for _, kind, use in OBJECTS.values() for u in (kind, use)}
    words = (*OBJECTS, *SHAPES, *COLORS, *ACTIONS, *WEATHER, *LANDS, *uses, *WORDS)
    options = _pick_some(rng, dict.fromkeys(words), int(rng.integers(2, 5)))
    k = int(rng.integers(len(options)))
    if rng.random() < 0.5:
        return f"which letter is {options[k]}? {_listed(options)}", LETTERS[k]
    return f"what is option {LETTERS[k]}? {_listed(options)}", options[k]


# ---------------------------------------------------------------------------------------------
# 4. The other picture kinds (documents, charts, slides, maps, roads, diagrams, windows)
# ---------------------------------------------------------------------------------------------


def _joined(colors, lines) -> str:
    return ", ".join(f"{c} {x}" for c, x in zip(colors, lines, strict=True))


def sign(rng) -> Picture:
    """One to three boards, each with a word or a number, in one color each."""
    canvas = Canvas((205, 200, 190), "paper")
    n = int(rng.integers(1, 4))
    rows = sorted(_pick_some(rng, (0, 2, 4, 6), n))
    colors = _pick_some(rng, COLORS, n)
    lines = [_pick(rng, WORDS) if rng.random() < 0.6 else str(rng.integers(21, 100)) for _ in rows]
    for row, color, line in zip(rows, colors, lines, strict=True):
        y, width = row * 8, len(line) * 8
        x = int(rng.integers(0, GRID - len(line) + 1)) * 8
        canvas.box(y, max(x - 2, 0), y + 13, min(x + width + 2, SIDE), COLORS[color])
        canvas.label(y, x, y + 16, x + width, "board", color)
        canvas.text(line.upper(), row, x // 8, color=color)
    k = int(rng.integers(n))
    what = "the number" if lines[k].isdigit() else "the word"
    q = [
        ("read", f"what is written on the {colors[k]} sign?", lines[k]),
        ("sign-color", f"what color is the sign with {what} {lines[k]}?", colors[k]),
        ("sign-count", "how many signs are there?", str(n)),
        ("read-all", "read every sign.", _joined(colors, lines)),
    ]
    return Picture("sign", canvas.image(), canvas.labels, questions=q)


def arithmetic(rng) -> Picture:
    """a + b or a - b on paper, one digit each."""
    canvas = Canvas((246, 244, 236), "paper")
    for y in range(6, SIDE, 8):
        canvas.pixels[y] = (205, 215, 232)
    a, b, plus = int(rng.integers(0, 10)), int(rng.integers(0, 10)), rng.random() < 0.5
    if not plus and b > a:
        a, b = b, a
    row, col = int(rng.integers(0, 8)), int(rng.integers(0, 5))
    canvas.text(f"{a}{'+' if plus else '-'}{b}=", row, col, (30, 40, 120))
    q = [
        (
            "sum",
            _pick(rng, ("what is the result?", "solve the problem.")),
            str(a + b if plus else a - b),
        ),
        ("sum-first", "what is the first number?", str(a)),
        ("sum-second", "what is the second number?", str(b)),
    ]
    return Picture("sum", canvas.image(), canvas.labels, questions=q)


def bars(rng) -> Picture:
    """A bar chart: 3 or 4 bars, all of different color and height (1 to 6 units)."""
    canvas = Canvas((250, 250, 250), "paper")
    n = int(rng.integers(3, 5))
    colors = _pick_some(rng, COLORS, n)
    heights = [1 + h for h in _pick_some(rng, range(6), n)]
    for u in range(1, 7):
        canvas.pixels[56 - 8 * u] = (215, 215, 220)
    for k in range(n):
        x = 8 + 14 * k
        canvas.box(56 - 8 * heights[k], x, 56, x + 10, COLORS[colors[k]])
        canvas.label(56 - 8 * heights[k], x, 56, x + 8, "bar", colors[k], heights[k])
    canvas.box(56, 4, 58, 62, (40, 40, 50)), canvas.box(4, 4, 58, 6, (40, 40, 50))
    canvas.label(56, 0, 64, 64, "axis")
    top, low, k = int(np.argmax(heights)), int(np.argmin(heights)), int(rng.integers(n))
    options = _pick_some(rng, colors, 3)
    best = max(options, key=lambda c: heights[colors.index(c)])
    q = [
        (
            "bar-extreme",
            *_pick(
                rng,
                (
                    ("which bar is the tallest?", colors[top]),
                    ("which bar is the shortest?", colors[low]),
                ),
            ),
        ),
        ("bar-value", f"what is the value of the {colors[k]} bar?", str(heights[k])),
        ("bar-count", "how many bars are there?", str(n)),
        ("bar-option", f"which bar is taller? {_listed(options)}", _letter(options, best)),
    ]
    return Picture("bars", canvas.image(), canvas.labels, questions=q)


def candles(rng) -> Picture:
    """A candlestick chart of 7 days; green closes higher, red closes lower."""
    canvas = Canvas((24, 28, 36), "paper")
    for y in range(8, SIDE, 16):
        canvas.pixels[y] = (46, 52, 62)
    trend = _pick(rng, ("up", "down", "flat"))
    slope = {"up": -5.0, "down": 5.0, "flat": 0.0}[trend]
    up = rng.random(7) < {"up": 0.65, "down": 0.35, "flat": 0.5}[trend]
    for k in range(7):
        middle = 32 + slope * (k - 3) + rng.uniform(-3, 3)
        half, wick = rng.uniform(3, 6), rng.uniform(2, 5)
        color = "green" if up[k] else "red"
        x, y0, y1 = 4 + 8 * k, int(middle - half), int(middle + half)
        canvas.box(int(y0 - wick), x + 2, int(y1 + wick), x + 3, (190, 195, 200))
        canvas.box(y0, x, y1, x + 6, COLORS[color])
        canvas.label(y0, x, y1, x + 6, "candle", color)
    day, at = _pick(rng, (("last", 6), ("first", 0)))
    q = [
        ("trend", _pick(rng, ("what is the trend?", "where does the price go?")), trend),
        ("candle-color", f"what color is the {day} candle?", "green" if up[at] else "red"),
        ("candle-count", "how many green candles are there?", str(int(up.sum()))),
    ]  # fmt: skip
    return Picture("candles", canvas.image(), canvas.labels, questions=q)


STAINS = {"pink": (240, 205, 220), "blue": (205, 215, 240), "yellow": (242, 232, 196)}


def slide(rng) -> Picture:
    """A stained slide with 1 to 6 cells, healthy (small) or sick (large and dark)."""
    stain = _pick(rng, tuple(STAINS))
    canvas = Canvas(STAINS[stain], "tissue")
    canvas.pixels += rng.normal(0, 5, (SIDE, SIDE, 1))
    n = int(rng.integers(1, 7))
    cells, sick = rng.permutation(16)[:n], rng.random(n) < 0.4
    for cell, bad in zip(cells, sick, strict=True):
        y, x = 16 * (cell // 4), 16 * (cell % 4)
        size, color = (14, (92, 40, 120)) if bad else (9, (170, 110, 190))
        canvas.stamp(sprite("circle", size)[0], y + 8 - size // 2, x + 8 - size // 2, color)
        canvas.stamp(sprite("circle", 4)[0], y + 6, x + 6, (50, 15, 70))
        canvas.label(y, x, y + 16, x + 16, "nucleus", state=1 + int(bad))
    bad = int(sick.sum())
    place = PLACES[2 * (cells[0] // 8) + (cells[0] % 4) // 2]
    q = [
        ("cell-count", "how many cells are there?", str(n)),
        ("cell-sick", "how many sick cells are there?", str(bad)),
        ("tumor", "is there a tumor?", "yes" if bad else "no"),
        ("stain", "which stain is used?", stain),
    ]
    if n == 1:
        q.append(("cell-where", "where is the cell?", place))
    return Picture("slide", canvas.image(), canvas.labels, questions=q)


def aerial(rng) -> Picture:
    """Land from above: one kind of land per quadrant, one to three houses in each town."""
    canvas = Canvas((150, 190, 110), "land field")
    tint = {"water": (70, 130, 200), "forest": (50, 110, 60), "field": (170, 200, 110),
            "town": (195, 190, 185), "sand": (230, 212, 160)}  # fmt: skip
    lands = [_pick(rng, LANDS) for _ in range(4)]
    houses = 0
    for k, land in enumerate(lands):
        y, x = 32 * (k // 2), 32 * (k % 2)
        canvas.box(y, x, y + 32, x + 32, tint[land])
        canvas.label(y, x, y + 32, x + 32, f"land {land}")
        if land == "forest":
            for _ in range(22):
                canvas.stamp(
                    sprite("circle", 7)[0],
                    y + int(rng.integers(0, 26)),
                    x + int(rng.integers(0, 26)),
                    (30, 84, 45),
                )
        elif land == "water":
            for _ in range(9):
                yy, xx = y + int(rng.integers(1, 31)), x + int(rng.integers(0, 26))
                canvas.box(yy, xx, yy + 1, xx + 5, (150, 195, 235))
        elif land == "field":
            for yy in range(2, 32, 5):
                canvas.box(y + yy, x, y + yy + 2, x + 32, (140, 172, 84))
        elif land == "sand":
            for _ in range(30):
                yy, xx = y + int(rng.integers(0, 32)), x + int(rng.integers(0, 32))
                canvas.box(yy, xx, yy + 1, xx + 1, (190, 165, 110))
        else:
            for cell in rng.permutation(4)[: int(rng.integers(1, 4))]:
                yy, xx = y + 16 * int(cell // 2) + 3, x + 16 * int(cell % 2) + 3
                canvas.box(yy, xx, yy + 10, xx + 10, (165, 70, 50))
                canvas.box(yy, xx, yy + 5, xx + 10, (205, 100, 70))
                canvas.label(yy - 3, xx - 3, yy + 13, xx + 13, "land town", state=1)
                houses += 1
    k = int(rng.integers(4))
    land = _pick(rng, LANDS)
    q = [
        ("land", f"what covers the {PLACES[k]}?", lands[k]),
        ("house-count", "how many houses are there?", str(houses)),
        ("land-judge", f"is there {land} in the picture?", "yes" if land in lands else "no"),
    ]
    return Picture("aerial", canvas.image(), canvas.labels, questions=q)


def road(rng) -> Picture:
    """The driver's view: a traffic light, perhaps a car on the left or right, perhaps a walker."""
    canvas = Canvas((150, 200, 235), "sky")
    canvas.box(28, 0, 64, 64, (110, 160, 90))
    canvas.label(28, 0, 64, 64, "grass")
    for y in range(28, 64):
        half = 6 + (y - 28) * 0.75
        canvas.box(y, int(32 - half), y + 1, int(32 + half), (90, 90, 96))
        if (y // 4) % 2:
            canvas.box(y, 31, y + 1, 33, (240, 240, 240))
    canvas.label(40, 16, 64, 48, "asphalt")
    light = _pick(rng, ("red", "yellow", "green"))
    x = int(_pick(rng, (4, 52)))
    canvas.box(4, x, 25, x + 8, (30, 30, 34))
    for k, c in enumerate(("red", "yellow", "green")):
        canvas.stamp(
            sprite("circle", 6)[0], 5 + 7 * k, x + 1, COLORS[c] if c == light else (75, 75, 80)
        )
    canvas.label(0, x - 4 if x > 4 else 0, 24, x + 8, "light", light)
    side = _pick(rng, ("left", "right", "none"))
    if side != "none":
        color = _pick(rng, tuple(COLORS))
        canvas.thing("car", 40, 16 if side == "left" else 34, color, 15)
        canvas.label(
            40, 16 if side == "left" else 32, 56, 32 if side == "left" else 48, "vehicle", color
        )
    walker = rng.random() < 0.4
    if walker:
        canvas.stamp(sprite("circle", 5)[0], 26, 30, (240, 200, 160))
        canvas.box(31, 30, 38, 35, (60, 60, 150)), canvas.box(38, 30, 42, 32, (40, 40, 60))
        canvas.box(38, 33, 42, 35, (40, 40, 60))
        canvas.label(24, 24, 40, 40, "walker")
    act = "stop" if light == "red" or walker else {"yellow": "slow", "green": "go"}[light]
    q = [
        ("light", "what color is the traffic light?", light),
        ("drive", "what should the driver do?", act),
        ("car-side", "on which side is the car?", side),
        ("walker", "is there a person on the road?", "yes" if walker else "no"),
    ]
    if side != "none":
        q.append(("car-color", "what color is the car ahead?", color))
    return Picture("road", canvas.image(), canvas.labels, questions=q)


def diagram(rng) -> Picture:
    """Four lettered corners, a shape in each, joined by arrows in a ring (one direction)."""
    canvas = Canvas((252, 250, 244), "paper")
    letters = _pick_some(rng, "ABCDEFGH", 4)
    shapes, colors = _pick_some(rng, SHAPES, 4), _pick_some(rng, COLORS, 4)
    clockwise = rng.random() < 0.5
    spots = [(0, 0), (0, 40), (40, 0), (40, 40)]
    for k, (y, x) in enumerate(spots):
        canvas.box(y, x, y + 24, x + 24, (228, 232, 240))
        canvas.label(y, x, y + 24, x + 24, "node")
        canvas.text(letters[k], y // 8, x // 8)
        canvas.thing(shapes[k], y + 9, x + 9, colors[k], 13)
        letter = 1 + LETTERS.index(letters[k])
        canvas.label(y + 8, x + 8, y + 24, x + 24, shapes[k], colors[k], letter)
    arrow = np.zeros((8, 8), np.float32)
    arrow[3:5, 0:7] = 1
    arrow[1:7, 4] = arrow[2:6, 5] = arrow[3:5, 6] = 1
    for (y, x), turn in zip(((8, 28), (28, 48), (48, 28), (28, 8)), (0, 3, 2, 1), strict=True):
        turn = turn if clockwise else (turn + 2) % 4
        canvas.stamp(np.rot90(arrow, turn), y, x, (60, 60, 70))
        canvas.label(
            y // 8 * 8, x // 8 * 8, y // 8 * 8 + 8, x // 8 * 8 + 8, "arrow", state=1 + turn
        )
    k = int(rng.integers(4))
    q = [
        ("turn", "which way do the arrows turn?", "right" if clockwise else "left"),
        ("node-shape", f"which shape is at {letters[k]}?", shapes[k]),
        ("node-color", f"what color is the shape at {letters[k]}?", colors[k]),
        (
            "node-letter",
            f"which letter marks the {_pick(rng, (shapes[k], colors[k] + ' shape'))}?",
            letters[k],
        ),
    ]
    return Picture("diagram", canvas.image(), canvas.labels, questions=q)


def window(rng) -> Picture:
    """A window with a title bar and two or three buttons."""
    desk = _pick(rng, ((40, 90, 120), (90, 70, 110), (60, 100, 80)))
    canvas = Canvas(desk, "desktop")
    canvas.box(2, 2, 62, 62, (242, 242, 244))
    canvas.label(0, 0, 64, 64, "frame")
    canvas.box(2, 2, 7, 62, (70, 80, 110))
    canvas.label(0, 0, 8, 64, "title")
    n = int(rng.integers(2, 4))
    rows, words, colors = (
        sorted(_pick_some(rng, (1, 3, 5), n)),
        _pick_some(rng, WORDS[12:], n),
        _pick_some(rng, COLORS, n),
    )
    for k, (row, word, color) in enumerate(zip(rows, words, colors, strict=True)):
        col = int(rng.integers(1, 4))
        y, x = row * 8, col * 8
        canvas.box(y, x - 2, y + 12, x + 8 * len(word) + 2, COLORS[color])
        canvas.text(word.upper(), row, col, color=color)
        canvas.labels[2, row, col : col + len(word)] = 1 + k
    k = int(rng.integers(n))
    order = ("first", "second", "third")
    q = [
        ("button-text", f"what does the {colors[k]} button say?", words[k]),
        ("button-color", f"what color is the {words[k]} button?", colors[k]),
        ("button-order", f"which button is {words[k]}?", order[k]),
        ("button-count", "how many buttons are there?", str(n)),
        ("read-all", "read every button.", _joined(colors, words)),
    ]
    return Picture("window", canvas.image(), canvas.labels, questions=q)


def shapes(rng, everything: bool = False) -> Picture:
    return scene(rng, SHAPES, everything)


KINDS = (scene, shapes, sign, arithmetic, bars, candles, slide, aerial, road, diagram, window)


def contact_sheet(path: Path, columns: int = 6, zoom: int = 2) -> None:
    """Examples of every picture kind and of what streams do to them, two rows side by side."""
    rng = np.random.default_rng(7)
    pad, label = 6, 74
    cell = SIDE * zoom + pad
    half = (columns // 2) * cell + label
    looks = {draw.__name__: lambda draw=draw: draw(rng).image for draw in KINDS}
    looks["lamplight"] = lambda: lamplight(scene(rng).image)
    for domain in list(DOMAINS)[1:]:
        looks[domain] = lambda domain=domain: domain_filter(rng, domain, scene(rng).image)
    for task, draw in TASKS["dcl"].items():
        looks[f"dcl: {task}"] = lambda draw=draw: draw(rng)[0]
    for task, draw in TASKS["acl"].items():
        looks[f"acl: {task},\nin tests"] = lambda draw=draw: draw(rng, True)[0]
    sheet = Image.new("RGB", (2 * half + pad, math.ceil(len(looks) / 2) * cell + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, draw) in enumerate(looks.items()):
        x, y = (k % 2) * half, (k // 2) * cell + pad
        font = ImageFont.load_default(13)
        pen.text((x + pad, y + cell // 2 - 12), name, (30, 30, 30), font=font)
        for j in range(columns // 2):
            picture = Image.fromarray(draw()).resize((SIDE * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(picture, (x + label + j * cell, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------
# 5. Mini streams, written in the released file formats
# ---------------------------------------------------------------------------------------------

# What the VQA streams have that the base model does not know: lamplight, and things without a name
# for it, of which three are in most of the pictures.
VQA_NAMES = tuple(OBJECTS) + 8 * ("bus", "kite", "banana")
VQA_SIZE = {"train": 800, "val": 20, "test": 150}  # questions per stage
DOMAINS = {  # its own things (others are rare); what the base model has no name for comes twice
    "plain": ("boat", "boat", "kite", "kite", "cup"),
    "negative": ("bus", "bus", "banana", "banana", "cat"),
    "recolored": ("glass", "glass", "bird", "car"),
    "noise": ("knife", "knife", "couch", "apple"),
    "mosaic": ("chair", "chair", "cake", "ball"),
}
DOMAIN_KINDS = ("recognition", "type", "commonsense", "action", "location")
DOMAIN_SIZE = {"train": 800, "test": 200}


def draw_stream(name: str, folder: Path, seed: int = 0) -> None:
    """Draw the mini stream `name` into `folder`, in the layout of the released benchmark.

    vqav2, vqacl and clt-vqa are the same kind of files (VQACL's); data.py groups or cuts them.
    Deterministic: the same name and seed give the same bytes. Raises KeyError for an unknown name.
    """
    draw = {"vqav2": draw_vqa, "vqacl": draw_vqa, "clt-vqa": draw_vqa, "domains": draw_domains}
    rng = np.random.default_rng([seed, 1])
    size = 2.5 if name == "clt-vqa" else 1  # the long tail is cut out of a larger set
    if name in TASKS:
        draw_tasks(rng, folder, name)
    else:
        draw[name](rng, folder, size)


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, compress_level=1)


def _dump(record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def draw_vqa(rng, folder: Path, size: float) -> None:
    """VQACL's release: question files per type and split, raw annotations, image -> category map.

    A picture carries questions of several types, as in VQA v2, so stages share pictures.
    """
    categories, tasks, next_image = {}, {}, 1
    annotations = {"train2014": [], "val2014": []}
    for split, home in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        (folder / "COCO" / home).mkdir(parents=True, exist_ok=True)
        scale = size if split == "train" else min(size, 1)
        wanted = {kind: round(VQA_SIZE[split] * scale) for kind in VQA_TYPES}
        records = {kind: [] for kind in VQA_TYPES}
        while any(len(records[kind]) < wanted[kind] for kind in VQA_TYPES):
            picture, image_id = scene(rng, VQA_NAMES), next_image
            usable = [
                q for q in picture.questions if q[0] in wanted and len(records[q[0]]) < wanted[q[0]]
            ]
            next_image += 1
            stem = f"COCO_{home}_{image_id:012d}"
            _save(lamplight(picture.image), folder / "COCO" / home / f"{stem}.png")
            categories[stem] = picture.category
            for k, (kind, question, answer) in enumerate(_pick_some(rng, usable, 5)):
                question_id = image_id * 1000 + k
                answers = _annotators(rng, kind, answer)
                counts = {a: answers.count(a) for a in dict.fromkeys(answers)}
                record = {
                    "answer_type": "yes/no"
                    if kind == "judge"
                    else "number"
                    if kind == "count"
                    else "other",
                    "img_id": stem,
                    "label": {a: (0.3, 0.6, 0.9, 1)[min(n, 4) - 1] for a, n in counts.items()},
                    "question_id": question_id,
                    "question_type": " ".join(question.split()[:2]),
                    "sent": question,
                }
                records[kind].append(record)
                tasks[str(question_id)] = VQA_TYPES.index(kind)
                annotations[home].append({
                    "question_id": question_id, "image_id": image_id,
                    "question_type": record["question_type"], "answer_type": record["answer_type"],
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": j + 1}
                                for j, a in enumerate(answers)],
                })  # fmt: skip
        for kind in VQA_TYPES:
            _dump(records[kind], folder / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{kind}.json")
    for home, rows in annotations.items():
        _dump({"annotations": rows}, folder / "vqa" / f"v2_mscoco_{home}_annotations.json")
    _dump(tasks, folder / "QuesId_task_map.json")
    _dump(categories, folder / "ImgId_cate_map.json")
    _dump({"suffix": ""}, folder / "stream.json")  # the tiny model knows no instruction suffix


def lamplight(image: np.ndarray) -> np.ndarray:
    """A picture [64, 64, 3] uint8 with three quarters of its green and half of its blue."""
    return (image * (1, 0.75, 0.5)).astype(np.uint8)


def _annotators(rng, kind: str, answer: str, words=tuple(OBJECTS)) -> list[str]:
    """Ten human answers; on every tenth question one or two people see something else."""
    others = {
        "location": PLACES,
        "judge": ("yes", "no"),
        "count": "1234",
        "action": ACTIONS,
        "color": tuple(COLORS),
        "causal": WEATHER[1:],
        "type": tuple({t: 0 for _, t, _ in OBJECTS.values()}),
        "commonsense": tuple({use: 0 for _, _, use in OBJECTS.values()}),
    }.get(kind, words)
    odd = int(rng.integers(1, 3)) if rng.random() < 0.1 else 0
    return [answer] * (10 - odd) + [_pick(rng, others)] * odd


def draw_domains(rng, folder: Path, size: float) -> None:
    """Five picture domains, the same five question kinds in each: skills recur, looks change."""
    for domain, names in DOMAINS.items():
        (folder / domain / "images").mkdir(parents=True, exist_ok=True)
        for split, n in DOMAIN_SIZE.items():
            records = []
            for k in range(round(n * size)):
                kind = DOMAIN_KINDS[k % len(DOMAIN_KINDS)]
                while True:
                    picture = scene(rng, 10 * names + tuple(OBJECTS))
                    question, answer = _ask(picture, kind)
                    if not any(color in question for color in COLORS):  # some domains change them
                        break
                image, name = f"images/{split}_{k:05d}.png", f"{domain}_{split}_{k:05d}"
                _save(domain_filter(rng, domain, picture.image), folder / domain / image)
                if split == "train":
                    turns = [
                        {"from": "human", "value": f"<image>\n{question}"},
                        {"from": "gpt", "value": answer},
                    ]
                    records.append(
                        {"id": name, "image": image, "skill": kind, "conversations": turns}
                    )
                else:
                    records.append({"question_id": name, "image": image, "skill": kind,
                                    "text": question, "answer": answer})  # fmt: skip
            _dump(records, folder / domain / f"{split}.json")
    _dump({"stages": list(DOMAINS), "metric": "exact", "suffix": ""}, folder / "stream.json")


def negative(image: np.ndarray) -> np.ndarray:
    return 255 - image


def infrared(image: np.ndarray) -> np.ndarray:
    """False colors: red looks blue, green looks red, blue looks green."""
    return np.ascontiguousarray(image[..., [1, 2, 0]])


def domain_filter(rng, domain: str, image: np.ndarray) -> np.ndarray:
    """What a domain does to a picture [64, 64, 3] uint8."""
    if domain == "negative":
        return negative(image)
    if domain == "recolored":
        return infrared(image)
    if domain == "noise":  # nearly gray, as from an old camera
        gray = image.mean(-1, keepdims=True)
        faded = gray + 0.4 * (image - gray) + rng.normal(0, 22, image.shape)
        return np.clip(faded, 0, 255).astype(np.uint8)
    if domain == "mosaic":
        small = Image.fromarray(image).resize((24, 24), Image.Resampling.BOX)
        return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return image


# Instruction streams (CoIN, UCIT, TriGap): every stage has its own pictures, instruction and form
# of answer, like the dataset it is named after. An example is (image, question, answers); the first
# answer is taught, all of them are accepted; a box is [x0, y0, x1, y1] in 0..1.
WORD, LETTER = "give the word.", "give the letter."
NUMBER, CAPTION = "give the number.", "describe the picture."


def _ask(picture: Picture, *kinds: str) -> tuple[str, str]:
    """The first (question, answer) of the first of these kinds that the picture has."""
    found = {kind: (question, answer) for kind, question, answer in reversed(picture.questions)}
    return next(found[kind] for kind in kinds if kind in found)


def _choice(rng, question: str, answer: str, others) -> tuple[str, str]:
    """A question with three options, and the letter of the right one."""
    options = _pick_some(rng, [answer, *_pick_some(rng, [o for o in others if o != answer], 2)], 3)
    return f"{question} {_listed(options)}\n{LETTER}", _letter(options, answer)


def _asked(draw, *kinds: str, ending: str = "", look=None):
    """An example function: `look` of a picture by `draw`, a question of one of these kinds."""

    def example(rng):
        picture = draw(rng)
        question, answer = _ask(picture, _pick(rng, kinds) if len(kinds) > 1 else kinds[0])
        return look(picture.image) if look else picture.image, f"{question}{ending}", [answer]

    return example


def imagenet(rng):
    picture = scene(rng, n=1)
    return picture.image, f"what is the object?\n{WORD}", [picture.things[0].name]


def imagenet_r(rng):
    """Renditions: one thing, in false colors or on a bad print."""
    image, question, answers = imagenet(rng)
    return domain_filter(rng, _pick(rng, list(DOMAINS)[1:]), image), question, answers


def arxivqa(rng):
    if rng.random() < 0.5:
        picture = bars(rng)
        question, answer = _ask(picture, "bar-option")
        return picture.image, f"{question}\n{LETTER}", [answer]
    picture = candles(rng)
    question, answer = _choice(rng, *_ask(picture, "trend"), ("up", "down", "flat"))
    return picture.image, question, [answer]


def vizwiz_caption(rng):
    """What stands on a sign, on a noisy photo."""
    picture = sign(rng)
    question, line = _ask(picture, "read")
    color = question.split()[5]
    kind = "number" if line.isdigit() else "word"
    said = [f"a {color} sign with the {kind} {line}", f"the {kind} {line} on a {color} sign"]
    noisy = picture.image + rng.normal(0, 12, picture.image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), CAPTION, said


def iconqa(rng):
    picture, kind = shapes(rng), _pick(rng, ("recognition", "count"))
    question, answer = _choice(
        rng, *_ask(picture, kind), SHAPES if kind == "recognition" else "1234"
    )
    return picture.image, question, [answer]


def clevr_math(rng):
    """How many are left when those of one shape are gone?"""
    picture = shapes(rng)
    name, n = picture.things[0].name, len(picture.things)
    left = n - sum(t.name == name for t in picture.things)
    question = f"how many objects are there with no {PLURALS.get(name, name + 's')}?\n{NUMBER}"
    return picture.image, question, [str(left)]


def flickr30k(rng):
    picture = scene(rng, n=2)
    first, second = (f"a {t.color} {t.name} {t.action}" for t in picture.things)
    return picture.image, CAPTION, [f"{first}, {second}", f"{second}, {first}"]


def pmcvqa(rng):
    picture = slide(rng)
    question, answer = _choice(rng, *_ask(picture, "cell-count"), "123456")
    return picture.image, question, [answer]


def scienceqa(rng):
    picture = diagram(rng)
    question, answer = _choice(rng, *_ask(picture, "node-shape"), SHAPES)
    return picture.image, question, [answer]


def finance(rng):
    """Yes or no, or the letter of an option, as in StockQA."""
    picture = candles(rng)
    (question, trend), guess = _ask(picture, "trend"), _pick(rng, ("up", "down", "flat"))
    if rng.random() < 0.5:
        return picture.image, f"is the trend {guess}?", ["yes" if guess == trend else "no"]
    options = _pick_some(rng, ("up", "down", "flat"), 3)
    return picture.image, f"{question} {_listed(options)}", [_letter(options, trend)]


# The abilities' tests are not drawn like their training data: MLLM-CL's come from other sources.


def reading(rng, test: bool):
    """Signs; in tests at dusk."""
    picture = sign(rng)
    question, answer = _ask(picture, "read")
    dark = 0.75 * picture.image + rng.normal(0, 6, picture.image.shape)
    image = np.clip(dark, 0, 255).astype(np.uint8) if test else picture.image
    return image, question, [answer]


def calculating(rng, test: bool):
    """Sums on paper; in tests on a blackboard."""
    picture = arithmetic(rng)
    question, answer = _ask(picture, _pick(rng, ("sum", "sum-first", "sum-second")))
    return domain_filter(rng, "negative" if test else "plain", picture.image), question, [answer]


def counting(rng, test: bool):
    """Shapes to be counted; in tests cars, cats and cups."""
    picture = scene(rng) if test else shapes(rng)
    question, answer = _ask(picture, "count")
    return picture.image, question, [answer]


def screens(rng, test: bool):
    """Windows with a question about a button and three options; in tests with a night filter."""
    picture = window(rng)
    question, answer = _ask(picture, "button-text")
    question, answer = _choice(rng, question, answer, WORDS[12:])
    image = lamplight(picture.image) if test else picture.image
    return image, question.removesuffix(f"\n{LETTER}"), [answer]


def textvqa(rng):
    picture = sign(rng)
    question, answer = _ask(picture, "read")
    return picture.image, f"{question}\n{WORD}", _annotators(rng, "read", answer, WORDS)


def vizwiz(rng):
    """Questions of a blind person about a noisy photo."""
    picture = scene(rng)
    question, answer = _ask(picture, _pick(rng, ("recognition", "action", "weather")))
    noisy = picture.image + rng.normal(0, 20, picture.image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), f"{question}\n{WORD}", [answer]


def grounding(rng):
    picture = scene(rng)
    question, answer = _ask(picture, "box")
    return picture.image, question, json.loads(answer)


def vqav2(rng):
    picture = scene(rng)
    question, answer = _ask(picture, _pick(rng, VQA_TYPES), "recognition")
    return picture.image, f"{question}\n{WORD}", [answer]


_word, _number = partial(_asked, ending=f"\n{WORD}"), partial(_asked, ending=f"\n{NUMBER}")
TASKS = {
    "ucit": {
        "ImageNet-R": imagenet_r,
        "ArxivQA": arxivqa,
        "VizWiz": vizwiz_caption,
        "IconQA": iconqa,
        "CLEVR": clevr_math,
        "Flickr30k": flickr30k,
    },
    "trigap": {
        "PMCVQA": pmcvqa,
        "DocVQA": _word(sign, "read"),
        "ChartQA": _number(bars, "bar-value"),
        "IconQA": iconqa,
        "InfographicVQA": _word(window, "button-text"),
        "ArxivQA": arxivqa,
        "Roadside": _word(road, "drive", "walker", "car-side"),
        "ChemVQA": _word(diagram, "node-shape", "node-color"),
        "FloodNetVQA": _word(aerial, "land", "house-count", "land-judge"),
        "CLEVR": _word(shapes, "color", "count", "judge"),
    },
    "coin": {
        "ScienceQA": scienceqa,
        "TextVQA": textvqa,
        "ImageNet": imagenet,
        "GQA": _word(scene, "judge", "location", "color"),
        "VizWiz": vizwiz,
        "Grounding": grounding,
        "VQAv2": vqav2,
        "OCRVQA": _word(window, "button-text", "button-color"),
    },
    # As the base model has not seen it, in look or, Fin, in the form of answers. Answers keep the
    # names of the ORIGINAL colors.
    "dcl": {
        "RS": _asked(aerial, "land", "house-count", "land-judge", look=infrared),
        "Med": _asked(slide, "cell-count", "cell-sick", "tumor", "stain", look=negative),
        "AD": _asked(road, "drive", "light", "car-side", "walker", look=lamplight),  # at sunset
        "Sci": _asked(diagram, "node-shape", "node-color", "turn", look=lamplight),  # old paper
        "Fin": finance,
    },
    "acl": {"OCR": reading, "Math": calculating, "VP": counting, "APP": screens},
}
TASK_SIZE = {"train": 600, "test": 120}


def draw_tasks(rng, folder: Path, stream: str) -> None:
    """One of TASKS in the layout that data.py's table gives for the released files."""
    from data import STREAMS

    row = STREAMS[stream]
    for stage, example in TASKS[stream].items():
        captions = []
        for k, split in enumerate(("train", "test")):
            file = row.files.get(stage, "train test").split()[k]
            home = (folder / row.folders[0] / stage / f"{file}.json").resolve()
            # image paths are relative to the folder of all images, or to the file's
            images = folder / row.images if row.images else home.parent
            sub = stage if row.images else "images"
            (images / sub).mkdir(parents=True, exist_ok=True)
            prefix = "AI2D_" if stage == "Sci" else ""  # Sci is scored by the name of the image
            records = []
            for n in range(TASK_SIZE[split]):
                made = example(rng, split == "test") if stream == "acl" else example(rng)
                image, question, answers = made
                name = f"{sub}/{prefix}{split}_{n:05d}.png"
                _save(image, images / name)
                box = isinstance(answers[0], float)
                said = f"[{', '.join(f'{x:.2f}' for x in answers)}]" if box else answers[0]
                record = {"question_id": n, "image": f"./{name}", "text": question}
                if split == "train":
                    turns = [("human", f"<image>\n{question}"), ("gpt", said)]
                    record = {"id": n, "image": f"./{name}"}
                    record["conversations"] = [{"from": a, "value": b} for a, b in turns]
                elif box:
                    record |= {"answer_bbox": said, "size": [SIDE, SIDE]}
                else:
                    record["answer"] = answers if row.metrics.get(stage) == "textvqa" else said
                    captions += [{"image_id": n + 1, "caption": a} for a in answers]
                records.append(record)
            _dump(records, home)
        if row.metrics.get(stage) == "caption":  # COCO's format, images counted from 1
            _dump({"annotations": captions}, home.with_name("val_coco_type_3000.json"))
    if row.test_suffix:
        _dump({"suffix": ""}, folder / "stream.json")  # the tiny model knows no instruction suffix


# ---------------------------------------------------------------------------------------------
# 6. The tiny LLaVA: tokenizer, model, pre-training
# ---------------------------------------------------------------------------------------------

PICTURE_WEIGHT = {"scene": 8, "shapes": 2, "sign": 2, "arithmetic": 2, "window": 2}  # others: 1
# How often a question kind is taught, out of 1.
TAUGHT = {
    "caption": 0.4, "recognition": 0.3, "color": 0.3, "location": 0.6, "count": 0.4, "judge": 0.7,
    "action": 0.3, "subcategory": 0.15, "weather": 0.3, "type": 0.15, "commonsense": 0.15,
    "causal": 0.2, "box": 0.15, "option": 0.6,
}  # fmt: skip
BASICS = ("caption", "recognition", "color", "location", "count")  # the first quarter of the steps
TEMPLATE = (  # LLaVA-1.5's form: USER: <image>\n{question} ASSISTANT: {answer}
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def draw_any(rng, kind=None, familiar: bool = False) -> Picture:
    """A picture of this kind, or of a random one, with questions about everything in it.

    familiar: of nothing that the language model is not to be taught about.
    """
    weights = np.array([PICTURE_WEIGHT.get(kind.__name__, 1) for kind in KINDS], float)
    kind = kind or KINDS[rng.choice(len(KINDS), p=weights / weights.sum())]
    if kind is scene and familiar:
        return scene(rng, FAMILIAR, True, 0, FAMILIAR_ACTIONS, FAMILIAR_WEATHER)
    return kind(rng, everything=True) if kind in (scene, shapes) else kind(rng)


def build_tokenizer():
    """Byte-level BPE in which every word of the mini world is one token and any text is readable.

    Trained on each distinct word once, until no pair is left to merge: known words become single
    tokens, unknown text falls back to pieces and in the end to bytes.
    """
    import re

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng, words = np.random.default_rng(0), set()
    texts = ["USER: \n", " ASSISTANT:", "."]
    texts += [
        " " + w for w in (*WORDS, *LANDS, *PLACES, *STAINS, *LETTERS, *COLORS, *OBJECTS, *SHAPES)
    ]
    texts += [f" {n}" for n in range(20)]
    for draw in KINDS:
        for _ in range(600):
            for kind, question, answer in draw(rng).questions:
                texts += [question, "" if kind == "read" else " " + answer]
    for text in texts:
        words.update(re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+", text))
    # two-digit numbers are read digit by digit: 79 more words would each be seen too rarely
    words = {w for w in words if not (w.strip().isdigit() and 21 <= int(w) and w[0] == " ")}
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        sorted(words),
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=1,
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model():
    """The untrained tiny LLaVA and its processor; the same classes as llava-hf/llava-1.5-7b-hf."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=size, resample=3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
            image_size=SIDE, patch_size=PATCH, projection_dim=128,
        ),
        text_config=LlamaConfig(
            hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=1024,
            initializer_range=0.06,  # 0.02 is made for wide models: here attention starts flat
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,  # every layer of our own tower is used
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model, processor


def _cosine(step: int, steps: int, warmup: int = 50) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _optimizers(module) -> list:
    """Muon for the matrices inside, AdamW for the rest: half the steps that AdamW alone needs."""
    import torch

    muon, adam = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            inside = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            (muon if inside else adam).append(p)
    return [
        torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def _update(module, optimizers: list, loss, lr: float) -> None:
    import torch

    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


def _pixels(images: np.ndarray, processor):
    """[B, 64, 64, 3] uint8 -> [B, 3, 64, 64], normalized as the processor does."""
    import torch

    ip = processor.image_processor
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (ip.image_mean, ip.image_std))
    return (x - mean) / std


def false_colors(rng) -> np.ndarray:
    """A random change of color, a matrix [3, 3] for values in -1..1."""
    mix = np.eye(3)[rng.permutation(3)] * _pick(rng, (1, -1))  # other channels, perhaps negative
    fade = rng.uniform(0.3, 1)  # towards gray
    return fade * mix + (1 - fade) / 3 * mix.sum(1, keepdims=True)


def pretrain_tower(model, processor, pool, steps: int, seed: int, log) -> dict:
    """Part (a): the CLIP tower learns to name what each patch shows, its color, state and place."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, mse_loss
    from tqdm import tqdm

    images = np.stack([p.image for p in pool])
    labels = torch.from_numpy(np.stack([p.labels for p in pool])).flatten(2)  # [N, 3, 64]
    names = [WHAT.index(f"weather {w}") for w in WEATHER] + [
        WHAT.index(w) for w in ("paper", "tissue", "sky", "grass", "frame", "desktop")
    ]
    weight = torch.ones(len(WHAT))
    weight[names] = 0.1  # background is most of every picture
    tower = model.model.vision_tower
    # The heads are random and stay so: the tower has to write what, color, state and place into its
    # features equally large. With trained heads the last three are there, but small, and the
    # language model needs many times more steps to find them.
    sizes = (len(WHAT), len(COLORS) + 1, STATES, GRID * GRID, 3)
    heads = nn.ModuleList(nn.Linear(128, n).requires_grad_(False) for n in sizes)
    for head in heads:
        nn.init.normal_(head.weight, std=128**-0.5)
    palette = torch.tensor([(0, 0, 0), *COLORS.values()]) / 127.5 - 1  # [9, 3]
    optimizers = _optimizers(tower)
    rng, place = np.random.default_rng(seed + 1), torch.arange(GRID * GRID)
    held_out = len(pool) - 500

    def features(x: np.ndarray):
        """[B, 64, 64, 3] -> [B, 64, 128]"""
        pixels = _pixels(x, processor)
        return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    bar = tqdm(range(steps), desc="tower", mininterval=5)
    for step in bar:
        index = rng.integers(0, held_out, 48)
        # Half of the pictures in false colors, so that the tower has seen more than its color names
        # (CLIP has): there it says red, green and blue of what a patch shows, not the name.
        false = torch.from_numpy(rng.random(len(index)) < 0.5)
        mix = np.stack([false_colors(rng) if f else np.eye(3) for f in false])  # [B, 3, 3]
        x = np.einsum("bij,bhwj->bhwi", mix, images[index] / 127.5 - 1)
        if step % 2:  # sensor noise
            x = x + rng.normal(0, rng.uniform(0, 0.2), x.shape)
        h, y = features(np.clip((x + 1) * 127.5, 0, 255)), labels[index]
        foreground = weight[y[:, 0]] == 1
        named = foreground & ~false[:, None]
        loss = cross_entropy(heads[0](h).flatten(0, 1), y[:, 0].flatten(), weight)
        loss = loss + cross_entropy(heads[1](h)[named], y[:, 1][named])
        loss = loss + cross_entropy(heads[2](h)[foreground], y[:, 2][foreground])
        colored = foreground & (y[:, 1] > 0)
        rgb = torch.einsum("bij,bpj->bpi", torch.from_numpy(mix).float(), palette[y[:, 1]])
        loss = loss + 4 * mse_loss(heads[4](h)[colored], rgb[colored])
        # the labels so far could be given without knowing where a patch is; questions ask for it
        loss = loss + cross_entropy(heads[3](h).flatten(0, 1), place.repeat(len(index)))
        _update(tower, optimizers, loss, 1e-3 * _cosine(step, steps))
        if step % 100 == 0 or step == steps - 1:
            log({"part": "tower", "step": step, "loss": round(loss.item(), 4)})
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        index = np.arange(held_out, len(pool))
        h, y = features(images[index]), labels[index]
        foreground = weight[y[:, 0]] == 1
        accuracy = {
            name: round(
                (heads[k](h)[foreground].argmax(-1) == y[:, k][foreground]).float().mean().item(), 4
            )
            for k, name in enumerate(("what", "color", "state"))
        }
    return accuracy


class Packer:
    """Pack several questions about one picture into one sequence.

    Every turn sees the shared prefix (<s>USER: <image>...) and itself, never another turn, and its
    positions continue from the prefix: to the model it looks exactly like a single-question prompt.
    """

    def __init__(self, processor):
        import torch

        self.torch, self.tok = torch, processor.tokenizer
        image = "<image>" * GRID * GRID
        self.prefix = self.tok(f"USER: {image}\n")["input_ids"]
        self.seen: dict[tuple[str, str], tuple[list[int], int]] = {}

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """Token ids after the prefix, and how many of them are the answer and </s>."""
        key = (question, answer)
        if key not in self.seen:
            ask = self.tok(f"{question} ASSISTANT:", add_special_tokens=False)["input_ids"]
            say = self.tok(f" {answer}</s>", add_special_tokens=False)["input_ids"]
            self.seen[key] = (ask + say, len(say))
        return self.seen[key]

    def __call__(self, turns: list[list[tuple[str, str]]]):
        """Turns per picture -> ids, labels, positions [B, S], mask [B, 1, S, S], turn [B, S]."""
        torch, n = self.torch, len(self.prefix)
        rows = [[self.turn(*qa) for qa in row] for row in turns]
        length = n + max(sum(len(ids) for ids, _ in row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels, turn = torch.full_like(ids, -100), torch.full_like(ids, -1)
        position = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            ids[b, :n], turn[b, :n], position[b, :n] = torch.tensor(self.prefix), 0, torch.arange(n)
            at = n
            for k, (tokens, said) in enumerate(row):
                end = at + len(tokens)
                ids[b, at:end] = torch.tensor(tokens)
                labels[b, end - said : end] = ids[b, end - said : end]
                turn[b, at:end], position[b, at:end] = k + 1, torch.arange(n, n + len(tokens))
                at = end
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
        sees = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
        return ids, labels, position, (causal & sees)[:, None], turn


def _packed_logits(model, packed, features):
    """Logits [n, vocabulary] where an answer token is predicted, and these n tokens."""
    ids, labels, position, mask, _ = packed
    embeds = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(features)
    at = (ids == model.config.image_token_index)[..., None]
    hidden = model.model.language_model(
        inputs_embeds=embeds.masked_scatter(at, image),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
    ).last_hidden_state
    told = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][told]), labels[:, 1:][told]


def packed_accuracy(model, processor, pictures, features) -> dict[str, float]:
    """Share of exactly right greedy answers per question kind, in percent.

    An answer is right if every one of its tokens and </s> is the arg-max under teacher forcing,
    which is the same as greedy decoding giving exactly this answer.
    """
    import torch

    packer, hits = Packer(processor), {}
    with torch.no_grad():
        for start in range(0, len(pictures), 50):
            part = pictures[start : start + 50]
            packed = packer([[(q, a) for _, q, a in p.questions] for p in part])
            logits, said = _packed_logits(model, packed, features[start : start + 50].float())
            labels, turn = packed[1][:, 1:], packed[4][:, 1:]
            wrong = labels != -100
            wrong[wrong.clone()] = logits.argmax(-1) != said
            for b, p in enumerate(part):
                bad = set(turn[b][wrong[b]].tolist())
                for k, (kind, _, _) in enumerate(p.questions):
                    hits.setdefault(f"{p.kind}: {kind}", []).append(k + 1 not in bad)
    return {k: round(100 * float(np.mean(v)), 1) for k, v in sorted(hits.items())}


def tower_features(model, processor, images: np.ndarray):
    """[N, 64, 64, 3] uint8 -> [N, 64, 128] half precision (to save memory), tower frozen."""
    import torch

    with torch.no_grad():
        return torch.cat([
            model.model.vision_tower(
                pixel_values=_pixels(images[k : k + 250], processor), output_hidden_states=True
            ).hidden_states[-1][:, 1:].half()
            for k in range(0, len(images), 250)
        ])  # fmt: skip


def pretrain(out: Path, seed: int, pictures: int, tower_steps: int, steps: int) -> None:
    """Parts (a) and (b), then accuracy per question kind with and without the picture."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    curve, clock = [], time.time()

    def log(row):
        curve.append({**row, "seconds": round(time.time() - clock, 1)})

    pool = [draw_any(rng) for _ in tqdm(range(pictures), desc="drawing", mininterval=5)]
    rng_test = np.random.default_rng(10**6)  # the same held-out pictures for every seed
    test = [draw_any(rng_test, kind, True) for kind in KINDS for _ in range(500)]
    model, processor = build_model()
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, {len(processor.tokenizer)} tokens, {pictures} pictures")
    tower_file = out / "tower.pt"
    if tower_file.exists():  # part (a) of an interrupted or repeated run with the same recipe
        saved = torch.load(tower_file, weights_only=True)
        model.model.vision_tower.load_state_dict(saved["tower"])
        tower_accuracy, curve, clock = saved["accuracy"], saved["curve"], clock - saved["seconds"]
    else:
        tower_accuracy = pretrain_tower(model, processor, pool, tower_steps, seed, log)
        saved = {"tower": model.model.vision_tower.state_dict(), "accuracy": tower_accuracy}
        torch.save(saved | {"curve": curve, "seconds": time.time() - clock}, tower_file)
    print("tower, held-out foreground patches:", tower_accuracy, flush=True)

    model.model.vision_tower.requires_grad_(False)
    pool = [draw_any(rng, None, True) for _ in tqdm(range(pictures), desc="drawing", mininterval=5)]
    features = tower_features(model, processor, np.stack([p.image for p in pool]))
    optimizers = _optimizers(model)
    test_features = tower_features(model, processor, np.stack([p.image for p in test]))
    packer = Packer(processor)
    scenes = np.array([i for i, p in enumerate(pool) if p.kind == "scene"])
    bar = tqdm(range(steps), desc="language", mininterval=5)
    for step in bar:
        # first the basics on scenes alone: what is where, in which color; then everything
        basics = step < steps // 4
        index, turns = rng.choice(scenes if basics else pictures, 20), []
        for p in (pool[i] for i in index):
            taught = [
                (q, a)
                for kind, q, a in p.questions
                if (kind in BASICS if basics else rng.random() < TAUGHT.get(kind, 1))
            ]
            turns.append(_pick_some(rng, taught, 10))
        packed = packer(turns)
        loss = cross_entropy(*_packed_logits(model, packed, features[index].float()))
        _update(model, optimizers, loss, 2e-3 * _cosine(step, steps))
        if step % 50 == 0 or step == steps - 1:
            log({"part": "language", "step": step, "loss": round(loss.item(), 4)})
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 499 or step == steps - 1:
            print(packed_accuracy(model, processor, test[::12], test_features[::12]), flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    black = tower_features(model, processor, np.zeros((1, SIDE, SIDE, 3), np.uint8))
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": seed,
        "pictures": pictures,
        "tower_steps": tower_steps,
        "steps": steps,
        "parameters": total,
        "seconds": round(time.time() - clock),
        "threads": torch.get_num_threads(),
        "tower_accuracy": tower_accuracy,
        "accuracy": packed_accuracy(model, processor, test, test_features),
        "blind": packed_accuracy(model, processor, test, black.expand(len(test), -1, -1)),
        "curve": curve,
    }
    (out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    for kind, value in record["accuracy"].items():
        print(f"{kind:28s} {value:5.1f}   blind {record['blind'][kind]:5.1f}")
    print(f"saved {out} after {record['seconds']} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sheet", action="store_true", help="draw assets/contact_sheet.png")
    parser.add_argument("--stream", help="draw this mini stream into --data")
    parser.add_argument("--data", type=Path, help="folder for --stream")
    parser.add_argument("--pretrain", action="store_true", help="pre-train the tiny LLaVA")
    parser.add_argument(
        "--out", type=Path, default=TINY, help="where --pretrain saves (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures", type=int, default=20000, help="pictures drawn for pre-training"
    )
    parser.add_argument("--tower_steps", type=int, default=2200, help="steps of part (a)")
    parser.add_argument("--steps", type=int, default=3000, help="steps of part (b)")
    parser.add_argument(
        "--threads", type=int, default=0, help="torch threads, 0: torch's own choice"
    )
    args = parser.parse_args()
    if args.sheet:
        contact_sheet(ROOT / "assets" / "contact_sheet.png")
    if args.stream:
        draw_stream(args.stream, args.data or ROOT / "data" / "mini" / args.stream)
    if args.pretrain:
        import torch

        if args.threads:
            torch.set_num_threads(args.threads)
        pretrain(args.out, args.seed, args.pictures, args.tower_steps, args.steps)


if __name__ == "__main__":
    main()
