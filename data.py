"""Streams of question-answering stages: find them, read them, order and cut them.

    python data.py --stream vqacl               check the mini stream (drawn on first use)
    python data.py --stream vqacl --data DIR    check the released files in DIR
    python data.py --stream FOLDER              check a stream of your own

A stream is a sequence of stages, each with training and test samples, learned one after the other.
benchmarks.py says which streams there are and how to read them; tokens.py makes tokens of them.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from benchmarks import (
    GROUPS,
    READERS,
    REAL,
    STREAMS,
    TARGETS,
    TINY,
    Row,
    Sample,
    Task,
    text_of,
)
from files import InputError, input_errors, load_image, pad_square, progress, read_json
from scorers import ALL_GOLDS, RULES
from tokens import Collator, build_prompt

ROOT = Path(__file__).resolve().parent
# Pictures of the reader's own are new to the tiny model: it needs steps, however few samples there
# are, and a higher rate (tests/test_own.py: handwritten digits and simple pictures).
OWN = {"tiny": {"epochs": None, "lr": 2e-3}}
OWN_STEPS = 175  # of a stage, about, but one pass at least
MINI_SOURCES = ("draw.py", "tasks.py", "streams.py", "sprites.png")  # what a drawing depends on


# ---- 1. Streams: find the folder, read the stages, order them, cut them --------------------------


@dataclass
class Stage:
    """A stage of a stream, ordered, limited and grouped as the flags ask."""

    name: str
    train: list[Sample]
    test: list[Sample]
    metric: str  # how answers are scored: a name in RULES or ALL_GOLDS of scorers.py
    blocks: list[list[int]] | None = None  # vqacl: indices of `train` by object group, as visited
    epochs: int = 1  # passes over `train`
    lr: float = 0.0  # peak learning rate


@dataclass
class Stream:
    """The stages in the order in which they are learned, and what is known about them."""

    name: str
    stages: list[Stage]
    root: Path
    row: Row | None = None  # of the table, with what the folder's stream.json changes
    descriptions: dict[str, str] = field(default_factory=dict)  # stage -> one line
    novel: list[Stage] | None = None  # with hold_out: per stage the test of the group left out
    skipped: dict[str, int] = field(default_factory=dict)  # "stage split" -> records left out


def mini_folder(name: str) -> Path:
    """data/mini/<name>, drawn by mini/streams.py if it is missing or older than the drawing code.

    Raises InputError with the script's last line if it fails.
    """
    mini, folder = ROOT / "mini", ROOT / "data" / "mini" / name
    code = b"".join((mini / file).read_bytes() for file in MINI_SOURCES)
    wanted = {"stream": name, "version": hashlib.sha256(code).hexdigest()}
    try:
        if json.loads((folder / "manifest.json").read_text()).items() >= wanted.items():
            return folder
    except (OSError, ValueError):  # never drawn
        pass
    print(f"drawing the mini stream {name} into {folder} (once)")
    command = [sys.executable, str(mini / "streams.py"), name, str(folder)]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise InputError(f"{' '.join(command)} failed: {reason}")
    return folder


def how_to_get(stream: str, folder: Path) -> str:
    """The commands that get a stream's released files into the folder DIR, from docs/real.md."""
    page = (ROOT / "docs" / "real.md").read_text(encoding="utf-8")
    blocks = re.findall(r"### ([^\n]+)\n\n```bash\n(.*?)```", page, re.DOTALL)
    texts = [text for names, text in blocks if f"`{stream}`" in names]
    if not texts:
        return "the head of benchmarks.py shows the layout"
    return f"how to get the files into DIR = {folder} (docs/real.md):\n\n{texts[0]}"


def find_stream(args) -> tuple[str, Row, Path]:
    """(name, row of the table, folder) of the stream that the arguments ask for."""
    if args.stream in STREAMS:
        row = STREAMS[args.stream]
        root = Path(os.path.abspath(args.data or mini_folder(args.stream)))
        if not root.is_dir():
            raise InputError(f"data folder {root} does not exist; {how_to_get(args.stream, root)}")
        return args.stream, row, root
    root = Path(os.path.abspath(args.stream))
    if not root.is_dir():
        known = ", ".join(STREAMS)
        raise InputError(f"unknown stream {args.stream!r}: use {known}, or an existing folder")
    if args.data:
        raise InputError(f"--stream {root} is a folder and already the data: leave out --data")
    names = {path.parent.name for path in root.glob("*/*.json") if path.stem in ("train", "test")}
    # by name, with stage2 before stage10
    names = sorted(names, key=lambda name: (re.sub(r"\d+", lambda n: n[0].zfill(9), name), name))
    return root.resolve().name, Row({name: Task() for name in names}, **OWN), root


def overridden(row: Row, root: Path) -> Row:
    """The row of the table with what DIR/stream.json changes; InputError if it is malformed."""
    path = root / "stream.json"
    table = {"stages": list(row.stages), "suffix": row.suffix, "metrics": {}, "descriptions": {}}
    spec = read_json(path, dict) if path.exists() else {}
    test_suffix = None if "suffix" in spec else row.test_suffix
    for key, value in table.items():
        if not isinstance(spec.setdefault(key, value), type(value)):
            raise InputError(f"{path}: {key} must be a value like {json.dumps(value)}")
    if unknown := set(spec) - {*table, "metric"}:
        known = ", ".join([*table, "metric"])
        raise InputError(f"{path}: unknown key {min(unknown)!r}; there are {known}")
    if not spec["stages"]:
        raise InputError(f"{root} has no stages: sub-folders with train.json and test.json")
    stages = {}
    for name in spec["stages"]:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise InputError(f"{path}: stages must be plain folder names, not {name!r}")
        if name in stages:
            raise InputError(f"{path}: two stages are called {name!r}")
        task = row.stages.get(name, Task())
        metric = spec["metrics"].get(name, spec.get("metric", task.metric or row.metric))
        if not isinstance(metric, str) or metric not in RULES | ALL_GOLDS:
            known = ", ".join(RULES | ALL_GOLDS)
            raise InputError(f"{path}: metric must be one of {known}, not {metric!r}")
        description = spec["descriptions"].get(name, task.description)
        try:
            description = description and text_of(description, "description")
            if len(description) > 500:
                raise InputError(f"the description of {name} is longer than 500 characters")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        stages[name] = replace(task, metric=metric, description=description)
    return replace(row, stages=stages, suffix=spec["suffix"], test_suffix=test_suffix)


def ordered(names: list[str], order: str | None) -> list[str]:
    """Stage names in the order asked for: names ("a,b"; leaving some out is a shorter stream),
    "reverse", or an integer that seeds a shuffle."""
    if order is None:
        return names
    if order == "reverse":
        return names[::-1]
    if order.isdecimal() and order not in names:
        return random.Random(f"order/{order}").sample(names, len(names))
    chosen = [name.strip() for name in order.split(",")]
    for name in chosen:
        if name not in names or chosen.count(name) > 1:
            known = ", ".join(names)
            raise InputError(f"--order: stage {name!r} is unknown or named twice; use {known}")
    return chosen


def pick(samples: list, limit: float | None, seed: str) -> list:
    """At most `limit` of the samples, in their order, chosen by the seed."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), int(limit)))]


def long_tail(samples: list[Sample], ratio: float, seed: str) -> list[Sample]:
    """Cut by answer: the answer of rank r (of A, by count) keeps the share ratio^(-r / (A - 1)).

    With balanced answers that is the usual exponential profile, n_max / n_min = ratio; VQA's
    answers have a long tail already, which becomes `ratio` times steeper. One sample stays."""
    by_answer: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_answer.setdefault(sample.answer, []).append(i)
    ranked, chosen = sorted(by_answer, key=lambda a: (-len(by_answer[a]), a)), []
    for rank, answer in enumerate(ranked):
        share = ratio ** (-rank / max(1, len(ranked) - 1))
        n = max(1, round(share * len(by_answer[answer])))
        chosen += random.Random(f"{seed}/{answer}").sample(by_answer[answer], n)
    return [samples[i] for i in sorted(chosen)]


def per_stage(flag: str, value, stages: int) -> list:
    """The value of a flag for every stage, in the order in which they are learned."""
    values = value if isinstance(value, list) else [value] * stages
    if len(values) != stages:
        raise InputError(f"--{flag} has {len(values)} values for {stages} stages: give one or all")
    return values


def stop(problem: str) -> None:
    raise InputError(problem)


def load_stream(args, problem: Callable = stop) -> Stream:
    """Read and check the stream of `args`, a namespace with the flags of `common_flags`.

    Raises InputError at the first fault, or hands every fault to another `problem`. Images are
    looked up here and decoded by `load_image`."""
    name, row, root = find_stream(args)
    if name == "vqav2" and not (root / "vqa").exists() and (root / "CL4VQA").exists():
        row = replace(row, layout="cl4vqa", metric="exact")
    row = overridden(row, root)
    descriptions = row.descriptions
    if args.stream in STREAMS and not args.data:
        # another drawing makes another run
        args.drawn_sha256 = read_json(root / "manifest.json", dict)["sha256"]
        descriptions |= read_json(ROOT / "mini" / "descriptions.json", dict).get(name, {})
    reader = READERS[row.layout](root, row, problem, args.skip_missing)
    grouped, novel, stages = "object_groups" in row.extras, [], []
    categories = reader.table(root / "ImgId_cate_map.json") if grouped else {}
    names = ordered(list(row.stages), args.order)
    rates = per_stage("lr", args.lr, len(names))
    for k, stage in enumerate(names):
        train, test = reader.read(stage, "train"), reader.read(stage, "test")
        metric, blocks = scorable(row.stages[stage].metric, stage, test), None
        if grouped:
            for sample in train + test:
                sample.group = reader.group(sample, categories, args.object_groups or "paper")
            if omitted := sum(not sample.group for sample in train + test):
                print(f"{stage}: {omitted} questions on images without object group are left out")
                train, test = [s for s in train if s.group], [s for s in test if s.group]
                if not (train and test):
                    problem(f"stage {stage} lacks training or test data in any object group")
        if args.hold_out:
            # Novel composition: this group is trained in no stage. VQACL's code does train it in
            # the first one, so that its "novel" pairs hold a familiar object; we follow the clean
            # reading. The stage's regular test has the other four groups.
            held = [s for s in test if s.group == args.hold_out]
            train = [s for s in train if s.group != args.hold_out]
            test = [s for s in test if s.group != args.hold_out]
            if not (train and test and held):
                sizes = f"{len(train)} train, {len(test)} test and {len(held)} novel questions"
                problem(f"stage {stage}: --hold_out {args.hold_out} leaves {sizes}, none may be 0")
            held = pick(held, args.limit_test, f"novel/{stage}")
            novel.append(Stage(stage, [], held, metric))
        if "imbalance" in row.extras:
            train = long_tail(train, args.imbalance or row.extras["imbalance"], f"tail/{stage}")
        train = pick(train, args.limit, f"{args.seed}/limit/{stage}")
        test = pick(test, args.limit_test, f"test/{stage}")  # the same questions for every seed
        if grouped:
            visits = random.Random(f"{args.seed}/groups/{stage}").sample(list(GROUPS), len(GROUPS))
            blocks = [[i for i, s in enumerate(train) if s.group == group] for group in visits]
            blocks = [block for block in blocks if block]
        stages.append(Stage(stage, train, test, metric, blocks, 1, rates[k]))
    if args.stream not in STREAMS:
        remark(stages)
    set_epochs(stages, args)
    check_lengths(stages + novel, args, problem)
    return Stream(name, stages, root, row, descriptions, novel or None, reader.skipped)


def remark(stages: list[Stage]) -> None:
    """Print what a stream of one's own may have, but is rarely meant to have."""
    kinds = {sample.skill == stage.name for stage in stages for sample in stage.train}
    if kinds == {True}:
        print('note: no record says under "skill" what kind of question it is, so each stage has a')
        print("kind of its own and asr.py little to hold: add it, or use --skills shared")
    for stage in stages:
        if not any(sample.image for sample in stage.train):
            print(f'note: no training record of {stage.name} has an "image": text only')
        known = {(sample.image, sample.question) for sample in stage.train}
        both = sum((sample.image, sample.question) in known for sample in stage.test)
        if both:
            print(f"note: {both} of {len(stage.test)} tests of {stage.name} are training questions")


def set_epochs(stages: list[Stage], args) -> None:
    """Give every stage its passes, --epochs or as many as make OWN_STEPS steps."""
    if args.epochs is None:
        sizes = [max(1, -(-len(stage.train) // args.batch_size)) for stage in stages]
        args.epochs = [max(1, round(OWN_STEPS / size)) for size in sizes]
        listed = ",".join(map(str, args.epochs))
        steps = sorted(size * epochs for size, epochs in zip(sizes, args.epochs))
        span = "to".join(f" {n} " for n in dict.fromkeys([steps[0], steps[-1]]))
        print(
            f"--epochs {listed}:{span}steps a stage, as new pictures need; --epochs 1: a quick try"
        )
    for stage, epochs in zip(stages, per_stage("epochs", args.epochs, len(stages))):
        stage.epochs = epochs


def check_lengths(stages: list[Stage], args, problem: Callable) -> None:
    """Hand to `problem` every sample that is longer than what the model was trained to read.

    Only texts with more bytes than there is room for tokens are tokenized: a token is never less
    than a byte.
    """
    config = llava_config(args.model)
    most = getattr(config.text_config, "max_position_embeddings", math.inf)
    marks = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    # of every text, and its role, the template adds less than 32 tokens
    room, collate = most - marks - len(args.system.encode()), None
    splits = [(stage.name, stage.train, 0) for stage in stages]
    splits += [(stage.name, stage.test, args.max_new_tokens) for stage in stages]
    for name, samples, answer in splits:
        for sample in samples:
            texts = sample.question, sample.answer, *itertools.chain(*sample.further)
            if sum(len(text.encode()) for text in texts) <= room - answer - 32 * len(texts):
                continue
            if not collate:
                processor = AutoProcessor.from_pretrained(args.model)
                collate = Collator(processor, marks, args.system)
            text = collate.text(sample, train=not answer)[0]
            tokens = len(collate.tokenizer(text, verbose=False)["input_ids"]) + answer
            if tokens > most:
                problem(
                    f"stage {name}, sample {sample.id}: {tokens} tokens with image and answer, but "
                    f"{args.model} reads at most {most}: shorten it, or leave it out"
                )


def scorable(metric: str, stage: str, test: list[Sample]) -> str:
    """The metric of a stage, or "unscored" if it wants option letters and the golds are none."""
    if metric != "option" or all(re.fullmatch("[A-Z]", sample.answer) for sample in test):
        return metric
    print(f"note: {stage} gets no score: its gold answers are no option letters (docs/real.md)")
    return "unscored"


def train_order(stage: Stage, seed: int, epoch: int, epochs: int = 1) -> list[int]:
    """Indices of stage.train in the order of pass number `epoch` (0-based) of `epochs`.

    Shuffled by the seed. In vqacl an object group is left only after all of its epochs, as in the
    release: pass k is the k-th stretch of that long sequence, so there `epochs` must be given."""
    assert epoch < epochs or not stage.blocks, f"epoch {epoch} of {epochs} epochs"
    sequence, n = [], len(stage.train)
    for k, block in enumerate(stage.blocks or [range(n)]):
        for visit in range(max(epochs, epoch + 1)):
            sequence += random.Random(f"{seed}/{stage.name}/{k}/{visit}").sample(block, len(block))
    return sequence[epoch * n : (epoch + 1) * n]


def steps_of(stage: Stage, args) -> list[list[list[int]]]:
    """The optimizer steps of a stage over all epochs: per step its micro-batches, as lists of
    indices of stage.train. No step crosses the end of an epoch, so an epoch's last may be short."""
    size, micro = args.batch_size, args.batch_size // args.accumulate
    orders = [train_order(stage, args.seed, epoch, stage.epochs) for epoch in range(stage.epochs)]
    steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
    return [[step[m : m + micro] for m in range(0, len(step), micro)] for step in steps]


def schedule(k: int, n: int, warm_up: float) -> float:
    """Factor of the learning rate in step k of a stage's n: rises over the first warm_up n steps,
    as each stage has a fresh AdamW, whose first steps are its worst; then a cosine to zero."""
    first = round(warm_up * n)
    if k < first:
        return (k + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (k - first) / (n - first)))


# ---- 2. Flags that all scripts share -------------------------------------------------------------


def number(kind: type, rule: str, holds: Callable) -> Callable:
    """An argparse type: a `kind` for which `holds`; `rule` says so in words."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):  # no comparison holds for nan
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")
        return value

    return parse


positive = number(float, "a finite number above zero", lambda x: 0 < x < math.inf)
endless = number(float, "a number above zero, or inf", lambda x: x > 0)
most = number(float, "a whole number from 1, or inf", lambda x: x >= 1 and x in (x // 1, math.inf))
count = number(int, "a whole number from 1 to 1000000", lambda x: 1 <= x <= 10**6)
few = number(int, "a whole number from 1 to 1024", lambda x: 1 <= x <= 1024)
natural = number(int, "a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)
fraction = number(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
weight = number(float, "a finite number, 0 or larger", lambda x: 0 <= x < math.inf)
one_or_larger = number(float, "a finite number, 1 or larger", lambda x: 1 <= x < math.inf)


def one_or_each(kind: Callable) -> Callable:
    """An argparse type: one value for all stages, or a list "1,3,1" with a value per stage."""

    def parse(text: str):
        values = [kind(part) for part in text.split(",")]
        return values if len(values) > 1 else values[0]

    return parse


def common_flags(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share, to which a script adds its flags. A flag left
    at None gets its value from `resolve_defaults`."""
    parser = argparse.ArgumentParser(prog, "%(prog)s [--flag value ...]", description)
    parser.allow_abbrev = False  # a shortened flag may mean another one after the next release
    add = parser.add_argument_group("run and data").add_argument
    add("--stream", default="vqacl", help=f"{', '.join(STREAMS)}; a folder (default: %(default)s)")
    add("--data", metavar="DIR", help="folder with the released files (default: draw mini data)")
    add("--model", default="mini/tiny-llava", help="a LLaVA, folder or hub id (default: mini's)")
    add("--out", metavar="DIR", help="run folder (default: under runs/, by method, stream, seed)")
    add("--seed", type=natural, default=0, help="of initial LoRA, order and choices (default: 0)")
    add("--order", help="stages by name (A,B,..), reverse, or a seed (default: the papers' order)")
    add("--limit", type=count, metavar="N", help="training samples per stage (default: all)")
    add("--limit_test", type=count, metavar="N", help="test samples per stage (default: all)")
    add("--skip_missing", action="store_true", help="leave out records whose image is missing")
    about = "vqacl: read group numbers as class positions or raw COCO ids (default: paper)"
    add("--object_groups", choices=["paper", "released"], help=about)
    add("--hold_out", choices=list(GROUPS), help="vqacl: object group tested but never trained")
    add("--imbalance", type=one_or_larger, metavar="X", help="clt-vqa: n_max / n_min (default: 10)")
    add("--resume", action="store_true", help="continue a killed run")
    about = "report.html: with pictures, text alone or none (default: pictures, with --data text)"
    add("--report", choices=["pictures", "text", "none"], help=about)
    add("--plot", nargs="+", metavar="RUN", help="only draw the figures of finished runs")
    about = "Defaults depend on stream and model (benchmarks.py); a run prints them. "
    about += "E and ETA: one value, or one per stage: 1,3,1."
    add = parser.add_argument_group("model and training", about).add_argument
    add("--epochs", type=one_or_each(count), metavar="E", help="passes over a stage")
    about = "peak learning rate of AdamW, cosine per stage"
    add("--lr", type=one_or_each(positive), metavar="ETA", help=about)
    add("--warm_up", type=fraction, metavar="W", help="share of a stage's steps with rising rate")
    add("--batch_size", type=count, metavar="B", help="samples per optimizer step")
    add("--accumulate", type=count, metavar="N", help="micro-batches of B / N samples per step")
    add("--rank", type=count, metavar="R", help="LoRA rank r in W + (alpha / r) B A")
    add("--alpha", type=positive, help="LoRA alpha in W + (alpha / r) B A")
    add("--dropout", type=fraction, metavar="P", help="before LoRA's A")
    add("--targets", metavar="A,B,..", help=f"layers with LoRA, of {', '.join(TARGETS)}")
    add("--max_new_tokens", type=count, metavar="N", help="longest answer")
    add("--system", metavar="TEXT", help="sentence before every conversation, '' for none")
    add("--eval_batch_size", type=count, default=32, metavar="B", help="of tests (default: 32)")
    add("--device", default="auto", help="auto, cpu or cuda[:N] (default: auto)")
    types = ["auto", "fp32", "bf16"]
    add("--dtype", default="auto", choices=types, help="of frozen weights (default: bf16 on cuda)")
    about = "run decoder layers again in backward: memory for time (default: on a GPU)"
    add("--checkpointing", action=argparse.BooleanOptionalAction, help=about)
    add("--threads", type=few, default=0, metavar="N", help="CPU threads (default: torch's)")
    return parser


def published_flag(add, numbers) -> None:
    """Add --published: take back all, or some, of the deviations `numbers` of a docs page."""
    listed = ",".join(map(str, numbers))

    def chosen(text: str) -> tuple[int, ...]:
        if unknown := {n for n in text.split(",") if n} - set(listed.split(",")):
            raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {listed}")
        return tuple(n for n in numbers if str(n) in text.split(","))

    about = f"as published: take back the deviations {listed} of the docs page, or some of them"
    add("--published", nargs="?", const=chosen(listed), default=(), type=chosen, help=about)


def text_config(model: str):
    """The config of a LLaVA's language model."""
    return llava_config(model).text_config


def llava_config(model: str):
    """The config of a LLaVA, read from config.json alone (folder or hub id)."""
    if Path(model).parent.is_dir() and not Path(model).is_dir():  # no hub id: a typing error
        raise InputError(f"model folder {model} does not exist in {Path.cwd()}")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # no such folder or name, no network, no permission, broken JSON
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model {model} cannot be read: {reason}") from None
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise InputError(f"model folder {model} holds no .safetensors weights")
    if config.model_type != "llava":
        raise InputError(f"model {model} is no LLaVA: its model_type is {config.model_type!r}")
    text, vision = config.text_config, config.vision_config
    sizes = text.hidden_size, text.num_hidden_layers, vision.image_size, vision.patch_size
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"model {model}: width, layers, image and patch size are {sizes}")
    return config


def is_tiny(model: str) -> bool:
    """Is the model so small that TINY's defaults fit it better than REAL's?"""
    return text_config(model).hidden_size < 512


def resolve_defaults(args):
    """Fill every flag left at None from stream and model size, print what was chosen, return args.

    Raises InputError if the model is no LLaVA or if flags do not fit each other."""
    row, config = STREAMS.get(args.stream, Row({}, **OWN)), text_config(args.model)
    tiny = is_tiny(args.model)
    values = (TINY | row.tiny if tiny else REAL | row.real) | row.extras
    if config.model_type != "llama":  # no Vicuna: its template has a system prompt of its own
        values["system"] = ""
    for key, value in values.items():
        if isinstance(value, dict):  # by the name of the stage
            values[key] = [value[name] for name in ordered(list(row.stages), args.order)]
    open_flags = {key for key, value in vars(args).items() if value is None}  # of this script
    chosen = {k: v for k, v in values.items() if k in open_flags and v is not None}
    vars(args).update(chosen)
    check_args(args)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        args.processes = world  # goes into args.json
    words = [f"{key} {value}" for key, value in chosen.items() if value != ""]
    listed = ", ".join(words) or "all given"
    size = f"{'tiny' if tiny else 'full-size'} model (text width {config.hidden_size})"
    print(f"defaults for {args.stream} and a {size}: {listed}")
    return args


def check_args(args) -> None:
    """Raise InputError for flags that argparse cannot check: those that must fit each other."""
    world = int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun has started
    if not re.fullmatch(r"auto|cpu|cuda" if world > 1 else r"auto|cpu|cuda(:\d\d?)?", args.device):
        raise InputError(
            f"--device {args.device!r} must be auto, cpu, cuda or, in one process, cuda:N"
        )
    size, n, known = args.batch_size, args.accumulate, ", ".join(TARGETS)
    if size % n:
        raise InputError(f"--batch_size {size} must be a multiple of --accumulate {n}")
    if n % world:
        raise InputError(f"--accumulate {n} must be a multiple of torchrun's {world} processes")
    if unknown := set(args.targets.split(",")) - set(TARGETS):
        raise InputError(f"--targets has {min(unknown)!r}: use a comma list of {known}")
    for name, row in STREAMS.items():
        for key in row.extras:
            if getattr(args, key) is not None and args.stream != name:
                raise InputError(f"--{key} belongs to --stream {name}, not to {args.stream}")


# ---- 3. python data.py: check a stream -----------------------------------------------------------


def show_sample(sample: Sample, processor, system: str = "") -> None:
    """Print one training sample token by token: is it a question row, is it in the loss?"""
    text, _, _ = build_prompt(processor, sample.question, image=sample.image is not None)
    images = [pad_square(load_image(sample.image), (127, 127, 127))] if sample.image else None
    ids = processor(text=[text], images=images)["input_ids"][0]
    marks = list(ids).count(processor.image_token_id)
    batch = Collator(processor, marks, system)([sample], train=True)
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
    """Print a stream's stages, everything that is missing, and one sample. 1 if anything is."""
    args = common_flags("data.py", "Check a stream's files, show what is in them.").parse_args(argv)
    problems: list[str] = []
    stream = load_stream(resolve_defaults(args), problems.append)
    tests = [stage.test for stage in stream.stages + (stream.novel or [])]
    samples = [s for split in [stage.train for stage in stream.stages] + tests for s in split]
    images, broken = sorted({s.image for s in samples if s.image}), set()
    for path in progress(images, f"decoding {len(images)} images"):
        try:
            load_image(path)
        except InputError as error:
            broken.add(path)
            problems.append(str(error))

    print(f"\n{stream.name} in {stream.root}: {len(stream.stages)} stages, {len(samples)} samples")
    print(f"{'stage':>14} {'train':>8} {'published':>9} {'test':>8} {'published':>9}  groups")
    for stage in stream.stages:
        train, test = stream.row.stages[stage.name].published
        visits = [f"{stage.train[block[0]].group} {len(block)}" for block in stage.blocks or []]
        sizes = f"{len(stage.train):>8} {train:>9} {len(stage.test):>8} {test:>9}"
        print(f"{stage.name:>14} {sizes}  {' '.join(visits) or '-'}")
    for stage in stream.novel or []:
        print(f"{stage.name:>14} novel test of {args.hold_out}: {len(stage.test)}")
    print(f"source: {stream.row.source or 'yours'}")
    usable = [s for stage in stream.stages for s in stage.train if s.image not in broken]
    if usable:
        show_sample(usable[0], AutoProcessor.from_pretrained(args.model), args.system)
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    print(f"\n{found}" if problems else "\nnothing is missing")
    for line in problems[:40]:
        print(f"  {line}")
    if len(problems) > 40:
        print(f"  and {len(problems) - 40} more")
    if problems and args.data:
        print("\n" + how_to_get(args.stream, stream.root))
    return 1 if problems else 0


if __name__ == "__main__":
    with input_errors():
        sys.exit(main())
