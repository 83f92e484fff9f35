"""What a script needs of the machine: errors, files that survive a kill, bars of progress.

input_errors       at the bottom of every script: what goes wrong ends as one sentence
damaged            around whatever reads a file that may be broken
read_json          the content of a file, or an InputError that names it; load_image: its pixels
pad_square         an image as LLaVA sees it; thumbnails: the images of samples for a figure
write_bytes, ...   a whole file or nothing
lock               a run folder belongs to one process
predictions_file   where a run keeps the answers behind a cell of its accuracy matrix
progress           a bar; a line a minute in a log file; peak_memory, versions
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class InputError(Exception):
    """The user's input cannot be used. One sentence: what, where, what to do."""


# ---- 1. Errors -----------------------------------------------------------------------------------

NO_MEMORY = "out of memory|t allocate memory|not enough memory"  # as torch says it
locks = {}  # run folder -> its open lock, of the runs that this process has begun


@contextlib.contextmanager
def input_errors():
    """Report what went wrong as one sentence on stderr and exit: with code 130 after Ctrl-C, with 2
    after an InputError, a file that cannot be read or written, or too little memory. Without a
    sentence and with 1 where the reader of stdout is gone (`| head`)."""
    code = 2
    try:
        yield
        return
    except KeyboardInterrupt:
        sentence, code = f"stopped{go_on()}", 130
    except InputError as error:
        sentence = f"error: {error}"
    except BrokenPipeError:
        if go_on():
            print(f"error: nobody reads the output any more{go_on()}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        sys.exit(1)
    except OSError as error:
        file = f" {error.filename}" if error.filename else ""
        sentence = f"error: cannot read or write{file}: {error.strerror or error}{go_on()}"
    except (MemoryError, RuntimeError) as error:
        if not of_machine(error):
            raise
        reason = str(error).partition("\n")[0] or "out of memory"
        sentence = f"error: {reason}; lower --batch_size (or raise --accumulate), --eval_batch_size"
    print(sentence, file=sys.stderr)
    sys.exit(code)


def go_on() -> str:
    """What to say where a run ends early."""
    runs = [folder for folder in locks if (folder / "args.json").exists()]  # it may be deleted
    return f"; the same command with --resume goes on in {runs[-1]}" if runs else ""


def of_machine(error) -> bool:
    """Is it memory, disk or permission that is lacking, rather than a file whose content is bad?"""
    if isinstance(error, OSError):  # broken content can ask for a place that no file has
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError) or bool(re.search(NO_MEMORY, str(error)))


@contextlib.contextmanager
def damaged(what, advice=""):
    """Around code that reads `what`: whatever it raises becomes an InputError that names it, unless
    the machine is at fault."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"missing file {error.filename or what}") from error
    except Exception as error:  # broken content can raise nearly anything inside a library
        if of_machine(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{what} is damaged, or of another version: {reason}{advice}") from error


def lock(folder: Path) -> None:
    """Keep this run folder to this process until it ends, however it ends.

    InputError if another process has it. Where the file system knows no locks, a note says so.
    """
    if folder in locks:
        return
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder} belongs to a run that is not over: choose another --out"
        ) from None
    except OSError as error:
        print(f"note: {folder} cannot be locked ({error.strerror}): do not start two runs in it")
    locks[folder] = file


# ---- 2. Reading ----------------------------------------------------------------------------------


def read_json(path: Path, kind: type = object):
    """Content of a .json file, or the list in a .jsonl file; InputError with file and line, or if
    it holds no `kind` (list or dict)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file" if path.exists() else f"missing file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":  # as one array, in which every line keeps its number
            text = "[" + ",\n".join(text.splitlines()) + "]"
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # broken JSON says its line and column
        fault = "is corrupt or truncated"
        if str(error).startswith("Extra data"):
            fault = "holds several JSON values, not one (records belong in one array, [..., ...])"
        raise InputError(f"{path} {fault}: {error}") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} must hold one JSON {'array' if kind is list else 'object'}")
    return content


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others may start programs
LARGEST = 10_000  # pixels a side: such a square takes 300 MB, gray with 16 bits for a moment 1 GB
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns


def load_image(path: Path) -> Image.Image:
    """The image as RGB, fully decoded; InputError naming the file if it is missing, broken or
    larger than LARGEST."""
    if not os.path.isfile(path):
        raise InputError(f"image {path} is no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) <= LARGEST:
                return eight_bits(image).convert("RGB")
    except Exception as error:  # a broken file can raise nearly anything inside a decoder
        if of_machine(error):
            raise
        raise InputError(f"image {path} is corrupt or truncated: {error}") from None
    size = " x ".join(map(str, image.size))
    raise InputError(f"image {path} has {size} pixels: scale it to at most {LARGEST} a side")


def eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits (medicine, satellites) stretched to 0..255, from its darkest to
    its brightest pixel, as no file says what its white is. Pillow alone would cut all above 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.array(image, dtype=np.float32)  # [h, w], changed in place: it may be large
    known = np.isfinite(values)
    low, high = values[known].min(), values[known].max()
    values[~known] = low
    values -= low
    values *= 255 / max(high - low, 1e-30)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def pad_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of color `fill`, as LLaVA-1.5 was trained."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def thumbnails(samples: list, side: int) -> np.ndarray:
    """The images of samples for a figure: [N, side, side, 3] uint8, white where there is none."""
    images = [s.image and pad_square(load_image(s.image), (127,) * 3) for s in samples]
    blank = np.full((side, side, 3), 255, np.uint8)
    return np.stack([np.array(i.resize((side, side))) if i else blank for i in images])


def predictions_file(run, trained, tested):
    """File of the answers behind matrix[trained, tested] (from 0); a word names an extra test."""
    on = tested + 1 if isinstance(tested, int) else tested
    return Path(run) / "predictions" / f"after-{trained + 1}-on-{on}.jsonl"


# ---- 3. Writing ----------------------------------------------------------------------------------


def silent():
    """Under torchrun the first process alone writes; True in the others."""
    return int(os.environ.get("RANK", 0)) > 0


def write_bytes(path, content):
    """Write the whole file or nothing: after a kill, on a full disk or without power the old file
    is there, never half a new one."""
    if silent():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def settle(path):
    """Have a file on the disk before another one that relies on it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path, text):
    write_bytes(path, text.encode())


def write_json(path, content):
    """Write a dict as JSON, one line per key."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(jsonable(content).items())]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def jsonable(value):
    """Plain JSON types: a path becomes a string, nan null, infinity "inf" (JSON knows neither)."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Path) else value


# ---- 4. Progress and costs -----------------------------------------------------------------------


class progress(tqdm):
    """A bar on stderr; where that is no terminal but a file, a line a minute instead."""

    def __init__(self, items, title, **options):
        self.terminal = sys.stderr.isatty()
        times = {} if self.terminal else {"delay": 60, "mininterval": 60, "maxinterval": 60}
        super().__init__(items, title, disable=silent(), **{"leave": False} | times | options)

    def display(self, *words, **values):
        if self.terminal:
            super().display(*words, **values)
        else:
            print(self, file=sys.stderr, flush=True)

    def close(self):
        self.disable |= not self.terminal  # in a file there is no bar to take away
        super().close()


def peak_memory():
    """The most memory in use so far, in MB: of the GPU if one was used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # getrusage there counts the process that started this one too
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def versions():
    """What numbers depend on to the last digit: Python, packages and the processor."""
    packages = ("torch", "transformers", "numpy", "pillow")
    facts = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return facts | {"cpu": cpu()}


def cpu():
    """Name, family and model of the processor, and the instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux
        pairs = re.findall(r"(?m)^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text())
        facts = dict(reversed(pairs))  # of the first core
        keys = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
        name = " ".join(facts[key] for key in keys if key in facts)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def git_commit():
    """Commit of this code, "-dirty" if files outside results/ differ; "unknown" outside git."""
    home = Path(__file__).resolve().parent
    git = ["git", "-C", str(home)]
    try:
        output = partial(subprocess.run, capture_output=True, text=True, check=True)
        top = output([*git, "rev-parse", "--show-toplevel"]).stdout.strip()
        if Path(top).resolve() != home:
            return "unknown"  # a copy without .git, unpacked inside another repository
        commit = output([*git, "rev-parse", "HEAD"]).stdout.strip()
        dirty = output([*git, "status", "--porcelain", "--", ".", ":!results"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if dirty else "")
