"""Properties of the method: what the paper proves, what we changed, and what goes into training.

The numbers themselves are compared with the authors' code in test_golden.py.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import asr
import data


def settings(*flags):
    return asr.parse(["--model", str(data.ROOT / "mini" / "tiny-llava"), *flags])


def random_maps(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("published", [(), asr.PUBLISHED])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (24, 24)])
def test_spectra_depend_neither_on_a_cyclic_shift_nor_on_scale(published, grid):  # Theorem 2
    maps = random_maps(2, 2, 2, 3, *grid)
    shifted = 5 * maps.roll((3, 2), (-2, -1))
    both = [asr.descriptor(m, published=published) for m in (maps, shifted)]
    for before, after in zip(*both):
        close(before, after)
    raw = [asr.descriptor(m, spectrum="raw")[0] for m in (maps, shifted)]
    assert (raw[0] - raw[1]).abs().max() > 1e-3  # the maps themselves do change


def test_spectra_change_at_most_linearly_with_the_map():  # Theorem 2, second half
    """With P the power |F|^2 of A and p = P / sum P, and ||.|| the Euclidean norm:
    ||P(A+E) - P(A)||_1 <= (2 ||A|| + ||E||) ||E|| (Parseval, Cauchy-Schwarz), hence
    ||p(A+E) - p(A)||_1 <= 2 (2 ||A|| + ||E||) ||E|| / ||A||^2. r is made of sums of p, so the bound
    is also its bound; d is without DC, so that ||A|| without its mean counts."""
    maps = random_maps(20, 1, 5, 7)
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))
    without = (maps - maps.mean((-2, -1), keepdim=True)).flatten(1).norm(dim=1)
    for scale in (1e-1, 1e-2, 1e-3):
        e = (scale * noise).flatten(1).norm(dim=1)
        before, after = (asr.head_spectra(m)[1:] for m in (maps, maps + scale * noise))
        for size, a, b in zip((maps.flatten(1).norm(dim=1), without), before, after):
            moved = (b - a).abs().flatten(1).sum(1)
            assert (moved <= 2 * (2 * size + e) * e / size**2 + 1e-5).all()
            assert moved.max() > scale / 50  # they do change


def test_angular_bins_cover_half_a_turn_and_leave_out_dc():
    _, _, radial, angular, cos, sin = asr.bin_table(8, 8)
    published = asr.bin_table(8, 8, (4,))[3]
    assert angular.sum(1).eq(1).all() and radial.sum(1).eq(1).all()
    mirror = torch.arange(64).view(8, 8).roll((-1, -1), (0, 1)).flip(0, 1).flatten()  # -f
    inside = [k for k in range(1, 64) if k // 8 != 4 and k % 8 != 4]  # not on a Nyquist line
    assert angular[inside].equal(angular[mirror[inside]])
    assert not published[inside].equal(published[mirror[inside]])
    close(torch.stack([cos, sin]), torch.stack([cos, sin])[:, mirror])
    rho, _, radial = asr.bin_table(5, 7)[:3]
    assert radial.argmax(1).equal((8 * rho).long().clamp(max=7))
    nearly_down = asr.bin_table(24, 24)[3].view(24, 24, 8)[8, [-1, 0, 1]]
    assert nearly_down.argmax(1).tolist() == [0, 0, 0]  # bins are centered on 0, pi / 8, ...
    maps = random_maps(1, 1, 8, 8)
    (_, r, d), (_, r_brighter, d_brighter) = asr.head_spectra(maps), asr.head_spectra(maps + 1)
    close(d, d_brighter)
    assert r_brighter[..., 0] > r[..., 0] + 0.1


def test_every_token_counts_the_same_however_much_of_its_attention_is_on_the_image():
    maps, words = random_maps(1, 1, 1, 3, 8, 8), torch.tensor([[True, True, False]])
    louder = maps * torch.tensor([1.0, 100.0, 10.0]).view(3, 1, 1)
    mean = (maps / maps.sum((-2, -1), keepdim=True))[:, 0, :, :2].mean(2)
    close(asr.token_average(louder, words), mean)


def test_functional_words(tiny, samples):
    def words(question):
        return [question[a:b] for a, b in asr.functional_spans(question)]

    assert words("What color is the big cup?") == ["What", "color", "is", "cup"]
    expected = "How many cars are left of it".split()
    assert words("How many cars are left of it? A. 2 B. 3") == expected
    assert words("Is the dog running to 3 trees?\nUse one word.") == "Is running 3 trees".split()
    assert words("Name the king or the ring of a wing\nUse it.") == "Name of wing".split()
    assert words("?!") == [] and asr.question_core("why? now") == "why?"
    batch = tiny.batch([replace(samples[1], question="?!"), samples[0]], train=True)
    rows, asked = asr.functional_rows(batch), batch["question_mask"]
    assert rows[0].equal(asked[0])  # no functional word: every word
    ids = batch["input_ids"][1]
    assert tiny.processor.decode(ids[rows[1]]).split() == ["what", "color", "is", "cup"]


def posterior(samples, *flags, t=1, skills=None, **rest):
    skills = skills or [f"skill {k}" for k in range(5)]
    return asr.skill_posterior(samples, t, settings(*flags), skills, **rest)


def test_posterior_of_known_skills_and_of_stages(samples):
    known, task, four = ["--skills", "stream"], ["--prototypes", "task"], {"skills": list("abcd")}
    close(posterior(samples[:5], *known), 0.9375 * torch.eye(5) + 0.0125)
    assert posterior(samples[:5], *known, "--posterior", "hard").equal(torch.eye(5))
    assert not posterior([replace(samples[0], image=None)], *known).any()  # nothing to look at
    assert posterior(samples[:1], *task, t=2, **four).tolist() == [[0.5, 0.5, 0, 0]]
    assert posterior(samples[:1], *task, t=2, **four, learned=True).tolist() == [[0, 0, 1, 0]]
    assert posterior(samples[:2], "--prototypes", "global", skills=["all"]).tolist() == [[1], [1]]


def test_parser_gives_mass_to_the_skills_met_so_far(tiny, samples):
    skills = [f"skill {k}" for k in range(5)]
    questions, parser = tiny.text_means([s.question for s in samples[:40]]), None
    old = [k for k in range(20) if k % 5 < 2]  # stage 1 knows skills 0 and 1, stage 2 brings 2
    new = [k for k in range(20, 40) if k % 5 == 2]
    for stage in (old, new):
        chosen = [samples[k] for k in stage]
        parser = asr.update_parser(parser, questions[stage], chosen, skills)
    assert parser["count"].tolist() == [4, 4, 4, 0, 0]
    close(parser["centroid"][1], questions[[1, 6, 11, 16]].mean(0))
    cosines = torch.cosine_similarity(questions[new][:, None], parser["centroid"][:3], dim=2)
    met = {"parser": parser, "questions": questions[new]}
    pi = posterior(chosen, **met)
    close(pi[:, :3], (cosines / 0.05).softmax(1))
    assert (pi.argmax(1) == 2).all() and not pi[:, 3:].any()
    assert posterior(chosen, "--posterior", "hard", **met).equal(torch.eye(5)[[2] * len(new)])
    asr.update_parser(parser, questions[new] + 1, chosen, skills)  # a skill that returns
    close(parser["centroid"][2], questions[new].mean(0) + 0.5)


def filled_memory(S=3, D=10, known=2):
    """Prototypes of `known` of S skills, made of 60 random samples."""
    torch.manual_seed(0)
    pi = torch.eye(S)[torch.arange(60) % known]
    return asr.update_prototypes(None, torch.randn(60, D), torch.rand(60, 8), pi)


def test_variance_floors():
    memory = filled_memory()
    memory["var"][:, 0] = 0.0  # constant inside the skills by chance
    memory["mean"][0, 0] += 2
    ours = asr.prototype_variance(memory)[:2]
    close(ours[:, 0], (0.1 * memory["mean"][:2, 0].var(correction=0)).expand(2))
    assert ours[:, 1:].equal(memory["var"][:2, 1:])
    assert asr.prototype_variance(memory, published=[7])[0, 0] == torch.tensor(1e-4)
    assert asr.prototype_variance(memory, "mean").eq(memory["var"][:2].mean()).all()


def test_spectral_loss_is_the_formula():
    memory, args = filled_memory(), settings("--lambda_ang", "0.3", "--tau", "2")
    phi, d, pi = torch.randn(4, 10), torch.rand(4, 8), torch.rand(4, 3)
    memory["var"] += 1  # above the floors
    total, q = 0.0, memory["angular"]
    for b, p in enumerate(d / d.sum(1, keepdim=True)):
        D2 = [((phi[b] - memory["mean"][s]) ** 2 / memory["var"][s]).mean() for s in range(2)]
        KL = [((p * (p / q[s]).log()).sum() + (q[s] * (q[s] / p).log()).sum()) / 2 for s in (0, 1)]
        pull = sum(pi[b, s] * (D2[s] + 0.3 * KL[s]) for s in range(2))  # skill 2 has no prototype
        total += math.exp(-min(D2) / 2) * pull / 4
    values = asr.spectral_loss(phi, d, pi, memory, args)
    close(values["spectral"], total)
    assert values["weight"] < 1
    assert asr.spectral_loss(phi, d, pi, memory, settings("--tau", "inf"))["weight"] == 1
    no_d, no_KL = (settings(*flags) for flags in (["--spectrum", "radial"], ["--lambda_ang", "0"]))
    no_d, no_KL = (asr.spectral_loss(phi, d, pi, memory, args) for args in (no_d, no_KL))
    assert no_d["spectral"] == no_KL["spectral"] < values["spectral"]


def test_mean_matching_leaves_the_spread_alone():
    """It sees the mean of a skill's samples; of one sample of each skill it is the usual loss."""
    memory, args = filled_memory(), [settings("--match", match) for match in ("mean", "sample")]
    phi, d, pi = torch.randn(2, 10), torch.rand(2, 8), torch.eye(3)[:2]
    once = [asr.spectral_loss(phi, d, pi, memory, a)["spectral"] for a in args]
    close(*once)
    offset = torch.randn(2, 10)
    wide = torch.cat([phi + offset, phi - offset]), d.repeat(2, 1), pi.repeat(2, 1)
    spread = [asr.spectral_loss(*wide, memory, a)["spectral"] for a in args]
    close(spread[0], once[0])
    assert not torch.isclose(spread[1], once[1])


def test_the_detached_weight_pulls_and_the_published_one_pushes_distant_maps_away():
    memory, pi = filled_memory(known=1), torch.tensor([[1.0, 0.0, 0.0]])
    std = asr.prototype_variance(memory)[0].sqrt()
    for published, pulls in (([], True), (["--published", "6"], False)):
        args = settings("--lambda_ang", "0", *published)
        phi = (memory["mean"][:1] + 1.5 * std).requires_grad_()  # D2 = 2.25
        asr.spectral_loss(phi, torch.ones(1, 8), pi, memory, args)["spectral"].backward()
        assert ((phi.grad * std).sum() > 0) == pulls  # a step against the gradient moves inward


def outcome(*flags):
    """Everything that a number of --published may change, on fixed random maps."""
    args, pi = settings(*flags), torch.tensor([[0.6, 0.3, 0.1]] * 6)  # no prototype of the last
    old, new = (random_maps(6, 2, 2, 3, 8, 8, seed=seed) for seed in (1, 2))
    looks = asr.descriptor(old, published=args.published)[:2]
    memory = asr.update_prototypes(None, *looks, pi)
    new.requires_grad_()
    looks = asr.descriptor(new, published=args.published)[:2]
    loss = asr.spectral_loss(*looks, pi, memory, args)["spectral"]
    loss.backward()
    warm_up = torch.tensor(args.warm_up)
    return {"phi": looks[0], "loss": loss, "gradient": new.grad, "warm_up": warm_up}


CHANGES = dict.fromkeys((1, 2, 3, 4, 5), "phi loss gradient")
CHANGES |= {6: "gradient", 7: "loss gradient", 8: "loss gradient", 16: "warm_up"}


@pytest.mark.parametrize("number", asr.PUBLISHED)
def test_every_number_of_published_alone_changes_what_it_should(number):
    ours, theirs = outcome(), outcome("--published", str(number))
    same = {k: a.shape == theirs[k].shape and a.allclose(theirs[k]) for k, a in ours.items()}
    assert [name for name in same if not same[name]] == CHANGES[number].split()


def adapt(llava):
    """A LoRA that does something: B is zero at first."""
    lora = llava.add_lora(settings("--targets", "q,v,projector", "--dropout", "0"))
    for p in lora:
        torch.nn.init.normal_(p, std=0.05)
    return lora


VARIANTS = ["--published", "--tau inf", "--prototypes mean", "--prototypes global", "--layers 1"]
VARIANTS += ["--spectrum radial", "--spectrum angular", "--spectrum raw"]


@pytest.mark.parametrize("flags", VARIANTS)
def test_every_variant_holds_what_it_remembers(tiny, samples, flags):
    args, stage = settings("--skills", "stream", *flags.split()), data.Stage("", samples, [], "")
    skills = asr.skill_names(args, data.Stream("", [stage], None))
    pi = asr.skill_posterior(samples[:20], 0, args, skills)
    memory = asr.remember(None, tiny, data.Stage("", samples[:20], [], ""), pi, args)
    lora, batch = adapt(tiny), tiny.batch(samples[:5], train=True)
    with asr.capture(tiny, batch, args) as captured:
        tiny.forward(batch)
        looks = asr.descriptor(*asr.attention_maps(captured, tiny), args.spectrum, args.published)
        loss = asr.spectral_loss(*looks[:2], pi[:5], memory, args)["spectral"]
        loss.backward()
    assert loss > 0 and sum(p.grad.abs().sum() for p in lora if p.grad is not None) > 0
    assert (memory["var"].min() >= 1e-4) == (7 in args.published)


def test_a_question_looks_at_its_image_in_tests_as_in_training(llava, samples):
    """Whatever the batches and the padding are; a question without an image looks at nothing."""
    some, means = [*samples[:6], replace(samples[6], image=None)], []
    adapt(llava)
    stage, pi = data.Stage("", some[:6], [], ""), torch.ones(6, 1)
    for size in (2, 6):
        args = settings("--eval_batch_size", str(size))
        means.append(asr.remember(None, llava, stage, pi, args)["mean"][0, :20])
    args.prototype_samples = 4
    assert asr.remember(None, llava, stage, pi, args)["count"].tolist() == [4]
    texts, notes = asr.answer(llava, args, {("first", "1")}, some)
    phi = torch.tensor(np.stack([note["phi"] for note in notes]))
    close(means[0], means[1])
    close(phi[:6, :20].mean(0), means[0])
    assert texts == llava.answer(some) and phi[6].isnan().all()
    assert ["map" in note for note in notes] == [k == 1 for k in range(7)]
    assert notes[1]["map"].shape == llava.grid and notes[1]["map"].sum() == pytest.approx(1)
    _, (note,) = asr.answer(llava, args, set(), some[6:])  # a batch without any image
    assert np.isnan(note["phi"]).all()


def test_the_reference_of_the_geometry_is_the_pretrained_model(llava, samples):
    args, batch = settings("--eval_batch_size", "3"), llava.batch(samples[:5], train=True)
    hidden, adapted = llava.forward(batch).last_hidden_state, adapt(llava)
    before = asr.reference_embeddings(llava, samples[:5], args)
    for k, name in enumerate(("image_mask", "question_mask")):
        means = [row[mask].mean(0) for row, mask in zip(hidden, batch[name])]
        close(before[:, k], torch.stack(means))
    now = asr.embeddings(llava.forward(batch), batch)
    assert adapted and asr.geometry_loss(*now, *before.unbind(1)) > 0


def test_a_step_does_not_depend_on_how_it_is_cut(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(asr.plot, "asr", lambda runs: None)
    small = "--order one,two --limit 8 --limit_test 1 --epochs 1 --dropout 0 --gamma 0 --lr 1e-3"
    logs = []
    for cut in ("1", "4"):
        more = [*small.split(), "--accumulate", cut, "--out", str(tmp_path / cut)]
        asr.main(asr.parse([*flags, *more]))
        lines = (tmp_path / cut / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert [line["spectral"] > 0 for line in logs[0]] == [False, False, True, True]
    for name in ("loss", "task", "spectral", "distance", "weight", "gradient_norm"):
        whole, cut = ([line[name] for line in log] for log in logs)
        assert cut == pytest.approx(whole, rel=1e-3), name
