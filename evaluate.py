"""Score pictures: are they what their caption says, and do they look real?

    python evaluate.py --checkpoint=out/shapes/last.pt                      # 500 held-out captions
    python evaluate.py --checkpoint=out/early/last.pt,out/shapes/last.pt    # several, in one table
    python evaluate.py --checkpoint=out/shapes/last.pt --sweep=1,1.5,2,3,5  # several w
    python evaluate.py --checkpoint=out/coco/best.pt --data=data/coco --steps=50 --guidance_scale=2
    python evaluate.py --folder=pictures --data=data/coco       # anybody's pictures, with captions

Shapes are scored exactly, in place of the paper's human study of counting: a classical detector
reads the objects off each picture. A picture is right in its count (as many objects as asked),
colour and shape (those asked and no others), relation (the first object stands where it should),
and everything (each object asked is there once, and nothing else). "99.2 / 96.0" are % right of
combinations seen in training / never seen.

Real pictures are scored by two networks with public weights, exactly as by the reference libraries:

    FID         |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Inception features           [FID]
    CLIP score  cosine x 100 between CLIP's features of a picture and of its caption    [CLIPScore]

The FID is against all held-out pictures of the cache. The ceiling is the score of as many real
pictures, the floor theirs with shuffled captions.

Pictures stay in out/NAME/eval/, a folder for each model, w and seed, and are used again; the same
command resumes an interrupted one. Each folder has an eval.json, the scores with their whole
protocol; out/NAME/eval.json is a copy of the latest. mscoco_uvit_small.pth is a checkpoint, too.

[FID] arXiv 1706.08500   [CLIP] arXiv 2103.00020   [CLIPScore] arXiv 2104.08718
"""
import hashlib
import math
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import scipy
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from clip_text import (CLIP_FILE, CLIPTransformer, encode_captions, load_clip_text, read_tower,
                       weights_sha256)
from model import (Constants, FilePath, Natural, Positive, Size, UserError, choose_device,
                   choose_precision, count_multiply_adds, load_strictly, one_writer, read_weights,
                   reading, run, sha256, write_json, writing)
from prepare_data import (BACKGROUND, COLOURS, RELATIONS, Cache, Scene, fetch, read_cache,
                          read_captions, read_picture, scene_of, unseen_scenes)
from sample import GuidanceScale, Pipeline, SolverSteps, save_pictures
from vae import load_autoencoder, to_uint8


@dataclass
class Config(Constants):
    checkpoint: FilePath = "out/shapes/last.pt"     # or several, separated by commas
    folder: FilePath | None = None      # in place of a checkpoint: pictures with captions
    data: FilePath = "data/shapes"      # the cache whose held-out captions are drawn
    n: Positive | None = None           # captions; None: 500 of shapes, else up to 30,000
    prompts: Literal["first", "random"] = "first"   # caption of each picture
    steps: SolverSteps = 20             # U-ViT: 50
    guidance_scale: GuidanceScale = 3.0     # w; 1 = none; U-ViT's COCO models: 2, which it calls 1
    sweep: str | None = None            # in place of one w: several, separated by commas
    seed: Natural = 0                   # of the first picture; picture i has seed + i
    batch_size: Size = 100              # of the sampler; the scores don't depend on it
    raw: bool = False                   # True: the raw weights, not their moving average (EMA)
    weights: FilePath = "weights"       # folder of the public weights
    inception: FilePath | None = None   # weights of the FID; None: the public ones
    clip: FilePath | None = None        # weights of the CLIP score; None: ViT-L/14's
    out: FilePath | None = None         # folder of the results; None: the checkpoint's


# ---- 1. shapes: reading a picture back ----

KINDS = ("count", "colour", "shape", "relation", "everything")
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)        # (6, 3)


def nearest_shape(cover):
    """The shape whose picture in the same box differs least from `cover` (H, W), 1 inside to 0."""
    def points(profile):            # four in each pixel; -1 and 1 are the two ends of the box
        pixels = np.arange(len(profile)) + 0.5
        fine = (np.arange(4 * len(profile)) + 0.5) / 4
        middle = (profile * pixels).sum() / profile.sum()
        return 2 * (fine - middle) / profile.sum()
    H, W = cover.shape
    y, x = points(cover.max(axis=1))[:, None], points(cover.max(axis=0))
    inside = {"circle": x ** 2 + y ** 2 <= 1,
              "square": np.maximum(abs(x), abs(y)) <= 1,
              "triangle": (2 * abs(x) <= y + 1) & (y <= 1)}

    def difference(shape):
        drawn = inside[shape].reshape(H, 4, W, 4).mean(axis=(1, 3))
        return ((drawn - cover) ** 2).sum()
    return min(inside, key=difference)


def detect_objects(picture: np.ndarray) -> list[tuple[str, str, float, float]]:
    """The objects of a shapes picture (S, S, 3) uint8: (colour, shape, y, x) of each.

    An object is a connected component of what is not background; specks are left out. Its colour is
    the palette's nearest to its most colourful half, its shape the one that fits its box best.
    """
    away = picture.astype(np.float64) - BACKGROUND                          # (S, S, 3)
    distance = np.linalg.norm(away, axis=-1)
    labels, _ = ndimage.label(distance > 90, structure=np.ones((3, 3)))
    unit = (len(picture) / 32) ** 2             # areas below are those at a side of 32
    objects = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == label
        area = inside.sum()
        if area < 10 * unit:
            continue
        core = away[inside & (distance >= np.median(distance[inside]))]     # (pixels, 3)
        errors = np.linalg.norm(core[:, None] - (PALETTE - BACKGROUND), axis=-1)
        colour = np.bincount(errors.argmin(axis=1)).argmax()
        direction = PALETTE[colour] - BACKGROUND
        near = ndimage.binary_dilation(inside, np.ones((3, 3)))             # with its soft edge
        cover = np.clip(away @ direction / (direction @ direction), 0, 1) * near
        shape = nearest_shape(cover[ndimage.find_objects(near.astype(int))[0]])
        if area > 120 * unit:                   # twice the largest: several
            shape = "blob"
        y, x = [(side.start + side.stop) / 2 for side in box]
        objects.append((list(COLOURS)[colour], shape, y, x))
    return objects


def judge_picture(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which KINDS are right in a picture (S, S, 3) uint8; a scene may have no "relation"."""
    found, asked = detect_objects(picture), scene.objects
    right = {"count": len(found) == len(asked),
             "colour": {colour for colour, *_ in found} == {colour for colour, _ in asked},
             "shape": {shape for _, shape, *_ in found} == {shape for _, shape in asked}}
    if scene.relation:
        down, across = RELATIONS[scene.relation]
        places = {thing[:2]: thing[2:] for thing in found}
        right["relation"] = False
        if all(thing in places for thing in asked):
            dy, dx = np.subtract(places[asked[0]], places[asked[1]])
            right["relation"] = bool(dy * down > abs(dx) if down else dx * across > abs(dy))
    same = sorted(thing[:2] for thing in found) == sorted(asked)
    right["everything"] = same and right.get("relation", True)
    return right


def score_shapes(pictures: Iterable[np.ndarray], captions: list[str]) -> dict[str, dict]:
    """Share right by kind, for seen and unseen combinations; pictures (S, S, 3) uint8.

    "count_by_number" is the share with a right count by the number asked for, without relations.
    """
    groups, by_number, scores = {"seen": [], "unseen": []}, {}, {}
    for picture, caption in zip(pictures, captions):
        if caption not in scene_of():
            raise UserError(f"{caption!r} is not a caption of the shapes dataset, "
                            "and the detector can't check it.")
        scene = scene_of()[caption]
        right = judge_picture(picture, scene)
        groups["unseen" if scene in unseen_scenes() else "seen"].append(right)
        if not scene.relation:
            by_number.setdefault(len(scene.objects), []).append(right["count"])
    for name, group in groups.items():
        scores[name] = {"pictures": len(group)}
        for kind in KINDS:
            values = [right[kind] for right in group if kind in right]
            scores[name][kind] = float(np.mean(values)) if values else None
    scores["count_by_number"] = {str(n): float(np.mean(by_number[n])) for n in sorted(by_number)}
    return scores


# ---- 2. FID ----

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_LAYOUT = "014e2b09052e854f2d78d83ebcf1a39d78adacc40fc3a845701a6f6719bf3461"
LAYER = ("conv/weight", "bn/running_mean", "bn/running_var", "bn/weight", "bn/bias")
HALVE = nn.MaxPool2d(3, stride=2)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


@contextmanager
def exact_float32(device: torch.device):
    """Without TensorFloat-32, autocast, gradients: scores don't depend on how training computed."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_pictures(images: torch.Tensor):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(f"pictures are scored as uint8 (B, 3, H, W), not as {images.dtype} "
                        f"{tuple(images.shape)}; vae.to_uint8 converts from [-1, 1].")


class Inception(nn.Module):
    """The FID's Inception v3, TensorFlow's of 2015-12-05. Its sizes are read off the weights.

    It differs from torchvision's in the weights, in the average pools, which don't count the
    padding, and in the maximum of Mixed_7c, an old slip that every published FID contains.
    """

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "/"), tensor.float())    # torch forbids dots

    def conv(self, x, name, stride=1, padding="same"):
        """Convolution, batch norm, ReLU."""
        kernel, mean, variance, gain, bias = [self.get_buffer(f"{name}/{part}") for part in LAYER]
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, mean, variance, gain, bias, eps=0.001))

    def chain(self, x, name, layers):
        """The layers name_1, name_2, ..., one after the other."""
        for i in range(1, layers + 1):
            x = self.conv(x, f"{name}_{i}")
        return x

    def mixed(self, x, block, **chains):
        """Branches on the same input, concatenated; `chains` are name=layers."""
        branches = [self.conv(x, f"{block}/branch1x1")]
        for name, layers in chains.items():
            branches.append(self.chain(x, f"{block}/{name}", layers))
        branches.append(self.conv(AVERAGE(x), f"{block}/branch_pool"))
        return torch.cat(branches, dim=1)

    def mixed_6a(self, x):
        three = self.conv(x, "Mixed_6a/branch3x3", 2, "valid")
        double = self.chain(x, "Mixed_6a/branch3x3dbl", 2)
        double = self.conv(double, "Mixed_6a/branch3x3dbl_3", 2, "valid")
        return torch.cat([three, double, HALVE(x)], dim=1)

    def mixed_7a(self, x):
        three = self.conv(x, "Mixed_7a/branch3x3_1")
        three = self.conv(three, "Mixed_7a/branch3x3_2", 2, "valid")
        seven = self.chain(x, "Mixed_7a/branch7x7x3", 3)
        seven = self.conv(seven, "Mixed_7a/branch7x7x3_4", 2, "valid")
        return torch.cat([three, seven, HALVE(x)], dim=1)

    def mixed_7(self, x, block, pool):
        branches = [self.conv(x, f"{block}/branch1x1")]
        for name, layers in (("branch3x3", 1), ("branch3x3dbl", 2)):
            y = self.chain(x, f"{block}/{name}", layers)
            for half in "ab":
                branches.append(self.conv(y, f"{block}/{name}_{layers + 1}{half}"))
        branches.append(self.conv(pool(x), f"{block}/branch_pool"))
        return torch.cat(branches, dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048), resized as in pytorch-fid: not antialiased."""
        check_pictures(images)
        with exact_float32(images.device):
            x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear")
            x = self.conv(2 * x - 1, "Conv2d_1a_3x3", 2, "valid")
            x = self.conv(x, "Conv2d_2a_3x3", 1, "valid")
            x = HALVE(self.conv(x, "Conv2d_2b_3x3"))        # (B, 64, 73, 73)
            x = self.conv(x, "Conv2d_3b_1x1")
            x = self.conv(x, "Conv2d_4a_3x3", 1, "valid")
            x = HALVE(x)                                    # (B, 192, 35, 35)
            for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
                x = self.mixed(x, block, branch5x5=2, branch3x3dbl=3)
            x = self.mixed_6a(x)                            # (B, 768, 17, 17)
            for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
                x = self.mixed(x, block, branch7x7=3, branch7x7dbl=5)
            x = self.mixed_7a(x)                            # (B, 1280, 8, 8)
            x = self.mixed_7(x, "Mixed_7b", AVERAGE)
            x = self.mixed_7(x, "Mixed_7c", MAXIMUM)        # (B, 2048, 8, 8)
            return x.mean((2, 3))


def load_inception(path: str | Path) -> Inception:
    """pytorch-fid's weight file, strictly but for the unused classifier; raises UserError."""
    with reading(path, f"pytorch-fid's weights ({INCEPTION})"):
        weights = {name: tensor for name, tensor in read_weights(path).items()
                   if not name.startswith("fc.") and not name.endswith("batches_tracked")}
        layout = repr(sorted((name, *tensor.shape) for name, tensor in weights.items()))
        if hashlib.sha256(layout.encode()).hexdigest() != INCEPTION_LAYOUT:
            raise ValueError("other names or shapes")
        return Inception(weights)


def mean_and_covariance(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) -> (D,), (D, D), in float64."""
    x = features.double().numpy()
    if len(x) < 2:
        raise UserError("A single picture has no covariance, and so no FID: score two or more.")
    return np.mean(x, axis=0), np.cov(x, rowvar=False)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray,
                     sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of float64 arrays [FID].

    With sigma = root root^T, the last trace is the sum of the singular values of root1^T root2:
    real, never negative, and exact even for fewer pictures than features. About 6 s on a CPU core.
    """
    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))            # rounding makes some zeros negative
    overlap = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return float(np.maximum(distance, 0))


# ---- 3. CLIP score ----

CLIP = "clip-vit-large-patch14.bin"
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

    def __init__(self, width, layers, heads, projection, patch_size, tokens):
        super().__init__()
        self.side = patch_size * math.isqrt(tokens - 1)     # 224 pixels for ViT-L/14
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
        with exact_float32(images.device):
            x = self.conv1(preprocess(images, self.side)).flatten(2).mT     # (B, N, width)
            start = self.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([start, x], dim=1) + self.positional_embedding    # (B, 1+N, width)
            x = self.transformer(self.ln_pre(x))
            return self.ln_post(x[:, 0]) @ self.proj


def load_clip_image(path: str | Path) -> CLIPImage:
    """The image tower, of any size, of the files that `load_clip_text` reads; raises UserError."""
    state, sizes = read_tower(path, "image", ["conv1.weight", "positional_embedding", "proj"])
    with reading(path, CLIP_FILE):
        net = CLIPImage(**sizes, projection=state["proj"].shape[1],
                        patch_size=state["conv1.weight"].shape[-1],
                        tokens=len(state["positional_embedding"]))
    return load_strictly(net, state, path).eval().requires_grad_(False)


def clip_scores(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosines (B,) of the features of pictures and of their captions, (B, projection)."""
    if image_features.shape != text_features.shape:
        raise UserError(f"picture features {tuple(image_features.shape)} and caption features "
                        f"{tuple(text_features.shape)} are not of the same CLIP model.")
    return F.cosine_similarity(image_features, text_features, dim=-1)


# ---- 4. scorers ----

SCORE_BATCH = 50        # whatever the --batch_size: the same pictures have the same score


class ShapesScorer:
    """Accuracy by the detector, which reads the pictures as they are."""
    protocol = {"detector": "nearest colour, connected components, shape that fits the box best"}
    embed, score = list, staticmethod(score_shapes)


class RealScorer:
    """FID against all held-out pictures of a cache, and CLIP score."""

    def __init__(self, cache: Cache, config: Config):
        inception = config.inception or fetch(INCEPTION, config.weights)
        clip = config.clip or fetch(CLIP, config.weights)
        self.device, images = choose_device(), cache.val_images
        self.inception = load_inception(inception).to(self.device)
        self.clip_image = load_clip_image(clip).to(self.device)
        self.clip_text = load_clip_text(clip).to(self.device)
        self.protocol = {
            "reference": f"all {len(images):,} held-out pictures of {config.data}",
            "reference_sha256": sha256(Path(config.data) / "val_images.npy"),
            "inception_sha256": sha256(inception),
            "clip_sha256": sha256(clip),
            "clip_prefix": PREFIX,
            "resize": "real pictures: central square, Lanczos; Inception: bilinear to 299, not "
                      f"antialiased; CLIP: Pillow's bicubic to {self.clip_image.side}"}
        features = [self.inception(batch).cpu() for batch in batches(images, self.device)]
        self.mu, self.sigma = mean_and_covariance(torch.cat(features))

    def embed(self, pictures: Iterable[np.ndarray]) -> tuple[float, torch.Tensor]:
        """The FID of pictures, and their CLIP features (n, projection)."""
        features, embedded = [], []
        for batch in batches(pictures, self.device):
            features.append(self.inception(batch).cpu())
            embedded.append(self.clip_image(batch).cpu())
        mu, sigma = mean_and_covariance(torch.cat(features))
        return frechet_distance(mu, sigma, self.mu, self.sigma), torch.cat(embedded)

    def score(self, pictures: tuple[float, torch.Tensor], captions: list[str]) -> dict[str, float]:
        """FID and CLIP scores, after the prefix and bare, of what `embed` gave."""
        fid, embedded = pictures
        scores, length = {"fid": fid}, len(self.clip_text.positional_embedding)
        for name, prefix in (("clip_prefix", PREFIX), ("clip", "")):
            pooled = []
            for i in range(0, len(captions), SCORE_BATCH):      # all features would take 7 GB
                texts = [prefix + caption for caption in captions[i:i + SCORE_BATCH]]
                with exact_float32(self.device):
                    pooled.append(encode_captions(self.clip_text, texts, length)[1].cpu())
            cosines = clip_scores(embedded, torch.cat(pooled))
            scores[name] = 100 * cosines.double().mean().item()
        return scores


def batches(pictures, device):
    """Pictures (S, S, 3) uint8, one by one -> uint8 (B, 3, S, S) on the device."""
    pictures = iter(tqdm(pictures, "scoring", unit="picture"))
    while batch := list(islice(pictures, SCORE_BATCH)):
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device)


def load_picture(path: Path, side: int) -> np.ndarray:
    """(side, side, 3) uint8; UserError for another size, since resizing changes the FID."""
    picture = read_picture(path)
    if picture.size != (side, side):
        raise UserError(f"{path} has {picture.width}x{picture.height} pixels, but the real "
                        f"pictures have {side}x{side}: resize all to that.")
    return np.asarray(picture)


def score_bounds(scorer, cache, pictures, captions, config) -> dict[str, dict]:
    """The real pictures with their captions are a ceiling, with others' captions the floor."""
    real = scorer.embed([cache.val_images[i] for i in pictures])
    bounds = {"real pictures (ceiling)": scorer.score(real, captions)}
    shift = len(captions) // 2                      # neighbours in a folder may be alike
    if cache.meta["dataset"] == "shapes":
        shift, device = 1, choose_device()
        autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder, config.weights)
        mean, _ = torch.from_numpy(cache.val.moments[pictures]).to(device).chunk(2, dim=1)
        decoded = to_uint8(autoencoder.to(device).decode(mean)).permute(0, 2, 3, 1)
        bounds["real, through the autoencoder"] = scorer.score(decoded.cpu().numpy(), captions)
    shuffled = captions[shift:] + captions[:shift]
    bounds["real, captions shuffled (floor)"] = scorer.score(real, shuffled)
    return bounds


# ---- 5. drawing and scoring ----

def choose_prompts(cache: Cache, config: Config) -> tuple[np.ndarray, list[str]]:
    """(n,) held-out pictures of the cache, and one caption of each.

    "first": in the order of the cache (COCO's: by image id), each picture's first caption, as the
    paper's fork of U-ViT. "random": in any order, any of its captions, by the seed, as U-ViT.
    """
    n = config.n or (500 if cache.meta["dataset"] == "shapes" else 30_000)
    pictures, pair, counts = np.unique(cache.val.pairs[:, 0], return_index=True, return_counts=True)
    if config.prompts == "random":
        rng = np.random.default_rng(config.seed)
        pair, order = pair + rng.integers(counts), rng.permutation(len(pictures))
        pictures, pair = pictures[order], pair[order]
    if n > len(pictures):
        print(f"{config.data} has {len(pictures):,} held-out pictures, and all are taken.")
    return pictures[:n], [cache.captions[row] for row in cache.val.pairs[pair[:n], 1]]


def draw_samples(pipeline, paths, captions, config) -> float | None:
    """Draw what is missing of one picture per caption, of seed + i; images/s, or None."""
    folder, size = paths[0].parent, config.batch_size
    lines = [f"{path.name}\t{' '.join(caption.split())}\n"
             for path, caption in zip(paths, captions)]
    index, drawn = folder / "captions.txt", set()
    if index.exists():
        drawn = {*index.read_text("utf-8", "replace").splitlines(keepends=True)}
    missing = [i for i, line in enumerate(lines) if line not in drawn or not paths[i].exists()]
    if not missing:
        return None
    begin = missing[0] // size * size               # the same batches as in an unbroken call
    with writing(index, "w") as file:
        file.writelines(lines[:begin])
    settings = {"guidance_scale": config.guidance_scale, "steps": config.steps}
    began = time.perf_counter()
    for i in tqdm(range(begin, len(paths), size), f"sampling {folder}", unit="batch"):
        part = captions[i:i + size]
        seeds = [config.seed + k for k in range(i, i + len(part))]
        pictures = pipeline.draw(part, seeds, **settings)
        save_pictures(folder, i, pictures, part, seeds, settings)
    return (len(paths) - begin) / (time.perf_counter() - began)


def score_pictures(home, paths, captions, facts, protocol, scorer, cache) -> dict:
    """Score pictures, and write home/eval.json: facts, scores, bounds, warnings, protocol."""
    side, warnings = cache.meta["image_size"], []
    pictures = scorer.embed(load_picture(path, side) for path in paths)
    scores, n = scorer.score(pictures, captions), min(len(paths), len(cache.val_images))
    if "fid" in scores and n < 30_000:
        warnings = [f"FID from {n:,} pictures is not comparable with FID-30k: the fewer the "
                    "pictures, the higher it is; below 2,048 it means little."]
    versions = {library.__name__: library.__version__ for library in (torch, np, scipy, PIL)}
    protocol = {"pictures": len(paths), "cache": cache.meta["config"], **protocol,
                **scorer.protocol, "versions": versions}
    result = {**facts, "scores": scores, "bounds": scorer.bounds, "warnings": warnings,
              "protocol": protocol}
    write_json(home / "eval.json", result)
    return result


def evaluate_checkpoint(config, captions, scorer, cache) -> dict:
    """Draw and score; the latest eval.json is also the checkpoint's."""
    pipeline = Pipeline(config.checkpoint, config.raw, config.weights)
    trained, held = [f"{meta['autoencoder']['kind']} latents of {meta['dataset']} at "
                     f"{meta['image_size']} pixels" for meta in (pipeline.meta, cache.meta)]
    if trained != held:
        raise UserError(f"{config.checkpoint} was trained on {trained}, but --data={config.data} "
                        f"holds {held}: name a cache like its own.")
    net, step, kind = pipeline.net, pipeline.step, "raw" if config.raw else "ema"
    digest, (text, image) = weights_sha256(net), count_multiply_adds(net.config)
    facts = {
        "name": f"{config.checkpoint} at step {step}", "step": step,
        "weights": kind, "weights_sha256": digest, "uvit": asdict(net.config),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "multiply_adds_text": text, "multiply_adds_per_step": image,
        "device": pipeline.device.type, "precision": str(choose_precision(pipeline.device))}
    protocol = asdict(config) | {
        "sampler": "DPM-Solver++(2M)", "guidance": "eps_uncond + w (eps_cond - eps_uncond)",
        "latent_scale": pipeline.latent_scale, "autoencoder": pipeline.meta["autoencoder"],
        "text_tower": pipeline.meta["text_tower"]}
    home = Path(config.out or Path(config.checkpoint).parent)
    folder = home / "eval" / (
        f"step{step}_{kind}_{digest[:8]}_w{config.guidance_scale:.9g}_steps{config.steps}_"
        f"{config.prompts}_seed{config.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        paths = [folder / f"{i:05d}.png" for i in range(len(captions))]
        facts["images_per_second"] = draw_samples(pipeline, paths, captions, config)
        result = score_pictures(folder, paths, captions, facts, protocol, scorer, cache)
    write_json(home / "eval.json", result)
    return result


def evaluate_folder(config, scorer, cache) -> dict:
    """Score anybody's pictures, each with its first caption."""
    folder = Path(config.folder)
    found = list(read_captions(folder).items())[:config.n]
    if not found:
        raise UserError(f"{folder} holds no pictures with captions.")
    paths = [folder / name for name, _ in found]
    captions = [texts[0] for _, texts in found]
    facts, protocol = {"name": config.folder}, {"captions": "the first of each picture"}
    home = Path(config.out or folder)
    return score_pictures(home, paths, captions, facts, protocol, scorer, cache)


# ---- 6. the table ----

def format_row(name, scores, facts) -> dict[str, str]:
    """Heading -> cell; `facts` are those of eval.json, or empty."""
    row = {"model": name, "w": "", "M params": "", "GFLOPs": "", "images/s": ""}
    if "parameters" in facts:
        work = facts["multiply_adds_text"] + facts["multiply_adds_per_step"]
        row["w"] = f"{facts['protocol']['guidance_scale']:g}"
        row["M params"] = f"{facts['parameters'] / 1e6:.2f}"
        row["GFLOPs"] = f"{2 * work / 1e9:.3f}"
    if speed := facts.get("images_per_second"):
        row["images/s"] = f"{speed:.1f}"
    if "fid" in scores:
        row["FID"] = f"{scores['fid']:.2f}"
        row["CLIP, prefix"] = f"{scores['clip_prefix']:.2f}"
        row["CLIP, bare"] = f"{scores['clip']:.2f}"
        return row
    for kind in KINDS:
        shares = [scores[group][kind] for group in ("seen", "unseen")]
        row[kind] = " / ".join("-" if x is None else f"{100 * x:.3g}" for x in shares)
    return row


def print_table(rows: list[dict[str, str]]):
    """In Markdown, with columns that are aligned in a terminal, too."""
    lines = [list(rows[0]), *[list(row.values()) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print(f"| {' | '.join(map(str.ljust, line, widths))} |")


def main(config: Config):
    cache, jobs = read_cache(config.data), []
    if not config.folder:
        scales = config.sweep.split(",") if config.sweep else [config.guidance_scale]
        for path in config.checkpoint.split(","):
            jobs += [replace(config, checkpoint=path.strip(), guidance_scale=w) for w in scales]
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    pictures, captions = choose_prompts(cache, config)
    scorer = ShapesScorer() if cache.meta["dataset"] == "shapes" else RealScorer(cache, config)
    scorer.bounds = score_bounds(scorer, cache, pictures, captions, config)
    results = [evaluate_checkpoint(job, captions, scorer, cache) for job in jobs]
    if config.folder:
        results.append(evaluate_folder(config, scorer, cache))
    rows = [format_row(result["name"], result["scores"], result) for result in results]
    rows += [format_row(name, scores, {}) for name, scores in scorer.bounds.items()]
    print(f"\n{results[0]['protocol']['pictures']:,} pictures\n")
    print_table(rows)
    for warning in results[0]["warnings"]:
        print(f"warning: {warning}")


if __name__ == "__main__":
    run(main, Config)
