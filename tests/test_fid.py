"""Protects the FID: Inception against one written in modules, the distance against closed forms."""
import re

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies

import evaluate
from evaluate import frechet_distance, load_inception
from model import UserError


# ---- an Inception written out from its description, with all sizes ----

class Conv(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding="same", pool=None):
        super().__init__()
        self.pool = pool or nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(self.pool(x))).relu()


class Branches(nn.ModuleDict):
    def __init__(self, **branches):
        super().__init__(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], dim=1)


def chain(*layers):
    return nn.Sequential(*layers)


def mixed_5(inputs, pooled, average):
    return Branches(
        branch1x1=Conv(inputs, 64, 1),
        branch5x5=chain(Conv(inputs, 48, 1), Conv(48, 64, 5)),
        branch3x3dbl=chain(Conv(inputs, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)),
        branch_pool=Conv(inputs, pooled, 1, pool=average))


def mixed_6(c, average):
    return Branches(
        branch1x1=Conv(768, 192, 1),
        branch7x7=chain(Conv(768, c, 1), Conv(c, c, (1, 7)), Conv(c, 192, (7, 1))),
        branch7x7dbl=chain(Conv(768, c, 1), Conv(c, c, (7, 1)), Conv(c, c, (1, 7)),
                           Conv(c, c, (7, 1)), Conv(c, 192, (1, 7))),
        branch_pool=Conv(768, 192, 1, pool=average))


def mixed_7(inputs, pool):
    def pair():
        return Branches(a=Conv(384, 384, (1, 3)), b=Conv(384, 384, (3, 1)))
    return Branches(
        branch1x1=Conv(inputs, 320, 1),
        branch3x3=chain(Conv(inputs, 384, 1), pair()),
        branch3x3dbl=chain(Conv(inputs, 448, 1), Conv(448, 384, 3), pair()),
        branch_pool=Conv(inputs, 192, 1, pool=pool))


def reference(average=None, last_pool=None):
    """From (B, 3, 299, 299) in [-1, 1] to (B, 2048)."""
    average = average or nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    halve = nn.MaxPool2d(3, stride=2)
    layers = {
        "Conv2d_1a_3x3": Conv(3, 32, 3, 2, "valid"), "Conv2d_2a_3x3": Conv(32, 32, 3, 1, "valid"),
        "Conv2d_2b_3x3": Conv(32, 64, 3), "pool_2": halve, "Conv2d_3b_1x1": Conv(64, 80, 1),
        "Conv2d_4a_3x3": Conv(80, 192, 3, 1, "valid"), "pool_4": halve,
        "Mixed_5b": mixed_5(192, 32, average), "Mixed_5c": mixed_5(256, 64, average),
        "Mixed_5d": mixed_5(288, 64, average),
        "Mixed_6a": Branches(
            branch3x3=Conv(288, 384, 3, 2, "valid"),
            branch3x3dbl=chain(Conv(288, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, 2, "valid")),
            branch_pool=halve),
        "Mixed_6b": mixed_6(128, average), "Mixed_6c": mixed_6(160, average),
        "Mixed_6d": mixed_6(160, average), "Mixed_6e": mixed_6(192, average),
        "Mixed_7a": Branches(
            branch3x3=chain(Conv(768, 192, 1), Conv(192, 320, 3, 2, "valid")),
            branch7x7x3=chain(Conv(768, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                              Conv(192, 192, 3, 2, "valid")),
            branch_pool=halve),
        "Mixed_7b": mixed_7(1280, average),
        "Mixed_7c": mixed_7(2048, last_pool or nn.MaxPool2d(3, 1, 1)),
        "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net.eval()


def file_name(name: str) -> str:
    """branch5x5.0.conv -> branch5x5_1.conv, branch3x3.1.a.conv -> branch3x3_2a.conv."""
    return re.sub(r"(branch\w+)\.(\d)(?:\.([ab]))?\.",
                  lambda found: f"{found[1]}_{int(found[2]) + 1}{found[3] or ''}.", name)


def random_weights() -> dict[str, torch.Tensor]:
    """A file in pytorch-fid's layout, 566 entries, everything random: running statistics, too."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)
    state = {"fc.weight": normal(1008, 2048), "fc.bias": normal(1008)}
    for name, tensor in reference().state_dict().items():
        if name.endswith("conv.weight"):
            tensor = normal(*tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            tensor = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif not name.endswith("tracked"):
            tensor = 0.2 * normal(*tensor.shape) + name.endswith("weight")
        state[file_name(name)] = tensor
    return state


@torch.no_grad()
def expected_features(images, **changes):
    net, state = reference(**changes), random_weights()
    net.load_state_dict({name: state[file_name(name)] for name in net.state_dict()})
    return net(F.interpolate(images / 255, size=(299, 299), mode="bilinear",
                             align_corners=False, antialias=False) * 2 - 1)


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


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Inception ----

def test_the_weight_file_has_566_entries_and_23850960_parameters():
    state = random_weights()
    parameters = [tensor for name, tensor in state.items()
                  if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert len(state) == 566
    assert sum(tensor.numel() for tensor in parameters) == 23_850_960
    assert {"Conv2d_2b_3x3.bn.running_var", "Mixed_5b.branch5x5_2.conv.weight",
            "Mixed_7c.branch3x3dbl_3b.conv.weight", "Mixed_6a.branch3x3.bn.bias"} <= set(state)


def test_features_equal_those_of_the_network_in_modules(weight_file, images):
    features = load_inception(weight_file)(images)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert not features.requires_grad
    assert relative_error(features, expected_features(images)) < 1e-5


@pytest.mark.parametrize("slip", [{"average": nn.AvgPool2d(3, 1, 1)},       # counts the padding
                                  {"last_pool": nn.AvgPool2d(3, 1, 1, count_include_pad=False)}])
def test_the_pools_of_torchvision_would_give_other_features(weight_file, images, slip):
    features = load_inception(weight_file)(images[:1])
    assert relative_error(features, expected_features(images[:1], **slip)) > 1e-3


def test_neither_batch_size_nor_autocast_matters(weight_file, images):
    net = load_inception(weight_file)
    plain = net(images[:1])
    assert relative_error(torch.cat([plain, net(images[1:])]), net(images)) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(images[:1]).equal(plain)


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8),
    torch.zeros(1, 32, 32, 3, dtype=torch.uint8)], ids=["float", "one picture", "channels last"])
def test_anything_but_uint8_pictures_is_refused(wrong):
    with pytest.raises(TypeError, match=r"uint8 \(B, 3, H, W\)"):
        evaluate.Inception({})(wrong)


def test_counters_and_classifier_may_be_absent_but_nothing_else(tmp_path, weight_file):
    state = {name: tensor for name, tensor in random_weights().items()
             if "tracked" not in name and name[:3] != "fc."}
    assert len(state) == 470
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "lean.pth")
    lean, full = load_inception(tmp_path / "lean.pth"), load_inception(weight_file)
    for name, tensor in full.state_dict().items():
        assert lean.get_buffer(name).equal(tensor.half().float())
    name = "Mixed_6a.branch3x3.bn.running_var"
    for wrong in ({name: None}, {name: state[name][1:]}, {"AuxLogits.fc.bias": torch.zeros(1)}):
        torch.save(state | wrong, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match="wrong.pth is damaged, or not pytorch-fid's weights"):
            load_inception(tmp_path / "wrong.pth")


def test_features_are_computed_without_tensorfloat_32(weight_file, monkeypatch):
    """Whatever training chose before, and whoever calls."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    net, seen = load_inception(weight_file), []
    conv = net.conv
    net.conv = lambda *args, **kwargs: seen.append(matmul.allow_tf32 or cudnn.allow_tf32) or \
        conv(*args, **kwargs)
    torch.set_float32_matmul_precision("high")
    net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen and not any(seen)


# ---- Frechet distance ----

def random_gaussian(D: int, samples: int, seed: int):
    """Mean and covariance of `samples` draws: singular if they are not more than D."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((samples, D)) @ generator.standard_normal((D, D)) / D ** 0.5
    x += generator.standard_normal(D)
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("samples", [20, 1000])
def test_equal_gaussians_are_at_distance_zero_and_a_shift_costs_its_square(samples):
    mu, sigma = random_gaussian(64, samples, seed=0)
    shift = np.linspace(-1, 2, 64)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-9
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(
        (shift ** 2).sum(), rel=1e-9)


def test_commuting_covariances_have_the_closed_form_even_with_zeros():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 64))
    a[:20], b[10:30] = 0, 0
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    Q = np.linalg.qr(generator.standard_normal((64, 64)))[0]
    for basis, accuracy in ((np.eye(64), 1e-12), (Q, 1e-6)):
        found = frechet_distance(np.zeros(64), basis * a @ basis.T,
                                 np.zeros(64), basis * b @ basis.T)
        assert found == pytest.approx(expected, rel=accuracy)


def test_covariances_of_rank_one_have_the_closed_form():
    """The trace of the root of u u^T v v^T is |u . v|."""
    u, v = np.random.default_rng(0).standard_normal((2, 64))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(np.zeros(64), np.outer(u, u), np.zeros(64), np.outer(v, v)) \
        == pytest.approx(expected, rel=1e-7)


def test_the_distance_equals_the_formula_with_scipys_matrix_root():
    (mu1, sigma1), (mu2, sigma2) = (random_gaussian(64, 1000, seed=0),
                                    random_gaussian(64, 500, seed=1))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)


@settings(deadline=None)
@given(D=strategies.integers(1, 12), sizes=strategies.tuples(*[strategies.integers(2, 30)] * 2),
       seed=strategies.integers(0, 2 ** 32 - 1), scale=strategies.floats(1e-6, 1e6))
def test_the_distance_is_symmetric_and_never_negative(D, sizes, seed, scale):
    generator = np.random.default_rng(seed)
    one, other = [scale * generator.standard_normal((n, D)) for n in sizes]
    gaussians = [(x.mean(0), np.cov(x, rowvar=False).reshape(D, D)) for x in (one, other)]
    distance = frechet_distance(*gaussians[0], *gaussians[1])
    assert isinstance(distance, float) and distance >= 0
    assert frechet_distance(*gaussians[1], *gaussians[0]) == pytest.approx(
        distance, rel=1e-6, abs=1e-9 * scale ** 2)
    assert f"{frechet_distance(*gaussians[0], *gaussians[0]) / scale ** 2:.2f}" == "0.00"


def test_a_distance_that_is_no_number_stays_one():
    mu, sigma = random_gaussian(4, 20, seed=0)
    assert np.isnan(frechet_distance(mu + np.nan, sigma, mu, sigma))
