"""report.html: what a run has shown, on one page that needs no other file and no network.

Accuracy matrix, metrics, figures, and a browser of test answers: what the model said to a question
after every stage, which expert it was sent to, where the words of the question looked. The filter
is part of the address: report.html#stage=2&lost=1 shows the questions of stage 2 that were answered
right at some time and are answered wrong at the end. The page itself is report.html beside this
file: what $words stand for comes from here.
"""

import base64
import hashlib
import io
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from data import Stage
from files import InputError, load_image, pad_square, predictions_file, read_json, write_text

SHOWN, LARGEST = 40, 3_000_000  # questions of a stage; bytes of a page, else half as many questions
SIDE = 96  # pixels of a thumbnail
LONGEST = 300  # characters of a text

PAGE = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def write(record: dict, stages: list[Stage], pictures: bool = True, most: int = SHOWN) -> Path:
    """Write report.html into record["folder"], the folder of a run; returns its path.

    record: what summary.json will hold, and "folder". stages: in the order learned, with their
    tests. pictures: with test images, which a license or a patient may forbid to pass on. most:
    questions of a stage.
    """
    folder = record["folder"]
    names = [f"{i + 1} {name}" for i, name in enumerate(record["stages"])]
    facts = dict(np.load(folder / "facts.npz")) if (folder / "facts.npz").is_file() else {}
    totals = [["stage", "questions", "right after it", "right at the end", "was right, is wrong"]]
    articles = []
    for i, stage in enumerate(stages):
        times = [t for t in range(len(stages)) if predictions_file(folder, t, i).is_file()]
        answers = list(zip(*(read_json(predictions_file(folder, t, i)) for t in times)))
        if not 0 < len(answers) == len(stage.test):
            raise InputError(f"{folder}: {len(answers)} saved answers for all tests of {names[i]}")
        right = np.array([[is_right(row) for row in rows] for rows in answers])  # [N, times]
        lost = right.any(1) & ~right[:, -1]
        counts = len(right), right[:, 0].sum(), right[:, -1].sum(), lost.sum()
        totals.append([names[i], *counts])
        for k in sorted(range(len(right)), key=lambda k: digest(stage.test[k].id))[:most]:
            sent = [expert(facts, names, t, i, k) for t in times]
            views = thumbnails(stage.test[k], facts, times, i, k) if pictures else ""
            said = history(times, answers[k], sent)
            data = f'data-stage="{i + 1}" data-lost="{int(lost[k])}"'
            about = question(stage.test[k], names[i])
            articles.append(f"<article {data}>{views}<div>{about}{said}</div></article>")
    options = [f'<option value="{i + 1}">{escape(name)}</option>' for i, name in enumerate(names)]
    page = PAGE.substitute(
        title=escape(f"{record['script']}.py on {record['stream']}, seed {record['seed']}"),
        head=head(record),
        matrix=matrix(record, names),
        totals=table(totals),
        shown=most,
        options="".join(options),
        questions="\n".join(articles),
        figures=figures(folder / "figures", pictures),
    )
    if len(page.encode()) > LARGEST and most > 1:
        return write(record, stages, pictures, most // 2)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def is_right(row: dict) -> bool:
    return row["score"] is not None and row["score"] >= 0.5


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def short(text: str) -> str:
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + "…")


def question(sample, stage: str) -> str:
    gold = " / ".join(dict.fromkeys(sample.answers))
    about = f"<small>{escape(stage)}, {short(sample.id)}</small>"
    return f"<p>{about}</p><p><b>{short(sample.question)}</b></p><p>gold: {short(gold)}</p>"


def history(times: list[int], rows: list[dict], sent: list[str]) -> str:
    """The answers after stages `times`, equal ones that follow each other in one line."""
    lines = []
    facts = zip([row["text"] for row in rows], map(mark, rows), sent)
    for (text, verdict, where), run in groupby(zip(facts, times), key=lambda pair: pair[0]):
        run = [t + 1 for _, t in run]
        after = f"after {run[0]}" + (f" to {run[-1]}" if len(run) > 1 else "")
        where = f" <small>by {escape(where)}</small>" if where else ""
        lines.append(
            f'<p class="{verdict}">{after}: {short(text) or "(empty)"} ({verdict}){where}</p>'
        )
    return "".join(lines)


def mark(row: dict) -> str:
    return "no score" if row["score"] is None else ("wrong", "right")[is_right(row)]


def expert(facts: dict, names: list[str], t: int, i: int, k: int) -> str:
    """The expert that weighs most for question k of stage i after stage t; "" without experts."""
    for name in ("weights", "probability"):  # of cram.py, of mllm_cl.py
        if f"{t + 1}-{i + 1}-{name}" in facts:
            return names[facts[f"{t + 1}-{i + 1}-{name}"][k].argmax()]
    return ""


def thumbnails(sample, facts: dict, times: list[int], i: int, k: int) -> str:
    """The image, and where asr.py has kept it what its question looked at, first and last."""
    try:
        image = sample.image and load_image(sample.image)
    except InputError:  # it has been moved since the test; the run is not to fail for it
        image = None
    if not image:
        return ""
    image = pad_square(image, (127, 127, 127)).resize((SIDE, SIDE))
    views = {"": image}
    for t in (times[0], times[-1]):
        attention = facts.get(f"{t + 1}-{i + 1}-map", ())
        if k < len(attention):
            share = Image.fromarray(np.uint8(180 * attention[k] / max(attention[k].max(), 1e-9)))
            red = Image.new("RGB", image.size, (213, 94, 0))
            views[f"looks after {t + 1}"] = Image.composite(red, image, share.resize(image.size))
    cells = []
    for name, view in views.items():
        file = io.BytesIO()
        view.save(file, "JPEG", quality=70)
        cells.append(f"<figure>{embedded(file.getvalue(), 'jpeg')}{name}</figure>")
    return "".join(cells)


def embedded(content: bytes, kind: str) -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def figures(folder: Path, pictures: bool) -> str:
    """All figures of the run but the matrix, which is a table here, and without `pictures` those
    that show test images."""
    paths = [path for path in sorted(folder.glob("*.png")) if path.stem != "matrix"]
    paths = [path for path in paths if pictures or "cases" not in path.stem]
    return "\n".join(f"<p>{embedded(path.read_bytes(), 'png')}</p>" for path in paths)


def table(rows: list[list], style=lambda cell: "") -> str:
    """Rows as an HTML table; the first row and the first column are heads. style: of a cell."""
    lines = []
    for k, row in enumerate(rows):
        first, *others = (escape(str(cell)) for cell in row)
        kind = "td" if k else "th"
        cells = "".join(f"<{kind}{style(cell) if k else ''}>{cell}</{kind}>" for cell in others)
        lines.append(f"<tr><th>{first}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def head(record: dict) -> str:
    """What was run, and what it cost."""
    cost = f"{record['seconds'] / 60:.1f} minutes, {record['peak_memory_mb']:,.0f} MB at the peak"
    return f"<p><code>{escape(record['command'])}</code><br>commit {record['commit']}; {cost}</p>"


def matrix(record: dict, names: list[str]) -> str:
    """The accuracy matrix, colored from 0 to 100, and the metrics."""

    def color(cell):
        share = float(cell or 0) / 100
        ink = "#fff" if share > 0.55 else "#222"
        return f' style="background: rgb(0 84 147 / {share:.2f}); color: {ink}"'

    rows = [["after", *range(1, len(names) + 1)]]
    for name, row in zip(names, np.array(record["matrix"], dtype=float)):
        rows.append([name, *("" if np.isnan(x) else f"{x:.1f}" for x in row)])
    known = {key: record["metrics"][key] for key in ("AP", "AF", "Avg", "MFT", "BWT")}
    known = {key: x for key, x in known.items() if x is not None and np.isfinite(x)}
    numbers = [["", *known], ["metrics", *(f"{x:.1f}" for x in known.values())]]
    return table(rows, color) + table(numbers)
