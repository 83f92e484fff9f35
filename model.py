"""The model side of every script: a frozen LLaVA and LoRA.

A LLaVA is three parts in a row. A vision tower cuts the image into P patches and gives one vector
per patch; a two-layer projector maps each vector to the width of the language model; a decoder-only
language model reads  [ text before | P image tokens | question | answer ]  as one causal sequence.
LLaVA-1.5-7B (Liu et al. 2023, arXiv 2310.03744): CLIP ViT-L/14 at 336 px, so P = 24 x 24 = 576
vectors of 1024 numbers; Llama with 32 layers of 4096. Nothing below assumes these parts or sizes:
they are read from the config, and the tests run the same code on SigLIP + Qwen2.

    1. LLaVA              what every script calls: batches, forward, generate, LoRA
    2. LoRA               LoRALinear, target_paths, read_lora
    3. Loading, torchrun  load_llava, start_process, gather, share_out

Letters in shapes: B batch, S sequence, P image tokens, C width of the tower, N answer tokens,
V vocabulary.
"""

import atexit
import hashlib
import io
import os
import random
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from transformers import AutoImageProcessor, AutoProcessor
from transformers import LlavaForConditionalGeneration as Llava
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from attention import one_pass_per_block
from data import TARGETS, text_config
from features import FeatureCache
from files import InputError, damaged, progress, read_json, silent, write_bytes, write_json
from tokens import Collator

# ---- 1. LLaVA ------------------------------------------------------------------------------------


GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": None}
GREEDY |= {"temperature": None, "top_p": None, "top_k": None}


class LLaVA:
    """A frozen LLaVA with what surrounds it in every script.

    model, processor   transformers' own objects; every weight is frozen
    features           a FeatureCache: image files -> what the tower makes of them
    grid, depth        (rows, columns) of image patches; number of decoder layers
    layers             {path: LoRALinear} that `add_lora` has made
    """

    def __init__(self, args):
        """Load args.model on args.device; InputError if it is no LLaVA or the device is missing."""
        if args.threads:
            torch.set_num_threads(args.threads)
        device = start_process(args.device)
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        self.name, self.max_new_tokens, self.layers = args.model, args.max_new_tokens, {}
        self.first = processes()[0] == 0  # under torchrun: is this the first process?
        self.model, self.processor = load_llava(args.model, device, dtype)
        self.device = self.model.device
        on_gpu = self.device.type != "cpu"
        if on_gpu if args.checkpointing is None else args.checkpointing:
            self.checkpoint_activations()
        tokenizer, eos = self.processor.tokenizer, self.model.generation_config.eos_token_id
        eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.end_tokens = {"eos_token_id": sorted(eos), "pad_token_id": pad}
        vision = self.model.config.vision_config
        self.grid = (vision.image_size // vision.patch_size,) * 2
        self.depth = self.model.config.text_config.num_hidden_layers
        self.collate = Collator(self.processor, self.grid[0] * self.grid[1], args.system)
        self.features = FeatureCache(self.model, self.processor)
        size = sum(p.numel() for p in self.model.parameters())
        threads = f"{torch.get_num_threads()} CPU threads"
        print(f"{args.model}: {size:,} parameters, {self.model.dtype} on {self.device}, {threads}")

    def checkpoint_activations(self):
        """In train mode keep only the input of each decoder layer; run the layer again in backward.
        use_reentrant=False: the older variant silently drops the gradient of captured maps."""
        layers = self.model.model.language_model
        layers.activation_checkpointing_enable({"use_reentrant": False})

    # ---- batches ---------------------------------------------------------------------------------

    def batch(self, samples, train):
        """Samples -> the Collator's tensors on the device, with "samples" and with "features"
        [images, P, C] of those samples that have an image (None if none has)."""
        batch = self.collate(samples, train)
        batch = to_device(batch, self.device)
        images = [sample.image for sample in samples if sample.image is not None]
        return batch | {"samples": samples, "features": self.features(images) if images else None}

    def micro_batches(self, samples, steps, k):
        """The batches of optimizer step k; under torchrun each process gets some of them.

        A step is lists of indices of `samples`, one list per micro-batch. Each batch has its
        "index", and says how much of the step it holds: "token_share" of the answer tokens and
        "sample_share" of the samples. Losses weighted by these add up to the mean of the step,
        however it is cut. The images of step k + 1 are decoded while a GPU is busy with these.
        """
        rank, world = processes()
        batches, step = [], steps[k]
        for index in step[rank::world]:
            batch = self.batch([samples[i] for i in index], train=True)
            tokens = int((batch["labels"] != -100).sum())
            batches.append(batch | {"index": index, "tokens": tokens})
        for coming in steps[k + 1 : k + 2]:
            self.features.fetch(samples[i].image for index in coming[rank::world] for i in index)
        all_tokens = sum(gather(sum(batch["tokens"] for batch in batches)))
        all_samples = sum(map(len, step))
        for batch in batches:
            batch["token_share"] = batch["tokens"] / all_tokens
            batch["sample_share"] = len(batch["index"]) / all_samples
        return batches

    @torch.no_grad()
    def over(self, samples, size, look, title="looking at the samples"):
        """look(batch) -> tensors [B, ...] for all samples in order, `size` at a time: a list of
        tensors [N, ...] on the CPU. Eval mode, no gradient; torchrun's processes share the work.
        A batch ends where its questions end, as no image or question token sees what follows; no
        answer is left, so no logits are computed."""
        self.model.eval()

        def look_at(start):
            batch = self.batch(samples[start : start + size], train=True)
            seen = (batch["image_mask"] | batch["question_mask"]).any(0).nonzero()
            end = int(seen.max()) + 1 if len(seen) else None
            flat = [k for k, x in batch.items() if torch.is_tensor(x) and x.dim() == 2]
            batch |= {name: batch[name][:, :end] for name in flat}
            coming = start + size * processes()[1]
            self.features.fetch(sample.image for sample in samples[coming : coming + size])
            return [x.cpu() for x in look(batch)]

        columns = zip(*share_out(look_at, progress(range(0, len(samples), size), title)))
        return [torch.cat(column) for column in columns]

    @torch.no_grad()
    def text_means(self, texts):
        """Mean of the frozen input embeddings of each text's tokens: [N, width] float32."""
        table = self.model.get_input_embeddings().weight
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = (torch.tensor(row, device=self.device) for row in ids)
        return torch.stack([table[row].float().mean(0) for row in ids])

    def clip(self, parameters, log, most=1.0):
        """Between backward and the optimizer's step: clip the gradient's norm, and return the log
        as numbers, with "gradient_norm" before clipping; the log costs one wait for a GPU. Under
        torchrun every process gets the sum of all gradients (DistributedDataParallel would take
        their mean), and of the numbers."""
        if processes()[1] > 1:
            used = gather([p.grad is not None for p in parameters])
            for p, anywhere in zip(parameters, map(any, zip(*used))):
                if anywhere:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    dist.all_reduce(p.grad)
        norm = nn.utils.clip_grad_norm_(parameters, most)
        values = [x.to(self.device, torch.float64) for x in (norm, *log.values())]
        norm, *values = torch.stack(values).tolist()
        logs = gather(dict(zip(log, values)))  # that of a process without a micro-batch is empty
        names = dict.fromkeys(name for other in logs for name in other)
        sums = {name: sum(other.get(name, 0) for other in logs) for name in names}
        return {"gradient_norm": norm, **sums}

    def eval(self):
        """Training is over: eval mode. InputError if it has left a weight that is not finite."""
        check_finite(p for p in self.model.parameters() if p.requires_grad)
        self.model.eval()

    # ---- forward and generate --------------------------------------------------------------------

    def _image_inputs(self, features):
        """Tower features [images, P, C], through the projector, as LLaVA takes them for pixels."""
        if features is None:
            return None
        tokens = self.model.model.multi_modal_projector(features)
        return {"image": BaseModelOutputWithPooling(pooler_output=list(tokens))}

    def forward(self, batch):
        """One pass over a batch. Returns the output object of transformers, with
          last_hidden_state   [B, S, width], after the final norm
          logits, loss        with batch["labels"] the logits [N, V] of the N answer tokens, sample
                              after sample, and their mean cross-entropy; else [B, S, V] and None
        Only answer tokens go through the output layer: the logits of a whole 7B sample and their
        gradient would be 640 x 32,064 floats several times over, nearly all multiplied by zero.
        """
        one_pass_per_block()
        mask, labels = batch["attention_mask"], batch.get("labels")
        output = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # counted from the first real token
            mm_encoder_outputs=self._image_inputs(batch["features"]),
            use_cache=False,
        )
        hidden = output.last_hidden_state
        if labels is None:
            output.logits, output.loss = self.model.lm_head(hidden), None
        else:
            labels = labels[:, 1:]  # position s predicts token s + 1
            output.logits = self.model.lm_head(hidden[:, :-1][labels != -100])
            output.loss = F.cross_entropy(output.logits.float(), labels[labels != -100])
        return output

    @torch.no_grad()
    def generate(self, batch, max_new_tokens=None):
        """Greedy answers to the left-padded prompts of batch(samples, train=False): B strings.

        An open capture_attention block gets the attention of the prompts.
        """
        one_pass_per_block()
        training = self.model.training
        self.model.eval()
        # Greedy whatever the checkpoint's own generation settings ask for: they are overruled.
        tokens = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            mm_encoder_outputs=self._image_inputs(batch["features"]),
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            **self.end_tokens,
            **GREEDY,
        )
        self.model.train(training)
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def answer(self, samples):
        """What a method without any routing does in a test."""
        return self.generate(self.batch(samples, train=False))

    # ---- LoRA ------------------------------------------------------------------------------------

    def add_lora(self, args, kind=None, **options):
        """A fresh adapter on the layers args.targets, replacing an earlier one; returns its
        parameters, layer after layer. A is drawn from torch's global generator.

        kind: a class like LoRALinear, which is the default; `options` go to it. InputError if the
        rank is larger than a layer has inputs or outputs.
        """
        kind, first, self.layers = kind or LoRALinear, not self.layers, {}
        for path in target_paths(self.model, args.targets.split(",")):
            base = self.model.get_submodule(path)
            base = getattr(base, "base", base)  # an earlier adapter is taken off
            if args.rank > min(base.weight.shape):
                raise InputError(f"--rank {args.rank}: {path} has only {min(base.weight.shape)}")
            layer = kind(base, args.rank, args.alpha, args.dropout, **options)
            self.model.set_submodule(path, layer.train(self.model.training))
            self.layers[path] = layer
        lora = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        if first:
            print(f"{sum(p.numel() for p in lora):,} parameters to train, on {args.targets}")
        return lora

    @contextmanager
    def lora_off(self):
        """The pretrained model inside a with-block: a reference that needs no second copy."""
        for layer in self.layers.values():
            layer.on = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.on = True

    def lora_state(self):
        """{"<path>.lora_A.weight": [r, in], "<path>.lora_B.weight": [out, r]}, copied to the CPU"""
        return {
            f"{path}.lora_{name}.weight": p.detach().cpu().clone()
            for path, layer in self.layers.items()
            for name, p in layer.named_parameters(recurse=False)
        }

    @torch.no_grad()
    def load_lora(self, state):
        """Copy a lora_state into the adapter. InputError unless it has exactly these layers."""
        if {k: x.shape for k, x in self.lora_state().items()} != {k: state[k].shape for k in state}:
            raise InputError("the adapter and the one to load have other layers, or other ranks")
        for path, layer in self.layers.items():
            for name, p in layer.named_parameters(recurse=False):
                p.copy_(state[f"{path}.lora_{name}.weight"])

    def save_lora(self, folder, state=None):
        """Write the adapter (or a lora_state) as peft does: PeftModel.from_pretrained reads it."""
        folder, layer = Path(folder), next(iter(self.layers.values()))
        state = self.lora_state() if state is None else state
        rank = len(next(iter(state.values())))
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(self.name),
            "r": rank,
            "lora_alpha": layer.scale * rank,
            "lora_dropout": layer.dropout,
            "target_modules": sorted(self.layers),  # full paths: the tower has a "q_proj" too
            "bias": "none",
            "inference_mode": True,
        }
        write_json(folder / "adapter_config.json", config)
        tensors = {PEFT + key: value for key, value in state.items()}
        write_tensors(folder / "adapter_model.safetensors", tensors)


# ---- 2. LoRA (Hu et al. 2021, arXiv 2106.09685) --------------------------------------------------

PEFT = "base_model.model."  # where a peft model keeps the model that it wraps


class LoRALinear(nn.Module):
    """A frozen nn.Linear W with a detour through r dimensions (their Eq. 3), x [..., in]:

        y = W x  +  (alpha / r) B A dropout(x)               A: [r, in], B: [out, r]

    B starts at zero, so training starts exactly at the pretrained model. A and B are float32 over a
    base of any dtype: at lr 1e-4 a step of AdamW is smaller than the gap between two neighboring
    bfloat16 numbers and would be rounded away. The products are in the dtype of x: in bfloat16 they
    use a GPU's tensor cores, and no float32 copy of x is made.
    """

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.dropout, self.scale, self.on = base, dropout, alpha / rank, True
        # Drawn on the CPU, then moved: one seed gives one adapter on every device.
        a = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5)
        b, device = torch.zeros(base.out_features, rank), base.weight.device
        self.A, self.B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        h = F.linear(F.dropout(x, self.dropout, self.training), A)
        return y + F.linear(h * self.scale, B)  # [..., r] is cheaper to scale than [..., out]


def target_paths(model, targets):
    """Paths of the linear layers that these targets mean, in model order.

    targets: some of TARGETS: linear layers of every decoder layer, and "projector" for both of its
    layers. Raises InputError for a target that this model does not have.
    """
    patterns = {t: rf"model\.language_model\.(.+\.)?{t}_proj" for t in TARGETS}
    patterns["projector"] = r"model\.multi_modal_projector\.linear_[12]"
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    paths = [path.removesuffix(".base") for path in paths]
    chosen = set()
    for target in targets:
        matches = {path for path in paths if re.fullmatch(patterns.get(target, ""), path)}
        if not matches:
            raise InputError(f"--targets: {target!r} is no layer of this model, see {TARGETS}")
        chosen |= matches
    return [path for path in paths if path in chosen]  # whatever the targets' order


def read_lora(folder):
    """The lora_state that save_lora (or peft) has written. InputError if there is no plain LoRA, or
    if a bit has changed since."""
    config = read_json(Path(folder) / "adapter_config.json", dict)
    with damaged(f"the adapter in {folder}"):
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            if digest(state) != (file.metadata() or {}).get("sha256", digest(state)):
                raise ValueError("its checksum is wrong")
    special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    if any(".lora_" not in key for key in state) or any(config.get(key) for key in special):
        raise InputError(f"{folder}: this adapter is more than a plain LoRA of one rank")
    return {key.removeprefix(PEFT): value for key, value in state.items()}


def write_tensors(path, tensors):
    """A safetensors file with a digest, as the format has no checksum."""
    write_bytes(path, to_safetensors(tensors, {"sha256": digest(tensors)}))


def digest(tensors):
    """SHA-256 of the names, types, shapes and bytes of a dict of CPU tensors."""
    total = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        total.update(x.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_state(path, state):
    """torch.save, the whole file or nothing."""
    if silent():
        return
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


def check_finite(parameters):
    """InputError if a parameter is nan or infinite."""
    if not all(p.isfinite().all() for p in parameters):
        raise InputError("training has left weights that are not finite: try a lower --lr")


# ---- 3. Loading; several GPUs: torchrun --nproc_per_node N asr.py ... --accumulate N -------------


def load_llava(name, device="cpu", dtype=None):
    """(model, processor): a LLaVA, frozen and in eval mode, from a folder or a hub id.

    dtype: None = float32 on CPU, bfloat16 elsewhere. Weights come from safetensors only, and no
    code from the folder is run. Raises InputError if this is no LLaVA or its weights are not whole.
    """
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    text_config(str(name))  # reads config.json alone: is this a LLaVA at all?
    set_verbosity_error()  # what transformers warns of is an error below
    if not sys.stderr.isatty():
        disable_progress_bar()  # it would fill a log file
    # use_safetensors: a pickled checkpoint could run code while it is read.
    options = {"use_safetensors": True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # they are reported, and refused below
    try:
        model, report = Llava.from_pretrained(name, dtype=dtype, **options)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        # backend="pil" needs no torchvision, and gives the same pixels with or without it.
        pixels = AutoImageProcessor.from_pretrained(name, backend="pil")
    except Exception as error:  # not a folder of a model, no network, a broken file: many kinds
        raise InputError(f"--model {name} could not be loaded: {_first_line(error)}") from error
    # from_pretrained fills what is missing with random numbers and only warns. We stop instead.
    layer, mark = model.config.vision_feature_layer, model.config.image_token_id
    depth = model.config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or abs(layer) > depth or mark != processor.image_token_id:
        raise InputError(f"--model {name}: features of layer {layer}, image token {mark}: unusable")
    wrong = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    if wrong:
        raise InputError(f"--model {name}: {len(wrong)} weights missing or misshapen: {wrong[0]}")
    size = pixels.crop_size if getattr(pixels, "do_center_crop", False) else pixels.size
    side = model.config.vision_config.image_size
    if (size["height"], size["width"]) != (side, side):
        raise InputError(f"--model {name}: images become {dict(size)}, the tower takes {side}")
    processor.image_processor = pixels
    # Only the language model gets the capture function of attention.py; the tower keeps plain SDPA.
    model.set_attn_implementation({"text_config": "capture"})
    return model.requires_grad_(False).to(device).eval(), processor


def to_device(x, device):
    """A tensor, or a dict or list of tensors and other things, with its tensors on the device."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_device(value, device) for value in x]
    return x.to(device) if torch.is_tensor(x) else x


def _first_line(error):
    return str(error).strip().split("\n")[0].rstrip(".")  # the libraries above write paragraphs


def seed_by(name):
    """Seed torch's generators by a name: what is drawn next does not depend on what came before."""
    torch.manual_seed(random.Random(name).getrandbits(32))


def random_state():
    """torch's generators, the only ones drawn from while training (LoRA's dropout)."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(states):
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state(states[1])


# Under torchrun every process has the whole model and takes every N-th micro-batch of a step and
# every N-th batch of a test. All make the same steps; the first process alone prints and writes.


def processes():
    """(number of this process from 0, how many there are) under torchrun; (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_process(device):
    """The flag --device -> the device of this process; InputError if there is no such GPU."""
    rank, world = processes()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1 and device == "cuda":  # every process has a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {device}: {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device.index or 0)  # random state and peak memory are of this one
    if world > 1 and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    return device


def gather(value):
    """The values of all processes, the first one's first; every process gets them."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(function, items):
    """[function(item) for item in items], of which every process does its share."""
    rank, world = processes()
    results = gather([function(item) for k, item in enumerate(items) if k % world == rank])
    return [results[k % world][k // world] for k in range(sum(map(len, results)))]
