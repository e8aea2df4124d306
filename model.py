"""U-ViT, and the place where text enters it. What two scripts must agree on lives here.

A U-ViT predicts the noise in a latent. It cuts the latent into N = (H/P)(W/P) patches, prepends one
time token, and runs a stack of transformer blocks, in which block i also hands its tokens to block
depth-1-i (a long skip):

    zt (B, C, H, W), t (B,), context (B, L, E)  ->  predicted noise (B, C, H, W)

Fusion is data, not a mode: a *window* of blocks that see the text, and text-only blocks before it.

    early          [ T T T T T T T T T T T T T ]   the window is the whole stack, n_text = 0 [U-ViT]
    intermediate   [ . . . . T T T . . . . ]       n_image + n_fuse + n_image blocks, and before
                     t t t t ^                     the window n_text blocks on the text alone [IF]

How the text is let in does not depend on where, and uses the same blocks and the same weights:

    concat            text tokens join the sequence inside the window and leave it at its end
    cross_attention   only time and image tokens ask; keys and values also come from the text,
                      which is never updated

Neither the text blocks nor the text's keys and values depend on t or zt, so `encode_text` runs once
per prompt and `denoise` once per step. Parameter names are those of the official U-ViT release.

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
import shlex
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
    """A mistake of the user: the message says what was given, what was expected and what to do."""


def parse_value(key: str, text: str, kind: type):
    """Read `text` as `kind` (int, float, bool or str), or raise UserError."""
    try:
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{key}={text}: expected {expected}.") from None


def override(Config: type, arguments: list[str]):
    """The dataclass `Config` with `--key=value` arguments applied; UserError for anything else."""
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    values = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            value = "True" if kinds.get(key) is bool else "VALUE"
            form = f"--{key}={value}" if key in kinds else "--key=value"
            raise UserError(f"{argument!r} is not an override; write it as {form}.")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
            raise UserError(f"--{key} is not a constant of this script; did you mean --{near}? "
                            "(--help lists all)")
        values[key] = parse_value(key, text, kinds[key])
    return Config(**values)


def describe(Config: type) -> str:
    """The `--help` text of a Config: every constant with its default and its source comment."""
    lines = []
    for source in inspect.getsource(Config).splitlines():
        if match := re.match(r"    (\w+): \w+ = (.*?)(?:\s+# (.*))?$", source):
            name, default, comment = match.groups(default="")
            lines.append(f"  --{name}={default:<{max(1, 36 - len(name))}} {comment}".rstrip())
        elif source.startswith("    # "):
            lines.append(f"\n{source[6:]}" if lines else source[6:])
    return "\n".join(lines)


def run(main, Config: type):
    """Run one script: parse its command line, call `main(config)`, answer a mistake in one line."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(inspect.getmodule(Config).__doc__.strip())
        print("\nConstants (edit them in the file, or override with --key=value):\n")
        return print(describe(Config))
    try:
        main(override(Config, arguments))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except torch.OutOfMemoryError as error:
        advice = "; a smaller --batch_size needs less" if hasattr(Config, "batch_size") else ""
        sys.exit(f"error: out of memory{advice} ({str(error).splitlines()[0]})")


def command(script: str, config) -> str:
    """The command line of a configuration: what differs from the constants in the file."""
    differs = [f"--{field.name}={value}" for field in dataclasses.fields(config)
               if (value := getattr(config, field.name)) != field.default]
    return shlex.join(["python", script, *differs])


def choose_device() -> torch.device:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device) -> torch.dtype:
    """The fastest safe type for matrix products: bfloat16 where the device computes in it."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16       # measured: 2 times faster with these instructions, else slower
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype | None = None):
    """Matrix products in `precision`; norms, softmax, residuals and weights stay float32."""
    precision = precision or choose_precision(device)
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def compile_guarded(function, mode: str, device: torch.device, try_out, say=print):
    """torch.compile(function), after `try_out` of it; where that fails, say why and go on without.

    mode: "on", "off" or "auto", which is on for CUDA alone, since a CPU gains only 3%.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return function
    try:
        fast = torch.compile(function)
        try_out(fast)
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as error:      # whatever goes wrong in a compiler must not cost the work
        reason = (str(error).strip() or "no message").splitlines()[0]
        say(f"torch.compile failed and is off ({type(error).__name__}: {reason:.200}).")
        return function


# ---- 2. noise schedule ----

def noise_schedule() -> torch.Tensor:
    """alpha_bar (1001,) in float64: zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps."""
    # t is in 1..1000, alpha_bar[0] = 1. "Scaled linear" betas of Stable Diffusion [LDM] and U-ViT:
    beta = torch.linspace(0.00085 ** 0.5, 0.0120 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


# ---- 3. layers ----

def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Time steps (B,) in 1..1000 -> (B, dim), cosines then sines: the time token itself [U-ViT]."""
    k = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10000) / (dim // 2) * k)            # from 1 down to 1/10000
    angle = t[:, None].float() * frequency                              # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                # (B, dim)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, h, Q, d), (B, h, K, d), (B, h, K, d) -> (B, h, Q, d)."""
    if q.device.type == "cpu":      # in bfloat16, 3 times faster than torch's fused one (backward)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention of (B, S, D); the text may add its keys and values to theirs."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)              # rows: q, k, v
        self.proj = nn.Linear(width, width)

    def split_heads(self, x):                                           # (B, S, D)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (B, h, S, D/h)

    def keys_values(self, x):
        """The keys and the values alone, (B, h, S, D/h) each: the same rows of the same matrix."""
        kv = F.linear(x, self.qkv.weight[x.shape[-1]:])                 # (B, S, 2D)
        return [self.split_heads(part) for part in kv.chunk(2, dim=-1)]

    def forward(self, x, text_keys_values=None):                        # (B, S, D)
        q, k, v = [self.split_heads(part) for part in self.qkv(x).chunk(3, dim=-1)]
        if text_keys_values is not None:                                # k, v: (B, h, S+L, D/h)
            k, v = [torch.cat(pair, dim=2) for pair in zip((k, v), text_keys_values)]
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, one that can `merge` its mirror image's tokens."""

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
        """Merge (B, S, D) with a skip (B, S', D) on the tokens of both, the first min(S, S')."""
        n = min(x.shape[1], skip.shape[1])
        merged = self.skip_linear(torch.cat([x[:, :n], skip[:, :n]], dim=-1))
        return torch.cat([merged.to(x.dtype), x[:, n:]], dim=1)         # stays float32 in autocast

    def forward(self, x, text_keys_values=None):                        # (B, S, D)
        x = x + self.attn(self.norm1(x), text_keys_values)
        return x + self.mlp(self.norm2(x))


# ---- 4. the network ----

@dataclasses.dataclass
class UViTConfig:
    fusion: str                 # "early" or "intermediate": where text meets the image
    conditioning: str           # "concat" or "cross_attention": how
    depth: int = 13             # early: blocks in the stack, all of which see the text
    n_image: int = 4            # intermediate: image-only blocks on each side
    n_fuse: int = 3             # intermediate: blocks that see the text, around the bottleneck
    n_text: int = 4             # intermediate: text-only blocks before them
    fuse_shift: int = 0         # intermediate: moves the window; 0 = centred on the bottleneck
    image_size: int = 32        # side of the latent, in its own pixels
    channels: int = 4           # of the latent
    patch_size: int = 2
    width: int = 512
    heads: int = 8
    context_len: int = 77       # L, text tokens
    context_dim: int = 768      # E, width of the text features

    def __post_init__(self):
        def require(name, holds, expected):
            if not holds:
                raise UserError(f"{name}={getattr(self, name)!r}: expected {expected}.")

        require("fusion", self.fusion in ("early", "intermediate"), "'early' or 'intermediate'")
        require("conditioning", self.conditioning in ("concat", "cross_attention"),
                "'concat' or 'cross_attention'")
        for name in ("depth", "n_fuse", "image_size", "channels", "patch_size", "width", "heads",
                     "context_len", "context_dim"):
            require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("n_image", "n_text"):
            require(name, getattr(self, name) >= 0, "0 or more")
        early, n, P = self.fusion == "early", self.n_image, self.patch_size
        require("depth" if early else "n_fuse", self.blocks % 2 == 1, "an odd number, since "
                "the stack has as many blocks before its middle block as after it")
        require("fuse_shift", early or abs(self.fuse_shift) <= n, "-n_image..n_image, that is "
                f"{-n}..{n}, or the window of n_fuse={self.n_fuse} blocks would leave the stack")
        require("image_size", self.image_size % P == 0, f"a multiple of patch_size={P}")
        require("width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        require("width", self.width % 4 == 0,
                "a multiple of 4, for sines and cosines of row and column")

    @property
    def blocks(self) -> int:            # in the stack
        return self.depth if self.fusion == "early" else 2 * self.n_image + self.n_fuse

    @property
    def window(self) -> range:          # the indices of the blocks that see the text
        first = self.n_image + self.fuse_shift
        return range(self.depth) if self.fusion == "early" else range(first, first + self.n_fuse)

    @property
    def text_blocks(self) -> int:       # before the window
        return 0 if self.fusion == "early" else self.n_text

    @property
    def image_tokens(self) -> int:      # N
        return (self.image_size // self.patch_size) ** 2


class UViT(nn.Module):
    """U-ViT [U-ViT] with a window of blocks that see the text [IF]."""

    def __init__(self, config: UViTConfig, init_std: float = 0.02):
        super().__init__()
        self.config = config
        D, P, C, h = config.width, config.patch_size, config.channels, config.heads
        L, N, half = config.context_len, config.image_tokens, config.blocks // 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(C, D, kernel_size=P, stride=P)})
        self.context_embed = nn.Linear(config.context_dim, D)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + L + N, D))
        self.text_blocks = nn.ModuleList(Block(D, h) for _ in range(config.text_blocks))
        self.in_blocks = nn.ModuleList(Block(D, h) for _ in range(half))
        self.mid_block = Block(D, h)
        self.out_blocks = nn.ModuleList(Block(D, h, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, P * P * C)
        self.final_layer = nn.Conv2d(C, C, kernel_size=3, padding=1)

        # [U-ViT]: 0.02 everywhere, at width 512; convolutions keep torch's own initialisation
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-2, b=2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std, a=-2, b=2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stack(self):
        """All blocks but those of the text, in the order in which tokens go through them."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def positions(self):
        """The learned positions of (time, text, image), in the order of the official file."""
        return self.pos_embed.split([1, self.config.context_len, self.config.image_tokens], dim=1)

    def encode_text(self, context: torch.Tensor):
        """The half that needs the text alone, context (B, L, E): run it once per prompt.

        Gives what `denoise` takes: for concat text tokens (B, L, D), for cross_attention the keys
        and values of the blocks in the window, [(k, v), ...], (B, h, L, D/h) each.
        """
        text = self.context_embed(context) + self.positions()[1]        # (B, L, D)
        for block in self.text_blocks:
            text = block(text)
        if self.config.conditioning == "concat":
            return text
        return [self.stack[i].keys_values(text) for i in self.config.window]

    def denoise(self, zt: torch.Tensor, t: torch.Tensor, text) -> torch.Tensor:
        """The half that runs at each step, with the text of `encode_text`.

        zt (B, C, H, W), t (B,) in 1..1000, text -> predicted noise (B, C, H, W).
        """
        window, concat = self.config.window, self.config.conditioning == "concat"
        keys_values = {} if concat else dict(zip(window, text))         # block -> text's (k, v)
        time_pos, _, image_pos = self.positions()
        time = timestep_embedding(t, self.config.width)[:, None]        # (B, 1, D)
        image = self.patch_embed["proj"](zt).flatten(2).mT              # (B, N, D)
        x = torch.cat([time + time_pos, image + image_pos], dim=1)      # (B, 1+N, D)
        skips, middle = [], len(self.in_blocks)
        for i, block in enumerate(self.stack):
            if concat and i == window.start:
                x = torch.cat([x, text], dim=1)                         # (B, 1+N+L, D) text enters
            if i > middle:
                x = block.merge(x, skips.pop())                         # from block depth-1-i
            x = block(x, keys_values.get(i))
            if i < middle:
                skips.append(x)
            if concat and i == window.stop - 1:
                x = x[:, :-text.shape[1]]                               # (B, 1+N, D) text leaves
        x = self.decoder_pred(self.norm(x[:, 1:]))                      # (B, N, P*P*C)
        return self.final_layer(self.unpatchify(x))                     # (B, C, H, W)

    def unpatchify(self, x):
        """(B, N, P*P*C) -> (B, C, H, W); the order in a patch is row, column, channel [U-ViT]."""
        side, P = self.config.image_size // self.config.patch_size, self.config.patch_size
        x = x.unflatten(2, (P, P, -1)).unflatten(1, (side, side))       # (B, H/P, W/P, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)     # (B, C, H, W)

    def forward(self, zt: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """zt (B, C, H, W), t (B,) in 1..1000, context (B, L, E) -> predicted noise (B, C, H, W)."""
        return self.denoise(zt, t, self.encode_text(context))

    @torch.no_grad()
    def start_positions_as_waves(self):
        """Start the image positions, still learned, as sines and cosines of row and column.

        U-ViT: normal(0.02). Wavelengths from 4 patches to twice the side make neighbours alike and
        others not. A short run then draws whole shapes, not fragments (README, "Where we differ").
        """
        side, D = self.config.image_size // self.config.patch_size, self.config.width
        wavelength = torch.logspace(2, math.log2(2 * side), D // 4, base=2)
        angle = 2 * math.pi * torch.arange(side)[:, None] / wavelength  # (side, D/4)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)             # (side, D/2)
        rows, columns = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)   # (N, D/2)
        self.positions()[2].copy_(torch.cat([rows, columns], dim=1))    # (1, N, D)


def count_multiply_adds(config: UViTConfig) -> tuple[int, int]:
    """Multiply-adds per image of (encode_text, denoise). One is two FLOPs; papers call it one."""
    with torch.device("meta"):          # nothing is computed there, and torch counts attention too
        net, t = UViT(config), torch.empty(1)
        zt = torch.empty(1, config.channels, config.image_size, config.image_size)
        context = torch.empty(1, config.context_len, config.context_dim)
    with FlopCounterMode(display=False) as once:
        text = net.encode_text(context)
    with FlopCounterMode(display=False) as each_step:
        net.denoise(zt, t, text)
    return once.get_total_flops() // 2, each_step.get_total_flops() // 2


# ---- 5. weight files and checkpoints ----

def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8,
             "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = bytearray(data[start + begin:start + end])
        tensors[name] = torch.frombuffer(raw, dtype=types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_weights(path: str | Path) -> dict:
    """The dict in a torch file, a TorchScript archive (its state dict) or a .safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file "
                        "(addresses of public weights: FILES in prepare_data.py).")
    size = f"{path.stat().st_size:,} bytes"
    with open(path, "rb") as file:
        if file.read(512).lstrip().startswith(b"<"):
            raise UserError(f"{path} has {size} and looks like HTML, not like weights: "
                            "the download went wrong; fetch it again.")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in names):
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                return torch.jit.load(path, map_location="cpu").state_dict()
        state = torch.load(path, map_location="cpu", weights_only=True)     # nothing in it can run
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, struct.error,
            zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} ({size}) can't be read as weights: it is damaged, incomplete or "
                        f"of another format ({type(error).__name__}).") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a dict of weights.")
    return state


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_encoder(description: dict, folder: str | Path, what: str) -> Path:
    """The weight file of `what` in `folder`, or UserError; a "sha256" of None is not checked."""
    path, expected = Path(folder) / description["file"], description.get("sha256")
    if not path.is_file():
        digest = f" (SHA-256 {expected})" if expected else ""
        raise UserError(f"{path} is missing, {what} that the data was encoded with: fetch "
                        f"{path.name}{digest} and put it into {path.parent} "
                        "(addresses of public weights: FILES in prepare_data.py).")
    if expected and expected != (found := sha256(path)):
        raise UserError(f"{path} has SHA-256 {found}, but the data was encoded with {what} "
                        f"of SHA-256 {expected}: put that one there, "
                        "or prepare the data and train anew.")
    return path


def load_strictly(module: nn.Module, state: dict, path: str | Path) -> nn.Module:
    """Load all of `state` into `module`; UserError names the first five tensors that do not fit."""
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own if key not in state]
    wrong += [f"unexpected {key}" for key in state if key not in own]
    wrong += [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{path} does not fit {type(module).__name__}: {shown}.")
    module.load_state_dict(state)
    return module


CHECKPOINT_FORMAT = "midfuse-1"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py, or the official U-ViT weights, as one dict that describes itself.

    Sampling needs "uvit" (UViTConfig), "ema", "latent_scale", "null_context" (L, E) or None (made
    from the empty caption), "meta" (of the data: which autoencoder, which text tower), "step".
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is {'a folder' if Path(path).is_dir() else 'not there'}: expected "
                        "a checkpoint of train.py, such as out/shapes/last.pt, or the official "
                        "mscoco_uvit_small.pth.")
    state = read_weights(path)
    if state.get("format") == CHECKPOINT_FORMAT:
        return state | {"uvit": UViTConfig(**state["uvit"])}
    missing = [key for key in ("pos_embed", "context_embed.weight", "patch_embed.proj.weight")
               if key not in state]
    if missing:
        raise UserError(f"{path} is neither a checkpoint of train.py nor an official U-ViT "
                        f"text-to-image file: it has no {' and no '.join(missing)}; "
                        f"its first keys are {', '.join(map(str, list(state)[:5]))}.")
    return describe_official(state)


def describe_official(state: dict) -> dict:
    """The official mscoco_uvit_small.pth, a flat state dict; its shapes give the architecture."""
    D, C, P, _ = state["patch_embed.proj.weight"].shape
    L, E = 77, state["context_embed.weight"].shape[1]
    side = P * math.isqrt(state["pos_embed"].shape[1] - 1 - L)
    half = len({key.split(".")[1] for key in state if key.startswith("in_blocks.")})
    config = UViTConfig("early", "concat", depth=2 * half + 1, image_size=side, channels=C,
                        patch_size=P, width=D, heads=D // 64, context_len=L, context_dim=E)
    meta = {"dataset": "coco", "image_size": 8 * side,      # files as prepare_data.py names them
            "autoencoder": {"kind": "kl", "file": "kl-f8.bin"},
            "text_tower": {"kind": "clip", "file": "clip-vit-large-patch14.bin"}}
    return {"uvit": config, "ema": state, "step": 1_000_000, "null_context": None, "meta": meta,
            "latent_scale": 0.23010}        # U-ViT's; its sampler, by mistake, decodes with 0.18215


def load_uvit(checkpoint: dict, weights: str, path: str | Path) -> UViT:
    """The network of `read_checkpoint`, in evaluation mode, with weights "ema" or "model" (raw)."""
    if weights not in checkpoint:
        raise UserError(f"{path} holds no raw weights, only their moving average: "
                        "leave out --raw=True.")
    net = load_strictly(UViT(checkpoint["uvit"]), checkpoint[weights], path)
    return net.eval().requires_grad_(False)
