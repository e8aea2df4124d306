"""Protects the scores: right on known pictures, repeatable, with the protocol beside each."""
import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import model
import prepare_data
import sample
from clip_text import CLIPText, tokenize
from evaluate import (CLIP, INCEPTION, PREFIX, CLIPImage, Config, choose_prompts, load_inception,
                      warn_about_fid)
from model import UserError, UViT, UViTConfig, count_multiply_adds
from sample import Pipeline
from test_fid import random_weights
from vae import KLAutoencoder

N, S = 6, 64                        # held-out pictures of the cache, and their side
CAPTIONS = [["a red tram", "a tram on a hill"], ["two dogs", "dogs at play", "a pair of dogs"],
            ["a bowl of soup"], ["a man with a kite", "a kite"],
            ["an empty street", "a street at night"], ["three sheep", "sheep on a meadow"]]


def randomise(module, seed=0, std=0.05):
    """Every weight, bias and norm at random: what starts at zero or one would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
            parameter.normal_(mean, std, generator=generator)
    return module.eval().requires_grad_(False)


def towers():
    return (randomise(CLIPText(64, 2, 1, 32), 1, 0.2),
            randomise(CLIPImage(64, 2, 1, 32, patch_size=16, tokens=10), 2, 0.2))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The public files under their own names, small where they may be, with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_weights(), folder / INCEPTION)
    text, image = towers()
    torch.save(dict(text.state_dict())
               | {f"visual.{key}": value for key, value in image.state_dict().items()},
               folder / CLIP)
    torch.save(randomise(KLAutoencoder(32, (1, 2, 4, 4), 1), 3).state_dict(), folder / "kl-f8.bin")
    return folder


def real_pictures() -> np.ndarray:
    """(N, S, S, 3) uint8, smooth, each with colours of its own."""
    coarse = np.random.default_rng(0).integers(0, 256, (N, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(picture).resize((S, S), Image.Resampling.BICUBIC))
                     for picture in coarse])


def write_cache(folder: Path, **changes):
    """A cache of pictures with one to three captions each, in prepare_data.py's form; latents 0."""
    folder.mkdir(parents=True)
    captions = [caption for several in CAPTIONS for caption in several]
    pairs = [(i, 1 + captions.index(caption))
             for i, several in enumerate(CAPTIONS) for caption in several]
    for split in ("train", "val"):
        np.save(folder / f"{split}_moments.npy", np.zeros((N, 8, 8, 8), dtype=np.float32))
        np.save(folder / f"{split}_pairs.npy", np.array(pairs))
    np.save(folder / "val_images.npy", real_pictures())
    np.save(folder / "text.npy", np.zeros((1 + len(captions), 77, 64), dtype=np.float16))
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in ["", *captions]))
    (folder / "meta.json").write_text(json.dumps({
        "format": prepare_data.CACHE_FORMAT, "dataset": "coco", "image_size": S,
        "latent_scale": 0.2, "latent_shape": [4, 8, 8],
        "config": {"dataset": "coco", "image_size": S},
        "autoencoder": {"kind": "kl", "file": "kl-f8.bin", "about": "tiny"},
        "text_tower": {"kind": "clip", "file": CLIP, "about": "tiny"}} | changes))


@pytest.fixture
def house(tmp_path):
    """A cache, an official file in runs/, and a folder of pictures with their first captions."""
    write_cache(tmp_path / "data" / "coco")
    (tmp_path / "runs").mkdir()
    save_official("runs/small.pth")
    save_folder("pictures", real_pictures(), [several[0] for several in CAPTIONS])


def save_official(path: str, depth: int = 3, seed: int = 0):
    net = UViT(UViTConfig("early", "concat", depth=depth, image_size=8, width=64, heads=1,
                          context_dim=64))
    torch.save(randomise(net, seed).state_dict(), path)


def save_folder(folder: str, pictures: np.ndarray, captions: list[str]):
    Path(folder).mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(Path(folder) / f"p{i}.png")
    (Path(folder) / "captions.txt").write_text(
        "".join(f"p{i}.png\t{caption}\n" for i, caption in enumerate(captions)))


class FewFeatures(torch.nn.Module):
    """In place of Inception where a test is not about it: the mean colours of the four quarters."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def quick(house, weights, monkeypatch):
    """A function that scores in no time, with 12 features for the FID, and gives the eval.json."""
    Path("few.pth").write_text("the mean colours")
    monkeypatch.setattr(evaluate, "load_inception", lambda path: FewFeatures())
    monkeypatch.setattr(evaluate, "Statistics", partial(evaluate.Statistics, 12))

    def call(**changes):
        config = Config(**{
            "checkpoint": "runs/small.pth", "data": "data/coco", "steps": 2, "guidance_scale": 2.0,
            "batch_size": 2, "weights": str(weights), "inception": "few.pth",
            "clip": str(weights / CLIP)} | changes)
        evaluate.main(config)
        return json.loads((Path(config.folder or Path(config.checkpoint.split(",")[-1]).parent)
                           / "eval.json").read_text())
    return call


def rows_of(printed: str) -> list[list[str]]:
    """The cells of a printed Markdown table, its headings first."""
    rows = [line.strip("|").split("|") for line in printed.splitlines()
            if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row] for row in rows]


# ---- the numbers ----

def features_one_by_one(net, pictures):
    return np.concatenate([net(torch.from_numpy(picture).permute(2, 0, 1)[None]).double().numpy()
                           for picture in pictures])


def plain_fid(x, y):
    """The FID of features (n, D), n < D: the root of the n x n part that is not 0, by SciPy."""
    a, b = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    root = scipy.linalg.sqrtm(a @ b.T @ b @ a.T)
    return (((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum()
            - 2 * np.trace(root).real)


def test_fid_is_zero_for_the_same_pictures_and_equals_the_plain_formula_for_others(
        house, weights):
    real = real_pictures()
    worse = ((real + np.random.default_rng(1).normal(0, 40, real.shape))
             .clip(0, 255).astype(np.uint8))
    save_folder("worse", worse, [several[0] for several in CAPTIONS])
    found = []
    for name in ("pictures", "worse"):
        evaluate.main(Config(folder=name, data="data/coco", inception=str(weights / INCEPTION),
                             clip=str(weights / CLIP)))
        found.append(json.loads(Path(name, "eval.json").read_text())["scores"]["fid"])
    x, y = [features_one_by_one(load_inception(weights / INCEPTION), pictures)
            for pictures in (real, worse)]
    assert abs(found[0]) < 1e-6 * np.trace(np.cov(x, rowvar=False))
    assert found[1] == pytest.approx(plain_fid(x, y), rel=1e-5) and found[1] > 0


def test_fid_grows_with_corruption(quick):
    found = []
    for share in (0, 0.1, 0.3, 0.9):
        save_folder(f"grey{share}",
                    ((1 - share) * real_pictures() + share * 128).astype(np.uint8),
                    [several[0] for several in CAPTIONS])
        found.append(quick(folder=f"grey{share}")["scores"]["fid"])
    assert abs(found[0]) < 1e-6 < found[1] < found[2] < found[3]


def test_clip_scores_are_cosines_of_each_picture_with_its_own_caption(quick):
    order = [3, 1, 0, 5, 4, 2]
    captions = [CAPTIONS[i][-1] for i in order]
    save_folder("mixed", real_pictures()[order], captions)
    result = quick(folder="mixed")
    text, image = towers()
    pictures = features_one_by_one(image, real_pictures())

    def cosine(prefix, i, caption):
        t, p = text(tokenize([prefix + caption]))[1][0].double().numpy(), pictures[i]
        return t @ p / np.linalg.norm(t) / np.linalg.norm(p)
    for name, prefix in (("clip_prefix", PREFIX), ("clip", "")):
        expected = np.array([cosine(prefix, i, caption) for i, caption in zip(order, captions)])
        assert expected.std() > 0.01
        scores = result["scores"][name]
        assert scores["cosine"] == pytest.approx(expected.mean(), abs=1e-6)
        assert scores["x 100"] == pytest.approx(100 * expected.mean(), abs=1e-4)
        assert scores["x 2.5"] == pytest.approx(2.5 * np.maximum(expected, 0).mean(), abs=1e-6)
        real = np.mean([cosine(prefix, i, CAPTIONS[i][0]) for i in range(N)])
        shuffled = np.mean([cosine(prefix, i, CAPTIONS[(i + 3) % N][0]) for i in range(N)])
        bounds = result["bounds"]
        assert bounds["real pairs (ceiling)"][name]["cosine"] == pytest.approx(real, abs=1e-6)
        assert bounds["real, captions shuffled (floor)"][name]["cosine"] == pytest.approx(
            shuffled, abs=1e-6)
    assert (result["protocol"]["clip"]["file"] == CLIP
            and result["protocol"]["clip_prefix"] == "A photo depicts ")


def test_the_same_pictures_give_the_same_scores_whatever_the_batch_size(quick, monkeypatch):
    first = quick(folder="pictures")["scores"]
    assert quick(folder="pictures", batch_size=5)["scores"] == first
    monkeypatch.setattr(evaluate, "SCORE_BATCH", 4)
    other = quick(folder="pictures")["scores"]
    for name in ("clip", "clip_prefix"):
        assert other[name] == pytest.approx(first[name], rel=1e-5)
    assert other["fid"] == pytest.approx(first["fid"], abs=1e-6)


def test_a_single_picture_has_no_fid(quick):
    with pytest.raises(UserError, match="score two or more"):
        quick(folder="pictures", n=1)


@pytest.mark.parametrize("n,few,other", [
    (2, True, True), (2047, True, True), (2048, False, True), (29_999, False, True),
    (30_000, False, False)])
def test_fid_of_few_pictures_comes_with_warnings(n, few, other):
    warnings = " ".join(warn_about_fid(n))
    assert ("singular" in warnings, "not comparable with FID-30k" in warnings) == (few, other)


# ---- the reference ----

def test_reference_statistics_are_kept_until_pictures_or_weights_change(quick, monkeypatch):
    calls = []
    forward = FewFeatures.forward
    monkeypatch.setattr(FewFeatures, "forward",
                        lambda self, images: calls.append(len(images)) or forward(self, images))
    quick(folder="pictures")
    kept = Path("data/coco/fid_reference_6.npz")
    with np.load(kept, allow_pickle=False) as file:
        expected = features_one_by_one(FewFeatures(), real_pictures())
        np.testing.assert_allclose(file["sigma"], np.cov(expected, rowvar=False),
                                   rtol=1e-6, atol=1e-6)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
    assert sum(calls) == 2 * N + N              # reference, folder, and `expected` above
    del calls[:]
    first = quick(folder="pictures")
    assert sum(calls) == N
    Path("few.pth").write_text("other weights")
    second = quick(folder="pictures")
    assert sum(calls) == 3 * N and (first["protocol"]["inception"]["sha256"]
                                    != second["protocol"]["inception"]["sha256"])
    np.save("data/coco/val_images.npy", 255 - real_pictures())
    third = quick(folder="pictures")
    assert sum(calls) == 5 * N and third["scores"]["fid"] > second["scores"]["fid"]
    assert third["protocol"]["reference"]["sha256"] != second["protocol"]["reference"]["sha256"]
    np.save("data/coco/val_images.npy", np.concatenate([real_pictures()] * 2))
    assert (quick(folder="pictures")["protocol"]["reference"]["pictures"] == 2 * N
            and Path("data/coco/fid_reference_12.npz").exists())


# ---- which captions ----

def prompts(**changes):
    cache = prepare_data.read_cache("data/coco")
    rows, captions = choose_prompts(cache, Config(data="data/coco", **changes))
    return list(rows), captions


def test_the_first_rule_takes_pictures_in_order_and_their_first_captions(house):
    assert prompts() == (list(range(N)), [several[0] for several in CAPTIONS])
    assert prompts(n=2) == ([0, 1], ["a red tram", "two dogs"])


def test_the_random_rule_takes_any_picture_and_any_of_its_captions_by_the_seed(house):
    drawn = [prompts(prompts="random", seed=seed) for seed in range(40)]
    assert all(sorted(rows) == list(range(N))
               and all(caption in CAPTIONS[row] for row, caption in zip(rows, captions))
               for rows, captions in drawn)
    assert {rows[0] for rows, _ in drawn} == set(range(N))
    assert ({caption for _, captions in drawn for caption in captions}
            == {caption for several in CAPTIONS for caption in several})
    assert prompts(prompts="random", seed=3) == drawn[3] != drawn[4]
    assert prompts(prompts="random", seed=3, n=4) == (drawn[3][0][:4], drawn[3][1][:4])


def test_more_pictures_than_there_are_is_said(house, capsys):
    assert len(prompts(n=7)[0]) == N
    assert "data/coco has 6 held-out pictures, and all are taken" in capsys.readouterr().out


# ---- samples on disk ----

@pytest.fixture
def drawn(monkeypatch):
    """The captions of every call of Pipeline.draw."""
    calls, draw = [], Pipeline.draw
    monkeypatch.setattr(
        Pipeline, "draw",
        lambda self, captions, *rest: calls.append(captions) or draw(self, captions, *rest))
    return calls


def folder_of(w="2"):
    """Of the samples at guidance scale w."""
    return next(Path("runs/eval").glob(f"step1000000_ema_*_w{w}_steps2_first_seed0"))


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def test_samples_are_drawn_once(quick, drawn):
    first = quick()
    assert [len(captions) for captions in drawn] == [2, 2, 2]
    assert (folder_of() / "captions.txt").read_text().splitlines()[1] == "00001.png\ttwo dogs"
    before = {path: path.stat().st_mtime_ns for path in folder_of().glob("*.png")}
    second = quick()
    assert len(drawn) == 3 and before == {path: path.stat().st_mtime_ns
                                          for path in folder_of().glob("*.png")}
    assert first == second and first["images_per_second"] > 0
    assert quick(n=4)["protocol"]["pictures"] == 4 and len(drawn) == 3
    quick(seed=1)
    assert len(drawn) == 6


def test_samples_of_other_weights_at_the_same_place_are_not_taken_for_ours(quick, drawn):
    first, old = quick(n=2), folder_of()
    save_official("runs/small.pth", seed=7)
    second = quick(n=2)
    new, = {*Path("runs/eval").iterdir()} - {old}
    assert (len(drawn) == 2 and (pixels(new) != pixels(old)).any()
            and first["weights_sha256"] != second["weights_sha256"])


def test_an_interrupted_call_goes_on_where_it_stopped(quick, drawn, monkeypatch):
    save = evaluate.save_pictures

    def stop_at_the_second(folder, first, *rest):
        if first == 2:
            raise KeyboardInterrupt
        save(folder, first, *rest)
    with monkeypatch.context() as context:
        context.setattr(evaluate, "save_pictures", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            quick()
    with open(folder_of() / "captions.txt", "a", encoding="utf-8") as file:
        file.write("00002.png\ta bo")                                   # as a crash may leave it
    del drawn[:]
    quick()
    assert drawn == [["a bowl of soup", "a man with a kite"], ["an empty street", "three sheep"]]
    assert (folder_of() / "captions.txt").read_text().splitlines() == [
        f"0000{i}.png\t{CAPTIONS[i][0]}" for i in range(N)]
    resumed = pixels(folder_of())
    folder_of().rename("resumed")
    quick()
    assert (pixels(folder_of()) == resumed).all()


@pytest.mark.parametrize("broken", [False, True])
def test_a_compiled_step_is_used_if_it_works(quick, monkeypatch, capsys, broken):
    """Compiled or not, the same pictures; a compiler that fails costs the speed alone."""
    quick(n=2)
    plain, calls = pixels(folder_of()), []
    folder_of().rename("plain")

    def fake_compile(function):
        def fast(*arguments):
            calls.append(arguments)
            if broken:
                raise RuntimeError("no C compiler")
            return function(*arguments)
        return fast
    monkeypatch.setattr(torch, "compile", fake_compile)
    quick(n=2, compile="on")
    assert (pixels(folder_of()) == plain).all()
    assert len(calls) == (1 if broken else 3)
    assert ("torch.compile failed and is off" in capsys.readouterr().out) == broken


def test_a_missing_picture_is_found_before_anything_is_scored(house, weights, monkeypatch):
    save_folder("gap", real_pictures(), [several[0] for several in CAPTIONS])
    Path("gap/p3.png").unlink()
    monkeypatch.setattr(evaluate, "RealScorer", None)
    with pytest.raises(UserError, match="p3.png"):
        evaluate.main(evaluate.Config(folder="gap", data="data/coco"))


def test_samples_of_other_captions_are_not_taken_for_ours(quick):
    quick()
    lines = (folder_of() / "captions.txt").read_text()
    (folder_of() / "captions.txt").write_text(lines.replace("two dogs", "two cats"))
    with pytest.raises(UserError, match="holds pictures of other captions"):
        quick()


def test_without_the_weights_one_sentence_comes_before_any_work_and_samples_stay(
        quick, drawn, monkeypatch):
    quick()
    asked = []

    def fetch(name, folder):
        asked.append((name, str(folder)))
        raise UserError(f"fetch {name} and put it into {folder}.")
    monkeypatch.setattr(evaluate, "fetch", fetch)
    before = pixels(folder_of())
    with pytest.raises(UserError, match=f"fetch {INCEPTION}"):
        quick(inception="", weights="nowhere")
    with pytest.raises(UserError, match=f"fetch {CLIP}"):
        quick(clip="", weights="nowhere")
    assert (INCEPTION in prepare_data.FILES and CLIP in prepare_data.FILES
            and asked == [(INCEPTION, "nowhere"), (CLIP, "nowhere")])
    with pytest.raises(UserError, match="mine.pth: there is no such file"):
        quick(inception="mine.pth")
    assert (pixels(folder_of()) == before).all() and len(drawn) == 3


# ---- one command ----

def test_eval_json_carries_its_whole_protocol(quick, weights, capsys):
    result = quick(raw=False)
    assert result == json.loads((folder_of() / "eval.json").read_text())
    protocol = result["protocol"]
    assert (protocol["pictures"] == N and protocol["captions"].startswith("first")
            and protocol["steps"] == 2 and protocol["seed"] == 0)
    assert (protocol["guidance_scale"] == 2
            and protocol["guidance"] == "eps_uncond + w (eps_cond - eps_uncond)")
    assert protocol["sampler"] == "DPM-Solver++(2M)" and protocol["latent_scale"] == 0.2301
    assert protocol["autoencoder"]["file"] == "kl-f8.bin" and protocol["text_tower"]["file"] == CLIP
    assert protocol["reference"]["pictures"] == N and len(protocol["reference"]["sha256"]) == 64
    assert len(protocol["inception"]["sha256"]) == len(protocol["clip"]["sha256"]) == 64
    assert "299" in protocol["resize"] and set(protocol["versions"]) == {
        "python", "torch", "numpy", "scipy", "pillow"}
    assert (result["step"], result["weights"], result["checkpoint"]) == (
        1_000_000, "ema", "runs/small.pth")
    assert result["warnings"] == warn_about_fid(N)
    printed = capsys.readouterr().out
    assert all(f"warning: {warning}" in printed for warning in warn_about_fid(N))
    assert CLIP in printed and repr(PREFIX) in printed
    head, row, ceiling, floor = rows_of(printed)
    cells = dict(zip(head, row))
    assert cells["FID"] == f"{result['scores']['fid']:.2f}" and cells["w"] == "2"
    assert cells["CLIP x 100, prefix"] == f"{result['scores']['clip_prefix']['x 100']:.2f}"
    assert ceiling[0] == "real pairs (ceiling)" and floor[0] == "real, captions shuffled (floor)"


def test_several_checkpoints_stand_in_one_table(quick, capsys):
    Path("deep").mkdir()
    save_official("deep/deep.pth", depth=5)
    quick(checkpoint="runs/small.pth,deep/deep.pth")
    head, *rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows[:2]] == ["runs/small.pth at step 1000000",
                                            "deep/deep.pth at step 1000000"]
    for row, path, depth in zip(rows, ("runs", "deep"), (3, 5)):
        cells, result = dict(zip(head, row)), json.loads(Path(path, "eval.json").read_text())
        uvit = UViTConfig("early", "concat", depth=depth, image_size=8, width=64, heads=1,
                          context_dim=64)
        parameters = sum(parameter.numel() for parameter in UViT(uvit).parameters())
        assert (result["parameters"], cells["M parameters"]) == (
            parameters, f"{parameters / 1e6:.2f}")
        assert cells["GFLOPs"] == f"{2 * sum(count_multiply_adds(uvit)) / 1e9:.3f}"
        assert float(cells["images/s"]) > 0


def test_a_sweep_has_a_row_and_a_folder_for_each_scale_and_a_plot(quick, drawn, capsys):
    quick(sweep="3,1,2", n=4)
    assert [row[1] for row in rows_of(capsys.readouterr().out)[1:]] == ["1", "2", "3", "", ""]
    assert len(list(Path("runs/eval").iterdir())) == 3 and len(drawn) == 6
    assert (pixels(folder_of("1")) != pixels(folder_of("3"))).any()
    with Image.open("runs/sweep.png") as plot:
        assert plot.size == (960, 640) and len(plot.getcolors(2 ** 20)) > 10
    quick(n=4)
    assert len(drawn) == 6                                              # w = 2 is there


@pytest.mark.parametrize("values", [
    [1, 2, 3.5], [0.0], [5.95, 5.95], [-3, 1e4], [22.1, 22.4, 22.35], [1e-9, 2e-9], [0, 100]],
    ids=str)
def test_ticks_are_few_round_and_enclose_the_values(values):
    ticks = evaluate.choose_ticks(values)
    assert ticks[0] <= min(values) and ticks[-1] >= max(values) and 2 <= len(ticks) <= 10
    assert all(re.fullmatch(r"-?[\d.]{1,6}(e[-+]\d\d)?", f"{tick:g}") for tick in ticks)


@pytest.mark.parametrize("changes,message", [
    ({"folder": "bare"}, "bare has no captions.txt"),
    ({"folder": "untabbed"}, "expected every line to be a picture's name, a tab and its caption"),
    ({"folder": "gap"}, "1 of the 6 pictures in captions.txt are not there: p3.png"),
    ({"folder": "empty"}, "no captions, and so no pictures"),
    ({"folder": "uneven"}, "p2.png has 32x64 pixels, but the real pictures have 64x64"),
    ({"folder": "broken"}, "p4.png is not a picture that Pillow can read"),
    ({"data": "data/none"}, "data/none is not a finished cache"),
    ({"data": "data/larger"}, "small.pth was trained on kl latents of coco at 64 pixels, "
                              "but --data=data/larger holds kl latents of coco at 128 pixels"),
    ({"data": "data/own"}, "small.pth was trained on kl latents of coco at 64 pixels, "
                           "but --data=data/own holds kl latents of folder at 64 pixels"),
    ({"raw": True}, "holds no raw weights"),
    ({"sweep": "1,two"}, "--sweep=1,two: expected guidance scales separated by commas"),
    ({"guidance_scale": float("nan")}, "guidance scales"), ({"steps": 0}, "steps=0"),
    ({"batch_size": 0}, "batch_size=0"), ({"prompts": "all"}, "prompts='all'"), ({"n": -1}, "n=-1"),
    ({"compile": "yes"}, "--compile=yes: expected auto, on or off"),
    ({"checkpoint": "runs/none.pth"}, "runs/none.pth is not there: expected a checkpoint"),
    ({"checkpoint": "runs"}, "runs is a folder: expected a checkpoint")], ids=str)
def test_mistakes_are_answered_in_one_sentence(quick, changes, message):
    for name in ("gap", "uneven", "broken"):
        save_folder(name, real_pictures(), [several[0] for several in CAPTIONS])
    Path("gap/p3.png").unlink()
    Image.new("RGB", (32, 64)).save("uneven/p2.png")
    Path("broken/p4.png").write_text("no picture")
    for name, content in (("bare", None), ("untabbed", "p0.png a red tram\n"), ("empty", "")):
        Path(name).mkdir()
        if content is not None:
            Path(name, "captions.txt").write_text(content)
    write_cache(Path("data/larger"), image_size=128)
    write_cache(Path("data/own"), dataset="folder")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        quick(**changes)
    assert "\n" not in str(caught.value)


# ---- the official weights ----

def test_the_official_weights_are_sampled_with_the_published_scale_and_the_empty_caption(
        house, weights, monkeypatch):
    decoded, decode = [], KLAutoencoder.decode
    monkeypatch.setattr(KLAutoencoder, "decode",
                        lambda self, z: decoded.append(z) or decode(self, z))
    sample.main(sample.Config(checkpoint="runs/small.pth", prompt="a red tram", n=2, steps=2,
                              weights=str(weights)))
    assert [np.asarray(Image.open(f"runs/generated/0001/0000{i}.png")).shape
            for i in (0, 1)] == [(S, S, 3)] * 2
    pipeline = Pipeline("runs/small.pth", weights=weights)
    torch.testing.assert_close(pipeline.null_context, towers()[0](tokenize([""]))[0][0])
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 8, 8)
    del decoded[:]
    pipeline.decode(latents)
    torch.testing.assert_close(decoded[0], latents / 0.2301)


# ---- shapes ----

@pytest.fixture(scope="module")
def house_of_shapes(tmp_path_factory):
    """A tiny cache of shapes and an untrained checkpoint that fits it."""
    folder = tmp_path_factory.mktemp("shapes")
    prepare_data.main(prepare_data.Config(out=str(folder / "data" / "shapes"), train_images=40,
                                          val_images=12))
    cache = prepare_data.read_cache(folder / "data" / "shapes")
    uvit = UViTConfig("intermediate", "cross_attention", n_image=1, n_fuse=1, n_text=1,
                      image_size=8, channels=16, patch_size=2, width=32, heads=2, context_len=16,
                      context_dim=64)
    raw, ema = [randomise(UViT(uvit), seed).state_dict() for seed in (1, 2)]
    (folder / "out").mkdir()
    torch.save({"format": "midfuse-1", "step": 7, "model": raw, "ema": ema,
                "uvit": dataclasses.asdict(uvit), "meta": cache.meta,
                "latent_scale": cache.meta["latent_scale"], "autoencoder": cache.autoencoder,
                "null_context": torch.from_numpy(cache.text[0])}, folder / "out" / "last.pt")
    return folder


@pytest.fixture
def shapes(house_of_shapes, tmp_path):
    shutil.copytree(house_of_shapes, tmp_path, dirs_exist_ok=True)
    return Config(checkpoint="out/last.pt", steps=2, n=8, batch_size=3)


def test_shapes_are_judged_by_the_detector_without_any_weights(shapes, capsys):
    evaluate.main(shapes)
    result = json.loads(Path("out/eval.json").read_text())
    folder, = Path("out/eval").glob("step7_ema_*_w3_steps2_first_seed0")
    cache = prepare_data.read_cache("data/shapes")
    captions = [cache.captions[row] for row in cache.val.pairs[:8, 1]]
    assert result["scores"] == evaluate.score_shapes(pixels(folder), captions)
    assert result["bounds"]["real pictures (ceiling)"]["seen"]["everything"] == 1
    assert (result["protocol"]["pictures"] == 8 and "detector" in result["protocol"]
            and result["warnings"] == [])
    printed = capsys.readouterr().out
    assert "FID and CLIP score are for real pictures and are not computed for the shapes" in printed
    assert [row[0] for row in rows_of(printed)[1:]] == ["out/last.pt at step 7", *result["bounds"]]
    evaluate.main(dataclasses.replace(shapes, raw=True))
    assert (json.loads(Path("out/eval.json").read_text())["weights"] == "raw"
            and len(list(Path("out/eval").iterdir())) == 2)


def test_shapes_can_be_swept_and_a_folder_of_them_scored(shapes, capsys):
    evaluate.main(dataclasses.replace(shapes, sweep="1,3", n=4))
    assert ([row[1] for row in rows_of(capsys.readouterr().out)[1:3]] == ["1", "3"]
            and Path("out/sweep.png").exists())
    val = prepare_data.Shapes(prepare_data.Config(train_images=40, val_images=12), "val")
    captions = [several[0] for several in val.captions]
    save_folder("theirs", np.stack([val.load(i) for i in range(12)]), captions)
    evaluate.main(dataclasses.replace(shapes, folder="theirs", n=0))
    scores = json.loads(Path("theirs/eval.json").read_text())["scores"]
    assert (scores["seen"]["everything"] == scores["unseen"]["everything"] == 1
            and scores["seen"]["pictures"] == 6)
    save_folder("cats", np.stack([val.load(i) for i in range(2)]), ["a cat", captions[1]])
    with pytest.raises(UserError, match="'a cat' is not a caption of the shapes dataset"):
        evaluate.main(dataclasses.replace(shapes, folder="cats", n=0))


def test_a_model_of_shapes_is_not_scored_on_photographs(shapes, quick):
    with pytest.raises(UserError, match="trained on linear latents of shapes at 32 pixels, "
                                        "but --data=data/coco holds kl latents of coco at 64"):
        quick(checkpoint="out/last.pt")


# ---- attention rank ----

def test_effective_rank_of_known_matrices():
    """1 for an outer product, n for n equal singular values at any scale, else exp(entropy)."""
    outer = torch.outer(torch.rand(7), torch.rand(4))
    orthogonal = torch.linalg.qr(torch.randn(7, 4))[0]
    mixed = orthogonal * torch.tensor([3.0, 1.0, 0.0, 0.0])
    ranks = evaluate.effective_rank(torch.stack([outer, 1e-3 * orthogonal, mixed]))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    torch.testing.assert_close(
        ranks, torch.tensor([1.0, 4.0, np.exp(entropy)], dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_attention_ranks_are_those_of_the_attention_that_the_network_computes(
        fusion, conditioning, monkeypatch):
    torch.manual_seed(0)
    uvit = UViTConfig(fusion, conditioning, depth=5, n_image=1, n_text=1, image_size=4, channels=2,
                      patch_size=1, width=16, heads=2, context_len=3, context_dim=5)
    net, seen = UViT(uvit, init_std=0.5), []
    attention = model.attention

    def record(q, k, v):
        if k.shape[2] == 1 + 16 + 3:                                # those with text among the keys
            seen.append((q @ k.mT / 8 ** 0.5).softmax(-1)[:, :, 1:17, 17:])
        return attention(q, k, v)
    monkeypatch.setattr(model, "attention", record)
    ranks = evaluate.attention_ranks(net, torch.randn(2, 2, 4, 4), torch.tensor([10, 900]),
                                     torch.randn(2, 3, 5))
    assert list(ranks) == list(uvit.window)
    expected = [evaluate.effective_rank(weights).mean().item() for weights in seen]
    assert (list(ranks.values()) == pytest.approx(expected, rel=1e-5)
            and all(1 <= rank <= 3 for rank in ranks.values()))
    assert not any(block.attn._forward_pre_hooks for block in net.in_blocks)    # all are removed


def test_attention_that_looks_at_the_text_alike_from_everywhere_has_rank_one():
    net = UViT(UViTConfig("early", "concat", depth=3, image_size=4, patch_size=1, width=16, heads=2,
                          context_len=3, context_dim=5))
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        block.attn.qkv.weight.data[:16] = 0                         # every query is 0
    ranks = evaluate.attention_ranks(net, torch.randn(1, 4, 4, 4), torch.tensor([5]),
                                     torch.randn(1, 3, 5))
    assert list(ranks.values()) == pytest.approx([1, 1, 1], abs=1e-3)
