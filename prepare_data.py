"""Pictures and captions -> data/NAME/, a cache of latents and text features for train.py.

    python prepare_data.py                                  # captioned shapes (train.py runs this)
    python prepare_data.py --dataset=coco                   # MS-COCO: 22 GB fetched, 62 GB cached
    python prepare_data.py --dataset=folder --pictures=DIR  # your own pictures and captions
    python prepare_data.py --autoencoder=kl --text_tower=clip --image_size=256 --out=data/shapes256

    pictures --crop, resize--> (3, S, S) --autoencoder--> moments (2C, h, w)
    captions --tokenize--> (L,) ids --text tower--> features (L, E)

The autoencoder and the text tower are frozen, so each picture and each caption goes through them
once. Moments are cached, not samples: a latent is drawn anew at every access. The public weights
(2 GB) and COCO are downloaded if they are not there. Killed at any point, the same command goes on
where it stopped.

    meta.json                 written last: a folder without it is not a cache
    captions.txt, text.npy    row i for line i; row 0 is the empty caption, the null context
    train_moments.npy         (N, 2C, h, w); and val_moments.npy, of the M held-out pictures
    train_pairs.npy           (K, 2): picture, caption row; a picture may have several captions
    val_pairs.npy             the same, with only the first caption of each held-out picture
    val_images.npy            (M, S, S, 3) uint8: the held-out pictures, for reference scores
    val_unseen.npy            (M,) bool, shapes only: whether training never shows that combination
    preview.png               look at it before you train

The shapes: one to nine circles, squares and triangles in six colours, captioned by number ("three
red circles and two blue squares") or by place ("a red circle to the left of a blue square"). A
fixed tenth of the single groups never occurs in training, alone or in a pair, nor does a tenth of
the relations, so that evaluate.py, which reads a caption back, can score unseen ones apart.

Five parts: 1 shapes, 2 public files, 3 COCO and your own pictures, 4 the cache, 5 preparing.
"""
import csv
import errno
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from clip_text import (CONTEXT_LEN, count_truncated, load_clip_text, random_clip_text, tokenize,
                       weights_sha256)
from model import UserError, choose_device, run, sha256
from sample import draw_grid
from vae import LinearAutoencoder, load_vae, sample_latent, to_uint8, to_unit


@dataclass
class Config:
    dataset: str = "shapes"         # or coco, or folder: your own pictures
    out: str = ""                   # folder of the cache; "" = data/DATASET
    pictures: str = ""              # folder: where your pictures and captions are
    downloads: str = "downloads"    # coco: where its three archives are, or are downloaded to
    weights: str = "weights"        # where the public weights are, or are downloaded to
    seed: int = 0                   # of the shapes and of the random text tower
    # for these, "" and 0 mean the dataset's own
    autoencoder: str = ""           # linear (shapes), kl (coco, folder), or a KL weight file
    text_tower: str = ""            # random (shapes), clip (coco, folder), or a CLIP weight file
    image_size: int = 0             # S, side in pixels, a multiple of 32; 32 (shapes), else 256
    context_len: int = 0            # L, text tokens; 77, or 16 for shapes with the random tower
    train_images: int = 0           # 20,000 (shapes), all there are (coco, folder)
    val_images: int = 0             # 1,000 (shapes), 30,000 (coco), a tenth, at most 1,000 (folder)


REAL = {"autoencoder": "kl", "text_tower": "clip", "image_size": 256}
DEFAULTS = {"shapes": {"autoencoder": "linear", "text_tower": "random", "image_size": 32,
                       "train_images": 20_000, "val_images": 1_000},
            "coco": REAL | {"val_images": 30_000}, "folder": REAL}
CACHE_FORMAT = "midfuse-cache-1"
# Most of a shapes picture is background. At standard deviation 1 its few objects would show through
# the noise even at t = 1000, but a sampler starts from noise alone, where training never was.
LATENT_STD = 0.5    # of scaled latents of the linear autoencoder; the KL autoencoder's have 1 [LDM]


def complete(config: Config) -> Config:
    """The constants, with the dataset's own for "" and 0; raises UserError for impossible ones."""
    if config.dataset not in DEFAULTS:
        raise UserError(f"--dataset={config.dataset}: expected shapes, coco or folder.")
    own = DEFAULTS[config.dataset]
    config = replace(config, **{key: own[key] for key in own if not getattr(config, key)})
    if not config.context_len:
        short = config.dataset == "shapes" and config.text_tower == "random"    # captions need 12
        config = replace(config, context_len=16 if short else CONTEXT_LEN)
    if config.image_size % 32 or config.image_size < 32:
        raise UserError(f"--image_size={config.image_size}: expected a multiple of 32.")
    if config.seed < 0:
        raise UserError(f"--seed={config.seed}: expected 0 or more.")
    if config.context_len < 2 or min(config.train_images, config.val_images) < 0:
        raise UserError(f"context_len={config.context_len}, train_images={config.train_images}, "
                        f"val_images={config.val_images}: expected 2 or more tokens, and no "
                        f"negative number of pictures.")
    return config


# ---- 1. captioned shapes ----

BACKGROUND = (245, 245, 240)
COLOURS = {"red": (225, 45, 45), "green": (40, 165, 70), "blue": (45, 85, 225),
           "yellow": (245, 200, 30), "purple": (160, 50, 190), "cyan": (40, 190, 215)}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1),      # (rows, columns)
             "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Scene:
    """What a caption says: groups of (count, colour, shape), or two objects and their relation."""
    groups: tuple[tuple[int, str, str], ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        if self.relation:
            (_, colour, shape), (_, other_colour, other_shape) = self.groups
            return f"a {colour} {shape} {self.relation} a {other_colour} {other_shape}"
        return " and ".join(f"{COUNTS[count - 1]} {colour} {shape}{'s' * (count > 1)}"
                            for count, colour, shape in self.groups)

    @property
    def objects(self) -> list[tuple[str, str]]:
        """(colour, shape) of every object, in the order of the caption."""
        return [(colour, shape) for count, colour, shape in self.groups for _ in range(count)]


@cache
def list_scenes() -> tuple[list[Scene], list[Scene], list[Scene]]:
    """All: 162 of one group, 11,016 of two groups, at most nine objects in all, 1,224 relations."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    one = [Scene(((count, *kind),)) for count in range(1, 10) for kind in kinds]
    two = [Scene(((count, *first), (total - count, *second))) for total in range(2, 10)
           for count in range(1, total) for first, second in permutations(kinds, 2)]
    relations = [Scene(((1, *first), (1, *second)), relation)
                 for relation in RELATIONS for first, second in permutations(kinds, 2)]
    return one, two, relations


@cache
def scene_of() -> dict[str, Scene]:
    """Caption -> scene, for all captions of the shapes dataset."""
    return {scene.caption: scene for family in list_scenes() for scene in family}


@cache
def unseen_scenes() -> frozenset[Scene]:
    """The scenes that never occur in training, whatever the seed.

    A fixed tenth of the relations and of the single groups, and every pair with such a group.
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


def place_objects(scene: Scene) -> list[tuple[int, int]]:
    """Each object's cell (row, column) of 3x3: counts in reading order, relations about (1, 1)."""
    if scene.relation:
        rows, columns = RELATIONS[scene.relation]
        return [(1 + rows, 1 + columns), (1 - rows, 1 - columns)]
    return [divmod(cell, 3) for cell in range(len(scene.objects))]


def draw_scene(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """The picture of a scene, anti-aliased: (size, size, 3) uint8. Lengths are for a side of 32."""
    zoom = 8                                            # drawn 8 times larger, then averaged
    image = Image.new("RGB", (size * zoom, size * zoom), BACKGROUND)
    canvas, unit = ImageDraw.Draw(image), size * zoom / 32
    for (row, column), (colour, shape) in zip(place_objects(scene), scene.objects):
        y, x = [(16 + 12 * (cell - 1) + rng.uniform(-0.4, 0.4)) * unit for cell in (row, column)]
        r = rng.uniform(3.1, 3.5) * unit        # areas differ, the box of side 2r is the same
        if shape == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        else:
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[colour])
    return np.asarray(image.reduce(zoom))


class Shapes:
    """A split of the shapes: picture i is a function of (seed, split, i), on any machine."""

    def __init__(self, config: Config, split: str):
        config = complete(config)
        self.size, self.key = config.image_size, (config.seed, ["train", "val"].index(split))
        self.names = range(getattr(config, f"{split}_images"))
        rng = np.random.default_rng(self.key)
        self.scenes = [choose_scene(rng, unseen=split == "val" and i % 2 == 1) for i in self.names]
        self.captions = [[scene.caption] for scene in self.scenes]

    def load(self, i: int) -> np.ndarray:
        return draw_scene(self.scenes[i], np.random.default_rng((*self.key, i)), self.size)


# ---- 2. public files ----

COCO = "http://images.cocodataset.org"      # http: its certificate doesn't cover a name with dots
HF = "https://huggingface.co"
FILES = {       # name -> (address, bytes, SHA-256); COCO publishes no hashes: these are mirrors'
    "annotations_trainval2014.zip": (f"{COCO}/annotations/annotations_trainval2014.zip",
        252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    "train2014.zip": (f"{COCO}/zips/train2014.zip",
        13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014.zip": (f"{COCO}/zips/val2014.zip",
        6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    # The autoencoder of Stable Diffusion 1.4, most likely U-ViT's and the paper's own. The later
    # "ft-mse" and "ft-ema" share its encoder, and so its caches, but their decoders move the FID.
    "kl-f8.bin": (
        f"{HF}/CompVis/stable-diffusion-v1-4/resolve/main/vae/diffusion_pytorch_model.bin",
        334_707_217, "1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5"),
    # OpenAI's own addresses are gone; their ViT-L-14.pt can be given by path.
    "clip-vit-large-patch14.bin": (
        f"{HF}/openai/clip-vit-large-patch14/resolve/main/pytorch_model.bin",
        1_710_671_599, "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3"),
    "pt_inception-2015-12-05-6726825d.pth": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        95_628_359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
}
ARCHIVES = ("train2014.zip", "val2014.zip")     # of COCO's pictures


def check_space(needs: dict[Path, int]):
    """Print the bytes still to be written to each folder; raises UserError if a disk lacks room."""
    disks = {}                                  # device -> (free bytes, needed bytes, folders)
    for folder, size in needs.items():
        there = next(path for path in (folder / "new").absolute().parents if path.exists())
        _, needed, folders = disks.get(there.stat().st_dev, (0, 0, []))
        disks[there.stat().st_dev] = (shutil.disk_usage(there).free, needed + size,
                                      [*folders, f"{size / 1e9:,.2f} GB to {folder}"])
    for free, needed, folders in disks.values():
        if needed > free:
            raise UserError(f"There is not enough room: {needed:,} bytes are still to be written "
                            f"({', '.join(folders)}), and the disk has {free:,} free; make room, "
                            f"or name another disk with --out, --downloads or --weights.")
        print(f"disk space: {', '.join(folders)}; {free / 1e9:,.1f} GB are free.")


def count_missing(files: dict[Path, int]) -> int:
    """Bytes still to be written to files of these sizes."""
    return sum(max(0, size - (path.stat().st_size if path.exists() else 0))
               for path, size in files.items())


def read_blocks(response):
    """What a server sends, until its end or until the connection breaks."""
    with suppress(OSError, http.client.HTTPException):
        while block := response.read(1 << 20):
            yield block


def download(url: str, size: int, part: Path):
    """Append to `part` until it has `size` bytes: after a break, or in a later call, it goes on."""
    with (open(part, "ab") as file,
          tqdm(total=size, initial=file.tell(), desc=part.stem, unit="B", unit_scale=True) as bar):
        while (begin := file.tell()) < size:
            request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"})
            with urllib.request.urlopen(request, timeout=60) as response:
                if response.status != 206:      # a server that can only begin at the beginning
                    file.seek(0)
                    file.truncate()
                    bar.reset()
                promised = file.tell() + int(response.headers["Content-Length"] or 0)
                if promised != size:
                    kind = response.headers.get_content_type()
                    raise UserError(f"{url} answers with {promised:,} bytes of {kind}, expected "
                                    f"{size:,}: another file, or a web page that asks for "
                                    f"something; look at it in a browser.")
                for block in read_blocks(response):
                    file.write(block)
                    bar.update(len(block))
            if file.tell() <= begin:
                raise ConnectionError("the connection breaks off")


def find_download(name: str, folder: str | Path) -> Path:
    """Where the public file `name` is in `folder`, or its beginning is, or would be."""
    path = Path(folder) / name
    return path if path.exists() else path.with_name(f"{name}.part")


def fetch(name: str, folder: str | Path) -> Path:
    """The public file `name` in `folder`, found or downloaded, and checked; raises UserError."""
    url, size, expected = FILES[name]
    path, file = Path(folder) / name, find_download(name, folder)
    if file != path:
        check_space({path.parent: count_missing({file: size})})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download(url, size, file)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} could not be fetched ({error}): run the same command again, "
                            f"which goes on where it stopped, or fetch it elsewhere and put it "
                            f"here as {path} ({size:,} bytes, SHA-256 {expected}).") from None
    print(f"checking {file}")
    found = sha256(file)
    if found != expected:
        with open(file, "rb") as start:
            html = " and looks like HTML" if start.read(512).lstrip().startswith(b"<") else ""
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, SHA-256 {found}{html}; "
                        f"expected {size:,} bytes, SHA-256 {expected}, from {url}: delete it and "
                        f"run the same command again, which fetches it anew.")
    os.replace(file, path)
    return path


# ---- 3. COCO and your own pictures ----

def clean(caption: str) -> str:
    """One line, one space between words; what can't be written as UTF-8 becomes a question mark."""
    return " ".join(caption.encode(errors="replace").decode().split())


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """An RGB picture -> its central square, then Lanczos [U-ViT]: (size, size, 3) uint8."""
    side = min(image.size)
    x, y = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((x, y, x + side, y + side)).resize((size, size), Image.LANCZOS))


class Coco:
    """A split of MS-COCO 2014: pictures by image id, captions in their file's order [U-ViT]."""

    def __init__(self, config: Config, split: str, texts: zipfile.ZipFile):
        annotations = json.loads(texts.read(f"annotations/captions_{split}2014.json"))
        names = {image["id"]: image["file_name"] for image in annotations["images"]}
        captions = {i: [] for i in names}
        for annotation in annotations["annotations"]:
            captions[annotation["image_id"]].append(clean(annotation["caption"]))
        # the first 30,000 of the validation split are those of the paper's own evaluation
        ids = sorted(i for i in names if captions[i])[:getattr(config, f"{split}_images") or None]
        self.size, self.archive = config.image_size, None
        self.names = [f"{split}2014/{names[i]}" for i in ids]
        self.captions = [captions[i] for i in ids]

    def open(self, archive: Path):
        self.archive = zipfile.ZipFile(archive)         # is read as it is, not unpacked

    def load(self, i: int) -> np.ndarray:
        with self.archive.open(self.names[i]) as file, Image.open(file) as image:
            return crop_and_resize(image.convert("RGB"), self.size)             # a few are grey


def open_coco(config: Config) -> tuple[Coco, Coco]:
    """(training, held-out) with captions; the pictures are there after `open`."""
    with zipfile.ZipFile(fetch("annotations_trainval2014.zip", config.downloads)) as texts:
        return Coco(config, "train", texts), Coco(config, "val", texts)


PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture -> RGB: upright by its EXIF data, 16 bits cut to 8, transparent places white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):              # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 256)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Folder:
    """Some of the user's own pictures, each with its captions."""

    def __init__(self, config: Config, captions: dict[str, list[str]]):
        self.size, self.folder = config.image_size, Path(config.pictures)
        self.names, self.captions = list(captions), list(captions.values())

    def load(self, i: int) -> np.ndarray:
        with Image.open(self.folder / self.names[i]) as image:
            return crop_and_resize(to_rgb(image), self.size)

    def check(self, i: int) -> str:
        """Why picture i can't be read, or ""."""
        try:
            self.load(i)
            return ""
        except Exception as error:      # a decoder can stumble over a broken file in any way
            return f"{self.names[i]} ({type(error).__name__}: {error})"


def read_captions(folder: Path) -> dict[str, list[str]]:
    """Picture -> captions: from the folder's .jsonl or .csv, else from the pictures' .txt files.

    A .txt has one caption a line; a .jsonl lines with "file_name" and "text", a caption or a list
    of them; a .csv columns of these names, and as many rows for a picture as it has captions.
    """
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    captions = {path.relative_to(folder).as_posix(): [] for path in pictures}
    tables = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".csv"))
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables[:5])
        raise UserError(f"{folder} has several tables of captions ({names}): "
                        f"leave only one of them there.")
    for table in tables:
        with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
            is_csv, number = table.suffix == ".csv", 0
            rows = csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
            try:
                for number, row in enumerate(rows, start=1):
                    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
                    captions.setdefault(row["file_name"], []).extend(map(clean, texts))
            except (KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
                raise UserError(f"{table}, after {number} rows: {error!r}; "
                                f"expected file_name and text in each.") from None
    for path in pictures if not tables else []:
        if (beside := path.with_suffix(".txt")).exists():
            lines = beside.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            captions[path.relative_to(folder).as_posix()] = list(map(clean, lines))
    return {name: [text for text in texts if text] for name, texts in captions.items()}


def say_skipped(why: str, names: list[str]):
    if names:
        first = ", ".join(names[:5]) + " ..." * (len(names) > 5)
        print(f"skipped, {why}: {len(names):,} pictures: {first}")


def open_folder(config: Config) -> tuple[Folder, Folder]:
    """(training, held-out); every picture is decoded once to see whether it can be."""
    if not config.pictures or not Path(config.pictures).is_dir():
        raise UserError(f"--pictures={config.pictures}: expected the folder of your pictures and "
                        f"their captions.")
    captions = read_captions(Path(config.pictures))
    say_skipped("without a caption", [name for name, texts in captions.items() if not texts])
    captions = {name: texts for name, texts in sorted(captions.items()) if texts}
    everything = Folder(config, captions)
    with ThreadPoolExecutor() as pool:
        checks = pool.map(everything.check, range(len(captions)))
        reasons = list(tqdm(checks, total=len(captions), desc="checking pictures"))
    say_skipped("can't be read", [reason for reason in reasons if reason])
    names = [name for name, reason in zip(captions, reasons) if not reason]
    count = config.val_images or min(1000, -(-len(names) // 10))
    if len(names) <= count:
        raise UserError(f"{config.pictures} has {len(names)} readable pictures with captions: too "
                        f"few to hold out {count} of them (--val_images) and train on the others.")
    order = {name: hashlib.sha256(repr(name).encode()).digest() for name in names}  # never changes
    held_out = set(sorted(names, key=order.get)[:count])
    train = [name for name in names if name not in held_out][:config.train_images or None]
    return tuple(Folder(config, {name: captions[name] for name in part})
                 for part in (train, sorted(held_out)))


OPEN = {"shapes": lambda config: (Shapes(config, "train"), Shapes(config, "val")),
        "coco": open_coco, "folder": open_folder}


# ---- 4. the cache ----

@dataclass
class Split:
    """Moments (M, 2C, h, w) float32; pairs (K, 2) of picture and text row, sorted by picture."""
    moments: np.ndarray
    pairs: np.ndarray


@dataclass
class Cache:
    """A cache as train.py and evaluate.py read it; large arrays stay on disk until indexed."""
    meta: dict
    captions: list[str]             # R distinct captions; the first is the empty one
    text: np.ndarray                # (R, L, E) float16, their features; row 0 is the null context
    autoencoder: dict               # state dict of the linear autoencoder, or empty
    train: Split
    val: Split
    val_images: np.ndarray          # (M, S, S, 3) uint8, the held-out pictures


def read_cache(folder: str | Path) -> Cache:
    """Open a finished cache; raises UserError for anything else."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} is not a finished cache (it has no meta.json): run python "
                        f"prepare_data.py; if it was interrupted, the same command as before goes "
                        f"on where it stopped.")
    meta = json.loads((folder / "meta.json").read_text())
    if meta["format"] != CACHE_FORMAT:
        raise UserError(f"{folder} has format {meta['format']}, and this code reads "
                        f"{CACHE_FORMAT}: delete it and prepare again.")
    captions = (folder / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]
    autoencoder = {}
    if (folder / "autoencoder.npz").exists():
        with np.load(folder / "autoencoder.npz", allow_pickle=False) as file:
            autoencoder = {key: torch.from_numpy(file[key]) for key in file.files}
    def array(name):
        return np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
    splits = [Split(array(f"{split}_moments"), np.asarray(array(f"{split}_pairs")))
              for split in ("train", "val")]
    return Cache(meta, captions, array("text"), autoencoder, *splits, array("val_images"))


def write_json(path: Path, content: dict):
    """Whole or not at all."""
    with open(path.with_suffix(".tmp"), "w") as file:
        file.write(json.dumps(content, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


class Progress:
    """Arrays that are filled in parts; after a stop, the rows in progress.json are on the disk."""
    PART = 512

    def __init__(self, folder: Path, made_with: dict):
        self.folder, self.state = folder, {"made_with": made_with, "rows": {}}
        if (folder / "progress.json").exists():
            old = json.loads((folder / "progress.json").read_text())
            if old.get("made_with") == made_with:
                self.state = old
            else:
                print(f"{folder} was begun with other constants; it is made anew.")
        write_json(folder / "progress.json", self.state)

    def fill(self, name: str, shape: tuple, dtype: type, produce):
        """folder/name.npy of `shape`; produce(i, j) yields rows i..j-1, any number at a time."""
        start, dtype = io.BytesIO(), np.dtype(dtype)
        fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(start, fields)
        header, row = start.getvalue(), math.prod(shape[1:]) * dtype.itemsize
        with open(self.folder / f"{name}.npy", "a+b") as file:
            there = (file.tell() - len(header)) // row  # a power cut can leave fewer than recorded
            file.seek(0)
            whole = file.read(len(header)) == header
            begin = min(self.state["rows"].get(name, 0), there) if whole else 0
            begin -= begin % self.PART if begin < shape[0] else 0
            file.truncate(len(header) + begin * row if begin else 0)  # and a kill half a part more
            if not begin:
                file.write(header)
            with tqdm(total=shape[0], initial=begin, desc=name, unit="row") as bar:
                for i in range(begin, shape[0], self.PART):
                    j = min(i + self.PART, shape[0])
                    for rows in produce(i, j):      # on a full disk a memory map would crash
                        file.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())
                        bar.update(len(rows))
                    file.flush()
                    os.fsync(file.fileno())
                    self.state["rows"][name] = j
                    write_json(self.folder / "progress.json", self.state)
        return np.load(self.folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)


# ---- 5. preparing ----

BATCH = 64


def load_pictures(source, i: int, j: int):
    """Yields pictures i..j-1 in batches (B, S, S, 3) uint8, read by several threads meanwhile."""
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(source.load, range(i, j))
        while batch := list(islice(pictures, BATCH)):
            yield np.stack(batch)


def encode_pictures(autoencoder, device: torch.device, batches):
    """Pictures (B, S, S, 3) uint8 -> moments (B, 2C, h, w), batch by batch."""
    for pictures in batches:
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
        yield autoencoder.encode(to_unit(x)).cpu().numpy()


def encode_captions(text_tower, device: torch.device, captions: list[str], context_len: int):
    """Captions -> features (B, L, E), batch by batch."""
    for i in range(0, len(captions), BATCH):
        yield text_tower(tokenize(captions[i:i + BATCH], context_len).to(device))[0].cpu().numpy()


PUBLIC = {"autoencoder": ("kl", "kl-f8.bin", "the KL autoencoder of Stable Diffusion 1.4, f8"),
          "text_tower": ("clip", "clip-vit-large-patch14.bin", "CLIP ViT-L/14")}


def describe_network(config: Config, flag: str) -> dict:
    """meta["autoencoder"] or meta["text_tower"]: what to load; public weights are fetched."""
    if flag == "autoencoder":
        stand_in = {"kind": "linear", "about": "closed-form principal components of 4x4 patches, "
                                               "a stand-in for the KL autoencoder"}
    else:
        stand_in = {"kind": "random", "seed": config.seed, "context_len": config.context_len,
                    "about": "small, random and frozen, a stand-in for CLIP's"}
    (kind, public, about), choice = PUBLIC[flag], getattr(config, flag)
    if choice == stand_in["kind"]:
        return stand_in
    if choice == kind:
        fetch(public, config.weights)
        return {"kind": kind, "file": public, "sha256": FILES[public][2], "about": about}
    path, weights = Path(choice).resolve(), Path(config.weights).resolve()
    if not path.is_file():
        expected = f"{stand_in['kind']}, {kind} or a file of weights"
        raise UserError(f"--{flag}={choice}: expected {expected}.")
    # named by its place in the folder of weights, or in full if it is elsewhere
    file = path.relative_to(weights).as_posix() if path.is_relative_to(weights) else str(path)
    about = f"{kind}, weights of {path.name}"
    return {"kind": kind, "file": file, "sha256": sha256(path), "about": about}


def plan(config: Config, folder: Path, train, val, captions: list[str], moments: tuple, E: int):
    """The arrays to be filled, name -> (shape, dtype); raises UserError if there is no room.

    Text features are large, for COCO 444,000 of 77 x 768 numbers, 53 GB. The other way, the text
    tower in the training loop, costs 14% more work in each of a million steps, and another kind of
    batch. The price is reading 256 rows of 118 kB a step, in the background. Measured with one
    thread: 450 rows/s from a disk of 600 MB/s, 3,900 from memory; take an SSD, or 64 GB of memory.
    """
    S, M, N, R = config.image_size, len(val.names), len(train.names), len(captions)
    arrays = {"val_images": ((M, S, S, 3), np.uint8), "val_moments": ((M, *moments), np.float32),
              "train_moments": ((N, *moments), np.float32),
              "text": ((R, config.context_len, E), np.float16)}
    files = {folder / f"{name}.npy": 128 + math.prod(shape) * np.dtype(dtype).itemsize
             for name, (shape, dtype) in arrays.items()}
    pairs = sum(map(len, train.captions + val.captions))
    small = 4_000_000 + 16 * pairs + sum(len(caption.encode()) + 1 for caption in captions)
    needs = {folder: count_missing(files) + small}
    if config.dataset == "coco":
        archives = {find_download(name, config.downloads): FILES[name][1] for name in ARCHIVES}
        needs[Path(config.downloads)] = count_missing(archives)
    check_space(needs)
    return arrays


def write_captions(folder: Path, captions: list[str], train, val):
    """captions.txt, and for each split the pairs of picture and caption row."""
    lines = "".join(caption + "\n" for caption in captions)
    (folder / "captions.txt").write_text(lines, encoding="utf-8")
    row = {caption: i for i, caption in enumerate(captions)}
    for split, source in (("train", train), ("val", val)):
        pairs = [(i, row[text]) for i, texts in enumerate(source.captions) for text in texts]
        np.save(folder / f"{split}_pairs.npy", np.array(pairs, dtype=np.int64))


def measure_scale(moments: np.ndarray, latent_std: float) -> tuple[float, float]:
    """(the factor that gives all latents standard deviation `latent_std`, their mean before it)."""
    total, squares, n = 0.0, 0.0, 0
    for i in range(0, len(moments), 512):
        part = torch.from_numpy(moments[i:i + 512])
        noise = torch.randn(len(part), part.shape[1] // 2, *part.shape[2:],
                            generator=torch.Generator().manual_seed(i))
        z = sample_latent(part, noise).double()
        total, squares, n = total + z.sum().item(), squares + z.square().sum().item(), n + z.numel()
    mean = total / n
    # for COCO expect about U-ViT's 0.23010; 0.18215 is Stable Diffusion's, of other pictures
    return latent_std * (squares / n - mean ** 2) ** -0.5, mean


@torch.no_grad()
def prepare(config: Config, made_with: dict, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    train, val = OPEN[config.dataset](config)
    val.captions = [texts[:1] for texts in val.captions]
    distinct = {text for source in (train, val) for texts in source.captions for text in texts}
    captions = ["", *sorted(distinct - {""})]
    S, L, N, M = config.image_size, config.context_len, len(train.names), len(val.names)
    contents = repr([(list(source.names), source.captions) for source in (train, val)])
    contents = hashlib.sha256(contents.encode()).hexdigest()

    # the frozen networks; the stand-ins stay on the CPU, so that a GPU makes no difference
    networks = about, about_text = [describe_network(config, flag) for flag in PUBLIC]
    progress = Progress(folder, {"config": made_with, "networks": networks, "contents": contents})
    linear, random = about["kind"] == "linear", about_text["kind"] == "random"
    device, text_device = [torch.device("cpu") if stand_in else choose_device()
                           for stand_in in (linear, random)]
    weights = Path(config.weights)
    autoencoder = LinearAutoencoder() if linear else load_vae(weights / about["file"]).to(device)
    if random:
        text_tower = random_clip_text(config.seed, L)
        about_text = about_text | {"sha256": weights_sha256(text_tower)}
    else:
        text_tower = load_clip_text(weights / about_text["file"]).to(text_device)
    longest, E = text_tower.positional_embedding.shape
    if L > longest:
        raise UserError(f"--context_len={L}: the text tower takes at most {longest} tokens.")

    C2, h, w = autoencoder.encode(torch.zeros(1, 3, S, S, device=device)).shape[1:]
    arrays = plan(config, folder, train, val, captions, (C2, h, w), E)
    print(f"time: {N + M:,} pictures go through the {about['kind']} autoencoder ({device.type}), "
          f"{len(captions):,} captions through the {about_text['kind']} text tower "
          f"({text_device.type}); each bar tells how long, after a first batch.")

    # pictures -> moments
    if config.dataset == "coco":
        for source, name in zip((train, val), ARCHIVES):
            source.open(fetch(name, config.downloads))
    if linear:
        pictures = np.concatenate(list(load_pictures(train, 0, min(4096, N))))
        autoencoder.fit(to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
        state = {key: value.numpy() for key, value in autoencoder.state_dict().items()}
        np.savez(folder / "autoencoder.npz", **state)
    val_images = progress.fill("val_images", *arrays["val_images"],
                               lambda i, j: load_pictures(val, i, j))
    progress.fill("val_moments", *arrays["val_moments"], lambda i, j: encode_pictures(
        autoencoder, device, (val_images[k:min(k + BATCH, j)] for k in range(i, j, BATCH))))
    moments = progress.fill("train_moments", *arrays["train_moments"], lambda i, j: encode_pictures(
        autoencoder, device, load_pictures(train, i, j)))

    # captions -> features
    write_captions(folder, captions, train, val)
    if config.dataset == "shapes":
        unseen = [scene in unseen_scenes() for scene in val.scenes]
        np.save(folder / "val_unseen.npy", np.array(unseen))
    progress.fill("text", *arrays["text"],
                  lambda i, j: encode_captions(text_tower, text_device, captions[i:j], L))
    tokens = tqdm(captions, desc="counting tokens", delay=2)
    truncated = sum(count_truncated([caption], L) for caption in tokens)
    if truncated:
        print(f"{truncated:,} captions are longer than {L} tokens and were cut short.")

    latent_shape, latent_std = (C2 // 2, h, w), LATENT_STD if linear else 1.0
    scale, mean = measure_scale(moments, latent_std)
    shown = torch.from_numpy(moments[:24]).chunk(2, dim=1)[0].to(device)
    decoded = to_uint8(autoencoder.decode(shown)).cpu()
    labels = [texts[0] for texts in train.captions[:24]]
    draw_grid(decoded, labels, columns=8).save(folder / "preview.png")
    write_json(folder / "meta.json", {
        "format": CACHE_FORMAT, "dataset": config.dataset, "image_size": S, "config": made_with,
        "train_images": N, "val_images": M, "captions": len(captions), "truncated": truncated,
        "contents": contents, "null_context": "row 0 of text.npy, the empty caption",
        "latent_shape": latent_shape, "latent_scale": scale, "latent_mean": mean,
        "latent_std": latent_std, "autoencoder": about, "text_tower": about_text})
    (folder / "progress.json").unlink()
    print(f"{folder}: {N:,} training and {M:,} held-out pictures, {len(captions):,} distinct "
          f"captions; latents {latent_shape}, scale {scale:.4f}. Look at {folder / 'preview.png'}.")


def main(config: Config):
    config = complete(config)
    folder = Path(config.out or f"data/{config.dataset}")
    made_with = {key: value for key, value in asdict(config).items()
                 if key not in ("out", "downloads", "weights")}
    if (folder / "meta.json").exists():
        before = json.loads((folder / "meta.json").read_text())["config"]
        if before != made_with:
            raise UserError(f"{folder} was made with {before}: to keep it, name another folder "
                            f"with --out=FOLDER; else delete it.")
        return print(f"{folder} is complete; nothing to do.")
    try:
        prepare(config, made_with, folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"The disk is full ({error}); nothing is lost: make room and run the same "
                        f"command again, which goes on where it stopped.") from None


if __name__ == "__main__":
    run(main, Config)
