"""model.py and attention.py against transformers and peft: same logits, attention, files."""

import copy
import json
import shutil
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from attention import capture_attention
from features import image_means
from files import InputError, load_image, pad_square
from model import LoRALinear, load_llava, read_lora

peft = pytest.importorskip("peft")
ALL = "q,k,v,o,gate,up,down,projector"


def settings(targets="q,v,projector", rank=4, alpha=8, dropout=0.0):
    return Namespace(targets=targets, rank=rank, alpha=alpha, dropout=dropout)


def adapt(llava, seed=0, **lora):
    """A LoRA that does something: B is zero at first. Returns its parameters."""
    torch.manual_seed(seed)
    parameters = llava.add_lora(settings(**lora))
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.1)
    return parameters


def capture(llava, batch, layers=2):
    return capture_attention(llava.model, layers, batch["question_mask"], batch["image_mask"])


def eager(llava, batch):
    """transformers as it comes, from pixels to all logits: (output, maps of the last 2 layers)."""
    model, rows = llava.model, batch["question_mask"]
    model.set_attn_implementation({"text_config": "eager"})
    images = [pad_square(load_image(s.image), llava.features.border) for s in batch["samples"]]
    inputs = dict(llava.processor.image_processor(images=images, return_tensors="pt"))
    inputs |= {name: batch.get(name) for name in ("input_ids", "attention_mask", "labels")}
    inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output, maps = model(**inputs, output_attentions=True), []
    for b in range(len(rows)):
        whole = torch.stack([layer[b] for layer in output.attentions[-2:]])  # [L, H, S, S]
        corner = whole[:, :, rows[b]][..., batch["image_mask"][b]]
        filler = (0, 0, 0, int(rows.sum(1).max() - rows[b].sum()))
        maps.append(torch.nn.functional.pad(corner, filler))
    return output, torch.stack(maps)  # [B, L, H, T, P]


def gradients(llava):
    return {path: p.grad for path, p in llava.model.named_parameters() if p.grad is not None}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a, b, tolerance=5e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance)


WEIGHTS = "model.safetensors"
FAULTS = {
    "is no LLaVA": ("config.json", b'"model_type": "llava"', b'"model_type": "llama"'),
    "could not be loaded": (WEIGHTS, b"dtype", b"dtypo"),
    "1 weights missing.*up_proj": (WEIGHTS, b"layers.1.mlp.up_proj", b"layers.9.mlp.up_proj"),
    "the tower takes 64": ("processor_config.json", b"64", b"32"),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_what_cannot_be_loaded_stops_with_a_sentence(sentence, tiny_folder, tmp_path):
    folder, (name, old, new) = shutil.copytree(tiny_folder, tmp_path / "model"), FAULTS[sentence]
    (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))
    with pytest.raises(InputError, match=sentence) as error:
        load_llava(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_logits_loss_and_maps_are_those_of_transformers(llava, samples, padding):
    adapt(llava)
    chosen = [samples[0], samples[35]] if padding == "none" else samples[:6]
    batch = llava.batch(chosen, train=padding != "left")
    real = batch["attention_mask"].bool()
    assert bool(real.all()) == (padding == "none") and not llava.model.training
    plain = llava.forward(batch)
    with capture(llava, batch) as maps:
        output = llava.forward(batch)
        attention, words = maps()
    assert torch.equal(plain.logits, output.logits)
    theirs, expected = eager(llava, batch)
    if padding == "left":  # a prompt: all logits, no loss
        close(output.logits[real], theirs.logits[real])
    else:  # answer tokens only
        close(output.logits, theirs.logits[:, :-1][batch["labels"][:, 1:] != -100])
        close(output.loss, theirs.loss)
    assert expected.amax() > 0.2  # far from uniform: the comparison means something
    close(attention, expected)
    assert torch.equal(words.sum(1), batch["question_mask"].sum(1))


def test_gradients_through_maps_are_those_of_transformers(llava, samples):
    """Checkpointing runs a layer twice: same dropout, and an open capture is not disturbed."""
    batch = llava.batch(samples[:4], train=True)
    weight = torch.randn(4, 2, 4, 1, llava.grid[0] * llava.grid[1])
    ours = {}
    for dropout in (0.3, 0.0):
        lora = adapt(llava, targets=ALL, dropout=dropout)
        for checkpointing in (False, True):
            one = copy.deepcopy(llava)
            one.model.train()
            if checkpointing:
                one.checkpoint_activations()
            torch.manual_seed(5)
            with capture(one, batch) as maps:
                (one.forward(batch).loss + (maps()[0] * weight).sum()).backward()
            ours[dropout, checkpointing] = gradients(one)
        assert equal(ours[dropout, False], ours[dropout, True])
    assert not equal(ours[0.3, True], ours[0.0, True])
    output, maps = eager(llava, batch)
    (output.loss + (maps * weight).sum()).backward()
    theirs = gradients(llava)
    assert len(theirs) == len(lora) == 2 * (7 * 4 + 2) and ours[0.0, True].keys() == theirs.keys()
    for path, gradient in theirs.items():
        error = (ours[0.0, True][path] - gradient).abs().max()
        assert error < 2e-4 * gradient.abs().max(), path


def test_samples_without_an_image_share_a_batch(llava, samples):
    some = [samples[0], replace(samples[1], image=None), samples[2]]
    batch, alone = llava.batch(some, train=True), llava.batch(some[1:2], train=True)
    with capture(llava, batch) as maps:
        together = llava.forward(batch)
        attention, words = maps()
    assert words.any(1).tolist() == [True, False, True]
    assert attention.isfinite().all() and not attention[1].any()
    with capture(llava, alone) as maps:
        lonely = llava.forward(alone)
        assert maps()[0].shape[-1] == 0
    start = int((batch["labels"][0] != -100).sum())
    close(together.logits[start : start + len(lonely.logits)], lonely.logits)
    means = image_means(llava, batch, torch.nan)
    close(means[[0, 2]], batch["features"].mean(1))
    assert means[1].isnan().all() and not image_means(llava, alone, 0.0).any()


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step(llava, samples):
    losses = []
    for step in ([0, 1, 2, 3, 4],), ([0, 1], [2, 3, 4]):
        batches = llava.micro_batches(samples, [step], 0)
        assert [b["sample_share"] for b in batches] == [len(index) / 5 for index in step]
        losses.append(sum(llava.forward(b).loss * b["token_share"] for b in batches))
    close(*losses)


def test_the_tower_sees_every_image_once_until_the_cache_is_full(llava, samples, tmp_path):
    paths = [s.image for s in samples[:40]]  # 16 different images
    first, cache = llava.features(paths), llava.features
    assert cache.tower_runs == 16 and first.shape[1] == llava.grid[0] * llava.grid[1]
    llava.model.train()  # dropout is LoRA's alone
    assert torch.equal(cache(paths), first) and cache.tower_runs == 16
    cache.rows, cache.room, cache.tower_runs = {}, 3.5 * first[0].nbytes, 0
    for runs in (8, 8 + 5):
        close(cache(paths[:8]), first[:8])
        assert list(cache.rows) == paths[:3] and cache.tower_runs == runs
    assert cache.rows[paths[0]].untyped_storage().nbytes() == first[0].nbytes  # no view of a batch
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:2000])
    with pytest.raises(InputError, match="cut.png"):
        cache([paths[0], tmp_path / "cut.png"])


def test_images_that_threads_decode_ahead_are_the_same(llava, samples, tmp_path):
    paths, cache = list(dict.fromkeys(s.image for s in samples)), llava.features
    usual, cache.rows = cache(paths), {}
    cache.pool = ThreadPoolExecutor(2)  # as beside a GPU
    steps = [[[0, 1], [2]], [[3, 4]]]
    llava.micro_batches(samples, steps, 0)
    assert set(cache.ahead) == {samples[3].image, samples[4].image} - set(cache.rows)
    assert torch.equal(cache(paths), usual) and not cache.ahead
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:2000])
    cache.fetch([tmp_path / "cut.png"])  # an error waits until the image is needed
    with pytest.raises(InputError, match="cut.png"):
        cache([tmp_path / "cut.png"])


def test_a_look_ends_with_the_questions(llava, samples):
    """What follows a question changes neither its hidden states nor those of the image."""

    def look(batch):
        assert batch["question_mask"][:, -1].any() and len(llava.forward(batch).logits) == 0
        hidden = llava.forward(batch).last_hidden_state
        names = ("image_mask", "question_mask")
        return [(hidden * batch[name][:, :, None]).sum(1) for name in names]

    images, questions = llava.over(samples[:5], 2, look)
    batch = llava.batch(samples[:5], train=True)
    hidden = llava.forward(batch).last_hidden_state.detach()
    close(images, (hidden * batch["image_mask"][:, :, None]).sum(1))
    close(questions, (hidden * batch["question_mask"][:, :, None]).sum(1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_lora_is_the_formula_and_its_weights_are_float32(dtype, tolerance):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(6, 5).to(dtype), torch.randn(3, 4, 6).to(dtype)
    layer = LoRALinear(base, rank=2, alpha=6, dropout=0.0)
    assert torch.equal(layer(x), base(x))  # B = 0
    torch.nn.init.normal_(layer.B)
    expected = base(x).float() + 6 / 2 * x.float() @ layer.A.T @ layer.B.T
    assert layer.A.dtype == expected.dtype == torch.float32 and layer(x).dtype == dtype
    largest = expected.abs().max()
    assert (layer(x).float() - expected).abs().max() <= tolerance * largest
    lora = [layer.A, layer.B]
    wanted = torch.autograd.grad(expected.square().sum(), lora)
    layer(x).float().square().sum().backward()
    for p, gradient in zip(lora, wanted):
        assert (p.grad - gradient).abs().max() <= 4 * tolerance * gradient.abs().max()
    before = [p.detach().clone() for p in lora]
    torch.optim.AdamW(lora, lr=1e-6, weight_decay=0.0).step()  # no step is rounded away
    for p, old in zip(lora, before):
        torch.testing.assert_close((p - old).abs(), torch.full_like(p, 1e-6), rtol=0.2, atol=0)


def test_an_adapter_begins_as_the_base_can_be_replaced_and_switched_off(llava, samples):
    batch = llava.batch(samples[:3], train=True)
    bare, states = llava.forward(batch).logits, []
    for targets in ("q,v", "v,q"):  # their order does not matter
        torch.manual_seed(3)
        llava.add_lora(settings(targets))
        assert torch.equal(llava.forward(batch).logits, bare)
        states.append(llava.lora_state())
    assert equal(*states)
    modules = llava.model.named_modules()
    assert [*llava.layers] == [path for path, m in modules if isinstance(m, LoRALinear)]
    lora = adapt(llava)
    one, state = llava.forward(batch).logits, llava.lora_state()
    with llava.lora_off():
        assert torch.equal(llava.forward(batch).logits, bare)
    with torch.no_grad():
        lora[0].add_(1.0)
    assert not torch.equal(llava.forward(batch).logits, one)
    llava.load_lora(state)
    assert torch.equal(llava.forward(batch).logits, one) and not torch.equal(one, bare)
    with pytest.raises(InputError, match="other layers"):
        llava.load_lora(states[0])
    with pytest.raises(InputError, match="banana"):
        llava.add_lora(settings("q,banana"))


def test_peft_reads_our_adapter_and_we_read_it_back(llava, samples, tmp_path):
    batch, fresh = llava.batch(samples[:3], train=True), copy.deepcopy(llava)
    adapt(llava, targets=ALL)
    llava.save_lora(tmp_path)
    ours = llava.forward(batch).logits
    peft.PeftModel.from_pretrained(fresh.model, tmp_path)  # changes the model in place
    close(fresh.forward(batch).logits, ours)
    adapt(llava, targets=ALL, seed=1)
    llava.load_lora(read_lora(tmp_path))
    assert torch.equal(llava.forward(batch).logits, ours)


def test_we_read_an_adapter_of_peft(llava, samples, tmp_path):
    batch, theirs = llava.batch(samples[:3], train=True), copy.deepcopy(llava)
    targets = r"model\.language_model.*\.(k_proj|down_proj)"
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(theirs.model, config).eval().save_pretrained(tmp_path)
    llava.add_lora(settings("k,down", rank=3, alpha=7))
    llava.load_lora(read_lora(tmp_path))
    close(llava.forward(batch).logits, theirs.forward(batch).logits)
    with pytest.raises(InputError, match="missing file .*adapter_config.json"):
        read_lora(tmp_path / "missing")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(InputError, match="more than a plain LoRA"):
        read_lora(tmp_path)


def test_answers_are_greedy_and_equal_stepwise_ones(llava, samples):
    """Each token is the arg-max of a whole pass, and a capture holds the prompt's attention."""
    adapt(llava)
    with torch.no_grad():  # random weights may well answer "<image>", which cannot be read again
        llava.model.lm_head.weight[llava.model.config.image_token_id] = 0
    sampling = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    llava.model.generation_config.update(**sampling)  # the checkpoint's, overruled
    batch = llava.batch(samples[:5], train=False)
    with capture(llava, batch) as maps:
        texts = llava.generate(batch)
        attention, _ = maps()
    with capture(llava, batch) as maps:
        llava.forward(batch)
        close(attention, maps()[0])
    longer = dict(batch)
    for _ in range(llava.max_new_tokens):
        new = llava.forward(longer).logits[:, -1:].argmax(-1)
        for name, value in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
            longer[name] = torch.cat([longer[name], value], 1)
    new = longer["input_ids"][:, -llava.max_new_tokens :]
    expected = llava.processor.batch_decode(new, skip_special_tokens=True)
    assert texts == [text.strip() for text in expected] and len(set(texts)) > 2


def test_answers_do_not_depend_on_the_batch(llava, samples):
    adapt(llava, dropout=0.5)
    llava.model.train()  # generate switches dropout off and puts the mode back
    together = llava.answer(samples[:12])
    assert [llava.answer([sample])[0] for sample in samples[:12]] == together
    assert llava.model.training and len(set(together)) > 8
