"""How the tiny LLaVA in mini/tiny-llava was pre-trained from nothing: 55 minutes on one CPU core.

    python mini/pretrain.py --out runs/tiny-llava     pre-train one; use it with --model FOLDER
    python mini/pretrain.py --table                   accuracies of the shipped runs, as Markdown

(a) The tower learns to name what every patch shows, (b) projector and language model learn to
answer questions; README.md says how. Settings, curve and accuracies are saved as pretrain.json.

Letters: N pictures of a set, B of a batch, S tokens of a sequence; 64 patches; 128 features.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import draw
import numpy as np
import torch
from draw import COLORS, GRID, HERE, KINDS, OBJECTS, SHAPES, SIDE, WEATHER, WHAT
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

TINY = HERE / "tiny-llava"
WIDTH = 128  # features of tower and language model
PICTURE_WEIGHT = {"scene": 8, "shapes": 2, "sign": 2, "arithmetic": 2, "window": 2}  # others: 1
BASICS = ("caption", "recognition", "color", "location", "count")  # the first quarter of the steps
TAUGHT = {  # probability that a question is taught: kinds (others: 1)
    0.15: "subcategory type commonsense box",
    0.2: "causal",
    0.3: "recognition color action weather",
    0.4: "caption count",
    0.6: "location option",
    0.7: "judge",
}
PROBABILITY = {kind: p for p, kinds in TAUGHT.items() for kind in kinds.split()}

# ---- 1. Tokenizer and model ----------------------------------------------------------------------


def build_tokenizer():
    """Byte-level BPE, trained on each word of the drawn world once, until each is one token."""
    rng, words = np.random.default_rng(0), set()
    vocabulary = (*draw.WORDS, *draw.LANDS, *draw.CORNERS, *draw.STAINS, *draw.LETTERS)
    vocabulary += (*COLORS, *OBJECTS, *SHAPES, *range(20))
    texts = ["USER: \n", " ASSISTANT:", ".", *(f" {word}" for word in vocabulary)]
    for kind_of_picture in KINDS:
        for _ in range(600):
            for kind, question, answer in kind_of_picture(rng).questions:
                texts += [question, "" if kind == "read" else f" {answer}"]
    for text in texts:
        words.update(re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+", text))
    # numbers above 20 are read digit by digit: as 79 words each would be too rare to learn
    words = {w for w in words if not (w.strip().isdigit() and 21 <= int(w) and w[0] == " ")}
    shipped = AutoTokenizer.from_pretrained(TINY)  # byte-level BPE, special tokens, <s> in front
    recipe = {"vocab_size": 4096, "min_frequency": 1, "show_progress": False}
    return shipped.train_new_from_iterator(sorted(words), **recipe)


def build_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained tiny LLaVA and its processor; the same classes as llava-hf/llava-1.5-7b-hf.

    Sizes, image processing and chat template are those of the files in mini/tiny-llava.
    """
    processor, config = LlavaProcessor.from_pretrained(TINY), LlavaConfig.from_pretrained(TINY)
    processor.tokenizer = build_tokenizer()
    config.text_config.vocab_size = len(processor.tokenizer)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model, processor


def draw_any(rng, kind=None, familiar: bool = False) -> draw.Picture:
    """A picture of this kind, or of a random one, with questions about everything in it.

    familiar: a scene shows nothing that the language model is not to be taught about.
    """
    weights = np.array([PICTURE_WEIGHT.get(kind.__name__, 1) for kind in KINDS], float)
    kind = kind or KINDS[rng.choice(len(KINDS), p=weights / weights.sum())]
    if kind is draw.scene and familiar:
        return draw.scene(rng, draw.FAMILIAR, everything=True, familiar=True)
    return kind(rng, everything=True) if kind in (draw.scene, draw.shapes) else kind(rng)


def train(part: str, module, steps: int, highest: float, loss_of, log, every: int) -> None:
    """Minimize loss_of(step) over the parameters of module that require gradients.

    Muon for the matrices inside, AdamW for the rest: half the steps that AdamW alone needs. The
    learning rate warms up linearly to `highest` in 50 steps, times a cosine that falls to 0.
    """
    inside, rest = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            is_inside = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            (inside if is_inside else rest).append(p)
    optimizers = [
        torch.optim.Muon(inside, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.05, betas=(0.9, 0.98)),
    ]
    for step in tqdm(range(steps), desc=part, mininterval=5):
        loss = loss_of(step)
        for optimizer in optimizers:  # a frozen tower keeps its gradient, and clipping counts it
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        share = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * share
            optimizer.step()
        if step % every == 0 or step == steps - 1:
            log(part, step, loss.item())


# ---- 2. Part (a): the tower ----------------------------------------------------------------------


def patch_features(model, processor, images: np.ndarray) -> torch.Tensor:
    """[B, 64, 64, 3] in 0..255 -> the tower's features of the patches [B, 64, 128]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # [B, 3, 64, 64]
    norm = processor.image_processor
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (norm.image_mean, norm.image_std))
    out = model.model.vision_tower(pixel_values=(x - mean) / std, output_hidden_states=True)
    return out.hidden_states[-1][:, 1:]  # without CLIP's class token


@torch.no_grad()
def frozen_features(model, processor, images: np.ndarray) -> torch.Tensor:
    """[N, 64, 64, 3] uint8 -> [N, 64, 128] in half precision, to save memory."""
    starts = range(0, len(images), 250)
    return torch.cat([patch_features(model, processor, images[k : k + 250]).half() for k in starts])


def false_colors(rng) -> np.ndarray:
    """A random change of colors: a matrix [3, 3] for RGB values in -1..1."""
    mix = np.eye(3)[rng.permutation(3)] * draw.pick(rng, (1, -1))  # channels swapped, maybe negated
    fade = rng.uniform(0.3, 1)  # towards gray
    return fade * mix + (1 - fade) / 3 * mix.sum(1, keepdims=True)


class PatchHeads(nn.Module):
    """Linear heads that read what, color, state, place and RGB value of a patch off its features.

    They are random and never trained: the tower must give all five the same magnitude (README.md).
    """

    def __init__(self):
        super().__init__()
        sizes = (len(WHAT), len(COLORS) + 1, draw.STATES, GRID * GRID, 3)
        heads = nn.ModuleList(nn.Linear(WIDTH, n).requires_grad_(False) for n in sizes)
        for head in heads:
            nn.init.normal_(head.weight, std=WIDTH**-0.5)
        self.what, self.color, self.state, self.place, self.rgb = heads
        self.palette = torch.tensor([(0, 0, 0), *COLORS.values()]) / 127.5 - 1  # [9, 3]
        self.weight = torch.ones(len(WHAT))
        plain = "paper tissue sky grass frame desktop".split()
        background = [f"weather {w}" for w in WEATHER] + plain  # most of every picture
        self.weight[[WHAT.index(w) for w in background]] = 0.1

    def foreground(self, labels: torch.Tensor) -> torch.Tensor:
        """Mask [B, 64] of the patches that show more than background; labels [B, 3, 64]."""
        return self.weight[labels[:, 0]] == 1

    def loss(self, h, labels, mix, is_false) -> torch.Tensor:
        """Sum of the five losses, means over patches, for features h [B, 64, 128].

        labels [B, 3, 64]; mix [B, 3, 3], each picture's change of colors; is_false [B], whether
        there is one: such a picture has RGB values but no color names.
        """
        what, color, state = labels.unbind(1)  # [B, 64] each
        foreground = self.foreground(labels)
        named = foreground & ~is_false[:, None]
        colored = foreground & (color > 0)
        rgb = torch.einsum("bij,bpj->bpi", mix, self.palette[color])
        place = torch.arange(GRID * GRID).repeat(len(h))
        loss = cross_entropy(self.what(h).flatten(0, 1), what.flatten(), self.weight)
        loss = loss + cross_entropy(self.color(h)[named], color[named])
        loss = loss + cross_entropy(self.state(h)[foreground], state[foreground])
        loss = loss + 4 * mse_loss(self.rgb(h)[colored], rgb[colored])
        # the other labels do not depend on where a patch is; questions do
        return loss + cross_entropy(self.place(h).flatten(0, 1), place)

    def accuracy(self, h, labels) -> dict[str, float]:
        """Share of correct labels among the foreground patches."""
        foreground, result = self.foreground(labels), {}
        for name, label in zip(("what", "color", "state"), labels.unbind(1)):
            guess = getattr(self, name)(h)[foreground].argmax(-1)
            result[name] = round((guess == label[foreground]).float().mean().item(), 4)
        return result


def pretrain_tower(model, processor, pictures, steps: int, seed: int, log) -> dict[str, float]:
    """Train the CLIP tower; returns its accuracy on the last 500 pictures, which are held out."""
    images = np.stack([p.image for p in pictures])
    labels = torch.from_numpy(np.stack([p.labels for p in pictures])).flatten(2)  # [N, 3, 64]
    tower, heads = model.model.vision_tower, PatchHeads()
    rng, held_out = np.random.default_rng(seed + 1), len(pictures) - 500

    def loss_of(step: int) -> torch.Tensor:
        index = rng.integers(0, held_out, 48)
        # half of the pictures in false colors: the tower should see more than eight colors
        is_false = torch.from_numpy(rng.random(len(index)) < 0.5)
        mix = np.stack([false_colors(rng) if f else np.eye(3) for f in is_false])  # [B, 3, 3]
        x = np.einsum("bij,bhwj->bhwi", mix, images[index] / 127.5 - 1)
        if step % 2:  # sensor noise
            x = x + rng.normal(0, rng.uniform(0, 0.2), x.shape)
        h = patch_features(model, processor, np.clip((x + 1) * 127.5, 0, 255))
        return heads.loss(h, labels[index], torch.from_numpy(mix).float(), is_false)

    train("tower", tower, steps, 1e-3, loss_of, log, every=100)
    with torch.no_grad():
        h = patch_features(model, processor, images[held_out:])
        return heads.accuracy(h, labels[held_out:])


# ---- 3. Part (b): projector and language model ---------------------------------------------------


def pack(tokenizer, questions: list[list[tuple[str, str]]]) -> tuple:
    """Pack the (question, answer) pairs about each of B pictures into one sequence per picture.

    Every turn sees the shared prefix (<s>USER: <image>...) and itself, never another turn, and its
    positions continue from the prefix: to the model it looks exactly like a single-question prompt.
    Returns ids, labels (-100 except for answers and </s>) and positions [B, S], mask [B, 1, S, S]
    of what a token sees, turn [B, S] (0 the prefix, then 1, 2, ... by question, -1 padding).
    """
    prefix = torch.tensor(tokenizer(f"USER: {'<image>' * GRID * GRID}\n")["input_ids"])
    n, rows = len(prefix), []
    for pairs in questions:
        texts = [text for q, a in pairs for text in (f"{q} ASSISTANT:", f" {a}</s>")]
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows.append(list(zip(tokens[::2], tokens[1::2])))
    length = n + max(sum(len(asked) + len(answer) for asked, answer in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, turn = torch.full_like(ids, -100), torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    ids[:, :n], turn[:, :n], positions[:, :n] = prefix, 0, torch.arange(n)
    for b, row in enumerate(rows):
        start = n
        for k, (asked, answer) in enumerate(row, start=1):
            end = start + len(asked) + len(answer)
            ids[b, start:end] = torch.tensor(asked + answer)
            labels[b, end - len(answer) : end] = torch.tensor(answer)
            turn[b, start:end] = k
            positions[b, start:end] = torch.arange(n, n + end - start)
            start = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    return ids, labels, positions, (causal & visible)[:, None], turn


def answer_logits(model, packed: tuple, features) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] where an answer token is predicted, and these n tokens.

    features [B, 64, 128]: the tower's, before the projector.
    """
    ids, labels, positions, mask, _ = packed
    embeddings = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(features)
    at = (ids == model.config.image_token_index)[..., None]
    hidden = model.model.language_model(
        inputs_embeds=embeddings.masked_scatter(at, image),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    is_answer = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][is_answer]), labels[:, 1:][is_answer]


@torch.no_grad()
def exact_answers(model, processor, pictures, features) -> dict[str, float]:
    """Share of exactly right greedy answers per kind of question, in percent.

    Such an answer has every token and </s> as the arg-max under teacher forcing.
    """
    hits = {}
    for start in range(0, len(pictures), 50):
        batch = pictures[start : start + 50]
        packed = pack(processor.tokenizer, [[(q, a) for _, q, a in p.questions] for p in batch])
        logits, answers = answer_logits(model, packed, features[start : start + 50].float())
        _, labels, _, _, turn = packed
        wrong = labels[:, 1:] != -100
        wrong[wrong.clone()] = logits.argmax(-1) != answers
        for b, p in enumerate(batch):
            failed = set(turn[b, 1:][wrong[b]].tolist())
            for k, (kind, _, _) in enumerate(p.questions, start=1):
                hits.setdefault(f"{p.kind}: {kind}", []).append(k not in failed)
    return {kind: round(100 * float(np.mean(hit)), 1) for kind, hit in sorted(hits.items())}


def pretrain_language(model, processor, pictures, steps: int, rng, log) -> None:
    """Train projector and language model on the frozen tower's features of these pictures."""
    features = frozen_features(model, processor, np.stack([p.image for p in pictures]))
    scenes = np.array([i for i, p in enumerate(pictures) if p.kind == "scene"])

    def loss_of(step: int) -> torch.Tensor:
        # first the basics, on scenes only: what is where, in which color; then everything
        basics = step < steps // 4
        index, questions = rng.choice(scenes if basics else len(pictures), 20), []
        for p in (pictures[i] for i in index):
            taught = [
                (question, answer)
                for kind, question, answer in p.questions
                if (kind in BASICS if basics else rng.random() < PROBABILITY.get(kind, 1))
            ]
            questions.append(draw.pick_some(rng, taught, 10))
        packed = pack(processor.tokenizer, questions)
        logits, answers = answer_logits(model, packed, features[index].float())
        return cross_entropy(logits, answers)

    train("language", model, steps, 2e-3, loss_of, log, every=50)


def pretrain(args) -> None:
    """Pre-train, measure and save a tiny LLaVA: weights, processor and pretrain.json."""
    torch.manual_seed(args.seed)
    rng, curve, start = np.random.default_rng(args.seed), [], time.time()

    def log(part: str, step: int, loss: float) -> None:
        seconds = round(time.time() - start, 1)
        curve.append({"part": part, "step": step, "loss": round(loss, 4), "seconds": seconds})

    pictures = [draw_any(rng) for _ in range(args.pictures)]
    model, processor = build_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(processor.tokenizer)} tokens")
    tower = pretrain_tower(model, processor, pictures, args.tower_steps, args.seed, log)
    print("tower, accuracy on held-out foreground patches:", tower)
    model.model.vision_tower.requires_grad_(False)
    pictures = [draw_any(rng, familiar=True) for _ in range(args.pictures)]
    pretrain_language(model, processor, pictures, args.steps, rng, log)
    model.requires_grad_(True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)

    test_rng = np.random.default_rng(10**6)  # the same held-out pictures for every seed
    test = [draw_any(test_rng, kind, True) for kind in KINDS for _ in range(500)]
    features = frozen_features(model, processor, np.stack([p.image for p in test]))
    black = frozen_features(model, processor, np.zeros((1, SIDE, SIDE, 3), np.uint8))
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": args.seed,
        "pictures": args.pictures,
        "tower_steps": args.tower_steps,
        "steps": args.steps,
        "parameters": parameters,
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
        "tower_accuracy": tower,
        "accuracy": exact_answers(model, processor, test, features),
        "blind": exact_answers(model, processor, test, black.expand(len(test), -1, -1)),
        "curve": curve,
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"mean accuracy {np.mean(list(record['accuracy'].values())):.1f}, saved as {args.out}")


def table() -> str:
    """Accuracy per kind of question of two runs that differ only in the seed, as Markdown."""
    runs = [json.loads((TINY / f"{f}.json").read_text()) for f in ("pretrain", "pretrain-again")]
    columns = [run["accuracy"] for run in runs] + [runs[0]["blind"]]
    titles = [f"seed {run['seed']}" for run in runs] + ["without picture"]
    lines = [f"| picture: question | {' | '.join(titles)} |", "|---" + "|---:" * len(titles) + "|"]
    for kind in columns[0]:
        lines.append(f"| {kind} | {' | '.join(f'{column[kind]:.1f}' for column in columns)} |")
    means = [np.mean(list(column.values())) for column in columns]
    lines.append(f"| mean | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--table", action="store_true", help="only print the accuracies of the shipped runs")
    add("--out", type=Path, default=Path("runs/tiny-llava"), help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--pictures", type=int, default=20000, help="pictures drawn for each part, more than 500")
    add("--tower_steps", type=int, default=2200, help="steps of part (a)")
    add("--steps", type=int, default=3000, help="steps of part (b)")
    add("--threads", type=int, default=0, help="torch threads, 0: torch's own choice")
    args = parser.parse_args()
    if args.table:
        print(table())
    else:
        if args.threads:
            torch.set_num_threads(args.threads)
        pretrain(args)
