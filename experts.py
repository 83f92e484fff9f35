"""Experts with a router that needs no training: a LoRA per stage, linear discriminants to choose.

Ours, not a paper's. A reference script: read it from top to bottom, copy it, edit it. Its sections
have the numbers of mllm_cl.py's: `diff mllm_cl.py experts.py` shows what a router costs there.

The idea. Experts that are never touched again forget nothing; what can go wrong is the choice.
MR-LoRA trains a router for it and keeps samples. Frozen parts of LLaVA already tell stages apart:
Fisher's linear discriminant needs the mean of each stage and one covariance that all share. Both
are sums over samples, collected stage after stage; no sample is kept. (Fisher 1936; streaming:
SLDA, Hayes and Kanan 2020, arXiv 1909.01520; on features of large models: RanPAC, McDonnell et al.
2023, arXiv 2307.02251.)

    x          frozen numbers of image and question     look, features.frozen_features
    m_k, C     mean of stage k; sum of covariances      welford, remember
    S          (1 - s) C / T + s tr(C / T) / d I        discriminants
    p(k | x)   softmax_k(x S^-1 m_k - m_k S^-1 m_k / 2) probability
    answers    of the expert of the largest p           answer
    start      how an expert begins                     begin_expert

    python experts.py --stream dcl                      mini stream, tiny LLaVA: laptop, minutes
    python experts.py --stream dcl --start fresh --out runs/fresh   every expert from nothing
    python experts.py --stream dcl --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU

Letters: B batch, N samples, T tasks, t stage, k expert, d size of x, r rank, s shrinkage. Numbers
in brackets, [3], are choices that docs/experts.md explains.
"""

from collections import Counter
from functools import cache, partial

import torch

import data
import plot
from baselines import StackedLoRALinear, save_stack
from eval import SAVE_EVERY, Run
from features import frozen_features
from files import input_errors, thumbnails
from mllm_cl import backward, sent
from model import LLaVA, seed_by

# ---- 1. Flags ------------------------------------------------------------------------------------

PROJECTED = 1024  # most numbers that a covariance is kept of: more are projected [3]
CHUNK = 4096  # samples whose x are in memory at a time


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("experts.py", __doc__.split("\n")[0])
    parser.set_defaults(stream="dcl")
    add = parser.add_argument_group("experts").add_argument
    about = "discriminants, cosine to the means, or the task known (default: lda)"
    add("--router", choices=["lda", "cosine", "oracle"], default="lda", help=about)
    about = "what x holds: image and question, one of them, the last layer's mean (default: both)"
    add("--features", choices=["both", "image", "question", "last"], default="both", help=about)
    add("--shrinkage", type=data.fraction, default=0.01, metavar="S", help="(default: 0.01)")
    about = "an expert begins from nothing, the last, the mean of all (default), or of alike ones"
    add("--start", choices=["fresh", "last", "mean", "alike"], default="mean", help=about)
    add("--untrained", action="store_true", help="experts stay empty: measures the router alone")
    args = parser.parse_args(argv)
    return args if args.plot else data.resolve_defaults(args)


# ---- 2. The quantity: which expert? Frozen numbers, and their discriminants ----------------------


def look(llava, args, batch):
    """x of a batch: [[B, d]] on the CPU."""
    if args.features == "last":  # one more pass of the pretrained model
        with llava.lora_off():
            hidden = llava.forward(batch).last_hidden_state.float()
        asked = (batch["image_mask"] | batch["question_mask"])[:, :, None]
        x = ((hidden * asked).sum(1) / asked.sum(1)).cpu()
    else:
        x = frozen_features(llava, batch)
        C = llava.model.config.vision_config.hidden_size
        x = {"both": x, "image": x[:, :C], "question": x[:, C:]}[args.features]
    return [x @ projection(x.shape[1]) if x.shape[1] > PROJECTED else x]


@cache
def projection(d):
    """A fixed random matrix [d, PROJECTED], drawn from a seed rather than stored [3]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d, PROJECTED, generator=generator) / PROJECTED**0.5


def discriminants(memory, shrinkage):
    """Fisher's linear discriminants with equal priors, "weights" [d, T] and "bias" [T], float64."""
    S = memory["covariance"] / len(memory["mean"])  # [d, d], means of the stages' covariances
    least = max(shrinkage * float(S.trace()) / len(S), 1e-9)  # where all x of a stage are equal
    S = (1 - shrinkage) * S + least * torch.eye(len(S), dtype=S.dtype)
    weights = torch.linalg.solve(S, memory["mean"].T)
    return {"weights": weights, "bias": -(memory["mean"].T * weights).sum(0) / 2}


def probability(x, memory, args):
    """p(k | x) of the T experts so far for every x [N, d]: [N, T] float64."""
    x = x.double()
    if args.router == "cosine":
        x, mean = (torch.nn.functional.normalize(y) for y in (x, memory["mean"]))
        return (20 * x @ mean.T).softmax(1)
    return (x @ memory["weights"] + memory["bias"]).softmax(1)


# ---- 3. The memory: means, one covariance, experts -----------------------------------------------


def welford(stage, x):
    """Take x [n, d] into a stage's "count", "mean" [d] and "scatter" [d, d], the sum of
    (x - mean)(x - mean)^T (Welford 1962, in batches). The order does not matter."""
    x, n, center = x.double(), len(x), x.double().mean(0)
    new = {"count": n, "mean": center, "scatter": (x - center).T @ (x - center)}
    if stage:
        new["count"], step = stage["count"] + n, center - stage["mean"]
        new["mean"] = stage["mean"] + step * (n / new["count"])
        between = torch.outer(step, step) * (stage["count"] * n / new["count"])
        new["scatter"] += stage["scatter"] + between
    stage |= new


def remember(memory, llava, samples, args):
    """One pass over a stage's training samples adds its mean [d] and its covariance [d, d]; returns
    the mean probability of the earlier experts [t] for these samples (None in the first stage)."""
    stage, alike, look_at = {}, [], partial(look, llava, args)
    for k in range(0, len(samples), CHUNK):
        chunk, size = samples[k : k + CHUNK], args.eval_batch_size
        x = llava.over(chunk, size, look_at, "means and covariance")[0]
        welford(stage, x)
        alike += [probability(x, memory, args)] if memory else []
    memory["mean"] = torch.stack([*memory.get("mean", ()), stage["mean"]])
    covariance = stage["scatter"] / stage["count"]
    memory["covariance"] = memory.get("covariance", 0) + covariance  # divided by T when it is used
    memory |= discriminants(memory, args.shrinkage)
    return torch.cat(alike).mean(0) if alike else None


def begin_expert(layers, args, t, alike):
    """Freeze the last expert. The new one begins as plain LoRA (fresh), or as the best product of
    rank r for sum_k w_k B_k A_k [2]: w one for the last expert, even, or `alike` [t]."""
    w = {"last": torch.eye(t)[-1], "mean": torch.full((t,), 1 / t), "alike": alike}.get(args.start)
    for layer in layers:
        r = len(layer.A)
        layer.stack()
        if w is not None:
            product(layer, w.to(layer.old_A).repeat_interleave(r))


def product(layer, w):
    """Set the LoRA in training to the best B A of its rank for old_B diag(w) old_A [2]."""
    r = len(layer.A)
    left, inner = torch.linalg.qr(layer.old_B * w)  # the out x in product is never formed
    right, outer = torch.linalg.qr(layer.old_A.T)
    U, S, Vh = torch.linalg.svd(inner @ outer.T)
    root = S[:r].sqrt()
    layer.A.data = root[:, None] * (Vh[:r] @ right.T)
    layer.B.data = left @ U[:, :r] * root


def experts_state(llava, memory):
    """What a checkpoint holds: the expert in training, the frozen ones, the router's numbers."""
    frozen = [(layer.old_A, layer.old_B) for layer in llava.layers.values()]
    return {"lora": llava.lora_state(), "frozen": frozen, "memory": memory}


# ---- 4. One micro-batch: mllm_cl.backward --------------------------------------------------------

# ---- 5. Answering the questions of a test: every sample by its expert, in one batch --------------


def answer(llava, args, names, memory, samples):
    """Answers, and for the figures the choice and the probability of every expert."""
    batch, T = llava.batch(samples, train=False), len(memory["mean"])
    p = probability(look(llava, args, batch)[0], memory, args)
    if args.router == "oracle":
        p = torch.eye(T)[[names.index(sample.stage) for sample in samples]]
    choice = p.argmax(1)
    weights = torch.eye(T, device=llava.device)[choice]  # [B, T]
    pictured = [sample.image is not None for sample in samples]
    for path, layer in llava.layers.items():
        layer.weights = weights[pictured] if "projector" in path else weights
    texts = llava.generate(batch)
    notes = zip(choice.tolist(), p.float().numpy())
    return texts, [{"choice": k, "probability": row} for k, row in notes]


def summary(run, memory, layers):
    """For the record: who was sent where after each stage, and what is stored."""
    T, d = memory["mean"].shape
    each = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    stored = T * each + T * d + d * (d + 1) // 2  # of the covariance the symmetric half
    return {"trainable_parameters": each, "stored_parameters": stored, **sent(run.facts, T)}


# ---- 6. The run ----------------------------------------------------------------------------------


def main(args):
    """Train on every stage in turn; after each, test on all stages seen so far."""
    stream = data.load_stream(args)
    run = Run(args, stream, "experts")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    seed_by(f"{args.seed}/expert-{stream.stages[0].name}")
    llava.add_lora(args, StackedLoRALinear, alone=True)  # frozen experts beside the one in training
    layers = list(llava.layers.values())
    data.show_sample(stream.stages[0].train[0], llava.processor, args.system)

    names, memory = [stage.name for stage in stream.stages], {}
    first, begin = 0, 0  # the stage and the step to start from
    if state := run.resume():
        (first, begin), memory = state["at"], state["memory"]
        llava.load_lora(state["lora"])
        for layer, (A, B) in zip(layers, state["frozen"]):
            layer.old_A, layer.old_B = A.to(llava.device), B.to(llava.device)

    for t, stage in list(enumerate(stream.stages))[first:]:
        # The router needs one look at the samples; then the expert begins.
        if not begin:
            alike = remember(memory, llava, stage.train, args)
            run.lap("router")
            if t:
                seed_by(f"{args.seed}/expert-{stage.name}")
                begin_expert(layers, args, t, alike)
        lora = [p for layer in layers for p in (layer.A, layer.B)]

        # Train. A step is a few micro-batches; each adds its share to the gradient.
        steps = [] if args.untrained else data.steps_of(stage, args)
        optimizer = torch.optim.AdamW(lora, lr=stage.lr, weight_decay=0.0)
        if begin:
            optimizer.load_state_dict(state["optimizer"])
        llava.model.train()
        for k in run.steps(t, len(steps), begin):
            lr = stage.lr * data.schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            log = Counter()  # adds up over the micro-batches
            for batch in llava.micro_batches(stage.train, steps, k):
                log.update(backward(llava, batch))
            log = llava.clip(lora, log)
            run.log(t, lr=lr, **log)  # stops the run at a nan
            optimizer.step()
            if (k + 1) % SAVE_EVERY == 0:
                run.save((t, k + 1), optimizer, **experts_state(llava, memory))
        begin = 0

        # Test on all stages seen so far; the router's choices are kept for the figures.
        llava.eval()
        run.test(t, partial(answer, llava, args, names, memory))
        run.note(**{f"{t + 1}-{t + 1}-picture": thumbnails(stage.test[:2], 96)})
        run.save((t + 1, 0), **experts_state(llava, memory))

    save_stack(llava, names, run.folder / "experts")
    run.finish(plot.mllm_cl, **summary(run, memory, layers))


if __name__ == "__main__":
    with input_errors():
        args = parse()
        print("figures:", plot.draw(args.plot, args.out)) if args.plot else main(args)
