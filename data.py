r"""Streams of question-answering stages, read from disk and turned into tokens.

    python data.py --stream vqacl               check the mini stream (drawn on first use)
    python data.py --stream vqacl --data DIR    check the released files in DIR
    python data.py --stream FOLDER              check a stream of your own

A stream is a list of stages; a stage is a training list and a test list of `Sample`s. The stages
come one after the other, and after each the model is tested on all of them. This file imports no
torch until it makes tensors, so that wrong arguments and paths are reported at once.

Streams
  vqacl    VQA v2 cut into 10 question types; inside each, 5 object groups one after the other
  vqav2    the same 10 question types, no groups       clt-vqa  the same, answers long-tailed
  domains  5 picture domains, the same mixed questions (mini only, or LLaVA files of your own)
  ucit     6 datasets, one instruction and form of answer each    coin  8    trigap  10
  dcl      MLLM-CL's 5 domains; training and test data are alike (IID)
  acl      MLLM-CL's 4 abilities; training and test data are of different sources (non-IID), in the
           mini stream, too: tests are at dusk, on a blackboard, with other things to be counted,
           under a night filter
  FOLDER   any folder in the LLaVA layout below: bring your own

Layout of the VQACL release (vqacl, vqav2, clt-vqa), and one record of it:
  DIR/vqa/Partition_Q/karpathy_{train,test}_q_<stage>.json   (the val files are never read)
      {"img_id": "COCO_train2014_000000458752", "question_id": 458752000, "answer_type": "other",
       "sent": "What is this photo taken looking through?", "label": {"net": 1},
       "question_type": "what is this"}
  DIR/vqa/v2_mscoco_{train,val}2014_annotations.json         10 raw answers per question
  DIR/ImgId_cate_map.json              {"COCO_train2014_000000458752": one COCO category id, 1..90}
  DIR/COCO/{train2014,val2014}/<img_id>.jpg (or .png)
  vqav2 also takes CL-MoE's files: DIR/CL4VQA/{train,test}/{train,test}_q_<stage>.json (LLaVA
  records with one gold, hence scored by exact match; its results compare with CL-MoE only).
Sources: github.com/zhangxi1997/VQACL (partition), visualqa.org (VQA v2: CC BY 4.0), cocodataset.org
(2014 images: 13 GB + 6 GB; annotations CC BY 4.0, the pictures under Flickr's terms of use).

Layout of LLaVA-style streams (domains, FOLDER): DIR/<stage>/{train,test}.json, images relative to
DIR/<stage>/, one JSON array per file, records as below; "image" may be missing (text only).
  train  {"id": "7", "image": "images/7.png", "conversations":
         [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A cat"}]}
  test   {"question_id": "7", "image": "images/7.png", "text": "What is shown?", "answer": "A cat"}
ucit, coin and trigap hold such records in other folders, DIR/instructions/<stage>/<file>.json with
images relative to DIR/datasets/ (coin: DIR/playground/Instructions_Original and DIR/cl_dataset);
the table below has the names of the files. Test records of Grounding have "answer_bbox"; captions
have more references in val_coco_type_3000.json beside the test file (COCO's format).
dcl is DIR/<domain>/{images/,train.json,test.json}; acl has DIR/<ability>/{images/,train.json} and
DIR/<ability>_test/{images/,test.json}.
An optional DIR/stream.json overrides the table: {"stages": [...], "metric": "exact" | "vqa" | ...,
"metrics": {stage: metric, where it is another one}, "suffix": "...", "descriptions": {stage: one
line for the router of mllm_cl.py}}. A record may
carry "skill", the kind of its question; else it is the stage's name.

Worked example. The vqacl record above becomes, for LLaVA-1.5 ([..] is in the loss, _.._ are the
question rows; the instruction is neither):
  <s>USER: <image> x 576 \n _What is this photo taken looking through?_ \n Answer the question using
  a single word or phrase. ASSISTANT:[ net</s>]
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options and experts


class InputError(Exception):
    """Something the user gave cannot be used. One sentence: what, where, what to do."""


def fail(message) -> None:
    """Print `error: message` to stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# 1. Records and the table of streams
# --------------------------------------------------------------------------------------------------


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
    suffix: str = ""  # the part of `question` that is the same everywhere: no question row


@dataclass
class Stage:
    name: str
    train: list[Sample]
    test: list[Sample]
    metric: str  # how answers are scored: a name of eval.SCORERS
    blocks: list[list[int]] | None = None  # vqacl: indices of `train` by object group, as visited


@dataclass
class Stream:
    name: str
    stages: list[Stage]
    root: Path
    suffix: str = ""
    published: dict[str, tuple[int, int]] = field(default_factory=dict)  # stage -> (train, test)
    descriptions: dict[str, str] = field(default_factory=dict)  # stage -> one line
    novel: list[Stage] | None = None  # with hold_out: per stage the test of the group left out


QUESTION_TYPES = (
    "recognition location judge commonsense count action color type subcategory causal".split()
)
# (train, test) counts quoted from the tables of the VQACL and CL-MoE papers, real data only.
_TRAIN = (131478, 12580, 160179, 25211, 62156, 33633, 50872, 23932, 31594, 5868)
_TEST = (5628, 611, 7194, 1100, 2658, 1373, 2192, 1089, 1416, 200)
VQA_COUNTS = dict(zip(QUESTION_TYPES, zip(_TRAIN, _TEST, strict=True), strict=True))
SHORT = "Answer the question using a single word or phrase."
# One line a task for the router of mllm_cl.py to read. All such lines are ours, short and in the
# tiny LLaVA's words as far as it has them; for real data others can go into DIR/stream.json.
VQA_TASKS = {
    "recognition": "what a thing is called",
    "location": "where a thing is",
    "judge": "questions with yes or no for an answer",
    "commonsense": "what can be done with a thing",
    "count": "how many things there are",
    "action": "what a thing is doing",
    "color": "the color of a thing",
    "type": "what type of thing it is",
    "subcategory": "which kind of animal, vehicle or food",
    "causal": "why something is so",
}

# Training defaults shared by all streams; rows of the table below override them. 7B values: ASR's
# setting. Tiny values: chosen by experiment on the mini streams.
REAL = {"lr": 2e-4, "warm_up": 0.03, "epochs": 1, "batch_size": 16, "accumulate": 1}
REAL |= {"max_new_tokens": 128}  # longest answer; the references have 128 if not said otherwise
TINY = {"lr": 1e-3, "warm_up": 0.1, "epochs": 1, "batch_size": 16, "accumulate": 1}
# On a CPU a sixth of a step would go into drawing dropout masks.
TINY |= {"targets": "q,v,gate,up,down", "dropout": 0.0, "max_new_tokens": 16}
ASR_TARGETS = {"targets": "q,v,projector"}  # the ASR paper's
LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": "q,v,projector"}
TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "projector")


METRICS = ("exact", "same", "vqa", "textvqa", "letter", "option", "contains", "iou", "anls")
METRICS += ("anls_0.5", "relaxed", "caption", "word-in", "gold-in", "sci", "fin", "ocr", "math")
METRICS += ("count",)
HAS_LEGACY = ("contains", "iou")  # scorers with a quirk in the references: --legacy


@dataclass
class Row:
    """One line of the table of streams. To add a stream, add a line."""

    stages: list[str]
    layout: str = "llava"  # how the files lie: "vqa" (VQACL release) or "llava"
    metric: str = "exact"
    metrics: dict = field(default_factory=dict)  # stage -> metric, where it is another one
    files: dict = field(default_factory=dict)  # stage -> "train test", names of its files
    folders: tuple = ("",)  # where the folders of the stages may lie; the first that exists
    images: str | None = None  # what image paths are relative to (None: the file's folder)
    test_suffix: Callable | None = None  # (stage, question, gold, legacy) -> added in tests only
    skill: str = "skill"  # where a record says the kind of its question, if not in "skill"
    descriptions: dict = field(default_factory=dict)  # stage -> one line, for mllm_cl.py's router
    suffix: str = ""  # appended to every question; LLaVA-style files hold it already
    published: dict = field(default_factory=dict)
    real: dict = field(default_factory=dict)  # training defaults that differ from REAL, TINY, LORA
    tiny: dict = field(default_factory=dict)
    extras: dict = field(default_factory=dict)  # flags only this stream takes, with their defaults


_VQA = {"layout": "vqa", "metric": "vqa", "suffix": SHORT, "published": VQA_COUNTS}
_VQA |= {"descriptions": VQA_TASKS, "tiny": {"lr": 5e-4, **ASR_TARGETS}}
_WORDS = {"max_new_tokens": 16}  # VQA's answers are a few words
STREAMS = {
    "vqacl": Row(
        QUESTION_TYPES,
        **_VQA,
        real={"lr": 1e-4, "warm_up": 0.1, "epochs": 3, "batch_size": 80, "accumulate": 5} | _WORDS,
        extras={"object_groups": "paper", "hold_out": None},
    ),
    "vqav2": Row(QUESTION_TYPES, **_VQA, real=_WORDS),
    # The paper's own cut of the tail is not public: an exponential profile of this ratio instead.
    "clt-vqa": Row(QUESTION_TYPES, **_VQA, real=_WORDS, extras={"imbalance": 10.0}),
    "domains": Row(
        "plain negative recolored noise mosaic".split(),
        descriptions={
            "plain": "pictures in plain light",
            "negative": "pictures with light and dark exchanged",
            "recolored": "pictures whose colors are exchanged",
            "noise": "gray pictures with noise",
            "mosaic": "pictures of coarse squares",
        },
        tiny={"lr": 2e-3, **ASR_TARGETS},
    ),
}

_PRISM = {"folders": ("instructions", ""), "images": "datasets"}
_PRISM |= {"tiny": {"lr": 4e-3, "epochs": 3, "max_new_tokens": 32}, "metric": "same"}
_4W = "train_standard_4w test_standard_3k"
STREAMS |= {
    # Guo et al. 2025 (HiDe-LLaVA, arXiv 2503.12941); files of huggingface.co/HaiyangGuo/UCIT
    "ucit": Row(
        "ImageNet-R ArxivQA VizWiz IconQA CLEVR Flickr30k".split(),
        metrics={"VizWiz": "caption", "Flickr30k": "caption"},
        files={
            "ImageNet-R": "train test_3000",
            "ArxivQA": "train_4w test_3000",
            "VizWiz": "train test_3000",
            "IconQA": "train test_3000",
            "CLEVR": "train_4w test_3000",
            "Flickr30k": "train_brief_4w test_3000",
        },
        descriptions={
            "ImageNet-R": "the word for one object",
            "ArxivQA": "charts with bars: the letter of an answer",
            "VizWiz": "describe a picture of a sign",
            "IconQA": "simple shapes: the letter of an answer",
            "CLEVR": "how many objects there are with no circles",
            "Flickr30k": "describe a picture of things",
        },
        **_PRISM,
    ),
    # huggingface.co/JuntaoTang/TriGap; its CRAM numbers use ANLS without the 0.5 threshold
    "trigap": Row(
        "PMCVQA DocVQA ChartQA IconQA InfographicVQA ArxivQA Roadside ChemVQA FloodNetVQA "
        "CLEVR".split(),
        metrics={"DocVQA": "anls", "InfographicVQA": "anls"},
        files={
            "PMCVQA": _4W,
            "DocVQA": "train_converted val_converted",
            "ChartQA": _4W,
            "IconQA": "train test_3000",
            "InfographicVQA": "infographicsVQA_train_converted infographicsVQA_val_converted",
            "ArxivQA": "train_4w test_3000",
            "Roadside": _4W,
            "ChemVQA": _4W,
            "FloodNetVQA": _4W,
            "CLEVR": "train_4w test_3000",
        },
        descriptions={
            "PMCVQA": "cells on a slide: the letter of an answer",
            "DocVQA": "words and numbers written on a page or sign",
            "ChartQA": "the value of a bar in a chart",
            "IconQA": "simple shapes: the letter of an answer",
            "InfographicVQA": "a window with words on buttons",
            "ArxivQA": "which bar of a chart: the letter of an answer",
            "Roadside": "the road as the driver sees it",
            "ChemVQA": "diagrams with letters and shapes",
            "FloodNetVQA": "land and water seen from above",
            "CLEVR": "objects: how many, where, which color",
        },
        **_PRISM,
    ),
    # Chen et al. 2024 (CoIN, arXiv 2403.08350); huggingface.co/datasets/Zacks-Chen/CoIN
    "coin": Row(
        "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCRVQA".split(),
        metrics={
            "ScienceQA": "letter",
            "TextVQA": "textvqa",
            "ImageNet": "contains",
            "VizWiz": "same",
            "Grounding": "iou",
            "VQAv2": "same",
        },
        files=dict.fromkeys(("ScienceQA", "ImageNet", "GQA", "Grounding", "OCRVQA"), "train test")
        | dict.fromkeys(("TextVQA", "VizWiz", "VQAv2"), "train val"),
        folders=("playground/Instructions_Original", "Instructions_Original"),
        images="cl_dataset",
        descriptions={
            "ScienceQA": "diagrams: the letter of an answer",
            "TextVQA": "what is written on a sign",
            "ImageNet": "the word for one object",
            "GQA": "where things are, and their colors",
            "VizWiz": "what a thing is doing, the weather",
            "Grounding": "give the box of an object",
            "VQAv2": "how many things there are, is there one",
            "OCRVQA": "a window with words on buttons",
        },
        tiny={"lr": 4e-3, "epochs": 3, "max_new_tokens": 32},
    ),
}


def dcl_suffix(stage: str, question: str, gold: str, legacy: bool) -> str:
    """What is added to DCL's test questions. Med's is MCITlib's; MLLM-CL's scripts add it only for
    the zero-shot model. MLLM-CL chooses Fin's from the GOLD answer, which tells the kind of
    question (legacy); ours looks at the question: does it list options?"""
    if stage == "Med":
        return "Answer the question with a single word (or phrase)."
    if stage == "Fin":
        yes_no = gold.lower() in ("yes", "no") if legacy else not re.search(r"\bB[.:)]", question)
        if yes_no:
            return "Only answer with yes or no directly."
        return "Answer with the given letter directly, e.g., A, B, C, D."
    return ""


_ALL_LINEAR = {"targets": "q,k,v,o,gate,up,down,projector"}
STREAMS |= {
    # Zhao et al. 2025 (MLLM-CL, arXiv 2506.05453); huggingface.co/datasets/MLLM-CL/MLLM-CL
    "dcl": Row(
        "RS Med AD Sci Fin".split(),
        metrics={"RS": "word-in", "Med": "gold-in", "AD": "word-in", "Sci": "sci", "Fin": "fin"},
        folders=("", "domain"),
        test_suffix=dcl_suffix,
        descriptions={
            "RS": "land seen from above: what covers it, how many houses",
            "Med": "cells on a stained slide, tumors",
            "AD": "the road as the driver sees it: lights, cars, what to do",
            "Sci": "diagrams with letters, shapes and arrows",
            "Fin": "candlestick charts: trend and price",
        },
        real={"lr": 2e-5, "batch_size": 64, "rank": 128, "alpha": 256.0, **_ALL_LINEAR},
        tiny={"lr": 2e-3},
    ),
    "acl": Row(
        "OCR Math VP APP".split(),
        metrics={"OCR": "ocr", "Math": "math", "VP": "count", "APP": "option"},
        files={stage: f"train ../{stage}_test/test" for stage in "OCR Math VP APP".split()},
        folders=("", "ability"),
        skill="answer_type",  # OCRBench's
        descriptions={
            "OCR": "text and numbers written on signs and documents",
            "Math": "problems and equations to solve",
            "VP": "counting objects",
            "APP": "a window on a screen, its buttons",
        },
        # the reference allows 2048 new tokens for OCR and Math, and 64 or 128 for the others
        real={"lr": 2e-5, "batch_size": 64, "rank": 128, "alpha": 256.0, **_ALL_LINEAR}
        | {"max_new_tokens": 512},
        tiny={"lr": 2e-3},
    ),
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
POSITION = {category: position for position, category in enumerate(COCO_IDS)}  # raw id -> 0..79


def object_group(category: int, reading: str = "paper") -> str:
    """Group "G1".."G5" of a raw COCO category id (1..90); "" where the reading has none."""
    return GROUP_OF.get(POSITION.get(category, -1) if reading == "paper" else category, "")


# --------------------------------------------------------------------------------------------------
# 2. Readers. A faulty record or file raises InputError; load_stream stops there or collects all
# --------------------------------------------------------------------------------------------------


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


def _text(value, what: str) -> str:
    """A stripped string that is not empty; numbers are taken as text."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise InputError(f"the {what} must be text, not {value!r}")
    if value is None or not str(value).strip():
        raise InputError(f"empty {what}")
    return str(value).strip()


class Reader:
    """Reads the samples below one data folder."""

    def __init__(self, root: Path, suffix: str, problem, skill: str = "skill"):
        self.root, self.suffix, self.problem, self.skill = root, suffix, problem, skill
        self.listings: dict[Path, set[str]] = {}  # file names per image folder
        self.found: dict[str, Path] = {}  # COCO image id -> file
        self.golds: dict[str, dict | None] = {}  # question id -> raw answers, per COCO split
        self.unlabelled = 0

    def read(self, path: Path, make) -> list[Sample]:
        """The samples that make(record) gives for one JSON array; faults go to `problem`."""
        samples, place = [], ""
        try:
            records = read_json(path, list)
        except InputError as error:
            self.problem(str(error))
            return []
        for number, record in enumerate(records, 1):
            try:
                place = f"{path}, record {number}"
                if not isinstance(record, dict):
                    raise InputError("no JSON object")
                samples.append(make(record))
            except InputError as error:
                self.problem(f"{place}: {error}")
        return [sample for sample in samples if sample]

    def exists(self, path: Path) -> bool:
        # One listing per folder: 120,000 single look-ups take minutes on a network disk.
        if path.parent not in self.listings:
            folder = os.scandir(path.parent) if path.parent.is_dir() else ()
            self.listings[path.parent] = {entry.name for entry in folder}
        return path.name in self.listings[path.parent]

    def image(self, folder: Path, name: str) -> Path:
        path = Path(os.path.normpath(folder / name))  # not resolve(): links to other disks are fine
        if not path.is_relative_to(self.root):
            raise InputError(f"image path {name!r} leaves the data folder {self.root}")
        if not self.exists(path):
            raise InputError(f"missing image {path}")
        return path

    def coco_image(self, img_id) -> Path:
        if img_id in self.found:  # five questions per image, 600,000 in all
            return self.found[img_id]
        match = re.fullmatch(r"COCO_((?:train|val)2014)_\d{12}", img_id)
        if not match:
            raise InputError(f"{img_id!r} is no COCO 2014 image id")
        folder = self.root / "COCO" / match[1]
        png = folder / f"{img_id}.png"  # the mini streams' pictures
        path = png if self.exists(png) else self.image(folder, f"{img_id}.jpg")
        return self.found.setdefault(img_id, path)

    def sample(self, record, key, image, question, answers, stage) -> Sample:
        if self.suffix and not question.endswith(self.suffix):
            question = f"{question}\n{self.suffix}"
        answer = Counter(answers).most_common(1)[0][0]
        skill = str(record.get("skill", record.get(self.skill, stage)))
        return Sample(str(key), image, question, answer, answers, skill, stage, "", self.suffix)

    def llava(self, record: dict, stage: str, folder: Path, coco: bool = False) -> Sample:
        """Sample of a LLaVA record, train or test (told apart by "conversations")."""
        question, golds = record.get("text"), record.get("answer", record.get("answer_bbox"))
        if "conversations" in record:
            turns = record["conversations"]
            if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
                raise InputError("conversations must be a list of turns")
            if [turn.get("from") for turn in turns] != ["human", "gpt"]:
                raise InputError(f"conversations must be a human and a gpt turn, not {len(turns)}")
            question, golds = turns[0].get("value"), turns[1].get("value")
        name = record.get("image")
        question = _text(question, "question")
        if question.count("<image>") > (name is not None):
            raise InputError(f"{question.count('<image>')} <image> marks for {name!r}; at most one")
        question = _text(question.replace("<image>", ""), "question")
        golds = golds if isinstance(golds, list) and golds else [golds]
        answers = tuple(_text(gold, "answer") for gold in golds)
        image = None
        if name is not None:  # CL-MoE's image paths end in COCO's file names
            name = _text(name, "image path")
            image = self.coco_image(Path(name).stem) if coco else self.image(folder, name)
        key = record.get("question_id", record.get("id", ""))
        if "conversations" not in record:
            _text(key, "question_id")  # predictions are joined with their golds by it
        return self.sample(record, key, image, question, answers, stage)

    def vqa(self, record: dict, stage: str, train: bool) -> Sample | None:
        """Sample of a VQACL record; None for a training question without a labelled answer."""
        key, label = _text(record.get("question_id"), "question_id"), record.get("label")
        question = _text(record.get("sent"), "question")
        image = self.coco_image(_text(record.get("img_id"), "img_id"))
        if not train:
            answers = self.raw_answers(image.parent.name, key)
            return answers and self.sample(record, key, image, question, answers, stage)
        scores = list(label.values()) if isinstance(label, dict) else [None]
        if not all(isinstance(score, int | float) and score >= 0 for score in scores):
            raise InputError(f"label must map answers to scores, not {label!r}")
        if not any(scores):  # every answer outside the release's 3129: nothing to learn
            self.unlabelled += 1
            return None
        # The release draws one answer with probability proportional to its score, anew at each
        # visit. We draw once, seeded by the question, so that all epochs and seeds teach the same.
        answer = random.Random(f"answer/{key}").choices(list(label), scores)[0]
        return self.sample(record, key, image, question, (_text(answer, "answer"),), stage)

    def raw_answers(self, split: str, key: str) -> tuple[str, ...] | None:
        path = self.root / "vqa" / f"v2_mscoco_{split}_annotations.json"
        if split not in self.golds:  # opened only if a test question needs it: the files are large
            self.golds[split] = None
            try:
                self.golds[split] = {
                    str(row["question_id"]): tuple(sys.intern(a["answer"]) for a in row["answers"])
                    for row in read_json(path, dict)["annotations"]
                }
            except (KeyError, TypeError) as error:
                raise InputError(f"{path} is no VQA annotation file: {error!r}") from None
        if self.golds[split] is None:  # reported already
            return None
        answers = tuple(a.strip() for a in self.golds[split].get(key, ()) if a.strip())
        if not answers:
            raise InputError(f"question {key} has no answer in {path}")
        return answers


# --------------------------------------------------------------------------------------------------
# 3. load_stream: find the folder, read the stages, order them, cut them
# --------------------------------------------------------------------------------------------------


def mini_folder(name: str) -> Path:
    """data/mini/<name>, drawn if it is not there yet or was drawn by another version of mini.py."""
    import mini

    folder = ROOT / "data" / "mini" / name
    manifest = {"stream": name, "version": mini.VERSION, "settings": {}}

    def current() -> bool:
        try:
            found = json.loads((folder / "manifest.json").read_text())
            return "sha256" in found and found | manifest == found
        except (OSError, ValueError):
            return False

    if current():
        return folder
    print(f"drawing the mini stream {name} into {folder} (once)")
    fresh, old = (folder.with_name(f"{name}.{word}-{os.getpid()}") for word in ("new", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    mini.draw_stream(name, fresh, **manifest["settings"])
    digest = hashlib.sha256()
    for path in sorted(path for path in fresh.rglob("*") if path.is_file()):
        digest.update(path.relative_to(fresh).as_posix().encode() + path.read_bytes())
    drawn = manifest | {"sha256": digest.hexdigest()}
    (fresh / "manifest.json").write_text(json.dumps(drawn))
    try:  # renamed only when complete: an interrupted drawing never looks finished
        if folder.exists() and not current():
            folder.rename(old)
        fresh.rename(folder)
    except OSError:  # another run was faster; its folder is the same
        if not current():
            raise
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _find(args) -> tuple[str, Row, Path]:
    """(name, row of the table, folder) of the stream that the arguments ask for."""
    if args.stream in STREAMS:
        root = Path(args.data) if args.data else mini_folder(args.stream)
        if not root.is_dir():
            raise InputError(f"data folder {root} does not exist; data.py's head shows its layout")
        return args.stream, STREAMS[args.stream], root
    root = Path(args.stream)
    if not root.is_dir():
        known = ", ".join(STREAMS)
        raise InputError(f"unknown stream {args.stream!r}: use {known}, or an existing folder")
    if args.data:
        raise InputError(f"--stream {root} is a folder and already the data: leave out --data")
    found = {path.parent.name for path in [*root.glob("*/train.json"), *root.glob("*/test.json")]}
    # by name, with stage2 before stage10
    stages = sorted(found, key=lambda name: [p.zfill(9) for p in re.split(r"(\d+)", name)])
    return root.resolve().name, Row(stages), root


def ordered(names: list[str], order: str | None) -> list[str]:
    """Stage names in the order asked for: names ("a,b"; leaving some out is a shorter stream),
    "reverse", or an integer that seeds a shuffle."""
    if order is None or order == "reverse":
        return list(names)[:: -1 if order else 1]
    if order.isdecimal() and order not in names:
        return random.Random(f"order/{order}").sample(names, len(names))
    chosen = [name.strip() for name in order.split(",")]
    for name in chosen:
        if name not in names:
            raise InputError(f"--order names an unknown stage {name!r}: use {', '.join(names)}")
        if chosen.count(name) > 1:
            raise InputError(f"--order names stage {name!r} twice")
    return chosen


def _some(samples: list, limit: int | None, seed: str) -> list:
    """At most `limit` of the samples, in their own order, chosen by the seed."""
    if limit is None or limit >= len(samples):
        return samples
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def long_tail(samples: list[Sample], ratio: float, seed: str) -> list[Sample]:
    """Cut by answer: the answer of rank r (of A, by count) keeps the share ratio^(-r / (A - 1)).

    With balanced answers that is the usual exponential profile, n_max / n_min = ratio; VQA's
    answers have a long tail of their own, which becomes `ratio` times steeper. One sample stays."""
    places: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        places.setdefault(sample.answer, []).append(i)
    ranked, kept = sorted(places, key=lambda answer: (-len(places[answer]), answer)), []
    for rank, answer in enumerate(ranked):
        share = ratio ** (-rank / max(1, len(ranked) - 1))
        n = max(1, round(share * len(places[answer])))
        kept += random.Random(f"{seed}/{answer}").sample(places[answer], n)
    return [samples[i] for i in sorted(kept)]


def more_captions(path: Path, samples: list[Sample], problem) -> None:
    """Take the references of test captions from a COCO file, if there is one: its image_id is the
    place of a sample in the test file, counted from 1."""
    if not path.exists():
        return
    found: dict[int, list[str]] = {}
    try:
        for row in read_json(path, dict)["annotations"]:
            found.setdefault(int(row["image_id"]), []).append(_text(row["caption"], "caption"))
    except (InputError, KeyError, TypeError, ValueError) as error:
        problem(f"{path} is no COCO caption file: {error!r}")
    for number, sample in enumerate(samples, 1):
        sample.answers = tuple(found.get(number, sample.answers))


def _stop(message: str) -> None:
    raise InputError(message)


def load_stream(args, problem=_stop) -> Stream:
    """Read and check the stream of `args` (stream, data, seed, order, limit, limit_test,
    object_groups, hold_out, imbalance). Raises InputError at the first fault, or, given another
    `problem`, hands it every fault. Images are looked up here and decoded by `load_image`."""
    name, row, root = _find(args)
    root = Path(os.path.abspath(root))
    if args.stream in STREAMS and not args.data:  # drawn: a run on other drawings is another run
        args.drawn_sha256 = read_json(root / "manifest.json", dict)["sha256"]
    spec = read_json(root / "stream.json", dict) if (root / "stream.json").exists() else {}
    names, suffix = spec.get("stages", row.stages), spec.get("suffix", row.suffix)
    cl4vqa = name == "vqav2" and not (root / "vqa").exists() and (root / "CL4VQA").exists()
    metric = spec.get("metric", "exact" if cl4vqa else row.metric)
    legacy = "-legacy" if args.legacy else ""  # the references' quirks, where there are any
    images = None if row.images is None else root / row.images
    if not isinstance(names, list) or not names:
        raise InputError(f"{root} has no stages: sub-folders with train.json and test.json")
    if not all(isinstance(n, str) and Path(n).name == n and n != ".." for n in names):
        raise InputError(f"{root}/stream.json: stages must be plain folder names, not {names}")
    for key in ("metrics", "descriptions"):
        if not isinstance(spec.get(key, {}), dict):
            raise InputError(f"{root}/stream.json: {key} must be {{stage: text}}")
    metrics = ({} if "metric" in spec else row.metrics) | spec.get("metrics", {})
    if not {metric, *metrics.values()} <= set(METRICS) or not isinstance(suffix, str):
        known = ", ".join(METRICS)
        raise InputError(f"{root}/stream.json: metric must be one of {known}, and suffix text")
    reader = Reader(root, suffix, problem, row.skill)
    grouped = "object_groups" in row.extras
    categories = {}
    if grouped:
        try:
            categories = read_json(root / "ImgId_cate_map.json", dict)
        except InputError as error:
            problem(str(error))

    def read(stage: str, split: str) -> list[Sample]:
        if cl4vqa:
            path = root / "CL4VQA" / split / f"{split}_q_{stage}.json"
            samples = reader.read(path, lambda r: reader.llava(r, stage, root, coco=True))
        elif row.layout == "vqa":
            path = root / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{stage}.json"
            samples = reader.read(path, lambda r: reader.vqa(r, stage, split == "train"))
        else:
            file = row.files.get(stage, "train test").split()[split == "test"]
            paths = [Path(os.path.normpath(root / folder / stage / f"{file}.json"))
                     for folder in row.folders]  # fmt: skip
            path = next((path for path in paths if path.exists()), paths[0])
            samples = reader.read(path, lambda r: reader.llava(r, stage, images or path.parent))
            if split == "test" and row.test_suffix and "suffix" not in spec:
                for s in samples:
                    s.suffix = row.test_suffix(stage, s.question, s.answer, args.legacy)
                    s.question = f"{s.question} {s.suffix}".strip()
            if split == "test" and metric_of(stage) == "caption":
                more = path.with_name("val_coco_type_3000.json")
                more_captions(more, samples, problem)
                if args.data and not more.exists():
                    print(f"note: {more} is missing: captions are compared with one reference each")
        if not samples:
            problem(f"stage {stage} is without {split} data: {path}")
        if reader.unlabelled:
            print(f"{stage}: {reader.unlabelled} training questions have no label, left out")
            reader.unlabelled = 0
        return samples

    def metric_of(stage: str) -> str:
        own = metrics.get(stage, metric)
        return own + legacy if own in HAS_LEGACY else own

    def group_of(sample: Sample) -> str:
        img_id = sample.image.stem  # the release's key; a plain image number is taken as well
        category = categories.get(img_id, categories.get(str(int(img_id[-12:])), 0))
        if not isinstance(category, int) or category and category not in POSITION:
            problem(f"{root}/ImgId_cate_map.json: {img_id} maps to {category!r}, no COCO id")
            category = 0
        return object_group(category, args.object_groups or "paper")

    stages, novel = [], []
    for stage in ordered(names, args.order):
        train, test, blocks = read(stage, "train"), read(stage, "test"), None
        if grouped:
            for sample in train + test:
                sample.group = group_of(sample)
            lost = sum(not sample.group for sample in train + test)
            if lost:  # no category; in the released reading also classes that match no number
                print(f"{stage}: {lost} questions on images without object group left out")
            train, test = [s for s in train if s.group], [s for s in test if s.group]
            if not (train and test):
                problem(f"stage {stage} has no {'test' if train else 'train'} data in any group")
        if args.hold_out:
            # Novel composition: this group is trained in no stage. VQACL's code does train it in
            # the first one, so that its "novel" pairs hold a familiar object; we follow the clean
            # reading. The stage's own test keeps the other four groups.
            held = [s for s in test if s.group == args.hold_out]
            train = [s for s in train if s.group != args.hold_out]
            test = [s for s in test if s.group != args.hold_out]
            if not (train and test and held):
                sizes = f"{len(train)} train, {len(test)} test and {len(held)} novel questions"
                problem(f"stage {stage}: --hold_out {args.hold_out} leaves {sizes}, none may be 0")
            held = _some(held, args.limit_test, f"novel/{stage}")
            novel.append(Stage(stage, [], held, metric_of(stage)))
        if "imbalance" in row.extras:
            ratio = args.imbalance or row.extras["imbalance"]
            train = long_tail(train, ratio, f"tail/{stage}")
        train = _some(train, args.limit, f"{args.seed}/limit/{stage}")
        test = _some(test, args.limit_test, f"test/{stage}")  # the same questions for every seed
        if grouped:
            visit = random.Random(f"{args.seed}/groups/{stage}").sample(list(GROUPS), len(GROUPS))
            blocks = [[i for i, s in enumerate(train) if s.group == group] for group in visit]
            blocks = [block for block in blocks if block]
        stages.append(Stage(stage, train, test, metric_of(stage), blocks))
    if any(stage.metric == "math" for stage in stages):
        print("MathVista's published score needs a paid model to extract answers: ours is a "
              "rule-based stand-in")  # fmt: skip
    descriptions = row.descriptions | spec.get("descriptions", {})
    return Stream(name, stages, root, suffix, row.published, descriptions, novel or None)


def train_order(stage: Stage, seed: int, epoch: int, epochs: int = 1) -> list[int]:
    """Indices of stage.train in the order of pass number `epoch` (0-based) of `epochs`.

    Shuffled by the seed. In vqacl an object group is left only after all of its epochs, as in the
    release: pass k is the k-th part of that long sequence, so there `epochs` must be given."""
    assert epoch < epochs or not stage.blocks, f"epoch {epoch} of {epochs} epochs"
    sequence, n = [], len(stage.train)
    for k, block in enumerate(stage.blocks or [range(n)]):
        for visit in range(max(epochs, epoch + 1)):
            sequence += random.Random(f"{seed}/{stage.name}/{k}/{visit}").sample(block, len(block))
    return sequence[epoch * n : (epoch + 1) * n]


def steps_of(stage, args):
    """The optimizer steps of a stage over all epochs, each a list of micro-batches of indices."""
    size, micro = args.batch_size, args.batch_size // args.accumulate
    orders = [train_order(stage, args.seed, epoch, args.epochs) for epoch in range(args.epochs)]
    steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
    return [[step[m : m + micro] for m in range(0, len(step), micro)] for step in steps]


def schedule(k: int, n: int, warm_up: float) -> float:
    """Factor of the learning rate in step k of a stage's n: rises over the first warm_up n steps,
    as each stage has a fresh AdamW, whose first steps are its worst; then a cosine to zero."""
    first = round(warm_up * n)
    if k < first:
        return (k + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (k - first) / (n - first)))


# --------------------------------------------------------------------------------------------------
# 4. Flags that all scripts share
# --------------------------------------------------------------------------------------------------


# fmt: off
def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of run, data, model and training. None means: see `resolve_defaults`."""
    parser.allow_abbrev = False  # a shortened flag may mean another one after the next release
    add = parser.add_argument_group("run and data").add_argument
    add("--stream", default="vqacl", metavar="NAME|FOLDER",
        help=f"{', '.join(STREAMS)}, or a folder of your own (default: vqacl)")
    add("--data", metavar="DIR", help="folder with the released files (default: draw mini data)")
    add("--model", default="assets/tiny-llava", metavar="FOLDER|HUB-ID",
        help="a LLaVA in Hugging Face format, like llava-hf/llava-1.5-7b-hf (default: %(default)s)")
    add("--out", metavar="DIR", help="run folder (default: runs/SCRIPT-STREAM-SEED)")
    add("--seed", type=int, default=0, help="of initial LoRA, order and choices (default: 0)")
    add("--order", metavar="A,B,..|reverse|SEED",
        help="stages by name, last first, or shuffled by a seed (default: the papers' order)")
    add("--limit", type=int, metavar="N", help="training samples per stage (default: all)")
    add("--limit_test", type=int, metavar="N", help="test samples per stage (default: all)")
    add("--object_groups", choices=["paper", "released"],
        help="vqacl: read group numbers as class positions or as raw COCO ids (default: paper)")
    add("--hold_out", choices=list(GROUPS),
        help="vqacl: leave this object group out of training and test it apart (default: none)")
    add("--imbalance", type=float, metavar="RHO",
        help="clt-vqa: rho = n_max / n_min of the exponential tail over answers (default: 10)")
    add("--legacy", action="store_true",
        help="coin, dcl: score with the references' quirks, which eval.py names (default: off)")
    add("--resume", action="store_true", help="continue a killed run (default: off)")
    add("--plot", nargs="+", metavar="RUN", help="draw the figures of finished runs (default: off)")

    add = parser.add_argument_group("model and training").add_argument
    add("--epochs", type=int, metavar="E", help="passes over a stage "
        "(default: 1; 7B on vqacl 3; tiny model on ucit, trigap and coin 3)")
    add("--lr", type=float, metavar="ETA", help="peak learning rate eta of AdamW, cosine per stage "
        "(default: 2e-4, vqacl 1e-4, dcl and acl 2e-5; tiny model: by stream)")
    add("--warm_up", type=float, metavar="W", help="share of a stage's steps in which the learning "
        "rate rises to eta (default: 0.03, vqacl 0.1; tiny model 0.1)")
    add("--batch_size", type=int, metavar="B",
        help="samples per optimizer step (default: 16, vqacl 80, dcl and acl 64; tiny model 16)")
    add("--accumulate", type=int, metavar="N",
        help="micro-batches of B / N samples per step (default: 1; 7B on vqacl 5)")
    add("--rank", type=int, metavar="R", help="LoRA rank r in W + (alpha / r) B A "
        "(default: 16; 7B on dcl and acl 128)")
    add("--alpha", type=float, help="LoRA alpha in W + (alpha / r) B A "
        "(default: 32; 7B on dcl and acl 256)")
    add("--dropout", type=float, metavar="P", help="before LoRA's A (default: 0.05; tiny model 0)")
    add("--targets", metavar="A,B,..",
        help=f"layers with LoRA, of {','.join(TARGETS)} (default: {LORA['targets']}; dcl, "
        f"acl: all; tiny model: {TINY['targets']}, on the VQA streams and domains q,v,projector)")
    add("--device", default="auto", help="auto, cpu or cuda[:N] (default: auto, cuda if present)")
    add("--max_new_tokens", type=int, metavar="N",
        help="longest answer (default: 128, acl 512, VQA streams 16; tiny model 16, on ucit, "
        "trigap and coin 32)")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
        help="of the frozen weights (default: auto, bf16 on cuda, else fp32)")
    add("--threads", type=int, default=0, help="CPU threads (default: 0, torch decides)")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations instead of keeping them (default: on for cuda)")
    add("--features", default="memory", choices=["memory", "disk", "off"],
        help="where to keep the frozen tower's features (default: memory)")
    add("--feature_gb", type=float, default=4.0, metavar="GB",
        help="how much of them to keep; 7B: 1.2 MB an image (default: 4)")
# fmt: on


def weight(text):
    return float(text)


positive, fraction, count = weight, weight, int


def common_flags(prog, description):
    parser = argparse.ArgumentParser(prog, description=description)
    add_common_flags(parser)
    parser.add_argument("--eval_batch_size", type=int, default=32)
    return parser


def deviations(numbers):
    """argparse type of --published: "3,5" -> [3, 5], all of `numbers` for "all"."""

    def parse(text):
        chosen = list(numbers) if text == "all" else [int(n) for n in text.split(",") if n]
        if not set(chosen) <= set(numbers):
            raise argparse.ArgumentTypeError(f"choose from {', '.join(map(str, numbers))}")
        return sorted(chosen)

    return parse


def published_flag(add, numbers):
    """The flag --published: all, or some, of the deviations that a script can take back."""
    listed = ",".join(map(str, numbers))
    add("--published", nargs="?", const=listed, default="", type=deviations(numbers), metavar="N,N",
        help=f"as published: take back the deviations {listed} of its docs page, or some of them")


from contextlib import contextmanager


@contextmanager
def input_errors():
    """Print an InputError as `error: sentence` to stderr and leave with exit code 2."""
    try:
        yield
    except InputError as error:
        fail(error)


def text_width(model: str) -> int:
    """Hidden size of a LLaVA's language model, from its config.json alone (folder or hub id)."""
    folder = Path(model)
    path = folder / "config.json"
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"model folder {model} holds no .safetensors weights")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not model.startswith("assets/"):
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:  # no such name, no network, no permission: the hub has many
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"model {model} is no folder, and the hub says: {reason}") from None
    else:
        raise InputError(f"model folder {model} does not exist in {Path.cwd()}")
    config = read_json(path, dict)
    if config.get("model_type") != "llava":
        kind = config.get("model_type")
        raise InputError(f"model {model} is no LLaVA: {path} has model_type {kind!r}, not 'llava'")
    # LLaVA-1.5's own file leaves the size out: Llama's default is meant.
    return (config.get("text_config") or {}).get("hidden_size", 4096)


def resolve_defaults(args):
    """Fill every flag left at None from stream and model size, print what was chosen, return args.

    Raises InputError if the model is no LLaVA or a flag is out of range. --out, --device, --dtype
    and --gradient_checkpointing are left to the code that uses them."""
    row, width = STREAMS.get(args.stream, Row([])), text_width(args.model)
    size, values = ("tiny", TINY | row.tiny) if width < 512 else ("full-size", REAL | row.real)
    values = LORA | values | row.extras
    chosen = {k: v for k, v in values.items() if getattr(args, k) is None and v is not None}
    vars(args).update(chosen)
    check_args(args)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        args.processes = world  # goes into args.json
    listed = ", ".join(f"{key} {value}" for key, value in chosen.items()) or "all given"
    print(f"defaults for {args.stream} and a {size} model (text width {width}): {listed}")
    return args


def check_args(args) -> None:
    """Raise InputError for flags out of range or of another stream; None passes."""
    positive = "lr epochs batch_size accumulate rank alpha limit limit_test feature_gb"
    positive += " max_new_tokens"
    for key in positive.split():
        value = getattr(args, key)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{key} {value} must be above zero")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise InputError(f"--dropout {args.dropout} must lie in 0 <= P < 1")
    if args.warm_up is not None and not 0 <= args.warm_up < 1:
        raise InputError(f"--warm_up {args.warm_up} must lie in 0 <= W < 1")
    if args.imbalance is not None and not 1 <= args.imbalance < math.inf:
        raise InputError(f"--imbalance {args.imbalance} must be 1 or more (1 cuts nothing)")
    if args.threads < 0:
        raise InputError(f"--threads {args.threads} must be 0 (as torch likes) or more")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        raise InputError(f"--device {args.device!r} must be auto, cpu, cuda or cuda:N")
    if args.batch_size and args.accumulate and args.batch_size % args.accumulate:
        sizes = f"--batch_size {args.batch_size} by --accumulate {args.accumulate}"
        raise InputError(f"cannot divide {sizes}: the micro-batches of a step must be equal")
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    if world > 1:
        if ":" in args.device:
            raise InputError(
                f"--device {args.device}: torchrun gives every process its own GPU, "
                "leave the number out"
            )
        if (args.accumulate or 1) % world:
            raise InputError(
                f"--accumulate {args.accumulate} must be a multiple of the {world} "
                "processes that torchrun has started: each takes its micro-batches"
            )
    for target in args.targets.split(",") if args.targets is not None else ():
        if target not in TARGETS:
            raise InputError(f"--targets has {target!r}: use a comma list of {', '.join(TARGETS)}")
    for name, row in STREAMS.items():
        for key in row.extras:
            if getattr(args, key) is not None and args.stream != name:
                raise InputError(f"--{key} belongs to --stream {name}, not to {args.stream}")


# --------------------------------------------------------------------------------------------------
# 5. Images and tokens
# --------------------------------------------------------------------------------------------------


def load_image(path: Path) -> Image.Image:
    """The image as RGB, fully decoded; InputError naming the file if it is missing or broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken file can raise nearly anything inside a decoder
        raise InputError(f"image {path} is corrupt or truncated: {error}") from None


def pad_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of color `fill`, as LLaVA-1.5 was trained."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@cache
def _template(processor, chat_template, image: bool) -> tuple[str, str, str]:
    """The model's own chat template, as the texts around question and answer (before, between,
    after): rendered once with two private-use characters in their places, so that no question can
    be mistaken for a part of the template."""
    if not chat_template:
        raise InputError("the model has no chat template: add chat_template.jinja to its folder")
    q, a = "\ue000", "\ue001"
    user = [{"type": "image"}] * image + [{"type": "text", "text": q}]
    talk = [{"role": "user", "content": user}]
    reply = [{"role": "assistant", "content": [{"type": "text", "text": a}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    full = processor.apply_chat_template(talk + reply)
    marks = prompt.count(processor.image_token)
    if prompt.count(q) != 1 or full.count(q) != 1 or full.count(a) != 1 or marks != image:
        raise InputError("the model's chat template does not show one question, one answer and one "
                         f"{processor.image_token} per image; it gives {prompt!r}")  # fmt: skip
    before, between = prompt.split(q)
    gap, after = full.split(q)[1].split(a)
    # What stands before the answer is what generation will see. A blank that only the full talk has
    # ("ASSISTANT: net" against "ASSISTANT:") belongs to the answer: the model must produce it.
    gap = gap[len(between) :] if gap.startswith(between) else ""
    eos = processor.tokenizer.eos_token
    if not eos:
        raise InputError("the model's tokenizer has no end-of-sequence token")
    after = after.strip()  # LLaVA-1.5: "" (the template forgets </s>); ChatML: <|im_end|>
    return before, between, gap + a + (after if eos in after else after + eos)


def build_prompt(processor, question: str, answer: str | None = None, image: bool = True):
    """(text, (question start, question end), answer start) in characters; <image> stands once.

    Without an answer, text is the prompt for generation and ends at `answer start`. With one,
    text[answer start:] is the answer with its leading blank and end marks: exactly what the model
    must produce after the prompt, and the part in the loss."""
    if processor.image_token in question:
        raise InputError(f"a question must not contain {processor.image_token}: {question!r}")
    before, between, tail = _template(processor, processor.chat_template, image)
    text = before + question + between
    start = len(text)
    if answer is not None:
        text += tail.replace("\ue001", answer)
    return text, (len(before), len(before) + len(question)), start


class Collator:
    """Samples -> one batch of tensors [B, S]: input_ids, attention_mask, image_mask, question_mask
    (bool; the question without the stream's suffix) and, for training, labels (-100 but for answer
    and end-of-sequence). `question_offsets`: per sample [(column, start, end)], characters of the
    question. Training pads right; generation gets prompts only, padded LEFT."""

    def __init__(self, processor, image_tokens: int):
        self.processor, self.image_tokens = processor, image_tokens
        self.tokenizer = processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("the model has no fast tokenizer (tokenizer.json) to give offsets")

    def __call__(self, samples: list[Sample], train: bool) -> dict:
        import torch

        tokenizer, mark, tokens = self.tokenizer, self.processor.image_token, self.image_tokens
        texts, spans = [], []
        for s in samples:
            answer = s.answer if train else None
            text, (q, _), a = build_prompt(self.processor, s.question, answer, bool(s.image))
            if s.image:  # one mark becomes P marks, and everything behind it moves
                at, shift = text.index(mark), len(mark) * (tokens - 1)
                text = text[:at] + mark * tokens + text[at + len(mark) :]
                q, a = q + shift * (q > at), a + shift
            texts.append(text)
            spans.append((q, q + len(s.question.removesuffix(s.suffix).rstrip()), a))
        bos = tokenizer.bos_token
        doubled = bool(bos) and texts[0].startswith(bos)  # a template may have written it already
        coded = tokenizer(texts, add_special_tokens=not doubled, return_offsets_mapping=True)

        size = len(samples), max(len(ids) for ids in coded["input_ids"])
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids, labels = torch.full(size, pad), torch.full(size, -100)
        attention, question = torch.zeros(size, dtype=torch.long), torch.zeros(size).bool()
        question_offsets = []
        for b, (sample, (q0, q1, a)) in enumerate(zip(samples, spans, strict=True)):
            row, offsets = torch.tensor(coded["input_ids"][b]), coded["offset_mapping"][b]
            first = 0 if train else size[1] - len(row)
            ids[b, first : first + len(row)] = row
            attention[b, first : first + len(row)] = 1
            expected, found = tokens * bool(sample.image), int((row == self.image_id).sum())
            assert found == expected, f"sample {sample.id}: {found} image tokens, not {expected}"
            asked = [
                (first + i, max(x - q0, 0), min(y, q1) - q0)
                for i, (x, y) in enumerate(offsets)
                if x < q1 and y > q0
            ]
            question[b, [i for i, _, _ in asked]] = True
            question_offsets.append(asked)
            if train:
                # A token is in the loss if it ends behind the prompt, so a lone blank before a
                # digit counts too. Marks added by the tokenizer (<s>) have the empty span (0, 0).
                answer = torch.tensor([y > a for _, y in offsets])
                found = int(answer.sum())
                assert found > 1, f"sample {sample.id}: {found} of {len(row)} tokens are answer"
                labels[b, : len(row)][answer] = row[answer]
        batch = {"input_ids": ids, "attention_mask": attention, "question_mask": question}
        batch |= {"image_mask": (ids == self.image_id) & (attention == 1)}
        batch |= {"labels": labels} if train else {}
        return batch | {"question_offsets": question_offsets}


# --------------------------------------------------------------------------------------------------
# 6. python data.py: check a stream
# --------------------------------------------------------------------------------------------------


def show_sample(sample: Sample, processor) -> None:
    """Print one training sample token by token: is it a question row, is it in the loss?"""
    text, _, _ = build_prompt(processor, sample.question, image=sample.image is not None)
    images = [pad_square(load_image(sample.image), (127, 127, 127))] if sample.image else None
    ids = processor(text=[text], images=images)["input_ids"][0]
    marks = list(ids).count(processor.image_token_id)
    batch = Collator(processor, marks)([sample], train=True)
    print(f"\none sample: {sample.id}, {sample.image}\n{'token':>24}  question row  in the loss")
    for i, token in enumerate(batch["input_ids"][0].tolist()):
        name = repr(processor.tokenizer.decode([token]))
        if batch["image_mask"][0, i]:
            if batch["image_mask"][0, i - 1] and i:
                continue
            name += f" x {marks}"
        row, loss = batch["question_mask"][0, i], batch["labels"][0, i] != -100
        print(f"{name:>24}  {'yes' if row else '-':>12}  {'yes' if loss else '-':>11}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Check a stream's files and show what is in them.")
    add_common_flags(parser)
    args = parser.parse_args(argv)
    check_args(args)
    problems: list[str] = []
    stream = load_stream(args, problems.append)
    text_width(args.model)
    tests = [stage.test for stage in stream.stages + (stream.novel or [])]
    samples = [s for part in [stage.train for stage in stream.stages] + tests for s in part]
    images = sorted({s.image for s in samples if s.image})
    from tqdm import tqdm

    broken = set()
    for path in tqdm(images, f"decoding {len(images)} images", disable=None):
        try:
            load_image(path)
        except InputError as error:
            broken.add(path)
            problems.append(str(error))

    print(f"\n{stream.name} in {stream.root}: {len(stream.stages)} stages, {len(samples)} samples")
    print("published: real data, quoted from the VQACL and CL-MoE papers" * bool(stream.published))
    print(f"{'stage':>14} {'train':>8} {'published':>9} {'test':>8} {'published':>9}  groups")
    for stage in stream.stages:
        papers = stream.published.get(stage.name, ("-", "-"))
        sizes = Counter(s.group for s in stage.train if s.group)
        visits = " ".join(f"{g} {sizes[g]}" for g in dict.fromkeys(
            stage.train[block[0]].group for block in stage.blocks or []))  # fmt: skip
        print(f"{stage.name:>14} {len(stage.train):>8} {papers[0]:>9} {len(stage.test):>8} "
              f"{papers[1]:>9}  {visits or '-'}")  # fmt: skip
    for stage in stream.novel or []:
        print(f"{stage.name:>14} novel test of {args.hold_out}: {len(stage.test)}")

    print(f"\n{len(problems)} problems" if problems else "\nnothing is missing")
    for line in problems[:20]:
        print(f"  {line}")
    if len(problems) > 20:
        print(f"  and {len(problems) - 20} more")
    usable = [s for stage in stream.stages for s in stage.train if s.image not in broken]
    if usable:
        from transformers import AutoProcessor

        show_sample(usable[0], AutoProcessor.from_pretrained(args.model))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        fail(error)
