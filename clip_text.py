"""Caption -> tokens -> features: CLIP's tokenizer and text tower.

    "two red circles"                                 a caption of any length
     -> [49406, 1237, 736, 19411, 49407, 49407, ...]  77 token ids: start is 49406, end is 49407
     -> features (B, 77, E), pooled (B, projection)

The tokenizer is OpenAI's byte-pair encoding. Clean the text, split it into words with one pattern,
spell every word in bytes, then merge neighbours: always the pair that stands first in a table of
48,894 merges. A token id is a place in a list: 256 bytes, the same at a word's end, the merges,
start, end. Padding is the end token, as in Stable Diffusion; truncated captions keep theirs.

The tower is a transformer with a causal mask. U-ViT and the paper condition on its features after
the final layer norm, at all 77 positions; the CLIP score compares the pooled feature (at the end
token, projected) with an image's. The shapes have a stand-in, small, random, never trained.
[CLIP] arXiv 2103.00020; the merge table is OpenAI's (MIT), as open_clip_torch ships it
"""
import gzip
import html
import pickle
import zipfile
from functools import cache
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn

from model import UserError, find_weights, load_frozen, read_weights, reading, weights_sha256

CONTEXT_LEN = 77  # L, tokens, start and end included
START, END = 49406, 49407
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
MERGES = Path(__file__).parent / "assets/bpe_simple_vocab_16e6.txt.gz"


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


def count_truncated(captions, length=CONTEXT_LEN):
    """How many of the captions `tokenize` cuts short."""
    return sum(len(encode(caption)) + 2 > length for caption in captions)


def encode(caption):
    """Token ids, without start and end, of 2,000 characters: more than 77 tokens can hold."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption[:2000])))
    return sum(map(encode_word, WORD.findall(text.lower())), [])


@cache
def encode_word(word):
    """Token ids of one word: merge the pair of the lowest rank until none is in the table."""
    characters, ids, ranks = vocabulary()
    if word in SPECIAL:
        return [ids[word]]
    parts = [characters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while pairs := ranks.keys() & zip(parts, parts[1:]):
        best = min(pairs, key=ranks.get)
        for i in range(len(parts)):
            if tuple(parts[i:i + 2]) == best:
                parts[i:i + 2] = ["".join(best)]
    return [ids[part] for part in parts]


@cache
def vocabulary():
    """(byte -> a printable character, token -> id, pair -> rank among the merges)."""
    with reading(MERGES, "OpenAI's merge table"):
        lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    ranks = {tuple(line.split()): i for i, line in enumerate(lines[1:48_895])}
    printable = [i for i in range(33, 256) if chr(i).isprintable()]
    others = sorted(set(range(256)) - set(printable))
    characters = dict(zip(printable + others, map(chr, [*printable, *range(256, 324)])))
    tokens = list(characters.values())
    tokens += [letter + "</w>" for letter in tokens]
    tokens += ["".join(pair) for pair in ranks] + SPECIAL
    return characters, {token: i for i, token in enumerate(tokens)}, ranks


# ---- 2. text tower ----
class CLIPBlock(nn.Module):
    """The pre-norm block of both towers, with QuickGELU: the exact GELU gives other features."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width),
                                  "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):  # (B, L, width), (L, L) or None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        y = y * torch.sigmoid(1.702 * y)
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

    def __init__(self, width, layers, heads, projection, context_len=CONTEXT_LEN,
                 vocabulary_size=49408):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_len, width))
        self.transformer = CLIPTransformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, projection))

    def forward(self, tokens: torch.Tensor):
        """Tokens (B, L) -> features (B, L, width) after the final norm, pooled (B, projection)."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        mask = x.new_full((L, L), -torch.inf).triu(1)  # no token sees a later one
        x = self.ln_final(self.transformer(x, mask))  # (B, L, width)
        end = tokens.argmax(dim=-1)  # the first: no id is higher
        return x, x[torch.arange(len(x)), end] @ self.text_projection


@torch.no_grad()
def encode_captions(tower, captions, length):
    """Captions -> features (B, length, E), pooled (B, projection), in float32."""
    tokens = tokenize(captions, length).to(tower.positional_embedding.device)
    with torch.autocast(tokens.device.type, enabled=False):
        parts = [tower(part) for part in tokens.split(64)]
    return tuple(map(torch.cat, zip(*parts)))


def random_clip_text(seed, context_len):
    """The stand-in for the shapes: a small text tower with random weights, a function of `seed`."""
    # Uniform numbers of 24 bits, in a range of a power of two, are the same on every machine
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw, too
        tower = CLIPText(64, 2, 2, 64, context_len)
    # Embeddings outweigh what the untrained blocks add: a feature still tells its word
    bounds = {"token_embedding.weight": 2, "positional_embedding": 1}
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 2:
            bound = bounds.get(name, 1 / 8)
            nn.init.uniform_(parameter, -bound, bound, generator)
        elif name.endswith("bias"):  # norms' weights are 1
            nn.init.zeros_(parameter)
    return tower.eval().requires_grad_(False)


# ---- 3. weight files ----
RENAMED = {  # Hugging Face's names -> OpenAI's
    "text_model.": "", "vision_model.": "visual.", "embeddings.": "",
    "position_embedding.weight": "positional_embedding", "patch_embedding": "conv1",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn",
    "fc1": "c_fc", "fc2": "c_proj", "final_layer_norm": "ln_final", "layer_norm": "ln_",
    "post_layernorm": "ln_post", "pre_layrnorm": "ln_pre",  # their typo
    "_projection.weight": "_projection", "visual_projection": "visual.proj"}


def load_clip_text(path: str | Path) -> CLIPText:
    """The text tower of OpenAI's archive or Hugging Face's file, of any size, in float32."""
    # No file says which GELU it was trained with: another CLIP (LAION's) may load and be wrong
    with reading(path, "a CLIP model with a text tower, OpenAI's or Hugging Face's"):
        state, sizes = read_tower(path, "text")
        # That of Stable Diffusion has no projection: pooled is then (B, 0)
        state.setdefault("text_projection", torch.empty(sizes["width"], 0))
        net = CLIPText(**sizes, projection=state["text_projection"].shape[-1],
                       context_len=len(state["positional_embedding"]),
                       vocabulary_size=len(state["token_embedding.weight"]))
        return load_frozen(net, state)


def read_tower(path, tower):
    """The weights, by OpenAI's names, and the sizes of a file's "text" or "image" tower."""
    state = {}
    for name, tensor in (read_openai_archive(path) or read_weights(path)).items():
        if name.endswith("_projection.weight"):
            tensor = tensor.T
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        is_weight = tensor.ndim and tensor.is_floating_point()
        if is_weight and name.startswith("visual.") == (tower == "image"):
            state[name.removeprefix("visual.")] = tensor
    for query in [name for name in state if "q_proj" in name]:
        parts = [state.pop(query.replace("q_", f"{x}_")) for x in "qkv"]
        state[query.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    layers = {name.split(".")[2] for name in state if "resblocks" in name}
    width = state["positional_embedding"].shape[1]
    if width % 64:  # width of a head
        raise ValueError(f"a width of {width}, no multiple of 64")
    return state, {"width": width, "layers": len(layers), "heads": width // 64}


def read_openai_archive(path):
    """The weights in OpenAI's archive, a TorchScript program, none of which is run, or {}."""
    class Module(dict):  # of tensors; data.pkl is a tree of these
        def __setstate__(self, attributes):
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor):
                    self[name] = value
                elif isinstance(value, Module):  # moved: no tree is endless
                    self.update({f"{name}.{key}": value.pop(key) for key in list(value)})

    known = {"HalfStorage": torch.float16, "FloatStorage": torch.float32,
             "LongStorage": torch.int64, "OrderedDict": dict,
             "_rebuild_tensor_v2": lambda storage, start, size, stride, *_:
                 storage.as_strided(size, stride, start)}

    class Reader(pickle._Unpickler):  # C's may fill the memory
        def find_class(self, module, name):
            return Module if module.startswith("__torch__") else known[name]

        def persistent_load(self, reference):
            _, dtype, key, *_ = reference
            data = archive.read(f"{folder}/data/{key}")
            return torch.frombuffer(bytearray(data), dtype=dtype)

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            folder = archive.namelist()[0].split("/")[0]
            if f"{folder}/constants.pkl" in archive.namelist():
                return Reader(archive.open(f"{folder}/data.pkl")).load()
    return {}


def load_text_tower(description, folder):
    """The tower that meta["text_tower"] describes, a file in `folder` or drawn again; UserError."""
    if description["kind"] == "clip":
        return load_clip_text(find_weights(description, folder, "the text tower"))
    tower = random_clip_text(description["seed"], description["context_len"])
    if weights_sha256(tower) != description["sha256"]:
        raise UserError("this torch draws another random text tower: install requirements.txt.")
    return tower
