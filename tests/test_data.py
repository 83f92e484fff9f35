"""data.py and benchmarks.py: readers, groups, orders, prompts, loss masks, and bad input."""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

import asr
import benchmarks
import data
import files
from data import InputError
from tokens import Collator, build_prompt

# Fixtures: two-record streams in both layouts, a small tokenizer, a folder that looks like a model


STAGES = ["color", "count"]
POTTED_PLANT, COW = 64, 21  # raw COCO ids; positions 58 (G1) and 19 (G2) among the 80 classes
COLOR_TRAIN = "vqa/Partition_Q/karpathy_train_q_color.json"
VAL_GOLDS = "vqa/v2_mscoco_val2014_annotations.json"


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)


def parse(*words):
    return data.common_flags("asr.py", "ASR").parse_args([str(word) for word in words])


def load(*words):
    args = parse(*words)
    given = {key: value for key, value in vars(args).items() if value is not None}
    return data.load_stream(argparse.Namespace(**vars(args) | data.TINY | given))


def categories(one, two):
    homes = ("COCO_train2014_00000000000", "COCO_val2014_00000000000")
    return {f"{home}{n}": category for home in homes for n, category in ((1, one), (2, two))}


@pytest.fixture
def vqa(tmp_path):
    """Stages color and count of VQACL's release; images 1 (a plant, G1) and 2 (a cow, G2)."""
    root = tmp_path / "vqa_data"
    answers = [{"answer": a} for a in ["red"] * 7 + ["dark red"] * 3]
    for split, home in (("train", "train2014"), ("test", "val2014")):
        golds = []
        for s, stage in enumerate(STAGES):
            records = []
            for image, ending in ((1, "jpg"), (2, "png")):
                img_id = f"COCO_{home}_{image:012d}"
                picture(root / "COCO" / home / f"{img_id}.{ending}")
                about = {"question_id": image * 1000 + s + 500 * (split == "test")}
                label = {"label": {"red": 1, "dark red": 0.3}}
                records.append(about | label | {"img_id": img_id, "sent": f"What {stage} is it?"})
                golds.append(about | {"answers": answers})
            write(root / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{stage}.json", records)
        write(root / "vqa" / f"v2_mscoco_{home}_annotations.json", {"annotations": golds})
    write(root / "ImgId_cate_map.json", categories(POTTED_PLANT, COW))
    write(root / "stream.json", {"stages": STAGES})
    return root


def copies(root, n, **labels):
    """Make the first training question of stage color n questions."""
    one = json.loads((root / COLOR_TRAIN).read_text())[0]
    write(root / COLOR_TRAIN, [one | {"question_id": number} | labels for number in range(n)])


def talk(question, answer, *further):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}, *further]


def llava_records(stage: str):
    """The training and test records of a stage: two questions about images 0 and 1."""
    train, test = [], []
    for k in (0, 1):
        image, question = {"image": f"images/{k}.png"}, f"What is {k}?"
        turns = talk(f"<image>\n{question}", "A cat")
        train.append(image | {"id": f"{stage}-{k}", "conversations": turns})
        test.append(image | {"question_id": f"t-{k}", "text": question, "answer": "A cat"})
    return train, test


@pytest.fixture
def llava(tmp_path):
    """A stream in a folder of the user's, with the stages stage2 and stage10."""
    root = tmp_path / "own"
    for stage in ("stage10", "stage2"):
        train, test = llava_records(stage)
        write(root / stage / "train.json", train)
        write(root / stage / "test.json", test)
        for k in (0, 1):
            picture(root / stage / "images" / f"{k}.png")
    return root


@pytest.fixture
def llama(tiny_folder):  # <s> in front, "USER: ... ASSISTANT:", as in LLaVA-1.5
    return AutoProcessor.from_pretrained(tiny_folder)


@pytest.fixture
def qwen(tiny_siglip_qwen_folder):  # no mark in front, ChatML
    return AutoProcessor.from_pretrained(tiny_siglip_qwen_folder)


@pytest.fixture
def model_folder(tmp_path):
    """config.json and an empty weight file: all that data.py looks at."""

    def make(width=128, **config):
        folder = tmp_path / f"model{width}"
        config = {"model_type": "llava", "text_config": {"hidden_size": width}} | config
        write(folder / "config.json", config)
        write(folder / "model.safetensors", "")
        return folder

    return make


def sample(question="What color is it?", answer="red", image=Path("x.png"), suffix=""):
    question = f"{question}\n{suffix}" if suffix else question
    return data.Sample("7", image, question, answer, (answer,), "color", "color", "", suffix)


# Readers


def test_vqa_layout(vqa):
    stream = load("--stream", "vqacl", "--data", vqa)
    assert [stage.name for stage in stream.stages] == STAGES and stream.novel is None
    first, train = stream.stages[0].test[0], stream.stages[0].train
    assert first.question == f"What color is it?\n{benchmarks.SHORT}"
    assert first.answers == ("red",) * 7 + ("dark red",) * 3 and first.answer == "red"
    assert first.image.is_absolute() and first.image.suffix == ".jpg"
    assert (first.id, first.skill, first.stage, first.group) == ("1500", "color", "color", "G1")
    assert [s.group for s in train] == ["G1", "G2"] and stream.stages[0].metric == "vqa"
    assert sorted(map(tuple, stream.stages[0].blocks)) == [(0,), (1,)]
    assert stream.row.stages["color"].published == (50872, 2192)
    assert load("--stream", "vqav2", "--data", vqa).stages[0].blocks is None


def test_training_answer_follows_the_scores_and_not_the_seed(vqa, capsys):
    copies(vqa, 2000)
    words = ("--stream", "vqav2", "--data", vqa, "--seed")
    first, second = ([s.answer for s in load(*words, k).stages[0].train] for k in (0, 1))
    assert first == second and abs(Counter(first)["red"] / 2000 - 1 / 1.3) < 0.03
    records = json.loads((vqa / COLOR_TRAIN).read_text())
    write(vqa / COLOR_TRAIN, [records[0] | {"label": {}}, records[1]])
    assert len(load("--stream", "vqav2", "--data", vqa).stages[0].train) == 1
    assert "color: 1 train questions without a usable answer" in capsys.readouterr().out


def test_folder_in_llava_layout(llava):
    stream = load("--stream", llava)
    (llava / "zoo").mkdir()  # short, but last in the alphabet
    (llava / "zoo" / "train.json").touch()
    assert [*data.find_stream(parse("--stream", llava))[1].stages] == ["stage2", "stage10", "zoo"]
    assert [stage.name for stage in stream.stages] == ["stage2", "stage10"]
    assert stream.name == "own" and stream.stages[0].metric == "exact"
    train, test = stream.stages[0].train[0], stream.stages[0].test[0]
    assert (train.id, train.question, train.answers) == ("stage2-0", "What is 0?", ("A cat",))
    assert train.image == llava / "stage2" / "images" / "0.png" and train.skill == "stage2"
    assert (test.id, test.question, test.answer) == ("t-0", "What is 0?", "A cat")


def test_stream_json_optional_fields_and_links(llava, tmp_path):
    (llava / "stage10" / "images").rename(tmp_path / "elsewhere")
    (llava / "stage10" / "images").symlink_to(tmp_path / "elsewhere")
    write(llava / "stream.json", {"stages": ["stage10"], "metric": "vqa", "suffix": "Be short."})
    train, test = llava_records("stage10")
    del test[0]["image"]  # text only
    test[1] |= {"answer": ["A cat", "cat", "cat"], "text": "Who?\nBe short.", "skill": "name"}
    write(llava / "stage10" / "test.json", test)
    (stage,) = load("--stream", llava).stages
    assert stage.metric == "vqa" and stage.test[0].image is None
    assert stage.train[0].question == "What is 0?\nBe short."
    assert stage.test[1].question == "Who?\nBe short." and stage.test[1].skill == "name"
    assert stage.test[1].answers == ("A cat", "cat", "cat") and stage.test[1].answer == "cat"


def one_record(split, image, gold="A", question="What is it?"):
    """A record of a training or a test file, about an image."""
    if split == "train":
        return {"id": "1", "image": image, "conversations": talk(f"<image>\n{question}", gold)}
    return {"question_id": "1", "image": image, "text": question, "answer": gold}


def release(root, train, test, image, stored):
    """Both files of a stage, and the image in the places `stored`."""
    for split, file in (("train", train), ("test", test)):
        write(root / f"{file}.json", [one_record(split, image)])
    for place in stored:
        picture(root / place)


CLEVR, UCIT, CL_MOE = "CLEVR/1.png", "UCIT/CLEVR-Math/", "CL4VQA"
PHOTO = "COCO_val2014_000000000001.jpg"
HERE = f"COCO/val2014/{PHOTO}"
INFO = "instructions/InfographicVQA/infographicsVQA_"
RELEASED = {  # stream, stage -> releases: training file, test file, image as written, as stored
    ("ucit", "CLEVR"): [
        ("instructions/CLEVR/train_4w", "instructions/CLEVR/test_3000", CLEVR, "datasets/" + CLEVR),
        (f"{UCIT}train", f"{UCIT}test", CLEVR, "UCIT/datasets/" + CLEVR),  # MCITlib
        ("CLEVR-Math/train", "CLEVR-Math/test", CLEVR, CLEVR),  # DIR is its UCIT/
    ],
    ("trigap", "InfographicVQA"): [
        (f"{INFO}train_converted", f"{INFO}val_converted", "info/1.png", "datasets/info/1.png")
    ],
    ("coin", "VizWiz"): [
        (f"{home}/VizWiz/train", f"{home}/VizWiz/val", "./VizWiz/1.png", "cl_dataset/VizWiz/1.png")
        for home in benchmarks.HOMES
    ],
    ("dcl", "RS"): [
        (f"{top}RS/train", f"{top}RS/test", "images/1.png", f"{top}RS/images/1.png")
        for top in ("", "domain/", "Domain_data/")
    ],
    ("vqav2", "color"): [
        (f"{CL_MOE}/train/train_q_color", f"{CL_MOE}/test/test_q_color", PHOTO, HERE)
    ],
    ("acl", "OCR"): [
        (f"{top}OCR/train", f"{top}OCR_test/test", "1.png", f"{top}OCR/1.png {top}OCR_test/1.png")
        for top in ("", "ability/")
    ],
}


@pytest.mark.parametrize("stream, stage", RELEASED)
def test_layouts_as_released(stream, stage, tmp_path, capsys):
    for k, (train, test, image, stored) in enumerate(RELEASED[stream, stage]):
        root, stored = tmp_path / str(k), stored.split()
        release(root, train, test, image, stored)
        words = ["--stream", stream, "--data", root, "--order", stage]
        (found,) = load(*words).stages
        assert found.train[0].image == root / stored[0] and found.test[0].answers == ("A",)
        assert found.test[0].image == root / stored[-1]
        (root / stored[-1]).unlink()  # an image that the release lacks, or has in an archive
        with pytest.raises(InputError, match="json: the image of 1 of 1 .*--skip_missing"):
            load(*words)
        write((root / stored[-1]).parent / "images-0.tar.gz", "")
        with pytest.raises(InputError, match=r"there \(1\) are not extracted: tar -C .*-0.tar"):
            load(*words)
    assert data.main(list(map(str, words))) == 1
    assert "how to get the files into DIR" in capsys.readouterr().out


def test_an_empty_folder_is_told_what_it_lacks(tmp_path, capsys):
    for stream in set(data.STREAMS) - {"domains"}:
        assert data.main(["--stream", stream, "--data", str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert "missing file" in out and "how to get the files into DIR" in out


def test_records_whose_image_is_missing_are_left_out_on_demand(llava, capsys):
    (llava / "stage2/images/1.png").unlink()
    stream = load("--stream", llava, "--skip_missing")
    assert stream.skipped == {"stage2 train": 1, "stage2 test": 1}
    assert [len(stage.train) for stage in stream.stages] == [1, 2]
    assert "stage2 train: 1 of 2 records are left out" in capsys.readouterr().out
    write(llava / "stream.json", {"metric": "caption"})  # references count records, not samples
    captions = [{"image_id": n, "caption": f"caption {n}"} for n in (1, 2)]
    (llava / "stage2/images/0.png").rename(llava / "stage2/images/1.png")
    write(llava / "stage2" / "test_coco_type.json", {"annotations": captions})
    stream = load("--stream", llava, "--skip_missing")
    assert stream.stages[0].test[0].answers == ("caption 2",)


HOME = "Instructions_Original/"
GOLDS = {  # stage -> training and test file, content of the file that has the golds, the golds
    "TextVQA": (
        f"{HOME}TextVQA/train",
        f"{HOME}TextVQA/val",
        {"data": [{"question_id": 1, "answers": ["a", "b"]}]},
        ("a", "b"),
    ),
    "ScienceQA": (f"{HOME}ScienceQA/train", f"{HOME}ScienceQA/test", {"1": {"answer": 2}}, ("C",)),
    "GQA": (f"{HOME}GQA/train", f"{HOME}GQA/test", {"1": {"answer": "left"}}, ("left",)),
    "APP": ("APP/train", "APP_test/test", "index\tanswer\n7\tA\n8\tD\n", ("D",)),
}


@pytest.mark.parametrize("stage", GOLDS)
def test_golds_in_files_of_their_own(stage, tmp_path):
    (train, test, content, golds), app = GOLDS[stage], stage == "APP"
    places = [f"{folder}/1.png" for folder in ("cl_dataset", "APP", "APP_test")]
    release(tmp_path, train, test, "1.png", places)
    record = one_record("test", "1.png", "no letter") | {"question_id": "ALL_1" if app else "1"}
    write(tmp_path / f"{test}.json", [record])
    words = ["--stream", "acl" if app else "coin", "--data", tmp_path, "--order", stage]
    (without,) = load(*words).stages
    assert without.test[0].answers == ("no letter",)
    assert (without.metric == "unscored") == app  # golds that are no option letters
    file = tmp_path / ("" if app else "cl_dataset") / benchmarks.GOLDS[stage][0]
    write(file, content)
    (found,) = load(*words).stages
    assert found.test[0].answers == golds and found.metric != "unscored"
    write(file, "x\n1\n1\n" if app else "{")
    with pytest.raises(InputError, match="is corrupt|does not hold gold answers"):
        load(*words)


def test_several_turns_are_one_conversation(llava, llama, qwen):
    further = talk("How many?", "2", *talk("Where?", "on a mat"))
    edit(TRAIN, conversations=talk("<image>\nWhat?", "A cat", *further))(llava)
    one = load("--stream", llava).stages[0].train[1]
    assert (one.question, one.answer) == ("What?", "A cat")
    assert one.further == (("How many?", "2"), ("Where?", "on a mat"))
    about = one.question, one.answer, True, "Be nice.", one.further
    texts = [build_prompt(processor, *about)[0] for processor in (llama, qwen)]
    vicuna = "Be nice. USER: <image>\nWhat? ASSISTANT: A cat</s>USER: How many? ASSISTANT: 2</s>"
    assert texts[0] == vicuna + "USER: Where? ASSISTANT: on a mat</s>"
    turn = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    chatml = turn.format("<image>\nWhat?") + "A cat" + turn.format("How many?") + "2"
    system = "<|im_start|>system\nBe nice."
    assert texts[1] == system + chatml + turn.format("Where?") + "on a mat<|im_end|>"
    for processor in (llama, qwen):  # all answers are in the loss, with their ends
        batch = Collator(processor, 4, "Be nice.")([one, sample()], train=True)
        labels = batch["labels"][0]
        end = processor.tokenizer.eos_token
        said = processor.tokenizer.decode(labels[labels != -100])
        assert [x.strip() for x in said.split(end)] == ["A cat", "2", "on a mat", ""]
        asked = batch["input_ids"][0][batch["question_mask"][0]]
        assert processor.tokenizer.decode(asked).strip() == "What?"
    edit(TRAIN, image=["1.png", "2.png"])(llava)
    with pytest.raises(InputError, match="2 images in one record: only one can be read"):
        load("--stream", llava)


# Object groups, orders, limits, the long tail


def test_both_readings_of_the_object_groups():
    group, ids = benchmarks.object_group, benchmarks.COCO_IDS
    assert len(ids) == 80 and Counter(map(group, ids)) == dict.fromkeys(data.GROUPS, 16)
    # potted plant, car: G1; cow: G2; person, toothbrush: G3; couch: G4; truck: G5
    expected = {64: "G1", 3: "G1", 21: "G2", 1: "G3", 90: "G3", 63: "G4", 8: "G5"}
    assert {category: group(category) for category in expected} == expected
    released = {k: group(k, "released") for k in range(1, 91)}  # compares raw ids
    assert not any(released[category] for category in range(80, 91))
    assert (released[1], released[64], released[21], released[23]) == ("G1", "G1", "G5", "G2")
    used = Counter(released[category] for category in ids)
    assert used == {"G1": 16, "G2": 15, "G3": 13, "G4": 12, "G5": 14, "": 10}


def test_hold_out(vqa):
    stream = load("--stream", "vqacl", "--data", vqa, "--hold_out", "G2")
    for stage, novel in zip(stream.stages, stream.novel):
        assert {s.group for s in stage.train + stage.test} == {"G1"}
        assert {s.group for s in novel.test} == {"G2"} and novel.train == []
        assert novel.name == stage.name
    with pytest.raises(InputError, match="leaves 2 train, 2 test and 0 novel"):
        load("--stream", "vqacl", "--data", vqa, "--hold_out", "G3")


def test_order():
    names = ["a", "b", "c", "d"]
    assert data.ordered(names, None) == names and data.ordered(names, "reverse") == names[::-1]
    assert data.ordered(names, "c, a") == ["c", "a"]
    assert data.ordered(names, "3") == data.ordered(names, "3") != data.ordered(names, "4")
    assert sorted(data.ordered(names, "3")) == names
    for order in ("a,x", "a,a", ""):
        with pytest.raises(InputError, match="is unknown or named twice; use a, b, c, d"):
            data.ordered(names, order)


def test_limits(vqa):
    copies(vqa, 40)

    def chosen(*words):
        stage = load("--stream", "vqacl", "--data", vqa, *words).stages[0]
        assert sorted(i for block in stage.blocks for i in block) == list(range(len(stage.train)))
        return [s.id for s in stage.train], [s.id for s in stage.test]

    train, test = chosen("--limit", 10, "--limit_test", 1)
    assert len(train) == 10 and len(test) == 1 and train == sorted(train, key=int)
    other, same = chosen("--limit", 10, "--limit_test", 1, "--seed", 1)
    assert other != train and same == test  # the test questions do not depend on the seed
    assert chosen("--limit", 99, "--limit_test", 99) == chosen()


def test_long_tail(vqa):
    samples = [sample(answer=a) for a in "abc" for _ in range(100)]
    cut = data.long_tail(samples, 25.0, "seed")
    assert Counter(s.answer for s in cut) == {"a": 100, "b": 20, "c": 4}
    assert cut == data.long_tail(samples, 25.0, "seed")
    assert data.long_tail(samples, 1.0, "seed") == samples
    assert len(data.long_tail(samples[:1], 25.0, "seed")) == 1
    copies(vqa, 100)
    records = json.loads((vqa / COLOR_TRAIN).read_text())
    write(vqa / COLOR_TRAIN, [r | {"label": {"xy"[n % 2]: 1}} for n, r in enumerate(records)])
    for words, left in (((), 5), (("--imbalance", 50), 1)):  # of training questions only
        stage = load("--stream", "clt-vqa", "--data", vqa, *words).stages[0]
        assert Counter(s.answer for s in stage.train)["y"] == left and len(stage.test) == 2


def test_training_visits_group_by_group():
    blocks = [list(range(20, 30)), list(range(0, 20))]
    stage = data.Stage("color", [sample() for _ in range(30)], [], "vqa", blocks)
    order = data.train_order(stage, 0, 0)
    assert sorted(order[:10]) == blocks[0] and sorted(order[10:]) == blocks[1]
    assert order == data.train_order(stage, 0, 0) != data.train_order(stage, 1, 0)
    passes = [i for epoch in range(3) for i in data.train_order(stage, 0, epoch, 3)]
    assert Counter(passes[:30]) == Counter(blocks[0] * 3)  # 3 passes over one group,
    assert Counter(passes[30:]) == Counter(blocks[1] * 3)  # then 3 over the other
    with pytest.raises(AssertionError, match="epoch 1 of 1 epochs"):
        data.train_order(stage, 0, 1)


def test_steps_end_with_their_epoch_and_consist_of_micro_batches():
    stage = data.Stage("plain", [sample() for _ in range(30)], [], "exact", epochs=2)
    first, second = data.train_order(stage, 0, 0), data.train_order(stage, 0, 1)
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    assert second == data.train_order(stage, 0, 1, 5)
    words = "--batch_size 8 --accumulate 2".split()
    steps = data.steps_of(stage, parse(*words))
    assert [[len(micro) for micro in step] for step in steps] == ([[4, 4]] * 3 + [[4, 2]]) * 2
    assert [i for step in steps for micro in step for i in micro] == first + second


def test_schedule_rises_once_then_falls_to_zero():
    rates = [data.schedule(k, 50, 0.1) for k in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]) and rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.01
    assert data.schedule(0, 1, 0.1) == data.schedule(0, 50, 0.0) == 1


# Prompt, tokens, loss mask


def test_prompts_of_llava_15_and_chatml(llama, qwen):
    text, (start, end), [(answer, _)] = build_prompt(llama, "What color is it?", "red")
    assert text == "USER: <image>\nWhat color is it? ASSISTANT: red</s>"
    assert text[start:end] == "What color is it?" and text[answer:] == " red</s>"
    assert build_prompt(llama, "What color is it?")[0] == text[:answer]
    text, span, _ = build_prompt(llama, "USER", "ASSISTANT", image=False)
    assert text == "USER: USER ASSISTANT: ASSISTANT</s>" and span == (6, 10)
    text, (start, end), [(answer, _)] = build_prompt(qwen, "user", "red")
    head = "<|im_start|>user\n<image>\nuser<|im_end|>\n<|im_start|>assistant\n"
    assert text == head + "red<|im_end|>" and text[:answer] == head
    assert text[start - 8 : end] == "<image>\nuser"


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_loss_mask(kind, request):
    processor = request.getfixturevalue(kind)
    tokenizer = processor.tokenizer
    samples = [sample(suffix="Answer one word"), sample("Ω?", "3 dark red", image=None)]
    samples.append(sample("is it 4?", "no"))
    collate = Collator(processor, 4)
    batch, prompts = collate(samples, train=True), collate(samples, train=False)
    assert "labels" not in prompts
    for b, s in enumerate(samples):
        length, size = int(batch["attention_mask"][b].sum()), batch["input_ids"].shape[1]
        assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (size - length)
        ids, labels = batch["input_ids"][b, :length], batch["labels"][b]
        n = int((labels != -100).sum())
        before, padding = [-100] * (length - n), [-100] * (size - length)
        assert labels.tolist() == before + ids[-n:].tolist() + padding
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[-n:], skip_special_tokens=True).strip() == s.answer
        # generation sees exactly what stands before the loss, padded left
        left = prompts["attention_mask"][b]
        assert left.tolist() == sorted(left.tolist())
        assert prompts["input_ids"][b][left == 1].tolist() == ids[:-n].tolist()
        # question rows: the question, neither suffix nor template nor image
        question = s.question.removesuffix(s.suffix).rstrip()
        for rows in (batch, prompts):
            asked = rows["input_ids"][b][rows["question_mask"][b]]
            assert tokenizer.decode(asked).strip() == question
            assert rows["image_mask"][b].sum() == (4 if s.image else 0)
            offsets = rows["question_offsets"][b]
            assert [i for i, _, _ in offsets] == rows["question_mask"][b].nonzero()[:, 0].tolist()
            covered = {c for _, x, y in offsets for c in range(x, y)}
            assert covered >= {k for k, c in enumerate(question) if c != " "}


def test_answer_and_image_tokens_are_counted(llama):
    collate = Collator(llama, 4)
    target = collate([sample(answer="3")], train=True)["labels"][0]
    tokens = llama.tokenizer.convert_ids_to_tokens(target[target != -100].tolist())
    assert tokens == ["Ġ", "3", "</s>"]  # a lone blank before a digit is in the loss
    with pytest.raises(InputError, match="must not contain <image>"):
        collate([sample("two <image> marks")], train=True)
    collate.image_id = -1  # a tokenizer that does not know the mark
    with pytest.raises(AssertionError, match="sample 7: 0 image tokens, not 4"):
        collate([sample()], train=True)


def test_images(tmp_path):
    path = tmp_path / "gray.png"
    Image.new("L", (4, 2), 255).save(path)
    square = files.pad_square(data.load_image(path), (1, 2, 3))
    assert [square.getpixel((0, y)) for y in (0, 1, 3)] == [(1, 2, 3), (255,) * 3, (1, 2, 3)]


# Bad input


def edit(path, **fields):
    """Change the second record of a file."""

    def change(root):
        records = json.loads((root / path).read_text())
        records[1] |= fields
        write(root / path, records)

    return change


def remove(path):
    return lambda root: (root / path).unlink()


def replace(path, content):
    return lambda root: write(root / path, content)


TRAIN, TEST = "stage2/train.json", "stage2/test.json"
LLAVA_FAULTS = [
    (remove(TEST), "missing file .*stage2/test.json"),
    (remove("stage2/images/1.png"), "the image of 1 of 2 records is missing, .*images/1.png"),
    (replace(TEST, []), "stage stage2 has no test data"),
    (replace(TRAIN, '[{"id": 1,\n"x"]'), r"train.json is corrupt or truncated: .*line 2 column 4"),
    (edit(TEST, image="/etc/passwd"), "image path '/etc/passwd' leaves the data folder"),
    (edit(TEST, text="<image> or <image>?"), "2 <image> marks"),
    (edit(TEST, text=None, question="why?"), "the question is missing"),
    (replace(TRAIN, '{"id": 1}\n{"id": 2}'), "holds several JSON values, not one"),
    (replace("stream.json", {"metrik": "vqa"}), "unknown key 'metrik'; there are stages, suffix,"),
    (edit(TEST, answer=None), "test.json, record 2: the answer is missing"),
    (
        edit(TRAIN, conversations=talk("a", "b", {"from": "human"})),
        "human and gpt turns, one after",
    ),
    (replace("stream.json", {"stages": ["../x"]}), "plain folder names"),
    (replace("stream.json", {"metrics": {"stage2": "f1"}}), "metric must be one of exact, same"),
    (replace("stream.json", {"metric": ["exact"]}), "metric must be one of exact, same"),
    (replace("stream.json", {"stages": ["stage2"] * 2}), "two stages are called 'stage2'"),
    (
        replace("stream.json", {"descriptions": {"stage2": "an <image>"}}),
        "description must not contain <image>",
    ),
    (replace("stream.json", {"descriptions": {"stage2": "x" * 501}}), "stage2 is longer than 500"),
    (edit(TEST, answer="a <image>"), "record 2: the answer must not contain <image>"),
    (
        edit(TRAIN, conversations=talk("a", "b", *talk("an <image>", "c"))),
        "the later question must not contain <image>",
    ),
    (edit(TEST, text="a \ud800"), "record 2: the question has half a character"),
    (edit(TEST, text="long " * 600), r"stage stage2, sample t-1: \d+ tokens .* reads at most 1024"),
]


VQA_FAULTS = [
    (remove(VAL_GOLDS), "missing file .*v2_mscoco_val2014_annotations"),
    (edit("vqa/Partition_Q/karpathy_test_q_color.json", question_id=3), "question 3 has no answer"),
    (replace("ImgId_cate_map.json", categories(12, 1)), "1 maps to 12, no COCO id"),
    (edit(COLOR_TRAIN, img_id="../../secret"), "'../../secret' is no COCO 2014 image id"),
    (edit(COLOR_TRAIN, label="red"), "label must map answers to scores"),
]


FAULTS = [("llava", *row) for row in LLAVA_FAULTS] + [("vqa", *row) for row in VQA_FAULTS]


@pytest.mark.parametrize("layout, fault, message", FAULTS)
def test_faulty_files(layout, fault, message, request):
    root = request.getfixturevalue(layout)
    fault(root)
    with pytest.raises(InputError, match=message):
        load("--stream", *([root] if layout == "llava" else ["vqacl", "--data", root]))


def test_equal_ids_are_numbered_and_passes_follow_from_steps(llava, capsys):
    edit(TEST, question_id="t-0")(llava)
    stream = load("--stream", llava, "--batch_size", 1)
    assert [s.id for s in stream.stages[0].test] == ["t-0", "t-0#2"]
    args = parse("--stream", llava, "--batch_size", "2", "--max_new_tokens", "4", "--system", "")
    args.lr = 1e-3
    assert [stage.epochs for stage in data.load_stream(args).stages] == [175, 175] == args.epochs
    out = capsys.readouterr().out
    for said in (
        "--epochs 175,175: 175 steps a stage",
        'under "skill"',
        "2 of 2 tests",
    ):
        assert said in out


def test_one_value_or_one_per_stage(llava):
    stages = load("--stream", llava, "--epochs", "1,3", "--lr", "1e-3").stages
    assert [(stage.epochs, stage.lr) for stage in stages] == [(1, 1e-3), (3, 1e-3)]
    with pytest.raises(InputError, match="--epochs has 3 values for 2 stages: give one or all"):
        load("--stream", llava, "--epochs", "1,3,1")


def test_faulty_arguments(vqa, llava, tmp_path):
    for words, message in [
        (("--stream", "vqacI"), "unknown stream 'vqacI': use vqacl, vqav2, clt-vqa, domains"),
        (("--stream", "vqacl", "--data", tmp_path / "no"), "data folder .*no does not exist"),
        (("--stream", llava, "--data", vqa), "leave out --data"),
    ]:
        with pytest.raises(InputError, match=message):
            load(*words)


# Flags


def test_defaults_follow_stream_and_model(model_folder, capsys):
    def defaults(*words):
        return data.resolve_defaults(parse(*words))

    tiny, large = model_folder(128), model_folder(4096, text_config={"model_type": "llama"})
    args = defaults("--stream", "vqacl", "--model", large)
    chosen = (args.lr, args.epochs, args.batch_size, args.rank, args.alpha, args.dropout)
    assert chosen == (1e-4, 3, 80, 16, 32, 0.05) and args.targets == "q,v,projector"
    assert args.object_groups == "paper" and args.imbalance is None and args.hold_out is None
    assert "lr 0.0001, warm_up 0.1, epochs 3, batch_size 80" in capsys.readouterr().out
    args = defaults("--stream", "vqav2", "--model", large, "--batch_size", 4)
    assert (args.lr, args.epochs, args.batch_size, args.object_groups) == (2e-4, 1, 4, None)
    args = defaults("--stream", "acl", "--model", large, "--order", "VP,OCR", "--lr", "1e-5")
    assert (args.epochs, args.lr, args.rank, args.system) == ([1, 3], 1e-5, 32, benchmarks.VICUNA)
    pairs = ("coin", large), ("vqacl", large), ("coin", tiny)
    gammas = [asr.parse(["--stream", s, "--model", str(model)]).gamma for s, model in pairs]
    assert gammas == [0.02, 0.05, 0.05]
    qwen = model_folder(1024, text_config={"model_type": "qwen2", "hidden_size": 1024})
    assert defaults("--stream", "dcl", "--model", qwen).system == ""
    for stream in [*data.STREAMS, "my/folder"]:
        args = defaults("--stream", stream, "--model", tiny)
        assert (args.imbalance == 10.0) == (stream == "clt-vqa")
    assert (args.lr, args.epochs) == (2e-3, None) and args.targets == "q,v,gate,up,down"


def test_faulty_models(model_folder, tmp_path):
    (model_folder(64) / "model.safetensors").unlink()
    model_folder(32, model_type="llama")
    (model_folder(16) / "config.json").write_text("{")
    for folder, message in (
        ("model64", "holds no .safetensors weights"),
        ("model32", "is no LLaVA: its model_type is 'llama'"),
        ("model16", "cannot be read: .*config.json"),
        ("nobody/no-llava", "model nobody/no-llava cannot be read"),  # offline here
        (str(model_folder(96, vision_config={"patch_size": 0})), "image and patch size are"),
    ):
        with pytest.raises(InputError, match=message):
            data.text_config(folder if "/" in folder else str(tmp_path / folder))


def test_values_that_argparse_rejects(capsys):
    bad = [f"--{key} {x}" for key in ("lr", "alpha") for x in ("0", "-1", "nan", "inf", "x")]
    bad += [f"--{key} {x}" for key in ("epochs", "rank", "limit") for x in ("0", "1.5")]
    bad += ["--dropout 1", "--warm_up -0.1", "--imbalance 0.5", "--threads -1", "--epoch 3"]
    bad += ["--seed -1", f"--seed {2**40}", f"--threads {10**9}", f"--rank {10**12}", "--seed x"]
    for words in bad:
        with pytest.raises(SystemExit) as stop:
            parse(*words.split())
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err
    assert data.weight("0") == data.fraction("0") == 0 and data.positive("1e-3") == 1e-3


def test_flags_that_do_not_fit_each_other(model_folder):
    folder = model_folder()
    for words, message in [
        ("--device gpu", "--device 'gpu'"),
        ("--targets q,x", "--targets has 'x'"),
        ("--batch_size 10 --accumulate 4", "--batch_size 10 must be a multiple of --accumulate 4"),
        ("--imbalance 5", "--imbalance belongs to --stream clt-vqa"),
        ("--hold_out G1", "--hold_out belongs to --stream vqacl"),
        ("--object_groups released", "--object_groups belongs to --stream vqacl"),
    ]:
        with pytest.raises(InputError, match=message):
            data.resolve_defaults(parse("--model", folder, "--stream", "domains", *words.split()))


# Mini streams, and the check: python data.py


def test_mini_stream_is_drawn_once_per_version(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "ROOT", tmp_path)
    code = 'raise SystemExit("no ink left")'
    for file in data.MINI_SOURCES:
        write(tmp_path / "mini" / file, code)
    version = hashlib.sha256(code.encode() * len(data.MINI_SOURCES)).hexdigest()
    manifest = tmp_path / "data" / "mini" / "coin" / "manifest.json"
    write(manifest, {"stream": "coin", "version": version, "sha256": "abc"})
    assert data.mini_folder("coin") == manifest.parent
    for content in ("{", {"stream": "coin", "version": "older"}):
        write(manifest, content)
        with pytest.raises(InputError, match="streams.py coin .* failed: no ink left"):
            data.mini_folder("coin")


@pytest.fixture
def check(vqa, model_folder, llama):
    folder = model_folder()
    llama.save_pretrained(folder)
    words = ["--stream", "vqacl", "--data", str(vqa), "--model", str(folder)]
    return lambda *further: data.main([*words, *further])


def test_check_of_a_good_stream(check, capsys):
    assert check("--hold_out", "G2") == 0
    out = capsys.readouterr().out
    assert "nothing is missing" in out and "novel test of G2: 1" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("color "))
    assert row.split() == ["color", "1", "50872", "1", "2192", "G1", "1"]
    lines = out[out.index("one sample") :].splitlines()
    rows = {line.split("'")[1]: line.split()[-2:] for line in lines if "'" in line}
    assert rows[" color"] == ["yes", "-"] and rows["</s>"] == ["-", "yes"]
    assert rows["\\n"] == rows[":"] == ["-", "-"] and "'<image>' x 64" in out
