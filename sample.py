"""Prompt -> pictures, with DPM-Solver++(2M) and classifier-free guidance.

    python sample.py --prompt="three red circles and two blue squares"
    python sample.py --prompt="a red circle above a blue square" --n=16 --guidance_scale=2
    python sample.py --checkpoint=out/early/best.pt

The checkpoint describes itself: architecture, autoencoder, text tower and latent scale are in it.
The text goes through its tower and through the model's text path once. The 50 steps run `denoise`
alone, on the prompt and the null context in one batch:

    eps = eps_uncond + w (eps_cond - eps_uncond)    w = 1: none; U-ViT's "scale" is w - 1    [CFG]
    x0  = (zt - sigma eps) / alpha                  the picture, if the noise were right
    z'  = sigma'/sigma zt - alpha' (e^-h - 1) D     D: x0, corrected with the last one     [DPM++]

where ' is the next step, and h the way to it in log(alpha / sigma).

Picture i has a noise generator of its own, seeded with seed + i: the same seed gives the same
picture whatever the batch. Each call makes a new folder, out/NAME/generated/0001 and so on, and
overwrites nothing: 00000.png, 00001.png, ... (their metadata hold prompt, seed and settings),
captions.txt and grid.png.

[CFG] arXiv 2207.12598   [DPM++] arXiv 2211.01095
"""
import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from clip_text import count_truncated, encode_captions, load_text_tower
from model import (Constants, FilePath, Natural, Size, UserError, UViT, autocast,
                   choose_device, load_uvit, noise_schedule, read_checkpoint, reading, run,
                   writing)
from vae import load_autoencoder, to_uint8

SolverSteps = Annotated[int, 1, 1000]
GuidanceScale = Annotated[float, 0, 100]


@dataclass
class Config(Constants):
    checkpoint: FilePath = "out/shapes/last.pt"
    prompt: str = "three red circles and two blue squares"
    n: Annotated[int, 1, 100_000] = 8   # pictures of it
    steps: SolverSteps = 50         # of the solver
    guidance_scale: GuidanceScale = 3.0     # w; 1 = no guidance
    seed: Natural = 0               # picture i has seed + i
    batch_size: Size = 64
    raw: bool = False               # True: the weights without their moving average (EMA)
    out: FilePath | None = None     # a new folder; None: the next in OUT/NAME/generated
    weights: FilePath = "weights"   # folder of the public weights, if it needs them


# ---- 1. the solver ----

def dpm_solver_pp_2m(predict_noise, zT: torch.Tensor, steps: int) -> torch.Tensor:
    """From t = 1000 to 1, where no noise is seen, in `steps` equal steps [DPM++, algorithm 2].

    `predict_noise(z, t)` gets z (B, ...) and t (B,). Between whole t, log alpha is interpolated.
    The first step has no step before it, and the last is by far the longest in log-SNR, so that the
    correction would overshoot: both are of first order.
    """
    t = np.linspace(1000, 1, steps + 1)
    log_alpha = 0.5 * noise_schedule().log().numpy()
    log_alpha = np.interp(t, np.arange(1001), log_alpha)
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    log_snr = log_alpha - np.log(sigma)  # half of it: log(alpha / sigma)
    z, previous = zT, None
    for i in range(steps):
        time = torch.full((len(z),), t[i], dtype=z.dtype, device=z.device)
        x0 = (z - sigma[i] * predict_noise(z, time)) / alpha[i]
        h = log_snr[i + 1] - log_snr[i]
        D = x0
        if 0 < i < steps - 1:
            r = (log_snr[i] - log_snr[i - 1]) / h
            D = x0 + (x0 - previous) / (2 * r)
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * math.expm1(-h) * D
        previous = x0
    return z


# ---- 2. guidance ----

@torch.no_grad()
def sample_latents(net: UViT, context: torch.Tensor, prompts: torch.Tensor,
                   null_context: torch.Tensor, seeds: list[int], steps: int,
                   guidance_scale: float) -> torch.Tensor:
    """Latents (B, C, H, W) float32, still multiplied by the latent scale.

    context (R, L, E) are distinct prompts; picture i has the prompt `prompts[i]` (B,) of them and
    the noise of seeds[i]. null_context (L, E).
    """
    config, device, w = net.config, context.device, guidance_scale
    shape = (config.channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(shape, generator=g) for g in generators]
    zT = torch.stack(noise).to(device)
    if w != 1:  # the null context is last
        null = torch.full_like(prompts, len(context))
        prompts = torch.cat([prompts, null])  # (2B,)
    with autocast(device):  # once, whatever the steps
        text = net.encode_text(torch.cat([context, null_context[None].to(context)]))
    text = text[prompts.to(device)]  # (B or 2B, ...)

    def predict_noise(z, t):
        with autocast(device):
            if w == 1:
                return net.denoise(z, t, text).float()
            both = net.denoise(torch.cat([z, z]), torch.cat([t, t]), text)
        cond, uncond = both.float().chunk(2)
        return uncond + w * (cond - uncond)  # [CFG]

    return dpm_solver_pp_2m(predict_noise, zT, steps)


# ---- 3. from a checkpoint ----

class Pipeline:
    """A checkpoint with all that it needs to draw: network, text tower, autoencoder."""

    def __init__(self, path, raw=False, weights="weights"):
        self.device = choose_device()
        with reading(path, "a checkpoint of train.py"):
            checkpoint = read_checkpoint(path)
            self.meta, self.step = checkpoint["meta"], checkpoint["step"]
            self.latent_scale = float(checkpoint["latent_scale"])
            net = load_uvit(checkpoint, "model" if raw else "ema", path)
            text_tower = load_text_tower(self.meta["text_tower"], weights)
            autoencoder = load_autoencoder(self.meta["autoencoder"],
                                           checkpoint["autoencoder"], weights)
            null_context = checkpoint["null_context"]  # (L, E)
            if null_context is None:
                length = net.config.context_len
                null_context = encode_captions(text_tower, [""], length)[0][0]
            net.encode_text(null_context[None].float())  # an error if it can't be
        self.net, self.text_tower = net.to(self.device), text_tower.to(self.device)
        self.autoencoder, self.null_context = autoencoder.to(self.device), null_context

    def encode(self, captions):
        """Captions -> (B, L, E)."""
        length = self.net.config.context_len
        return encode_captions(self.text_tower, captions, length)[0]

    @torch.no_grad()
    def decode(self, latents):
        """Latents as the network sees them -> (B, 3, H, W) uint8 on the CPU."""
        return to_uint8(self.autoencoder.decode(latents / self.latent_scale)).cpu()

    def draw(self, captions, seeds, steps, guidance_scale):
        """One picture per caption and seed: (B, 3, H, W) uint8."""
        distinct = list(dict.fromkeys(captions))
        prompts = torch.tensor([distinct.index(caption) for caption in captions])
        z = sample_latents(self.net, self.encode(distinct), prompts, self.null_context,
                           seeds, steps, guidance_scale)
        return self.decode(z)


def main(config: Config):
    pipeline = Pipeline(config.checkpoint, config.raw, config.weights)
    length = pipeline.net.config.context_len
    if count_truncated([config.prompt], length):
        print(f"The prompt is longer than the model's {length} tokens and is cut short.")
    home = Path(config.checkpoint).parent / "generated"
    numbered = (home / f"{number:04d}" for number in itertools.count(1))
    folder = new_folder([Path(config.out)] if config.out else numbered)
    names = [f"{i:05d}.png" for i in range(config.n)]

    weights = "raw" if config.raw else "EMA"
    settings = {"guidance_scale": config.guidance_scale, "steps": config.steps,
                "sampler": "DPM-Solver++(2M)", "checkpoint": config.checkpoint,
                "train_step": pipeline.step, "weights": weights}
    pictures, seeds = [], list(range(config.seed, config.seed + config.n))
    for i in tqdm(range(0, config.n, config.batch_size), "sampling", unit="batch"):
        part = slice(i, i + config.batch_size)
        prompts = [config.prompt] * len(seeds[part])
        drawn = pipeline.draw(prompts, seeds[part], config.steps, config.guidance_scale)
        save_pictures(folder, names[part], drawn, prompts, seeds[part], settings)
        if i < 64:  # what grid.png shows
            pictures.append(drawn)
    write_captions(folder, names, [config.prompt] * config.n)
    labels = [f"seed {seed}" for seed in seeds[:64]]
    columns = min(8, math.ceil(math.sqrt(config.n)))
    draw_grid(torch.cat(pictures)[:64], labels, columns).save(folder / "grid.png")
    print(f"{config.n} pictures of {config.prompt!r} are in {folder}; "
          f"look at {folder / 'grid.png'}")


# ---- 4. pictures on disk ----

def new_folder(candidates):
    """Create the first of the candidates that is free."""
    for folder in candidates:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{folder} exists already, and nothing is overwritten: name a new folder.")


def write_captions(folder, names, captions):
    """captions.txt: lines of name, tab, caption."""
    with writing(folder / "captions.txt", "w") as file:
        for name, caption in zip(names, captions):
            file.write(f"{name}\t{' '.join(caption.split())}\n")


def save_pictures(folder, names, pictures, captions, seeds, settings):
    """Write PNG files, with caption, seed and settings as text inside."""
    for name, picture, caption, seed in zip(names, pictures, captions, seeds):
        info = PngImagePlugin.PngInfo()
        for key, value in ({"prompt": caption, "seed": seed} | settings).items():
            info.add_itxt(key, str(value))
        with writing(folder / name) as file:
            to_image(picture).save(file, "PNG", pnginfo=info)


def to_image(picture):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def draw_grid(pictures, captions, columns):
    """Pictures (B, 3, H, W) uint8 above their captions; small ones are enlarged, not smoothed."""
    side, margin, line = pictures.shape[-1], 8, 14
    side *= max(1, 128 // side)
    texts = [textwrap.wrap(caption, side // 6)[:20] for caption in captions]  # 6 pixels a letter
    width = side + margin
    height = side + line * max(map(len, texts)) + 4 + margin
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    canvas, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, picture in enumerate(pictures):
        x, y = margin + i % columns * width, margin + i // columns * height
        image = to_image(picture).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(image, (x, y))
        for n, text in enumerate(texts[i]):
            canvas.text((x, y + side + 2 + line * n), text, fill="black", font=font)
    return grid


if __name__ == "__main__":
    run(main, Config)
