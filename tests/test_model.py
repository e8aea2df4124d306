"""Protects the network: U-ViT, both fusions, the official weight file, and what is refused."""
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import (UserError, UViT, UViTConfig, autocast, choose_device, choose_precision,
                   count_multiply_adds, load_uvit, noise_schedule, read_checkpoint,
                   timestep_embedding)

FOUR = [(fusion, conditioning) for fusion in ("early", "intermediate")
        for conditioning in ("concat", "cross_attention")]


def tiny(fusion, conditioning, **changes) -> UViTConfig:
    """Seven blocks, and no two dimensions alike: C 5, P 3, N 4, L 6, E 10, D 24, 3 heads."""
    sizes = dict(depth=7, n_image=2, n_fuse=3, n_text=2, image_size=6, channels=5, patch_size=3,
                 width=24, heads=3, context_len=6, context_dim=10)
    return UViTConfig(fusion, conditioning, **sizes | changes)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight, bias, norm and position at random: what starts at zero would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            noise = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        elif name != "pos_embed":
            noise = noise / parameter[0].numel() ** 0.5
        parameter.data = noise
    return net


def inputs(config: UViTConfig, B: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    zt = torch.randn(B, config.channels, config.image_size, config.image_size, generator=generator)
    context = torch.randn(B, config.context_len, config.context_dim, generator=generator)
    return zt, torch.tensor([3, 40, 17, 1, 29])[:B], context


def stack(net: UViT) -> list[nn.Module]:
    return [*net.in_blocks, net.mid_block, *net.out_blocks]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ---- the plain computation: FACTS 1 and 1b as formulas over a state dict ----

def plain_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return (centred / ((centred ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()
            * state[f"{name}.weight"] + state[f"{name}.bias"])


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
    return x + plain_linear(state, f"{name}.mlp.fc2",
                            0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def plain_skip(state, name, x, old):
    return plain_linear(state, f"{name}.skip_linear", torch.cat([x, old], -1))


def plain_tokens(config, state, zt, t, context):
    """(time, text, image) tokens without positions."""
    P, side, half = config.patch_size, config.image_size // config.patch_size, config.width // 2
    matrix = state["patch_embed.proj.weight"].flatten(1)
    patches = [zt[:, :, P * r:P * r + P, P * c:P * c + P].flatten(1)
               for r in range(side) for c in range(side)]
    image = torch.stack([patch @ matrix.T + state["patch_embed.proj.bias"] for patch in patches], 1)
    angles = torch.tensor([[step / 10000 ** (k / half) for k in range(half)]
                           for step in t.tolist()])
    return (torch.cat([angles.cos(), angles.sin()], 1)[:, None],
            plain_linear(state, "context_embed", context), image)


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


def block_names(config, depth):
    half = depth // 2
    return ([f"in_blocks.{i}" for i in range(half)] + ["mid_block"]
            + [f"out_blocks.{i}" for i in range(half)])


def plain_official(config, state, zt, t, context):
    """FACTS 1: early fusion by concat; [time][text][image], the official order, everywhere."""
    x = torch.cat(plain_tokens(config, state, zt, t, context), 1) + state["pos_embed"]
    skips = []
    for i, name in enumerate(block_names(config, config.depth)):
        if name.startswith("out"):
            x = plain_skip(state, name, x, skips.pop())
        x = plain_block(state, name, x, config.heads)
        if name.startswith("in"):
            skips.append(x)
    return plain_head(config, state, x[:, 1 + config.context_len:])


def plain_two_streams(config, state, zt, t, context):
    """FACTS 1b: a stream x of [image][time], a stream y of text; any window and conditioning."""
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
    for i, name in enumerate(block_names(config, depth)):
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

@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_the_output_has_the_shape_of_the_latent_and_the_text_matters(fusion, conditioning):
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    zt, t, context = inputs(config, B=3)
    out = net(zt, t, context)
    assert out.shape == zt.shape and out.dtype == torch.float32
    assert (out - net(zt, t, context.flip(0)))[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-2
    assert (out - net(zt, t.flip(0), context))[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-2
    assert error(net.denoise(zt, t, net.encode_text(context)), out) == 0


@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_gradients_reach_every_parameter_and_every_position(fusion, conditioning):
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    net(*inputs(config)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (net.pos_embed.grad.abs().amax(-1) > 0).all()


def test_early_concat_equals_the_plain_computation_in_the_official_order_of_tokens():
    config = tiny("early", "concat")
    net = randomise(UViT(config))
    batch = inputs(config)
    assert error(net(*batch), plain_official(config, net.state_dict(), *batch)) < 1e-5


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_all_windows_equal_the_plain_computation(fusion, conditioning, shift):
    config = tiny(fusion, conditioning, fuse_shift=shift)
    net = randomise(UViT(config))
    batch = inputs(config)
    assert error(net(*batch), plain_two_streams(config, net.state_dict(), *batch)) < 1e-5


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
@pytest.mark.parametrize("changes", [
    dict(n_image=0), dict(n_text=0), dict(n_image=0, n_text=0), dict(n_fuse=1), dict(depth=1)],
    ids=str)
def test_the_smallest_stacks_equal_the_plain_computation(conditioning, changes):
    config = tiny("early" if "depth" in changes else "intermediate", conditioning, **changes)
    net = randomise(UViT(config))
    batch = inputs(config)
    assert error(net(*batch), plain_two_streams(config, net.state_dict(), *batch)) < 1e-5


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_a_window_over_the_whole_stack_without_text_blocks_is_early_fusion(conditioning):
    early = randomise(UViT(tiny("early", conditioning, depth=5)))
    whole = UViT(tiny("intermediate", conditioning, n_image=0, n_fuse=5, n_text=0))
    whole.load_state_dict(early.state_dict())
    batch = inputs(early.config)
    assert error(whole(*batch), early(*batch)) == 0


def test_the_two_ways_of_conditioning_use_the_same_weights_and_give_different_outputs():
    concat = randomise(UViT(tiny("intermediate", "concat")))
    cross = UViT(tiny("intermediate", "cross_attention"))
    cross.load_state_dict(concat.state_dict())
    batch = inputs(concat.config)
    assert error(cross(*batch), concat(*batch)) > 1e-2


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_encoded_text_is_not_changed_by_denoising(conditioning):
    config = tiny("intermediate", conditioning)
    net = randomise(UViT(config))
    zt, t, context = inputs(config)
    text = net.encode_text(context)
    tensors = [text] if conditioning == "concat" else [tensor for pair in text for tensor in pair]
    before = [tensor.clone() for tensor in tensors]
    first = net.denoise(zt, t, text)
    assert error(net.denoise(zt, t, text), first) == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_the_two_attention_computations_agree():
    """CPUs take the plain one, GPUs torch's fused one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(2, 3, S, 8, generator=generator) for S in (5, 9, 9)]
    assert error(model.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-6


# ---- the window ----

def test_the_window_is_centred_on_the_middle_and_moves_with_fuse_shift():
    assert list(UViTConfig("intermediate", "concat").window) == [4, 5, 6]           # of 11 blocks
    assert list(UViTConfig("intermediate", "concat", fuse_shift=-4).window) == [0, 1, 2]
    assert list(UViTConfig("intermediate", "concat", fuse_shift=3).window) == [7, 8, 9]
    early = UViTConfig("early", "concat", fuse_shift=2)
    assert list(early.window) == list(range(13)) and (early.blocks, early.text_blocks) == (13, 0)
    intermediate = UViTConfig("intermediate", "cross_attention", n_image=3, n_fuse=5, n_text=1)
    assert (intermediate.blocks, intermediate.text_blocks, list(intermediate.window)) == (
        11, 1, [3, 4, 5, 6, 7])


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_blocks_see_the_text_inside_the_window_and_nowhere_else(conditioning, shift):
    config = tiny("intermediate", conditioning, fuse_shift=shift)
    net = randomise(UViT(config))
    zt, t, context = inputs(config)
    seen, outputs = [], []

    def record(block, arguments, output):
        x, text = arguments
        seen.append((x.shape[1], text is not None))
        outputs.append(output[:, :5])                                   # time and image tokens
    for block in stack(net):
        block.register_forward_hook(record)
    net.denoise(zt, t, net.encode_text(context))
    inside, outside = ((5 + 6, False) if conditioning == "concat" else (5, True)), (5, False)
    start = 2 + shift
    assert seen == [outside] * start + [inside] * 3 + [outside] * (4 - start)

    first, outputs[:] = list(outputs), []
    net.denoise(zt, t, net.encode_text(context + 1))
    changed = [error(a, b) > 0 for a, b in zip(first, outputs)]
    assert changed == [False] * start + [True] * (7 - start)


def test_a_long_skip_acts_on_the_tokens_that_both_ends_have():
    block = randomise(model.Block(24, 3, skip=True))
    x, skip = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    both = plain_skip(block.state_dict() | {
        ".skip_linear.weight": block.skip_linear.weight,
        ".skip_linear.bias": block.skip_linear.bias}, "", x, skip)
    assert error(block.merge(x, skip), both) < 1e-5
    assert error(block.merge(x[:, :5], skip), both[:, :5]) < 1e-5       # the text has left
    assert error(block.merge(x, skip[:, :5]),                           # it has come
                 torch.cat([both[:, :5], x[:, 5:]], 1)) < 1e-5


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
    for name in block_names(net.config, depth):
        expected |= {f"{name}.{key}": shape for key, shape in block.items()}
        if name.startswith("out"):
            expected |= {f"{name}.skip_linear.weight": (512, 1024),
                         f"{name}.skip_linear.bias": (512,)}
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == expected
    assert (len(expected) == tensors
            and sum(math.prod(shape) for shape in expected.values()) == parameters)
    assert {name for name, _ in net.named_parameters()} == set(expected)


def test_text_blocks_are_all_that_intermediate_fusion_adds_to_the_official_names():
    with torch.device("meta"):
        early = UViT(UViTConfig("early", "concat", depth=11)).state_dict()
        ours = UViT(UViTConfig("intermediate", "cross_attention")).state_dict()
    added = set(ours) - set(early)
    assert set(early) <= set(ours) and {name.split(".")[0] for name in added} == {"text_blocks"}
    assert sum(ours[name].numel() for name in added) == 4 * 3_150_848


@functools.cache
def counted(fusion, conditioning):
    return count_multiply_adds(UViTConfig(fusion, conditioning))


def test_multiply_adds_are_those_of_the_count_by_hand():
    def by_hand(blocks, skips, n_text, window, cross):
        image, text, d = 257, 77, 512
        plain = 12 * image * d ** 2 + 2 * image ** 2 * d
        joint = 12 * (image + text) * d ** 2 + 2 * (image + text) ** 2 * d
        if cross:
            joint = (10 * image * d ** 2 + 2 * (image + text) * d ** 2
                     + 2 * image * (image + text) * d)
        text_side = 768 * d * text + n_text * (12 * text * d ** 2 + 2 * text ** 2 * d)
        skipped = skips * image * 2 * d * d + (0 if cross else (window // 2) * text * 2 * d * d)
        return (text_side + (blocks - window) * plain + window * joint + skipped
                + 256 * (16 * d * 2) + 32 * 32 * 4 * 4 * 9)

    total = {key: sum(counted(*key)) for key in FOUR}
    assert total["early", "concat"] == by_hand(13, 6, 0, 13, False) \
        == pytest.approx(16.2291e9, abs=5e4)
    assert total["early", "cross_attention"] == by_hand(13, 6, 0, 13, True) \
        == pytest.approx(13.0204e9, abs=5e4)
    assert total["intermediate", "concat"] == by_hand(11, 5, 4, 3, False) \
        <= 0.80 * total["early", "concat"]
    assert total["intermediate", "cross_attention"] == by_hand(11, 5, 4, 3, True)


def test_the_text_half_of_the_count_is_what_the_sampler_pays_once():
    d, L = 512, 77
    embedding, text_block = L * 768 * d, 12 * L * d ** 2 + 2 * L ** 2 * d
    assert counted("early", "concat")[0] == embedding
    assert counted("intermediate", "concat")[0] == embedding + 4 * text_block
    assert counted("early", "cross_attention")[0] == embedding + 13 * 2 * L * d ** 2


# ---- conventions ----

def test_inside_a_patch_the_order_is_row_column_channel():
    config = tiny("early", "concat")                        # C 5, P 3, 2 x 2 patches
    tokens = torch.arange(4 * 45.0).reshape(1, 4, 45)
    picture = UViT(config).unpatchify(tokens)[0]
    for c, row, column in (
            (0, 0, 0), (4, 0, 0), (0, 0, 1), (1, 2, 1), (3, 1, 4), (2, 3, 0), (4, 5, 5)):
        patch = row // 3 * 2 + column // 3
        assert picture[c, row, column] == 45 * patch + (row % 3 * 3 + column % 3) * 5 + c


def test_time_embeddings_are_those_of_the_official_code():
    one, thousand = timestep_embedding(torch.tensor([1, 1000]), 512)
    golden = {0: 0.5403023, 1: 0.5696951, 256: 0.8414710, 257: 0.8218563, 511: 1.0366e-4}
    assert {i: one[i].item() for i in golden} == pytest.approx(golden, abs=1e-7)
    golden = {0: 0.5623791, 255: 0.9946318, 256: 0.8268796, 511: 0.1034778}
    assert {i: thousand[i].item() for i in golden} == pytest.approx(golden, abs=2e-6)
    assert thousand.norm().item() == pytest.approx(16, abs=1e-5)
    assert timestep_embedding(torch.tensor([980.02]), 512)[0, 0].item() == pytest.approx(
        math.cos(980.02), abs=1e-4)


def test_the_noise_schedule_is_stable_diffusions():
    alpha_bar = noise_schedule()
    assert alpha_bar.shape == (1001,) and alpha_bar.dtype == torch.float64 and alpha_bar[0] == 1
    golden = {1: 0.99915000, 2: 0.99829603, 50: 0.95262555, 100: 0.89546277, 250: 0.67543241,
              500: 0.27766965, 750: 0.05662349, 900: 0.01429868, 1000: 0.00466010}
    assert {t: alpha_bar[t].item() for t in golden} == pytest.approx(golden, abs=5e-9)
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert beta[[0, 499, 999]].tolist() == pytest.approx([0.00085, 0.00480379, 0.012], abs=5e-9)


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
            assert module.bias is None or (module.bias == 0).all(), name
        if isinstance(module, nn.LayerNorm):
            assert ((module.weight == 1).all() and (module.bias == 0).all()
                    and module.eps == 1e-5), name
        if isinstance(module, nn.Conv2d):                 # torch's: uniform, to 1 / sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            for parameter in (module.weight, module.bias):
                assert 0.5 * bound < parameter.abs().max() <= bound, name
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert [name for name, module in net.named_modules()
            if isinstance(module, nn.Linear) and module.bias is None] \
        == [name for name, _ in net.named_modules() if name.endswith("attn.qkv")]


def test_positions_that_start_as_waves_differ_from_each_other_and_are_learned():
    net = UViT(tiny("intermediate", "concat", image_size=24))                 # 8 x 8 patches
    before = net.pos_embed.detach().clone()
    net.start_positions_as_waves()
    time, text, image = net.positions()
    assert (torch.equal(net.pos_embed[:, :7], before[:, :7])
            and time.shape[1] == 1 and text.shape[1] == 6)
    apart = torch.cdist(image[0], image[0]) + 9 * torch.eye(64)
    assert image.shape == (1, 64, 24) and apart.min() > 0.1
    assert torch.allclose(image.square().sum(-1), torch.tensor(12.0))         # sin and cos in pairs
    grid = image[0].unflatten(0, (8, 8))
    assert torch.equal(grid[:, :1, :12].expand(8, 8, 12), grid[:, :, :12])    # half says the row,
    assert torch.equal(grid[:1, :, 12:].expand(8, 8, 12), grid[:, :, 12:])    # half the column
    started = net.pos_embed.detach().clone()
    net(*inputs(net.config)).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert net.pos_embed.is_leaf and ((net.pos_embed - started).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("width", [8, 24, 30, 36])
def test_waves_fit_every_width_that_the_configuration_allows(width):
    try:
        config = tiny("early", "concat", width=width, heads=1)
    except UserError as refused:
        assert width % 4 and str(refused).startswith(f"width={width}: ")
        return
    net = UViT(config)
    net.start_positions_as_waves()
    image = net.positions()[2][0]
    assert (torch.cdist(image, image) + 9 * torch.eye(4)).min() > 0.1


# ---- what is refused ----

@pytest.mark.parametrize("field,changes", [
    ("fusion", dict(fusion="late")), ("fusion", dict(fusion="")),
    ("conditioning", dict(conditioning="adaln")),
    ("depth", dict(fusion="early", depth=12)), ("depth", dict(fusion="early", depth=0)),
    ("depth", dict(fusion="early", depth=-1)),
    ("n_fuse", dict(n_fuse=4)), ("n_fuse", dict(n_fuse=0)), ("n_fuse", dict(n_fuse=-1)),
    ("n_image", dict(n_image=-1)), ("n_text", dict(n_text=-1)),
    ("fuse_shift", dict(fuse_shift=5)), ("fuse_shift", dict(fuse_shift=-5)),
    ("fuse_shift", dict(n_image=0, fuse_shift=1)),
    ("image_size", dict(image_size=31)), ("image_size", dict(image_size=0)),
    ("image_size", dict(patch_size=3)), ("patch_size", dict(patch_size=0)),
    ("channels", dict(channels=0)),
    ("width", dict(width=500)), ("width", dict(width=0)), ("width", dict(width=33, heads=3)),
    ("heads", dict(heads=0)), ("heads", dict(heads=-8)),
    ("context_len", dict(context_len=0)), ("context_dim", dict(context_dim=-1))], ids=str)
def test_an_impossible_configuration_is_refused_by_the_name_of_its_field(field, changes):
    with pytest.raises(UserError, match=rf"^{field}=.*: .*expected .*\.$") as caught:
        UViTConfig(**dict(fusion="intermediate", conditioning="concat") | changes)
    value = (changes | {"image_size": changes.get("image_size", 32)})[field]
    assert str(caught.value).startswith(f"{field}={value!r}") and "\n" not in str(caught.value)


def test_constants_that_a_fusion_does_not_use_cannot_make_it_impossible():
    assert UViTConfig("early", "concat", n_fuse=4, fuse_shift=9).blocks == 13
    assert UViTConfig("intermediate", "concat", depth=12).blocks == 11


# ---- precision and device ----

@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_bfloat16_stays_close_to_float32(fusion, conditioning):
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    batch = inputs(config, B=5)
    with torch.no_grad():
        exact = net(*batch)
        with autocast(torch.device("cpu"), torch.bfloat16):
            out = net(*batch).float()
    assert 1e-4 < ((out - exact).norm() / exact.norm()).item() < 3e-2


@pytest.mark.parametrize("fusion,conditioning", FOUR)
def test_in_bfloat16_norms_and_residuals_stay_float32(fusion, conditioning):
    """As `autocast` promises: each block adds to the residual, and bfloat16 has three digits."""
    config = tiny(fusion, conditioning)
    net = randomise(UViT(config))
    types = {}
    for name, module in net.named_modules():
        if isinstance(module, (model.Block, nn.LayerNorm)):
            module.register_forward_hook(lambda module, arguments, output, name=name:
                                         types.update({name: (arguments[0].dtype, output.dtype)}))
    with autocast(torch.device("cpu"), torch.bfloat16):
        net(*inputs(config))
    assert {name: found for name, found in types.items()
            if found != (torch.float32, torch.float32)} == {}


def test_autocast_computes_matrix_products_in_the_precision_that_is_named():
    matrix = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), precision):
            assert (matrix @ matrix).dtype == precision
    with autocast(torch.device("cpu")):
        assert (matrix @ matrix).dtype == choose_precision(torch.device("cpu"))
    assert (matrix @ matrix).dtype == torch.float32


def test_precision_is_bfloat16_only_where_the_device_computes_in_it(monkeypatch):
    for device, native, capability, expected in [
            ("cpu", True, None, torch.bfloat16), ("cpu", False, None, torch.float32),
            ("cuda", False, (9, 0), torch.bfloat16), ("cuda", False, (8, 0), torch.bfloat16),
            ("cuda", True, (7, 5), torch.float16), ("mps", True, None, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert choose_precision(torch.device(device)) == expected, device


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for cuda, mps, expected in [(False, False, "cpu"), (False, True, "mps"),
                                (True, False, "cuda:1"), (True, True, "cuda:1")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert choose_device() == torch.device(expected)


# ---- the official file, and wrong ones ----

def official(tmp_path, **changes):
    sizes = dict(depth=5, image_size=8, width=128, heads=2, context_len=77, context_dim=24)
    net = randomise(UViT(UViTConfig("early", "concat", **sizes | changes)))
    torch.save(net.state_dict(), tmp_path / "mscoco_uvit_tiny.pth")
    return net, tmp_path / "mscoco_uvit_tiny.pth"


@pytest.mark.parametrize("depth", [13, 17], ids=["S/2", "deep"])
def test_the_architecture_of_the_official_files_is_read_off_their_shapes(tmp_path, depth):
    config = UViTConfig("early", "concat", depth=depth)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UViT(config).state_dict().items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()},
               tmp_path / "small.pth")                                  # a few kB
    checkpoint = read_checkpoint(tmp_path / "small.pth")
    assert checkpoint["uvit"] == config
    assert checkpoint["latent_scale"] == 0.2301 and checkpoint["null_context"] is None
    assert checkpoint["meta"]["image_size"] == 256
    assert (checkpoint["meta"]["autoencoder"]["kind"],
            checkpoint["meta"]["text_tower"]["kind"]) == ("kl", "clip")


@pytest.mark.parametrize("changes", [
    {}, dict(depth=1, width=64, heads=1), dict(patch_size=4, channels=3, image_size=20)], ids=str)
def test_an_official_file_loads_strictly_and_computes_what_it_should(tmp_path, changes):
    net, path = official(tmp_path, **changes)
    checkpoint = read_checkpoint(path)
    assert checkpoint["uvit"] == net.config
    loaded = load_uvit(checkpoint, "ema", path)
    assert (not loaded.training
            and not any(parameter.requires_grad for parameter in loaded.parameters()))
    batch = inputs(net.config)
    assert error(loaded(*batch), plain_official(net.config, net.state_dict(), *batch)) < 2e-5


def test_an_official_file_that_lacks_or_adds_a_tensor_is_refused_by_its_name(tmp_path):
    net, path = official(tmp_path)
    state = dict(net.state_dict())
    for wrong, message in [
            ({key: state[key] for key in state if key != "norm.bias"}, "missing norm.bias"),
            (state | {"time_embed.0.weight": torch.zeros(2)}, "unexpected time_embed.0.weight"),
            (state | {"decoder_pred.bias": torch.zeros(7)},
             r"decoder_pred.bias is \(7,\), expected \(16,\)")]:
        torch.save(wrong, path)
        with pytest.raises(UserError, match=f"mscoco_uvit_tiny.pth does not fit UViT: {message}"):
            load_uvit(read_checkpoint(path), "ema", path)


def test_a_checkpoint_of_ours_describes_its_own_architecture(tmp_path):
    config = tiny("intermediate", "cross_attention", fuse_shift=1, n_text=1)
    raw, ema = randomise(UViT(config), 0), randomise(UViT(config), 1)
    torch.save({"format": "midfuse-1", "step": 7, "uvit": dataclasses.asdict(config),
                "model": raw.state_dict(), "ema": ema.state_dict()}, tmp_path / "last.pt")
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    assert checkpoint["uvit"] == config and checkpoint["step"] == 7
    batch = inputs(config)
    for weights, net in (("model", raw), ("ema", ema)):
        assert error(load_uvit(checkpoint, weights, "last.pt")(*batch), net(*batch)) == 0


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_and_a_web_page_are_named_as_such(tmp_path):
    assert "is not there: expected a checkpoint" in refusal(tmp_path / "absent.pt")
    assert "is a folder: expected a checkpoint" in refusal(tmp_path)
    page = tmp_path / "page.pth"
    page.write_text("\n  <!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    assert f"has {page.stat().st_size} bytes and looks like HTML" in refusal(page)


def test_a_file_cut_anywhere_is_called_incomplete(tmp_path):
    path = tmp_path / "whole.pt"
    torch.save({"pos_embed": torch.zeros(1, 80, 64), "context_embed.weight": torch.zeros(64, 100)},
               path)
    data = path.read_bytes()
    for size in (0, 1, 100, 4000, 6000, 10_000, len(data) // 2, len(data) - 1000, len(data) - 1):
        path.write_bytes(data[:size])
        assert f"({size:,} bytes) can't be read as weights" in refusal(path)


@pytest.mark.parametrize("text", ["", "a", "hello", '{"a": 1}', "(", "import torch", "0" * 100])
def test_a_text_file_is_no_weight_file(tmp_path, text):
    (tmp_path / "notes.pt").write_text(text)
    assert "can't be read as weights" in refusal(tmp_path / "notes.pt")


def test_a_pickle_that_would_run_code_is_refused_without_advice_to_trust_it(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    message = refusal(tmp_path / "module.pt")
    assert ("can't be read as weights" in message and "trust" not in message
            and "\x1b" not in message)


@pytest.mark.parametrize("other", [
    {"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, {}, {1: 2},
    {"format": "midfuse-2", "step": 3, "uvit": {}}], ids=["lightning", "empty", "numbers", "newer"])
def test_another_dict_is_refused_with_its_first_keys(tmp_path, other):
    torch.save(other, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    assert "neither a checkpoint of train.py nor an official U-ViT" in message
    assert ", ".join(map(str, other)) in message


@pytest.mark.parametrize("other", [[1, 2], torch.zeros(3), None, 5],
                         ids=["list", "tensor", "None", "number"])
def test_something_that_is_not_a_dict_is_refused(tmp_path, other):
    torch.save(other, tmp_path / "other.pt")
    assert "expected a dict of weights" in refusal(tmp_path / "other.pt")


def test_a_file_that_only_begins_like_the_official_one_is_refused(tmp_path):
    net, path = official(tmp_path)
    torch.save({key: value for key, value in net.state_dict().items()
                if not key.startswith("patch_embed")}, path)
    assert refusal(path)
