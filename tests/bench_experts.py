"""What experts cost: CRAM's layer beside plain LoRA, MR-LoRA's evaluation beside one pass.

    python tests/bench_experts.py [--pairs 9]        some minutes on one CPU thread
    python tests/bench_experts.py --save             and keep them as results/bench_experts.json

Random weights in bench.py's sizes. All modes take turns in one process; figures are medians over
rounds of (this mode / the first) in the same round: processor time of one thread.

    lora        plain LoRA of rank 9 on q, k, v, o: a training step, and generation of 8 tokens
    cram E      E experts of rank 9, the last in training, L_orth on (older ones: its group)
    loop 6      as cram 6, with a Python loop over the experts and no L_orth

Goals, at width 512: cram 6 at most 1.30 of lora in training and in generation; cram 32 at most 1.5
of cram 2.
For MR-LoRA: the seconds of switching an adapter (at most 1 ms on the tiny model), and of answering
T test sets by route-then-answer beside one router pass and one generation per sample (at most 1.15)
and beside the public way: the router, and every expert on every test set.
"""

import argparse
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest
import torch
import torch.nn.functional as F
from bench import SIZES, build, save, show
from PIL import Image

import cram
import mllm_cl
import model as M
from data import Collator, Sample

RANK = 9


class LoopLinear(cram.ExpertLinear):
    """The obvious way: one expert after the other."""

    def forward(self, x):
        y, pi = self.base(x), self.routing.weights
        x = F.dropout(x, self.dropout, self.training)
        for k in range(pi.shape[1] - 1):
            own = self.owner == k
            part = F.linear(F.linear(x, self.A[own]), self.B[:, own])
            y = y + pi[:, k, None, None] * self.scale * part
        if self.new_A is not None:
            y = y + pi[:, -1, None, None] * self.scale * F.linear(
                F.linear(x, self.new_A), self.new_B
            )
        return y


def prepared(folder, size, mode):
    """(step, answer): functions of one training step and one generation in this mode."""
    model, processor = M.load_llava(folder)
    torch.manual_seed(0)
    targets, routing, layers = ["q", "k", "v", "o"], None, {}
    n = SIZES[size][-1]
    if mode == "lora":
        parameters = M.add_lora(model, "one", RANK, 2 * RANK, 0.05, targets)
    else:
        kind, E = mode.split()
        E, parameters = int(E), []
        layers, routing = cram.add_experts(model, targets, 2.0, 0.05)
        for layer in layers.values():
            if kind == "loop":
                layer.__class__ = LoopLinear
            for k in range(E - 1):
                A = 0.01 * torch.randn(RANK, layer.base.in_features)
                layer.keep(k, A, 0.01 * torch.randn(layer.base.out_features, RANK))
            layer.old_outputs = cram.basis(layer.B) if kind == "cram" else None
            parameters += layer.fresh_pair(RANK)
        routing.weights = torch.full((n, E), 1 / E)
        routing.gamma = torch.full((n,), 1 - 1 / E)
    picture = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    samples = [
        Sample(str(i), picture, conftest.QUESTIONS[i % 5], conftest.ANSWERS[i % 5],
               (conftest.ANSWERS[i % 5],), "skill", "stage")
        for i in range(n)
    ]  # fmt: skip
    collator = Collator(processor, M.image_tokens(model, processor))
    features = M.image_features(M.FeatureCache(model, processor), samples)
    train, ask = collator(samples, train=True), collator(samples, train=False)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    model.generation_config.eos_token_id = None  # always 8 tokens

    def step():
        model.train()
        optimizer.zero_grad()
        if mode == "lora":
            M.forward(model, train, features).loss.backward()
        else:
            cram.backward(model, train, features, (1.0, 1.0), routing, layers, 1.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def answer():
        model.eval()
        M.generate(model, processor, ask, features, 8)

    return step, answer


def timed(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def rounds(functions, pairs):
    """Median seconds, and median ratio to the first, of {name: function} that take turns."""
    names, found = list(functions), []
    for function in functions.values():
        function()
    for i in range(pairs):
        order = names[i % len(names) :] + names[: i % len(names)]
        found.append({name: timed(functions[name]) for name in order})
    return {
        name: (
            statistics.median(r[name] for r in found),
            statistics.median(r[name] / r[names[0]] for r in found),
        )
        for name in names
    }


def routed_evaluation(folder, pairs, T=4, N=32):
    """MR-LoRA's evaluation on the tiny model: [(what, seconds, ratio)]."""
    model, processor = M.load_llava(folder)
    targets = ["q", "k", "v", "o", "gate", "up", "down", "projector"]
    stages = [types.SimpleNamespace(name=f"{k}") for k in range(T)]
    for stage in stages:
        M.add_lora(model, mllm_cl.expert_name(stage), 16, 32, 0.0, targets)
    M.add_lora(model, "router", 16, 32, 0.0, targets)
    picture = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    samples = [
        Sample(str(i), picture, conftest.QUESTIONS[i % 5], "A", ("A",), "skill", "stage")
        for i in range(T * N)
    ]
    collator = Collator(processor, M.image_tokens(model, processor))
    cache = M.FeatureCache(model, processor)
    args = types.SimpleNamespace(router="mllm", eval_batch_size=32, max_new_tokens=8)
    stream = types.SimpleNamespace(
        stages=stages, descriptions={s.name: "pictures of one kind" for s in stages}
    )
    letters = mllm_cl.letters_of(T, 0)
    model.generation_config.eos_token_id = None

    def route():
        mllm_cl.use(model, "router")
        inputs = (model, processor, cache, collator, samples, T - 1, args, stream, letters, [])
        return mllm_cl.route(*inputs)[1]

    def answer(choice):
        mllm_cl.answer_all(model, processor, cache, collator, samples, choice, stages, args, {})

    functions = {
        "one router pass and one generation": lambda: (route(), answer([0] * len(samples))),
        "route, then answer by expert": lambda: answer(
            [k % T for k, _ in enumerate(route())]  # random weights choose one; make it T
        ),
        "route, and every expert on every test set": lambda: (
            route(),
            *(answer([k] * len(samples)) for k in range(T)),
        ),
    }
    lines = [(name, *values) for name, values in rounds(functions, pairs).items()]
    names = [mllm_cl.expert_name(stage) for stage in stages]
    start = time.perf_counter()
    for k in range(200):
        mllm_cl.use(model, names[k % T])
    return [*lines, ("switching an adapter", (time.perf_counter() - start) / 200, float("nan"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds (9)")
    parser.add_argument("--save", action="store_true", help="write results/bench_experts.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = [[]]
    show("model, mode, training: ms, ratio, generation: ms, ratio".split(", "), tables)
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            build(size, folder)
            modes = ("lora", "cram 2", "cram 6", "cram 32", "loop 6")
            made = {mode: prepared(folder, size, mode) for mode in modes}
            train = rounds({mode: pair[0] for mode, pair in made.items()}, args.pairs)
            answer = rounds({mode: pair[1] for mode, pair in made.items()}, args.pairs)
            parts = [part["cram 32"][0] / part["cram 2"][0] for part in (train, answer)]
            for mode in modes:
                cells = [f"{1e3 * s:.0f} | {ratio:.2f}" for s, ratio in (train[mode], answer[mode])]
                show([size, mode, *" | ".join(cells).split(" | ")], tables)
            show([size, "cram 32 to cram 2", "", f"{parts[0]:.2f}", "", f"{parts[1]:.2f}"], tables)
    print()
    tables.append([])
    show(["MR-LoRA, tiny, 4 tasks of 32 samples", "ms", "ratio"], tables)
    with tempfile.TemporaryDirectory() as folder:
        build(next(iter(SIZES)), folder)
        for name, seconds, ratio in routed_evaluation(folder, max(3, args.pairs // 3)):
            show([name, f"{1e3 * seconds:.2f}", "-" if ratio != ratio else f"{ratio:.2f}"], tables)
    if args.save:
        save("bench_experts", tables)


if __name__ == "__main__":
    main()
