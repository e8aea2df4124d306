"""Score pictures: are they what their caption says, and do they look real?

    python evaluate.py --checkpoint=out/shapes/last.pt                      # 500 held-out captions
    python evaluate.py --checkpoint=out/early/last.pt,out/shapes/last.pt    # several, in one table
    python evaluate.py --checkpoint=out/coco/best.pt --data=data/coco --steps=50 --guidance_scale=2

Shapes are scored exactly, by a detector that reads the objects off each picture: right are count,
colour and shape (those asked and no others), relation, everything (each object asked is there once,
nothing else). "99 / 96" are % right of combinations seen in training / never seen. For real ones:

    FID         |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Inception features           [FID]
    CLIP score  cosine x 100 between CLIP's features of a picture and of its caption    [CLIPScore]

The FID is against all held-out pictures of the cache. The ceiling is the score of as many of these,
the floor theirs with captions of others. What is drawn stays in out/NAME/eval/, for the same code
to use again, with scores and protocol in eval.json; out/NAME/eval.json is the latest.
[FID] arXiv 1706.08500   [CLIP] arXiv 2103.00020   [CLIPScore] arXiv 2104.08718
"""
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from clip_text import CLIPTransformer, encode_captions, load_clip_text, read_tower
from model import (Constants, FilePath, Natural, Size, UserError, choose_device,
                   choose_precision, load_frozen, one_writer, read_weights, reading, run,
                   sha256, weights_sha256, write_json)
from prepare_data import (BACKGROUND, COLOURS, RELATIONS, digest, fetch, read_cache,
                          read_picture, same_data, scene_of, unseen_scenes)
from sample import GuidanceScale, Pipeline, SolverSteps, draw_files


@dataclass
class Config(Constants):
    checkpoint: FilePath = "out/shapes/last.pt"  # or several: A.pt,B.pt
    data: FilePath = "data/shapes"  # cache of held-out captions
    n: Annotated[int, 2, 10 ** 6] | None = None  # None: 500 shapes or 30,000
    steps: SolverSteps = 20  # U-ViT: 50
    guidance_scale: GuidanceScale = 3.0  # w; 1 = none; U-ViT: 2, which it calls 1
    seed: Natural = 0  # picture i has seed + i
    batch_size: Size = 100  # of the sampler
    weights: FilePath = "weights"  # the public weights
    inception: FilePath | None = None  # weights of the FID
    clip: FilePath | None = None  # weights of the CLIP score
    out: FilePath | None = None  # of the results


# ---- 1. shapes: reading a picture back ----
KINDS = ("count", "colour", "shape", "relation", "everything")
PALETTE = np.array(list(COLOURS.values()), np.float64) - BACKGROUND  # (6, 3)


def nearest_shape(cover):
    """The shape whose picture in the same box differs least from `cover` (H, W), 1 inside to 0."""
    H, W = cover.shape

    def places(profile):  # 4 in a pixel; box: -1 to 1
        n = len(profile)
        middle = (profile * (np.arange(n) + 0.5)).sum() / profile.sum()
        return 2 * ((np.arange(4 * n) + 0.5) / 4 - middle) / profile.sum()
    y, x = places(cover.max(axis=1))[:, None], places(cover.max(axis=0))
    shapes = {"circle": x ** 2 + y ** 2 <= 1,
              "square": np.maximum(abs(x), abs(y)) <= 1,
              "triangle": (2 * abs(x) <= y + 1) & (y <= 1)}
    errors = {}
    for name, inside in shapes.items():
        drawn = inside.reshape(H, 4, W, 4).mean(axis=(1, 3))
        errors[name] = ((drawn - cover) ** 2).sum()
    return min(errors, key=errors.get)


def detect_objects(picture):
    """The objects of a shapes picture (S, S, 3) uint8: (colour, shape, y, x) of each.
    An object is a connected component of what is not background, but for specks. Its colour is
    the palette's nearest to its most colourful half."""
    away = picture.astype(np.float64) - BACKGROUND
    distance = np.linalg.norm(away, axis=-1)
    square, objects = np.ones((3, 3)), []
    labels, _ = ndimage.label(distance > 90, square)
    unit = (len(picture) / 32) ** 2  # areas are at a side of 32
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == label
        area = inside.sum() / unit
        if area < 10:
            continue
        core = away[inside & (distance >= np.median(distance[inside]))]
        errors = np.linalg.norm(core[:, None] - PALETTE, axis=-1)  # (pixels, 6)
        colour = np.bincount(errors.argmin(axis=1)).argmax()
        pure = PALETTE[colour]
        near = ndimage.binary_dilation(inside, square)  # with its soft edge
        cover = np.clip(away @ pure / (pure @ pure), 0, 1) * near
        shape = nearest_shape(cover[ndimage.find_objects(near.astype(int))[0]])
        if area > 120:  # twice the largest: several
            shape = "blob"
        y, x = [(side.start + side.stop) / 2 for side in box]
        objects.append((list(COLOURS)[colour], shape, y, x))
    return objects


def judge_picture(picture, scene):
    """Which KINDS are right in a picture (S, S, 3) uint8; a scene may have no "relation"."""
    objects, asked = detect_objects(picture), scene.objects
    found = [(colour, shape) for colour, shape, _, _ in objects]
    right = {"count": len(found) == len(asked)}
    for i, kind in enumerate(("colour", "shape")):
        right[kind] = {thing[i] for thing in found} == {thing[i] for thing in asked}
    if scene.relation:
        down, across = RELATIONS[scene.relation]
        places = {(colour, shape): (y, x) for colour, shape, y, x in objects}
        first, second = [places.get(thing, (np.nan, np.nan)) for thing in asked]
        dy, dx = np.subtract(first, second)  # nan: is missing
        right["relation"] = bool(dy * down > abs(dx) if down else dx * across > abs(dy))
    right["everything"] = sorted(found) == sorted(asked) and right.get("relation", True)
    return right


def score_shapes(pictures, captions):
    """Share right by kind, of seen and of unseen scenes, in pictures (S, S, 3) uint8."""
    groups, scores = {"seen": [], "unseen": []}, {}
    for picture, caption in zip(pictures, captions):
        scene = scene_of().get(caption)
        if scene is None:
            raise UserError(f"{caption!r} is not a caption of the shapes dataset.")
        right = judge_picture(picture, scene)
        groups["unseen" if scene in unseen_scenes() else "seen"].append(right)
    for name, group in groups.items():
        scores[name] = {"pictures": len(group)}
        for kind in KINDS:
            values = [right[kind] for right in group if kind in right]
            scores[name][kind] = float(np.mean(values)) if values else None
    return scores


# ---- 2. FID ----
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_LAYOUT = "e962123329df4d94"
LAYER = ("conv/weight", "bn/running_mean", "bn/running_var", "bn/weight", "bn/bias")
HALVE = nn.MaxPool2d(3, stride=2)
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def exact_float32(images):
    """Without TensorFloat-32, from now on, and autocast: scores depend on the pictures alone."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(f"expected uint8 (B, 3, H, W), not {images.dtype} {[*images.shape]}.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.autocast(images.device.type, enabled=False)


class Inception(nn.Module):
    """The FID's Inception v3, TensorFlow's of 2015-12-05; sizes are those of the weights.
    torchvision's has other weights, average pools that count the padding, and an average in
    Mixed_7c, where the maximum is an old slip that every published FID contains."""

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "/"), tensor.float())

    def conv(self, x, name, stride=1, padding="same"):
        """Convolution, batch norm, ReLU."""
        kernel, *norm = [self.get_buffer(f"{name}/{part}") for part in LAYER]
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, *norm, eps=0.001))

    def chain(self, x, name, layers, *last):
        """Layers name_1, name_2, ...; `last` are the stride and padding of the last one."""
        for i in range(1, layers):
            x = self.conv(x, f"{name}_{i}")
        return self.conv(x, f"{name}_{layers}", *last)

    def mixed(self, x, block, pool=AVERAGE, halves=("",), **chains):
        """Branches, concatenated; `chains` are name=layers, the last in two `halves` or whole."""
        branches = [self.conv(x, f"{block}/branch1x1")]
        for name, layers in chains.items():
            y = self.chain(x, f"{block}/{name}", layers - 1)
            for half in halves:
                branches.append(self.conv(y, f"{block}/{name}_{layers}{half}"))
        branches.append(self.conv(pool(x), f"{block}/branch_pool"))
        return torch.cat(branches, dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048), resized as in pytorch-fid: not antialiased."""
        with exact_float32(images):
            x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear")
            x = self.conv(2 * x - 1, "Conv2d_1a_3x3", 2, "valid")
            x = self.conv(x, "Conv2d_2a_3x3", 1, "valid")
            x = HALVE(self.conv(x, "Conv2d_2b_3x3"))  # (B, 64, 73, 73)
            x = self.conv(x, "Conv2d_3b_1x1")
            x = HALVE(self.conv(x, "Conv2d_4a_3x3", 1, "valid"))  # (B, 192, 35, 35)
            for i in "bcd":
                x = self.mixed(x, f"Mixed_5{i}", branch5x5=2, branch3x3dbl=3)
            three = self.conv(x, "Mixed_6a/branch3x3", 2, "valid")
            double = self.chain(x, "Mixed_6a/branch3x3dbl", 3, 2, "valid")
            x = torch.cat([three, double, HALVE(x)], dim=1)  # (B, 768, 17, 17)
            for i in "bcde":
                x = self.mixed(x, f"Mixed_6{i}", branch7x7=3, branch7x7dbl=5)
            three = self.chain(x, "Mixed_7a/branch3x3", 2, 2, "valid")
            seven = self.chain(x, "Mixed_7a/branch7x7x3", 4, 2, "valid")
            x = torch.cat([three, seven, HALVE(x)], dim=1)  # (B, 1280, 8, 8)
            for i, pool in ("b", AVERAGE), ("c", nn.MaxPool2d(3, 1, 1)):
                x = self.mixed(x, f"Mixed_7{i}", pool, "ab", branch3x3=2, branch3x3dbl=3)
            return x.mean((2, 3))


def load_inception(path: str | Path) -> Inception:
    """pytorch-fid's weight file, strictly but for the unused classifier; raises UserError."""
    with reading(path, f"pytorch-fid's weights ({INCEPTION})"):
        weights = {name: tensor for name, tensor in read_weights(path).items()
                   if not name.startswith("fc.") and "tracked" not in name}
        layout = sorted((name, *tensor.shape) for name, tensor in weights.items())
        if digest(layout)[:16] != INCEPTION_LAYOUT:
            raise ValueError("other names or shapes")
        return Inception(weights)


def mean_and_covariance(features):
    """(n, D) -> (D,), (D, D) float64 arrays."""
    x = features.double().numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of float64 arrays [FID].
    With sigma = root root^T, the last trace is the sum of the singular values of root1^T root2:
    real, never negative, and exact even for fewer pictures than features. It takes 6 s."""
    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))  # rounding makes some negative
    overlap = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return float(np.maximum(distance, 0))


# ---- 3. CLIP score ----
CLIP = "clip-vit-large-patch14.bin"
PREFIX = "A photo depicts "  # before each caption [CLIPScore]


def preprocess(images, side):
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side), as CLIP saw its training pictures: through
    Pillow's bicubic filter. torch's, which does not round to 8 bits, gives another score."""
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
        self.side = patch_size * int((tokens - 1) ** 0.5)  # 224 in ViT-L/14
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = CLIPTransformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, projection))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> features (B, projection) in float32."""
        with exact_float32(images):
            x = self.conv1(preprocess(images, self.side)).flatten(2).mT  # (B, N, width)
            start = self.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([start, x], dim=1) + self.positional_embedding  # (B, 1+N, width)
            x = self.transformer(self.ln_pre(x))
            return self.ln_post(x[:, 0]) @ self.proj


def load_clip_image(path: str | Path) -> CLIPImage:
    """The image tower, of any size, of the files that `load_clip_text` reads; raises UserError."""
    with reading(path, "a CLIP model with an image tower"):
        state, sizes = read_tower(path, "image")
        net = CLIPImage(**sizes, projection=state["proj"].shape[1],
                        patch_size=state["conv1.weight"].shape[-1],
                        tokens=len(state["positional_embedding"]))
        return load_frozen(net, state)


# ---- 4. scorers ----
SCORE_BATCH = 50  # whatever the --batch_size
SHAPES_SCORER = SimpleNamespace(protocol={"detector": "best shape"}, embed=list, score=score_shapes)


class RealScorer:
    """FID against all held-out pictures of a cache, and CLIP score."""

    def __init__(self, cache, config):
        inception = config.inception or fetch(INCEPTION, config.weights)
        clip = config.clip or fetch(CLIP, config.weights)
        self.device = choose_device()
        self.inception = load_inception(inception).to(self.device)
        self.clip_image = load_clip_image(clip).to(self.device)
        self.clip_text = load_clip_text(clip).to(self.device)
        self.protocol = {
            "reference": f"all held-out pictures of {config.data}", "clip_prefix": PREFIX,
            "reference_sha256": sha256(f"{config.data}/val_images.npy"),
            "inception_sha256": sha256(inception), "clip_sha256": sha256(clip),
            "resize": "real: Lanczos; FID: bilinear, 299; CLIP: bicubic"}
        self.reference = self.embed(cache.val_images)[0]

    def embed(self, pictures):
        """Pictures (S, S, 3) uint8 -> their mean and covariance, CLIP features (n, projection)."""
        features, embedded = [], []
        pictures = iter(tqdm(pictures, "scoring"))
        while batch := list(islice(pictures, SCORE_BATCH)):
            images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
            features.append(self.inception(images).cpu())
            embedded.append(self.clip_image(images).cpu())
        return mean_and_covariance(torch.cat(features)), torch.cat(embedded)

    def score(self, embedded, captions):
        """FID and CLIP scores, after the prefix and bare."""
        moments, images = embedded
        scores = {"fid": frechet_distance(*moments, *self.reference)}
        length = len(self.clip_text.positional_embedding)
        for name, prefix in ("clip_prefix", PREFIX), ("clip", ""):
            cosines = []
            for i in range(0, len(captions), SCORE_BATCH):
                part = slice(i, i + SCORE_BATCH)
                prefixed = [prefix + caption for caption in captions[part]]
                texts = encode_captions(self.clip_text, prefixed, length)[1].cpu()
                cosines.append(F.cosine_similarity(images[part], texts))
            scores[name] = 100 * torch.cat(cosines).double().mean().item()
        return scores


def score_bounds(scorer, cache, pictures, captions):
    """Real pictures with their captions are a ceiling, with those of unlike ones the floor."""
    real = scorer.embed([cache.val_images[i] for i in pictures])
    # of shapes the next, which is unseen if this is seen; of COCO far away, as some repeat
    shift = 1 if cache.meta["dataset"] == "shapes" else len(captions) // 2
    others = captions[shift:] + captions[:shift]
    return {"real pictures (ceiling)": scorer.score(real, captions),
            "real, captions shuffled (floor)": scorer.score(real, others)}


# ---- 5. drawing, scoring, the table ----
def choose_prompts(cache, config):
    """The first n held-out pictures, or all, and the first caption of each, as U-ViT's fork."""
    n = config.n or (500 if cache.meta["dataset"] == "shapes" else 30_000)
    pictures, first = np.unique(cache.val_pairs[:, 0], return_index=True)
    return pictures[:n], [cache.captions[row] for row in cache.val_pairs[first[:n], 1]]


def evaluate_checkpoint(pipeline, config, captions, scorer, bounds, cache):
    """Draw and score; the latest eval.json is also the checkpoint's."""
    step, w = pipeline.step, config.guidance_scale
    weights, *rest = map(weights_sha256, (pipeline.net, pipeline.autoencoder, pipeline.text_tower))
    files = "clip_text", "model", "sample", "vae"
    code = [sha256(Path(__file__).with_name(f"{name}.py")) for name in files]
    made_of = digest([weights, rest, code, cache.meta["files"]])[:8]
    home = Path(config.out or Path(config.checkpoint).parent)
    folder = home / f"eval/step{step}_{made_of}_w{w:.9g}_steps{config.steps}_seed{config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        paths = draw_files(pipeline, folder, captions, config)
        pictures = (np.asarray(read_picture(path)) for path in paths)
        result = {
            "name": f"{config.checkpoint} at step {step}",
            "scores": scorer.score(scorer.embed(pictures), captions), "bounds": bounds,
            "protocol": asdict(config) | scorer.protocol | {
                "pictures": len(paths), "captions": "first of each picture", "step": step,
                "averaged": True, "weights_sha256": weights, "trained_on": pipeline.meta,
                "sampler": "DPM-Solver++(2M), eps_uncond + w (eps_cond - eps_uncond)",
                "precision": str(choose_precision(pipeline.device)), "torch": torch.__version__}}
        write_json(folder / "eval.json", result)
        write_json(folder / "latest.json", result)
        (folder / "latest.json").replace(home / "eval.json")
    return result


def format_row(result):
    """Heading -> cell, of an eval.json, or of a bound."""
    scores, protocol = result["scores"], result.get("protocol", {})
    row = {"model": result["name"], "w": str(protocol.get("guidance_scale", ""))}
    if "fid" in scores:
        return row | {key: f"{value:.2f}" for key, value in scores.items()}
    for kind in KINDS:
        shares = [scores[group][kind] for group in ("seen", "unseen")]
        row[kind] = " / ".join("-" if x is None else f"{100 * x:.3g}" for x in shares)
    return row


def print_table(rows):
    for cells in (rows[0], ["---"] * len(rows[0]), *[row.values() for row in rows]):
        print(f"| {' | '.join(cells)} |")


def main(config: Config):
    cache = read_cache(config.data)
    shapes, jobs = cache.meta["dataset"] == "shapes", []
    for path in config.checkpoint.split(","):
        pipeline = Pipeline(path, config.weights)
        same = all(pipeline.meta.get(key) == cache.meta[key] for key in ("dataset", "image_size"))
        if not same or cache.meta["dataset"] == "folder" and same_data(pipeline.meta, cache.meta):
            raise UserError(f"{path} was not trained on pictures as in {config.data}: name --data.")
        jobs.append((pipeline, replace(config, checkpoint=path)))
    pictures, captions = choose_prompts(cache, config)
    scorer = SHAPES_SCORER if shapes else RealScorer(cache, config)
    bounds = score_bounds(scorer, cache, pictures, captions)
    results = [evaluate_checkpoint(*job, captions, scorer, bounds, cache) for job in jobs]
    unit = "; % right of seen / unseen combinations" if shapes else ""
    print(f"\n{len(captions):,} pictures{unit}\n")
    results += [{"name": name, "scores": scores} for name, scores in bounds.items()]
    print_table([format_row(result) for result in results])
    if not shapes and len(captions) < 30_000:
        print("warning: not comparable with FID-30k: fewer pictures have a higher FID.")


if __name__ == "__main__":
    run(main, Config)
