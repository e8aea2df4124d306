"""Image <-> latent: the autoencoder that makes pictures small enough for a transformer.

    pictures  --to_unit-->     x in [-1, 1]  --encode-->  moments  --sample_latent-->   latent z
    uint8 (B, H, W, 3)         (B, 3, H, W)               (B, 2C, h, w)                 (B, C, h, w)
    pictures  <--to_pictures--  x about [-1, 1]  <---------------- decode ------------------+

Moments are the mean and log-variance of a normal distribution over latents: z = mean + std * noise.
A cache holds moments: a picture has another latent each time it is seen. The diffusion model works
on latent_scale * z; callers apply that factor.

`KLAutoencoder` is the one of U-ViT and the paper: the "f8" of latent diffusion [LDM], C = 4,
h = H/8, w = W/8, under CompVis's names and with public weights. `LinearAutoencoder`, the stand-in
of the shapes, needs no download: the principal components of 4x4 patches, C = 16, h = H/4, w = W/4.
[LDM] arXiv 2112.10752
"""
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import find_weights, load_frozen, read_weights, reading

CHUNK = 8  # images; each takes 0.3 GB at 256x256


# ---- 1. pixels, moments, latents ----
def to_unit(pictures):
    """uint8 array (B, H, W, 3) -> float32 tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x):
    """Float tensor (B, 3, H, W) in [-1, 1], clamped -> uint8 array (B, H, W, 3), rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sample_latent(moments, noise):
    """Moments (B, 2C, h, w), standard normal noise (B, C, h, w) -> latent (B, C, h, w) [LDM]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise


@torch.no_grad()
def in_chunks(network, x):
    """network(x) in float32, CHUNK images at a time; FloatingPointError if NaN comes out."""
    with torch.autocast(x.device.type, enabled=False):  # float16 gives black
        y = torch.cat([network(part.float()) for part in x.split(CHUNK)])
    if not y.isfinite().all():
        cause = "weights are bad" if x.isfinite().all() else "input has some"
        raise FloatingPointError(f"The autoencoder gave NaN or infinity: its {cause}.")
    return y


# ---- 2. KL autoencoder ----
def group_norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)  # torch's is 1e-5


def conv(before, after):
    return nn.Conv2d(before, after, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """x + two convolutions of it; x goes through a third, 1x1, if its channels change in number."""

    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = group_norm(before), conv(before, after)
        self.norm2, self.conv2 = group_norm(after), conv(after, after)
        self.nin_shortcut = nn.Identity()
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):  # (B, before, h, w)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y  # (B, after, h, w)


class AttentionBlock(nn.Module):
    """Self-attention among all h*w places, one head; its linear layers are 1x1 convolutions."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = [nn.Conv2d(width, width, 1) for _ in range(4)]

    def forward(self, x):  # (B, width, h, w)
        y = self.norm(x)
        q, k, v = [layer(y).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, h*w, width)
        return x + self.proj_out(y.mT.reshape(x.shape))


def chain(**layers):
    """Layers that run in the order in which they are written here, under CompVis's names."""
    return nn.Sequential(OrderedDict(layers))


def resnets(before, after, blocks):
    return nn.Sequential(*[ResnetBlock(before if i == 0 else after, after) for i in range(blocks)])


def middle(width):
    return chain(block_1=ResnetBlock(width, width), attn_1=AttentionBlock(width),
                 block_2=ResnetBlock(width, width))


class KLAutoencoder(nn.Module):
    """The f8 autoencoder [LDM]. The defaults are the real one's: 83,653,863 parameters."""

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), blocks=2):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        deepest = widths[-1]
        down, before = nn.Sequential(), channels
        for i, width in enumerate(widths):  # level 0 is the picture's
            down.append(chain(block=resnets(before, width, blocks)))
            before = width
            if i < 3:  # pads at the right and the bottom [LDM]
                down[i].downsample = chain(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                           conv=nn.Conv2d(width, width, 3, stride=2))
        self.encoder = chain(conv_in=conv(3, channels), down=down, mid=middle(deepest),
                             norm_out=group_norm(deepest), silu=nn.SiLU(),
                             conv_out=conv(deepest, 8))
        self.quant_conv = nn.Conv2d(8, 8, 1)
        up = nn.Sequential()
        for i in (3, 2, 1, 0):
            level = chain(block=resnets(before, widths[i], blocks + 1))
            before = widths[i]
            if i > 0:
                level.upsample = chain(up=nn.Upsample(scale_factor=2), conv=conv(before, before))
            up.add_module(str(i), level)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.decoder = chain(conv_in=conv(4, deepest), mid=middle(deepest), up=up,
                             norm_out=group_norm(before), silu=nn.SiLU(),
                             conv_out=conv(before, 3))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 8, H/8, W/8). At 256x256: 136 G multiply-adds."""
        return in_chunks(lambda part: self.quant_conv(self.encoder(part)), x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent (B, 4, h, w) -> (B, 3, 8h, 8w), about [-1, 1]. To 256x256: 311 G multiply-adds."""
        return in_chunks(lambda part: self.decoder(self.post_quant_conv(part)), z)


# ---- 3. linear autoencoder ----
class LinearAutoencoder(nn.Module):
    """Principal components of 4x4 RGB patches, in closed form: the best linear code of 16 numbers.

        z = V^(-1/4) U (patch - mean)           patch = mean + U^T V^(1/4) z

    U (16, 48) has the eigenvectors of the patches' covariance as rows, V the eigenvalues. z_k has
    variance sqrt(V_k): half whitened, or noise would hide what tells a circle from a square."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))
        self.register_buffer("components", torch.zeros(16, 48))  # V^(-1/4) U

    def fit(self, x):
        """Principal components of the patches of x (M, 3, H, W) in [-1, 1]."""
        patches = self.cut(x).flatten(0, 2).double()  # (M*h*w, 48)
        self.mean.copy_(patches.mean(0))
        V, vectors = torch.linalg.eigh(patches.T.cov())  # in columns, ascending
        U = vectors.T.flip(0)[:16]
        V = V.flip(0)[:16, None].clamp(min=1e-6)  # there may be fewer
        largest = U.gather(1, U.abs().argmax(1, keepdim=True))
        U *= largest.sign()  # arbitrary: fix it
        self.components.copy_(U * V ** -0.25)

    def cut(self, x):
        """(B, 3, H, W) -> patches (B, H/4, W/4, 48), each in the order (channel, row, column)."""
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> moments (B, 32, H/4, W/4) with the least log-variance."""
        z = in_chunks(lambda part: (self.cut(part) - self.mean) @ self.components.T, x)
        mean = z.permute(0, 3, 1, 2)  # (B, 16, h, w)
        return torch.cat([mean, torch.full_like(mean, -30)], dim=1)  # no noise

    def decode(self, z):
        """Latent (B, 16, h, w) -> (B, 3, 4h, 4w), about [-1, 1]."""
        inverse = self.components / self.components.square().sum(1, keepdim=True)
        patches = in_chunks(lambda part: part.permute(0, 2, 3, 1) @ inverse + self.mean, z)
        patches = patches.unflatten(3, (3, 4, 4))  # (B, h, w, 3, 4, 4)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ---- 4. loading ----
KL_FILE = "weights of an f8 KL autoencoder, by CompVis's or diffusers' names"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
COMPVIS = {  # diffusers' names -> CompVis's
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"attn_1\.(to_)?(q|k|v)(uery|ey|alue)?\.": r"attn_1.\2.",
    r"attn_1\.(to_out\.0|proj_attn)": "attn_1.proj_out", "group_norm": "norm",
    "down_blocks": "down", r"(down|up)samplers\.0": r"\1sample", "resnets": "block",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}


def load_vae(path: str | Path) -> KLAutoencoder:
    """The KL autoencoder of a file, of any size, by CompVis's or diffusers' keys; UserError."""
    with reading(path, KL_FILE):
        weights = read_weights(path)
        weights = weights.get("state_dict", weights)
        state = {}
        for key, value in weights.items():
            key = re.sub(r"^(first_stage_model|vae)\.", "", key)
            # diffusers counts the decoder's levels in the order in which they run
            key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", key)
            for diffusers, compvis in COMPVIS.items():
                key = re.sub(diffusers, compvis, key)
            if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", key):
                value = value.reshape(*value.shape[:2], 1, 1)  # to a 1x1 convolution
            if key.startswith(PARTS):
                state[key] = value
        channels = len(state["encoder.conv_in.weight"])
        widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(4)]
        blocks = {key.split(".")[4] for key in state if key.startswith("encoder.down.0.block.")}
        vae = KLAutoencoder(channels, tuple(width // channels for width in widths), len(blocks))
        return load_frozen(vae, state)


def load_autoencoder(description, state, folder):
    """That of a cache or checkpoint: {"kind": "linear"}, of `state`, or {"kind": "kl"}, a file."""
    if description["kind"] == "linear":
        return load_frozen(LinearAutoencoder(), state)
    return load_vae(find_weights(description, folder, "the autoencoder"))
