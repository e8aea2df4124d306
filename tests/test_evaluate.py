"""Protects the scores: right on known pictures, repeatable, with the protocol next to each."""
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from hypothesis.extra.numpy import arrays
from PIL import Image

import evaluate
import prepare_data
import sample
from clip_text import CLIPText, tokenize
from conftest import randomise
from evaluate import CLIP, INCEPTION, PREFIX, CLIPImage, Config, choose_prompts
from model import (CHECKPOINT_FORMAT, UserError, UViT, UViTConfig, describe_official, one_writer,
                   sha256, writing)
from sample import Pipeline
from test_fid import random_weights
from vae import KLAutoencoder

N, S = 6, 64                        # held-out pictures of the cache, and their side
CAPTIONS = [["a red tram", "a tram on a hill"], ["two dogs", "dogs at play", "a pair of dogs"],
            ["a bowl of soup"], ["a man with a kite", "a kite"],
            ["an empty street", "a street at night"], ["three sheep", "sheep on a meadow"]]
FIRST = [several[0] for several in CAPTIONS]


def towers():
    """A tiny CLIP, its features far from parallel."""
    text, image = CLIPText(64, 2, 1, 32), CLIPImage(64, 2, 1, 32, patch_size=16, tokens=10)
    return randomise(text, 1).eval(), randomise(image, 2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The public files under their own names, small where they may be, with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_weights(), folder / INCEPTION)
    text, image = towers()
    images = {f"visual.{key}": value for key, value in image.state_dict().items()}
    torch.save(dict(text.state_dict()) | images, folder / CLIP)
    torch.save(randomise(KLAutoencoder(32, (1, 2, 4, 4), 1), 3).state_dict(), folder / "kl-f8.bin")
    return folder


def real_pictures() -> np.ndarray:
    """(N, S, S, 3) uint8, smooth, each with colours of its own."""
    coarse = np.random.default_rng(0).integers(0, 256, (N, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(picture).resize((S, S), Image.Resampling.BICUBIC))
                     for picture in coarse])


def write_cache(folder: str, pictures=None, captions=CAPTIONS, **changes):
    """A cache of pictures with one to three captions each, in prepare_data.py's form; latents 0."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = [caption for several in captions for caption in several]
    pairs = [(i, 1 + flat.index(caption))
             for i, several in enumerate(captions) for caption in several]
    for split in ("train", "val"):
        np.save(folder / f"{split}_moments.npy", np.zeros((N, 8, 8, 8), dtype=np.float32))
        np.save(folder / f"{split}_pairs.npy", np.array(pairs))
    np.save(folder / "val_images.npy", real_pictures() if pictures is None else pictures)
    np.save(folder / "text.npy", np.zeros((1 + len(flat), 77, 64), dtype=np.float16))
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in ["", *flat]))
    prepare_data.write_meta(folder, {
        "format": prepare_data.CACHE_FORMAT, "dataset": "coco", "image_size": S,
        "latent_scale": 0.2, "latent_shape": [4, 8, 8], "config": {"dataset": "coco"},
        "autoencoder": {"kind": "kl", "file": "kl-f8.bin", "about": "tiny"},
        "text_tower": {"kind": "clip", "file": CLIP, "about": "tiny"}} | changes)


def save_official(path: str, depth: int = 3, seed: int = 0):
    net = UViT(UViTConfig("early", "concat", depth=depth, image_size=8, width=64, heads=1,
                          context_dim=64))
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(randomise(net, seed).state_dict(), path)


class FewFeatures(torch.nn.Module):
    """In place of Inception where a test is not about it: the mean colours of the four quarters."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def quick(weights, monkeypatch):
    """A function that scores in no time, with 12 features for the FID, and gives the eval.json.

    There are a cache, and an official file in runs/.
    """
    write_cache("data/coco")
    save_official("runs/small.pth")
    Path("few.pth").write_text("the mean colours")
    monkeypatch.setattr(evaluate, "load_inception", lambda path: FewFeatures())

    def call(**changes):
        config = Config(**{
            "checkpoint": "runs/small.pth", "data": "data/coco", "steps": 2, "guidance_scale": 2.0,
            "batch_size": 2, "weights": str(weights), "inception": "few.pth",
            "clip": str(weights / CLIP)} | changes)
        evaluate.main(config)
        home = config.out or Path(config.checkpoint.split(",")[-1]).parent
        return json.loads(Path(home, "eval.json").read_text())
    return call


def rows_of(printed: str) -> list[dict[str, str]]:
    """The rows of a printed Markdown table, heading -> cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in printed.splitlines() if line.startswith("|") and "---" not in line]
    return [dict(zip(lines[0], line)) for line in lines[1:]]


# ---- the numbers ----

def features_of(net, pictures):
    return net(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).double().numpy()


def plain_fid(x, y):
    """The FID of features (n, D), n < D: the root of the n x n part that is not 0, by SciPy."""
    a, b = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    root = scipy.linalg.sqrtm(a @ b.T @ b @ a.T)
    return (((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum()
            - 2 * np.trace(root).real)


def test_fid_of_inception_equals_the_plain_formula(weights, monkeypatch):
    """Of its first 256 features, which are as good as all and 500 times faster."""
    forward = evaluate.Inception.forward
    monkeypatch.setattr(evaluate.Inception, "forward", lambda *inputs: forward(*inputs)[:, :256])
    write_cache("data/coco")
    scorer = evaluate.RealScorer(prepare_data.read_cache("data/coco"), Config(
        data="data/coco", inception=str(weights / INCEPTION), clip=str(weights / CLIP)))
    real = real_pictures()
    noise = np.random.default_rng(1).normal(0, 40, real.shape)
    worse = (real + noise).clip(0, 255).astype(np.uint8)
    x, y = [features_of(scorer.inception, pictures) for pictures in (real, worse)]
    found = scorer.score(scorer.embed(worse), FIRST)["fid"]
    assert found == pytest.approx(plain_fid(x, y), rel=1e-5)
    assert plain_fid(x, y) > 1


@pytest.fixture
def score(quick, weights):
    """A function that scores pictures with captions, as evaluate.py those that it draws."""
    def call(pictures, captions):
        config = Config(data="data/coco", inception="few.pth", clip=str(weights / CLIP))
        scorer = evaluate.RealScorer(prepare_data.read_cache("data/coco"), config)
        return scorer.score(scorer.embed(pictures), captions)
    return call


def test_clip_scores_are_cosines_of_each_picture_with_its_own_caption(quick, score):
    order = [3, 1, 0, 5, 4, 2]
    captions = [CAPTIONS[i][-1] for i in order]
    scores, bounds = score(real_pictures()[order], captions), quick()["bounds"]
    text, image = towers()
    pictures = features_of(image, real_pictures())

    def cosine(prefix, i, caption):
        t, p = text(tokenize([prefix + caption]))[1][0].double().detach().numpy(), pictures[i]
        return 100 * t @ p / np.linalg.norm(t) / np.linalg.norm(p)
    for name, prefix in (("clip_prefix", PREFIX), ("clip", "")):
        expected = np.array([cosine(prefix, i, caption) for i, caption in zip(order, captions)])
        assert expected.std() > 0.1
        assert scores[name] == pytest.approx(expected.mean(), abs=1e-4)
        shifted = FIRST[N // 2:] + FIRST[:N // 2]
        for key, texts in (("real pictures (ceiling)", FIRST),
                           ("real, captions shuffled (floor)", shifted)):
            real = np.mean([cosine(prefix, i, texts[i]) for i in range(N)])
            assert bounds[key][name] == pytest.approx(real, abs=1e-4)
    assert PREFIX == "A photo depicts "


def test_the_same_pictures_have_the_same_scores_whatever_the_batch_size(score, monkeypatch):
    first = score(real_pictures(), FIRST)
    assert first["fid"] < 1e-6
    monkeypatch.setattr(evaluate, "SCORE_BATCH", 4)
    assert score(real_pictures(), FIRST) == pytest.approx(first, rel=1e-5, abs=1e-6)


# ---- the reference ----

def test_the_protocol_names_the_pictures_and_the_weights_of_the_reference(quick):
    first = quick()
    Path("few.pth").write_text("other weights")
    second = quick()
    write_cache("data/coco", pictures=255 - real_pictures())
    third = quick()
    a, b, c = [result["protocol"] for result in (first, second, third)]
    assert a["inception_sha256"] != b["inception_sha256"] == c["inception_sha256"]
    assert a["reference_sha256"] == b["reference_sha256"] != c["reference_sha256"]
    assert third["scores"]["fid"] != second["scores"]["fid"]


# ---- which captions ----

def prompts(**changes):
    cache = prepare_data.read_cache("data/coco")
    pictures, captions = choose_prompts(cache, Config(data="data/coco", **changes))
    return list(pictures), captions


def test_pictures_are_taken_in_order_with_their_first_captions():
    write_cache("data/coco")
    assert prompts() == (list(range(N)), FIRST)
    assert prompts(n=2) == ([0, 1], ["a red tram", "two dogs"])
    assert len(prompts(n=7)[0]) == N


# ---- samples on disk ----

@pytest.fixture
def drawn(monkeypatch):
    """The captions of every call of Pipeline.draw."""
    calls, draw = [], Pipeline.draw
    monkeypatch.setattr(
        Pipeline, "draw", lambda self, captions, *rest, **settings:
        calls.append(captions) or draw(self, captions, *rest, **settings))
    return calls


def folder_of(w="2"):
    """Of the samples at guidance scale w."""
    return next(Path("runs/eval").glob(f"step1000000_*_w{w}_steps2_seed0"))


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def test_samples_are_drawn_once(quick, drawn):
    first = quick()
    assert drawn == [FIRST[:2], FIRST[2:4], FIRST[4:]]
    lines = [f"{i:05d}.png\t{caption}" for i, caption in enumerate(FIRST)]
    assert (folder_of() / "captions.txt").read_text().splitlines() == lines
    assert quick()["scores"] == first["scores"] and len(drawn) == 3
    assert quick(n=4)["protocol"]["pictures"] == 4 and len(drawn) == 3
    quick(seed=1)
    assert len(drawn) == 6


def test_samples_of_other_weights_or_captions_are_not_taken_for_ours(quick, drawn):
    first, old = quick(n=2), folder_of()
    save_official("runs/small.pth", seed=7)
    second = quick(n=2)
    new, = {*Path("runs/eval").glob("step*")} - {old}
    assert len(drawn) == 2 and (pixels(new) != pixels(old)).any()
    assert first["protocol"]["weights_sha256"] != second["protocol"]["weights_sha256"]
    write_cache("data/other", captions=[["a cat"], *CAPTIONS[1:]])
    quick(n=2, data="data/other")
    assert drawn[2:] == [["a cat", "two dogs"]]
    assert len({*Path("runs/eval").glob("step*")}) == 3


def test_pictures_of_another_autoencoder_or_of_edited_code_are_drawn_again(
        quick, drawn, weights, monkeypatch):
    first = quick(n=2)
    shutil.copytree(weights, "others")
    other = randomise(KLAutoencoder(32, (1, 2, 4, 4), 1), 9)
    torch.save(other.state_dict(), "others/kl-f8.bin")
    assert quick(n=2, weights="others")["scores"] != first["scores"] and len(drawn) == 2
    assert quick(n=2)["scores"] == first["scores"] and len(drawn) == 2
    monkeypatch.setattr(evaluate, "sha256", lambda path: (
        "edited" if Path(path).name == "clip_text.py" else sha256(path)))
    quick(n=2)
    assert len(drawn) == 3


class Killed(BaseException):
    pass


def killed_before(picture: int):
    """`sample.writing` of a process that ends before this picture."""
    def write(path, *mode):
        if Path(path).name == f"{picture:05d}.png":
            raise Killed
        return writing(path, *mode)
    return write


@pytest.mark.parametrize("picture", [0, 3, 5])
def test_an_interrupted_call_resumes_and_ends_with_the_same_pictures(
        quick, drawn, monkeypatch, picture):
    expected = quick()
    folder_of().rename("unbroken")
    with monkeypatch.context() as context:
        context.setattr(sample, "writing", killed_before(picture))
        with pytest.raises(Killed):
            quick()
    del drawn[:]
    result = quick()
    assert sum(drawn, []) == FIRST[picture // 2 * 2:]
    assert (pixels(folder_of()) == pixels("unbroken")).all()
    for name in ("captions.txt", "eval.json"):
        mine, theirs = (folder_of() / name).read_text(), Path("unbroken", name).read_text()
        assert mine == theirs or name == "eval.json"
    assert result["scores"] == expected["scores"] and result["bounds"] == expected["bounds"]


def test_a_picture_that_is_gone_is_drawn_again(quick):
    quick()
    before = pixels(folder_of())
    (folder_of() / "00003.png").unlink()
    quick()
    assert (pixels(folder_of()) == before).all()


def test_one_evaluation_writes_a_folder_at_a_time(quick):
    quick(n=2)
    told = pytest.raises(UserError, match="another process is writing runs/eval")
    with one_writer(folder_of()), told:
        quick()


def test_results_can_go_to_another_folder_than_that_of_the_checkpoint(quick):
    assert quick(out="mine")["scores"] == quick()["scores"]
    assert {path.name for path in Path("mine").iterdir()} == {"eval", "eval.json"}


def test_without_the_weights_one_sentence_comes_before_any_work(
        quick, weights, drawn, monkeypatch):
    asked = []

    def fetch(name, folder):
        asked.append((name, str(folder)))
        raise UserError(f"fetch {name} and put it into {folder}.")
    monkeypatch.setattr(evaluate, "fetch", fetch)
    for choice, name in (("inception", INCEPTION), ("clip", CLIP)):
        with pytest.raises(UserError, match=f"fetch {name}"):
            quick(**{choice: None})
        assert name in prepare_data.FILES and asked.pop() == (name, str(weights))
    with pytest.raises(UserError, match="mine.pth is missing"):
        quick(clip="mine.pth")
    assert not drawn


# ---- one command ----

def test_eval_json_carries_its_whole_protocol(quick, weights, capsys):
    result = quick()
    assert result == json.loads((folder_of() / "eval.json").read_text())
    protocol = result["protocol"]
    expected = {
        "pictures": N, "captions": "first of each picture", "data": "data/coco", "steps": 2,
        "seed": 0, "guidance_scale": 2, "step": 1_000_000, "averaged": True,
        "sampler": "DPM-Solver++(2M), eps_uncond + w (eps_cond - eps_uncond)",
        "checkpoint": "runs/small.pth", "reference": "all held-out pictures of data/coco",
        "reference_sha256": sha256("data/coco/val_images.npy"),
        "inception_sha256": sha256("few.pth"), "clip_sha256": sha256(weights / CLIP)}
    assert expected.items() <= protocol.items()
    assert protocol["trained_on"]["autoencoder"]["file"] == "kl-f8.bin"
    assert "299" in protocol["resize"]
    printed = capsys.readouterr().out
    assert "warning: not comparable with FID-30k" in printed
    row, ceiling, floor = rows_of(printed)
    assert row["fid"] == f"{result['scores']['fid']:.2f}" and row["w"] == "2.0"
    assert row["clip_prefix"] == f"{result['scores']['clip_prefix']:.2f}"
    assert ceiling["model"] == "real pictures (ceiling)"
    assert floor["model"] == "real, captions shuffled (floor)"


def test_several_checkpoints_stand_in_one_table_and_what_is_drawn_is_used_again(
        quick, drawn, capsys):
    save_official("deep/deep.pth", depth=5)
    quick(checkpoint="runs/small.pth,deep/deep.pth", n=2)
    rows = rows_of(capsys.readouterr().out)[:2]
    assert [(row["model"], row["w"]) for row in rows] == [
        ("runs/small.pth at step 1000000", "2.0"), ("deep/deep.pth at step 1000000", "2.0")]
    quick(n=2, guidance_scale=1)
    assert len(drawn) == 3 and (pixels(folder_of("1")) != pixels(folder_of("2"))).any()
    quick(n=2)
    assert len(drawn) == 3


@pytest.mark.parametrize("changes,message", [
    ({"data": "data/none"}, "data/none/meta.json is missing"),
    ({"data": "data/larger"}, "small.pth was not trained on pictures as in data/larger"),
    ({"data": "data/own"}, "small.pth was not trained on pictures as in data/own"),
    ({"guidance_scale": "two"}, "--guidance_scale=two"), ({"n": 1}, "--n=1: expected"),
    ({"guidance_scale": 1e308}, "--guidance_scale=1e+308"),
    ({"checkpoint": "runs/small.pth,no.pth"}, "no.pth is missing"),
    ({"checkpoint": ""}, " is not a file"),
    ({"checkpoint": "runs"}, "runs is not a file")], ids=str)
def test_mistakes_are_answered_in_one_sentence(quick, changes, message):
    write_cache("data/larger", image_size=128)
    write_cache("data/own", dataset="folder")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        quick(**changes)
    assert "\n" not in str(caught.value) and not Path("runs/eval.json").exists()


def test_own_pictures_are_only_scored_on_the_data_that_the_checkpoint_was_trained_on(quick):
    cache = {"dataset": "folder", "config": {"dataset": "folder", "val_images": N}}
    write_cache("data/own", **cache)
    official = torch.load("runs/small.pth", weights_only=True)
    about = describe_official(official)
    about |= {"uvit": dataclasses.asdict(about["uvit"]), "format": CHECKPOINT_FORMAT,
              "model": official, "meta": prepare_data.read_cache("data/own").meta,
              "null_context": torch.zeros(77, 64)}
    torch.save(about, "runs/own.pt")
    assert quick(checkpoint="runs/own.pt", data="data/own")["protocol"]["pictures"] == N
    write_cache("data/leak", **cache | {"config": {"dataset": "folder", "val_images": N + 1}})
    with pytest.raises(UserError, match="was not trained on pictures as in data/leak"):
        quick(checkpoint="runs/own.pt", data="data/leak")   # its held-out ones may be trained on


# ---- shapes ----

@pytest.fixture(scope="module")
def house_of_shapes(tmp_path_factory):
    """A tiny cache of shapes and an untrained checkpoint that fits it."""
    folder = tmp_path_factory.mktemp("shapes")
    data = folder / "data" / "shapes"
    prepare_data.main(prepare_data.Config(out=str(data), train_images=40, val_images=12))
    cache = prepare_data.read_cache(data)
    uvit = UViTConfig("intermediate", "cross_attention", n_image=1, n_fuse=1, n_text=1,
                      image_size=8, channels=16, patch_size=2, width=32, heads=2, context_len=16,
                      context_dim=64)
    raw, ema = [randomise(UViT(uvit), seed).state_dict() for seed in (1, 2)]
    (folder / "out").mkdir()
    torch.save({"format": CHECKPOINT_FORMAT, "step": 7, "model": raw, "ema": ema,
                "uvit": dataclasses.asdict(uvit), "meta": cache.meta,
                "latent_scale": cache.meta["latent_scale"], "autoencoder": cache.autoencoder,
                "null_context": torch.tensor(cache.text[0])}, folder / "out" / "last.pt")
    return folder


@pytest.fixture
def shapes(house_of_shapes, tmp_path):
    shutil.copytree(house_of_shapes, tmp_path, dirs_exist_ok=True)
    return Config(checkpoint="out/last.pt", steps=2, n=8, batch_size=3)


def test_shapes_are_judged_by_the_detector_without_any_weights(shapes, capsys):
    evaluate.main(shapes)
    result = json.loads(Path("out/eval.json").read_text())
    folder, = Path("out/eval").glob("step7_*_w3_steps2_seed0")
    cache = prepare_data.read_cache("data/shapes")
    captions = [cache.captions[row] for row in cache.val_pairs[:8, 1]]
    assert result["scores"] == evaluate.score_shapes(pixels(folder), captions)
    assert result["bounds"]["real pictures (ceiling)"]["seen"]["everything"] == 1
    assert result["protocol"]["pictures"] == 8 and "detector" in result["protocol"]
    printed = capsys.readouterr().out
    assert "warning" not in printed
    rows = rows_of(printed)
    assert [row["model"] for row in rows] == ["out/last.pt at step 7", *result["bounds"]]
    assert rows[1]["everything"] == "100 / 100"
    assert max(map(len, printed.splitlines())) <= 140


def test_other_captions_than_those_of_shapes_are_refused():
    with pytest.raises(UserError, match="'a cat' is not a caption of the shapes dataset"):
        evaluate.score_shapes(np.zeros((1, 32, 32, 3), np.uint8), ["a cat"])


@settings(deadline=None)
@given(arrays(np.uint8, (8, 8, 3), elements=strategies.sampled_from([0, 40, 90, 165, 245, 255])),
       strategies.sampled_from([4, 8]), strategies.sampled_from(sorted(prepare_data.scene_of())))
def test_the_detector_reads_any_picture(coarse, zoom, caption):
    picture = coarse.repeat(zoom, axis=0).repeat(zoom, axis=1)
    found = evaluate.detect_objects(picture)
    for colour, shape, y, x in found:
        assert colour in prepare_data.COLOURS and shape in (*prepare_data.SHAPES, "blob")
        assert 0 <= y <= len(picture) and 0 <= x <= len(picture)
    right = evaluate.judge_picture(picture, prepare_data.scene_of()[caption])
    assert right["everything"] <= min(right.values())
    assert not any(math.isnan(place) for thing in found for place in thing[2:])


# ---- the official weights ----

def test_the_official_weights_are_sampled_with_the_published_scale_and_the_empty_caption(
        quick, weights, monkeypatch):
    decoded, decode = [], KLAutoencoder.decode
    monkeypatch.setattr(KLAutoencoder, "decode",
                        lambda self, z: decoded.append(z) or decode(self, z))
    sample.main(sample.Config(checkpoint="runs/small.pth", prompt="a red tram", n=2, steps=2,
                              weights=str(weights)))
    for i in range(2):
        assert Image.open(f"runs/generated/0001/0000{i}.png").size == (S, S)
    pipeline = Pipeline("runs/small.pth", weights=weights)
    torch.testing.assert_close(pipeline.null_context, towers()[0](tokenize([""]))[0][0])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    del decoded[:]
    pipeline.decode(latents)
    torch.testing.assert_close(decoded[0], latents / 0.2301)
