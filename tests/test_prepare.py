"""Protects the road from pictures to a cache: whole, resumable, never silently wrong."""
import collections
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_data
import sample
import train
from clip_text import CLIPText, load_clip_text, load_text_tower, tokenize
from model import UserError
from prepare_data import Config, fetch, read_cache, read_captions, read_picture, same_data
from vae import KLAutoencoder, load_autoencoder, load_vae, to_unit

TRAIN_IDS, VAL_IDS = (57870, 9, 25, 581921, 30), (42, 7, 500000, 73)        # unsorted, as in COCO
CAPTIONS = {9: ["A  red bus\n", "A bus on a road. ", "bus", "the\tred bus", "A bus, parked."],
            42: ["Two dogs play.", "another caption of two dogs"]}


def draw(seed, size=(50, 40), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def same(one, other):
    """All files of two caches are the same, but for the locks."""
    one, other = [{path.name: path.read_bytes() for path in Path(folder).iterdir()}
                  for folder in (one, other)]
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def refused(call, *facts):
    """The one line of the UserError that `call` raises, which names the facts."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(fact in message for fact in facts), message
    return message


# ---- public files, and COCO in miniature ----

def coco_split(archive, annotations, split, ids):
    images, captions = [], []
    for i in ids:
        name, file = f"COCO_{split}2014_{i:012d}.jpg", io.BytesIO()
        mode = {9: "L", 25: "CMYK"}.get(i, "RGB")
        draw(i, (75, 48) if i % 2 else (40, 61), mode).save(file, "JPEG")
        archive.writestr(f"{split}2014/{name}", file.getvalue())
        images.append({"id": i, "file_name": name})
        captions += [{"image_id": i, "caption": text}
                     for text in CAPTIONS.get(i, [f"picture {i}", "a picture"])]
    content = {"images": images, "annotations": captions[::2] + captions[1::2]}
    annotations.writestr(f"annotations/captions_{split}2014.json", json.dumps(content))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with the three archives of COCO, an autoencoder and a text tower, all tiny."""
    folder = tmp_path_factory.mktemp("served")
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as annotations:
        for split, ids in (("train", TRAIN_IDS), ("val", VAL_IDS)):
            with zipfile.ZipFile(folder / f"{split}2014.zip", "w") as archive:
                coco_split(archive, annotations, split, ids)
    torch.manual_seed(0)
    vae = KLAutoencoder(channels=32, multipliers=(1, 1, 1, 1), blocks=1)
    tower = CLIPText(width=64, layers=1, heads=1, projection=32)
    for module, name in ((vae, "kl-f8.bin"), (tower, "clip-vit-large-patch14.bin")):
        state = {key: 0.1 * torch.randn_like(value) for key, value in module.state_dict().items()}
        torch.save(state, folder / name)
    return folder


@pytest.fixture
def public(served, monkeypatch):
    """The addresses, sizes and hashes of these files take the place of the public ones."""
    for path in served.iterdir():
        content = path.read_bytes()
        entry = (path.as_uri(), len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(prepare_data.FILES, path.name, entry)


def coco(**changes):
    return Config(**{"dataset": "coco", "image_size": 32, "val_images": 3} | changes)


def read_coco(served, split, ids):
    """The pictures, read and cropped in another way."""
    pictures = []
    with zipfile.ZipFile(served / f"{split}2014.zip") as archive:
        for i in ids:
            file = archive.open(f"{split}2014/COCO_{split}2014_{i:012d}.jpg")
            pixels = np.asarray(Image.open(file).convert("RGB"))
            H, W = pixels.shape[:2]
            s = min(H, W)
            square = Image.fromarray(pixels[(H - s) // 2:(H + s) // 2, (W - s) // 2:(W + s) // 2])
            pictures.append(np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS)))
    return np.stack(pictures)


def test_coco_is_fetched_and_prepared(public, served, capsys):
    prepare_data.main(coco())
    out = capsys.readouterr().out
    for fact in ("5 training and 3 held-out pictures", "0 of them truncated to 77 tokens",
                 "python train.py --data=data/coco --name=coco"):
        assert fact in out
    assert len([*Path("downloads").iterdir()]) == 3 and len([*Path("weights").iterdir()]) == 2

    cache, train_ids, val_ids = read_cache("data/coco"), sorted(TRAIN_IDS), sorted(VAL_IDS)[:3]
    assert cache.captions[0] == "" and cache.captions[1:] == sorted({*cache.captions[1:]})
    pairs = cache.train_pairs
    assert [cache.captions[row] for picture, row in pairs if train_ids[picture] == 9] == [
        "A red bus", "bus", "A bus, parked.", "A bus on a road.", "the red bus"]
    assert [cache.captions[row] for row in cache.val_pairs[:, 1]] == [
        "picture 7", "Two dogs play.", "picture 73"]
    assert "another caption of two dogs" not in cache.captions

    vae, tower = load_vae("weights/kl-f8.bin"), load_clip_text("weights/clip-vit-large-patch14.bin")
    for split, ids, moments in (("train", train_ids, cache.train_moments),
                                ("val", val_ids, cache.val_moments)):
        pictures = read_coco(served, split, ids)
        assert split == "train" or (cache.val_images == pictures).all()
        expected = vae.encode(to_unit(pictures))
        torch.testing.assert_close(torch.tensor(moments), expected)
    assert cache.text.shape == (len(cache.captions), 77, 64) and cache.text.dtype == np.float16
    torch.testing.assert_close(torch.tensor(cache.text),
                               tower(tokenize(cache.captions))[0].half(), atol=2e-3, rtol=2e-3)

    assert cache.meta["latent_shape"] == [4, 4, 4]
    mean, logvar = torch.tensor(cache.train_moments).chunk(2, dim=1)
    variance = (mean.var() + logvar.clamp(-30, 20).exp().mean()).item()     # between and within
    assert cache.meta["latent_scale"] == pytest.approx(variance ** -0.5, rel=0.1)
    load_autoencoder(cache.meta["autoencoder"], None, "weights")
    load_text_tower(cache.meta["text_tower"], "weights")


def test_two_steps_are_trained_on_it_and_a_picture_is_sampled(public):
    prepare_data.main(coco())
    train.main(train.Config(data="data/coco", name="tiny", steps=2, patch_size=2, width=32, heads=2,
                            n_image=1, n_fuse=1, n_text=1, batch_size=4,
                            sample_steps=2, score=False, precision="float32"))
    sample.main(sample.Config(checkpoint="out/tiny/last.pt", prompt="a red bus", n=1, steps=2))
    with Image.open("out/tiny/generated/0001/00000.png") as image:
        assert image.size == (32, 32)


def test_shapes_go_through_the_real_encoders_too(public, served):
    shutil.copy(served / "kl-f8.bin", "mine.bin")
    config = Config(train_images=6, val_images=2, autoencoder="mine.bin", text_tower="clip",
                    context_len=77)
    prepare_data.main(config)
    meta = read_cache("data/shapes").meta
    assert meta["latent_shape"] == [4, 4, 4]
    assert meta["autoencoder"]["file"] == str(Path("mine.bin").resolve())
    load_autoencoder(meta["autoencoder"], None, "weights")
    state = torch.load("mine.bin")
    torch.save({name: 2 * tensor for name, tensor in state.items()}, "mine.bin")
    refused(lambda: load_autoencoder(meta["autoencoder"], None, "weights"), "mine.bin", "SHA-256")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"", None], ids=["page", "empty", "bits"])
def test_what_is_not_the_public_file_is_refused_and_stays(public, served, content):
    Path("weights").mkdir()
    wrong = bytearray((served / "kl-f8.bin").read_bytes())
    wrong[1000] ^= 1
    Path("weights/kl-f8.bin").write_bytes(wrong if content is None else content)
    _, size, digest = prepare_data.FILES["kl-f8.bin"]
    refused(lambda: fetch("kl-f8.bin", "weights"), "weights/kl-f8.bin", digest, f"{size:,} bytes")
    assert Path("weights/kl-f8.bin").exists()


def test_a_download_that_is_another_file_leaves_nothing(public, monkeypatch):
    url, size, _ = prepare_data.FILES["kl-f8.bin"]
    monkeypatch.setitem(prepare_data.FILES, "kl-f8.bin", (url, size, "0" * 64))
    refused(lambda: fetch("kl-f8.bin", "weights"), "weights/kl-f8.bin is missing")
    assert not [*Path("weights").iterdir()]


@pytest.mark.parametrize("size", [12345, 2 ** 33])
def test_without_internet_one_sentence_says_what_to_fetch_and_where_to_put_it(monkeypatch, size):
    address = "http://127.0.0.1:9/kl"           # nobody listens there
    monkeypatch.setitem(prepare_data.FILES, "kl-f8.bin", (address, size, "abc"))
    refused(lambda: prepare_data.main(Config(train_images=4, val_images=2, autoencoder="kl")),
            f"curl -L -C - --create-dirs -o weights/kl-f8.bin {address}", f"{size:,} bytes",
            "SHA-256 is not abc")


# ---- the disk, and interruptions ----

def small(**changes):
    return Config(**{"train_images": 90, "val_images": 20} | changes)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Two finished caches of the same shapes, to be copied."""
    folder = tmp_path_factory.mktemp("caches")
    for seed in (0, 1):
        prepare_data.main(small(out=str(folder / str(seed)), seed=seed))
    return folder


def test_interrupted_at_any_write_the_result_is_the_same(caches, monkeypatch):
    fsync, generator = os.fsync, random.Random(0)
    errors = [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")]

    def interrupt(descriptor):
        if generator.random() < 0.5:
            raise generator.choice(errors)
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", interrupt)
    for attempt in range(300):
        try:
            prepare_data.main(small(out="often"))
            break
        except (KeyboardInterrupt, OSError):
            refused(lambda: read_cache("often"), "often/meta.json is missing", "finished cache")
    assert 5 < attempt < 299
    same("often", caches / "0")


def start(folder):
    """A preparation in a process of its own."""
    process = multiprocessing.get_context("fork").Process(
        target=prepare_data.main, args=[small(out=folder)])
    process.start()
    return process


def test_killed_at_any_moment_the_same_command_resumes(caches):
    began, generator = time.perf_counter(), random.Random(0)
    start("timed").join()
    whole = time.perf_counter() - began
    for _ in range(8):
        process = start("killed")
        time.sleep(whole * generator.uniform(0.2, 1))
        process.kill()
        process.join()
    prepare_data.main(small(out="killed"))
    same("killed", caches / "0")


def test_two_preparations_of_one_cache_both_succeed(caches, capfd):
    processes = [start("both") for _ in range(2)]
    for process in processes:
        process.join()
    out = capfd.readouterr().out
    assert [process.exitcode for process in processes] == [0, 0]
    assert out.count("both is complete") == 2 and out.count("waiting for the other process") >= 1
    same("both", caches / "0")


def test_what_an_interrupted_call_left_is_only_kept_of_the_same_data(caches, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(prepare_data, "measure_scale", stop)
        prepare_data.main(small(out="cut"))
    refused(lambda: prepare_data.main(small(out="cut", seed=1)), "cut", "seed (0 and 1)", "--out")
    for damage in (b"", b"short"):
        Path("cut/train_moments.npy").write_bytes(damage)
        refused(lambda: prepare_data.main(small(out="cut")), "cut/train_moments.npy", "delete it")
    Path("cut/train_moments.npy").unlink()
    with monkeypatch.context() as context:              # another version made other arrays
        context.setattr(prepare_data, "CACHE_FORMAT", "midfuse-cache-0")
        refused(lambda: prepare_data.main(small(out="cut")), "cut", "format", "--out")
    prepare_data.main(small(out="cut"))
    same("cut", caches / "0")


def test_a_folder_of_other_files_is_left_alone():
    Path("mine").mkdir()
    Path("mine/captions.txt").write_text("my own")
    refused(lambda: prepare_data.main(small(out="mine")), "mine", "--out")
    assert Path("mine/captions.txt").read_text() == "my own"


# ---- the gate of a cache ----

FILES = ("captions.txt", "autoencoder.npz", "text.npy", "train_moments.npy", "train_pairs.npy",
         "val_images.npy", "val_moments.npy", "val_pairs.npy", "meta.json")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "deleted": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path, other: flip(path),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "swapped": lambda path, other: shutil.copy(other / path.name, path),
    "folder": lambda path, other: (path.unlink(), path.mkdir()),
    "pipe": lambda path, other: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_cache_with_a_damaged_file_is_refused_by_its_name(caches, name):
    for damage, act in DAMAGE.items():
        shutil.rmtree("cache", ignore_errors=True)
        shutil.copytree(caches / "0", "cache")
        act(Path("cache", name), caches / "1")
        named = "" if (damage, name) == ("swapped", "meta.json") else name      # fits no file
        message = refused(lambda: read_cache("cache"), f"cache/{named}")
        assert "delete cache and prepare it again" in message
        if damage not in ("deleted", "folder"):
            refused(lambda: prepare_data.main(small(out="cache")), "cache")


def test_meta_without_any_of_its_keys_or_of_another_kind_is_refused(caches):
    shutil.copytree(caches / "0", "cache")
    path = Path("cache/meta.json")
    text = path.read_text()
    meta = json.loads(text)
    contents = [{key: meta[key] for key in meta if key != missing} for missing in meta]
    contents += [meta | {"latent_scale": 0.3}, meta | {"format": "midfuse-cache-1"}, [], 3, None]
    for content in contents:
        path.write_text(json.dumps(content))
        refused(lambda: read_cache("cache"), "delete cache and prepare it again")
    path.write_text(text)
    assert read_cache("cache").meta["latent_scale"] == meta["latent_scale"]


def test_data_made_again_on_another_machine_are_the_same_others_are_named(caches):
    meta = read_cache(caches / "0").meta
    again = meta | {"files": {}, "latent_scale": meta["latent_scale"] * (1 + 1e-6)}
    assert same_data(meta, again) is None and same_data(again, meta) is None
    moved = {"kind": "kl", "file": "/a/kl.bin", "sha256": "1", "about": "a"}
    assert same_data({"autoencoder": moved}, {"autoencoder": moved | {"file": "b"}}) is None
    for other, name in ((meta | {"latent_scale": 0.3}, "latent_scale"),
                        (meta | {"config": meta["config"] | {"seed": 7}}, "seed (0 and 7)"),
                        (meta | {"text_tower": {"kind": "clip"}}, "text_tower"),
                        (meta | {"latent_scale": None}, "latent_scale"),
                        ({key: meta[key] for key in meta if key != "config"}, "config"),
                        (read_cache(caches / "1").meta, "seed")):
        assert name in same_data(meta, other) and name.split()[0] in same_data(other, meta)


def test_a_complete_cache_is_left_as_it_is(caches, capsys):
    shutil.copytree(caches / "0", "cache")
    before = {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()
              if path.name != ".lock"}
    prepare_data.main(small(out="cache"))
    assert "cache is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    refused(lambda: prepare_data.main(small(out="cache", seed=3)), "seed (0 and 3)", "--out")


# ---- your own pictures ----

def own(**changes):
    return Config(**{"dataset": "folder", "pictures": "mine", "image_size": 32, "val_images": 2,
                     "autoencoder": "linear", "text_tower": "random"} | changes)


def write_captions(layout, captions):
    if layout == "txt":
        for name, texts in captions.items():
            text = "\n".join(texts) + "\n\n"
            Path("mine", name).with_suffix(".txt").write_text(text, encoding="utf-8")
    elif layout == "jsonl":
        lines = [{"file_name": f"./{name}", "text": texts[0] if len(texts) == 1 else texts}
                 for name, texts in captions.items()]
        Path("mine/captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    else:
        rows = [f'{name},"{text}"' for name, texts in captions.items() for text in texts]
        Path("mine/captions.csv").write_text("\r\n".join(["file_name,text", *rows]), "utf-8-sig")


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_own_pictures_with_each_layout_of_captions(layout, capsys):
    Path("mine/more").mkdir(parents=True)
    Path("mine/.ipynb_checkpoints").mkdir()
    captions = {f"{i}.png": [f"picture  {i}, drawn"] for i in range(5)} | {
        "more/café.JPG": ["one of two", "二つ目", " "], "x.png": ["broken"], "pipe.png": ["waits"],
        ".ipynb_checkpoints/0-copy.png": [], os.fsdecode(b"\xff.png"): []}
    for i, name in enumerate(captions):
        draw(i).save(Path("mine", name), "PNG")
    for i in range(7):
        draw(i).save(f"mine/without{i}.png")
    Path("mine/x.png").write_bytes(Path("mine/1.png").read_bytes()[:200])
    Path("mine/pipe.png").unlink()
    os.mkfifo("mine/pipe.png")
    write_captions(layout, {name: texts for name, texts in captions.items() if texts})
    if layout == "txt":
        Path(os.fsdecode(b"mine/\xff.txt")).write_text("a name in Latin-1")
    prepare_data.main(own())
    out = capsys.readouterr().out
    odd = int(layout == "txt")              # the name in Latin-1 can only be captioned by a .txt
    assert f"skipped: {8 - odd} pictures without a caption" in out and "ipynb" not in out
    assert "skipped: mine/pipe.png is not a file" in out
    assert "skipped: mine/x.png is damaged, or not a picture" in out
    cache = read_cache("data/folder")
    assert (len(cache.train_moments), len(cache.val_moments)) == (4 + odd, 2)
    assert {*cache.captions} <= {"", "one of two", "二つ目", "a name in Latin-1",
                                 *(f"picture {i}, drawn" for i in range(5))}
    more, fewer = [sum(prepare_data.open_folder(own(val_images=n))[0].captions, [])
                   for n in (2, 3)]
    assert {*fewer} < {*more}                           # more held out: still the same ones
    prepare_data.main(own())
    assert "data/folder is complete" in capsys.readouterr().out


def test_pictures_behind_links_are_seen_once_and_so_are_those_of_other_makers():
    Path("mine/plain").mkdir(parents=True)
    Path("elsewhere").mkdir()
    for i, name in enumerate(("mine/a.jfif", "mine/b.PPM", "mine/plain/c.png", "elsewhere/d.tif")):
        draw(i).save(name, {"a": "JPEG"}.get(Path(name).stem))
    Path("mine/e.heic").write_text("which Pillow alone does not read")
    Path("mine/linked").symlink_to(Path("elsewhere").absolute())
    Path("mine/latest").symlink_to("plain")
    Path("mine/loop").symlink_to(".")
    names = ["a.jfif", "b.PPM", "e.heic", "latest/c.png", "linked/d.tif"]
    assert prepare_data.list_pictures(Path("mine")) == names


def test_a_part_of_the_pictures_is_of_all_folders(capsys):
    for i in range(40):
        name = Path("mine", "cats" if i < 20 else "dogs", f"{i}.png")
        name.parent.mkdir(parents=True, exist_ok=True)
        draw(i).save(name)
        name.with_suffix(".txt").write_text(f"{name.parent.name} {i}")
    few, more = [sum(prepare_data.open_folder(own(train_images=n))[0].captions, [])
                 for n in (10, 20)]
    assert {text.split()[0] for text in few} == {"cats", "dogs"}
    assert len(few) == 10 and {*few} < {*more}


@pytest.fixture
def mine():
    """Five captioned pictures, and their cache."""
    Path("mine").mkdir()
    for i in range(5):
        draw(i).save(f"mine/{i}.bmp")
    write_captions("csv", {f"{i}.bmp": [f"picture {i}"] for i in range(5)})
    prepare_data.main(own())


def add_one():
    draw(9).save("mine/9.bmp")
    with open("mine/captions.csv", "a") as file:
        file.write("\r\n9.bmp,picture 9")


@pytest.mark.parametrize("change,name", [
    (add_one, "captions"), (lambda: Path("mine/2.bmp").unlink(), "pictures"),
    (lambda: draw(9).save("mine/2.bmp"), "pictures"),
    (lambda: write_captions("csv", {f"{i}.bmp": [f"image {i}"] for i in range(5)}), "captions")])
def test_changed_pictures_and_captions_are_noticed(mine, change, name):
    change()
    refused(lambda: prepare_data.main(own()), "data/folder", name, "another --out")
    prepare_data.main(own(out="data/new"))
    shutil.copytree("mine", "moved")
    prepare_data.main(own(out="data/new", pictures="moved"))        # contents count, not places


@pytest.mark.parametrize("name,content,captions", [
    ("c.csv", "file_name,text\n0.jpg,\"a \"\"red\"\" apple\"\n./0.jpg,\"a, b\"\n",
     ["a \"red\" apple", "a, b"]),
    ("c.csv", "n,file_name,text\n1,0.jpg,one\n\n2,0.jpg,two\n", ["one", "two"]),
    ("c.csv", "text,file_name\n\"a, b\",0.jpg\n", ["a, b"]),
    ("c.jsonl", '{"file_name": "./0.jpg", "text": ["a", " b\\n c"]}', ["a", "b c"]),
])
def test_rows_of_tables(name, content, captions):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        Path(name).write_text(content, encoding=encoding)
        assert read_captions(Path()) == {"0.jpg": captions}


@pytest.mark.parametrize("name,content,line", [
    ("c.jsonl", '{"file_name": "1.png"}', 1), ("c.jsonl", "[1]", 1), ("c.jsonl", "3", 1),
    ("c.jsonl", '{"file_name": "1.png", "text": "a"}\n{', 2),
    ("c.jsonl", '{"file_name": 1, "text": "a"}', 1),
    ("c.jsonl", '{"file_name": "1.png", "text": [1]}', 1),
    ("c.jsonl", '{"file_name": "1.png", "text": {"en": "a cat"}}', 1),
    ("c.jsonl", '{"file_name": "1.png", "text": null}', 1),
    ("c.csv", "name,caption\n1.png,one\n", 1), ("c.csv", "file_name,text\n1.png\n", 2),
    ("c.csv", "text,file_name\na red apple, on a table,0.jpg\n", 2),
    ("c.csv", "file_name,text\n0.jpg,a red apple, on a table\n", 2),
    ("c.csv", 'file_name,text\n0.jpg,one\n1.jpg,"two\n2.jpg,three\n3.jpg,four"\n', 3),
    ("c.csv", 'file_name,text\n1.jpg,"two" three\n', 2),
])
def test_a_row_that_does_not_fit_is_named(name, content, line):
    Path(name).write_text(content)
    refused(lambda: read_captions(Path()), name, f"row {line}")


@pytest.mark.parametrize("content", [b"\xe9", "a b".encode("utf-16-le"), b"\xff\xfea"])
def test_text_in_another_encoding_is_refused_by_its_name(content):
    draw(0).save("0.png")
    for name in ("0.txt", "c.csv"):
        Path(name).write_bytes(content)
        refused(lambda: read_captions(Path()), name, "UTF-8")
        Path(name).unlink()


@pytest.mark.parametrize("changes,facts", [
    ({"image_size": 40}, ["--image_size=40", "multiple of 32"]),
    ({"val_images": 1}, ["--val_images=1"]), ({"context_len": 1}, ["--context_len=1"]),
    ({"pictures": "x"}, ["--dataset=folder"]), ({"dataset": "folder"}, ["--pictures"]),
    ({"dataset": "folder", "pictures": "nowhere"}, ["nowhere is no folder"]),
    ({"text_tower": "nowhere.bin"}, ["nowhere.bin is missing"]),
    ({"autoencoder": "."}, ["is not a file"])])
def test_what_makes_no_sense_is_refused(changes, facts):
    refused(lambda: prepare_data.main(Config(**{"train_images": 5} | changes)), *facts)
    assert not [*Path("data").rglob("[!.]*.*")]


def test_captions_that_are_too_long_are_counted(capsys):
    Path("mine").mkdir()
    for i in range(4):
        draw(i).save(f"mine/{i}.png")
    write_captions("txt", {f"{i}.png": ["word " * (200 if i < 3 else 3) + str(i)]
                           for i in range(4)})
    prepare_data.main(own())
    assert "3 of them truncated to 77 tokens" in capsys.readouterr().out


# ---- the one reader of pictures ----

RED = Image.new("RGB", (40, 40), (255, 0, 0))


def pixel(image, at=(1, 1), **options):
    image.save("a.png", **options)
    return read_picture("a.png").getpixel(at)


def test_every_kind_of_picture_becomes_rgb():
    RED.convert("CMYK").save("a.jpg", quality=100)
    assert np.allclose(read_picture("a.jpg").getpixel((5, 5)), (255, 0, 0), atol=4)
    assert pixel(RED.convert("P")) == (255, 0, 0)
    assert pixel(Image.new("L", (4, 4), 90)) == (90, 90, 90)
    assert pixel(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    for alpha, expected in ((0, (255, 255, 255)), (255, (255, 0, 0)), (127, (255, 128, 128))):
        assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, alpha))) == expected
    assert pixel(Image.new("LA", (4, 4), (0, 0))) == (255, 255, 255)
    for value in (0, 77, 255):
        grey = Image.fromarray(np.full((4, 4), 257 * value, dtype=np.uint16))
        assert pixel(grey) == (value,) * 3
    index = RED.convert("P").getpixel((0, 0))
    assert pixel(RED.convert("P"), transparency=index) == (255, 255, 255)


def test_pictures_are_turned_upright():
    exif, half_red = Image.Exif(), Image.new("RGB", (64, 32))
    exif[0x0112] = 6                                        # clockwise by 90 degrees
    half_red.paste((255, 0, 0), (0, 0, 32, 32))             # the left half comes to the top
    half_red.save("a.jpg", exif=exif, quality=95)
    upright = read_picture("a.jpg")
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 10))[0] > 240 and upright.getpixel((16, 54))[0] < 15


@pytest.mark.parametrize("exif", [b"foreign", b"", b"II*\0\x08\0\0\0\xff\xff" + 9 * b"\x12\x01"])
def test_broken_exif_data_do_not_cost_a_sound_picture(exif):
    RED.save("a.png")
    data = Path("a.png").read_bytes()
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    Path("a.png").write_bytes(data[:33] + chunk + data[33:])        # after the header
    assert read_picture("a.png").tobytes() == RED.tobytes()


def test_what_is_no_picture_is_one_sentence_with_its_name(monkeypatch):
    draw(0).save("half.png")
    os.truncate("half.png", os.path.getsize("half.png") // 2)
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    os.mkfifo("pipe.png")
    for name in ("half.png", "text.png", "empty.png", "pipe.png", "missing.png"):
        refused(lambda: read_picture(name), name)
    for kind in (np.float32, np.int32):                 # 0 to 1, or to 255? Pillow makes it black
        Image.fromarray(np.ones((4, 4), dtype=kind)).save("wide.tif")
        refused(lambda: read_picture("wide.tif"), "wide.tif", "32 bits", "8 or 16")
    draw(0).save("bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(lambda: read_picture("bomb.png"), "bomb.png", "DecompressionBomb")


def test_the_crop_is_central_with_whole_pixels():
    pixels = np.zeros((32, 41, 3), dtype=np.uint8)
    pixels[:, 4:36] = 200                                   # (41 - 32) // 2 = 4
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        split = prepare_data.open_pictures(own(), {"a": ["text"]}, lambda name: image)
        assert (split.load(0) == 200).all()


def test_an_array_that_is_larger_than_the_memory_can_be_read():
    rows = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 ** 20
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 2 ** 20)}
    with open("large.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * 2 ** 20)     # a hole: takes no space
    array = prepare_data.fill(Path("large.npy"), rows, None)
    assert array.shape == (rows, 2 ** 20) and not array[-1].any()


def test_an_array_that_does_not_fit_on_the_disk_is_not_begun(monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda _: usage(99))
    with pytest.raises(UserError, match="big.npy takes 100 bytes, and 99 are free"):
        prepare_data.fill(Path("big.npy"), 5, np.zeros((5, 20), dtype=np.uint8).__getitem__)
    assert not [*Path().glob("*big*")]
