"""Time and memory at the widths of LLaVA-1.5-7B, with random weights. Not part of the test suite.

    python tests/bench.py                        two decoder layers on a CPU: 15 minutes, 6 GB
    python tests/bench.py --dtype bf16           the same in bfloat16
    python tests/bench.py --device cuda --layers 32 --whole    all layers, the streams' own batches
    python tests/bench.py --table                the records of results/widths.jsonl as a table
    python -m pytest tests/bench.py              on a GPU: small runs beside those of a CPU

Every script runs two stages of its drawn stream with the defaults of a full-size model and with
activation checkpointing, as a user would start it; on a CPU with fewer samples in a batch. Beside
the measured peak stands the one that docs/real.md computes. The answers are noise: what this shows
is that the sizes fit together, and what they cost. --save appends to results/widths.jsonl.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval import grid  # noqa: E402
from files import git_commit, read_json  # noqa: E402

RECORDS = ROOT / "results" / "widths.jsonl"
# Without a role before the system sentence, as in the template of llava-hf/llava-1.5-7b-hf.
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SCRIPTS = {  # script -> its flags; the two stages that are run
    "asr.py": "--stream vqacl --order recognition,count",
    "cram.py": "--stream ucit --order ArxivQA,IconQA",
    "mllm_cl.py": "--stream dcl --order RS,AD --router_epochs 2 --shots 8",
    "experts.py": "--stream dcl --order RS,AD",
    "baselines.py": "--method sequential --stream vqacl --order recognition,count",
}
FEW = "--limit 4 --limit_test 2 --batch_size 2 --accumulate 1 --epochs 1 --max_new_tokens 4"
FEW += " --eval_batch_size 2"
WHOLE = "--limit_test 16 --eval_batch_size 16 --limit"
TOKENS = 576 + 64  # of a sample: image and text
SMALL = (  # of the test: on the tiny LLaVA and stream of conftest.py
    "asr.py",
    "cram.py --rank 4 --targets q,v --buffer_share 0.5",
    "mllm_cl.py --shots 3 --router_steps 4",
    "baselines.py --method ewc",
)


def make_model(folder, layers, tower_layers, device):
    """A LLaVA with the widths of LLaVA-1.5-7B and random weights, saved in bfloat16."""
    tiny = tf.AutoProcessor.from_pretrained(ROOT / "mini" / "tiny-llava")
    vision = tf.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=tower_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = tf.LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )
    mark = tiny.tokenizer.convert_tokens_to_ids("<image>")
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = tf.LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    pixels = tf.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    tf.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tiny.tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def computed_mb(r):
    """The formula of docs/real.md, in MB: weights, adapters with gradient and moments, and the
    larger of two things: what checkpointing keeps of a micro-batch, which is the input of every
    layer, and the keys and values of a batch of test questions. A lower bound."""
    size, width = {"bf16": 2, "fp32": 4}[r["dtype"]], r["layers"] * 4096
    train = r["micro_batch"] * TOKENS * width
    test = r["questions"] * 2 * (TOKENS + r["new_tokens"]) * width
    return (size * (r["weights"] + max(train, test)) + 16 * r["trainable_parameters"]) / 1e6


def run(script, flags, args, folder):
    """One script as a process of its own; its record."""
    out = folder / f"{Path(script).stem}-{args.dtype}-{args.micro or 'default'}"
    words = [sys.executable, str(ROOT / script), *flags, "--out", str(out)]
    words += ["--model", str(folder / "model"), "--device", args.device, "--dtype", args.dtype]
    words += ["--checkpointing"]
    subprocess.run(words, cwd=ROOT, check=True)
    record = read_json(out / "summary.json")
    steps = read_json(out / "metrics.jsonl")
    micro = record["args"]["batch_size"] // record["args"]["accumulate"]
    train = sum(record["seconds_by_part"].get(part, 0) for part in ("train", "buffer", "expert"))
    epochs = np.ones(2) * record["args"]["epochs"]  # of the two stages
    trained = record["args"]["limit"] * epochs.sum()
    asked = record.get("cost", {}).get("generations", 3 * record["args"]["limit_test"])
    return {
        "script": script,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "dtype": args.dtype,
        "layers": args.layers,
        "rank": record["args"]["rank"],
        "micro_batch": micro,
        "batch_size": record["args"]["batch_size"],
        "questions": record["args"]["eval_batch_size"],
        "new_tokens": record["args"]["max_new_tokens"],
        "seconds_a_sample": train / trained,
        "seconds_a_question": record["seconds_by_part"]["evaluation"] / asked,
        "seconds": record["seconds"],
        "seconds_by_part": record["seconds_by_part"],
        "peak_mb": record["peak_memory_mb"],
        "trainable_parameters": record["trainable_parameters"],
        "finite": all(abs(line["loss"]) < 1e4 for line in steps),
        "versions": record["versions"],
        "commit": git_commit(),
    }


def table(records):
    keys = ["script", "device", "dtype", "layers", "rank", "micro_batch", "questions"]
    rows = [[*keys, "s a sample", "s a question", "peak, MB", "computed, MB"]]
    for r in records:
        seconds = [f"{r[key]:.3f}" for key in ("seconds_a_sample", "seconds_a_question")]
        memory = [f"{x:,.0f}" for x in (r["peak_mb"], computed_mb(r))]
        rows.append([*(str(r[key]) for key in keys), *seconds, *memory])
    return grid(rows, markdown=True)


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
@pytest.mark.parametrize("command", SMALL)
def test_a_gpu_in_bfloat16_is_near_a_cpu(command, flags, tmp_path):
    """The losses of the first steps agree to the precision of the numbers."""
    script, *further = command.split()
    words = [sys.executable, ROOT / script, *flags, *further, "--dropout", "0"]

    def losses(*choice):
        out = tmp_path / "-".join(choice)
        places = ["--device", choice[0], "--dtype", choice[1], "--out", out]
        subprocess.run(list(map(str, [*words, *places])), check=True)
        assert json.loads((out / "summary.json").read_text())["peak_memory_mb"] > 1
        return [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]

    cpu, gpu, half = losses("cpu", "fp32"), losses("cuda", "fp32"), losses("cuda", "bf16")
    assert len(cpu) == len(gpu) == len(half) and np.isfinite(gpu + half).all()
    np.testing.assert_allclose(gpu[:3], cpu[:3], rtol=1e-3)
    np.testing.assert_allclose(half[:3], cpu[:3], rtol=5e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=2, help="of the decoder (default: 2)")
    parser.add_argument("--tower_layers", type=int, default=3, help="(default: 3; the real one 24)")
    parser.add_argument("--whole", action="store_true", help="the streams' own batches and epochs")
    parser.add_argument("--limit", type=int, default=48, help="with --whole: samples of a stage")
    parser.add_argument("--micro", type=int, help="with --whole: samples at a time")
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench" / time.strftime("%H%M%S")
    )
    parser.add_argument("--save", action="store_true", help=f"append to {RECORDS.name}")
    parser.add_argument("--table", action="store_true", help="only print the records")
    args = parser.parse_args()
    if args.table:
        print(table(read_json(RECORDS)))
        return
    if not (args.out / "model").exists():
        make_model(args.out / "model", args.layers, args.tower_layers, args.device)
    with torch.device("meta"):
        config = tf.AutoConfig.from_pretrained(args.out / "model")
        model = tf.LlavaForConditionalGeneration(config)
        weights = sum(p.numel() for p in model.parameters())
    records = []
    for script in args.scripts:
        flags = SCRIPTS[script].split()
        flags += [*WHOLE.split(), str(args.limit)] if args.whole else FEW.split()
        if args.micro:
            batch = {"vqacl": 80}.get(flags[flags.index("--stream") + 1], 16)
            flags += ["--accumulate", str(batch // args.micro)]
        if script == "mllm_cl.py" and not args.whole:
            flags += ["--router_batch", "2"]
        if script == "asr.py":  # captures the last four
            flags += ["--layers", str(min(4, args.layers))]
        record = run(script, flags, args, args.out) | {"weights": weights}
        records.append(record)
        if args.save:
            with open(RECORDS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
