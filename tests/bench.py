"""How fast are the four models, on this machine, in one interleaved run?

    python tests/bench.py                           # the model of the shapes run
    python tests/bench.py --size=S                  # the paper's S/2: latents 4x32x32, text 77x768
    python tests/bench.py --size=S --json=bench.json

For each model: parameters, multiply-adds per image, the median time of a training step as train.py
computes it (but for the loss scaler), images/s, the share of what this machine's own large matrix
product reaches in the same precision, peak memory beyond weights, average and optimiser, images/s
of sampling with guidance; ratios to early/concat. Then the parts of a step (data, forward,
backward, optimiser, moving average) and of sampling (the text path, which runs once, and one step
of the solver). Each part is waited for, so that on a GPU they add up to more than a step.

Two baselines are next to them, both the network of early/concat:

    plain           blocks of torch.nn.TransformerEncoderLayer, which have torch's own attention
    as published    computed the way of U-ViT's public code: attention in float32, not compiled,
                    AdamW neither fused nor foreach, the moving average tensor by tensor

Nothing is asserted: these are measurements. Let nothing else run meanwhile.
"""
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import model
import train
from evaluate import print_table
from model import (Constants, FilePath, Positive, Size, UViT, UViTConfig, autocast, choose_device,
                   choose_precision, count_multiply_adds, noise_schedule, run, timestep_embedding,
                   write_json)
from sample import sample_latents


@dataclass
class Config(Constants):
    size: Literal["shapes", "S"] = "shapes"     # S: the paper's S/2
    batch_size: Size | None = None      # None: 32 (shapes), 8 (S on a CPU), 256 (S on CUDA)
    repeats: Positive = 7               # timed steps of each model, after two that are not
    sample_batch: Size | None = None    # pictures sampled at once; None: 8 on a CPU, 64 on CUDA
    sample_steps: Positive = 10         # timed steps of the solver; images/s are given for 50
    compile: Literal["auto", "on", "off"] = "auto"      # torch.compile; auto: on CUDA
    json: FilePath | None = None        # also write everything to this file


# ---- 1. the models and their baselines ----

def describe_models(size: str) -> dict[str, UViTConfig]:
    """The four models of a size, by name."""
    names = ("depth", "n_image", "n_fuse", "n_text", "patch_size", "width", "heads")
    shapes = {name: getattr(train.Config, name) for name in names}
    shapes |= {"channels": 16, "image_size": 8, "context_len": 16, "context_dim": 64}
    return {f"{fusion}/{how}": UViTConfig(fusion, how, **(shapes if size == "shapes" else {}))
            for fusion in ("early", "intermediate") for how in ("concat", "cross_attention")}


class PlainUViT(UViT):
    """Early fusion by concatenation, written down directly with torch's transformer layers."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        D, half = config.width, len(self.in_blocks)

        def layer():
            return nn.TransformerEncoderLayer(D, config.heads, 4 * D, dropout=0, activation="gelu",
                                              batch_first=True, norm_first=True)
        self.in_blocks = nn.ModuleList(layer() for _ in range(half))
        self.mid_block = layer()
        self.out_blocks = nn.ModuleList(layer() for _ in range(half))
        self.merges = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(half))

    def forward(self, zt, t, context):
        image = self.patch_embed["proj"](zt).flatten(2).mT                  # (B, N, D)
        time = timestep_embedding(t, self.config.width)[:, None]            # (B, 1, D)
        x = torch.cat([time, self.context_embed(context), image], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block, merge in zip(self.out_blocks, self.merges):
            x = block(merge(torch.cat([x, skips.pop()], dim=-1)))
        x = self.decoder_pred(self.norm(x))[:, -image.shape[1]:]            # (B, N, P*P*C)
        return self.final_layer(self.unpatchify(x))


def attend_in_float32(q, k, v):
    """U-ViT's public way: inputs cast to float32 before attention."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def fake_cache(config: UViTConfig, pictures: int = 1024) -> SimpleNamespace:
    """A cache of noise with the shapes of a real one, each picture with a caption of its own."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
    index = np.arange(pictures)
    moments = noise(pictures, 2 * config.channels, config.image_size, config.image_size)
    pairs = np.stack([index, index + 1], axis=1)
    shape = (config.channels, config.image_size, config.image_size)
    return SimpleNamespace(train_moments=moments, train_pairs=pairs,
                           text=noise(pictures + 1, config.context_len, config.context_dim),
                           meta={"latent_scale": 1, "latent_shape": shape})


# ---- 2. one model, timed ----

def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(device: torch.device, function, *arguments) -> float:
    began = clock(device)
    function(*arguments)
    return clock(device) - began


class Bench:
    """One model with its data, optimiser and moving average, whose step and sampling are timed."""

    def __init__(self, uvit: UViTConfig, kind: str, batch_size: int, device: torch.device,
                 compiled: bool = False):
        """`kind` is "ours", "plain" or "as published", which is never compiled."""
        Network = PlainUViT if kind == "plain" else UViT
        self.published, self.device = kind == "as published", device
        self.config = train.Config(batch_size=batch_size, ema_decay=0.9999)
        self.net = Network(uvit).to(device)
        self.ema = Network(uvit).to(device).requires_grad_(False)
        self.wrapped = self.net
        if compiled and not self.published:
            self.wrapped = torch.compile(self.net)
            self.ema.denoise = torch.compile(self.ema.denoise)
        way = {"foreach": False} if self.published else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.9),
                                           weight_decay=0.03, **way)
        self.alpha_bar = noise_schedule().float().to(device)
        self.precision = choose_precision(device)
        data = train.Batches(fake_cache(uvit), self.config, device)
        self.batches = data.stream(1, sys.maxsize)      # on CUDA read ahead: "data" is the wait
        self.steps, self.parts, self.samplings = [], [], []

    def update_ema(self):
        if not self.published:
            return train.update_ema(self.ema, self.net, 10 ** 6, self.config)
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.net.parameters()):
                average.lerp_(parameter, 1 - self.config.ema_decay)

    def step(self, mark=lambda: None):
        """A training step as in train.py; `mark` is called at its beginning and after each part."""
        attention = attend_in_float32 if self.published else model.attention
        with patch.object(model, "attention", attention):
            mark()
            _, [batch] = next(self.batches)
            mark()
            loss = train.compute_loss(self.wrapped, self.alpha_bar, self.precision, *batch)
            mark()
            loss.backward()
            mark()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mark()
            self.update_ema()
            mark()

    def time_steps(self):
        """Two steps: one as a whole, and one with each part waited for."""
        self.steps.append(seconds(self.device, self.step))
        marks = []
        self.step(lambda: marks.append(clock(self.device)))
        self.parts.append(np.diff(marks))

    def time_sampling(self, pictures: int, steps: int):
        """Appends seconds: of the text path, of one step, and of 50 steps for each picture."""
        uvit, prompts = self.net.config, torch.arange(pictures)
        context = torch.randn(pictures, uvit.context_len, uvit.context_dim, device=self.device)

        def draw(steps):
            sample_latents(self.ema, context, prompts, context[0], prompts.tolist(), steps, 2.0)
        with autocast(self.device), torch.no_grad():
            both = torch.cat([context, context[:1]])
            text = seconds(self.device, self.ema.encode_text, both)
        first = seconds(self.device, draw, 1)                   # with noise and text path
        each = (seconds(self.device, draw, 1 + steps) - first) / steps
        self.samplings.append([text, each, (first + 49 * each) / pictures])

    def warm_up(self) -> float | None:
        """Two steps that do not count; the GiB that one needs, on CUDA."""
        self.step()                             # compiles, and makes the optimiser's averages
        if self.device.type != "cuda":
            return self.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def measure_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of 60, as other work may disturb some."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(precision)
    return 2 * n ** 3 / min(seconds(device, torch.matmul, a, b) for _ in range(60))


# ---- 3. all of them, in turn ----

PARTS = ["data", "forward", "backward", "optimiser", "ema"]


COLUMNS = {         # title -> figure, factor
    "M parameters": ("parameters", 1e-6), "G multiply-adds": ("multiply_adds", 1e-9),
    "step ms": ("step_ms", 1), "images/s": ("images_per_second", 1),
    "% of peak": ("share_of_peak", 100), "GiB": ("memory_gib", 1),
    "images/s, sampling": ("sampling_images_per_second", 1)}
RATIOS = ["multiply_adds", "images_per_second", "sampling_images_per_second"]
COLUMNS_OF_PARTS = {f"{part} ms": (f"{part}_ms", 1)
                    for part in [*PARTS, "sampling_text", "sampling_step"]}


def measure(benches: dict[str, Bench], config: Config, peak: float) -> dict[str, dict]:
    """Medians of all models, timed in turn: model -> figure -> value."""
    memory = {name: bench.warm_up() for name, bench in benches.items()}
    for _ in range(config.repeats):
        for bench in benches.values():
            bench.time_steps()
    for _ in range(4):                          # the first does not count
        for name, bench in benches.items():
            if ", " not in name:
                bench.time_sampling(config.sample_batch, config.sample_steps)
    figures = {}
    for name, bench in benches.items():
        text, image = count_multiply_adds(bench.net.config)
        step = statistics.median(bench.steps)
        speed = config.batch_size / step
        figures[name] = row = {
            "parameters": sum(p.numel() for p in bench.net.parameters()),
            "multiply_adds": text + image, "multiply_adds_text": text,
            "step_ms": 1000 * step, "images_per_second": speed,
            "share_of_peak": 6 * (text + image) * speed / peak, "memory_gib": memory[name]}
        for part, times in zip(PARTS, zip(*bench.parts)):
            row[f"{part}_ms"] = 1000 * statistics.median(times)
        if bench.samplings:
            text, each, picture = map(statistics.median, zip(*bench.samplings[1:]))
            row |= {"sampling_text_ms": 1000 * text, "sampling_step_ms": 1000 * each,
                    "sampling_images_per_second": 1 / picture}
    return figures


def print_figures(figures: dict[str, dict]):
    """Two Markdown tables: the whole, with ratios to early/concat in brackets, and the parts."""
    for columns in (COLUMNS, COLUMNS_OF_PARTS):
        rows = []
        for name, row in figures.items():
            cells = {"model": name}
            for title, (key, factor) in columns.items():
                value = row.get(key)
                cells[title] = "" if value is None else f"{factor * value:.4g}"
                if value and key in RATIOS:
                    cells[title] += f" ({value / figures['early/concat'][key]:.2f})"
            rows.append(cells)
        print()
        print_table(rows)


def main(config: Config):
    models, device = describe_models(config.size), choose_device()
    cuda, precision = device.type == "cuda", choose_precision(device)
    compiled = config.compile == "on" or config.compile == "auto" and cuda
    large = 256 if cuda else 8
    config.batch_size = config.batch_size or (32 if config.size == "shapes" else large)
    config.sample_batch = config.sample_batch or (64 if cuda else 8)
    peak = measure_peak(device, precision)
    torch.set_float32_matmul_precision("high")
    other = f"{device.type}, {torch.get_num_threads()} threads"
    machine = {"device": torch.cuda.get_device_name() if cuda else other,
               "torch": torch.__version__, "precision": str(precision).removeprefix("torch."),
               "peak_flops": peak}
    for key, value in (machine | asdict(config)).items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")

    def prepare(name, kind):
        return Bench(models[name], kind, config.batch_size, device, compiled)
    benches = {name: prepare(name, "ours") for name in models}
    for kind in ("plain", "as published"):
        benches[f"early/concat, {kind}"] = prepare("early/concat", kind)
    figures = measure(benches, config, peak)
    print_figures(figures)
    if config.json:
        write_json(config.json, {"machine": machine, "config": asdict(config), "rows": figures})


if __name__ == "__main__":
    run(main, Config)
