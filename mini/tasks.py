"""What the stages of the drawn instruction streams ask: UCIT, TriGap, CoIN, MLLM-CL's DCL and ACL.

Every stage has its own pictures, instruction and form of answer, like the dataset it is named
after. A stage is a function example(rng) -> (image, question, answers): image [64, 64, 3] uint8;
the first answer is taught, all of them are accepted; a box is [x0, y0, x1, y1] in 0..1. Stages of
"acl" are functions example(rng, test), because their tests are drawn differently: MLLM-CL's come
from other sources than its training data.
"""

import json
from functools import partial

import draw
from draw import SHAPES, bars, candles, change_look, noisy, pick, pick_some, scene, shapes, sign

WORD, LETTER = "give the word.", "give the letter."
NUMBER, CAPTION = "give the number.", "describe the picture."
TRENDS = ("up", "down", "flat")
STYLES = ("negative", "recolored", "noise", "mosaic")  # of renditions


def asked(kind_of_picture, *kinds: str, ending: str = "", look: str = "plain"):
    """An example function: one of these kinds of questions, about a picture in this look.

    A picture without the kind that was picked is asked the first kind.
    """

    def example(rng):
        picture = kind_of_picture(rng)
        question, answer = picture.ask(pick(rng, kinds), kinds[0])
        return change_look(rng, look, picture.image), f"{question}{ending}", [answer]

    return example


asked_word, asked_number = partial(asked, ending=f"\n{WORD}"), partial(asked, ending=f"\n{NUMBER}")


def choose(kind_of_picture, kind: str, others, ending: str = f"\n{LETTER}"):
    """An example function: a question with three options, whose answer is a letter."""

    def example(rng):
        picture = kind_of_picture(rng)
        question, answer = picture.ask(kind)
        wrong = pick_some(rng, [o for o in others if o != answer], 2)
        options, letter = draw.lettered(pick_some(rng, [answer, *wrong], 3), answer)
        return picture.image, f"{question} {options}{ending}", [letter]

    return example


def tested_in(look: str, example):
    """An example function for "acl": training pictures as they are, tests in another look."""

    def split_example(rng, test: bool):
        image, question, answers = example(rng)
        changed = change_look(rng, look, image)
        return changed if test else image, question, answers

    return split_example


def annotators(rng, kind: str, answer: str, words=tuple(draw.OBJECTS)) -> list[str]:
    """Answers of ten people; to every tenth question one or two of them give another answer.

    words: what those may answer where the kind of question does not say it.
    """
    others = {
        "location": draw.CORNERS,
        "judge": ("yes", "no"),
        "count": "1234",
        "action": draw.ACTIONS,
        "color": tuple(draw.COLORS),
        "causal": draw.WEATHER[1:],
        "type": tuple(dict.fromkeys(kind for _, kind, _ in draw.OBJECTS.values())),
        "commonsense": tuple(dict.fromkeys(use for _, _, use in draw.OBJECTS.values())),
    }.get(kind, words)
    odd = int(rng.integers(1, 3)) if rng.random() < 0.1 else 0
    return [answer] * (10 - odd) + [pick(rng, others)] * odd


def imagenet(rng):
    picture = scene(rng, n=1)
    return picture.image, f"what is the object?\n{WORD}", [picture.things[0].name]


def imagenet_r(rng):
    """Renditions: one thing, in false colors or on a bad print."""
    image, question, answers = imagenet(rng)
    return change_look(rng, pick(rng, STYLES), image), question, answers


def arxivqa(rng):
    if rng.random() < 0.5:
        return asked(bars, "bar-option", ending=f"\n{LETTER}")(rng)
    return choose(candles, "trend", TRENDS)(rng)


def vizwiz_caption(rng):
    """Describe a sign on a noisy photo."""
    picture = sign(rng)
    question, line = picture.ask("read")
    color = question.split()[5]
    kind = "number" if line.isdigit() else "word"
    captions = [f"a {color} sign with the {kind} {line}", f"the {kind} {line} on a {color} sign"]
    return noisy(rng, picture.image, 12), CAPTION, captions


def iconqa(rng):
    picture = shapes(rng)
    kind, others = pick(rng, (("recognition", SHAPES), ("count", "1234")))
    return choose(lambda rng: picture, kind, others)(rng)


def clevr_math(rng):
    """How many are left when those of one shape are gone?"""
    picture = shapes(rng)
    name = picture.things[0].name
    left = sum(t.name != name for t in picture.things)
    many = draw.PLURALS.get(name, f"{name}s")
    question = f"how many objects are there with no {many}?\n{NUMBER}"
    return picture.image, question, [str(left)]


def flickr30k(rng):
    picture = scene(rng, n=2)
    first, second = (f"a {t.color} {t.name} {t.action}" for t in picture.things)
    return picture.image, CAPTION, [f"{first}, {second}", f"{second}, {first}"]


def textvqa(rng):
    picture = sign(rng)
    question, answer = picture.ask("read")
    return picture.image, f"{question}\n{WORD}", annotators(rng, "read", answer, draw.WORDS)


def grounding(rng):
    picture = scene(rng)
    question, answer = picture.ask("box")
    return picture.image, question, json.loads(answer)


def finance(rng):
    """Yes or no, or the letter of an option, as in StockQA."""
    picture = candles(rng)
    question, trend = picture.ask("trend")
    guess = pick(rng, TRENDS)
    if rng.random() < 0.5:
        return picture.image, f"is the trend {guess}?", ["yes" if guess == trend else "no"]
    options, letter = draw.lettered(pick_some(rng, TRENDS, 3), trend)
    return picture.image, f"{question} {options}", [letter]


def counting(rng, test: bool):
    """Count shapes; in tests cars, cats and cups."""
    picture = scene(rng) if test else shapes(rng)
    question, answer = picture.ask("count")
    return picture.image, question, [answer]


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
        "PMCVQA": choose(draw.slide, "cell-count", "123456"),
        "DocVQA": asked_word(sign, "read"),
        "ChartQA": asked_number(bars, "bar-value"),
        "IconQA": iconqa,
        "InfographicVQA": asked_word(draw.window, "button-text"),
        "ArxivQA": arxivqa,
        "Roadside": asked_word(draw.road, "drive", "walker", "car-side"),
        "ChemVQA": asked_word(draw.diagram, "node-shape", "node-color"),
        "FloodNetVQA": asked_word(draw.aerial, "land", "house-count", "land-judge"),
        "CLEVR": asked_word(shapes, "color", "count", "judge"),
    },
    "coin": {
        "ScienceQA": choose(draw.diagram, "node-shape", SHAPES),
        "TextVQA": textvqa,
        "ImageNet": imagenet,
        "GQA": asked_word(scene, "judge", "location", "color"),
        "VizWiz": asked_word(scene, "recognition", "action", "weather", look="grain"),
        "Grounding": grounding,
        "VQAv2": asked_word(scene, *draw.VQA_TYPES),
        "OCRVQA": asked_word(draw.window, "button-text", "button-color"),
    },
    # New to the base model: the looks and, for Fin, the form of the answers. Answers name the
    # ORIGINAL colors.
    "dcl": {
        "RS": asked(draw.aerial, "land", "house-count", "land-judge", look="recolored"),
        "Med": asked(draw.slide, "cell-count", "cell-sick", "tumor", "stain", look="negative"),
        "AD": asked(draw.road, "drive", "light", "car-side", "walker", look="lamplight"),  # sunset
        "Sci": asked(draw.diagram, "node-shape", "node-color", "turn", look="lamplight"),
        "Fin": finance,
    },
    # Signs at dusk, sums on a blackboard, objects for shapes, windows by lamplight.
    "acl": {
        "OCR": tested_in("dusk", asked(sign, "read")),
        "Math": tested_in("negative", asked(draw.arithmetic, "sum", "sum-first", "sum-second")),
        "VP": counting,
        "APP": tested_in("lamplight", choose(draw.window, "button-text", draw.BUTTONS, "")),
    },
}
