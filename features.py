"""What frozen encoders make of images and questions, computed once and never trained.

    FeatureCache         LLaVA's own tower: every image file goes through it once
    question_and_image   one vector per question and per image, by LLaVA's own frozen parts
    frozen_features      the same as one vector of two unit lengths, without the suffix
    ClipFeatures         the same by a CLIP model, as in CRAM's public code

Letters in shapes: B batch, P image patches, C width of the tower, d width of a question's vector,
c of an image's.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPProcessor

from files import InputError, load_image, pad_square

DECODERS = 8  # threads that decode images while a GPU computes
FEATURE_GB = 4.0  # how much of them is kept in memory; a 7B image is 576 x 1024 bfloat16 = 1.2 MB


def border_of(image_processor):
    """As in LLaVA's own training: the border gets the mean color, which normalizes to zero."""
    return tuple(int(255 * c) for c in image_processor.image_mean)


class FeatureCache:
    """Image files -> [B, P, C], what the frozen tower hands to the projector; once per file.

    The tower never changes, so three epochs need not pay for it three times. The projector comes
    after the cache, in forward(): LoRA on it gets its gradient. When FEATURE_GB are full, nothing
    is added and nothing thrown out; the images left over go through the tower each time (1.4% of a
    step of LLaVA-1.5-7B). Epochs visit the images in a cycle: throwing out the oldest would throw
    out each one shortly before its turn.

    Beside a GPU threads decode, in training and in looks one batch ahead: Pillow and NumPy leave
    Python to others while they work. On a CPU the main thread does, as nothing is to be won.
    """

    def __init__(self, model, processor):
        self.model, self.processor, self.rows = model, processor, {}
        self.room, self.tower_runs = FEATURE_GB * 1e9, 0  # bytes; images through the tower
        self.border = border_of(processor.image_processor)
        self.ahead = {}  # path -> Future of its pixels
        decoders = min(DECODERS, os.cpu_count() or 1)
        self.pool = None if model.device.type == "cpu" else ThreadPoolExecutor(decoders)

    def fetch(self, paths):
        """Begin to decode images that will be asked for soon."""
        for path in paths if self.pool else ():
            if path and path not in self.rows and path not in self.ahead:
                self.ahead[path] = self.pool.submit(self.pixels, [path])

    def __call__(self, paths):
        """Raises InputError for an unreadable image."""
        fresh, missing = {}, [path for path in dict.fromkeys(paths) if path not in self.rows]
        self.fetch(missing)
        for start in range(0, len(missing), 32):
            chunk = missing[start : start + 32]
            if self.pool:
                pixels = torch.cat([self.ahead.pop(path).result() for path in chunk])
            else:
                pixels = self.pixels(chunk)
            fresh |= zip(chunk, self.tower(pixels))
        for path, row in fresh.items():
            if row.nbytes <= self.room:
                self.room -= row.nbytes
                self.rows[path] = row.cpu().clone()
        rows = [fresh[path] if path in fresh else self.rows[path] for path in paths]
        return torch.stack([row.to(self.model.device) for row in rows])

    def pixels(self, paths):
        """Image files -> [n, 3, height, width] as the tower takes them."""
        squares = [pad_square(load_image(path), self.border) for path in paths]
        return self.processor.image_processor(images=squares, return_tensors="pt").pixel_values

    @torch.no_grad()
    def tower(self, pixels):
        """[n, 3, height, width] -> [n, P, C]: what this LLaVA gives its projector."""
        llava, config = self.model.model, self.model.config
        llava.vision_tower.eval()  # model.train() is for the dropout of LoRA, not for the tower
        pixels = pixels.to(self.model.device, self.model.dtype)
        layers = llava.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = layers[config.vision_feature_layer]
        self.tower_runs += len(pixels)
        return features[:, 1:] if config.vision_feature_select_strategy == "default" else features


@torch.no_grad()
def image_means(llava, batch, missing):
    """Mean tower feature of each image, over patches: [B, C] float32; `missing` without one."""
    shape = len(batch["samples"]), llava.model.config.vision_config.hidden_size
    means = torch.full(shape, missing, device=llava.device)
    if batch["features"] is not None:
        pictured = [sample.image is not None for sample in batch["samples"]]
        means[pictured] = batch["features"].float().mean(1)
    return means


def question_and_image(llava, batch, missing=math.nan):
    """A batch -> u [B, d] of its questions, q [B, C] of its images.

    u: mean token embedding of the question, suffix and all, less the mean of the embedding table,
    as all embeddings share a large part; q: mean feature of the tower, `missing` for pure text.
    """
    center = llava.model.get_input_embeddings().weight.mean(0, dtype=torch.float32)
    u = llava.text_means([sample.question for sample in batch["samples"]]) - center
    return u, image_means(llava, batch, missing)


def asked(sample):
    """The question without its suffix, which may tell the form of the answer."""
    if not sample.suffix:
        return sample.question
    return sample.question.removesuffix(sample.suffix).rstrip()


def frozen_features(llava, batch):
    """[B, d]: mean tower feature of the image and mean token embedding of the question without its
    suffix, each of unit length; zeros for a missing image."""
    images = image_means(llava, batch, 0.0)
    texts = llava.text_means([asked(sample) for sample in batch["samples"]])
    return torch.cat([F.normalize(images), F.normalize(texts)], 1).cpu()


class ClipFeatures:
    """The same by a CLIP model, as in CRAM's public code: u [B, d] is the text tower's pooled
    output, not projected, with layer norm; q [B, c] the projected embedding of the image padded to
    a square, not normalized, nan for pure text. Raises InputError if NAME is no CLIP model."""

    def __init__(self, name, device):
        try:
            self.clip, report = CLIPModel.from_pretrained(
                name, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:  # they would be filled with random numbers
                raise ValueError("weights are missing")
            self.processor = CLIPProcessor.from_pretrained(name, backend="pil")
        except Exception as error:  # no folder, no network, other shapes: many kinds
            line = str(error).strip().split("\n")[0]
            raise InputError(f"--routing_features {name}: no CLIP model: {line}") from None
        # A question that is too long loses its end, though it states the form of the answer.
        self.processor.tokenizer.truncation_side = "right"
        self.border = border_of(self.processor.image_processor)
        longest = self.clip.config.text_config.max_position_embeddings
        self.text = {"return_tensors": "pt", "padding": True, "truncation": True}
        self.text["max_length"] = longest
        self.clip.requires_grad_(False).to(device).eval()

    @torch.no_grad()
    def __call__(self, batch):
        samples, device = batch["samples"], self.clip.device
        text = self.processor(text=[sample.question for sample in samples], **self.text)
        u = self.clip.text_model(**text.to(device)).pooler_output.float().cpu()
        q = torch.full((len(u), self.clip.config.projection_dim), math.nan)
        pictured = [sample.image is not None for sample in samples]
        if any(pictured):
            images = [load_image(sample.image) for sample in samples if sample.image]
            squares = [pad_square(image.convert("RGB"), self.border) for image in images]
            pixels = self.processor(images=squares, return_tensors="pt").to(device)
            q[pictured] = self.clip.get_image_features(**pixels).pooler_output.float().cpu()
        return F.layer_norm(u, u.shape[1:]), q
