"""Attacks: what a user, a disk or a stranger's file can do to a run.

    python tests/attacks.py [NAME ...]    all, or those whose name contains a word; some minutes

Every attack is a case of its own. It is handled well if the program works, which is checked, or if
it ends with exit code 2 (130 after Ctrl-C) and one line that begins with "error: ", and nothing
that was computed is lost. A traceback, a hang, a wrong number or silence is bad. Not part of the
test suite. The attacks are children of this process, forked, so that they start at once.
"""

import hashlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import eval  # noqa: E402
import files  # noqa: E402
import plot  # noqa: E402

HOME = Path(tempfile.mkdtemp(prefix="attacks-"))
SCRIPTS = ("asr", "cram", "mllm_cl", "baselines")
COUNT = itertools.count()


# ---- 1. A small stream, and programs that run as children ----------------------------------------


def new(name="x"):
    """A path that does not exist yet."""
    return HOME / f"{next(COUNT)}" / name


def make_stream(root=None, stages=("one", "two"), spec=None, change=lambda split, k, record: None):
    """A stream of drawn squares: 6 training and 4 test questions a stage."""
    root = root or new("stream")
    rng = np.random.default_rng(0)
    for stage in stages:
        (root / stage).mkdir(parents=True)
        for split, n in (("train", 6), ("test", 4)):
            records = []
            for k in range(n):
                name, answer = f"{split}{k}.png", ("red", "blue")[k % 2]
                image = Image.new("RGB", (64, 64), answer)
                image.paste((0, 0, 0), tuple(rng.integers(0, 30, 2)) + (60, 60))
                image.save(root / stage / name)
                turns = [{"from": "human", "value": "<image>\nwhat color is it?"}]
                turns += [{"from": "gpt", "value": answer}]
                record = {"id": str(k), "image": name, "skill": ("a", "b")[k % 2]}
                asked = {"text": "what color is it?", "answer": answer}
                record |= {"conversations": turns} if split == "train" else asked
                change(split, k, record)
                records.append(record)
            (root / stage / f"{split}.json").write_text(json.dumps(records))
    if spec is not None:
        text = spec if isinstance(spec, str) else json.dumps(spec)
        (root / "stream.json").write_text(text)
    return root


def words_of(script, stream, out, *further):
    """A command: two steps a stage, a checkpoint after each (SAVE_EVERY is 1 here)."""
    words = [f"{script}.py", "--stream", stream, "--out", out, "--epochs", 1, "--batch_size", 3]
    words += {"cram": ["--rank", 4], "mllm_cl": ["--shots", 2, "--router_steps", 1]}.get(script, [])
    return [str(word) for word in [*words, "--threads", 1, *further]]


def start(words, before=lambda: None, figures=False):
    """Fork: run `before`, then the command; (process id, folder of its stdout and stderr)."""
    log = new("log")
    log.mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child, log
    code = 1
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = words
        torch.set_num_threads(1)
        eval.SAVE_EVERY = 1
        if not figures:
            for name in SCRIPTS:
                setattr(plot, name, lambda *_: "none")
        before()
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def end(child, log, timeout=120):
    """(exit code or -signal or "hang", stdout, stderr) of a started command."""
    deadline = time.time() + timeout
    code = "hang"
    while time.time() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code, (log / "out").read_text(), (log / "err").read_text()


def run(words, before=lambda: None, figures=False):
    return end(*start([str(word) for word in words], before, figures))


def refused(result, about="", code=2):
    """ "" if a command has ended in one sentence that names `about`, else what it did instead."""
    got, _, err = result
    lines = [line for line in err.splitlines() if line]
    if got != code:
        return f"exit code {got}: {lines[-1:]}"
    if len(lines) != 1 and not lines[0].startswith("usage: "):
        return f"{len(lines)} lines on stderr: {lines[-3:]}"
    if not re.search(about, lines[-1]):
        return f"the sentence is: {lines[-1]}"
    return "" if "error: " in lines[-1] or code == 130 else lines[-1]


def works(result, wanted=True):
    """ "" if a command has succeeded and `wanted` holds."""
    got, _, err = result
    return (
        f"exit code {got}: {err.splitlines()[-1:]}" if got else ("" if wanted else "wrong result")
    )


def contents(run):
    """{file: digest} of what must be equal in equal runs, with the numbers of the record."""
    names = [*run.glob("matrix.json"), *run.glob("metrics.jsonl"), *run.glob("facts.npz")]
    names += [*run.glob("predictions/*"), *run.rglob("*.safetensors"), *run.glob("experts.pt")]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names
    }


def finished(script, *further, cache={}):  # noqa: B006
    """(stream, folder) of an uninterrupted run, made once; use a copy of it."""
    key = (script, *further)
    if key not in cache:
        stream, out = make_stream(), new("run")
        code, _, err = run(words_of(script, stream, out, *further))
        assert code == 0, err
        cache[key] = stream, out
    return cache[key]


def killed(script, *further, point="log", n=3):
    """(stream, folder, command) of a run that SIGKILL ended after the n-th call of Run.<point>."""
    stream, out = finished(script, *further)[0], new("run")
    words = words_of(script, stream, out, *further)
    code, _, err = run(words, lambda: interrupt(point, n, signal.SIGKILL))
    assert code == -signal.SIGKILL, (code, err)
    return stream, out, words


def interrupt(point, n, number):
    """Send this process a signal after the n-th call of Run.<point>."""
    calls, method = itertools.count(1), getattr(eval.Run, point)

    def call(*args, **values):
        result = method(*args, **values)
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return result

    setattr(eval.Run, point, call)


def goes_on(script, out, words, *further):
    """ "" if --resume ends with the same bytes as the run that was never interrupted."""
    bad = works(run([*words, "--resume"]))
    same = bad or contents(out) == contents(finished(script, *further)[1])
    return bad or ("" if same else "other bytes than without the interruption")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def copy(script, *further):
    """(stream, copy of a finished run, its command)."""
    stream, made = finished(script, *further)
    out = new("run")
    shutil.copytree(made, out)
    return stream, out, words_of(script, stream, out, *further)


def twin(out, words):
    """A copy of a run folder, and the command that goes on in it."""
    copied = new("run")
    shutil.copytree(out, copied)
    return copied, [str(copied) if word == str(out) else word for word in words]


def check(stream, *further):
    return run(["data.py", "--stream", stream, *further])


# ---- 2. F1 to F18: (case, "" or what is bad) -----------------------------------------------------


def f1_gray_images():
    for kind, low, high, name in (
        (np.uint16, 0, 65535, "16 bit.png"),
        (np.uint16, 500, 4000, "12 bit.png"),
        (np.int32, -9, 9000, "32 bit.tif"),
        (np.float32, 0, 1, "float.tif"),
        (np.float32, -1e6, 1e6, "large float.tif"),
    ):
        path = new(name)
        path.parent.mkdir()
        Image.fromarray(np.linspace(low, high, 64).reshape(8, 8).astype(kind)).save(path)
        pixels = np.array(files.load_image(path))[:, :, 0].ravel()
        bad = np.abs(pixels - np.linspace(0, 255, 64)).max() > 1
        yield name, "no gradient any more" if bad else ""


def f2_two_processes():
    for script, further in (("asr", ()), ("cram", ("--resume",)), ("mllm_cl", ("--resume",))):
        stream, out = finished(script)[0], new("run")
        words = words_of(script, stream, out)
        first = start(words, lambda: interrupt("log", 2, signal.SIGSTOP))
        os.waitpid(first[0], os.WUNTRACED)
        bad = refused(run([*words, *further]), "not over")
        yield f"{script} {' '.join(further)} beside a living one", bad
        os.kill(first[0], signal.SIGCONT)
        bad = works(end(*first))
        same = bad or contents(out) == contents(finished(script)[1])
        yield f"{script}: the first one is not disturbed", bad or ("" if same else "it is")
    _, out, words = killed("asr")
    yield "a lock does not outlive a kill", goes_on("asr", out, words)


def f3_flipped_bits():
    for script in ("asr", "cram", "mllm_cl"):
        _, out, words = killed(script, n=4)
        for path in [out / "checkpoint.pt", out / "facts.npz", *out.rglob("*.safetensors")][:3]:
            for place in np.linspace(7, path.stat().st_size - 9, 4).astype(int):
                copied, again = twin(out, words)
                flip(copied / path.relative_to(out), place)
                result = run([*again, "--resume"])
                bad = refused(result, "damaged")
                if result[0] == 0:  # a bit that nobody reads
                    same = contents(copied) == contents(finished(script)[1])
                    bad = "" if same else "accepted, and other numbers come out"
                yield f"{script}: bit in byte {place} of {path.name}", bad


def f4_killed_while_drawing():
    for script in SCRIPTS:
        words = words_of(script, finished(script)[0], out := new("run"))

        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        run(words, lambda script=script, kill=kill: setattr(plot, script, kill), figures=True)
        early = (out / "summary.json").exists()
        bad = works(run([*words, "--resume"], figures=True), not early)
        drawn = {path.name for path in (out / "figures").glob("*.png")}
        missing = {"matrix.png", "accuracy.png", "loss.png"} - drawn
        yield script, bad or (f"missing: {missing}" if missing else "")


def f5_broken_files():
    for script in ("asr", "mllm_cl"):
        _, out, words = killed(script, n=4)
        paths = [out / "checkpoint.pt", out / "metrics.jsonl", out / "facts.npz"]
        paths += [*out.rglob("adapter_model.safetensors"), *out.rglob("adapter_config.json")][:2]
        for path in filter(Path.exists, paths):
            half = path.read_bytes()[: path.stat().st_size // 2]
            kinds = {"empty": b"", "cut": half, "foreign": b"\x00\x01" * 99, "missing": None}
            for kind, content in kinds.items():
                copied, again = twin(out, words)
                broken = copied / path.relative_to(out)
                broken.unlink() if content is None else broken.write_bytes(content)
                result = run([*again, "--resume"])
                bad = refused(result, "damaged|missing|corrupt")
                if (path.name, kind) == ("checkpoint.pt", "missing"):
                    bad = works(result, "from the beginning" in result[1])
                yield f"{script}: {path.name} {kind}", bad


def f6_full_disks():
    for script in ("asr", "cram", "mllm_cl"):
        for most in (3_000, 100_000, 300_000):  # bytes of a file
            words = words_of(script, finished(script)[0], out := new("run"))

            def limit(most=most):
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

            result = run(words, limit)
            bad = works(result) if result[0] == 0 else refused(result, "File too large.*--resume")
            yield f"{script}: files of {most} bytes", bad or goes_on(script, out, words)
    words = words_of("asr", finished("asr")[0], out := new("run"))
    result = run(words, lambda: during_log(lambda: shutil.rmtree(out)))
    yield "the folder is deleted", refused(result, "cannot read or write")
    yield "no folder can be made", refused(run(words_of("asr", finished("asr")[0], "/proc/x/y")))
    (blocked := new("file")).parent.mkdir()
    blocked.write_text("precious")
    yield "--out is a file", refused(run(words_of("cram", finished("cram")[0], blocked)))


def during_log(action):
    """Call action() once, in the second step."""
    calls, method = itertools.count(1), eval.Run.log

    def log(*args, **values):
        if next(calls) == 2:
            action()
        return method(*args, **values)

    eval.Run.log = log


def f7_ctrl_c():
    for script, point in (("asr", "log"), ("cram", "test"), ("mllm_cl", "save"), ("asr", "note")):
        words = words_of(script, finished(script)[0], out := new("run"))
        result = run(words, lambda point=point: interrupt(point, 2, signal.SIGINT))
        bad = refused(result, "--resume", 130)
        yield f"{script} in {point}", bad or goes_on(script, out, words)
    result = run(["data.py", "--stream", make_stream()], lambda: interrupt_loading())
    yield "data.py", refused(result, "stopped", 130)


def interrupt_loading():
    def load_image(path):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    data.load_image = files.load_image = load_image


def f8_long_questions():
    def long(split, field, n):
        def change(now, k, record):
            if now == split and k == 2:
                turn = record["conversations"][field == "answer"] if split == "train" else record
                key = "value" if split == "train" else {"question": "text"}.get(field, field)
                turn[key] += " word" * n

        return change

    for split, field, n in (("train", "question", 6000), ("train", "answer", 20_000)):
        stream = make_stream(change=long(split, field, n))
        bad = refused(run(words_of("asr", stream, new())), "sample 2: .* tokens")
        yield f"{split}: {field} of {n} words", bad
    stream = make_stream(change=long("test", "question", 1500))
    yield "test: just too long", refused(run(words_of("cram", stream, new())), "sample 2")
    code, out, _ = check(stream)
    yield "data.py", "" if code == 1 and "sample 2: " in out else f"exit code {code}"
    stream = make_stream(change=long("test", "question", 100))
    yield "long, but it fits", works(run(words_of("asr", stream, new())))


def f9_programs_as_images():
    for name, content in (
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"),
        ("pdf", b"%PDF-1.4\n1 0 obj <<>> endobj\n"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("fits", b"SIMPLE  =                    T" + b" " * 3000),
    ):
        stream = make_stream()
        (stream / "one" / "train0.png").write_bytes(content)
        yield name, refused(run(words_of("asr", stream, new())), "train0.png is corrupt")


def f10_stage_names():
    for names in (("v1.2", "..x"), ("a b", "颜色"), ("$x^2$", "n" * 100), ("-", "1-1-map")):
        stream = make_stream(stages=names, spec={"stages": names})
        for script in ("asr", "mllm_cl"):
            yield (
                f"{script}: {names}"[:60],
                works(run(words_of(script, stream, new()), figures=True)),
            )
    for names in (("one", "one"), ("one", ".."), ("one", "../two"), ("one", 7), ("one", "")):
        stream = make_stream(spec={"stages": names})
        yield f"{names}", refused(run(words_of("mllm_cl", stream, new())), "stream.json")


def f11_marks_and_surrogates():
    for name, split, value in (
        ("<image> in an answer", "train", "a <image> b"),
        ("a surrogate in an answer", "train", "a \ud83d b"),
        ("a surrogate in a gold answer", "test", "\udfff"),
        ("<image> in a gold answer", "test", "<image>"),
    ):

        def change(now, k, record, split=split, value=value):
            if now == split == "test":
                record["answer"] = value
            elif now == split:
                record["conversations"][1]["value"] = value

        yield name, refused(run(words_of("asr", make_stream(change=change), new())), "record 1")
    for text in ("an <image>", "\ud800", ["x"]):
        stream = make_stream(spec={"descriptions": {"one": text}})
        yield f"description {text!a}", refused(run(words_of("mllm_cl", stream, new())), "descript")


def f12_first_moment():
    for left in (("args.json.part",), ("lock",), ("lock", "args.json"), ("checkpoint.pt.part",)):
        stream, out = finished("asr")[0], new("run")
        out.mkdir(parents=True)
        for name in left:
            (out / name).write_text("")
        yield f"left: {', '.join(left)}", works(run(words_of("asr", stream, out)))


def f13_flags():
    for script, flags in (
        ("asr", f"--seed {10**30}"),
        ("asr", "--seed -1"),
        ("cram", f"--rank {10**12}"),
        ("baselines", "--rank 5000"),
        ("asr", f"--threads {10**9}"),
        ("asr", "--device cuda:9999"),
        ("asr", "--device cuda:99999999999999999999"),
        ("asr", "--device tpu"),
        ("cram", "--sigma_share nan"),
        ("cram", "--lambda_orth inf"),
        ("asr", "--layers 99"),
        ("asr", f"--out {'x' * 5000}"),
        ("asr", f"--stream {'y' * 5000}"),
        ("asr", f"--model {'z' * 5000}"),
        ("mllm_cl", f"--experts {HOME}"),
        ("baselines", "--method ewc --buffer 10"),
    ):
        words = words_of(script, finished(script)[0], new(), *flags.split())
        yield f"{script} {flags}"[:50], refused(run(words))


def f14_odd_files():
    yield "metric: a list", refused(check(make_stream(spec={"metric": ["exact"]})), "metric")
    yield "metrics: a list", refused(check(make_stream(spec={"metrics": {"one": {}}})), "metric")
    yield "stream.json: a list", refused(check(make_stream(spec=[])), "stream.json")
    yield "nested JSON", refused(check(make_stream(spec="[" * 100_000)), "stream.json")
    (stream := make_stream()).joinpath("one", "test.json").write_text("[" * 100_000)
    yield "nested records", refused(run(words_of("asr", stream, new())), "test.json")
    for file in ("one/train0.png", "two/test.json"):
        path = (stream := make_stream()) / file
        path.unlink()
        os.mkfifo(path)
        yield f"{file} is a pipe", refused(run(words_of("asr", stream, new())), path.name)
    path = (stream := make_stream()) / "one" / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    yield "UTF-8 with BOM", works(run(words_of("asr", stream, new())))
    path.write_bytes(path.read_text("utf-8-sig").encode("utf-16"))
    yield "UTF-16", refused(run(words_of("asr", stream, new())), "train.json")
    stream = make_stream(change=lambda split, k, record: record.update(id="same"))
    result = run(words_of("mllm_cl", stream, out := new("run")))
    again = run(["eval.py", out])
    yield "equal ids", works(result, "have another's id" in result[1]) or works(again)
    Image.new("1", (13_000, 13_000)).save((stream := make_stream()) / "one" / "train0.png")
    yield "13,000 x 13,000 pixels", refused(run(words_of("asr", stream, new())), "13000 x 13000")
    (stream := make_stream()).joinpath("two", "test3.png").write_bytes(b"")
    code, out, _ = check(stream)
    yield "data.py finds an empty image", "" if code == 1 and "test3.png" in out else f"code {code}"


def f15_damaged_runs():
    for script in ("asr", "cram", "mllm_cl"):
        _, out, _ = copy(script)
        for name in ("args.json", "matrix.json", "summary.json", "facts.npz", "metrics.jsonl"):
            whole = (out / name).read_bytes()
            for kind, content in (
                ("empty", b""),
                ("cut", whole[: len(whole) // 2]),
                ("a list", b"[]"),
                ("an object", b"{}"),
                ("other types", re.sub(rb"\d+\.\d+", b'"x"', whole)),
            ):
                (out / name).write_bytes(content)
                for words in (["eval.py", out], [f"{script}.py", "--plot", out]):
                    result = run(words, figures=True)
                    bad = "" if result[0] in (0, 1) and not result[2] else refused(result)
                    yield f"{words[0]} {name} {kind}", bad
            (out / name).write_bytes(whole)
        path = out / "predictions" / "after-2-on-1.jsonl"
        for content in (b"", b"[1]\n", b"{}\n", b'{"text": 3, "answers": 4, "score": "x"}\n'):
            path.write_bytes(content)
            for words in (["eval.py", out], [f"{script}.py", "--plot", out]):
                result = run(words, figures=True)
                bad = "" if result[0] in (0, 1) and not result[2] else refused(result)
                yield f"{words[0]} {path.name}: {content[:9]}", bad


def f16_edited_numbers():
    _, out, _ = copy("asr")
    path = out / "summary.json"
    record = json.loads(path.read_text())
    for name, change in (
        ("matrix", {"matrix": [[99.0, None], [99.0, 99.0]]}),
        ("a cell", {"matrix": [record["matrix"][0], [12.5, record["matrix"][1][1]]]}),
        ("scorers", {"scorers": ["contains", "no metric"]}),
    ):
        path.write_text(json.dumps(record | change))
        code, text, err = run(["eval.py", out])
        yield name, "" if code == 1 and "the record" in text or code == 2 else f"code {code} {err}"
    path.write_text(json.dumps(record | {"metrics": {"AP": 99.9, "AF": -5}}))
    result = run(["eval.py", out])
    yield "metrics", works(result, "99.9" not in result[1])


def f17_nan_at_the_end():
    for script in SCRIPTS:
        words = words_of(script, finished(script)[0], out := new("run"))

        def spoil(step=torch.optim.AdamW.step, calls=None):
            calls = itertools.count(1)

            def after(self, *args):
                step(self, *args)
                if next(calls) == 4:  # the last step of the second stage
                    self.param_groups[0]["params"][0].data[0] = torch.nan

            torch.optim.AdamW.step = after

        bad = refused(run(words, spoil), "finite")
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        nan = "nan" in str(state.get("lora", state.get("experts"))) and script != "mllm_cl"
        yield script, bad or ("the checkpoint holds nan" if nan else goes_on(script, out, words))


def f18_models():
    tiny = ROOT / "mini" / "tiny-llava"
    for part, key, value in (
        ("text_config", "hidden_size", "a"),
        ("text_config", "hidden_size", 0),
        ("vision_config", "patch_size", 0),
        ("vision_config", "image_size", 65),
        ("text_config", "num_hidden_layers", 3),
        ("text_config", "vocab_size", 7),
    ):
        shutil.copytree(tiny, folder := new("model"))
        config = json.loads((folder / "config.json").read_text())
        config[part][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        words = words_of("asr", finished("asr")[0], new(), "--model", folder)
        result = run(words)
        bad = works(result) if key == "num_hidden_layers" and result[0] == 0 else refused(result)
        yield f"{key} {value}", bad
    for template in ("{{ 1 / 0 }}", "no question", "{% for", "{{ messages.__class__.__mro__ }}"):
        shutil.copytree(tiny, folder := new("model"))
        for path in folder.glob("chat_template*"):
            path.write_text(template)
        words = words_of("asr", finished("asr")[0], new(), "--model", folder)
        yield f"template {template}", refused(run(words), "template")


# ---- 3. What must go on to hold ------------------------------------------------------------------


def hold_resume():
    rng = random.Random(0)
    for script, further in (
        ("asr", ()),
        ("cram", ()),
        ("mllm_cl", ()),
        ("baselines", ("--method", "ewc")),
        ("baselines", ("--method", "hide")),
    ):
        finished(script, *further)
        for _ in range(2):
            point = rng.choice(["log", "save", "test", "note"])
            n = rng.randint(1, 2 if point == "test" else 3)
            try:
                _, out, words = killed(script, *further, point=point, n=n)
            except AssertionError:  # this method does not get so far
                continue
            yield (
                f"{script} {' '.join(further)}: {n} x {point}",
                goes_on(script, out, words, *further),
            )


def hold_old_checkpoint():
    for script in ("asr", "cram", "mllm_cl"):
        _, out, words = killed(script, n=3)
        before = (out / "checkpoint.pt").read_bytes()
        most = len(before) - 100

        def limit(most=most):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        bad = refused(run([*words, "--resume"], limit), "--resume")
        same = (out / "checkpoint.pt").read_bytes() == before
        yield script, bad or ("" if same else "it was overwritten") or goes_on(script, out, words)


class Program:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hold_no_code_runs():
    mark = new("ran")
    mark.parent.mkdir()
    _, out, words = killed("asr", n=4)
    copied, again = twin(out, words)
    torch.save({"lora": Program(mark)}, copied / "checkpoint.pt")
    yield "checkpoint.pt", refused(run([*again, "--resume"])) or "it ran" * mark.exists()
    copied, again = twin(out, words)
    facts = np.array([Program(mark)], dtype=object)
    np.savez(copied / "facts.npz", **{"1-1-phi": facts}, allow_pickle=True)
    yield "facts.npz", refused(run([*again, "--resume"])) or "it ran" * mark.exists()
    shutil.copytree(ROOT / "mini" / "tiny-llava", folder := new("model"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Program(mark)}))
    words = words_of("asr", finished("asr")[0], new(), "--model", folder)
    yield "pytorch_model.bin", refused(run(words)) or "it ran" * mark.exists()


def hold_torchrun():
    for script in ("asr", "cram", "mllm_cl"):
        flags = ["--batch_size", 2, "--accumulate", 2]
        stream, out = finished(script, *map(str, flags))
        words = words_of(script, stream, two := new("run"), *flags)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
        done = subprocess.run([*command, *words], **options)
        if done.returncode:
            yield script, done.stderr[-300:]
            continue
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (out, two)]
        one, both = ([json.loads(line)["loss"] for line in text] for text in lines)
        yield script, "" if np.allclose(one, both, rtol=1e-4) else f"{one} {both}"


def hold_nan_stop():
    for script in SCRIPTS:
        words = words_of(script, finished(script)[0], out := new("run"), "--lr", "1e30")
        bad = refused(run(words), "lower --lr|not finite")
        yield script, bad or ("a summary" if (out / "summary.json").exists() else "")


def hold_paths():
    for name in ("a blank", "ünï-颜色", "quote'\"$x;&"):
        shutil.copytree(finished("asr")[0], stream := new(name))
        out = new(f"run of {name}")
        bad = works(run(words_of("asr", stream, out)))
        yield name, bad or works(run(["eval.py", out]))
    link = new("link")
    link.parent.mkdir()
    link.symlink_to(finished("asr")[0])
    yield "a link", works(run(words_of("asr", link, new("run"))))


# ---- 4. All of them ------------------------------------------------------------------------------


def main(chosen):
    # the attacks are forked from this process, where torch has one thread
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    tests = {name: value for name, value in globals().items() if re.match(r"f\d+_|hold_", name)}
    good = total = 0
    for name, attack in tests.items():
        if chosen and not any(word in name for word in chosen):
            continue
        begin, cases = time.time(), list(attack())
        bad = [(case, what) for case, what in cases if what]
        good, total = good + len(cases) - len(bad), total + len(cases)
        seconds = time.time() - begin
        print(
            f"{name:26} {len(cases) - len(bad):3} of {len(cases):3}  {seconds:4.0f} s", flush=True
        )
        for case, what in bad:
            print(f"    {case}: {what}", flush=True)
    print(f"{good} of {total} attacks handled well")
    shutil.rmtree(HOME)
    return good < total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
