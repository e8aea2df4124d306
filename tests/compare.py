"""Where should text meet the image? Networks trained alike, and what they draw along the way.

    python tests/compare.py                                     # the four models, five seeds
    python tests/compare.py --models=positions --seeds=4 --until=1200
    python tests/compare.py --models=positions --seeds=4 --task=what --until=400
    python tests/compare.py --report=assets/results.json        # trains nothing: our runs
    python tests/compare.py --sweep=out/shapes/eval             # draws evaluations at several w

Every 300 steps (100 of the easier task "what") the EMA draws the same held-out captions, 160 of
them and 500 after the last step, from the same noise (picture i has seed i), and the detector of
evaluate.py reads the pictures. So each run is a curve: the share that is right in everything,
against steps or multiply-adds (3 for each of a forward pass, the text path included). Of the
network at its end where.py says in which blocks the text acts.

Models are compared with early-concat, or with the first that is named, by runs of the same seed,
which see the same batches and noise; intervals are of 95%, by Student's t over the seeds. Whole
runs are not trained again, interrupted ones resume, and of two calls at a time each takes what the
other has not begun. `until` ends a run at that step of the same schedule, and is where the tables
stand; a later call without it resumes. A run of the task "shapes" takes 12 to 90 minutes of a core.

    out/compare/TASK/MODEL-SEED/    curve.json; where.json; run/, as train.py leaves it; output.txt
    TO/results.json                 all runs, also of other machines; of two alike the longer one
    TO/work.png, positions.png, guidance.png
"""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import evaluate
import prepare_data
import train
import where
from model import (Constants, FilePath, Positive, UserError, UViTConfig, choose_device,
                   choose_precision, count_multiply_adds, one_writer, read_checkpoint, reading,
                   run, write_json, writing)
from prepare_data import Scene, scene_of, unseen_scenes
from sample import Pipeline, sample_latents
from vae import load_autoencoder, to_pictures

CONCAT = {"fusion": "intermediate", "conditioning": "concat"}
CROSS = {"fusion": "intermediate", "conditioning": "cross_attention"}
MODELS = {      # name -> what differs from the constants of train.py
    "early-concat": {"fusion": "early", "conditioning": "concat"},
    "early-cross": {"fusion": "early", "conditioning": "cross_attention"},
    "intermediate-concat": CONCAT,
    "intermediate-cross": CROSS,
    "shift-2": CONCAT | {"fuse_shift": -2},             # the window is at the front
    "shift-2-cross": CROSS | {"fuse_shift": -2},
    "shift-1": CONCAT | {"fuse_shift": -1},
    "shift+1": CONCAT | {"fuse_shift": 1},
    "shift+2": CONCAT | {"fuse_shift": 2},
    "notext": CONCAT | {"n_text": 0},                   # no text blocks
    "text1": CONCAT | {"n_text": 1},
    "text4": CONCAT | {"n_text": 4},
    "shift-2-notext": CONCAT | {"fuse_shift": -2, "n_text": 0},
    "wide-notext": CONCAT | {"n_image": 0, "n_fuse": 9, "n_text": 0},   # the window is everything
    "wide-text2": CONCAT | {"n_image": 0, "n_fuse": 9, "n_text": 2}}
FOUR = ["early-concat", "early-cross", "intermediate-concat", "intermediate-cross"]
GROUPS = {
    "all": list(MODELS),
    "four": FOUR,
    "windows": [*FOUR, "shift-2", "shift-2-cross"],
    "positions": ["shift-2", "shift-1", "intermediate-concat", "shift+1", "shift+2"],
    "text": ["notext", "intermediate-concat", "text1", "text4", "wide-notext", "wide-text2"]}
TASKS = {       # name -> (constants of prepare_data.py, constants of train.py)
    "shapes": ({}, {}),
    "what": ({"out": "data/what"}, {}),                 # nine alike: the text says what, not where
    "S": ({"out": "data/shapes64", "image_size": 64, "context_len": 77},    # wants a GPU
          {"width": 512, "heads": 8, "depth": 13, "n_image": 4, "n_text": 4, "init_std": 0.02,
           "batch_size": 256, "steps": 3600, "learning_rate": 5e-4, "warmup": 500})}
BASE = "early-concat"
LEVELS = (0.8, 0.9, 0.95)
EVERY = {"shapes": 300, "what": 100, "S": 300}          # steps between two looks


@dataclass
class Config(Constants):
    models: str = "four"            # four, windows, positions, text, all; or names with commas
    seeds: Positive = 5             # 0, 1, ...
    until: Positive | None = None   # stop at this step of the schedule; None: at its end
    task: Literal["shapes", "what", "S"] = "shapes"
    processes: Positive = 2         # runs at a time, with one thread each
    report: FilePath | None = None  # train nothing: the runs of this results.json, and no others
    to: FilePath = "out/compare"    # folder of pictures and results.json
    sweep: FilePath | None = None   # draw only this: a folder of evaluate.py's folders
    one: str | None = None          # train only this run, such as early-concat-0, in this process


# ---- 1. the measure ----

ON_THE_WAY, AT_THE_END = 160, 500                       # captions


class ExaminationError(Exception):
    """Of a kind that train.py does not pass over."""


class Examination:
    """What train.py calls at regular steps: the EMA draws, the detector judges."""

    def __init__(self, path: Path, facts: dict, constants: train.Config, until: int):
        self.path, self.constants, self.until = path, constants, until
        (cache, uvit), device = train.open_data(constants), choose_device()
        self.facts = facts | {"multiply_adds": count_multiply_adds(uvit)}
        self.curve = read_curve(path.parent)
        self.captions = evaluate.choose_prompts(cache, evaluate.Config(n=AT_THE_END))[1]
        texts = [0, *(cache.captions.index(caption) for caption in self.captions)]
        text = torch.from_numpy(cache.text[texts]).float().to(device)
        self.null_context, self.context = text[0], text[1:]
        self.scale = cache.meta["latent_scale"]
        self.autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder,
                                            constants.weights).to(device)

    def examine(self, *now):
        """What fails here ends the run, which resumes; train.py would go on as without a grid."""
        try:
            self.add_point(*now)
        except Exception as error:
            raise ExaminationError(f"{type(error).__name__}: {error}") from error

    def add_point(self, step: int, net, ema, folder: Path):
        last = step == self.constants.steps
        captions = self.captions[:AT_THE_END if last else ON_THE_WAY]
        pictures = self.draw(ema, len(captions))
        rights = [evaluate.judge_picture(picture, scene_of()[caption])
                  for picture, caption in zip(pictures, captions)]
        point = {"step": step, "captions": len(captions)}
        for kind in evaluate.KINDS:
            values = [right[kind] for right in rights if kind in right]
            point[kind] = float(np.mean(values)) if values else None
        point["scores"] = evaluate.score_shapes(pictures, captions)     # seen and unseen apart
        with open(folder / "log.csv", newline="") as file:
            *_, log = csv.DictReader(file)                              # its last line
        point |= {key: float(log[key]) for key in ("held_out_raw", "held_out_ema")}
        self.curve = [earlier for earlier in self.curve if earlier["step"] < step] + [point]
        write_json(self.path, self.facts | {"seconds": float(log["seconds"]), "curve": self.curve})
        print(f"step {step:,}: {100 * point['everything']:.1f}% of {len(captions)} captions right")
        if self.until <= step and not last:
            signal.raise_signal(signal.SIGTERM)         # train.py saves the next step and ends

    @torch.no_grad()
    def draw(self, ema, number: int) -> np.ndarray:
        """Picture i has caption i and seed i: (number, S, S, 3) uint8."""
        pictures = []
        for seeds in torch.arange(number).split(80):
            z = sample_latents(ema, self.context[seeds], torch.arange(len(seeds)),
                               self.null_context, seeds.tolist(), 20, 3.0)
            pictures.append(to_pictures(self.autoencoder.decode(z / self.scale)))
        return np.concatenate(pictures)


def read_curve(folder: Path) -> list[dict]:
    path = folder / "curve.json"
    return json.loads(path.read_text())["curve"] if path.exists() else []


# ---- 2. the second task ----

def choose_nine(rng: np.random.Generator, unseen: bool) -> Scene:
    """Such as "nine red circles": the text says what, and the layout is always the same."""
    nine = [scene for scene in scene_of().values()
            if scene.groups[0][0] == 9 and (scene in unseen_scenes()) == unseen]
    return nine[rng.integers(len(nine))]


def prepare(task: str) -> str:
    """The folder of the task's data, which is made if it is missing."""
    config = prepare_data.Config(**TASKS[task][0])
    changed = patch.object(prepare_data, "choose_scene", choose_nine)
    if not Path(config.out, "meta.json").exists():
        with changed if task == "what" else nullcontext():
            prepare_data.main(config)
    return config.out


# ---- 3. the runs ----

def folder_of(config: Config, name: str, seed: int) -> Path:
    return Path("out/compare", config.task, f"{name}-{seed}")


def choice_of(task: str, name: str) -> dict:
    """What differs from the constants of train.py. S is deeper: its windows move by two blocks."""
    choice = TASKS[task][1] | MODELS[name]
    if task == "S" and "fuse_shift" in choice:
        choice["fuse_shift"] *= 2
    return choice


def end_of(config: Config, name: str) -> int:
    """The step at which a run is whole: a look, or the end of its schedule."""
    steps = choice_of(config.task, name).get("steps", train.Config.steps)
    every = EVERY[config.task]
    return min(math.ceil((config.until or steps) / every) * every, steps)


def read_looks(folder: Path) -> list[dict]:
    """What where.py saw in the network, at each end that the run has had."""
    path = folder / "where.json"
    return json.loads(path.read_text()) if path.exists() else []


def is_whole(config: Config, name: str, seed: int) -> bool:
    """Whether the run was trained to its end, and looked at there."""
    folder = folder_of(config, name, seed)
    return all(max((each["step"] for each in parts), default=0) >= end_of(config, name)
               for parts in (read_looks(folder), read_curve(folder)))


def step_of(path: Path) -> int:
    """The step at which a run of train.py was saved; 0 if it never was."""
    return read_checkpoint(path / "last.pt")["step"] if (path / "last.pt").exists() else 0


def train_to_end(config: Config, name: str, seed: int, path: Path):
    """Train one network in the folder `path`, or resume it; KeyboardInterrupt if it is stopped."""
    if not (path / "last.pt").exists():
        shutil.rmtree(path, ignore_errors=True)         # it was stopped before its first step
    every, choice = EVERY[config.task], choice_of(config.task, name)
    constants = train.Config(
        data=prepare(config.task), name=path.relative_to("out").as_posix(), seed=seed,
        resume=path.exists(), draw_every=every, validate_every=every, save_every=every,
        score=False, **choice)
    facts = {"name": name, "seed": seed, "choice": choice, "steps": constants.steps,
             "batch_size": constants.batch_size * constants.grad_accum,
             "device": choose_device().type, "torch": torch.__version__,
             "precision": str(choose_precision(choose_device(), constants.precision))}
    curve = path.parent / "curve.json"
    examination = Examination(curve, facts, constants, end_of(config, name))
    train.main(constants, examination.examine)
    if step_of(path) < end_of(config, name):
        raise KeyboardInterrupt


def train_run(config: Config, name: str, seed: int):
    """Train one network to its end, and look at it there, unless that was done before."""
    folder = folder_of(config, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        if is_whole(config, name, seed):
            return
        if step_of(folder / "run") < end_of(config, name):
            train_to_end(config, name, seed, folder / "run")
        pipeline = Pipeline(folder / "run" / "last.pt")
        look = where.look(pipeline, prepare_data.read_cache(prepare(config.task)), 64)
        write_json(folder / "where.json", [*read_looks(folder), look])


def train_all(config: Config, runs: list[tuple[str, int]]):
    """Train the runs, several at a time, each in a process of its own with one thread."""
    def train_apart(run):
        name, seed = run
        folder = folder_of(config, name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder} is being trained: see its output.txt.", flush=True)
        line = [sys.executable, __file__, f"--one={name}-{seed}", f"--task={config.task}",
                f"--until={config.until}"]
        with open(folder / "output.txt", "a") as output:
            subprocess.run(line, stdout=output, stderr=output,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
        *_, last = (folder / "output.txt").read_text().strip().split("\n")
        print(f"{folder}: {last}", flush=True)
    with ThreadPoolExecutor(config.processes) as pool:
        list(pool.map(train_apart, runs))


# ---- 4. figures of a run, and their means over the seeds ----

def point_at(run: dict, step: int) -> dict:
    return next(point for point in run["curve"] if point["step"] == step)


def steps_to(run: dict, level: float) -> float | None:
    """Steps until this share is first right in everything, on lines between the points."""
    before = {"step": 0, "everything": 0.0}
    for point in run["curve"]:
        if point["everything"] >= level:
            shares = before["everything"], point["everything"]
            return float(np.interp(level, shares, (before["step"], point["step"])))
        before = point


def work(run: dict, steps: float) -> float:
    """10^12 multiply-adds of so many steps: a backward pass costs twice a forward pass."""
    return 3 * steps * run["batch_size"] * sum(run["multiply_adds"]) / 1e12


def at_equal_work(run: dict, other: dict, step: int) -> tuple[float, float | None]:
    """% right at this step, and in `other` after the same work; None if it has not done so much.
    Both have one schedule: the dearer one's rate is then higher, which flatters the cheaper."""
    x = [work(other, point["step"]) for point in other["curve"]]
    shares = [100 * point["everything"] for point in other["curve"]]
    done, mine = work(run, step), 100 * point_at(run, step)["everything"]
    return mine, float(np.interp(done, [0, *x], [0, *shares])) if done <= x[-1] else None


def measure(run: dict, step: int) -> dict[str, float | None]:
    """The figures of one run; those that are not "to" a level, at `step`. None: not reached."""
    point, figures = point_at(run, step), {}
    for kind in reversed(evaluate.KINDS):
        if point[kind] is not None:                     # the task "what" has no relations
            figures[f"{kind}, %"] = 100 * point[kind]
    for group in ("seen", "unseen"):
        share = point["scores"][group]["everything"]
        figures[f"{group}, %"] = share and 100 * share
    figures["held-out loss"] = point["held_out_ema"]
    for level in LEVELS:
        steps = steps_to(run, level)
        figures[f"steps to {level:.0%}"] = steps
        figures[f"T multiply-adds to {level:.0%}"] = steps and work(run, steps)
    return figures


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval by Student's t; of a single value, infinite."""
    n = len(values)
    if n == 1:
        return values[0], math.inf
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * stats.sem(values))


def show_mean(values: list[float | None], digits: int | None = None) -> str:
    """Mean and interval, if all runs reach the level: a mean of those that do would flatter."""
    if None in values:
        return f"{len(values) - values.count(None)} of {len(values)}"
    mean, half = interval(values)
    if digits is None:
        digits = 4 if mean < 1 else 1 if mean < 1000 else 0
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}".removesuffix(" ± inf")


def show_difference(pairs: list[tuple], title: str) -> str:
    """Mean of mine less the base's, in points or in % of the base; or that it may be nothing."""
    if not pairs or None in sum(pairs, ()):
        return ""
    if title.endswith(", %"):
        values, unit = [mine - base for mine, base in pairs], ""
    else:
        values, unit = [100 * (mine / base - 1) for mine, base in pairs], "%"
    mean, half = interval(values)
    text = f"{mean:+.1f}{unit} ± {half:.1f}".removesuffix(" ± inf")
    return text if abs(mean) > half else f"undecided ({text})"


# ---- 5. the report ----

def collect(to: Path) -> dict[str, list[dict]]:
    """Task -> runs: those of results.json, which keeps what else it has, and those on this disk."""
    path, results = to / "results.json", {}
    kept = json.loads(path.read_text()) if path.exists() else {}
    for task in TASKS:
        runs = {(run["name"], run["seed"]): run for run in kept.get(task, [])}
        for curve in Path("out/compare", task).glob("*/curve.json"):
            run = json.loads(curve.read_text()) | {"where": read_looks(curve.parent)}
            key = run["name"], run["seed"]
            runs[key] = max(run, runs.get(key, run), key=lambda each: each["curve"][-1]["step"])
        results[task] = [runs[key] for key in sorted(runs)]
    with writing(path, "w") as file:                    # a line for each run
        file.write(json.dumps(kept | results).replace('{"name"', '\n{"name"') + "\n")
    return results


def looks_at(runs: list[dict], step: int) -> list[dict]:
    """What where.py saw at this step, or one later, where a run is saved that ends early."""
    return [look for run in runs for look in run["where"] if look["step"] - step in (0, 1)]


def print_tables(models: dict[str, list[dict]], steps: list[int]):
    """The figures of each model's runs, what differs from the base, and the way there."""
    first = BASE if BASE in models else next(iter(models))
    base = {run["seed"]: measure(run, steps[-1]) for run in models[first]}
    bases = {run["seed"]: run for run in models[first]}
    means, differences, ways = [], [], []
    for name, runs in models.items():
        figures = {run["seed"]: measure(run, steps[-1]) for run in runs}
        pairs = [(figures[seed], base[seed]) for seed in figures.keys() & base.keys()]
        mean = {f"right at step {steps[-1]:,}": name, "seeds": str(len(runs))}
        difference = {f"less {first}": name, "pairs": str(len(pairs))}
        for title in figures[runs[0]["seed"]]:
            both = [(mine[title], other[title]) for mine, other in pairs]
            digits = 1 if title.endswith(", %") else None
            mean[title] = show_mean([each[title] for each in figures.values()], digits)
            difference[title] = show_difference(both, title)
        difference["everything at equal work, %"] = show_difference([
            at_equal_work(run, bases[run["seed"]], steps[-1])
            for run in runs if run["seed"] in bases], "points, %")
        way = {"everything right, %, at step": name}
        for step in steps:
            rights = [100 * point_at(run, step)["everything"] for run in runs]
            way[f"{step:,}"] = show_mean(rights, 1)
        means.append(mean)
        ways.append(way)
        if pairs and name != first:
            differences.append(difference)
    for table in filter(None, (means, differences, ways)):
        print()
        evaluate.print_table(table)
    print_effects(models, steps[-1])
    print_trend(models, steps[-1])


def slopes_of(positions: dict[str, list[dict]], step: int, key: str) -> list[float]:
    """How much this figure rises for each block by which the window moves back, for each seed that
    has all positions: the slope of the straight line through them."""
    lines = {}
    for runs in positions.values():
        for each in runs:
            shift, figure = each["choice"].get("fuse_shift", 0), point_at(each, step)[key]
            lines.setdefault(each["seed"], []).append((shift, figure))
    return [float(stats.linregress(*zip(*line)).slope)
            for line in lines.values() if len(line) == len(positions)]


def print_trend(models: dict[str, list[dict]], step: int):
    positions = {name: models[name] for name in GROUPS["positions"] if name in models}
    if len(positions) < 3:
        return
    rights = [100 * slope for slope in slopes_of(positions, step, "everything")]
    losses = slopes_of(positions, step, "held_out_ema")
    if rights:
        print(f"\nEach block by which the window moves back ({len(rights)} seeds, step {step:,}): "
              f"{show_mean(rights, 1)} points in everything, {show_mean(losses, 5)} in loss.")


RANK = "rank of the attention from image to text"


def print_effects(models: dict[str, list[dict]], step: int):
    """Of both ways of conditioning together: what the window changes, and what the way changes."""
    names, rows, rank = GROUPS["windows"], [], f"{RANK}, in the blocks that both have"
    early, bottleneck, front = names[:2], names[2:4], names[4:]
    for title, mine, base in (("intermediate less early", bottleneck, early),
                              ("front less early", front, early),
                              ("front less intermediate", front, bottleneck),
                              ("cross_attention less concat", names[1:4:2], names[:4:2])):
        figures = {name: {run["seed"]: measure(run, step) for run in models.get(name, [])}
                   for name in (*mine, *base)}
        seeds = sorted(set.intersection(*map(set, figures.values())))
        if not seeds:
            continue
        shared = set.intersection(*(set(window_of(models[name][0])) for name in figures))
        for name in figures:
            for each in models[name]:
                ranks = [look["rank"][str(i)] for look in looks_at([each], step) for i in shared]
                figures[name][each["seed"]][rank] = float(np.mean(ranks)) if ranks else None
        row = {"mean of both pairs": title, "seeds": str(len(seeds))}
        for key in figures[mine[0]][seeds[0]]:
            values = [[[figures[name][seed][key] for name in pair] for pair in (mine, base)]
                      for seed in seeds]
            row[key] = "" if None in np.ravel(values) else show_difference(
                [*map(tuple, np.mean(values, axis=2))], key)
        runs = {(each["name"], each["seed"]): each for name in figures for each in models[name]}
        values = [[at_equal_work(runs[one, seed], runs[other, seed], step)
                   for one, other in zip(mine, base)] for seed in seeds]
        row["everything at equal work, %"] = "" if None in np.ravel(values) else show_difference(
            [*map(tuple, np.mean(values, axis=1))], "points, %")
        rows.append(row)
    if rows:
        print()
        evaluate.print_table(rows)


def tables_of_look(look: dict) -> dict[str, dict[str, float]]:
    """Title -> block -> figure, of a look of where.py."""
    tables = {f"% of the rise without text, if hidden here alone, t = {t}":
              {block: 100 * lost[i] for block, lost in look["lost_if_hidden"].items()}
              for i, t in enumerate(look["t"])}
    return tables | {RANK: look["rank"], "the same, text's part alone": look["rank_text_alone"]}


def print_looks(models: dict[str, list[dict]], step: int):
    """Where the networks use the text, by block."""
    looks = {name: [*map(tables_of_look, looks_at(runs, step))] for name, runs in models.items()}
    looks = {name: found for name, found in looks.items() if found}
    blocks = sorted({int(block) for (look, *_) in looks.values() for block in look[RANK]})
    for title in next(iter(looks.values()), [{}])[0]:
        rows = []
        for name, found in looks.items():
            row = {title: name, "seeds": str(len(found))}
            for block in map(str, blocks):
                values = [look[title][block] for look in found if block in look[title]]
                digits = 0 if title.startswith("%") else 2
                row[f"block {block}"] = show_mean(values, digits) if values else ""
            if not title.startswith("%"):
                row["mean"] = show_mean([np.mean([*look[title].values()]) for look in found], 2)
            rows.append(row)
        print()
        evaluate.print_table(rows)


def window_of(run: dict) -> range:
    """The blocks that see the text."""
    constants = train.Config(**run["choice"])
    names = "depth", "n_image", "n_fuse", "fuse_shift"
    places = {name: getattr(constants, name) for name in names}
    return UViTConfig(constants.fusion, constants.conditioning, **places).window


def print_forecast(models: dict[str, list[dict]], step: int):
    """How much early fusion uses the text in the blocks of each window: does that foretell which
    window is best?"""
    windows = [window_of(models[name][0]) for name in GROUPS["positions"] if name in models]
    firsts = [window[0] for window in windows]
    if len(windows) < 3:
        return
    for name in ("early-concat", "early-cross"):
        looks = looks_at(models.get(name, []), step)
        if not looks:
            continue
        rows = []
        for key, title in ("lost_if_hidden", "lost if hidden"), ("kept_if_alone", "kept if alone"):
            for i, t in enumerate(looks[0]["t"]):
                shares = [[100 * np.mean([look[key][str(block)][i] for block in window])
                           for window in windows] for look in looks]
                slopes = [float(stats.linregress(firsts, share).slope) for share in shares]
                row = {f"{name}, mean of these blocks": f"% {title}, t = {t}"}
                for window, column in zip(windows, zip(*shares)):
                    row[f"{window[0]} to {window[-1]}"] = show_mean(column, 0)
                rows.append(row | {"each block back": show_mean(slopes, 1)})
        print()
        evaluate.print_table(rows)


def draw_curves(axes, models: dict[str, list[dict]], against_work: bool):
    """The share right in everything, as far as all seeds go: their mean, and a band from lowest to
    highest. The darker, the earlier the text enters; black: everywhere; dashed: cross-attention."""
    for name, runs in models.items():
        choice, window = runs[0]["choice"], window_of(runs[0])
        everywhere = choice["fusion"] == "early"
        colour = "black" if everywhere else colormaps["viridis"](0.1 + window[0] / 6)
        dashes = "--" if choice["conditioning"] == "cross_attention" else "-"
        steps = [{point["step"] for point in run["curve"]} for run in runs]
        steps = sorted(set.intersection(*steps))
        label = f"{name}: {window[0]} to {window[-1]}; {len(runs)} seeds to {steps[-1]:,}"
        x = [work(runs[0], step) if against_work else step for step in steps]
        right = [[100 * point_at(run, step)["everything"] for step in steps] for run in runs]
        axes.plot(x, np.mean(right, axis=0), "o" + dashes, color=colour, label=label)
        low, high = np.min(right, axis=0), np.max(right, axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="10^12 multiply-adds of training" if against_work else "training steps",
             ylabel="right in everything, % (band: worst to best seed)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small",
                handlelength=3, title="model: blocks that see the text; seeds to a step")


def draw_figures(models: dict[str, list[dict]], to: Path):
    """work.png of the windows everywhere, in the middle and in front; positions.png, with the base,
    and where that uses the text, at the last step at which all its seeds were looked at."""
    windows, positions = [{name: models[name] for name in group if name in models}
                          for group in (GROUPS["windows"], [*GROUPS["positions"], BASE])]
    if len(windows) > 1:
        figure = Figure(figsize=(7, 5), layout="constrained")
        draw_curves(figure.subplots(), windows, against_work=True)
        figure.savefig(to / "work.png", dpi=120)
    if len(positions) > 1:
        base = [run for run in models.get(BASE, []) if run["where"]]
        step = min((run["where"][-1]["step"] for run in base), default=0)
        looks = looks_at(base, step)
        panels = 2 if looks else 1
        figure = Figure(figsize=(7 * panels, 5), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_curves(axes[-1], positions, against_work=False)
        if looks:
            shares = {block: np.median([look["lost_if_hidden"][block] for look in looks], axis=0)
                      for block in looks[0]["lost_if_hidden"]}
            where.draw_heat_map(axes[0], shares, looks[0]["blocks"],
                                f"{BASE}, median of {len(looks)} seeds, step {step:,}: rise of\n"
                                "the loss, text hidden in one block, % of that in all")
        figure.savefig(to / "positions.png", dpi=120)


def report(config: Config, names: list[str]):
    to, models = Path(config.to), {}
    to.mkdir(parents=True, exist_ok=True)
    if config.report:
        with reading(config.report, "runs that this program wrote"):
            results = json.loads(Path(config.report).read_text())[config.task]
    else:
        results = collect(to)[config.task]
    end = end_of(config, names[0])
    for name in names:
        whole = [run for run in results if run["name"] == name
                 and run["curve"][-1]["step"] >= end]
        if whole:
            models[name] = whole
    if not models:
        raise UserError(f"no run of {', '.join(names)} has come to step {end:,}: train one, "
                        "or give an earlier --until.")
    if short := sorted({run["name"] for run in results} & {*names} - {*models}):
        print(f"Left out, as no run has come to step {end:,}: {', '.join(short)}. "
              "An earlier --until has them.")
    steps = [{point["step"] for point in run["curve"]} for runs in models.values() for run in runs]
    steps = [step for step in sorted(set.intersection(*steps)) if step <= end]
    print_tables(models, steps)
    print_looks(models, steps[-1])
    print_forecast(models, steps[-1])
    draw_figures(models, to)
    print(f"\nMean ± half of its 95% interval over the seeds; of what not all reach, how many do. "
          f"All runs are in {config.report or to / 'results.json'}; look at the pictures in {to}.")


def draw_sweep(folder: Path, to: Path):
    """What is right against the guidance scale w, or FID against CLIP score, of each checkpoint."""
    results = [json.loads(path.read_text()) for path in folder.glob("*/eval.json")]
    if not results:
        raise UserError(f"{folder} holds no folders of evaluate.py with an eval.json in them.")
    results.sort(key=lambda result: (result["name"], result["protocol"]["guidance_scale"]))
    figure, curves = Figure(figsize=(7, 4.5), layout="constrained"), {}
    axes = figure.subplots()
    for result in results:
        protocol, scores = result["protocol"], result["scores"]
        w, name = protocol["guidance_scale"], (
            f"{result['name']}, {protocol['steps']} steps, seed {protocol['seed']}")
        if "fid" in scores:
            curves.setdefault(name, []).append((scores["clip_prefix"], scores["fid"]))
            axes.annotate(f" w = {w:g}", curves[name][-1])
            axes.set(xlabel="CLIP score (cosine x 100)", ylabel="FID")
        else:
            for group in ("seen", "unseen"):
                right = 100 * scores[group]["everything"]
                curves.setdefault(f"{name}, {group}", []).append((w, right))
            axes.set(xlabel="guidance scale w", ylabel="right in everything, %")
    for name, points in curves.items():
        axes.plot(*zip(*points), "o-", label=name)
    axes.legend()
    to.mkdir(parents=True, exist_ok=True)
    figure.savefig(to / "guidance.png", dpi=120)
    print(f"{len(results)} evaluations are drawn in {to / 'guidance.png'}.")


def main(config: Config):
    names = GROUPS.get(config.models, config.models.split(","))
    name, _, seed = (config.one or f"{names[0]}-0").rpartition("-")
    for unknown in {*names, name} - {*MODELS}:
        raise UserError(f"{unknown} is no model: expected {', '.join([*GROUPS, *MODELS])}.")
    if config.task == "S" and any("n_text" in MODELS[each] for each in {*names, name}):
        raise UserError("--task=S has 4 text blocks in all models: expected windows or positions.")
    if config.sweep:
        return draw_sweep(Path(config.sweep), Path(config.to))
    if config.one:
        return train_run(config, name, int(seed))
    if not config.report:
        train_all(config, [
            (name, seed) for seed in range(config.seeds) for name in names
            if not is_whole(config, name, seed)])
    report(config, names)


if __name__ == "__main__":
    run(main, Config)
