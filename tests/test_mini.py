"""The drawn world: true labels, right answers, released formats. The recipe of the tiny LLaVA."""

import draw
import numpy as np
import pretrain
import pytest
import streams
import torch
from safetensors.torch import load_file

import data


def pictures(kind):
    rng = np.random.default_rng(3)
    return [kind(rng) for _ in range(20)]


def answers(picture):
    return {kind: answer for kind, _, answer in picture.questions}


@pytest.mark.parametrize("kind", draw.KINDS, ids=lambda kind: kind.__name__)
def test_patches_labelled_with_a_color_show_it(kind):
    for picture in pictures(kind):
        for k, rgb in enumerate(draw.COLORS.values(), start=1):
            labelled = np.kron(picture.labels[1] == k, np.ones((8, 8), bool))  # [64, 64] pixels
            shown = (picture.image == rgb).all(-1)
            assert (shown & labelled).any() or not labelled.any()


def test_scenes_answer_what_is_where():
    """The labels of a corner name one thing of one color: what the questions ask for."""
    for picture in pictures(draw.scene):
        answer, (what, color, _) = answers(picture), picture.labels
        rows = slice(0, 4) if "top" in answer["location"] else slice(4, 8)
        columns = slice(0, 4) if "left" in answer["location"] else slice(4, 8)
        assert answer["recognition"] in {draw.WHAT[k] for k in what[rows, columns].flatten()}
        shown = {list(draw.COLORS)[k - 1] for k in color[rows, columns].flatten() if k}
        assert shown == {answer["color"]}
        names = [thing.name for thing in picture.things]
        assert answer["count"] in (str(len(names)), str(names.count(answer["recognition"])))


def test_charts_slides_and_maps_answer_what_is_drawn():
    for picture in pictures(draw.bars):
        _, question, answer = picture.questions[1]
        rgb = draw.COLORS[question.split()[-2]]
        assert answer == str((picture.image == rgb).all(-1).any(1).sum() // 8)  # 8 pixels per unit
    for picture in pictures(draw.slide):
        state = picture.labels[2]  # of 2 x 2 patches per cell: 1 healthy, 2 sick
        assert answers(picture)["cell-count"] == str((state > 0).sum() // 4)
        assert answers(picture)["cell-sick"] == str((state == 2).sum() // 4)
    for picture in pictures(draw.aerial):
        assert answers(picture)["house-count"] == str(picture.labels[2].sum() // 4)


@pytest.mark.parametrize("name", streams.STREAMS)
def test_streams_are_deterministic_and_read_like_released_ones(name, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "TASK_SIZE", {"train": 6, "test": 4})
    for folder in (tmp_path / "first", tmp_path / "again"):
        rng = np.random.default_rng(0)
        if name in streams.TASKS:
            streams.draw_tasks(rng, folder, name)
        else:
            (streams.draw_domains if name == "domains" else streams.draw_vqa)(rng, folder, 0.02)
    assert streams.digest(tmp_path / "first") == streams.digest(folder)
    parser = data.common_flags("test", "")
    parser.set_defaults(**data.TINY)
    stages = data.load_stream(parser.parse_args(["--stream", name, "--data", str(folder)])).stages
    assert [stage.name for stage in stages] == list(data.STREAMS[name].stages)
    for stage in stages:
        assert len(stage.train) > 1 and len(stage.test) > 1
        assert data.load_image(stage.test[0].image).size == (64, 64)
        letters = {sample.answer for sample in stage.train} <= set("ABC")
        assert letters or stage.metric not in ("letter", "option"), stage.name
    if name == "vqacl":
        groups = {sample.group for stage in stages for sample in stage.train}
        assert groups == {"G1", "G2", "G3", "G4", "G5"}


def test_the_recipe_makes_the_shipped_tokenizer_and_model():
    torch.manual_seed(0)
    model, processor = pretrain.build_model()
    tokenizer, shipped = processor.tokenizer, pretrain.TINY / "tokenizer.json"
    assert tokenizer.backend_tokenizer.to_str(pretty=True) == shipped.read_text()
    weights = load_file(pretrain.TINY / "model.safetensors")
    shapes = [sorted(v.shape for v in w.values()) for w in (model.state_dict(), weights)]
    assert shapes[0] == shapes[1]
    for text in ("what color is the car? red", "Wie heißt das? 東京 🙂", "x = 3.14; y\t!"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_table_in_the_readme_is_that_of_the_records():
    assert pretrain.table() in (draw.HERE / "README.md").read_text()
