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
Several human and gpt turns about one image make one conversation: all of its answers are trained.
The table names other folders (`folders`, `images`) and files. Grounding's tests have "answer_bbox";
some golds stand in files of their own (GOLDS), and captions have further references in COCO's
format beside the test file (REFERENCES).
Optional: a record's "skill", the kind of its question; and DIR/stream.json, which overrides the
table: {"stages": [...], "metric": "exact", "metrics": {stage: metric}, "suffix": "...",
"descriptions": {stage: one line for the router of mllm_cl.py}}.
"""

import contextlib
import csv
import itertools
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from files import InputError, read_json


class MissingImage(InputError):
    """A record's image is not there; --skip_missing leaves the record out."""


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
    further: tuple[tuple[str, str], ...] = ()  # (question, answer) of later turns, trained as well


# ---- 1. The table --------------------------------------------------------------------------------


@dataclass
class Task:
    """A stage in the table."""

    description: str = ""  # for mllm_cl.py's router: the released data, in our words
    metric: str = ""  # "": the row's
    published: tuple = ("-", "-")  # training and test questions, as far as they are known
    files: str = ""  # names of its two files; "": the row's; "train test" is tried as well
    folder: str = ""  # another name of its folder


@dataclass
class Row:
    """A stream in the table. To add a stream, add a row."""

    stages: dict[str, Task]  # in the paper's order
    metric: str = "exact"
    layout: str = "llava"  # which reader: "llava", "vqacl", "cl4vqa"
    files: str = "train test"
    folders: tuple[str, ...] = ("",)  # where the stages' folders may lie: the first that exists
    images: tuple[str, ...] = ()  # what image paths may be relative to; (): the file's folder
    suffix: str = ""  # appended to every question; LLaVA records contain it already
    test_suffix: Callable | None = None  # (stage, question) -> what tests append
    skill: str = "skill"  # where records without "skill" say the kind of their question
    source: str = ""  # of the files and of `real`, with versions
    real: dict = field(default_factory=dict)  # training defaults other than REAL's
    tiny: dict = field(default_factory=dict)  # and TINY's
    extras: dict = field(default_factory=dict)  # flags of this stream alone, with their defaults

    @property
    def descriptions(self) -> dict[str, str]:
        return {name: task.description for name, task in self.stages.items() if task.description}


TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "projector")

# Defaults of the training flags. REAL is for 7B: ASR's setting, and the references' 128 new tokens.
# A dict has a value per stage. VICUNA is what LLaVA-1.5 has seen before every conversation, in its
# training and in that of the references. TINY was chosen on the mini streams; on a CPU, dropout
# masks would take a sixth of a step.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
REAL = {"lr": 2e-4, "warm_up": 0.03, "epochs": 1, "batch_size": 16, "accumulate": 1, "rank": 16}
REAL |= {"alpha": 32.0, "dropout": 0.05, "targets": "q,v,projector", "max_new_tokens": 128}
REAL |= {"system": VICUNA, "gamma": 0.05, "prototype_samples": 1000}
REAL |= {"router_lr": 2e-4, "router_epochs": 30, "router_batch": 16, "blind_shots": False}
TINY = REAL | {"lr": 1e-3, "warm_up": 0.1, "dropout": 0.0, "max_new_tokens": 16, "system": ""}
TINY |= {"targets": "q,v,gate,up,down", "prototype_samples": 200}
TINY |= {"router_lr": 4e-3, "router_epochs": 5, "router_batch": 4, "blind_shots": True}

QUESTION_TYPES = {  # of VQA v2; counts from the tables of the VQACL and CL-MoE papers
    "recognition": Task("naming a thing in an everyday photo", published=(131478, 5628)),
    "location": Task("where the photo was taken or where a thing is", published=(12580, 611)),
    "judge": Task("questions about a photo that are answered yes or no", published=(160179, 7194)),
    "commonsense": Task("yes or no by common sense: can one, would it", published=(25211, 1100)),
    "count": Task("how many people, animals or things a photo shows", published=(62156, 2658)),
    "action": Task("what somebody in a photo is doing", published=(33633, 1373)),
    "color": Task("the color of a thing in a photo", published=(50872, 2192)),
    "type": Task("what type of thing it is", published=(23932, 1089)),
    "subcategory": Task("what kind of animal, food, sport or vehicle", published=(31594, 1416)),
    "causal": Task("why something in a photo is so", published=(5868, 200)),
}
DOMAINS = {  # the same mixed questions on 5 kinds of picture (mini, or LLaVA records of yours)
    "plain": Task("pictures in plain light"),
    "negative": Task("pictures with light and dark exchanged"),
    "recolored": Task("pictures whose colors are exchanged"),
    "noise": Task("gray pictures with noise"),
    "mosaic": Task("pictures of coarse squares"),
}
# Guo et al. 2025 (HiDe-LLaVA, arXiv 2503.12941). "4w" are 40,000.
SMALL_TEST, CUT_TRAIN = "train test_3000", "train_4w test_3000"
FLICKR_FILES, N3, N4 = "train_brief_4w test_3000", ("-", 3000), (40000, 3000)
UCIT = {
    "ImageNet-R": Task("art, cartoons and toys: name the object", "", N3, SMALL_TEST),
    "ArxivQA": Task("figures of papers: the letter of an answer", "", N4, CUT_TRAIN),
    "VizWiz": Task("photos taken by blind people, to be described", "caption", N3, SMALL_TEST),
    "IconQA": Task("abstract diagrams and icons: an option", "", N3, SMALL_TEST),
    "CLEVR": Task("arithmetic with rendered solids", "", N4, CUT_TRAIN, "CLEVR-Math"),
    "Flickr30k": Task("photos of people, to be described", "caption", N4, FLICKR_FILES),
}
# TriGap's numbers of CRAM use ANLS without the threshold of 0.5.
STANDARD, CONVERTED = "train_standard_4w test_standard_3k", "train_converted val_converted"
INFOGRAPHICS = "infographicsVQA_train_converted infographicsVQA_val_converted"
TRIGAP = {
    "PMCVQA": Task("medical figures: the letter of an answer", "", N4, STANDARD),
    "DocVQA": Task("scanned documents: copy the answer", "anls", ("-", 5349), CONVERTED),
    "ChartQA": Task("charts: read off or compute a value", "", ("-", 2500), STANDARD),
    "IconQA": Task("abstract diagrams and icons: an option", "", N3, SMALL_TEST),
    "InfographicVQA": Task("posters of text and numbers", "anls", ("-", 2801), INFOGRAPHICS),
    "ArxivQA": Task("figures of papers: the letter of an answer", "", N4, CUT_TRAIN),
    "Roadside": Task("roads and traffic as seen from the roadside", "", N4, STANDARD),
    "ChemVQA": Task("molecules and chemistry", "", N4, STANDARD),
    "FloodNetVQA": Task("flooded land, seen from a drone", "", ("-", 1833), STANDARD),
    "CLEVR": Task("arithmetic with rendered solids", "", N4, CUT_TRAIN),
}
# Chen et al. 2024 (CoIN, arXiv 2403.08350)
COIN = {
    "ScienceQA": Task("school science: the letter of an answer", "letter", (12726, 4241)),
    "TextVQA": Task("text on signs, packages and books", "textvqa", (34602, 5000), "train val"),
    "ImageNet": Task("photos of one object: its class", "contains"),
    "GQA": Task("relations and attributes of things in a photo", "", (72140, 12578)),
    "VizWiz": Task("questions of blind people", "same", (20523, 4319), "train val"),
    "Grounding": Task("give the box of a described object", "iou"),
    "VQAv2": Task("short questions on everyday photos", "same", (82783, "-"), "train val"),
    "OCRVQA": Task("covers of books: title, author, genre"),
}
# Zhao et al. 2025 (MLLM-CL, arXiv 2506.05453). DCL trains and tests on the same kind of data (IID),
# ACL tests on data of other sources (non-IID).
DCL = {
    "RS": Task("land seen from the air: presence, number, area", "word-in", ("60k", "10k")),
    "Med": Task("stained tissue, photos of organs and diseases", "gold-in", ("22.8k", "9.8k")),
    "AD": Task("six cameras of a car: traffic, positions, plans", "word-in", ("60k", "10k")),
    "Sci": Task("biology, physics, chemistry, maps of states", "sci", ("33.4k", "8.2k")),
    "Fin": Task("stock charts with candlesticks: trends, indicators", "fin", ("60k", "10k")),
}
ACL = {
    "OCR": Task("reading text: scenes, handwriting, documents", "ocr", ("128.1k", 1000)),
    "Math": Task("equations, geometry, plots, puzzles, papers", "math", ("526.1k", 1000)),
    "VP": Task("counting the objects in a photo; weak at text", "count", ("119.9k", 788)),
    "APP": Task("screenshots: buttons, coordinates, actions", "option", ("147.3k", "0.8k")),
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
MR_LORA = {"rank": 32, "alpha": 64.0, "targets": ",".join(TARGETS)}
DCL_REAL = MR_LORA | {"epochs": {"RS": 1, "Med": 3, "AD": 1, "Sci": 2, "Fin": 1}}
ACL_REAL = MR_LORA | {"epochs": {"OCR": 3, "Math": 1, "VP": 1, "APP": 3}}
ACL_REAL |= {"lr": {"OCR": 5e-5, "Math": 2e-4, "VP": 2e-4, "APP": 2e-4}}
ACL_REAL |= {"max_new_tokens": 512}  # the reference: OCR, Math 2048; others 64 or 128
ASR_TARGETS = {"targets": "q,v,projector"}  # the ASR paper's
ASR_TUNING = {"gamma": 0.02}  # of its code for instruction tuning

# Where files and settings come from, with versions; docs/real.md has the commands to get them.
VQA_SOURCE = "VQACL's release (github.com/zhangxi1997/VQACL); settings: the ASR paper"
UCIT_SOURCE = "HiDe-LLaVA's, in its own, Prism's or MCITlib's folders; settings: the ASR paper"
TRIGAP_SOURCE = "Prism's release (github.com/LAMDA-CL/EMNLP2026-CRAM); settings: CRAM's code"
COIN_SOURCE = "CoIN's release (github.com/zackschen/CoIN); settings: the ASR paper"
MLLM_CL_SOURCE = "MLLM-CL's release, June 2025; settings: MCITlib v3, April 2026"

VQA = Row(QUESTION_TYPES, "vqa", "vqacl", suffix=SHORT, source=VQA_SOURCE)
VQA = replace(VQA, real=WORDS, tiny={"lr": 5e-4} | ASR_TARGETS)
# The CRAM authors' code base, Prism, reads UCIT and TriGap from `instructions` and `datasets`,
# MCITlib reads UCIT from UCIT/<stage>.
PRISM = {"folders": ("instructions", "", "UCIT"), "metric": "same", "tiny": LONGER}
PRISM |= {"images": ("datasets", "", "UCIT/datasets", "UCIT")}
HOMES = ("playground/Instructions_Original", "playground/Instruction_Original")
HOMES += ("Instructions_Original", "Instruction_Original")
PLAYGROUND = {"folders": HOMES, "images": ("cl_dataset",), "tiny": LONGER}
# OCRBench says in answer_type what kind of question it is.
ACL_FILES = {"files": "train ../{}_test/test", "skill": "answer_type"}
DOMAIN_DATA = ("", "domain", "Domain_data")  # the last is MCITlib's
MLLM_CL = {"source": MLLM_CL_SOURCE, "tiny": {"lr": 2e-3}}
STREAMS = {
    # inside a stage, 5 object groups one after the other
    "vqacl": replace(VQA, real=VQACL_REAL, extras={"object_groups": "paper", "hold_out": None}),
    "vqav2": VQA,
    # The paper's cut of the tail is not public: an exponential profile of this ratio instead.
    "clt-vqa": replace(VQA, extras={"imbalance": 10.0}),
    "domains": Row(DOMAINS, source="ours", tiny={"lr": 2e-3} | ASR_TARGETS),
    "ucit": Row(UCIT, source=UCIT_SOURCE, real=ASR_TUNING, **PRISM),
    "trigap": Row(TRIGAP, source=TRIGAP_SOURCE, **PRISM),
    "coin": Row(COIN, source=COIN_SOURCE, real=ASR_TUNING, **PLAYGROUND),
    "dcl": Row(DCL, folders=DOMAIN_DATA, test_suffix=dcl_suffix, real=DCL_REAL, **MLLM_CL),
    "acl": Row(ACL, folders=("", "ability"), real=ACL_REAL, **ACL_FILES, **MLLM_CL),
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


def text_of(value, what: str) -> str:
    """A stripped string that is not empty; numbers are taken as text. InputError, too, if it is no
    Unicode, or if it has the mark of an image where none can be."""
    if value is None:
        raise InputError(f"the {what} is missing")
    text = str(value).strip() if type(value) in (str, int, float) else ""
    if not text:
        raise InputError(f"the {what} must be text, not {value!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} has half a character (a surrogate): {value!a}") from None
    if "<image>" in text and what in ("answer", "later question", "description"):
        raise InputError(f"the {what} must not contain <image>: {value!r}")
    return text


class Reader:
    """What the layouts share. A subclass says where a stage's file lies (`path`) and what a record
    holds (`fields`: image, question, gold answers, further turns; None leaves it out). Faults go to
    `problem`; skip_missing: records whose image is missing are counted in `skipped` instead."""

    def __init__(self, root: Path, row: Row, problem: Callable, skip_missing: bool = False):
        self.root, self.row, self.problem = root, row, problem
        self.skip_missing, self.skipped = skip_missing, {}  # "stage split" -> number of records
        self.numbers = []  # of the records of the file last read that became samples, from 1
        # One listing per folder: 120,000 single look-ups take minutes on a network disk.
        self.names_in = cache(lambda folder: set(os.listdir(folder)) if folder.is_dir() else set())
        # about five questions share an image
        self.image, self.coco_image = cache(self.image), cache(self.coco_image)

    def table(self, path: Path) -> dict:
        """A JSON object; an empty one if the file is faulty."""
        try:
            return read_json(path, dict)
        except InputError as error:
            self.problem(str(error) + self.unextracted(path))
            return {}

    def unextracted(self, path: Path) -> str:
        """What to say of archives that lie where a file is missing, or above it; "" without any."""
        for folder in path.parents:
            names = [name for name in self.names_in(folder) if re.search(ARCHIVE, name)]
            if names:
                command = "unzip -d" if min(names).endswith("zip") else "tar -C"
                way = f"{command} {folder}{' -xf' * ('tar' in command)} {folder / min(names)}"
                return f"; archives there ({len(names)}) are not extracted: {way}"
            if folder == self.root:
                break
        return ""

    def read(self, stage: str, split: str) -> list[Sample]:
        """The samples of a stage's "train" or "test" file."""
        path, samples, absent, unusable = self.path(stage, split), [], [], 0
        self.numbers = []
        try:
            records = read_json(path, list)
        except InputError as error:
            self.problem(str(error) + self.unextracted(path))
            return []
        for number, record in enumerate(records, 1):
            try:
                if not isinstance(record, dict):
                    raise InputError("no JSON object")
                if fields := self.fields(record, path):
                    samples.append(self.sample(record, stage, *fields))
                    self.numbers.append(number)
                else:
                    unusable += 1
            except MissingImage as error:
                absent.append(Path(str(error)))
            except InputError as error:
                self.problem(f"{path}, record {number}: {error}")
        if unusable:
            print(f"{stage}: {unusable} {split} questions without a usable answer are left out")
        if absent:
            self.absent(f"{stage} {split}", path, absent, len(records))
        if not samples:
            self.problem(f"stage {stage} has no {split} data: {path}")
        if split == "test":
            self.tell_apart(stage, samples)
        return samples

    def tell_apart(self, stage: str, samples: list[Sample]) -> None:
        """Number the samples that share an id, by which answers are kept: 7, 7#2, 7#3."""
        met = Counter()
        for sample in samples:
            met[sample.id] += 1
            if met[sample.id] > 1:
                sample.id += f"#{met[sample.id]}"
        if twice := sum(met.values()) - len(met):
            print(f"note: {twice} test questions of {stage} have another's id: numbered #2, ..")

    def absent(self, name: str, path: Path, images: list[Path], records: int) -> None:
        """Count records without their image, or name them as a problem."""
        if self.skip_missing:
            print(
                f"{name}: {len(images)} of {records} records are left out, their image is missing"
            )
            self.skipped[name] = len(images)
            return
        self.problem(
            f"{path}: the image of {len(images)} of {records} records is missing, for example "
            f"{images[0]}{self.unextracted(images[0])}; --skip_missing leaves such records out"
        )

    def sample(self, record, stage, image, question, answers, further=()) -> Sample:
        suffix = self.row.suffix
        if suffix and not question.endswith(suffix):
            question = f"{question}\n{suffix}"
        key = str(record.get("question_id", record.get("id", "")))
        answer = Counter(answers).most_common(1)[0][0] if len(answers) > 1 else answers[0]
        skill = sys.intern(str(record.get("skill", record.get(self.row.skill, stage))))
        return Sample(key, image, question, answer, answers, skill, stage, "", suffix, further)

    def image(self, folder: Path, name: str) -> Path:
        """The path of an existing image; MissingImage, or InputError outside the data folder."""
        path = Path(os.path.normpath(folder / name))  # not resolve(): links to other disks are fine
        if not path.is_relative_to(self.root):
            raise InputError(f"image path {name!r} leaves the data folder {self.root}")
        if path.name not in self.names_in(path.parent):
            raise MissingImage(str(path))
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
        task = self.row.stages[stage]
        names = [name for name in (stage, task.folder) if name]
        files = (task.files or self.row.files).format(stage), "train test"
        files = [names.split()[split == "test"] for names in files]
        places = itertools.product(self.row.folders, names, files)
        paths = [self.root / folder / name / f"{file}.json" for folder, name, file in places]
        paths = [Path(os.path.normpath(path)) for path in paths]
        likely = [path for path in paths if path.parent.parent.is_dir()] or paths[:1]
        return next(filter(Path.exists, paths), max(likely, key=lambda path: len(path.parts)))

    def fields(self, record: dict, path: Path) -> tuple:
        further = ()
        if "conversations" in record:
            (question, gold), *further = self.turns(record["conversations"])
            golds = [gold]
        elif "text" not in record:
            raise InputError('it has neither "conversations" (training) nor "text" (test)')
        else:
            question, golds = record.get("text"), self.answers(record)
        image, question = record.get("image"), text_of(question, "question")
        if isinstance(image, list):
            raise InputError(f"{len(image)} images in one record: only one can be read")
        if question.count("<image>") > (image is not None):
            raise InputError(f"{question.count('<image>')} <image> marks for image {image!r}")
        question = text_of(question.replace("<image>", ""), "question")
        answers = tuple(text_of(gold, "answer") for gold in golds)
        further = tuple((text_of(q, "later question"), text_of(a, "answer")) for q, a in further)
        if image is not None:
            image = self.find(text_of(image, "image path"), path)
        return image, question, answers, further

    def answers(self, record: dict) -> list:
        """The gold answers of a test record, or of the file that has them."""
        # predictions are joined with their golds by it
        key = text_of(record.get("question_id", record.get("id")), "question_id")
        golds = record.get("answer", record.get("answer_bbox"))
        golds = self.golds_of_stage.get(key, golds)
        return golds if isinstance(golds, list) and golds else [golds]

    def turns(self, conversation) -> list[tuple]:
        """[(question, answer)] of a training conversation."""
        try:
            said = [(turn["from"], turn["value"]) for turn in conversation]
        except (TypeError, KeyError):
            said = []
        speakers = [speaker for speaker, _ in said]
        if not said or speakers != ["human", "gpt"] * (len(said) // 2):
            raise InputError("conversations must be human and gpt turns, one after the other")
        texts = [text for _, text in said]
        return list(zip(texts[::2], texts[1::2]))

    def find(self, image: str, path: Path) -> Path:
        """The image in one of the places where it may be; MissingImage names a likely one."""
        folders = [self.root / folder for folder in self.row.images] or [path.parent]
        for folder in folders:
            with contextlib.suppress(MissingImage):
                return self.image(folder, image)
        places = [folder / image for folder in folders]
        likely = next((place for place in places if place.parent.is_dir()), places[0])
        return self.image(likely.parent, likely.name)

    def read(self, stage: str, split: str) -> list[Sample]:
        self.golds_of_stage = self.side_golds(stage) if split == "test" else {}
        samples = super().read(stage, split)
        if split == "test" and self.row.test_suffix:
            for sample in samples:
                sample.suffix = self.row.test_suffix(stage, sample.question)
                sample.question = f"{sample.question} {sample.suffix}".strip()
        if split == "test" and self.row.stages[stage].metric == "caption":
            self.add_references(self.path(stage, split), samples)
        return samples

    def side_golds(self, stage: str) -> dict[str, list]:
        """{question_id: gold answers} of a stage whose golds have a file of their own; {} if the
        stage has none or the file is not there."""
        name, golds_of = GOLDS.get(stage, ("", None))
        paths = [self.root / folder / name for folder in (*self.row.images, *self.row.folders)]
        path = next(filter(Path.is_file, paths), None)
        if not path:
            return {}
        try:
            return golds_of(read_tsv(path) if path.suffix == ".tsv" else read_json(path))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            self.problem(f"{path} does not hold gold answers in its released form: {error!r}")
            return {}

    def add_references(self, path: Path, samples: list[Sample]) -> None:
        """All references of the captions; the file's image_id counts test records from 1."""
        paths = [path.with_name(name) for name in REFERENCES]
        path = next(filter(Path.exists, paths), None)
        if not path:
            print(f"note: {paths[0]} is missing: captions are compared with one reference each")
            return
        captions: dict[int, list[str]] = {}
        try:
            for row in self.table(path)["annotations"]:
                caption = text_of(row["caption"], "caption")
                captions.setdefault(int(row["image_id"]), []).append(caption)
        except (InputError, KeyError, TypeError, ValueError) as error:
            self.problem(f"{path} is no COCO caption file: {error!r}")
        for number, sample in zip(self.numbers, samples):
            sample.answers = tuple(captions.get(number, sample.answers))


def read_tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a cell can hold an image
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


GOLDS = {  # stage -> file with its tests' gold answers; its content -> {question_id: answers}
    "TextVQA": (  # ten people's answers
        "TextVQA/TextVQA_0.5.1_val.json",
        lambda content: {str(row["question_id"]): row["answers"] for row in content["data"]},
    ),
    "ScienceQA": (  # the number of the right choice, here its letter
        "ScienceQA/problems.json",
        lambda content: {key: [LETTERS[row["answer"]]] for key, row in content.items()},
    ),
    "GQA": (
        "GQA/testdev_balanced_questions.json",
        lambda content: {key: [row["answer"]] for key, row in content.items()},
    ),
    # MLLM-CL's question ALL_<n> is row n, counted from 0, as in its code that fills in MMT-Bench's
    # form; that this table has the same order is a guess.
    "APP": (
        "APP_test/MMT-Bench_ALL_MI_anno.tsv",
        lambda rows: {f"ALL_{n}": [row["answer"]] for n, row in enumerate(rows)},
    ),
}


class CL4VQAReader(LlavaReader):
    """CL-MoE's files: LLaVA records whose image paths end in COCO's file names."""

    def path(self, stage: str, split: str) -> Path:
        return self.root / "CL4VQA" / split / f"{split}_q_{stage}.json"

    def find(self, image: str, path: Path) -> Path:
        return self.coco_image(Path(image).stem)


class VQACLReader(Reader):
    """VQACL's release."""

    def __init__(self, *settings):
        super().__init__(*settings)
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


ARCHIVE = r"\.(tar|tgz|zip|tar\.\w+)$"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options and experts
REFERENCES = ("val_coco_type_3000.json", "test_coco_type.json")  # beside the test file of captions
READERS = {"llava": LlavaReader, "cl4vqa": CL4VQAReader, "vqacl": VQACLReader}
