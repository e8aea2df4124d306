"""Do the paper's claims hold? The four models on captioned shapes: same seed, data and steps.

    python tests/compare.py                 # small: the models of train.py, 32x32 pixels, a CPU
    python tests/compare.py --seed=1        # once more, with another seed
    python tests/compare.py --size=S        # width 512, 256 image and 77 text tokens; wants a GPU
    python tests/compare.py --report=True   # trains nothing: only collects what there is

A fifth run gives intermediate/concat the training time of early/concat, not its number of steps.
Then all draw the same 1,000 held-out captions from the same noise, and the detector of evaluate.py
reads the pictures. A run that is there is not trained again; an interrupted one goes on. The report
takes the runs of all seeds together:

    out/compare-SIZE/MODEL-SEED/    the runs, with log.csv and eval.json
    out/compare-SIZE/results.json   every figure of every run; --to=assets: the README's files
        curves-SIZE.png             held-out loss against steps, and against multiply-adds spent
        compare-SIZE.png            the first held-out captions, a row for each model
"""
import csv
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import evaluate
import prepare_data
import train
from model import UserError, read_checkpoint, run
from prepare_data import write_json
from sample import draw_grid


@dataclass
class Config:
    size: str = "small"             # or S
    seed: int = 0                   # of the training
    steps: int = 0                  # of each model; 0 = the size's own
    n: int = 1000                   # held-out captions
    speed: float = 0.0              # images/s to early/concat's of the fifth run; 0 = by the logs
    report: bool = False            # True: train and evaluate nothing
    to: str = ""                    # folder of the report; "" = out/compare-SIZE


MODELS = {f"{fusion}-{how.split('_')[0]}": {"fusion": fusion, "conditioning": how}
          for fusion in ("early", "intermediate") for how in ("concat", "cross_attention")}
EQUAL_TIME = "intermediate-concat-equal-time"
SIZES = {       # size -> (constants of prepare_data.py, constants of train.py), where they differ
    "small": ({}, {"steps": 1200}),
    "S": ({"out": "data/shapes64", "image_size": 64, "context_len": 77},
          {"width": 512, "heads": 8, "depth": 13, "n_image": 4, "n_text": 4, "init_std": 0.02,
           "batch_size": 256, "steps": 3600, "learning_rate": 5e-4, "warmup": 500})}


# ---- 1. the runs ----

def folder_of(config: Config, name: str) -> Path:
    return Path("out") / f"compare-{config.size}" / f"{name}-{config.seed}"


def train_model(config: Config, name: str, choice: dict, steps: int):
    """Train one model, or go on with it; KeyboardInterrupt if it was stopped before its end."""
    prepare, constants = SIZES[config.size]
    folder, data = folder_of(config, name), prepare.get("out", train.Config.data)
    if not (Path(data) / "meta.json").exists():
        prepare_data.main(prepare_data.Config(**prepare))
    if there := (folder / "last.pt").exists():
        checkpoint = read_checkpoint(folder / "last.pt")
        planned = checkpoint["config"]["steps"]
        if planned != steps:            # its rate fell to 0 elsewhere: no run of that length
            raise UserError(f"{folder} is a run of {planned:,} steps, not of {steps:,}: ask for "
                            "its own --steps and --speed, or move it away.")
        if checkpoint["step"] >= steps:
            return
    print(f"\n---- {folder} ----")
    train.main(train.Config(**constants | choice | {
        "data": data, "name": str(folder.relative_to("out")), "seed": config.seed, "resume": there,
        "steps": steps, "validate_every": max(1, steps // 10), "save_every": max(1, steps // 4),
        "draw_every": steps, "score": False}))
    if read_checkpoint(folder / "last.pt")["step"] < steps:
        raise KeyboardInterrupt


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log.csv, with the columns that they fill."""
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in line.items() if value}
                for line in csv.DictReader(file)]


def median_speed(folder: Path) -> float:
    """images/s of a run, the median over its log."""
    return statistics.median(line["images_per_second"] for line in read_log(folder))


def train_all(config: Config):
    steps = config.steps or SIZES[config.size][1]["steps"]
    for name, choice in MODELS.items():
        train_model(config, name, choice, steps)
    early, intermediate = [median_speed(folder_of(config, name))
                           for name in ("early-concat", "intermediate-concat")]
    longer = round(steps * (config.speed or intermediate / early))
    train_model(config, EQUAL_TIME, MODELS["intermediate-concat"], longer)
    checkpoints = [folder_of(config, name) / "last.pt" for name in (*MODELS, EQUAL_TIME)]
    evaluate.main(evaluate.Config(checkpoint=",".join(map(str, checkpoints)), n=config.n,
                                  data=SIZES[config.size][0].get("out", evaluate.Config.data)))


# ---- 2. the report ----

def collect(folder: Path) -> dict:
    """The figures of one run."""
    result = json.loads((folder / "eval.json").read_text())
    checkpoint, log = read_checkpoint(folder / "last.pt"), read_log(folder)
    curve = [[line["step"], line["held_out_ema"]] for line in log if "held_out_ema" in line]
    protocol, (model, seed) = result["protocol"], folder.name.rsplit("-", 1)
    return {
        "model": model, "seed": int(seed), "steps": checkpoint["step"],
        **{key: result[key] for key in
           ("fusion", "conditioning", "parameters", "multiply_adds_text", "multiply_adds_per_step",
            "scores", "attention_rank_by_block", "device", "precision")},
        "multiply_adds": result["multiply_adds_text"] + result["multiply_adds_per_step"],
        "images_per_second": median_speed(folder), "training_seconds": log[-1]["seconds"],
        "held_out_loss": curve[-1][1], "curve": curve, "captions": protocol["pictures"],
        "sampling": {key: protocol[key] for key in ("sampler", "steps", "guidance_scale", "seed")},
        "torch": protocol["versions"]["torch"], "constants": checkpoint["config"]}


def summarise(values: list[float], digits: int) -> str:
    """The mean, and the lowest and highest where they differ."""
    mean, low, high = [f"{f(values):.{digits}f}" for f in (statistics.mean, min, max)]
    return mean if low == high else f"{mean} ({low} to {high})"


def print_tables(runs: list[dict]):
    """Two Markdown tables: the whole, and counting by the number asked for."""
    columns = {
        "steps": (0, lambda run: run["steps"]),
        "G multiply-adds": (3, lambda run: run["multiply_adds"] / 1e9),
        "held-out loss": (4, lambda run: run["held_out_loss"]),
        **{f"{kind}, seen": (1, lambda run, kind=kind: 100 * run["scores"]["seen"][kind])
           for kind in evaluate.KINDS},
        "everything, unseen": (1, lambda run: 100 * run["scores"]["unseen"]["everything"]),
        "attention rank": (2, lambda run: statistics.mean(run["attention_rank_by_block"].values()))}
    numbers = sorted(set.intersection(*({*run["scores"]["count_by_number"]} for run in runs)))
    by_number = {n: (0, lambda run, n=n: 100 * run["scores"]["count_by_number"][n])
                 for n in numbers}
    for title, columns in (("model", columns), ("count right, when asked for", by_number)):
        print(f"\n| {title} | seeds | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
        for name in (*MODELS, EQUAL_TIME):
            if same := [run for run in runs if run["model"] == name]:
                cells = [summarise([figure(run) for run in same], digits)
                         for digits, figure in columns.values()]
                print(f"| {name} | {len(same)} | {' | '.join(cells)} |")


def draw_curves(runs: list[dict]) -> Image.Image:
    """Held-out loss, mean of the seeds, against steps and against the work of training.

    The first fifth of the steps, where it is far higher, is left out.
    """
    by_steps, by_work = {}, {}
    for name in MODELS:
        same = [run for run in runs if run["model"] == name]
        same = [run for run in same if run["steps"] == same[0]["steps"]]
        for points in zip(*(run["curve"] for run in same)):
            step, loss = points[0][0], statistics.mean(loss for _, loss in points)
            work = 3 * step * same[0]["constants"]["batch_size"] * same[0]["multiply_adds"] / 1e12
            if step > same[0]["steps"] / 5:
                by_steps.setdefault(name, []).append((step, loss, ""))
                by_work.setdefault(name, []).append((work, loss, ""))
    plots = [evaluate.draw_plot(by_steps, "training steps", "held-out loss (EMA)"),
             evaluate.draw_plot(by_work, "10^12 multiply-adds of training", "held-out loss (EMA)")]
    both = Image.new("RGB", (plots[0].width, 2 * plots[0].height), "white")
    both.paste(plots[0], (0, 0))
    both.paste(plots[1], (0, plots[0].height))
    return both


def draw_pictures(folders: list[Path], columns: int = 8) -> Image.Image:
    """The first held-out captions as the runs in `folders` draw them, a row for each."""
    pictures, labels = [], []
    for run in folders:
        name, _ = run.name.rsplit("-", 1)
        latest = max((run / "eval").glob("*"), key=lambda folder: folder.stat().st_mtime)
        for path, caption in list(zip(*evaluate.read_pictures(latest)))[:columns]:
            pictures.append(torch.tensor(evaluate.load_picture(path)).permute(2, 0, 1))
            labels.append(f"{name}: {caption}")
    return draw_grid(torch.stack(pictures), labels, columns)


def report(config: Config):
    group = Path("out") / f"compare-{config.size}"
    to = Path(config.to or group)
    folders = sorted(path.parent for path in group.glob("*/eval.json"))
    if not folders:
        raise UserError(f"{group} holds no evaluated run: leave out --report=True to train some.")
    runs, path = [collect(folder) for folder in folders], to / "results.json"
    to.mkdir(parents=True, exist_ok=True)
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {config.size: runs})
    draw_curves(runs).save(to / f"curves-{config.size}.png")
    first = [next((folder for folder in folders if folder.name.rsplit("-", 1)[0] == name), None)
             for name in MODELS]
    draw_pictures(list(filter(None, first))).save(to / f"compare-{config.size}.png")
    print_tables(runs)
    print(f"\n{len(runs)} runs are in {path}; look at curves-{config.size}.png and "
          f"compare-{config.size}.png beside it.")


def main(config: Config):
    if config.size not in SIZES:
        raise UserError(f"--size={config.size}: expected {' or '.join(SIZES)}.")
    if not config.report:
        train_all(config)
    report(config)


if __name__ == "__main__":
    run(main, Config)
