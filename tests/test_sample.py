"""Protects drawing: the solver's numbers, guidance, one noise per picture, what is left on disk."""
import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import sample
from clip_text import random_clip_text, tokenize, weights_sha256
from model import UserError, UViT, UViTConfig, noise_schedule
from sample import (Config, draw_grid, dpm_solver_pp_2m, new_folder, sample_latents, save_pictures,
                    take_rows, wrap)
from vae import LinearAutoencoder, to_uint8

PROMPT = "two red circles"


@pytest.fixture
def in_float32(monkeypatch):
    """On the CPU and without autocast, so that rounding hides nothing."""
    monkeypatch.setattr(sample, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(sample, "choose_device", lambda: torch.device("cpu"))


def randomise(net: UViT, seed: int = 0) -> UViT:
    """Every weight, bias, norm and position at random and of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            noise = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        elif name != "pos_embed":
            noise = noise / parameter[0].numel() ** 0.5
        parameter.data = noise
    return net.eval().requires_grad_(False)


# ---- the solver ----

def gaussian(z, t):
    """The exact noise in N(0, 0.5^2) data at fractional t, from the betas (FACTS 6.1, 6.2, 6.5)."""
    beta = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    log_alpha = np.interp(t.double().numpy(), np.arange(1, 1001), 0.5 * np.log(1 - beta).cumsum())
    alpha = torch.from_numpy(np.exp(log_alpha)).to(z)
    return (1 - alpha ** 2).sqrt() * z / (0.25 * alpha ** 2 + 1 - alpha ** 2)


@pytest.mark.parametrize("steps,golden", [(10, 0.4260801), (20, 0.4699311), (50, 0.4922580)])
def test_the_solver_gives_the_numbers_of_the_reference(steps, golden):
    z = dpm_solver_pp_2m(gaussian, torch.ones(1, dtype=torch.float64), steps)
    assert z.item() == pytest.approx(golden, abs=1e-6)
    assert dpm_solver_pp_2m(gaussian, torch.ones(1), steps).item() == pytest.approx(
        golden, abs=1e-5)                                                       # in float32


def test_the_solver_converges_to_the_exact_answer():
    errors = [abs(dpm_solver_pp_2m(gaussian, torch.ones(1, dtype=torch.float64), steps).item()
                  - 0.5015143) for steps in (10, 100, 1000, 2000)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 1e-3 and errors[3] < 3e-4


def test_the_solver_is_linear_in_its_start_and_treats_pictures_alike():
    start = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    ends = dpm_solver_pp_2m(lambda z, t: gaussian(z, t[:, None]), start, 10)
    assert torch.allclose(ends, 0.4260801 * start, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_the_network_is_evaluated_once_per_step_on_a_uniform_grid_from_1000(steps):
    times = []

    def predict_noise(z, t):
        assert t.shape == (3,) and t.dtype == z.dtype == torch.float32
        times.append(t[0].item())
        return torch.zeros_like(z)
    trace = []
    z = dpm_solver_pp_2m(predict_noise, torch.ones(3, 2), steps, trace)
    assert times == pytest.approx([1000 - 999 * i / steps for i in range(steps)], abs=1e-3)
    assert z.shape == (3, 2) and len(trace) == steps
    # without noise z is alpha x0 all the way
    assert z[0, 0].item() == pytest.approx(
        (noise_schedule()[1] / noise_schedule()[1000]).sqrt().item(), rel=1e-4)


def test_one_step_is_ddim_from_the_first_time_to_the_last():
    start, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    before, after = noise_schedule()[1000], noise_schedule()[1]
    x0 = (start - (1 - before).sqrt() * eps) / before.sqrt()
    trace = []
    z = dpm_solver_pp_2m(lambda z, t: eps, start, 1, trace)
    assert torch.allclose(z, after.sqrt() * x0 + (1 - after).sqrt() * eps, atol=1e-10)
    assert torch.allclose(trace[0], x0, atol=1e-10)


# ---- guidance and noise ----

class Counted(UViT):
    """A random U-ViT that counts what is asked of it."""

    def __init__(self, conditioning):
        super().__init__(UViTConfig("intermediate", conditioning, n_image=1, n_fuse=1, n_text=1,
                                    image_size=4, channels=3, patch_size=2, width=16, heads=2,
                                    context_len=5, context_dim=6))
        self.encoded, self.batches = [], []
        randomise(self)

    def encode_text(self, context):
        self.encoded.append(len(context))
        return super().encode_text(context)

    def denoise(self, zt, t, text):
        self.batches.append(len(zt))
        return super().denoise(zt, t, text)


BOTH = pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])


def case(conditioning):
    generator = torch.Generator().manual_seed(5)
    net = Counted(conditioning)
    context, null_context = (torch.randn(2, 5, 6, generator=generator),
                             torch.randn(5, 6, generator=generator))
    return net, context, torch.tensor([1, 0, 1]), null_context


def initial_noise(seeds):
    return torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


@BOTH
def test_guidance_of_one_is_the_conditional_pass_alone(in_float32, conditioning):
    net, context, rows, null_context = case(conditioning)
    z = sample_latents(net, context, rows, null_context, [4, 5, 6], steps=4, guidance_scale=1)
    assert net.batches == [3] * 4
    plain = dpm_solver_pp_2m(lambda z, t: net(z, t, context[rows]), initial_noise([4, 5, 6]), 4)
    assert torch.allclose(z, plain, atol=1e-4) and z.dtype == torch.float32


@BOTH
def test_guidance_of_zero_is_the_unconditional_pass(in_float32, conditioning):
    net, context, rows, null_context = case(conditioning)
    z = sample_latents(net, context, rows, null_context, [4, 5, 6], steps=4, guidance_scale=0)
    plain = dpm_solver_pp_2m(lambda z, t: net(z, t, null_context.expand(3, 5, 6)),
                             initial_noise([4, 5, 6]), 4)
    assert torch.allclose(z, plain, atol=1e-4)


@BOTH
@pytest.mark.parametrize("w", [-0.5, 0.5, 2, 7.5])
def test_guidance_is_the_formula_at_every_step(in_float32, conditioning, w):
    net, context, rows, null_context = case(conditioning)

    def guided(z, t):
        uncond = net(z, t, null_context.expand(3, 5, 6))
        return uncond + w * (net(z, t, context[rows]) - uncond)
    z = sample_latents(net, context, rows, null_context, [4, 5, 6], steps=4, guidance_scale=w)
    assert net.batches == [6] * 4
    plain = dpm_solver_pp_2m(guided, initial_noise([4, 5, 6]), 4)
    assert torch.allclose(z, plain, atol=1e-4 * plain.abs().max().item())


@BOTH
def test_one_step_is_linear_in_the_guidance_scale(in_float32, conditioning):
    net, context, rows, null_context = case(conditioning)
    zero, one, three = [sample_latents(net, context, rows, null_context, [4, 5, 6], 1, w)
                        for w in (0, 1, 3)]
    assert (one - zero).abs().max() > 0.1
    assert torch.allclose(three, zero + 3 * (one - zero), atol=1e-3)


@BOTH
def test_the_text_is_encoded_once_whatever_the_number_of_steps_and_pictures(
        in_float32, conditioning):
    for steps, w in ((2, 3.0), (7, 3.0), (7, 1.0)):
        net, context, rows, null_context = case(conditioning)
        sample_latents(net, context, rows, null_context, [1, 2, 3], steps, w)
        assert len(net.encoded) == 1 and net.encoded[0] <= 3 and len(net.batches) == steps


@BOTH
def test_a_seed_and_a_prompt_give_the_same_latent_whatever_the_batch(in_float32, conditioning):
    net, context, _, null_context = case(conditioning)
    rows, seeds = [1, 0, 1, 0, 0], [4, 5, 6, 7, 4]

    def draw(which):
        return sample_latents(net, context, torch.tensor([rows[i] for i in which]), null_context,
                              [seeds[i] for i in which], 5, 2.0)
    together = draw(range(5))
    for parts in ([[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]], [[4, 3], [2, 1, 0]]):
        for part in parts:
            assert torch.allclose(draw(part), together[list(part)], atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1                       # another seed
    assert (together[0] - together[4]).abs().max() > 0.1                       # another prompt


def test_drawing_does_not_touch_the_global_random_state(in_float32):
    net, context, rows, null_context = case("concat")
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    sample_latents(net, context, rows, null_context, [1, 2, 3], 2, 2.0)
    assert torch.equal(torch.randn(3), expected)


@BOTH
def test_rows_of_encoded_text_are_the_text_of_those_rows(conditioning):
    net, context, rows, _ = case(conditioning)
    taken, direct = take_rows(net.encode_text(context), rows), net.encode_text(context[rows])
    pairs = [(taken, direct)] if conditioning == "concat" else [
        (a, b) for t, d in zip(taken, direct) for a, b in zip(t, d)]
    assert len(pairs) == (1 if conditioning == "concat" else 2)
    assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


# ---- pictures on disk ----

COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]],
                       dtype=torch.uint8)


def flat_pictures(count, side):
    return COLOURS[:count, :, None, None].expand(-1, -1, side, side)


@pytest.mark.parametrize("side,cell", [
    (32, 128), (33, 99), (16, 128), (100, 100), (128, 128), (256, 256)])
@pytest.mark.parametrize("count,columns", [(1, 1), (5, 2), (3, 4)])
def test_a_grid_has_every_picture_in_its_place(side, cell, count, columns):
    grid = draw_grid(flat_pictures(count, side), ["seed 1"] * count, columns)
    rows = math.ceil(count / columns)
    assert (grid.width == columns * (cell + 8) + 8 and (grid.height - 8) % rows == 0
            and grid.mode == "RGB")
    height = (grid.height - 8) // rows
    for i in range(count):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * height
        for dx, dy in ((0, 0), (cell - 1, cell - 1), (cell // 2, cell // 3)):
            assert grid.getpixel((x + dx, y + dy)) == tuple(COLOURS[i].tolist())
        for dx, dy in ((-1, 0), (cell, 0), (0, -1)):
            assert grid.getpixel((x + dx, y + dy)) == (255, 255, 255)
        below = np.array(grid)[y + cell:y + height, x:x + cell]
        assert below.min() < 128                                               # its caption


def test_small_pictures_are_enlarged_without_smoothing():
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8,
                            generator=torch.Generator().manual_seed(0))
    grid = np.array(draw_grid(picture, [""], 1))[8:8 + 128, 8:8 + 128]
    assert (grid == picture[0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)).all()


def test_long_captions_are_wrapped_and_stay_between_the_pictures():
    words = " ".join(["three red circles and two blue squares"] * 6)
    short, long = [draw_grid(flat_pictures(2, 32), [caption, "b"], 1) for caption in ("a", words)]
    assert long.width == short.width and long.height > short.height
    height = (long.height - 8) // 2
    picture = np.array(long)[8 + height:8 + height + 128, 8:8 + 128]
    assert (picture == np.array([0, 250, 0])).all()                            # the second is whole
    assert (np.array(long)[:, -8:] == 255).all()                               # an empty margin


def test_every_picture_has_its_own_caption():
    def captions(*texts):
        return np.array(draw_grid(flat_pictures(2, 32), texts, 2))[8 + 128:].reshape(
            -1, 280, 3)[:, :272].reshape(-1, 2, 136, 3)
    ab, bb = captions("a", "b"), captions("b", "b")
    assert ((ab[:, 1] == bb[:, 1]).all() and (bb[:, 0] == bb[:, 1]).all()
            and (ab[:, 0] != bb[:, 0]).any())


@pytest.mark.parametrize("text", [
    "", "one", "two red circles and three blue squares to the left of a cat", "  odd \n spaces\t"])
def test_wrapping_keeps_every_word_and_the_width(text):
    font = ImageFont.load_default(size=11)
    lines = wrap(text, font, 60)
    assert " ".join(lines).split() == text.split()
    assert all(font.getlength(line) <= 60 for line in lines)
    for line, following in zip(lines, lines[1:]):                              # no line ends early
        assert font.getlength(f"{line} {following.split()[0]}") > 60


def test_a_first_word_that_is_too_wide_leaves_no_empty_line():
    assert wrap("incomprehensibilities are long", ImageFont.load_default(size=11), 60)[0] \
        == "incomprehensibilities"


PROMPTS = ["two red circles", "三个红色的圆 und ein Kätzchen ☀️", "", "tabs\tand\nlines",
           "x" * 5000]


def test_pngs_carry_prompt_seed_and_settings_and_captions_txt_has_a_line_for_each(tmp_path):
    settings = {"guidance_scale": 3.0, "steps": 50, "checkpoint": "out/größe/last.pt"}
    pictures = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8,
                             generator=torch.Generator().manual_seed(0))
    save_pictures(tmp_path, 0, pictures[:2], PROMPTS[:2], [7, 8], settings)
    save_pictures(tmp_path, 2, pictures[2:], PROMPTS[2:], [9, 10, 11], settings)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"{i:05d}.png" for i in range(5)]
    for i in range(5):
        with Image.open(tmp_path / f"{i:05d}.png") as image:
            assert (np.array(image) == pictures[i].permute(1, 2, 0).numpy()).all()
            text = {key: str(value) for key, value in image.text.items()}
        assert text == {"prompt": PROMPTS[i], "seed": str(7 + i), "guidance_scale": "3.0",
                        "steps": "50", "checkpoint": "out/größe/last.pt"}
    lines = (tmp_path / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{i:05d}.png\t{' '.join(prompt.split())}" for i, prompt in enumerate(PROMPTS)]


def test_a_new_folder_is_never_one_that_exists(tmp_path):
    parent = tmp_path / "a" / "generated"
    first = new_folder(parent)
    (first / "precious.png").touch()
    (parent / "0003").mkdir()
    assert [new_folder(parent).name for _ in range(3)] == ["0002", "0004", "0005"]
    assert first.name == "0001" and (first / "precious.png").exists()


# ---- from a checkpoint to pictures ----

UNUSUAL = dict(fusion="intermediate", conditioning="cross_attention", n_image=1, n_fuse=3, n_text=1,
               fuse_shift=1, image_size=6, channels=16, patch_size=3, width=24, heads=3,
               context_len=9, context_dim=64)
CONFIG = Config(prompt=PROMPT, n=3, steps=3, guidance_scale=2.0, seed=11)


@pytest.fixture(scope="module")
def contents():
    """What sampling needs of a checkpoint: a tiny model of unusual sizes, for 24 x 24 pixels."""
    tower = random_clip_text(3, 9)
    coarse = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")
    with torch.no_grad():
        null_context = tower(tokenize(["nothing at all"], 9))[0][0]  # not that of "": from the file
    raw, ema = [randomise(UViT(UViTConfig(**UNUSUAL)), seed).state_dict() for seed in (1, 2)]
    meta = {"format": "midfuse-cache-1", "dataset": "shapes", "image_size": 24,
            "latent_shape": [16, 6, 6], "latent_scale": 0.9,
            "autoencoder": {"kind": "linear", "about": "components"},
            "text_tower": {"kind": "random", "seed": 3, "context_len": 9,
                           "sha256": weights_sha256(tower), "about": "random"}}
    return {"format": "midfuse-1", "step": 1234, "model": raw, "ema": ema,
            "uvit": dataclasses.asdict(UViTConfig(**UNUSUAL)), "config": {"width": 24},
            "meta": meta, "latent_scale": 0.9, "null_context": null_context,
            "autoencoder": LinearAutoencoder().fit(2 * smooth - 1).state_dict()}


@pytest.fixture
def checkpoint(contents, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    torch.save(contents, tmp_path / "out" / "run" / "last.pt")
    return "out/run/last.pt"


def draw(checkpoint, **changes):
    """Run sample.main; returns its pictures (n, H, W, 3) and its folder."""
    config = dataclasses.replace(CONFIG, checkpoint=checkpoint, **changes)
    sample.main(config)
    folder = Path(config.out) if config.out else max(
        (Path(checkpoint).parent / "generated").iterdir())
    return np.stack([np.array(Image.open(folder / f"{i:05d}.png"))
                     for i in range(config.n)]).astype(int), folder


def by_hand(contents, weights, null_context):
    """The same pictures from the parts of the checkpoint, one by one."""
    net = UViT(UViTConfig(**UNUSUAL))
    net.load_state_dict(contents[weights])
    autoencoder = LinearAutoencoder()
    autoencoder.load_state_dict(contents["autoencoder"])
    context = random_clip_text(3, 9)(tokenize([PROMPT], 9))[0]
    pictures = []
    for seed in (11, 12, 13):
        zT = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            z = dpm_solver_pp_2m(
                lambda z, t: 2 * net(z, t, context) - net(z, t, null_context[None]), zT, 3)
            pictures.append(to_uint8(
                autoencoder.decode(z / contents["latent_scale"]))[0].permute(1, 2, 0))
    return torch.stack(pictures).numpy().astype(int)


def test_everything_but_the_prompt_comes_from_the_checkpoint(in_float32, contents, checkpoint):
    pictures, _ = draw(checkpoint)
    expected = by_hand(contents, "ema", contents["null_context"])
    assert pictures.shape == (3, 24, 24, 3) and expected.std() > 20
    assert abs(pictures - expected).max() <= 1


def test_raw_true_takes_the_raw_weights(in_float32, contents, checkpoint):
    raw, folder = draw(checkpoint, raw=True)
    assert abs(raw - by_hand(contents, "model", contents["null_context"])).max() <= 1
    assert abs(raw - draw(checkpoint)[0]).max() > 20
    assert Image.open(folder / "00000.png").text["weights"] == "raw"


def test_a_checkpoint_without_null_context_takes_the_empty_caption(
        in_float32, contents, checkpoint):
    torch.save(contents | {"null_context": None}, checkpoint)
    with torch.no_grad():
        empty = random_clip_text(3, 9)(tokenize([""], 9))[0][0]
    assert abs(draw(checkpoint)[0] - by_hand(contents, "ema", empty)).max() <= 1


def test_a_run_leaves_pictures_captions_a_grid_and_a_film(contents, checkpoint, capsys):
    _, folder = draw(checkpoint, gif=True, steps=4)
    assert folder == Path("out/run/generated/0001")
    assert sorted(path.name for path in folder.iterdir()) == \
        ["00000.png", "00001.png", "00002.png", "captions.txt", "denoising.gif", "grid.png"]
    assert (folder / "captions.txt").read_text() == "".join(
        f"0000{i}.png\t{PROMPT}\n" for i in range(3))
    for i in range(3):
        text = Image.open(folder / f"0000{i}.png").text
        expected = {"prompt": PROMPT, "seed": str(11 + i), "guidance_scale": "2.0", "steps": "4",
                    "checkpoint": "out/run/last.pt", "train_step": "1234", "weights": "EMA"}
        assert expected.items() <= text.items()
    with Image.open(folder / "denoising.gif") as film, Image.open(folder / "grid.png") as grid:
        assert film.n_frames == 4 and film.size == grid.size
    assert f"3 pictures of '{PROMPT}' are in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [
    dict(steps=1, gif=True), dict(n=1, gif=True), dict(n=5, batch_size=2, gif=True),
    dict(prompt=""), dict(guidance_scale=0.0)], ids=str)
def test_unusual_requests_work(checkpoint, changes):
    pictures, folder = draw(checkpoint, **changes)
    assert len(pictures) == changes.get("n", 3) and (folder / "grid.png").exists()
    assert (folder / "denoising.gif").exists() == changes.get("gif", False)
    if changes.get("gif"):
        with Image.open(folder / "denoising.gif") as film:                     # of the first batch
            assert film.n_frames == changes.get("steps", CONFIG.steps)


def test_the_same_seed_gives_the_same_picture_whatever_the_batch_size(checkpoint):
    """In the precision that this machine samples in."""
    five, _ = draw(checkpoint, n=5)
    by_two, _ = draw(checkpoint, n=5, batch_size=2)
    last, _ = draw(checkpoint, n=1, seed=CONFIG.seed + 4)
    assert abs(five - by_two).mean() < 2 and abs(five[4] - last[0]).mean() < 2
    assert abs(five[4] - five[3]).mean() > 10
    assert (draw(checkpoint, n=5)[0] == five).all()


def test_nothing_is_overwritten(checkpoint, tmp_path):
    first, folder = draw(checkpoint)
    assert draw(checkpoint, seed=5)[1].name == "0002"
    assert (np.array(Image.open(folder / "00000.png")) == first[0]).all()
    assert draw(checkpoint, out="deep/new")[1] == Path("deep/new")
    before = {path: path.read_bytes() for path in (tmp_path / "deep" / "new").iterdir()}
    for taken in ("deep/new", "deep", checkpoint):
        with pytest.raises(UserError, match=f"--out={taken} exists already, "
                                            "and nothing is overwritten"):
            draw(checkpoint, out=taken, seed=5)
    assert {path: path.read_bytes() for path in (tmp_path / "deep" / "new").iterdir()} == before


def test_a_prompt_of_two_hundred_words_is_cut_and_that_is_said(checkpoint, capsys):
    draw(checkpoint, prompt=" ".join(["cat"] * 200))
    assert "longer than the model's 9 tokens and is cut" in capsys.readouterr().out
    draw(checkpoint, prompt=" ".join(["cat"] * 7))                      # 9 with start and end
    assert "is cut" not in capsys.readouterr().out


def test_a_prompt_beyond_latin_is_drawn_and_recorded(checkpoint):
    _, folder = draw(checkpoint, prompt="红色的圆 🎈")
    assert Image.open(folder / "00002.png").text["prompt"] == "红色的圆 🎈"
    assert (folder / "captions.txt").read_text(encoding="utf-8").endswith(
        "00002.png\t红色的圆 🎈\n")


@pytest.mark.parametrize("changes", [dict(n=0), dict(n=-1), dict(steps=0), dict(batch_size=0)],
                         ids=str)
def test_impossible_numbers_are_refused_before_anything_is_written(checkpoint, tmp_path, changes):
    with pytest.raises(UserError, match=f"{[*changes][0]}={[*changes.values()][0]}"
                                        ".*expected 1 or more"):
        draw(checkpoint, **changes)
    assert not (tmp_path / "out" / "run" / "generated").exists()


@pytest.mark.parametrize("seed", [-1, 2 ** 32])
def test_a_seed_that_no_generator_takes_is_refused(checkpoint, tmp_path, seed):
    with pytest.raises(UserError, match=f"seed={seed}"):
        draw(checkpoint, seed=seed)
    assert not (tmp_path / "out" / "run" / "generated").exists()


def test_another_text_tower_than_that_of_the_checkpoint_is_refused(contents, checkpoint):
    other = contents["meta"] | {"text_tower": contents["meta"]["text_tower"] | {"seed": 4}}
    torch.save(contents | {"meta": other}, checkpoint)
    with pytest.raises(UserError, match="text tower"):
        draw(checkpoint)


# ---- the official weights ----

@pytest.fixture
def official(tmp_path):
    net = randomise(UViT(UViTConfig("early", "concat", depth=3, image_size=8, width=64, heads=1,
                                    context_dim=64)))
    torch.save(net.state_dict(), tmp_path / "mscoco_uvit_small.pth")
    return "mscoco_uvit_small.pth"


def test_the_official_weights_name_the_files_that_they_need(official):
    with pytest.raises(UserError, match="weights/clip-vit-large-patch14.bin"):
        draw(official)


def test_the_official_weights_have_no_raw_ones_beside_them(official):
    with pytest.raises(UserError, match="raw"):
        draw(official, raw=True)
