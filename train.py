"""Train a text-to-image U-ViT on a cache of latents and text features.

    python train.py                                 # captioned shapes; needs no data and no GPU
    python train.py --fusion=early --name=early     # the U-ViT baseline, from the same constants
    python train.py --resume=True                   # go on, exactly, after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=4 train.py           # several GPUs

Edit a constant below and run again, or override it with --key=value. One step, as in `main`:

    batch -> rate -> loss -> backward -> clip -> step -> EMA -> log -> validate -> save, draw

    z0 = scale * sample(moments)
    zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps
    loss = |net(zt, t, text) - eps|^2

In a tenth of the pairs the text is replaced by that of the empty caption, which makes guidance
possible [CFG]. All chance is a function of (seed, step), so a resumed run draws what an unbroken
one would have drawn.

out/NAME/ holds last.pt, best.pt (lowest held-out loss), log.csv, and samples/step_000500.png: the
same prompts and noise every time, raw weights above EMA. A checkpoint is written to a temporary
name and then moved, so a crash never costs the one before.

[U-ViT] arXiv 2209.12152   [CFG] arXiv 2207.12598
"""
import copy
import csv
import dataclasses
import datetime
import itertools
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import evaluate
import prepare_data
import sample
from model import (CHECKPOINT_FORMAT, UserError, UViT, UViTConfig, autocast, choose_device,
                   choose_precision, command, compile_guarded, count_multiply_adds,
                   noise_schedule, read_checkpoint, run)
from vae import load_autoencoder, sample_latent, to_uint8


@dataclass
class Config:
    # the run
    data: str = "data/shapes"       # a folder made by prepare_data.py
    weights: str = "weights"        # folder of the public weights, for the autoencoder
    name: str = "shapes"            # results go to out/NAME or, if that is taken, out/NAME-2, ...
    resume: bool = False            # True: go on with out/NAME/last.pt
    seed: int = 0
    # the model (see model.py); image size, channels and text length come with the data
    fusion: str = "intermediate"    # or early
    conditioning: str = "concat"    # or cross_attention
    depth: int = 9                  # early only
    n_image: int = 2                # this and the next three: intermediate only
    n_fuse: int = 3
    n_text: int = 2
    fuse_shift: int = 0
    patch_size: int = 1
    width: int = 128
    heads: int = 4
    # optimisation
    steps: int = 3300
    batch_size: int = 32            # pictures at a time, over all GPUs
    grad_accum: int = 1             # batches per step
    learning_rate: float = 3e-3     # U-ViT: 2e-4, for a million steps
    warmup: int = 200               # steps from 0 to the full rate
    cooldown: float = 1.0           # last share of the steps, with a falling rate; U-ViT: 0
    beta: float = 0.9               # both of AdamW's [U-ViT]
    weight_decay: float = 0.03      # of every parameter [U-ViT]
    grad_clip: float = 1.0          # largest norm of a gradient; 0 = any, as in U-ViT
    t_power: float = 0.4            # t = 1000 u^t_power, u uniform; < 1: more noise; U-ViT: 1
    p_uncond: float = 0.1           # share of the pairs trained without text [CFG]
    ema_decay: float = 0.999        # U-ViT: 0.9999
    init_std: float = 0.06          # of the linear weights; U-ViT: 0.02 at width 512
    waves: bool = True              # image positions start as sine waves; U-ViT: normal(0.02)
    # speed
    precision: str = "auto"         # or float32, bfloat16, float16
    compile: str = "auto"           # torch.compile: on, off, auto (on CUDA; a CPU gains only 3%)
    # reports
    log_every: int = 50
    validate_every: int = 500
    draw_every: int = 500
    save_every: int = 500
    validation_images: int = 500
    guidance_scale: float = 3.0     # of the sample grids and of the score at the end
    sample_steps: int = 20
    score: bool = True              # evaluate last.pt when training has ended (shapes)
    wandb: bool = False             # True: also log to Weights & Biases (pip install wandb)


# ---- 1. processes, devices and constants ----

def start_processes() -> tuple[int, int, torch.device]:
    """(rank, processes, device): one process, or one per GPU under torchrun (on CPUs with gloo)."""
    if "RANK" not in os.environ:
        return 0, 1, choose_device()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size(), choose_device()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# dense bfloat16 / float16 TFLOP/s of the data sheets, for the share of the peak (MFU)
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "RTX 3090": 71, "L40S": 362,
               "A6000": 155}


def images_at_peak(uvit: UViTConfig, world: int, device: torch.device) -> float | None:
    """Images/s that a known GPU allows: 6 FLOPs per multiply-add, forward and backward."""
    for key, tflops in PEAK_TFLOPS.items():
        if key in device_name(device):
            return world * tflops * 1e12 / (6 * sum(count_multiply_adds(uvit)))


def check(config: Config, world: int):
    """Refuse impossible constants before anything is read or written."""
    for key in ("steps", "batch_size", "grad_accum", "log_every", "validate_every", "draw_every",
                "save_every", "validation_images", "sample_steps"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: expected 1 or more.")
    for key in ("seed", "warmup", "cooldown", "grad_clip", "learning_rate"):
        if getattr(config, key) < 0:
            raise UserError(f"{key}={getattr(config, key)}: expected 0 or more.")
    if Path(config.name).is_absolute() or ".." in Path(config.name).parts or not config.name:
        raise UserError(f"--name={config.name}: expected a folder below out/, such as shapes.")
    describe_uvit(config, image_size=config.patch_size, channels=1, context_len=1, context_dim=1)
    if config.batch_size % world:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the {world} "
                        f"processes that share it.")
    for key, choices in (("precision", ["auto", "float32", "bfloat16", "float16"]),
                         ("compile", ["auto", "on", "off"])):
        if getattr(config, key) not in choices:
            raise UserError(f"--{key}={getattr(config, key)}: expected "
                            f"{', '.join(choices[:-1])} or {choices[-1]}.")
    if config.wandb and find_spec("wandb") is None:
        raise UserError("--wandb=True needs the package: pip install wandb.")


# ---- 2. batches ----

def seeded(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for this key, hashed: torch's CPU generator looks at 32 bits of a seed only."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


class Batches:
    """Training batches as a function of the step. Arrays live on the device if they fit."""

    def __init__(self, cache: prepare_data.Cache, config: Config, rank: int, world: int,
                 device: torch.device):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.moments, self.text = self.place(cache.train.moments), self.place(cache.text)
        self.scale, self.count = cache.meta["latent_scale"], len(cache.train.moments)
        self.pairs = torch.from_numpy(cache.train.pairs)            # (K, 2): picture, text row
        pictures = self.pairs[:, 0].contiguous()                    # ascending
        self.first = torch.searchsorted(pictures, torch.arange(self.count + 1))     # pair of each

    def place(self, array):
        if self.device.type == "cuda" and array.nbytes < 0.3 * torch.cuda.mem_get_info()[0]:
            return torch.from_numpy(array[:]).to(self.device)
        return torch.from_numpy(array)                              # its rows are read as needed

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device; nobody waits for the copy, since it starts from pinned memory."""
        cuda = self.device.type == "cuda"
        return (x.pin_memory() if cuda else x).to(self.device, non_blocking=cuda)

    def rows(self, tensor, index):
        """tensor[index] on the device, in float32."""
        there = tensor.device == self.device
        return (tensor[self.send(index)] if there else self.send(tensor[index])).float()

    def choose(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures, each once per epoch, and the text row of a caption of each, or 0: no text."""
        position = torch.arange(step * size, (step + 1) * size)
        epochs, pictures = position // self.count, torch.empty_like(position)
        for epoch in epochs.unique().tolist():
            order = torch.randperm(self.count, generator=seeded(self.config.seed, 0, epoch))
            inside = epochs == epoch
            pictures[inside] = order[position[inside] % self.count]
        generator = seeded(self.config.seed, 1, step)
        first, after = self.first[pictures], self.first[pictures + 1]
        caption = first + (torch.rand(size, generator=generator) * (after - first)).long()
        dropped = torch.rand(size, generator=generator) < self.config.p_uncond
        return pictures, torch.where(dropped, 0, self.pairs[caption, 1])

    def read(self, step: int) -> list[tuple[torch.Tensor, ...]]:
        """`grad_accum` batches z0, eps (B, C, H, W), t (B,), context (B, L, E) of this process."""
        config, device = self.config, self.device
        size = config.batch_size * config.grad_accum
        pictures, text_rows = self.choose(step, size)
        generator = seeded(config.seed, 2, step, device=device)
        _, twice_channels, H, W = self.moments.shape                # mean and log variance
        shape = (2, size, twice_channels // 2, H, W)
        noise, eps = torch.randn(shape, generator=generator, device=device)
        u = torch.rand(size, generator=generator, device=device)
        t = (1000 * u ** config.t_power).ceil().clamp(1, 1000).long()
        batches, share = [], config.batch_size // self.world
        for i in range(config.grad_accum):
            first = i * config.batch_size + self.rank * share
            mine = slice(first, first + share)
            moments = self.rows(self.moments, pictures[mine])       # (B, 2C, H, W)
            z0 = self.scale * sample_latent(moments, noise[mine])
            batches.append((z0, eps[mine], t[mine], self.rows(self.text, text_rows[mine])))
        return batches

    def stream(self, start: int, stop: int):
        """The batches of steps start..stop-1; on CUDA, a thread reads one step ahead."""
        if self.device.type != "cuda":      # on a CPU it would only get in the way
            yield from map(self.read, range(start, stop))
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self.read, start)
            for step in range(start, stop):
                batches, pending = pending.result(), reader.submit(self.read, step + 1)
                yield batches


# ---- 3. loss ----

def compute_loss(net, alpha_bar, precision, z0, eps, t, context) -> torch.Tensor:
    """Mean squared error of the noise, unweighted [U-ViT]; in float32 outside the network."""
    a = alpha_bar[t][:, None, None, None]                           # (B, 1, 1, 1)
    zt = a.sqrt() * z0 + (1 - a).sqrt() * eps                       # (B, C, H, W)
    with autocast(zt.device, precision):
        predicted = net(zt, t, context)
    return F.mse_loss(predicted.float(), eps)


class HeldOut:
    """Held-out loss, on the same pictures, captions, time steps and noise every time."""

    def __init__(self, cache: prepare_data.Cache, count: int, device: torch.device):
        pairs = torch.from_numpy(cache.val.pairs)[:count]           # (count, 2): picture, text row
        self.count = count = len(pairs)
        generator = torch.Generator().manual_seed(0)
        moments = torch.from_numpy(cache.val.moments[pairs[:, 0].numpy()])
        shape = (2, count, *cache.meta["latent_shape"])
        noise, eps = torch.randn(shape, generator=generator)      # (count, C, H, W) each
        z0 = cache.meta["latent_scale"] * sample_latent(moments, noise)
        t = torch.linspace(1, 1000, count).long()[torch.randperm(count, generator=generator)]
        context = torch.from_numpy(cache.text[pairs[:, 1].numpy()]).float()
        self.batches = list(zip(*(x.to(device).split(64) for x in (z0, eps, t, context))))

    @torch.no_grad()
    def loss(self, net, alpha_bar, precision) -> float:
        losses = [compute_loss(net, alpha_bar, precision, *batch) * len(batch[0])
                  for batch in self.batches]
        return (torch.stack(losses).sum() / self.count).item()


# ---- 4. reports ----

class Progress:
    """How the run goes. What is counted each step stays on the device: only a report waits."""

    def __init__(self, config: Config, folder: Path, checkpoint: dict, data: Batches, peak, say):
        self.config, self.folder, self.peak, self.say = config, folder, peak, say
        self.world, self.size = data.world, config.batch_size * config.grad_accum
        self.losses = torch.zeros(2, device=data.device)        # their sum and number
        self.streak = torch.zeros((), device=data.device)       # of steps that were not finite
        self.skipped = torch.tensor(checkpoint["skipped"], device=data.device)
        self.best, self.rises = checkpoint["best"], checkpoint["rises"]
        self.step, self.time = checkpoint["step"], time.perf_counter()  # of the last report
        self.began = self.time - checkpoint["seconds"]

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"best": self.best, "rises": self.rises,
                "seconds": time.perf_counter() - self.began, "skipped": int(self.skipped)}

    def add(self, loss: torch.Tensor):
        """The loss of one more batch; the mean is over those that are finite."""
        finite = loss.isfinite()
        self.losses += torch.stack([torch.where(finite, loss, 0), finite.float()])

    def count(self, grad_norm: torch.Tensor):
        """One more step. It was left out if its gradient is not finite."""
        finite = grad_norm.isfinite()
        self.skipped = self.skipped + ~finite
        self.streak = torch.where(finite, 0, self.streak + 1)

    def report(self, step: int, rate: float, grad_norm: torch.Tensor) -> dict:
        """The line of log.csv, printed too; loss and speed are means since the one before."""
        if self.world > 1:
            dist.all_reduce(self.losses)
        total, number = self.losses.tolist()                            # waits for the device
        now = time.perf_counter()
        speed = (step - self.step) * self.size / (now - self.time)
        skipped, loss = int(self.skipped), total / number if number else math.nan
        line = {"step": step, "seconds": now - self.began, "loss": loss,
                "learning_rate": rate, "grad_norm": grad_norm.item(),
                "images_per_second": speed, "skipped": skipped}
        self.losses.zero_()
        self.step, steps = step, self.config.steps
        left = datetime.timedelta(seconds=round((steps - step) * self.size / speed))
        self.say(f"step {step:,}/{steps:,}  loss {line['loss']:.4f}  {speed:,.0f} images/s"
                 + (f"  {100 * speed / self.peak:.0f}% of peak" if self.peak else "")
                 + f"  {left} left" + (f"  ({skipped} skipped: not finite)" if skipped else ""))
        if self.streak >= 10:
            third = self.config.learning_rate / 3
            raise UserError(f"Ten steps in a row were not finite; the weights in "
                            f"{self.folder / 'last.pt'} are sound. Go on from there with a lower "
                            f"rate: {command_line(self.config, resume=True, learning_rate=third)}")
        return line

    def judge(self, raw: float, ema: float) -> bool:
        """Print the held-out losses; True if that of the EMA is the lowest so far."""
        self.say(f"           held-out loss {raw:.4f}, of the EMA {ema:.4f}")
        self.rises = self.rises + 1 if ema > self.best else 0
        if self.rises == 5:
            self.say(f"           it has not fallen for five checks: the model begins to learn the "
                     f"training pictures by heart; {self.folder / 'best.pt'} is the one to use.")
        lowest = ema < self.best
        self.best = ema if lowest else self.best
        return lowest


class Log:
    """log.csv, one line per report, and Weights & Biases if asked for."""
    COLUMNS = ["step", "seconds", "loss", "learning_rate", "grad_norm", "images_per_second",
               "skipped", "held_out_raw", "held_out_ema"]

    def __init__(self, folder: Path, config: Config, step: int):
        """Lines after `step`, that of the checkpoint, are dropped: they will be written again."""
        self.path, lines = folder / "log.csv", []
        if self.path.exists():
            with open(self.path, newline="", errors="replace") as file:
                lines = [line for line in csv.DictReader(file)  # the last may have been cut short
                         if None not in line.values() and line["step"].isdigit()
                         and int(line["step"]) <= step]
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(lines)
        self.tracker = None
        if config.wandb:
            import wandb
            self.tracker = wandb.init(project="midfuse", name=config.name,
                                      config=dataclasses.asdict(config))

    def write(self, line: dict):
        rounded = {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in line.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(rounded)
        if self.tracker:
            self.tracker.log(line, step=line["step"])


class Drawer:
    """The sample grid: eight held-out captions, raw weights in the first row, EMA in the second."""

    def __init__(self, cache: prepare_data.Cache, config: Config, device: torch.device):
        self.config, self.scale = config, cache.meta["latent_scale"]
        rows = list(dict.fromkeys(cache.val.pairs[:, 1].tolist()))[:8]
        self.captions = [cache.captions[row] for row in rows]
        self.context = torch.from_numpy(cache.text[rows]).float().to(device)
        self.null_context = torch.from_numpy(cache.text[0]).float().to(device)
        self.autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder,
                                            config.weights).to(device)

    def draw(self, nets: list[UViT], path: Path):
        rows = torch.arange(len(self.captions))
        latents = [sample.sample_latents(net, self.context, rows, self.null_context, rows.tolist(),
                                         self.config.sample_steps, self.config.guidance_scale)
                   for net in nets]
        try:
            pictures = to_uint8(self.autoencoder.decode(torch.cat(latents) / self.scale)).cpu()
        except FloatingPointError as error:                     # must not cost the run
            return print(f"{path} is not drawn: {error}")
        captions = [f"{kind}: {caption}" for kind in ("raw", "EMA") for caption in self.captions]
        path.parent.mkdir(exist_ok=True)
        sample.draw_grid(pictures, captions, columns=len(self.captions)).save(path)


def print_facts(config: Config, net: UViT, data: Batches, meta: dict, precision: torch.dtype):
    uvit, (channels, height, width) = net.config, meta["latent_shape"]
    multiply_adds = sum(count_multiply_adds(uvit)) / 1e9
    size = config.batch_size * config.grad_accum
    print(f"{uvit.fusion} fusion by {uvit.conditioning}: {uvit.blocks} blocks, "
          f"text in {uvit.window.start}..{uvit.window.stop - 1}, {uvit.text_blocks} text blocks, "
          f"width {uvit.width}; {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"{multiply_adds:.3f} G multiply-adds = {2 * multiply_adds:.3f} GFLOPs per image")
    print(f"{data.count:,} pictures with {len(data.pairs):,} captions, "
          f"latents {channels}x{height}x{width}; "
          f"{config.steps:,} steps of {size} = {config.steps * size / data.count:.3g} epochs; "
          f"{data.world} x {device_name(data.device)}, {str(precision).removeprefix('torch.')}")
    print(f"text tower: {meta['text_tower']['about']}; autoencoder: {meta['autoencoder']['about']}")


# ---- 5. the run and its files ----

def command_line(config: Config, **changes) -> str:
    """The `train.py` command of a configuration, on as many GPUs as now."""
    line, n = command("train.py", dataclasses.replace(config, **changes)), os.getenv("WORLD_SIZE")
    return line.replace("python", f"torchrun --standalone --nproc_per_node={n}", 1) if n else line


def open_new(config: Config, rank: int, world: int) -> tuple[Path, dict]:
    """A folder of its own for a new run, and what its checkpoint counts before the first step.

    The folder is the first of out/NAME, out/NAME-2, ... that is not there yet.
    """
    folders = [None]
    for number in itertools.count(1) if rank == 0 else ():
        folders = [Path("out") / (config.name if number == 1 else f"{config.name}-{number}")]
        try:
            folders[0].mkdir(parents=True)
            break
        except FileExistsError:
            continue
    if world > 1:
        dist.broadcast_object_list(folders)
    return folders[0], {"step": 0, "best": math.inf, "rises": 0, "seconds": 0.0, "skipped": 0}


def open_old(config: Config, uvit: UViTConfig, meta: dict, say) -> tuple[Path, dict]:
    """The folder and last.pt of the run to go on with; UserError if that is not possible."""
    path = Path("out") / config.name / "last.pt"
    if not path.exists():
        runs = sorted(str(run.parent.relative_to("out")) for run in Path("out").rglob("last.pt"))
        raise UserError(f"{path} does not exist: there is no run of that name to go on with. "
                        f"Runs in out/: {', '.join(runs) or 'none'}; name one with --name.")
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds weights alone, not a run of train.py to go on with.")
    step, then = checkpoint["step"], checkpoint["config"]
    before = {key: then.get(key, value) for key, value in vars(config).items()}
    if checkpoint["uvit"] != uvit or checkpoint["meta"] != meta:
        side = "architecture" if checkpoint["uvit"] != uvit else "data cache"
        raise UserError(f"{path} was trained with another {side} than this command's; its own "
                        f"command is: {command_line(Config(**before), resume=True)}")
    if step >= config.steps:
        raise UserError(f"{path} is at step {step:,} already: raise --steps={config.steps} "
                        f"to go on.")
    changed = ", ".join(f"{key} {before[key]} -> {value}" for key, value in vars(config).items()
                        if before[key] != value and key != "resume")
    also = f" with other constants than before: {changed}" if changed else ""
    say(f"going on from step {step:,}{also}")
    return path.parent, checkpoint


def save_checkpoint(path: Path, checkpoint: dict):
    """Write to a temporary name, then move: whatever happens, the file before stays whole."""
    if not all(x.isfinite().all() for name in ("model", "ema") for x in checkpoint[name].values()):
        raise UserError(f"Weights are not finite at step {checkpoint['step']}, and are not saved: "
                        f"go back to {path.parent / 'last.pt'} with --resume=True and a lower "
                        f"--learning_rate.")
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch's writer hides a full disk in the latter
        advice = ("what was there before is whole. Make room, then --resume=True."
                  if path.exists() else "make room, and run it again.")
        raise UserError(f"{path} could not be written ({error}): is the disk full? If so, "
                        f"{advice}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def stop_gently(config: Config, folder: Path, world: int):
    """Gives a list that the first Ctrl-C or SIGTERM fills; the second ends the run at once.

    Running out of memory is answered with the command that needs less.
    """
    asked = []

    def ask(number, _):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("Stopping after this step, to save it; once more ends the run at once.")
    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except torch.OutOfMemoryError:
        B, accum = config.batch_size, config.grad_accum
        smaller = command_line(config, batch_size=B // 2, grad_accum=2 * accum,
                               resume=(folder / "last.pt").exists())
        advice = (f"try {smaller} (the same effective batch)." if B % (2 * world) == 0 else
                  "make --batch_size smaller, or the model.")
        raise UserError(f"Out of memory at batch_size={B}: {advice}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- 6. training ----

def describe_uvit(config: Config, **data) -> UViTConfig:
    """The network's configuration: the constants that it shares, and the sizes of the data."""
    names = [field.name for field in dataclasses.fields(UViTConfig) if hasattr(config, field.name)]
    return UViTConfig(**data | {name: getattr(config, name) for name in names})


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `cooldown` of the steps."""
    steps, cooldown = config.steps, config.cooldown * config.steps
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    fall = min(1.0, (steps - step) / cooldown) if cooldown else 1.0
    return config.learning_rate * rise * fall


def open_cache(config: Config, rank: int, world: int) -> tuple[prepare_data.Cache, UViTConfig]:
    """The data and a network's configuration that fits it. A first run makes the default data."""
    if rank == 0 and config.data == Config.data and not (Path(config.data) / "meta.json").exists():
        prepare_data.main(prepare_data.Config())
    if world > 1:
        dist.barrier()
    cache = prepare_data.read_cache(config.data)
    channels, image_size, _ = cache.meta["latent_shape"]
    _, context_len, context_dim = cache.text.shape
    return cache, describe_uvit(config, image_size=image_size, channels=channels,
                                context_len=context_len, context_dim=context_dim)


def start_network(config: Config, uvit: UViTConfig, checkpoint: dict, precision, device):
    """(net, ema, optimizer, scaler) at random, or as in the checkpoint of a run to go on with."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    net = UViT(uvit, config.init_std)
    if config.waves:
        net.start_positions_as_waves()
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, (config.beta,) * 2,
                                  weight_decay=config.weight_decay, fused=True)
    # float16 needs the scaler; else its scale is 1, and it only skips steps that are not finite.
    half = precision == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0 if half else 1.0)
    if config.resume:
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:                    # they may have been changed since
            group.update(betas=(config.beta,) * 2, weight_decay=config.weight_decay)
        if half and checkpoint["scaler"]["scale"] > 1:          # else it was not of float16
            scaler.load_state_dict(checkpoint["scaler"])
    return net, ema, optimizer, scaler


def finish(config: Config, folder: Path, step: int, cache: prepare_data.Cache, device, stop: list):
    """Say how to go on with a stopped run; score one that has ended, and say how to draw."""
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    if step < config.steps:
        return print(f"Stopped at step {step:,}; go on with: {command_line(config, resume=True)}")
    shared = {"checkpoint": str(folder / "last.pt"), "weights": config.weights,
              "guidance_scale": config.guidance_scale}
    scoring = evaluate.Config(**shared, data=config.data, steps=config.sample_steps,
                              compile=config.compile)
    drawing = sample.Config(**shared, prompt=cache.captions[cache.val.pairs[0, 1]])
    if config.score and cache.meta["dataset"] == "shapes":
        try:
            if stop:
                raise KeyboardInterrupt
            evaluate.main(scoring)
        except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
            why = "interrupted"
            if isinstance(error, torch.OutOfMemoryError):
                why, scoring.batch_size = "out of memory", scoring.batch_size // 4
            print(f"\nThe run is whole and saved, but not scored ({why}). Score it with:\n"
                  f"  {command('evaluate.py', scoring)}")
    print(f"Look at {folder / 'samples'}; then draw with:\n  {command('sample.py', drawing)}")


def main(config: Config):
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    check(config, world)
    precision = (choose_precision(device) if config.precision == "auto"
                 else getattr(torch, config.precision))
    cache, uvit = open_cache(config, rank, world)
    if config.resume:
        folder, checkpoint = open_old(config, uvit, cache.meta, say)
    else:
        folder, checkpoint = open_new(config, rank, world)
        config = dataclasses.replace(config, name=str(folder.relative_to("out")))
    start = checkpoint["step"]

    with stop_gently(config, folder, world) as stop:
        net, ema, optimizer, scaler = start_network(config, uvit, checkpoint, precision, device)
        data = Batches(cache, config, rank, world, device)
        held_out = HeldOut(cache, config.validation_images, device)
        if rank == 0:
            print_facts(config, net, data, cache.meta, precision)
        alpha_bar = noise_schedule().float().to(device)
        def try_out(fast):
            compute_loss(fast, alpha_bar, precision, *data.read(start)[0]).backward()
        wrapped = compile_guarded(net, config.compile, device, try_out, say)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if world > 1:
            gpus = [device.index] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(wrapped, gpus)
        if rank == 0:
            log, drawer = Log(folder, config, start), Drawer(cache, config, device)
        peak = images_at_peak(uvit, world, device)
        progress = Progress(config, folder, checkpoint, data, peak, say)
        step = start                                                # `save` reads it
        del checkpoint                                              # its weights were copied

        def save(name):
            if rank == 0:
                save_checkpoint(folder / name, {
                    "format": CHECKPOINT_FORMAT, "step": step, "model": net.state_dict(),
                    "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), **progress.state(),
                    "config": dataclasses.asdict(config), "uvit": dataclasses.asdict(uvit),
                    "meta": cache.meta, "latent_scale": cache.meta["latent_scale"],
                    "autoencoder": cache.autoencoder,
                    "null_context": torch.from_numpy(cache.text[0])})

        save("last.pt")                                         # proves the disk before the work
        progress.time = time.perf_counter()
        for step, batches in enumerate(data.stream(start, config.steps), start=start + 1):
            rate = learning_rate(step - 1, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for i, batch in enumerate(batches):
                with wrapped.no_sync() if world > 1 and i < len(batches) - 1 else nullcontext():
                    loss = compute_loss(wrapped, alpha_bar, precision, *batch)
                    scaler.scale(loss / len(batches)).backward()
                    progress.add(loss.detach())
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(),
                                                       config.grad_clip or math.inf)
            scaler.step(optimizer)                              # not if a gradient is infinite
            scaler.update(None if precision == torch.float16 else 1.0)
            optimizer.zero_grad()
            decay = min(config.ema_decay, (1 + step) / (10 + step))     # the first steps fade soon
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            progress.count(grad_norm)

            stopping = torch.tensor(float(bool(stop)))
            if world > 1:
                dist.all_reduce(stopping)                       # on the CPU: all leave together
            last = step == config.steps
            validate = last or step % config.validate_every == 0
            report = validate or step % config.log_every == 0
            if report:
                line = progress.report(step, rate, grad_norm)
            if validate:
                raw, average = [held_out.loss(x, alpha_bar, precision) for x in (net, ema)]
                line |= {"held_out_raw": raw, "held_out_ema": average}
                if progress.judge(raw, average):
                    save("best.pt")
            if report and rank == 0:
                log.write(line)
            if stopping or last or step % config.save_every == 0:
                save("last.pt")
            if stopping:
                break
            if rank == 0 and (last or step % config.draw_every == 0):
                drawer.draw([net, ema], folder / "samples" / f"step_{step:06d}.png")
            if report:
                progress.time = time.perf_counter()             # reports are not training time
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(config, folder, step, cache, device, stop)


if __name__ == "__main__":
    run(main, Config)
