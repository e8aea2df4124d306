"""Train a text-to-image U-ViT on a cache of latents and text features.

    python train.py                                             # captioned shapes; makes data/shapes first; no GPU needed
    python train.py --fusion=early --name=early                 # the U-ViT baseline, from the same constants
    python train.py --resume=True                               # go on after Ctrl-C, a crash or a power cut: exactly
    torchrun --standalone --nproc_per_node=4 train.py           # several GPUs

Edit a constant below and run again, or override it with --key=value. One step, in the order of `main`:

    rate -> batch -> loss -> backward -> clip -> step -> EMA -> log -> validate -> draw, save

    z0 = scale * sample(moments),  zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps,  loss = |net(zt, t, text) - eps|^2

In a tenth of the pairs the text is replaced by that of the empty caption, which makes guidance possible [CFG]. All chance is a
function of (seed, step), so a resumed run draws what an unbroken one would have drawn.

out/NAME/ holds last.pt and best.pt (lowest held-out loss; each one file, written to a temporary name and then moved, so a crash
never costs the one before), log.csv, and samples/step_000500.png: the same prompts and noise every time, raw weights above EMA.

[U-ViT] arXiv 2209.12152   [CFG] arXiv 2207.12598
"""
import copy
import csv
import dataclasses
import datetime
import math
import os
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import evaluate
import prepare_data
from model import (CHECKPOINT_FORMAT, UserError, UViT, UViTConfig, autocast, choose_device, choose_precision,
                   count_multiply_adds, noise_schedule, read_checkpoint, run)
from sample import draw_grid, sample_latents
from vae import load_autoencoder, sample_latent, to_uint8


@dataclass
class Config:
    # the run
    data: str = "data/shapes"       # a folder made by prepare_data.py
    weights: str = "weights"        # folder of the public weights; the sample grids need the autoencoder
    name: str = "shapes"            # results go to out/NAME; if that is taken, to out/NAME-2 and so on
    resume: bool = False            # True: go on with out/NAME/last.pt
    seed: int = 0
    # the model; model.py explains each, and image size, channels and text length come with the data
    fusion: str = "intermediate"    # or early
    conditioning: str = "concat"    # or cross_attention
    depth: int = 9                  # early only
    n_image: int = 2                # the other four: intermediate only
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
    cooldown: float = 1.0           # last share of the steps in which the rate falls to 0; U-ViT: 0, constant to the end
    beta: float = 0.9               # both of AdamW's [U-ViT]
    weight_decay: float = 0.03      # of every parameter [U-ViT]
    grad_clip: float = 1.0          # U-ViT: none
    t_power: float = 0.4            # t = 1000 u^t_power, u uniform: below 1, more of the noisy steps; U-ViT: 1
    p_uncond: float = 0.1           # share of the pairs trained without text [CFG]
    ema_decay: float = 0.999        # U-ViT: 0.9999
    init_std: float = 0.06          # of the linear weights; U-ViT: 0.02 at width 512
    waves: bool = True              # start the image positions from sines and cosines; U-ViT: False, normal(0.02)
    # speed
    precision: str = "auto"         # or float32, bfloat16, float16
    compile: str = "auto"           # torch.compile: auto (on CUDA), on, off; on a CPU it gains 3% and takes 80 s to begin
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


# ---- 1. processes and devices ----

def start_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device): one process, or one per GPU under torchrun (on CPUs with gloo)."""
    if "RANK" not in os.environ:
        return 0, 1, choose_device()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size(), choose_device()


# dense bfloat16 / float16 TFLOP/s of the data sheets, for the share of the peak (MFU)
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "RTX 3090": 71, "L40S": 362, "A6000": 155}


# ---- 2. batches ----

def seeded(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for this key; the key is hashed, since torch's CPU generator looks at 32 bits of a seed only."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Batches:
    """Training batches as a function of the step. The arrays live on the device if they fit; else rows are read as needed."""

    def __init__(self, cache: prepare_data.Cache, config: Config, rank: int, world: int, device: torch.device):
        self.config, self.rank, self.world, self.device, self.scale = config, rank, world, device, cache.meta["latent_scale"]
        self.moments, self.text = [self.place(array) for array in (cache.train.moments, cache.text)]
        self.pairs = torch.from_numpy(cache.train.pairs)                              # (K, 2): picture, text row
        self.count = len(cache.train.moments)
        self.first = torch.searchsorted(self.pairs[:, 0].contiguous(), torch.arange(self.count + 1))    # of each picture

    def place(self, array):
        if self.device.type == "cuda" and array.nbytes < 0.3 * torch.cuda.mem_get_info(self.device)[0]:
            return torch.from_numpy(array[:]).to(self.device)
        return torch.from_numpy(array)

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device; nobody waits for the copy, since it starts from pinned memory."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def rows(self, tensor, index):
        """tensor[index] on the device, in float32."""
        return (tensor[self.send(index)] if tensor.device == self.device else self.send(tensor[index])).float()

    def order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.count, generator=seeded(self.config.seed, 0, epoch))

    def choose(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures, each once per epoch, and a text row for each: one of its captions, or row 0, the null context."""
        position = torch.arange(step * size, (step + 1) * size)
        pictures = torch.empty_like(position)
        for epoch in range(step * size // self.count, ((step + 1) * size - 1) // self.count + 1):
            inside = position // self.count == epoch
            pictures[inside] = self.order(epoch)[position[inside] % self.count]
        generator = seeded(self.config.seed, 1, step)
        first, after = self.first[pictures], self.first[pictures + 1]
        caption = first + (torch.rand(size, generator=generator) * (after - first)).long()
        dropped = torch.rand(size, generator=generator) < self.config.p_uncond
        return pictures, torch.where(dropped, 0, self.pairs[caption, 1])

    def read(self, step: int) -> list[tuple[torch.Tensor, ...]]:
        """This process's part of the step: `grad_accum` times (z0 (B, C, H, W), eps likewise, t (B,), context (B, L, E))."""
        size = self.config.batch_size * self.config.grad_accum
        pictures, text_rows = self.choose(step, size)
        generator = seeded(self.config.seed, 2, step, device=self.device)
        moments_shape, latent_shape = self.moments.shape[1:], (self.moments.shape[1] // 2, *self.moments.shape[2:])
        noise, eps = torch.randn((2, size, *latent_shape), generator=generator, device=self.device)
        u = torch.rand(size, generator=generator, device=self.device)
        t = (1000 * u ** self.config.t_power).ceil().clamp(1, 1000).long()
        batches, share = [], self.config.batch_size // self.world
        for i in range(self.config.grad_accum):
            first = i * self.config.batch_size + self.rank * share
            mine = slice(first, first + share)
            z0 = self.scale * sample_latent(self.rows(self.moments, pictures[mine]), noise[mine])
            batches.append((z0, eps[mine], t[mine], self.rows(self.text, text_rows[mine])))
        return batches

    def stream(self, start: int, stop: int):
        """The batches of steps start..stop-1; on CUDA each is read while the step before is computed."""
        if self.device.type != "cuda":          # on a CPU a second thread would only get in the way of the first's
            yield from map(self.read, range(start, stop))
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self.read, start)
            for step in range(start, stop):
                batches, pending = pending.result(), reader.submit(self.read, step + 1)
                yield batches


# ---- 3. loss ----

def compute_loss(net, alpha_bar, precision, z0, eps, t, context) -> torch.Tensor:
    """Mean squared error of the predicted noise, unweighted [U-ViT]; in float32 outside the network."""
    a = alpha_bar[t][:, None, None, None]                                         # (B, 1, 1, 1)
    zt = a.sqrt() * z0 + (1 - a).sqrt() * eps                                     # (B, C, H, W)
    with autocast(zt.device, precision):
        predicted = net(zt, t, context)
    return F.mse_loss(predicted.float(), eps)


class HeldOut:
    """Held-out loss on the same pictures, captions, time steps and noise every time, so that two values can be compared."""

    def __init__(self, cache: prepare_data.Cache, count: int, device: torch.device):
        pairs = torch.from_numpy(cache.val.pairs)
        count = min(count, len(pairs))
        generator = torch.Generator().manual_seed(0)
        moments = torch.from_numpy(cache.val.moments[pairs[:count, 0].numpy()])
        noise, eps = torch.randn((2, count, moments.shape[1] // 2, *moments.shape[2:]), generator=generator)
        z0 = cache.meta["latent_scale"] * sample_latent(moments, noise)
        t = torch.linspace(1, 1000, count).long()[torch.randperm(count, generator=generator)]
        context = torch.from_numpy(cache.text[pairs[:count, 1].numpy()]).float()
        self.batches = [[x.to(device) for x in part] for part in zip(*(x.split(64) for x in (z0, eps, t, context)))]

    @torch.no_grad()
    def loss(self, net, alpha_bar, precision) -> float:
        losses = [compute_loss(net, alpha_bar, precision, *part) * len(part[0]) for part in self.batches]
        return (torch.stack(losses).sum() / sum(len(part[0]) for part in self.batches)).item()


# ---- 4. reports and files ----

class Drawer:
    """The sample grid: eight held-out captions, raw weights in the first row, EMA in the second."""

    def __init__(self, cache: prepare_data.Cache, config: Config, device: torch.device):
        rows = list(dict.fromkeys(cache.val.pairs[:, 1].tolist()))[:8]
        self.captions, self.config = [cache.captions[row] for row in rows], config
        self.context = torch.from_numpy(cache.text[rows]).float().to(device)
        self.null_context, self.scale = torch.from_numpy(cache.text[0]).float().to(device), cache.meta["latent_scale"]
        self.autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder, config.weights).to(device)

    def draw(self, nets: list[UViT], path: Path):
        rows = torch.arange(len(self.captions))
        latents = [sample_latents(net, self.context, rows, self.null_context, rows.tolist(), self.config.sample_steps,
                                  self.config.guidance_scale) for net in nets]
        pictures = to_uint8(self.autoencoder.decode(torch.cat(latents) / self.scale)).cpu()
        path.parent.mkdir(exist_ok=True)
        captions = [f"{kind}: {caption}" for kind in ("raw", "EMA") for caption in self.captions]
        draw_grid(pictures, captions, columns=len(self.captions)).save(path)


def save_checkpoint(path: Path, checkpoint: dict):
    """Write to a temporary name, then move: whatever happens meanwhile, the file before stays whole."""
    if not all(torch.isfinite(tensor).all() for name in ("model", "ema") for tensor in checkpoint[name].values()):
        raise UserError(f"Weights are not finite at step {checkpoint['step']}, and are not saved: go back to {path.parent / 'last.pt'} "
                        f"with --resume=True and a lower --learning_rate.")
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); what was there before is whole. Make room, then "
                        f"--resume=True.") from None


class Log:
    """log.csv, one line per report. On resume the lines after the checkpoint's step are dropped: they will be written again."""
    COLUMNS = ["step", "seconds", "loss", "learning_rate", "grad_norm", "images_per_second", "skipped",
               "held_out_raw", "held_out_ema"]

    def __init__(self, path: Path, step: int):
        self.path, lines = path, []
        if path.exists():
            with open(path, newline="", errors="replace") as file:          # the last line may have been cut short
                lines = [line for line in csv.DictReader(file)
                         if None not in line.values() and line["step"].isdigit() and int(line["step"]) <= step]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(lines)

    def write(self, **values):
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def free_folder(name: str) -> Path:
    """out/NAME, or out/NAME-2 and so on: the first that holds no run."""
    number, folder = 1, Path("out") / name
    while (folder / "last.pt").exists():
        number, folder = number + 1, Path("out") / f"{name}-{number + 1}"
    return folder


def command_line(config: Config, **changes) -> str:
    """The `train.py` command of a configuration: what differs from the constants in the file."""
    config = dataclasses.replace(config, **changes)
    differs = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
               if getattr(config, field.name) != field.default}
    return " ".join(["python train.py", *(shlex.quote(f"--{key}={value}") for key, value in differs.items())])


# ---- 5. training ----

def compile_guarded(net: UViT, arguments, mode: str, device: torch.device, say):
    """torch.compile the network and try it once, forward and backward; on failure go on without, and say why."""
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--compile={mode}: expected auto, on or off.")
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return net
    try:
        fast = torch.compile(net)
        compute_loss(fast, *arguments).backward()
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as error:      # whatever goes wrong in a compiler must not cost the run
        say(f"torch.compile failed and is off ({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.200}).")
        return net


def describe_uvit(config: Config, **data) -> UViTConfig:
    """The network's configuration: the constants above that it shares, and image size, channels and text length of the `data`."""
    return UViTConfig(**data | {field.name: getattr(config, field.name) for field in dataclasses.fields(UViTConfig)
                                if hasattr(config, field.name)})


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `cooldown` of the steps."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    fall = min(1.0, (config.steps - step) / (config.cooldown * config.steps)) if config.cooldown else 1.0
    return config.learning_rate * rise * fall


def main(config: Config):
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    for key in ("steps", "batch_size", "grad_accum", "log_every", "validate_every", "draw_every", "save_every", "validation_images"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: expected 1 or more.")
    if config.batch_size % world:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the {world} processes that share it.")
    if config.precision not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--precision={config.precision}: expected auto, float32, bfloat16 or float16.")
    precision = choose_precision(device) if config.precision == "auto" else getattr(torch, config.precision)

    if config.wandb:                                            # imported only if asked for
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=True needs the package: pip install wandb.") from None

    # data: the default cache is made on the first run
    if config.data == Config.data and not (Path(config.data) / "meta.json").exists() and rank == 0:
        prepare_data.main(prepare_data.Config())
    if world > 1:
        dist.barrier()
    cache = prepare_data.read_cache(config.data)
    channels, image_size, _ = cache.meta["latent_shape"]
    context_len, context_dim = cache.text.shape[1:]
    uvit = describe_uvit(config, image_size=image_size, channels=channels, context_len=context_len, context_dim=context_dim)

    # the run: a new one, or one to go on with
    if config.resume:
        folder = Path("out") / config.name
        checkpoint = read_checkpoint(folder / "last.pt")
        start = checkpoint["step"]
        if checkpoint["uvit"] != uvit or checkpoint["meta"] != cache.meta:
            side = "architecture" if checkpoint["uvit"] != uvit else "data cache"
            raise UserError(f"{folder / 'last.pt'} was trained with another {side} than this command's; its own command is: "
                            f"{command_line(Config(**checkpoint['config']), resume=True)}")
        changed = [f"{key} {checkpoint['config'][key]} -> {value}" for key, value in dataclasses.asdict(config).items()
                   if checkpoint["config"][key] != value and key != "resume"]
        say(f"going on from step {start:,}" + (f" with other constants than before: {', '.join(changed)}" if changed else ""))
        if start >= config.steps:
            raise UserError(f"{folder / 'last.pt'} is at step {start:,} already: raise --steps={config.steps} to go on.")
    else:
        names = [free_folder(config.name) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(names)
        folder, start = names[0], 0
        config = dataclasses.replace(config, name=folder.name)
        folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    net = UViT(uvit, config.init_std)
    if config.waves:
        net.start_positions_as_waves()
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, betas=(config.beta, config.beta),
                                  weight_decay=config.weight_decay, fused=True)
    # The scaler is needed for float16; for the others its scale is 1 and it only leaves out steps that are not finite.
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0 if precision == torch.float16 else 1.0)
    best, rises, seconds, skipped = math.inf, 0, 0.0, 0
    if config.resume:
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if precision == torch.float16:
            scaler.load_state_dict(checkpoint["scaler"])
        best, rises, seconds, skipped = (checkpoint[key] for key in ("best", "rises", "seconds", "skipped"))
        del checkpoint

    # facts
    data = Batches(cache, config, rank, world, device)
    held_out = HeldOut(cache, config.validation_images, device)
    multiply_adds = sum(count_multiply_adds(uvit))
    effective = config.batch_size * config.grad_accum
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    say(f"{uvit.fusion} fusion by {uvit.conditioning}: {uvit.blocks} blocks, text in {uvit.window.start}..{uvit.window.stop - 1}, "
        f"{uvit.text_blocks} text blocks, width {uvit.width}; {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"{multiply_adds / 1e9:.3f} G multiply-adds = {2 * multiply_adds / 1e9:.3f} GFLOPs per image")
    say(f"{data.count:,} pictures with {len(data.pairs):,} captions, latents {channels}x{image_size}x{image_size}; "
        f"{config.steps:,} steps of {effective} = {config.steps * effective / data.count:.1f} epochs; "
        f"{world} x {name}, {str(precision).removeprefix('torch.')}")
    say(f"text tower: {cache.meta['text_tower']['about']}; autoencoder: {cache.meta['autoencoder']['about']}")

    alpha_bar = noise_schedule().float().to(device)
    wrapped = compile_guarded(net, (alpha_bar, precision, *data.read(start)[0]), config.compile, device, say)
    optimizer.zero_grad()
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
    log, drawer = (Log(folder / "log.csv", start), Drawer(cache, config, device)) if rank == 0 else (None, None)
    tracker = wandb.init(project="midfuse", name=config.name, config=dataclasses.asdict(config)) if config.wandb and rank == 0 else None

    def save(name):
        if rank == 0:
            save_checkpoint(folder / name, {
                "format": CHECKPOINT_FORMAT, "step": step, "model": net.state_dict(), "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "best": best, "rises": rises,
                "seconds": seconds + time.perf_counter() - began, "skipped": skipped + int(bad), "config": dataclasses.asdict(config),
                "uvit": dataclasses.asdict(uvit), "meta": cache.meta, "latent_scale": cache.meta["latent_scale"],
                "autoencoder": cache.autoencoder, "null_context": torch.from_numpy(cache.text[0])})

    stop = []                                                   # signals that ask for an end; a second one ends at once
    def ask_to_stop(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    step, began = start, time.perf_counter()
    last_time, last_step = began, start
    losses, streak, bad = (torch.zeros((), device=device) for _ in range(3))
    save("last.pt")                                             # proves the disk before the work
    try:
        for step, batches in enumerate(data.stream(start, config.steps), start=start + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, config)
            for i, batch in enumerate(batches):
                with wrapped.no_sync() if world > 1 and i < len(batches) - 1 else nullcontext():
                    loss = compute_loss(wrapped, alpha_bar, precision, *batch) / len(batches)
                    scaler.scale(loss).backward()
                    losses += loss.detach().nan_to_num(0, 0, 0)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
            scaler.step(optimizer)                              # leaves the weights alone if a gradient is not finite
            scaler.update(None if precision == torch.float16 else 1.0)
            optimizer.zero_grad()
            decay = min(config.ema_decay, (1 + step) / (10 + step))             # warm-up: the first steps do not linger
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            finite = grad_norm.isfinite()
            streak, bad = torch.where(finite, 0, streak + 1), bad + ~finite

            stopping = torch.tensor(float(bool(stop)))
            if world > 1:
                dist.all_reduce(stopping)                       # on the CPU: all processes leave at the same step
            last = step == config.steps
            validate = step % config.validate_every == 0 or last
            if validate or step % config.log_every == 0:
                if world > 1:
                    dist.all_reduce(losses)
                done, loss = step - last_step, losses.item()    # waits for the device
                now = time.perf_counter()
                speed = done * effective / (now - last_time)
                line = {"step": step, "seconds": seconds + now - began, "loss": loss / done / world,
                        "learning_rate": learning_rate(step - 1, config), "grad_norm": grad_norm.item(),
                        "images_per_second": speed, "skipped": skipped + int(bad)}
                share = f"  {600 * multiply_adds * speed / (peak * 1e12 * world):.0f}% of peak" if peak else ""
                left = datetime.timedelta(seconds=round((config.steps - step) * effective / speed))
                say(f"step {step:,}/{config.steps:,}  loss {line['loss']:.4f}  {speed:,.0f} images/s{share}  {left} left"
                    + (f"  ({line['skipped']} skipped: not finite)" if line["skipped"] else ""))
                if streak >= 10:
                    raise UserError(f"Ten steps in a row were not finite; the weights in {folder / 'last.pt'} are sound. "
                                    f"Go on from there with a lower rate: {command_line(config, resume=True, learning_rate=config.learning_rate / 3)}")
                if validate:
                    line["held_out_raw"] = held_out.loss(net, alpha_bar, precision)
                    line["held_out_ema"] = held_out.loss(ema, alpha_bar, precision)
                    say(f"           held-out loss {line['held_out_raw']:.4f}, of the EMA {line['held_out_ema']:.4f}")
                    rises = rises + 1 if line["held_out_ema"] > best else 0
                    if rises == 5:
                        say(f"           it has not fallen for five checks: the model begins to learn the training pictures by heart; "
                            f"{folder / 'best.pt'} is the one to use.")
                    if line["held_out_ema"] < best:
                        best = line["held_out_ema"]
                        save("best.pt")
                if rank == 0:
                    log.write(**line)
                if tracker:
                    tracker.log(line, step=step)
                losses.zero_()
                last_step = step
            if step % config.save_every == 0 or last or stopping:
                save("last.pt")
            if stopping:
                break
            if (step % config.draw_every == 0 or last) and rank == 0:
                drawer.draw([net, ema], folder / "samples" / f"step_{step:06d}.png")
            if last_step == step:
                last_time = time.perf_counter()                 # reports do not count as training time
    except torch.OutOfMemoryError:
        smaller = command_line(config, batch_size=config.batch_size // 2, grad_accum=2 * config.grad_accum, resume=True)
        raise UserError(f"Out of memory at batch_size={config.batch_size}: " + (
            f"try {smaller} (the same effective batch)." if config.batch_size % (2 * world) == 0 else
            "make --batch_size smaller, or the model.")) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if device.type == "cuda":
        say(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    if step < config.steps:
        return say(f"Stopped at step {step:,}; go on with: {command_line(config, resume=True)}")
    if config.score and cache.meta["dataset"] == "shapes":
        evaluate.main(evaluate.Config(checkpoint=str(folder / "last.pt"), data=config.data,
                                      guidance_scale=config.guidance_scale, steps=config.sample_steps))
    prompt = shlex.quote(f"--prompt={cache.captions[cache.val.pairs[0, 1]]}")
    say(f"Look at {folder / 'samples'}; then draw with:\n  python sample.py --checkpoint={folder / 'last.pt'} {prompt}")


if __name__ == "__main__":
    run(main, Config)
