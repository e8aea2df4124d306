"""Do the paper's claims hold? The four models on captioned shapes, with the same seed, data order and number of steps.

    python tests/compare.py                         # the small setting: the models of `python train.py`, 32x32 pixels, a CPU
    python tests/compare.py --seed=1                # once more, with another seed
    python tests/compare.py --size=S                # the paper's width 512, 256 image tokens and 77 text tokens; wants a GPU
    python tests/compare.py --report=True           # trains nothing: only collects what there is

A fifth run gives intermediate/concat the training time of early/concat instead of its number of steps. Then all draw the same 1,000
held-out captions from the same noise, and the detector of evaluate.py reads the pictures. A run that is there already is not
trained again, and one that was interrupted goes on. The report takes the runs of all seeds together:

    out/compare-SIZE/MODEL-SEED/    the runs, with log.csv and eval.json
    assets/results.json             every figure of every run, by size
    assets/curves-SIZE.png          held-out loss against steps, and against the multiply-adds spent on training
    assets/compare-SIZE.png         the first pictures of the first seed, a row for each model
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
    speed: float = 0.0              # images/s of intermediate/concat to early/concat, for the run of equal time; 0 = by the logs
    report: bool = False            # True: train and evaluate nothing


MODELS = {f"{fusion}-{conditioning.split('_')[0]}": {"fusion": fusion, "conditioning": conditioning}
          for fusion in ("early", "intermediate") for conditioning in ("concat", "cross_attention")}
EQUAL_TIME = "intermediate-concat-equal-time"
SIZES = {       # size -> (constants of prepare_data.py, constants of train.py) that differ from those in the files
    "small": ({}, {"steps": 2000}),
    "S": ({"out": "data/shapes64", "image_size": 64, "context_len": 77},
          {"width": 512, "heads": 8, "depth": 13, "n_image": 4, "n_text": 4, "init_std": 0.02,
           "batch_size": 256, "steps": 3600, "learning_rate": 5e-4, "warmup": 500})}


def folder_of(config: Config, name: str) -> Path:
    return Path("out") / f"compare-{config.size}" / f"{name}-{config.seed}"


def train_model(config: Config, name: str, choice: dict, steps: int):
    """Train, or go on with, one model; raises KeyboardInterrupt if it was stopped before its end."""
    prepare, constants = SIZES[config.size]
    folder = folder_of(config, name)
    data = prepare.get("out", train.Config.data)
    if not (Path(data) / "meta.json").exists():
        prepare_data.main(prepare_data.Config(**prepare))
    there = (folder / "last.pt").exists()
    if not there or read_checkpoint(folder / "last.pt")["step"] < steps:
        print(f"\n---- {folder} ----")
        train.main(train.Config(**constants | choice | {"steps": steps}, data=data, seed=config.seed, resume=there,
                                name=str(folder.relative_to("out")), validate_every=steps // 10, save_every=steps // 4,
                                draw_every=steps, score=False))
        if read_checkpoint(folder / "last.pt")["step"] < steps:
            raise KeyboardInterrupt


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log.csv, with the columns that they fill."""
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)]


def median_speed(folder: Path) -> float:
    """images/s of a run, the median over its log."""
    return statistics.median(line["images_per_second"] for line in read_log(folder))


def train_all(config: Config):
    steps = config.steps or SIZES[config.size][1]["steps"]
    for name, choice in MODELS.items():
        train_model(config, name, choice, steps)
    early, intermediate = [median_speed(folder_of(config, name)) for name in ("early-concat", "intermediate-concat")]
    longer = round(steps * (config.speed or intermediate / early))
    train_model(config, EQUAL_TIME, MODELS["intermediate-concat"], longer)
    checkpoints = [folder_of(config, name) / "last.pt" for name in (*MODELS, EQUAL_TIME)]
    evaluate.main(evaluate.Config(checkpoint=",".join(map(str, checkpoints)), n=config.n,
                                  data=SIZES[config.size][0].get("out", evaluate.Config.data)))


# ---- the report ----

def collect(folder: Path) -> dict:
    """The figures of one run."""
    log, result, checkpoint = read_log(folder), json.loads((folder / "eval.json").read_text()), read_checkpoint(folder / "last.pt")
    model, seed = folder.name.rsplit("-", 1)
    keys = ("fusion", "conditioning", "parameters", "multiply_adds_text", "multiply_adds_per_step", "attention_rank_by_block",
            "scores", "device", "precision")
    constants = checkpoint["config"]
    validated = [line for line in log if "held_out_ema" in line]
    return {"model": model, "seed": int(seed), "steps": checkpoint["step"], "batch_size": constants["batch_size"],
            "images_per_second": median_speed(folder), "training_seconds": log[-1]["seconds"],
            "held_out_loss": validated[-1]["held_out_ema"], "curve": [[line["step"], line["held_out_ema"]] for line in validated],
            **{key: result[key] for key in keys}, "sampling": {key: result["protocol"][key] for key in ("steps", "guidance_scale")},
            "captions": result["protocol"]["pictures"], "torch": result["protocol"]["versions"]["torch"], "constants": constants}


def summarise(values: list[float], digits: int) -> str:
    """The mean, and the lowest and highest where they differ."""
    mean, lowest, highest = [f"{choose(values):.{digits}f}" for choose in (statistics.mean, min, max)]
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def print_table(runs: list[dict]):
    columns = {"steps": (0, lambda run: run["steps"]),
               "G multiply-adds": (3, lambda run: (run["multiply_adds_text"] + run["multiply_adds_per_step"]) / 1e9),
               "held-out loss": (4, lambda run: run["held_out_loss"]),
               **{f"{kind}, seen": (1, lambda run, kind=kind: 100 * run["scores"]["seen"][kind]) for kind in evaluate.KINDS},
               "everything, unseen": (1, lambda run: 100 * run["scores"]["unseen"]["everything"]),
               "attention rank": (2, lambda run: statistics.mean(run["attention_rank_by_block"].values()))}
    print(f"\n| model | seeds | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
    for name in (*MODELS, EQUAL_TIME):
        same = [run for run in runs if run["model"] == name]
        if same:
            cells = [summarise([figure(run) for run in same], digits) for digits, figure in columns.values()]
            print(f"| {name} | {len(same)} | {' | '.join(cells)} |")


def draw_curves(runs: list[dict]) -> Image.Image:
    """Mean held-out loss over the seeds, against steps and against the work done; the first fifth, far higher, is left out."""
    plots = []
    for label in ("training steps", "training, in peta (10^15) multiply-adds"):
        curves = {}
        for name in MODELS:
            same = [run for run in runs if run["model"] == name]
            for points in zip(*(run["curve"] for run in same)):
                step, run = points[0][0], same[0]
                work = 3 * step * run["batch_size"] * (run["multiply_adds_text"] + run["multiply_adds_per_step"]) / 1e15
                if step > same[0]["steps"] / 5:
                    curves.setdefault(name, []).append((step if label == "training steps" else work,
                                                        statistics.mean(loss for _, loss in points), ""))
        plots.append(evaluate.draw_plot(curves, label, "held-out loss (EMA)"))
    both = Image.new("RGB", (plots[0].width, sum(plot.height for plot in plots)), "white")
    for i, plot in enumerate(plots):
        both.paste(plot, (0, i * plots[0].height))
    return both


def draw_pictures(runs: list[dict], config: Config, columns: int = 8) -> Image.Image:
    """The first held-out captions as the models of the first seed draw them."""
    pictures, labels = [], []
    for name in MODELS:
        folder = folder_of(config, name)
        paths, captions = evaluate.read_pictures(max((folder / "eval").glob("*"), key=lambda path: path.stat().st_mtime))
        pictures += [torch.from_numpy(evaluate.load_picture(path).copy()).permute(2, 0, 1) for path in paths[:columns]]
        labels += [f"{name}: {caption}" for caption in captions[:columns]]
    return draw_grid(torch.stack(pictures), labels, columns)


def report(config: Config):
    folders = sorted(path.parent for path in Path("out", f"compare-{config.size}").glob("*/eval.json"))
    if not folders:
        raise UserError(f"out/compare-{config.size} holds no evaluated run: leave out --report=True to train some.")
    runs = [collect(folder) for folder in folders]
    assets = ROOT / "assets"
    results = assets / "results.json"
    write_json(results, (json.loads(results.read_text()) if results.exists() else {}) | {config.size: runs})
    draw_curves(runs).save(assets / f"curves-{config.size}.png")
    draw_pictures(runs, config).save(assets / f"compare-{config.size}.png")
    print_table(runs)
    print(f"\n{len(runs)} runs are in {results}; look at curves-{config.size}.png and compare-{config.size}.png beside it.")


def main(config: Config):
    if config.size not in SIZES:
        raise UserError(f"--size={config.size}: expected {' or '.join(SIZES)}.")
    if not config.report:
        train_all(config)
    report(config)


if __name__ == "__main__":
    run(main, Config)
