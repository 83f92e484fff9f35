"""report.html: nothing from outside, texts as text, totals over all, a filter in the address."""

import re
import shutil
import subprocess

import numpy as np
import pytest

import data
import report
from eval import write_predictions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HOSTILE = '</article><script>alert(1)</script> $title {0} "quoted" 颜色'
N = 60  # questions of a stage


@pytest.fixture
def record(samples, tmp_path):
    """Three stages, whose names are hostile; question k of the first is lost if k is a multiple of
    3, that is in 20 of 60."""
    rng = np.random.default_rng(0)
    stages, scores = [], np.full((3, 3), np.nan)
    for i in range(3):
        images = [samples[k % 16].image if i else None for k in range(N)]
        texts = HOSTILE, "x", ("x",), "", ""
        tests = [data.Sample(f"{i}-{k}", image, *texts) for k, image in enumerate(images)]
        stages.append(data.Stage(f"stage <b>{i}", [], tests, "exact"))
    for t in range(3):
        for i in range(t + 1):
            right = [1.0 if t == i or (i == 0 and k % 3) else 0.0 for k in range(N)]
            rows = [
                {"text": HOSTILE + "y" * 3000, "answers": ["x"], "score": score if i < 2 else None}
                for score in right
            ]
            write_predictions(tmp_path, t, i, rows)
            scores[t, i] = 100 * np.mean(right) if i < 2 else np.nan  # its golds are no letters
    maps = rng.random((N, 8, 8))
    np.savez(tmp_path / "facts.npz", **{"2-2-map": maps, "3-2-weights": np.eye(3)[[2] * N]})
    (tmp_path / "figures").mkdir()
    for name in ("loss", "cases", "matrix"):
        (tmp_path / "figures" / f"{name}.png").write_bytes(samples[0].image.read_bytes())
    names = [stage.name for stage in stages]
    costs = {"seconds": 60.0, "peak_memory_mb": 500.0, "metrics": {"AP": 50.0, "AF": None}}
    about = {"script": "asr", "stream": "own", "seed": 0, "command": HOSTILE, "commit": "abc"}
    keys = ("AF_vqacl", "Avg", "MFT", "BWT")
    costs["metrics"] |= dict.fromkeys(keys, 1.0)
    return about | costs | {"folder": tmp_path, "stages": names, "matrix": scores.tolist()}, stages


def visible(page, state):
    """(stage, id) of the questions that Chromium shows at page#state."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={page.parent / 'chromium'}", f"file://{page}#{state}"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = re.findall(r"<article ([^>]*)>.*?</article>", dom, re.DOTALL)
    assert len(shown) == 120 and "alert(1)" in dom
    return [about for about in shown if "hidden" not in about]


def test_the_page_stands_alone_and_is_small(record):
    page = report.write(*record)
    text = page.read_text()
    assert page.stat().st_size < 3e6 and text.count("<article ") == 3 * 40
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and text.count("<script") == 1
    assert "$title {0}" in text and "y" * 301 not in text
    cells = r"<tr><th>(\d) stage &lt;b&gt;\d</th>" + 4 * r"<td>(\d+)</td>" + "</tr>"
    rows = [tuple(map(int, row)) for row in re.findall(cells, text)]
    assert rows == [(1, N, N, 40, 20), (2, N, N, 0, N), (3, N, 0, 0, 0)]
    assert text.count("looks after 2") == 40 == text.count("looks after")
    assert text.count("by 3 stage &lt;b&gt;2<") == 40 and "no score" in text
    assert text.count("image/png") == 2 and text.count("image/jpeg") >= 80


def test_without_pictures(record):
    text = report.write(*record, pictures=False).read_text()
    assert text.count("image/png") == 1 and "image/jpeg" not in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_filter_is_in_the_address(record):
    page = report.write(*record)
    lost = visible(page, "stage=1&lost=1")
    ids = [f"0-{k}" for k in range(0, N, 3)]
    shown = sorted((f"0-{k}" for k in range(N)), key=report.digest)[:40]
    assert len(lost) == len(set(ids) & set(shown)) and all('data-stage="1"' in x for x in lost)
    assert len(visible(page, "")) == 120 and len(visible(page, "stage=3&lost=1")) == 0
