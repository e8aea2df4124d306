"""How fast are the four models, on this machine, in one interleaved run?

    python tests/bench.py                               # the model of the shapes run
    python tests/bench.py --size=S                      # the paper's S/2: latents 4x32x32, text 77x768
    python tests/bench.py --size=S --json=bench.json

For each model: parameters, multiply-adds per image, the median time of a training step as train.py computes it, images/s, the
share of what this machine's own large matrix product reaches in the same precision, peak memory, and images/s of sampling with
guidance; ratios to early/concat. Then the parts of a step (data, forward, backward, optimiser, moving average) and of sampling
(the text path, which runs once, and one step of the solver), each waited for, which makes their sum longer than a step on a GPU.

Two baselines stand beside them, both the network of early/concat:

    plain           blocks of torch.nn.TransformerEncoderLayer, which attend with torch's own attention; all else like ours
    as published    computed the way of U-ViT's public code: attention in float32, not compiled, AdamW neither fused nor foreach,
                    the moving average one tensor after the other

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
from model import (UserError, UViT, UViTConfig, autocast, choose_device, choose_precision, count_multiply_adds,
                   noise_schedule, run, timestep_embedding)
from prepare_data import write_json
from sample import sample_latents


@dataclass
class Config:
    size: str = "shapes"            # or S: the paper's S/2
    batch_size: int = 0             # 0 = 32 (shapes), 8 (S on a CPU), 256 (S on CUDA)
    repeats: int = 7                # timed steps of each model, after two that are not
    sample_batch: int = 0           # pictures sampled at once; 0 = 8 on a CPU, 64 on CUDA
    sample_steps: int = 10          # timed steps of the solver; images/s are given for 50
    compile: bool = True            # on CUDA; never on a CPU
    json: str = ""                  # also write everything to this file


# ---- 1. the models and their baselines ----

def describe_models(size: str) -> dict[str, UViTConfig]:
    """The four models of a size, by name."""
    if size not in ("shapes", "S"):
        raise UserError(f"--size={size}: expected shapes or S.")
    shapes = train.describe_uvit(train.Config(), channels=16, image_size=8, context_len=16, context_dim=64)
    shared = dataclasses.asdict(shapes) if size == "shapes" else {}
    return {f"{fusion}/{conditioning}": UViTConfig(**shared | {"fusion": fusion, "conditioning": conditioning})
            for fusion in ("early", "intermediate") for conditioning in ("concat", "cross_attention")}


class PlainUViT(UViT):
    """Early fusion by concatenation, written down directly with torch's transformer layers."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        self.in_blocks, self.out_blocks = [nn.ModuleList(map(self.block, blocks)) for blocks in (self.in_blocks, self.out_blocks)]
        self.mid_block = self.block(self.mid_block)
        self.merges = nn.ModuleList(nn.Linear(2 * config.width, config.width) for _ in self.out_blocks)

    def block(self, _):
        D, heads = self.config.width, self.config.heads
        return nn.TransformerEncoderLayer(D, heads, 4 * D, dropout=0, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, zt, t, context):
        image = self.patch_embed["proj"](zt).flatten(2).transpose(1, 2)               # (B, N, D)
        time = timestep_embedding(t, self.config.width)[:, None]                      # (B, 1, D)
        x = torch.cat([time, self.context_embed(context), image], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block, merge in zip(self.out_blocks, self.merges):
            x = block(merge(torch.cat([x, skips.pop()], dim=-1)))
        return self.final_layer(self.unpatchify(self.decoder_pred(self.norm(x))[:, -image.shape[1]:]))


def attend_in_float32(q, k, v):
    """U-ViT's public way: inputs cast to float32 before attention."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def fake_cache(config: UViTConfig, pictures: int = 1024) -> SimpleNamespace:
    """A data cache of noise with the shapes of a real one, each picture with a caption of its own."""
    rng = np.random.default_rng(0)
    latent = (2 * config.channels, config.image_size, config.image_size)
    context = (pictures + 1, config.context_len, config.context_dim)
    moments, text = [rng.standard_normal(shape, dtype=np.float32).astype(np.float16) for shape in ((pictures, *latent), context)]
    pairs = np.stack([np.arange(pictures), 1 + np.arange(pictures)], axis=1)
    return SimpleNamespace(train=SimpleNamespace(moments=moments, pairs=pairs), text=text, meta={"latent_scale": 1.0})


# ---- 2. one model, timed ----

class Bench:
    """One model with its data, optimiser and moving average; the training step and the sampler are timed."""

    def __init__(self, uvit: UViTConfig, kind: str, batch_size: int, device: torch.device, compiled: bool):
        """`kind` is "ours", "plain" or "as published"."""
        self.uvit, self.kind, self.device, self.batch_size = uvit, kind, device, batch_size
        Network = PlainUViT if kind == "plain" else UViT
        self.net, self.ema = Network(uvit).to(device), Network(uvit).to(device).requires_grad_(False)
        fast = dict(foreach=False) if kind == "as published" else dict(fused=True)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.9), weight_decay=0.03, **fast)
        self.wrapped = torch.compile(self.net) if compiled and kind != "as published" else self.net
        self.alpha_bar, self.precision = noise_schedule().float().to(device), choose_precision(device)
        data = train.Batches(fake_cache(uvit), train.Config(batch_size=batch_size), 0, 1, device)
        self.batches = data.stream(0, sys.maxsize)          # on CUDA a thread reads ahead, and "data" is the wait for it
        self.steps, self.parts, self.samplings = [], [], []

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def update_average(self):
        with torch.no_grad():
            if self.kind != "as published":
                return torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1e-4)
            for average, parameter in zip(self.ema.parameters(), self.net.parameters()):
                average.lerp_(parameter, 1e-4)

    def step(self, mark=lambda: None):
        """One training step, as train.py does it; `mark` is called before the first part and after each."""
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
        """Seconds of the text path, which runs once, of one step, and of all 50 for each picture, from `steps` of them."""
        context = torch.randn(pictures, self.uvit.context_len, self.uvit.context_dim, device=self.device)
        began = self.clock()
        with autocast(self.device):
            self.ema.encode_text(torch.cat([context, context[:1]]))
        text = self.clock() - began
        began = self.clock()
        sample_latents(self.ema, context, torch.arange(pictures), context[0], list(range(pictures)), steps, 2.0)
        step = (self.clock() - began - text) / steps
        self.samplings.append([text, step, (text + 50 * step) / pictures])


def measure_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine: the best of 10."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds[2:])


# ---- 3. all of them, in turn ----

def measure(benches: dict[str, Bench], config: Config, pictures: int, peak: float) -> dict[str, dict]:
    """Warm up, time in turn, and give the medians: model -> figure -> value."""
    memory = {}
    for name, bench in benches.items():                     # one model at a time, for its peak memory
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):
            bench.step()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30 if bench.device.type == "cuda" else None
        if bench.kind == "ours":
            bench.time_sampling(pictures, 1)
            bench.samplings.clear()
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
        step = statistics.median(bench.steps)
        rows[name] = {"parameters": sum(p.numel() for p in bench.net.parameters()), "multiply_adds": text + image,
                      "multiply_adds_text": text, "step_ms": 1000 * step, "images_per_second": bench.batch_size / step,
                      "share_of_peak": 6 * (text + image) * bench.batch_size / step / peak, "memory_gib": memory[name]}
        for part, seconds in zip(("data", "forward", "backward", "optimiser", "ema"), zip(*bench.parts)):
            rows[name][f"{part}_ms"] = 1000 * statistics.median(seconds)
        if bench.kind == "ours":
            once, each, picture = map(statistics.median, zip(*bench.samplings))
            rows[name] |= {"sampling_text_ms": 1000 * once, "sampling_step_ms": 1000 * each, "sampling_images_per_second": 1 / picture}
    return rows


def print_table(heads: list[str], table: list[list[str]]):
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for cells in table:
        print(f"| {' | '.join(cells)} |")


def print_rows(rows: dict[str, dict]):
    """Two Markdown tables: the whole, with ratios to early/concat, and the parts."""
    def ratio(row, key):
        return f"{row[key] / rows['early/concat'][key]:.2f}"
    whole, parts = [], []
    for name, row in rows.items():
        sampling = "sampling_images_per_second" in row
        whole.append([
            name, f"{row['parameters'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.3f}", ratio(row, "multiply_adds"),
            f"{row['step_ms']:.1f}", f"{row['images_per_second']:.1f}", ratio(row, "images_per_second"),
            f"{100 * row['share_of_peak']:.0f}%", f"{row['memory_gib']:.1f}" if row["memory_gib"] else "",
            *([f"{row['sampling_images_per_second']:.2f}", ratio(row, "sampling_images_per_second")] if sampling else ["", ""])])
        keys = [f"{part}_ms" for part in ("data", "forward", "backward", "optimiser", "ema", "sampling_text", "sampling_step")]
        parts.append([name, *(f"{row[key]:.1f}" if key in row else "" for key in keys)])
    print_table(["model", "M parameters", "G multiply-adds", "ratio", "step ms", "images/s", "ratio", "of peak", "GiB",
                 "sampling images/s", "ratio"], whole)
    print_table(["parts, ms", "data", "forward", "backward", "clip and optimiser", "EMA", "sampling: text, once",
                 "sampling: a step"], parts)


def main(config: Config):
    models, device = describe_models(config.size), choose_device()
    cuda, precision = device.type == "cuda", choose_precision(device)
    batch_size = config.batch_size or (32 if config.size == "shapes" else 256 if cuda else 8)
    pictures, peak = config.sample_batch or (64 if cuda else 8), measure_peak(device, precision)
    torch.set_float32_matmul_precision("high")
    machine = {"device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
               "torch": torch.__version__, "precision": str(precision).removeprefix("torch."), "peak_flops": peak,
               "size": config.size, "batch_size": batch_size, "sample_batch": pictures}
    print(f"{machine['device']}, torch {machine['torch']}, {machine['precision']}; a large matrix product reaches "
          f"{peak / 1e12:.3f} TFLOP/s; size {config.size}, batch {batch_size}, medians of {config.repeats}, interleaved; "
          f"{pictures} pictures sampled at once")

    compiled, early = cuda and config.compile, models["early/concat"]
    benches = {name: Bench(uvit, "ours", batch_size, device, compiled) for name, uvit in models.items()}
    benches |= {f"early/concat, {kind}": Bench(early, kind, batch_size, device, compiled) for kind in ("plain", "as published")}
    rows = measure(benches, config, pictures, peak)
    print_rows(rows)
    if config.json:
        write_json(Path(config.json), {"machine": machine, "config": dataclasses.asdict(config), "rows": rows})


if __name__ == "__main__":
    run(main, Config)
