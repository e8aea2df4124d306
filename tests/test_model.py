"""Protects the network: U-ViT, both fusions, what they cost, the official weights, precision."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from conftest import randomise
from model import (UserError, UViT, UViTConfig, add_noise, autocast, choose_device,
                   choose_precision, count_multiply_adds, load_frozen, noise_schedule,
                   read_checkpoint, timestep_embedding)

HOW = ["concat", "cross_attention"]
FOUR = [(fusion, conditioning) for fusion in ("early", "intermediate") for conditioning in HOW]


def tiny(fusion, conditioning, **changes) -> UViTConfig:
    """Seven blocks, and no two dimensions alike: C 5, P 3, N 4, L 6, E 10, D 24, 3 heads."""
    sizes = dict(depth=7, n_image=2, n_fuse=3, n_text=2, image_size=6, channels=5, patch_size=3,
                 width=24, heads=3, context_len=6, context_dim=10)
    return UViTConfig(fusion, conditioning, **sizes | changes)


def inputs(config: UViTConfig, B: int = 2):
    generator = torch.Generator().manual_seed(1)
    zt = torch.randn(B, config.channels, config.image_size, config.image_size, generator=generator)
    context = torch.randn(B, config.context_len, config.context_dim, generator=generator)
    return zt, torch.tensor([3, 40, 17, 1, 29])[:B], context


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ---- the plain computation: FACTS 1 and 1b as formulas over a state dict ----

def plain_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def plain_linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_block(state, name, x, heads, heard=None):
    """The tokens x ask and are updated; keys and values are of x and `heard`, head by head."""
    everybody = plain_norm(state, f"{name}.norm1", x if heard is None else torch.cat([x, heard], 1))
    d = x.shape[2] // heads
    answers = []
    for matrix in zip(*[part.split(d) for part in state[f"{name}.attn.qkv.weight"].chunk(3)]):
        q, k, v = [everybody @ rows.T for rows in matrix]
        scores = torch.einsum("bqd,bkd->bqk", q[:, :x.shape[1]], k) / math.sqrt(d)
        answers.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v)
    x = x + plain_linear(state, f"{name}.attn.proj", torch.cat(answers, -1))
    hidden = plain_linear(state, f"{name}.mlp.fc1", plain_norm(state, f"{name}.norm2", x))
    return x + plain_linear(state, f"{name}.mlp.fc2", F.gelu(hidden))


def plain_skip(state, name, x, old):
    return plain_linear(state, f"{name}.skip_linear", torch.cat([x, old], -1))


def plain_tokens(config, state, zt, t, context):
    """(time, text, image) tokens without positions."""
    P, half = config.patch_size, config.width // 2
    matrix, bias = state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"]
    image = F.unfold(zt, P, stride=P).mT @ matrix.T + bias
    angles = torch.tensor([[step / 10000 ** (k / half) for k in range(half)]
                           for step in t.tolist()])
    time = torch.cat([angles.cos(), angles.sin()], 1)[:, None]
    return time, plain_linear(state, "context_embed", context), image


def plain_head(config, state, image):
    """Image tokens after the last block -> predicted noise; in a patch the channel is fastest."""
    P, C, side = config.patch_size, config.channels, config.image_size // config.patch_size
    numbers = plain_linear(state, "decoder_pred", plain_norm(state, "norm", image))
    picture = torch.empty(len(image), C, config.image_size, config.image_size)
    for row in range(config.image_size):
        for column in range(config.image_size):
            first = (row % P * P + column % P) * C
            picture[:, :, row, column] = numbers[:, row // P * side + column // P, first:first + C]
    return F.conv2d(picture, state["final_layer.weight"], state["final_layer.bias"], padding=1)


def block_names(depth):
    half = depth // 2
    return ([f"in_blocks.{i}" for i in range(half)] + ["mid_block"]
            + [f"out_blocks.{i}" for i in range(half)])


def plain_uvit(config, state, zt, t, context):
    """A stream x of [image][time], a stream y of text; any window and conditioning."""
    early = config.fusion == "early"
    depth = config.depth if early else config.n_image + config.n_fuse + config.n_image
    first, last = (0, depth - 1) if early else (
        config.n_image + config.fuse_shift,
        config.n_image + config.fuse_shift + config.n_fuse - 1)
    time, text, image = plain_tokens(config, state, zt, t, context)
    L, N = config.context_len, image.shape[1]
    x = torch.cat([image + state["pos_embed"][:, 1 + L:], time + state["pos_embed"][:, :1]], 1)
    y = text + state["pos_embed"][:, 1:1 + L]
    for i in range(0 if early else config.n_text):
        y = plain_block(state, f"text_blocks.{i}", y, config.heads)     # text sees only text
    kept = []
    for i, name in enumerate(block_names(depth)):
        sees_text = first <= i <= last
        joins = sees_text and config.conditioning == "concat"
        if name.startswith("out"):
            old_x, old_y = kept[depth - 1 - i]
            x = plain_skip(state, name, x, old_x)
            if joins and old_y is not None:                             # where both ends have text
                y = plain_skip(state, name, y, old_y)
        if joins:
            both = plain_block(state, name, torch.cat([x, y], 1), config.heads)
            x, y = both[:, :N + 1], both[:, N + 1:]
        else:
            x = plain_block(state, name, x, config.heads, heard=y if sees_text else None)
        kept.append((x, y if joins else None))
    return plain_head(config, state, x[:, :N])


# ---- the four models ----

@pytest.mark.parametrize("changes", [
    *[dict(fuse_shift=shift) for shift in range(-2, 3)], dict(n_image=0), dict(n_text=0),
    dict(n_fuse=1), dict(fusion="early"), dict(fusion="early", depth=1)], ids=str)
@pytest.mark.parametrize("conditioning", HOW)
def test_all_windows_equal_the_plain_computation(conditioning, changes):
    config = tiny(conditioning=conditioning, **{"fusion": "intermediate"} | changes)
    net = randomise(UViT(config))
    batch = inputs(config)
    assert error(net(*batch), plain_uvit(config, net.state_dict(), *batch)) < 1e-5


@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_gradients_reach_every_parameter_and_position(fusion, conditioning):
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    net(*inputs(config)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (net.pos_embed.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_text_encoded_once_serves_every_step_and_is_never_updated(fusion, conditioning):
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    zt, t, context = inputs(config)
    text = net.encode_text(context)
    assert text.shape == ((2, 6, 24) if conditioning == "concat" else
                          (2, len(config.window), 6, 48))
    before = text.clone()
    for step in (t, t + 1):
        assert error(net.denoise(zt, step, text), net(zt, step, context)) == 0
    assert torch.equal(text, before)


@pytest.mark.parametrize("conditioning", HOW)
def test_a_window_over_the_whole_stack_without_text_blocks_is_early_fusion(conditioning):
    early = randomise(UViT(tiny("early", conditioning, depth=5)))
    whole = UViT(tiny("intermediate", conditioning, n_image=0, n_fuse=5, n_text=0))
    whole.load_state_dict(early.state_dict())
    batch = inputs(early.config)
    assert error(whole(*batch), early(*batch)) == 0


def test_the_two_attention_computations_agree():
    """CPUs take the plain one, GPUs torch's fused one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(2, 3, S, 8, generator=generator) for S in (5, 9, 9)]
    assert error(model.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-6


def test_the_window_is_centred_on_the_middle_and_moves_with_fuse_shift():
    assert list(UViTConfig("intermediate", "concat").window) == [4, 5, 6]           # of 11 blocks
    assert list(UViTConfig("intermediate", "concat", fuse_shift=-4).window) == [0, 1, 2]
    assert list(UViTConfig("intermediate", "concat", fuse_shift=3).window) == [7, 8, 9]
    early = UViTConfig("early", "concat", fuse_shift=2)
    assert list(early.window) == list(range(13)) and (early.depth, early.n_text) == (13, 0)
    odd = UViTConfig("intermediate", "cross_attention", n_image=3, n_fuse=5, n_text=1)
    assert (odd.depth, odd.n_text, list(odd.window)) == (11, 1, [3, 4, 5, 6, 7])


# ---- names, sizes, costs ----

@pytest.mark.parametrize("depth,tensors,parameters", [
    (13, 166, 44_692_644), (17, 214, 58_345_636)], ids=["S/2", "deep"])
def test_parameters_have_the_names_and_shapes_of_the_official_release(depth, tensors, parameters):
    with torch.device("meta"):
        net = UViT(UViTConfig("early", "concat", depth=depth))
    block = {"norm1.weight": (512,), "norm1.bias": (512,),
             "norm2.weight": (512,), "norm2.bias": (512,), "attn.qkv.weight": (1536, 512),
             "attn.proj.weight": (512, 512), "attn.proj.bias": (512,),
             "mlp.fc1.weight": (2048, 512), "mlp.fc1.bias": (2048,),
             "mlp.fc2.weight": (512, 2048), "mlp.fc2.bias": (512,)}
    expected = {"pos_embed": (1, 334, 512),
                "patch_embed.proj.weight": (512, 4, 2, 2), "patch_embed.proj.bias": (512,),
                "context_embed.weight": (512, 768), "context_embed.bias": (512,),
                "norm.weight": (512,), "norm.bias": (512,),
                "decoder_pred.weight": (16, 512), "decoder_pred.bias": (16,),
                "final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)}
    for name in block_names(depth):
        expected |= {f"{name}.{key}": shape for key, shape in block.items()}
        if name.startswith("out"):
            expected |= {f"{name}.skip_linear.weight": (512, 1024),
                         f"{name}.skip_linear.bias": (512,)}
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == expected
    assert len(expected) == tensors == len(list(net.parameters()))
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    with torch.device("meta"):
        ours = UViT(UViTConfig("intermediate", "cross_attention", n_image=depth // 2 - 1))
    added = [key.split(".")[0] for key in ours.state_dict() if key not in expected]
    assert added == ["text_blocks"] * 4 * len(block)


def test_multiply_adds_are_those_of_the_count_by_hand():
    """The first of each pair is what the sampler pays once per prompt."""
    image, text, d = 257, 77, 512
    embedding = text * 768 * d
    text_blocks = 4 * (12 * text * d ** 2 + 2 * text ** 2 * d)

    def by_hand(blocks, window, cross):
        plain = 12 * image * d ** 2 + 2 * image ** 2 * d
        joint = 12 * (image + text) * d ** 2 + 2 * (image + text) ** 2 * d
        if cross:
            joint = (10 * image * d ** 2 + 2 * (image + text) * d ** 2
                     + 2 * image * (image + text) * d)
        skips = blocks // 2 * image + (0 if cross else window // 2 * text)
        return ((blocks - window) * plain + window * joint + skips * 2 * d * d
                + 256 * (16 * d * 2) + 32 * 32 * 4 * 4 * 9)
    total = {}
    for fusion, conditioning in FOUR:
        cross, early = conditioning == "cross_attention", fusion == "early"
        blocks, window, before = (13, 13, 0) if early else (11, 3, text_blocks)
        once, each = count_multiply_adds(UViTConfig(fusion, conditioning))
        assert once == embedding + before + cross * window * 2 * text * d ** 2
        total[fusion, conditioning] = once + each
        assert once + each == embedding + before + by_hand(blocks, window, cross)
    assert total["early", "concat"] == pytest.approx(16.2291e9, abs=5e4)
    assert total["early", "cross_attention"] == pytest.approx(13.0204e9, abs=5e4)
    assert total["intermediate", "concat"] <= 0.80 * total["early", "concat"]


# ---- conventions ----

def test_time_embeddings_are_those_of_the_official_code():
    one, thousand = timestep_embedding(torch.tensor([1, 1000]), 512)
    golden = {0: 0.5403023, 1: 0.5696951, 256: 0.8414710, 257: 0.8218563, 511: 1.0366e-4}
    assert {i: one[i].item() for i in golden} == pytest.approx(golden, abs=1e-7)
    golden = {0: 0.5623791, 255: 0.9946318, 256: 0.8268796, 511: 0.1034778}
    assert {i: thousand[i].item() for i in golden} == pytest.approx(golden, abs=2e-6)
    assert thousand.norm().item() == pytest.approx(16, abs=1e-5)
    assert timestep_embedding(torch.tensor([980.02]), 512)[0, 0].item() == pytest.approx(
        math.cos(980.02), abs=1e-4)


def test_the_noise_schedule_is_stable_diffusions_and_keeps_the_variance():
    alpha_bar = noise_schedule()
    assert alpha_bar.shape == (1001,) and alpha_bar.dtype == torch.float64 and alpha_bar[0] == 1
    golden = {1: 0.99915000, 2: 0.99829603, 50: 0.95262555, 100: 0.89546277, 250: 0.67543241,
              500: 0.27766965, 750: 0.05662349, 900: 0.01429868, 1000: 0.00466010}
    assert {t: alpha_bar[t].item() for t in golden} == pytest.approx(golden, abs=5e-9)
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert beta[[0, 499, 999]].tolist() == pytest.approx([0.00085, 0.00480379, 0.012], abs=5e-9)

    z0, eps = torch.full((3, 1, 1, 1), 2.0), torch.ones(3, 1, 1, 1)
    zt = add_noise(z0, eps, torch.tensor([0, 500, 1000]), alpha_bar).flatten().tolist()
    assert zt == pytest.approx([2, 2 * 0.27766965 ** 0.5 + 0.72233035 ** 0.5,
                                2 * 0.0046601 ** 0.5 + 0.9953399 ** 0.5])


# ---- initialisation ----

@pytest.mark.parametrize("arguments,std", [([], 0.02), ([0.06], 0.06)], ids=["official", "wider"])
def test_initialisation_is_that_of_the_official_code_but_for_the_width_of_the_linear_weights(
        arguments, std):
    torch.manual_seed(0)
    net = UViT(UViTConfig("intermediate", "concat", n_image=1, n_text=1, width=128, heads=4,
                          image_size=16), *arguments)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
            assert module.weight.mean().abs() < 0.1 * std, name
            assert (module.bias is None) == name.endswith("attn.qkv")
            assert module.bias is None or (module.bias == 0).all(), name
        if isinstance(module, nn.LayerNorm):
            assert ((module.weight == 1).all() and (module.bias == 0).all()
                    and module.eps == 1e-5), name
        if isinstance(module, nn.Conv2d):                 # torch's: uniform, to 1 / sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            for parameter in (module.weight, module.bias):
                assert 0.5 * bound < parameter.abs().max() <= bound, name
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("width", [8, 24, 36])
def test_positions_that_start_as_waves_differ_from_each_other_and_are_learned(width):
    config = tiny("intermediate", "concat", image_size=24, width=width, heads=1)   # 8 x 8 patches
    net, half = UViT(config), width // 2
    before = net.pos_embed.detach().clone()
    net.init_sincos_positions()
    time, text, image = net.positions()
    assert torch.equal(net.pos_embed[:, :7], before[:, :7])
    assert time.shape[1] == 1 and text.shape[1] == 6 and image.shape == (1, 64, width)
    assert (torch.cdist(image[0], image[0]) + 9 * torch.eye(64)).min() > 0.1
    assert torch.allclose(image.square().sum(-1), torch.tensor(width / 2))    # sin and cos in pairs
    grid = image[0].unflatten(0, (8, 8))            # half of it says the row, half the column
    assert torch.equal(grid[:, :1, :half].expand(8, 8, half), grid[:, :, :half])
    assert torch.equal(grid[:1, :, half:].expand(8, 8, half), grid[:, :, half:])
    started = net.pos_embed.detach().clone()
    net(*inputs(config)).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert net.pos_embed.is_leaf and ((net.pos_embed - started).abs().amax(-1) > 0).all()


# ---- what is refused ----

@pytest.mark.parametrize("message,changes", [
    ("--fusion=late: expected early or intermediate.", dict(fusion="late")),
    ("--conditioning=adaln: expected concat or cross_attention.", dict(conditioning="adaln")),
    ("--heads=0: expected a whole number from 1 to 16,384.", dict(heads=0)),
    ("12 blocks: expected an odd number", dict(fusion="early", depth=12)),
    ("12 blocks: expected an odd number", dict(n_fuse=4)),
    ("fuse_shift=5: expected", dict(fuse_shift=5)),
    ("fuse_shift=-5: expected ±4 at most", dict(fuse_shift=-5)),
    ("fuse_shift=1: expected ±0 at most", dict(n_image=0, fuse_shift=1)),
    ("patch_size=2: expected a divisor of the latent's side, 31.", dict(image_size=31)),
    ("width=500: expected a multiple of 4 and of heads=8.", dict(width=500)),
    ("width=33: expected a multiple of 4 and of heads=3.", dict(width=33, heads=3))], ids=str)
def test_an_impossible_configuration_is_refused_by_the_name_of_its_field(message, changes):
    with pytest.raises(UserError) as caught:
        UViTConfig(**dict(fusion="intermediate", conditioning="concat") | changes)
    assert str(caught.value).startswith(message)


def test_constants_that_a_fusion_does_not_use_cannot_make_it_impossible():
    assert UViTConfig("early", "concat", n_fuse=4, fuse_shift=9).depth == 13
    assert UViTConfig("intermediate", "concat", depth=12).depth == 11


# ---- precision and device ----

@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_in_bfloat16_norms_and_residuals_stay_float32_and_the_output_close(fusion, conditioning):
    """As `autocast` promises: each block adds to the residual, and bfloat16 has three digits."""
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config)).requires_grad_(False)
    batch = inputs(config, B=5)
    exact, types = net(*batch), {}
    for name, module in net.named_modules():
        if isinstance(module, (model.Block, nn.LayerNorm)):
            module.register_forward_hook(lambda module, arguments, output, name=name:
                                         types.update({name: (arguments[0].dtype, output.dtype)}))
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        out = net(*batch).float()
    assert 1e-4 < ((out - exact).norm() / exact.norm()).item() < 3e-2
    assert {name for name, found in types.items() if found != (torch.float32,) * 2} == set()


def test_precision_is_bfloat16_only_where_the_device_computes_in_it(monkeypatch):
    for device, native, capability, expected in [
            ("cpu", True, None, torch.bfloat16), ("cpu", False, None, torch.float32),
            ("cuda", False, (9, 0), torch.bfloat16), ("cuda", False, (8, 0), torch.bfloat16),
            ("cuda", True, (7, 5), torch.float16), ("mps", True, None, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert choose_precision(torch.device(device)) == expected, device
        assert choose_precision(torch.device(device), "float16") == torch.float16


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for cuda, mps, expected in [(False, False, "cpu"), (False, True, "mps"),
                                (True, False, "cuda:1"), (True, True, "cuda:1")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert choose_device() == torch.device(expected)


# ---- the official weights ----

@pytest.mark.parametrize("depth", [13, 17], ids=["S/2", "deep"])
def test_the_architecture_of_the_official_files_is_read_off_their_shapes(depth):
    config = UViTConfig("early", "concat", depth=depth)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UViT(config).state_dict().items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()},
               "small.pth")                                             # a few kB
    checkpoint = read_checkpoint("small.pth")
    assert checkpoint["uvit"] == config
    assert checkpoint["latent_scale"] == 0.2301 and checkpoint["null_context"] is None
    assert checkpoint["meta"]["image_size"] == 256
    assert [checkpoint["meta"][part]["kind"] for part in ("autoencoder", "text_tower")] == [
        "kl", "clip"]


@pytest.mark.parametrize("changes", [
    {}, dict(depth=1, width=64, heads=1), dict(patch_size=4, channels=3, image_size=20)], ids=str)
def test_an_official_file_loads_strictly_and_computes_what_it_should(changes):
    sizes = dict(depth=5, image_size=8, width=128, heads=2, context_len=77, context_dim=24)
    net = randomise(UViT(UViTConfig("early", "concat", **sizes | changes)))
    state = dict(net.state_dict())
    torch.save(state, "official.pth")
    checkpoint = read_checkpoint("official.pth")
    assert checkpoint["uvit"] == net.config
    loaded = load_frozen(UViT(checkpoint["uvit"]), checkpoint["ema"])
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    batch = inputs(net.config)
    assert error(loaded(*batch), plain_uvit(net.config, state, *batch)) < 2e-5

    for wrong, message in [
            ({key: state[key] for key in state if key != "norm.bias"}, "Missing.*norm.bias"),
            (state | {"time_embed.0.weight": torch.zeros(2)}, "Unexpected.*time_embed.0.weight"),
            (state | {"decoder_pred.bias": torch.zeros(7)}, r"decoder_pred.bias: .*\[7\]")]:
        torch.save(wrong, "official.pth")
        wrong = read_checkpoint("official.pth")
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            load_frozen(UViT(wrong["uvit"]), wrong["ema"])
