"""Protects drawing: the solver's numbers, guidance, one noise per picture, what is left on disk."""
import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from clip_text import random_clip_text, tokenize
from conftest import randomise
from model import (CHECKPOINT_FORMAT, UserError, UViT, UViTConfig, noise_schedule,
                   weights_sha256)
from sample import Config, draw_files, draw_grid, dpm_solver_pp_2m, sample_latents
from vae import LinearAutoencoder, to_pictures

PROMPT = "two red circles"


@pytest.fixture
def float32(monkeypatch):
    """On the CPU and without autocast, so that rounding hides nothing."""
    monkeypatch.setattr(sample, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(sample, "choose_device", lambda: torch.device("cpu"))


# ---- the solver ----

def gaussian(z, t):
    """The exact noise in N(0, 0.5^2) data at fractional t, from the betas (FACTS 6.1, 6.2, 6.5)."""
    beta = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    log_alpha = np.interp(t.double().numpy(), np.arange(1, 1001), 0.5 * np.log(1 - beta).cumsum())
    alpha = torch.from_numpy(np.exp(log_alpha)).to(z)
    return (1 - alpha ** 2).sqrt() * z / (0.25 * alpha ** 2 + 1 - alpha ** 2)


@pytest.mark.parametrize("steps,golden", [(10, 0.4260801), (20, 0.4699311), (50, 0.4922580)])
def test_the_solver_gives_the_numbers_of_the_reference(steps, golden):
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)         # it is linear in its start
    z = dpm_solver_pp_2m(gaussian, start, steps)
    assert z.tolist() == pytest.approx((golden * start).tolist(), abs=2e-6)
    z = dpm_solver_pp_2m(gaussian, start.float(), steps)
    assert z.tolist() == pytest.approx((golden * start).tolist(), abs=2e-5)


def test_the_solver_converges_to_the_exact_answer():
    errors = [abs(dpm_solver_pp_2m(gaussian, torch.ones(1, dtype=torch.float64), steps).item()
                  - 0.5015143) for steps in (10, 100, 1000)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 999, 1000])
def test_the_network_is_evaluated_once_per_step_on_a_uniform_grid_from_1000(steps):
    times = []

    def predict_noise(z, t):
        assert t.shape == (3,) and t.dtype == z.dtype == torch.float32
        times.append(t[0].item())
        return torch.zeros_like(z)
    z = dpm_solver_pp_2m(predict_noise, torch.ones(3, 2), steps)
    assert times == pytest.approx([1000 - 999 * i / steps for i in range(steps)], abs=1e-3)
    assert z.shape == (3, 2)
    # without noise z is alpha x0 all the way
    assert z[0, 0].item() == pytest.approx(
        (noise_schedule()[1] / noise_schedule()[1000]).sqrt().item(), rel=1e-3)


def test_one_step_is_ddim_from_the_first_time_to_the_last():
    start, eps = torch.randn(2, 2, 3, dtype=torch.float64)
    before, after = noise_schedule()[1000], noise_schedule()[1]
    x0 = (start - (1 - before).sqrt() * eps) / before.sqrt()
    z = dpm_solver_pp_2m(lambda z, t: eps, start, 1)
    assert torch.allclose(z, after.sqrt() * x0 + (1 - after).sqrt() * eps, atol=1e-10)


# ---- guidance and noise ----

class Counted(UViT):
    """A random U-ViT that counts what is asked of it."""

    def __init__(self, conditioning):
        super().__init__(UViTConfig("intermediate", conditioning, n_image=1, n_fuse=1, n_text=1,
                                    image_size=4, channels=3, patch_size=2, width=16, heads=2,
                                    context_len=5, context_dim=6))
        self.encoded, self.batches = [], []
        randomise(self).eval().requires_grad_(False)

    def encode_text(self, context):
        self.encoded.append(len(context))
        return super().encode_text(context)

    def denoise(self, zt, t, text):
        self.batches.append(len(zt))
        return super().denoise(zt, t, text)


BOTH = pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])


def case(conditioning):
    """(net, two prompts' context, which prompt each of three pictures has, null context)."""
    generator = torch.Generator().manual_seed(5)
    context, null_context = (torch.randn(2, 5, 6, generator=generator),
                             torch.randn(5, 6, generator=generator))
    return Counted(conditioning), context, torch.tensor([1, 0, 1]), null_context


@BOTH
@pytest.mark.parametrize("w", [0, 0.5, 1, 7.5])
def test_guidance_is_the_formula_at_every_step(float32, conditioning, w):
    """w = 1 is the conditional pass alone, at half the cost, and w = 0 the unconditional one."""
    net, context, prompts, null_context = case(conditioning)

    def guided(z, t):
        cond = net(z, t, context[prompts])
        uncond = net(z, t, null_context.expand(3, 5, 6))
        return cond if w == 1 else uncond + w * (cond - uncond)
    z = sample_latents(net, context, prompts, null_context, [4, 5, 6], steps=4, guidance_scale=w)
    assert net.batches == [3 if w == 1 else 6] * 4
    assert net.encoded == [3]                   # once, whatever the number of steps and pictures
    noise = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
                         for seed in (4, 5, 6)])
    plain = dpm_solver_pp_2m(guided, noise, 4)
    assert torch.allclose(z, plain, atol=1e-4 * max(1, plain.abs().max()))
    assert z.dtype == torch.float32


@BOTH
def test_a_seed_and_a_prompt_give_the_same_latent_whatever_the_batch(float32, conditioning):
    net, context, _, null_context = case(conditioning)
    prompts, seeds = [1, 0, 1, 0, 0], [4, 5, 6, 7, 4]

    def draw(which):
        return sample_latents(net, context, torch.tensor([prompts[i] for i in which]),
                              null_context, [seeds[i] for i in which], 5, 2.0)
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    together = draw(range(5))
    assert torch.equal(torch.randn(3), expected)        # the global random state is not touched
    for part in ([0], [1], [2], [3], [4], [0, 1], [2, 3, 4], [4, 3], [2, 1, 0]):
        assert torch.allclose(draw(part), together[part], atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1                       # another seed
    assert (together[0] - together[4]).abs().max() > 0.1                       # another prompt


# ---- pictures on disk ----

def random_pictures(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 250, shape, dtype=torch.uint8, generator=generator).numpy()


@pytest.mark.parametrize("side,zoom", [(32, 4), (33, 3), (128, 1), (256, 1)])
@pytest.mark.parametrize("number,columns", [(1, 1), (5, 2), (3, 4)])
def test_a_grid_has_every_picture_in_its_place_enlarged_without_smoothing(
        side, zoom, number, columns):
    pictures = random_pictures(number, side, side, 3)
    grid = np.array(draw_grid(pictures, ["seed 1"] * number, columns))
    cell, lines = zoom * side, math.ceil(number / columns)
    height = (len(grid) - 8) // lines
    assert grid.shape == (lines * height + 8, columns * (cell + 8) + 8, 3)
    for i, picture in enumerate(pictures):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * height
        place = grid[y - 1:y + cell, x - 1:x + cell + 1]
        assert (place[1:, 1:-1] == picture.repeat(zoom, 0).repeat(zoom, 1)).all()
        assert (place[0] == 255).all() and (place[:, [0, -1]] == 255).all()
        assert grid[y + cell:y + height, x:x + cell].min() < 128               # its caption


def test_every_picture_has_its_own_caption_and_long_ones_are_wrapped():
    pictures = np.zeros((2, 32, 32, 3), np.uint8)

    def captions(*texts):
        below = np.array(draw_grid(pictures, texts, 2))[8 + 128:, :272]
        return below[:, :136], below[:, 136:]
    (a, b), (c, d) = captions("a", "b"), captions("b", "b")
    assert (b == d).all() and (c == d).all() and (a != c).any()
    words = " ".join(["three red circles and two blue squares"] * 6)
    short, long = [np.array(draw_grid(pictures, [text, "b"], 1)) for text in ("a", words)]
    assert long.shape[1] == short.shape[1] and len(long) > len(short)
    height = (len(long) - 8) // 2
    assert (long[8 + height:8 + height + 128, 8:8 + 128] == 0).all()           # the second is whole
    assert (long[:, -8:] == 255).all()                                         # an empty margin


PROMPTS = ["two red circles", "三个红色的圆 und ein Kätzchen ☀️", "", "tabs\tand\nlines",
           "x" * 5000]


def test_picture_i_has_caption_i_and_its_own_seed_and_whole_batches_are_drawn_once():
    pictures, calls = random_pictures(5, 24, 32, 3), []

    class Drawer:
        def draw(self, captions, seeds, steps, guidance_scale):
            calls.append((captions, seeds, steps, guidance_scale))
            return pictures[[seed - 7 for seed in seeds]]
    config = Config(seed=7, steps=9, guidance_scale=2, batch_size=2)
    for _ in range(2):
        paths = draw_files(Drawer(), Path("."), PROMPTS, config)
        assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(5)]
        assert calls == [(PROMPTS[:2], [7, 8], 9, 2), (PROMPTS[2:4], [9, 10], 9, 2),
                         (PROMPTS[4:], [11], 9, 2)]
        for picture, path in zip(pictures, paths):
            assert (np.array(Image.open(path)) == picture).all()
    paths[3].unlink()
    draw_files(Drawer(), Path("."), PROMPTS, config)
    assert calls[3:] == calls[1:2] and paths[3].exists()
    draw_files(Drawer(), Path("."), PROMPTS[:2], config)        # fewer: captions.txt keeps all
    assert len(calls) == 4
    assert sorted(path.name for path in Path(".").iterdir()) == [
        *(path.name for path in paths), "captions.txt"]
    lines = Path("captions.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{path.name}\t{' '.join(prompt.split())}"
                     for path, prompt in zip(paths, PROMPTS)]


# ---- from a checkpoint to pictures ----

UNUSUAL = dict(fusion="intermediate", conditioning="cross_attention", n_image=1, n_fuse=3, n_text=1,
               fuse_shift=1, image_size=6, channels=16, patch_size=3, width=24, heads=3,
               context_len=9, context_dim=64)
CONFIG = Config(prompt=PROMPT, n=3, steps=3, guidance_scale=2.0, seed=11)
GENERATED = Path("out/run/generated")


@pytest.fixture(scope="module")
def contents():
    """What sampling needs of a checkpoint: a tiny model of unusual sizes, for 24 x 24 pixels."""
    tower = random_clip_text(3, 9)
    coarse = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")
    autoencoder = LinearAutoencoder()
    autoencoder.fit(2 * smooth - 1)
    null_context = tower(tokenize(["nothing at all"], 9))[0][0]  # not that of "": from the file
    raw, ema = [randomise(UViT(UViTConfig(**UNUSUAL)), seed).state_dict() for seed in (1, 2)]
    text_tower = {"kind": "random", "seed": 3, "context_len": 9, "sha256": weights_sha256(tower)}
    return {"format": CHECKPOINT_FORMAT, "step": 1234, "model": raw, "ema": ema, "uvit": UNUSUAL,
            "meta": {"autoencoder": {"kind": "linear"}, "text_tower": text_tower},
            "latent_scale": 0.9, "null_context": null_context,
            "autoencoder": autoencoder.state_dict()}


@pytest.fixture
def checkpoint(contents):
    Path("out/run").mkdir(parents=True)
    torch.save(contents, "out/run/last.pt")
    return "out/run/last.pt"


def draw(checkpoint, **changes):
    """Run sample.main; returns its pictures (n, H, W, 3) and its folder."""
    config = dataclasses.replace(CONFIG, checkpoint=checkpoint, **changes)
    sample.main(config)
    folder = Path(config.out) if config.out else max(GENERATED.iterdir())
    pictures = [np.array(Image.open(folder / f"{i:05d}.png")) for i in range(config.n)]
    return np.stack(pictures).astype(int), folder


@torch.no_grad()
def by_hand(contents, null_context):
    """The same pictures from the parts of the checkpoint, one by one."""
    net = UViT(UViTConfig(**UNUSUAL))
    net.load_state_dict(contents["ema"])
    autoencoder = LinearAutoencoder()
    autoencoder.load_state_dict(contents["autoencoder"])
    context = random_clip_text(3, 9)(tokenize([PROMPT], 9))[0]
    pictures = []
    for seed in (11, 12, 13):
        zT = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(seed))
        z = dpm_solver_pp_2m(
            lambda z, t: 2 * net(z, t, context) - net(z, t, null_context[None]), zT, 3)
        pictures.append(to_pictures(autoencoder.decode(z / 0.9))[0])
    return np.stack(pictures).astype(int)


def test_everything_but_the_prompt_comes_from_the_checkpoint(float32, contents, checkpoint):
    pictures, folder = draw(checkpoint)
    expected = by_hand(contents, contents["null_context"])
    assert pictures.shape == (3, 24, 24, 3) and expected.std() > 20
    assert abs(pictures - expected).max() <= 1
    torch.save(contents | {"null_context": None}, checkpoint)       # then the empty caption's
    empty = random_clip_text(3, 9)(tokenize([""], 9))[0][0]
    assert abs(draw(checkpoint)[0] - by_hand(contents, empty)).max() <= 1


def test_a_run_leaves_pictures_captions_and_a_grid(checkpoint, capsys):
    _, folder = draw(checkpoint, steps=4)
    assert folder == GENERATED / "0001"
    assert sorted(path.name for path in folder.iterdir()) == \
        ["00000.png", "00001.png", "00002.png", "captions.txt", "grid.png"]
    assert (folder / "captions.txt").read_text() == "".join(
        f"0000{i}.png\t{PROMPT}\n" for i in range(3))
    assert f"3 pictures of '{PROMPT}': look at {folder}/grid.png" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [
    dict(steps=1), dict(n=1), dict(n=5, batch_size=2),
    dict(prompt=""), dict(prompt="红色的圆 🎈"), dict(guidance_scale=0.0)], ids=str)
def test_unusual_requests_work(checkpoint, changes):
    pictures, folder = draw(checkpoint, **changes)
    assert len(pictures) == changes.get("n", 3) and (folder / "grid.png").exists()


def test_the_same_seed_gives_the_same_picture_whatever_the_batch_size(checkpoint):
    """In the precision that this machine samples in."""
    five, _ = draw(checkpoint, n=5)
    by_two, _ = draw(checkpoint, n=5, batch_size=2)
    last, _ = draw(checkpoint, n=1, seed=CONFIG.seed + 4)
    assert abs(five - by_two).mean() < 2 and abs(five[4] - last[0]).mean() < 2
    assert abs(five[4] - five[3]).mean() > 10
    assert (draw(checkpoint, n=5)[0] == five).all()


def test_nothing_is_overwritten(checkpoint):
    first, folder = draw(checkpoint, n=1)
    (GENERATED / "0002").mkdir()
    (GENERATED / "0003").symlink_to("nowhere")
    assert draw(checkpoint, n=1, seed=5)[1].name == "0004"
    assert (np.array(Image.open(folder / "00000.png")) == first[0]).all()
    assert draw(checkpoint, n=1, out="deep/new")[1] == Path("deep/new")
    before = {path: path.read_bytes() for path in Path("deep/new").iterdir()}
    Path("dead").symlink_to("nowhere")
    for taken in ("deep/new", "deep", checkpoint, "dead"):
        with pytest.raises(UserError, match=f"{taken} exists already, and nothing is overwritten"):
            draw(checkpoint, out=taken)
    assert {path: path.read_bytes() for path in Path("deep/new").iterdir()} == before


def test_a_prompt_of_two_hundred_words_is_cut_and_that_is_said(checkpoint, capsys):
    draw(checkpoint, prompt=" ".join(["cat"] * 200))
    assert "longer than the model's 9 tokens and is cut" in capsys.readouterr().out
    draw(checkpoint, prompt=" ".join(["cat"] * 7))                      # 9 with start and end
    assert "is cut" not in capsys.readouterr().out


PARTS = ["format", "step", "ema", "uvit", "meta", "latent_scale", "null_context", "autoencoder"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", PARTS)
def test_a_checkpoint_with_a_part_missing_or_of_another_kind_is_refused(
        contents, checkpoint, key):
    wrong = [{name: contents[name] for name in contents if name != key}]
    if key != "step":                                           # it is only shown
        wrong += [contents | {key: value} for value in ([], {}, "x", torch.zeros(2, 3))]
    for content in wrong:
        torch.save(content, checkpoint)
        with pytest.raises(UserError, match="out/run/last.pt"):
            draw(checkpoint)
    assert not GENERATED.exists()


def test_another_text_tower_or_autoencoder_than_that_of_the_checkpoint_is_refused(
        contents, checkpoint):
    for part, changes, words in [
            ("text_tower", {"seed": 4}, "text tower"), ("text_tower", {"kind": "clip"}, "'file'"),
            ("text_tower", {"kind": "clip", "file": "a.bin"}, "weights/a.bin is missing"),
            ("autoencoder", {"kind": "kl", "file": "b.bin"}, "weights/b.bin is missing")]:
        meta = contents["meta"] | {part: contents["meta"][part] | changes}
        torch.save(contents | {"meta": meta}, checkpoint)
        with pytest.raises(UserError, match=words):
            draw(checkpoint)


def test_the_official_weights_name_the_files_that_they_need():
    net = UViT(UViTConfig("early", "concat", depth=3, image_size=8, width=64, heads=1,
                          context_dim=64))
    torch.save(net.state_dict(), "mscoco_uvit_small.pth")
    with pytest.raises(UserError, match="weights/clip-vit-large-patch14.bin"):
        draw("mscoco_uvit_small.pth")
