"""Protects the road from public files to a cache: after any interruption the bits are the same."""
import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_data
import sample
import train
from clip_text import CLIPText, load_clip_text, load_text_tower, tokenize
from model import UserError
from prepare_data import Config, Folder, Progress, crop_and_resize, fetch, read_cache, to_rgb
from vae import KLAutoencoder, load_autoencoder, load_vae, to_unit

ARRAYS = ("train_moments", "val_moments", "val_images", "text", "train_pairs", "val_pairs")
TRAIN_IDS, VAL_IDS = (57870, 9, 25, 581921, 30), (42, 7, 500000, 73)        # unsorted, as in COCO
CAPTIONS = {9: ["A  red bus\n", "A bus on a road. ", "bus", "the\tred bus", "A bus, parked.",
                "six captions here"],
            42: ["Two dogs play.", "another caption of two dogs"]}


# ---- a COCO in miniature, on a server that breaks off ----

class Server(http.server.ThreadingHTTPServer):
    """Files in memory with Range; `allowed`: where a file's connection breaks, and if for good."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.allowed, self.ranges = {}, [], {}, True
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path[1:], self.server
        content, begin = server.files[name], int(
            self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        server.requests.append((name, begin))
        begin = begin if server.ranges else 0
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        limit, for_good = server.allowed.get(name, (len(content), False))
        if not for_good:
            server.allowed.pop(name, None)
        self.wfile.write(content[begin:max(begin, limit)])

    def log_message(self, *_):
        pass


def draw(seed, size, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def coco_split(archive, annotations, split, ids):
    images, captions = [], []
    for i in ids:
        name = f"COCO_{split}2014_{i:012d}.jpg"
        file = io.BytesIO()
        draw(i, (75, 48) if i % 2 else (40, 61), {9: "L", 25: "CMYK"}.get(i, "RGB")).save(
            file, "JPEG")
        archive.writestr(f"{split}2014/{name}", file.getvalue())
        images.append({"id": i, "file_name": name, "width": 1, "height": 1})
        captions += [{"id": len(captions), "image_id": i, "caption": text}
                     for text in CAPTIONS.get(i, [f"picture {i}", "a picture"])]
    annotations.writestr(
        f"annotations/captions_{split}2014.json",
        json.dumps({"images": images, "annotations": captions[::2] + captions[1::2]}))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with the five files under their names, and FILES-table entries without addresses."""
    folder = tmp_path_factory.mktemp("served")
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as annotations:
        for split, ids in (("train", TRAIN_IDS), ("val", VAL_IDS)):
            with zipfile.ZipFile(folder / f"{split}2014.zip", "w") as archive:
                coco_split(archive, annotations, split, ids)
    torch.manual_seed(0)
    vae, tower = (KLAutoencoder(channels=32, multipliers=(1, 1, 1, 1), blocks=1),
                  CLIPText(width=64, layers=1, heads=1, projection=32))
    for module, name in ((vae, "kl-f8.bin"), (tower, "clip-vit-large-patch14.bin")):
        state = {key: 0.1 * torch.randn_like(value) for key, value in module.state_dict().items()}
        torch.save(state, folder / name)
    return folder


@pytest.fixture
def server(served, monkeypatch):
    server = Server()
    for path in served.iterdir():
        server.files[path.name] = path.read_bytes()
        entry = (f"http://127.0.0.1:{server.server_port}/{path.name}", path.stat().st_size,
                 hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(prepare_data.FILES, path.name, entry)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def here(served, server, monkeypatch):
    """Everything is on disk already: a Config of COCO with parts of two rows."""
    monkeypatch.setattr(Progress, "PART", 2)
    Path("weights").symlink_to(served)
    return lambda **changes: Config(**{"dataset": "coco", "image_size": 32, "val_images": 3,
                                       "downloads": str(served)} | changes)


def same(one, other):
    for name in ARRAYS:
        assert (Path(one) / f"{name}.npy").read_bytes() == (
            Path(other) / f"{name}.npy").read_bytes(), name
    for name in ("captions.txt", "meta.json", "preview.png"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name


# ---- downloads ----

def test_coco_is_downloaded_over_broken_connections_and_prepared(server, served, capsys):
    config = Config(dataset="coco", image_size=32, val_images=3)
    half = {name: len(content) // 2 for name, content in server.files.items()}
    server.allowed = {"val2014.zip": (half["val2014.zip"], False),
                      "train2014.zip": (half["train2014.zip"], True)}
    with pytest.raises(UserError, match="goes on where it stopped") as error:
        prepare_data.main(config)
    assert (str(error.value).count("\n") == 0
            and prepare_data.FILES["train2014.zip"][2] in str(error.value))
    assert Path("downloads/train2014.zip.part").stat().st_size == half["train2014.zip"]
    assert not Path("downloads/train2014.zip").exists() and not Path("data/coco/meta.json").exists()

    server.allowed, server.requests = {"val2014.zip": (half["val2014.zip"], False)}, []
    prepare_data.main(config)
    assert server.requests == [("train2014.zip", half["train2014.zip"]), ("val2014.zip", 0),
                               ("val2014.zip", half["val2014.zip"])]
    assert {path.name for path in [*Path("downloads").iterdir(),
                                   *Path("weights").iterdir()]} == set(server.files)
    out = capsys.readouterr().out
    assert "GB to data/coco" in out and "GB are free" in out and "time:" in out

    cache = read_cache("data/coco")
    train_ids, val_ids = sorted(TRAIN_IDS), sorted(VAL_IDS)[:3]
    assert cache.captions[0] == "" and cache.captions[1:] == sorted(set(cache.captions[1:]))
    texts = [[cache.captions[row] for picture, row in cache.train.pairs if picture == i]
             for i in range(5)]
    assert texts[train_ids.index(9)] == ["A red bus", "bus", "A bus, parked.", "A bus on a road.",
                                         "the red bus", "six captions here"]
    assert [cache.captions[row] for row in cache.val.pairs[:, 1]] == [
        "picture 7", "Two dogs play.", "picture 73"]
    assert "another caption of two dogs" not in cache.captions

    images = np.load("data/coco/val_images.npy")
    vae, tower = load_vae("weights/kl-f8.bin"), load_clip_text("weights/clip-vit-large-patch14.bin")
    for split, ids, moments in (("train", train_ids, cache.train.moments),
                                ("val", val_ids, cache.val.moments)):
        pictures = []
        with zipfile.ZipFile(served / f"{split}2014.zip") as archive:
            for i in ids:
                pixels = np.asarray(Image.open(archive.open(
                    f"{split}2014/COCO_{split}2014_{i:012d}.jpg")).convert("RGB"))
                H, W = pixels.shape[:2]
                s = min(H, W)
                square = pixels[(H - s) // 2:(H + s) // 2, (W - s) // 2:(W + s) // 2]
                pictures.append(np.asarray(Image.fromarray(square).resize(
                    (32, 32), Image.Resampling.LANCZOS)))
        assert split == "train" or (images == pictures).all()
        torch.testing.assert_close(
            torch.from_numpy(moments[:]),
            vae.encode(to_unit(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))))
    assert cache.text.shape == (len(cache.captions), 77, 64) and cache.text.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(cache.text[:]),
                               tower(tokenize(cache.captions))[0].half(), atol=2e-3, rtol=2e-3)

    assert cache.meta["latent_shape"] == [4, 4, 4] and cache.meta["latent_std"] == 1
    mean, logvar = torch.from_numpy(cache.train.moments[:]).chunk(2, dim=1)
    # of the latents: between pictures, and within each
    variance = (mean.var() + logvar.clamp(-30, 20).exp().mean()).item()
    assert cache.meta["latent_scale"] == pytest.approx(variance ** -0.5, rel=0.1)
    load_autoencoder(cache.meta["autoencoder"], None, "weights")
    load_text_tower(cache.meta["text_tower"], "weights")


def test_a_server_without_ranges_begins_again_and_the_file_is_whole(server):
    server.ranges = False
    Path("downloads").mkdir()
    Path("downloads/val2014.zip.part").write_bytes(b"the beginning of something else")
    assert fetch("val2014.zip", "downloads").read_bytes() == server.files["val2014.zip"]


def test_a_file_with_another_hash_is_refused_and_stays(server):
    Path("downloads").mkdir()
    wrong = server.files["val2014.zip"][:-1] + b"?"
    for name in ("val2014.zip", "val2014.zip.part"):
        path = Path("downloads") / name
        path.write_bytes(wrong)
        with pytest.raises(UserError) as error:
            fetch("val2014.zip", "downloads")
        assert (hashlib.sha256(wrong).hexdigest() in str(error.value)
                and prepare_data.FILES["val2014.zip"][2] in str(error.value))
        assert path.read_bytes() == wrong and "\n" not in str(error.value)
        path.unlink()


def test_a_web_page_in_place_of_a_file_is_refused(server, served):
    page = b"<!DOCTYPE html><title>Please log in</title>"
    server.files["kl-f8.bin"] = page
    with pytest.raises(UserError, match="another file, or a web page"):
        fetch("kl-f8.bin", "weights")
    assert Path("weights/kl-f8.bin.part").stat().st_size == 0
    Path("weights/kl-f8.bin").write_bytes(page)
    with pytest.raises(UserError, match="43 bytes.*looks like HTML"):
        fetch("kl-f8.bin", "weights")
    with pytest.raises(UserError, match="43 bytes and looks like HTML"):
        prepare_data.main(Config(train_images=4, val_images=2, autoencoder="weights/kl-f8.bin"))


def test_without_internet_one_sentence_says_what_to_fetch_and_where_to_put_it(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/kl"
    monkeypatch.setitem(prepare_data.FILES, "kl-f8.bin", (address, 12345, "abc"))
    with pytest.raises(UserError) as error:
        prepare_data.main(Config(train_images=4, val_images=2, autoencoder="kl"))
    for fact in (address, "12,345 bytes", "SHA-256 abc", str(Path("weights/kl-f8.bin"))):
        assert fact in str(error.value)
    assert "\n" not in str(error.value)


def test_every_public_file_has_an_address_a_size_and_a_hash():
    for name, (url, size, digest) in prepare_data.FILES.items():
        assert url.startswith(("http://images.cocodataset.org/", "https://")) and size > 10 ** 7
        assert len(digest) == 64 and int(digest, 16)


# ---- the disk ----

def test_too_small_a_disk_is_refused_before_anything_large_is_written(here, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="not enough room.*10,000 free.*--out") as error:
        prepare_data.main(here())
    assert "\n" not in str(error.value) and not list(Path("data/coco").glob("*.npy"))


def test_the_space_that_is_said_is_the_space_that_is_used(here, monkeypatch):
    needs = []
    monkeypatch.setattr(prepare_data, "check_space", needs.append)
    prepare_data.main(here())
    said, used = (sum(needs[-1].values()),
                  sum(path.stat().st_size for path in Path("data/coco").iterdir()))
    assert used <= said < used + 5_000_000


def test_a_full_disk_is_one_sentence_and_the_next_call_goes_on(here, monkeypatch):
    prepare_data.main(here(out="whole"))
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full.*goes on where it stopped"):
        prepare_data.main(here(out="full"))
    prepare_data.main(here(out="full"))
    same("full", "whole")


# ---- interruptions ----

def test_interrupted_at_every_write_the_result_is_the_same(here, monkeypatch):
    prepare_data.main(here(out="whole"))
    fsync, calls = os.fsync, []

    def interrupt(descriptor):
        calls.append(descriptor)
        fsync(descriptor)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    for attempt in range(100):
        try:
            prepare_data.main(here(out="often"))
            break
        except KeyboardInterrupt:
            with pytest.raises(UserError, match="not a finished cache"):
                read_cache("often")
    assert 3 < attempt < 99
    same("often", "whole")


def test_killed_in_the_middle_of_a_row_the_next_call_goes_on(here, capsys):
    config = here(out="killed")
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(prepare_data.__file__).parent)!r})
import prepare_data, torch
torch.set_num_threads(1)
prepare_data.FILES.update({ {name: prepare_data.FILES[name] for name in prepare_data.FILES}!r})
prepare_data.Progress.PART = 2
encode, calls = prepare_data.encode_pictures, []
def killed(*arguments):
    for rows in encode(*arguments):
        calls.append(rows)
        yield rows if len(calls) < 4 else die(rows)
def die(rows):
    path = "killed/train_moments.npy"
    with open(path, "ab") as file:
        file.write(rows.tobytes()[:700])
    os._exit(9)
prepare_data.encode_pictures = killed
prepare_data.main(prepare_data.{config!r})
"""
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL).returncode == 9
    state = json.loads(Path("killed/progress.json").read_text())
    assert (state["rows"] == {"val_images": 3, "val_moments": 3, "train_moments": 2}
            and not Path("killed/meta.json").exists())
    assert (Path("killed/train_moments.npy").stat().st_size - 128) % 512 == 700 - 512
    prepare_data.main(config)
    assert "made anew" not in capsys.readouterr().out
    prepare_data.main(here(out="whole"))
    same("killed", "whole")


@pytest.mark.parametrize("damage", ["shorter", "gone", "empty", "other"])
def test_data_that_lag_behind_their_record_are_made_again(here, monkeypatch, damage):
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(prepare_data, "measure_scale", stop)
        prepare_data.main(here(out="cut"))
    path = Path("cut/train_moments.npy")
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        os.truncate(path, path.stat().st_size - 700 if damage == "shorter" else 0)
    prepare_data.main(here(out="cut"))
    prepare_data.main(here(out="whole"))
    same("cut", "whole")


def test_other_weights_under_the_same_name_make_a_half_written_cache_anew(
        here, monkeypatch, served, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    shutil.copy(served / "kl-f8.bin", "mine.bin")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(prepare_data, "measure_scale", stop)
        prepare_data.main(here(autoencoder="mine.bin"))
    state = torch.load("mine.bin")
    torch.save({name: 2 * tensor for name, tensor in state.items()}, "mine.bin")
    prepare_data.main(here(autoencoder="mine.bin"))
    assert "made anew" in capsys.readouterr().out
    prepare_data.main(here(autoencoder="mine.bin", out="whole"))
    same("data/coco", "whole")


# ---- use ----

def test_two_steps_are_trained_on_it_and_a_picture_is_sampled(here):
    prepare_data.main(here())
    train.main(train.Config(data="data/coco", name="tiny", steps=2, patch_size=2, width=32, heads=2,
                            n_image=1, n_fuse=1, n_text=1, batch_size=4, validation_images=3,
                            sample_steps=2, score=False, precision="float32"))
    sample.main(sample.Config(checkpoint="out/tiny/last.pt", prompt="a red bus", n=1, steps=2))
    with Image.open("out/tiny/generated/0001/00000.png") as image:
        assert image.size == (32, 32)


def test_shapes_go_through_the_real_encoders_too(here, served):
    shutil.copy(served / "kl-f8.bin", "mine.bin")
    prepare_data.main(Config(train_images=6, val_images=2, autoencoder="mine.bin",
                             text_tower="clip"))
    meta = read_cache("data/shapes").meta
    assert meta["latent_shape"] == [4, 4, 4] and meta["config"]["context_len"] == 77
    assert meta["autoencoder"]["file"] == str(Path("mine.bin").resolve())
    assert meta["text_tower"]["file"] == "clip-vit-large-patch14.bin"
    load_autoencoder(meta["autoencoder"], None, "weights")


@pytest.mark.parametrize("changes,message", [
    ({"dataset": "cocoa"}, "expected shapes, coco or folder"),
    ({"image_size": 40}, "multiple of 32"), ({"val_images": -1}, "negative"),
    ({"dataset": "folder", "autoencoder": "linear"}, "--pictures="),
    ({"text_tower": "nowhere.bin"}, "expected random, clip or a file")])
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prepare_data.main(Config(**changes))


# ---- your own pictures ----

def own(folder="mine", **changes):
    return Config(**{"dataset": "folder", "pictures": folder, "image_size": 32,
                     "autoencoder": "linear", "text_tower": "random", "val_images": 2} | changes)


def write_captions(layout, captions):
    if layout == "txt":
        for name, texts in captions.items():
            Path("mine", name).with_suffix(".txt").write_text("\n".join(texts) + "\n\n",
                                                              encoding="utf-8")
    elif layout == "jsonl":
        lines = [{"file_name": name, "text": texts[0] if len(texts) == 1 else texts}
                 for name, texts in captions.items()]
        Path("mine/captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    else:
        rows = [f'{name},"{text}"' for name, texts in captions.items() for text in texts]
        Path("mine/captions.csv").write_text("\n".join(["file_name,text", *rows]),
                                             encoding="utf-8-sig")


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_own_pictures_with_each_layout_of_captions(layout, capsys):
    Path("mine/more").mkdir(parents=True)
    captions = {f"{i}.png": [f"picture  {i}, drawn"] for i in range(5)} | {
        "more/café.JPG": ["one of two", "二つ目", " "], "x.png": ["broken"]}
    for i, name in enumerate(captions):
        draw(i, (50, 40)).save(Path("mine", name), "PNG")
    for i in range(7):
        draw(i, (50, 40)).save(f"mine/without{i}.png")
    Path("mine/x.png").write_bytes(Path("mine/1.png").read_bytes()[:200])
    write_captions(layout, captions)
    prepare_data.main(own())
    out = capsys.readouterr().out
    assert ("without a caption: 7 pictures" in out and "without4.png ..." in out
            and "without5" not in out)
    assert "can't be read: 1 pictures: x.png (" in out
    cache = read_cache("data/folder")
    assert (cache.meta["train_images"], cache.meta["val_images"]) == (4, 2)
    assert set(cache.captions) <= {
        "", "one of two", "二つ目", *(f"picture {i}, drawn" for i in range(5))}
    prepare_data.main(own(out="again"))
    same("data/folder", "again")
    train_names = prepare_data.open_folder(own(val_images=1))[0].names
    # more held out: still the same ones
    assert set(prepare_data.open_folder(own(val_images=2))[0].names) < set(train_names)


@pytest.mark.parametrize("lines,message", [
    ('{"file_name": "1.png"}', "KeyError"),
    ('{"file_name": "1.png", "text": "a"}\n{', "after 1 rows"), ('[1]', "TypeError")])
def test_a_table_that_lacks_something_is_named(lines, message):
    Path("mine").mkdir()
    Path("mine/c.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"c.jsonl.*{message}"):
        prepare_data.main(own())
    Path("mine/d.csv").write_text("name,caption\n1.png,one\n")
    with pytest.raises(UserError, match="several tables.*c.jsonl, d.csv"):
        prepare_data.main(own())
    Path("mine/c.jsonl").unlink()
    with pytest.raises(UserError, match="d.csv.*KeyError"):
        prepare_data.main(own())


def test_every_kind_of_picture_becomes_rgb_and_upright():
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    assert to_rgb(red.convert("CMYK")).getpixel((5, 5)) == (255, 0, 0)
    assert to_rgb(red.convert("P")).getpixel((5, 5)) == (255, 0, 0)
    assert to_rgb(Image.new("L", (40, 40), 90)).getpixel((5, 5)) == (90, 90, 90)
    assert to_rgb(Image.new("1", (40, 40), 1)).getpixel((5, 5)) == (255, 255, 255)
    for half, expected in ((0, (255, 255, 255)), (255, (255, 0, 0)), (127, (255, 128, 128))):
        assert to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, half))).getpixel((1, 1)) == expected
    assert to_rgb(Image.new("LA", (4, 4), (0, 0))).getpixel((1, 1)) == (255, 255, 255)
    for value in (0, 77, 255):                                      # 16-bit grey, through a file
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), 257 * value, dtype=np.uint16)).save(file, "PNG")
        assert to_rgb(Image.open(file)).getpixel((1, 1)) == (value,) * 3
    transparent = io.BytesIO()                                      # a palette with transparency
    red.convert("P").save(transparent, "PNG", transparency=red.convert("P").getpixel((0, 0)))
    assert to_rgb(Image.open(transparent)).getpixel((1, 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (4, 4)))
    turned, exif = io.BytesIO(), Image.Exif()                       # orientation 6: clockwise by 90
    exif[0x0112] = 6
    half_red = Image.new("RGB", (64, 32))
    half_red.paste((255, 0, 0), (0, 0, 32, 32))                     # the left half comes to the top
    half_red.save(turned, "JPEG", exif=exif, quality=95)
    upright = to_rgb(Image.open(turned))
    assert (upright.size == (32, 64) and upright.getpixel((16, 10))[0] > 240
            and upright.getpixel((16, 54))[0] < 15)


def test_the_crop_is_central_with_whole_pixels():
    pixels = np.zeros((32, 41, 3), dtype=np.uint8)
    pixels[:, 4:36] = 200                                           # (41 - 32) // 2 = 4
    assert (crop_and_resize(Image.fromarray(pixels), 32) == 200).all()
    assert (crop_and_resize(Image.fromarray(pixels.transpose(1, 0, 2)), 32) == 200).all()


def test_captions_that_are_too_long_are_counted(capsys):
    Path("mine").mkdir()
    for i in range(4):
        draw(i, (40, 40)).save(f"mine/{i}.png")
    write_captions("txt", {f"{i}.png": ["word " * (200 if i < 3 else 3) + str(i)]
                           for i in range(4)})
    prepare_data.main(own())
    assert "3 captions are longer than 77 tokens" in capsys.readouterr().out
    assert read_cache("data/folder").meta["truncated"] == 3
