"""What ASR costs beside sequential LoRA: time of a training step, and peak memory.

    python tests/bench.py [--pairs 15]        about 10 minutes on one CPU thread; --device cuda too
    python tests/bench.py --save              and keep the table as results/bench.json

Time: steps of all modes take turns in one process, on the same model and batch; the figure is
the median over rounds of (this mode / sequential) in the same round, so that a busy machine slows
both. On a CPU it is the processor time of one thread: waiting for other programs does not count.
Memory: one process per mode; what the step needs at its peak on top of the loaded model.
Random weights in two sizes. Modes:

    sequential   LoRA on the answer loss alone (asr.py --beta 0 --gamma 0)
    asr          asr.py's step: captured attention, L_spec and L_geo (its reference vectors are
                 computed once per sample; that pass is printed apart)
    eager        the same L_spec on the matrices of output_attentions=True, no L_geo

Goals: asr / sequential at most 1.10 in time; in memory 1.15, and 1.35 with checkpointing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# name: side and patch of the image; width, layers, heads, feed-forward of the text; micro-batch
SIZES = {
    "tiny: 4 x 128, 8 x 8 patches": (64, 8, 128, 4, 4, 320, 32),
    "wide: 8 x 512, 24 x 24 patches": (336, 14, 512, 8, 8, 1376, 2),
}
MODES = ("sequential", "asr", "eager")
GOAL = {"off": 1.15, "on": 1.35}


def build(size, folder):
    """A random CLIP + Llama of that size, saved to `folder`."""
    import conftest
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

    side, patch, width, layers, heads, inner, _ = SIZES[size]
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = conftest.byte_tokenizer(special, "<s>", "</s>", "<pad>")
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    square = {"height": side, "width": side}
    conftest.build(
        folder,
        CLIPVisionConfig(num_attention_heads=4, image_size=side, patch_size=patch, **tower),
        LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=heads, **text),
        tokenizer,
        conftest.VICUNA,
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square),
        "default",
        1,
        seed=0,
    )


class Bench:
    """A model, one micro-batch and everything that asr.py's step wants to know of it."""

    def __init__(self, folder, size, checkpointing, device):
        import conftest
        import torch
        from PIL import Image

        import asr
        import model as M
        from data import Collator, Sample

        torch.set_num_threads(1)
        self.torch, self.asr, self.M = torch, asr, M
        self.args = asr.parse(["--stream", "vqacl"])
        self.model, processor = M.load_llava(folder, device)
        torch.manual_seed(0)
        targets = ("q", "v", "projector")
        self.parameters = M.add_lora(self.model, asr.ADAPTER, 16, 32, 0.05, targets)
        if checkpointing:
            M.enable_checkpointing(self.model)
        picture = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
        self.samples = []
        for i in range(SIZES[size][-1]):
            question, answer = conftest.QUESTIONS[i % 5], conftest.ANSWERS[i % 5]
            self.samples.append(
                Sample(str(i), picture, question, answer, (answer,), "skill", "stage")
            )
        collator = Collator(processor, M.image_tokens(self.model, processor))
        self.batch = M.to_device(collator(self.samples, train=True), self.model.device)
        self.features = M.image_features(M.FeatureCache(self.model, processor), self.samples)
        self.grid, self.share = M.image_grid(self.model), (1.0, 1.0)

        # Prototypes of two skills, from this very batch: what they are does not change the cost.
        self.model.eval()
        collated = self.batch, self.features
        part = [range(len(self.samples))]
        start = self.clock()
        self.reference = asr.reference_embeddings(
            self.model, self.samples, part, lambda _: collated
        )
        self.reference_seconds = self.clock() - start
        self.reference = self.reference.to(self.model.device).unbind(1)
        phi, angular = asr.stage_descriptors(
            self.model, self.samples, part, lambda _: collated, self.args, self.grid
        )
        self.memory = asr.new_prototypes(2, phi.shape[1], angular.shape[1])
        self.pi = torch.full((len(phi), 2), 0.5)
        asr.update_prototypes(self.memory, phi, angular, self.pi)
        self.memory = M.to_device(self.memory, self.model.device)
        self.pi = self.pi.to(self.model.device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.model.train()

    def step(self, mode):
        """Seconds of one whole training step."""
        text = "eager" if mode == "eager" else "capture"
        self.model.set_attn_implementation({"text_config": text})
        start = self.clock()
        self.optimizer.zero_grad()
        if mode == "eager":
            self.eager_backward()
        else:
            weights = {"beta": 0.5, "gamma": 0.05} if mode == "asr" else {"beta": 0.0, "gamma": 0.0}
            self.asr.backward(
                self.model,
                self.batch,
                self.features,
                self.samples,
                self.share,
                self.args,
                self.grid,
                pi=self.pi,
                memory=self.memory,
                reference=self.reference,
                **weights,
            )
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return self.clock() - start

    def eager_backward(self):
        asr, batch = self.asr, self.batch
        output = self.M.forward(self.model, batch, self.features, output_attentions=True)
        rows, real = self.M._positions(asr.functional_rows(batch, self.samples))
        columns, _ = self.M._positions(batch["image_mask"])
        b = self.torch.arange(len(rows), device=rows.device)[:, None, None]
        corner = [  # [B, H, S, S] -> [B, T, P, H] -> [B, H, T, P]
            whole[b, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
            for whole in output.attentions[-self.args.layers :]
        ]
        captured = self.torch.stack(corner, 1), real
        phi, angular, _ = asr.look(captured, self.grid, self.args)
        spectral, _, _ = asr.spectral_loss(phi, angular, self.pi, self.memory)
        (output.loss + 0.5 * spectral).backward()

    def clock(self):
        if self.model.device.type == "cpu":
            return time.process_time()
        self.torch.cuda.synchronize()
        return time.perf_counter()


def work(request):
    """In a process of its own: build a model, time all modes, or measure the memory of one."""
    kind, size, folder, checkpointing, device, mode, pairs = request
    if kind == "build":
        return build(size, folder)
    bench = Bench(folder, size, checkpointing, device)
    if kind == "memory":
        if bench.model.device.type == "cuda":
            bench.torch.cuda.reset_peak_memory_stats()
            before = bench.torch.cuda.memory_allocated() / 1e6
        else:  # the peak counter of the process (VmHWM) starts again from what it holds now
            Path("/proc/self/clear_refs").write_text("5")
            before = bench.M.peak_memory()
        for _ in range(3):
            bench.step(mode)
        return {"before": before, "peak": bench.M.peak_memory()}
    for mode in MODES:
        bench.step(mode)
    rounds = []
    for i in range(pairs):
        order = MODES[i % 3 :] + MODES[: i % 3]  # nobody always comes first
        rounds.append({mode: bench.step(mode) for mode in order})
    return {"rounds": rounds, "reference": bench.reference_seconds}


def show(row, tables):
    """Print a row of the last of the tables at once, and keep it there."""
    tables[-1].append([str(cell) for cell in row])
    print("| " + " | ".join(tables[-1][-1]) + " |", flush=True)
    if len(tables[-1]) == 1:
        print("|" + "---|" * len(row))


def save(name, tables):
    """The tables as results/NAME.json, with what a reader needs to make them again."""
    import platform

    import torch
    import transformers

    import eval as evaluation

    record = {"command": f"python tests/{name}.py --save", "commit": evaluation.git_commit()}
    record["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    record |= {"machine": platform.machine(), "threads": 1, "tables": tables}
    evaluation.write_json(Path(__file__).parents[1] / "results" / f"{name}.json", record)


def process(kind, *request):
    command = [sys.executable, __file__, "--work", json.dumps([kind, *request])]
    environment = dict(os.environ)
    if (
        kind == "memory"
    ):  # what is freed goes back to the system at once, not to the C library's heap
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="rounds of timed steps (15)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--save", action="store_true", help="write results/bench.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print("\n" + json.dumps(work(json.loads(args.work))))
        return
    tables = [[]]
    head = "model, checkpointing, mode, ms a step, time ratio, MB, memory ratio, goal"
    show(head.split(", "), tables)
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            process("build", size, folder, False, args.device, "", 0)
            for name, on in (("off", False), ("on", True)):
                timed = process("time", size, folder, on, args.device, "", args.pairs)
                plain = None
                for mode in MODES:
                    used = process("memory", size, folder, on, args.device, mode, 0)
                    extra = used["peak"] - used["before"]
                    plain = plain or extra
                    ratio = statistics.median(r[mode] / r["sequential"] for r in timed["rounds"])
                    ms = 1e3 * statistics.median(r[mode] for r in timed["rounds"])
                    goal = f"1.10, {GOAL[name]:.2f}" if mode == "asr" else ""
                    cells = [f"{ms:.0f}", f"{ratio:.3f}", f"{extra:.0f}", f"{extra / plain:.2f}"]
                    show([size, name, mode, *cells, goal], tables)
                once = f"{1e3 * timed['reference']:.0f}"
                show([size, name, "reference pass, once per batch", once, *[""] * 4], tables)
    if args.save:
        save("bench", tables)


if __name__ == "__main__":
    main()
