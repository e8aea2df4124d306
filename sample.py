"""Prompt -> pictures, with DPM-Solver++(2M) and classifier-free guidance.

    python sample.py --prompt="three red circles and two blue squares"
    python sample.py --prompt="a red circle above a blue square" --n=16 --guidance_scale=2
    python sample.py --checkpoint=out/early/best.pt --gif=True

The checkpoint describes itself: architecture, autoencoder, text tower and latent scale are in it.
The text goes through its tower and through the model's text path once. The 50 steps run `denoise`
alone, on the prompt and the null context in one batch:

    eps = eps_uncond + w (eps_cond - eps_uncond)    w = 1: none; U-ViT's "scale" is w - 1    [CFG]
    x0  = (zt - sigma eps) / alpha                  the picture, if the noise were right
    z'  = sigma'/sigma zt - alpha' (e^-h - 1) D     D: x0, corrected with the last one     [DPM++]

Picture i has a noise generator of its own, seeded with seed + i: the same seed gives the same
picture whatever the batch. Each call makes a new folder, out/NAME/generated/0001 and so on, and
overwrites nothing: 00000.png, 00001.png, ... (their metadata hold prompt, seed and settings),
captions.txt, grid.png, and denoising.gif if asked for.

[CFG] arXiv 2207.12598   [DPM++] arXiv 2211.01095
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from clip_text import count_truncated, load_text_tower, tokenize
from model import (UserError, UViT, autocast, choose_device, compile_guarded, load_uvit,
                   noise_schedule, read_checkpoint, run)
from vae import load_autoencoder, to_uint8


@dataclass
class Config:
    checkpoint: str = "out/shapes/last.pt"
    prompt: str = "three red circles and two blue squares"
    n: int = 8                      # pictures to make of it
    steps: int = 50                 # of the solver; each evaluates a batch of 2 per picture
    guidance_scale: float = 3.0     # w; 1 = no guidance
    seed: int = 0                   # of the first picture; picture i has seed + i
    batch_size: int = 64
    raw: bool = False               # True: the raw weights instead of their moving average (EMA)
    gif: bool = False               # True: also draw the x0 predictions of every step
    out: str = ""                   # a new folder; "": the next in generated/ by the checkpoint
    weights: str = "weights"        # folder of the public weights, for checkpoints that need them


# ---- 1. the solver ----

def dpm_solver_pp_2m(predict_noise, zT: torch.Tensor, steps: int,
                     trace: list | None = None) -> torch.Tensor:
    """From t = 1000 to t = 1 in `steps` equal steps of time [DPM++, algorithm 2].

    `predict_noise(z, t)` gets z (B, ...) and t (B,). Between whole t, log alpha is interpolated.
    The first step has no step before it, and the last is by far the longest in log-SNR, so that the
    correction would overshoot: both are of first order. Each x0 is appended to `trace`.
    """
    t = np.linspace(1000, 1, steps + 1)
    log_alpha = np.interp(t, np.arange(1001), 0.5 * noise_schedule().log().numpy())
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    log_snr = log_alpha - np.log(sigma)                             # half of it: log(alpha / sigma)
    z, previous = zT, None
    for i in range(steps):
        eps = predict_noise(z, torch.full((len(z),), t[i], dtype=z.dtype, device=z.device))
        x0 = (z - sigma[i] * eps) / alpha[i]
        h = log_snr[i + 1] - log_snr[i]
        D = x0
        if 0 < i < steps - 1:
            r = (log_snr[i] - log_snr[i - 1]) / h
            D = x0 + (x0 - previous) / (2 * r)
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * math.expm1(-h) * D
        previous = x0
        if trace is not None:
            trace.append(x0)
    return z


# ---- 2. guidance ----

def take_rows(text, rows: torch.Tensor):
    """Rows of what `encode_text` gives: a tensor (concat), or keys and values (cross_attention)."""
    return text[rows] if torch.is_tensor(text) else [(k[rows], v[rows]) for k, v in text]


@torch.no_grad()
def sample_latents(net: UViT, context: torch.Tensor, rows: torch.Tensor, null_context: torch.Tensor,
                   seeds: list[int], steps: int, guidance_scale: float,
                   trace: list | None = None) -> torch.Tensor:
    """Latents (B, C, H, W) float32, still multiplied by the latent scale.

    context (R, L, E) are distinct prompts; picture i follows that of rows[i], from the noise of
    seeds[i]. null_context (L, E).
    """
    config, device, w = net.config, context.device, guidance_scale
    shape = (config.channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    zT = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    with autocast(device):                                              # once, whatever the steps
        text = net.encode_text(torch.cat([context, null_context[None].to(context)]))
    if w != 1:                                                          # the null context is last
        rows = torch.cat([rows, torch.full_like(rows, len(context))])   # (2B,)
    text = take_rows(text, rows.to(device))

    def predict_noise(z, t):
        with autocast(device):
            if w == 1:
                return net.denoise(z, t, text).float()
            cond, uncond = net.denoise(torch.cat([z, z]), torch.cat([t, t]), text).float().chunk(2)
        return uncond + w * (cond - uncond)                             # [CFG]

    return dpm_solver_pp_2m(predict_noise, zT, steps, trace)


# ---- 3. from a checkpoint ----

class Pipeline:
    """A checkpoint with all that it needs to draw: network, text tower, autoencoder."""

    def __init__(self, path: str | Path, raw: bool = False, weights: str | Path = "weights"):
        checkpoint = read_checkpoint(path)
        meta = checkpoint["meta"]
        self.path, self.meta, self.step = Path(path), meta, checkpoint["step"]
        self.device = device = choose_device()
        self.net = load_uvit(checkpoint, "model" if raw else "ema", path).to(device)
        self.text_tower = load_text_tower(meta["text_tower"], weights).to(device)
        self.autoencoder = load_autoencoder(meta["autoencoder"], checkpoint.get("autoencoder"),
                                            weights).to(device)
        self.latent_scale, null_context = checkpoint["latent_scale"], checkpoint["null_context"]
        self.null_context = (self.encode([""])[0] if null_context is None
                             else null_context.to(device).float())      # (L, E)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """Captions -> (B, L, E)."""
        tokens = tokenize(captions, self.net.config.context_len).to(self.device)
        return torch.cat([self.text_tower(part)[0] for part in tokens.split(256)])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the network sees them -> (B, 3, H, W) uint8 on the CPU."""
        return to_uint8(self.autoencoder.decode(latents / self.latent_scale)).cpu()

    def compile(self, mode: str, captions: list[str], guidance_scale: float):
        """Compile the network's step for batches like this one; see `compile_guarded`."""
        def try_out(denoise):
            self.net.denoise = denoise
            self.draw(captions, [0] * len(captions), 1, guidance_scale)
        self.net.denoise = compile_guarded(self.net.denoise, mode, self.device, try_out)

    def draw(self, captions: list[str], seeds: list[int], steps: int, guidance_scale: float,
             trace: list | None = None) -> torch.Tensor:
        """One picture per caption and seed: (B, 3, H, W) uint8."""
        distinct = list(dict.fromkeys(captions))
        rows = torch.tensor([distinct.index(caption) for caption in captions])
        return self.decode(sample_latents(self.net, self.encode(distinct), rows, self.null_context,
                                          seeds, steps, guidance_scale, trace))


# ---- 4. pictures on disk ----

def to_image(picture: torch.Tensor) -> Image.Image:
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def wrap(text: str, font, width: int) -> list[str]:
    """The words of `text` in lines of at most `width` pixels."""
    first, *words = text.split() or [""]
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def draw_grid(pictures: torch.Tensor, captions: list[str], columns: int) -> Image.Image:
    """Pictures (B, 3, H, W) uint8 above their captions; small ones are enlarged, not smoothed."""
    zoom = max(1, 128 // pictures.shape[-1])
    cell, font = zoom * pictures.shape[-1], ImageFont.load_default(size=11)
    lines = [wrap(caption, font, cell) for caption in captions]
    margin, rows = 8, math.ceil(len(pictures) / columns)
    across, down = cell + margin, cell + 14 * max(map(len, lines)) + 4 + margin
    grid = Image.new("RGB", (columns * across + margin, rows * down + margin), "white")
    canvas = ImageDraw.Draw(grid)
    for i, picture in enumerate(pictures):
        x, y = margin + i % columns * across, margin + i // columns * down
        grid.paste(to_image(picture).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(lines[i]):
            canvas.text((x, y + cell + 2 + 14 * n), line, fill="black", font=font)
    return grid


def new_folder(parent: Path) -> Path:
    """The next free numbered folder, created: parent/0001, parent/0002, ..."""
    for number in itertools.count(1):
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def save_pictures(folder: Path, first: int, pictures: torch.Tensor, captions: list[str],
                  seeds: list[int], settings: dict):
    """Write first.png, ... with caption, seed and settings as PNG text, and for each a line
    "name<TAB>caption" in captions.txt."""
    with open(folder / "captions.txt", "a", encoding="utf-8") as file:
        for i, (picture, caption, seed) in enumerate(zip(pictures, captions, seeds), start=first):
            info = PngImagePlugin.PngInfo()
            for key, value in ({"prompt": caption, "seed": seed} | settings).items():
                info.add_itxt(key, str(value))
            to_image(picture).save(folder / f"{i:05d}.png", pnginfo=info)
            file.write(f"{i:05d}.png\t{' '.join(caption.split())}\n")


def main(config: Config):
    if config.n < 1 or config.steps < 1 or config.batch_size < 1:
        raise UserError(f"n={config.n}, steps={config.steps}, batch_size={config.batch_size}: "
                        f"expected 1 or more of each.")
    if not 0 <= config.seed < 2 ** 32 - config.n:
        raise UserError(f"seed={config.seed}: expected 0 or more, and less than 2^32 for every "
                        f"picture.")
    if config.out and Path(config.out).exists():
        raise UserError(f"--out={config.out} exists already, and nothing is overwritten: name a "
                        f"new folder.")
    pipeline = Pipeline(config.checkpoint, config.raw, config.weights)
    length = pipeline.net.config.context_len
    if count_truncated([config.prompt], length):
        print(f"The prompt is longer than the model's {length} tokens and is cut short.")
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True)
    else:
        folder = new_folder(pipeline.path.parent / "generated")
    seeds = list(range(config.seed, config.seed + config.n))
    settings = {"guidance_scale": config.guidance_scale, "steps": config.steps,
                "sampler": "DPM-Solver++(2M)", "checkpoint": config.checkpoint,
                "train_step": pipeline.step, "weights": "raw" if config.raw else "EMA"}
    parts, trace = [], [] if config.gif else None
    for i in tqdm(range(0, config.n, config.batch_size), desc="sampling", unit="batch"):
        part = seeds[i:i + config.batch_size]
        prompts = [config.prompt] * len(part)
        parts.append(pipeline.draw(prompts, part, config.steps, config.guidance_scale,
                                   trace if i == 0 else None))
        save_pictures(folder, i, parts[-1], prompts, part, settings)
    labels = [f"seed {seed}" for seed in seeds]
    columns = min(8, math.ceil(math.sqrt(config.n)))
    draw_grid(torch.cat(parts), labels, columns).save(folder / "grid.png")
    if config.gif:
        frames = [draw_grid(pipeline.decode(x0), labels[:len(x0)], columns) for x0 in trace]
        frames[0].save(folder / "denoising.gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=[80] * (len(frames) - 1) + [1500])
    print(f"{config.n} pictures of {config.prompt!r} are in {folder}; "
          f"look at {folder / 'grid.png'}")


if __name__ == "__main__":
    run(main, Config)
