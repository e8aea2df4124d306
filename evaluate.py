"""Score pictures: are they what their caption says, and do they look real?

    python evaluate.py --checkpoint=out/shapes/last.pt                          # accuracy on 500 held-out captions
    python evaluate.py --checkpoint=out/early/last.pt,out/shapes/last.pt        # several side by side, in one Markdown table

Shapes can be scored exactly, which replaces the paper's human study of counting: a classical detector reads the objects off each
picture, and a caption is right in its count (as many objects as asked), colour and shape (those asked and no others), relation (the
first object stands where it should), and everything (each object asked is there once, and nothing else). Captions with a combination
that never occurred in training are counted apart ("unseen"). Beside it stand the ceiling, the detector on the real pictures, also after
the autoencoder, and the floor, real pictures with shuffled captions.

Real pictures are scored by two networks with public weights, computed here exactly as by the reference libraries:

    FID         distance between two clouds of Inception features: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))      [FID]
    CLIP score  cosine between a picture's CLIP features and those of the caption it was made from                   [CLIPScore]

out/NAME/eval.json carries the whole protocol beside the scores; the pictures stay in out/NAME/eval/ and are used again.

[FID] arXiv 1706.08500   [CLIP] arXiv 2103.00020   [CLIPScore] arXiv 2104.08718
"""
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from clip_text import CLIPTransformer, read_tower
from model import UserError, count_multiply_adds, load_strictly, read_weights, run
from prepare_data import BACKGROUND, COLOURS, RELATIONS, Cache, Scene, read_cache, scene_of, unseen_scenes
from sample import Pipeline, save_pictures
from vae import load_autoencoder, to_uint8


@dataclass
class Config:
    checkpoint: str = "out/shapes/last.pt"      # or several, separated by commas
    data: str = "data/shapes"                   # the cache whose held-out captions are drawn
    n: int = 500                                # captions, one picture each
    steps: int = 20                             # of the solver
    guidance_scale: float = 3.0                 # w; 1 = no guidance
    seed: int = 0                               # of the first picture; picture i has seed + i
    batch_size: int = 100
    raw: bool = False                           # True: the raw weights instead of their moving average (EMA)
    weights: str = "weights"                    # folder of the public weights


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
        shape = "square" if fill > 0.87 else "circle" if fill > 0.73 else "triangle"
        if inside.sum() > 90 * (len(picture) / 32) ** 2:                        # twice the largest object: several in one
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


def score_shapes(pictures: Iterable[np.ndarray], captions: list[str]) -> dict[str, dict[str, float]]:
    """Share right by kind, for seen and unseen combinations apart; pictures (S, S, 3) uint8."""
    scenes = [scene_of()[caption] for caption in captions]
    results = [(scene in unseen_scenes(), judge_picture(picture, scene)) for picture, scene in zip(pictures, scenes)]
    scores = {}
    for name, group in (("seen", False), ("unseen", True)):
        right = [result for unseen, result in results if unseen == group]
        kinds = ("count", "colour", "shape", "relation", "everything")
        values = {kind: [result[kind] for result in right if kind in result] for kind in kinds}
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


def format_clip_score(cosines: torch.Tensor, model: str) -> str:
    """One line with the three numbers that are called CLIP score: mean cosine, x 100, and 2.5 max(cosine, 0) [CLIPScore]."""
    return (f"cosine {cosines.mean():.4f} | x 100: {100 * cosines.mean():.2f} | x 2.5, each at least 0: "
            f"{2.5 * cosines.clamp(min=0).mean():.4f} | {model}, captions after {PREFIX!r}")


# ---- 4. samples on disk ----

def read_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures and captions of a folder with a captions.txt of lines "name<TAB>caption", in its order."""
    if not (folder / "captions.txt").exists():
        raise UserError(f"{folder} has no captions.txt: expected lines of a picture's name, a tab and its caption.")
    lines = [line.split("\t", 1) for line in (folder / "captions.txt").read_text(encoding="utf-8").splitlines() if line]
    if any(len(line) != 2 for line in lines):
        raise UserError(f"{folder / 'captions.txt'}: expected every line to be a picture's name, a tab and its caption.")
    return [folder / name for name, _ in lines], [caption for _, caption in lines]


def load_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def draw_samples(pipeline: Pipeline, folder: Path, captions: list[str], config: Config) -> float | None:
    """One picture per caption, seeded with seed + i, in `folder`; those already there are kept. Images per second, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    done = len(read_pictures(folder)[0]) if (folder / "captions.txt").exists() else 0
    began, begin = time.perf_counter(), done
    for i in tqdm(range(done, len(captions), config.batch_size), desc=f"sampling {pipeline.path}", unit="batch"):
        part = captions[i:i + config.batch_size]
        seeds = [config.seed + i + k for k in range(len(part))]
        pictures = pipeline.draw(part, seeds, config.steps, config.guidance_scale)
        save_pictures(folder, i, pictures, part, seeds, {"guidance_scale": config.guidance_scale, "steps": config.steps})
    return (len(captions) - begin) / (time.perf_counter() - began) if begin < len(captions) else None


# ---- 5. the whole evaluation ----

def evaluate_shapes(path: str, cache: Cache, captions: list[str], config: Config) -> dict:
    """Draw, judge, and write eval.json beside the checkpoint."""
    pipeline = Pipeline(path, config.raw, config.weights)
    if pipeline.meta["dataset"] != "shapes":
        raise UserError(f"{path} was trained on {pipeline.meta['dataset']!r}; only shapes can be scored so far.")
    kind = "raw" if config.raw else "ema"
    folder = Path(path).parent / "eval" / f"step{pipeline.step}_{kind}_w{config.guidance_scale:g}_steps{config.steps}_seed{config.seed}"
    speed = draw_samples(pipeline, folder, captions, config)
    paths, captions = read_pictures(folder)
    uvit = pipeline.net.config
    text, image = count_multiply_adds(uvit)
    result = {
        "checkpoint": path, "step": pipeline.step, "weights": kind, "fusion": uvit.fusion, "conditioning": uvit.conditioning,
        "parameters": sum(p.numel() for p in pipeline.net.parameters()), "multiply_adds_text": text, "multiply_adds_per_step": image,
        "gflops_per_image": 2 * (text + image) / 1e9, "images_per_second": speed, "device": pipeline.device.type,
        "scores": score_shapes(map(load_picture, paths), captions),
        "protocol": {"pictures": len(captions), "captions": "the first held-out captions, one picture each", "cache": pipeline.meta["config"],
                     "sampler": "DPM-Solver++(2M)", "steps": config.steps, "guidance_scale": config.guidance_scale,
                     "guidance": "eps_uncond + w (eps_cond - eps_uncond)", "seed": config.seed, "detector": "nearest colour, components, fill"}}
    (Path(path).parent / "eval.json").write_text(json.dumps(result, indent=1))
    return result


KINDS = ("count", "colour", "shape", "relation", "everything")


def format_row(name: str, result: dict | None, scores: dict) -> str:
    """A row of the Markdown table."""
    cost = [f"{result['parameters'] / 1e6:.2f}", f"{result['gflops_per_image']:.3f}",
            f"{result['images_per_second']:.1f}" if result["images_per_second"] else ""] if result else [""] * 3
    shares = ["" if scores[group][kind] is None else f"{100 * scores[group][kind]:.1f}" for group in ("seen", "unseen") for kind in KINDS]
    return f"| {' | '.join([name, *cost, *shares])} |"


def main(config: Config):
    checkpoints = config.checkpoint.split(",")
    cache = read_cache(config.data)
    if cache.meta["dataset"] != "shapes":
        raise UserError(f"--data={config.data} holds {cache.meta['dataset']!r}; only shapes can be scored so far.")
    n = min(config.n, len(cache.val.pairs))
    captions = [cache.captions[row] for row in cache.val.pairs[:n, 1]]
    results = [evaluate_shapes(path, cache, captions, config) for path in checkpoints]

    real = np.load(Path(config.data) / "val_images.npy", mmap_mode="r", allow_pickle=False)[:n]
    autoencoder = load_autoencoder(cache.meta["autoencoder"], cache.autoencoder, config.weights)
    mean = torch.from_numpy(cache.val.moments[:n]).chunk(2, dim=1)[0]
    decoded = to_uint8(autoencoder.decode(mean)).permute(0, 2, 3, 1).numpy()
    bounds = {"real pictures (ceiling)": score_shapes(real, captions),
              "real, through the autoencoder": score_shapes(decoded, captions),
              "real, captions shuffled (floor)": score_shapes(real, captions[1:] + captions[:1])}
    head = ["model", "M parameters", "GFLOPs", "images/s", *(f"{kind}, {group}" for group in ("seen", "unseen") for kind in KINDS)]
    print(f"\nShare right in % of {n} held-out captions, w = {config.guidance_scale:g}, {config.steps} steps; GFLOPs per image and "
          f"step (2 x multiply-adds):\n")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for path, result in zip(checkpoints, results):
        print(format_row(f"{path} at step {result['step']}", result, result["scores"]))
    for name, scores in bounds.items():
        print(format_row(name, None, scores))
    print("\nFID and CLIP score need the public Inception and CLIP weights, and are not computed for the shapes.")


if __name__ == "__main__":
    run(main, Config)
