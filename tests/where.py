"""Where does text act in a trained network? Three looks into its attention, and a film.

    python tests/where.py --checkpoint=out/shapes/last.pt
    python tests/where.py --checkpoint=out/early/last.pt --prompt="a red circle above a blue square"
    python tests/where.py --checkpoint=mscoco_uvit_small.pth --data=data/coco

1 The knock-out. Hide the text from time and image in one block (the text still reads itself, and
passes on), and measure by how much the held-out loss rises at fixed noise levels:

    share = (loss, hidden in this block - loss) / (loss, hidden in all blocks - loss)

Then the opposite: show the text in this block alone; what share of that rise is avoided? Blocks
replace each other or depend on each other, so the shares of all need not add up to 1. No network
was trained with hidden text: without any, its loss may rise far more than with the empty caption,
which is measured, too. So shares compare the blocks of one network at one noise level.

2 The effective rank of the attention from image to text [IF: that of early fusion is low], as the
softmax gives it, and of the text's part alone, with rows that add up to 1.

3 Word maps: a picture is drawn, and the attention from each of its patches to each word of the
prompt is averaged over heads and solver steps [IF, section 4.6].

4 The film: what the network takes for the picture, x0, at each step of the solver.

The folder where/ next to the checkpoint then holds where.json, where.png (1 and 2), words.png (3)
and denoising.gif (4). Works for each model, also for the official weights. [IF] arXiv 2403.16530
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import model
import sample
from model import (Constants, FilePath, Natural, Size, UserError, UViT, add_noise, noise_schedule,
                   run, write_json)
from prepare_data import read_cache
from sample import GuidanceScale, Pipeline, SolverSteps, draw_grid, dpm_solver_pp_2m
from vae import sample_latent


@dataclass
class Config(Constants):
    checkpoint: FilePath = "out/shapes/last.pt"
    data: FilePath = "data/shapes"          # the cache whose held-out pictures are used
    pictures: Size = 128                    # of them, for the knock-out; a quarter for the rank
    prompt: str | None = None               # of the word maps; None: the first held-out caption
    steps: SolverSteps = 20                 # this and the next two: of their picture
    guidance_scale: GuidanceScale = 3.0
    seed: Natural = 0
    weights: FilePath = "weights"           # folder of the public weights, if it needs them
    out: FilePath | None = None             # folder of the results; None: where/ next to it


LEVELS = (100, 300, 500, 700, 900)          # t
BATCH = 50


# ---- 1. changing and watching attention ----

@contextmanager
def replaced_attention(net: UViT, attend):
    """Inside, block i of the stack computes attend(i, q, k, v) instead of attention(q, k, v).

    Keys are time and image, (1+N), and in the window text, (L). Queries are the same ones, for
    cross_attention without the text.
    """
    def fuse(i, *inputs):
        with patch.object(model, "attention", partial(attend, i)):
            return UViT.fuse(net, i, *inputs)
    with patch.object(net, "fuse", fuse):
        yield


def hidden_text(net: UViT, blocks):
    """Inside, time and image see no text in these blocks."""
    own = net.pos_embed.shape[1] - net.config.context_len            # time and image

    def attend(i, q, k, v):
        logits = q @ k.mT * q.shape[-1] ** -0.5                     # (B, h, Q, K)
        if i in blocks:
            logits[:, :, :own, own:] = -torch.inf
        return logits.softmax(-1).to(v.dtype) @ v
    return replaced_attention(net, attend)


def watched_attention(net: UViT, watch):
    """Inside, watch(i, weights) gets the attention from image to text, (B, h, N, L), of block i."""
    own = net.pos_embed.shape[1] - net.config.context_len            # time and image

    def attend(i, q, k, v):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)      # (B, h, Q, K)
        if i in net.config.window:
            watch(i, weights[:, :, 1:own, own:].float())
        return weights.to(v.dtype) @ v
    return replaced_attention(net, attend)


# ---- 2. the knock-out ----

@torch.no_grad()
def held_out_losses(net: UViT, z0: torch.Tensor, eps: torch.Tensor,
                    context: torch.Tensor) -> np.ndarray:
    """The loss at each of LEVELS, on the same pictures and noise, (M, C, H, W), and (M, L, E)."""
    alpha_bar = noise_schedule().float().to(z0.device)
    total = np.zeros(len(LEVELS))
    for z, noise, captions in zip(z0.split(BATCH), eps.split(BATCH), context.split(BATCH)):
        text = net.encode_text(captions)
        for i, level in enumerate(LEVELS):
            t = torch.full((len(z),), level, device=z.device)
            predicted = net.denoise(add_noise(z, noise, t, alpha_bar), t, text)
            total[i] += len(z) * F.mse_loss(predicted, noise).item()
    return total / len(z0)


def knock_out(net: UViT, z0: torch.Tensor, eps: torch.Tensor, context: torch.Tensor) -> dict:
    """Losses with and without text, and what hiding or showing it in one block does, by level."""
    window = net.config.window
    shown = held_out_losses(net, z0, eps, context)
    with hidden_text(net, window):
        rise = held_out_losses(net, z0, eps, context) - shown
    lost, kept = {}, {}
    for i in window:
        with hidden_text(net, [i]):
            lost[i] = (held_out_losses(net, z0, eps, context) - shown) / rise
        with hidden_text(net, [k for k in window if k != i]):
            kept[i] = 1 - (held_out_losses(net, z0, eps, context) - shown) / rise
    return {"loss": shown.tolist(), "loss_without_text": (shown + rise).tolist(),
            "lost_if_hidden": {i: shares.tolist() for i, shares in lost.items()},
            "kept_if_alone": {i: shares.tolist() for i, shares in kept.items()}}


# ---- 3. the rank of attention ----

def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """exp(entropy of the singular values, as shares of their sum) of matrices (..., N, L).

    1 for an outer product, n for n equal singular values. Roy & Vetterli, "The effective rank",
    EUSIPCO 2007; [IF] speaks of low rank without a definition that we know of.
    """
    values = torch.linalg.svdvals(matrices.float().cpu())   # on CUDA one matrix after the other
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@torch.no_grad()
def attention_ranks(net: UViT, zt: torch.Tensor, t: torch.Tensor, context: torch.Tensor,
                    text_alone: bool = False) -> dict[int, float]:
    """Block of the window -> effective rank of its attention to text, mean over pictures and heads.

    That is the part (N, L) from image tokens to text tokens, after the softmax over all keys; with
    `text_alone` its rows are divided by their sums. Low rank: all patches look at the text in the
    same way, which needs no attention.
    """
    ranks = {}

    def watch(i, weights):                                              # (B, h, N, L)
        if text_alone:
            weights = weights / weights.sum(-1, keepdim=True)
        ranks[i] = effective_rank(weights).mean().item()
    with watched_attention(net, watch):
        net(zt, t, context)
    return ranks


# ---- 4. word maps ----

def find_words(prompt: str, length: int) -> list[tuple[str, slice]]:
    """The words of a prompt with the places of their tokens; also the start, and end and padding.

    What is cut off a prompt longer than `length` tokens is left out.
    """
    words, place = [("(start)", slice(0, 1))], 1
    for word in prompt.split():
        after = min(place + len(clip_text.encode(word)), length - 1)
        if after > place:
            words.append((word, slice(place, after)))
        place = after
    return [*words, ("(end)", slice(place, length))]


def map_words(pipeline: Pipeline, prompt: str, config: Config):
    """(a picture (S, S, 3) uint8, block -> attention to each of `find_words`, (words, N))."""
    net, attention = pipeline.net, dict.fromkeys(pipeline.net.config.window, 0)

    def watch(i, weights):                                              # (B, h, N, L)
        attention[i] += weights[0].mean(0).cpu() / config.steps         # 0: not the null context
    with watched_attention(net, watch):
        pictures = pipeline.draw([prompt], [config.seed], config.steps, config.guidance_scale)
    words = find_words(prompt, net.config.context_len)
    maps = {i: torch.stack([weights[:, places].sum(1) for _, places in words]).numpy()
            for i, weights in attention.items()}
    return pictures[0], maps


# ---- 5. pictures ----

def draw_heat_map(axes, shares: dict[int, list[float]], blocks: int, title: str):
    """Shares by block (columns) and noise level (rows); blocks that see no text are grey."""
    table = np.full((len(LEVELS), blocks), np.nan)
    for i, column in shares.items():
        table[:, int(i)] = column
    axes.set_facecolor("lightgrey")
    axes.imshow(table, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(table):
        if np.isfinite(share):
            colour = "white" if share > 0.6 else "black"
            axes.text(column, row, round(100 * share), color=colour, ha="center", va="center")
    axes.set(title=title, xlabel="block", ylabel="t (1,000: all noise)", xticks=range(blocks))
    axes.set_yticks(range(len(LEVELS)), LEVELS)


def draw_results(result: dict) -> Figure:
    """Both heat maps, and the ranks by block."""
    blocks, ranks = result["blocks"], result["rank"]
    figure = Figure(figsize=(4.5 + 1.2 * blocks, 3.5), layout="constrained")
    hidden, alone, right = figure.subplots(1, 3)
    draw_heat_map(hidden, result["lost_if_hidden"], blocks, "hidden here: % of rise if everywhere")
    draw_heat_map(alone, result["kept_if_alone"], blocks, "seen here alone: % of it avoided")
    right.plot(list(ranks), list(ranks.values()), "o-", label="after the softmax")
    text_alone = result["rank_text_alone"]
    right.plot(list(text_alone), list(text_alone.values()), "s--", label="text's part alone")
    right.set(title="effective rank, image to text", xlabel="block", xticks=range(blocks),
              xlim=(-0.5, blocks - 0.5))
    right.set_ylim(bottom=1)
    right.legend()
    return figure


def draw_word_maps(picture: np.ndarray, maps: dict[int, np.ndarray], words: list[str]) -> Figure:
    """A row for each block, in which white is the most attention to any word."""
    figure = Figure(figsize=(1.3 * (len(words) + 1), 1.3 * len(maps) + 0.5), layout="constrained")
    cells = figure.subplots(len(maps), len(words) + 1, squeeze=False)
    side, S = int(np.sqrt(next(iter(maps.values())).shape[1])), len(picture)
    for row, (block, attention) in zip(cells, maps.items()):
        row[0].imshow(picture)
        row[0].set_ylabel(f"block {block}")
        for axes, weights in zip(row[1:], attention):
            axes.imshow(picture)
            axes.imshow(weights.reshape(side, side), cmap="gray", alpha=0.75, vmin=0,
                        vmax=attention[1:-1].max(initial=1e-9), extent=(0, S, S, 0))
            axes.set_xlabel(f"{100 * weights.mean():.1f}%", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, word in zip(cells[0, 1:], words):
        axes.set_title(word, fontsize=9)
    return figure


# ---- 6. the film ----

def draw_film(pipeline: Pipeline, captions: list[str], config: Config) -> list:
    """A frame for each solver step: x0 = (z - sigma eps) / alpha of each caption."""
    found, log_alpha = [], 0.5 * noise_schedule().log().numpy()

    def watched_solver(predict_noise, zT, steps):
        def watched(z, t):
            eps = predict_noise(z, t)
            log = np.interp(t[0].item(), np.arange(1001), log_alpha)
            found.append((z - np.sqrt(-np.expm1(2 * log)) * eps) / np.exp(log))
            return eps
        return dpm_solver_pp_2m(watched, zT, steps)
    with patch.object(sample, "dpm_solver_pp_2m", watched_solver):
        seeds = [config.seed + i for i in range(len(captions))]
        pipeline.draw(captions, seeds, config.steps, config.guidance_scale)
    return [draw_grid(pipeline.decode(x0), captions, columns=6) for x0 in found]


# ---- 7. from a checkpoint ----

def read_pairs(pipeline: Pipeline, cache, number: int):
    """Held-out latents z0 and noise eps (number, C, H, W), and context (number, L, E)."""
    pairs = cache.val_pairs[:number]
    moments = torch.from_numpy(cache.val_moments[pairs[:, 0]])          # (number, 2C, H, W)
    shape = (2, len(pairs), *cache.meta["latent_shape"])
    noise, eps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z0 = pipeline.latent_scale * sample_latent(moments, noise)
    context = pipeline.encode([cache.captions[text] for text in pairs[:, 1]])
    return z0.to(pipeline.device), eps.to(pipeline.device), context


@torch.no_grad()
def look(pipeline: Pipeline, cache, pictures: int) -> dict:
    """The knock-out, on so many held-out pictures, and the ranks, on a quarter of them."""
    net, uvit = pipeline.net, pipeline.net.config
    z0, eps, context = read_pairs(pipeline, cache, pictures)
    few = max(1, len(z0) // 4)
    t = torch.linspace(1, 1000, few).long().to(pipeline.device)
    alpha_bar = noise_schedule().float().to(pipeline.device)
    inputs = add_noise(z0[:few], eps[:few], t, alpha_bar), t, context[:few]
    empty = held_out_losses(net, z0, eps, pipeline.null_context.to(context).expand_as(context))
    return {"step": pipeline.step, "fusion": uvit.fusion, "conditioning": uvit.conditioning,
            "blocks": uvit.depth, "window": list(uvit.window), "text_blocks": uvit.n_text,
            "pictures": len(z0), "t": LEVELS, **knock_out(net, z0, eps, context),
            "loss_of_empty_caption": empty.tolist(), "rank": attention_ranks(net, *inputs),
            "rank_text_alone": attention_ranks(net, *inputs, text_alone=True)}


def main(config: Config):
    cache = read_cache(config.data)
    pipeline = Pipeline(config.checkpoint, config.weights)
    uvit = pipeline.net.config
    latents = [uvit.channels, uvit.image_size, uvit.image_size]
    if latents != list(cache.meta["latent_shape"]):
        raise UserError(f"{config.checkpoint} was trained on latents {latents}, but --data="
                        f"{config.data} holds {cache.meta['latent_shape']}: name a cache like "
                        "its own.")
    result = {"checkpoint": config.checkpoint, **look(pipeline, cache, config.pictures)}
    prompt = config.prompt or cache.captions[cache.val_pairs[0, 1]]
    picture, maps = map_words(pipeline, prompt, config)
    words = [word for word, _ in find_words(prompt, uvit.context_len)]
    result["prompt"], result["words"] = prompt, words
    result["attention"] = {i: weights.mean(1).tolist() for i, weights in maps.items()}

    folder = Path(config.out or Path(config.checkpoint).parent / "where")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "where.json", result)
    draw_results(result).savefig(folder / "where.png", dpi=120)
    draw_word_maps(picture, maps, words).savefig(folder / "words.png", dpi=120)
    texts = list(dict.fromkeys(cache.val_pairs[:, 1].tolist()))[:6]
    frames = draw_film(pipeline, [cache.captions[text] for text in texts], config)
    frames[0].save(folder / "denoising.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[80] * (len(frames) - 1) + [1500])      # ms
    shown, none, empty = [np.array(result[key]) for key in (
        "loss", "loss_without_text", "loss_of_empty_caption")]
    shares = "  ".join(f"{100 * share:4.0f}%" for share in (empty - shown) / (none - shown))
    print(f"the empty caption costs {shares} of what hiding the text everywhere does, t = {LEVELS}")
    for i in uvit.window:
        lost = "  ".join(f"{100 * share:4.0f}%" for share in result["lost_if_hidden"][i])
        print(f"block {i}: hiding the text in it alone costs {lost}; "
              f"rank {result['rank'][i]:.2f}")
    print(f"Numbers are in {folder / 'where.json'}; look at where.png, words.png "
          "and denoising.gif next to it.")


if __name__ == "__main__":
    run(main, Config)
