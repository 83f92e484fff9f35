"""Our functions against numbers computed by the authors' public code (tests/golden/asr_golden.npz).

The file stores inputs and outputs. The public code averages over tokens before it normalizes, keeps
DC, uses bins over [-pi, pi), rescales the posterior over the skills that have a prototype and does
not detach the weight: switches of the same functions that `asr.py` trains with.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import asr
import eval as evaluation

GOLDEN = np.load(Path(__file__).parent / "golden" / "asr_golden.npz")
VALUE, GRADIENT = 1e-5, 5e-5  # allowed error, relative to the largest entry of each array
CASES = range(6)
PUBLISHED = dict(weight="published", kind="paper", renormalize=True)


def g(name):
    return torch.from_numpy(np.asarray(GOLDEN[name])) if name in GOLDEN.files else None


def close(ours, name, tolerance=VALUE):
    theirs = GOLDEN[name].astype(np.float64)
    ours = np.asarray(torch.as_tensor(ours).detach(), dtype=np.float64)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def memory_of(prefix):
    names = ("mean", "var", "angular")
    return {n: g(prefix + n).clone() for n in names} | {"count": g(prefix + "init").clone()}


@pytest.mark.parametrize("i", CASES)
def test_bins(i):
    h, w = GOLDEN[f"c{i}_attn"].shape[-2:]
    rho, theta, radial, angular = asr.bin_table(h, w, "paper")[:4]
    close(rho, f"c{i}_rho")
    close(theta, f"c{i}_theta")
    assert (radial.argmax(1).numpy() == GOLDEN[f"c{i}_radial_bin"]).all()
    assert (angular.argmax(1).numpy() == GOLDEN[f"c{i}_angular_bin"]).all()


@pytest.mark.parametrize("i", CASES)
def test_descriptor_and_its_gradient(i):
    attn, mask = g(f"c{i}_attn").requires_grad_(), g(f"c{i}_mask")
    maps = asr.token_average(attn[:, -4:], mask, average_first=True)
    close(maps, f"c{i}_maps")
    close(asr.head_spectra(maps, "paper")[0], f"c{i}_per_head")
    phi, angular, radial = asr.descriptor(attn[:, -4:], mask, "paper", average_first=True)
    close(phi, f"c{i}_descriptor")
    close(angular, f"c{i}_angular")
    close(radial, f"c{i}_radial")
    (phi * g(f"c{i}_probe_coef")).sum().backward()
    close(attn.grad, f"c{i}_probe_grad_attn", GRADIENT)


@pytest.mark.parametrize("i", CASES)
def test_spectral_loss_and_its_gradient(i):
    attn, memory = g(f"c{i}_attn").requires_grad_(), memory_of(f"c{i}_mem_")
    phi, angular, _ = asr.descriptor(attn[:, -4:], g(f"c{i}_mask"), "paper", average_first=True)
    loss, D2, w = asr.spectral_loss(phi, angular, g(f"c{i}_probs"), memory, **PUBLISHED)
    close(D2, f"c{i}_d2")
    close(asr.symmetric_kl(angular[:, None], memory["angular"]), f"c{i}_symkl")
    close(D2[:, memory["count"] > 0].amin(1), f"c{i}_dmin")
    close(w, f"c{i}_weight")
    close(loss, f"c{i}_loss")
    loss.backward()
    close(attn.grad, f"c{i}_loss_grad_attn", GRADIENT)


@pytest.mark.parametrize("i", (0, 3))
def test_variants_of_the_descriptor(i):
    attn, mask = g(f"c{i}_attn"), g(f"c{i}_mask")
    h, w = attn.shape[-2:]
    phi, angular, radial = asr.descriptor(attn, mask, "paper", average_first=True)
    # std: sqrt(var + eps) instead of the variance
    close(torch.cat([phi[:, :27], (phi[:, 27:] + asr.EPS).sqrt()], 1), f"c{i}_std_descriptor")
    close(angular, f"c{i}_std_angular")
    close(radial, f"c{i}_std_radial")
    # raw: frequencies u / h, v / w without wrapping, as the paper prints them
    bins = asr.bin_table(h, w, "paper", wrapped=False)
    raw = asr.descriptor(attn, mask, "paper", average_first=True, bins=bins)
    for ours, name in zip(raw, ("descriptor", "angular", "radial"), strict=True):
        close(ours, f"c{i}_raw_{name}")
    # bwd: FFT without 1 / sqrt(hw) and the peak's power not normalised: p* times the total power,
    # which is hw * sum of squares (Parseval)
    maps = asr.token_average(attn, mask, average_first=True)
    per_head = asr.head_spectra(maps, "paper")[0]
    per_head[..., -1] *= h * w * (maps**2).sum((-2, -1))
    bwd = torch.cat([per_head.mean(1), per_head.var(1, correction=0)], 1)
    close(bwd, f"c{i}_bwd_descriptor")
    close(angular, f"c{i}_bwd_angular")
    close(radial, f"c{i}_bwd_radial")


def test_divergences():
    close(asr.symmetric_kl(g("kl_p"), g("kl_q")), "kl_symmetric")
    close(asr.js_divergence(GOLDEN["kl_p"], GOLDEN["kl_q"]), "kl_jsd")
    close(asr.high_frequency_loss(GOLDEN["hf_prev"], GOLDEN["hf_cur"]), "hf_loss_rho0_3")


def test_prototype_memory_over_two_updates():
    memory = asr.new_prototypes(5, 54, 8)
    before = np.zeros(5)
    for k in (1, 2):
        asr.update_prototypes(memory, g(f"mem_desc{k}"), g(f"mem_ang{k}"), g(f"mem_probs{k}"))
        for name in ("mean", "var", "angular"):
            close(memory[name], f"mem_after{k}_{name}")
        count = memory["count"].numpy()
        assert (count == GOLDEN[f"mem_after{k}_count"]).all()
        assert ((count > 0) == GOLDEN[f"mem_after{k}_init"]).all()
        assert (count - before == GOLDEN[f"mem_selected{k}"]).all()
        before = count.copy()


@pytest.mark.parametrize(
    "name, scale, settings",
    [
        ("default", 1, dict()),
        # distance not divided by D = 54 and tau = 54: the same weight, everything else times 54
        ("unnorm_tau54", 54, dict(lambda_ang=0.1 / 54)),
        ("lam1_tau4", 1, dict(lambda_ang=1.0, tau=4.0)),
    ],
)
def test_spectral_loss_on_that_memory(name, scale, settings):
    memory = memory_of("mem_after2_")
    phi, angular = g("sl_desc").requires_grad_(), g("sl_ang").requires_grad_()
    pi = g("sl_probs")
    loss = scale * asr.spectral_loss(phi, angular, pi, memory, **PUBLISHED, **settings)[0]
    close(loss, f"sl_{name}_loss")
    loss.backward()
    close(phi.grad, f"sl_{name}_grad_desc", GRADIENT)
    close(angular.grad, f"sl_{name}_grad_ang", GRADIENT)
    rows = [(phi[k : k + 1], angular[k : k + 1], pi[k : k + 1]) for k in range(len(pi))]
    alone = [scale * asr.spectral_loss(*r, memory, **PUBLISHED, **settings)[0] for r in rows]
    close(torch.stack(alone), f"sl_{name}_per_row")


@pytest.mark.parametrize("i", range(3))
def test_geometry_loss_and_its_gradient(i):
    image, text = g(f"geo{i}_img").requires_grad_(), g(f"geo{i}_txt").requires_grad_()
    loss = asr.geometry_loss(image, text, g(f"geo{i}_ref_img"), g(f"geo{i}_ref_txt"))
    close(loss, f"geo{i}_loss")
    loss.backward()
    close(image.grad, f"geo{i}_grad_img", GRADIENT)
    close(text.grad, f"geo{i}_grad_txt", GRADIENT)


@pytest.mark.parametrize("i", range(3))
def test_metrics(i):
    matrix = GOLDEN[f"metric{i}_matrix"].astype(np.float64)
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    ours = evaluation.metrics(matrix)
    close([ours[name] for name in ("AP", "AF", "Last", "Avg")], f"metric{i}_ap_af_last_avg")
