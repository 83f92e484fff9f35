"""The rows that every method is compared with: from zero-shot to joint training, and classics.

A reference script: read it from top to bottom, copy it, edit it. One loop, `main`, and a small
class per method, which overrides what it changes of sequential LoRA.

    zeroshot    the pretrained model, tested on every stage: the starting point
    sequential  one LoRA adapter trained on stage after stage: what a method must beat; the same
                run as `asr.py --beta 0 --gamma 0`, bit for bit
    joint       one LoRA adapter trained on all stages at once: usually the ceiling, not continual
    replay      sequential with --buffer samples of every earlier stage; any method takes --buffer
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
    disco       a new LoRA for every stage, trained alone; tests weigh them by how much the question
                is like those of its stage (Guo et al. 2025, arXiv 2503.12897)
    reglora     a new LoRA for every stage, added to earlier ones; where these have changed W most,
                the new one is held at zero (Chen et al. 2025, SEFE, arXiv 2505.02486)
    clmoe       moelora, whose experts keep a share of what they were before the stage (Huai et al.
                2025, CL-MoE, arXiv 2503.00413)
    smolora     two of --experts LoRAs for every sample, picked by what the layer sees and by the
                instruction (Wang et al. 2024, SMoLoRA, arXiv 2411.13949)

    python baselines.py --method ewc --stream vqacl               mini stream, tiny LLaVA: minutes
    python baselines.py --method joint --stream vqacl --data DIR --model llava-hf/llava-1.5-7b-hf

zeroshot and joint fill only the last row of the accuracy matrix: they have AP and no forgetting.
t is a stage, T the temperature of lwf and hide, theta the LoRA weights, F the Fisher information.
Numbers in brackets, [3], are the deviations from the papers of docs/baselines.md.
"""

import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, dropout, kl_div, linear
from torch.utils.checkpoint import checkpoint

import data
import plot
from data import Stage
from eval import SAVE_EVERY, Run, accuracy, evaluate, write_predictions
from features import question_and_image
from files import InputError, input_errors, predictions_file, progress, read_json
from model import LLaVA, LoRALinear, gather, seed_by, to_device, write_tensors

# ---- 1. Flags ------------------------------------------------------------------------------------

FISHER_SAMPLES = 100  # of a stage, that ewc measures F on
LWF_TEMPERATURE = 2.0  # answers are compared as softmax(logits / T)
DISCO_TEMPERATURE = 0.05  # of the softmax over cosines
KEPT_SHARE = 0.02  # of the entries of every B A of a stage, that reglora protects later
OLD_SHARE, OLD_SHARE_UNUSED = 0.7, 0.3  # of clmoe's experts; of those in use only before the stage
# flag -> the methods that read it, its default at full size and for a tiny model
OWN_FLAGS = {
    "buffer": ("replay", 20, 20),
    "ewc_lambda": ("ewc", 10.0, 10.0),
    "lwf_lambda": ("lwf", 0.25, 1.0),
    "olora_lambda": ("olora", 0.5, 0.05),
    "reglora_lambda": ("reglora", 2500.0, 250.0),
    "experts": ("moelora, clmoe, smolora", 8, 8),
    "hide_temperature": ("hide", 0.1, 0.03),
    "hide_sum": ("hide", math.inf, 2.0),
}


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("baselines.py", __doc__.split("\n")[0])
    add = parser.add_argument_group("baseline").add_argument
    about = f"one of {', '.join(METHODS)} (default: sequential)"
    add("--method", default="sequential", choices=list(METHODS), metavar="NAME", help=about)
    add("--buffer", type=data.count, help="samples of each earlier stage, replayed (replay: 20)")
    add("--ewc_lambda", type=data.weight, help="weight of the penalty (default: 10)")
    add("--lwf_lambda", type=data.weight, help="weight of distillation (default: 0.25; tiny 1)")
    add("--olora_lambda", type=data.weight, help="weight of |A_i A_t^T| (default: 0.5; tiny 0.05)")
    add("--reglora_lambda", type=data.weight, help="weight of kept |B A| (default: 2500; tiny 250)")
    add("--experts", type=data.count, help="of moelora, clmoe, smolora; share the rank (8)")
    add("--hide_temperature", type=data.positive, help="last layer (default: 0.1; tiny 0.03)")
    add("--hide_sum", type=data.endless, help="n LoRAs count min(1, W / n) (default: inf; tiny 2)")
    add("--blind", action="store_true", help="also test with black images")
    args = parser.parse_args(argv)
    if args.plot:
        return args
    tiny = data.is_tiny(args.model)
    for name, (methods, *values) in OWN_FLAGS.items():
        own, given = args.method in methods.split(", "), getattr(args, name) is not None
        anywhere = name == "buffer" and args.method not in ("zeroshot", "joint")
        if given and not (own or anywhere):
            raise InputError(f"--{name}: {args.method} ignores it; use --method {methods}")
        if not given and (own or name != "buffer"):
            setattr(args, name, values[tiny])
    args = data.resolve_defaults(args)
    if args.method in OWN_FLAGS["experts"][0].split(", ") and args.rank % args.experts:
        raise InputError(f"cannot divide --rank {args.rank} by --experts {args.experts}")
    if args.method in ("clmoe", "smolora") and args.experts % 2:  # they have two halves
        raise InputError(f"--experts {args.experts}: {args.method} needs an even number")
    if args.blind and args.method in ("hide", "disco", "smolora"):
        raise InputError(f"--blind: {args.method} chooses by the sample; use another --method")
    return args


# ---- 2. The methods ------------------------------------------------------------------------------


class Sequential:
    """Plain LoRA, stage after stage. A method overrides what it changes."""

    keeps = ()  # attributes that a checkpoint must hold: tensors, or lists or dicts of them

    def __init__(self, args, llava, stream):
        self.args, self.llava, self.stages = args, llava, stream.stages
        self.lora = self.add_lora()  # the parameters to train

    def add_lora(self):
        return self.llava.add_lora(self.args)

    def plan(self):
        """What to train on: (row of the matrix that is tested afterwards, stage)."""
        return [(t, self.mixed(t, stage)) for t, stage in enumerate(self.stages)]

    def mixed(self, t, stage):
        """The stage with args.buffer samples of each earlier one (all, if it has fewer), the same
        ones whatever comes later; in vqacl dealt out to the object groups, which come in turn."""
        kept = []
        for old in self.stages[:t] if self.args.buffer else ():
            rng = random.Random(f"replay/{self.args.seed}/{old.name}")
            kept += rng.sample(old.train, min(self.args.buffer, len(old.train)))
        places = range(len(stage.train), len(stage.train) + len(kept))
        blocks = stage.blocks and [
            block + list(places[k :: len(stage.blocks)]) for k, block in enumerate(stage.blocks)
        ]
        return replace(stage, train=stage.train + kept, blocks=blocks)

    def before(self, t, stage):
        """Once, before training on stage t."""

    def losses(self, t, batch):
        """The parts of the loss of a micro-batch by name, means over its answer tokens."""
        return {"task": self.llava.forward(batch).loss}

    def penalties(self, t):
        """What is added once per step, whatever the batch, by name."""
        return {}

    def after(self, t, stage):
        """Once, after training on stage t: a last look at its data."""

    def answer(self, samples):
        return self.llava.answer(samples)

    def state(self):
        kept = {name: getattr(self, name) for name in self.keeps}
        return {"lora": self.llava.lora_state(), **kept}

    def load(self, state):
        self.llava.load_lora(state["lora"])
        for name in self.keeps:
            setattr(self, name, to_device(state[name], self.llava.device))

    def stored(self):
        """How many numbers are kept after the last stage."""
        return sum(x.numel() for x in self.llava.lora_state().values())

    def save(self, folder):
        self.llava.save_lora(folder)


class ZeroShot(Sequential):
    def add_lora(self):
        return []

    def plan(self):
        return [(len(self.stages) - 1, Stage("nothing", [], [], ""))]

    def save(self, folder):
        pass


class Joint(Sequential):
    def plan(self):
        """A stage with more epochs than others is repeated; the largest rate counts [7]."""
        once = math.gcd(*(stage.epochs for stage in self.stages))
        everything = [s for stage in self.stages for s in stage.train * (stage.epochs // once)]
        lr = max(stage.lr for stage in self.stages)
        return [(len(self.stages) - 1, Stage("all stages", everything, [], "", None, once, lr))]


class EWC(Sequential):
    """lambda sum_i F_i (theta_i - theta*_i)^2 / 2 (their Eq. 3), all earlier stages in one term.

    A sum of quadratic functions is one around the mean of their centers, weighted by F, plus a
    constant: two numbers per weight, however many stages there were.
    """

    F = center = None
    keeps = ("F", "center")

    def penalties(self, t):
        if self.F is None:
            return {}
        terms = zip(self.F, self.lora, self.center)
        ewc = sum((f * (p - center) ** 2).sum() for f, p, center in terms) / 2
        return {"ewc": self.args.ewc_lambda * ewc}

    def after(self, t, stage):
        rng = random.Random(f"fisher/{self.args.seed}/{stage.name}")
        samples = rng.sample(stage.train, min(FISHER_SAMPLES, len(stage.train)))
        new, now = self.fisher_information(samples), [p.detach().clone() for p in self.lora]
        if self.F is None:
            self.F, self.center = new, now
            return
        total = [a + b for a, b in zip(self.F, new)]
        terms = zip(self.F, self.center, new, now, total)
        self.center = [(a * x + b * y) / c.clamp(min=1e-30) for a, x, b, y, c in terms]
        self.F = total

    def fisher_information(self, samples):
        """F, a tensor per parameter: the mean over samples of the squared gradient of log p of the
        given answer [2]. One sample at a time: the square of a mean gradient is something else."""
        fisher = [torch.zeros_like(p) for p in self.lora]
        for sample in progress(samples, "Fisher information"):
            batch = self.llava.batch([sample], train=True)
            n = (batch["labels"] != -100).sum()  # log p is a sum over the answer's tokens
            log_p = -self.llava.forward(batch).loss * n
            gradients = torch.autograd.grad(log_p, self.lora, allow_unused=True)
            for f, g in zip(fisher, gradients):
                if g is not None:  # a sample without an image does not reach the projector
                    f += g**2 / len(samples)
        return fisher

    def stored(self):
        return sum(x.numel() for x in [*self.lora, *self.F, *self.center])


class LwF(Sequential):
    """T^2 KL(softmax(old / T) || softmax(new / T)), mean over answer tokens [3]. T^2 makes the
    gradient's size independent of T (Hinton et al. 2015, arXiv 1503.02531)."""

    keeps = ("old",)

    def before(self, t, stage):
        self.old = [p.detach().clone() for p in self.lora]

    def swap(self):
        for p, old in zip(self.lora, self.old):
            p.data, old.data = old.data, p.data

    def losses(self, t, batch):
        if not t:
            return super().losses(t, batch)
        self.swap()
        with torch.no_grad():
            self.llava.model.eval()
            before = self.llava.forward(batch).logits
            self.llava.model.train()
        self.swap()
        output = self.llava.forward(batch)
        p, q = (x.float().div(LWF_TEMPERATURE).log_softmax(1) for x in (before, output.logits))
        distilled = LWF_TEMPERATURE**2 * kl_div(q, p, log_target=True, reduction="batchmean")
        return {"task": output.loss, "lwf": self.args.lwf_lambda * distilled}


class StackedLoRALinear(LoRALinear):
    """The trained LoRA beside frozen ones of earlier stages, old_A [n r, in], old_B [out, n r].

    alone: in training the trained one is alone; weights [B or 1, n + 1]: how much each counts in
    tests, by sample (None: fully).
    """

    def __init__(self, base, rank, alpha, dropout, alone=False):
        super().__init__(base, rank, alpha, dropout)
        self.old_A, self.old_B = self.A.detach()[:0], self.B.detach()[:, :0]
        self.alone, self.weights = alone, None

    def stack(self):
        """Freeze the trained LoRA; the next one starts fresh."""
        self.old_A = torch.cat([self.old_A, self.A.detach()])
        self.old_B = torch.cat([self.old_B, self.B.detach()], 1)
        fresh = LoRALinear(self.base, len(self.A), 1, 0.0)
        self.A, self.B = fresh.A, fresh.B

    def all_pairs(self):
        return torch.cat([self.old_A, self.A]), torch.cat([self.old_B, self.B], 1)

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        alone = self.alone and self.training
        A, B = (self.A, self.B) if alone else self.all_pairs()
        if self.training and self.dropout and not alone:  # frozen ones see all of x
            y = y + linear(linear(x, self.old_A.to(x.dtype)) * self.scale, self.old_B.to(x.dtype))
            A, B = self.A, self.B
        h = linear(dropout(x, self.dropout, self.training), A.to(x.dtype)) * self.scale
        if self.weights is not None and not self.training:  # h [B, S, n r]
            h = h * self.weights.repeat_interleave(len(self.A), 1)[:, None].to(x.dtype)
        return y + linear(h, B.to(x.dtype))


def save_stack(llava, names, folder):
    """Write the LoRA of every stage into a folder of its own."""
    for k, name in enumerate(names):
        state = {}
        for path, layer in llava.layers.items():
            rows = slice(k * len(layer.A), (k + 1) * len(layer.A))
            A, B = (x.detach().cpu() for x in layer.all_pairs())
            state[f"{path}.lora_A.weight"] = A[rows].clone()
            state[f"{path}.lora_B.weight"] = B[:, rows].clone()
        llava.save_lora(folder / name, state)


class OLoRA(Sequential):
    """lambda_1 times the sum of |A_i A_t^T|, over layers, earlier stages i and entries [4]."""

    keeps = ("stacks",)

    def add_lora(self):
        return self.llava.add_lora(self.args, StackedLoRALinear)

    @property
    def layers(self):
        return list(self.llava.layers.values())

    @property
    def stacks(self):
        return [(layer.old_A, layer.old_B) for layer in self.layers]

    @stacks.setter
    def stacks(self, stacks):
        for layer, (A, B) in zip(self.layers, stacks):
            layer.old_A, layer.old_B = A, B

    def before(self, t, stage):
        if t:
            seed_by(f"{self.args.seed}/{t}")
            for layer in self.layers:
                layer.stack()
            self.lora = [p for layer in self.layers for p in (layer.A, layer.B)]

    def penalties(self, t):
        if not t:
            return {}
        overlap = sum((layer.old_A @ layer.A.T).abs().sum() for layer in self.layers)
        return {"olora": self.args.olora_lambda * overlap}

    def stored(self):
        return len(self.stages) * sum(p.numel() for p in self.lora)

    def save(self, folder):  # one file with the ranks of all: [B_1 B_2 ..] [A_1; A_2; ..]
        state = {}
        for path, layer in self.llava.layers.items():
            A, B = layer.all_pairs()
            state |= {f"{path}.lora_A.weight": A.detach(), f"{path}.lora_B.weight": B.detach()}
        self.llava.save_lora(folder, state)


class HiDe(OLoRA):
    """Tests: y = W x + s sum_i w_i B_i A_i x over n stages [6], w_i = min(1, W / n) with W of
    --hide_sum, in the last decoder layer softmax_i(likeness_i / T)."""

    keeps = ("stacks", "anchors")

    def __init__(self, args, llava, stream):
        super().__init__(args, llava, stream)
        self.anchors = []  # per stage what its questions and its images are like, [d] and [C]
        self.features_of = partial(question_and_image, llava, missing=0.0)

    def add_lora(self):
        return self.llava.add_lora(self.args, StackedLoRALinear, alone=True)

    def penalties(self, t):
        return {}

    def after(self, t, stage):
        features = self.llava.over(stage.train, 64, self.features_of, "anchors")
        self.anchors.append([x.mean(0).to(self.llava.device) for x in features])

    def likeness(self, words, images):
        """Mean cosine of B samples' questions and images with those of n stages: [B, n]; of pure
        text that of the question alone."""
        pairs = zip((words, images), zip(*self.anchors))
        text, image = (cosine_similarity(x[:, None], torch.stack(a)[None], -1) for x, a in pairs)
        return torch.where(images.any(1, keepdim=True), (image + text) / 2, text)

    def answer(self, samples):
        batch, n = self.llava.batch(samples, train=False), len(self.anchors)
        alike = self.likeness(*self.features_of(batch))
        fused = torch.full((1, n), min(1.0, self.args.hide_sum / n), device=self.llava.device)
        for path, layer in self.llava.layers.items():
            last = f".layers.{self.llava.depth - 1}." in path
            layer.weights = (alike / self.args.hide_temperature).softmax(1) if last else fused
        return self.llava.generate(batch)

    def stored(self):
        return super().stored() + sum(x.numel() for pair in self.anchors for x in pair)

    def save(self, folder):  # a folder each: what they add up to depends on the question
        save_stack(self.llava, [stage.name for stage in self.stages], folder)


class Disco(HiDe):
    """Tests: y = W x + s sum_i w_i B_i A_i x, w = softmax_i(cos(question, mean question of stage i)
    / DISCO_TEMPERATURE) in every layer [8]."""

    def words(self, samples):
        center = self.llava.model.get_input_embeddings().weight.mean(0, dtype=torch.float32)
        return self.llava.text_means([sample.question for sample in samples]) - center

    def after(self, t, stage):
        self.anchors.append(self.words(stage.train).mean(0))

    def answer(self, samples):
        batch, means = self.llava.batch(samples, train=False), torch.stack(self.anchors)
        alike = cosine_similarity(self.words(samples)[:, None], means[None], -1)  # [B, n]
        weights = alike.div(DISCO_TEMPERATURE).softmax(1)
        pictured = [sample.image is not None for sample in samples]
        for path, layer in self.llava.layers.items():
            layer.weights = weights[pictured] if "projector" in path else weights
        return self.llava.generate(batch)


class RegLoRA(OLoRA):
    """lambda times the mean over layers of mean |(B A)_ij| over the entries that earlier stages
    changed most, the KEPT_SHARE largest of each one's B A [9]. Zero in the first stage."""

    keeps = ("stacks", "kept")

    def __init__(self, args, llava, stream):
        super().__init__(args, llava, stream)
        self.kept = [torch.zeros(0, dtype=torch.int, device=llava.device) for _ in self.layers]

    def penalties(self, t):
        if not t:
            return {}
        again = partial(checkpoint, self.change, use_reentrant=False)  # at 7B B A take 30 GB
        changes = [again(layer, kept) for layer, kept in zip(self.layers, self.kept)]
        return {"reglora": self.args.reglora_lambda * torch.stack(changes).mean()}

    @staticmethod
    def change(layer, kept):
        return (layer.B @ layer.A).flatten()[kept].abs().mean()

    @torch.no_grad()
    def after(self, t, stage):
        for k, layer in enumerate(self.layers):
            size = (layer.B @ layer.A).flatten().abs()
            largest = size.topk(max(1, int(KEPT_SHARE * len(size)))).indices
            self.kept[k] = torch.cat([self.kept[k], largest.int()])

    def stored(self):
        return super().stored() + sum(map(len, self.kept))


class MoELoRALinear(torch.nn.Module):
    """y = W x + (alpha / r) B (g * A x) for x [..., in]; g = softmax(G x), [..., E], weighs the
    experts, each of which has r / E of the rows of A [5]."""

    def __init__(self, base, rank, alpha, dropout, experts):
        super().__init__()
        self.base, self.dropout, self.scale = base, dropout, alpha / rank
        fresh = LoRALinear(base, rank, alpha, dropout)
        self.A, self.B, self.count = fresh.A, fresh.B, None
        G = torch.zeros(experts, base.in_features, device=base.weight.device)
        self.G = torch.nn.Parameter(G)

    def forward(self, x):
        y, (A, B, G) = self.base(x), (p.to(x.dtype) for p in (self.A, self.B, self.G))
        g = linear(x, G).softmax(-1)
        if self.count and self.training:  # clmoe: which two gates of a token are the largest?
            self.count(g)
        g = g.repeat_interleave(len(A) // len(G), -1)
        h = linear(dropout(x, self.dropout, self.training), A) * g * self.scale
        return y + linear(h, B)


class MoELoRA(Sequential):
    def add_lora(self):
        return self.llava.add_lora(self.args, MoELoRALinear, experts=self.args.experts)

    def save(self, folder):  # peft has no such adapter: our own names
        write_tensors(folder / "adapter_model.safetensors", self.llava.lora_state())


class CLMoE(MoELoRA):
    """After every stage but the first an expert becomes lambda old + (1 - lambda) new; lambda is
    OLD_SHARE, or OLD_SHARE_UNUSED for an expert that was among the more used half in the stage
    before and no longer is. Gates are not averaged [10]."""

    keeps = ("old", "top", "used")

    def __init__(self, args, llava, stream):
        super().__init__(args, llava, stream)
        self.old, self.used = [], torch.zeros(args.experts, dtype=torch.long, device=llava.device)
        self.top = self.used > 0
        for layer in llava.layers.values():
            layer.count = self.count

    def count(self, g):
        self.used += g.topk(2).indices.flatten().bincount(minlength=len(self.used))

    def before(self, t, stage):
        self.old = [p.detach().clone() for p in self.lora]
        self.used = torch.zeros_like(self.used)

    @torch.no_grad()
    def after(self, t, stage):
        most = sum(gather(self.used.cpu())).topk(len(self.top) // 2).indices.to(self.top.device)
        top = torch.zeros_like(self.top).index_fill(0, most, True)
        share = torch.where(self.top & ~top, OLD_SHARE_UNUSED, OLD_SHARE)  # [E]
        share, self.top = share.repeat_interleave(self.args.rank // len(top)), top
        layers = self.llava.layers.values() if t else ()
        for layer, A, B in zip(layers, self.old[::3], self.old[1::3]):  # the third is G
            layer.A.lerp_(A, share[:, None])
            layer.B.lerp_(B, share)

    def state(self):  # the counts of all processes: all load them, and the first one goes on
        return super().state() | {"used": sum(gather(self.used.cpu()))}

    def load(self, state):
        super().load(state)
        self.used *= self.llava.first


class SMoLoRALinear(torch.nn.Module):
    """y = W x + a y_v + b y_i for x [B, S, in]: y_v = s B_k A_k x of the expert k among the first
    half that a fixed gate picks for the mean of x over the prompt, y_i of one among the second
    half, picked for the instruction; [a, b] = softmax([u_v . y_v, u_i . y_i]) token by token [11].

    routing: for all layers, of the batch: "mask" [B, S] of the prompt, "pictured" [B], "words"
    [B, width]. The gates V and I stay as drawn: nothing in the method gives them a gradient."""

    def __init__(self, base, rank, alpha, dropout, experts, routing):
        super().__init__()
        self.base, self.dropout, self.scale, self.routing = base, dropout, alpha / rank, routing
        fresh, device = LoRALinear(base, rank, alpha, dropout), base.weight.device
        self.A, self.B = fresh.A, fresh.B
        self.u = torch.nn.Parameter(torch.zeros(2, base.out_features, device=device))
        gates = [torch.randn(experts // 2, n) for n in (base.in_features, routing["width"])]
        self.V, self.I = (torch.nn.Parameter(G.to(device), requires_grad=False) for G in gates)
        self.chosen = None

    def forward(self, x):
        mask, words = self.routing["mask"], self.routing["words"]
        if len(x) != len(mask) or x.shape[1] not in (1, mask.shape[1]):  # the projector: images
            mask, words = torch.ones_like(x[..., 0]), words[self.routing["pictured"]]
        if x.shape[1] > 1:  # a token that is being written keeps the experts of its prompt
            total = torch.einsum("bs,bsd->bd", mask.to(x.dtype), x.detach())
            mean = total.float() / mask.sum(1, keepdim=True)
            self.chosen = torch.stack([(mean @ self.V.T).argmax(1), (words @ self.I.T).argmax(1)])
        half, each = len(self.V), len(self.A) // (2 * len(self.V))
        picked = torch.eye(half, device=x.device)[self.chosen]  # [2, B, E / 2]
        picked = picked.repeat_interleave(each, 2)[:, :, None].to(x.dtype)
        A, B, u = (p.to(x.dtype) for p in (self.A, self.B, self.u))
        h = linear(dropout(x, self.dropout, self.training), A) * self.scale  # [B, S, r]
        h = torch.stack(h.chunk(2, -1)) * picked  # [2, B, S, r / 2]
        both = torch.stack([linear(part, rows) for part, rows in zip(h, B.chunk(2, 1))])
        share = torch.einsum("kbso,ko->kbs", both, u).softmax(0)
        return self.base(x) + (share[..., None] * both).sum(0)


class SMoLoRA(MoELoRA):
    def add_lora(self):
        self.routing = {"width": self.llava.model.config.text_config.hidden_size}
        options = {"experts": self.args.experts, "routing": self.routing}
        return self.llava.add_lora(self.args, SMoLoRALinear, **options)

    def route(self, batch):
        words, _ = question_and_image(self.llava, batch)
        prompt = batch.get("labels", -100) == -100  # an answer would lead to other experts
        self.routing |= {"mask": batch["attention_mask"] * prompt, "words": words}
        self.routing["pictured"] = [sample.image is not None for sample in batch["samples"]]

    def losses(self, t, batch):
        self.route(batch)
        return super().losses(t, batch)

    def answer(self, samples):
        batch = self.llava.batch(samples, train=False)
        self.route(batch)
        return self.llava.generate(batch)


METHODS = {"zeroshot": ZeroShot, "sequential": Sequential, "joint": Joint, "replay": Sequential}
METHODS |= {"ewc": EWC, "lwf": LwF, "olora": OLoRA, "moelora": MoELoRA, "hide": HiDe}
METHODS |= {"disco": Disco, "reglora": RegLoRA, "clmoe": CLMoE, "smolora": SMoLoRA}


def test_blind(run, method):
    """Answers to the questions of all stages with black images: what is known without looking."""
    llava, T, scores, kinds = method.llava, len(run.stages), [], {}
    black = [Image.new("RGB", (64, 64))]
    black = llava.processor.image_processor(images=black, return_tensors="pt").pixel_values
    black = llava.features.tower(black)

    def answer(samples):
        batch = llava.batch(samples, train=False)
        if batch["features"] is not None:
            batch["features"] = black.expand_as(batch["features"])
        return llava.generate(batch)

    for i, stage in enumerate(run.stages):
        rows, _ = evaluate(answer, stage.test, stage.metric, run.args.eval_batch_size, "blind")
        scores.append(accuracy(rows, stage.metric))
        write_predictions(run.folder, T - 1, f"blind-{i + 1}", rows)
        seeing = read_json(predictions_file(run.folder, T - 1, i))
        for a, b in zip(seeing, rows):
            kinds.setdefault(b["skill"], []).append((100 * a["score"], 100 * b["score"]))
    kinds = {kind: np.mean(pairs, 0) for kind, pairs in kinds.items()}
    return {"stages": scores, "AP": np.mean(scores), "seeing_blind_by_kind": kinds}


def backward(method, t, batch):
    """Forward and backward for one micro-batch; returns its share of the step's log."""
    log = method.losses(t, batch)
    log["loss"] = sum(log.values())
    log = {name: x * batch["token_share"] for name, x in log.items()}
    log["loss"].backward()
    return {name: x.detach().double() for name, x in log.items()}


# ---- 3. The run ----------------------------------------------------------------------------------


def main(args, kind=None):
    """Train on what the method trains on, test, write the run folder. kind: a class of your own."""
    args.method = kind.__name__.lower() if kind else args.method
    args.out = args.out or f"runs/{args.method}-{Path(args.stream).resolve().name}-{args.seed}"
    stream = data.load_stream(args)
    run = Run(args, stream, "baselines")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    torch.manual_seed(args.seed)
    method = (kind or METHODS[args.method])(args, llava, stream)
    trained = sum(p.numel() for p in method.lora)
    data.show_sample(stream.stages[0].train[0], llava.processor, args.system)

    plan = method.plan()
    run.plan = [stage for _, stage in plan]
    first, begin = 0, 0  # the stage and the step to start from
    if state := run.resume():
        method.load(state)
        first, begin = state["at"]

    for p, (t, stage) in list(enumerate(plan))[first:]:
        if not begin:
            method.before(t, stage)

        # Train. A step is a few micro-batches; each adds its share to the gradient.
        steps = data.steps_of(stage, args) if stage.train else []
        optimizer = (
            torch.optim.AdamW(method.lora, lr=stage.lr, weight_decay=0.01) if steps else None
        )
        if begin:
            optimizer.load_state_dict(state["optimizer"])
        llava.model.train()
        for k in run.steps(p, len(steps), begin):
            lr = stage.lr * data.schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            log = Counter()  # adds up over the micro-batches
            for batch in llava.micro_batches(stage.train, steps, k):
                log.update(backward(method, t, batch))
            for name, penalty in method.penalties(t).items() if llava.first else ():
                penalty.backward()  # once per step: by the first process of torchrun alone
                log.update(dict.fromkeys(("loss", name), penalty.detach().double()))
            log = llava.clip(method.lora, log)
            run.log(p, lr=lr, **log)  # stops the run at a nan
            optimizer.step()
            if (k + 1) % SAVE_EVERY == 0:
                run.save((p, k + 1), optimizer, **method.state())
        begin = 0

        # A last look at the stage's data, then test on all stages seen so far.
        llava.eval()
        method.after(t, method.stages[t])
        run.test(t, method.answer)
        run.save((p + 1, 0), **method.state())

    facts = {"blind": test_blind(run, method)} if args.blind else {}
    method.save(run.folder / "lora")
    facts |= {"trainable_parameters": trained, "stored_parameters": method.stored()}
    run.finish(plot.baselines, **facts)


if __name__ == "__main__":
    with input_errors():
        args = parse()
        print("figures:", plot.draw(args.plot, args.out)) if args.plot else main(args)
