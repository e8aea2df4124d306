"""Pictures and captions -> data/NAME/, a cache of latents and text features for train.py.

    python prepare_data.py                                  # captioned shapes (train.py runs this)
    python prepare_data.py --dataset=coco                   # MS-COCO: 22 GB to fetch, 62 GB cached
    python prepare_data.py --dataset=folder --pictures=DIR  # your own pictures and captions

    pictures --crop, resize--> (3, S, S) --autoencoder--> moments (2C, h, w)
    captions --tokenize--> (L,) ids --text tower--> features (L, E)

The autoencoder and the text tower are frozen, so each picture and caption goes through them once.
Moments are cached, not samples of them. Killed at any point, the same command resumes.

    captions.txt, text.npy    row i for line i; row 0 is the empty caption, the null context
    train_moments.npy         (N, 2C, h, w); and val_moments.npy, of the M held-out pictures
    train_pairs.npy           (K, 2): picture, caption row; a picture may have several captions
    val_pairs.npy             the same, with only the first caption of each held-out picture
    val_images.npy            (M, S, S, 3) uint8: the held-out pictures, for reference scores
    autoencoder.npz           the linear autoencoder, where it is used
    preview.png, meta.json    look at it before you train; written last: what all is made of

The shapes have three kinds and six colours, and are captioned by number ("one red circle and two
blue squares") or place ("a red circle above a blue square"). A fixed fifth is never trained on.
"""
import csv
import hashlib
import json
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from glob import glob
from itertools import chain, islice, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from clip_text import count_truncated, encode_captions, load_clip_text, random_clip_text
from model import (Constants, FilePath, Natural, Positive, Size, UserError, choose_device,
                   one_writer, reading, run, sha256, weights_sha256, write_json, writing)
from sample import draw_grid
from vae import LinearAutoencoder, load_vae, sample_latent, to_pictures, to_unit


@dataclass
class Config(Constants):
    dataset: Literal["shapes", "coco", "folder"] = "shapes"
    pictures: FilePath | None = None  # folder: yours, with captions
    out: FilePath | None = None  # None: data/DATASET
    downloads: FilePath = "downloads"  # coco: its archives
    weights: FilePath = "weights"  # the public weights
    seed: Natural = 0  # of shapes and random tower
    # None: the dataset's own, of shapes / coco / folder
    autoencoder: FilePath | None = None  # linear / kl / kl, or a file of KL weights
    text_tower: FilePath | None = None  # random / clip / clip, or a CLIP file
    image_size: Size | None = None  # S, a multiple of 32: 32 / 256 / 256
    context_len: Annotated[int, 2, 77] | None = None  # L, text tokens: 16 / 77 / 77
    train_images: Positive | None = None  # 20,000 / all / all
    val_images: Annotated[int, 2, 10 ** 6] | None = None  # 1,000 / 30,000 / 2 to 1,000

    def __post_init__(self):
        super().__post_init__()
        defaults = DEFAULTS[self.dataset] | {"out": f"data/{self.dataset}"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.image_size % 32:
            raise UserError(f"--image_size={self.image_size}: expected a multiple of 32.")
        if (self.dataset == "folder") != bool(self.pictures):
            raise UserError("expected --pictures=FOLDER with --dataset=folder, and only then.")


REAL = {"autoencoder": "kl", "text_tower": "clip", "image_size": 256, "context_len": 77}
DEFAULTS = {
    "shapes": {"autoencoder": "linear", "text_tower": "random", "image_size": 32,
               "context_len": 16, "train_images": 20_000, "val_images": 1_000},
    "coco": REAL | {"val_images": 30_000}, "folder": REAL}
CACHE_FORMAT = "midfuse-cache-2"
# Standard deviation of the linear latents. At 1, that of the KL ones [LDM], a few objects on a
# background would show even at t = 1000, where a sampler starts from noise alone.
LATENT_STD = 0.5
BATCH = 64


# ---- 1. captioned shapes ----
BACKGROUND = (245, 245, 240)
COLOURS = {"red": (225, 45, 45), "green": (40, 165, 70), "blue": (45, 85, 225),
           "yellow": (245, 200, 30), "purple": (160, 50, 190), "cyan": (40, 190, 215)}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1),  # (rows, columns)
             "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Scene:
    """What a caption says: groups of (number, colour, shape), or two objects and their relation."""
    groups: tuple[tuple[int, str, str], ...]
    relation: str = ""

    @property
    def caption(self):
        phrases = []
        for number, colour, shape in self.groups:
            article = "a" if self.relation else NUMBERS[number - 1]
            plural = "s" if number > 1 else ""
            phrases.append(f"{article} {colour} {shape}{plural}")
        return f" {self.relation or 'and'} ".join(phrases)

    @property
    def objects(self):
        """(colour, shape) of every object, in the order of the caption."""
        return [(colour, shape) for number, colour, shape in self.groups for _ in range(number)]


@cache
def list_scenes():
    """All: 162 of one group, 11,016 of two groups, at most nine objects in all, 1,224 relations."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [*permutations(kinds, 2)]
    one = [Scene(((n, *kind),)) for n in range(1, 10) for kind in kinds]
    two = [Scene(((n, *a), (total - n, *b)))
           for total in range(2, 10) for n in range(1, total) for a, b in pairs]
    relations = [Scene(((1, *a), (1, *b)), name) for name in RELATIONS for a, b in pairs]
    return one, two, relations


@cache
def scene_of():
    """Caption -> scene, for all captions of the shapes dataset."""
    return {scene.caption: scene for scene in chain(*list_scenes())}


@cache
def unseen_scenes():
    """A fixed tenth of the relations and of the single groups, and every pair with such a group."""
    def tenth(scenes):
        order = np.random.default_rng(2403_16530).permutation(len(scenes))
        return [scenes[i] for i in order[:len(scenes) // 10]]
    one, two, relations = list_scenes()
    groups = {scene.groups[0] for scene in tenth(one)}
    unseen = [scene for scene in one + two if groups & {*scene.groups}]
    return frozenset(unseen + tenth(relations))


def choose_scene(rng, unseen):
    """A random scene, seen or unseen: 30% have one group, 30% two groups, 40% a relation."""
    family = list_scenes()[rng.choice(3, p=(0.3, 0.3, 0.4))]
    while True:
        scene = family[rng.integers(len(family))]
        if (scene in unseen_scenes()) == unseen:
            return scene


def draw_scene(scene, rng, size):
    """The picture of a scene, anti-aliased: (size, size, 3) uint8. Lengths are for a side of 32."""
    cells = [divmod(i, 3) for i in range(9)]  # of 3x3, in reading order
    if scene.relation:
        y, x = RELATIONS[scene.relation]
        cells = [(1 + y, 1 + x), (1 - y, 1 - x)]
    zoom = 8  # drawn larger, then averaged
    image = Image.new("RGB", (size * zoom, size * zoom), BACKGROUND)
    canvas, unit = ImageDraw.Draw(image), size * zoom / 32
    for cell, (colour, shape) in zip(cells, scene.objects):
        y, x = [(16 + 12 * (i - 1) + rng.uniform(-0.4, 0.4)) * unit for i in cell]
        r = rng.uniform(3.1, 3.5) * unit  # half the side of each shape's box
        box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
        if shape == "circle":
            canvas.ellipse(box, fill)
        elif shape == "square":
            canvas.rectangle(box, fill)
        else:
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    return np.asarray(image.reduce(zoom))


class Source:
    """A split: the captions of each picture, and a slice of it is pictures (n, S, S, 3) uint8."""

    def __init__(self, captions, load):
        self.captions, self.load = captions, load  # load(i): picture i

    def __getitem__(self, part):
        with ThreadPoolExecutor() as pool:
            return np.stack([*pool.map(self.load, range(len(self.captions))[part])])


def open_shapes(config, split):
    """A split of the shapes: picture i is a function of (seed, split, i), on any machine."""
    key = (config.seed, int(split == "val"))
    rng, count = np.random.default_rng(key), getattr(config, f"{split}_images")
    scenes = [choose_scene(rng, split == "val" and i % 2 == 1) for i in range(count)]

    def load(i):
        return draw_scene(scenes[i], np.random.default_rng((*key, i)), config.image_size)
    return Source([[scene.caption] for scene in scenes], load)


# ---- 2. your own pictures, and COCO ----
SUFFIXES = {*".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .heic .ppm".split()}


def read_picture(path):
    """Any picture as RGB: upright, 16 bits cut to 8, transparent places white; or UserError."""
    with reading(path, "a picture"), Image.open(path) as image:
        image.load()
        with suppress(Exception):  # broken EXIF costs no picture
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a channel have no known range: save it with 8 or 16")
        if image.mode.startswith("I;16"):  # grey, which Pillow would clip
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def open_pictures(config, captions, read):
    """Of each name, its captions; `read` gives its RGB image, of which the square is taken."""
    names, size = [*captions], (config.image_size,) * 2

    def load(i):
        """The central square of picture i, then Lanczos [U-ViT]."""
        image = read(names[i])
        side = min(image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((x, y, x + side, y + side))
        return np.asarray(square.resize(size, Image.Resampling.LANCZOS))
    return Source([*captions.values()], load)


def clean(text):
    """One line, one space between words; what can't be written as UTF-8 becomes a question mark."""
    return " ".join(text.encode(errors="replace").decode().split())


def read_lines(path):
    with reading(path, "text in UTF-8, or UTF-16 with a byte-order mark"):
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has null characters")
        return text.split("\n")


def read_captions(folder):
    """Name -> captions, of the folder's tables, or else of the .txt next to each picture.
    A .txt has a caption a line; a .jsonl and a .csv "file_name" and "text", one or, in .jsonl, a
    list of captions."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one of pictures and captions.")
    tables, pairs, captions = [*folder.glob("[!.]*.jsonl"), *folder.glob("[!.]*.csv")], [], {}
    for path in sorted(tables):
        lines = [*filter(str.strip, read_lines(path))]
        for number, line in enumerate(lines, start=1):
            with reading(path, f"a picture's file_name and text in row {number}"):
                if path.suffix == ".jsonl":
                    row = json.loads(line)
                else:  # alone, or an open quote takes others
                    names, cells = csv.reader([lines[0]]), csv.reader([line], strict=True)
                    row = dict(zip(next(names), next(cells), strict=True))
                texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
                pairs += [(Path(row["file_name"]).as_posix(), clean(text)) for text in texts]
    for name in list_pictures(folder):
        path = (folder / name).with_suffix(".txt")
        if not tables and path.exists():
            pairs += [(name, clean(line)) for line in read_lines(path)]
    for name, text in pairs:
        if text and name != "file_name":  # the heading of a .csv
            captions.setdefault(name, []).append(text)
    return captions


def list_pictures(folder):
    """The names of the pictures in a folder, below it and behind links, each once, none hidden."""
    paths = sorted(map(Path, glob("**", root_dir=folder, recursive=True)), reverse=True)
    paths = [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted({(folder / path).resolve(): path.as_posix() for path in paths}.values())


def open_folder(config):
    """(training, held-out); every picture is decoded once to see whether it can be."""
    folder, names = Path(config.pictures), []
    captions = read_captions(folder)
    for name in tqdm(captions, "reading pictures"):
        try:
            read_picture(folder / name)
            names.append(name)
        except UserError as error:
            print(clean(f"skipped: {error}"))
    if silent := {*list_pictures(folder)} - {*captions}:
        print(f"skipped: {len(silent):,} pictures without a caption")
    count = config.val_images or min(1000, max(2, len(names) // 10))
    if len(names) <= count:
        raise UserError(f"{folder} has {len(names)} sound pictures with captions: expected more "
                        f"than --val_images={count}.")
    names.sort(key=digest)  # never changes
    splits = sorted(names[count:][:config.train_images]), sorted(names[:count])
    return [open_pictures(config, {folder / name: captions[name] for name in split}, read_picture)
            for split in splits]


def open_coco(config, split):
    """A split of MS-COCO 2014: pictures by image id, captions in their file's order [U-ViT]."""
    texts = zipfile.ZipFile(fetch("annotations_trainval2014.zip", config.downloads))
    content = json.loads(texts.read(f"annotations/captions_{split}2014.json"))
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions = {names[i]: [] for i in sorted(names)}
    for entry in content["annotations"]:
        captions[names[entry["image_id"]]].append(clean(entry["caption"]))
    # the first 30,000 of the validation split are those of the paper's own evaluation
    captioned = ((name, texts) for name, texts in captions.items() if texts)
    chosen = dict(islice(captioned, getattr(config, f"{split}_images")))
    archive = zipfile.ZipFile(fetch(f"{split}2014.zip", config.downloads))

    def read(name):
        with archive.open(f"{split}2014/{name}") as file, Image.open(file) as image:
            return image.convert("RGB")  # a few are grey
    return open_pictures(config, chosen, read)


# ---- 3. preparing ----
def fill(path, count, compute):
    """An array of `count` rows: kept where it is whole, else made of compute(slice)."""
    if not path.exists():
        with writing(path) as file:  # on a full disk a memory map would crash
            for i in tqdm(range(0, count, BATCH), path.stem):
                batch = compute(slice(i, i + BATCH))
                if i == 0:
                    size, free = count * batch[0].nbytes, shutil.disk_usage(path.parent).free
                    if size > free:
                        raise UserError(f"{path} takes {size:,} bytes, and {free:,} are free.")
                    header = {"descr": batch.dtype.str, "fortran_order": False,
                              "shape": (count, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(batch.tobytes())
    with reading(path, "an array of an unfinished cache: delete it"):
        return np.load(path, mmap_mode="r")


def measure_scale(moments):
    """The factor that gives the latents of up to 20,000 pictures a standard deviation of 1."""
    moments = torch.tensor(moments[:20_000])
    mean, _ = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    # for COCO expect about U-ViT's 0.23010; 0.18215 is Stable Diffusion's, of other pictures
    return 1 / sample_latent(moments, noise).double().std(correction=0).item()


PUBLIC = {"kl": "kl-f8.bin", "clip": "clip-vit-large-patch14.bin"}


def load_network(kind, choice, load, weights):
    """(network, what finds it again): the public one of this kind, or that of the file `choice`."""
    public = choice == kind
    path = fetch(PUBLIC[kind], weights) if public else Path(choice).absolute()
    about = {"kind": kind, "file": path.name if public else str(path), "about": path.name}
    return load(path).to(choose_device()), about | {"sha256": sha256(path)}


# The stand-ins stay on the CPU, so that a GPU makes no difference.
def open_autoencoder(config):
    if config.autoencoder != "linear":
        return load_network("kl", config.autoencoder, load_vae, config.weights)
    about = "principal components of 4x4 patches, a stand-in"
    return LinearAutoencoder(), {"kind": "linear", "about": about}


def open_text_tower(config):
    if config.text_tower != "random":
        return load_network("clip", config.text_tower, load_clip_text, config.weights)
    seed, length = config.seed, config.context_len
    tower, about = random_clip_text(seed, length), "small, random and frozen, a stand-in for CLIP's"
    return tower, {"kind": "random", "seed": seed, "context_len": length,
                   "sha256": weights_sha256(tower), "about": about}


def expect_same(path, made_of):
    with reading(path, "a cache of these data: name another --out"):
        then = json.loads(path.read_text(encoding="utf-8"))
        if difference := same_data({key: then.get(key) for key in made_of}, made_of):
            raise UserError(f"{path} is of other data: {difference}; name another --out.")


@torch.no_grad()
def prepare(config, made_of, folder):
    """Write a cache; what an interrupted call left whole is kept."""
    if config.dataset == "folder":
        train, val = open_folder(config)
    else:
        open_split = open_shapes if config.dataset == "shapes" else open_coco
        train, val = open_split(config, "train"), open_split(config, "val")
    val.captions = [texts[:1] for texts in val.captions]
    captions = sorted({"", *chain(*train.captions, *val.captions)})  # "" is the first
    N, M, L = len(train.captions), len(val.captions), config.context_len

    autoencoder, about = open_autoencoder(config)
    tower, about_text = open_text_tower(config)
    made_of = made_of | {"format": CACHE_FORMAT, "autoencoder": about, "text_tower": about_text}
    record = folder / ".preparing.json"
    if not any(folder.glob("[!.]*")):
        write_json(record, made_of)
    expect_same(record, made_of)
    print(f"{N:,} training and {M:,} held-out pictures, {len(captions):,} distinct captions, "
          f"{count_truncated(captions, L):,} of them truncated to {L} tokens")

    linear = config.autoencoder == "linear"
    device = torch.device("cpu") if linear else choose_device()

    def encode(pictures):
        return autoencoder.encode(to_unit(pictures).to(device)).cpu().numpy()

    def encode_text(part):
        return encode_captions(tower, captions[part], L)[0].half().cpu().numpy()

    if linear:
        autoencoder.fit(to_unit(train[:4096]))
        with writing(folder / "autoencoder.npz") as file:
            np.savez(file, **autoencoder.state_dict())
    images = fill(folder / "val_images.npy", M, lambda part: val[part])
    fill(folder / "val_moments.npy", M, lambda part: encode(images[part].copy()))
    moments = fill(folder / "train_moments.npy", N, lambda part: encode(train[part]))
    # For COCO 53 GB, on an SSD; the tower in the training loop would be 14% more work at each step
    fill(folder / "text.npy", len(captions), encode_text)
    with writing(folder / "captions.txt", "w") as file:
        file.writelines(caption + "\n" for caption in captions)
    row = {caption: i for i, caption in enumerate(captions)}
    for split, source in (("train", train), ("val", val)):
        pairs = [(i, row[text]) for i, texts in enumerate(source.captions) for text in texts]
        fill(folder / f"{split}_pairs.npy", len(pairs), np.array(pairs).__getitem__)

    latents = torch.tensor(moments[:24]).chunk(2, dim=1)[0].to(device)
    decoded, texts = to_pictures(autoencoder.decode(latents)), train.captions[:24]
    with writing(folder / "preview.png") as file:
        draw_grid(decoded, [first for first, *_ in texts], columns=8).save(file, "PNG")
    scale = (LATENT_STD if linear else 1) * measure_scale(moments)
    write_meta(folder, made_of | {"dataset": config.dataset, "image_size": config.image_size,
                                  "latent_shape": latents.shape[1:], "latent_scale": scale})


def main(config: Config):
    folder, places = Path(config.out), ("pictures", "out", "downloads", "weights")
    made_of = {"config": {key: vars(config)[key] for key in vars(config) if key not in places}}
    if config.pictures:
        captions = read_captions(Path(config.pictures))
        paths = [Path(config.pictures, name) for name in captions]
        made_of["captions"] = digest(captions)
        made_of["pictures"] = digest([sha256(path) for path in paths if path.is_file()])
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder, wait=True):
        if not (folder / "meta.json").exists():
            prepare(config, made_of, folder)
    expect_same(folder / "meta.json", made_of)
    meta = read_cache(folder).meta
    print(f"{folder} is complete, of latent scale {meta['latent_scale']:.4f}. Look at its "
          f"preview.png, then:\n  python train.py --data={folder} --name={folder.name}")


# ---- 4. the cache ----
def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_file(path):
    """The size and SHA-256 of a file; from 256 MB (COCO's have up to 53 GB) the size alone."""
    size = path.stat().st_size if path.is_file() else -1
    return [size, sha256(path) if 0 <= size < 2 ** 28 else None]


def write_meta(folder, meta):
    """Finish a cache: meta.json, with the digests of its files and of itself."""
    paths = [folder / "captions.txt", *sorted(folder.glob("*.np[yz]"))]
    meta = meta | {"files": {path.name: describe_file(path) for path in paths}}
    write_json(folder / "meta.json", meta | {"sha256": digest(meta)})


def read_cache(folder):
    """A finished cache, or UserError: meta, captions, autoencoder (a state dict, or empty), and by
    their files' names the arrays, on disk until indexed: text, train_moments, train_pairs, ..."""
    folder = Path(folder)
    path, advice = folder / "meta.json", f"delete {folder} and prepare it again"
    with reading(path, f"a finished cache (run prepare_data.py, or {advice})"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != CACHE_FORMAT or meta.pop("sha256") != digest(meta):
            raise UserError(f"{path} is damaged, edited or not {CACHE_FORMAT}: {advice}.")
    for name, facts in meta["files"].items():
        if describe_file(folder / name) != facts:
            raise UserError(f"{folder / name} is missing, damaged or of another cache: {advice}.")
    arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r")
              for name in meta["files"] if name != "captions.txt"}
    linear = arrays.pop("autoencoder", {}).items()
    autoencoder = {key: torch.from_numpy(array) for key, array in linear}
    captions = (folder / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return SimpleNamespace(meta=meta, captions=captions, autoencoder=autoencoder, **arrays)


def same_data(meta, other):
    """What differs between two descriptions of data, or None. Floats may differ by rounding."""
    for key in sorted({*meta, *other} - {"files", "file", "about"}):
        a, b = meta.get(key), other.get(key)
        floats = {type(a), type(b)} == {float}
        if isinstance(a, dict) and isinstance(b, dict):
            if difference := same_data(a, b):
                return f"{key}: {difference}"
        elif a != b and not (floats and abs(a - b) <= 1e-3 * abs(a)):
            return f"{key} ({a!s:.20} and {b!s:.20})"


# ---- 5. public files ----
# Name -> address, bytes, SHA-256. COCO's hashes are mirrors', its certificate lacks its name: so
# http. kl-f8.bin is Stable Diffusion 1.4's, most likely the paper's: "ft-mse" has another decoder.
FILES = json.loads((Path(__file__).parent / "assets/files.json").read_text())


def fetch(name, folder):
    """The public file `name` in `folder`, downloaded if it is missing, and verified."""
    url, size, expected = FILES[name]
    path = Path(folder, name)
    if not path.exists() and size < 2 ** 32:  # curl can resume what is larger
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), expected)
        except (OSError, RuntimeError) as error:
            print(f"{url}: {error}")
    if not path.exists() or sha256(path) != expected:
        raise UserError(f"{path} is missing, or its SHA-256 is not {expected} ({size:,} bytes): "
                        f"delete it, and fetch it: curl -L -C - --create-dirs -o {path} {url}")
    return path


if __name__ == "__main__":
    run(main, Config)
