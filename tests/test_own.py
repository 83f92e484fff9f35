"""A reader's own pictures: with the defaults, plain LoRA learns every stage and forgets."""

import json

import numpy as np
import pytest
from conftest import run_here
from PIL import Image
from sklearn.datasets import load_digits

from eval import read_run

RGB = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}


def scans():
    """Handwritten digits, 8 x 8 pixels: is the number even or odd?"""
    digits = load_digits()
    for pixels, number in zip(digits.images, digits.target):
        image = Image.fromarray(np.uint8(255 - 15.9 * pixels))
        yield image, "Is the number even or odd?", ("even", "odd")[number % 2]


def shapes():
    """A colored square on white: what is its color?"""
    rng = np.random.default_rng(0)
    while True:
        color, (x, y), side = rng.choice(list(RGB)), rng.integers(0, 40, 2), rng.integers(20, 50)
        image = Image.new("RGB", (120, 90), (255, 255, 255))
        image.paste(RGB[color], (x, y, x + side, y + side))
        yield image, "What is the color of the shape?", str(color)


@pytest.fixture
def folder(tmp_path):
    for name, pictures in {"digits": scans(), "shapes": shapes()}.items():
        (tmp_path / name).mkdir()
        for split, n in (("train", 200), ("test", 40)):
            records = []
            for k, (image, question, answer) in zip(range(n), pictures):
                image.save(tmp_path / name / f"{split}{k}.png")
                record = {"id": k, "image": f"{split}{k}.png"}
                turns = [{"from": "human", "value": f"<image>\n{question}"}]
                turns += [{"from": "gpt", "value": answer}]
                test = {"text": question, "answer": answer}
                records.append(record | ({"conversations": turns} if split == "train" else test))
            (tmp_path / name / f"{split}.json").write_text(json.dumps(records))
    return tmp_path


def test_new_pictures_are_learned_and_forgotten(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "run"
    run_here("baselines", ["--stream", str(folder), "--threads", "2"], out)
    metrics = read_run(out)["metrics"]
    assert metrics["MFT"] > 60 and metrics["AF"] > 20, metrics
