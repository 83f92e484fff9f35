"""What things cost, each beside something, in one run. Not part of the test suite.

    python tests/speed.py                      everything, on a CPU: half an hour
    python tests/speed.py --parts peft steps   some of it
    python tests/speed.py --parts peft input --device cuda --dtype bf16 --model FOLDER
    python tests/speed.py --table              the records of results/speed.jsonl as a table

    peft      a training step and answers, beside transformers + peft: same model, samples, LoRA
    steps     a step of asr.py, cram.py (six experts) and mllm_cl.py beside sequential LoRA
    wide      the same with a decoder of width 512
    experts   a step of cram.py and answers of experts.py with 2, 8 and 64 experts
    input     a training step whose images are new and large, beside one whose images are known
    whole     whole runs of the scripts, beside sequential LoRA
    records   a stream of a million records: seconds and memory until it is loaded

What is compared runs in turns, --rounds times; a ratio is the median over the turns. FOLDER is a
LLaVA; bench.py leaves one with the widths of LLaVA-1.5-7B in its --out. --save appends to the
records.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import torch
import transformers as tf
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import asr  # noqa: E402
import baselines  # noqa: E402
import cram  # noqa: E402
import data  # noqa: E402
import mllm_cl  # noqa: E402
from eval import grid  # noqa: E402
from files import git_commit, load_image, pad_square, read_json  # noqa: E402
from model import LLaVA  # noqa: E402
from tokens import build_prompt  # noqa: E402

RECORDS, TINY = ROOT / "results" / "speed.jsonl", ROOT / "mini" / "tiny-llava"
BATCH, STEPS = 16, 6  # samples of a step; steps (or batches of questions) of a turn
WHOLE = {  # what -> (command, what it is compared with)
    "sequential, vqacl": ("baselines.py --stream vqacl", ""),
    "asr.py, vqacl": ("asr.py --stream vqacl", "sequential, vqacl"),
    "sequential, vqacl, 3 epochs": ("baselines.py --stream vqacl --epochs 3", ""),
    "asr.py, vqacl, 3 epochs": ("asr.py --stream vqacl --epochs 3", "sequential, vqacl, 3 epochs"),
    "sequential, cut vqacl": ("baselines.py --stream vqacl CUT", ""),
    "mllm_cl.py, cut vqacl": ("mllm_cl.py --stream vqacl CUT", "sequential, cut vqacl"),
    "mllm_cl.py --router_steps 60, cut vqacl": (
        "mllm_cl.py --stream vqacl --router_steps 60 --router_lr 2e-3 --router_batch 4 CUT",
        "sequential, cut vqacl",
    ),
    "sequential, cut vqacl, 5 stages": ("baselines.py --stream vqacl CUT FIVE", ""),
    "mllm_cl.py, cut vqacl, 5 stages": (
        "mllm_cl.py --stream vqacl CUT FIVE",
        "sequential, cut vqacl, 5 stages",
    ),
    "sequential, dcl": ("baselines.py --stream dcl", ""),
    "mllm_cl.py, dcl": ("mllm_cl.py --stream dcl", "sequential, dcl"),
    "experts.py, dcl": ("experts.py --stream dcl", "sequential, dcl"),
    "sequential, ucit": ("baselines.py --stream ucit", ""),
    "cram.py, ucit": ("cram.py --stream ucit", "sequential, ucit"),
}
CUT = "--limit 480 --limit_test 40"
FIVE = "--order recognition,location,judge,commonsense,count"
LOAD = """import resource, sys, time; start = time.perf_counter()
sys.argv = ["asr.py", "--stream", sys.argv[1], "--epochs", "1"]
import asr, data
args = asr.parse(); stream = data.load_stream(args)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(time.perf_counter() - start, int(status["VmRSS"].split()[0]) / 1e6,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""


def in_turns(functions, device, rounds):
    """{name: function} -> {name: (median seconds, median ratio to the first)}."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first turn warms up
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    first = next(iter(times.values()))
    return {
        name: (
            statistics.median(values[1:]),
            statistics.median(x / y for x, y in zip(values[1:], first[1:])),
        )
        for name, values in times.items()
    }


def rows_of(part, results):
    """Records of one comparison."""
    first, rows = next(iter(results)), []
    for name, (seconds, ratio) in results.items():
        row = {"part": part, "what": name, "beside": "" if name == first else first}
        rows.append(row | {"seconds": seconds, "ratio": ratio})
    return rows


def setting(script, options, *words):
    """(args, LLaVA, stream) of a script on mini vqacl."""
    flags = ["--stream", "vqacl", "--device", options.device, "--dtype", options.dtype]
    args = script.parse([*flags, "--model", str(options.model), *words])
    args.accumulate = 1
    return args, LLaVA(args), data.load_stream(args)


def training(llava, lora, samples, backward):
    """A turn of training: STEPS optimizer steps."""
    optimizer = torch.optim.AdamW(lora, lr=1e-6)
    steps = [[list(range(k, k + BATCH))] for k in range(0, STEPS * BATCH, BATCH)]

    def turn():
        llava.model.train()
        for k in range(STEPS):
            optimizer.zero_grad()
            for batch in llava.micro_batches(samples, steps, k):
                log = backward(batch)
            llava.clip(lora, log)
            optimizer.step()

    return turn


class Peft:
    """The usual way: transformers' model, peft's LoRA, the processor for every batch."""

    def __init__(self, args, llava, samples, device):
        dtype, names = llava.model.dtype, [re.escape(path) for path in llava.layers]
        model = tf.LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
        config = peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout)
        config.target_modules = "|".join(names)
        self.model = peft.get_peft_model(model.to(device), config)
        if device.type == "cuda":  # as ours: activations are checkpointed
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.lora = [p for p in self.model.parameters() if p.requires_grad]
        self.processor, self.device = llava.processor, device
        self.samples, self.args, self.border = samples, args, llava.features.border
        self.optimizer = torch.optim.AdamW(self.lora, lr=1e-6)

    def inputs(self, samples, train):
        texts, system = [], self.args.system
        for s in samples:
            answer = s.answer if train else None
            texts.append(build_prompt(self.processor, s.question, answer, True, system)[0])
        images = [pad_square(load_image(s.image), self.border) for s in samples]
        options = {"padding": True, "padding_side": "right" if train else "left"}
        return self.processor(text=texts, images=images, return_tensors="pt", **options).to(
            self.device, self.model.dtype
        )

    def train(self):
        self.model.train()
        for k in range(0, STEPS * BATCH, BATCH):
            inputs = self.inputs(self.samples[k : k + BATCH], True)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            self.optimizer.zero_grad()
            self.model(**inputs, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.lora, 1.0)
            self.optimizer.step()

    @torch.no_grad()
    def answer(self):
        self.model.eval()
        for k in range(0, STEPS * BATCH, BATCH):
            inputs = self.inputs(self.samples[k : k + BATCH], False)
            self.model.generate(**inputs, max_new_tokens=self.args.max_new_tokens, do_sample=False)


def beside_peft(options):
    """Ours beside transformers + peft: images that are new, and those whose features are known, as
    in every epoch but the first and in all tests but the first of a question."""
    args, llava, stream = setting(mllm_cl, options, "--targets", "q,v", "--max_new_tokens", "8")
    samples = stream.stages[0].train[: STEPS * BATCH]
    lora = llava.add_lora(args)
    usual = Peft(args, llava, samples, llava.device)
    train = training(llava, lora, samples, partial(mllm_cl.backward, llava))

    def answer():
        llava.model.eval()
        for k in range(0, len(samples), BATCH):
            llava.answer(samples[k : k + BATCH])

    for name, theirs, ours in ("step", usual.train, train), ("answers", usual.answer, answer):
        turns = {f"transformers + peft, {name}": theirs}
        turns |= {f"ours, {name}, new images": forgetting(llava, ours)}
        turns |= {f"ours, {name}, known images": ours}
        yield from rows_of("peft", in_turns(turns, llava.device, options.rounds))


def forgetting(llava, turn):
    """The same turn, but no image is known."""

    def anew():
        llava.features.rows.clear()
        llava.features.room = 4e9
        turn()

    return anew


def cram_experts(llava, args, number):
    """CRAM's layers with `number` experts, the last one in training, all of one group."""
    routing = SimpleNamespace(weights=None, buffer=False, image_mask=None, gamma=None)
    lora = llava.add_lora(args, cram.ExpertLinear, routing=routing)
    layers, lora = list(llava.layers.values()), []
    for layer in layers:
        for expert in range(number - 1):
            layer.fresh_pair(args.rank)
            layer.new_B.data.normal_(0, 0.01)
            layer.freeze(expert)
        layer.old_outputs = cram.basis(layer.B)
        lora += layer.fresh_pair(args.rank)
    pi = torch.full((STEPS * BATCH, number), 1 / number, device=llava.device)
    gamma = pi[:, 1:].sum(1)
    return lora, partial(
        cram.backward, llava, args=args, routing=routing, layers=layers, pi=pi, gamma=gamma
    )


def steps(options, width=0):
    """One script's step beside sequential LoRA's with the same layers and rank, images known."""
    model, name = (wider(width, options.out), f"width {width}") if width else (TINY, "tiny")
    chosen = argparse.Namespace(**vars(options) | {"model": model})
    args, llava, stream = setting(asr, chosen, "--targets", "q,v,projector", "--gamma", "0.05")
    stage, words = stream.stages[0], "q,v,projector"
    samples = stage.train[: STEPS * BATCH]
    few = data.Stage(stage.name, samples, [], "")
    skills = asr.skill_names(args, data.Stream("", [few], None))
    method = baselines.Sequential(args, llava, stream)
    lora = method.lora
    pi = asr.known_skills(samples, skills, True).to(llava.device)
    memory = asr.remember({}, llava, few, pi, args)
    reference = asr.reference_embeddings(llava, samples, args)
    rest = dict(beta=args.beta, pi=pi, memory=memory, reference=reference)
    turns = {
        "sequential": partial(baselines.backward, method, 0),
        "mllm_cl.py": partial(mllm_cl.backward, llava),
        "asr.py": partial(asr.backward, llava, args=args, **rest),
    }
    turns = {k: training(llava, lora, samples, back) for k, back in turns.items()}
    yield from rows_of(f"step, {name}, {words}", in_turns(turns, llava.device, options.rounds))
    yield from cram_steps(chosen, name, (6,))


def cram_steps(options, name, numbers):
    """CRAM's step with some numbers of experts beside sequential LoRA on its layers."""
    words = ("--targets", "q,k,v,o", "--rank", "9", "--alpha", "18")
    args, llava, stream = setting(cram, options, *words)
    samples, turns = stream.stages[0].train[: STEPS * BATCH], {}

    def start(number):
        if not number:
            return llava.add_lora(args), partial(mllm_cl.backward, llava)
        return cram_experts(llava, args, number)

    for number in (0, *numbers):
        lora, back = start(number)
        kept = dict(llava.layers)
        run = training(llava, lora, samples, back)

        def turn(kept=kept, run=run):  # the adapters take turns
            for path, layer in kept.items():
                llava.model.set_submodule(path, layer)
            llava.layers = kept
            run()

        turns[f"cram.py, {number} experts" if number else "sequential"] = turn
    yield from rows_of(f"step, {name}, q,k,v,o", in_turns(turns, llava.device, options.rounds))


def experts(options):
    """Cost against the number of experts."""
    yield from cram_steps(options, "tiny", (2, 8, 64))
    args, llava, stream = setting(mllm_cl, options, "--max_new_tokens", "8")
    samples, turns = stream.stages[0].test[: STEPS * BATCH], {}
    llava.add_lora(args, baselines.StackedLoRALinear, alone=True)
    layers = list(llava.layers.values())
    for number in (1, 2, 8, 64):
        while len(layers[0].old_A) < (number - 1) * args.rank:
            for layer in layers:
                layer.stack()
        stacks = [(layer.old_A, layer.old_B) for layer in layers]

        def turn(number=number, stacks=stacks):
            for layer, (layer.old_A, layer.old_B) in zip(layers, stacks):
                layer.weights = torch.eye(number)[:1].to(llava.device)
            for k in range(0, len(samples), BATCH):
                llava.answer(samples[k : k + BATCH])

        turns[f"experts.py, answers, {number} experts"] = turn
    yield from rows_of("experts", in_turns(turns, llava.device, options.rounds))


def wider(width, out):
    """A LLaVA with the tower of the tiny one and a wider decoder of random weights."""
    folder = out / f"width-{width}"
    config = tf.AutoConfig.from_pretrained(TINY)
    text = config.text_config
    text.hidden_size, text.intermediate_size = width, int(2.75 * width)
    text.num_attention_heads = text.num_key_value_heads = 8
    text.head_dim = width // 8
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tf.AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    return folder


def new_images(options):
    """Steps whose images (JPEG, 640 x 480) go through the tower for the first time."""
    args, llava, stream = setting(mllm_cl, options, "--targets", "q,v")
    samples, draw = stream.stages[0].train[: STEPS * BATCH], np.random.default_rng(0)
    for k, sample in enumerate(samples):
        noise = Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        sample.image = options.out / f"{k}.jpg"
        noise.resize((640, 480)).save(sample.image)
    train = training(llava, llava.add_lora(args), samples, partial(mllm_cl.backward, llava))
    pool = llava.features.pool

    def turn(run, decoders):
        llava.features.pool = decoders
        run()

    new = forgetting(llava, train)
    turns = {"images known": partial(turn, train, pool), "images new": partial(turn, new, pool)}
    if pool:
        turns["images new, no threads"] = partial(turn, new, None)
    yield from rows_of("input", in_turns(turns, llava.device, options.rounds))


def whole(options):
    """Whole runs, one after the other: those with options.only in their name, and beside what."""
    seconds = {}
    needed = {beside for what, (_, beside) in WHOLE.items() if options.only in what}
    for what, (command, beside) in WHOLE.items():
        if options.only not in what and what not in needed:
            continue
        script, *flags = command.replace("CUT", CUT).replace("FIVE", FIVE).split()
        out = options.out / what.replace(", ", "-").replace(" ", "-")
        words = [*flags, "--out", str(out), "--device", options.device, "--report", "none"]
        subprocess.run([sys.executable, str(ROOT / script), *words], cwd=ROOT, check=True)
        record = read_json(out / "summary.json")
        seconds[what] = record["seconds"]
        row = {"part": "whole", "what": what, "beside": beside, "seconds": seconds[what]}
        by_part = {"by_part": record["seconds_by_part"], "AP": record["metrics"]["AP"]}
        yield row | {"ratio": seconds[what] / seconds[beside or what]} | by_part


def million(options):
    """Two stages of half a million records on ten thousand images."""
    folder = options.out / "million"
    for stage in ("a", "b"):
        (folder / stage).mkdir(parents=True)
        images = [f"{k}.png" for k in range(10_000)]
        for name in images:
            Image.new("RGB", (8, 8)).save(folder / stage / name)
        records = [
            {"question_id": k, "image": images[k % 10_000], "skill": f"kind {k % 8}"}
            | {"text": f"What is thing {k} doing in this picture?", "answer": f"word {k % 999}"}
            for k in range(500_000)
        ]
        (folder / stage / "train.json").write_text(json.dumps(records))
        (folder / stage / "test.json").write_text(json.dumps(records[:100]))
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if process.returncode:
        sys.exit(process.stderr)
    seconds, resident, peak = map(float, process.stdout.split("\n")[-2].split())
    row = {"part": "records", "what": "a million records", "beside": "", "seconds": seconds}
    yield row | {"ratio": 1.0, "resident_gb": resident, "peak_gb": peak}


PARTS = {"peft": beside_peft, "steps": steps, "wide": partial(steps, width=512)}
PARTS |= {"experts": experts, "input": new_images, "whole": whole, "records": million}


def table(records):
    rows = [["part", "what", "beside", "seconds", "ratio", "on"]]
    for r in records:
        numbers = f"{r['seconds']:.3g}", f"{r['ratio']:.2f}" if r["beside"] else ""
        more = f" ({r['resident_gb']:.2f} GB, peak {r['peak_gb']:.2f})" if "peak_gb" in r else ""
        rows.append([r["part"], r["what"] + more, r["beside"], *numbers, r["device"]])
    return grid(rows, markdown=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--model", default=TINY, type=Path, help="of peft, experts and input")
    parser.add_argument("--rounds", default=7, type=int, help="(default: 7)")
    parser.add_argument("--only", default="", help="whole runs with this in their name")
    parser.add_argument("--save", action="store_true", help=f"append to {RECORDS.name}")
    parser.add_argument("--table", action="store_true", help="only print the records")
    options = parser.parse_args()
    if options.table:
        print(table(read_json(RECORDS)))
        return
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    about = {"device": card, "dtype": options.dtype, "model": options.model.name}
    about |= {"threads": torch.get_num_threads(), "commit": git_commit()}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        options.out = Path(folder)
        for part in options.parts:
            for row in PARTS[part](options):
                records.append(row | about)
                if options.save:
                    with open(RECORDS, "a", encoding="utf-8") as file:
                        file.write(json.dumps(records[-1]) + "\n")
            print("\n" + table(records))


if __name__ == "__main__":
    main()
