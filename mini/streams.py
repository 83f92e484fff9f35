"""The drawn streams, written in the file formats of the released benchmarks.

    python mini/streams.py vqacl FOLDER     draw one stream into FOLDER, completely or not at all

data.py runs this when a drawn stream is first asked for, and reads the files exactly as it reads
released ones. FOLDER/manifest.json records the stream, the `version` (SHA-256 of the code that
draws) and the SHA-256 of the files drawn.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import draw
import numpy as np
from draw import HERE, OBJECTS, VQA_TYPES, change_look, pick_some, scene
from PIL import Image
from tasks import CAPTION, TASKS, annotators

sys.path.insert(0, str(HERE.parent))

from benchmarks import STREAMS as STREAM_TABLE  # noqa: E402

# New to the base model in the VQA streams: lamplight, and objects that it cannot name. Three of
# those are in most of the pictures.
VQA_NAMES = tuple(OBJECTS) + 8 * ("bus", "kite", "banana")
VQA_SIZE = {"train": 800, "val": 20, "test": 150}  # questions per stage
DOMAINS = {  # look: its common objects (others are rare); twice those the base model cannot name
    "plain": ("boat", "boat", "kite", "kite", "cup"),
    "negative": ("bus", "bus", "banana", "banana", "cat"),
    "recolored": ("glass", "glass", "bird", "car"),
    "noise": ("knife", "knife", "couch", "apple"),
    "mosaic": ("chair", "chair", "cake", "ball"),
}
DOMAIN_KINDS = ("recognition", "type", "commonsense", "action", "location")
DOMAIN_SIZE = {"train": 800, "test": 200}
TASK_SIZE = {"train": 600, "test": 120}


def save_image(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def save_json(record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def llava_record(name, image: str, question: str, answer, split: str, **extra) -> dict:
    """A question in LLaVA's training format or in the releases' test format."""
    if split == "train":
        turns = (("human", f"<image>\n{question}"), ("gpt", answer))
        conversation = [{"from": who, "value": text} for who, text in turns]
        return {"id": name, "image": image, **extra, "conversations": conversation}
    return {"question_id": name, "image": image, **extra, "text": question, "answer": answer}


# ---- 1. VQA v2: vqacl, vqav2, clt-vqa ------------------------------------------------------------


def draw_vqa(rng, folder: Path, size: float) -> None:
    """VQACL's release: question files per type and split, raw annotations, image -> category map.

    A picture carries questions of several types, as in VQA v2, so stages share pictures.
    size: number of training questions relative to VQA_SIZE; above 1, tests do not grow with it.
    """
    categories, tasks, next_image = {}, {}, 1
    annotations = {"train2014": [], "val2014": []}
    for split, home in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        wanted = round(VQA_SIZE[split] * (size if split == "train" else min(size, 1)))
        records = {kind: [] for kind in VQA_TYPES}
        while any(len(rows) < wanted for rows in records.values()):
            picture, image_id = scene(rng, VQA_NAMES), next_image
            next_image += 1
            stem = f"COCO_{home}_{image_id:012d}"
            image = change_look(rng, "lamplight", picture.image)
            save_image(image, folder / "COCO" / home / f"{stem}.png")
            categories[stem] = picture.category
            open_kinds = {kind for kind in VQA_TYPES if len(records[kind]) < wanted}
            usable = [q for q in picture.questions if q[0] in open_kinds]
            for k, (kind, question, answer) in enumerate(pick_some(rng, usable, 5)):
                answers = annotators(rng, kind, answer)
                soft = {a: (0.3, 0.6, 0.9, 1)[min(answers.count(a), 4) - 1] for a in answers}
                about = {
                    "question_id": image_id * 1000 + k,
                    "image_id": image_id,
                    "question_type": " ".join(question.split()[:2]),
                    "answer_type": {"judge": "yes/no", "count": "number"}.get(kind, "other"),
                }
                record = about | {"img_id": stem, "label": soft, "sent": question}
                del record["image_id"]
                records[kind].append(dict(sorted(record.items())))
                tasks[str(about["question_id"])] = VQA_TYPES.index(kind)
                people = [
                    {"answer": a, "answer_confidence": "yes", "answer_id": j + 1}
                    for j, a in enumerate(answers)
                ]
                about |= {"multiple_choice_answer": answer, "answers": people}
                annotations[home].append(about)
        for kind, rows in records.items():
            save_json(rows, folder / "vqa" / "Partition_Q" / f"karpathy_{split}_q_{kind}.json")
    for home, rows in annotations.items():
        save_json({"annotations": rows}, folder / "vqa" / f"v2_mscoco_{home}_annotations.json")
    save_json(tasks, folder / "QuesId_task_map.json")
    save_json(categories, folder / "ImgId_cate_map.json")
    save_json({"suffix": ""}, folder / "stream.json")  # the tiny model knows no instruction suffix


# ---- 2. LLaVA format: domains, and the instruction streams ---------------------------------------


def draw_domains(rng, folder: Path, size: float) -> None:
    """Five looks, the same five kinds of questions in each: skills recur, looks change."""
    for domain, names in DOMAINS.items():
        for split, n in DOMAIN_SIZE.items():
            records = []
            for k in range(round(n * size)):
                kind = DOMAIN_KINDS[k % len(DOMAIN_KINDS)]
                while True:
                    picture = scene(rng, 10 * names + tuple(OBJECTS))
                    question, answer = picture.ask(kind)
                    if not any(c in question for c in draw.COLORS):  # some looks change colors
                        break
                image, name = f"images/{split}_{k:05d}.png", f"{domain}_{split}_{k:05d}"
                save_image(change_look(rng, domain, picture.image), folder / domain / image)
                records.append(llava_record(name, image, question, answer, split, skill=kind))
            save_json(records, folder / domain / f"{split}.json")
    save_json({"stages": list(DOMAINS), "metric": "exact", "suffix": ""}, folder / "stream.json")


def draw_tasks(rng, folder: Path, stream: str) -> None:
    """One of the streams in TASKS, in the layout of its release, which benchmarks.py knows."""
    row = STREAM_TABLE[stream]
    for stage, example in TASKS[stream].items():
        files = (row.stages[stage].files or row.files).format(stage).split()
        prefix = "AI2D_" if stage == "Sci" else ""  # Sci is scored by the name of the image
        for split, file in zip(("train", "test"), files):
            file = Path(os.path.normpath(folder / row.folders[0] / stage / f"{file}.json"))
            home, images = file.parent, folder / row.images[0] if row.images else file.parent
            records, captions = [], []
            for n in range(TASK_SIZE[split]):
                options = (split == "test",) if stream == "acl" else ()
                image, question, answers = example(rng, *options)
                name = f"{stage if row.images else 'images'}/{prefix}{split}_{n:05d}.png"
                save_image(image, images / name)
                is_box = isinstance(answers[0], float)
                answer = f"[{', '.join(f'{x:.2f}' for x in answers)}]" if is_box else answers[0]
                record = llava_record(n, f"./{name}", question, answer, split)
                if split == "test" and is_box:
                    record["answer_bbox"] = record.pop("answer")
                    record["size"] = [draw.SIDE, draw.SIDE]
                elif split == "test" and stage == "TextVQA":
                    record["answer"] = answers  # of ten people
                records.append(record)
                captions += [{"image_id": n + 1, "caption": a} for a in answers]
            save_json(records, file)
        if question == CAPTION:  # COCO's format, images counted from 1
            save_json({"annotations": captions}, home / "val_coco_type_3000.json")
    if stream == "dcl":
        save_json({"suffix": ""}, folder / "stream.json")  # no instruction suffix in tests either


# ---- 3. A stream, completely or not at all -------------------------------------------------------

STREAMS = ("vqacl", "vqav2", "clt-vqa", "domains", *TASKS)
SOURCES = ("draw.py", "tasks.py", "streams.py", "sprites.png")  # data.py hashes the same files


def draw_stream(name: str, folder: Path) -> None:
    """Draw the files of one of STREAMS into `folder`: always the same bytes.

    vqacl, vqav2 and clt-vqa share VQACL's layout; data.py groups them or cuts the long tail.
    """
    rng = np.random.default_rng([0, 1])
    if name in TASKS:
        draw_tasks(rng, folder, name)
    elif name == "domains":
        draw_domains(rng, folder, 1)
    else:  # a long tail is cut out of a larger set
        draw_vqa(rng, folder, 2.5 if name == "clt-vqa" else 1)


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def replace_stream(name: str, folder: Path) -> None:
    """Draw a stream beside `folder` and rename it when complete.

    A process that is killed leaves `folder` as it was. Of two that draw at the same time the first
    to finish wins: both have drawn the same files.
    """
    manifest = folder / "manifest.json"
    if folder.exists() and not manifest.exists():
        sys.exit(f"error: {folder} was not drawn by this script; delete it or name another folder")
    fresh, old = (folder.with_name(f"{folder.name}.{x}-{os.getpid()}") for x in ("new", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    draw_stream(name, fresh)
    version = hashlib.sha256(b"".join((HERE / file).read_bytes() for file in SOURCES)).hexdigest()
    drawn = {"stream": name, "version": version, "sha256": digest(fresh)}
    save_json(drawn, fresh / "manifest.json")

    def is_current() -> bool:
        return manifest.exists() and manifest.read_text() == json.dumps(drawn)

    try:
        if folder.exists() and not is_current():
            folder.rename(old)
        fresh.rename(folder)
    except OSError:  # another process was faster
        if not is_current():
            raise
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    replace_stream(args.stream, args.folder.resolve())
