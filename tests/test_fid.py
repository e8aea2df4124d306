"""Protects the FID: Inception against plain functional calls, the distance against closed forms."""
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import evaluate
from evaluate import Inception, Statistics, exact_float32, frechet_distance, load_inception
from model import UserError


# ---- an Inception written out from its description, on a flat dict of weights ----

STEM = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3), "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3)}


def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """The 94 convolutions of the weight file, (out, in, height, width), spelt out one by one."""
    shapes = dict(STEM)
    for block, inputs, pool in (
            ("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        shapes |= {f"{block}.branch1x1": (64, inputs, 1, 1),
                   f"{block}.branch5x5_1": (48, inputs, 1, 1),
                   f"{block}.branch5x5_2": (64, 48, 5, 5),
                   f"{block}.branch3x3dbl_1": (64, inputs, 1, 1),
                   f"{block}.branch3x3dbl_2": (96, 64, 3, 3),
                   f"{block}.branch3x3dbl_3": (96, 96, 3, 3),
                   f"{block}.branch_pool": (pool, inputs, 1, 1)}
    shapes |= {"Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1),
               "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3), "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3)}
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        shapes |= {f"{block}.branch1x1": (192, 768, 1, 1),
                   f"{block}.branch7x7_1": (c, 768, 1, 1), f"{block}.branch7x7_2": (c, c, 1, 7),
                   f"{block}.branch7x7_3": (192, c, 7, 1),
                   f"{block}.branch7x7dbl_1": (c, 768, 1, 1),
                   f"{block}.branch7x7dbl_2": (c, c, 7, 1),
                   f"{block}.branch7x7dbl_3": (c, c, 1, 7),
                   f"{block}.branch7x7dbl_4": (c, c, 7, 1),
                   f"{block}.branch7x7dbl_5": (192, c, 1, 7),
                   f"{block}.branch_pool": (192, 768, 1, 1)}
    shapes |= {"Mixed_7a.branch3x3_1": (192, 768, 1, 1), "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
               "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1),
               "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
               "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1),
               "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3)}
    for block, inputs in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        shapes |= {f"{block}.branch1x1": (320, inputs, 1, 1),
                   f"{block}.branch3x3_1": (384, inputs, 1, 1),
                   f"{block}.branch3x3_2a": (384, 384, 1, 3),
                   f"{block}.branch3x3_2b": (384, 384, 3, 1),
                   f"{block}.branch3x3dbl_1": (448, inputs, 1, 1),
                   f"{block}.branch3x3dbl_2": (384, 448, 3, 3),
                   f"{block}.branch3x3dbl_3a": (384, 384, 1, 3),
                   f"{block}.branch3x3dbl_3b": (384, 384, 3, 1),
                   f"{block}.branch_pool": (192, inputs, 1, 1)}
    return shapes


def random_weights() -> dict[str, torch.Tensor]:
    """A file in pytorch-fid's layout, 566 entries, everything random: running statistics, too."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    state = {"fc.weight": normal(1008, 2048), "fc.bias": normal(1008)}
    for name, (outputs, *rest) in kernel_shapes().items():
        state[f"{name}.conv.weight"] = normal(outputs, *rest) * (2 / np.prod(rest)) ** 0.5
        state[f"{name}.bn.weight"] = 1 + 0.2 * normal(outputs)
        state[f"{name}.bn.bias"] = 0.2 * normal(outputs)
        state[f"{name}.bn.running_mean"] = 0.2 * normal(outputs)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    return state


def activations(state: dict, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every named layer and the features, by plain functional calls."""
    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = [state[f"{name}.bn.{part}"] for part in
                                   ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-3).relu()

    def average(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    found = {}
    x = F.interpolate(images / 255.0, size=(299, 299), mode="bilinear", align_corners=False,
                      antialias=False) * 2 - 1
    for name, stride, padding in (
            ("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)):
        found[name] = x = conv(x, name, stride, padding)
    x = F.max_pool2d(x, 3, 2)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        found[name] = x = conv(x, name)
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", 1, 2)
        double = conv(conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1),
                      f"{m}.branch3x3dbl_3", 1, 1)
        found[m] = x = torch.cat([conv(x, f"{m}.branch1x1"), five, double,
                                  conv(average(x), f"{m}.branch_pool")], 1)
    m = "Mixed_6a"
    double = conv(conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1),
                  f"{m}.branch3x3dbl_3", 2)
    found[m] = x = torch.cat([conv(x, f"{m}.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)
    wide, tall = (0, 3), (3, 0)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = conv(conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", 1, wide),
                     f"{m}.branch7x7_3", 1, tall)
        double = conv(x, f"{m}.branch7x7dbl_1")
        for i, padding in ((2, tall), (3, wide), (4, tall), (5, wide)):
            double = conv(double, f"{m}.branch7x7dbl_{i}", 1, padding)
        found[m] = x = torch.cat([conv(x, f"{m}.branch1x1"), seven, double,
                                  conv(average(x), f"{m}.branch_pool")], 1)
    m = "Mixed_7a"
    three = conv(conv(x, f"{m}.branch3x3_1"), f"{m}.branch3x3_2", 2)
    seven = conv(conv(conv(x, f"{m}.branch7x7x3_1"), f"{m}.branch7x7x3_2", 1, wide),
                 f"{m}.branch7x7x3_3", 1, tall)
    found[m] = x = torch.cat([three, conv(seven, f"{m}.branch7x7x3_4", 2),
                              F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b", "Mixed_7c"):
        three = conv(x, f"{m}.branch3x3_1")
        double = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
        pool = average(x) if m == "Mixed_7b" else F.max_pool2d(x, 3, stride=1, padding=1)
        found[m] = x = torch.cat([conv(x, f"{m}.branch1x1"),
                                  conv(three, f"{m}.branch3x3_2a", 1, (0, 1)),
                                  conv(three, f"{m}.branch3x3_2b", 1, (1, 0)),
                                  conv(double, f"{m}.branch3x3dbl_3a", 1, (0, 1)),
                                  conv(double, f"{m}.branch3x3dbl_3b", 1, (1, 0)),
                                  conv(pool, f"{m}.branch_pool")], 1)
    return found | {"features": x.mean((2, 3))}


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def images():
    """Lower and wider than 299 pixels: enlarging and reducing both happen."""
    return torch.randint(0, 256, (2, 3, 40, 400), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(images):
    with torch.no_grad():
        return activations(random_weights(), images[:1])


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Inception ----

def test_the_weight_file_has_566_entries_and_23850960_parameters():
    state = random_weights()
    parameters = [tensor for name, tensor in state.items()
                  if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert len(state) == 566
    assert sum(tensor.numel() for tensor in parameters) == 23_850_960


def test_every_layer_equals_the_functional_computation(weight_file, images, expected):
    net, found = load_inception(weight_file), {}
    for name, layer in net.named_children():
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: found.update({name: output}))
    features = net(images[:1])
    assert features.shape == (1, 2048) and features.dtype == torch.float32
    found["features"] = features
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert relative_error(found[name], expected[name]) < 1e-5, name
    assert not net.training and not features.requires_grad


def test_counting_the_padding_in_the_average_gives_other_features(
        weight_file, images, expected, monkeypatch):
    monkeypatch.setattr(evaluate.AVERAGE, "count_include_pad", True)
    assert relative_error(load_inception(weight_file)(images[:1]), expected["features"]) > 1e-3


def test_an_average_in_place_of_the_maximum_of_mixed_7c_gives_other_features(
        weight_file, images, expected, monkeypatch):
    monkeypatch.setattr(evaluate, "MAXIMUM", evaluate.AVERAGE)
    assert relative_error(load_inception(weight_file)(images[:1]), expected["features"]) > 1e-3


def test_the_usual_epsilon_of_batch_norm_gives_other_features(weight_file, images, expected):
    net = load_inception(weight_file)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5
    assert relative_error(net(images[:1]), expected["features"]) > 1e-3


def test_the_batch_size_does_not_matter(weight_file, images):
    net = load_inception(weight_file)
    assert relative_error(torch.cat([net(images[:1]), net(images[1:])]), net(images)) < 1e-5


def test_autocast_does_not_matter(weight_file, images):
    net = load_inception(weight_file)
    plain = net(images[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(images[:1]).equal(plain)
        assert net.Conv2d_1a_3x3(torch.zeros(1, 3, 9, 9)).dtype == torch.bfloat16       # it was on


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8),
    torch.zeros(1, 32, 32, 3, dtype=torch.uint8)])
def test_anything_but_uint8_pictures_is_refused(wrong):
    with pytest.raises(TypeError, match=r"uint8 \(B, 3, H, W\)"):
        Inception()(wrong)


def test_counters_and_classifier_may_be_absent_but_nothing_else(tmp_path, weight_file):
    state = {name: tensor for name, tensor in random_weights().items()
             if "tracked" not in name and name[:3] != "fc."}
    torch.save(state, tmp_path / "lean.pth")
    assert len(state) == 470
    lean, full = (load_inception(tmp_path / "lean.pth").state_dict(),
                  load_inception(weight_file).state_dict())
    assert all(lean[name].equal(full[name]) for name in state)
    del state["Mixed_6a.branch3x3.bn.running_var"]
    torch.save(state | {"AuxLogits.fc.bias": torch.zeros(1)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match="missing Mixed_6a.branch3x3.bn.running_var; "
                                        "unexpected AuxLogits.fc.bias"):
        load_inception(tmp_path / "torchvision.pth")


def test_a_web_page_in_place_of_the_weights_is_named(tmp_path):
    (tmp_path / "weights.pth").write_text("<!DOCTYPE html><html>Not Found</html>")
    with pytest.raises(UserError, match="looks like HTML"):
        load_inception(tmp_path / "weights.pth")


def test_the_precision_settings_of_the_process_are_left_as_they_were():
    torch.backends.cuda.matmul.allow_tf32, before = True, torch.backends.cuda.matmul.allow_tf32
    try:
        with pytest.raises(ZeroDivisionError), exact_float32("cpu"):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            assert not torch.is_grad_enabled()
            1 / 0
        assert (torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
                and torch.is_grad_enabled())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- mean and covariance ----

@pytest.mark.parametrize("sizes", [[100], [1] * 100, [64, 36], [7, 50, 43]])
def test_streaming_statistics_equal_numpys_in_any_batching(sizes):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(100, 24, generator=generator)
                @ torch.randn(24, 24, generator=generator) + 3)
    statistics = Statistics(24)
    for batch in features.split(sizes):
        statistics.add(batch)
    mean, covariance = statistics.mean_and_covariance()
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False),
                               rtol=1e-10, atol=1e-10)


# ---- Frechet distance ----

def random_gaussian(D: int, samples: int, seed: int):
    """Mean and covariance of `samples` draws: singular if they are not more than D."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((samples, D)) @ generator.standard_normal((D, D)) / D ** 0.5
    x += generator.standard_normal(D)
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("samples", [20, 1000])
def test_the_distance_of_equal_gaussians_is_zero(samples):
    mu, sigma = random_gaussian(64, samples, seed=0)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-9


@pytest.mark.parametrize("samples", [20, 1000])
def test_a_shift_of_the_mean_costs_its_square(samples):
    mu, sigma = random_gaussian(64, samples, seed=0)
    shift = np.linspace(-1, 2, 64)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(
        (shift ** 2).sum(), rel=1e-9)


def test_diagonal_covariances_have_the_closed_form_even_with_zeros():
    a, b = np.random.default_rng(0).random((2, 64))
    a[:20], b[10:30] = 0, 0
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(64), np.diag(a), np.zeros(64), np.diag(b)) \
        == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_the_closed_form():
    generator = np.random.default_rng(0)
    Q = np.linalg.qr(generator.standard_normal((64, 64)))[0]
    a, b = generator.random((2, 64))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(64), Q * a @ Q.T, np.zeros(64), Q * b @ Q.T) \
        == pytest.approx(expected, rel=1e-10)


def test_covariances_of_rank_one_have_the_closed_form():
    """The trace of the root of u u^T v v^T is |u . v|."""
    u, v = np.random.default_rng(0).standard_normal((2, 64))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(np.zeros(64), np.outer(u, u), np.zeros(64), np.outer(v, v)) \
        == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("samples", [(1000, 500), (20, 1000), (20, 30)])
def test_the_distance_is_symmetric_and_not_negative(samples):
    one, other = [random_gaussian(64, n, seed) for seed, n in enumerate(samples)]
    distance = frechet_distance(*one, *other)
    assert isinstance(distance, float) and distance > 0
    assert frechet_distance(*other, *one) == pytest.approx(distance, rel=1e-12)


def test_the_distance_equals_the_formula_with_scipys_matrix_root():
    (mu1, sigma1), (mu2, sigma2) = (random_gaussian(64, 1000, seed=0),
                                    random_gaussian(64, 500, seed=1))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)
