"""Two tiny LLaVAs with random weights, saved and loaded like real ones, and a few samples.

`tiny` is CLIP + Llama (class token, as many key heads as query heads); `llava` runs a test on it
and on SigLIP + Qwen2 (no class token, two query heads per key head, ChatML prompt). Every test gets
a fresh LLaVA. `tiny_folder` and `tiny_siglip_qwen_folder` are their folders.
"""

import argparse
import copy
import importlib
import json
import os
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import model
import plot
from data import Sample
from model import LLaVA

load_llava = cache(model.load_llava)

QUESTIONS = (
    "what color is the round cup",
    "how many",
    "is there a red car left of the small blue house near the tree",
    "where is the dog",
    "name the largest thing in this picture",
)
ANSWERS = ("red", "three", "no", "on the left side", "a house")
VICUNA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() }}: {% endif %}"
    "{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {"num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 64}
SIZE |= {"intermediate_size": 96, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32}
TOWER |= {"intermediate_size": 64, "patch_size": 8}


def byte_tokenizer(special, bos, eos, pad):
    """Byte-level BPE: a few merges from the sentences above, and bytes for all other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=360, **settings)
    tokenizer.train_from_iterator(QUESTIONS + ANSWERS, trainer)
    if bos:  # Llama's tokenizers write <s> themselves, Qwen's do not
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **names
    )


def build(folder, vision, text, tokenizer, template, pixels):
    """Random weights, large enough that attention is far from uniform, saved to `folder`."""
    clip = isinstance(vision, tf.CLIPVisionConfig)  # has a class token, which LLaVA leaves out
    select = {"vision_feature_select_strategy": "default" if clip else "full"}
    processor = tf.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        num_additional_image_tokens=int(clip),
        chat_template=template,
        **select,
    )
    mark = tokenizer.convert_tokens_to_ids("<image>")
    settings = {"image_token_index": mark, "vision_feature_layer": -1} | select
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, **settings)
    )
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() > 1 and "vision" not in path:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_here(script, flags, out, figures=False):
    """A run of a script in this process, by default without its figures; returns its folder."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_llava", lambda *args: copy.deepcopy(load_llava(*args)))
        if not figures:
            drawn = {"experts": "mllm_cl"}.get(script, script)
            patch.setattr(plot, drawn, lambda folders: None)
        module.main(module.parse([*flags, "--out", str(out)]))
    return out


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    tokenizer = byte_tokenizer(["<pad>", "<s>", "</s>", "<image>"], "<s>", "</s>", "<pad>")
    vision = tf.CLIPVisionConfig(image_size=64, **TOWER)
    text = tf.LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, num_key_value_heads=4, **SIZE)
    square = {"height": 64, "width": 64}
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=square)
    folder = tmp_path_factory.mktemp("tiny-clip-llama")
    return build(folder, vision, text, tokenizer, VICUNA, pixels)


@pytest.fixture(scope="session")
def tiny_siglip_qwen_folder(tmp_path_factory):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = byte_tokenizer(special, None, "<|im_end|>", "<|endoftext|>")
    vision = tf.SiglipVisionConfig(image_size=48, vision_use_head=False, **TOWER)
    text = tf.Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZE)
    pixels = tf.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    folder = tmp_path_factory.mktemp("tiny-siglip-qwen")
    return build(folder, vision, text, tokenizer, CHATML, pixels)


@pytest.fixture(scope="session")
def loaded(tiny_folder, tiny_siglip_qwen_folder):
    flags = {"threads": 1, "device": "cpu", "dtype": "auto", "max_new_tokens": 4}
    flags |= {"system": "", "checkpointing": None}
    folders = {"tiny": tiny_folder, "tiny_siglip_qwen": tiny_siglip_qwen_folder}
    return {k: LLaVA(argparse.Namespace(model=str(v), **flags)) for k, v in folders.items()}


@pytest.fixture
def tiny(loaded):
    return copy.deepcopy(loaded["tiny"])


@pytest.fixture(params=["tiny", "tiny_siglip_qwen"])
def llava(request, loaded):
    return copy.deepcopy(loaded[request.param])


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """64 samples: questions of different length over 16 different images that are not square."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(16):
        pixels = random.integers(0, 256, (40 + i, 70 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    made = []
    for i in range(64):
        question, answer = QUESTIONS[i % 5] + " please" * (i % 7), ANSWERS[i % 5]
        image, skill = folder / f"{i % 16}.png", f"skill {i % 5}"
        made.append(Sample(str(i), image, question, answer, (answer,), skill, "first"))
    return made


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Three stages of 12 training and 5 test questions of two kinds; one sample has no image."""
    root, random = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    for s, stage in enumerate(("one", "two", "three")):
        (root / stage / "images").mkdir(parents=True)
        for split, n in (("train", 12), ("test", 5)):
            records = []
            for k in range(n):
                name = f"images/{split}{k}.png"
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / stage / name)
                text = ("what color is the cup?", "how many cars are there?")[k % 2]
                answer = ("red", "three")[(k + s) % 2]
                record = {"id": f"{stage}{k}", "skill": ("color", "count")[k % 2]}
                image = {} if stage == "two" and k == 3 else {"image": name}
                asked = f"<image>\n{text}" if image else text
                turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
                train = split == "train"
                content = {"conversations": turns} if train else {"text": text, "answer": answer}
                records.append(record | image | content)
            (root / stage / f"{split}.json").write_text(json.dumps(records))
    lines = {"one": "signs", "two": "maps", "three": "charts"}
    spec = {"stages": list(lines), "descriptions": lines}
    (root / "stream.json").write_text(json.dumps(spec))
    return root


@pytest.fixture(scope="session")
def flags(stream_folder, tiny_folder):
    """The flags that all runs share."""
    text = f"--stream {stream_folder} --model {tiny_folder} --batch_size 4 --epochs 2 --lr 2e-2"
    text += " --targets q,v,projector --dropout 0.05 --warm_up 0.5"
    return [*text.split(), *"--threads 1 --max_new_tokens 4".split()]
