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
the final layer norm, at all 77 positions; the CLIP score compares the pooled feature (at the end
token, projected) with an image's. The shapes have a stand-in, small, random, never trained.

Three parts: 1 tokenizer, 2 text tower, 3 weight files.
[CLIP] arXiv 2103.00020; the merge table in assets/ is OpenAI's (MIT), as open_clip_torch ships it
"""
import gzip
import hashlib
import html
import itertools
import pickle
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ftfy
import regex
import torch
import torch.nn as nn

from model import UserError, find_weights, load_strictly, read_weights, reading

CONTEXT_LEN = 77            # L, tokens of a caption, start and end included
VOCABULARY = 49408
START, END = 49406, 49407
LONGEST = 2000              # characters of a caption: more than 77 tokens can hold
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"


# ---- 1. tokenizer ----

# The special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                     r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def tokenize(captions: list[str], length: int = CONTEXT_LEN) -> torch.Tensor:
    """Captions -> (B, length) int64, padded with the end token, which truncated ones keep."""
    tokens = torch.full((len(captions), length), END)
    for row, caption in zip(tokens, captions):
        ids = [START, *encode(caption)][:length - 1]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def count_truncated(captions: list[str], length: int = CONTEXT_LEN) -> int:
    """How many of the captions `tokenize` cuts short."""
    return sum(len(encode(caption)) + 2 > length for caption in captions)


def encode(caption: str) -> list[int]:
    """Token ids of a caption, without start and end; of a very long one, of its beginning."""
    text = ftfy.fix_text(caption[:LONGEST])
    text = html.unescape(html.unescape(text)).lower()           # &amp;lt; -> <, as OpenAI does
    return [i for word in WORD.findall(text) for i in encode_word(word)]


@cache
def encode_word(word: str) -> list[int]:
    """The token ids of one word: merge the pair of the lowest rank until none is in the table."""
    characters, ids, ranks = vocabulary()
    if word in SPECIAL:
        return [ids[word]]
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


@cache
def vocabulary() -> tuple[dict[int, str], dict[str, int], dict[tuple[str, str], int]]:
    """(byte -> a printable character, token -> id, pair -> rank among the merges)."""
    with reading(MERGES, "OpenAI's merge table, which comes with this repository"):
        lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48_895]]      # 0 is a header
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [*characters.values(), *(character + "</w>" for character in characters.values())]
    tokens += ["".join(pair) for pair in merges] + SPECIAL
    ids = {token: i for i, token in enumerate(tokens)}
    return characters, ids, {pair: i for i, pair in enumerate(merges)}


# ---- 2. text tower ----

class CLIPBlock(nn.Module):
    """The pre-norm transformer block of both towers, with OpenAI's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width),
                                  "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):            # (B, L, width), (L, L) or None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        y = y * torch.sigmoid(1.702 * y)        # QuickGELU: the exact GELU gives other features
        return x + self.mlp["c_proj"](y)


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

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L) -> features (B, L, width) after the final norm, pooled (B, projection)."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]        # (B, L, width)
        mask = x.new_full((L, L), float("-inf")).triu(1)        # no token sees a later one
        x = self.ln_final(self.transformer(x, mask))
        end = tokens.argmax(dim=-1)             # the first end token: it has the highest id
        return x, x[torch.arange(len(x)), end] @ self.text_projection


@torch.no_grad()
def encode_captions(tower: CLIPText, captions: list[str],
                    length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> features (B, length, E), pooled (B, projection), in float32."""
    device = tower.positional_embedding.device
    tokens = tokenize(captions, length).to(device)
    with torch.autocast(device.type, enabled=False):
        features, pooled = zip(*[tower(part) for part in tokens.split(64)])
    return torch.cat(features), torch.cat(pooled)


def random_clip_text(seed: int, context_len: int) -> CLIPText:
    """A small text tower with random weights, a function of `seed`: the stand-in for the shapes.

    Embeddings outweigh what the untrained blocks add: a feature still tells its word from others.
    Uniform numbers of 24 bits, in a range of a power of two, are the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):     # torch's layers draw from the global generator
        tower = CLIPText(width=64, layers=2, heads=2, projection=64, context_len=context_len)
    bounds = {"token_embedding.weight": 2, "positional_embedding": 1}
    for name, parameter in tower.named_parameters():
        bound = bounds.get(name, 1 / 8)
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:               # the weights of layer norms are 1
            nn.init.uniform_(parameter, -bound, bound, generator)
    return tower.eval().requires_grad_(False)


# ---- 3. weight files ----

CLIP_FILE = "CLIP's weights (OpenAI's ViT-L-14.pt, Hugging Face's .bin or .safetensors)"
NOT_WEIGHTS = ("position_ids", "input_resolution", "context_length", "vocab_size", "logit_scale")
RENAMED = {     # parts of Hugging Face's names -> OpenAI's, replaced in this order
    "text_model.": "", "vision_model.": "visual.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.", "embeddings.": "",
    "encoder.layers.": "transformer.resblocks.", "self_attn.": "attn.",
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "fc1.": "c_fc.", "fc2.": "c_proj.",
    "final_layer_norm.": "ln_final.", "post_layernorm.": "ln_post.",
    "pre_layrnorm.": "ln_pre.",                 # the typo is in the files
    "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def load_clip_text(path: str | Path) -> CLIPText:
    """The text tower of OpenAI's archive or Hugging Face's file, of any size, in float32.

    A file of the text tower alone (Stable Diffusion's) has no projection: pooled is then (B, 0).
    No file says which GELU it was trained with: another CLIP (LAION's) may load and be wrong.
    """
    state, sizes = read_tower(path, "text", ["token_embedding.weight", "positional_embedding"])
    state.setdefault("text_projection", torch.empty(sizes["width"], 0))
    with reading(path, CLIP_FILE):
        net = CLIPText(**sizes, projection=state["text_projection"].shape[1],
                       context_len=len(state["positional_embedding"]),
                       vocabulary_size=len(state["token_embedding.weight"]))
    return load_strictly(net, state, path).eval().requires_grad_(False)


def read_tower(path: str | Path, tower: str, needed: list[str]) -> tuple[dict, dict]:
    """The weights of a CLIP file's "text" or "image" tower and its sizes, {width, layers, heads}.

    The `needed` weights, off which sizes are read, are matrices (or more), or else UserError.
    """
    with reading(path, CLIP_FILE):
        weights = openai_names(read_openai_archive(path) or read_weights(path))
        state = {name.removeprefix("visual."): tensor for name, tensor in weights.items()
                 if name.startswith("visual.") == (tower == "image")}
        for name in needed:
            if name not in state or state[name].ndim < 2:
                raise UserError(f"{path} holds no {tower} tower of CLIP: {name} is missing.")
        width = state["positional_embedding"].shape[1]
        if width % 64:                          # the width of a head of CLIP
            raise UserError(f"{path}: the {tower} tower's width {width} is no multiple of 64.")
        layers = {key.split(".")[2] for key in state if key.startswith("transformer.")}
    return state, {"width": width, "layers": len(layers), "heads": width // 64}


def openai_names(state: dict) -> dict:
    """The weights of both towers of a CLIP file, Hugging Face's or OpenAI's, by OpenAI's names."""
    named = {}
    for key, tensor in state.items():
        name = key
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if name.split(".")[-1] not in NOT_WEIGHTS:
            named[name] = tensor.T if key.endswith("_projection.weight") else tensor
    for query in [name for name in named if "q_proj" in name]:
        parts = [named.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        named[query.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return named


def read_openai_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in OpenAI's archive, a TorchScript program, of which nothing is run.

    NAME/data.pkl is a tree of modules, NAME/data/KEY the bytes of a tensor. {} for other files.
    """
    def rebuild_tensor(storage, start, size, stride, *_):
        return storage.as_strided(size, stride, start)

    known = {"HalfStorage": torch.float16, "FloatStorage": torch.float32,
             "LongStorage": torch.int64, "OrderedDict": dict,
             "_rebuild_tensor_v2": rebuild_tensor}

    class Reader(pickle._Unpickler):        # in Python: that in C can be made to fill the memory
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return SimpleNamespace      # an object without behaviour
            return known[name]              # a KeyError if it is not part of CLIP

        def persistent_load(self, reference):           # "storage", dtype, key, device, length
            data = archive.read(f"{folder}/data/{reference[2]}")        # checks their CRC
            return torch.frombuffer(bytearray(data), dtype=reference[1])

    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else [""]
    folder = names[0].split("/")[0]
    if f"{folder}/constants.pkl" not in names:
        return {}
    with zipfile.ZipFile(path) as archive:
        modules = [("", Reader(archive.open(f"{folder}/data.pkl")).load())]
    state = {}
    for prefix, module in modules:                  # the list grows on the way
        for name, value in vars(module).items():
            if isinstance(value, SimpleNamespace):
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, torch.Tensor):
                state[prefix + name] = value
        vars(module).clear()                        # a tree that contains itself has an end
    return state


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the names and the float32 values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_text_tower(description: dict, folder: str | Path) -> CLIPText:
    """The very text tower that a data cache or a checkpoint was made with, or UserError.

    `description`, its meta["text_tower"], is {"kind": "random", "seed", "context_len", "sha256"},
    which is drawn again, or {"kind": "clip", "file", "sha256"}, a file in `folder`.
    """
    if description["kind"] == "clip":
        return load_clip_text(find_weights(description, folder, "the text tower"))
    tower = random_clip_text(description["seed"], description["context_len"])
    if weights_sha256(tower) != description["sha256"]:
        raise UserError(f"torch {torch.__version__} draws other random numbers for the text tower "
                        "than when the data was prepared: install that of requirements.txt.")
    return tower
