"""U-ViT, and the place where text enters it. What all scripts share follows in sections 4 to 7.

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
[IF] arXiv 2403.16530   [U-ViT] arXiv 2209.12152   [LDM] arXiv 2112.10752
"""
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shlex
import sqlite3
import sys
import zipfile
from argparse import SUPPRESS, ArgumentParser
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# Kinds of constants, with their least and greatest value; `Constants` checks them.
Positive = Annotated[int, 1, 2 ** 31 - 1]
Natural = Annotated[int, 0, 2 ** 31 - 1]
Size = Annotated[int, 1, 2 ** 14]  # of a layer or a picture
Unit = Annotated[float, 0, 1]
FilePath = Annotated[str, "path"]  # may begin with ~


# ---- 1. noise schedule ----
def noise_schedule():
    """alpha_bar (1001,) in float64, for t in 0..1000; alpha_bar[0] = 1."""
    # "Scaled linear" betas of Stable Diffusion [LDM] and U-ViT
    beta = torch.linspace(0.00085 ** 0.5, 0.0120 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


def add_noise(z0, eps, t, alpha_bar):
    """zt = sqrt(alpha_bar[t]) z0 + sqrt(1 - alpha_bar[t]) eps, (B, C, H, W), at t (B,)."""
    a = alpha_bar[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * eps


# ---- 2. layers ----
def timestep_embedding(t, dim):
    """Time steps (B,) in 1..1000 -> (B, dim), cosines then sines: the time token itself [U-ViT]."""
    k = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10000) / (dim // 2) * k)  # from 1 down to 1/10000
    angle = t[:, None].float() * frequency  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v: (B, h, Q, d), (B, h, K, d), (B, h, K, d) -> (B, h, Q, d)."""
    if q.device.type == "cpu":  # 3 times faster in bfloat16
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention of (B, S, D); the text may add its keys and values to theirs."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # rows: q, k, v
        self.proj = nn.Linear(width, width)

    def split_heads(self, x):  # (B, S, D)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, S, D/h)

    def keys_values(self, x):
        """Keys and values alone, (B, S, 2D): the same rows of the same matrix."""
        return F.linear(x, self.qkv.weight[x.shape[-1]:])

    def forward(self, x, text_kv=None):  # (B, S, D), (B, L, 2D)
        q, k, v = [self.split_heads(part) for part in self.qkv(x).chunk(3, dim=-1)]
        if text_kv is not None:
            text_k, text_v = [self.split_heads(part) for part in text_kv.chunk(2, dim=-1)]
            k, v = torch.cat([k, text_k], 2), torch.cat([v, text_v], 2)  # (B, h, S+L, D/h)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, S, D)


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

    def merge(self, x, skip):
        """Merge (B, S, D) with a skip (B, S', D); text that only x has stays, the skip's goes."""
        n = min(x.shape[1], skip.shape[1])
        merged = self.skip_linear(torch.cat([x[:, :n], skip[:, :n]], dim=-1))
        return torch.cat([merged.to(x.dtype), x[:, n:]], dim=1)  # stays float32 in autocast

    def forward(self, x, text_kv=None):  # (B, S, D)
        x = x + self.attn(self.norm1(x), text_kv)
        return x + self.mlp(self.norm2(x))


# ---- 3. the network ----
@dataclasses.dataclass
class UViTConfig:
    """What a UViT is made of; raises UserError where that is impossible."""
    fusion: Literal["early", "intermediate"]  # where text meets the image
    conditioning: Literal["concat", "cross_attention"]  # how
    depth: Size = 13  # blocks in the stack; intermediate: 2 n_image + n_fuse
    # intermediate; early sets them to 0, depth, 0, 0: the window is the whole stack
    n_image: Natural = 4  # image-only blocks on each side
    n_fuse: Size = 3  # blocks that see the text
    n_text: Natural = 4  # text-only blocks before them
    fuse_shift: int = 0  # moves the window from the bottleneck
    image_size: Size = 32  # side of the latent, in its own pixels
    channels: Size = 4  # of the latent
    patch_size: Size = 2
    width: Size = 512
    heads: Size = 8
    context_len: Size = 77  # L, text tokens
    context_dim: Size = 768  # E, width of the text features

    def __post_init__(self):
        Constants.__post_init__(self)
        if self.fusion == "early":
            self.n_image, self.n_fuse, self.n_text, self.fuse_shift = 0, self.depth, 0, 0
        self.depth = 2 * self.n_image + self.n_fuse
        side, patch, width, heads = self.image_size, self.patch_size, self.width, self.heads
        if self.depth % 2 == 0:
            raise UserError(f"{self.depth} blocks: expected an odd number (of depth or n_fuse).")
        if abs(self.fuse_shift) > self.n_image:
            raise UserError(f"fuse_shift={self.fuse_shift}: expected ±{self.n_image} at most.")
        if side % patch:
            raise UserError(f"patch_size={patch}: expected a divisor of the latent's side, {side}.")
        if width % heads or width % 4:
            raise UserError(f"width={width}: expected a multiple of 4 and of heads={heads}.")

    @property
    def window(self):  # the indices of the blocks that see the text
        first = self.n_image + self.fuse_shift
        return range(first, first + self.n_fuse)


class UViT(nn.Module):
    """U-ViT [U-ViT] with a window of blocks that see the text [IF]."""

    def __init__(self, config, init_std=0.02):
        super().__init__()
        self.config = config
        D, P, C, h = config.width, config.patch_size, config.channels, config.heads
        L, N, half = config.context_len, (config.image_size // P) ** 2, config.depth // 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(C, D, kernel_size=P, stride=P)})
        self.context_embed = nn.Linear(config.context_dim, D)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + L + N, D))  # time, text, image
        self.text_blocks = nn.ModuleList(Block(D, h) for _ in range(config.n_text))
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
        """The learned positions of (time, text, image), (1, 1, D), (1, L, D), (1, N, D)."""
        return self.pos_embed.tensor_split([1, 1 + self.config.context_len], dim=1)

    def encode_text(self, context: torch.Tensor) -> torch.Tensor:
        """The half that needs the text alone, context (B, L, E): run it once per prompt.
        Gives for concat text tokens (B, L, D), for cross_attention the keys and values of each
        block in the window (B, n_fuse, L, 2D)."""
        text = self.context_embed(context) + self.positions()[1]  # (B, L, D)
        for block in self.text_blocks:
            text = block(text)
        if self.config.conditioning == "concat":
            return text
        window = [self.stack[i] for i in self.config.window]
        return torch.stack([block.attn.keys_values(block.norm1(text)) for block in window], dim=1)

    def denoise(self, zt: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """zt (B, C, H, W), t (B,) in 1..1000, `encode_text`'s text -> predicted noise like zt."""
        time_pos, _, image_pos = self.positions()
        time = timestep_embedding(t, self.config.width)[:, None]    # (B, 1, D)
        image = self.patch_embed["proj"](zt).flatten(2).mT          # (B, N, D)
        x = torch.cat([time + time_pos, image + image_pos], dim=1)  # (B, 1+N, D)

        skips, middle = [], len(self.in_blocks)
        for i, block in enumerate(self.in_blocks):
            x = self.fuse(i, block, x, text)
            skips.append(x)                                         # for block depth-1-i
        x = self.fuse(middle, self.mid_block, x, text)
        for i, block in enumerate(self.out_blocks, start=middle + 1):
            x = block.merge(x, skips.pop())
            x = self.fuse(i, block, x, text)

        x = self.decoder_pred(self.norm(x[:, 1:]))                  # (B, N, P*P*C)
        return self.final_layer(self.unpatchify(x))                 # (B, C, H, W)

    def fuse(self, i, block, x, text):
        """Block i of the stack on x (B, 1+N, D); inside the window it also sees the text."""
        window = self.config.window
        if i not in window:
            return block(x)
        if self.config.conditioning == "cross_attention":
            return block(x, text[:, i - window.start])
        if i == window.start:
            x = torch.cat([x, text], dim=1)                         # (B, 1+N+L, D) text enters
        x = block(x)
        if i == window.stop - 1:
            x = x[:, :-text.shape[1]]                               # (B, 1+N, D) text leaves
        return x

    def unpatchify(self, x):
        """(B, N, P*P*C) -> (B, C, H, W); the order in a patch is row, column, channel [U-ViT]."""
        side, P = math.isqrt(x.shape[1]), self.config.patch_size
        x = x.unflatten(2, (P, P, -1)).unflatten(1, (side, side))  # (B, H/P, W/P, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def forward(self, zt: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """zt (B, C, H, W), t (B,) in 1..1000, context (B, L, E) -> predicted noise (B, C, H, W)."""
        return self.denoise(zt, t, self.encode_text(context))

    @torch.no_grad()
    def init_sincos_positions(self):
        """Image positions start as waves, still learned: a short run then draws whole shapes."""
        side, D = self.config.image_size // self.config.patch_size, self.config.width
        wavelength = torch.logspace(2, math.log2(2 * side), D // 4, base=2)
        angle = 2 * math.pi * torch.arange(side)[:, None] / wavelength  # (side, D/4)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D/2)
        rows, columns = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)  # (N, D/2)
        self.positions()[2].copy_(torch.cat([rows, columns], dim=1))  # (1, N, D)


def count_multiply_adds(config):
    """Multiply-adds per image of (encode_text, denoise). One is two FLOPs; papers call it one."""
    with torch.device("meta"):  # computes nothing
        net, t = UViT(config), torch.empty(1)
        zt = torch.empty(1, config.channels, config.image_size, config.image_size)
        context = torch.empty(1, config.context_len, config.context_dim)
    with FlopCounterMode(display=False) as once:
        text = net.encode_text(context)
    with FlopCounterMode(display=False) as each_step:
        net.denoise(zt, t, text)
    return once.get_total_flops() // 2, each_step.get_total_flops() // 2


# ---- 4. devices ----
def choose_device():
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device, name="auto"):
    """The fastest safe type for matrix products: bfloat16 where the device computes in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16  # twice as fast; else slower
    return torch.float32


def autocast(device, precision=None):
    """Matrix products in `precision`; norms, softmax, residuals and weights stay float32."""
    precision = precision or choose_precision(device)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


# ---- 5. files ----
class UserError(ValueError):
    """A mistake of the user: the message says what was given, what was expected and what to do."""


@contextmanager
def reading(path, expected):
    """The gate of a file: whatever is wrong inside leaves as one UserError that names it."""
    try:
        if not Path(path).is_file():  # a pipe would wait for ever
            what = "is not a file" if Path(path).exists() else "is missing"
            raise UserError(f"{path} {what}: expected {expected}.")
        yield
    except UserError as error:
        known = str(path) in str(error)
        raise error if known else UserError(f"{path}: {error}") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied.") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise UserError(f"{path} is damaged, or not {expected} ({reason}).") from None


@contextmanager
def writing(path, mode="wb"):
    """A file that appears whole, under its name, when the block ends, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # a killed writer's goes
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with writing(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


@contextmanager
def one_writer(folder, wait=False):
    """Hold SQLite's lock of a file in a folder, which works anywhere and dies with its process."""
    path = Path(folder, ".lock")
    path.touch()  # or why it can't be
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as lock:
        while not lock.in_transaction:
            try:  # in memory: a kill leaves no journal
                lock.executescript("PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                if not wait:
                    raise UserError(f"another process is writing {folder}: wait for it.") from None
                print(f"waiting for the other process that writes {folder} ...")
                lock.execute("PRAGMA busy_timeout = 3000")  # in which Ctrl-C waits, too
        yield


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    data, tensors = bytearray(Path(path).read_bytes()), {}
    start = 8 + int.from_bytes(data[:8], "little")
    content = torch.frombuffer(data, dtype=torch.uint8)[start:]
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = content[begin:end].clone().view(types[entry["dtype"]])
            tensors[name] = part.reshape(entry["shape"])
    return tensors


def read_weights(path):
    """The dict in a torch or .safetensors file, told apart by content. Nothing in it can run."""
    with reading(path, "a file of weights"):
        with open(path, "rb") as file:
            start = file.read(64)
        if start[8:9] == b"{":
            return read_safetensors(path)
        if start.lstrip().startswith((b"<", b"version https://git-lfs")):
            raise UserError("this is HTML or a git-LFS pointer: fetch the file itself.")
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # checksums
            raise UserError("the file is damaged: take another copy of it.")
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:  # it advises to trust the file
            raise TypeError("not of torch.save(state_dict), or more than weights") from None


def find_weights(description, folder, what):
    """The weight file of `what` in `folder`, or UserError; a "sha256" of None is not checked."""
    path, known = Path(folder, description["file"]), description.get("sha256")
    if not path.is_file():
        path = Path(folder, path.name)  # if it was a path elsewhere
    expected = f"{what} of the data, of SHA-256 {known} (see assets/files.json)"
    with reading(path, expected):
        if known and sha256(path) != known:
            raise UserError(f"{path} has another SHA-256: expected {expected}.")
    return path


def load_frozen(module, state):
    """The module with all of `state`, which must fit, for evaluation."""
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def weights_sha256(module):
    """SHA-256 over the names and the float32 values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- 6. checkpoints ----
CHECKPOINT_FORMAT = "midfuse-2"


def read_checkpoint(path):
    """A checkpoint of train.py, or the official U-ViT weights: a dict that describes itself."""
    expected = "a checkpoint of train.py, such as out/shapes/last.pt, or mscoco_uvit_small.pth"
    with reading(path, expected):
        state = read_weights(path)
        if "pos_embed" in state:
            return describe_official(state)
        if state.get("format") != CHECKPOINT_FORMAT:
            raise UserError(f"this is not {expected}, or of another version of this code.")
        return state | {"uvit": UViTConfig(**state["uvit"])}


def describe_official(state):
    """The official mscoco_uvit_small.pth, a flat state dict; its shapes give the architecture."""
    D, C, P, _ = state["patch_embed.proj.weight"].shape
    L, E = 77, state["context_embed.weight"].shape[1]
    side = P * math.isqrt(state["pos_embed"].shape[1] - 1 - L)
    half = len({key.split(".")[1] for key in state if key.startswith("in_blocks.")})
    config = UViTConfig("early", "concat", depth=2 * half + 1, image_size=side, channels=C,
                        patch_size=P, width=D, heads=D // 64, context_len=L, context_dim=E)
    autoencoder = {"kind": "kl", "file": "kl-f8.bin"}
    tower = {"kind": "clip", "file": "clip-vit-large-patch14.bin"}
    meta = dict(dataset="coco", image_size=8 * side, autoencoder=autoencoder, text_tower=tower)
    return {"uvit": config, "ema": state, "step": 1_000_000, "null_context": None, "meta": meta,
            "autoencoder": {}, "latent_scale": 0.23010}  # its own sampler takes 0.18215, wrongly


# ---- 7. command line ----
@dataclasses.dataclass
class Constants:
    """The base of each script's Config, whose constants are checked when one is made."""

    def __post_init__(self):
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                setattr(self, name, convert(value, hint))
            except ValueError as error:
                raise UserError(f"--{name}={value!s:.100}: expected {error}.") from None


def convert(value, hint):
    """A value, or the text of one, as `hint` declares it; ValueError says what is expected."""
    options = get_args(hint)
    if type(None) in options:
        return None if value in (None, "None") else convert(value, options[0])
    if get_origin(hint) is Literal or hint is bool:
        names = {str(option): option for option in options or (True, False)}
        if str(value) not in names:
            raise ValueError(" or ".join(names))
        return names[str(value)]
    kind, *limits = options or [hint]
    if kind is str:
        if not isinstance(value, str) or re.search("[\0\ud800-\udfff]", value):
            raise ValueError("text in UTF-8")
        return os.path.expanduser(value) if limits else value
    low, high = limits or (-10 ** 9, 10 ** 9)
    try:
        number = kind(str(value))
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        name = "whole number" if kind is int else "number"
        raise ValueError(f"a {name} from {low:,} to {high:,}")
    return number


def parse_arguments(Config, arguments):
    """The dataclass `Config` with `--key=value` or `--key value` applied; raises UserError."""
    def fail(message):
        raise UserError(f"{message} (--help lists all constants).")
    parser = ArgumentParser(allow_abbrev=False, add_help=False, argument_default=SUPPRESS)
    parser.error = fail
    hints = get_type_hints(Config)
    for name, hint in hints.items():
        alone = {"nargs": "?", "const": True} if hint is bool else {}  # --resume alone
        parser.add_argument(f"--{name}", action="append", **alone)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        def likeness(name):  # --lr is --learning_rate
            key = unknown[0].partition("=")[0].strip("-")
            initials = "".join(word[:1] for word in name.split("_"))
            return key == initials, difflib.SequenceMatcher(None, key, name).ratio()
        fail(f"{unknown[0]!r:.100} is no constant: did you mean --{max(hints, key=likeness)}?")
    for name, values in vars(given).items():
        if len(values) > 1:
            raise UserError(f"--{name} is given {len(values)} times: leave only one of them.")
    return Config(**{name: value for name, [value] in vars(given).items()})


def run(main, Config: type):
    """Run one script: parse its command line, call `main(config)`, answer a mistake in one line."""
    for stream in (sys.stdout, sys.stderr):  # a log is never behind
        stream.reconfigure(line_buffering=True, errors="replace")
    try:
        if {"--help", "-h"} & {*sys.argv}:
            constants = inspect.getsource(Config).partition("\n\n")[0]
            return print(f"{inspect.getmodule(Config).__doc__}\nEdit a constant in the file, or "
                         f"override it with --key=value:\n\n{constants}")
        main(parse_arguments(Config, sys.argv[1:]))
    except (UserError, FloatingPointError) as error:
        sys.exit(" ".join(f"error: {error}".split()))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # as by `head`
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        sys.exit("error: out of memory: halve --batch_size (train.py: double --grad_accum, for "
                 f"the same steps), or take a smaller model ({error!r:.80})")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}.")


def command(script, config, **changes):
    """The command line of a configuration: what differs from the constants in the file."""
    config = dataclasses.replace(config, **changes)
    differs = [f"--{field.name}={value}" for field in dataclasses.fields(config)
               if (value := getattr(config, field.name)) != field.default]
    return shlex.join(["python", script, *differs])
