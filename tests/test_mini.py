"""The mini world: deterministic, true to the released formats, readable by its own tokenizer."""

import argparse
import hashlib
import json
import re

import numpy as np
import pytest

import data
import mini
from data import QUESTION_TYPES, object_group


def digest(folder):
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two drawings of each kind of stream, a tenth of the usual size."""
    folders = {}
    for name, draw in (("vqa", mini.draw_vqa), ("domains", mini.draw_domains)):
        folders[name] = [tmp_path_factory.mktemp(f"{name}{k}") for k in range(3)]
        for folder, seed in zip(folders[name], (0, 0, 1), strict=True):
            draw(np.random.default_rng(seed), folder, 0.05)
    return folders


@pytest.mark.parametrize("name", ["vqa", "domains"])
def test_same_seed_same_bytes(small, name):
    first, again, other = map(digest, small[name])
    assert first == again != other


def test_vqa_files_have_the_released_records(small):
    folder = small["vqa"][0]
    categories = json.loads((folder / "ImgId_cate_map.json").read_text())
    raw = json.loads((folder / "vqa" / "v2_mscoco_train2014_annotations.json").read_text())
    humans = {row["question_id"]: row for row in raw["annotations"]}
    for kind in QUESTION_TYPES:
        path = folder / "vqa" / "Partition_Q" / f"karpathy_train_q_{kind}.json"
        for record in json.loads(path.read_text()):
            assert list(record) == sorted(record)
            assert {
                "answer_type",
                "img_id",
                "label",
                "question_id",
                "question_type",
                "sent",
            } == set(record)
            row = humans[record["question_id"]]
            assert len(row["answers"]) == 10
            assert max(record["label"], key=record["label"].get) == row["multiple_choice_answer"]
            assert record["img_id"] in categories


def test_object_classes_fill_the_groups_of_both_readings():
    for reading, per_group in (("paper", 3), ("released", 1)):
        groups = [object_group(coco, reading) for coco, _, _ in mini.OBJECTS.values()]
        assert all(groups.count(f"G{k}") >= per_group for k in range(1, 6)), (reading, groups)


def test_questions_are_answered_by_the_drawing():
    """A question about a place or a color must have one true answer: look at the labels."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        picture = mini.scene(rng)
        asked = {kind: (q, a) for kind, q, a in picture.questions}
        what, color, _ = picture.labels
        _, place = asked["location"]
        rows = slice(0, 4) if "top" in place else slice(4, 8)
        columns = slice(0, 4) if "left" in place else slice(4, 8)
        corner = {mini.WHAT[k] for k in what[rows, columns].flatten()}
        assert asked["recognition"][1] in corner
        shown = {list(mini.COLORS)[k - 1] for k in color[rows, columns].flatten() if k}
        assert {asked["color"][1]} == shown  # one thing a quadrant


def test_tokenizer_reads_and_writes_anything():
    tok = mini.build_tokenizer()
    for text in ("what color is the car? red", "Wie heißt das? 東京 🙂", "x = 3.14; y\t!"):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert tok.decode(ids) == text
    for word in (*mini.COLORS, *mini.OBJECTS, *mini.SHAPES, *mini.WORDS, *mini.LETTERS):
        assert len(tok(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


def test_packed_questions_equal_single_prompts():
    """Packing is only for speed: logits of a packed turn equal those of the prompt alone."""
    import torch

    torch.manual_seed(0)
    model, processor = mini.build_model()
    model.eval()
    packer = mini.Packer(processor)
    turns = [("what color is the car?", "red"), ("how many cups are there?", "3")]
    features = torch.randn(1, 64, 128)
    with torch.no_grad():
        both, said = mini._packed_logits(model, packer([turns]), features)
        alone = [mini._packed_logits(model, packer([[turn]]), features) for turn in turns]
    assert said.tolist() == [token for _, tokens in alone for token in tokens.tolist()]
    assert torch.allclose(both, torch.cat([logits for logits, _ in alone]), atol=1e-5)


def forms(answer):
    """What kind of answer this is, as a reader would say it."""
    if isinstance(answer, float):
        return "box"
    if re.fullmatch("[A-F]", answer):
        return "letter"
    return "number" if answer.isdigit() else "caption" if " " in answer else "word"


@pytest.mark.parametrize("stream", ["ucit", "trigap", "coin"])
def test_stages_differ_in_picture_instruction_or_form_of_answer(stream, monkeypatch, tmp_path):
    """Drawn small and read as the released files are; no two stages are alike in all three."""
    monkeypatch.setitem(mini.TASK_SIZE, "train", 24)
    monkeypatch.setitem(mini.TASK_SIZE, "test", 12)
    mini.draw_tasks(np.random.default_rng(0), tmp_path, stream)
    parser = argparse.ArgumentParser()
    data.add_common_flags(parser)
    args = parser.parse_args(["--stream", stream, "--data", str(tmp_path)])
    kinds, metrics = set(), {"caption": "caption", "iou": "box", "letter": "letter"}
    for stage in data.load_stream(args).stages:
        assert len(stage.train) == 24 and len(stage.test) == 12
        boxes = stage.metric == "iou"
        form = {forms(0.5 if boxes else s.answer) for s in stage.train}
        assert form == {metrics.get(stage.metric)} or stage.metric not in metrics, stage.name
        instruction = stage.train[0].question.split("\n")[-1]
        if len({s.question.split("\n")[-1] for s in stage.train}) > 1:
            instruction = None  # each question is its own
        pictures = np.stack([np.asarray(data.load_image(s.image)) for s in stage.train])
        look = tuple((pictures.mean((0, 1, 2)) / 16).round().astype(int))
        kinds.add((instruction, tuple(sorted(form)), look))
    assert len(kinds) == len(mini.TASKS[stream]) == len(data.STREAMS[stream].stages)
