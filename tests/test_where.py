"""Protects the looks into a trained network: hidden text is hidden, shares are what they say."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip_text
import model
import prepare_data
import vae
import where
from model import UserError, UViT, UViTConfig

FOUR = [(fusion, conditioning) for fusion in ("early", "intermediate")
        for conditioning in ("concat", "cross_attention")]


def small_net(fusion, conditioning, **changes):
    torch.manual_seed(0)
    sizes = {"depth": 5, "n_image": 1, "n_text": 1, "image_size": 4, "channels": 2,
             "patch_size": 1, "width": 16, "heads": 2, "context_len": 3, "context_dim": 5}
    return UViT(UViTConfig(fusion, conditioning, **sizes | changes), init_std=0.5).eval()


def inputs(seed=0, n=2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 2, 4, 4, generator=generator), torch.tensor([10, 900])[:n],
            torch.randn(n, 3, 5, generator=generator))


# ---- the knock-out ----

@pytest.mark.parametrize("fusion, conditioning", FOUR)
@torch.no_grad()
def test_text_that_is_hidden_everywhere_has_no_influence(fusion, conditioning):
    net, (zt, t, context) = small_net(fusion, conditioning), inputs()
    assert not torch.allclose(net(zt, t, context), net(zt, t, -context), atol=1e-2)
    with where.hidden_text(net, net.config.window):
        torch.testing.assert_close(net(zt, t, context), net(zt, t, -context), rtol=0, atol=0)
    hidden = [i for i in net.config.window if i != net.config.window.stop - 1]
    with where.hidden_text(net, hidden):                # one block still sees it
        assert not torch.allclose(net(zt, t, context), net(zt, t, -context), atol=1e-3)


@pytest.mark.parametrize("fusion, conditioning", FOUR)
@torch.no_grad()
def test_hiding_in_no_block_or_outside_the_window_changes_nothing(fusion, conditioning):
    net, example = small_net(fusion, conditioning), inputs()
    outside = [i for i in range(-1, net.config.depth + 1) if i not in net.config.window]
    before = net(*example)
    for blocks in ([], outside):
        with where.hidden_text(net, blocks):
            torch.testing.assert_close(net(*example), before, rtol=0, atol=0)
    with where.hidden_text(net, [net.config.window.start]):
        assert not torch.equal(net(*example), before)
    assert torch.equal(net(*example), before)           # all is as before
    assert "fuse" not in vars(net)


@torch.no_grad()
def test_hidden_everywhere_cross_attention_is_a_network_that_never_had_text():
    net, (zt, t, context) = small_net("intermediate", "cross_attention"), inputs()
    with where.hidden_text(net, net.config.window):
        hidden = net(zt, t, context)
    net.fuse = lambda i, block, x, text: block(x)
    torch.testing.assert_close(hidden, net(zt, t, context), rtol=0, atol=1e-6)


@torch.no_grad()
def test_hidden_text_still_reads_itself_and_the_image():
    """In concat the block's text tokens come out as ever; time and image do not."""
    net, example, seen = small_net("early", "concat"), inputs(), []
    net.in_blocks[0].register_forward_hook(lambda block, inputs, x: seen.append(x))
    net(*example)
    with where.hidden_text(net, [0]):
        net(*example)
    own = 1 + net.pos_embed.shape[1] - 1 - net.config.context_len
    torch.testing.assert_close(seen[0][:, own:], seen[1][:, own:], rtol=0, atol=0)
    assert (seen[0][:, :own] - seen[1][:, :own]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("fusion, conditioning", FOUR)
def test_shares_are_those_of_their_definition(fusion, conditioning):
    net = small_net(fusion, conditioning)
    z0, _, context = inputs()
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    result = where.knock_out(net, z0, eps, context)
    shown, none = [np.array(result[key]) for key in ("loss", "loss_without_text")]
    a = model.noise_schedule()[500].float()
    zt, t = a.sqrt() * z0 + (1 - a).sqrt() * eps, torch.full((2,), 500)
    with torch.no_grad():
        assert shown[2] == pytest.approx((net(zt, t, context) - eps).square().mean().item())
    window = list(net.config.window)
    assert list(result["lost_if_hidden"]) == list(result["kept_if_alone"]) == window
    with where.hidden_text(net, [window[0]]):
        loss = where.held_out_losses(net, z0, eps, context)
    np.testing.assert_allclose(result["lost_if_hidden"][window[0]],
                               (loss - shown) / (none - shown), rtol=1e-4)
    with where.hidden_text(net, window[1:]):
        loss = where.held_out_losses(net, z0, eps, context)
    np.testing.assert_allclose(result["kept_if_alone"][window[0]],
                               (none - loss) / (none - shown), rtol=1e-4, atol=1e-6)


def test_a_window_of_one_block_has_all_the_rise():
    net = small_net("intermediate", "concat", n_fuse=1)
    z0, _, context = inputs()
    result = where.knock_out(net, z0, torch.ones_like(z0), context)
    assert result["lost_if_hidden"] == result["kept_if_alone"] == {1: [1.0] * 5}


# ---- attention rank ----

def test_effective_rank_of_known_matrices():
    """1 for an outer product, n for n equal singular values at any scale, else exp(entropy)."""
    outer = torch.outer(torch.rand(7), torch.rand(4))
    orthogonal = torch.linalg.qr(torch.randn(7, 4))[0]
    mixed = orthogonal * torch.tensor([3.0, 1.0, 0.0, 0.0])
    ranks = where.effective_rank(torch.stack([outer, 1e-3 * orthogonal, mixed]))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    torch.testing.assert_close(
        ranks, torch.tensor([1.0, 4.0, np.exp(entropy)], dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion, conditioning", FOUR)
def test_attention_ranks_are_those_of_the_attention_that_the_network_computes(
        fusion, conditioning, monkeypatch):
    net, seen, attention = small_net(fusion, conditioning), [], model.attention
    ranks = where.attention_ranks(net, *inputs())
    alone = where.attention_ranks(net, *inputs(), text_alone=True)

    def record(q, k, v):
        if k.shape[2] == 1 + 16 + 3:                    # those with text among the keys
            seen.append((q @ k.mT / 8 ** 0.5).softmax(-1)[:, :, 1:17, 17:])
        return attention(q, k, v)
    monkeypatch.setattr(model, "attention", record)
    net(*inputs())
    assert list(ranks) == list(alone) == list(net.config.window)
    for found, weights in ((ranks, seen), (alone, [x / x.sum(-1, keepdim=True) for x in seen])):
        expected = [where.effective_rank(matrices).mean().item() for matrices in weights]
        assert list(found.values()) == pytest.approx(expected, rel=1e-5)
        assert all(1 <= rank <= 3 for rank in found.values())


def test_attention_that_looks_at_the_text_alike_from_everywhere_has_rank_one():
    net = small_net("early", "concat")
    for block in net.stack:
        block.attn.qkv.weight.data[:16] = 0             # every query is 0
    assert list(where.attention_ranks(net, *inputs()).values()) == pytest.approx([1] * 5, abs=1e-3)


# ---- words, and whole checkpoints ----

@pytest.mark.parametrize("prompt", ["three red circles", "a photograph of Mr. O'Neill's 42 cats!",
                                    "", " ".join(20 * ["red"])])
def test_the_words_of_a_prompt_share_out_all_its_tokens(prompt):
    words, tokens = where.find_words(prompt, 16), clip_text.tokenize([prompt], 16)[0]
    places = [place for _, part in words for place in range(16)[part]]
    assert places == list(range(16))
    for word, part in words[1:-1]:
        ids = clip_text.encode(word)
        assert tokens[part].tolist() == ids[:part.stop - part.start]
    assert (tokens[words[-1][1]] == clip_text.END).all()


def looks(folder):
    """The where.json of a folder, if its pictures are there, too."""
    assert {path.name for path in folder.iterdir()} == {
        "where.json", "where.png", "words.png", "denoising.gif"}
    with Image.open(folder / "denoising.gif") as film:
        assert film.n_frames == 2                           # one for each step
    return json.loads((folder / "where.json").read_text())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small cache of shapes."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    prepare_data.main(prepare_data.Config(out=str(folder), train_images=60, val_images=20))
    return folder


@pytest.mark.parametrize("fusion, conditioning", [FOUR[0], FOUR[3]])
def test_a_checkpoint_is_looked_into(fusion, conditioning, shapes, tmp_path):
    cache = prepare_data.read_cache(shapes)
    net = small_net(fusion, conditioning, depth=3, image_size=8, channels=16, context_len=16,
                    context_dim=64)
    torch.save({"format": model.CHECKPOINT_FORMAT, "step": 7, "uvit": vars(net.config),
                "ema": net.state_dict(), "latent_scale": cache.meta["latent_scale"],
                "meta": cache.meta, "autoencoder": cache.autoencoder,
                "null_context": torch.tensor(cache.text[0])}, "last.pt")
    where.main(where.Config(checkpoint="last.pt", data=str(shapes), pictures=12, steps=2,
                            prompt="one red circle"))
    found = looks(tmp_path / "where")
    assert (found["step"], found["pictures"], found["window"]) == (7, 12, list(net.config.window))
    assert found["words"] == ["(start)", "one", "red", "circle", "(end)"]
    for block in map(str, net.config.window):
        assert len(found["lost_if_hidden"][block]) == len(found["kept_if_alone"][block]) == 5
        assert 1 <= found["rank"][block] <= 16 and 1 <= found["rank_text_alone"][block] <= 16
        assert 0 < sum(found["attention"][block]) < 1       # the rest looks at time and image


def test_the_official_weights_are_looked_into(monkeypatch, tmp_path):
    """A flat state dict of U-ViT's, 77 tokens, with CLIP's tower and the KL autoencoder."""
    (tmp_path / "weights").mkdir()
    tower = clip_text.CLIPText(width=64, layers=1, heads=1, projection=8)
    torch.save(tower.state_dict(), "weights/clip-vit-large-patch14.bin")
    torch.save(vae.KLAutoencoder(32, (1, 1, 1, 1), 1).state_dict(), "weights/kl-f8.bin")
    net = small_net("early", "concat", depth=3, image_size=8, channels=4, patch_size=2, width=64,
                    heads=1, context_len=77, context_dim=64)
    torch.save(net.state_dict(), "mscoco_uvit_small.pth")
    pairs = np.array([[0, 1], [1, 1], [2, 2]])
    cache = SimpleNamespace(
        meta={"latent_shape": [4, 8, 8]}, captions=["", "a cat on a mat", "two birds"],
        val_moments=np.random.default_rng(0).normal(size=(3, 8, 8, 8)).astype("f"),
        val_pairs=pairs)
    monkeypatch.setattr(where, "read_cache", lambda folder: cache)
    where.main(where.Config(checkpoint="mscoco_uvit_small.pth", pictures=3, steps=2, out="looks"))
    found = looks(tmp_path / "looks")
    assert (found["window"], found["fusion"], found["pictures"]) == ([0, 1, 2], "early", 3)
    assert found["words"] == ["(start)", "a", "cat", "on", "a", "mat", "(end)"]
    assert np.isfinite([*found["lost_if_hidden"].values()]).all()
    cache.meta["latent_shape"] = [16, 8, 8]
    with pytest.raises(UserError, match="trained on latents .4, 8, 8., but --data=data/shapes"):
        where.main(where.Config(checkpoint="mscoco_uvit_small.pth"))


def test_word_maps_are_the_mean_over_heads_and_steps_of_the_prompt_alone(shapes, monkeypatch):
    """The picture is that of the Pipeline; with guidance, the null context is left out."""
    net = small_net("early", "concat", image_size=8, channels=16, context_len=16, context_dim=64)
    seen = []

    class Pipeline:
        def draw(self, captions, seeds, steps, guidance_scale):
            generator = torch.Generator().manual_seed(seeds[0])
            zt = torch.randn(2, 16, 8, 8, generator=generator)
            context = torch.randn(2, 16, 64, generator=generator)
            for t in (1000, 500):
                net(zt, torch.full((2,), t), context)
            return np.zeros((1, 32, 32, 3), np.uint8)
    pipeline = Pipeline()
    pipeline.net = net
    with torch.no_grad():
        picture, maps = where.map_words(pipeline, "two red circles", where.Config(steps=2))
        with where.watched_attention(net, lambda i, weights: seen.append((i, weights[0]))):
            pipeline.draw(["two red circles"], [0], 2, 3.0)
    assert picture.shape == (32, 32, 3)
    for block, attention in maps.items():
        mean = torch.stack([weights.mean(0) for i, weights in seen if i == block]).mean(0)
        np.testing.assert_allclose(attention[1], mean[:, 1], rtol=1e-5)     # "two" is one token
        np.testing.assert_allclose(attention.sum(0), mean.sum(1), rtol=1e-5)
