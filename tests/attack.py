"""Kill training, preparing and evaluating, resume them, and compare with an undisturbed call.

    python tests/attack.py --kills=300              # a few minutes on two cores
    python tests/attack.py --kills=20 --seed=1

A call is killed by SIGKILL, either at a random moment or at a point of its own: right before or
after it opens a file for writing, moves one into place or makes a folder. All points are visited in
turn, by a random order. (If it appends, the start of a line is written before it dies.) Half of the
resumed calls are killed, too. Then the same command runs to its end, and has to leave what an
undisturbed one leaves, bit for bit, and nothing else:

    train       all of last.pt and best.pt, every preview, log.csv with each step once
    shapes      the cache, all its files
    folder      the same, of own pictures with captions
    evaluate    every picture, captions.txt, eval.json

Only times and speeds may differ. torch is imported once, and each call is a fork. Prints tried and
held; exits with 1 if something did not hold, and then leaves its folder for inspection.
"""
import builtins
import csv
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import evaluate
import prepare_data
import train
from evaluate import print_table
from model import Constants, Natural, Positive, UserError, read_checkpoint, run


@dataclass
class Config(Constants):
    kills: Positive = 300
    seed: Natural = 0


# ---- 1. the calls ----

SIZES = {"train_images": 30, "val_images": 10}
TRAIN = train.Config(name="run", width=16, heads=2, n_image=1, n_fuse=1, n_text=1, patch_size=2,
                     steps=8, batch_size=4, warmup=2, precision="float32",
                     sample_steps=2, log_every=1, validate_every=3, draw_every=4, save_every=5,
                     score=False)


def train_or_resume(base: Path):
    """What a user does: resume the run that has a checkpoint; without one, start again."""
    config = replace(TRAIN, data=str(base / "shapes/cache"))
    started = [path.parent.name for path in Path("out").glob("*/last.pt")]
    if not started:
        train.main(config)
    elif read_checkpoint(f"out/{started[0]}/last.pt")["step"] < config.steps:
        train.main(replace(config, name=started[0], resume=True))


def prepare_shapes(base: Path):
    prepare_data.main(prepare_data.Config(out="cache", **SIZES))


def prepare_folder(base: Path):
    prepare_data.main(prepare_data.Config(
        dataset="folder", pictures=str(base / "pictures"), out="cache", image_size=32,
        autoencoder="linear", text_tower="random", context_len=16, val_images=4))


def evaluate_run(base: Path):
    evaluate.main(evaluate.Config(
        checkpoint=str(base / "train/out/run/last.pt"), data=str(base / "shapes/cache"),
        out="scores", n=7, batch_size=3, steps=2))


CALLS = {       # name -> (call, the folder of its results)
    "shapes": (prepare_shapes, "cache"),
    "folder": (prepare_folder, "cache"),
    "train": (train_or_resume, "out/*"),
    "evaluate": (evaluate_run, "scores"),
}


def draw_pictures(base: Path, count: int = 12):
    """Own pictures, with one to three captions each."""
    (base / "pictures").mkdir()
    scenes = prepare_data.list_scenes()[1]
    for i in range(count):
        picture = prepare_data.draw_scene(scenes[i], np.random.default_rng(i), 40)
        Image.fromarray(picture).save(base / f"pictures/{i}.png")
        captions = [scene.caption for scene in scenes[i:i + 1 + i % 3]]
        (base / f"pictures/{i}.txt").write_text("\n".join(captions))


# ---- 2. a kill ----

def watch_disk(strike: int):
    """Number the points before and after each change on the disk, and die at `strike`."""
    points, open_file, move, make = itertools.count(), open, os.replace, os.mkdir

    def point(appended=None):
        if next(points) == strike:
            if appended:
                appended.write("1")
                appended.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_open(file, mode="r", *rest, **named):
        if "w" not in mode and "a" not in mode:
            return open_file(file, mode, *rest, **named)
        point()
        opened = open_file(file, mode, *rest, **named)
        point(opened if "a" in mode else None)
        return opened

    def watched(change):
        def call(*arguments, **named):
            point()
            change(*arguments, **named)
            point()
        return call
    builtins.open, os.replace, os.mkdir = watched_open, watched(move), watched(make)
    return points


def skip_what_is_slow():
    """Counting multiply-adds takes longer than this training; a kill, unlike a power failure,
    loses nothing that was written but not yet on the disk."""
    train.count_multiply_adds = evaluate.count_multiply_adds = lambda config: (1, 1)
    os.fsync = lambda file: None


def fork(call: Callable, base: Path, folder: Path, strike: int = -1, moment: float = 0) -> bool:
    """Run call(base) in `folder`, in a process of its own; True if it was killed on the way."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            skip_what_is_slow()
            points = watch_disk(strike)
            call(base)
            Path("points").write_text(str(next(points)))
            os._exit(0)
        except BaseException:
            Path("error").write_text(traceback.format_exc())
            os._exit(1)
    if moment:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


# ---- 3. the comparison ----

def read_results(folder: Path, pattern: str) -> dict:
    """Path -> content of all files, without what may differ: times, speeds, how it was called."""
    [home] = [path for path in folder.glob(pattern) if [*path.glob("[!.]*")]]
    contents = {}
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        name = str(path.relative_to(home))
        if path.name == "log.csv":
            content = list(csv.DictReader(path.read_text().splitlines()))
            for line in content:
                del line["seconds"], line["images_per_second"]
        elif path.suffix == ".pt":
            content = read_checkpoint(path)
            del content["report"]["seconds"], content["report"]["lines"]
            del content["config"]["resume"], content["config"]["name"]
        else:
            content = path.read_bytes()
        if path.name != ".lock":
            contents[name] = content
    return contents


def find_difference(found, expected, name: str = "") -> str | None:
    """Where two contents differ, or None; tensors are compared bit for bit."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in {**expected, **found}:
            if key not in found or key not in expected:
                return f"{name} {key} is {'missing' if key in expected else 'left over'}"
            if difference := find_difference(found[key], expected[key], f"{name} {key}"):
                return difference
        return None
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        equal = found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        equal = found == expected
    return None if equal else f"{name} differs ({found!s:.300} for {expected!s:.300})"


# ---- 4. the attack ----

@dataclass
class Kind:
    """Attacks of one kind on one call, and what came out."""
    name: str
    how: str                    # "moment" or "file"
    points: list[int]           # those of an undisturbed call, in the order of their visit
    seconds: float              # that an undisturbed call takes
    expected: dict              # what it leaves
    kills: int = 0
    attacks: int = 0
    failures: list[str] = field(default_factory=list)


def observe(name: str, base: Path, rng: np.random.Generator) -> list[Kind]:
    """Run a call undisturbed, in base/name."""
    call, pattern = CALLS[name]
    folder = base / name
    folder.mkdir()
    began = time.perf_counter()
    fork(call, base, folder)
    seconds = time.perf_counter() - began
    if (folder / "error").exists():
        raise UserError((folder / "error").read_text())
    points = rng.permutation(int((folder / "points").read_text())).tolist()
    expected = read_results(folder, pattern)
    return [Kind(name, how, points, seconds, expected) for how in ("moment", "file")]


def attack(kind: Kind, base: Path, folder: Path, rng: np.random.Generator):
    """Kill one call, resume it (and kill it again, perhaps) until it is done, and compare."""
    call, pattern = CALLS[kind.name]
    folder.mkdir()
    history = []
    while True:
        harm = {}
        if not history or rng.random() < 0.5:
            if kind.how == "moment":
                harm = {"moment": rng.uniform(0, kind.seconds)}
            elif not history:
                harm = {"strike": kind.points[kind.attacks % len(kind.points)]}
            else:
                harm = {"strike": int(rng.integers(len(kind.points)))}
        killed = fork(call, base, folder, **harm)
        if not killed:
            break
        kind.kills += 1
        history.append(harm)
    kind.attacks += 1
    difference = find_difference(read_results(folder, pattern), kind.expected)
    if (folder / "error").exists():
        difference = (folder / "error").read_text()
    if difference:
        kind.failures.append(f"{kind.name}, killed at {history}: {difference} (see {folder})")
        tqdm.write(kind.failures[-1])
    else:
        shutil.rmtree(folder)


def warm_up():
    """What each process would have to do again: lists, the tokenizer's table, torch's imports."""
    prepare_data.scene_of()
    prepare_data.unseen_scenes()
    clip_text.tokenize(["a"])
    torch.optim.AdamW([torch.zeros(1)])


def main(config: Config):
    torch.set_num_threads(1)                # a process with threads can't be forked
    warm_up()
    rng = np.random.default_rng(config.seed)
    base = Path(tempfile.mkdtemp(prefix="attack-"))
    draw_pictures(base)
    kinds = [kind for name in CALLS for kind in observe(name, base, rng)]
    turns, kills = itertools.cycle(kinds), 0
    with tqdm(total=config.kills, unit="kill") as bar:
        for number in itertools.count():
            if kills >= config.kills:
                break
            attack(next(turns), base, base / f"{number:04d}", rng)
            bar.update(sum(kind.kills for kind in kinds) - kills)
            kills = sum(kind.kills for kind in kinds)
    print_table([{"call": kind.name, "killed at a": kind.how, "kills": str(kind.kills),
                  "tried": str(kind.attacks), "held": str(kind.attacks - len(kind.failures)),
                  "points": str(len(kind.points)) if kind.how == "file" else "any",
                  "seconds undisturbed": f"{kind.seconds:.2f}"} for kind in kinds])
    failures = [failure for kind in kinds for failure in kind.failures]
    if failures:
        raise UserError(f"{len(failures)} did not hold, first of all: {failures[0]}")
    shutil.rmtree(base)


if __name__ == "__main__":
    run(main, Config)
