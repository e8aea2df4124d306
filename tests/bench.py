"""How fast are the four models, on this machine, in one interleaved run?

    python tests/bench.py                               # the model of the shapes run
    python tests/bench.py --size=S --batch_size=256     # the paper's S/2: latents 4x32x32, text 77x768
    python tests/bench.py --size=S --json=bench.json

For each model: parameters, multiply-adds per image, time of a training step (median, after warm-up) and of its parts, images/s, the share
of what this machine's own large matrix product reaches in the same precision, peak memory, and images/s of sampling with guidance; ratios
to early/concat. The row "as published" is early/concat computed the way U-ViT's public code does: attention in float32, no compilation,
an optimiser that is not fused. Nothing is asserted: these are measurements.
"""
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import model
import train
from model import UserError, UViT, UViTConfig, choose_device, choose_precision, count_multiply_adds, noise_schedule, run
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


def describe_models(size: str) -> dict[str, UViTConfig]:
    """The four models of a size, by name."""
    if size not in ("shapes", "S"):
        raise UserError(f"--size={size}: expected shapes or S.")
    shared = {} if size == "S" else {field.name: getattr(train.Config, field.name) for field in dataclasses.fields(UViTConfig)
                                     if hasattr(train.Config, field.name)} | dict(image_size=8, channels=16, context_len=16, context_dim=64)
    return {f"{fusion}/{conditioning}": UViTConfig(**shared | {"fusion": fusion, "conditioning": conditioning})
            for fusion in ("early", "intermediate") for conditioning in ("concat", "cross_attention")}


def attend_in_float32(q, k, v):
    """U-ViT's public way: inputs cast to float32 before attention."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())


class Bench:
    """One model with its optimiser and moving average, and a training step whose parts are timed."""

    def __init__(self, config: UViTConfig, batch_size: int, device: torch.device, as_published: bool, compiled: bool):
        self.config, self.device, self.as_published, self.batch_size = config, device, as_published, batch_size
        self.net, self.ema = UViT(config).to(device), UViT(config).to(device).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=not as_published, foreach=False if as_published else None)
        self.fast = torch.compile(self.net) if compiled and not as_published else self.net
        self.alpha_bar, self.precision = noise_schedule().float().to(device), choose_precision(device)
        latent = (batch_size, config.channels, config.image_size, config.image_size)
        self.batch = (torch.randn(latent, device=device), torch.randn(latent, device=device),
                      torch.randint(1, 1001, (batch_size,), device=device),
                      torch.randn(batch_size, config.context_len, config.context_dim, device=device))
        self.times, self.sampling = [], []

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self):
        """One training step; appends the seconds of (forward, backward, optimiser, moving average)."""
        fused_attention = model.attention
        if self.as_published:
            model.attention = attend_in_float32
        try:
            marks = [self.clock()]
            loss = train.compute_loss(self.fast, self.alpha_bar, self.precision, *self.batch)
            marks.append(self.clock())
            loss.backward()
            marks.append(self.clock())
            self.optimizer.step()
            self.optimizer.zero_grad()
            marks.append(self.clock())
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1e-4)
            marks.append(self.clock())
        finally:
            model.attention = fused_attention
        self.times.append([after - before for before, after in zip(marks, marks[1:])])

    def sample(self, pictures: int, steps: int):
        """Seconds per picture of 50 steps with guidance, from `steps` of them."""
        context = torch.randn(pictures, self.config.context_len, self.config.context_dim, device=self.device)
        began = self.clock()
        sample_latents(self.ema, context, torch.arange(pictures), context[0], list(range(pictures)), steps, 2.0)
        self.sampling.append((self.clock() - began) / pictures * 50 / steps)


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


def main(config: Config):
    models, device = describe_models(config.size), choose_device()
    cuda, precision = device.type == "cuda", choose_precision(choose_device())
    batch_size = config.batch_size or (32 if config.size == "shapes" else 256 if cuda else 8)
    pictures, peak = config.sample_batch or (64 if cuda else 8), measure_peak(device, precision)
    torch.set_float32_matmul_precision("high")
    machine_name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine_name}, torch {torch.__version__}, {str(precision).removeprefix('torch.')}; a large matrix product reaches {peak / 1e12:.3f} "
          f"TFLOP/s; size {config.size}, batch {batch_size}, medians of {config.repeats}, interleaved")

    benches = {name: Bench(uvit, batch_size, device, False, cuda and config.compile) for name, uvit in models.items()}
    benches["early/concat, as published"] = Bench(models["early/concat"], batch_size, device, True, False)
    memory = {}
    for name, bench in benches.items():                         # warm-up, and peak memory, one model at a time
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):
            bench.step()
        bench.sample(pictures, 1)
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30 if cuda else None
        bench.times, bench.sampling = [], []
    for _ in range(config.repeats):
        for bench in benches.values():
            bench.step()
    for _ in range(3):
        for bench in benches.values():
            bench.sample(pictures, config.sample_steps)

    rows = {}
    for name, bench in benches.items():
        text, image = count_multiply_adds(bench.config)
        step = statistics.median(map(sum, bench.times))
        parts = [1000 * statistics.median(part) for part in zip(*bench.times)]
        rows[name] = {"parameters": sum(p.numel() for p in bench.net.parameters()), "multiply_adds_text": text,
                      "multiply_adds_image": image, "step_ms": 1000 * step, "forward_ms": parts[0], "backward_ms": parts[1],
                      "optimiser_ms": parts[2], "ema_ms": parts[3], "images_per_second": batch_size / step,
                      "share_of_peak": 6 * (text + image) * batch_size / step / peak, "memory_gib": memory[name],
                      "sampling_images_per_second": None if bench.as_published else 1 / statistics.median(bench.sampling)}
    base = rows["early/concat"]
    head = ["model", "M parameters", "G multiply-adds", "ratio", "step ms", "forward", "backward", "optimiser", "EMA", "images/s", "ratio",
            "of peak", "GiB", "sampling images/s", "ratio"]
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name, row in rows.items():
        work = row["multiply_adds_text"] + row["multiply_adds_image"]
        speed = row["sampling_images_per_second"]                # of "as published" none: it would need its own solver
        sampling = (speed, speed and speed / base["sampling_images_per_second"])
        cells = [name, f"{row['parameters'] / 1e6:.2f}", f"{work / 1e9:.3f}",
                 f"{work / (base['multiply_adds_text'] + base['multiply_adds_image']):.3f}",
                 *(f"{row[key]:.1f}" for key in ("step_ms", "forward_ms", "backward_ms", "optimiser_ms", "ema_ms", "images_per_second")),
                 f"{row['images_per_second'] / base['images_per_second']:.2f}", f"{100 * row['share_of_peak']:.0f}%",
                 "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}", *(f"{speed:.2f}" if speed else "" for speed in sampling)]
        print(f"| {' | '.join(cells)} |")
    if config.json:
        machine = {"device": machine_name, "torch": torch.__version__, "precision": str(precision), "peak_flops": peak, "batch_size": batch_size}
        Path(config.json).write_text(json.dumps({"machine": machine, "config": dataclasses.asdict(config), "rows": rows}, indent=1))


if __name__ == "__main__":
    run(main, Config)
