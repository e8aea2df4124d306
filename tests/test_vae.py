"""Protects the way from image to latent: diffusers' numbers, key layouts, float32, closed forms."""
import hashlib
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

import vae
from model import UserError, read_weights

TINY = dict(channels=32, multipliers=(1, 2, 4, 4), blocks=1)


def randomise(module, seed=0):
    """All parameters at random: an initialisation has zeros and ones, and these hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, std=0.05, generator=generator)
    return module.eval().requires_grad_(False)


def diffusers_autoencoder(channels, multipliers, blocks):
    widths = [channels * multiplier for multiplier in multipliers]
    return randomise(AutoencoderKL(
        block_out_channels=widths, layers_per_block=blocks, latent_channels=4, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))


def old_names(state):
    """diffusers' names of 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub("|".join(names), lambda match: names[match[0]], key): state[key]
            for key in state}


def error(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_equal_to(reference, ours):
    torch.manual_seed(1)
    x, z = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 4, 6)
    moments, image = ours.encode(x), ours.decode(z)
    assert moments.shape == (2, 8, 4, 6) and image.shape == (2, 3, 32, 48)
    assert error(moments, reference.encode(x).latent_dist.parameters) < 1e-4
    assert error(image, reference.decode(z).sample) < 1e-4


def fit(x):
    linear = vae.LinearAutoencoder()
    linear.fit(x)
    return linear


@pytest.fixture(scope="module")
def reference():
    return diffusers_autoencoder(**TINY)


@pytest.fixture(scope="module")
def compvis():
    """A state dict with CompVis's names, and diffusers' model with it, converted by diffusers."""
    state, model = (randomise(vae.KLAutoencoder(**TINY), seed=2).state_dict(),
                    diffusers_autoencoder(**TINY))
    model.load_state_dict(convert_ldm_vae_checkpoint(dict(state), model.config))
    return state, model


@pytest.fixture
def tiny():
    return randomise(vae.KLAutoencoder(**TINY))


# ---- KL autoencoder ----

def test_the_real_size_equals_diffusers(tmp_path):
    reference = diffusers_autoencoder(128, (1, 2, 4, 4), 2)
    reference.save_pretrained(tmp_path)
    ours = vae.load_vae(tmp_path / "diffusion_pytorch_model.safetensors")
    assert len(ours.state_dict()) == 248
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863
    assert_equal_to(reference, ours)


@pytest.mark.parametrize("name", ["vae.safetensors", "VAE.SAFETENSORS", "vae.ckpt", "0123abcd"])
@pytest.mark.parametrize("rename", [dict, old_names])
def test_new_and_old_diffusers_names_load_from_every_kind_of_file(
        reference, tmp_path, rename, name):
    state = rename(reference.state_dict())
    (save_file if name.lower().endswith("safetensors") else torch.save)(state, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)         # as in the cache of Hugging Face
    assert_equal_to(reference, vae.load_vae(tmp_path / "link"))


def test_attention_weights_may_have_two_three_or_four_dimensions(reference, tmp_path):
    for extra in ((1,), (1, 1)):
        state = reference.state_dict()
        matrices = {key: state[key] for key in state
                    if "attentions.0.to_" in key and state[key].ndim == 2}
        assert len(matrices) == 8
        state |= {key: value.reshape(value.shape + extra) for key, value in matrices.items()}
        torch.save(state, tmp_path / "vae.pth")
        assert_equal_to(reference, vae.load_vae(tmp_path / "vae.pth"))


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"epoch": 3, "state_dict": state | {
        "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(3)}},
    lambda state: {"state_dict": {f"first_stage_model.{key}": state[key] for key in state} | {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(8)}},
    lambda state: {f"vae.{key}": state[key] for key in state} | {
        "unet.conv_in.bias": torch.zeros(4)},
], ids=["bare", "state_dict_with_loss", "stable_diffusion", "vae_prefix"])
def test_compvis_names_load_bare_wrapped_and_from_a_whole_stable_diffusion(compvis, tmp_path, wrap):
    state, reference = compvis
    torch.save(wrap(state), tmp_path / "model.ckpt")
    assert_equal_to(reference, vae.load_vae(tmp_path / "model.ckpt"))


def test_a_loaded_autoencoder_is_float32_frozen_and_in_evaluation_mode(reference, tmp_path):
    torch.save({key: value.half() for key, value in reference.state_dict().items()},
               tmp_path / "vae.pth")
    ours = vae.load_vae(tmp_path / "vae.pth")
    for parameter in ours.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
    assert not ours.training


def test_the_architecture_is_read_off_the_weights(tmp_path):
    reference = diffusers_autoencoder(32, (1, 3, 2, 2), 2)
    save_file(reference.state_dict(), tmp_path / "vae.safetensors")
    assert_equal_to(reference, vae.load_vae(tmp_path / "vae.safetensors"))


def test_all_group_norms_have_the_eps_of_diffusers(reference, tiny):
    """With weights of ordinary size the difference from torch's 1e-5 would drown in rounding."""
    for model in (reference, tiny):
        assert {module.eps for module in model.modules()
                if isinstance(module, nn.GroupNorm)} == {1e-6}


def test_padding_all_around_would_give_other_moments(compvis):
    """The equality tests can fail: right-and-bottom padding is not a matter of rounding."""
    state, reference = compvis
    ours = vae.KLAutoencoder(**TINY)
    ours.load_state_dict(state)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = reference.encode(x).latent_dist.parameters
    assert error(ours.encode(x), moments) < 1e-5
    for level in ours.encoder.down[:3]:
        level.downsample.pad = nn.ZeroPad2d(1)
    assert error(ours.encode(x), moments) > 1e-2


def test_sampled_latents_equal_diffusers(reference):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = reference.encode(x).latent_dist
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    expected = posterior.sample(generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(vae.sample_latent(posterior.parameters, noise), expected)


# ---- float32, chunks, gradients ----

@pytest.mark.parametrize("kind", ["kl", "linear"])
def test_autocast_changes_no_bit(tiny, kind):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    autoencoder = tiny if kind == "kl" else fit(x)
    moments = autoencoder.encode(x)
    z = moments.chunk(2, dim=1)[0]
    image = autoencoder.decode(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16     # it is on
        assert (torch.equal(autoencoder.encode(x), moments)
                and torch.equal(autoencoder.decode(z), image))
    assert torch.equal(autoencoder.decode(z.bfloat16()), autoencoder.decode(z.bfloat16().float()))
    assert moments.dtype == image.dtype == torch.float32


def test_results_do_not_depend_on_the_chunk_size(tiny, monkeypatch):
    torch.manual_seed(0)
    x, z = torch.rand(5, 3, 32, 32) * 2 - 1, torch.randn(5, 4, 4, 4)
    moments, image = tiny.encode(x), tiny.decode(z)
    sizes = []
    tiny.quant_conv.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(vae, "CHUNK", 2)
    assert error(tiny.encode(x), moments) < 1e-5 and error(tiny.decode(z), image) < 1e-5
    assert sizes == [2, 2, 1]


def test_no_gradients_are_recorded(tiny):
    tiny.requires_grad_(True)
    assert not tiny.encode(torch.zeros(1, 3, 16, 16)).requires_grad
    assert not tiny.decode(torch.zeros(1, 4, 2, 2)).requires_grad


def test_nan_and_infinity_are_refused_and_say_whether_they_were_in_the_input(tiny):
    with pytest.raises(FloatingPointError, match="gave NaN or infinity: its input has some"):
        tiny.decode(torch.stack([torch.zeros(4, 2, 2), torch.full((4, 2, 2), float("inf"))]))
    tiny.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="gave NaN or infinity: its weights are bad"):
        tiny.encode(torch.zeros(1, 3, 16, 16))


# ---- files ----

@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_the_safetensors_reader_equals_the_package(tmp_path, metadata):
    torch.manual_seed(0)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16,
             torch.int64, torch.int32]
    tensors = {f"matrix.{i}": (100 * torch.randn(3, 5)).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(2.5), "odd": torch.tensor([1, 0, 1]),
                "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "0123abcd", metadata=metadata)
    read = read_weights(tmp_path / "0123abcd")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_a_file_of_lightning_loads_if_it_holds_weights_alone(compvis, tmp_path):
    state, reference = compvis
    wrapped = {"epoch": 3, "state_dict": state, "callbacks": {}, "optimizer_states": []}
    torch.save(wrapped, tmp_path / "last.ckpt")
    assert_equal_to(reference, vae.load_vae(tmp_path / "last.ckpt"))
    torch.save(wrapped | {"callbacks": tmp_path}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="or more than weights"):
        vae.load_vae(tmp_path / "last.ckpt")


def test_an_unreadable_file_is_refused(reference, tmp_path):
    save_file(reference.state_dict(), tmp_path / "whole.safetensors")
    torch.save(reference.state_dict(), tmp_path / "whole.bin")
    for name in ("whole.safetensors", "whole.bin"):
        data = (tmp_path / name).read_bytes()
        for size in (0, 5, 1000, len(data) // 2):
            (tmp_path / "cut").write_bytes(data[:size])
            with pytest.raises(UserError, match="cut is damaged, or not"):
                vae.load_vae(tmp_path / "cut")
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(UserError, match="page.pth: this is HTML"):
        vae.load_vae(tmp_path / "page.pth")
    with pytest.raises(UserError, match="absent.pth is missing"):
        vae.load_vae(tmp_path / "absent.pth")


def test_another_network_is_refused_with_what_was_expected(compvis, tmp_path):
    def refusal(state):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(UserError) as caught:
            vae.load_vae(tmp_path / "weights.pth")
        return str(caught.value)

    state, _ = compvis
    for none in ({"pos_embed": torch.zeros(1, 2, 3)}, {}):
        assert "or not weights of an f8 KL autoencoder, by CompVis's" in refusal(none)
    decoder = {key: state[key] for key in state if not key.startswith("encoder.")}
    assert "KeyError: 'encoder.conv_in.weight'" in refusal(decoder)
    three_levels = {key: state[key] for key in state if ".3." not in key}
    assert "encoder.down.3.block.0.conv1.weight" in refusal(three_levels)
    narrow = {key: state[key][:16] for key in state if key not in decoder}
    assert "divisible by num_groups" in refusal(decoder | narrow)
    whole_but_one = {key: state[key] for key in state if key != "quant_conv.weight"}
    assert "Error(s) in loading state_dict" in refusal(whole_but_one)
    assert 'Missing key(s) in state_dict: "quant_conv.weight"' in refusal(whole_but_one)
    attention = "encoder.down.2.attn.0.q.bias"                          # attention at every level
    assert f'Unexpected key(s) in state_dict: "{attention}"' in refusal(
        state | {attention: torch.zeros(64)})
    wide = refusal(state | {"decoder.conv_in.weight": torch.zeros(128, 16, 3, 3)})  # 16 channels
    assert "decoder.conv_in.weight" in wide and "[128, 16, 3, 3]" in wide


def test_a_description_loads_its_own_autoencoder_and_no_other(compvis, tmp_path):
    state, reference = compvis
    with pytest.raises(UserError, match="kl.pth is missing: expected the autoencoder .*abc"):
        vae.load_autoencoder({"kind": "kl", "file": "kl.pth", "sha256": "abc"}, None, tmp_path)
    torch.save(state, tmp_path / "kl.pth")
    digest = hashlib.sha256((tmp_path / "kl.pth").read_bytes()).hexdigest()
    for description in ({"kind": "kl", "file": "kl.pth"},
                        {"kind": "kl", "file": "kl.pth", "sha256": digest}):
        assert_equal_to(reference, vae.load_autoencoder(description, None, tmp_path))
    with pytest.raises(UserError, match="kl.pth has another SHA-256: .*abc"):
        vae.load_autoencoder({"kind": "kl", "file": "kl.pth", "sha256": "abc"}, None, tmp_path)


def test_a_linear_description_loads_from_its_state(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    fitted = fit(x)
    loaded = vae.load_autoencoder({"kind": "linear"}, fitted.state_dict(), tmp_path)
    assert torch.equal(loaded.encode(x), fitted.encode(x))
    other = fitted.state_dict() | {"components": torch.zeros(8, 48)}
    with pytest.raises(RuntimeError, match=r"components.*\[8, 48\]"):
        vae.load_autoencoder({"kind": "linear"}, other, tmp_path)


# ---- linear autoencoder ----

@pytest.fixture
def pictures():
    """Smooth random pictures plus noise: patches with a wide spectrum of eigenvalues."""
    torch.manual_seed(0)
    smooth = nn.functional.interpolate(torch.rand(20, 3, 4, 4), size=(32, 24), mode="bilinear")
    return (smooth * 2 - 1 + 0.1 * torch.randn(20, 3, 32, 24)).clamp(-1, 1)


def reconstruct(linear, x):
    return linear.decode(linear.encode(x).chunk(2, dim=1)[0])


def test_patches_are_the_squares_of_the_picture(pictures):
    patches = vae.LinearAutoencoder().cut(pictures)
    assert patches.shape == (20, 8, 6, 48)
    for row, column in ((0, 0), (3, 5), (7, 1)):
        square = pictures[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
        assert torch.equal(patches[:, row, column], square.flatten(1))


def test_components_are_orthogonal_uncorrelated_and_half_whitened(pictures):
    linear = fit(pictures)
    patches = linear.cut(pictures).flatten(0, 2).numpy().astype(np.float64)
    eigenvalues = torch.from_numpy(np.linalg.eigvalsh(np.cov(patches.T))[::-1][:16].copy())
    lengths = linear.components @ linear.components.T
    torch.testing.assert_close(lengths, (eigenvalues ** -0.5).diag().float(), atol=1e-4, rtol=0)
    moments = linear.encode(pictures)
    assert (moments.shape == (20, 32, 8, 6)
            and linear.decode(moments[:, :16]).shape == (20, 3, 32, 24))
    covariance = moments[:, :16].transpose(0, 1).flatten(1).double().cov()
    variances = covariance.diagonal()
    torch.testing.assert_close(variances, eigenvalues.sqrt(),           # half whitened: the roots
                               rtol=1e-4, atol=0)
    assert (variances.diff() < 0).all()
    torch.testing.assert_close(covariance, variances.diag(), atol=1e-5, rtol=0)


def test_the_error_is_the_sum_of_the_discarded_eigenvalues(pictures):
    linear = fit(pictures)
    patches = linear.cut(pictures).flatten(0, 2).numpy().astype(np.float64)
    discarded = np.linalg.eigvalsh(np.cov(patches.T, bias=True))[:-16].sum()
    squared = ((linear.cut(reconstruct(linear, pictures) - pictures) ** 2).sum(-1)
               .double().mean().item())
    assert squared == pytest.approx(discarded, rel=1e-5)


def test_encoding_and_decoding_is_a_projection(pictures):
    linear = fit(pictures)
    once = reconstruct(linear, pictures)
    assert (once - pictures).abs().max() > 0.05
    torch.testing.assert_close(reconstruct(linear, once), once, atol=1e-5, rtol=0)
    z = torch.randn(2, 16, 5, 7)                            # whatever lies in the span comes back
    torch.testing.assert_close(linear.encode(linear.decode(z))[:, :16], z, atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruct(linear, linear.decode(z)), linear.decode(z),
                               atol=1e-5, rtol=0)


def test_the_linear_latent_has_no_noise_to_sample(pictures):
    moments = fit(pictures).encode(pictures)
    latent = vae.sample_latent(moments, torch.ones(20, 16, 8, 6))
    torch.testing.assert_close(latent, moments[:, :16], atol=1e-6, rtol=0)


def test_fitting_twice_gives_the_same_signs(pictures):
    first, second = (fit(pictures),
                     fit(pictures.flip(0)))
    torch.testing.assert_close(first.components, second.components, atol=1e-5, rtol=0)
    assert (first.components.gather(1, first.components.abs().argmax(1, keepdim=True)) > 0).all()


# ---- pixels and moments ----

def test_every_pixel_value_survives_the_way_to_unit_and_back():
    values = np.arange(768, dtype=np.uint8).reshape(2, 8, 16, 3)
    x = vae.to_unit(values)
    assert x.shape == (2, 3, 8, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1 and x[0, 1, 0, 0] == 1 / 127.5 - 1
    assert (vae.to_pictures(x) == values).all()
    beyond = torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1)
    assert vae.to_pictures(beyond).tolist() == [[[[0, 255, 128]]]]


def test_the_log_variance_is_clamped_to_minus_30_and_20():
    logvar = torch.tensor([-1000.0, -30.0, 0.0, 20.0, 1000.0]).reshape(1, 5, 1, 1)
    moments = torch.cat([torch.zeros(1, 5, 1, 1), logvar], dim=1)
    std = vae.sample_latent(moments, torch.ones(1, 5, 1, 1)).flatten()
    torch.testing.assert_close(std, torch.tensor([-15.0, -15.0, 0.0, 10.0, 10.0]).exp())
