"""Caption -> tokens -> features: CLIP's tokenizer and text tower.

    "two red circles"                                 a caption of any length
     -> [49406, 1237, 736, 14040, 49407, 49407, ...]  77 token ids: start is 49406, end is 49407
     -> features (B, 77, E), pooled (B, projection)

The tokenizer is OpenAI's byte-pair encoding. Clean the text, split it into words with one pattern,
spell every word in bytes (each shown as a printable character), then merge neighbours: always the
pair that stands first in a table of 48,894 merges. A token id is a place in a list: 256 bytes, the
same bytes at the end of a word, the 48,894 merges, start, end. Padding is the end token, as in
U-ViT and Stable Diffusion; a caption that is too long is truncated and keeps its end token.

The tower is a transformer with a causal mask. U-ViT and the paper condition on its features after
the final layer norm, at all 77 positions. The pooled feature (at the end token, projected) is what
the CLIP score compares with an image's.

Its architecture is read off the weights, in OpenAI's own files or Hugging Face's. The shapes have a
stand-in, `random_clip_text`: the same class, small, randomly initialised, never trained.

[CLIP] arXiv 2103.00020. assets/bpe_simple_vocab_16e6.txt.gz is OpenAI's merge table (MIT), as
shipped by open_clip_torch.
"""
import gzip
import hashlib
import html
import itertools
from collections import OrderedDict
from functools import cache
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn

from model import UserError, find_encoder, load_strictly, read_weights

CONTEXT_LEN = 77            # L, tokens of a caption, start and end included
VOCABULARY = 49408
START, END = 49406, 49407
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


# ---- 1. tokenizer ----

# The special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                     r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_characters() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in the order of the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """(token -> id, pair -> rank among the merges)."""
    table = MERGES.read_bytes()
    if hashlib.sha256(table).hexdigest() != MERGES_SHA256:
        raise RuntimeError(f"{MERGES} is damaged: its SHA-256 is not {MERGES_SHA256}. "
                           "Restore it from the repository.")
    lines = gzip.decompress(table).decode().split("\n")[1:VOCABULARY - 512 - 2 + 1]    # 0: a header
    merges = [tuple(line.split()) for line in lines]
    characters = list(byte_characters().values())
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), *SPECIAL]
    return {token: i for i, token in enumerate(tokens)}, {pair: i for i, pair in enumerate(merges)}


@cache
def encode_word(word: str) -> list[int]:
    """The token ids of one word: merge the pair of the lowest rank until none is in the table."""
    ids, ranks = vocabulary()
    if word in SPECIAL:
        return [ids[word]]
    characters = byte_characters()
    parts = [characters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        for i in range(len(parts)):             # merge all its occurrences, from left to right
            if tuple(parts[i:i + 2]) == best:
                parts[i:i + 2] = ["".join(best)]
    return [ids[part] for part in parts]


def encode(caption: str) -> list[int]:
    """Token ids of a caption, without start and end, of any length."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption))).lower()
    return [i for word in WORD.findall(text) for i in encode_word(word)]


def tokenize(captions: list[str], length: int = CONTEXT_LEN) -> torch.Tensor:
    """Captions -> (B, length) int64, padded with the end token, which truncated ones keep."""
    begun = [[START, *encode(caption)][:length - 1] for caption in captions]
    rows = [ids + [END] * (length - len(ids)) for ids in begun]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), length)


def count_truncated(captions: list[str], length: int = CONTEXT_LEN) -> int:
    """How many of the captions `tokenize` cuts short."""
    return sum(len(encode(caption)) + 2 > length for caption in captions)


# ---- 2. text tower ----

class QuickGELU(nn.Module):
    """CLIP was trained with this approximation; the exact GELU would give other features."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class CLIPBlock(nn.Module):
    """The pre-norm transformer block of both towers, with OpenAI's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(),
                                             c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask=None):            # (B, L, width), (L, L) or None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class CLIPTransformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(CLIPBlock(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class CLIPText(nn.Module):
    """The text tower. The paper's, of ViT-L/14: width 768, 12 layers, 12 heads, projection 768."""

    def __init__(self, width: int, layers: int, heads: int, projection: int,
                 context_len: int = CONTEXT_LEN, vocabulary_size: int = VOCABULARY):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_len, width))
        self.transformer = CLIPTransformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, projection))
        mask = torch.full((context_len, context_len), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)    # causal: no token sees a later one

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L) -> features (B, L, width) after the final norm, pooled (B, projection)."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]        # (B, L, width)
        x = self.ln_final(self.transformer(x, self.mask[:L, :L]))
        end = tokens.argmax(dim=-1)             # the first end token: it has the highest id
        return x, x[torch.arange(len(x)), end] @ self.text_projection


def random_clip_text(seed: int, context_len: int) -> CLIPText:
    """A small text tower with random weights, a function of `seed`: the stand-in for the shapes.

    Embeddings outweigh what the untrained blocks add, so that a feature still tells its own word
    from others. All machines give the same bits: torch's normal numbers differ between kinds of
    CPU, but its uniform ones have 24 bits, and a range of a power of two rounds none of them away.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):     # torch's layers draw from the global generator
        tower = CLIPText(width=64, layers=2, heads=2, projection=64, context_len=context_len)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:               # the weights of layer norms are 1
            bound = {"token_embedding.weight": 2, "positional_embedding": 1}.get(name, 1 / 8)
            nn.init.uniform_(parameter, -bound, bound, generator)
    return tower.eval().requires_grad_(False)


# ---- 3. weight files ----

RENAMED = {     # parts of Hugging Face's names -> OpenAI's, replaced in this order
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.": "", "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.", "text_projection.weight": "text_projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.": "visual.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",             # the typo is in the files
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.", "visual_projection.weight": "visual.proj",
    ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj."}
NOT_WEIGHTS = ("position_ids", "input_resolution", "context_length", "vocab_size", "logit_scale")


def openai_names(state: dict) -> dict:
    """The weights of both towers of a CLIP file, Hugging Face's or OpenAI's, by OpenAI's names."""
    named = {}
    for key, tensor in state.items():
        name = key
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        named[name] = tensor.T if key.endswith("_projection.weight") else tensor
    for query in [name for name in named if ".attn.q_proj." in name]:
        parts = [query.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in named for part in parts):
            named[query.replace("q_proj.", "in_proj_")] = torch.cat([*map(named.pop, parts)])
    return {key: tensor for key, tensor in named.items() if key.split(".")[-1] not in NOT_WEIGHTS}


def read_tower(path: str | Path, tower: str, needed: list[str]) -> tuple[dict, dict]:
    """The weights of a CLIP file's "text" or "image" tower and its sizes, {width, layers, heads}.

    UserError if one of the `needed` weights, off which sizes are read, is not there.
    """
    weights = openai_names(read_weights(path))
    state = {name.removeprefix("visual."): tensor for name, tensor in weights.items()
             if name.startswith("visual.") == (tower == "image")}
    for name in needed:
        if name not in state:
            raise UserError(f"{path} holds no CLIP {tower} tower: there is no {name}. Expected "
                            "OpenAI's archive (ViT-L-14.pt) or Hugging Face's pytorch_model.bin.")
    width = state["positional_embedding"].shape[1]
    if width % 64:
        raise UserError(f"{path}: its {tower} tower has width {width}; expected a multiple of 64, "
                        "the width of a CLIP head.")
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    return state, {"width": width, "layers": layers, "heads": width // 64}


def load_clip_text(path: str | Path) -> CLIPText:
    """The text tower of OpenAI's archive or Hugging Face's file, of any size, in float32.

    A file of the text tower alone (Stable Diffusion's) has no projection: pooled is then (B, 0).
    No file says which GELU it was trained with: another CLIP (LAION's) may load and be wrong.
    """
    state, sizes = read_tower(path, "text", ["token_embedding.weight", "positional_embedding"])
    state.setdefault("text_projection", torch.empty(sizes["width"], 0))
    net = CLIPText(**sizes, projection=state["text_projection"].shape[1],
                   context_len=len(state["positional_embedding"]),
                   vocabulary_size=len(state["token_embedding.weight"]))
    return load_strictly(net, state, path).eval().requires_grad_(False)


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the names and the float32 values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_text_tower(description: dict, folder: str | Path) -> CLIPText:
    """The very text tower that a data cache or a checkpoint was made with, or UserError.

    `description`, its meta["text_tower"], is {"kind": "random", "seed", "context_len", "sha256"},
    which is drawn anew, or {"kind": "clip", "file", "sha256"}, a file in `folder`.
    """
    if description["kind"] == "random":
        tower = random_clip_text(description["seed"], description["context_len"])
        if weights_sha256(tower) != description["sha256"]:
            raise UserError(f"torch {torch.__version__} draws other random numbers for the text "
                            "tower than the torch that the cache or checkpoint was made with; "
                            "install the version in requirements.txt.")
        return tower
    return load_clip_text(find_encoder(description, folder, "the text tower"))
