"""Behind docs/asr.md, on the CPU: what carries the answer, what forgets it, and is it drift?

    python results/causes.py hide    results/causes-hide.jsonl: some rows do not see the image
    python results/causes.py swap    results/causes-swap.jsonl: parts of a LoRA are put back
    python results/causes.py drift   results/causes-drift.jsonl: the paper's pairs (Eqs. 1-2)

hide: the pretrained model answers all tests of a stream while the image is hidden from some kind
of rows in some decoder layers. What the answer loses came through these rows and layers.
swap: of the LoRA after the last stage one part is put back as it was after the first stage (or the
other way round), and the first stage is tested. Its runs are those of the sweep asr-swap.
drift: for every skill and every stage since its own, the drift of its spectra in this stage (nats)
and the points that are missing to its best earlier accuracy. Its runs are those of asr-match.

A clone has the records of these two sweeps but not their runs: delete results/asr-swap.jsonl or
results/asr-match.jsonl to have them run again (two hours on two cores).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run import run_sweep  # noqa: E402
from sweeps import SWEEPS, cells, folder_of  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import asr  # noqa: E402
import data  # noqa: E402
import plot  # noqa: E402
from eval import accuracy, evaluate, read_run  # noqa: E402
from files import git_commit, input_errors, jsonable, write_text  # noqa: E402
from model import LLaVA, read_lora  # noqa: E402

STREAMS, RECORDS = ("domains", "vqacl"), Path(__file__).parent
ROWS = ("nothing", "functional words", "question", "behind the question", "all text")
LAYERS = {"all": (0, 1, 2, 3), "1 and 2": (0, 1), "3 and 4": (2, 3), "4": (3,)}
PARTS = ("q_proj", "k_proj", "v_proj", "projector")
ALL, FIRST = "all parts", "first stage alone"  # the rows of the sweep asr-swap


class Hidden:
    """Decoder attention in which `rows` of a prompt do not see its image in `layers`."""

    layers = ()

    def choose(self, kind, batch):
        """Rows [B, S] of a kind, and whether answers that are being written belong to it."""
        real, image, asked = (
            batch[key].bool() for key in ("attention_mask", "image_mask", "question_mask")
        )
        text = real & (image.cumsum(1) == image.sum(1, keepdim=True)) & ~image  # behind the image
        behind = text & (asked.cumsum(1) == asked.sum(1, keepdim=True)) & ~asked
        rows = {"nothing": text & False, "functional words": asr.functional_rows(batch)}
        rows |= {"question": asked, "behind the question": behind, "all text": text}
        self.rows, self.image = rows[kind], image
        self.writing = kind in ("behind the question", "all text")

    def __call__(self, module, query, key, value, mask, **options):
        B, S, K = len(query), query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(B, 1, S, K, dtype=torch.bool).tril(K - S)
        if module.layer_idx in self.layers:
            image = torch.nn.functional.pad(self.image, (0, K - self.image.shape[1]))
            rows = self.rows if S > 1 else torch.full((B, 1), self.writing)
            mask = mask & ~(rows[:, None, :, None] & image[:, None, None])
        return sdpa_attention_forward(module, query, key, value, mask, **options)


def setting(stream, *words):
    """(args, stages, LLaVA) of a stream; deterministic, so there is one seed."""
    flags = ["--stream", stream, "--device", "cpu", "--threads", "1", *words]
    args = data.resolve_defaults(data.common_flags("causes.py", "").parse_args(flags))
    return args, data.load_stream(args).stages, LLaVA(args)


def hide(stream):
    """A record per kind of rows and set of layers: the score of every question."""
    args, stages, llava = setting(stream)
    hidden = Hidden()
    ALL_ATTENTION_FUNCTIONS.register("capture", hidden)
    for kind in ROWS:
        for name, hidden.layers in LAYERS.items():
            if kind == "nothing" and name != "all":
                continue

            def answer(samples, kind=kind):
                batch = llava.batch(samples, train=False)
                hidden.choose(kind, batch)
                return llava.generate(batch)

            tests = [evaluate(answer, s.test, s.metric, args.eval_batch_size)[0] for s in stages]
            scores = [row["score"] for rows in tests for row in rows]
            yield {"stream": stream, "rows": kind, "layers": name, "scores": scores}


def swap(stream, seed):
    """A record per part put back, and per part put forward: accuracy on the first stage."""
    runs = [folder_of("asr-swap", row, stream, seed) for row in (FIRST, ALL)]
    early, late = (read_lora(ROOT / run / "lora") for run in runs)
    args, stages, llava = setting(stream, "--targets", "q,k,v,projector")
    llava.add_lora(args)
    for base, other, way in ((late, early, "put back"), (early, late, "put forward")):
        for parts in ((), *((part,) for part in PARTS), ("q_proj", "k_proj"), PARTS):
            moved = {key: any(part in key for part in parts) for key in base}
            llava.load_lora({key: (other if moved[key] else base)[key] for key in base})
            test = stages[0]
            rows, _ = evaluate(llava.answer, test.test, test.metric, args.eval_batch_size)
            record = {"stream": stream, "seed": seed, "way": way, "parts": " ".join(parts)}
            yield record | {"accuracy": accuracy(rows, test.metric)}


def drift(stream, row, seed):
    """A record of a run: its pairs (drift in a stage, points below the best accuracy before)."""
    folder, pairs = folder_of("asr-match", row, stream, seed), []
    for states in plot.read_skills(folder, read_run(folder)).values():
        scores = [100 * np.mean(state.scores) for state in states]
        for k in range(1, len(states)):
            moved = plot.change(states[k - 1], states[k])[0]
            pairs.append((moved, max(scores[:k]) - scores[k]))
    yield {"stream": stream, "row": row, "seed": seed, "pairs": pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=["hide", "swap", "drift"])
    which = parser.parse_args().which
    if which == "swap":
        run_sweep("asr-swap")
        sweep = SWEEPS["asr-swap"]
        records = [r for s in sweep.streams for seed in sweep.seeds for r in swap(s, seed)]
    elif which == "drift":
        run_sweep("asr-match")
        records = [r for row, stream, seed in cells("asr-match") for r in drift(stream, row, seed)]
    else:
        records = [record for stream in STREAMS for record in hide(stream)]
    lines = [json.dumps(jsonable(record | {"commit": git_commit()})) for record in records]
    write_text(RECORDS / f"causes-{which}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    os.chdir(ROOT)
    with input_errors():
        main()
