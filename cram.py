"""CRAM: LoRA experts of adaptive rank, routed by instruction groups and visual centroids.

Paper: "CRAM: Centroid-Routing and Adaptive MoE for Multimodal Continual Instruction Tuning", arXiv
2606.02502. A reference script: read it from top to bottom, copy it, edit it. Its sections have the
numbers of asr.py's: `diff asr.py cram.py` shows what makes the methods different.

The idea. Every stage gets a LoRA expert of its own, and older experts are never touched again, so
nothing is overwritten. What can still go wrong is the choice of the expert, and CRAM makes it
without training a router. Level 1: instructions that ask for the same form of answer ("give the
letter") make a group; a question goes to the group whose mean instruction is most like its own.
Level 2: inside the group every expert has a centroid, the mean image of its stage, and the experts
are mixed by how near the image is to their centroids. A new expert begins as a wide buffer; after a
short warm-up only those directions of it are kept that are strong and that the older experts of its
group do not have. So a stage that resembles an old one costs fewer parameters.

    Level 1    groups and their prototypes m_g       choose_group, group_of
    Level 2    weights pi over a group's experts     route
    Layer      y = W x + s sum_k pi_k B_k A_k x      ExpertLinear
    Rank       SVD of the buffer, gap, novelty       adaptive_expert
    L_orth     new outputs outside the old ones      ExpertLinear.leak

    python cram.py --stream ucit                     mini stream, tiny LLaVA: laptop, minutes
    python cram.py --stream ucit --paper_constants --out runs/cram-paper   the published constants
    python cram.py --stream ucit --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU
    python cram.py --plot RUN [RUN ...]              the figures from saved runs

Letters: B batch, N samples, S sequence, E experts, G groups, R rank rows of all experts together,
d size of instruction features, c of image features, D_in and D_out of a layer; t stage, k expert.

Where we differ from the paper (P) or its public code (C), and why:
 1. (C) Routing is per sample, in training and in tests. The code averages the features of a batch,
    so that an answer depends on the other questions in its batch.
 2. (C) The expert is the truncated SVD of B A. The code takes that of s B A and multiplies by s
    again, so that its expert starts as twice the buffer.
 3. (C) The projector stays frozen: trained, it would change what older experts compute.
 4. (P, C) Novelty is measured against a random direction, threshold tau_orth sqrt(1 - m / D_in):
    against one older expert of rank 9 a random direction has novelty > 0.99 in all cases at width
    4096 and in 2% at width 128.
 5. (P, C) sigma is a third of the median distance between the stages' centroids in the features in
    use; the published 2 fits CLIP's embeddings. (With the whole median, --sigma_share 1, an image
    that lies on its own centroid still gives an expert at median distance e^(-1/2) = 0.6 times the
    weight of its own: that is nearly even. With the third, stages that look different hardly share
    experts, and L_orth, which counts by the weight of older ones, has little to do; the run prints
    that weight.) It is computed anew after every stage, from the centroids so far.
 6. (P, C) The default features are LLaVA's own: mean token embedding of the instruction less the
    mean of the table (all embeddings share a large part), mean tower feature of the image.
    --routing_features NAME takes a CLIP model, as published. (Less the mean of the FIRST stage, its
    prototype would be about zero, and a cosine with it noise.)
 7. (P, C) The buffer is trained for at least 16 steps: 5% of a short stage are one or two. The
    expert that it becomes gets a fresh AdamW, but no second rise of the rate: a guess.
 8. (P, C) A stage decides on its group once, from the mean instruction of all of its samples, and
    its centroid is and stays their mean image: both are frozen features, known before the first
    step. The code adds them up batch by batch, and trains the centroid with the expert.
 9. (C) L_orth uses the output space of every layer; the code takes the input space of square ones.
    The hidden state in it is a constant, so that only this layer's expert can lower its part; in
    the code the gradient goes on to the layers before.
10. (P, C) Pure text has no image to route by: in training its own expert has weight 1 (as in the
    code), in tests its group's experts get equal weights, and a stage of nothing but text has no
    centroid, so that images never go to its expert if another one of the group has any.
11. (P, C) A stage joins the best of several groups only if its cosine is above `join`, as with one
    group. As published the lead alone decides: a stage that is like no group, but least unlike one
    of them, joins that one (captions joined option letters).
12. (P, C) tau_alloc is 0.13 on the tiny model: it learns at a 20 times higher rate, so the singular
    values of a buffer are larger, and above the published 0.08 lie most of them.
4, 5, 7, 11 and 12 go back with --paper_constants.
"""

import argparse
import math
import os
import random
import textwrap
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import eval as evaluation
from data import (
    TARGETS,
    Collator,
    InputError,
    add_common_flags,
    fail,
    load_image,
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


# fmt: off
def parse(argv=None):
    """All flags; InputError if one of this script's own makes no sense."""
    parser = argparse.ArgumentParser("cram.py", description=__doc__.split("\n")[0])
    add_common_flags(parser)
    parser.set_defaults(stream="ucit")
    add = parser.add_argument_group("CRAM (--rank is r_max, default 9, trigap 10; alpha is 2 r; "
                                    "--targets default q,k,v,o)").add_argument
    add("--routing_features", default="llava", metavar="NAME",
        help="what is routed by: llava, the model's own frozen features, or the folder or hub id "
             "of a CLIP model (default: llava, ours)")
    add("--buffer_rank", type=int, default=48, metavar="R", help="of the buffer (default: 48)")
    add("--buffer_share", type=float, default=0.05, metavar="SHARE",
        help="of a stage's steps in the buffer, at least 16 steps; 0: no buffer, the expert is a "
             "fresh LoRA of rank r_max (default: 0.05)")
    add("--r_min", type=int, default=4, help="least rank of an expert in a layer (default: 4)")
    add("--tau_alloc", type=float, metavar="TAU",
        help="directions with s S_i above it are worth keeping (default: 0.08; tiny model 0.13)")
    add("--tau_orth", type=float, default=0.99,
        help="novelty a direction needs, relative to a random one (default: 0.99)")
    add("--theta", type=float, default=0.1,
        help="a stage joins the best of several groups if its cosine leads by this (default: 0.1)")
    add("--join", type=float, default=0.8, metavar="COS",
        help="and if it is above this, as with one group (default: 0.8)")
    add("--sigma", type=float, metavar="SIGMA",
        help="width of the RBF weights (default: from --sigma_share, ours)")
    add("--sigma_share", type=float, default=1 / 3, metavar="SHARE",
        help="sigma as a share of the median distance between centroids (default: 1/3)")
    add("--lambda_orth", type=float, default=1.0, metavar="LAMBDA",
        help="weight of L_orth; 0: no orthogonality (default: 1)")
    add("--max_groups", type=int, metavar="G",
        help="at most so many groups (default: the number of stages; as published 5 on ucit)")
    add("--max_experts", type=int, metavar="E", help="(default: the number of stages)")
    add("--paper_constants", action="store_true",
        help="sigma 2, tau_alloc 0.08, novelty not relative, buffer not at least 16 steps, groups "
             "by lead alone, on ucit at most 5 (default: off)")
    add("--routing", default="centroid", choices=["centroid", "uniform", "oracle"],
        help="inside a group: by RBF, evenly; or in tests the stage's own expert alone, known, "
             "even if it was trained in a mixture (default: centroid)")
    add("--reuse", action=argparse.BooleanOptionalAction, default=True,
        help="mix a group's experts; off: one expert per task, trained and used alone, the most "
             "likely one (default: on)")
    add("--fixed_rank", action="store_true",
        help="keep the r_max strongest directions as they are, with what older experts have in "
             "them (default: off)")
    add("--grouping", action=argparse.BooleanOptionalAction, default=True,
        help="level 1; off: one group for all (default: on)")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval_batch_size", type=int, default=32, metavar="B",
        help="questions answered at once (default: 32)")
    add("--save_every", type=int, default=100, metavar="N",
        help="checkpoint every N steps inside a stage too; 0: after stages only (default: 100)")
    args = parser.parse_args(argv)
    for name in ("buffer_share", "tau_alloc", "tau_orth", "theta", "lambda_orth", "save_every"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)} must be zero or more")
    above_zero = "buffer_rank r_min sigma sigma_share max_groups max_experts eval_batch_size"
    for name in above_zero.split():
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} must be above zero")
    if args.routing == "uniform" and not args.reuse:
        raise InputError("--routing uniform with --no-reuse: of even weights none is the largest, "
                         "so no expert can be chosen; leave one of the two out")
    if not args.plot:
        args.rank = (10 if args.stream == "trigap" else 9) if args.rank is None else args.rank
        args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
        args.targets = "q,k,v,o" if args.targets is None else args.targets
        if "projector" in args.targets.split(","):
            raise InputError("--targets projector: CRAM's projector stays frozen, or old experts "
                             f"would see other images; use some of {', '.join(TARGETS[:-1])}")
        if not args.r_min <= args.rank <= args.buffer_rank:
            raise InputError(f"ranks must be r_min {args.r_min} <= --rank {args.rank} <= "
                             f"--buffer_rank {args.buffer_rank}")
        if args.paper_constants:
            args.sigma = args.sigma or 2.0
    return args


def check_stream(args, stream):
    """InputError if the experts do not suffice; else fills the two limits and tau_alloc."""
    T, tiny = len(stream.stages), text_width(args.model) < 512
    if args.tau_alloc is None:
        args.tau_alloc = 0.13 if tiny and not args.paper_constants else 0.08
    groups = 5 if args.paper_constants and args.stream == "ucit" else T
    args.max_groups, args.max_experts = args.max_groups or groups, args.max_experts or T
    if T > args.max_experts:
        raise InputError(f"{T} stages need --max_experts {T} or more, not {args.max_experts}")
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
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model import (  # noqa: E402
    add_up_gradients,
    forward,
    gather,
    generate,
    image_features,
    image_tokens,
    load_checkpoint,
    parameter_report,
    peak_memory,
    processes,
    random_state,
    save_checkpoint,
    set_random_state,
    set_up,
    target_paths,
    to_device,
)

# --------------------------------------------------------------------------------------------------
# 2. The quantity: frozen features, and the weights of the experts that follow from them
# --------------------------------------------------------------------------------------------------


class RoutingFeatures:
    """samples -> u [N, d] of their instructions and q [N, c] of their images.

    The model's own: u is the mean token embedding of the question, suffix and all, less the mean of
    the embedding table; q is the mean of the tower's features. clip: the folder or hub id of a CLIP
    model, whose projected text and image embeddings are taken as they are (--sigma 2 is about their
    lengths). q is nan for pure text. keep: remember them, for samples that come again.
    """

    def __init__(self, model, processor, cache, clip=None):
        self.cache, self.seen, self.clip = cache, {}, None
        self.table = model.get_input_embeddings().weight
        self.d, self.c = len(self.table[0]), model.model.multi_modal_projector.linear_1.in_features
        self.center = self.table.float().mean(0).cpu()
        self.tokenizer, self.device = processor.tokenizer, model.device
        if clip:
            from transformers import CLIPConfig, CLIPModel, CLIPProcessor

            try:
                kind = CLIPConfig.get_config_dict(clip)[0].get("model_type")
                if kind != "clip":
                    raise ValueError(f"its config.json says model_type {kind!r}")
                self.clip, found = CLIPModel.from_pretrained(
                    clip, use_safetensors=True, output_loading_info=True
                )
                if missing := sorted(found["missing_keys"]):
                    raise ValueError(f"{len(missing)} weights are missing, {missing[0]} first")
                self.clip_processor = CLIPProcessor.from_pretrained(clip, backend="pil")
                made = self.clip_processor.image_processor.crop_size["height"]
            except Exception as error:  # no folder, no network, other shapes: many kinds
                line = str(error).strip().split("\n")[0]
                raise InputError(f"--routing_features {clip}: no CLIP model: {line}") from None
            side, self.d = self.clip.config.vision_config.image_size, self.clip.projection_dim
            self.c = self.d
            # of a question that is too long the end stays: it says the form of the answer
            tokenizer, text = self.clip_processor.tokenizer, self.clip.config.text_config
            tokenizer.truncation_side = "left"
            tokenizer.model_max_length = min(
                tokenizer.model_max_length, text.max_position_embeddings
            )
            if made != side:
                raise InputError(
                    f"--routing_features {clip}: its processor makes images of {made} pixels, "
                    f"its tower takes {side}"
                )
            self.clip.requires_grad_(False).to(self.device).eval()

    @torch.no_grad()
    def __call__(self, samples, keep=True):
        seen = self.seen if keep else {}
        new = [sample for sample in samples if id(sample) not in seen]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            texts, pictured = self._texts(part), [s for s in part if s.image is not None]
            images = iter(self._images(pictured)) if pictured else iter(())
            blank = torch.full((self.c,), math.nan)
            for sample, u in zip(part, texts, strict=True):
                # the sample itself is kept: its id stays its own for as long as it lives
                seen[id(sample)] = u, next(images) if sample.image else blank, sample
        u, q, _ = zip(*(seen[id(sample)] for sample in samples), strict=True)
        return torch.stack(u), torch.stack(q)

    def _texts(self, samples):
        questions = [sample.question for sample in samples]
        if self.clip:
            batch = self.clip_processor(
                text=questions, return_tensors="pt", padding=True, truncation=True
            )
            return _embedding(self.clip.get_text_features(**batch.to(self.device)))
        ids = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        rows = [self.table[torch.tensor(row, device=self.table.device)] for row in ids]
        return torch.stack([row.float().mean(0).cpu() for row in rows]) - self.center

    def _images(self, samples):
        if self.clip:
            pictures = [load_image(sample.image) for sample in samples]
            batch = self.clip_processor(images=pictures, return_tensors="pt").to(self.device)
            return _embedding(self.clip.get_image_features(**batch))
        return image_features(self.cache, samples).float().mean(1).cpu()


def _embedding(output):
    """[N, d] float32 on the CPU of what CLIP returns: a tensor, or an object that holds it."""
    return getattr(output, "pooler_output", output).float().cpu()


def choose_group(u, prototypes, theta=0.1, join=0.8, max_groups=99, lead_is_enough=False):
    """Level 1, training: the group of a new stage, an old one or len(prototypes), a new one.

    u [d] mean instruction feature of the stage, prototypes [G, d]. One group so far: join it if the
    cosine is above `join`. More: join the best if it is, too, and leads the second by more than
    theta; lead_is_enough: the lead alone, as published.
    """
    G = len(prototypes)
    if G == 0:
        return 0
    u = F.layer_norm(u, u.shape)
    cosine = F.cosine_similarity(u[None], prototypes)
    best = int(cosine.argmax())
    if G >= max_groups:
        return best
    if G == 1:
        return 0 if cosine[0] > join else 1
    first, second = cosine.topk(2).values
    return best if first - second > theta and (lead_is_enough or first > join) else G


def group_of(u, prototypes):
    """Level 1, tests: argmax_g cos(u, m_g) for u [N, d] -> [N]."""
    return (F.normalize(u) @ F.normalize(prototypes).T).argmax(1)


def route(q, group, centroids, groups, sigma):
    """Level 2: pi [N, E] = softmax_k(-|q - c_k|^2 / (2 sigma^2)) over the experts of a group.

    q [N, c], group [N] of the samples, centroids [E, c], groups [E] of the experts. A q of nan
    (pure text) weighs the group's experts evenly; a centroid of nan is farther than any other.
    """
    distance = ((q[:, None] - centroids) ** 2).sum(-1)  # [N, E]
    logits = torch.nan_to_num(-distance / (2 * sigma**2), nan=-1e30)
    return logits.masked_fill(groups[None] != group[:, None], -math.inf).softmax(1)


def sigma_of(args, centroids):
    """--sigma, or its share of the median distance between centroids [E, c] (those of stages with
    images); 1 if there is one."""
    centroids = centroids[~centroids.isnan().any(1)]
    if args.sigma or len(centroids) < 2:
        return args.sigma or 1.0
    return float(torch.pdist(centroids).median()) * args.sigma_share


# --------------------------------------------------------------------------------------------------
# 3. The memory: experts in every adapted layer
# --------------------------------------------------------------------------------------------------


class Routing:
    """What all adapted layers of a model are told before a forward pass."""

    def __init__(self):
        self.weights = None  # pi [B, E]; None: no expert takes part
        self.buffer = False  # warm-up: the trained pair alone, with weight 1
        self.image_mask, self.gamma, self.leaks = None, None, {}  # for L_orth, while training


class ExpertLinear(nn.Module):
    """A frozen nn.Linear with E experts: y = W x + s sum_k pi_k B_k A_k x (x [B, S, D_in]).

    The frozen experts lie one under the other in A [R, D_in] and B [D_out, R], so that any number
    of them is two matrix products; `owner` [R] says whose row it is. The pair that is being
    trained (the buffer, or the newest expert) is apart.
    """

    def __init__(self, base, routing, scale, dropout):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.routing = routing  # shared by all layers
        device = base.weight.device
        self.register_buffer("A", torch.zeros(0, base.in_features, device=device))
        self.register_buffer("B", torch.zeros(base.out_features, 0, device=device))
        self.register_buffer("owner", torch.zeros(0, dtype=torch.long, device=device))
        self.new_A = self.new_B = None
        self.old_outputs = None  # orthonormal basis [D_out, m] of the group's older B

    def forward(self, x):
        y, routing = self.base(x), self.routing
        if routing.weights is None and not routing.buffer:
            return y
        z = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        if routing.buffer:
            return (y + F.linear(F.linear(z, self.new_A) * self.scale, self.new_B)).to(y.dtype)
        A, B, owner = self.A, self.B, self.owner
        if self.new_A is not None:
            A, B = torch.cat([A, self.new_A]), torch.cat([B, self.new_B], 1)
            newest = owner.new_full((len(self.new_A),), routing.weights.shape[1] - 1)
            owner = torch.cat([owner, newest])
        pi = routing.weights[:, owner] * self.scale  # [B, R]
        if routing.image_mask is not None and self.old_outputs is not None:
            # a checkpointed layer comes by again in backward; the first result stays
            routing.leaks.setdefault(id(self), self.leak(x.detach()))
        return (y + F.linear(F.linear(z, A) * pi[:, None], B)).to(y.dtype)

    def leak(self, x):
        """This layer's part of L_orth: mean_b gamma_b |Q^T z_b|^2, z_b the new expert's output for
        the mean hidden state of the image tokens, Q the outputs of the group's older experts."""
        mask = self.routing.image_mask.to(self.A.dtype)  # [B, S]
        mean = torch.einsum("bs,bsd->bd", mask, x.to(self.A.dtype))
        mean = mean / mask.sum(1, keepdim=True).clamp(min=1)
        z = F.linear(F.linear(mean, self.new_A) * self.scale, self.new_B)  # [B, D_out]
        return (self.routing.gamma * (z @ self.old_outputs).square().sum(1)).mean()

    def train_pair(self, A, B):
        """Make A [r, D_in], B [D_out, r] the pair in training; returns it."""
        device = self.A.device
        self.new_A, self.new_B = (nn.Parameter(x.detach().clone().to(device)) for x in (A, B))
        return self.new_A, self.new_B

    def fresh_pair(self, rank):
        """A plain LoRA: A Kaiming-uniform (drawn on the CPU), B zero."""
        A = nn.init.kaiming_uniform_(torch.empty(rank, self.base.in_features), a=5**0.5)
        return self.train_pair(A, torch.zeros(self.base.out_features, rank))

    def rows_of(self, experts):
        """Which of the R rows belong to these experts: [R] bool."""
        return torch.isin(self.owner, torch.tensor(experts, device=self.owner.device))

    def keep(self, expert, A=None, B=None):
        """Freeze the trained pair (or the one given) as expert number `expert`."""
        A, B = (self.new_A, self.new_B) if A is None else (A, B)
        self.A = torch.cat([self.A, A.detach().to(self.A)])
        self.B = torch.cat([self.B, B.detach().to(self.B)], 1)
        self.owner = torch.cat([self.owner, self.owner.new_full((len(A),), expert)])
        self.new_A = self.new_B = None


def add_experts(model, targets, scale, dropout):
    """Replace the target layers by ExpertLinears: ({path: layer}, their Routing)."""
    routing, layers = Routing(), {}
    for path in target_paths(model, targets):
        layers[path] = ExpertLinear(model.get_submodule(path), routing, scale, dropout)
        model.set_submodule(path, layers[path].train(model.training))
    return layers, routing


def ranks_of(layers, E):
    """Rank of each of E experts in every layer, [E, layers]."""
    return torch.stack([layer.owner.bincount(minlength=E) for layer in layers.values()], 1).cpu()


def basis(x):
    """Orthonormal basis [D, m] of the space that the columns of x [D, n] span; None if n = 0."""
    if x.shape[1] == 0:
        return None
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    return U[:, S > 1e-6 * S[0].clamp(min=1e-30)]


# fmt: off
def adaptive_expert(A, B, scale, Q=None, r_min=4, r_max=9, tau_alloc=0.08, tau_orth=0.99,
                    relative=True, fixed=False):
    # fmt: on
    """The expert that a warm buffer B A leaves behind: (A_k [r, D_in], B_k [D_out, r], chosen [r]).

    A [R, D_in], B [D_out, R]; Q [D_in, m] orthonormal rows' space of the group's older A, or None.
    Capability gap: s S_i > tau_alloc, at most the r_max largest. Novelty: of those, the right
    singular vectors v_i whose part outside Q is longer than tau_orth (relative: than tau_orth times
    that of a random direction). At least r_min, filled up by the largest. Kept vectors lose their
    part inside Q and get unit length again (one that lies inside to 1e-6 stays as it is).
    fixed: the r_max largest as they are.
    """
    outer, inner = torch.linalg.qr(B.double())  # the D_out x D_in product is never formed
    U, S, Vh = torch.linalg.svd(inner @ A.double(), full_matrices=False)
    U = outer @ U
    Q = None if fixed or Q is None else Q.double()
    outside = Vh if Q is None else Vh - (Vh @ Q) @ Q.T
    length = outside.norm(dim=1)
    if fixed:
        chosen = torch.arange(min(r_max, len(S)))
    else:
        random = math.sqrt(1 - Q.shape[1] / len(Q)) if Q is not None and relative else 1.0
        novel = length > tau_orth * random if Q is not None else torch.ones_like(S).bool()
        strong = (scale * S > tau_alloc) & (torch.arange(len(S), device=S.device) < r_max)
        wanted = strong & novel
        rest = (~wanted).nonzero()[:, 0][: max(0, r_min - int(wanted.sum()))]
        chosen = torch.cat([wanted.nonzero()[:, 0], rest]).sort().values
    free = length > 1e-6
    V = torch.where(free[:, None], outside / length.clamp(min=1e-12)[:, None], Vh)[chosen]
    root = S[chosen].sqrt()
    return (root[:, None] * V).float(), (U[:, chosen] * root).float(), chosen


# --------------------------------------------------------------------------------------------------
# 4. The losses: L_task + lambda L_orth (the second is summed up layer by layer, see `leak`)
# --------------------------------------------------------------------------------------------------


def orthogonality_loss(routing, layers):
    """Mean over all adapted layers of the leaks that the last forward pass has left."""
    leaks = list(routing.leaks.values())
    return torch.stack(leaks).sum() / len(layers) if leaks else torch.zeros(())


def shared_energy(layer, Q):
    """The share of |B A|^2 of the trained pair that lies inside Q [D_out, m], in 0..1."""
    B = layer.new_B.detach()
    gram = layer.new_A.detach() @ layer.new_A.detach().T
    whole = torch.trace(B.T @ B @ gram)
    inside = Q.T @ B
    return float(torch.trace(inside.T @ inside @ gram) / whole.clamp(min=1e-30))


# --------------------------------------------------------------------------------------------------
# 5. One micro-batch
# --------------------------------------------------------------------------------------------------


def backward(model, batch, features, share, routing, layers, lambda_orth):
    """Forward, loss and backward for one micro-batch; returns the values for the log.

    share: what part of the step's answer tokens, and of its samples, this micro-batch holds.
    """
    penalize = lambda_orth > 0 and routing.weights is not None
    routing.image_mask = batch["image_mask"] if penalize else None
    task = forward(model, batch, features).loss * share[0]
    orthogonality = orthogonality_loss(routing, layers).to(task.device) * share[1]
    loss = task + lambda_orth * orthogonality
    loss.backward()
    routing.image_mask, routing.leaks = None, {}
    values = {"loss": loss, "task": task, "orthogonality": orthogonality}
    return {name: value.item() for name, value in values.items()}


# --------------------------------------------------------------------------------------------------
# 6. Evaluation: the answers, and the route that every question took
# --------------------------------------------------------------------------------------------------


def weights_for(u, q, memory, args, own=None):
    """Group [N] and pi [N, E] of samples with features u [N, d], q [N, c].

    own: in training the number of the stage's expert, which is known then, and so its group.
    """
    centroids, groups = memory["centroid"], memory["group"]
    if own is None:
        group = group_of(u, memory["prototype"] / memory["count"][:, None])
    else:
        group = groups[own].expand(len(u))
    text = q.isnan().all(1)
    if args.routing == "uniform":
        q = torch.full_like(q, math.nan)
    pi = route(q, group, centroids, groups, sigma_of(args, centroids))
    if own is not None and args.routing != "uniform":
        pi[text] = F.one_hot(torch.tensor(own), len(groups)).float()
    if not args.reuse:  # one expert alone: in training its own, in tests the most likely
        best = pi.argmax(1) if own is None else torch.full((len(u),), own)
        pi = F.one_hot(best, len(groups)).float()
    return group, pi


def evaluate_stage(model, processor, cache, collator, stage, i, args, title, features_of, memory,
                   routing):  # fmt: skip
    """Rows of eval.evaluate and, in their order, {group [N], weights [N, E]}. i: its number."""
    place, found = {id(sample): k for k, sample in enumerate(stage.test)}, {}

    def answer(samples):
        group, pi = weights_for(*features_of(samples), memory, args)
        if args.routing == "oracle":
            group = memory["group"][i].expand(len(samples))
            pi = F.one_hot(torch.full((len(samples),), i), pi.shape[1]).float()
        for sample, g, row in zip(samples, group.tolist(), pi.numpy(), strict=True):
            found[place[id(sample)]] = g, row
        routing.weights = pi.to(model.device)
        batch = to_device(collator(samples, train=False), model.device)
        images = image_features(cache, samples)
        return generate(model, processor, batch, images, args.max_new_tokens)

    rows = evaluation.evaluate(answer, stage.test, stage.metric, args.eval_batch_size, title)
    routing.weights = None
    found = {k: values for part in gather(found) for k, values in part.items()}
    group, weights = zip(*(found[k] for k in range(len(rows))), strict=True)
    return rows, {"group": np.array(group), "weights": np.stack(weights)}


# --------------------------------------------------------------------------------------------------
# 7. The run
# --------------------------------------------------------------------------------------------------


def main(args, stream, run):
    """Train on every stage in turn, test on all stages seen so far, write the run folder."""
    clock, seconds = time.perf_counter(), {}

    def lap(part):
        """Book the time since the last lap on a part of the run."""
        nonlocal clock
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - clock
        clock = now

    # ---- 7.1 The model: a frozen LLaVA whose attention layers can hold experts ------------------
    model, processor, cache = set_up(args)
    me, world = processes()
    torch.manual_seed(args.seed)
    scale = args.alpha / args.rank
    layers, routing = add_experts(model, args.targets.split(","), scale, args.dropout)
    collator = Collator(processor, image_tokens(model, processor))
    clip = None if args.routing_features == "llava" else args.routing_features
    features_of = RoutingFeatures(model, processor, cache, clip)

    def collate(samples):
        batch = collator(samples, train=True)
        return to_device(batch, model.device), image_features(cache, samples)

    # ---- 7.2 What is about to happen ------------------------------------------------------------
    stages, T = stream.stages, len(stream.stages)
    count, micro = parameter_report(model), args.batch_size // args.accumulate
    sizes = ", ".join(f"{stage.name} {len(stage.train)} + {len(stage.test)}" for stage in stages)
    per_rank = sum(layer.base.in_features + layer.base.out_features for layer in layers.values())
    show_sample(stages[0].train[0], processor)
    print(f"\n{run}: on {model.device} in {model.dtype}, {torch.get_num_threads()} CPU threads")
    print(f"{count['total']:,} parameters; experts on {args.targets}: {per_rank:,} a rank")
    print(f"ranks {args.r_min} to {args.rank}, buffer {args.buffer_rank}, s = {scale:g}")
    print(f"{T} stages, training + test samples: {sizes}")
    print(f"{args.epochs} epochs in steps of {args.batch_size} samples, micro-batches of {micro}")

    # ---- 7.3 Memory and records, from the checkpoint if there is one ----------------------------
    memory = {"group": torch.zeros(0, dtype=torch.long), "centroid": torch.zeros(0, features_of.c)}
    memory |= {"prototype": torch.zeros(0, features_of.d), "count": torch.zeros(0)}
    matrix, novel, routes = np.full((T, T), np.nan), np.full((T, T), np.nan), {}
    log = "stored_parameters trained_parameters energy old_experts_weight sigma".split()
    log = {name: [] for name in log}  # a number for every stage
    first, step, unfinished = 0, 0, None  # stage to begin with, steps so far, a stage half done
    if args.resume and (state := load_checkpoint(run)):
        torch.set_num_threads(state["threads"])  # another number would round differently
        set_random_state(state["random"])
        first, step, unfinished = state["stage"], state["step"], state["unfinished"]
        matrix, novel, seconds = state["matrix"].numpy(), state["novel"].numpy(), state["seconds"]
        memory, log = state["memory"], state["log"]
        for path, layer in layers.items():
            for name, value in state["experts"][path].items():
                setattr(layer, name, value.to(model.device))
        if first:
            if not (run / "routing.npz").exists():
                raise InputError(f"--resume: {run / 'routing.npz'} is missing; copy it back")
            saved = np.load(run / "routing.npz")  # keys "t-i-name"; a kill may have left more
            routes = {key: saved[key] for key in saved if int(key.split("-")[0]) <= first}
        print(f"resumed after {first} stages and {step} steps")
    evaluation.truncate_metrics(run, step)

    def checkpoint(done, unfinished=None):
        kept = {path: dict(layer.named_buffers(recurse=False)) for path, layer in layers.items()}
        state = {"stage": done, "unfinished": unfinished, "step": step, "random": random_state()}
        state |= {"experts": kept, "memory": memory, "log": log}
        state |= {"matrix": torch.tensor(matrix), "novel": torch.tensor(novel)}
        save_checkpoint(run, state | {"seconds": seconds, "threads": torch.get_num_threads()})

    # ---- 7.4 Stage after stage ------------------------------------------------------------------
    lap("start")
    for t in range(first, T):
        stage, train = stages[t], stages[t].train
        u, q = features_of(train, keep=False)
        lap("features")

        # level 1 and the centroid; a stage that was interrupted has them already
        if not unfinished:
            means = memory["prototype"] / memory["count"][:, None]
            limit = args.max_groups if args.grouping else 1
            g = choose_group(u.mean(0), means, args.theta, args.join, limit, args.paper_constants)
            if g == len(means):  # a new group
                memory["prototype"] = torch.cat([memory["prototype"], u.new_zeros(1, u.shape[1])])
                memory["count"] = torch.cat([memory["count"], torch.zeros(1)])
            memory["prototype"][g] += u.sum(0)
            memory["count"][g] += len(u)
            memory["group"] = torch.cat([memory["group"], torch.tensor([g])])
            memory["centroid"] = torch.cat([memory["centroid"], q.nanmean(0, keepdim=True)])
        g = int(memory["group"][t])
        older = [k for k in range(t) if memory["group"][k] == g] if args.reuse else []
        print(f"{stage.name}: group {g + 1} with expert {t + 1}, older experts there: {len(older)}")
        _, pi = weights_for(u, q, memory, args, own=t)
        gamma = pi[:, older].sum(1)
        for layer in layers.values():
            rows = layer.rows_of(older)
            layer.old_outputs = basis(layer.B[:, rows])

        orders = [train_order(stage, args.seed, e, args.epochs) for e in range(args.epochs)]
        size = args.batch_size
        steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
        least = 1 if args.paper_constants else 16
        warm = max(math.ceil(args.buffer_share * len(steps)), least) if args.buffer_share else 0
        warm = min(warm, len(steps) - 1)
        print(f"{warm} steps in the buffer, {len(steps) - warm} in the expert; old experts have "
              f"{100 * gamma.mean():.1f}% of the weight")  # fmt: skip
        if len(steps) - warm < warm and args.buffer_share:
            print(f"note: {stage.name} has {len(steps)} steps: most of them go to the buffer")
        begin = 0
        if unfinished:
            begin = unfinished["steps"]
            pairs = [layer.train_pair(*unfinished["pairs"][p]) for p, layer in layers.items()]
        else:
            rank = args.buffer_rank if warm else args.rank
            torch.manual_seed(random.Random(f"{args.seed}/{stage.name}").getrandbits(32))
            pairs = [layer.fresh_pair(rank) for layer in layers.values()]
        parameters = [p for pair in pairs for p in pair]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
        if unfinished:
            optimizer.load_state_dict(unfinished["optimizer"])
            unfinished = None

        model.train()
        title = f"stage {t + 1}/{T} {stage.name}"
        bar = tqdm(range(begin, len(steps)), title, len(steps), initial=begin, disable=None)
        for k in bar:
            if k == warm and warm:  # the buffer becomes an expert, which the rest of the stage
                pairs = []  # trains together with, and apart from, the older ones of its group
                for layer in layers.values():
                    old = basis(layer.A[layer.rows_of(older)].T)
                    A, B, _ = adaptive_expert(
                        layer.new_A.detach(), layer.new_B.detach(), scale, old, args.r_min,
                        args.rank, args.tau_alloc, args.tau_orth, not args.paper_constants,
                        args.fixed_rank,
                    )  # fmt: skip
                    pairs.append(layer.train_pair(A, B))
                parameters = [p for pair in pairs for p in pair]
                # no second rise of the rate, as the expert begins with trained directions
                optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
            routing.buffer = k < warm
            lr = args.lr * schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            parts = [steps[k][m : m + micro] for m in range(0, len(steps[k]), micro)][me::world]
            batches = [collate([train[i] for i in part]) for part in parts]
            tokens = [int((batch["labels"] != -100).sum()) for batch, _ in batches]
            whole = sum(gather(sum(tokens)))
            values = dict.fromkeys("loss task orthogonality".split(), 0.0)
            for part, (batch, features), n in zip(parts, batches, tokens, strict=True):
                share = n / whole, len(part) / len(steps[k])
                routing.weights = None if routing.buffer else pi[part].to(model.device)
                routing.gamma = gamma[part].to(model.device)
                more = backward(model, batch, features, share, routing, layers, args.lambda_orth)
                values = {name: values[name] + more[name] for name in values}
            values = {name: sum(other[name] for other in gather(values)) for name in values}
            add_up_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(values["loss"] + norm):
                raise InputError(
                    f"{title}, step {k + 1}: loss {values['loss']}, gradient norm {norm}; stopped. "
                    f"The last good checkpoint stays in {run / 'checkpoint'}; try a lower --lr "
                    f"(now {args.lr:g}) with another --out"
                )
            optimizer.step()
            step += 1
            line = {"step": step, "stage": t + 1, "lr": lr, "gradient_norm": norm, **values}
            evaluation.append_metrics(run, line | {"phase": ("stable", "buffer")[k < warm]})
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if args.save_every and (k + 1) % args.save_every == 0:
                lap("train")
                pairs = {p: (v.new_A.detach(), v.new_B.detach()) for p, v in layers.items()}
                unfinished_now = {"steps": k + 1, "pairs": pairs}
                checkpoint(t, unfinished_now | {"optimizer": optimizer.state_dict()})
        lap("train")

        # the new expert is frozen; what it costs, and how much of it lies where older ones write
        model.eval()
        routing.buffer, routing.weights = False, None
        inside = [shared_energy(v, v.old_outputs) for v in layers.values() if older]
        log["energy"].append(float(np.mean(inside)) if inside else math.nan)
        log["trained_parameters"].append(sum(p.numel() for p in parameters))
        log["old_experts_weight"].append(float(gamma.mean()))
        log["sigma"].append(sigma_of(args, memory["centroid"]))
        for layer in layers.values():
            layer.keep(t)
        experts = sum(layer.A.numel() + layer.B.numel() for layer in layers.values())
        stored = experts + memory["centroid"].numel() + memory["prototype"].numel()
        log["stored_parameters"].append(stored)
        ranks = ranks_of(layers, t + 1)
        print(f"expert {t + 1}: mean rank {ranks[t].float().mean():.1f}, {stored:,} stored")

        # test on all stages seen so far; with --hold_out also on the object group that was left out
        for tests, scores, kind in ((stages, matrix, ""), (stream.novel or [], novel, "novel-")):
            for i, test in enumerate(tests[: t + 1]):
                title = f"test {kind}{test.name}"
                rows, seen = evaluate_stage(model, processor, cache, collator, test, i, args, title,
                                            features_of, memory, routing)  # fmt: skip
                scores[t, i] = evaluation.accuracy(rows, test.metric)
                evaluation.write_predictions(run, t, f"{kind}{i + 1}" if kind else i, rows)
                routes |= {f"{t + 1}-{kind}{i + 1}-{name}": x for name, x in seen.items()}
        routes[f"{t + 1}-0-ranks"], routes[f"{t + 1}-0-groups"] = ranks.numpy(), memory["group"]
        if not me:
            np.savez(run / "routing.part.npz", **routes)
            os.replace(run / "routing.part.npz", run / "routing.npz")
        evaluation.write_matrix(run, stages, matrix)
        print(f"after {stage.name}: " + " ".join(f"{a:.1f}" for a in matrix[t, : t + 1]))
        lap("evaluation")
        checkpoint(t + 1)

    # ---- 7.5 The result -------------------------------------------------------------------------
    if me:  # under torchrun the first process has it
        return
    names = [stage.name for stage in stages]
    print("\n" + evaluation.table(matrix, names) + "\n")
    right = routing_accuracy(routes, T)
    print(f"right group {right['group']:.1f}%, right expert {right['expert']:.1f}% of all tests")
    buffer = per_rank * args.buffer_rank if args.buffer_share else 0
    summary = log | {
        "peak_memory_mb": peak_memory(),
        "trainable_parameters": max(buffer, *log["trained_parameters"]),
        "tower_runs": cache.tower_runs,
        "instructions": [stage.train[0].question.split("\n")[-1] for stage in stages],
        "groups": memory["group"].tolist(),
        "ranks": ranks_of(layers, T).tolist(),
        "layers": list(layers),
        "per_rank": per_rank,
        "routing_accuracy": right,
    }
    if stream.novel:
        print("object group left out of training:\n" + evaluation.table(novel, names) + "\n")
        summary["novel"] = {"matrix": novel, "metrics": evaluation.metrics(novel)}
    kept = {path: dict(layer.named_buffers(recurse=False)) for path, layer in layers.items()}
    torch.save({"experts": kept, "memory": memory}, run / "experts.pt")
    lap("end")
    summary |= {"seconds": sum(seconds.values()), "seconds_by_part": seconds}
    evaluation.finish_run(run, summary)
    plot([run], run / "figures")
    print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
    print(f"peak memory {summary['peak_memory_mb']:,.0f} MB; everything is in {run}")


def routing_accuracy(routes, T):
    """After the last stage: share (%) of test samples in the right group, and whose largest weight
    is that of their own stage's expert (1/n where n weights are largest)."""
    groups, right = np.asarray(routes[f"{T}-0-groups"]), {"group": [], "expert": []}
    for i in range(T):
        right["group"] += (routes[f"{T}-{i + 1}-group"] == groups[i]).tolist()
        weights = np.asarray(routes[f"{T}-{i + 1}-weights"])
        top = weights == weights.max(1, keepdims=True)
        right["expert"] += (top[:, i] / top.sum(1)).tolist()
    return {name: 100 * float(np.mean(values)) for name, values in right.items()}


# --------------------------------------------------------------------------------------------------
# 8. Figures from saved records: python cram.py --plot RUN [RUN ...]
# --------------------------------------------------------------------------------------------------


def figure_routing(record, routes, path):
    """Weights of the experts for every test sample at the end, stage by stage."""
    T, names = len(record["stages"]), record["stages"]
    parts = [routes[f"{T}-{i + 1}-weights"] for i in range(T)]
    figure, axis = evaluation.new_figure(height=4.6)
    image = axis.imshow(np.concatenate(parts), aspect="auto", cmap="cividis", vmin=0, vmax=1,
                        interpolation="nearest")  # fmt: skip
    ends = np.cumsum([len(part) for part in parts])
    axis.hlines(ends[:-1] - 0.5, -0.5, T - 0.5, color="white", linewidth=0.8)
    axis.set_yticks(ends - [len(part) / 2 for part in parts], names)
    labels = [f"{name}\n(group {g + 1})" for name, g in zip(names, record["groups"], strict=True)]
    axis.set_xticks(range(T), labels, rotation=45, ha="right", fontsize=8)
    axis.set_xlabel("expert of")
    axis.set_ylabel("test samples of")
    right = record["routing_accuracy"]
    axis.set_title(f"Right group {right['group']:.0f}%, right expert {right['expert']:.0f}%")
    figure.colorbar(image, ax=axis, label="weight of the expert")
    return evaluation.save_figure(figure, path / "routing.png")


def figure_groups(record, path):
    """The tree: question -> groups -> experts, in the order in which the stages came."""
    groups = record["groups"]
    figure, axis = evaluation.new_figure(height=1.2 + 0.5 * len(groups))
    order = sorted(range(len(groups)), key=lambda k: (groups[k], k))
    place = {k: y for y, k in enumerate(order)}
    for g in sorted(set(groups)):
        members = [place[k] for k in order if groups[k] == g]
        middle, color = np.mean(members), evaluation.COLORS[g % len(evaluation.COLORS)]
        axis.plot([0, 1], [(len(groups) - 1) / 2, middle], color=color)
        axis.text(1, middle, f"group {g + 1} ", ha="right", va="center", fontsize=9,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        for y in members:
            axis.plot([1, 2], [middle, y], color=color)
    for k, y in place.items():
        mean = np.mean(record["ranks"][k])
        text = f"expert {k + 1}: {record['stages'][k]}, mean rank {mean:.1f}\n"
        text += f'"{textwrap.shorten(record["instructions"][k], 56)}"'
        axis.text(2.03, y, text, va="center", fontsize=8, parse_math=False)  # "$5" is money
    axis.text(0, (len(groups) - 1) / 2, "question ", ha="right", va="center", fontsize=9)
    axis.set_xlim(-0.4, 5)
    axis.invert_yaxis()
    axis.axis("off")
    axis.set_title("Instruction groups and their experts")
    return evaluation.save_figure(figure, path / "groups.png")


def figure_ranks(record, path):
    """The rank of every expert in every adapted layer."""
    ranks = np.array(record["ranks"])
    figure, axis = evaluation.new_figure(height=1.8 + 0.3 * len(ranks))
    image = axis.imshow(ranks, aspect="auto", cmap="cividis", vmin=0)
    if ranks.shape[1] <= 40:
        for k, layer in np.ndindex(ranks.shape):
            ink = "white" if ranks[k, layer] < 0.5 * ranks.max() else "black"
            axis.text(layer, k, ranks[k, layer], ha="center", va="center", color=ink, fontsize=8)
    axis.set_yticks(range(len(ranks)), record["stages"])
    axis.set_xlabel("adapted layer, from the first to the last")
    axis.set_title(f"Ranks of the experts, mean {ranks.mean():.1f}")
    figure.colorbar(image, ax=axis, label="rank")
    return evaluation.save_figure(figure, path / "ranks.png")


def figure_parameters(runs, path):
    """Stored parameters against stages; one LoRA per task and a mixture of fixed size beside."""
    figure, axis = evaluation.new_figure()
    for k, (label, record) in enumerate(runs.items()):
        stages = np.arange(1, len(record["stored_parameters"]) + 1)
        color = evaluation.COLORS[k % 7]
        axis.plot(stages, np.array(record["stored_parameters"]) / 1e3, color=color,
                  marker=evaluation.MARKERS[k % 7], label=f"{label}: stored")  # fmt: skip
        axis.plot(stages, np.array(record["trained_parameters"]) / 1e3, color=color,
                  linestyle="-.", label=f"{label}: trained, after the buffer")  # fmt: skip
    record = next(iter(runs.values()))
    rank = record["args"]["rank"]
    one = record["per_rank"] * rank / 1e3
    axis.plot(stages, one * stages, "k--", label=f"one LoRA of rank {rank} a task")
    axis.plot(stages, one * len(stages) + 0 * stages, "k:",
              label=f"a mixture of {len(stages)} such experts from the start")  # fmt: skip
    axis.set_xticks(stages)
    axis.set_xlabel("after training stage")
    axis.set_ylabel("parameters (thousands)")
    axis.set_title("What is kept (experts, centroids, prototypes), and what is trained")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return evaluation.save_figure(figure, path / "parameters.png")


def figure_energy(runs, path):
    """How much of a new expert lies in the output space of the older experts of its group."""
    figure, axis = evaluation.new_figure()
    width = 0.8 / len(runs)
    for k, (label, record) in enumerate(runs.items()):
        values = [math.nan if x is None else 100 * x for x in record["energy"]]
        place = np.arange(len(values)) + (k - (len(runs) - 1) / 2) * width
        axis.bar(place, np.nan_to_num(values), width, label=label, color=evaluation.COLORS[k % 7])
    axis.set_xticks(range(len(values)), record["stages"], rotation=30, ha="right")
    axis.set_ylabel("energy inside older outputs (%)")
    axis.set_title("New experts in the space of older ones (no bar: first in its group)")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    return evaluation.save_figure(figure, path / "energy.png")


def plot(folders, path=None):
    """Routing, groups and ranks of the first run; parameters and energy of all."""
    records = [evaluation.read_run(folder) for folder in folders]
    path = Path(path or Path(folders[0]) / "figures")
    for folder, record in zip(folders, records, strict=True):
        if record["script"] != "cram" or "ranks" not in record:
            raise InputError(f"{folder}: these figures need finished runs of cram.py")
    if len({str(record["stages"]) for record in records}) > 1:
        raise InputError("--plot: these runs went through different stages or another order")
    flags = [record["args"] for record in records]
    keys = [key for key in flags[0] if len({str(own.get(key)) for own in flags}) > 1]
    labels = [", ".join(["CRAM", *(f"{key} {own.get(key)}" for key in keys)]) for own in flags]
    if len(set(labels)) < len(labels):  # the same flags, say from two commits
        labels = [f"{label} ({folder})" for label, folder in zip(labels, folders, strict=True)]
    runs = dict(zip(labels, records, strict=True))
    if not (file := Path(folders[0]) / "routing.npz").exists():
        raise InputError(f"--plot: {file} is missing; copy it back, or plot another run first")
    routes = np.load(file)
    figure_routing(records[0], routes, path)
    figure_groups(records[0], path)
    figure_ranks(records[0], path)
    figure_parameters(runs, path)
    figure_energy(runs, path)
    first = records[0]
    evaluation.plot_matrix(first["matrix"], first["stages"], path / "matrix.png", "CRAM")
    print(f"figures: {path}")


if __name__ == "__main__":
    try:
        if args.plot:
            plot(args.plot, args.out)
        else:
            main(args, stream, run)
    except InputError as error:
        fail(error)
