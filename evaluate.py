"""Score pictures: are they what their caption says, and do they look real?

    python evaluate.py --checkpoint=out/shapes/last.pt                          # accuracy on 500 held-out captions
    python evaluate.py --checkpoint=out/early/last.pt,out/shapes/last.pt        # several side by side, in one Markdown table
    python evaluate.py --checkpoint=out/shapes/last.pt --sweep=1,1.5,2,3,5      # over the guidance scale, with a plot
    python evaluate.py --checkpoint=mscoco_uvit_small.pth --data=data/coco --steps=50 --guidance_scale=2    # FID, CLIP score
    python evaluate.py --folder=pictures --data=data/coco                       # anybody's, with their captions.txt

Shapes can be scored exactly, which replaces the paper's human study of counting: a classical detector reads the objects off each
picture, and a caption is right in its count (as many objects as asked), colour and shape (those asked and no others), relation (the
first object stands where it should), and everything (each object asked is there once, and nothing else). Captions with a combination
that never occurred in training are counted apart ("unseen"). Beside it stand the ceiling, the detector on the real pictures, also after
the autoencoder, and the floor, real pictures with shuffled captions.

The paper holds that early fusion spends much on text-to-image attention of low rank: each model's effective rank is printed by block.

Real pictures are scored by two networks with public weights, computed here exactly as by the reference libraries:

    FID         distance between two clouds of Inception features: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))      [FID]
    CLIP score  cosine between a picture's CLIP features and those of the caption it was made from                   [CLIPScore]

FID is measured against all held-out pictures of the cache, whose statistics are kept beside it. It depends on the number of pictures:
below 2,048 it means little, and only one of 30,000 compares with the published ones. The CLIP score stands beside that of the real
pairs (ceiling) and of shuffled ones (floor).

The pictures stay in out/NAME/eval/..., a folder for each model, scale and seed, and are used again; an interrupted call goes on.
Each folder keeps its eval.json: the scores with their whole protocol. out/NAME/eval.json is a copy of the latest.

[FID] arXiv 1706.08500   [CLIP] arXiv 2103.00020   [CLIPScore] arXiv 2104.08718
"""
import json
import math
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import scipy
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm

from clip_text import CLIPTransformer, load_clip_text, read_tower, tokenize, weights_sha256
from model import (UserError, UViT, choose_device, choose_precision, count_multiply_adds, load_strictly, noise_schedule,
                   read_weights, run, sha256)
from prepare_data import (BACKGROUND, COLOURS, RELATIONS, Cache, Scene, fetch, read_cache, scene_of, unseen_scenes,
                          write_json)
from sample import Pipeline, save_pictures
from vae import load_autoencoder, to_uint8


@dataclass
class Config:
    checkpoint: str = "out/shapes/last.pt"      # or several, separated by commas
    folder: str = ""                            # in place of a checkpoint: pictures with a captions.txt, "name<TAB>caption" lines
    data: str = "data/shapes"                   # the cache whose held-out captions are drawn
    n: int = 0                                  # captions, one picture each; 0 = 500 of shapes, else all, at most 30,000
    prompts: str = "first"                      # the first pictures' first captions; random = random ones of random pictures
    steps: int = 20                             # of the solver; U-ViT: 50
    guidance_scale: float = 3.0                 # w; 1 = no guidance; U-ViT's COCO models: 2, which it calls 1
    sweep: str = ""                             # in place of one w: several, separated by commas, and a plot
    seed: int = 0                               # of the first picture; picture i has seed + i
    batch_size: int = 100                       # of the sampler; the scores don't depend on it
    raw: bool = False                           # True: the raw weights instead of their moving average (EMA)
    weights: str = "weights"                    # folder of the public weights
    inception: str = ""                         # file of the FID's Inception; "" = the public one in that folder
    clip: str = ""                              # file of the CLIP score's towers; "" = ViT-L/14 in that folder


# ---- 1. shapes: reading a picture back ----

PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)                    # (6, 3)


def detect_objects(picture: np.ndarray) -> list[tuple[str, str, float, float]]:
    """Read the objects off a shapes picture (S, S, 3) uint8: (colour, shape, y, x) of each, by classical means.

    Connected components of what is not background; the nearest palette colour of the component's most colourful half; and the
    shape by the share of its box that it fills: a square all of it, a circle pi/4, a triangle half. Specks are left out.
    """
    away = picture.astype(np.float64) - BACKGROUND                              # (S, S, 3)
    distance = np.linalg.norm(away, axis=-1)
    labels, _ = ndimage.label(distance > 90, structure=np.ones((3, 3)))
    objects = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == label
        if inside.sum() < 10 * (len(picture) / 32) ** 2:
            continue
        core = away[inside & (distance >= np.median(distance[inside]))]         # (pixels, 3)
        nearest = np.linalg.norm(core[:, None] - (PALETTE - BACKGROUND), axis=-1).argmin(axis=1)
        colour = np.bincount(nearest, minlength=len(PALETTE)).argmax()
        direction = PALETTE[colour] - BACKGROUND
        cover = away @ direction / (direction @ direction)                      # (S, S), 1 inside, 0 outside, smooth between
        cover = np.clip((cover - 0.15) / 0.5, 0, 1) * ndimage.binary_dilation(inside, np.ones((3, 3)))
        fill = cover.sum() / (cover.max(axis=0).sum() * cover.max(axis=1).sum())
        shape = "square" if fill > 0.895 else "circle" if fill > 0.705 else "triangle"
        if inside.sum() > 120 * (len(picture) / 32) ** 2:                        # twice the largest object: several in one
            shape = "blob"
        objects.append((list(COLOURS)[colour], shape, (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2))
    return objects


def judge_picture(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """What of a scene is right in a picture (S, S, 3) uint8: count, colour, shape, relation (if it has one), everything."""
    found, wanted = detect_objects(picture), scene.objects
    right = {"count": len(found) == len(wanted),
             "colour": {colour for colour, *_ in found} == {colour for colour, _ in wanted},
             "shape": {shape for _, shape, *_ in found} == {shape for _, shape in wanted}}
    everything = sorted(thing[:2] for thing in found) == sorted(wanted)
    if scene.relation:
        rows, columns = RELATIONS[scene.relation]
        places = {thing[:2]: thing[2:] for thing in found}
        right["relation"] = False
        if all(thing in places for thing in wanted):
            dy, dx = np.subtract(places[wanted[0]], places[wanted[1]])
            right["relation"] = bool(dy * rows > abs(dx) if rows else dx * columns > abs(dy))
        everything = everything and right["relation"]
    return right | {"everything": everything}


KINDS = ("count", "colour", "shape", "relation", "everything")


def score_shapes(pictures: Iterable[np.ndarray], captions: list[str]) -> dict[str, dict[str, float]]:
    """Share right by kind, for seen and unseen combinations apart; pictures (S, S, 3) uint8."""
    unknown = [caption for caption in captions if caption not in scene_of()]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a caption of the shapes dataset, and the detector can't check it.")
    scenes = [scene_of()[caption] for caption in captions]
    results = [(scene in unseen_scenes(), judge_picture(picture, scene)) for picture, scene in zip(pictures, scenes)]
    scores = {}
    for name, group in (("seen", False), ("unseen", True)):
        right = [result for unseen, result in results if unseen == group]
        values = {kind: [result[kind] for result in right if kind in result] for kind in KINDS}
        scores[name] = {"pictures": len(right)} | {kind: float(np.mean(v)) if v else None for kind, v in values.items()}
    return scores


# ---- 2. FID ----

@contextmanager
def exact_float32(device: str):
    """Without TensorFloat-32, autocast and gradients: a score must not depend on how the training chose to compute."""
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def check_pictures(images: torch.Tensor):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(f"pictures are scored as uint8 (B, 3, H, W), the way a PNG holds them, not as {images.dtype} "
                        f"{tuple(images.shape)}; vae.to_uint8 converts from [-1, 1].")


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches on the same input, concatenated: `name=[(outputs, kernel), ...]`, one convolution after the other.

    A list in place of a (outputs, kernel) is a pair of convolutions on the same input. "branch_pool" begins with `pool`.
    In the weight file the steps of a branch are NAME_1, NAME_2, ..., those of a pair NAME_2a, NAME_2b, a single one NAME.
    """

    def __init__(self, inputs, pool, **branches):
        super().__init__()
        self.paths = []
        for branch, steps in branches.items():
            width, path = inputs, [[pool]] if branch == "branch_pool" else []
            for number, step in enumerate(steps, start=1):
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                named = zip((f"{name}a", f"{name}b"), step) if isinstance(step, list) else [(name, step)]
                blocks = {name: ConvBlock(width, *sizes) for name, sizes in named}
                for name, block in blocks.items():
                    self.add_module(name, block)
                path.append(list(blocks.values()))
                width = step[0]                                     # a pair is always the last step
            self.paths.append(path)

    def forward(self, x):
        results = []
        for path in self.paths:
            y = x
            for blocks in path:
                y = torch.cat([block(y) for block in blocks], dim=1)
            results.append(y)
        return torch.cat(results, dim=1)


HALVE = nn.MaxPool2d(3, stride=2)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)     # of the pixels that are there


def mixed_5(inputs, pool_width):
    return Mixed(inputs, AVERAGE, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool_width, 1)])


def mixed_6(c):
    return Mixed(768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))], branch_pool=[(192, 1)])


def mixed_7(inputs, pool):
    pair = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), pair],
                 branch3x3dbl=[(448, 1), (384, 3), pair], branch_pool=[(192, 1)])


class Inception(nn.Sequential):
    """The Inception v3 of the FID: TensorFlow's graph of 2015-12-05, with the names of pytorch-fid's weight file.

    It differs from torchvision's in the weights, in the average pools, and in the maximum of Mixed_7c, an old slip that
    every published FID contains.
    """

    def __init__(self):
        super().__init__(OrderedDict(                                       # (B, 3, 299, 299) in [-1, 1]
            Conv2d_1a_3x3=ConvBlock(3, 32, 3, 2, "valid"),
            Conv2d_2a_3x3=ConvBlock(32, 32, 3, 1, "valid"),
            Conv2d_2b_3x3=ConvBlock(32, 64, 3),
            pool_2=HALVE,                                                   # (B, 64, 73, 73)
            Conv2d_3b_1x1=ConvBlock(64, 80, 1),
            Conv2d_4a_3x3=ConvBlock(80, 192, 3, 1, "valid"),
            pool_4=HALVE,                                                   # (B, 192, 35, 35)
            Mixed_5b=mixed_5(192, 32),
            Mixed_5c=mixed_5(256, 64),
            Mixed_5d=mixed_5(288, 64),                                      # (B, 288, 35, 35)
            Mixed_6a=Mixed(288, HALVE, branch3x3=[(384, 3, 2, "valid")],
                           branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")], branch_pool=[]),
            Mixed_6b=mixed_6(128),
            Mixed_6c=mixed_6(160),
            Mixed_6d=mixed_6(160),
            Mixed_6e=mixed_6(192),                                          # (B, 768, 17, 17)
            Mixed_7a=Mixed(768, HALVE, branch3x3=[(192, 1), (320, 3, 2, "valid")],
                           branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "valid")], branch_pool=[]),
            Mixed_7b=mixed_7(1280, AVERAGE),
            Mixed_7c=mixed_7(2048, MAXIMUM),                                # (B, 2048, 8, 8)
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> (B, 2048) in float32, resized as pytorch-fid does: bilinear, without antialiasing."""
        check_pictures(images)
        with exact_float32(images.device.type):
            x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
            return super().forward(2 * x - 1)


def load_inception(path: str | Path) -> Inception:
    """pytorch-fid's weight file, strictly but for the classifier, which the FID does not use; raises UserError."""
    net = Inception()
    unused = {name: tensor for name, tensor in net.state_dict().items() if name.endswith("num_batches_tracked")}
    state = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith("fc.")}
    return load_strictly(net, unused | state, path).eval().requires_grad_(False)


class Statistics:
    """Mean and covariance, in float64, of features that arrive in batches."""

    def __init__(self, width: int = 2048):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: torch.Tensor):
        x = features.cpu().double()                                         # (B, width)
        self.count += len(x)
        self.sum += x.sum(0)
        self.products += x.T @ x

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(width,), (width, width), unbiased: as np.cov of all the features at once."""
        if self.count < 2:
            raise UserError("FID compares covariances, and a single picture has none: score two or more.")
        mean = self.sum / self.count
        return mean.numpy(), ((self.products - self.count * mean.outer(mean)) / (self.count - 1)).numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the FID of float64 means and covariances [FID].

    With sigma = root root^T, the last trace is the sum of the singular values of root1^T root2: real, never negative, and
    exact for covariances of fewer pictures than features, too. Takes about 6 s on one CPU core for 2048 features.
    """
    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))                            # rounding makes zeros slightly negative
    overlap = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


# ---- 3. CLIP score ----

PREFIX = "A photo depicts "         # before every caption that is scored [CLIPScore]; the paper's fork of U-ViT has it too


def preprocess(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) as CLIP saw its training pictures, through Pillow's bicubic filter.

    torch's resizing has other weights and does not round to 8 bits: close, but another score.
    """
    B, _, H, W = images.shape
    height, width = [int(side * length / min(H, W)) for length in (H, W)]
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = np.empty((B, side, side, 3), dtype=np.float32)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels[i] = np.asarray(resized)[top:top + side, left:left + side]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).to(images.device)


class CLIPImage(nn.Module):
    """The image tower, with OpenAI's names less `visual.`; its transformer is the text tower's, without the mask."""

    def __init__(self, width: int, layers: int, heads: int, projection: int, patch_size: int, tokens: int):
        super().__init__()
        self.side = patch_size * math.isqrt(tokens - 1)                     # 224 pixels for ViT-L/14
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = CLIPTransformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, projection))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> features (B, projection) in float32."""
        check_pictures(images)
        with exact_float32(images.device.type):
            x = self.conv1(preprocess(images, self.side)).flatten(2).transpose(1, 2)                # (B, N, width)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)                   # (B, 1+N, width)
            x = self.transformer(self.ln_pre(x + self.positional_embedding))
            return self.ln_post(x[:, 0]) @ self.proj


def load_clip_image(path: str | Path) -> CLIPImage:
    """The image tower of the files that `load_clip_text` reads, of any size, in float32; raises UserError."""
    state, sizes = read_tower(path, "image", ["conv1.weight", "positional_embedding", "proj"])
    net = CLIPImage(**sizes, projection=state["proj"].shape[1], patch_size=state["conv1.weight"].shape[-1],
                    tokens=len(state["positional_embedding"]))
    return load_strictly(net, state, path).eval().requires_grad_(False)


def clip_scores(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosines (B,) between (B, projection) features of pictures and of their captions (CLIPText's second result)."""
    if image_features.shape != text_features.shape:
        raise UserError(f"picture features {tuple(image_features.shape)} don't match caption features "
                        f"{tuple(text_features.shape)}: the two towers are not of the same CLIP model, or the text tower's "
                        "file has no projection.")
    return F.cosine_similarity(image_features, text_features, dim=-1)


def summarise_cosines(cosines: torch.Tensor) -> dict[str, float]:
    """The three numbers that are called CLIP score: the mean cosine, x 100, and 2.5 max(cosine, 0) [CLIPScore]."""
    cosines = cosines.double()
    return {"cosine": cosines.mean().item(), "x 100": 100 * cosines.mean().item(), "x 2.5": 2.5 * cosines.clamp(min=0).mean().item()}


# ---- 4. attention rank ----

def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """exp(entropy of the singular values, as shares of their sum) of (..., N, L): 1 for an outer product, n for n equal ones.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007. [IF] speaks of low rank without a definition that we know of.
    """
    values = torch.linalg.svdvals(matrices.float())
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@torch.no_grad()
def attention_ranks(net: UViT, zt: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> dict[int, float]:
    """How many different things image tokens ask of the text: block of the window -> mean effective rank over pictures, heads.

    Of each block's attention, softmax over all keys, the part (N, L) from image tokens to text tokens. Low rank: all patches
    look at the text in the same way, which needs no attention.
    """
    N, L, ranks = net.config.image_tokens, net.config.context_len, {}
    blocks = [*net.in_blocks, net.mid_block, *net.out_blocks]

    def measure(i):
        def hook(attn, inputs):
            x, text_keys_values = inputs
            q, k, _ = [attn.split_heads(part) for part in attn.qkv(x).chunk(3, dim=-1)]
            k = k if text_keys_values is None else torch.cat([k, text_keys_values[0]], dim=2)
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)                  # (B, h, Q, 1+N+L)
            ranks[i] = effective_rank(weights[:, :, 1:1 + N, -L:]).mean().item()
        return hook
    hooks = [blocks[i].attn.register_forward_pre_hook(measure(i)) for i in net.config.window]
    net(zt, t, context)
    for hook in hooks:
        hook.remove()
    return ranks


def rank_attention(pipeline: Pipeline, cache: Cache, pictures: int = 32) -> dict[int, float]:
    """`attention_ranks` on held-out pictures and their captions, noised to steps from t = 1 to 1000."""
    pairs = cache.val.pairs[:pictures]
    mean = torch.from_numpy(cache.val.moments[pairs[:, 0]]).float().chunk(2, dim=1)[0]
    z0 = pipeline.latent_scale * mean                                               # (B, C, H, W)
    t = torch.linspace(1, 1000, len(pairs)).long()
    a = noise_schedule().float()[t][:, None, None, None]
    zt = a.sqrt() * z0 + (1 - a).sqrt() * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    context = pipeline.encode([cache.captions[row] for row in pairs[:, 1]])
    return attention_ranks(pipeline.net, zt.to(pipeline.device), t.to(pipeline.device), context)


# ---- 5. samples on disk ----

def choose_prompts(cache: Cache, config: Config) -> tuple[np.ndarray, list[str]]:
    """(n,) held-out pictures of the cache, and one caption of each.

    "first" is the order of the cache, COCO's by image id, as in the paper's fork of U-ViT, and each picture's first caption.
    "random" is U-ViT's rule, as far as the cache goes: a random order, and a random one of its captions, both by the seed.
    """
    if config.prompts not in ("first", "random") or config.n < 0:
        raise UserError(f"prompts={config.prompts!r}, n={config.n}: expected first or random, and 0 (the default) or more.")
    pictures, first, count = np.unique(cache.val.pairs[:, 0], return_index=True, return_counts=True)
    texts, n = cache.val.pairs[first, 1], config.n or (500 if cache.meta["dataset"] == "shapes" else 30_000)
    if config.prompts == "random":
        rng = np.random.default_rng(config.seed)
        texts, order = cache.val.pairs[first + rng.integers(count), 1], rng.permutation(len(pictures))
        pictures, texts = pictures[order], texts[order]
    if n > len(pictures):
        print(f"{config.data} has {len(pictures):,} held-out pictures, and all are taken.")
    return pictures[:n], [cache.captions[row] for row in texts[:n]]


def read_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures and captions of a folder with a captions.txt of lines "name<TAB>caption", in its order."""
    if not (folder / "captions.txt").exists():
        raise UserError(f"{folder} has no captions.txt: expected lines of a picture's name, a tab and its caption.")
    lines = [line.split("\t", 1) for line in (folder / "captions.txt").read_text(encoding="utf-8").split("\n") if line]
    if any(len(line) != 2 for line in lines):
        raise UserError(f"{folder / 'captions.txt'}: expected every line to be a picture's name, a tab and its caption.")
    return [folder / name for name, _ in lines], [caption for _, caption in lines]


def check_sizes(paths: list[Path], size: int):
    """Raise UserError unless all pictures are there and (size, size): another size means another resize, and so another FID."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the {len(paths)} pictures in captions.txt are not there: {', '.join(missing[:5])}.")
    for path in paths:
        try:
            with Image.open(path) as image:
                W, H = image.size
        except UnidentifiedImageError:
            raise UserError(f"{path} is not a picture that Pillow can read.") from None
        if (W, H) != (size, size):
            raise UserError(f"{path} has {W}x{H} pixels, but the real pictures have {size}x{size}: resize all to that.")


def load_picture(picture: Path | np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8, of a file or as it is."""
    if isinstance(picture, np.ndarray):
        return picture
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def draw_samples(pipeline: Pipeline, folder: Path, captions: list[str], guidance_scale: float, config: Config) -> float | None:
    """One picture per caption, seeded with seed + i, in `folder`; those already there are kept. Images per second, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "captions.txt"
    index.touch()
    whole, newline, cut = index.read_bytes().rpartition(b"\n")
    if cut:                                                         # killed while writing the last line
        index.write_bytes(whole + newline)
    paths, found = read_pictures(folder)
    if any(old != " ".join(new.split()) for old, new in zip(found, captions)):
        raise UserError(f"{folder} holds pictures of other captions than those of --data={config.data}: move it away.")
    begin, began = len(paths), time.perf_counter()
    for i in tqdm(range(begin, len(captions), config.batch_size), desc=f"sampling {folder}", unit="batch"):
        part = captions[i:i + config.batch_size]
        seeds = [config.seed + i + k for k in range(len(part))]
        pictures = pipeline.draw(part, seeds, config.steps, guidance_scale)
        save_pictures(folder, i, pictures, part, seeds, {"guidance_scale": guidance_scale, "steps": config.steps})
    return (len(captions) - begin) / (time.perf_counter() - began) if begin < len(captions) else None


# ---- 6. shapes, and real pictures ----

class ShapesScorer:
    """Accuracy by the detector, which needs no weights."""

    def __init__(self, cache: Cache, rows: np.ndarray, captions: list[str], config: Config):
        images, device = np.load(Path(config.data) / "val_images.npy", mmap_mode="r", allow_pickle=False), choose_device()
        real = [images[row] for row in rows]
        autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder, config.weights).to(device)
        mean = torch.from_numpy(cache.val.moments[rows]).to(device).chunk(2, dim=1)[0]
        with torch.no_grad():
            decoded = to_uint8(autoencoder.decode(mean)).permute(0, 2, 3, 1).cpu().numpy()
        self.protocol = {"detector": "nearest colour, connected components, share of the box that is filled"}
        self.bounds = {"real pictures (ceiling)": self.score(real, captions),
                       "real, through the autoencoder": self.score(decoded, captions),
                       "real, captions shuffled (floor)": self.score(real, captions[1:] + captions[:1])}
        self.about = "Share right in %; FID and CLIP score are for real pictures and are not computed for the shapes."

    def score(self, pictures, captions: list[str]) -> dict:
        return score_shapes(map(load_picture, pictures), captions)


INCEPTION, CLIP = "pt_inception-2015-12-05-6726825d.pth", "clip-vit-large-patch14.bin"
SCORE_BATCH = 50        # pictures at a time, whatever the --batch_size: the same pictures, the same number


def find_weights(given: str, name: str, folder: str) -> Path:
    """The weight file that is given, or else the public one in `folder`, fetched if it is not there; raises UserError."""
    if given and not Path(given).is_file():
        raise UserError(f"{given}: there is no such file.")
    return Path(given) if given else fetch(name, folder)


def batches(pictures: list, device: torch.device, label: str) -> Iterator[torch.Tensor]:
    """Pictures (S, S, 3) uint8, or their paths -> uint8 (B, 3, S, S) on the device."""
    for i in tqdm(range(0, len(pictures), SCORE_BATCH), desc=label, unit="batch"):
        part = np.stack([load_picture(picture) for picture in pictures[i:i + SCORE_BATCH]])
        yield torch.from_numpy(part).permute(0, 3, 1, 2).to(device)


def reference_statistics(data: str, inception: Inception, weights: str, device: torch.device) -> dict[str, np.ndarray]:
    """Statistics of all held-out pictures of a cache, kept beside them; made anew if they or the weights (a SHA-256) change."""
    source = Path(data) / "val_images.npy"
    images = np.load(source, mmap_mode="r", allow_pickle=False)     # (M, S, S, 3) uint8
    path = source.with_name(f"fid_reference_{len(images)}.npz")
    if path.exists() and path.stat().st_mtime_ns > source.stat().st_mtime_ns:
        with np.load(path, allow_pickle=False) as file:
            if str(file["inception_sha256"]) == weights:
                return dict(file)
    statistics = Statistics()
    for part in batches(images, device, "reference statistics"):
        statistics.add(inception(part))
    mu, sigma = statistics.mean_and_covariance()
    found = {"mu": mu, "sigma": sigma, "inception_sha256": np.array(weights), "pictures_sha256": np.array(sha256(source))}
    np.savez(path.with_suffix(".tmp.npz"), **found)
    os.replace(path.with_suffix(".tmp.npz"), path)                  # whole or not at all
    return found


class RealScorer:
    """FID against all held-out pictures of a cache, and CLIP score; the bounds are the real pairs, matched and shuffled."""

    def __init__(self, cache: Cache, rows: np.ndarray, captions: list[str], config: Config):
        self.device = choose_device()
        inception, clip = [find_weights(given, name, config.weights)
                           for given, name in ((config.inception, INCEPTION), (config.clip, CLIP))]
        self.inception, self.clip_image, self.clip_text = [
            load(path).to(self.device)
            for load, path in ((load_inception, inception), (load_clip_image, clip), (load_clip_text, clip))]
        hashes = [{"file": path.name, "sha256": sha256(path)} for path in (inception, clip)]
        self.reference = reference_statistics(config.data, self.inception, hashes[0]["sha256"], self.device)
        images = np.load(Path(config.data) / "val_images.npy", mmap_mode="r", allow_pickle=False)
        self.protocol = {
            "reference": {"split": f"all held-out pictures of {config.data}", "pictures": len(images),
                          "sha256": str(self.reference["pictures_sha256"])},
            "resize": f"real pictures: central square, Lanczos to {cache.meta['image_size']}; Inception: bilinear to 299 "
                      f"without antialiasing; CLIP: Pillow's bicubic to {self.clip_image.side}",
            "inception": hashes[0], "clip": hashes[1], "clip_prefix": PREFIX}
        real = [images[row] for row in rows]
        features = torch.cat([self.clip_image(part).cpu() for part in batches(real, self.device, "real pairs")])
        half = len(captions) // 2                                   # neighbours in a folder may be alike
        self.bounds = {"real pairs (ceiling)": self.clip(features, captions),
                       "real, captions shuffled (floor)": self.clip(features, captions[half:] + captions[:half])}
        self.about = (f"FID against all {len(images):,} held-out pictures. CLIP score: cosine in {clip.name}, x 100 and "
                      f"2.5 max(cosine, 0), captions after {PREFIX!r} and without; each picture's is the one it was made from.")

    def clip(self, features: torch.Tensor, captions: list[str]) -> dict:
        """CLIP scores of pictures with `features` (n, projection) and their captions, with the prefix and without."""
        scores, length = {}, len(self.clip_text.positional_embedding)
        for name, prefix in (("clip_prefix", PREFIX), ("clip", "")):
            tokens = tokenize([prefix + caption for caption in captions], length).to(self.device)
            with exact_float32(self.device.type):
                text = torch.cat([self.clip_text(part)[1].cpu() for part in tokens.split(SCORE_BATCH)])
            scores[name] = summarise_cosines(clip_scores(features, text))
        return scores

    def score(self, pictures: list, captions: list[str]) -> dict:
        statistics, features = Statistics(), []
        for part in batches(pictures, self.device, "scoring"):
            statistics.add(self.inception(part))
            features.append(self.clip_image(part).cpu())
        fid = frechet_distance(*statistics.mean_and_covariance(), self.reference["mu"], self.reference["sigma"])
        return {"fid": fid} | self.clip(torch.cat(features), captions)


# ---- 7. the whole evaluation ----

def warn_about_fid(n: int) -> list[str]:
    """What must be known before the FID of n pictures is compared with another."""
    few = f"FID from {n:,} pictures, fewer than its 2,048 features: the covariance is singular and the distance far too high."
    other = f"FID from {n:,} pictures is not comparable with FID-30k: the fewer the pictures, the higher it is."
    return [few] * (n < 2048) + [other] * (n < 30_000)


def score_pictures(paths: list[Path], captions: list[str], facts: dict, protocol: dict, scorer, cache: Cache) -> dict:
    """Score the pictures of a folder and leave eval.json there: facts about the model, scores, bounds, protocol."""
    if not paths:
        raise UserError("There are no captions, and so no pictures to score.")
    check_sizes(paths, cache.meta["image_size"])
    scores = scorer.score(paths, captions)
    warnings = warn_about_fid(min(len(paths), scorer.protocol["reference"]["pictures"])) if "fid" in scores else []
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "scipy": scipy.__version__, "pillow": PIL.__version__}
    protocol = {"pictures": len(paths), "cache": cache.meta["config"]} | protocol | scorer.protocol | {"versions": versions}
    result = facts | {"scores": scores, "bounds": scorer.bounds, "warnings": warnings, "protocol": protocol}
    write_json(paths[0].parent / "eval.json", result)
    return result


def evaluate_checkpoint(path: str, scales: list[float], captions: list[str], scorer, cache: Cache, config: Config):
    """Draw and score: a result for each guidance scale; the latest eval.json is copied beside the checkpoint."""
    pipeline = Pipeline(path, config.raw, config.weights)
    trained, asked = [f"{meta['dataset']} at {meta['image_size']} pixels" for meta in (pipeline.meta, cache.meta)]
    if trained != asked:
        raise UserError(f"{path} was trained on {trained}, but --data={config.data} holds {asked}: name a cache like its own.")
    kind, uvit, results = "raw" if config.raw else "ema", pipeline.net.config, []
    text, image = count_multiply_adds(uvit)
    ranks = rank_attention(pipeline, cache)
    digest = weights_sha256(pipeline.net)                           # pictures of other weights are never taken for ours
    for w in scales:
        folder = Path(path).parent / "eval" / (f"step{pipeline.step}_{kind}_{digest[:8]}_w{w:g}_steps{config.steps}_"
                                               f"{config.prompts}_seed{config.seed}")
        speed = draw_samples(pipeline, folder, captions, w, config)
        if speed is None and (folder / "eval.json").exists():
            speed = json.loads((folder / "eval.json").read_text())["images_per_second"]
        facts = {"name": f"{path} at step {pipeline.step}", "checkpoint": path, "step": pipeline.step, "weights": kind,
                 "weights_sha256": digest, "fusion": uvit.fusion, "conditioning": uvit.conditioning,
                 "parameters": sum(p.numel() for p in pipeline.net.parameters()), "multiply_adds_text": text,
                 "multiply_adds_per_step": image, "gflops_per_image": 2 * (text + image) / 1e9, "images_per_second": speed,
                 "attention_rank_by_block": ranks, "device": pipeline.device.type, "precision": str(choose_precision(pipeline.device)).removeprefix("torch.")}
        protocol = {"captions": f"{config.prompts}, one for each held-out picture of {config.data}",
                    "sampler": "DPM-Solver++(2M)", "steps": config.steps, "guidance_scale": w,
                    "guidance": "eps_uncond + w (eps_cond - eps_uncond)", "seed": config.seed,
                    "latent_scale": pipeline.latent_scale, "autoencoder": pipeline.meta["autoencoder"],
                    "text_tower": pipeline.meta["text_tower"]}
        paths = [folder / f"{i:05d}.png" for i in range(len(captions))]
        results.append(score_pictures(paths, captions, facts, protocol, scorer, cache))
        write_json(Path(path).parent / "eval.json", results[-1])
    return results


def format_row(name: str, result: dict, scores: dict) -> dict[str, str]:
    """A row of the Markdown table: heading -> cell."""
    def show(value, digits):
        return "" if value is None else f"{value:.{digits}f}"
    row = {"model": name, "w": f"{result['protocol']['guidance_scale']:g}" if "checkpoint" in result else "",
           "M parameters": show(result["parameters"] / 1e6 if "checkpoint" in result else None, 2),
           "GFLOPs": show(result.get("gflops_per_image"), 3), "images/s": show(result.get("images_per_second"), 1)}
    if "seen" in scores:
        return row | {f"{kind}, {group}": show(None if scores[group][kind] is None else 100 * scores[group][kind], 1)
                      for group in ("seen", "unseen") for kind in KINDS}
    return row | {"FID": show(scores.get("fid"), 2)} | {
        f"CLIP {factor}, {about}": show(scores[key][factor], digits) for key, about in (("clip_prefix", "prefix"), ("clip", "bare"))
        for factor, digits in (("x 100", 2), ("x 2.5", 4))}


def choose_ticks(values: list[float]) -> list[float]:
    """A few round numbers, the first below all values and the last above."""
    span = (max(values) - min(values)) or abs(values[0]) or 1
    step = min((m * 10.0 ** e for e in range(-12, 13) for m in (1, 2, 5)), key=lambda step: abs(math.log(span / step / 5)))
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def draw_plot(curves: dict[str, list[tuple[float, float, str]]], x_label: str, y_label: str) -> Image.Image:
    """Lines through points (x, y, note), a colour for each name, with axes."""
    W, H, left, right, top, bottom = 1920, 1280, 180, 120, 60 + 48 * len(curves), 150    # twice the size, then averaged
    image, font = Image.new("RGB", (W, H), "white"), ImageFont.load_default(size=30)
    canvas = ImageDraw.Draw(image)
    x_ticks, y_ticks = [choose_ticks([point[axis] for points in curves.values() for point in points]) for axis in (0, 1)]
    def place(x, y):
        return (left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (W - left - right),
                H - bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (H - top - bottom))
    for x in x_ticks:
        canvas.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], fill="lightgrey", width=2)
        canvas.text((place(x, 0)[0], H - bottom + 14), f"{x:g}", fill="black", font=font, anchor="ma")
    for y in y_ticks:
        canvas.line([place(x_ticks[0], y), place(x_ticks[-1], y)], fill="lightgrey", width=2)
        canvas.text(place(x_ticks[0], y), f"{y:g}  ", fill="black", font=font, anchor="rm")
    canvas.text(((left + W - right) / 2, H - 40), x_label, fill="black", font=font, anchor="ms")
    upright = Image.new("RGB", (H - top - bottom, 44), "white")
    ImageDraw.Draw(upright).text((upright.width / 2, 22), y_label, fill="black", font=font, anchor="mm")
    image.paste(upright.rotate(90, expand=True), (16, top))
    for number, (name, points) in enumerate(curves.items()):
        colour = ("royalblue", "darkorange", "seagreen", "crimson", "purple", "saddlebrown")[number % 6]
        canvas.text((left, 40 + 48 * number), name, fill=colour, font=font, anchor="lm")
        canvas.line([place(x, y) for x, y, _ in points], fill=colour, width=5)
        for x, y, note in points:
            canvas.circle(place(x, y), 11, fill=colour)
            canvas.text(place(x, y), f"  {note}", fill="black", font=font, anchor="ls")
    return image.reduce(2)


def draw_sweep(results: list[dict]) -> Image.Image:
    """FID against CLIP score, or the share of shapes right against w: a curve for each checkpoint."""
    curves = {}
    for result in results:
        w, scores, name = result["protocol"]["guidance_scale"], result["scores"], result["name"]
        if "fid" in scores:
            curves.setdefault(name, []).append((scores["clip_prefix"]["x 100"], scores["fid"], f"w = {w:g}"))
        else:
            for group in ("seen", "unseen"):
                if scores[group]["pictures"]:
                    curves.setdefault(f"{name}, {group}", []).append((w, 100 * scores[group]["everything"], f"{w:g}"))
    if "fid" in results[0]["scores"]:
        return draw_plot(curves, "CLIP score (cosine x 100, with prefix)", "FID")
    return draw_plot(curves, "guidance scale w", "everything right, %")


def main(config: Config):
    try:
        scales = sorted({float(w) for w in (config.sweep or str(config.guidance_scale)).split(",")})
    except ValueError:
        raise UserError(f"--sweep={config.sweep}: expected guidance scales separated by commas, such as 1,1.5,2,3,5.") from None
    if not all(map(math.isfinite, scales)) or min(config.steps, config.batch_size) < 1:
        raise UserError(f"guidance scales {scales}, steps={config.steps}, batch_size={config.batch_size}: expected numbers, "
                        "and 1 or more of the last two.")
    cache = read_cache(config.data)
    rows, captions = choose_prompts(cache, config)
    scorer = (ShapesScorer if cache.meta["dataset"] == "shapes" else RealScorer)(cache, rows, captions, config)
    if config.folder:
        paths, captions = read_pictures(Path(config.folder))
        n = config.n or len(paths)
        facts, protocol = {"name": config.folder}, {"captions": "those of its captions.txt"}
        results = [score_pictures(paths[:n], captions[:n], facts, protocol, scorer, cache)]
    else:
        results = [result for path in config.checkpoint.split(",")
                   for result in evaluate_checkpoint(path.strip(), scales, captions, scorer, cache, config)]

    table = [format_row(result["name"], result, result["scores"]) for result in results]
    table += [format_row(name, {}, scores) for name, scores in scorer.bounds.items()]
    how = "" if config.folder else (f", {config.steps} steps of DPM-Solver++(2M), guidance scale w; GFLOPs per image and step "
                                    f"(2 x multiply-adds)")
    print(f"\n{results[0]['protocol']['pictures']:,} pictures{how}.\n{scorer.about}\n")
    print(f"| {' | '.join(table[0])} |\n|{' --- |' * len(table[0])}")
    for row in table:
        print(f"| {' | '.join(row.values())} |")
    print()
    for result in [] if config.folder else results[::len(scales)]:
        ranks = ", ".join(f"{block}: {rank:.2f}" for block, rank in result["attention_rank_by_block"].items())
        print(f"{result['name']}: effective rank of the attention from image to text, by block: {ranks}")
    for warning in results[0]["warnings"]:
        print(f"warning: {warning}")
    if config.sweep and not config.folder:
        path = Path(results[0]["checkpoint"]).parent / "sweep.png"
        draw_sweep(results).save(path)
        print(f"The guidance scale's effect is drawn in {path}.")


if __name__ == "__main__":
    run(main, Config)
