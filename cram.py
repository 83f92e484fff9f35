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
short warm-up only those directions are kept that are strong and that the older experts of its group
do not have. So a stage that resembles an old one costs fewer parameters.

    Level 1    groups and their prototypes m_g       choose_group, weights_for
    Level 2    weights pi over a group's experts     route
    Layer      y = W x + s sum_k pi_k B_k A_k x      ExpertLinear
    Rank       SVD of the buffer, gap, novelty       adaptive_expert
    L_orth     new outputs outside the old ones      ExpertLinear.outputs_inside_old

    python cram.py --stream ucit                     mini stream, tiny LLaVA: laptop, minutes
    python cram.py --stream ucit --published --out runs/cram-published     the published constants
    python cram.py --stream ucit --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU

Letters: B batch, N samples, S sequence, E experts, G groups, R rank rows of all experts together,
d size of instruction features, c of image features, D_in and D_out of a layer; t stage, k expert.

Numbers in brackets, [3], are the deviations of docs/cram.md, which gives reasons and sources. The
ones that change results most: routing is per sample [1], sigma follows from the centroids [5], and
the features are LLaVA's own [6].
"""

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import plot
from eval import SAVE_EVERY, Run
from features import ClipFeatures, question_and_image
from files import InputError, input_errors
from model import LLaVA, seed_by, write_state

# ---- 1. Flags ------------------------------------------------------------------------------------

PUBLISHED = (3, 4, 5, 7, 11, 12, 13)  # deviations of docs/cram.md that --published takes back
BUFFER_RANK, R_MIN = 48, 4  # rank of the buffer; least rank of an expert in a layer
THETA, JOIN = 0.1, 0.8  # cosine to the best group: least lead over the second, and least value
TAU_ORTH = 0.99  # the novelty that a direction needs


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("cram.py", __doc__.split("\n")[0])
    parser.set_defaults(stream="ucit", targets="q,k,v,o")
    add = parser.add_argument_group("CRAM (--rank is r_max, default 9, trigap 10)").add_argument
    add("--routing_features", default="llava", help="or the name of a CLIP model (default: llava)")
    add("--buffer_share", type=data.fraction, default=0.05, help="of the steps (default: 0.05)")
    add("--tau_alloc", type=data.weight, help="least s S_i that is kept (default: 0.08; tiny 0.13)")
    add("--weight_decay", type=data.weight, help="of AdamW (default: 0; tiny 0.01)")
    add("--sigma_share", type=data.positive, default=1 / 3, help="sigma / median distance (1/3)")
    add("--lambda_orth", type=data.weight, default=1.0, help="weight of L_orth (default: 1)")
    ways = ["centroid", "uniform", "oracle"]
    add("--routing", choices=ways, default="centroid", help="inside a group (default: centroid)")
    add("--no-reuse", dest="reuse", action="store_false", help="experts are trained and used alone")
    add("--fixed_rank", action="store_true", help="keep the r_max strongest directions as they are")
    add("--no-grouping", dest="grouping", action="store_false", help="one group for all stages")
    data.published_flag(add, PUBLISHED)
    args = parser.parse_args(argv)
    if args.plot:
        return args
    args.rank = args.rank or (10 if args.stream == "trigap" else 9)
    args.alpha = args.alpha or 2.0 * args.rank
    tiny = data.is_tiny(args.model)
    if args.weight_decay is None:
        args.weight_decay = 0.01 if tiny and 3 not in args.published else 0.0
    if args.tau_alloc is None:
        args.tau_alloc = 0.13 if tiny and 12 not in args.published else 0.08
    if args.routing == "uniform" and not args.reuse:
        raise InputError("--routing uniform with --no-reuse: of even weights none is the largest")
    if "projector" in args.targets.split(","):
        raise InputError("--targets projector: CRAM's projector stays frozen, leave it out")
    if not R_MIN <= args.rank <= BUFFER_RANK:
        raise InputError(f"--rank {args.rank} must lie between {R_MIN} and {BUFFER_RANK}")
    return data.resolve_defaults(args)


# ---- 2. The quantity: frozen features, and the weights of the experts that follow from them ------


def choose_group(u, prototypes, most=99, lead_is_enough=False):
    """Level 1, training: the group of a new stage, an old one or len(prototypes), a new one.

    u [d] mean instruction feature of the stage, prototypes [G, d]. One group so far: join it if the
    cosine is above JOIN. More: join the best if it is, too, and leads the second by more than
    THETA; lead_is_enough: the lead alone, as published [11]. most: no further group beyond it.
    """
    G = len(prototypes)
    if G == 0:
        return 0
    u = F.layer_norm(u, u.shape)
    cosine = F.cosine_similarity(u[None], prototypes)  # [G]
    best = int(cosine.argmax())
    if G >= most:
        return best
    if G == 1:
        return 0 if cosine[0] > JOIN else 1
    first, second = cosine.topk(2).values
    return best if first - second > THETA and (lead_is_enough or first > JOIN) else G


def route(q, group, centroids, groups, sigma):
    """Level 2: pi [N, E] = softmax_k(-|q - c_k|^2 / (2 sigma^2)) over the experts of a group.

    q [N, c], group [N] of the samples, centroids [E, c], groups [E] of the experts. A q of nan
    (pure text [10]) weighs the group's experts evenly; a centroid of nan is farther than any other.
    """
    distance = ((q[:, None] - centroids) ** 2).sum(-1)  # [N, E]
    logits = torch.nan_to_num(-distance / (2 * sigma**2), nan=-1e30)
    return logits.masked_fill(groups[None] != group[:, None], -math.inf).softmax(1)


def sigma_of(args, centroids):
    """A share of the median distance between the centroids [E, c] [5]; 1 if there is only one."""
    if 5 in args.published:
        return 2.0
    centroids = centroids[~centroids.isnan().any(1)]  # of stages with images
    return float(torch.pdist(centroids).median()) * args.sigma_share if len(centroids) > 1 else 1.0


def weights_for(u, q, memory, args, expert=None):
    """Group [N] and pi [N, E] of samples with features u [N, d], q [N, c].

    expert: in training the number of the stage's expert, which is known then, and so its group.
    """
    centroids, groups = memory["centroid"], memory["group"]
    if expert is None:
        means = memory["prototype"] / memory["count"][:, None]  # m_g, [G, d]
        group = (F.normalize(u) @ F.normalize(means).T).argmax(1)  # level 1: argmax_g cos(u, m_g)
    else:
        group = groups[expert].expand(len(u))
    text = q.isnan().all(1)
    if args.routing == "uniform":
        q = torch.full_like(q, math.nan)
    pi = route(q, group, centroids, groups, sigma_of(args, centroids))
    if expert is not None and args.routing != "uniform":
        pi[text] = F.one_hot(torch.tensor(expert), len(groups)).float()  # [10]
    if not args.reuse:  # one expert alone: in training its own, in tests the most likely
        best = pi.argmax(1) if expert is None else torch.full((len(u),), expert)
        pi = F.one_hot(best, len(groups)).float()
    return group, pi


# ---- 3. The memory: groups and centroids, and experts in every adapted layer ---------------------


def join_group(memory, u, q, args, T):
    """Put a new stage with features u [N, d], q [N, c] into a group, and note its mean image [8].

    memory: "group" and "centroid" per stage; "prototype" and "count" per group, the sum of its
    instructions and their number.
    """
    if not memory:
        memory |= {"group": torch.zeros(0, dtype=torch.long), "centroid": q[:0]}
        memory |= {"prototype": u[:0], "count": torch.zeros(0)}
    means = memory["prototype"] / memory["count"][:, None]
    most = 5 if 13 in args.published and args.stream == "ucit" else T
    g = choose_group(u.mean(0), means, most if args.grouping else 1, 11 in args.published)
    if g == len(means):
        memory["prototype"] = torch.cat([memory["prototype"], u.new_zeros(1, u.shape[1])])
        memory["count"] = torch.cat([memory["count"], torch.zeros(1)])
    memory["prototype"][g] += u.sum(0)
    memory["count"][g] += len(u)
    memory["group"] = torch.cat([memory["group"], torch.tensor([g])])
    memory["centroid"] = torch.cat([memory["centroid"], q.nanmean(0, keepdim=True)])


class ExpertLinear(nn.Module):
    """A frozen nn.Linear with E experts: y = W x + s sum_k pi_k B_k A_k x (x [B, S, D_in]).

    The frozen experts lie one under the other in A [R, D_in] and B [D_out, R], so that any number
    of them is two matrix products; `owner` [R] says whose row it is. The pair that is being
    trained (the buffer, or the newest expert) is apart.

    routing: set for all layers before a forward pass: weights pi [B, E] (None: no expert
    takes part), buffer (warm-up: the trained pair alone, with weight 1), and for L_orth image_mask
    [B, S] (None: no penalty) and gamma [B].
    """

    def __init__(self, base, rank, alpha, dropout, routing):
        super().__init__()
        self.base, self.scale, self.dropout, self.routing = base, alpha / rank, dropout, routing
        device = base.weight.device
        self.register_buffer("A", torch.zeros(0, base.in_features, device=device))
        self.register_buffer("B", torch.zeros(base.out_features, 0, device=device))
        self.register_buffer("owner", torch.zeros(0, dtype=torch.long, device=device))
        self.new_A = self.new_B = None
        self.old_outputs = None  # orthonormal basis [D_out, m] of the group's older B
        self.inside = None  # this layer's share of L_orth in the last forward pass

    def forward(self, x):
        y, routing = self.base(x), self.routing
        if routing.weights is None and not routing.buffer:
            return y
        z = F.dropout(x, self.dropout, self.training)
        if routing.buffer:
            # float32 weights, as in LoRALinear
            A, B = self.new_A.to(x.dtype), self.new_B.to(x.dtype)
            return y + F.linear(F.linear(z, A) * self.scale, B)
        A, B, owner = self.A, self.B, self.owner
        if self.new_A is not None:
            A, B = torch.cat([A, self.new_A]), torch.cat([B, self.new_B], 1)
            newest = owner.new_full((len(self.new_A),), routing.weights.shape[1] - 1)
            owner = torch.cat([owner, newest])
        pi = (routing.weights[:, owner] * self.scale).to(x.dtype)  # [B, R]
        if routing.image_mask is not None and self.old_outputs is not None:
            inside = self.outputs_inside_old(x.detach())
            # A checkpointed layer comes by again in backward; the first result stays.
            self.inside = inside if self.inside is None else self.inside
        return y + F.linear(F.linear(z, A.to(x.dtype)) * pi[:, None], B.to(x.dtype))

    def outputs_inside_old(self, x):
        """mean_b gamma_b |Q^T z_b|^2, z_b the new expert's output for the mean hidden state of the
        image tokens, Q the outputs of the group's older experts [9]."""
        mask = self.routing.image_mask  # [B, S]
        total = torch.einsum("bs,bsd->bd", mask.to(x.dtype), x)
        mean = total.to(self.A.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
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

    def freeze(self, expert):
        """Keep the trained pair as expert number `expert`."""
        self.A = torch.cat([self.A, self.new_A.detach()])
        self.B = torch.cat([self.B, self.new_B.detach()], 1)
        self.owner = torch.cat([self.owner, self.owner.new_full((len(self.new_A),), expert)])
        self.new_A = self.new_B = None


def experts_state(layers):
    """What a checkpoint holds of every layer: A, B, owner, and the pair in training (or None)."""
    names = ("A", "B", "owner", "new_A", "new_B")
    return [{name: getattr(layer, name) for name in names} for layer in layers]


def load_experts(layers, state):
    """Fill the layers from experts_state."""
    for layer, tensors in zip(layers, state):
        for name in ("A", "B", "owner"):
            setattr(layer, name, tensors[name].to(layer.A.device))
        if tensors["new_A"] is not None:
            layer.train_pair(tensors["new_A"], tensors["new_B"])


def basis(x):
    """Orthonormal basis [D, m] of the space that the columns of x [D, n] span; None if n = 0."""
    if x.shape[1] == 0:
        return None
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    return U[:, S > 1e-6 * S[0].clamp(min=1e-30)]


def adaptive_expert(A, B, scale, Q, args):
    """The expert that a warm buffer B A leaves behind: (A_k [r, D_in], B_k [D_out, r], chosen [r]).

    A [R, D_in], B [D_out, R]; Q [D_in, m] orthonormal basis of the group's older A, or None.
    Capability gap: s S_i > tau_alloc, at most the r_max largest. Novelty: of those, the right
    singular vectors v_i whose part outside Q is longer than TAU_ORTH times that of a random
    direction [4]. At least R_MIN, filled up by the largest. Kept vectors lose their part inside Q
    and get unit length again (one that lies inside to 1e-6 stays as it is).
    """
    outer, inner = torch.linalg.qr(B.double())  # the D_out x D_in product is never formed
    U, S, Vh = torch.linalg.svd(inner @ A.double(), full_matrices=False)
    U = outer @ U
    Q = None if args.fixed_rank or Q is None else Q.double()
    outside = Vh if Q is None else Vh - (Vh @ Q) @ Q.T
    length = outside.norm(dim=1)
    if args.fixed_rank:
        chosen = torch.arange(min(args.rank, len(S)))
    else:
        relative = Q is not None and 4 not in args.published
        random_length = math.sqrt(1 - Q.shape[1] / len(Q)) if relative else 1.0
        novel = length > TAU_ORTH * random_length if Q is not None else torch.ones_like(S).bool()
        largest = torch.arange(len(S), device=S.device) < args.rank
        wanted = (scale * S > args.tau_alloc) & largest & novel
        rest = (~wanted).nonzero()[:, 0][: max(0, R_MIN - int(wanted.sum()))]
        chosen = torch.cat([wanted.nonzero()[:, 0], rest]).sort().values
    free = length > 1e-6
    V = torch.where(free[:, None], outside / length.clamp(min=1e-12)[:, None], Vh)[chosen]
    root = S[chosen].sqrt()
    return (root[:, None] * V).float(), (U[:, chosen] * root).float(), chosen  # [2]


def shrink_buffers(layers, older, args):
    """Turn every layer's buffer into an expert, trained for the rest of the stage beside the frozen
    ones of its group; returns the parameters."""
    lora = []
    for layer in layers:
        Q = basis(layer.A[layer.rows_of(older)].T)
        A, B, _ = adaptive_expert(layer.new_A.detach(), layer.new_B.detach(), layer.scale, Q, args)
        lora += layer.train_pair(A, B)
    return lora


def warm_up_steps(steps, args):
    """How many of a stage's steps train the buffer: at least 16 [7], and one less than all."""
    least = 1 if 7 in args.published else 16
    warm = max(round(args.buffer_share * steps), least) if args.buffer_share else 0
    return min(warm, steps - 1)


# ---- 4. The losses: L_task + lambda L_orth -------------------------------------------------------


def orthogonality_loss(layers):
    """Mean over all adapted layers of what the last forward pass has left: L_orth."""
    inside = [layer.inside for layer in layers if layer.inside is not None]
    return torch.stack(inside).sum() / len(layers) if inside else torch.tensor(0.0)


def backward(llava, batch, args, routing, layers, pi, gamma):
    """Forward, L_task + lambda L_orth and backward for one micro-batch; returns its share of the
    step's log. pi [N, t + 1], gamma [N]: of the stage's samples."""
    routing.weights = None if routing.buffer else pi[batch["index"]]
    routing.gamma = gamma[batch["index"]]
    routing.image_mask = batch["image_mask"] if args.lambda_orth > 0 else None
    for layer in layers:
        layer.inside = None
    log = {"task": llava.forward(batch).loss * batch["token_share"]}
    log["orthogonality"] = orthogonality_loss(layers) * batch["sample_share"]
    log["loss"] = log["task"] + args.lambda_orth * log["orthogonality"]
    log["loss"].backward()
    return {name: x.detach().double() for name, x in log.items()}


def shared_energy(layer):
    """The share of |B A|^2 of the trained pair inside the older experts' outputs, in 0..1."""
    B, Q = layer.new_B.detach(), layer.old_outputs
    gram = layer.new_A.detach() @ layer.new_A.detach().T
    whole = torch.trace(B.T @ B @ gram)
    inside = Q.T @ B
    return float(torch.trace(inside.T @ inside @ gram) / whole.clamp(min=1e-30))


def freeze(layers, older, gamma, memory, args):
    """Freeze the trained pairs as the newest expert; returns what it cost, and how much of it lies
    where the older experts of its group write."""
    inside = [shared_energy(layer) for layer in layers if older]
    trained = sum(layer.new_A.numel() + layer.new_B.numel() for layer in layers)
    for layer in layers:
        layer.freeze(len(memory["group"]) - 1)
    experts = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    return {
        "energy": float(np.mean(inside)) if inside else math.nan,
        "trained_parameters": trained,
        "old_experts_weight": float(gamma.mean()),
        "sigma": sigma_of(args, memory["centroid"]),
        "stored_parameters": experts + memory["centroid"].numel() + memory["prototype"].numel(),
    }


def summary(layers, memory, facts, args):
    """For the record: groups, ranks [T, layers], routing accuracy, the most that was trained."""
    groups = memory["group"].tolist()
    ranks = [layer.owner.bincount(minlength=len(groups)) for layer in layers]
    per_rank = sum(layer.base.in_features + layer.base.out_features for layer in layers)
    most = BUFFER_RANK if args.buffer_share else args.rank
    return {
        "groups": groups,
        "ranks": torch.stack(ranks, 1).tolist(),
        "per_rank": per_rank,
        "trainable_parameters": per_rank * most,
        "routing_accuracy": routing_accuracy(facts, groups),
    }


# ---- 5. Answering the questions of a test --------------------------------------------------------


def answer(llava, args, names, memory, routing, features_of, samples):
    """Answers, and the route of every question: its group and the weights [E] of the experts."""
    batch = llava.batch(samples, train=False)
    u, q = features_of(batch)
    group, pi = weights_for(u.cpu(), q.cpu(), memory, args)
    if args.routing == "oracle":
        k = names.index(samples[0].stage)
        group = memory["group"][k].expand(len(samples))
        pi = F.one_hot(torch.full((len(samples),), k), pi.shape[1]).float()
    routing.weights = pi.to(llava.device)
    texts = llava.generate(batch)
    routing.weights = None
    return texts, [{"group": g, "weights": row} for g, row in zip(group.tolist(), pi.numpy())]


def routing_accuracy(facts, groups):
    """After the last stage: share (%) of test samples in the right group, and whose largest weight
    is that of their own stage's expert (1/n where n weights are largest)."""
    T, right = len(groups), {"group": [], "expert": []}
    for i in range(T):
        right["group"] += (facts[f"{T}-{i + 1}-group"] == groups[i]).tolist()
        weights = facts[f"{T}-{i + 1}-weights"]
        top = weights == weights.max(1, keepdims=True)
        right["expert"] += (top[:, i] / top.sum(1)).tolist()
    return {name: 100 * float(np.mean(values)) for name, values in right.items()}


# ---- 6. The run ----------------------------------------------------------------------------------


def main(args):
    """Train on every stage in turn; after each, test on all stages seen so far."""
    stream = data.load_stream(args)
    run = Run(args, stream, "cram")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    routing = SimpleNamespace(weights=None, buffer=False, image_mask=None, gamma=None)
    llava.add_lora(args, ExpertLinear, routing=routing)  # layers that can hold experts; none yet
    layers = list(llava.layers.values())
    data.show_sample(stream.stages[0].train[0], llava.processor, args.system)

    features_of = partial(question_and_image, llava)  # [6]
    if args.routing_features != "llava":
        features_of = ClipFeatures(args.routing_features, llava.device)
    names = [stage.name for stage in stream.stages]
    memory, costs = {}, {}  # groups, prototypes, centroids; what every stage cost
    first, begin = 0, 0  # the stage and the step to start from
    if state := run.resume():
        load_experts(layers, state["experts"])
        (first, begin), memory, costs = state["at"], state["memory"], state["costs"]

    for t, stage in list(enumerate(stream.stages))[first:]:
        # Level 1: which group does the stage belong to? Its centroid is its mean image.
        u, q = llava.over(stage.train, 64, features_of, "features of the stage")
        run.lap("features")
        if not begin:
            join_group(memory, u, q, args, len(names))
        group = memory["group"]
        older = [k for k in range(t) if group[k] == group[t]] if args.reuse else []
        pi = weights_for(u, q, memory, args, expert=t)[1].to(llava.device)  # level 2, [N, t + 1]
        gamma = pi[:, older].sum(1)  # [N], the weight of older experts
        print(f"{stage.name}: group {group[t] + 1}, {100 * gamma.mean():.1f}% to older experts")
        for layer in layers:
            layer.old_outputs = basis(layer.B[:, layer.rows_of(older)])

        # Train. A step is a few micro-batches; each adds its share to the gradient.
        steps = data.steps_of(stage, args)
        warm = warm_up_steps(len(steps), args)  # these steps train the buffer, the rest the expert
        if not begin:
            seed_by(f"{args.seed}/{stage.name}")
            for layer in layers:
                layer.fresh_pair(BUFFER_RANK if warm else args.rank)
        lora = [p for layer in layers for p in (layer.new_A, layer.new_B)]
        optimizer = torch.optim.AdamW(lora, lr=stage.lr, weight_decay=args.weight_decay)
        if begin:
            optimizer.load_state_dict(state["optimizer"])
        llava.model.train()
        for k in run.steps(t, len(steps), begin):
            if k == warm and warm:  # no second warm-up of the rate: it has trained directions
                lora = shrink_buffers(layers, older, args)
                optimizer = torch.optim.AdamW(lora, lr=stage.lr, weight_decay=args.weight_decay)
            routing.buffer = k < warm
            lr = stage.lr * data.schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            log = Counter()  # adds up over the micro-batches
            for batch in llava.micro_batches(stage.train, steps, k):
                log.update(backward(llava, batch, args, routing, layers, pi, gamma))
            log = llava.clip(lora, log)
            phase = "buffer" if routing.buffer else "expert"
            run.log(t, lr=lr, **log, phase=phase)  # stops the run at a nan
            optimizer.step()
            if (k + 1) % SAVE_EVERY == 0:
                memories = {"memory": memory, "costs": costs}
                run.save((t, k + 1), optimizer, experts=experts_state(layers), **memories)
        begin = 0

        # The new expert is frozen.
        llava.eval()
        routing.buffer, routing.weights, routing.image_mask = False, None, None
        for name, value in freeze(layers, older, gamma, memory, args).items():
            costs.setdefault(name, []).append(value)

        # Test on all stages seen so far; the route of every question is kept for the figures.
        run.test(t, partial(answer, llava, args, names, memory, routing, features_of))
        run.save((t + 1, 0), experts=experts_state(layers), memory=memory, costs=costs)

    write_state(run.folder / "experts.pt", {"experts": experts_state(layers), "memory": memory})
    instructions = [stage.train[0].question.split("\n")[-1] for stage in stream.stages]
    facts = summary(layers, memory, run.facts, args)
    run.finish(plot.cram, **facts, **costs, instructions=instructions)


if __name__ == "__main__":
    with input_errors():
        args = parse()
        print("figures:", plot.draw(args.plot, args.out)) if args.plot else main(args)
