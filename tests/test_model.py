"""model.py against transformers and peft: same logits, same attention maps, same adapter files."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
from data import Collator, InputError, load_image, pad_square
from model import capture_attention, forward, generate

ALL = ("q", "k", "v", "o", "gate", "up", "down", "projector")


def prepare(llava, samples, train=True):
    """(model, processor, cache, batch, features) of some samples."""
    model, processor = llava
    cache = M.FeatureCache(model, processor)
    batch = Collator(processor, M.image_tokens(model, processor))(samples, train)
    return model, processor, cache, batch, M.image_features(cache, samples)


def trained_lora(model, name="a", targets=("q", "v", "projector"), dropout=0.0, seed=0):
    """An adapter that does something: B is zero at first."""
    torch.manual_seed(seed)
    parameters = M.add_lora(model, name, 4, 8, dropout, targets)
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.1)
    return parameters


def capture(model, batch, layers=4):
    return capture_attention(model, layers, batch["question_mask"], batch["image_mask"])


def eager_maps(model, batch, features, layers):
    """The same corner cut out of the whole matrices, one sample and one token at a time."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation({"text_config": "eager"})
    attentions = forward(eager, batch, features, output_attentions=True).attentions
    rows, images = batch["question_mask"], batch["image_mask"]
    most = int(rows.sum(1).max())
    samples = []
    for b in range(len(rows)):
        layer = torch.stack([attentions[i][b] for i in layers])  # [L, H, S, S]
        corner = layer[:, :, rows[b]][..., images[b]]
        filler = corner.new_zeros(*corner.shape[:2], most - corner.shape[2], corner.shape[3])
        samples.append(torch.cat([corner, filler], dim=2))
    return torch.stack(samples), eager


# ---- loading ---------------------------------------------------------------------------------


def test_loaded_model_is_frozen_and_ready(llava):
    model, processor = llava
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config.text_config._attn_implementation == "capture"
    assert model.config.vision_config._attn_implementation == "sdpa"
    rows, columns = M.image_grid(model)
    assert M.image_tokens(model, processor) == rows * columns


def test_what_is_no_llava_is_an_input_error(tiny_folder, tmp_path):
    with pytest.raises(InputError):
        M.load_llava(tmp_path / "missing")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="LLaVA"):
        M.load_llava(other)
    pickled = shutil.copytree(tiny_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        M.load_llava(pickled)
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="could not be loaded"):
        M.load_llava(broken)


def test_absent_weights_are_an_input_error(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "hole")
    state = load_file(folder / "model.safetensors")
    del state[next(key for key in state if "layers.1.mlp.up_proj" in key)]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="up_proj"):
        M.load_llava(folder)


# ---- forward ---------------------------------------------------------------------------------


def test_features_give_the_logits_and_loss_of_pixels(llava, samples):
    """Cache, projector and forward in our hands = transformers given the pixels, bit for bit."""
    model, processor, cache, batch, features = prepare(llava, samples[:5])
    pictures = [pad_square(load_image(s.image), cache.border) for s in samples[:5]]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    keys = ("input_ids", "attention_mask", "labels")
    theirs = model(pixel_values=pixels, **{key: batch[key] for key in keys})
    ours = forward(model, batch, features)
    answer = batch["labels"][:, 1:] != -100
    # The output layer runs on another number of rows: same numbers up to rounding.
    torch.testing.assert_close(ours.logits, theirs.logits[:, :-1][answer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    everything = forward(model, prompt, features, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert torch.equal(everything.logits[real], theirs.logits[real]) and everything.loss is None
    assert torch.equal(everything.hidden_states[-1], ours.hidden_states[-1])
    assert len(everything.hidden_states) == 5 and len(ours.hidden_states) == 1


def test_samples_without_an_image_share_a_batch(llava, samples):
    some = [samples[0], replace(samples[1], image=None), samples[2]]
    model, _, _, batch, features = prepare(llava, some)
    assert len(features) == 2
    with capture(model, batch) as maps:
        together = forward(model, batch, features)
        attention, row_mask = maps()
    assert row_mask.any(1).tolist() == [True, False, True]
    assert attention.isfinite().all() and not attention[1].any()
    alone = prepare(llava, some[1:2])
    assert alone[4] is None
    with capture(model, alone[3]) as maps:
        lonely = forward(model, alone[3], None)
        attention, row_mask = maps()
    assert attention.shape[-1] == 0 and not row_mask.any()
    start = int((batch["labels"][0] != -100).sum())
    torch.testing.assert_close(
        together.logits[start : start + len(lonely.logits)], lonely.logits, rtol=1e-4, atol=1e-4
    )


# ---- LoRA ------------------------------------------------------------------------------------


def test_lora_is_the_formula_in_float32():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.nn.Linear(6, 5).to(dtype)
        layer = M.LoRALinear(base)
        layer.add("a", rank=2, alpha=6, dropout=0.0)
        x = torch.randn(3, 4, 6).to(dtype)
        layer.active = ("a",)
        assert torch.equal(layer(x), base(x))  # B = 0
        a, b = layer.pair("a")
        assert a.dtype == b.dtype == torch.float32
        torch.nn.init.normal_(b)
        expected = base(x).float() + 6 / 2 * x.float() @ a.T @ b.T
        assert layer(x).dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(layer(x).float(), expected, rtol=tolerance, atol=tolerance)


def test_adapters_switch_and_leave_the_base_alone(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:3])
    bare = forward(model, batch, features).logits
    first = trained_lora(model, "type", ("q", "projector"), seed=1)
    one = forward(model, batch, features).logits
    trained_lora(model, "train", ALL, seed=2)  # both names are methods of nn.Module
    two = forward(model, batch, features).logits
    assert not torch.equal(bare, one) and not torch.equal(one, two)
    with M.lora_off(model):
        assert torch.equal(forward(model, batch, features).logits, bare)
    assert torch.equal(forward(model, batch, features).logits, two)
    M.set_lora(model, "type")
    assert torch.equal(forward(model, batch, features).logits, one)
    state = M.lora_state(model, "type")
    assert sum(p.numel() for p in first) == sum(p.numel() for p in state.values())
    with torch.no_grad():
        first[0].add_(1.0)
    M.load_lora_state(model, "type", state)
    assert torch.equal(forward(model, batch, features).logits, one)
    M.set_lora(model)
    assert torch.equal(forward(model, batch, features).logits, bare)
    with pytest.raises(ValueError):
        M.load_lora_state(model, "train", state)
    with pytest.raises(ValueError):
        M.set_lora(model, "unknown")
    with pytest.raises(ValueError):
        M.add_lora(model, "type", 4, 8, 0.0, ("q",))
    with pytest.raises(InputError, match="banana"):
        M.add_lora(model, "new", 4, 8, 0.0, ("banana",))


def test_every_adapter_parameter_gets_a_gradient_and_nothing_else_does(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:3])
    parameters = trained_lora(model, targets=ALL)
    assert len(parameters) == 2 * (7 * 4 + 2)
    forward(model.train(), batch, features).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in parameters}
    count = M.parameter_report(model)
    assert count["trainable"] == count["adapters"] == sum(p.numel() for p in parameters)
    parts = ("tower", "projector", "language_model", "adapters")
    assert count["total"] == sum(count[part] for part in parts)


def test_all_randomness_comes_from_torchs_global_generator(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:3])
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    M.add_lora(model, "a", 4, 8, 0.0, ("q", "v"))
    torch.manual_seed(3)
    M.add_lora(other, "a", 4, 8, 0.0, ("v", "q"))  # the order of targets is no matter
    ours, theirs = M.lora_state(model, "a"), M.lora_state(other, "a")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    state = torch.get_rng_state()
    M.enable_checkpointing(model)
    with capture(model.train(), batch) as maps:
        (forward(model, batch, features).loss + maps()[0].sum()).backward()
    assert torch.equal(torch.get_rng_state(), state)  # without dropout nothing is drawn
    trained_lora(model, "dropped", dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(forward(model, batch, features).loss.item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert forward(model, batch, features).loss == forward(model, batch, features).loss


@pytest.mark.parametrize("targets", [("q", "v", "projector"), ALL])
def test_peft_loads_our_adapter_and_we_load_it_back(llava, samples, tmp_path, targets):
    peft = pytest.importorskip("peft")
    model, _, _, batch, features = prepare(llava, samples[:3])
    fresh, again = copy.deepcopy(model), copy.deepcopy(model)
    trained_lora(model, "ours", targets)
    M.save_lora(model, "ours", tmp_path / "ours", base="some/llava")
    ours = forward(model, batch, features)
    wrapped = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    theirs = forward(wrapped.base_model.model, batch, features)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=2e-5)
    state = torch.get_rng_state()
    parameters = M.load_lora(again, "back", tmp_path / "ours")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in parameters)
    assert torch.equal(forward(again, batch, features).logits, ours.logits)


def test_we_load_an_adapter_of_peft(llava, samples, tmp_path):
    peft = pytest.importorskip("peft")
    model, _, _, batch, features = prepare(llava, samples[:3])
    targets = r"model\.language_model.*\.(k_proj|down_proj)"
    settings = {"r": 3, "lora_alpha": 7, "target_modules": targets, "init_lora_weights": False}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    M.load_lora(model, "theirs", tmp_path)
    torch.testing.assert_close(
        forward(model, batch, features).logits,
        forward(theirs.base_model.model, batch, features).logits,
        rtol=1e-5,
        atol=2e-5,
    )
    with pytest.raises(InputError):
        M.load_lora(model, "none", tmp_path / "missing")


# ---- feature cache ---------------------------------------------------------------------------


def test_the_tower_runs_once_per_image_content(llava, samples, tmp_path):
    model, processor = llava
    cache = M.FeatureCache(model, processor)
    paths = [s.image for s in samples[:40]]  # 16 different images
    first = cache(paths)
    assert first.shape[:2] == (40, M.image_tokens(model, processor)) and not first.requires_grad
    assert cache.tower_runs == 16
    copied = shutil.copy(paths[0], tmp_path / "renamed.png")
    assert torch.equal(cache([copied, load_image(paths[1]), *paths[2:]]), first)
    assert cache.tower_runs == 16
    off = M.FeatureCache(model.train(), processor, where="off")
    trained_lora(model, targets=("projector",), dropout=0.5)
    state = torch.get_rng_state()
    torch.testing.assert_close(off(paths[:4]), first[:4], rtol=1e-5, atol=1e-5)
    off(paths[:4])
    assert torch.equal(torch.get_rng_state(), state)
    assert off.tower_runs == 8


def test_a_full_cache_stops_adding(tiny, samples):
    model, processor = tiny
    paths = [s.image for s in samples[:8]]
    size = M.FeatureCache(model, processor)(paths[:1]).nbytes
    cache = M.FeatureCache(model, processor, limit_gb=3.5 * size / 1e9)
    first = cache(paths)
    assert len(cache.rows) == 3 and cache.tower_runs == 8
    torch.testing.assert_close(cache(paths), first, rtol=1e-5, atol=1e-5)
    assert len(cache.rows) == 3 and cache.tower_runs == 8 + 5


def test_a_disk_cache_outlives_the_run_but_not_the_tower(tiny, samples, tmp_path):
    model, processor = tiny
    paths = [s.image for s in samples[:6]]

    def cache(model):
        return M.FeatureCache(model, processor, where="disk", folder=tmp_path)

    one = cache(model)
    first = one(paths)
    two = cache(model)
    assert torch.equal(two(paths), first) and two.tower_runs == 0 and two.used >= first.nbytes
    assert torch.equal(one(paths), first) and one.tower_runs == 6
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).add_(1.0)
    three = cache(other)
    assert not torch.equal(three(paths), first) and three.tower_runs == 6
    with pytest.raises(ValueError):
        M.FeatureCache(model, processor, where="disk")


def test_a_truncated_image_is_named(tiny, tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(
        whole
    )
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(InputError, match="cut.png"):
        M.FeatureCache(*tiny)([whole, cut])


# ---- attention capture -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_maps_equal_eager_attention_and_logits_do_not_change(llava, samples, padding):
    chosen = [samples[0], samples[35]] if padding == "none" else samples[:6]
    model, _, _, batch, features = prepare(llava, chosen, train=padding != "left")
    trained_lora(model)
    if padding == "none":
        batch = {key: v[:1] if torch.is_tensor(v) else v for key, v in batch.items()}
        keep = batch["attention_mask"][0].bool()
        batch = {key: v[:, keep] if torch.is_tensor(v) else v for key, v in batch.items()}
        features = features[:1]
    assert bool((batch["attention_mask"] == 1).all()) == (padding == "none")
    plain = forward(model, batch, features)
    layers = [1, 3]
    with capture(model, batch, layers) as maps:
        captured = forward(model, batch, features)
        attention, row_mask = maps()
    assert torch.equal(plain.logits, captured.logits)
    expected, _ = eager_maps(model, batch, features, layers)
    assert attention.dtype == torch.float32 and attention.shape == expected.shape
    assert torch.equal(row_mask.sum(1), batch["question_mask"].sum(1))
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)
    assert attention.amax() > 0.2  # far from uniform: the comparison means something


def test_gradients_through_maps_equal_eager_with_and_without_checkpointing(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:4])
    trained_lora(model, targets=ALL)
    weight = torch.randn(4, 2, 4, 1, M.image_tokens(*llava))
    expected, eager = eager_maps(model, batch, features, [2, 3])
    (forward(eager, batch, features).loss + (expected * weight).sum()).backward()
    wanted = {path: p.grad for path, p in eager.named_parameters() if p.grad is not None}
    checkpointed = copy.deepcopy(model)
    M.enable_checkpointing(checkpointed)
    gradients = []
    for one in (model.train(), checkpointed.train()):
        with capture(one, batch, 2) as maps:
            out = forward(one, batch, features)
            attention, _ = maps()
            (out.loss + (attention * weight).sum()).backward()
        found = {path: p.grad for path, p in one.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for path in found:
            scale = wanted[path].abs().max()
            assert (found[path] - wanted[path]).abs().max() < 2e-4 * scale, path
        gradients.append(found)
    assert all(torch.equal(gradients[0][path], gradients[1][path]) for path in wanted)


def test_checkpointing_repeats_the_same_dropout(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:4])
    trained_lora(model, dropout=0.3)
    gradients = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointing:
            M.enable_checkpointing(one)
        torch.manual_seed(5)
        with capture(one, batch) as maps:
            (forward(one, batch, features).loss + maps()[0].square().sum()).backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_capture_works_in_bfloat16(llava, samples):
    model, _, _, batch, features = prepare(llava, samples[:4])
    with capture(model, batch, 1) as maps:
        forward(model, batch, features)
        exact, _ = maps()
    half = copy.deepcopy(model).to(torch.bfloat16)
    parameters = trained_lora(half)
    M.set_lora(half)
    with capture(half, batch, 1) as maps:
        forward(half, batch, features.bfloat16())
        attention, _ = maps()
    assert attention.dtype == torch.float32
    assert (attention - exact).abs().mean() < 0.05 * exact.abs().mean()
    M.set_lora(half, "a")
    M.enable_checkpointing(half)
    with capture(half.train(), batch, 2) as maps:
        (forward(half, batch, features.bfloat16()).loss + maps()[0].sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters)


def test_generate_captures_the_prompt(llava, samples):
    model, processor, _, batch, features = prepare(llava, samples[:5], train=False)
    with capture(model, batch) as maps:
        forward(model, batch, features)
        expected, _ = maps()
    quiet = generate(model, processor, batch, features, 5)
    with capture(model, batch) as maps:
        assert generate(model, processor, batch, features, 5) == quiet
        attention, row_mask = maps()
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-6)
    assert torch.equal(row_mask.sum(1), batch["question_mask"].sum(1))


def test_capture_never_makes_the_whole_matrix(llava, samples):
    model, _, _, batch, _ = prepare(llava, samples[:2])
    text = model.config.text_config
    S, D = batch["input_ids"].shape[1], text.hidden_size // text.num_attention_heads
    q = torch.randn(2, text.num_attention_heads, S, D, requires_grad=True)
    k = torch.randn(2, text.num_key_value_heads, S, D, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                sizes.append(out.numel())
            return out

    maps = capture(model, batch, 1)
    with Watch():
        maps.record(3, q, k, None, D**-0.5)
        maps()[0].sum().backward()
    question = int(batch["question_mask"].sum(1).max())
    assert max(sizes) <= 2 * text.num_attention_heads * S * max(question, D) < S * q[..., 0].numel()


def test_wrong_use_of_capture_is_an_error(tiny, samples):
    model, processor, _, batch, features = prepare(tiny, samples[:2])
    with capture(model, batch) as maps:
        with pytest.raises(RuntimeError, match="no forward"):
            maps()
        forward(model, batch, features)
        with pytest.raises(RuntimeError, match="already holds"):
            forward(model, batch, features)
        with pytest.raises(RuntimeError, match="nest"), capture(model, batch):
            pass
    forward(model, batch, features)  # a block that ended leaves nothing behind
    with pytest.raises(ValueError, match="5"):
        capture(model, batch, 5)
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ValueError, match="load_llava"):
        capture(model, batch)


# ---- generation ------------------------------------------------------------------------------


def test_answers_do_not_depend_on_the_batch(llava, samples):
    model, processor = llava
    trained_lora(model.train())
    cache = M.FeatureCache(model, processor)
    collator = Collator(processor, M.image_tokens(model, processor))
    texts = {}
    for size in (64, 1):
        texts[size] = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            features = M.image_features(cache, part)
            texts[size] += generate(model, processor, collator(part, False), features, 4)
    assert texts[1] == texts[64] and len(set(texts[1])) > 10
    assert model.training  # generate switches dropout off and puts the mode back
    assert cache.tower_runs == 16


def test_greedy_answers_agree_with_teacher_forcing(llava, samples):
    """Each generated token is the arg-max of one forward pass over prompt and answer."""
    model, processor, _, batch, features = prepare(llava, samples[:4], train=False)
    with torch.no_grad():  # random weights may well answer "<image>", which nothing can read again
        model.lm_head.weight[model.config.image_token_id] = 0
    images = M._image_inputs(model, features)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain = {"do_sample": False, "max_new_tokens": 4}
    tokens = model.generate(**inputs, mm_encoder_outputs=images, **plain)
    new = tokens[:, batch["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert generate(model, processor, batch, features, 4) == texts
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)
    logits = forward(model, {"input_ids": tokens, "attention_mask": mask}, features).logits
    assert torch.equal(logits[:, -new.shape[1] - 1 : -1].argmax(-1), new)


# ---- counting --------------------------------------------------------------------------------


def test_memory_table_counts_the_published_sizes():
    rows = [line.split("|") for line in M.memory_table().splitlines() if line.startswith("| ")]
    weights = {(row[1].split("B,")[0].strip(), float(row[3])) for row in rows[1:]}
    assert weights == {("7", 14.13), ("13", 26.7)}  # 7.06 and 13.35 billion parameters in bf16
    totals = [[float(cell) for cell in row[7:10]] for row in rows[1:]]
    assert all(total == sorted(total) for total in totals)
    assert all(on[2] < off[2] for on, off in zip(totals[::2], totals[1::2], strict=True))
    # rank 128 on all linear layers: 7 x 32 layers and the projector, 16 bytes a parameter
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    count = 32 * sum(128 * (a + b) for a, b in shapes) + 128 * (1024 + 3 * 4096)
    assert float(rows[5][4]) == pytest.approx(16 * count / 1e9, abs=0.01)
    assert M.peak_memory() > 50
