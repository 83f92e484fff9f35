"""Two tiny LLaVAs with random weights, saved and loaded like real ones, and a few samples.

`tiny` is CLIP + Llama (class token, as many key heads as query heads), `tiny_siglip_qwen` is
SigLIP + Qwen2 (no class token, two query heads to a key head, ChatML prompt); `llava` runs a test
on both. Every test gets a fresh copy. `tiny_folder` and `tiny_siglip_qwen_folder` are the folders.
"""

import copy
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from data import Sample
from model import load_llava

QUESTIONS = (
    "what color is the round cup",
    "how many",
    "is there a red car left of the small blue house near the tree",
    "where is the dog",
    "name the largest thing in this picture",
)
ANSWERS = ("red", "three", "no", "on the left side", "a house")
VICUNA = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(special, bos, eos, pad):
    """Byte-level BPE: a few merges from the sentences above, and bytes for all other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUESTIONS + ANSWERS, trainer)
    if bos:  # Llama's tokenizers write <s> themselves, Qwen's do not
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=["<image>"],
    )


def build(folder, vision, text, tokenizer, template, pixels, select, extra, seed):
    """Random weights, large enough that attention is far from uniform, saved to `folder`."""
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=extra,
        chat_template=template,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy=select,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() > 1 and "vision" not in path:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    tokenizer = byte_tokenizer(["<pad>", "<s>", "</s>", "<image>"], "<s>", "</s>", "<pad>")
    square = {"height": 64, "width": 64}
    return build(
        tmp_path_factory.mktemp("tiny-clip-llama"),
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        ),
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        tokenizer,
        VICUNA,
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=square),
        "default",
        1,
        seed=0,
    )


@pytest.fixture(scope="session")
def tiny_siglip_qwen_folder(tmp_path_factory):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = byte_tokenizer(special, None, "<|im_end|>", "<|endoftext|>")
    return build(
        tmp_path_factory.mktemp("tiny-siglip-qwen"),
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=8,
            vision_use_head=False,
        ),
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        ),
        tokenizer,
        CHATML,
        SiglipImageProcessorPil(size={"height": 48, "width": 48}),
        "full",
        0,
        seed=1,
    )


@pytest.fixture(scope="session")
def loaded(tiny_folder, tiny_siglip_qwen_folder):
    folders = {"tiny": tiny_folder, "tiny_siglip_qwen": tiny_siglip_qwen_folder}
    return {name: load_llava(folder) for name, folder in folders.items()}


@pytest.fixture
def tiny(loaded):
    model, processor = loaded["tiny"]
    return copy.deepcopy(model), processor


@pytest.fixture
def tiny_siglip_qwen(loaded):
    model, processor = loaded["tiny_siglip_qwen"]
    return copy.deepcopy(model), processor


@pytest.fixture(params=["tiny", "tiny_siglip_qwen"])
def llava(request, loaded):
    model, processor = loaded[request.param]
    return copy.deepcopy(model), processor


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """64 samples: questions of different length over 16 different images that are not square."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for i in range(16):
        shape = (40 + i, 70 - i, 3)
        paths.append(folder / f"{i}.png")
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    made = []
    for i in range(64):
        question, answer = QUESTIONS[i % 5] + " please" * (i % 7), ANSWERS[i % 5]
        made.append(
            Sample(
                id=str(i),
                image=paths[i % 16],
                question=question,
                answer=answer,
                answers=(answer,),
                skill=f"skill {i % 5}",
                stage="first",
            )
        )
    return made


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Three stages of 12 training and 5 test questions of two kinds; one sample has no image."""
    root, random = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    for s, stage in enumerate(("one", "two", "three")):
        (root / stage / "images").mkdir(parents=True)
        records = {"train": [], "test": []}
        for split, n in (("train", 12), ("test", 5)):
            for k in range(n):
                name = f"images/{split}{k}.png"
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / stage / name)
                kind = ("color", "count")[k % 2]
                question = ("what color is the cup?", "how many cars are there?")[k % 2]
                answer = ("red", "three")[(k + s) % 2]
                record = {"id": f"{stage}{k}", "image": name, "skill": kind}
                if split == "train":
                    turns = [("human", f"<image>\n{question}"), ("gpt", answer)]
                    record["conversations"] = [{"from": a, "value": b} for a, b in turns]
                else:
                    record |= {"text": question, "answer": answer}
                if stage == "two" and k == 3:
                    del record["image"]
                    if split == "train":
                        record["conversations"][0]["value"] = question
                records[split].append(record)
        for split, content in records.items():
            (root / stage / f"{split}.json").write_text(json.dumps(content))
    (root / "stream.json").write_text(json.dumps({"stages": ["one", "two", "three"]}))
    return root


@pytest.fixture(scope="session")
def flags(stream_folder, tiny_folder):
    """The flags that all runs share."""
    text = f"--stream {stream_folder} --model {tiny_folder} --batch_size 4 --epochs 2 --lr 2e-2"
    text += " --targets q,v,projector --dropout 0.05 --warm_up 0.5"
    return [*text.split(), *"--threads 1 --max_new_tokens 4".split()]
