"""The rows that every method is compared with: from zero-shot to joint training, and classics.

A reference script: read it from top to bottom, copy it, edit it. Its sections have the numbers of
asr.py's, whose run with both losses off is --method sequential.

    zeroshot    the pretrained model, tested on every stage: what there is to start from
    sequential  one LoRA adapter trained on stage after stage: what a method must beat; the same
                run as `asr.py --beta 0 --gamma 0`, bit for bit
    joint       one LoRA adapter trained on all stages at once: usually the ceiling, not continual
    replay      sequential, with --buffer samples of every earlier stage mixed in: what storing a
                little data buys
    ewc         sequential, with weights held where earlier stages need them: their Fisher
                information says which ones (Kirkpatrick et al. 2017, arXiv 1612.00796)
    lwf         sequential, with the distributions over words kept near those before the stage, on
                the stage's own data (Li and Hoiem 2016, arXiv 1606.09282)
    olora       a new LoRA for every stage, added to the frozen ones of earlier stages and held
                orthogonal to them (Wang et al. 2023, arXiv 2310.14152)
    moelora     sequential, with a LoRA cut into --experts that a gate mixes token by token (Chen et
                al. 2024, CoIN, arXiv 2403.08350)
    hide        a new LoRA for every stage, trained alone; tests add all of them up, but in the last
                decoder layer each counts by how much image and question are like its stage's (Guo
                et al. 2025, HiDe-LLaVA, arXiv 2503.12941)

    python baselines.py --method sequential --stream vqacl        mini stream, tiny LLaVA: minutes
    python baselines.py --method joint --stream vqacl --data DIR --model llava-hf/llava-1.5-7b-hf
    python baselines.py --method joint --blind                    also test with all images black

zeroshot and joint fill the last row of the accuracy matrix only, so they have AP and no forgetting.
t is a stage, T the temperature of lwf and hide, theta the LoRA weights, F the Fisher information.

Where they differ from their papers: ewc and lwf train the LoRA weights alone, all others are
frozen. F is the mean of squared gradients for the given answers (the "empirical" one), not for
answers drawn from the model; the quadratic terms of all stages are kept as one. lwf has no heads of
old tasks: the words of an answer are one output layer for all stages; old and new model are
compared word by word along the given answer. Its loss is a KL divergence in place of the cross
entropy, which has the same gradient, times T^2, so that T does not change its weight: the paper's
weight of 1 is 1 / T^2 = 0.25 here. olora adds up absolute values as its release does (the paper has
squares), and has no penalty on the size of the new LoRA. moelora's gates begin even; its scale is
alpha / r, r the ranks of all experts together, as in its release; A is drawn as any LoRA's. hide
adds up the products B_i A_i; its release adds up the B_i and the A_i, and multiplies then, so that
B_i meets A_j. Its likeness is that of LLaVA's own frozen features (of pure text the question's
alone), its release's that of CLIP's, and every question has weights of its own, in the release the
whole batch has one; the projector is a LoRA or frozen and not one that all stages train. --hide_sum
is ours: with W = n for n stages it is the release's sum, and the more stages the larger. Rank,
layers, rate, epochs and --experts are the same for all methods of a stream; the releases choose
them by method and by task. On the tiny model the defaults of lwf, olora and hide are what did well
on mini streams; moelora's even gates divide its first updates by --experts, which --alpha 256 makes
up for there.
"""

import argparse
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import eval as evaluation
from data import (
    Collator,
    InputError,
    Stage,
    add_common_flags,
    fail,
    load_stream,
    resolve_defaults,
    schedule,
    show_sample,
    text_width,
    train_order,
)

# --------------------------------------------------------------------------------------------------
# 1. Flags
# --------------------------------------------------------------------------------------------------


METHODS = ["zeroshot", "sequential", "joint", "replay", "ewc", "lwf", "olora", "moelora", "hide"]


# fmt: off
def parse(argv=None):
    """All flags; InputError if one of this script's own makes no sense."""
    parser = argparse.ArgumentParser("baselines.py", description=__doc__.split("\n")[0])
    add_common_flags(parser)
    add = parser.add_argument_group("baseline").add_argument
    add("--method", default="sequential", choices=METHODS,
        help="which row (default: sequential)")
    add("--buffer", type=int, default=20, metavar="N",
        help="replay: samples kept of every stage (default: 20)")
    add("--ewc_lambda", type=float, default=10.0, metavar="LAMBDA",
        help="ewc: weight of sum_i F_i (theta_i - theta*_i)^2 / 2 (default: 10, found "
        "on mini streams)")
    add("--fisher_samples", type=int, default=100, metavar="N",
        help="ewc: samples of a stage that F is measured on (default: 100)")
    add("--lwf_lambda", type=float, metavar="LAMBDA",
        help="lwf: weight of the distillation loss (default: 0.25, the paper's 1 / T^2; tiny 1)")
    add("--lwf_temperature", type=float, default=2.0, metavar="T",
        help="lwf: answers are compared as softmax(logits / T) (default: 2)")
    add("--olora_lambda", type=float, metavar="LAMBDA_1",
        help="olora: weight of the sum of |A_i A_t^T| over earlier stages i (default: 0.5, its "
        "release's; tiny 0.05)")
    add("--experts", type=int, default=8, metavar="E",
        help="moelora: experts that share the rank (default: 8)")
    add("--hide_temperature", type=float, metavar="T",
        help="hide: weights of the last layer are softmax(likeness / T) (default: 0.1, its "
        "release's; tiny 0.03)")
    add("--hide_sum", type=float, metavar="W",
        help="hide: in the other layers each of n LoRAs counts min(1, W / n), together at most W "
        "(default: inf, as in its release; tiny 2)")
    add("--blind", action="store_true",
        help="at the end test with black images, too: what is known without looking")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval_batch_size", type=int, default=32, metavar="B",
        help="questions answered at once (default: 32)")
    add("--save_every", type=int, default=100, metavar="N",
        help="checkpoint every N steps inside a stage too; 0: after stages only (default: 100)")
    args = parser.parse_args(argv)
    if args.save_every < 0:
        raise InputError(f"--save_every {args.save_every} must be zero or more")
    for name in ("ewc_lambda", "lwf_lambda", "olora_lambda"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} {value} must be zero or more")
    above_zero = "eval_batch_size buffer fisher_samples lwf_temperature hide_temperature"
    for name in above_zero.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} {value} must be above zero")
    if args.hide_sum is not None and not args.hide_sum > 0:
        raise InputError(f"--hide_sum {args.hide_sum} must be above zero")
    if args.experts < 1:
        raise InputError(f"--experts {args.experts} must be 1 or more")
    if args.blind and args.method == "hide":
        raise InputError("--blind: hide chooses by the image; use another --method")
    if args.out is None and not args.plot:
        args.out = f"runs/{args.method}-{Path(args.stream).resolve().name}-{args.seed}"
    return args


def check_stream(args, stream):
    """InputError if the experts cannot share the rank; else fills lwf's, olora's, hide's flags."""
    if args.method == "moelora" and args.rank % args.experts:
        raise InputError(f"cannot divide --rank {args.rank} by --experts {args.experts}")
    tiny = text_width(args.model) < 512
    defaults = {"lwf_lambda": (0.25, 1.0), "olora_lambda": (0.5, 0.05)}
    defaults |= {"hide_temperature": (0.1, 0.03), "hide_sum": (math.inf, 2.0)}
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[tiny])
    return args
# fmt: on


# Wrong flags and missing files are reported before the seconds that importing torch takes.
if __name__ == "__main__":
    try:
        args = parse()
        if not args.plot:
            stream = load_stream(resolve_defaults(args))
            run = evaluation.start_run(check_stream(args, stream), __file__)
    except InputError as error:
        fail(error)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn.functional import cosine_similarity, dropout, kl_div, linear  # noqa: E402

from model import (  # noqa: E402
    add_lora,
    add_up_gradients,
    forward,
    gather,
    generate,
    image_features,
    image_tokens,
    load_checkpoint,
    load_lora_state,
    lora_state,
    parameter_report,
    peak_memory,
    processes,
    random_state,
    save_checkpoint,
    save_lora,
    set_lora,
    set_random_state,
    set_up,
    share_lora,
    target_paths,
    to_device,
)

# --------------------------------------------------------------------------------------------------
# 3. The memory: of replay, of ewc, of hide
# --------------------------------------------------------------------------------------------------


def with_replay(stage, old, n, seed):
    """The stage with n training samples of each stage in `old` (all, if it has fewer) mixed in.

    They are drawn uniformly, the same ones whatever comes later. In vqacl they are dealt out to the
    object groups, which are visited one after the other.
    """
    kept = [s for other in old for s in
            random.Random(f"replay/{seed}/{other.name}").sample(
                other.train, min(n, len(other.train)))]  # fmt: skip
    places = range(len(stage.train), len(stage.train) + len(kept))
    blocks = stage.blocks and [
        block + list(places[k :: len(stage.blocks)]) for k, block in enumerate(stage.blocks)
    ]
    return replace(stage, train=stage.train + kept, blocks=blocks)


def fisher_information(model, parameters, samples, collate):
    """F, one tensor per parameter: the mean over samples of the squared gradient of log p(answer).

    One sample at a time: the square of a batch's mean gradient is something else.
    """
    fisher = [torch.zeros_like(p) for p in parameters]
    for sample in samples:
        batch, features = collate([sample])
        n = (batch["labels"] != -100).sum()  # log p is a sum over the answer's tokens
        log_p = -forward(model, batch, features).loss * n
        gradients = torch.autograd.grad(log_p, parameters, allow_unused=True)
        for f, g in zip(fisher, gradients, strict=True):
            if g is not None:  # a sample without an image does not reach the projector
                f += g**2 / len(samples)
    return fisher


def remember(memory, fisher, parameters):
    """Add a stage's F (theta - theta*)^2 to the sum of those before; memory: {"F", "theta"}.

    A sum of quadratic functions is one around the mean of their centers, weighted by F, plus a
    constant: two numbers per weight, however many stages there were.
    """
    now = [p.detach().clone() for p in parameters]
    if memory is None:
        return {"F": fisher, "theta": now}
    total = [a + b for a, b in zip(memory["F"], fisher, strict=True)]
    parts = zip(memory["F"], memory["theta"], fisher, now, total, strict=True)
    return {"F": total, "theta": [(a * x + b * y) / c.clamp(min=1e-30) for a, x, b, y, c in parts]}


@torch.no_grad()
def frozen_features(model, processor, samples, seen):
    """Means over a sample's image tokens, [N, c] (zeros without an image), and over the embeddings
    of its question, [N, d], less the mean of the embedding table. seen: their image_features."""
    table = model.get_input_embeddings().weight
    asked = processor.tokenizer([s.question for s in samples], add_special_tokens=False)
    words = torch.stack([table[ids].float().mean(0) for ids in asked["input_ids"]])
    words = words - table.mean(0, dtype=torch.float32)
    images = torch.zeros(len(samples), model.config.vision_config.hidden_size, device=model.device)
    if seen is not None:
        images[[s.image is not None for s in samples]] = seen.float().mean(1)
    return images, words


def anchors(model, processor, cache, samples):
    """hide: what the images and the questions of a stage are like, [c] and [d]."""
    parts = [samples[k : k + 64] for k in range(0, len(samples), 64)]
    parts = [frozen_features(model, processor, p, image_features(cache, p)) for p in parts]
    return [torch.cat(x).mean(0) for x in zip(*parts, strict=True)]


def likeness(features, memory):
    """Mean cosine of N samples' images and questions with those of t stages: [N, t]; of pure text
    that of the question alone.

    features: [N, c] (zeros: no image) and [N, d]; memory: the stages' anchors.
    """
    pairs = zip(features, zip(*memory, strict=True), strict=True)
    image, text = (cosine_similarity(x[:, None], torch.stack(a)[None], -1) for x, a in pairs)
    return torch.where(features[0].any(1, keepdim=True), (image + text) / 2, text)


class MoELoRALinear(torch.nn.Module):
    """y = W x + (alpha / r) B (g * A x) for x [..., in]; g = softmax(G x), [..., E], weighs the
    experts, each of which has r / E of the rows of A."""

    def __init__(self, base, rank, alpha, dropout, experts):
        super().__init__()
        self.base, self.dropout, self.scale = base, dropout, alpha / rank
        device, n = base.weight.device, base.in_features
        a = torch.nn.init.kaiming_uniform_(torch.empty(rank, n), a=5**0.5)
        self.A = torch.nn.Parameter(a.to(device))
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.G = torch.nn.Parameter(torch.zeros(experts, n, device=device))

    def forward(self, x):
        y, x = self.base(x), x.to(self.A.dtype)
        g = linear(x, self.G).softmax(-1).repeat_interleave(len(self.A) // len(self.G), -1)
        h = linear(dropout(x, self.dropout, self.training), self.A) * g * self.scale
        return (y + linear(h, self.B)).to(y.dtype)


def add_mixture(model, rank, alpha, dropout, targets, experts):
    """Put a MoELoRALinear on every target layer; returns its parameters."""
    parameters = []
    for path in target_paths(model, targets):
        layer = MoELoRALinear(model.get_submodule(path), rank, alpha, dropout, experts)
        model.set_submodule(path, layer.train(model.training))
        parameters += [layer.A, layer.B, layer.G]
    return parameters


# --------------------------------------------------------------------------------------------------
# 4. The losses
# --------------------------------------------------------------------------------------------------


def ewc_penalty(memory, parameters):
    """sum_i F_i (theta_i - theta*_i)^2 / 2"""
    parts = zip(memory["F"], parameters, memory["theta"], strict=True)
    return sum((f * (p - center) ** 2).sum() for f, p, center in parts) / 2


def distillation_loss(logits, before, temperature):
    """T^2 KL(softmax(before / T) || softmax(logits / T)), mean over answer tokens: [N, V] each.

    T^2 makes the gradient's size independent of T (Hinton et al. 2015, arXiv 1503.02531).
    """
    p, q = (x.float().div(temperature).log_softmax(1) for x in (before, logits))
    return temperature**2 * kl_div(q, p, log_target=True, reduction="batchmean")


def orthogonality_loss(earlier, parameters):
    """Sum over layers and earlier stages i of |A_i A_t^T|, entry by entry, as in O-LoRA's release.

    parameters: A and B of layer after layer; earlier: such lists, of the stages before.
    """
    loss = 0.0
    for k in range(0, len(parameters), 2):
        loss = loss + (torch.cat([old[k] for old in earlier]) @ parameters[k].T).abs().sum()
    return loss


# --------------------------------------------------------------------------------------------------
# 5. One micro-batch
# --------------------------------------------------------------------------------------------------


def backward(model, batch, features, share, args, t):
    """Forward and backward of one micro-batch, which holds `share` of the step's answer tokens."""
    before = None
    if args.method == "lwf" and t:
        set_lora(model, BEFORE)
        with torch.no_grad():
            before = forward(model.eval(), batch, features).logits
        set_lora(model.train(), ADAPTER)
    output = forward(model, batch, features)
    loss = output.loss
    if before is not None:
        distilled = distillation_loss(output.logits, before, args.lwf_temperature)
        loss = loss + args.lwf_lambda * distilled
    loss = loss * share
    loss.backward()
    return loss.detach()


# --------------------------------------------------------------------------------------------------
# 6. Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate_stage(model, processor, cache, collator, stage, args, title, blind=False, memory=None):
    """Rows of eval.evaluate; blind: every image is black; memory: hide's anchors.

    hide answers with y = W x + s sum_i w_i B_i A_i x over its n stages: w_i = min(1, W / n) with W
    of --hide_sum, in the last decoder layer softmax_i(likeness_i / T).
    """

    def answer(samples):
        batch = to_device(collator(samples, train=False), model.device)
        features = image_features(cache, samples)
        if memory:
            alike = likeness(frozen_features(model, processor, samples, features), memory)
            fused = min(1.0, args.hide_sum / len(memory))
            fused = torch.full((1, len(memory)), fused, device=model.device)
            share_lora(model, fused, last=(alike / args.hide_temperature).softmax(1))
        if blind and features is not None:
            features = cache([Image.new("RGB", (64, 64))]).expand_as(features)
        return generate(model, processor, batch, features, args.max_new_tokens)

    return evaluation.evaluate(answer, stage.test, stage.metric, args.eval_batch_size, title)


# --------------------------------------------------------------------------------------------------
# 7. The run
# --------------------------------------------------------------------------------------------------

ADAPTER = "continual"  # the one LoRA adapter that goes through all stages; olora: the first
BEFORE = "before"  # lwf: as it was before the stage


def main(args, stream, run):
    """Train on what the method trains on, test, write the run folder."""
    clock, seconds = time.perf_counter(), {}

    def lap(part):
        """Book the time since the last lap on a part of the run."""
        nonlocal clock
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - clock
        clock = now

    # ---- 7.1 The model: a frozen LLaVA with LoRA -------------------------------------------------
    model, processor, cache = set_up(args)
    me, world = processes()
    torch.manual_seed(args.seed)
    parameters, earlier, adapters = [], [], []  # trained; olora: frozen ones; names of all in use
    targets = args.targets.split(",")

    def new_adapter():
        """The next LoRA to train; those before are frozen and stay in use."""
        nonlocal parameters
        for p in parameters:
            p.requires_grad_(False)
        earlier.extend([parameters] if parameters else [])
        if adapters:  # the first one's seed is the run's
            torch.manual_seed(random.Random(f"{args.seed}/{len(adapters)}").getrandbits(32))
        adapters.append(f"{ADAPTER}-{len(adapters) + 1}" if adapters else ADAPTER)
        parameters = add_lora(model, adapters[-1], args.rank, args.alpha, args.dropout, targets)
        set_lora(model, *adapters if args.method == "olora" else adapters[-1:])

    if args.method == "moelora":
        more = args.rank, args.alpha, args.dropout, targets, args.experts
        parameters = add_mixture(model, *more)
    elif args.method != "zeroshot":
        new_adapter()
    if args.method == "lwf":
        for p in add_lora(model, BEFORE, args.rank, args.alpha, 0.0, targets):
            p.requires_grad_(False)
        set_lora(model, ADAPTER)
    collator = Collator(processor, image_tokens(model, processor))

    def collate(samples):
        batch = collator(samples, train=True)
        return to_device(batch, model.device), image_features(cache, samples)

    # ---- 7.2 What is about to happen ------------------------------------------------------------
    stages, T = stream.stages, len(stream.stages)
    plan = list(enumerate(stages))  # (row of the matrix, stage to train on before it is filled)
    if args.method == "joint":
        everything = [sample for stage in stages for sample in stage.train]
        plan = [(T - 1, Stage("all stages", everything, [], stages[0].metric))]
    elif args.method == "zeroshot":
        plan = [(T - 1, Stage("nothing", [], [], stages[0].metric))]
    count, micro = parameter_report(model), args.batch_size // args.accumulate
    sizes = ", ".join(f"{stage.name} {len(stage.train)} + {len(stage.test)}" for stage in stages)
    show_sample(stages[0].train[0], processor)
    print(f"\n{run}: on {model.device} in {model.dtype}, {torch.get_num_threads()} CPU threads")
    print(f"{count['total']:,} parameters, {count['trainable']:,} trained (LoRA on {args.targets})")
    print(f"{T} stages, training + test samples: {sizes}")
    print(f"{args.epochs} epochs in steps of {args.batch_size} samples, micro-batches of {micro}")
    print(f"{args.method}: trains on " + ", then ".join(stage.name for _, stage in plan))

    # ---- 7.3 Records, from the checkpoint if there is one ---------------------------------------
    matrix, novel = np.full((T, T), np.nan), np.full((T, T), np.nan)
    memory = [] if args.method == "hide" else None  # of hide, of ewc
    first, step, unfinished = 0, 0, None  # stage to begin with, steps so far, a stage half done
    if args.resume and (state := load_checkpoint(run)):
        torch.set_num_threads(state["threads"])  # another number would round differently
        for name, saved in state["lora"].items():
            if name not in adapters:
                new_adapter()
            load_lora_state(model, name, saved)
        if args.method == "lwf":
            load_lora_state(model, BEFORE, state["before"])
        if args.method == "moelora":
            for p, saved in zip(parameters, state["mixture"], strict=True):
                p.data.copy_(saved)
        if args.method == "hide":
            memory = [[x.to(model.device) for x in pair] for pair in state["memory"]]
        if args.method == "ewc" and state["memory"]:
            memory = {k: [x.to(model.device) for x in v] for k, v in state["memory"].items()}
        set_random_state(state["random"])
        first, step, unfinished = state["stage"], state["step"], state["unfinished"]
        matrix, novel, seconds = state["matrix"].numpy(), state["novel"].numpy(), state["seconds"]
        print(f"resumed after {first} stages and {step} steps")
    evaluation.truncate_metrics(run, step)

    def checkpoint(done, unfinished=None):
        state = {"stage": done, "unfinished": unfinished, "step": step, "random": random_state()}
        state |= {"lora": {name: lora_state(model, name) for name in adapters}, "memory": memory}
        if args.method == "lwf":
            state["before"] = lora_state(model, BEFORE)
        if args.method == "moelora":
            state["mixture"] = [p.detach().cpu() for p in parameters]
        state |= {"matrix": torch.tensor(matrix), "novel": torch.tensor(novel)}
        save_checkpoint(run, state | {"seconds": seconds, "threads": torch.get_num_threads()})

    # ---- 7.4 Stage after stage ------------------------------------------------------------------
    lap("start")
    for p in range(first, len(plan)):
        t, stage = plan[p]
        if args.method == "replay":
            stage = with_replay(stage, stages[:t], args.buffer, args.seed)
        if args.method in ("olora", "hide") and len(adapters) == t:
            new_adapter()
        train = stage.train

        # a new optimizer, whose learning rate rises to lr and falls to zero within the stage
        steps, size = [], args.batch_size
        if train:
            optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
            orders = [train_order(stage, args.seed, e, args.epochs) for e in range(args.epochs)]
            steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
        begin = 0
        if args.method == "lwf" and not unfinished:
            load_lora_state(model, BEFORE, lora_state(model, ADAPTER))
        if unfinished:
            begin = unfinished["steps"]
            optimizer.load_state_dict(unfinished["optimizer"])
            unfinished = None

        model.train()
        title = f"stage {p + 1}/{len(plan)} {stage.name}"
        bar = tqdm(range(begin, len(steps)), title, len(steps), initial=begin, disable=None)
        for k in bar:
            lr = args.lr * schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            parts = [steps[k][m : m + micro] for m in range(0, len(steps[k]), micro)][me::world]
            batches = [collate([train[i] for i in part]) for part in parts]
            tokens = [int((batch["labels"] != -100).sum()) for batch, _ in batches]
            whole = sum(gather(sum(tokens)))
            loss = 0.0
            for (batch, features), n in zip(batches, tokens, strict=True):
                loss += backward(model, batch, features, n / whole, args, t).item()
            if earlier and args.method == "olora" and me == 0:
                penalty = args.olora_lambda * orthogonality_loss(earlier, parameters)
                penalty.backward()
                loss += penalty.item()
            if memory and args.method == "ewc" and me == 0:
                penalty = args.ewc_lambda * ewc_penalty(memory, parameters)
                penalty.backward()
                loss += penalty.item()
            loss = sum(gather(loss))
            add_up_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(loss + norm):
                raise InputError(
                    f"{title}, step {k + 1}: loss {loss}, gradient norm {norm}; stopped. "
                    f"The last good checkpoint stays in {run / 'checkpoint'}; try a lower --lr "
                    f"(now {args.lr:g}) with another --out"
                )
            optimizer.step()
            step += 1
            line = {"step": step, "stage": p + 1, "lr": lr, "gradient_norm": norm, "loss": loss}
            evaluation.append_metrics(run, line)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if args.save_every and (k + 1) % args.save_every == 0:
                lap("train")
                checkpoint(p, {"steps": k + 1, "optimizer": optimizer.state_dict()})
        lap("train")

        if args.method == "ewc":
            chosen = random.Random(f"fisher/{args.seed}/{stage.name}")
            chosen = chosen.sample(train, min(args.fisher_samples, len(train)))
            model.eval()
            fisher = fisher_information(model, parameters, chosen, collate)
            memory = remember(memory, fisher, parameters)
            lap("fisher")

        if args.method == "hide":
            memory.append(anchors(model, processor, cache, train))
            set_lora(model, *adapters)
            lap("anchors")

        # test on all stages seen so far; with --hold_out also on the object group that was left out
        model.eval()
        for tests, scores, kind in ((stages, matrix, ""), (stream.novel or [], novel, "novel-")):
            for i, test in enumerate(tests[: t + 1]):
                title = f"test {kind}{test.name}"
                rows = evaluate_stage(
                    model, processor, cache, collator, test, args, title,
                    memory=memory if args.method == "hide" else None,
                )  # fmt: skip
                scores[t, i] = evaluation.accuracy(rows, test.metric)
                evaluation.write_predictions(run, t, f"{kind}{i + 1}" if kind else i, rows)
        evaluation.write_matrix(run, stages, matrix)
        print(f"after {stage.name}: " + " ".join(f"{a:.1f}" for a in matrix[t, : t + 1]))
        lap("evaluation")
        if parameters:
            checkpoint(p + 1)

    # ---- 7.5 The result -------------------------------------------------------------------------
    unseen = []  # answers without looking; all processes take part
    for stage in stages if args.blind else ():
        more = args, f"blind {stage.name}", True
        unseen.append(evaluate_stage(model, processor, cache, collator, stage, *more))
    if me:  # under torchrun the first process has it
        return
    names = [stage.name for stage in stages]
    print("\n" + evaluation.table(matrix, names) + "\n")
    summary = {"peak_memory_mb": peak_memory(), "trainable_parameters": count["trainable"]}
    stored = sum(p.numel() for p in parameters) * (len(adapters) or 1)  # moelora has no adapters
    if memory:  # F and theta* of ewc, anchors of hide
        kept = memory.values() if args.method == "ewc" else memory
        stored += sum(x.numel() for tensors in kept for x in tensors)
    summary |= {"tower_runs": cache.tower_runs, "stored_parameters": stored}
    if args.blind:
        blind, kinds = [], {}  # accuracy per stage; [seeing, blind] scores per kind of question
        for i, (stage, rows) in enumerate(zip(stages, unseen, strict=True)):
            blind.append(evaluation.accuracy(rows, stage.metric))
            evaluation.write_predictions(run, T - 1, f"blind-{i + 1}", rows)
            seeing = evaluation.predictions_file(run, T - 1, i)
            for a, b in zip(evaluation.read_json(seeing, lines=True), rows, strict=True):
                kinds.setdefault(b["skill"], []).append((a["score"], b["score"]))
        kinds = {kind: [100 * np.mean(x) for x in zip(*kinds[kind], strict=True)] for kind in kinds}
        summary["blind"] = {"stages": blind, "AP": np.mean(blind), "seeing_blind_by_kind": kinds}
        print(f"blind, on task 1 to {T}: " + " ".join(f"{a:.1f}" for a in blind))
        lap("evaluation")
    if stream.novel:
        print("object group left out of training:\n" + evaluation.table(novel, names) + "\n")
        summary["novel"] = {"matrix": novel, "metrics": evaluation.metrics(novel)}
    if args.method == "hide":  # a folder each: what they add up to depends on the question
        for name, other in zip(adapters, stages, strict=True):
            save_lora(model, name, run / "lora" / other.name, args.model)
    if earlier and args.method == "olora":
        # one file with the ranks of all: B A summed over stages is [B_1 B_2 ..] [A_1; ..]
        n, layers = len(adapters), [*earlier, parameters]
        joined = add_lora(model, "all", n * args.rank, n * args.alpha, args.dropout, targets)
        with torch.no_grad():
            for k, p in enumerate(joined):
                p.copy_(torch.cat([own[k] for own in layers], k % 2))
    if adapters and args.method != "hide":
        save_lora(model, "all" if earlier else ADAPTER, run / "lora", args.model)
    if args.method == "moelora":  # peft has no such adapter: our own names
        names = {p: name for name, p in model.named_parameters()}
        (run / "lora").mkdir(exist_ok=True)
        kept = {names[p]: p.detach().cpu() for p in parameters}
        save_file(kept, run / "lora" / "adapter_model.safetensors")
    lap("end")
    summary |= {"seconds": sum(seconds.values()), "seconds_by_part": seconds}
    evaluation.finish_run(run, summary)
    plot([run], run / "figures")
    print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
    print(f"peak memory {summary['peak_memory_mb']:,.0f} MB; everything is in {run}")


# --------------------------------------------------------------------------------------------------
# 8. Figures from saved records: python baselines.py --plot RUN [RUN ...]
# --------------------------------------------------------------------------------------------------


def plot(folders, path=None):
    """The first run's accuracy matrix, and the accuracy of all runs over their stages."""
    records = {str(folder): evaluation.read_run(folder) for folder in folders}
    path, first = Path(path or Path(folders[0]) / "figures"), next(iter(records.values()))
    name = first["args"].get("method", first["script"])
    evaluation.plot_matrix(first["matrix"], first["stages"], path / "matrix.png", name)
    curves = {folder: record["matrix"] for folder, record in records.items()}
    evaluation.plot_accuracy(curves, path / "accuracy.png")
    print(f"figures: {path}")


if __name__ == "__main__":
    try:
        if args.plot:
            plot(args.plot, args.out)
        else:
            main(args, stream, run)
    except InputError as error:
        fail(error)
