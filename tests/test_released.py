"""Instruction streams in the layout of their releases are read."""

import json

import pytest

import data


def test_released_folders_are_read(tmp_path, capsys):
    """Two stages of coin and one of ucit in the layout of their releases, quirks included."""
    pixel = tmp_path / "cl_dataset" / "COCO2014" / "1.png"
    pixel.parent.mkdir(parents=True)
    data.Image.new("RGB", (4, 4)).save(pixel)
    root = tmp_path / "playground" / "Instructions_Original"
    turns = [("human", "<image>\nwhere?"), ("gpt", "[0, 0, 1, 1]")]
    train = [{"question_id": "1", "image": "./COCO2014/1.png"}]
    train[0]["conversations"] = [{"from": a, "value": b} for a, b in turns]
    test = {"question_id": 7, "image": "./COCO2014/1.png", "text": "where?", "size": [4, 4]}
    for stage, split, gold in (
        ("Grounding", "test", {"answer_bbox": "[0.1, 0.2, 0.3, 0.4]"}),
        ("TextVQA", "val", {"answer": ["stop", "stop sign"]}),
    ):
        (root / stage).mkdir(parents=True)
        (root / stage / "train.json").write_text(json.dumps(train))
        (root / stage / f"{split}.json").write_text(json.dumps([test | gold]))

    def load(*flags):
        parser = data.argparse.ArgumentParser()
        data.add_common_flags(parser)
        return data.load_stream(parser.parse_args([*flags]))

    flags = ["--stream", "coin", "--data", str(tmp_path), "--order", "Grounding,TextVQA"]
    stream = load(*flags)
    assert [stage.metric for stage in stream.stages] == ["iou", "textvqa"]
    assert stream.stages[0].test[0].answers == ("[0.1, 0.2, 0.3, 0.4]",)
    assert stream.stages[1].test[0].answers == ("stop", "stop sign")
    assert stream.stages[0].train[0].image == pixel
    with pytest.raises(data.InputError, match="GQA is without train data|missing file"):
        load("--stream", "coin", "--data", str(tmp_path), "--order", "GQA")

    stage = tmp_path / "instructions" / "Flickr30k"
    stage.mkdir(parents=True)
    (tmp_path / "datasets").mkdir()
    pixel.rename(tmp_path / "datasets" / "1.png")
    for record in (train[0], test):
        record["image"] = "1.png"
    (stage / "train_brief_4w.json").write_text(json.dumps(train))
    (stage / "test_3000.json").write_text(json.dumps([test | {"answer": "a cat"}]))
    flags = ["--stream", "ucit", "--data", str(tmp_path), "--order", "Flickr30k"]
    assert load(*flags).stages[0].test[0].answers == ("a cat",)
    assert "val_coco_type_3000.json is missing: captions" in capsys.readouterr().out
    more = [{"image_id": 1, "caption": text} for text in ("two cats", "one cat ", "one cat")]
    (stage / "val_coco_type_3000.json").write_text(json.dumps({"annotations": more}))
    stream = load(*flags)
    assert stream.stages[0].metric == "caption"
    assert stream.stages[0].test[0].answers == ("two cats", "one cat", "one cat")
