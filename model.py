"""U-ViT, and the place where text enters it. What two scripts must agree on lives here.

A U-ViT predicts the noise in a latent. It cuts the latent into patches, prepends one time token, and runs a stack
of transformer blocks in which block i also hands its tokens to block depth-1-i (a long skip):

    zt (B, C, H, W), t (B,), context (B, L, E)  ->  predicted noise (B, C, H, W)        N = (H/P)(W/P) image tokens

Fusion is data, not a mode: a stack of blocks, a *window* of blocks that see the text, and text-only blocks before it.

    early          [ T T T T T T T T T T T T T ]      the window is the whole stack, n_text = 0       [U-ViT]
    intermediate   [ . . . . T T T . . . . ]          n_image + n_fuse + n_image blocks, after        [IF]
                           t t t t ^                  n_text transformer blocks on the text alone

How the text is let in does not depend on where, and uses the same blocks and the same weights:

    concat            text tokens join the sequence inside the window and leave it at its end
    cross_attention   only time and image tokens ask; keys and values also come from the text, which is never updated

Neither the text blocks nor the text's keys and values depend on t or zt, so `encode_text` runs once per prompt and
`denoise` once per step. Parameter names are those of the official U-ViT release.

Five parts: 1 command line, 2 noise schedule, 3 layers, 4 the network, 5 checkpoints.
[IF] arXiv 2403.16530   [U-ViT] arXiv 2209.12152   [LDM] arXiv 2112.10752
"""
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import pickle
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---- 1. command line ----

class UserError(ValueError):
    """A mistake that the user can mend: its message says what was given, what was expected and what to do."""


def parse_value(key: str, text: str, kind: type):
    """Read `text` as `kind` (int, float, bool or str), or raise UserError."""
    try:
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = "True or False" if kind is bool else {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{key}={text}: expected {expected}.") from None


def override(Config: type, arguments: list[str]):
    """The dataclass `Config` with `--key=value` arguments applied; raises UserError for anything else."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    values = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            form = f"--{key}={'True' if fields[key].type is bool else 'VALUE'}" if key in fields else "--key=value"
            raise UserError(f"{argument!r} is not an override; write it as {form}.")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise UserError(f"--{key} is not a constant of this script; did you mean --{near[0]}? (--help lists all)")
        values[key] = parse_value(key, text, fields[key].type)
    return Config(**values)


def describe(Config: type) -> str:
    """The `--help` text of a config dataclass: every constant with its default and its comment in the source."""
    lines = []
    for source in inspect.getsource(Config).splitlines():
        match = re.match(r"    (\w+): (\w+) = (.*?)(?:\s+# (.*))?$", source)
        if match:
            name, kind, default, comment = match.groups()
            lines.append(f"  --{name}={default:<{max(1, 36 - len(name))}} {comment or ''}".rstrip())
        elif source.startswith("    # "):
            lines.append(f"\n{source[6:]}" if lines else source[6:])
    return "\n".join(lines)


def run(main, Config: type):
    """Run one script from the command line: parse, call `main(config)`, and answer a user's mistake in one sentence."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        module = inspect.getmodule(Config)
        print(f"{module.__doc__.strip()}\n\nConstants (edit them in the file, or override with --key=value):\n")
        return print(describe(Config))
    try:
        main(override(Config, arguments))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def choose_device() -> torch.device:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device) -> torch.dtype:
    """The fastest safe type for matrix products: bfloat16 where the device computes in it, float16 on older CUDA, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():     # measured: 2 times faster with it, slower without
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype | None = None):
    """Matrix products in `precision` (default: `choose_precision`); norms, softmax, residuals and weights stay float32."""
    precision = precision or choose_precision(device)
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


# ---- 2. noise schedule ----

def noise_schedule() -> torch.Tensor:
    """alpha_bar (1001,) in float64: zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps, t in 1..1000, alpha_bar[0] = 1.

    Stable Diffusion's "scaled linear" betas [LDM], which U-ViT uses too.
    """
    beta = torch.linspace(0.00085 ** 0.5, 0.0120 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


# ---- 3. layers ----

def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """(B,) time steps in 1..1000 -> (B, dim) [cos | sin] of `dim / 2` frequencies. It is the time token itself [U-ViT]."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t[:, None].float() * frequency                                        # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                          # (B, dim)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, (B, h, Q, d), (B, h, K, d), (B, h, K, d) -> (B, h, Q, d)."""
    if q.device.type == "cpu":      # torch's fused CPU attention is 3 times slower than this in bfloat16 (backward pass)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention of (B, S, D), whose keys and values may be extended by those of the text."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)                        # rows: q, k, v
        self.proj = nn.Linear(width, width)

    def split_heads(self, x):                                                     # (B, S, D)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                  # (B, h, S, D/h)

    def keys_values(self, x):
        """The keys and values alone, each (B, h, S, D/h): the same rows of the same matrix."""
        width = x.shape[-1]
        return [self.split_heads(part) for part in F.linear(x, self.qkv.weight[width:]).chunk(2, dim=-1)]

    def forward(self, x, text_keys_values=None):
        q, k, v = [self.split_heads(part) for part in self.qkv(x).chunk(3, dim=-1)]
        if text_keys_values is not None:
            k, v = [torch.cat(pair, dim=2) for pair in zip((k, v), text_keys_values)]   # (B, h, S+L, D/h)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))           # (B, S, D)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block. The blocks after the middle (`skip`) first merge the tokens of their mirror image."""

    def __init__(self, width, heads, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def keys_values(self, text):
        return self.attn.keys_values(self.norm1(text))

    def merge(self, x, skip):
        """Merge (B, S, D) with a skip (B, S', D) on the tokens that both have: the first min(S, S')."""
        shared = min(x.shape[1], skip.shape[1])
        merged = self.skip_linear(torch.cat([x[:, :shared], skip[:, :shared]], dim=-1))
        return torch.cat([merged.to(x.dtype), x[:, shared:]], dim=1)             # not autocast's type: it stays float32

    def forward(self, x, text_keys_values=None):                                  # (B, S, D)
        x = x + self.attn(self.norm1(x), text_keys_values)
        return x + self.mlp(self.norm2(x))


# ---- 4. the network ----

@dataclasses.dataclass
class UViTConfig:
    fusion: str                     # "early" or "intermediate": where text meets the image
    conditioning: str               # "concat" or "cross_attention": how
    depth: int = 13                 # early: blocks in the stack, all of which see the text
    n_image: int = 4                # intermediate: image-only blocks on each side
    n_fuse: int = 3                 # intermediate: blocks that see the text, around the bottleneck
    n_text: int = 4                 # intermediate: text-only blocks before them
    fuse_shift: int = 0             # intermediate: moves the window of n_fuse blocks; 0 = centred on the bottleneck
    image_size: int = 32            # side of the latent, in its own pixels
    channels: int = 4               # of the latent
    patch_size: int = 2
    width: int = 512
    heads: int = 8
    context_len: int = 77           # L, text tokens
    context_dim: int = 768          # E, width of the text features

    def __post_init__(self):
        def require(holds, message):
            if not holds:
                raise UserError(message)
        require(self.fusion in ("early", "intermediate"),
                f"fusion={self.fusion!r}: expected 'early' or 'intermediate'.")
        require(self.conditioning in ("concat", "cross_attention"),
                f"conditioning={self.conditioning!r}: expected 'concat' or 'cross_attention'.")
        for name in ("depth", "n_fuse", "image_size", "channels", "patch_size", "width", "heads", "context_len",
                     "context_dim"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected 1 or more.")
        for name in ("n_image", "n_text"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected 0 or more.")
        odd = "the stack has as many blocks before its middle block as after it"
        if self.fusion == "early":
            require(self.depth % 2 == 1, f"depth={self.depth}: expected an odd number, since {odd}.")
        else:
            require(self.n_fuse % 2 == 1, f"n_fuse={self.n_fuse}: expected an odd number, since {odd}.")
            require(abs(self.fuse_shift) <= self.n_image,
                    f"fuse_shift={self.fuse_shift}: the window of n_fuse={self.n_fuse} blocks would leave the stack; "
                    f"expected -n_image..n_image, that is {-self.n_image}..{self.n_image}.")
        require(self.image_size % self.patch_size == 0,
                f"image_size={self.image_size}: expected a multiple of patch_size={self.patch_size}.")
        require(self.width % self.heads == 0, f"width={self.width}: expected a multiple of heads={self.heads}.")
        require(self.width % 4 == 0, f"width={self.width}: expected a multiple of 4, for sines and cosines of row and column.")

    @property
    def blocks(self) -> int:
        """Number of blocks in the stack."""
        return self.depth if self.fusion == "early" else 2 * self.n_image + self.n_fuse

    @property
    def window(self) -> range:
        """The indices of the blocks that see the text."""
        if self.fusion == "early":
            return range(self.depth)
        first = self.n_image + self.fuse_shift
        return range(first, first + self.n_fuse)

    @property
    def text_blocks(self) -> int:
        """Number of text-only blocks before the window."""
        return 0 if self.fusion == "early" else self.n_text

    @property
    def image_tokens(self) -> int:
        """N, the number of patches."""
        return (self.image_size // self.patch_size) ** 2


class UViT(nn.Module):
    """U-ViT [U-ViT] with a window of blocks that see the text [IF]."""

    def __init__(self, config: UViTConfig, init_std: float = 0.02):
        super().__init__()
        self.config = config
        D, P, C, heads = config.width, config.patch_size, config.channels, config.heads
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(C, D, kernel_size=P, stride=P)})
        self.context_embed = nn.Linear(config.context_dim, D)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.context_len + config.image_tokens, D))
        self.text_blocks = nn.ModuleList(Block(D, heads) for _ in range(config.text_blocks))
        self.in_blocks = nn.ModuleList(Block(D, heads) for _ in range(config.blocks // 2))
        self.mid_block = Block(D, heads)
        self.out_blocks = nn.ModuleList(Block(D, heads, skip=True) for _ in range(config.blocks // 2))
        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, P * P * C)
        self.final_layer = nn.Conv2d(C, C, kernel_size=3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-2, b=2)                # [U-ViT]: at width 512 all are 0.02;
        for module in self.modules():                                             # convolutions keep torch's own
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std, a=-2, b=2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self):
        """The learned positions of (time, text, image); the official file keeps them in this order."""
        return self.pos_embed.split([1, self.config.context_len, self.config.image_tokens], dim=1)

    def encode_text(self, context: torch.Tensor):
        """The half of the forward pass that depends on the text alone: run it once per prompt.

        context (B, L, E) -> what `denoise` needs of it: text tokens (B, L, D) for concat; for cross_attention the keys and
        values of every block in the window, [(k, v), ...], each (B, h, L, D/h).
        """
        text = self.context_embed(context) + self.positions()[1]                  # (B, L, D)
        for block in self.text_blocks:
            text = block(text)
        if self.config.conditioning == "concat":
            return text
        blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]
        return [blocks[i].keys_values(text) for i in self.config.window]

    def denoise(self, zt: torch.Tensor, t: torch.Tensor, text) -> torch.Tensor:
        """The half that runs at every step: zt (B, C, H, W), t (B,) in 1..1000, text of `encode_text` -> noise (B, C, H, W)."""
        concat, window = self.config.conditioning == "concat", self.config.window
        time_position, _, image_position = self.positions()
        image = self.patch_embed["proj"](zt).flatten(2).transpose(1, 2)           # (B, N, D)
        time = timestep_embedding(t, self.config.width)[:, None]                  # (B, 1, D)
        x = torch.cat([time + time_position, image + image_position], dim=1)      # (B, 1+N, D)
        skips = []
        for i, block in enumerate([*self.in_blocks, self.mid_block, *self.out_blocks]):
            if concat and i == window.start:
                x = torch.cat([x, text], dim=1)                                   # (B, 1+N+L, D), text enters
            if i > self.config.blocks // 2:
                x = block.merge(x, skips.pop())
            x = block(x, None if concat or i not in window else text[i - window.start])
            if i < self.config.blocks // 2:
                skips.append(x)
            if concat and i == window.stop - 1:
                x = x[:, :1 + image.shape[1]]                                     # (B, 1+N, D), text leaves
        x = self.decoder_pred(self.norm(x[:, 1:]))                                # (B, N, P*P*C)
        return self.final_layer(self.unpatchify(x))                               # (B, C, H, W)

    def unpatchify(self, x):
        """(B, N, P*P*C) -> (B, C, H, W); inside a patch the order is (row, column, channel) [U-ViT]."""
        side, P = self.config.image_size // self.config.patch_size, self.config.patch_size
        x = x.reshape(len(x), side, side, P, P, self.config.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.config.channels, side * P, side * P)

    def forward(self, zt: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """zt (B, C, H, W), t (B,) in 1..1000, context (B, L, E) -> predicted noise (B, C, H, W)."""
        return self.denoise(zt, t, self.encode_text(context))

    @torch.no_grad()
    def start_positions_as_waves(self):
        """Start the image positions as sines and cosines of row and column, still learned. U-ViT: normal(0.02).

        Wavelengths go from 4 patches to twice the side, so that neighbours are alike and others are not. With so little training
        as the default run gets, this makes whole shapes instead of fragments (README, "Where we differ").
        """
        side, D = self.config.image_size // self.config.patch_size, self.config.width
        wavelength = torch.logspace(math.log2(4), math.log2(2 * side), D // 4, base=2)
        angle = 2 * math.pi * torch.arange(side)[:, None] / wavelength            # (side, D/4)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)                       # (side, D/2)
        rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
        self.positions()[2].copy_(torch.cat([rows, columns], dim=-1).reshape(1, side * side, -1))


def count_multiply_adds(config: UViTConfig) -> tuple[int, int]:
    """Multiply-adds per image of (encode_text, denoise), by torch's own counter; one multiply-add is two FLOPs.

    Papers of this field call multiply-adds "FLOPs". On the meta device nothing is computed and attention is counted.
    """
    with torch.device("meta"):
        net = UViT(config)
        context = torch.empty(1, config.context_len, config.context_dim)
        zt, t = torch.empty(1, config.channels, config.image_size, config.image_size), torch.empty(1)
    with FlopCounterMode(display=False) as text_counter:
        text = net.encode_text(context)
    with FlopCounterMode(display=False) as image_counter:
        net.denoise(zt, t, text)
    return text_counter.get_total_flops() // 2, image_counter.get_total_flops() // 2


# ---- 5. weight files and checkpoints ----

def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A .safetensors file: 8 bytes of header length, a JSON header with type, shape and place of each tensor, raw bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = torch.frombuffer(bytearray(data[start + begin:start + end]), dtype=types[entry["dtype"]])
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def read_weights(path: str | Path) -> dict:
    """What a weight file holds, on the CPU: a torch file, a TorchScript archive (its state dict) or a .safetensors file.

    A torch file is read with `weights_only=True`: nothing in it can run. Raises UserError if the file is missing, damaged or a web page.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file (addresses of public weights: FILES in prepare_data.py).")
    with open(path, "rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"<"):
        raise UserError(f"{path} has {path.stat().st_size:,} bytes and looks like HTML, not like weights: "
                        "the download went wrong; fetch it again.")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)               # of torch.jit.load, in torch 2.13
                return torch.jit.load(path, map_location="cpu").state_dict()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) can't be read as weights: it is damaged, incomplete or of "
                        f"another format ({type(error).__name__}).") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a dict of weights.")
    return state


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_encoder(description: dict, folder: str | Path, what: str) -> Path:
    """The weight file {"file", "sha256"} of `what` in `folder`; a "sha256" of None is not checked. Raises UserError otherwise."""
    path, expected = Path(folder) / description["file"], description.get("sha256")
    if not path.is_file():
        digest = f" (SHA-256 {expected})" if expected else ""
        raise UserError(f"{path} is missing, {what} that the data was encoded with: fetch {path.name}{digest} and put it into "
                        f"{path.parent} (addresses of public weights: FILES in prepare_data.py).")
    if expected and expected != (found := sha256(path)):
        raise UserError(f"{path} has SHA-256 {found}, but the data was encoded with {what} of SHA-256 {expected}: put that one "
                        f"there, or prepare the data and train anew.")
    return path


def load_strictly(module: nn.Module, state: dict, path: str | Path) -> nn.Module:
    """Load every tensor of `state` into `module`; raises UserError naming the first five that do not fit."""
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own if key not in state] + [f"unexpected {key}" for key in state if key not in own]
    wrong += [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        raise UserError(f"{path} does not fit {type(module).__name__}: {'; '.join(wrong[:5])}"
                        f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}.")
    module.load_state_dict(state)
    return module


CHECKPOINT_FORMAT = "midfuse-1"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py, or the official U-ViT text-to-image weights, as one dict that describes itself.

    Keys that sampling needs: "uvit" (UViTConfig), "ema" (state dict), "latent_scale", "null_context" (L, E) or None (made from
    the empty caption), "meta" (of the data cache: which autoencoder, which text tower), "step".
    """
    state = read_weights(path)
    keys = list(state) if isinstance(state, dict) else []
    if "format" in keys and state["format"] == CHECKPOINT_FORMAT:
        return state | {"uvit": UViTConfig(**state["uvit"])}
    missing = [key for key in ("pos_embed", "context_embed.weight", "patch_embed.proj.weight") if key not in keys]
    if not missing:
        return describe_official(state)
    raise UserError(f"{path} is neither a checkpoint of train.py nor an official U-ViT text-to-image file: it has no "
                    f"{' and no '.join(missing)}; its first keys are {', '.join(map(str, keys[:5]))}.")


def describe_official(state: dict) -> dict:
    """The official U-ViT weights (mscoco_uvit_small.pth): a flat state dict, whose architecture is read off its shapes."""
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    context_len, context_dim = 77, state["context_embed.weight"].shape[1]
    image_tokens = state["pos_embed"].shape[1] - 1 - context_len
    depth = 1 + 2 * sum(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", key) is not None for key in state)
    config = UViTConfig("early", "concat", depth=depth, image_size=math.isqrt(image_tokens) * patch_size,
                        channels=channels, patch_size=patch_size, width=width, heads=width // 64,
                        context_len=context_len, context_dim=context_dim)
    meta = {"dataset": "coco", "image_size": 8 * config.image_size, "autoencoder": {"kind": "kl", "file": "kl-f8.bin"},
            "text_tower": {"kind": "clip", "file": "clip-vit-large-patch14.bin"}}    # the names that prepare_data.py gives them
    return {"uvit": config, "ema": state, "step": 1_000_000, "null_context": None, "meta": meta,
            "latent_scale": 0.23010}        # U-ViT's configuration; its own sampler decodes with 0.18215 by mistake


def load_uvit(checkpoint: dict, weights: str, path: str | Path) -> UViT:
    """The network of a `read_checkpoint`, in evaluation mode; `weights` is "ema" or "model" (raw)."""
    if weights not in checkpoint:
        raise UserError(f"{path} holds no raw weights, only their moving average: leave out --raw=True.")
    return load_strictly(UViT(checkpoint["uvit"]), checkpoint[weights], path).eval().requires_grad_(False)
