"""The drawn world: small pictures of known content, and questions whose answers are known.

    python mini/draw.py     draw examples of every kind of picture into mini/contact_sheet.png

Continual learning of a 7B model takes days and 125 GB of pictures; a reader wants an answer in
minutes. Every picture here is 64 x 64 pixels, which the tiny LLaVA sees as 8 x 8 image tokens. A
picture is a Canvas: pixels, plus three labels per patch (what, color, state) that only
pre-training uses. Everything is deterministic in its random generator `rng` (numpy).
"""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SIDE, PATCH = 64, 8  # side of a picture and of a patch, pixels
GRID = SIDE // PATCH  # 8 x 8 patches, one image token each

# ---- 1. Vocabulary: what can be drawn, and the words for it --------------------------------------

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
# name: (COCO category id, type, what it is for). The ids make VQACL's object groups work on drawn
# pictures: under the paper's reading each of the five groups holds three of these classes.
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
PLURALS = {"glass": "glasses", "knife": "knives", "couch": "couches", "bus": "buses"}
PLURALS |= {"cross": "crosses"}
ACTIONS = ("resting", "moving", "falling", "sleeping")
WEATHER = ("clear", "rain", "snow", "night", "fog")
# What pre-training asks the language model about in scenes of objects. The other seven names, and
# the other kinds of weather, it only meets in lists of words, never with a picture (its tower has
# seen them): the streams teach those.
FAMILIAR = ("car", "cat", "cake", "cup", "apple", "ball", "bird", "couch")
FAMILIAR_ACTIONS, FAMILIAR_WEATHER = ACTIONS[:3], WEATHER[:3]
CORNERS = ("top left", "top right", "bottom left", "bottom right")
LANDS = ("water", "forest", "field", "town", "sand")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SIGNS = "stop exit open sale cafe bank park hotel taxi pizza milk shop".split()
BUTTONS = "save copy quit help send play edit back next done".split()
WORDS = SIGNS + BUTTONS  # signs show all of them
VQA_TYPES = (  # VQACL's order
    "recognition location judge commonsense count action color type subcategory causal".split()
)

# What a patch can show: labels for the tower's pre-training. Their order is part of the recipe.
WHAT = (
    list(OBJECTS)
    + list(SHAPES)
    + [f"glyph {c}" for c in LETTERS + DIGITS + "+-="]
    + [f"weather {w}" for w in WEATHER]
    + [f"land {x}" for x in LANDS]
    + "board bar axis candle wick nucleus tissue asphalt lane sky grass light walker".split()
    + "vehicle node arrow paper frame title button desktop".split()
)
STATES = 10  # action, size, height, direction or order, depending on what the patch shows


def pick(rng, options):
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_some(rng, options, n: int) -> list:
    """Up to n different options in random order."""
    options = list(options)
    return [options[k] for k in rng.permutation(len(options))[:n]]


def lettered(options, answer) -> tuple[str, str]:
    """Options as multiple-choice questions list them, "A. cat B. dog", and the answer's letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    return " ".join(lines), LETTERS[options.index(answer)]


# ---- 2. Canvas: pixels and labels ----------------------------------------------------------------


@cache
def sprite(name: str, size: int = 13) -> np.ndarray:
    """Masks [2, size, size] in 0..1 of an object or a shape: body (takes the color), dark ink.

    sprites.png holds a column of two 64 x 64 cells for each name, the body above the ink.
    """
    x = 64 * [*OBJECTS, *SHAPES].index(name)
    with Image.open(HERE / "sprites.png") as sheet:
        cells = [sheet.crop((x, y, x + 64, y + 64)) for y in (0, 64)]
    small = [np.asarray(cell.resize((size, size), Image.Resampling.BOX)) for cell in cells]
    return np.stack(small).astype(np.float32) / 255


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
        top, left = round(y0 / PATCH), round(x0 / PATCH)
        rows = slice(top, max(round(y1 / PATCH), top + 1))
        columns = slice(left, max(round(x1 / PATCH), left + 1))
        self.labels[0, rows, columns] = WHAT.index(what)
        self.labels[1, rows, columns] = 0 if color is None else 1 + list(COLORS).index(color)
        self.labels[2, rows, columns] = state

    def stamp(self, mask: np.ndarray, y: int, x: int, color) -> None:
        """Blend `color` in where mask [h, w] says, from pixel (y, x) on, cut at the edges."""
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
        """Characters from patch (row, column) on, one per patch; the state is their position.

        color: the name of the color they are written on, if it matters.
        """
        for k, char in enumerate(string):
            y, x = row * PATCH, (column + k) * PATCH
            self.stamp(glyph(char), y, x, ink)
            self.label(y, x, y + 8, x + 8, f"glyph {char}", color, 1 + k)

    def image(self) -> np.ndarray:
        return np.clip(self.pixels + 0.5, 0, 255).astype(np.uint8)


@dataclass
class Picture:
    """A drawn picture, what the tower must recognize in it, and questions with their answers."""

    kind: str
    image: np.ndarray  # [64, 64, 3] uint8
    labels: np.ndarray  # [3, 8, 8]
    questions: list[tuple[str, str, str]]  # (kind, question, answer)
    things: list = field(default_factory=list)  # scenes: the Things drawn
    category: int = 0  # scenes of objects: COCO id of the first one

    def ask(self, *kinds: str) -> tuple[str, str]:
        """The first (question, answer) of the first of these kinds that the picture has."""
        by_kind = {kind: (question, answer) for kind, question, answer in reversed(self.questions)}
        return next(by_kind[kind] for kind in kinds if kind in by_kind)


# ---- 3. Scenes: objects x colors x actions x weather, and the ten question types of VQA v2 -------

BACKGROUND = {
    "clear": (236, 232, 220),
    "rain": (150, 165, 185),
    "snow": (222, 232, 242),
    "night": (38, 40, 62),
    "fog": (190, 190, 188),
}


def weather_canvas(rng, weather: str) -> Canvas:
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
    cell: int  # 0..15 on a grid of 4 x 4 cells, 16 pixels each

    @property
    def corner(self) -> str:
        return corner_of(self.cell)


def corner_of(cell: int) -> str:
    """The corner of the picture that a cell of the 4 x 4 grid lies in."""
    return CORNERS[2 * (cell // 8) + (cell % 4) // 2]


def scene(rng, names=tuple(OBJECTS), everything=False, n=0, familiar=False) -> Picture:
    """n (0: 2 to 4) things, one per corner, of different colors; names may repeat, to be counted.

    Questions are about the first thing, whose class is the picture's category, or about everything.
    familiar: with the actions and the weather that the language model is taught about.
    """
    n = n or int(rng.integers(2, 5))
    actions, sky = (FAMILIAR_ACTIONS, FAMILIAR_WEATHER) if familiar else (ACTIONS, WEATHER)
    weather = pick(rng, sky)
    colors = rng.permutation(list(COLORS))[:n]
    corners = rng.permutation(4)[:n]
    first = pick(rng, names)
    things = []
    for k in range(n):
        repeat = k == 0 or rng.random() < 0.4
        name = first if repeat else pick(rng, names)
        dy, dx = rng.integers(0, 2, 2)
        cell = (2 * (corners[k] // 2) + dy) * 4 + 2 * (corners[k] % 2) + dx
        things.append(Thing(name, str(colors[k]), pick(rng, actions), int(cell)))
    canvas = weather_canvas(rng, weather)
    ink = (245, 245, 250) if weather == "night" else (40, 40, 50)
    for t in things:
        y, x = 16 * (t.cell // 4), 16 * (t.cell % 4)
        shift_y, shift_x = rng.integers(0, 2, 2)
        canvas.stamp(action_mark(t.action), y, x, ink)
        canvas.thing(t.name, y + 3 - shift_y, x + 3 - shift_x, t.color)
        canvas.label(y, x, y + 16, x + 16, t.name, t.color, ACTIONS.index(t.action))
    questions = scene_questions(rng, things, 0, weather, names)
    for k in range(1, n if everything else 1):
        others = scene_questions(rng, things, k, weather, names)
        once = ("caption", "causal", "weather", "option-read")
        questions += [q for q in others if q[0] not in once]
    kind, category = ("scene", OBJECTS[first][0]) if names[0] in OBJECTS else ("shapes", 0)
    return Picture(kind, canvas.image(), canvas.labels, questions, things, category)


def shapes(rng, everything: bool = False) -> Picture:
    return scene(rng, SHAPES, everything)


def scene_questions(rng, things, k: int, weather: str, names) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of every kind that the scene allows about thing number k.

    names: what could have been in the scene; wrong options are taken from it.
    """

    def one(*options):
        return pick(rng, options)

    t, n = things[k], len(things)
    same = sum(u.name == t.name for u in things)
    here, colored = f"the object at the {t.corner}", f"the {t.color} object"
    named = f"the {t.name}" if same == 1 else here  # names may repeat; colors and corners do not
    q = {}
    q["recognition"] = one(f"what is {colored}?", f"what do you see at the {t.corner}?"), t.name
    by_name = f"the {t.name}" if same == 1 else colored
    q["location"] = f"where is {one(by_name, colored)}?", t.corner
    q["color"] = f"what color is {one(named, here)}?", t.color
    many = PLURALS.get(t.name, f"{t.name}s")
    total = "how many objects are there?", str(n)
    q["count"] = one((f"how many {many} are there?", str(same)), total)
    q["judge"] = judge_question(rng, things, t, names)
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
    reading = sorted(things, key=lambda u: CORNERS.index(u.corner))
    captions = [f"{u.color} {u.name} {u.action} {u.corner}" for u in reading]
    q["caption"] = "describe the picture.", ", ".join(captions)
    y, x = divmod(t.cell, 4)
    corners = ", ".join(f"{v / 4:.2f}" for v in (x, y, x + 1, y + 1))
    q["box"] = f"give the box of {one(named, colored)}.", f"[{corners}]"
    options = [t.name, *pick_some(rng, [x for x in names if x != t.name], 2)]
    options, letter = lettered(pick_some(rng, options, 3), t.name)
    q["option"] = f"what is {one(colored, here)}? {options}", letter
    q["option-read"] = read_option(rng)
    return [(kind, *qa) for kind, qa in q.items()]


def judge_question(rng, things, t: Thing, names) -> tuple[str, str]:
    """Presence, color, corner or number: the statement is true half of the time."""
    true, n = rng.random() < 0.5, len(things)
    name, color, corner, number = t.name, t.color, t.corner, n
    if not true:
        drawn = {u.name for u in things}
        name = pick(rng, [x for x in names if x not in drawn])
        color = pick(rng, [c for c in COLORS if c != t.color])
        corner = pick(rng, [c for c in CORNERS if c != t.corner])
        number = pick(rng, [m for m in (2, 3, 4) if m != n])
    statements = (
        f"is there a {name}?",
        f"is the object at the {t.corner} {color}?",
        f"is the {t.color} object at the {corner}?",
        f"are there {number} objects?",
    )
    return pick(rng, statements), "yes" if true else "no"


def read_option(rng) -> tuple[str, str]:
    """Find a word or its letter in a list: how multiple choice works, without the picture.

    It also makes the model write every word that any stage will ask for, out of context.
    """
    uses = dict.fromkeys(word for _, kind, use in OBJECTS.values() for word in (kind, use))
    words = (*OBJECTS, *SHAPES, *COLORS, *ACTIONS, *WEATHER, *LANDS, *uses, *WORDS)
    options = pick_some(rng, dict.fromkeys(words), int(rng.integers(2, 5)))
    answer = pick(rng, options)
    options, letter = lettered(options, answer)
    if rng.random() < 0.5:
        return f"which letter is {answer}? {options}", letter
    return f"what is option {letter}? {options}", answer


# ---- 4. The other kinds of pictures: documents, charts, slides, maps, roads, diagrams, windows ---


def sign(rng) -> Picture:
    """One to three boards, each with a word or a number, each of its own color."""
    canvas = Canvas((205, 200, 190), "paper")
    n = int(rng.integers(1, 4))
    rows = sorted(pick_some(rng, (0, 2, 4, 6), n))
    colors = pick_some(rng, COLORS, n)
    lines = [pick(rng, WORDS) if rng.random() < 0.6 else str(rng.integers(21, 100)) for _ in rows]
    for row, color, line in zip(rows, colors, lines):
        y, width = row * 8, len(line) * 8
        x = int(rng.integers(0, GRID - len(line) + 1)) * 8
        canvas.box(y, max(x - 2, 0), y + 13, min(x + width + 2, SIDE), COLORS[color])
        canvas.label(y, x, y + 16, x + width, "board", color)
        canvas.text(line.upper(), row, x // 8, color=color)
    k = int(rng.integers(n))
    what = "number" if lines[k].isdigit() else "word"
    boards = ", ".join(f"{color} {line}" for color, line in zip(colors, lines))
    questions = [
        ("read", f"what is written on the {colors[k]} sign?", lines[k]),
        ("sign-color", f"what color is the sign with the {what} {lines[k]}?", colors[k]),
        ("sign-count", "how many signs are there?", str(n)),
        ("read-all", "read every sign.", boards),
    ]
    return Picture("sign", canvas.image(), canvas.labels, questions)


def arithmetic(rng) -> Picture:
    """a + b or a - b on paper, one digit each."""
    canvas = Canvas((246, 244, 236), "paper")
    for y in range(6, SIDE, 8):
        canvas.pixels[y] = (205, 215, 232)
    a, b, plus = int(rng.integers(0, 10)), int(rng.integers(0, 10)), rng.random() < 0.5
    if not plus and b > a:
        a, b = b, a
    row, column = int(rng.integers(0, 8)), int(rng.integers(0, 5))
    canvas.text(f"{a}{'+' if plus else '-'}{b}=", row, column, (30, 40, 120))
    ask = pick(rng, ("what is the result?", "solve the problem."))
    questions = [
        ("sum", ask, str(a + b if plus else a - b)),
        ("sum-first", "what is the first number?", str(a)),
        ("sum-second", "what is the second number?", str(b)),
    ]
    return Picture("sum", canvas.image(), canvas.labels, questions)


def bars(rng) -> Picture:
    """A bar chart: 3 or 4 bars, all of different color and height (1 to 6 units)."""
    canvas = Canvas((250, 250, 250), "paper")
    n = int(rng.integers(3, 5))
    colors = pick_some(rng, COLORS, n)
    heights = [1 + h for h in pick_some(rng, range(6), n)]
    for u in range(1, 7):
        canvas.pixels[56 - 8 * u] = (215, 215, 220)
    for k in range(n):
        x, top = 8 + 14 * k, 56 - 8 * heights[k]
        canvas.box(top, x, 56, x + 10, COLORS[colors[k]])
        canvas.label(top, x, 56, x + 8, "bar", colors[k], heights[k])
    canvas.box(56, 4, 58, 62, (40, 40, 50))
    canvas.box(4, 4, 58, 6, (40, 40, 50))
    canvas.label(56, 0, 64, 64, "axis")
    k = int(rng.integers(n))
    options = pick_some(rng, colors, 3)
    options, letter = lettered(options, max(options, key=lambda c: heights[colors.index(c)]))
    word, at = pick(rng, (("tallest", np.argmax(heights)), ("shortest", np.argmin(heights))))
    questions = [
        ("bar-extreme", f"which bar is the {word}?", colors[at]),
        ("bar-value", f"what is the value of the {colors[k]} bar?", str(heights[k])),
        ("bar-count", "how many bars are there?", str(n)),
        ("bar-option", f"which bar is taller? {options}", letter),
    ]
    return Picture("bars", canvas.image(), canvas.labels, questions)


def candles(rng) -> Picture:
    """A candlestick chart of 7 days; green closes higher, red closes lower."""
    canvas = Canvas((24, 28, 36), "paper")
    for y in range(8, SIDE, 16):
        canvas.pixels[y] = (46, 52, 62)
    trend = pick(rng, ("up", "down", "flat"))
    slope = {"up": -5.0, "down": 5.0, "flat": 0.0}[trend]
    up = rng.random(7) < {"up": 0.65, "down": 0.35, "flat": 0.5}[trend]
    colors = ["green" if higher else "red" for higher in up]
    for k in range(7):
        middle = 32 + slope * (k - 3) + rng.uniform(-3, 3)
        half, wick = rng.uniform(3, 6), rng.uniform(2, 5)
        x, y0, y1 = 4 + 8 * k, int(middle - half), int(middle + half)
        canvas.box(int(y0 - wick), x + 2, int(y1 + wick), x + 3, (190, 195, 200))
        canvas.box(y0, x, y1, x + 6, COLORS[colors[k]])
        canvas.label(y0, x, y1, x + 6, "candle", colors[k])
    day, at = pick(rng, (("last", 6), ("first", 0)))
    questions = [
        ("trend", pick(rng, ("what is the trend?", "where does the price go?")), trend),
        ("candle-color", f"what color is the {day} candle?", colors[at]),
        ("candle-count", "how many green candles are there?", str(int(up.sum()))),
    ]
    return Picture("candles", canvas.image(), canvas.labels, questions)


STAINS = {"pink": (240, 205, 220), "blue": (205, 215, 240), "yellow": (242, 232, 196)}


def slide(rng) -> Picture:
    """A stained slide with 1 to 6 cells, healthy (small) or sick (large and dark)."""
    stain = pick(rng, tuple(STAINS))
    canvas = Canvas(STAINS[stain], "tissue")
    canvas.pixels += rng.normal(0, 5, (SIDE, SIDE, 1))
    n = int(rng.integers(1, 7))
    cells, sick = rng.permutation(16)[:n], rng.random(n) < 0.4
    for cell, bad in zip(cells, sick):
        y, x = 16 * (cell // 4), 16 * (cell % 4)
        size, color = (14, (92, 40, 120)) if bad else (9, (170, 110, 190))
        canvas.stamp(sprite("circle", size)[0], y + 8 - size // 2, x + 8 - size // 2, color)
        canvas.stamp(sprite("circle", 4)[0], y + 6, x + 6, (50, 15, 70))
        canvas.label(y, x, y + 16, x + 16, "nucleus", state=1 + int(bad))
    questions = [
        ("cell-count", "how many cells are there?", str(n)),
        ("cell-sick", "how many sick cells are there?", str(int(sick.sum()))),
        ("tumor", "is there a tumor?", "yes" if sick.any() else "no"),
        ("stain", "which stain is used?", stain),
    ]
    if n == 1:
        questions.append(("cell-where", "where is the cell?", corner_of(cells[0])))
    return Picture("slide", canvas.image(), canvas.labels, questions)


LAND_COLORS = {
    "water": (70, 130, 200),
    "forest": (50, 110, 60),
    "field": (170, 200, 110),
    "town": (195, 190, 185),
    "sand": (230, 212, 160),
}


def aerial(rng) -> Picture:
    """Land from above: one kind of land per corner, one to three houses in each town."""
    canvas = Canvas((150, 190, 110), "land field")
    lands = [pick(rng, LANDS) for _ in range(4)]
    houses = 0
    for k, land in enumerate(lands):
        y, x = 32 * (k // 2), 32 * (k % 2)
        canvas.box(y, x, y + 32, x + 32, LAND_COLORS[land])
        canvas.label(y, x, y + 32, x + 32, f"land {land}")
        if land == "forest":
            for _ in range(22):
                yy, xx = y + int(rng.integers(0, 26)), x + int(rng.integers(0, 26))
                canvas.stamp(sprite("circle", 7)[0], yy, xx, (30, 84, 45))
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
    land = pick(rng, LANDS)
    questions = [
        ("land", f"what covers the {CORNERS[k]}?", lands[k]),
        ("house-count", "how many houses are there?", str(houses)),
        ("land-judge", f"is there {land} in the picture?", "yes" if land in lands else "no"),
    ]
    return Picture("aerial", canvas.image(), canvas.labels, questions)


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
    lights = ("red", "yellow", "green")
    light = pick(rng, lights)
    x = int(pick(rng, (4, 52)))
    canvas.box(4, x, 25, x + 8, (30, 30, 34))
    for k, color in enumerate(lights):
        shine = COLORS[color] if color == light else (75, 75, 80)
        canvas.stamp(sprite("circle", 6)[0], 5 + 7 * k, x + 1, shine)
    canvas.label(0, x - 4 if x > 4 else 0, 24, x + 8, "light", light)
    side = pick(rng, ("left", "right", "none"))
    if side != "none":
        color, left = pick(rng, tuple(COLORS)), 16 if side == "left" else 32
        canvas.thing("car", 40, 16 if side == "left" else 34, color, 15)
        canvas.label(40, left, 56, left + 16, "vehicle", color)
    walker = rng.random() < 0.4
    if walker:
        canvas.stamp(sprite("circle", 5)[0], 26, 30, (240, 200, 160))
        canvas.box(31, 30, 38, 35, (60, 60, 150))
        canvas.box(38, 30, 42, 32, (40, 40, 60))
        canvas.box(38, 33, 42, 35, (40, 40, 60))
        canvas.label(24, 24, 40, 40, "walker")
    act = "stop" if light == "red" or walker else {"yellow": "slow", "green": "go"}[light]
    questions = [
        ("light", "what color is the traffic light?", light),
        ("drive", "what should the driver do?", act),
        ("car-side", "on which side is the car?", side),
        ("walker", "is there a person on the road?", "yes" if walker else "no"),
    ]
    if side != "none":
        questions.append(("car-color", "what color is the car ahead?", color))
    return Picture("road", canvas.image(), canvas.labels, questions)


ARROWS = ((8, 28, 0), (28, 48, 3), (48, 28, 2), (28, 8, 1))  # y, x, quarter turns (clockwise ring)


def diagram(rng) -> Picture:
    """Four lettered corners, a shape in each, joined by arrows in a ring (one direction)."""
    canvas = Canvas((252, 250, 244), "paper")
    letters = pick_some(rng, "ABCDEFGH", 4)
    names, colors = pick_some(rng, SHAPES, 4), pick_some(rng, COLORS, 4)
    clockwise = rng.random() < 0.5
    for k, (y, x) in enumerate(((0, 0), (0, 40), (40, 0), (40, 40))):
        canvas.box(y, x, y + 24, x + 24, (228, 232, 240))
        canvas.label(y, x, y + 24, x + 24, "node")
        canvas.text(letters[k], y // 8, x // 8)
        canvas.thing(names[k], y + 9, x + 9, colors[k])
        letter = 1 + LETTERS.index(letters[k])
        canvas.label(y + 8, x + 8, y + 24, x + 24, names[k], colors[k], letter)
    arrow = np.zeros((8, 8), np.float32)
    arrow[3:5, 0:7] = 1
    arrow[1:7, 4] = arrow[2:6, 5] = arrow[3:5, 6] = 1
    for y, x, turn in ARROWS:
        turn = turn if clockwise else (turn + 2) % 4
        canvas.stamp(np.rot90(arrow, turn), y, x, (60, 60, 70))
        y0, x0 = y // 8 * 8, x // 8 * 8
        canvas.label(y0, x0, y0 + 8, x0 + 8, "arrow", state=1 + turn)
    k = int(rng.integers(4))
    what = pick(rng, (names[k], f"{colors[k]} shape"))
    questions = [
        ("turn", "which way do the arrows turn?", "right" if clockwise else "left"),
        ("node-shape", f"which shape is at {letters[k]}?", names[k]),
        ("node-color", f"what color is the shape at {letters[k]}?", colors[k]),
        ("node-letter", f"which letter marks the {what}?", letters[k]),
    ]
    return Picture("diagram", canvas.image(), canvas.labels, questions)


def window(rng) -> Picture:
    """A window with a title bar and two or three buttons."""
    desktop = pick(rng, ((40, 90, 120), (90, 70, 110), (60, 100, 80)))
    canvas = Canvas(desktop, "desktop")
    canvas.box(2, 2, 62, 62, (242, 242, 244))
    canvas.label(0, 0, 64, 64, "frame")
    canvas.box(2, 2, 7, 62, (70, 80, 110))
    canvas.label(0, 0, 8, 64, "title")
    n = int(rng.integers(2, 4))
    rows = sorted(pick_some(rng, (1, 3, 5), n))
    words, colors = pick_some(rng, BUTTONS, n), pick_some(rng, COLORS, n)
    for k, (row, word, color) in enumerate(zip(rows, words, colors)):
        column = int(rng.integers(1, 4))
        y, x = row * 8, column * 8
        canvas.box(y, x - 2, y + 12, x + 8 * len(word) + 2, COLORS[color])
        canvas.text(word.upper(), row, column, color=color)
        canvas.labels[2, row, column : column + len(word)] = 1 + k
    k = int(rng.integers(n))
    order = ("first", "second", "third")
    buttons = ", ".join(f"{color} {word}" for color, word in zip(colors, words))
    questions = [
        ("button-text", f"what does the {colors[k]} button say?", words[k]),
        ("button-color", f"what color is the {words[k]} button?", colors[k]),
        ("button-order", f"which button is {words[k]}?", order[k]),
        ("button-count", "how many buttons are there?", str(n)),
        ("read-all", "read every button.", buttons),
    ]
    return Picture("window", canvas.image(), canvas.labels, questions)


KINDS = (scene, shapes, sign, arithmetic, bars, candles, slide, aerial, road, diagram, window)

# ---- 5. Looks: how streams change pictures, and the contact sheet --------------------------------

LOOKS = ("lamplight", "negative", "recolored", "noise", "mosaic", "grain", "dusk")


def noisy(rng, image: np.ndarray, sigma: float) -> np.ndarray:
    """An image (values 0..255) as uint8 with Gaussian noise of this standard deviation."""
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def change_look(rng, look: str, image: np.ndarray) -> np.ndarray:
    """A picture [64, 64, 3] uint8 in one of the LOOKS; any other name leaves it as it is."""
    if look == "lamplight":  # three quarters of its green and half of its blue
        return (image * (1, 0.75, 0.5)).astype(np.uint8)
    if look == "negative":
        return 255 - image
    if look == "recolored":  # false colors: red looks blue, green looks red, blue looks green
        return np.ascontiguousarray(image[..., [1, 2, 0]])
    if look == "noise":  # nearly gray, as from an old camera
        gray = image.mean(-1, keepdims=True)
        return noisy(rng, gray + 0.4 * (image - gray), 22)
    if look == "mosaic":
        small = Image.fromarray(image).resize((24, 24), Image.Resampling.BOX)
        return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    if look == "grain":
        return noisy(rng, image, 20)
    if look == "dusk":
        return noisy(rng, 0.75 * image, 6)
    return image


def contact_sheet(path: Path, examples: int = 3, zoom: int = 2) -> None:
    """Examples of every kind of picture and of every look, two rows side by side."""
    rng = np.random.default_rng(7)
    rows = {draw.__name__: [draw(rng).image for _ in range(examples)] for draw in KINDS}
    for look in LOOKS:
        rows[look] = [change_look(rng, look, scene(rng).image) for _ in range(examples)]
    gap, label, side = 6, 74, SIDE * zoom
    width = label + examples * (side + gap)
    height = math.ceil(len(rows) / 2) * (side + gap)
    sheet = Image.new("RGB", (2 * width + gap, height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, images) in enumerate(rows.items()):
        x, y = (k % 2) * width, (k // 2) * (side + gap) + gap
        pen.text((x + gap, y + side // 2 - 9), name, "black", font=ImageFont.load_default(13))
        for j, image in enumerate(images):
            large = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (x + label + j * (side + gap), y))
    sheet.save(path)


if __name__ == "__main__":
    contact_sheet(HERE / "contact_sheet.png")
