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

Two baselines stand beside them, both the network of early/concat:

    plain           blocks of torch.nn.TransformerEncoderLayer, which have torch's own attention
    as published    computed the way of U-ViT's public code: attention in float32, not compiled,
                    AdamW neither fused nor foreach, the moving average tensor by tensor

Nothing is asserted: these are measurements. Let nothing else run meanwhile.
"""
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import model
import train
from model import (UserError, UViT, UViTConfig, autocast, choose_device, choose_precision,
                   count_multiply_adds, noise_schedule, run, timestep_embedding)
from prepare_data import write_json
from sample import sample_latents


@dataclass
class Config:
    size: str = "shapes"            # or S: the paper's S/2
    batch_size: int = 0             # 0 = 32 (shapes), 8 (S on a CPU), 256 (S on CUDA)
    repeats: int = 7                # timed steps of each model, after two that are not
    sample_batch: int = 0           # pictures sampled at once; 0 = 8 on a CPU, 64 on CUDA
    sample_steps: int = 10          # timed steps of the solver; images/s are given for 50
    compile: str = "auto"           # a mode of torch.compile, or off; auto: default, CPU: off
    json: str = ""                  # also write everything to this file


# ---- 1. the models and their baselines ----

def describe_models(size: str) -> dict[str, UViTConfig]:
    """The four models of a size, by name."""
    if size not in ("shapes", "S"):
        raise UserError(f"--size={size}: expected shapes or S.")
    shared = {} if size == "S" else dataclasses.asdict(train.describe_uvit(
        train.Config(), channels=16, image_size=8, context_len=16, context_dim=64))
    return {f"{fusion}/{how}": UViTConfig(**shared | {"fusion": fusion, "conditioning": how})
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
    rows = np.arange(pictures)
    moments = noise(pictures, 2 * config.channels, config.image_size, config.image_size)
    return SimpleNamespace(
        train=SimpleNamespace(moments=moments, pairs=np.stack([rows, rows + 1], axis=1)),
        text=noise(pictures + 1, config.context_len, config.context_dim), meta={"latent_scale": 1})


# ---- 2. one model, timed ----

class Bench:
    """One model with its data, optimiser and moving average, whose step and sampling are timed."""

    def __init__(self, uvit: UViTConfig, kind: str, batch_size: int, device: torch.device,
                 mode: str = "off"):
        """`kind` is "ours", "plain" or "as published"; `mode` is torch.compile's, or "off"."""
        self.uvit, self.kind, self.device, self.batch_size = uvit, kind, device, batch_size
        Network = PlainUViT if kind == "plain" else UViT
        self.net = Network(uvit).to(device)
        self.ema = Network(uvit).to(device).requires_grad_(False)
        self.wrapped = self.net
        if mode != "off" and kind != "as published":
            self.wrapped = torch.compile(self.net, mode=mode)
            self.ema.denoise = torch.compile(self.ema.denoise, mode=mode)
        way = {"foreach": False} if kind == "as published" else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.9),
                                           weight_decay=0.03, **way)
        self.alpha_bar = noise_schedule().float().to(device)
        self.precision = choose_precision(device)
        data = train.Batches(fake_cache(uvit), train.Config(batch_size=batch_size), 0, 1, device)
        self.batches = data.stream(0, sys.maxsize)      # on CUDA read ahead: "data" is the wait
        self.steps, self.parts, self.samplings = [], [], []

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def update_average(self):
        averages, parameters = list(self.ema.parameters()), list(self.net.parameters())
        if self.kind != "as published":
            return torch._foreach_lerp_(averages, parameters, 1e-4)
        for average, parameter in zip(averages, parameters):
            average.lerp_(parameter, 1e-4)

    def step(self, mark=lambda: None):
        """A training step as in train.py; `mark` is called at its beginning and after each part."""
        attention = model.attention
        model.attention = attend_in_float32 if self.kind == "as published" else attention
        try:
            mark()
            batch, = next(self.batches)
            mark()
            loss = train.compute_loss(self.wrapped, self.alpha_bar, self.precision, *batch)
            mark()
            loss.backward()
            mark()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mark()
            self.update_average()
            mark()
        finally:
            model.attention = attention

    def time_step(self):
        began = self.clock()
        self.step()
        self.steps.append(self.clock() - began)

    def time_parts(self):
        marks = []
        self.step(lambda: marks.append(self.clock()))
        self.parts.append(np.diff(marks))

    @torch.no_grad()
    def time_sampling(self, pictures: int, steps: int):
        """Appends seconds: of the text path, of one step, and of 50 steps for each picture."""
        context = torch.randn(pictures, self.uvit.context_len, self.uvit.context_dim,
                              device=self.device)
        began = self.clock()
        with autocast(self.device):
            self.ema.encode_text(torch.cat([context, context[:1]]))
        text = self.clock() - began

        def seconds(n):
            began = self.clock()
            sample_latents(self.ema, context, torch.arange(pictures), context[0],
                           list(range(pictures)), n, 2.0)
            return self.clock() - began
        first, whole = seconds(1), seconds(1 + steps)         # the first: with noise and text path
        step = (whole - first) / steps
        self.samplings.append([text, step, (first + 49 * step) / pictures])


def measure_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine: the best of 60."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
    seconds = []
    for _ in range(62):         # seconds on a CPU, which other work may disturb meanwhile
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds[2:])


# ---- 3. all of them, in turn ----

PARTS = ("data", "forward", "backward", "optimiser", "ema")


def warm_up(bench: Bench, pictures: int) -> float | None:
    """Two steps and a sampling that do not count; the GiB that they needed, on CUDA."""
    cuda = bench.device.type == "cuda"
    bench.step()                                # compiles, and makes the optimiser's averages
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    bench.step()
    needed = (torch.cuda.max_memory_allocated() - before) / 2 ** 30 if cuda else None
    if bench.kind == "ours":
        bench.time_sampling(pictures, 1)
        bench.samplings.clear()
    return needed


def measure(benches: dict[str, Bench], config: Config, pictures: int, peak: float) -> dict:
    """Medians of all models, timed in turn: model -> figure -> value."""
    memory = {name: warm_up(bench, pictures) for name, bench in benches.items()}
    for _ in range(config.repeats):
        for bench in benches.values():
            bench.time_step()
            bench.time_parts()
    for _ in range(3):
        for bench in benches.values():
            if bench.kind == "ours":
                bench.time_sampling(pictures, config.sample_steps)
    rows = {}
    for name, bench in benches.items():
        text, image = count_multiply_adds(bench.uvit)
        seconds, B = statistics.median(bench.steps), bench.batch_size
        row = {"parameters": sum(p.numel() for p in bench.net.parameters()),
               "multiply_adds": text + image, "multiply_adds_text": text,
               "step_ms": 1000 * seconds, "images_per_second": B / seconds,
               "share_of_peak": 6 * (text + image) * B / seconds / peak,
               "memory_gib": memory[name]}
        for part, times in zip(PARTS, zip(*bench.parts)):
            row[f"{part}_ms"] = 1000 * statistics.median(times)
        if bench.kind == "ours":
            once, each, picture = map(statistics.median, zip(*bench.samplings))
            row |= {"sampling_text_ms": 1000 * once, "sampling_step_ms": 1000 * each,
                    "sampling_images_per_second": 1 / picture}
        rows[name] = row
    return rows


def print_table(heads: list[str], rows: dict[str, list[str]]):
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, cells in rows.items():
        print(f"| {' | '.join([name, *cells])} |")


def print_rows(rows: dict[str, dict]):
    """Two Markdown tables: the whole, with ratios to early/concat, and the parts."""
    def show(row, key, digits=1, factor=1):
        return f"{factor * row[key]:.{digits}f}" if row.get(key) is not None else ""

    def ratio(row, key):
        return f"{row[key] / rows['early/concat'][key]:.2f}" if key in row else ""
    speed, sampling = "images_per_second", "sampling_images_per_second"
    print_table(
        ["model", "M parameters", "G multiply-adds", "ratio", "step ms", "images/s", "ratio",
         "% of peak", "GiB", "sampling images/s", "ratio"],
        {name: [show(row, "parameters", 2, 1e-6), show(row, "multiply_adds", 3, 1e-9),
                ratio(row, "multiply_adds"), show(row, "step_ms"), show(row, speed),
                ratio(row, speed), show(row, "share_of_peak", 0, 100), show(row, "memory_gib"),
                show(row, sampling, 2), ratio(row, sampling)] for name, row in rows.items()})
    keys = [f"{part}_ms" for part in (*PARTS, "sampling_text", "sampling_step")]
    print_table(
        ["parts, ms", "data", "forward", "backward", "clip and optimiser", "EMA",
         "sampling: text, once", "sampling: a step"],
        {name: [show(row, key) for key in keys] for name, row in rows.items()})


def main(config: Config):
    modes = ("auto", "off", "default", "reduce-overhead", "max-autotune")
    if config.compile not in modes:
        raise UserError(f"--compile={config.compile}: expected {', '.join(modes[:-1])} or "
                        f"{modes[-1]}.")
    models, device = describe_models(config.size), choose_device()
    cuda, precision = device.type == "cuda", choose_precision(device)
    batch_size = config.batch_size or (32 if config.size == "shapes" else 256 if cuda else 8)
    pictures = config.sample_batch or (64 if cuda else 8)
    peak = measure_peak(device, precision)
    torch.set_float32_matmul_precision("high")
    threads = f"CPU, {torch.get_num_threads()} threads"
    mode = config.compile
    if mode == "auto":
        mode = "default" if cuda else "off"
    machine = {"device": torch.cuda.get_device_name() if cuda else threads,
               "torch": torch.__version__, "precision": str(precision).removeprefix("torch."),
               "compile": mode, "peak_flops": peak, "batch_size": batch_size,
               "sample_batch": pictures}
    print(f"{machine['device']}, torch {machine['torch']}, {machine['precision']}, compile {mode}; "
          f"a large matrix product reaches {peak / 1e12:.3f} TFLOP/s; size {config.size}, "
          f"batch {batch_size}, medians of {config.repeats}, interleaved; "
          f"{pictures} pictures sampled at once")

    def prepare(name, kind):
        return Bench(models[name], kind, batch_size, device, mode)
    benches = {name: prepare(name, "ours") for name in models}
    for kind in ("plain", "as published"):
        benches[f"early/concat, {kind}"] = prepare("early/concat", kind)
    rows = measure(benches, config, pictures, peak)
    print_rows(rows)
    if config.json:
        write_json(Path(config.json), {"machine": machine, "config": dataclasses.asdict(config),
                                       "rows": rows})


if __name__ == "__main__":
    run(main, Config)
