"""The model side of every script: a frozen LLaVA, LoRA adapters, and a window into its attention.

A LLaVA is three parts in a row. A vision tower cuts the image into P patches and gives one vector
per patch; a two-layer projector maps each vector to the width of the language model; a decoder-only
language model reads  [ text before | P image tokens | question | answer ]  as one causal sequence.
LLaVA-1.5-7B (Liu et al. 2023, arXiv 2310.03744): CLIP ViT-L/14 at 336 px, so P = 24 x 24 = 576
vectors of 1024 numbers; Llama with 32 layers of 4096. Nothing below assumes these parts or sizes:
they are read from the config, and the tests run the same code on SigLIP + Qwen2.

    1. Loading                 load_llava, image_grid, image_tokens
    2. LoRA                    LoRALinear, add_lora, set_lora, lora_off, save_lora, load_lora
    3. Tower features, once    FeatureCache
    4. Attention capture       capture_attention
    5. Forward and generate    forward, generate, enable_checkpointing
    6. Set-up and checkpoints  set_up, save_checkpoint, load_checkpoint, random_state
    7. Several GPUs            processes, gather, share_out, add_up_gradients
    8. Counting                parameter_report, peak_memory, memory_table, hours_table

Letters in shapes: B batch, S sequence, P image tokens, T question tokens (most in the batch),
L captured layers, H heads, D width of a head, C width of the tower, N answer tokens, V vocabulary.

    python model.py --memory      # GPU memory of LoRA training, LLaVA-1.5 7B and 13B, computed
    python model.py --hours       # and how long it takes
"""

import argparse
import atexit
import hashlib
import json
import os
import re
import resource
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data import TARGETS, VQA_COUNTS, InputError, load_image, pad_square, text_width

# ----------------------------------------------------------------------------------------------
# 1. Loading
# ----------------------------------------------------------------------------------------------


def load_llava(name, device="cpu", dtype=None):
    """(model, processor): a LLaVA, frozen and in eval mode, from a folder or a hub id.

    dtype: None = float32 on CPU, bfloat16 elsewhere. Weights come from safetensors only, and no
    code from the folder is run. Raises InputError if this is no LLaVA or its weights are not whole.
    """
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    text_width(str(name))  # reads config.json alone: is this a LLaVA at all?
    try:
        # use_safetensors: a pickled checkpoint could run code while it is read.
        model, report = Llava.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        # backend="pil" needs no torchvision, and gives the same pixels with or without it.
        processor.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except Exception as error:  # not a folder of a model, no network, a broken file: many kinds
        raise InputError(f"--model {name} could not be loaded: {_first_line(error)}") from error
    # from_pretrained fills what is missing with random numbers and only warns. We stop instead.
    wrong = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    if wrong:
        raise InputError(f"--model {name}: {len(wrong)} weights missing or misshapen: {wrong[0]}")
    # Only the language model gets the capture function of section 4; the tower keeps plain SDPA.
    model.set_attn_implementation({"text_config": "capture"})
    return model.requires_grad_(False).to(device).eval(), processor


def _first_line(error):
    return str(error).strip().split("\n")[0].rstrip(".")  # the libraries below write paragraphs


def image_grid(model):
    """(rows, columns) of patches in one image: (24, 24) in LLaVA-1.5."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size,) * 2


def image_tokens(model, processor):
    """P, the number of <image> tokens of one image. InputError: pixels do not fit the tower."""
    pixels, side = processor.image_processor, model.config.vision_config.image_size
    size = pixels.crop_size if getattr(pixels, "do_center_crop", False) else pixels.size
    if (size["height"], size["width"]) != (side, side):
        raise InputError(f"the image processor makes {dict(size)}, the vision tower takes {side}")
    rows, columns = image_grid(model)
    return rows * columns


# ----------------------------------------------------------------------------------------------
# 2. LoRA (Hu et al. 2021, arXiv 2106.09685)
# ----------------------------------------------------------------------------------------------
# A frozen linear map W gets a detour through a space of only r dimensions (their Eq. 3):
#
#     y = W x  +  (alpha / r) B A dropout(x)               A: [r, in], B: [out, r]
#
# B starts at zero, so training starts exactly at the pretrained model. Several adapters, each under
# its own name, can sit on the same W; one of them is active, or none, or some, added up.


class LoRALinear(nn.Module):
    """A frozen nn.Linear with named adapters: x [..., in] -> y [..., out], in the base's dtype.

    The adapters are float32 over a base of any dtype: at lr 1e-4 a step of AdamW is smaller than
    the gap between two neighboring bfloat16 numbers, and would be rounded away.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        # Keys are "<name>_A" and "<name>_B". The bare name may be a word nn.Module already uses:
        # VQA v2 has a stage called "type".
        self.adapters = nn.ParameterDict()
        self.scale, self.dropout = {}, {}  # by adapter name
        self.active = ()  # names; several are one LoRA of all their ranks together
        self.shares = None  # [B or 1, active]: how much each counts, by sample; None: all fully

    def add(self, name, rank, alpha, dropout):
        # Drawn on the CPU, then moved: one seed gives one adapter on every device.
        a = nn.init.kaiming_uniform_(torch.empty(rank, self.base.in_features), a=5**0.5)
        b, device = torch.zeros(self.base.out_features, rank), self.base.weight.device
        self.adapters[f"{name}_A"] = nn.Parameter(a.to(device))
        self.adapters[f"{name}_B"] = nn.Parameter(b.to(device))
        self.scale[name], self.dropout[name] = alpha / rank, dropout

    def pair(self, name):
        return self.adapters[f"{name}_A"], self.adapters[f"{name}_B"]

    def forward(self, x):
        y = self.base(x)
        if not self.active:
            return y
        last, pairs = self.active[-1], [self.pair(name) for name in self.active]
        a, b = pairs[0] if len(pairs) == 1 else (torch.cat([a for a, _ in pairs]),
                                                 torch.cat([b for _, b in pairs], 1))  # fmt: skip
        h = F.dropout(x.to(a.dtype), self.dropout[last], self.training)
        h = F.linear(h, a) * self.scale[last]  # [..., r], cheaper to scale than [..., out]
        if self.shares is not None:  # h [B, S, r]
            h = h * self.shares.repeat_interleave(len(a) // len(self.active), 1)[:, None]
        return (y + F.linear(h, b)).to(y.dtype)  # summed in float32, rounded once


def _adapted(model, name=None):
    """{path: LoRALinear} of the layers that carry adapter `name` (None: any adapter)."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {path: m for path, m in found.items() if name is None or name in m.scale}


def _attach(model, paths, name, rank, alpha, dropout):
    """Put a new adapter on the linear layers at `paths`, make it active, return its parameters."""
    if _adapted(model, name):
        raise ValueError(f"there already is an adapter {name!r}")
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer).train(model.training)
            model.set_submodule(path, layer)
        layer.add(name, rank, alpha, dropout)
    set_lora(model, name)
    return [p for layer in _adapted(model, name).values() for p in layer.pair(name)]


def target_paths(model, targets):
    """Paths of the linear layers that these targets mean, in model order.

    targets: some of TARGETS: linear layers of every decoder layer, and "projector" for both of its
    layers. Raises InputError for a target that this model does not have.
    """
    patterns = {t: rf"model\.language_model\.(.+\.)?{t}_proj" for t in TARGETS}
    patterns["projector"] = r"model\.multi_modal_projector\.linear_[12]"
    layers = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))]
    chosen = set()
    for target in targets:
        found = {path for path in layers if re.fullmatch(patterns.get(target, ""), path)}
        if not found:
            raise InputError(f"--targets: {target!r} is no layer of this model, see {TARGETS}")
        chosen |= found
    return [path for path in layers if path in chosen]  # whatever the targets' order


def add_lora(model, name, rank, alpha, dropout, targets):
    """Add an adapter and make it active; returns its parameters, A and B of layer after layer.

    targets: see target_paths. A is drawn from torch's global generator: torch.manual_seed before
    the call fixes it.
    """
    paths = target_paths(model, targets)
    return _attach(model, paths, name, rank, alpha, dropout)


def set_lora(model, *names):
    """Switch to an adapter; to none: all are off. Layers without it run bare.

    Several are added up, all with weight 1 until share_lora says otherwise; ValueError unless they
    have one scale and dropout.
    """
    for name in names:
        if not _adapted(model, name):
            raise ValueError(f"there is no adapter {name!r}")
    for layer in _adapted(model).values():
        layer.active = tuple(name for name in names if name in layer.scale)
        layer.shares = None
        if len({(layer.scale[name], layer.dropout[name]) for name in layer.active}) > 1:
            raise ValueError(f"adapters {layer.active} have different scales or dropout")


def share_lora(model, shares, last=None):
    """Weigh the adapters that are switched on: shares [B or 1, adapters], in the order of set_lora.

    last: other weights for the last decoder layer. All active adapters must have one rank.
    """
    end = rf"model\.language_model\.layers\.{model.config.text_config.num_hidden_layers - 1}\..+"
    for path, layer in _adapted(model).items():
        layer.shares = last if last is not None and re.fullmatch(end, path) else shares


def move_lora(model, name, device):
    """Put an adapter's weights on a device; nothing is copied if they are there."""
    for layer in _adapted(model, name).values():
        for p in layer.pair(name):
            p.data = p.data.to(device)


def remove_lora(model, name):
    """Forget an adapter. The layers stay; the model runs bare until another one is set."""
    set_lora(model)
    for layer in _adapted(model, name).values():
        del layer.adapters[f"{name}_A"], layer.adapters[f"{name}_B"]
        del layer.scale[name], layer.dropout[name]


@contextmanager
def lora_off(model):
    """The pretrained model inside a with-block: a reference that needs no second copy."""
    before = [(layer, layer.active, layer.shares) for layer in _adapted(model).values()]
    set_lora(model)
    try:
        yield
    finally:
        for layer, active, shares in before:
            layer.active, layer.shares = active, shares


def lora_state(model, name):
    """{"<path>.lora_A.weight": [r, in], "<path>.lora_B.weight": [out, r]}, copies on the CPU."""
    return {
        f"{path}.lora_{letter}.weight": p.detach().cpu().clone()
        for path, layer in _adapted(model, name).items()
        for letter, p in zip("AB", layer.pair(name), strict=True)
    }


@torch.no_grad()
def load_lora_state(model, name, state):
    """Copy a lora_state into an existing adapter. ValueError unless it has exactly these layers."""
    if lora_state(model, name).keys() != state.keys():
        raise ValueError(f"adapter {name!r} and the state to load sit on different layers")
    for path, layer in _adapted(model, name).items():
        for letter, p in zip("AB", layer.pair(name), strict=True):
            p.copy_(state[f"{path}.lora_{letter}.weight"])


PEFT = "base_model.model."  # where a peft model keeps the model that it wraps


def save_lora(model, name, folder, base):
    """Write an adapter as peft does: peft.PeftModel.from_pretrained(llava, folder) loads it.

    base: name of the pretrained model, noted in the file.
    """
    if processes()[0]:
        return
    folder, layers = Path(folder), _adapted(model, name)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    rank = len(first.adapters[f"{name}_A"])
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": first.scale[name] * rank,
        "lora_dropout": first.dropout[name],
        "target_modules": sorted(layers),  # full paths: the tower has a "q_proj" too
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {PEFT + key: p for key, p in lora_state(model, name).items()}
    save_file(state, folder / "adapter_model.safetensors")


def load_lora(model, name, folder):
    """Read a folder of save_lora (or a plain LoRA by peft) as a new, active adapter.

    Returns its parameters. Raises InputError if the files are missing or hold anything else.
    """
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        state = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no LoRA could be read: {_first_line(error)}") from error
    state = {key.removeprefix(PEFT): p for key, p in state.items()}
    paths = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    if len(state) != 2 * len(paths) or any(config.get(key) for key in special):
        raise InputError(f"{folder}: this adapter is more than a plain LoRA of one rank")
    with torch.random.fork_rng(devices=[]):  # these draws are overwritten: take none from the run
        settings = config["r"], config["lora_alpha"], config["lora_dropout"]
        parameters = _attach(model, paths, name, *settings)
    load_lora_state(model, name, state)
    return parameters


# ----------------------------------------------------------------------------------------------
# 3. Tower features, once per image
# ----------------------------------------------------------------------------------------------


class FeatureCache:
    """images -> [B, P, C], what the frozen tower hands to the projector, computed once per image.

    The tower never changes, so three epochs need not pay for it three times. The projector comes
    after the cache, in forward(): LoRA on it gets its gradient.

    where: "memory", "disk" (a file per image in `folder`, kept for the next run too) or "off".
    limit_gb: when full, nothing is added and nothing thrown out; the images left over go through
        the tower each time. (Epochs visit the images in a cycle. Throwing out the oldest would
        throw out each one shortly before its turn.) A 7B image is 576 x 1024 bfloat16 = 1.2 MB.
    tower_runs: how many images have gone through the tower.

    The key of an image is a hash of its decoded, padded pixels, of the tower's weights and of the
    preprocessing: a renamed copy is the same image, a re-trained tower is another tower. A path is
    read once per run: do not change images while a program runs.
    """

    CHUNK = 32  # images per call of the tower

    def __init__(self, model, processor, where="memory", limit_gb=4.0, folder=None):
        if where not in ("memory", "disk", "off") or (where == "disk" and folder is None):
            raise ValueError(f"where is 'memory', 'disk' (with a folder) or 'off', not {where!r}")
        self.model, self.processor, self.tower_runs, self.full = model, processor, 0, False
        self.folder = Path(folder) if where == "disk" else None
        self.limit, self.used = (0 if where == "off" else limit_gb * 1e9), 0
        self.paths, self.rows = {}, {}  # path -> key, key -> [P, C]
        # As in LLaVA's own training: the border gets the mean color, which normalizes to zero.
        self.border = tuple(int(255 * c) for c in processor.image_processor.image_mean)
        facts = [processor.image_processor.to_dict(), model.config.to_dict(), str(model.dtype)]
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode())
        for p in model.model.vision_tower.parameters():
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.identity = digest.digest()
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.used = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))

    def __call__(self, images):
        """List of paths or PIL images -> [B, P, C]. Raises InputError for an unreadable image."""
        keys, missing = [], {}
        for image in images:
            key = self.paths.get(str(image)) if isinstance(image, (str, Path)) else None
            if key is None or not (key in missing or self._has(key)):
                picture = load_image(image) if isinstance(image, (str, Path)) else image
                picture = pad_square(picture.convert("RGB"), self.border)
                pixels = f"{picture.size}".encode() + picture.tobytes()
                key = hashlib.blake2b(self.identity + pixels, digest_size=16).hexdigest()
                if isinstance(image, (str, Path)):
                    self.paths[str(image)] = key
                if not self._has(key):
                    missing[key] = picture
            keys.append(key)
        fresh, waiting = {}, list(missing)
        for start in range(0, len(waiting), self.CHUNK):
            chunk = waiting[start : start + self.CHUNK]
            fresh.update(zip(chunk, self._tower([missing[k] for k in chunk]), strict=True))
        for key, row in fresh.items():
            self._keep(key, row)
        rows = [fresh[key] if key in fresh else self._load(key) for key in keys]
        return torch.stack([row.to(self.model.device) for row in rows])

    def _file(self, key):
        return self.folder / f"{key}.safetensors"

    def _has(self, key):
        return self._file(key).exists() if self.folder else key in self.rows

    def _load(self, key):
        return load_file(self._file(key))["features"] if self.folder else self.rows[key]

    def _keep(self, key, row):
        size = row.numel() * row.element_size()
        if self.used + size > self.limit:
            if self.limit and not self.full:
                print(
                    f"the cache of frozen features is full ({self.limit / 1e9:g} GB): all other "
                    "images go through the tower each time; see --feature_gb, --features disk"
                )
            self.full = True
            return
        self.used += size
        row = row.cpu().clone()
        if self.folder:  # written aside, then renamed: a killed run leaves no half file
            part = self.folder / f"{key}.{os.getpid()}.part"
            save_file({"features": row}, part)
            os.replace(part, self._file(key))
        else:
            self.rows[key] = row

    @torch.no_grad()
    def _tower(self, pictures):
        """List of square PIL images -> [n, P, C]."""

        class Seen(Exception):
            pass

        def stop(_, inputs):  # the projector is not run: only what it is given is wanted
            raise Seen(inputs[0])

        llava = self.model.model
        llava.vision_tower.eval()  # model.train() is for the dropout of LoRA, not for the tower
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        # Which layer, with or without the class token? Whatever this LLaVA gives its projector.
        hook = llava.multi_modal_projector.register_forward_pre_hook(stop)
        try:
            llava.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        except Seen as seen:
            (features,) = seen.args
        finally:
            hook.remove()
        self.tower_runs += len(pictures)
        found, grid = features.shape[1], image_tokens(self.model, self.processor)
        if found != grid:
            raise InputError(f"the vision tower gives {found} vectors for a grid of {grid} patches")
        return features


# ----------------------------------------------------------------------------------------------
# 4. Attention capture
# ----------------------------------------------------------------------------------------------
# Fused attention (SDPA) is fast because it never writes down the [S, S] matrix of attention, and so
# it has none to show. transformers can return the matrix ("eager"), but then all of it, in every
# layer, at a multiple of the memory. We want a corner: how T question tokens see P image tokens.
#
#                     before | image | question | answer
#                    +-------+-------+-------------------+
#     a question row |       | keep  |                   |     softmax(q k^T / sqrt(D)) over the
#                    +-------+-------+-------------------+     WHOLE row, then its image part
#
# transformers calls attention functions by name, and lets us register our own. Ours calls SDPA as
# before, so that logits do not change by a single bit; beside it, in the chosen layers, it computes
# these T rows: T x S numbers per head instead of S x S. The queries and keys it is given have their
# rotary positions applied already.

_capture = None  # the capture_attention block that is open, if any


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query [B, H, S, D], key and value [B, key heads, S, D] -> [B, S, H, D], no matrix."""
    # Generation reads the question in its first call, with S queries; later calls have one each.
    if _capture is not None and query.shape[2] == _capture.length:
        _capture.record(module.layer_idx, query, key, attention_mask, scaling)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


# Registered under one name in both places: without the second, no padding mask would be built.
ALL_ATTENTION_FUNCTIONS.register("capture", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("capture", sdpa_mask)


class capture_attention:
    """Keep the attention of question tokens to image tokens, with gradient, of one forward pass.

        with capture_attention(model, 4, batch["question_mask"], batch["image_mask"]) as maps:
            out = forward(model, batch, features)
            attention, row_mask = maps()           # [B, L, H, T, P] float32, [B, T] bool
            (out.loss + penalty(attention)).backward()

    layers: the last n decoder layers (an int), or a list of layer numbers.
    rows, image_mask: [B, S] bool, where the question and the image tokens are in the padded batch.

    attention[b, :, :, t] belongs to the t-th question token of sample b and sums to the share of
    its attention that goes to the image (the rest goes to text). Where row_mask is False there is
    no such token, or no image, and the numbers are zero.

    One forward or generate per block, and backward inside it: gradient checkpointing runs the
    layers again during backward, and must find the same operations.
    """

    def __init__(self, model, layers, rows, image_mask):
        depth = model.config.text_config.num_hidden_layers
        self.layers = range(depth - layers, depth) if isinstance(layers, int) else list(layers)
        if not self.layers or min(self.layers) < 0 or max(self.layers) >= depth:
            raise ValueError(f"layers = {layers}, but the language model has {depth}")
        if model.config.text_config._attn_implementation != "capture":
            raise ValueError("this model does not use the capture function: load it by load_llava")
        images = image_mask.sum(1)  # image tokens per sample: P, or 0 in a sample without an image
        if ((images != 0) & (images != images.max())).any():
            raise ValueError(f"unequal numbers of image tokens in a batch: {images.tolist()}")
        self.length = rows.shape[1]
        self.row_index, real = _positions(rows)  # [B, T]
        self.column_index, _ = _positions(image_mask)  # [B, P]
        self.row_mask = real & (images > 0)[:, None]  # [B, T]
        self.batch_index = torch.arange(len(rows), device=rows.device)[:, None]  # [B, 1]
        self.maps = {}

    def __enter__(self):
        global _capture
        if _capture is not None:
            raise RuntimeError("capture_attention blocks do not nest")
        _capture = self
        return self

    def __exit__(self, *_):
        global _capture
        _capture = None

    def record(self, layer, query, key, attention_mask, scaling):
        """The corner of one layer's attention. query [B, H, S, D], key [B, key heads, S, D]."""
        if layer not in self.layers:
            return
        (B, H, S, D), heads, T = query.shape, key.shape[1], self.row_index.shape[1]
        # One index operation takes the T rows out: [B, S, H, D] -> [B, T, H, D] -> [B, H, T, D].
        q = query.transpose(1, 2)[self.batch_index, self.row_index].transpose(1, 2).float()
        # Grouped-query attention: H / heads neighboring query heads share a key head. Their rows
        # go into one matrix product, which spares us repeating the keys.
        q = (q * scaling).reshape(B, heads, H // heads * T, D)
        scores = (q @ key.float().transpose(2, 3)).view(B, H, T, S)
        if attention_mask is None:  # no padding: SDPA is told "causal", which we spell out
            sees = torch.arange(S, device=q.device) <= self.row_index[:, :, None]  # [B, T, S]
        else:  # [B, 1, S, S], True where a row may look
            sees = attention_mask[:, 0].expand(B, -1, -1)[self.batch_index, self.row_index]
        # Adding 0 or -inf is one pass; masked_fill on the scores would cost another in backward.
        barrier = torch.zeros(sees.shape, device=q.device).masked_fill_(~sees, float("-inf"))
        rows = (scores + barrier[:, None]).softmax(-1)  # [B, H, T, S]
        columns = self.column_index[:, None, None].expand(B, H, T, -1)
        corner = rows.gather(-1, columns) * self.row_mask[:, None, :, None]  # [B, H, T, P]
        # A checkpointed layer comes by again in backward: same work, but the first result stays.
        self.maps.setdefault(layer, corner)

    def __call__(self):
        """attention [B, L, H, T, P] float32 with its gradient, row_mask [B, T] bool."""
        if len(self.maps) < len(self.layers):
            raise RuntimeError("no forward pass has run in this capture_attention block")
        return torch.stack([self.maps[layer] for layer in self.layers], dim=1), self.row_mask


def _positions(mask):
    """mask [B, S] -> positions of its True entries [B, most in a row], and which of them are real.

    Shorter rows are filled up with the last position. That is never left padding, whose attention
    has nothing to look at: a softmax of nothing is NaN, and NaN times zero is NaN.
    """
    S = mask.shape[1]
    index = torch.arange(S, device=mask.device).expand_as(mask).masked_fill(~mask, S)
    index = index.sort(dim=1).values[:, : int(mask.sum(1).max())]
    return index.clamp(max=S - 1), index < S


def _one_pass_per_block():
    if _capture is not None and _capture.maps:
        raise RuntimeError("this capture_attention block already holds a forward pass")


# ----------------------------------------------------------------------------------------------
# 5. Forward and generate
# ----------------------------------------------------------------------------------------------


def enable_checkpointing(model):
    """In train mode keep only each decoder layer's input, and run the layer again for backward.

    use_reentrant=False: the older variant drops the gradient of captured maps without a word.
    """
    language_model = model.model.language_model
    language_model.activation_checkpointing_enable({"use_reentrant": False})


def _image_inputs(model, features):
    """Tower features [images, P, C], put through the projector, as LLaVA takes them for pixels."""
    if features is None:
        return None
    tokens = model.model.multi_modal_projector(features)
    return {"image": BaseModelOutputWithPooling(pooler_output=list(tokens))}


def forward(model, batch, features, **kwargs):
    """One pass over a padded batch of the Collator, with features of the FeatureCache (or None).

    Returns the output object of transformers with
      hidden_states   the last is [B, S, width], after the final norm; output_hidden_states=True
                      in kwargs gives those of all layers before it
      logits, loss    with batch["labels"] the logits [N, V] of the N answer tokens, sample after
                      sample, and their mean cross-entropy; without labels [B, S, V] and None
    Only answer tokens go through the output layer: the logits of a whole 7B sample and their
    gradient would be 640 x 32,064 floats several times over, all but a few multiplied by zero.
    """
    _one_pass_per_block()
    mask, labels = batch["attention_mask"], batch.get("labels")
    output = model.model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # counted from the first real token
        mm_encoder_outputs=_image_inputs(model, features),
        use_cache=False,
        **kwargs,
    )
    hidden = output.last_hidden_state
    output.hidden_states = output.hidden_states or (hidden,)
    if labels is None:
        output.logits, output.loss = model.lm_head(hidden), None
    else:
        labels = labels[:, 1:]  # position s predicts token s + 1
        output.logits = model.lm_head(hidden[:, :-1][labels != -100])
        output.loss = F.cross_entropy(output.logits.float(), labels[labels != -100])
    return output


@torch.no_grad()
def generate(model, processor, batch, features, max_new_tokens=16):
    """Greedy answers to left-padded prompts: list of B strings, without special tokens.

    An open capture_attention block gets the attention of the prompts.
    """
    _one_pass_per_block()
    stop = model.generation_config.eos_token_id
    stop = {processor.tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])}
    pad = processor.tokenizer.pad_token_id
    training = model.training
    model.eval()
    # Greedy whatever the checkpoint's own generation settings ask for: each is overruled here.
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs=_image_inputs(model, features),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=None,
        eos_token_id=sorted(stop - {None}),
        pad_token_id=processor.tokenizer.eos_token_id if pad is None else pad,
    )
    model.train(training)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def image_features(cache, samples):
    """[images, P, C] of those samples that have an image, in order; None if none has."""
    images = [sample.image for sample in samples if sample.image is not None]
    return cache(images) if images else None


def to_device(batch, device):
    """A batch with its tensors on `device`; everything else as it was."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


# ----------------------------------------------------------------------------------------------
# 6. Set-up and checkpoints
# ----------------------------------------------------------------------------------------------


def set_up(args):
    """Threads, device, dtype, checkpointing, cache as the flags say: model, processor, cache."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    me, world = processes()
    if world > 1 and device == "cuda":  # torchrun: every process has a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if torch.device(device).type == "cuda":
        number, cards = torch.device(device).index or 0, torch.cuda.device_count()
        if number >= cards:
            raise InputError(f"--device {device}: torch finds {cards} CUDA devices here")
        torch.cuda.set_device(number)  # random state and peak memory are of this one
    if world > 1:
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        if me:  # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, processor = load_llava(args.model, device, dtype)
    checkpointing = args.gradient_checkpointing
    if checkpointing or (checkpointing is None and device != "cpu"):
        enable_checkpointing(model)
    folder = Path(__file__).parent / "data" / "features" if args.features == "disk" else None
    return model, processor, FeatureCache(model, processor, args.features, args.feature_gb, folder)


def save_checkpoint(run, state):
    """Write run/checkpoint/state.pt whole or not at all: a kill leaves the one before."""
    if processes()[0]:
        return
    path = run / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(run):
    """The state that save_checkpoint wrote, on the CPU; None if there is none."""
    path = run / "checkpoint" / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def random_state():
    """torch's generators, the only ones drawn from while training (LoRA's dropout)."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(states):
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state(states[1])


# ----------------------------------------------------------------------------------------------
# 7. Several GPUs: torchrun --nproc_per_node N asr.py ... --accumulate N
# ----------------------------------------------------------------------------------------------
# Every process has the whole model and takes every N-th micro-batch of a step, its loss weighed by
# its share of the whole step; then the gradients are added up, where torch's
# DistributedDataParallel takes their mean. All make the same steps; the first one alone prints and
# writes.


def processes():
    """(number of this process from 0, how many there are) under torchrun; (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """The values of all processes, the first one's first; every process gets them."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(function, parts):
    """[function(part) for part in parts], of which every process does its share."""
    rank, world = processes()
    done = gather([function(part) for k, part in enumerate(parts) if k % world == rank])
    return [done[k % world][k // world] for k in range(sum(map(len, done)))]


def add_up_gradients(parameters):
    """Give every process the sum of all processes' gradients; None if none of them has any."""
    if processes()[1] > 1:
        used = gather([p.grad is not None for p in parameters])
        for p, anywhere in zip(parameters, map(any, zip(*used, strict=True)), strict=True):
            if anywhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)


# ----------------------------------------------------------------------------------------------
# 8. Counting
# ----------------------------------------------------------------------------------------------


def parameter_report(model):
    """Numbers of parameters: {tower, projector, language_model, adapters, trainable, total}."""
    prefixes = {"tower": "model.vision_tower.", "projector": "model.multi_modal_projector."}
    count = dict.fromkeys((*prefixes, "language_model", "adapters", "trainable", "total"), 0)
    for path, p in model.named_parameters():
        part = next((part for part, start in prefixes.items() if path.startswith(start)), None)
        part = "adapters" if ".adapters." in path else part or "language_model"
        count[part] += p.numel()
        count["trainable"] += p.numel() if p.requires_grad else 0
        count["total"] += p.numel()
    return count


def peak_memory():
    """The most memory in use so far, in MB: of the GPU if one was used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # getrusage there counts the process that started this one too
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _fused_attention_on_meta(module, query, key, value, attention_mask, **kwargs):
    # What a GPU's fused attention keeps for backward. SDPA without data would take its S x S way.
    fused = torch.ops.aten._scaled_dot_product_flash_attention
    return fused(query, key, value)[0].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("fused_on_meta", _fused_attention_on_meta)


def _kept_for_backward(function):
    """The bytes that autograd keeps of a call of function() until backward, weights not counted."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor  # views of one memory count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory_table(text=64, question=24, captured=4, answer=128):
    """Markdown table of the GPU memory that LoRA training of LLaVA-1.5 needs: computed.

    The models are built on torch's "meta" device: every shape and no data. Their parameters are
    counted, and one decoder layer is run to see what autograd keeps of it for backward. Adapters
    count 16 bytes a parameter: float32 weight, gradient, and the two moments of AdamW.
    """
    lines = [
        "Computed, not measured: GB (1e9 bytes); weights in bf16, adapters with gradient and AdamW",
        f"state in float32. A sample is 576 image tokens and {text} of text; asr.py alone captures",
        f"attention, of {question} question tokens in the last {captured} layers. Add 1-2 GB for",
        "CUDA itself, temporaries and fragmentation (two columns leave 2 GB for that). In tests a",
        f"question keeps keys and values of all layers, of up to {answer} new tokens (`acl`: 512).",
        "",
        "| LLaVA-1.5, LoRA | checkpointing | weights | adapters | a sample | of it capture "
        "| total, batch 1 | batch 4 | batch 16 | samples that 24 / 48 / 80 GB hold "
        "| a test question | of them 24 / 48 / 80 GB hold |",
        "|" + "---|" * 12,
    ]
    for what, (name, rank, targets) in ADAPTERS.items():
        (width, _, depth, heads), model = LLAVAS[name], llava_on_meta(name)
        weights = 2 * parameter_report(model)["total"]
        adapter = add_lora(model, "new", rank, 2 * rank, 0.05, targets.split())
        adapters = 16 * sum(p.numel() for p in adapter)
        P = image_grid(model)[0] * image_grid(model)[1]
        S, D, bf16 = P + text, width // heads, dict(device="meta", dtype=torch.bfloat16)

        model.set_attn_implementation({"text_config": "fused_on_meta"})
        last = model.model.language_model.layers[-1]
        x, angle = torch.empty(1, S, width, **bf16).requires_grad_(), torch.empty(1, S, D, **bf16)
        layer = _kept_for_backward(partial(last, x, position_embeddings=(angle, angle)))

        model.set_attn_implementation({"text_config": "capture"})
        position = torch.arange(S)[None]
        corner = capture_attention(model, captured, position >= S - question, position < P)
        for key in ("row_index", "column_index", "row_mask", "batch_index"):
            setattr(corner, key, getattr(corner, key).to("meta"))
        q, k = (torch.empty(1, heads, S, D, **bf16).requires_grad_() for _ in "qk")
        maps = _kept_for_backward(partial(corner.record, depth - 1, q, k, None, D**-0.5))

        asked = 2 * depth * (S + answer) * width * 2 + layer  # one layer's work: at most that

        # With checkpointing: the input of every layer, and one layer at a time in full.
        for on, sample, capture in (
            ("on", depth * x.nbytes + layer + maps, maps),
            ("off", depth * layer + captured * maps, captured * maps),
        ):
            totals = [weights + adapters + batch * sample for batch in (1, 4, 16)]
            cells = [f"{c / 1e9:.2f}" for c in (weights, adapters, sample, capture, *totals)]
            free = [gb * 1e9 - 2e9 - weights - adapters for gb in (24, 48, 80)]
            held = [" / ".join(str(max(0, int(room // need))) for room in free)
                    for need in (sample, asked)]  # fmt: skip
            cells += [held[0], f"{asked / 1e9:.2f}", held[1]]
            lines.append(f"| {what} | {on} | {' | '.join(cells)} |")
    return "\n".join(lines)


LINEAR = "q k v o gate up down"
ADAPTERS = {  # what is trained at a time -> (model, rank, layers): the defaults of the streams
    "7B, `vqacl`: r 16, q, v, projector": ("7B", 16, "q v projector"),
    "7B, `cram.py`: buffer of r 48, q, k, v, o": ("7B", 48, "q k v o"),
    "7B, `dcl`, `acl`: r 128, all": ("7B", 128, f"{LINEAR} projector"),
    "13B, `vqacl`: r 16, q, v, projector": ("13B", 16, "q v projector"),
}
LLAVAS = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # width, inner, layers, heads


def llava_on_meta(name):
    """LLaVA-1.5 of this size without its weights: shapes and counts alone."""
    clip = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096)
    clip |= dict(num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
    width, inner, depth, heads = LLAVAS[name]
    llama = dict(model_type="llama", vocab_size=32064, hidden_size=width)
    llama |= dict(intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads)
    with torch.device("meta"):
        model = Llava(LlavaConfig(vision_config=clip, text_config=llama))
    return model.to(torch.bfloat16).requires_grad_(False).train()


# memory (GB) and dense bf16 TFLOP/s, from their data sheets
GPUS = {"RTX 4090": (24, 165), "A100": (80, 312), "H100": (80, 989)}
USED = 0.35  # of that: a guess, from what is common for training with checkpointing


# samples of one pass over all stages, as the papers count them; ucit's are rounded
SAMPLES = {"vqacl": 537_503, "ucit": 214_000, "dcl": 236_200, "acl": 921_400}
SAMPLES["trigap"] = 400_000  # at most: three of its ten tasks may have fewer than 40,000
TESTS = {  # test questions of each stage; ucit's and trigap's are 3,000 or unknown
    "vqacl": [test for _, test in VQA_COUNTS.values()],
    "dcl": [10_000, 9_800, 10_000, 8_200, 10_000],
    "acl": [1000, 1000, 788, 720],
    "ucit": 6 * [3000],
    "trigap": 10 * [3000],
}


def hours_table(text=64):
    """Markdown table of the hours of LoRA training on one GPU: computed.

    A frozen matrix costs 2 operations per weight and token forward and 2 backward (no gradient of
    its own), and with checkpointing 2 more for the second forward. Counted are the language model's
    layers and their attention; logits are made for the answer's few tokens only.
    """
    passes = {"100,000 samples": 1e5, "`vqacl`, 3 epochs": 3 * SAMPLES["vqacl"]}
    passes |= {f"`{name}`, 1 epoch": SAMPLES[name] for name in SAMPLES if name != "vqacl"}
    answers = [f"{sum((len(n) - k) * x for k, x in enumerate(n)):,} answers on `{name}`"
               for name, n in TESTS.items()]  # fmt: skip
    lines = [
        f"Computed, not measured: hours of training at {100 * USED:.0f}% (a guess) of the card's",
        f"dense bf16 peak, 576 image tokens and {text} of text, checkpointing on. On top come the",
        "tests, the tower's one pass per image, and for asr.py two passes over each stage (about a",
        "third of an epoch each). -: the weights alone do not fit. The tests after every stage",
        f"take {', '.join(answers)} (the last two with 3,000 test questions a stage).",
        "",
        "| | " + " | ".join(f"{name}, {size} GB" for name, (size, _) in GPUS.items()) + " |",
        "|---|" + "---|" * len(GPUS),
    ]
    for name, (width, _, depth, _) in LLAVAS.items():
        layers = llava_on_meta(name).model.language_model.layers
        weights, S = sum(p.numel() for p in layers.parameters()), 576 + text
        operations = 3 * S * (2 * weights + 4 * S * width * depth / 2)  # causal: half of S^2
        for what, n in passes.items():
            hours = [
                f"{n * operations / (USED * peak * 1e12) / 3600:.1f}"
                if 2 * weights < size * 1e9
                else "-"
                for size, peak in GPUS.values()
            ]
            lines.append(f"| {name}, {what} | " + " | ".join(hours) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory and hours of LoRA training, computed")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--memory", action="store_true", help="print the table of GPU memory")
    what.add_argument("--hours", action="store_true", help="print the table of hours")
    print(memory_table() if parser.parse_args().memory else hours_table())
