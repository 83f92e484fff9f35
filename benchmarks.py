r"""The benchmarks: a table of them, and how their released files are read into samples.

A benchmark is a sequence of stages, each with a training and a test file. `data.py` makes a stream
of it: orders the stages, limits and groups their samples, turns them into tokens.

VQACL's release (vqacl, vqav2, clt-vqa: VQA v2 cut into 10 types of question), and one record:
  DIR/vqa/Partition_Q/karpathy_{train,test}_q_<stage>.json   (the val files are not read)
      {"img_id": "COCO_train2014_000000458752", "question_id": 458752000, "label": {"net": 1},
       "sent": "What is this photo taken looking through?", ...}
  DIR/vqa/v2_mscoco_{train,val}2014_annotations.json         10 raw answers per question
  DIR/ImgId_cate_map.json              {"COCO_train2014_000000458752": one COCO category id, 1..90}
  DIR/COCO/{train2014,val2014}/<img_id>.jpg (or .png)
Without DIR/vqa, vqav2 reads CL-MoE's files, DIR/CL4VQA/{train,test}/{train,test}_q_<stage>.json:
LLaVA records with one gold answer, scored by exact match and comparable with CL-MoE's results only.
Sources: github.com/zhangxi1997/VQACL (partition), visualqa.org (VQA v2: CC BY 4.0), cocodataset.org
(2014 images: 13 GB + 6 GB; annotations CC BY 4.0, images under Flickr's terms of use).

LLaVA records (all other streams, and FOLDER) in DIR/<stage>/{train,test}.json, one JSON array per
file; image paths are relative to the file's folder, and a record without "image" is text only:
  train  {"id": "7", "image": "images/7.png", "conversations":
         [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A cat"}]}
  test   {"question_id": "7", "image": "images/7.png", "text": "What is shown?", "answer": "A cat"}
The table names other folders (`folders`, `images`) and files. Grounding's tests have "answer_bbox";
captions have further references in val_coco_type_3000.json (COCO's format) beside the test file.
Optional: a record's "skill", the kind of its question; and DIR/stream.json, which overrides the
table: {"stages": [...], "metric": "exact", "metrics": {stage: metric}, "suffix": "...",
"descriptions": {stage: one line for the router of mllm_cl.py}}.
"""

import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path


class InputError(Exception):
    """The user's input cannot be used. One sentence: what, where, what to do."""


@dataclass(slots=True)
class Sample:
    id: str
    image: Path | None  # absolute, or None: text only
    question: str  # as asked, suffix included, without the image token
    answer: str  # what training teaches
    answers: tuple[str, ...]  # what scoring accepts: 10 raw answers in VQA, else (answer,)
    skill: str  # kind of question
    stage: str
    group: str = ""  # object group G1..G5 (vqacl)
    suffix: str = ""  # end of `question` that all questions share: not a question row


# ---- 1. The table --------------------------------------------------------------------------------


@dataclass
class Task:
    """A stage in the table."""

    description: str = ""  # for mllm_cl.py's router; ours, in the tiny LLaVA's words if possible
    metric: str = ""  # "": the row's
    files: str = "train test"  # names of its two files
    published: tuple[int, int] | None = None  # training and test questions


@dataclass
class Row:
    """A stream in the table. To add a stream, add a row."""

    stages: dict[str, Task]  # in the paper's order
    metric: str = "exact"
    layout: str = "llava"  # which reader: "llava", "vqacl", "cl4vqa"
    folders: tuple[str, ...] = ("",)  # where the stages' folders may lie: the first that exists
    images: str | None = None  # what image paths are relative to; None: the file's folder
    suffix: str = ""  # appended to every question; LLaVA records contain it already
    test_suffix: Callable | None = None  # (stage, question) -> what tests append
    skill: str = "skill"  # where records without "skill" say the kind of their question
    real: dict = field(default_factory=dict)  # training defaults other than REAL's
    tiny: dict = field(default_factory=dict)  # and TINY's
    extras: dict = field(default_factory=dict)  # flags of this stream alone, with their defaults

    @property
    def descriptions(self) -> dict[str, str]:
        return {name: task.description for name, task in self.stages.items() if task.description}


METRICS = "exact same vqa textvqa letter option contains iou anls caption word-in gold-in sci fin"
METRICS = (*METRICS.split(), "ocr", "math", "count")
TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "projector")

# Defaults of the training flags. REAL is for 7B: ASR's setting, and the references' 128 new tokens.
# TINY was chosen on the mini streams; on a CPU, dropout masks would take a sixth of a step.
REAL = {"lr": 2e-4, "warm_up": 0.03, "epochs": 1, "batch_size": 16, "accumulate": 1, "rank": 16}
REAL |= {"alpha": 32.0, "dropout": 0.05, "targets": "q,v,projector", "max_new_tokens": 128}
TINY = REAL | {"lr": 1e-3, "warm_up": 0.1, "dropout": 0.0, "max_new_tokens": 16}
TINY |= {"targets": "q,v,gate,up,down"}

QUESTION_TYPES = {  # of VQA v2; counts from the tables of the VQACL and CL-MoE papers
    "recognition": Task("what a thing is called", published=(131478, 5628)),
    "location": Task("where a thing is", published=(12580, 611)),
    "judge": Task("questions with yes or no for an answer", published=(160179, 7194)),
    "commonsense": Task("what can be done with a thing", published=(25211, 1100)),
    "count": Task("how many things there are", published=(62156, 2658)),
    "action": Task("what a thing is doing", published=(33633, 1373)),
    "color": Task("the color of a thing", published=(50872, 2192)),
    "type": Task("what type of thing it is", published=(23932, 1089)),
    "subcategory": Task("which kind of animal, vehicle or food", published=(31594, 1416)),
    "causal": Task("why something is so", published=(5868, 200)),
}
DOMAINS = {  # the same mixed questions on 5 kinds of picture (mini, or LLaVA records of yours)
    "plain": Task("pictures in plain light"),
    "negative": Task("pictures with light and dark exchanged"),
    "recolored": Task("pictures whose colors are exchanged"),
    "noise": Task("gray pictures with noise"),
    "mosaic": Task("pictures of coarse squares"),
}
# Guo et al. 2025 (HiDe-LLaVA, arXiv 2503.12941); files of huggingface.co/HaiyangGuo/UCIT
SMALL_TEST, CUT_TRAIN = "train test_3000", "train_4w test_3000"
UCIT = {
    "ImageNet-R": Task("the word for one object", files=SMALL_TEST),
    "ArxivQA": Task("charts with bars: the letter of an answer", files=CUT_TRAIN),
    "VizWiz": Task("describe a picture of a sign", "caption", SMALL_TEST),
    "IconQA": Task("simple shapes: the letter of an answer", files=SMALL_TEST),
    "CLEVR": Task("how many objects there are with no circles", files=CUT_TRAIN),
    "Flickr30k": Task("describe a picture of things", "caption", "train_brief_4w test_3000"),
}
# huggingface.co/JuntaoTang/TriGap; its CRAM numbers use ANLS without the threshold of 0.5
STANDARD, CONVERTED = "train_standard_4w test_standard_3k", "train_converted val_converted"
INFOGRAPHICS = "infographicsVQA_train_converted infographicsVQA_val_converted"
TRIGAP = {
    "PMCVQA": Task("cells on a slide: the letter of an answer", files=STANDARD),
    "DocVQA": Task("words and numbers written on a page or sign", "anls", CONVERTED),
    "ChartQA": Task("the value of a bar in a chart", files=STANDARD),
    "IconQA": Task("simple shapes: the letter of an answer", files=SMALL_TEST),
    "InfographicVQA": Task("a window with words on buttons", "anls", INFOGRAPHICS),
    "ArxivQA": Task("which bar of a chart: the letter of an answer", files=CUT_TRAIN),
    "Roadside": Task("the road as the driver sees it", files=STANDARD),
    "ChemVQA": Task("diagrams with letters and shapes", files=STANDARD),
    "FloodNetVQA": Task("land and water seen from above", files=STANDARD),
    "CLEVR": Task("objects: how many, where, which color", files=CUT_TRAIN),
}
# Chen et al. 2024 (CoIN, arXiv 2403.08350); huggingface.co/datasets/Zacks-Chen/CoIN
COIN = {
    "ScienceQA": Task("diagrams: the letter of an answer", "letter"),
    "TextVQA": Task("what is written on a sign", "textvqa", "train val"),
    "ImageNet": Task("the word for one object", "contains"),
    "GQA": Task("where things are, and their colors"),
    "VizWiz": Task("what a thing is doing, the weather", "same", "train val"),
    "Grounding": Task("give the box of an object", "iou"),
    "VQAv2": Task("how many things there are, is there one", "same", "train val"),
    "OCRVQA": Task("a window with words on buttons"),
}
# Zhao et al. 2025 (MLLM-CL, arXiv 2506.05453); huggingface.co/datasets/MLLM-CL/MLLM-CL. DCL trains
# and tests on the same kind of data (IID), ACL tests on data of other sources (non-IID).
DCL = {
    "RS": Task("land seen from above: what covers it, how many houses", "word-in"),
    "Med": Task("cells on a stained slide, tumors", "gold-in"),
    "AD": Task("the road as the driver sees it: lights, cars, what to do", "word-in"),
    "Sci": Task("diagrams with letters, shapes and arrows", "sci"),
    "Fin": Task("candlestick charts: trend and price", "fin"),
}
ACL = {
    "OCR": Task("text and numbers written on signs and documents", "ocr", "train ../OCR_test/test"),
    "Math": Task("problems and equations to solve", "math", "train ../Math_test/test"),
    "VP": Task("counting objects", "count", "train ../VP_test/test"),
    "APP": Task("a window on a screen, its buttons", "option", "train ../APP_test/test"),
}


def dcl_suffix(stage: str, question: str) -> str:
    """What DCL's tests append to a question. Med's is MCITlib's (MLLM-CL has it for the zero-shot
    model only). MLLM-CL chooses Fin's by the GOLD answer, which gives the kind of question away; we
    ask whether the question lists options."""
    if stage == "Med":
        return "Answer the question with a single word (or phrase)."
    if stage == "Fin" and re.search(r"\bB[.:)]", question):
        return "Answer with the given letter directly, e.g., A, B, C, D."
    return "Only answer with yes or no directly." if stage == "Fin" else ""


SHORT = "Answer the question using a single word or phrase."
WORDS = {"max_new_tokens": 16}  # VQA's answers are a few words
VQACL_REAL = {"lr": 1e-4, "warm_up": 0.1, "epochs": 3, "batch_size": 80, "accumulate": 5} | WORDS
LONGER = {"lr": 4e-3, "epochs": 3, "max_new_tokens": 32}  # captions, letters, boxes
MR_LORA = {"lr": 2e-5, "batch_size": 64, "rank": 128, "alpha": 256.0, "targets": ",".join(TARGETS)}
ACL_REAL = MR_LORA | {"max_new_tokens": 512}  # the reference: OCR, Math 2048; others 64 or 128
ASR_TARGETS = {"targets": "q,v,projector"}  # the ASR paper's
VQA = Row(QUESTION_TYPES, "vqa", "vqacl", suffix=SHORT, real=WORDS, tiny={"lr": 5e-4} | ASR_TARGETS)
# The CRAM authors' code base, Prism, reads UCIT and TriGap from these folders.
PRISM = Row({}, "same", folders=("instructions", ""), images="datasets", tiny=LONGER)
PLAYGROUND = ("playground/Instructions_Original", "Instructions_Original")
STREAMS = {
    # inside a stage, 5 object groups one after the other
    "vqacl": replace(VQA, real=VQACL_REAL, extras={"object_groups": "paper", "hold_out": None}),
    "vqav2": VQA,
    # The paper's cut of the tail is not public: an exponential profile of this ratio instead.
    "clt-vqa": replace(VQA, extras={"imbalance": 10.0}),
    "domains": Row(DOMAINS, tiny={"lr": 2e-3} | ASR_TARGETS),
    "ucit": replace(PRISM, stages=UCIT),
    "trigap": replace(PRISM, stages=TRIGAP),
    "coin": Row(COIN, folders=PLAYGROUND, images="cl_dataset", tiny=LONGER),
    "dcl": Row(
        DCL, folders=("", "domain"), test_suffix=dcl_suffix, real=MR_LORA, tiny={"lr": 2e-3}
    ),
    # OCRBench says the kind of a question in answer_type.
    "acl": Row(ACL, folders=("", "ability"), skill="answer_type", real=ACL_REAL, tiny={"lr": 2e-3}),
}

# VQACL's object groups, 16 numbers each, as printed in its code. Meant as positions 0..79 among the
# 80 COCO classes ("paper": clean, the default). The released code compares them with raw COCO ids
# 1..90 instead ("released": its published numbers), so ten numbers match nothing, and the ten
# classes with ids 80..90 are neither trained nor tested.
GROUPS = {
    "G1": (58, 48, 55, 36, 64, 1, 70, 73, 42, 15, 6, 18, 49, 59, 31, 2),
    "G2": (19, 77, 22, 9, 24, 53, 12, 13, 78, 50, 47, 41, 32, 28, 54, 23),
    "G3": (60, 8, 34, 25, 67, 4, 14, 68, 3, 79, 0, 5, 65, 20, 71, 39),
    "G4": (35, 29, 66, 40, 43, 26, 72, 10, 38, 61, 76, 44, 75, 69, 16, 57),
    "G5": (45, 33, 63, 56, 21, 11, 62, 74, 17, 52, 46, 30, 27, 51, 37, 7),
}
GROUP_OF = {number: group for group, numbers in GROUPS.items() for number in numbers}
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def object_group(category: int, reading: str = "paper") -> str:
    """Group "G1".."G5" of a raw COCO category id (1..90); "" where the reading has none."""
    if reading == "paper":
        category = COCO_IDS.index(category) if category in COCO_IDS else -1
    return GROUP_OF.get(category, "")


# ---- 2. Readers, one per layout ------------------------------------------------------------------


def read_json(path: Path, kind: type):
    """Content of a JSON file that must hold a `kind` (list or dict); InputError with the line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"missing file {path}") from None
    except (OSError, ValueError) as error:  # broken JSON says its line and column
        raise InputError(f"{path} is corrupt or truncated: {error}") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} must hold one JSON {'array' if kind is list else 'object'}")
    return content


def text_of(value, what: str) -> str:
    """A stripped string that is not empty; numbers are taken as text."""
    text = str(value).strip() if type(value) in (str, int, float) else ""
    if not text:
        raise InputError(f"the {what} must be text, not {value!r}")
    return text


class Reader:
    """What the layouts share. A subclass says where a stage's file lies (`path`) and what a record
    holds (`fields`: image, question, gold answers; None leaves it out). Faults go to `problem`."""

    def __init__(self, root: Path, row: Row, problem: Callable):
        self.root, self.row, self.problem = root, row, problem
        # One listing per folder: 120,000 single look-ups take minutes on a network disk.
        self.names_in = cache(lambda folder: set(os.listdir(folder)) if folder.is_dir() else ())
        self.coco_image = cache(self.coco_image)  # about five questions share an image

    def table(self, path: Path) -> dict:
        """A JSON object; an empty one if the file is faulty."""
        try:
            return read_json(path, dict)
        except InputError as error:
            self.problem(str(error))
            return {}

    def read(self, stage: str, split: str) -> list[Sample]:
        """The samples of a stage's "train" or "test" file."""
        path, samples = self.path(stage, split), []
        try:
            records = read_json(path, list)
        except InputError as error:
            self.problem(str(error))
            return []
        for number, record in enumerate(records, 1):
            try:
                if not isinstance(record, dict):
                    raise InputError("no JSON object")
                if fields := self.fields(record, path):
                    samples.append(self.sample(record, stage, *fields))
            except InputError as error:
                self.problem(f"{path}, record {number}: {error}")
        if omitted := len(records) - len(samples):
            print(f"{stage}: {omitted} {split} questions without a usable answer are left out")
        if not samples:
            self.problem(f"stage {stage} has no {split} data: {path}")
        return samples

    def sample(self, record: dict, stage: str, image, question: str, answers: tuple) -> Sample:
        suffix = self.row.suffix
        if suffix and not question.endswith(suffix):
            question = f"{question}\n{suffix}"
        key = str(record.get("question_id", record.get("id", "")))
        answer = Counter(answers).most_common(1)[0][0]
        skill = str(record.get("skill", record.get(self.row.skill, stage)))
        return Sample(key, image, question, answer, answers, skill, stage, "", suffix)

    def image(self, folder: Path, name: str) -> Path:
        """The path of an existing image; InputError if it is missing or outside the data folder."""
        path = Path(os.path.normpath(folder / name))  # not resolve(): links to other disks are fine
        if not path.is_relative_to(self.root):
            raise InputError(f"image path {name!r} leaves the data folder {self.root}")
        if path.name not in self.names_in(path.parent):
            raise InputError(f"missing image {path}")
        return path

    def coco_image(self, img_id: str) -> Path:
        """The path of a COCO 2014 image: .jpg in the release, .png in the mini streams."""
        match = re.fullmatch(r"COCO_((?:train|val)2014)_\d{12}", img_id)
        if not match:
            raise InputError(f"{img_id!r} is no COCO 2014 image id")
        folder = self.root / "COCO" / match[1]
        drawn = f"{img_id}.png" in self.names_in(folder)
        return self.image(folder, f"{img_id}.{'png' if drawn else 'jpg'}")


class LlavaReader(Reader):
    """LLaVA records, of training ("conversations") and of tests."""

    def path(self, stage: str, split: str) -> Path:
        file = self.row.stages[stage].files.split()[split == "test"]
        paths = [self.root / folder / stage / f"{file}.json" for folder in self.row.folders]
        paths = [Path(os.path.normpath(path)) for path in paths]
        return next(filter(Path.exists, paths), paths[0])

    def fields(self, record: dict, path: Path) -> tuple:
        question, golds = record.get("text"), record.get("answer", record.get("answer_bbox"))
        if "conversations" in record:
            question, golds = self.turns(record["conversations"])
        else:  # predictions are joined with their golds by it
            text_of(record.get("question_id", record.get("id")), "question_id")
        image, question = record.get("image"), text_of(question, "question")
        if question.count("<image>") > (image is not None):
            raise InputError(f"{question.count('<image>')} <image> marks for image {image!r}")
        question = text_of(question.replace("<image>", ""), "question")
        golds = golds if isinstance(golds, list) and golds else [golds]
        answers = tuple(text_of(gold, "answer") for gold in golds)
        if image is not None:
            image = self.find(text_of(image, "image path"), path)
        return image, question, answers

    def turns(self, conversation) -> tuple:
        """(question, answer) of a training conversation; only single-turn ones can be read."""
        try:
            (human, question), (gpt, answer) = [(t["from"], t["value"]) for t in conversation]
        except (TypeError, KeyError, ValueError):
            human = gpt = None
        if (human, gpt) != ("human", "gpt"):
            raise InputError("conversations must be one human turn and one gpt turn")
        return question, answer

    def find(self, image: str, path: Path) -> Path:
        return self.image(self.root / self.row.images if self.row.images else path.parent, image)

    def read(self, stage: str, split: str) -> list[Sample]:
        samples = super().read(stage, split)
        if split == "test" and self.row.test_suffix:
            for sample in samples:
                sample.suffix = self.row.test_suffix(stage, sample.question)
                sample.question = f"{sample.question} {sample.suffix}".strip()
        if split == "test" and self.row.stages[stage].metric == "caption":
            self.add_references(self.path(stage, split).with_name(REFERENCES), samples)
        return samples

    def add_references(self, path: Path, samples: list[Sample]) -> None:
        """All references of the captions; the file's image_id counts test records from 1."""
        if not path.exists():
            print(f"note: {path} is missing: captions are compared with one reference each")
            return
        captions: dict[int, list[str]] = {}
        try:
            for row in self.table(path)["annotations"]:
                caption = text_of(row["caption"], "caption")
                captions.setdefault(int(row["image_id"]), []).append(caption)
        except (InputError, KeyError, TypeError, ValueError) as error:
            self.problem(f"{path} is no COCO caption file: {error!r}")
        for number, sample in enumerate(samples, 1):
            sample.answers = tuple(captions.get(number, sample.answers))


class CL4VQAReader(LlavaReader):
    """CL-MoE's files: LLaVA records whose image paths end in COCO's file names."""

    def path(self, stage: str, split: str) -> Path:
        return self.root / "CL4VQA" / split / f"{split}_q_{stage}.json"

    def find(self, image: str, path: Path) -> Path:
        return self.coco_image(Path(image).stem)


class VQACLReader(Reader):
    """VQACL's release."""

    def __init__(self, root: Path, row: Row, problem: Callable):
        super().__init__(root, row, problem)
        self.golds = cache(self.raw_answers)  # large files, opened when a test question needs them

    def path(self, stage: str, split: str) -> Path:
        return self.root / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{stage}.json"

    def fields(self, record: dict, path: Path) -> tuple | None:
        key, label = text_of(record.get("question_id"), "question_id"), record.get("label")
        question = text_of(record.get("sent"), "question")
        image = self.coco_image(text_of(record.get("img_id"), "img_id"))
        if path.name.startswith("karpathy_test"):
            golds = self.golds(image.parent.name)
            if golds and not golds.get(key):
                raise InputError(f"question {key} has no answer in the annotations")
            return golds and (image, question, golds[key])
        scores = list(label.values()) if isinstance(label, dict) else [None]
        if not all(isinstance(score, int | float) and score >= 0 for score in scores):
            raise InputError(f"label must map answers to scores, not {label!r}")
        if not any(scores):  # every answer outside the release's 3129: nothing to learn
            return None
        # The release draws one answer with probability proportional to its score, anew at each
        # visit. We draw once, seeded by the question, so that all epochs and seeds teach the same.
        answer = random.Random(f"answer/{key}").choices(list(label), scores)[0]
        return image, question, (text_of(answer, "answer"),)

    def raw_answers(self, split: str) -> dict[str, tuple[str, ...]]:
        """Question id -> the annotators' answers, of a COCO split; {} if the file is faulty."""
        path, golds = self.root / "vqa" / f"v2_mscoco_{split}_annotations.json", {}
        try:
            for row in self.table(path).get("annotations", ()):
                answers = (sys.intern(answer["answer"].strip()) for answer in row["answers"])
                golds[str(row["question_id"])] = tuple(filter(None, answers))
        except (KeyError, TypeError) as error:
            self.problem(f"{path} is no VQA annotation file: {error!r}")
        return golds

    def group(self, sample: Sample, categories: dict, reading: str) -> str:
        """Object group of a sample, by the COCO category of its image; "" if it has none."""
        img_id = sample.image.stem  # the release's key; a plain image number is taken as well
        category = categories.get(img_id, categories.get(str(int(img_id[-12:])), 0))
        if category and category not in COCO_IDS:
            self.problem(f"ImgId_cate_map.json: {img_id} maps to {category!r}, no COCO id")
            category = 0
        return object_group(category, reading)


REFERENCES = "val_coco_type_3000.json"  # beside the test file of captions
READERS = {"llava": LlavaReader, "cl4vqa": CL4VQAReader, "vqacl": VQACLReader}
