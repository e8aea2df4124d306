"""Pictures and captions -> a cache of latents and text features in data/NAME/, which is all that train.py reads.

    python prepare_data.py                         # captioned shapes, drawn here, no download (train.py does it by itself)
    python prepare_data.py --image_size=64         # the same at 64x64: 256 image tokens, as in the paper

    pictures --crop, resize--> (3, S, S) --autoencoder--> moments (2C, h, w)      train_moments.npy, val_moments.npy
    captions --tokenize--> (77,) ids     --text tower---> features (L, E)         text.npy, one row per distinct caption

The autoencoder and the text tower are frozen, so each picture and each caption goes through them once. Moments are cached,
not samples: the latent is drawn anew at every access, and nothing random is frozen in.

    meta.json                 written last: a folder without it is not a cache, and preparing again goes on where it stopped
    captions.txt, text.npy    row i of the features belongs to line i; row 0 is the empty caption, the null context
    train_pairs.npy           (K, 2): picture, caption row; sorted by picture, which may have several captions
    val_images.npy            (M, S, S, 3) uint8: the held-out pictures, for reference scores
    preview.png               look at it before you train

The shapes: one to five circles, squares and triangles in six colours, captioned by number ("three red circles and two blue
squares") or by place ("a red circle to the left of a blue square"). A fixed tenth of the combinations never occurs in
training, and `parse_caption` reads a caption back, so that evaluate.py can check every picture against its caption.
"""
import dataclasses
import json
import os
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from clip_text import count_truncated, random_clip_text, tokenize, weights_sha256
from model import UserError, run
from sample import draw_grid
from vae import LinearAutoencoder, sample_latent, to_uint8, to_unit


@dataclass
class Config:
    dataset: str = "shapes"         # the only one so far
    out: str = ""                   # folder of the cache; "" = data/DATASET
    image_size: int = 32            # S, side of the pictures in pixels; a multiple of 32
    context_len: int = 16           # L, text tokens; a shapes caption has at most 12, start and end included
    train_images: int = 20_000
    val_images: int = 1_000         # held-out pictures, every other one with an unseen combination
    seed: int = 0                   # of the shapes


CACHE_FORMAT = "midfuse-cache-1"
# Most of a shapes picture is background, so that at standard deviation 1 its few objects would show through the noise even at
# t = 1000, and a sampler, which starts from noise alone, would start where training never was.
LATENT_STD = 0.5


# ---- 1. captioned shapes ----

BACKGROUND = (245, 245, 240)
COLOURS = {"red": (225, 45, 45), "green": (40, 165, 70), "blue": (45, 85, 225), "yellow": (245, 200, 30),
           "purple": (160, 50, 190), "cyan": (40, 190, 215)}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three", "four", "five")
RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}   # (rows, columns)


@dataclass(frozen=True)
class Scene:
    """What a caption says: groups of (count, colour, shape), and where the first is relative to the second, or ""."""
    groups: tuple[tuple[int, str, str], ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        if self.relation:
            (_, colour, shape), (_, other_colour, other_shape) = self.groups
            return f"a {colour} {shape} {self.relation} a {other_colour} {other_shape}"
        return " and ".join(f"{COUNTS[count - 1]} {colour} {shape}{'s' * (count > 1)}" for count, colour, shape in self.groups)

    @property
    def objects(self) -> list[tuple[str, str]]:
        """(colour, shape) of every object, in the order of the caption."""
        return [(colour, shape) for count, colour, shape in self.groups for _ in range(count)]


@cache
def list_scenes() -> tuple[list[Scene], list[Scene], list[Scene]]:
    """Every scene there is: 90 of one group, 3,060 of two groups with at most five objects, 1,224 relations."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    one = [Scene(((count, *kind),)) for count in range(1, 6) for kind in kinds]
    two = [Scene(((count, *first), (total - count, *second)))
           for total in range(2, 6) for count in range(1, total) for first, second in permutations(kinds, 2)]
    relations = [Scene(((1, *first), (1, *second)), relation)
                 for relation in RELATIONS for first, second in permutations(kinds, 2)]
    return one, two, relations


@cache
def scene_of() -> dict[str, Scene]:
    """Caption -> scene, for all captions of the shapes dataset."""
    return {scene.caption: scene for family in list_scenes() for scene in family}


@cache
def unseen_scenes() -> frozenset[Scene]:
    """The scenes with a combination that never occurs in training, whatever the seed.

    A fixed tenth of the 90 (count, colour, shape), with every pair of groups that holds one of them, and of the 1,224 relations.
    """
    def tenth(scenes):
        order = np.random.default_rng(2403_16530).permutation(len(scenes))
        return [scenes[i] for i in order[:len(scenes) // 10]]
    one, two, relations = list_scenes()
    groups = {scene.groups[0] for scene in tenth(one)}
    return frozenset([scene for scene in one + two if groups & {*scene.groups}] + tenth(relations))


def choose_scene(rng: np.random.Generator, unseen: bool) -> Scene:
    """A random scene, seen or unseen: 30% have one group, 30% two groups, 40% a relation."""
    family = list_scenes()[rng.choice(3, p=(0.3, 0.3, 0.4))]
    while True:
        scene = family[rng.integers(len(family))]
        if (scene in unseen_scenes()) == unseen:
            return scene


def place_objects(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A cell (row, column) of a 3x3 board for each object: a relation along a line, a count in reading order."""
    if scene.relation:
        rows, columns = RELATIONS[scene.relation]
        line, (near, far) = rng.integers(3), np.sort(rng.choice(3, size=2, replace=False))
        first, second = (near, far) if rows + columns < 0 else (far, near)
        return [(first, line), (second, line)] if rows else [(line, first), (line, second)]
    return [divmod(cell, 3) for cell in np.sort(rng.choice(9, size=len(scene.objects), replace=False))]


def draw_scene(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """The picture of a scene, anti-aliased: (size, size, 3) uint8. All lengths below are for a picture of side 32."""
    zoom = 8                                                        # drawn 8 times larger, then averaged
    image = Image.new("RGB", (size * zoom, size * zoom), BACKGROUND)
    canvas, unit = ImageDraw.Draw(image), size * zoom / 32
    for (row, column), (colour, shape) in zip(place_objects(scene, rng), scene.objects):
        y, x = [(16 + 10.5 * (cell - 1) + rng.uniform(-0.75, 0.75)) * unit for cell in (row, column)]
        r = rng.uniform(3.4, 3.9) * unit
        if shape == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=COLOURS[colour])
        else:
            canvas.polygon([(x, y - 1.1 * r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=COLOURS[colour])
    return np.asarray(image.reduce(zoom))


class Shapes:
    """A split of the shapes dataset: picture i is a function of (seed, split, i), on any machine."""

    def __init__(self, config: Config, split: str):
        self.size, self.key = config.image_size, (config.seed, ["train", "val"].index(split))
        count = config.train_images if split == "train" else config.val_images
        rng = np.random.default_rng(self.key)
        self.scenes = [choose_scene(rng, unseen=split == "val" and i % 2 == 1) for i in range(count)]
        self.captions = [[scene.caption] for scene in self.scenes]

    def load(self, i: int) -> np.ndarray:
        return draw_scene(self.scenes[i], np.random.default_rng((*self.key, i)), self.size)


# ---- 2. the cache ----

@dataclass
class Split:
    """One split of a cache: moments (M, 2C, h, w) float32, and pairs (K, 2) of picture and text row, sorted by picture."""
    moments: np.ndarray
    pairs: np.ndarray


@dataclass
class Cache:
    """A cache as train.py and evaluate.py read it; the large arrays stay on disk until they are indexed."""
    meta: dict
    captions: list[str]             # R distinct captions; the first is the empty one
    text: np.ndarray                # (R, L, E) float16, their features; row 0 is the null context
    autoencoder: dict               # state dict of the linear autoencoder, or empty
    train: Split
    val: Split


def read_cache(folder: str | Path) -> Cache:
    """Open a finished cache; raises UserError for anything else."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} is not a finished cache (it has no meta.json): run python prepare_data.py; if it was interrupted, "
                        f"the same command as before goes on where it stopped.")
    meta = json.loads((folder / "meta.json").read_text())
    if meta["format"] != CACHE_FORMAT:
        raise UserError(f"{folder} has format {meta['format']}, and this code reads {CACHE_FORMAT}: delete it and prepare again.")
    def array(name):
        return np.load(folder / name, mmap_mode="c", allow_pickle=False)
    autoencoder = {}
    if (folder / "autoencoder.npz").exists():
        with np.load(folder / "autoencoder.npz", allow_pickle=False) as file:
            autoencoder = {key: torch.from_numpy(file[key]) for key in file.files}
    splits = [Split(array(f"{split}_moments.npy"), np.asarray(array(f"{split}_pairs.npy"))) for split in ("train", "val")]
    return Cache(meta, (folder / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1], array("text.npy"), autoencoder, *splits)


def write_json(path: Path, content: dict):
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


class Progress:
    """Arrays that are filled in parts; how far each has come is in progress.json, so that an interrupted call goes on there."""
    PART = 512

    def __init__(self, folder: Path, config: Config):
        self.path, self.state = folder / "progress.json", {"config": dataclasses.asdict(config), "rows": {}}
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if old["config"] == self.state["config"]:
                self.state = old
            else:
                print(f"{folder} was begun with other constants; it is made anew.")

    def fill(self, name: str, shape: tuple, dtype, produce):
        """folder/name.npy of `shape`, in which produce(i, j) gives rows i..j-1."""
        rows, path = self.state["rows"], self.path.parent / f"{name}.npy"
        begin = rows.get(name, 0) if path.exists() else 0
        array = np.lib.format.open_memmap(path, mode="r+" if begin else "w+", dtype=dtype, shape=shape)
        with tqdm(total=shape[0], initial=begin, desc=name, unit="row") as bar:
            for i in range(begin, shape[0], self.PART):
                j = min(i + self.PART, shape[0])
                array[i:j] = produce(i, j)
                array.flush()
                rows[name] = j
                write_json(self.path, self.state)
                bar.update(j - i)
        return array


@torch.no_grad()
def main(config: Config):
    if config.dataset != "shapes":
        raise UserError(f"--dataset={config.dataset}: expected shapes.")
    if config.image_size % 32 or config.image_size < 32:
        raise UserError(f"--image_size={config.image_size}: expected a multiple of 32.")
    folder = Path(config.out or f"data/{config.dataset}")
    if (folder / "meta.json").exists():
        made_with = json.loads((folder / "meta.json").read_text())["config"]
        if made_with != dataclasses.asdict(config):
            raise UserError(f"{folder} was made with {made_with}: to keep it, name another folder with --out=FOLDER; else delete it.")
        return print(f"{folder} is complete; nothing to do.")
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, config)

    # pictures -> moments
    train, val = Shapes(config, "train"), Shapes(config, "val")
    def pictures(source, i, j):
        return torch.from_numpy(np.stack([source.load(k) for k in range(i, j)])).permute(0, 3, 1, 2)    # (B, 3, S, S) uint8
    sample = min(4096, len(train.captions))
    autoencoder = LinearAutoencoder().fit(to_unit(pictures(train, 0, sample)))
    np.savez(folder / "autoencoder.npz", **{key: value.numpy() for key, value in autoencoder.state_dict().items()})
    latent_shape = (autoencoder.CHANNELS, config.image_size // autoencoder.PATCH, config.image_size // autoencoder.PATCH)
    moments_shape = (2 * latent_shape[0], *latent_shape[1:])
    def moments(source):
        return lambda i, j: autoencoder.encode(to_unit(pictures(source, i, j))).numpy()
    train_moments = progress.fill("train_moments", (len(train.captions), *moments_shape), np.float32, moments(train))
    progress.fill("val_moments", (len(val.captions), *moments_shape), np.float32, moments(val))
    progress.fill("val_images", (len(val.captions), config.image_size, config.image_size, 3), np.uint8,
                  lambda i, j: np.stack([val.load(k) for k in range(i, j)]))

    # captions -> features, once for each distinct one; the empty caption comes first
    captions = ["", *sorted({caption for source in (train, val) for captions in source.captions for caption in captions} - {""})]
    row = {caption: i for i, caption in enumerate(captions)}
    (folder / "captions.txt").write_text("".join(caption + "\n" for caption in captions), encoding="utf-8")
    for split, source in (("train", train), ("val", val)):
        pairs = [(i, row[caption]) for i, captions_of in enumerate(source.captions) for caption in captions_of]
        np.save(folder / f"{split}_pairs.npy", np.array(pairs, dtype=np.int64))
    text_tower = random_clip_text(config.seed, config.context_len)
    progress.fill("text", (len(captions), config.context_len, text_tower.ln_final.normalized_shape[0]), np.float16,
                  lambda i, j: text_tower(tokenize(captions[i:j], config.context_len))[0].numpy())
    truncated = count_truncated(captions, config.context_len)
    if truncated:
        print(f"{truncated} captions are longer than {config.context_len} tokens and were cut short.")

    # the scale that brings the latents of all training pictures to standard deviation LATENT_STD
    total, squares, size = 0.0, 0.0, 0
    for i in range(0, len(train_moments), Progress.PART):
        part = torch.from_numpy(train_moments[i:i + Progress.PART])
        z = sample_latent(part, torch.randn(len(part), *latent_shape, generator=torch.Generator().manual_seed(i))).double()
        total, squares, size = total + z.sum().item(), squares + z.square().sum().item(), size + z.numel()
    mean = total / size
    scale = LATENT_STD * (squares / size - mean ** 2) ** -0.5

    draw_grid(to_uint8(autoencoder.decode(sample_latent(torch.from_numpy(train_moments[:24]), torch.zeros(24, *latent_shape)))),
              [source_captions[0] for source_captions in train.captions[:24]], columns=8).save(folder / "preview.png")
    write_json(folder / "meta.json", {
        "format": CACHE_FORMAT, "dataset": config.dataset, "image_size": config.image_size, "config": dataclasses.asdict(config),
        "train_images": len(train.captions), "val_images": len(val.captions), "captions": len(captions), "truncated": truncated,
        "null_context": "row 0 of text.npy, the empty caption", "latent_shape": latent_shape, "latent_scale": scale, "latent_mean": mean, "latent_std": LATENT_STD,
        "autoencoder": {"kind": "linear", "about": "closed-form principal components of 4x4 patches, a stand-in for the KL autoencoder"},
        "text_tower": {"kind": "random", "seed": config.seed, "context_len": config.context_len, "sha256": weights_sha256(text_tower),
                       "about": "small, random and frozen, a stand-in for CLIP's"}})
    (folder / "progress.json").unlink()
    print(f"{folder}: {len(train.captions):,} training and {len(val.captions):,} held-out pictures, {len(captions):,} distinct captions; "
          f"latents {latent_shape}, scale {scale:.4f}. Look at {folder / 'preview.png'}.")


if __name__ == "__main__":
    run(main, Config)
