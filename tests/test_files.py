"""Broken files, full disks, second processes, Ctrl-C: one sentence, and nothing is lost."""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import answer, flags, stream

import eval as ev
import files
from files import InputError
from model import check_finite, read_lora, write_tensors


def gray(kind, low, high):
    """A gradient from low to high in 16 pixels."""
    return Image.fromarray(np.linspace(low, high, 16).reshape(1, 16).astype(kind))


@pytest.mark.parametrize(
    "name, image",
    [
        ("x.png", gray(np.uint16, 0, 65535)),
        ("x.png", gray(np.uint16, 100, 4095)),  # 12 bits, as scanners have them
        ("x.tif", gray(np.int32, -70000, 70000)),
        ("x.tif", gray(np.float32, 0, 1)),
    ],
)
def test_gray_images_of_16_and_32_bits(name, image, tmp_path):
    image.save(tmp_path / name)
    pixels = np.array(files.load_image(tmp_path / name))
    assert pixels.shape == (1, 16, 3)
    np.testing.assert_allclose(pixels[0, :, 0], np.linspace(0, 255, 16), atol=1)


def test_images_that_are_refused(tmp_path):
    Image.new("L", (files.LARGEST + 1, 1)).save(tmp_path / "wide.png")
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    (tmp_path / "program.png").write_text(postscript)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    messages = {"wide": "10001 x 1 pixels", "program": "cannot identify", "cut": "truncated"}
    for name in ("wide", "program", "pipe", "folder", "cut", "absent"):
        with pytest.raises(InputError, match=f"{name}.png.*{messages.get(name, 'is no file')}"):
            files.load_image(tmp_path / f"{name}.png")


def test_json_that_is_no_json(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"\xef\xbb\xbf[1]", b"[1]"):  # with the byte-order mark that editors add
        path.write_bytes(content)
        assert files.read_json(path, list) == [1]
    for content in (b"", b"\xff\xfe[\x00", b"[" * 100_000, b"{1}"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="x.json is corrupt or truncated"):
            files.read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="x.json is no file"):
        files.read_json(path)


def test_a_run_folder_belongs_to_one_process(tmp_path, monkeypatch):
    run = ev.Run(flags(tmp_path), stream(), "asr").folder
    code = "import files, pathlib, sys; files.lock(pathlib.Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert "belongs to a run that is not over" in second.stderr
    files.locks.pop(run).close()  # as when the first process ends
    assert subprocess.run([sys.executable, "-c", code, run]).returncode == 0


def saved(folder):
    """A run that has been killed after its first stage: step 1 is logged, a checkpoint is there."""
    run = ev.Run(flags(folder), stream(), "asr")
    list(run.steps(0, 1))
    run.log(0, loss=0.5, gradient_norm=1.0)
    run.test(0, answer)
    run.save((1, 0), lora={"A": torch.arange(64.0)})
    return run.folder


def resumed(folder):
    return ev.Run(flags(folder, resume=True), stream(), "asr").resume()


def test_a_flipped_bit_is_found(tmp_path):
    """In 60 places of a checkpoint and of an adapter: refused, or of no effect."""
    checkpoint = saved(tmp_path / "run") / "checkpoint.pt"
    write_tensors(tmp_path / "adapter_model.safetensors", {"a.lora_A.weight": torch.arange(64.0)})
    (tmp_path / "adapter_config.json").write_text("{}")
    readers = {
        checkpoint: lambda: resumed(tmp_path / "run")["lora"]["A"],
        tmp_path / "adapter_model.safetensors": lambda: read_lora(tmp_path)["a.lora_A.weight"],
    }
    for path, read in readers.items():
        content, refused = path.read_bytes(), 0
        for place in np.linspace(0, len(content) - 1, 60).astype(int):
            broken = bytearray(content)
            broken[place] ^= 1 << place % 8
            path.write_bytes(broken)
            try:
                assert torch.equal(read(), torch.arange(64.0)), place
            except InputError:
                refused += 1
        path.write_bytes(content)
        assert refused > 20 and torch.equal(read(), torch.arange(64.0))


@pytest.mark.parametrize("name", ["checkpoint.pt", "facts.npz", "metrics.jsonl"])
def test_a_broken_file_of_a_run_is_named(name, tmp_path):
    path, other = saved(tmp_path / "run") / name, saved(tmp_path / "other") / name
    assert resumed(tmp_path / "run")["at"] == (1, 0)
    whole = path.read_bytes()
    foreign = b"\x80\x04 no file of ours" if name != "metrics.jsonl" else b'{"step": 2}\n'
    for content in (b"", whole[: len(whole) // 2], foreign):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is damaged, .*start the run anew"):
            resumed(tmp_path / "run")
    path.unlink()
    if name == "checkpoint.pt":  # a run of other flags
        ev.write_bytes(other, other.read_bytes())
        run = ev.Run(flags(tmp_path / "third", tau=2.0), stream(), "asr")
        run.save((0, 1))
        os.replace(run.folder / name, path)
    with pytest.raises(InputError, match=f"missing file .*{name}|belongs to another run"):
        resumed(tmp_path / "run")


def test_the_machine_is_not_the_fault_of_a_file(tmp_path):
    """Only what a file holds makes it damaged; a run is not begun anew because memory was short."""
    for error in (
        MemoryError(),
        OSError(errno.EACCES, "no"),
        RuntimeError("can't allocate memory"),
    ):
        with pytest.raises(type(error)), files.damaged("checkpoint.pt"):
            raise error
    with pytest.raises(InputError, match="is damaged"), files.damaged("checkpoint.pt"):
        raise RuntimeError("unexpected end")


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    run = saved(tmp_path / "run")
    before = (run / "checkpoint.pt").read_bytes()

    def full(file):
        if os.fstat(file).st_mtime > os.stat(run / "metrics.jsonl").st_mtime:  # not the log again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ev.Run(flags(run, resume=True), stream(), "asr").save((1, 0))
    assert (run / "checkpoint.pt").read_bytes() == before
    assert resumed_after_part(run, monkeypatch)["at"] == (1, 0)


def resumed_after_part(run, monkeypatch):
    monkeypatch.undo()
    assert (run / "checkpoint.pt.part").exists()  # what the full disk has left is ignored
    return resumed(run)


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (KeyboardInterrupt(), 130, "stopped; the same command with --resume goes on in /.*/run"),
        (InputError("no."), 2, "error: no."),
        (OSError(28, "No space left", "f"), 2, "error: cannot read or write f: .*--resume"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory.; lower -"),
    ],
)
def test_how_a_script_ends(error, code, sentence, monkeypatch, capsys, tmp_path):
    files.write_json(tmp_path / "run" / "args.json", {})
    monkeypatch.setattr(files, "locks", {tmp_path / "run": None, tmp_path / "deleted": None})
    with pytest.raises(SystemExit) as end, files.input_errors():
        raise error
    assert end.value.code == code
    assert re.match(sentence, line := capsys.readouterr().err) and line.count("\n") == 1
    with pytest.raises(RuntimeError, match="illegal memory access"), files.input_errors():
        raise RuntimeError("an illegal memory access")  # a bug keeps its traceback


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    run, optimizer = ev.Run(flags(tmp_path / "run"), stream(), "asr"), torch.optim.SGD([weight], 1)
    run.save((0, 1), optimizer)
    before = (run.folder / "checkpoint.pt").read_bytes()
    weight.data[1] = torch.nan
    with pytest.raises(InputError, match="not finite: try a lower --lr"):
        run.save((0, 2), optimizer)
    assert (run.folder / "checkpoint.pt").read_bytes() == before
    check_finite([torch.ones(3)])


def test_an_edited_summary_is_found(tmp_path, capsys):
    from test_eval import make_run

    run = make_run(tmp_path / "run")
    text = (run / "summary.json").read_text()
    for edited in ("99.0", "null"):
        (run / "summary.json").write_text(re.sub(r"\b89(\.0)?\b", edited, text))
        assert ev.main([str(run)]) == 1
        assert f"the record {edited.replace('null', 'nan')}" in capsys.readouterr().out


def test_progress_in_a_file_is_a_line_a_minute(monkeypatch, capsys):
    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    bar = files.progress(range(40), "test color")
    bar._time = lambda: next(clock)
    assert list(bar) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8 and all(line.startswith("test color: ") for line in lines)
