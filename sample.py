"""Prompt -> pictures, with DPM-Solver++(2M) and classifier-free guidance.

    python sample.py --prompt="three red circles and two blue squares"
    python sample.py --prompt="a red circle above a blue square" --n=16 --guidance_scale=2

The checkpoint describes itself: architecture, autoencoder, text tower and latent scale are in it.
The text goes through its tower and through the model's text path once. The 50 steps run `denoise`
alone, on the prompt and the null context in one batch:

    eps = eps_uncond + w (eps_cond - eps_uncond)    w = 1: none; U-ViT's "scale" is w - 1    [CFG]
    x0  = (zt - sigma eps) / alpha                  the picture, if the noise were right
    z'  = sigma'/sigma zt - alpha' (e^-h - 1) D     D: x0, corrected with the last one     [DPM++]

where ' is the next step, and h the way to it in log(alpha / sigma).

Picture i has a noise generator of its own, seeded with seed + i: the same seed gives the same
picture whatever the batch. Each call makes a new folder, out/NAME/generated/0001 and so on.
[CFG] arXiv 2207.12598   [DPM++] arXiv 2211.01095
"""
import itertools
import math
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clip_text import count_truncated, encode_captions, load_text_tower
from model import (Constants, FilePath, Natural, Size, UserError, UViT, autocast,
                   choose_device, load_frozen, noise_schedule, read_checkpoint, reading, run,
                   writing)
from vae import load_autoencoder, to_pictures

SolverSteps = Annotated[int, 1, 1000]
GuidanceScale = Annotated[float, 0, 100]


@dataclass
class Config(Constants):
    checkpoint: FilePath = "out/shapes/last.pt"
    prompt: str = "three red circles and two blue squares"
    n: Annotated[int, 1, 100_000] = 8  # pictures of it
    steps: SolverSteps = 50  # of the solver
    guidance_scale: GuidanceScale = 3.0  # w; 1 = no guidance
    seed: Natural = 0  # picture i has seed + i
    batch_size: Size = 64
    out: FilePath | None = None  # None: the next in out/NAME/generated
    weights: FilePath = "weights"  # the public weights


# ---- 1. the solver ----
def dpm_solver_pp_2m(predict_noise, zT: torch.Tensor, steps: int) -> torch.Tensor:
    """From t = 1000 to 1, where no noise is seen, in `steps` equal steps [DPM++, algorithm 2].
    `predict_noise(z, t)` gets z (B, ...) and t (B,). The first step, which has none before it, and
    the last, so long in log-SNR that a correction would overshoot, are of first order."""
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
def sample_latents(net, context, prompts, null_context, seeds, steps, guidance_scale):
    """Latents (B, C, H, W) float32, still multiplied by the latent scale.
    Picture i has row prompts[i] (B,) of context (R, L, E), and seeds[i]; null_context (L, E)."""
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

    def __init__(self, path, weights="weights"):
        self.device = choose_device()
        with reading(path, "a checkpoint of train.py"):
            saved = read_checkpoint(path)
            self.meta, self.step = saved["meta"], saved["step"]
            self.latent_scale = float(saved["latent_scale"])
            net = load_frozen(UViT(saved["uvit"]), saved["ema"])
            text_tower = load_text_tower(self.meta["text_tower"], weights)
            autoencoder = load_autoencoder(self.meta["autoencoder"], saved["autoencoder"], weights)
            null_context = saved["null_context"]  # (L, E)
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
        """Latents as the network sees them -> pictures (B, H, W, 3) uint8."""
        return to_pictures(self.autoencoder.decode(latents / self.latent_scale))

    def draw(self, captions, seeds, steps, guidance_scale):
        """One picture per caption and seed: (B, H, W, 3) uint8."""
        distinct = list(dict.fromkeys(captions))
        prompts = torch.tensor([distinct.index(caption) for caption in captions])
        z = sample_latents(self.net, self.encode(distinct), prompts, self.null_context,
                           seeds, steps, guidance_scale)
        return self.decode(z)


def main(config: Config):
    pipeline = Pipeline(config.checkpoint, config.weights)
    length = pipeline.net.config.context_len
    if count_truncated([config.prompt], length):
        print(f"The prompt is longer than the model's {length} tokens and is cut.")
    numbered = (Path(config.checkpoint).parent / f"generated/{i:04d}" for i in itertools.count(1))
    folder = new_folder([Path(config.out)] if config.out else numbered)
    paths = draw_files(pipeline, folder, [config.prompt] * config.n, config)[:64]
    pictures = np.stack([Image.open(path) for path in paths])
    labels = [f"seed {config.seed + i}" for i in range(len(paths))]
    columns = min(8, math.ceil(math.sqrt(config.n)))
    draw_grid(pictures, labels, columns).save(folder / "grid.png")
    print(f"{config.n} pictures of {config.prompt!r}: look at {folder / 'grid.png'}")


# ---- 4. pictures on disk ----
def new_folder(candidates):
    """Create the first of the candidates that is free."""
    for folder in candidates:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UserError(f"{folder} exists already, and nothing is overwritten: name a new folder.")


def draw_files(pipeline, folder, captions, config):
    """Draw what is missing of 00000.png, ...: picture i has captions[i] and seed + i; the paths."""
    paths = [folder / f"{i:05d}.png" for i in range(len(captions))]
    batches = [part for part in torch.arange(len(paths)).split(config.batch_size)
               if not all(paths[i].exists() for i in part)]
    if batches:
        with writing(folder / "captions.txt", "w") as file:  # lines of name, tab, caption
            for path, caption in zip(paths, captions):
                file.write(f"{path.name}\t{' '.join(caption.split())}\n")
    for batch in tqdm(batches, f"sampling {folder}"):
        seeds = [config.seed + i for i in batch.tolist()]
        texts = [captions[i] for i in batch]
        pictures = pipeline.draw(texts, seeds, config.steps, config.guidance_scale)
        for i, picture in zip(batch, pictures):
            with writing(paths[i]) as file:
                Image.fromarray(picture).save(file, "PNG")
    return paths


def draw_grid(pictures, captions, columns):
    """Pictures (B, S, S, 3) uint8 above their captions; small ones are enlarged, not smoothed."""
    side, margin, line = pictures.shape[1], 8, 15
    side *= max(1, 128 // side)
    texts = [textwrap.wrap(caption, side // 6)[:20] for caption in captions]  # 6 pixels a letter
    width = side + margin
    height = side + line * max(map(len, texts)) + 4 + margin
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    canvas, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, picture in enumerate(pictures):
        x, y = margin + i % columns * width, margin + i // columns * height
        image = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(image, (x, y))
        canvas.text((x, y + side + 2), "\n".join(texts[i]), fill="black", font=font)
    return grid


if __name__ == "__main__":
    run(main, Config)
