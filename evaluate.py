"""Score pictures: are they what their caption says, and do they look real?

    python evaluate.py --checkpoint=out/shapes/last.pt                      # 500 held-out captions
    python evaluate.py --checkpoint=out/early/last.pt,out/shapes/last.pt    # several, in one table
    python evaluate.py --checkpoint=out/shapes/last.pt --sweep=1,1.5,2,3,5  # several w, and a plot
    python evaluate.py --checkpoint=out/coco/best.pt --data=data/coco --steps=50 --guidance_scale=2
    python evaluate.py --folder=pictures --data=data/coco       # anybody's, with their captions.txt

Shapes can be scored exactly, which replaces the paper's human study of counting: a classical
detector reads the objects off each picture. A picture is right in its count (as many objects as
asked), colour and shape (those asked and no others), relation (the first object stands where it
should), and everything (each object asked is there once, and nothing else). Captions with a
combination that never occurred in training are counted apart ("unseen"). The ceiling is the score
of the real pictures, also after the autoencoder; the floor is theirs with shuffled captions.

The paper holds that early fusion spends much on text-to-image attention of low rank: each model's
effective rank is printed by block.

Real pictures are scored by two networks with public weights, exactly as by the reference libraries:

    FID         |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Inception features           [FID]
    CLIP score  cosine between the CLIP features of a picture and of its caption        [CLIPScore]

FID compares with all held-out pictures of the cache, whose statistics are kept beside it. It
depends on the number of pictures: below 2,048 it means little, and only one of 30,000 compares with
the published ones. The CLIP score, too, has a ceiling (real pairs) and a floor (shuffled captions).

Pictures stay in out/NAME/eval/..., a folder for each model, scale and seed, and are used again; an
interrupted call goes on. Each folder keeps its eval.json, the scores with their whole protocol;
out/NAME/eval.json is a copy of the latest. U-ViT's mscoco_uvit_small.pth is a checkpoint, too.

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
from functools import partial
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
from model import (UserError, UViT, choose_device, choose_precision, count_multiply_adds,
                   load_strictly, noise_schedule, read_weights, run, sha256)
from prepare_data import (BACKGROUND, COLOURS, FILES, RELATIONS, Cache, Scene, fetch, read_cache,
                          scene_of, unseen_scenes, write_json)
from sample import Pipeline, save_pictures
from vae import load_autoencoder, to_uint8


@dataclass
class Config:
    checkpoint: str = "out/shapes/last.pt"  # or several, separated by commas
    folder: str = ""                        # in place of a checkpoint: pictures and a captions.txt
    data: str = "data/shapes"               # the cache whose held-out captions are drawn
    n: int = 0                              # captions; 0 = 500 of shapes, of others up to 30,000
    prompts: str = "first"                  # first caption of each picture; random = any, shuffled
    steps: int = 20                         # of the solver; U-ViT: 50
    guidance_scale: float = 3.0             # w; 1 = none; U-ViT's COCO models: 2, which it calls 1
    sweep: str = ""                         # in place of one w: several, with commas, and a plot
    seed: int = 0                           # of the first picture; picture i has seed + i
    batch_size: int = 100                   # of the sampler; the scores don't depend on it
    raw: bool = False                       # True: the raw weights, not their moving average (EMA)
    compile: str = "auto"                   # torch.compile: on, off, auto (CUDA, many pictures)
    weights: str = "weights"                # folder of the public weights
    inception: str = ""                     # file of the FID's Inception; "" = the public one there
    clip: str = ""                          # file of the CLIP score's towers; "" = ViT-L/14 there


# ---- 1. shapes: reading a picture back ----

PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)        # (6, 3)


def nearest_shape(cover: np.ndarray) -> str:
    """The shape whose picture in the same box differs least from `cover` (H, W), 1 inside to 0."""
    def points(profile):            # four in each pixel; -1 and 1 are the two ends of the box
        middles = np.arange(len(profile)) + 0.5
        fine = (np.arange(4 * len(profile)) + 0.5) / 4
        return 2 * (fine - (profile * middles).sum() / profile.sum()) / profile.sum()
    (H, W), y, x = cover.shape, points(cover.max(axis=1))[:, None], points(cover.max(axis=0))
    inside = {"circle": x ** 2 + y ** 2 <= 1, "square": np.maximum(abs(x), abs(y)) <= 1,
              "triangle": (2 * abs(x) <= y + 1) & (y <= 1)}
    def difference(shape):
        return ((inside[shape].reshape(H, 4, W, 4).mean(axis=(1, 3)) - cover) ** 2).sum()
    return min(inside, key=difference)


def detect_objects(picture: np.ndarray) -> list[tuple[str, str, float, float]]:
    """The objects of a shapes picture (S, S, 3) uint8: (colour, shape, y, x) of each.

    An object is a connected component of what is not background; specks are left out. Its colour is
    the palette's nearest to its most colourful half, its shape the one that fits its box best.
    """
    away = picture.astype(np.float64) - BACKGROUND                          # (S, S, 3)
    distance = np.linalg.norm(away, axis=-1)
    labels, _ = ndimage.label(distance > 90, structure=np.ones((3, 3)))
    objects = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == label
        if inside.sum() < 10 * (len(picture) / 32) ** 2:
            continue
        core = away[inside & (distance >= np.median(distance[inside]))]     # (pixels, 3)
        nearest = np.linalg.norm(core[:, None] - (PALETTE - BACKGROUND), axis=-1).argmin(axis=1)
        colour = np.bincount(nearest, minlength=len(PALETTE)).argmax()
        direction = PALETTE[colour] - BACKGROUND
        near = ndimage.binary_dilation(inside, np.ones((3, 3)))             # with its soft edge
        cover = np.clip(away @ direction / (direction @ direction), 0, 1) * near
        shape = nearest_shape(cover[ndimage.find_objects(near.astype(int))[0]])
        if inside.sum() > 120 * (len(picture) / 32) ** 2:           # twice the largest: several
            shape = "blob"
        y, x = [(side.start + side.stop) / 2 for side in box]
        objects.append((list(COLOURS)[colour], shape, y, x))
    return objects


def judge_picture(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which KINDS are right in a picture (S, S, 3) uint8; a scene may have no "relation"."""
    found, wanted = detect_objects(picture), scene.objects
    right = {"count": len(found) == len(wanted),
             "colour": {colour for colour, *_ in found} == {colour for colour, _ in wanted},
             "shape": {shape for _, shape, *_ in found} == {shape for _, shape in wanted}}
    if scene.relation:
        rows, columns = RELATIONS[scene.relation]
        places = {thing[:2]: thing[2:] for thing in found}
        right["relation"] = False
        if all(thing in places for thing in wanted):
            dy, dx = np.subtract(places[wanted[0]], places[wanted[1]])
            right["relation"] = bool(dy * rows > abs(dx) if rows else dx * columns > abs(dy))
    same = sorted(thing[:2] for thing in found) == sorted(wanted)
    return right | {"everything": same and right.get("relation", True)}


KINDS = ("count", "colour", "shape", "relation", "everything")


def score_shapes(pictures: Iterable[np.ndarray], captions: list[str]) -> dict[str, dict]:
    """Share right by kind, for seen and unseen combinations apart; pictures (S, S, 3) uint8.

    "count_by_number" is the share with a right count, by the number that the caption asks for, of
    all captions without a relation.
    """
    unknown = [caption for caption in captions if caption not in scene_of()]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a caption of the shapes dataset, "
                        "and the detector can't check it.")
    scenes, scores = [scene_of()[caption] for caption in captions], {}
    results = [judge_picture(picture, scene) for picture, scene in zip(pictures, scenes)]
    unseen = [scene in unseen_scenes() for scene in scenes]
    for name, group in (("seen", False), ("unseen", True)):
        rights = [right for right, where in zip(results, unseen) if where == group]
        scores[name] = {"pictures": len(rights)}
        for kind in KINDS:
            values = [right[kind] for right in rights if kind in right]
            scores[name][kind] = float(np.mean(values)) if values else None
    by_number = {}
    for right, scene in zip(results, scenes):
        if not scene.relation:
            by_number.setdefault(len(scene.objects), []).append(right["count"])
    scores["count_by_number"] = {str(n): float(np.mean(by_number[n])) for n in sorted(by_number)}
    return scores


# ---- 2. FID ----

@contextmanager
def exact_float32(device: str):
    """No TensorFloat-32, autocast, gradients: a score must not depend on how training computed."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_pictures(images: torch.Tensor):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(
            "pictures are scored as uint8 (B, 3, H, W), the way a PNG holds them, not as "
            f"{images.dtype} {tuple(images.shape)}; vae.to_uint8 converts from [-1, 1].")


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches on the same input, concatenated.

    `name=[(outputs, kernel), ...]` is a branch, one convolution after the other; a list as its last
    step is a pair on the same input; "branch_pool" begins with `pool`. In the weight file the steps
    of a branch are NAME_1, NAME_2, ..., those of a pair NAME_2a, NAME_2b, a single one NAME.
    """

    def __init__(self, inputs, pool, **branches):
        super().__init__()
        self.paths = []
        for branch, steps in branches.items():
            width, path = inputs, [[pool]] if branch == "branch_pool" else []
            for number, step in enumerate(steps, start=1):
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                parts = zip("ab", step) if isinstance(step, list) else [("", step)]
                path.append([])
                for letter, sizes in parts:
                    path[-1].append(ConvBlock(width, *sizes))
                    self.add_module(name + letter, path[-1][-1])
                width = step[0]                             # a pair is always the last step
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
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)     # of the pixels there


def mixed_5(inputs, pool_width):
    return Mixed(inputs, AVERAGE, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool_width, 1)])


def mixed_6(c):
    return Mixed(768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                 branch_pool=[(192, 1)])


def mixed_7(inputs, pool):
    pair = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), pair],
                 branch3x3dbl=[(448, 1), (384, 3), pair], branch_pool=[(192, 1)])


class Inception(nn.Sequential):
    """The FID's Inception v3, TensorFlow's of 2015-12-05, with the names of pytorch-fid's file.

    It differs from torchvision's in the weights, in the average pools, and in the maximum of
    Mixed_7c, an old slip that every published FID contains.
    """

    def __init__(self):
        super().__init__(OrderedDict(                                # (B, 3, 299, 299) in [-1, 1]
            Conv2d_1a_3x3=ConvBlock(3, 32, 3, 2, "valid"),
            Conv2d_2a_3x3=ConvBlock(32, 32, 3, 1, "valid"),
            Conv2d_2b_3x3=ConvBlock(32, 64, 3),
            pool_2=HALVE,                                            # (B, 64, 73, 73)
            Conv2d_3b_1x1=ConvBlock(64, 80, 1),
            Conv2d_4a_3x3=ConvBlock(80, 192, 3, 1, "valid"),
            pool_4=HALVE,                                            # (B, 192, 35, 35)
            Mixed_5b=mixed_5(192, 32), Mixed_5c=mixed_5(256, 64),
            Mixed_5d=mixed_5(288, 64),                               # (B, 288, 35, 35)
            Mixed_6a=Mixed(
                288, HALVE, branch3x3=[(384, 3, 2, "valid")],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")], branch_pool=[]),
            Mixed_6b=mixed_6(128), Mixed_6c=mixed_6(160), Mixed_6d=mixed_6(160),
            Mixed_6e=mixed_6(192),                                   # (B, 768, 17, 17)
            Mixed_7a=Mixed(
                768, HALVE, branch3x3=[(192, 1), (320, 3, 2, "valid")],
                branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "valid")],
                branch_pool=[]),
            Mixed_7b=mixed_7(1280, AVERAGE),
            Mixed_7c=mixed_7(2048, MAXIMUM),                         # (B, 2048, 8, 8)
            pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))     # (B, 2048)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048), resized as in pytorch-fid: not antialiased."""
        check_pictures(images)
        with exact_float32(images.device.type):
            x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear")
            return super().forward(2 * x - 1)


def load_inception(path: str | Path) -> Inception:
    """pytorch-fid's weight file, strictly but for the unused classifier; raises UserError."""
    net = Inception()
    counters = {name: x for name, x in net.state_dict().items() if name.endswith("batches_tracked")}
    state = {name: x for name, x in read_weights(path).items() if not name.startswith("fc.")}
    return load_strictly(net, counters | state, path).eval().requires_grad_(False)


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
            raise UserError("FID compares covariances, and a single picture has none: "
                            "score two or more.")
        mean = self.sum / self.count
        covariance = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        return mean.numpy(), covariance.numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray,
                     sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of float64 arrays [FID].

    With sigma = root root^T, the last trace is the sum of the singular values of root1^T root2:
    real, never negative, and exact even for fewer pictures than features. About 6 s on a CPU core.
    """
    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))        # rounding makes some zeros negative
    overlap = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


# ---- 3. CLIP score ----

PREFIX = "A photo depicts "     # before every caption [CLIPScore], as in the paper's fork of U-ViT


def preprocess(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side), as CLIP saw its training pictures.

    Through Pillow's bicubic filter: torch's has other weights and does not round to 8 bits, which
    gives a close, but different score.
    """
    B, _, H, W = images.shape
    height, width = [int(side * length / min(H, W)) for length in (H, W)]
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = np.empty((B, side, side, 3), dtype=np.float32)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels[i] = np.asarray(resized)[top:top + side, left:left + side]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).to(images.device)


class CLIPImage(nn.Module):
    """The image tower: the text tower's blocks without the mask, OpenAI's names less `visual.`."""

    def __init__(self, width: int, layers: int, heads: int,
                 projection: int, patch_size: int, tokens: int):
        super().__init__()
        self.side = patch_size * math.isqrt(tokens - 1)                 # 224 pixels for ViT-L/14
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
            x = self.conv1(preprocess(images, self.side)).flatten(2).mT              # (B, N, width)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1+N, width)
            x = self.transformer(self.ln_pre(x + self.positional_embedding))
            return self.ln_post(x[:, 0]) @ self.proj


def load_clip_image(path: str | Path) -> CLIPImage:
    """The image tower, of any size, of the files that `load_clip_text` reads; raises UserError."""
    state, sizes = read_tower(path, "image", ["conv1.weight", "positional_embedding", "proj"])
    sizes |= {"projection": state["proj"].shape[1], "patch_size": state["conv1.weight"].shape[-1]}
    net = CLIPImage(**sizes, tokens=len(state["positional_embedding"]))
    return load_strictly(net, state, path).eval().requires_grad_(False)


def clip_scores(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosines (B,) of the features (B, projection) of pictures and of their captions (pooled)."""
    if image_features.shape != text_features.shape:
        raise UserError(f"picture features {tuple(image_features.shape)} don't match caption "
                        f"features {tuple(text_features.shape)}: the two towers are not of the "
                        "same CLIP model, or the text tower's file has no projection.")
    return F.cosine_similarity(image_features, text_features, dim=-1)


def summarise_cosines(cosines: torch.Tensor) -> dict[str, float]:
    """All that is called CLIP score: the mean cosine, x 100, and 2.5 max(cosine, 0) [CLIPScore]."""
    cosines = cosines.double()
    mean, clipped = cosines.mean().item(), cosines.clamp(min=0).mean().item()
    return {"cosine": mean, "x 100": 100 * mean, "x 2.5": 2.5 * clipped}


# ---- 4. attention rank ----

def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """exp(entropy of the singular values, as shares of their sum) of matrices (..., N, L).

    1 for an outer product, n for n equal singular values. Roy & Vetterli, "The effective rank",
    EUSIPCO 2007; [IF] speaks of low rank without a definition that we know of.
    """
    values = torch.linalg.svdvals(matrices.float().cpu())   # on CUDA one matrix after the other
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@torch.no_grad()
def attention_ranks(net: UViT, zt: torch.Tensor, t: torch.Tensor,
                    context: torch.Tensor) -> dict[int, float]:
    """Block of the window -> effective rank of its attention to text, mean over pictures and heads.

    That is the part (N, L) from image tokens to text tokens, after the softmax over all keys. Low
    rank: all patches look at the text in the same way, which needs no attention.
    """
    N, L, ranks = net.config.image_tokens, net.config.context_len, dict.fromkeys(net.config.window)

    def measure(i, attn, inputs):
        x, text_keys_values = inputs
        q, k, _ = [attn.split_heads(part) for part in attn.qkv(x).chunk(3, dim=-1)]
        k = k if text_keys_values is None else torch.cat([k, text_keys_values[0]], dim=2)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)                  # (B, h, Q, 1+N+L)
        ranks[i] = effective_rank(weights[:, :, 1:1 + N, -L:]).mean().item()
    hooks = [net.stack[i].attn.register_forward_pre_hook(partial(measure, i)) for i in ranks]
    net(zt, t, context)
    for hook in hooks:
        hook.remove()
    return ranks


def rank_attention(pipeline: Pipeline, cache: Cache, pictures: int = 32) -> dict[int, float]:
    """`attention_ranks` on held-out pictures, noised to t from 1 to 1000, and their captions."""
    pairs = cache.val.pairs[:pictures]
    mean = torch.from_numpy(cache.val.moments[pairs[:, 0]]).float().chunk(2, dim=1)[0]
    z0 = pipeline.latent_scale * mean                                           # (B, C, H, W)
    t = torch.linspace(1, 1000, len(pairs)).long()
    a = noise_schedule().float()[t][:, None, None, None]
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    zt = (a.sqrt() * z0 + (1 - a).sqrt() * eps).to(pipeline.device)
    context = pipeline.encode([cache.captions[row] for row in pairs[:, 1]])
    return attention_ranks(pipeline.net, zt, t.to(pipeline.device), context)


# ---- 5. samples on disk ----

def choose_prompts(cache: Cache, config: Config) -> tuple[np.ndarray, list[str]]:
    """(n,) held-out pictures of the cache, and one caption of each.

    "first" takes the order of the cache (COCO's: by image id) and each picture's first caption, as
    the paper's fork of U-ViT. "random" is U-ViT's rule, as far as the cache goes: a random order,
    and a random one of each picture's captions, both by the seed.
    """
    if config.prompts not in ("first", "random") or config.n < 0:
        raise UserError(f"prompts={config.prompts!r}, n={config.n}: expected first or random, and "
                        "0 (the default) or more.")
    n = config.n or (500 if cache.meta["dataset"] == "shapes" else 30_000)
    pictures, pair, count = np.unique(cache.val.pairs[:, 0], return_index=True, return_counts=True)
    if config.prompts == "random":
        rng = np.random.default_rng(config.seed)
        pair, order = pair + rng.integers(count), rng.permutation(len(pictures))
        pictures, pair = pictures[order], pair[order]
    if n > len(pictures):
        print(f"{config.data} has {len(pictures):,} held-out pictures, and all are taken.")
    return pictures[:n], [cache.captions[row] for row in cache.val.pairs[pair[:n], 1]]


def read_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures and captions of a folder, as its captions.txt has them: "name<TAB>caption"."""
    index, form = folder / "captions.txt", "a picture's name, a tab and its caption"
    if not index.exists():
        raise UserError(f"{folder} has no captions.txt: expected lines of {form}.")
    text = index.read_text(encoding="utf-8")
    lines = [line.split("\t", 1) for line in text.split("\n") if line]
    if any(len(line) != 2 for line in lines):
        raise UserError(f"{index}: expected every line to be {form}.")
    return [folder / name for name, _ in lines], [caption for _, caption in lines]


def check_sizes(paths: list[Path], size: int):
    """Raise UserError unless all pictures are there and (size, size): resizing changes the FID."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the {len(paths)} pictures in captions.txt are not "
                        f"there: {', '.join(missing[:5])}.")
    for path in paths:
        try:
            with Image.open(path) as image:
                W, H = image.size
        except UnidentifiedImageError:
            raise UserError(f"{path} is not a picture that Pillow can read.") from None
        if (W, H) != (size, size):
            raise UserError(f"{path} has {W}x{H} pixels, but the real pictures have "
                            f"{size}x{size}: resize all to that.")


def load_picture(picture: Path | np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8, of a file or as it is."""
    if isinstance(picture, np.ndarray):
        return picture
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def draw_samples(pipeline: Pipeline, folder: Path, captions: list[str], guidance_scale: float,
                 config: Config) -> float | None:
    """Draw what the folder lacks, one picture per caption, of seed + i; images/s, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "captions.txt"
    index.touch()
    whole, newline, cut = index.read_bytes().rpartition(b"\n")
    if cut:                                             # killed while writing the last line
        index.write_bytes(whole + newline)
    paths, found = read_pictures(folder)
    if any(old != " ".join(new.split()) for old, new in zip(found, captions)):
        raise UserError(f"{folder} holds pictures of other captions than those of "
                        f"--data={config.data}: move it away.")
    begin, end, size = len(paths), len(captions), config.batch_size
    evaluations = math.ceil((end - begin) / size) * config.steps
    if begin < end and (config.compile == "on" or evaluations > 2000):      # not measured: a guess
        pipeline.compile(config.compile, captions[begin:begin + size], guidance_scale)
    began = time.perf_counter()
    for i in tqdm(range(begin, end, size), f"sampling {folder}", unit="batch"):
        part = captions[i:i + size]
        seeds = [config.seed + i + k for k in range(len(part))]
        pictures = pipeline.draw(part, seeds, config.steps, guidance_scale)
        settings = {"guidance_scale": guidance_scale, "steps": config.steps}
        save_pictures(folder, i, pictures, part, seeds, settings)
    return (end - begin) / (time.perf_counter() - began) if begin < end else None


# ---- 6. shapes, and real pictures ----

class ShapesScorer:
    """Accuracy by the detector, which needs no weights."""

    def __init__(self, cache: Cache, rows: np.ndarray, captions: list[str], config: Config):
        real, shuffled = cache.val_images[rows], captions[1:] + captions[:1]
        device = choose_device()
        autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder, config.weights)
        autoencoder.to(device)
        mean = torch.from_numpy(cache.val.moments[rows]).to(device).chunk(2, dim=1)[0]
        with torch.no_grad():
            decoded = to_uint8(autoencoder.decode(mean)).permute(0, 2, 3, 1).cpu().numpy()
        self.protocol = {
            "detector": "nearest colour, connected components, shape that fits the box best"}
        self.bounds = {"real pictures (ceiling)": self.score(real, captions),
                       "real, through the autoencoder": self.score(decoded, captions),
                       "real, captions shuffled (floor)": self.score(real, shuffled)}
        self.about = ("Share right in %; FID and CLIP score are for real pictures "
                      "and are not computed for the shapes.")

    def score(self, pictures, captions: list[str]) -> dict:
        return score_shapes(map(load_picture, pictures), captions)


INCEPTION, CLIP = "pt_inception-2015-12-05-6726825d.pth", "clip-vit-large-patch14.bin"
SCORE_BATCH = 50        # whatever the --batch_size: the same pictures have the same score


def find_weights(given: str, name: str, folder: str) -> tuple[Path, str]:
    """The weight file that is given, or else the public one, and its SHA-256; raises UserError."""
    if not given:
        return fetch(name, folder), FILES[name][2]      # which fetch has just checked
    if not Path(given).is_file():
        raise UserError(f"{given}: there is no such file.")
    return Path(given), sha256(given)


def batches(pictures: list, device: torch.device, label: str) -> Iterator[torch.Tensor]:
    """Pictures (S, S, 3) uint8, or their paths -> uint8 (B, 3, S, S) on the device."""
    for i in tqdm(range(0, len(pictures), SCORE_BATCH), label, unit="batch"):
        part = np.stack([load_picture(picture) for picture in pictures[i:i + SCORE_BATCH]])
        yield torch.from_numpy(part).permute(0, 3, 1, 2).to(device)


def reference_statistics(data: str, images: np.ndarray, inception: Inception, weights: str,
                         device: torch.device) -> dict[str, np.ndarray]:
    """Those of all held-out pictures, kept on disk until they or the weights' SHA-256 change."""
    source = Path(data) / "val_images.npy"
    path = source.with_name(f"fid_reference_{len(images)}.npz")
    if path.exists() and path.stat().st_mtime_ns > source.stat().st_mtime_ns:
        with np.load(path, allow_pickle=False) as file:
            if str(file["inception_sha256"]) == weights:
                return dict(file)
    statistics = Statistics()
    for part in batches(images, device, "reference statistics"):
        statistics.add(inception(part))
    mu, sigma = statistics.mean_and_covariance()
    found = {"mu": mu, "sigma": sigma, "inception_sha256": np.array(weights),
             "pictures_sha256": np.array(sha256(source))}
    np.savez(path.with_suffix(".tmp.npz"), **found)
    os.replace(path.with_suffix(".tmp.npz"), path)      # whole or not at all
    return found


class RealScorer:
    """FID against all held-out pictures of a cache, and CLIP score, also of the real pairs."""

    def __init__(self, cache: Cache, rows: np.ndarray, captions: list[str], config: Config):
        self.device = choose_device()
        inception, digest = find_weights(config.inception, INCEPTION, config.weights)
        clip, clip_digest = find_weights(config.clip, CLIP, config.weights)
        self.inception = load_inception(inception).to(self.device)
        self.clip_image = load_clip_image(clip).to(self.device)
        self.clip_text = load_clip_text(clip).to(self.device)
        images, size = cache.val_images, cache.meta["image_size"]
        self.reference = reference_statistics(config.data, images, self.inception, digest,
                                              self.device)
        self.protocol = {
            "reference": {
                "split": f"all held-out pictures of {config.data}", "pictures": len(images),
                "sha256": str(self.reference["pictures_sha256"])},
            "resize": f"real pictures: central square, Lanczos to {size}; Inception: bilinear to "
                      f"299 without antialiasing; CLIP: Pillow's bicubic to {self.clip_image.side}",
            "inception": {"file": inception.name, "sha256": digest},
            "clip": {"file": clip.name, "sha256": clip_digest}, "clip_prefix": PREFIX}
        real = batches([images[row] for row in rows], self.device, "real pairs")
        features = torch.cat([self.clip_image(part).cpu() for part in real])
        half = len(captions) // 2                           # neighbours in a folder may be alike
        shuffled = captions[half:] + captions[:half]
        self.bounds = {"real pairs (ceiling)": self.clip(features, captions),
                       "real, captions shuffled (floor)": self.clip(features, shuffled)}
        self.about = (f"FID against all {len(images):,} held-out pictures. CLIP score: cosine in "
                      f"{clip.name}, x 100 and 2.5 max(cosine, 0), captions after {PREFIX!r} and "
                      "without; each picture's is the one it was made from.")

    def clip(self, features: torch.Tensor, captions: list[str]) -> dict:
        """CLIP scores of pictures' features (n, projection), with the prefix and without."""
        scores, length = {}, len(self.clip_text.positional_embedding)
        for name, prefix in (("clip_prefix", PREFIX), ("clip", "")):
            tokens = tokenize([prefix + caption for caption in captions], length).to(self.device)
            with exact_float32(self.device.type):
                pooled = [self.clip_text(part)[1].cpu() for part in tokens.split(SCORE_BATCH)]
            scores[name] = summarise_cosines(clip_scores(features, torch.cat(pooled)))
        return scores

    def score(self, pictures: list, captions: list[str]) -> dict:
        statistics, features = Statistics(), []
        for part in batches(pictures, self.device, "scoring"):
            statistics.add(self.inception(part))
            features.append(self.clip_image(part).cpu())
        mu, sigma = self.reference["mu"], self.reference["sigma"]
        fid = frechet_distance(*statistics.mean_and_covariance(), mu, sigma)
        return {"fid": fid} | self.clip(torch.cat(features), captions)


# ---- 7. the whole evaluation ----

def warn_about_fid(n: int) -> list[str]:
    """What must be known before the FID of n pictures is compared with another."""
    few = "fewer than its 2,048 features: the covariance is singular and the distance far too high."
    other = "is not comparable with FID-30k: the fewer the pictures, the higher it is."
    return ([f"FID from {n:,} pictures, {few}"] * (n < 2048)
            + [f"FID from {n:,} pictures {other}"] * (n < 30_000))


def score_pictures(folder: Path, paths: list[Path], captions: list[str], facts: dict,
                   protocol: dict, scorer, cache: Cache) -> dict:
    """Score a folder and leave eval.json there: facts about the model, scores, bounds, protocol."""
    if not paths:
        raise UserError("There are no captions, and so no pictures to score.")
    scores, warnings = scorer.score(paths, captions), []
    if "fid" in scores:
        warnings = warn_about_fid(min(len(paths), scorer.protocol["reference"]["pictures"]))
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "scipy": scipy.__version__, "pillow": PIL.__version__}
    protocol = {"pictures": len(paths), "cache": cache.meta["config"], **protocol,
                **scorer.protocol, "versions": versions}
    result = {**facts, "scores": scores, "bounds": scorer.bounds, "warnings": warnings,
              "protocol": protocol}
    write_json(folder / "eval.json", result)
    return result


def evaluate_checkpoint(path: str, scales: list[float], captions: list[str], scorer, cache: Cache,
                        config: Config) -> list[dict]:
    """Draw and score, with a result for each scale; the last eval.json is also the checkpoint's."""
    pipeline = Pipeline(path, config.raw, config.weights)
    trained, asked = [f"{meta['autoencoder']['kind']} latents of {meta['dataset']} at "
                      f"{meta['image_size']} pixels" for meta in (pipeline.meta, cache.meta)]
    if trained != asked:
        raise UserError(f"{path} was trained on {trained}, but --data={config.data} holds {asked}: "
                        "name a cache like its own.")
    net, kind, results = pipeline.net, "raw" if config.raw else "ema", []
    text, image = count_multiply_adds(net.config)
    ranks = rank_attention(pipeline, cache)
    digest = weights_sha256(net)                # pictures of other weights are never taken for ours
    for w in scales:
        name = (f"step{pipeline.step}_{kind}_{digest[:8]}_w{w:g}_steps{config.steps}_"
                f"{config.prompts}_seed{config.seed}")
        folder = Path(path).parent / "eval" / name
        speed = draw_samples(pipeline, folder, captions, w, config)
        if speed is None and (folder / "eval.json").exists():
            speed = json.loads((folder / "eval.json").read_text())["images_per_second"]
        facts = {
            "name": f"{path} at step {pipeline.step}", "checkpoint": path, "step": pipeline.step,
            "weights": kind, "weights_sha256": digest, "fusion": net.config.fusion,
            "conditioning": net.config.conditioning,
            "parameters": sum(p.numel() for p in net.parameters()),
            "multiply_adds_text": text, "multiply_adds_per_step": image,
            "gflops_per_image": 2 * (text + image) / 1e9, "images_per_second": speed,
            "attention_rank_by_block": ranks, "device": pipeline.device.type,
            "precision": str(choose_precision(pipeline.device)).removeprefix("torch.")}
        protocol = {
            "captions": f"{config.prompts}, one for each held-out picture of {config.data}",
            "sampler": "DPM-Solver++(2M)", "steps": config.steps, "guidance_scale": w,
            "guidance": "eps_uncond + w (eps_cond - eps_uncond)", "seed": config.seed,
            "latent_scale": pipeline.latent_scale, "autoencoder": pipeline.meta["autoencoder"],
            "text_tower": pipeline.meta["text_tower"]}
        paths = [folder / f"{i:05d}.png" for i in range(len(captions))]
        check_sizes(paths, cache.meta["image_size"])
        results.append(score_pictures(folder, paths, captions, facts, protocol, scorer, cache))
        write_json(Path(path).parent / "eval.json", results[-1])
    return results


def format_row(name: str, result: dict, scores: dict) -> dict[str, str]:
    """A row of the Markdown table: heading -> cell."""
    def show(value, digits, factor=1):
        return "" if value is None else f"{factor * value:.{digits}f}"
    drawn = "checkpoint" in result
    row = {"model": name, "w": f"{result['protocol']['guidance_scale']:g}" if drawn else "",
           "M parameters": f"{result['parameters'] / 1e6:.2f}" if drawn else "",
           "GFLOPs": show(result.get("gflops_per_image"), 3),
           "images/s": show(result.get("images_per_second"), 1)}
    if "seen" in scores:
        return row | {f"{kind}, {group}": show(scores[group][kind], 1, 100)
                      for group in ("seen", "unseen") for kind in KINDS}
    row["FID"] = show(scores.get("fid"), 2)
    for key, about in (("clip_prefix", "prefix"), ("clip", "bare")):
        for scale, digits in (("x 100", 2), ("x 2.5", 4)):
            row[f"CLIP {scale}, {about}"] = show(scores[key][scale], digits)
    return row


def choose_ticks(values: list[float]) -> list[float]:
    """About six round numbers, the first not above any value and the last not below."""
    low, high = min(values), max(values)
    fifth = (high - low or abs(low) or 1) / 5
    steps = [m * 10.0 ** e for e in range(-12, 13) for m in (1, 2, 5)]
    step = min(steps, key=lambda step: abs(math.log(step / fifth)))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def draw_plot(curves: dict[str, list[tuple[float, float, str]]], x_label: str,
              y_label: str) -> Image.Image:
    """Lines through points (x, y, note), a colour for each name, with axes."""
    W, H, left, right, top, bottom = 1920, 1280, 180, 1800, 60 + 48 * len(curves), 1130
    image, font = Image.new("RGB", (W, H), "white"), ImageFont.load_default(size=30)
    canvas = ImageDraw.Draw(image)
    write = partial(canvas.text, fill="black", font=font)
    xs, ys, _ = zip(*(point for points in curves.values() for point in points))
    x_ticks, y_ticks = choose_ticks(xs), choose_ticks(ys)
    def place(x, y):
        return (np.interp(x, (x_ticks[0], x_ticks[-1]), (left, right)),
                np.interp(y, (y_ticks[0], y_ticks[-1]), (bottom, top)))
    for x in x_ticks:
        canvas.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], fill="lightgrey", width=2)
        write((place(x, 0)[0], bottom + 14), f"{x:g}", anchor="ma")
    for y in y_ticks:
        canvas.line([place(x_ticks[0], y), place(x_ticks[-1], y)], fill="lightgrey", width=2)
        write(place(x_ticks[0], y), f"{y:g}  ", anchor="rm")
    write(((left + right) / 2, H - 40), x_label, anchor="ms")
    upright = Image.new("RGB", (bottom - top, 44), "white")
    ImageDraw.Draw(upright).text((upright.width / 2, 22), y_label, "black", font, anchor="mm")
    image.paste(upright.rotate(90, expand=True), (16, top))
    colours = ("royalblue", "darkorange", "seagreen", "crimson", "purple", "saddlebrown")
    for number, (name, points) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        write((left, 40 + 48 * number), name, fill=colour, anchor="lm")
        canvas.line([place(x, y) for x, y, _ in points], fill=colour, width=5)
        for x, y, note in points:
            canvas.circle(place(x, y), 11, fill=colour)
            write(place(x, y), f"  {note}", anchor="ls")
    return image.reduce(2)                                      # drawn large: smooth edges


def draw_sweep(results: list[dict]) -> Image.Image:
    """FID against CLIP score, or the share of shapes right against w, by checkpoint."""
    curves, real = {}, "fid" in results[0]["scores"]
    for result in results:
        w, scores, name = result["protocol"]["guidance_scale"], result["scores"], result["name"]
        if real:
            points = {name: (scores["clip_prefix"]["x 100"], scores["fid"], f"w = {w:g}")}
        else:
            points = {f"{name}, {group}": (w, 100 * scores[group]["everything"], f"{w:g}")
                      for group in ("seen", "unseen") if scores[group]["pictures"]}
        for curve, point in points.items():
            curves.setdefault(curve, []).append(point)
    if real:
        return draw_plot(curves, "CLIP score (cosine x 100, with prefix)", "FID")
    return draw_plot(curves, "guidance scale w", "everything right, %")


def main(config: Config):
    try:
        sweep = config.sweep or str(config.guidance_scale)
        scales = sorted({float(w) for w in sweep.split(",")})
    except ValueError:
        raise UserError(f"--sweep={config.sweep}: expected guidance scales separated by commas, "
                        "such as 1,1.5,2,3,5.") from None
    if not all(map(math.isfinite, scales)) or min(config.steps, config.batch_size) < 1:
        raise UserError(f"guidance scales {scales}, steps={config.steps}, "
                        f"batch_size={config.batch_size}: "
                        "expected numbers, and 1 or more of the last two.")
    if config.compile not in ("auto", "on", "off"):
        raise UserError(f"--compile={config.compile}: expected auto, on or off.")
    if config.folder and config.sweep:
        raise UserError("--sweep draws pictures, and --folder scores those that are there: "
                        "leave one out.")
    cache = read_cache(config.data)
    if config.folder:
        paths, texts = [part[:config.n or None] for part in read_pictures(Path(config.folder))]
        check_sizes(paths, cache.meta["image_size"])
    rows, captions = choose_prompts(cache, config)
    Scorer = ShapesScorer if cache.meta["dataset"] == "shapes" else RealScorer
    scorer = Scorer(cache, rows, captions, config)
    if config.folder:
        facts, protocol = {"name": config.folder}, {"captions": "those of its captions.txt"}
        results = [score_pictures(Path(config.folder), paths, texts, facts, protocol, scorer,
                                  cache)]
    else:
        results = [result for path in config.checkpoint.split(",") for result in
                   evaluate_checkpoint(path.strip(), scales, captions, scorer, cache, config)]

    table = [format_row(result["name"], result, result["scores"]) for result in results]
    table += [format_row(name, {}, scores) for name, scores in scorer.bounds.items()]
    how = "" if config.folder else (
        f", {config.steps} steps of DPM-Solver++(2M), guidance scale w; GFLOPs per image and step "
        "(2 x multiply-adds)")
    print(f"\n{results[0]['protocol']['pictures']:,} pictures{how}.\n{scorer.about}\n")
    print(f"| {' | '.join(table[0])} |\n|{' --- |' * len(table[0])}")
    for row in table:
        print(f"| {' | '.join(row.values())} |")
    print()
    for result in [] if config.folder else results[::len(scales)]:
        ranks = result["attention_rank_by_block"].items()
        print(f"{result['name']}: effective rank of the attention from image to text, by block: "
              + ", ".join(f"{block}: {rank:.2f}" for block, rank in ranks))
    for warning in results[0]["warnings"]:
        print(f"warning: {warning}")
    if config.sweep and not config.folder:
        path = Path(results[0]["checkpoint"]).parent / "sweep.png"
        draw_sweep(results).save(path)
        print(f"The guidance scale's effect is drawn in {path}.")


if __name__ == "__main__":
    run(main, Config)
