"""Scorers of the instruction streams: hand-made cases, the references' quirks, other packages."""

import json

import numpy as np
import pytest
from anls import anls_score
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import data
import eval as evaluation
from eval import score


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "wanted"),
    [
        ("letter", "B", ["B"], 1),
        ("letter", "b. star", ["B"], 1),
        ("letter", "The answer is C .", ["C"], 1),
        ("letter", "Because", ["B"], 0),
        ("letter", "B)", ["B"], 0),  # the reference reads "B", "B. ..." and words of one letter
        ("option", "b", ["B"], 1),
        ("option", "(B)", ["B"], 1),
        ("option", "I think the answer is B.", ["B"], 1),
        ("option", "A button that opens: C", ["C"], 1),
        ("option", "A button", ["A"], 0),
        ("option", "A. a button", ["A"], 1),
        ("option", "C is right", ["C"], 1),
        ("option", "", ["A"], 0),
        ("same", " star", ["Star"], 1),
        ("same", "star.", ["star"], 0),
        ("exact", "star.", ["Star"], 1),
        ("textvqa", "2", ["two"] * 4 + ["three"], 1),
        ("vqa", "2", ["two"] * 4 + ["three"], 0),
        ("textvqa", "stop", ["The stop!", "stop", "go"], 0.4444),
        ("letter", "", ["A"], 0),
        ("contains", "a tabby cat", ["cat"], 1),
        ("contains", "cat", ["tabby cat"], 1),
        ("contains", "", ["cat"], 0),
        ("contains-legacy", "", ["cat"], 1),
        ("iou", "[0.10, 0.10, 0.50, 0.50]", ["[0.10, 0.10, 0.50, 0.40]"], 1),
        ("iou", "[0.00, 0.00, 0.50, 0.50]", ["[0.00, 0.00, 0.50, 1.00]"], 0),  # IoU is just 0.5
        ("iou", "no idea", ["[0.00, 0.00, 0.50, 1.00]"], 0),
        ("iou", "[0.0, 0.0, 0.2, 0.98]", ["[0.0, 0.5, 0.2, 0.98]"], 0),
        ("iou", "[0.0, 0.0, 0.2, 0.19]", ["[0.0, 0.0, 0.2, 0.19]"], 1),
        ("iou-legacy", "[0.0, 0.0, 0.2, 0.19]", ["[0.0, 0.0, 0.2, 0.19]"], 1),
        ("iou-legacy", "[0.0, 0.0, 0.2, 0.9]", ["[0.0, 0.0, 0.2, 0.9]"], 0),  # 0.9 becomes 0.
        ("anls", "1.0", ["0.28"], 0.25),  # both cases are CRAM's own
        ("anls", "2015", ["2013"], 0.75),
        ("anls_0.5", "1.0", ["0.28"], 0),
        ("anls_0.5", "2015", ["2013", "2015"], 1),
        ("relaxed", "95%", ["100"], 0),  # 95% is 0.95
        ("relaxed", "50%", ["0.5"], 1),
        ("relaxed", "96", ["100"], 1),
        ("relaxed", "94.9", ["100"], 0),
        ("relaxed", "1,050", ["1000"], 0),  # no number for the usual program
        ("relaxed", "Yes", ["yes"], 1),
    ],
)
def test_scorers_by_hand(metric, prediction, answers, wanted):
    assert score(metric, prediction, answers) == pytest.approx(wanted, abs=1e-4)


WORDS = "a the red blue cat dog on under table sits runs big small and".split()


def random_captions(n, seed):
    rng = np.random.default_rng(seed)

    def caption():
        return " ".join(rng.choice(WORDS, rng.integers(3, 12)))

    return [{"text": caption(), "answers": [caption() for _ in range(5)]} for _ in range(n)]


def test_caption_scores_equal_the_usual_package(capsys):
    rows = random_captions(40, 1)
    rows[3]["text"] = rows[3]["answers"][2]
    rows[5]["text"] = "cat"
    golds = {k: row["answers"] for k, row in enumerate(rows)}
    texts = {k: [row["text"]] for k, row in enumerate(rows)}
    ours = evaluation.caption_scores(rows)
    wanted, _ = Bleu(4).compute_score(golds, texts, verbose=0)
    for n in range(4):
        assert ours[f"BLEU-{n + 1}"] == pytest.approx(100 * wanted[n], abs=1e-5)
    assert ours["ROUGE-L"] == pytest.approx(100 * Rouge().compute_score(golds, texts)[0], abs=1e-6)
    assert ours["CIDEr"] == pytest.approx(100 * Cider().compute_score(golds, texts)[0], abs=1e-6)
    five = [*(ours[f"BLEU-{n}"] for n in (1, 2, 3, 4)), ours["ROUGE-L"]]
    assert ours["BLEU-ROUGE"] == pytest.approx(np.mean(five))
    assert evaluation.accuracy(rows, "caption") == ours["BLEU-ROUGE"]


def test_anls_equals_the_usual_package():
    rng = np.random.default_rng(2)
    for _ in range(50):
        gold = ["".join(rng.choice(list("ab1 "), rng.integers(1, 7))).strip() or "a" for _ in "xy"]
        said = "".join(rng.choice(list("AB1 "), rng.integers(1, 7))).strip() or "b"
        for metric, threshold in (("anls", 1.01), ("anls_0.5", 0.5)):  # theirs is of the distance
            wanted = anls_score(prediction=said, gold_labels=gold, threshold=threshold)
            assert score(metric, said, gold) == pytest.approx(wanted)


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
    assert load(*flags, "--legacy").stages[0].metric == "iou-legacy"
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
