"""Train a text-to-image U-ViT on a cache of latents and text features.

    python train.py                                 # captioned shapes; needs no data and no GPU
    python train.py --fusion=early --name=early     # the U-ViT baseline, from the same constants
    python train.py --resume                        # resume, exactly, after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=gpu train.py         # all GPUs

Edit a constant below and run again, or override it with --key=value. One step, as in `main`:

    rate -> batch -> loss -> backward -> clip -> step -> EMA -> log -> validate -> draw -> save
    z0 = scale * sample(moments)
    zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps
    loss = |net(zt, t, text) - eps|^2

In a tenth of the pairs the text is replaced by that of the empty caption, which makes guidance
possible [CFG]. All chance is a function of (seed, step), and a resumed run equals an unbroken one.

out/NAME/ holds last.pt, best.pt (lowest held-out loss), log.csv, and samples/step_000500.png: the
same prompts and noise every time, raw weights above EMA.
[U-ViT] arXiv 2209.12152   [CFG] arXiv 2207.12598
"""
import copy
import csv
import io
import itertools
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import prepare_data
import sample
from model import (CHECKPOINT_FORMAT, Constants, FilePath, Mlp, Natural, Positive, Size, Unit,
                   UserError, UViT, UViTConfig, add_noise, autocast, choose_device,
                   choose_precision, command, count_multiply_adds, noise_schedule, one_writer,
                   read_checkpoint, reading, run, writing)
from vae import load_autoencoder, sample_latent, to_pictures


@dataclass
class Config(Constants):
    # the run
    data: FilePath = "data/shapes"  # made by prepare_data.py
    weights: FilePath = "weights"  # the public weights
    name: str = "shapes"  # folder in out/; if taken, shapes-2, ...
    resume: bool = False  # resume out/NAME/last.pt
    seed: Natural = 0
    # the model (see model.py); image size, channels and text length come with the data
    fusion: Literal["early", "intermediate"] = "intermediate"
    conditioning: Literal["concat", "cross_attention"] = "concat"
    depth: Size = 9  # early only
    n_image: Natural = 2  # these four: intermediate only
    n_fuse: Size = 3
    n_text: Natural = 2
    fuse_shift: int = 0  # -2: text enters at block 0
    patch_size: Size = 1
    width: Size = 128
    heads: Size = 4
    # optimisation
    steps: Positive = 3300
    batch_size: Positive = 32  # pictures, over all GPUs
    grad_accum: Positive = 1  # batches per step
    learning_rate: Unit = 3e-3  # U-ViT: 2e-4, 1e6 steps
    warmup: Natural = 200  # steps of rising rate
    cooldown: Unit = 1.0  # share of steps of falling rate; U-ViT: 0
    beta: Annotated[float, 0, 0.9999] = 0.9  # both of AdamW's [U-ViT]
    weight_decay: Unit = 0.03  # of every parameter [U-ViT]
    grad_clip: Annotated[float, 0, 1e9] = 1.0  # largest norm; 0: any, as U-ViT
    t_power: Annotated[float, 0.01, 100] = 0.4  # t = 1000 u^t_power: more noise; U-ViT: 1
    p_uncond: Unit = 0.1  # share of the pairs without text [CFG]
    ema_decay: Unit = 0.999  # U-ViT: 0.9999
    init_std: Unit = 0.06  # of linear weights; U-ViT: 0.02, at width 512
    sincos_positions: bool = True  # positions start as waves; U-ViT: noise
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: long runs on CUDA
    # reports
    log_every: Positive = 50
    validate_every: Positive = 500
    draw_every: Positive = 500
    save_every: Positive = 500
    guidance_scale: sample.GuidanceScale = 3.0  # of grids and score
    sample_steps: sample.SolverSteps = 20
    score: bool = True  # shapes: evaluate last.pt

    @property
    def pictures_per_step(self):
        return self.batch_size * self.grad_accum


# ---- 1. the loss ----
def compute_loss(net, alpha_bar, precision, z0, eps, t, context):
    """Mean squared error of the noise, unweighted [U-ViT]; in float32 outside the network."""
    zt = add_noise(z0, eps, t, alpha_bar)  # (B, C, H, W)
    with autocast(zt.device, precision):
        predicted = net(zt, t, context)
    return nn.functional.mse_loss(predicted.float(), eps)


def learning_rate(step, config):
    """Linear warm-up, times a linear fall to 0 over the last `cooldown` of the steps."""
    left, cooldown = config.steps - (step - 1), config.cooldown * config.steps
    rise = min(1.0, step / config.warmup) if config.warmup else 1.0
    fall = min(1.0, left / cooldown) if cooldown else 1.0
    return config.learning_rate * rise * fall


@torch.no_grad()
def update_ema(ema, net, step, config):
    """ema <- decay ema + (1 - decay) net. The decay grows, so that the first steps fade soon."""
    decay = min(config.ema_decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---- 2. the loop ----
def main(config: Config, draw=None):
    """Train, save and score one network; `draw(step, net, ema, folder)` replaces sample grids."""
    device = start_processes(config)
    cache, uvit = open_data(config)
    with open_run(config) as (config, folder, stop):
        precision = choose_precision(device, config.precision)
        alpha_bar = noise_schedule().float().to(device)
        data = Batches(cache, config, device)
        held_out = HeldOut(cache, config, alpha_bar, precision)
        draw = draw or SampleGrid(cache, config, device).draw
        net, ema, optimizer, scaler = start_network(config, uvit, device, precision)
        report = Report(config, folder, device)
        parts = dict(model=net, ema=ema, optimizer=optimizer, scaler=scaler, report=report)
        step = load_run(folder / "last.pt", config, parts, cache.meta) if config.resume else 0
        print_facts(config, net, data, cache.meta, precision)
        wrapped = wrap_network(net, config, device)
        save = partial(save_checkpoint, folder, parts, config, cache)
        save("last.pt", step)  # is the disk writable?
        report.restart_clock(step)

        for step, batches in data.stream(step + 1, config.steps):
            rate = learning_rate(step, config)
            optimizer.param_groups[0]["lr"] = rate
            for batch in batches:  # their gradients add up
                loss = compute_loss(wrapped, alpha_bar, precision, *batch)
                scaler.scale(loss / len(batches)).backward()
                report.losses.append(loss.detach())
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip or math.inf)
            scaler.step(optimizer)  # not if a gradient is not finite
            scaler.update(None if precision == torch.float16 else 1.0)
            optimizer.zero_grad()
            update_ema(ema, net, step, config)
            report.norms.append(norm)

            stopping, last = any_process(stop), step == config.steps
            validate = last or step % config.validate_every == 0
            if validate or step % config.log_every == 0:
                report.measure(step, rate)
                if validate and report.judge(held_out.loss(net), held_out.loss(ema)):
                    with optional("best.pt"):
                        save("best.pt", step)
                report.write_log(step)
            if RANK == 0 and (last or step % config.draw_every == 0):
                with optional("the sample grid"):
                    draw(step, net, ema, folder)
                report.restart_clock(step)
            if stopping or last or step % config.save_every == 0:
                save("last.pt", step)
                report.restart_clock(step)
            if stopping:
                break
    if RANK == 0:
        finish(config, folder, step, cache, device, stop)


# ---- 3. batches ----
def seeded(*key, device="cpu"):
    """A generator for this key, hashed: torch's CPU generator looks at 32 bits of a seed only."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


class Batches:
    """Training batches as a function of the step."""

    def __init__(self, cache, config, device):
        self.config, self.device = config, device
        self.scale, self.shape = cache.meta["latent_scale"], cache.meta["latent_shape"]
        self.moments, self.text = cache.train_moments, cache.text  # on disk until indexed
        self.pictures = len(self.moments)
        self.pairs = torch.tensor(cache.train_pairs)  # (K, 2): picture, text row
        number = self.pairs[:, 0].contiguous()  # ascending
        self.first_pair = torch.searchsorted(number, torch.arange(self.pictures + 1))

    def choose(self, index, size):
        """(size,) pictures, each once per epoch, and a caption's text row of each; 0: the empty."""
        place = torch.arange(index * size, (index + 1) * size)  # of all epochs
        epochs, pictures = place // self.pictures, torch.empty_like(place)
        for epoch in epochs.unique().tolist():
            order = torch.randperm(self.pictures, generator=seeded(self.config.seed, 0, epoch))
            inside = epochs == epoch
            pictures[inside] = order[place[inside] % self.pictures]
        generator = seeded(self.config.seed, 1, index)
        first, after = self.first_pair[pictures], self.first_pair[pictures + 1]
        pair = first + (torch.rand(size, generator=generator) * (after - first)).long()
        dropped = torch.rand(size, generator=generator) < self.config.p_uncond
        return pictures, torch.where(dropped, 0, self.pairs[pair, 1])

    def read(self, index):
        """Its share of step index + 1, batches: z0, eps (B, C, H, W), t (B,), context (B, L, E)."""
        config, device = self.config, self.device
        size = config.pictures_per_step
        pictures, texts = self.choose(index, size)
        generator = seeded(config.seed, 2, index, device=device)
        noise, eps = torch.randn(2, size, *self.shape, generator=generator, device=device)
        u = torch.rand(size, generator=generator, device=device)
        t = (1000 * u ** config.t_power).ceil().clamp(1, 1000).long()
        batches = []
        for mine in torch.arange(size).view(config.grad_accum, WORLD, -1)[:, RANK]:
            moments = torch.tensor(self.moments[pictures[mine].numpy()]).to(device)  # (B, 2C, H, W)
            context = torch.tensor(self.text[texts[mine].numpy()]).to(device).float()  # (B, L, E)
            z0 = self.scale * sample_latent(moments, noise[mine])
            batches.append((z0, eps[mine], t[mine], context))
        return batches

    def stream(self, first, last):
        """(step, its batches) for first..last; a thread reads one step ahead."""
        cuda = self.device.type == "cuda"  # not GPU 0 for all
        start = torch.cuda.set_device if cuda else None
        with ThreadPoolExecutor(1, "reader", start, (self.device,)) as reader:
            ahead = reader.submit(self.read, first - 1)
            for step in range(first, last + 1):
                batches, ahead = ahead.result(), reader.submit(self.read, step)
                yield step, batches


class HeldOut:
    """Held-out loss, on the same pictures, captions, time steps and noise every time."""

    def __init__(self, cache, config, alpha_bar, precision):
        self.alpha_bar, self.precision = alpha_bar, precision
        pairs = torch.tensor(cache.val_pairs[:500])
        pairs = pairs.repeat(math.ceil(100 / len(pairs)), 1)  # few: each at several t
        self.size = len(pairs)  # (size, 2): picture, text row
        generator = torch.Generator().manual_seed(0)
        moments = torch.from_numpy(cache.val_moments[pairs[:, 0].numpy()])
        noise, eps = torch.randn(2, self.size, *cache.meta["latent_shape"], generator=generator)
        z0 = cache.meta["latent_scale"] * sample_latent(moments, noise)
        order = torch.randperm(self.size, generator=generator)
        t = torch.linspace(1, 1000, self.size)[order].long()
        context = torch.from_numpy(cache.text[pairs[:, 1].numpy()]).float()
        parts = [x.to(alpha_bar.device).split(64) for x in (z0, eps, t, context)]
        self.batches = list(zip(*parts))

    @torch.no_grad()
    def loss(self, net):
        losses = [len(batch[0]) * compute_loss(net, self.alpha_bar, self.precision, *batch)
                  for batch in self.batches]
        return (torch.stack(losses).sum() / self.size).item()


# ---- 4. processes, data and network ----
# Under torchrun this is process RANK of WORLD; the first one prints and writes.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(text):
    """Print in the first process; a closed terminal or pipe must not stop a run."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def start_processes(config):
    """The device of this process: under torchrun, a GPU of its own, or the CPU with the others."""
    if config.batch_size % WORLD:
        raise UserError(f"--batch_size={config.batch_size} is no multiple of {WORLD} processes.")
    if WORLD > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return choose_device()


def any_process(stop):
    """Whether one of the processes is asked to stop: all leave together."""
    asked = torch.tensor(float(bool(stop)))
    if WORLD > 1:
        dist.all_reduce(asked)  # on the CPU
    return bool(asked)


def open_data(config):
    """The cache, and a network's configuration that fits it. A first run makes the shapes."""
    missing = not Path(config.data, "meta.json").exists()
    if RANK == 0 and missing and config.data == prepare_data.Config().out:
        prepare_data.main(prepare_data.Config())
    if WORLD > 1:
        dist.barrier()
    cache = prepare_data.read_cache(config.data)
    channels, side, _ = cache.meta["latent_shape"]
    _, L, E = cache.text.shape
    names = vars(config).keys() & UViTConfig.__dataclass_fields__
    return cache, UViTConfig(**{name: getattr(config, name) for name in names}, channels=channels,
                             image_size=side, context_len=L, context_dim=E)


def start_network(config, uvit, device, precision):
    """(net, ema, optimizer, scaler) before the first step."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    net = UViT(uvit, config.init_std)
    if config.sincos_positions:
        net.init_sincos_positions()
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, (config.beta,) * 2,
                                  weight_decay=config.weight_decay, fused=True)
    # float16 needs the scaler; else its scale is 1, and it only skips steps that are not finite
    scale = 65536.0 if precision == torch.float16 else 1.0
    return net, ema, optimizer, torch.amp.GradScaler(device.type, init_scale=scale)


def wrap_network(net, config, device):
    """The network, compiled where that pays, and shared by all processes.
    "auto" compiles on CUDA what does 1e16 multiply-adds or more: a guess, not yet measured."""
    work = 3 * config.steps * config.pictures_per_step * sum(count_multiply_adds(net.config))
    pays = device.type == "cuda" and work >= 1e16
    if config.compile == "on" or config.compile == "auto" and pays:
        try:
            torch.compile(Mlp(8).to(device))(torch.ones(1, 8, device=device))
            net = torch.compile(net)
        except Exception as error:
            print0(f"torch.compile failed and is off ({type(error).__name__}: {error!s:.200}).")
    if WORLD > 1:
        gpu = [device.index] if device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(net, gpu)
    return net


# ---- 5. reports ----
def print_facts(config, net, data, meta, precision):
    uvit, giga = net.config, sum(count_multiply_adds(net.config)) / 1e9
    parameters = sum(p.numel() for p in net.parameters())
    size, window = config.pictures_per_step, uvit.window
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else data.device.type
    print0(f"{uvit.fusion} fusion by {uvit.conditioning}: {uvit.depth} blocks, text in "
           f"{window[0]} to {window[-1]}, {uvit.n_text} text blocks; {parameters:,} "
           f"parameters, {giga:.3f} G multiply-adds = {2 * giga:.3f} GFLOPs per image\n"
           f"{data.pictures:,} pictures, {len(data.pairs):,} captions; {config.steps:,} steps of "
           f"{size}; {WORLD} x {device}, {precision}\ntext tower: {meta['text_tower']['about']}; "
           f"autoencoder: {meta['autoencoder']['about']}")


@contextmanager
def optional(what):
    """Only the last checkpoint may stop a run: `what` fails with a word, and training continues."""
    try:
        yield
    except (OSError, RuntimeError, UserError, FloatingPointError) as error:
        print0(f"{what} is not written ({error}); training continues.")


class Report:
    """How the run goes: loss, speed, held-out loss, log.csv. A GPU is only waited for at a line."""
    COLUMNS = ["step", "seconds", "loss", "learning_rate", "grad_norm", "images_per_second",
               "skipped", "held_out_raw", "held_out_ema"]

    def __init__(self, config, folder, device):
        self.config, self.folder, self.device = config, folder, device
        self.best, self.skipped, self.failed = math.inf, 0, 0
        self.began, self.lines = time.perf_counter(), [self.COLUMNS]
        self.losses, self.norms = [], []  # since the last line

    def state_dict(self):
        self.seconds = time.perf_counter() - self.began
        return {key: vars(self)[key] for key in "best skipped seconds lines losses norms".split()}

    def load_state_dict(self, state):
        vars(self).update(state)  # rank 0's
        for values in (self.losses, self.norms):
            values[:] = [value.to(self.device) for value in values]
        self.began -= self.seconds

    def restart_clock(self, step):
        """Drawing and saving are not training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.step, self.clock = step, time.perf_counter()

    def measure(self, step, rate):
        """A line for log.csv, printed too; the loss is a mean over the steps since the last one."""
        losses = torch.stack(self.losses)
        finite = torch.stack(self.norms).isfinite()
        if WORLD > 1:
            dist.all_reduce(losses)
            losses /= WORLD
        loss = losses[losses.isfinite()].mean().item()
        now, config = time.perf_counter(), self.config
        pace = (now - self.clock) / (step - self.step)
        speed, left = config.pictures_per_step / pace, (config.steps - step) * pace / 60
        self.skipped += (~finite).sum().item()
        self.failed = 0 if finite.any() else self.failed + len(finite)
        skipped = f"  ({self.skipped} skipped: not finite)" if self.skipped else ""
        print0(f"step {step:,}/{config.steps:,}  loss {loss:.4f}  {speed:,.0f} images/s  "
               f"{left:,.0f} minutes left{skipped}")
        if self.failed >= 10:
            lower = config.learning_rate / 3
            raise UserError("No step is finite any more. Resume with a lower rate: "
                            f"{command('train.py', config, resume=True, learning_rate=lower)}")
        norm, seconds = self.norms[-1].item(), now - self.began
        self.lines.append([step, seconds, loss, rate, norm, speed, self.skipped, None, None])
        self.losses, self.norms = [], []

    def judge(self, raw, ema):
        """Note the held-out losses; True if that of the EMA is the lowest so far."""
        print0(f"           held-out loss {raw:.4f}, of the EMA {ema:.4f}")
        self.lines[-1][-2:] = raw, ema
        before, self.best = self.best, min(self.best, ema)
        return ema < before

    def write_log(self, step):
        if RANK == 0:
            with optional("log.csv"), writing(self.folder / "log.csv", "w") as file:
                csv.writer(file, lineterminator="\n").writerows(self.lines)
        self.restart_clock(step)


class SampleGrid:
    """Eight held-out captions, drawn by the raw weights in the first row, by the EMA below."""

    def __init__(self, cache, config, device):
        self.config, self.scale = config, cache.meta["latent_scale"]
        texts = list(dict.fromkeys(cache.val_pairs[:, 1].tolist()))[:8]
        self.captions = [cache.captions[i] for i in texts]
        context = torch.from_numpy(cache.text[[0, *texts]]).float().to(device)
        self.null_context, self.context = context[0], context[1:]
        self.autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder,
                                            config.weights).to(device)

    def draw(self, step, net, ema, folder):
        count, pictures, labels = len(self.captions), [], []
        for name, weights in ("raw", net), ("EMA", ema):
            z = sample.sample_latents(weights, self.context, torch.arange(count),
                                      self.null_context, list(range(count)),
                                      self.config.sample_steps, self.config.guidance_scale)
            pictures.append(to_pictures(self.autoencoder.decode(z / self.scale)))
            labels += [f"{name}: {caption}" for caption in self.captions]
        path = folder / "samples" / f"step_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with writing(path) as file:
            sample.draw_grid(np.concatenate(pictures), labels, columns=count).save(file, "PNG")


# ---- 6. the run and its files ----
@contextmanager
def open_run(config):
    """Yields (config, folder, stop) of a new run or of one to resume, and holds its lock.
    The first Ctrl-C, SIGTERM or closed terminal fills the list `stop`; the second raises."""
    folder, stop = Path("out", config.name), []
    if Path("out") not in folder.parents or {"..", ","} & {*folder.parts, *config.name}:
        raise UserError(f"--name={config.name}: expected a folder below out/, without a comma.")
    if config.resume and not folder.is_dir():
        raise UserError(f"{folder} is missing: --name says which run in out/ to resume.")
    if not config.resume and RANK == 0:
        numbered = (Path(f"{folder}-{number}") for number in itertools.count(2))
        folder = sample.new_folder(itertools.chain([folder], numbered))
        config = replace(config, name=folder.relative_to("out").as_posix())
        print0(f"This run is {folder}; to resume it: {command('train.py', config, resume=True)}")

    def ask(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        print0("Stopping after this step; once more stops at once.")
    with ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                stack.callback(signal.signal, number, signal.signal(number, ask))
        if RANK == 0:
            stack.enter_context(one_writer(folder))
        yield config, folder, stop


def load_run(path, config, parts, meta):
    """Load a checkpoint into the parts of a run; the step it was saved at; UserError."""
    state = read_checkpoint(path)
    with reading(path, "a run of train.py to resume"):
        then = Config(**state["config"])
        changed = dict(vars(config).items() - vars(then).items()).keys() - {"resume"}
        other = prepare_data.same_data(state["meta"], meta)
        if state["uvit"] != parts["model"].config:
            other = "architecture"
        for key in ("seed", "init_std", "sincos_positions", "beta", "weight_decay"):
            if key in changed:  # fixed by now
                other = key
        if other:
            raise UserError(f"{path} was trained with another {other}; its own command is: "
                            f"{command('train.py', then, resume=True)}")
        if state["step"] >= config.steps:
            raise UserError(f"{path} is at step {state['step']:,}: raise --steps to train longer.")
        for key in sorted(changed):
            print0(f"{key} was {vars(then)[key]} and is now {vars(config)[key]}")
        for name, part in parts.items():
            if name != "scaler" or part.get_scale() > 1 and state["scaler"]["scale"] > 1:
                part.load_state_dict(state[name])
        return state["step"]


def save_checkpoint(folder, parts, config, cache, name, step):
    """Whole or not at all: whatever happens, the checkpoint before stays."""
    if RANK > 0:
        return
    checkpoint = {"format": CHECKPOINT_FORMAT, "step": step}
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"config": asdict(config), "uvit": asdict(parts["model"].config),
                   "meta": cache.meta, "latent_scale": cache.meta["latent_scale"],
                   "autoencoder": cache.autoencoder,
                   "null_context": torch.tensor(cache.text[0])}
    content = io.BytesIO()  # torch.save hides what goes wrong
    torch.save(checkpoint, content)
    with writing(folder / name) as file:
        file.write(content.getbuffer())


def finish(config, folder, step, cache, device, stop):
    """Say how to resume a stopped run; score one that has ended, and say how to draw."""
    if device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    if step < config.steps:
        again = command("train.py", config, resume=True)
        return print0(f"Stopped at step {step:,}; resume with: {again}")
    import evaluate  # read it last
    path, prompt = str(folder / "last.pt"), cache.captions[cache.val_pairs[0, 1]]
    same = {"weights": config.weights, "guidance_scale": config.guidance_scale}
    scoring = evaluate.Config(path, config.data, steps=config.sample_steps, **same)
    drawing = sample.Config(path, prompt, **same)
    print0(f"The run is whole and saved; it is scored by:\n  {command('evaluate.py', scoring)}")
    if config.score and cache.meta["dataset"] == "shapes" and not stop:
        evaluate.main(scoring)
    print0(f"Look at {folder / 'samples'}; then draw with:\n  {command('sample.py', drawing)}")


if __name__ == "__main__":
    run(main, Config)
