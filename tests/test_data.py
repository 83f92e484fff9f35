"""data.py: readers, groups, orders, prompts and loss masks, and every kind of bad input."""

import argparse
import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
from data import InputError

# --------------------------------------------------------------------------------------------------
# Fixtures: two-record streams in both layouts, a small tokenizer, a folder that looks like a model
# --------------------------------------------------------------------------------------------------

STAGES = ["color", "count"]
POTTED_PLANT, COW = 64, 21  # raw COCO ids; positions 58 (G1) and 19 (G2) among the 80 classes


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)


def flags(*words):
    parser = argparse.ArgumentParser(prog="asr.py")
    data.add_common_flags(parser)
    return parser.parse_args([str(word) for word in words])


def load(*words):
    return data.load_stream(flags(*words))


def categories(one, two):
    homes = ("COCO_train2014_", "COCO_val2014_")
    return {f"{h}{n:012d}": category for h in homes for n, category in ((1, one), (2, two))}


@pytest.fixture
def vqa(tmp_path):
    """Stages color and count of VQACL's release; images 1 (a plant, G1) and 2 (a cow, G2)."""
    root = tmp_path / "vqa_data"
    golds = {"train2014": [], "val2014": []}
    for split, home in (("train", "train2014"), ("test", "val2014")):
        for stage in STAGES:
            records = []
            for image in (1, 2):
                img_id = f"COCO_{home}_{image:012d}"
                picture(root / "COCO" / home / f"{img_id}.{'jpg' if image == 1 else 'png'}")
                number = image * 1000 + STAGES.index(stage) + 500 * (split == "test")
                records.append({
                    "answer_type": "other", "img_id": img_id, "label": {"red": 1, "dark red": 0.3},
                    "question_id": number, "question_type": "what", "sent": f"What {stage} is it?",
                })  # fmt: skip
                raw = ["red"] * 7 + ["dark red"] * 3
                answers = [{"answer": a, "answer_id": k + 1} for k, a in enumerate(raw)]
                golds[home].append({"question_id": number, "image_id": image, "answers": answers})
            write(root / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{stage}.json", records)
    for home, rows in golds.items():
        write(root / "vqa" / f"v2_mscoco_{home}_annotations.json", {"annotations": rows})
    write(root / "ImgId_cate_map.json", categories(POTTED_PLANT, COW))
    write(root / "stream.json", {"stages": STAGES})
    return root


def said(question, answer, *more):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}, *more]


def llava_records(stage: str):
    train = [
        {"id": f"{stage}-{k}", "image": f"images/{k}.png",
         "conversations": said(f"<image>\nWhat is {k}?", "A cat")}
        for k in (0, 1)
    ]  # fmt: skip
    test = [
        {"question_id": f"t-{k}", "image": f"images/{k}.png", "text": f"What is {k}?",
         "answer": "A cat"}
        for k in (0, 1)
    ]  # fmt: skip
    return train, test


@pytest.fixture
def llava(tmp_path):
    """A stream of one's own with the stages stage2 and stage10."""
    root = tmp_path / "own"
    for stage in ("stage10", "stage2"):
        train, test = llava_records(stage)
        write(root / stage / "train.json", train)
        write(root / stage / "test.json", test)
        for k in (0, 1):
            picture(root / stage / "images" / f"{k}.png")
    return root


LLAVA_15 = (  # renders what LLaVA-1.5's own template renders: images first, a blank after each text
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_processor(kind: str):
    """A LlavaProcessor with a small tokenizer: "llama" (byte fallback, <s>) or "qwen" (ChatML)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = "USER ASSISTANT What color is it red dark Answer one word".split()
    if kind == "llama":
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁:?"]
        pieces += sorted(set("".join(words)))
        merges = [(f"▁{w}"[:k], w[k - 1]) for w in words for k in range(1, len(w) + 1)]
        pieces += [a + b for a, b in merges]
        vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>"]})
    sizes = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=sizes, crop_size=sizes)
    return LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_15 if kind == "llama" else CHATML,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return make_processor("llama")


@pytest.fixture(scope="module")
def qwen():
    return make_processor("qwen")


@pytest.fixture
def model_folder(tmp_path):
    """config.json and a (never read) weight file: all that is looked at before torch."""

    def make(width=128, **config):
        folder = tmp_path / f"model{width}"
        folder.mkdir()
        config = {"model_type": "llava", "text_config": {"hidden_size": width}} | config
        write(folder / "config.json", config)
        write(folder / "model.safetensors", "")
        return folder

    return make


def sample(question="What color is it?", answer="red", image=Path("x.png"), suffix=""):
    question = f"{question}\n{suffix}" if suffix else question
    return data.Sample("7", image, question, answer, (answer,), "color", "color", "", suffix)


# --------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------


def test_vqa_layout(vqa):
    stream = load("--stream", "vqacl", "--data", vqa)
    assert [stage.name for stage in stream.stages] == STAGES and stream.novel is None
    first = stream.stages[0].test[0]
    assert first.question == f"What color is it?\n{data.SHORT}" and first.suffix == data.SHORT
    assert first.answers == ("red",) * 7 + ("dark red",) * 3 and first.answer == "red"
    assert first.image.is_absolute() and first.image.suffix == ".jpg"
    assert (first.id, first.skill, first.stage, first.group) == ("1500", "color", "color", "G1")
    train = stream.stages[0].train
    assert [s.group for s in train] == ["G1", "G2"] and stream.stages[0].metric == "vqa"
    assert {s.answer for s in train} <= {"red", "dark red"}
    assert sorted(map(tuple, stream.stages[0].blocks)) == [(0,), (1,)]
    assert stream.published["color"] == (50872, 2192)
    assert load("--stream", "vqav2", "--data", vqa).stages[0].blocks is None


def test_train_answer_follows_the_scores_and_stays(vqa):
    path = vqa / "vqa" / "Partition_Q" / "karpathy_train_q_color.json"
    one = json.loads(path.read_text())[0]
    write(path, [one | {"question_id": number} for number in range(2000)])
    first, second = (
        [s.answer for s in load("--stream", "vqav2", "--data", vqa, "--seed", k).stages[0].train]
        for k in (0, 1)
    )
    assert first == second
    assert abs(Counter(first)["red"] / 2000 - 1 / 1.3) < 0.03


def test_question_without_label_is_left_out_and_said(vqa, capsys):
    path = vqa / "vqa" / "Partition_Q" / "karpathy_train_q_color.json"
    records = json.loads(path.read_text())
    write(path, [records[0] | {"label": {}}, records[1]])
    assert len(load("--stream", "vqav2", "--data", vqa).stages[0].train) == 1
    assert "color: 1 training questions have no label" in capsys.readouterr().out


def test_cl_moe_files(vqa):
    (vqa / "vqa").rename(vqa / "unused")
    for split, field in (("train", "id"), ("test", "question_id")):
        for stage in STAGES:
            home = "train2014" if split == "train" else "val2014"
            record = {field: 5, "image": f"./COCO2014/{home}/COCO_{home}_000000000001.jpg"}
            if split == "train":
                record["conversations"] = said("<image>\nWhat?", 3)
            else:
                record |= {"text": f"What?\n{data.SHORT}", "answer": "3"}
            write(vqa / "CL4VQA" / split / f"{split}_q_{stage}.json", [record])
    stage = load("--stream", "vqav2", "--data", vqa).stages[0]
    assert stage.metric == "exact" and stage.train[0].answer == "3"
    assert stage.test[0].image == vqa / "COCO" / "val2014" / "COCO_val2014_000000000001.jpg"
    assert stage.test[0].question == stage.train[0].question == f"What?\n{data.SHORT}"


def test_own_folder(llava):
    stream = load("--stream", llava)
    assert [stage.name for stage in stream.stages] == ["stage2", "stage10"]
    assert stream.name == "own" and stream.stages[0].metric == "exact"
    train, test = stream.stages[0].train[0], stream.stages[0].test[0]
    assert (train.id, train.question, train.answers) == ("stage2-0", "What is 0?", ("A cat",))
    assert train.image == llava / "stage2" / "images" / "0.png" and train.skill == "stage2"
    assert (test.id, test.question, test.answer) == ("t-0", "What is 0?", "A cat")


def test_stream_json_and_optional_fields(llava):
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


def test_links_to_other_disks_are_fine(llava, tmp_path):
    (llava / "stage2" / "images").rename(tmp_path / "elsewhere")
    (llava / "stage2" / "images").symlink_to(tmp_path / "elsewhere")
    assert len(load("--stream", llava).stages) == 2


# --------------------------------------------------------------------------------------------------
# Object groups, orders, limits, the long tail
# --------------------------------------------------------------------------------------------------


def test_paper_groups_partition_the_80_classes():
    groups = Counter(data.object_group(category, "paper") for category in data.COCO_IDS)
    assert len(data.COCO_IDS) == 80 and groups == dict.fromkeys(data.GROUPS, 16)
    # potted plant, car: G1; cow: G2; person, toothbrush: G3; couch: G4; truck: G5
    expected = {64: "G1", 3: "G1", 21: "G2", 1: "G3", 90: "G3", 63: "G4", 8: "G5"}
    assert {category: data.object_group(category) for category in expected} == expected


def test_released_groups_compare_raw_ids():
    groups = {category: data.object_group(category, "released") for category in range(1, 91)}
    assert not any(groups[category] for category in range(80, 91))
    assert (groups[1], groups[64], groups[21], groups[23]) == ("G1", "G1", "G5", "G2")
    used = Counter(groups[category] for category in data.COCO_IDS)
    assert used == {"G1": 16, "G2": 15, "G3": 13, "G4": 12, "G5": 14, "": 10}


def test_reading_of_the_groups_is_a_flag(vqa, capsys):
    released = load("--stream", "vqacl", "--data", vqa, "--object_groups", "released").stages[0]
    assert [s.group for s in released.train] == ["G1", "G5"]
    write(vqa / "ImgId_cate_map.json", {"1": POTTED_PLANT, "2": 87})  # by number; 87: scissors
    for reading, left in (("paper", 2), ("released", 1)):
        stream = load("--stream", "vqacl", "--data", vqa, "--object_groups", reading)
        assert len(stream.stages[0].train) == left
    assert "2 questions on images without object group left out" in capsys.readouterr().out


def test_hold_out(vqa):
    stream = load("--stream", "vqacl", "--data", vqa, "--hold_out", "G2")
    for stage, novel in zip(stream.stages, stream.novel, strict=True):
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
    for order, message in (("a,x", "unknown stage 'x'"), ("a,a", "twice"), ("", "unknown stage")):
        with pytest.raises(InputError, match=message):
            data.ordered(names, order)


def test_limits(vqa):
    path = vqa / "vqa" / "Partition_Q" / "karpathy_train_q_color.json"
    one = json.loads(path.read_text())[0]
    write(path, [one | {"question_id": number} for number in range(40)])

    def chosen(*words):
        stage = load("--stream", "vqacl", "--data", vqa, *words).stages[0]
        assert sorted(i for block in stage.blocks for i in block) == list(range(len(stage.train)))
        return [s.id for s in stage.train], [s.id for s in stage.test]

    train, test = chosen("--limit", 10, "--limit_test", 1)
    assert len(train) == 10 and len(test) == 1 and train == sorted(train, key=int)
    other, same = chosen("--limit", 10, "--limit_test", 1, "--seed", 1)
    assert other != train and same == test  # the test questions do not depend on the seed
    assert chosen("--limit", 99, "--limit_test", 99) == chosen()


def test_long_tail():
    samples = [sample(answer=a) for a in "abc" for _ in range(100)]
    cut = data.long_tail(samples, 25.0, "seed")
    assert Counter(s.answer for s in cut) == {"a": 100, "b": 20, "c": 4}
    assert cut == data.long_tail(samples, 25.0, "seed")
    assert data.long_tail(samples, 1.0, "seed") == samples
    assert len(data.long_tail(samples[:1], 25.0, "seed")) == 1


def test_clt_vqa_cuts_training_only(vqa):
    path = vqa / "vqa" / "Partition_Q" / "karpathy_train_q_color.json"
    one = json.loads(path.read_text())[0]
    records = [one | {"question_id": n, "label": {"xy"[n % 2]: 1}} for n in range(100)]
    write(path, records)
    stages = [load("--stream", "clt-vqa", "--data", vqa, *more).stages[0]
              for more in ((), ("--imbalance", 50))]  # fmt: skip
    assert [Counter(s.answer for s in stage.train)["y"] for stage in stages] == [5, 1]
    assert all(len(stage.test) == 2 for stage in stages)


def test_train_order_visits_group_by_group():
    train = [sample() for _ in range(30)]
    blocks = [list(range(20, 30)), list(range(0, 20))]
    stage = data.Stage("color", train, [], "vqa", blocks)
    order = data.train_order(stage, 0, 0)
    assert sorted(order[:10]) == blocks[0] and sorted(order[10:]) == blocks[1]
    assert order == data.train_order(stage, 0, 0) != data.train_order(stage, 1, 0)
    passes = [data.train_order(stage, 0, epoch, 3) for epoch in range(3)]
    whole = [i for part in passes for i in part]  # 3 passes over one group, then 3 over the other
    assert Counter(whole[:30]) == Counter(blocks[0] * 3)
    assert Counter(whole[30:]) == Counter(blocks[1] * 3)
    with pytest.raises(AssertionError, match="epoch 1 of 1 epochs"):
        data.train_order(stage, 0, 1)


def test_train_order_without_groups():
    stage = data.Stage("plain", [sample() for _ in range(30)], [], "exact")
    first, second = data.train_order(stage, 0, 0), data.train_order(stage, 0, 1)
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    assert second == data.train_order(stage, 0, 1, 5)


# --------------------------------------------------------------------------------------------------
# Prompt, tokens, loss mask
# --------------------------------------------------------------------------------------------------


def test_prompt_of_llava_15(llama):
    text, (start, end), answer = data.build_prompt(llama, "What color is it?", "red")
    assert text == "USER: <image>\nWhat color is it? ASSISTANT: red</s>"
    assert text[start:end] == "What color is it?" and text[answer:] == " red</s>"
    assert data.build_prompt(llama, "What color is it?")[0] == text[:answer]
    text, span, _ = data.build_prompt(llama, "USER", "ASSISTANT", image=False)
    assert text == "USER: USER ASSISTANT: ASSISTANT</s>" and span == (6, 10)


def test_prompt_of_chatml(qwen):
    text, (start, end), answer = data.build_prompt(qwen, "user", "red")
    assert text == ("<|im_start|>user\n<image>user<|im_end|>\n<|im_start|>assistant\nred<|im_end|>")
    assert text[start - 7 : end] == "<image>user" and text[answer:] == "red<|im_end|>"


def test_chatml_with_another_end_of_sequence_token():
    processor = make_processor("qwen")
    processor.tokenizer.eos_token = "<|endoftext|>"
    assert data.build_prompt(processor, "q", "red")[0].endswith("red<|im_end|><|endoftext|>")


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_loss_mask(kind, request):
    processor = request.getfixturevalue(kind)
    tokenizer = processor.tokenizer
    samples = [
        sample(suffix="Answer one word"),
        sample("Ω?", "3 dark red", image=None),
        sample("is it 4?", "no"),
    ]
    collate = data.Collator(processor, 4)
    batch, prompts = collate(samples, train=True), collate(samples, train=False)
    assert "labels" not in prompts
    for b, s in enumerate(samples):
        length, size = int(batch["attention_mask"][b].sum()), batch["input_ids"].shape[1]
        assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (size - length)
        ids, labels = batch["input_ids"][b, :length], batch["labels"][b, :length]
        n = int((labels != -100).sum())
        assert (labels[-n:] == ids[-n:]).all() and (labels[:-n] == -100).all()
        assert (batch["labels"][b, length:] == -100).all()
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labels[-n:], skip_special_tokens=True).strip() == s.answer
        # generation sees exactly what stands before the loss, padded left
        left = prompts["attention_mask"][b]
        assert left.tolist() == sorted(left.tolist())
        assert prompts["input_ids"][b][left == 1].tolist() == ids[:-n].tolist()
        # question rows: the question, neither suffix nor template nor image
        for rows in (batch, prompts):
            asked = rows["input_ids"][b][rows["question_mask"][b]]
            assert tokenizer.decode(asked).strip() == s.question.removesuffix(s.suffix).strip()
            assert rows["image_mask"][b].sum() == (4 if s.image else 0)
            offsets = rows["question_offsets"][b]
            assert [i for i, _, _ in offsets] == rows["question_mask"][b].nonzero()[:, 0].tolist()
            covered = {c for _, x, y in offsets for c in range(x, y)}
            asked = s.question.removesuffix(s.suffix).rstrip()
            assert covered | {k for k, c in enumerate(asked) if c == " "} == set(range(len(asked)))


def test_lone_blank_before_a_digit_is_in_the_loss(llama):
    batch = data.Collator(llama, 4)([sample(answer="3")], train=True)
    kept = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert llama.tokenizer.convert_ids_to_tokens(kept) == ["▁", "<0x33>", "</s>"]


def test_image_tokens_are_counted(llama):
    collate = data.Collator(llama, 4)
    with pytest.raises(InputError, match="must not contain <image>"):
        collate([sample("two <image> marks")], train=True)
    collate.image_id = -1  # a tokenizer that does not know the mark
    with pytest.raises(AssertionError, match="sample 7: 0 image tokens, not 4"):
        collate([sample()], train=True)


def test_chat_template_is_needed():
    processor = make_processor("llama")
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        data.build_prompt(processor, "q")
    processor.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(InputError, match="does not show one question"):
        data.build_prompt(processor, "q")


def test_images(tmp_path):
    Image.new("L", (4, 2), 255).save(tmp_path / "gray.png")
    image = data.load_image(tmp_path / "gray.png")
    assert image.mode == "RGB"
    square = data.pad_square(image, (1, 2, 3))
    assert square.size == (4, 4) and square.getpixel((0, 0)) == (1, 2, 3)
    assert [square.getpixel((0, y))[0] for y in range(4)] == [1, 255, 255, 1]


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def break_json(root):
    path = root / "stage2" / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1)[:-30])


def edit(split, **fields):
    def change(root):
        path = root / "stage2" / f"{split}.json"
        records = json.loads(path.read_text())
        records[1] |= fields
        write(path, records)

    return change


def not_utf8(root):
    (root / "stage2" / "test.json").write_bytes(b"\xff\xfe\x00[")


LLAVA_FAULTS = [
    (lambda r: (r / "stage2/test.json").unlink(), "missing file .*stage2/test.json"),
    (lambda r: (r / "stage2/train.json").unlink(), "missing file .*stage2/train.json"),
    (lambda r: (r / "stage2/images/1.png").unlink(), "record 2: missing image .*images/1.png"),
    (lambda r: write(r / "stage2/test.json", []), "stage stage2 is without test data"),
    (lambda r: write(r / "stage2/train.json", []), "stage stage2 is without train data"),
    (lambda r: write(r / "stage2/train.json", {}), "train.json must hold one JSON array"),
    (lambda r: write(r / "stage2/train.json", [3]), "record 1: no JSON object"),
    (break_json, r"stage2/train.json is corrupt or truncated: .*line \d+ column \d+"),
    (not_utf8, "stage2/test.json is corrupt or truncated"),
    (edit("train", image="../../../secret.png"), "image path .* leaves the data folder"),
    (edit("test", image="/etc/passwd"), "image path '/etc/passwd' leaves the data folder"),
    (edit("test", image=7.5), "missing image"),
    (edit("test", image=""), "record 2: empty image path"),
    (edit("test", text=" "), "record 2: empty question"),
    (edit("test", text="<image>\n"), "record 2: empty question"),
    (edit("test", text=["what"]), "the question must be text"),
    (edit("test", answer=""), "test.json, record 2: empty answer"),
    (edit("test", question_id=""), "record 2: empty question_id"),
    (edit("test", answer=[]), "the answer must be text"),
    (edit("test", answer=None), "record 2: empty answer"),
    (edit("test", text="<image> or <image>?"), "2 <image> marks"),
    (edit("train", conversations=said("What?", " ")), "train.json, record 2: empty answer"),
    (edit("train", conversations=said("<image>", "cat")), "record 2: empty question"),
    (edit("train", conversations=said("a", "b", {"from": "human"})), "not 3"),
    (edit("train", conversations="What?"), "conversations must be a list"),
    (lambda r: write(r / "stream.json", "{"), "stream.json is corrupt or truncated"),
    (lambda r: write(r / "stream.json", {"stages": ["x"]}), "missing file .*x/train.json"),
    (lambda r: write(r / "stream.json", {"stages": ["../x"]}), "plain folder names"),
    (lambda r: write(r / "stream.json", {"stages": []}), "has no stages"),
    (lambda r: write(r / "stream.json", {"metric": "f1"}), "metric must be one of exact, same"),
]


@pytest.mark.parametrize("fault, message", LLAVA_FAULTS, ids=[m for _, m in LLAVA_FAULTS])
def test_faulty_llava_files(llava, fault, message):
    fault(llava)
    with pytest.raises(InputError, match=message):
        load("--stream", llava)


def edit_vqa(split, **fields):
    def change(root):
        path = root / "vqa" / "Partition_Q" / f"karpathy_{split}_q_color.json"
        records = json.loads(path.read_text())
        records[1] |= fields
        write(path, records)

    return change


VAL_GOLDS = "vqa/v2_mscoco_val2014_annotations.json"
VQA_FAULTS = [
    (lambda r: (r / "vqa/Partition_Q/karpathy_test_q_count.json").unlink(), "missing file"),
    (lambda r: (r / VAL_GOLDS).unlink(), "missing file .*v2_mscoco_val2014_annotations"),
    (lambda r: write(r / VAL_GOLDS, {"annotations": [{}]}), "no VQA annotation file"),
    (lambda r: write(r / VAL_GOLDS, {"annotations": []}), "question 1500 has no answer"),
    (lambda r: (r / "ImgId_cate_map.json").unlink(), "missing file .*ImgId_cate_map"),
    (lambda r: write(r / "ImgId_cate_map.json", categories(12, 1)), "1 maps to 12, no COCO id"),
    (lambda r: write(r / "ImgId_cate_map.json", categories(64, [21])), "no COCO id"),
    (lambda r: write(r / "ImgId_cate_map.json", {}), "no train data in any group"),
    (lambda r: (r / "COCO/val2014/COCO_val2014_000000000001.jpg").unlink(), "missing image"),
    (edit_vqa("test", img_id="../../secret"), "'../../secret' is no COCO 2014 image id"),
    (edit_vqa("train", sent=""), "karpathy_train_q_color.json, record 2: empty question"),
    (edit_vqa("train", label={"": 1}), "record 2: empty answer"),
    (edit_vqa("train", label="red"), "label must map answers to scores"),
    (edit_vqa("train", label={"red": -1}), "label must map answers to scores"),
    (edit_vqa("test", question_id=None), "record 2: empty question_id"),
]


@pytest.mark.parametrize("fault, message", VQA_FAULTS, ids=[m for _, m in VQA_FAULTS])
def test_faulty_vqa_files(vqa, fault, message):
    fault(vqa)
    with pytest.raises(InputError, match=message):
        load("--stream", "vqacl", "--data", vqa)


def test_faulty_arguments(vqa, llava, tmp_path):
    for words, message in [
        (("--stream", "vqacI"), "unknown stream 'vqacI': use vqacl, vqav2, clt-vqa, domains"),
        (("--stream", "vqacl", "--data", tmp_path / "no"), "data folder .*no does not exist"),
        (("--stream", llava, "--data", vqa), "leave out --data"),
        (("--stream", tmp_path), "has no stages"),
        (("--stream", llava, "--order", "stage2,stage3"), "unknown stage 'stage3'"),
    ]:
        with pytest.raises(InputError, match=message):
            load(*words)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_broken_image(tmp_path, content):
    path = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(InputError, match="broken.png is corrupt or truncated"):
        data.load_image(path)
    with pytest.raises(InputError, match="gone.png"):
        data.load_image(tmp_path / "gone.png")


def test_schedule_rises_once_then_falls_to_zero():
    rates = [data.schedule(k, 50, 0.1) for k in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]) and rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.01
    assert data.schedule(0, 1, 0.1) == data.schedule(0, 50, 0.0) == 1


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def test_defaults_follow_stream_and_model(model_folder, capsys):
    tiny, large = model_folder(128), model_folder(4096)
    args = data.resolve_defaults(flags("--stream", "vqacl", "--model", large))
    chosen = (args.lr, args.epochs, args.batch_size, args.rank, args.alpha, args.dropout)
    assert chosen == (1e-4, 3, 80, 16, 32, 0.05) and args.targets == "q,v,projector"
    assert args.object_groups == "paper" and args.imbalance is None and args.hold_out is None
    assert "lr 0.0001, warm_up 0.1, epochs 3, batch_size 80" in capsys.readouterr().out
    args = data.resolve_defaults(flags("--stream", "vqav2", "--model", large, "--batch_size", 4))
    assert (args.lr, args.epochs, args.batch_size, args.object_groups) == (2e-4, 1, 4, None)
    for stream in data.STREAMS:
        args = data.resolve_defaults(flags("--stream", stream, "--model", tiny))
        assert (args.imbalance == 10.0) == (stream == "clt-vqa")
    own = data.resolve_defaults(flags("--stream", "my/folder", "--model", tiny))
    assert own.lr == data.TINY["lr"] and own.batch_size % own.accumulate == 0


def test_llava_15_leaves_its_text_width_out(model_folder):
    assert data.text_width(str(model_folder(text_config={"model_type": "llama"}))) == 4096


def test_faulty_models(model_folder, tmp_path):
    folder = model_folder(model_type="llama")
    with pytest.raises(InputError, match="is no LLaVA: .*model_type 'llama'"):
        data.text_width(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is corrupt"):
        data.text_width(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="missing file .*config.json"):
        data.text_width(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no .safetensors weights"):
        data.text_width(str(folder))
    for name in (tmp_path / "none", "assets/tiny-llavo", "./runs/x"):
        with pytest.raises(InputError, match="does not exist"):
            data.text_width(str(name))


def test_hub_model(monkeypatch, model_folder):
    import huggingface_hub

    folder = model_folder(4096)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: folder / file)
    assert data.text_width("llava-hf/llava-1.5-7b-hf") == 4096

    def offline(name, file):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="the hub says: no network$"):
        data.text_width("llava-hf/llava-1.5-7b-hf")


POSITIVE = "lr epochs batch_size accumulate rank alpha limit limit_test feature_gb".split()
BAD_FLAGS = [
    *((f"--{key} {value}", f"--{key} {value}.* must be above zero")
      for key in POSITIVE for value in (0, -1)),
    ("--lr nan", "--lr nan must be above zero"),
    ("--lr inf", "above zero"),
    ("--dropout 1", "0 <= P < 1"),
    ("--warm_up 1", "0 <= W < 1"),
    ("--threads -1", "--threads -1"),
    ("--device gpu", "--device 'gpu'"),
    ("--targets q,x", "--targets has 'x'"),
    ("--targets q,", "--targets has ''"),
    ("--batch_size 10 --accumulate 4", "--batch_size 10 by --accumulate 4"),
    ("--stream clt-vqa --imbalance 0.5", "--imbalance 0.5 must be 1 or more"),
    ("--stream domains --imbalance 5", "--imbalance belongs to --stream clt-vqa"),
    ("--stream domains --hold_out G1", "--hold_out belongs to --stream vqacl"),
    ("--stream domains --object_groups released", "--object_groups belongs to --stream vqacl"),
]  # fmt: skip


@pytest.mark.parametrize("words, message", BAD_FLAGS)
def test_bad_flags(words, message, model_folder):
    with pytest.raises(InputError, match=message):
        data.check_args(flags(*words.split()))
    with pytest.raises(InputError, match=message):
        data.resolve_defaults(flags("--model", model_folder(), *words.split()))


def test_flags_are_not_abbreviated_and_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        flags("--epoch", "3")
    with pytest.raises(SystemExit):
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == len(vars(flags())) and "W + (alpha / r) B A" in text


def test_fail(capsys):
    with pytest.raises(SystemExit) as stop:
        data.fail(InputError("no such file"))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no such file\n"


def test_faults_are_reported_before_torch_is_imported(tmp_path):
    code = (
        "import sys, argparse, data\n"
        "parser = argparse.ArgumentParser(); data.add_common_flags(parser)\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "try: data.load_stream(args)\n"
        "except data.InputError as error: data.fail(error if 'torch' not in sys.modules else '')"
    )
    command = [sys.executable, "-c", code, "--stream", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=data.ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown stream 'nothing'")


# --------------------------------------------------------------------------------------------------
# Mini streams and the check
# --------------------------------------------------------------------------------------------------


def test_mini_stream_is_drawn_once_and_only_whole(monkeypatch, tmp_path):
    drawn = []

    def draw_stream(name, folder):
        drawn.append(name)
        (folder / "picture").write_text(str(mini.VERSION))
        if mini.VERSION == 0:
            raise KeyboardInterrupt

    mini = types.SimpleNamespace(VERSION=0, draw_stream=draw_stream)
    monkeypatch.setitem(sys.modules, "mini", mini)
    monkeypatch.setattr(data, "ROOT", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        data.mini_folder("domains")
    assert not (tmp_path / "data" / "mini" / "domains").exists()
    for mini.VERSION, times in ((1, 2), (1, 2), (2, 3), (2, 3)):
        folder = data.mini_folder("domains")
        assert len(drawn) == times and (folder / "picture").read_text() == str(mini.VERSION)
    assert [path.name for path in folder.parent.iterdir()] == ["domains"]


@pytest.fixture
def checked_model(model_folder, llama):
    folder = model_folder()
    llama.save_pretrained(folder)
    return folder


def test_check_of_a_good_stream(vqa, checked_model, capsys):
    words = ["--stream", "vqacl", "--data", vqa, "--model", checked_model, "--hold_out", "G2"]
    assert data.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "nothing is missing" in out and "novel test of G2: 1" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("color "))
    assert row.split() == ["color", "1", "50872", "1", "2192", "G1", "1"]
    lines = out[out.index("one sample") :].splitlines()
    rows = {line.split("'")[1]: line.split()[-2:] for line in lines if "'" in line}
    assert rows[" color"] == ["yes", "-"] and rows["</s>"] == ["-", "yes"]
    assert rows[" word"] == rows["\\n"] == ["-", "-"] and "'<image>' x 4" in out


def test_check_lists_what_is_missing(vqa, checked_model, capsys):
    path = vqa / "vqa" / "Partition_Q" / "karpathy_train_q_color.json"
    records = json.loads(path.read_text())
    gone = [records[0] | {"img_id": f"COCO_train2014_{k:012d}"} for k in range(100, 125)]
    write(path, records + gone)
    broken = vqa / "COCO" / "train2014" / "COCO_train2014_000000000002.png"
    broken.write_bytes(broken.read_bytes()[:40])
    words = ["--stream", "vqacl", "--data", vqa, "--model", checked_model]
    assert data.main([str(word) for word in words]) == 1
    out = capsys.readouterr().out
    assert "26 problems" in out and "and 6 more" in out
    assert "missing image" in out and "000000000100" in out and "one sample: 1000" in out


def test_check_without_any_usable_file(vqa, checked_model, capsys):
    for path in (vqa / "vqa" / "Partition_Q").iterdir():
        path.write_text("[")
    words = ["--stream", "vqav2", "--data", vqa, "--model", checked_model]
    assert data.main([str(word) for word in words]) == 1
    assert "line 1 column 2" in capsys.readouterr().out


def test_a_folder_may_be_called_like_a_stream(tmp_path):
    """Only what is drawn by mini.py has a manifest; a folder of one's own needs none."""
    home = tmp_path / "dcl" / "one"
    home.mkdir(parents=True)
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    (home / "train.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    test = [{"question_id": "0", "text": "1 + 1?", "answer": "2"}]
    (home / "test.json").write_text(json.dumps(test))
    args = flags("--stream", tmp_path / "dcl")
    assert [s.name for s in data.load_stream(args).stages] == ["one"]
    assert not hasattr(args, "drawn_sha256")
