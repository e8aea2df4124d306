"""Protects what captions become: token ids, CLIP's features from every file, never a program."""
import hashlib
import html
import os
import pickle
import random
import re
import unicodedata
import zipfile
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies
from PIL import Image
from safetensors.torch import save_file
from transformers import (CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection,
                          CLIPTokenizer)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import clip_text
import evaluate
from clip_text import (CLIPText, count_truncated, encode, encode_captions, load_clip_text,
                       load_text_tower, random_clip_text, read_openai_archive, tokenize,
                       weights_sha256)
from evaluate import load_clip_image
from model import UserError

TEXT = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1,
            projection_dim=32)
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
              projection_dim=32, image_size=48, patch_size=16)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight, bias and norm at random: what starts at zero or one would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            noise = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        elif "embedding" not in name:
            noise = 2 * noise / tensor[0].numel() ** 0.5
        tensor.data = noise
    return module.eval()


def reference_clip(**text) -> CLIPModel:
    """A small CLIP of Hugging Face's, both towers at random."""
    config = CLIPConfig(text_config=TEXT | text, vision_config=VISION, projection_dim=32)
    return randomise(CLIPModel(config))


def hub_state(reference: CLIPModel) -> dict:
    """The state dict as the hub's files have it: with the integer `position_ids` of their time."""
    state = dict(reference.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    return state


def openai_state(reference: CLIPModel) -> dict:
    """The same weights as OpenAI's archive has them: its names, its float16, its three scalars.

    Written apart from `read_tower`, the other way round: from OpenAI's name to the reference's.
    """
    theirs = reference.state_dict()
    text, vision = "text_model.embeddings.", "vision_model.embeddings."
    state = {"token_embedding.weight": theirs[text + "token_embedding.weight"],
             "positional_embedding": theirs[text + "position_embedding.weight"],
             "text_projection": theirs["text_projection.weight"].T.contiguous().half(),
             "visual.conv1.weight": theirs[vision + "patch_embedding.weight"].half(),
             "visual.class_embedding": theirs[vision + "class_embedding"],
             "visual.positional_embedding": theirs[vision + "position_embedding.weight"],
             "visual.proj": theirs["visual_projection.weight"].T.contiguous().half(),
             "logit_scale": theirs["logit_scale"], "input_resolution": torch.tensor(48),
             "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
        for ours, tower, layers in (("", "text_model", 3), ("visual.", "vision_model", 2)):
            for i in range(layers):
                block, layer = f"{ours}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
                parts = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts).half()
                for one, other in (("attn.out_proj", "self_attn.out_proj"),
                                   ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    state[f"{block}.{one}.{kind}"] = theirs[f"{layer}.{other}.{kind}"].half()
                for n in (1, 2):
                    state[f"{block}.ln_{n}.{kind}"] = theirs[f"{layer}.layer_norm{n}.{kind}"]
    return state


def save_torchscript(state: dict, path: Path):
    """A TorchScript archive whose state dict is `state`."""
    root = nn.Module()
    for name, tensor in state.items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if folder not in dict(module.named_children()):
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        module.register_buffer(leaf, tensor)
    torch.jit.script(root).save(str(path))


def halve_weights(reference: CLIPModel) -> CLIPModel:
    """The reference, in float32, with the weights rounded that OpenAI's archive has in float16."""
    for name, tensor in reference.named_parameters():
        if any(part in name for part in ("_proj", "projection", ".mlp.", "patch_embedding")):
            tensor.data = tensor.data.half().float()
    return reference


def pictures(B: int = 3, H: int = 60, W: int = 75, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


CAPTIONS = ["", "A green train is coming down the tracks.", "two dogs and a cat " * 40, "a diagram"]


# ---- tokenizer ----

@pytest.mark.parametrize("text, ids", [
    ("a diagram", [320, 22697]),
    ("a dog", [320, 1929]),
    ("a cat", [320, 2368]),
    ("A green train is coming down the tracks.",
     [320, 1901, 3231, 533, 1171, 1136, 518, 7579, 269]),
    ("It's  the  man's 12 dogs &amp;amp; cats!!",
     [585, 568, 518, 786, 568, 272, 273, 3255, 261, 3989, 748]),
    ("naïve café 日本語 😀", [1097, 35689, 563, 15304, 39121, 44353, 34002, 508, 7334]),
    ("hello   world\n\n", [3306, 1002]),
    ("", []),
])
def test_token_ids_are_those_of_openais_tokenizer(text, ids):
    assert encode(text) == ids


# Words, contractions, HTML, mojibake, odd letters and spaces: what captions may hold.
PIECES = """a the man Woman's DOGS zebra skateboarding 3rd x2 don't I'LL we've they're it'd 'S naïve
    snowboarder's café ſ's &amp; &amp;amp; &lt;b&gt; &#39; &#x27;s &nbsp; &amp;nbsp; &eacute;
    &notit; &#x1c; &#0; & Ã© â€™s “quoted” ’s ﬁne Ⅷ ²½ ٣٤ 日本語 😀👍🏽 e\u0301 İ ß \u200b \ufeff !!?? ...
    <| |>""".split()
SPACES = ["", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x0b", "\x85"] + 5 * [" "]


def test_token_ids_equal_transformers_on_4000_random_strings_after_openais_cleaning():
    draw = random.Random(0)
    characters = [chr(i) for i in range(0x30000)        # the unassigned change with each Unicode
                  if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")]
    _, ids, ranks = clip_text.vocabulary()
    reference = CLIPTokenizer(vocab=dict(ids), merges=list(ranks))
    for _ in range(4000):
        kinds = draw.choices([PIECES, SPACES, characters], [3, 3, 1], k=draw.randrange(1, 25))
        caption = "".join(map(draw.choice, kinds))
        cleaned = html.unescape(html.unescape(ftfy.fix_text(caption)))
        if "'ſ" not in cleaned:         # to OpenAI's pattern, a contraction with a long s
            assert [49406, *encode(caption), 49407] == reference(cleaned)["input_ids"], \
                repr(caption)


@pytest.mark.parametrize("piece, length", [
    ("a", 200_000), ("!", 200_000), ("dog ", 300_000), ("\n", 1_000_000), ("&amp;", 100_000),
    ("Ã©", 100_000), ("e\u0301", 100_000)])
def test_the_longest_captions_end(piece, length):
    """They took minutes; only their beginning is read, which is more than 77 tokens hold."""
    assert tokenize([piece * length]).shape == (1, 77)
    assert count_truncated([piece * length]) == (piece != "\n")


@settings(max_examples=300, deadline=None, database=None)
@given(strategies.text(strategies.characters()))          # lone surrogates too
def test_any_string_becomes_77_tokens(caption):
    ids = tokenize([caption])[0].tolist()
    assert len(ids) == 77 and ids[0] == 49406 and ids[-1] == 49407
    assert ids[1:76] == (encode(caption) + 75 * [49407])[:75]
    assert count_truncated([caption]) == (len(encode(caption)) > 75)


@pytest.mark.parametrize("caption", ["&#" + 5000 * "9" + ";", "&amp;#" + 5000 * "9" + ";"])
def test_a_character_with_a_number_that_python_refuses_is_the_unknown_character(caption):
    assert encode(caption) == encode("\ufffd")


def test_special_tokens_in_the_text_are_their_own_ids():
    assert encode("<|startoftext|>a dog<|endoftext|>") == [49406, 320, 1929, 49407]
    assert encode("<|ENDOFTEXT|>") == [49407]


def test_captions_are_padded_with_the_end_token():
    tokens = tokenize(["", "a dog"])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406] + 76 * [49407]
    assert tokens[1].tolist() == [49406, 320, 1929] + 74 * [49407]
    assert tokenize([]).shape == (0, 77)


def test_a_prompt_of_200_words_is_truncated_keeps_its_end_token_and_is_counted():
    prompt = " ".join(200 * ["dog"])
    assert tokenize([prompt])[0].tolist() == [49406] + 75 * [1929] + [49407]
    fits = " ".join(75 * ["dog"])
    assert tokenize([fits])[0].tolist() == tokenize([prompt])[0].tolist()
    assert count_truncated([prompt, fits, "a dog", fits + " dog"]) == 2
    assert tokenize(["a dog"], length=3).tolist() == [[49406, 320, 49407]]


def test_a_damaged_merge_table_is_refused(tmp_path, monkeypatch):
    damaged = bytearray(clip_text.MERGES.read_bytes())
    damaged[700_000] ^= 1
    (tmp_path / "merges.gz").write_bytes(damaged)
    monkeypatch.setattr(clip_text, "MERGES", tmp_path / "merges.gz")
    with pytest.raises(UserError, match="merges.gz .*damaged"):
        clip_text.vocabulary.__wrapped__()


# ---- text tower ----

@torch.no_grad()
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "MODEL.SAFETENSORS",
                                  "weights", "link"])
def test_both_towers_equal_transformers_from_a_hub_file_whatever_its_name(tmp_path, name):
    reference, path = reference_clip(), tmp_path / name
    save = save_file if name.lower().endswith("safetensors") else torch.save
    save(hub_state(reference), path)
    if name == "link":                                  # as the cache of Hugging Face has it
        path.rename(tmp_path / "0123abcd")
        path.symlink_to(tmp_path / "0123abcd")
    check_towers(reference, path)
    tower = load_clip_text(path)
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def check_towers(reference: CLIPModel, path: Path):
    features, pooled = load_clip_text(path)(tokenize(CAPTIONS))
    expected = reference.text_model(tokenize(CAPTIONS))
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, reference.text_projection(expected.pooler_output),
                               atol=1e-5, rtol=1e-5)
    pixels = evaluate.preprocess(pictures(), 48)
    expected = reference.visual_projection(reference.vision_model(pixels).pooler_output)
    torch.testing.assert_close(load_clip_image(path)(pictures()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")               # torch.jit is deprecated
@pytest.mark.parametrize("save", [save_torchscript, torch.save])
def test_both_towers_equal_transformers_from_openais_file(tmp_path, save):
    reference, path = halve_weights(reference_clip()), tmp_path / "ViT.pt"
    save(openai_state(reference), path)
    check_towers(reference, path)
    assert load_clip_text(path).text_projection.dtype == torch.float32


@torch.no_grad()
def test_the_architecture_is_read_off_the_weights(tmp_path):
    config = CLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=1,
                            num_attention_heads=2, vocab_size=300, max_position_embeddings=16,
                            projection_dim=24, bos_token_id=298, eos_token_id=299)
    reference = randomise(CLIPTextModelWithProjection(config))
    torch.save(reference.state_dict(), tmp_path / "text.bin")
    tokens = torch.tensor([[298, 5, 7, 299] + 12 * [299]])
    features, pooled = load_clip_text(tmp_path / "text.bin")(tokens)
    expected = reference(tokens)
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tower_without_projection_gives_features_but_nothing_to_score(tmp_path):
    state = {name: tensor for name, tensor in hub_state(reference_clip()).items()
             if name.startswith("text_model.")}
    torch.save(state, tmp_path / "text_encoder.bin")
    features, pooled = load_clip_text(tmp_path / "text_encoder.bin")(tokenize(["a dog"]))
    assert features.shape == (1, 77, 64) and pooled.shape == (1, 0)


def test_the_parameters_of_vit_l_14_are_123_million_and_the_projection():
    with torch.device("meta"):
        tower = CLIPText(width=768, layers=12, heads=12, projection=768)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 123_060_480 + 768 * 768


@torch.no_grad()
def test_the_exact_gelu_in_place_of_quickgelu_would_give_other_features(tmp_path):
    torch.save(hub_state(reference_clip()), tmp_path / "model.bin")
    features, _ = load_clip_text(tmp_path / "model.bin")(tokenize(CAPTIONS))
    wrong = reference_clip(hidden_act="gelu").text_model(tokenize(CAPTIONS)).last_hidden_state
    assert (features - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_a_token_does_not_see_those_after_it():
    tower = random_clip_text(seed=3, context_len=20)
    one, other = tokenize(["a red circle left of a blue square", "a red circle above three dogs"],
                          length=20)
    assert one[:4].equal(other[:4]) and not one[4].equal(other[4])
    features = [tower(tokens[None])[0][0] for tokens in (one, other)]
    torch.testing.assert_close(features[0][:4], features[1][:4])
    assert (features[0][4] - features[1][4]).abs().max() > 1e-2
    torch.testing.assert_close(tower(one[None, :9])[0][0], features[0][:9])     # a shorter row


@torch.no_grad()
def test_the_pooled_feature_is_that_of_the_first_end_token():
    tower = random_clip_text(seed=3, context_len=20)
    features, pooled = tower(tokenize(["a red circle", ""], length=20))
    torch.testing.assert_close(
        pooled, torch.stack([features[0, 4], features[1, 1]]) @ tower.text_projection)
    assert (features[0, 4] - features[0, 5]).abs().max() > 1e-2


@pytest.mark.parametrize("count", [0, 1, 70])
def test_captions_are_encoded_by_64_in_float32_without_gradients(count):
    tower, captions = random_clip_text(0, 20).requires_grad_(True), count * ["a dog", "two cats"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, pooled = encode_captions(tower, captions, 20)
    assert features.shape == (2 * count, 20, 64) and pooled.shape == (2 * count, 64)
    assert features.dtype == pooled.dtype == torch.float32 and not features.requires_grad
    with torch.no_grad():
        expected = tower(tokenize(captions[64:128], 20))
    assert features[64:128].equal(expected[0]) and pooled[64:128].equal(expected[1])


def test_the_random_tower_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    hashes = [weights_sha256(random_clip_text(seed, 20)) for seed in (0, 0, 1)]
    assert torch.rand(3).equal(expected)
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[0] == (                                                       # on every machine
        "0eb2b753bf7ece0ab392819eaebcde19ea620825e185075a9eb057efd7817fb2")


def test_the_random_tower_has_no_weight_that_depends_on_the_kind_of_cpu():
    """Uniform numbers of 24 bits in a range of a power of two: multiples of 2^-29, no rounding."""
    for parameter in random_clip_text(0, 20).parameters():
        assert (parameter * 2 ** 29).frac().eq(0).all()


# ---- the tower that a cache or a checkpoint describes ----

def test_the_random_tower_comes_back_from_its_description_or_is_refused():
    tower = random_clip_text(5, 12)
    description = {"kind": "random", "seed": 5, "context_len": 12, "sha256": weights_sha256(tower)}
    assert weights_sha256(load_text_tower(description, "weights")) == weights_sha256(tower)
    with pytest.raises(UserError, match="this torch draws another random text tower"):
        load_text_tower(description | {"sha256": "0" * 64}, "weights")


def test_a_clip_file_is_read_only_if_it_is_the_one_described(tmp_path):
    path = tmp_path / "ViT.pt"
    description = {"kind": "clip", "file": "ViT.pt", "sha256": None}
    with pytest.raises(UserError, match="ViT.pt is missing: expected the text tower"):
        load_text_tower(description, tmp_path)
    torch.save(openai_state(reference_clip()), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for known in (None, sha256):
        assert isinstance(load_text_tower(description | {"sha256": known}, tmp_path), CLIPText)
    with pytest.raises(UserError, match=f"another SHA-256: .*{'0' * 64}"):
        load_text_tower(description | {"sha256": "0" * 64}, tmp_path)


# ---- files that do not fit ----

def save_without(path: Path, missing: str, **extra) -> Path:
    state = {name: tensor for name, tensor in hub_state(reference_clip()).items()
             if missing not in name}
    torch.save(state | extra, path)
    return path


@pytest.mark.parametrize("load, missing, message", [
    (load_clip_text, "token_embedding", "KeyError: 'token_embedding.weight'"),
    (load_clip_text, "text_model.encoder.layers.1.self_attn.k_proj.weight",
     "KeyError.*transformer.resblocks.1.attn.k_proj.weight"),
    (load_clip_text, "text_model.final_layer_norm.bias", "text tower.*ln_final.bias"),
    (load_clip_image, "visual_projection", "KeyError: 'proj'"),
    (load_clip_image, "vision_model.pre_layrnorm.bias", "image tower .*ln_pre.bias"),
])
def test_a_file_with_a_missing_weight_is_refused_by_name(tmp_path, load, missing, message):
    with pytest.raises(UserError, match=message):
        load(save_without(tmp_path / "model.bin", missing))


def test_a_file_with_a_surplus_weight_is_refused_by_name(tmp_path):
    path = save_without(tmp_path / "model.bin", "nothing",
                        **{"text_model.adapter.weight": torch.ones(1)})
    with pytest.raises(UserError, match="text tower.*adapter.weight"):
        load_clip_text(path)
    assert load_clip_image(path).side == 48             # the other tower is none of its business


def test_a_width_that_is_no_multiple_of_64_is_refused(tmp_path):
    config = CLIPTextConfig(**TEXT | dict(hidden_size=32))
    torch.save(CLIPTextModelWithProjection(config).state_dict(), tmp_path / "tiny.bin")
    with pytest.raises(UserError, match="a width of 32, no multiple of 64"):
        load_clip_text(tmp_path / "tiny.bin")


# ---- OpenAI's archive, a program that must not run ----

class Writer(nn.Module):
    """A TorchScript module that writes the file "marker" while it is loaded."""

    def __init__(self):
        super().__init__()
        self.positional_embedding = torch.zeros(77, 64)

    @torch.jit.export
    def __getstate__(self):
        return self.positional_embedding, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.positional_embedding = state[0]
        self.training = state[1]
        torch.save(self.positional_embedding, "marker")


class Call:
    """A pickle of this calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def save_archive(path: Path, data: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT/constants.pkl", pickle.dumps(()))
        archive.writestr("ViT/data.pkl", data)


@pytest.mark.filterwarnings("ignore")
def test_the_archive_of_a_traced_module_is_its_state_dict(tmp_path):
    tower = random_clip_text(0, 20)
    traced = torch.jit.trace(tower, tokenize(["a dog"], 20), check_trace=False)
    traced.save(tmp_path / "traced.pt")
    state = read_openai_archive(tmp_path / "traced.pt")
    assert state.keys() == tower.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tower.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_the_code_in_a_torchscript_archive_does_not_run(tmp_path):
    torch.jit.script(Writer()).save(tmp_path / "evil.pt")
    Path("marker").unlink(missing_ok=True)
    with pytest.raises(UserError, match="evil.pt"):
        load_clip_text(tmp_path / "evil.pt")
    assert not Path("marker").exists()
    torch.jit.load(tmp_path / "evil.pt")            # as every loader of it would have done
    assert Path("marker").exists()


@pytest.mark.parametrize("call", [
    Call(os.system, "touch marker"), Call(eval, "open('marker', 'w')"),
    Call(os.mkdir, "marker"), Call(torch.save, 1, "marker"), Call(torch.load, "marker")])
def test_a_pickle_in_an_archive_calls_nothing(tmp_path, call):
    save_archive(tmp_path / "evil.pt", pickle.dumps({"positional_embedding": call}, protocol=2))
    with pytest.raises(UserError, match="evil.pt is damaged, or not a CLIP model"):
        load_clip_text(tmp_path / "evil.pt")
    assert not Path("marker").exists()


def test_a_tree_that_contains_itself_and_a_huge_memo_have_an_end(tmp_path):
    module = b"c__torch__\nNet\n)\x81"               # an empty object
    save_archive(tmp_path / "ring.pt", b"\x80\x02" + module + b"q\x00}X\x01\x00\x00\x00ah\x00sb.")
    save_archive(tmp_path / "memo.pt", b"\x80\x02" + module + b"r\xff\xff\xff\x7f.")
    for name in ("ring.pt", "memo.pt"):
        with pytest.raises(UserError, match=name):
            load_clip_text(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_a_tensor_of_an_archive_is_noticed(tmp_path):
    path = tmp_path / "ViT.pt"
    save_torchscript(openai_state(reference_clip()), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1                       # in the tokens' embedding, by far the largest
    path.write_bytes(data)
    with pytest.raises(UserError, match="ViT.pt is damaged.*CRC"):
        load_clip_text(path)


# ---- image tower ----

@pytest.mark.parametrize("H, W", [(256, 256), (224, 224), (300, 400),
                                  (401, 233), (100, 260), (224, 500)])
def test_preprocessing_equals_transformers_on_any_shape(H, W):
    images = pictures(2, H, W)
    expected = CLIPImageProcessorPil()(list(images.permute(0, 2, 3, 1).numpy()),
                                       return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(evaluate.preprocess(images, 224), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("H, W", [(224, 227), (231, 224), (333, 500), (97, 61)])
def test_preprocessing_equals_pillow_with_openais_rounding_of_the_crop(H, W):
    image = pictures(1, H, W)
    scale = 224 / min(H, W)
    size = (224 if W <= H else int(W * scale + 1e-9), 224 if H <= W else int(H * scale + 1e-9))
    left, top = [int(round((length - 224) / 2)) for length in size]
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(
        size, Image.Resampling.BICUBIC)
    pixels = np.array(picture.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    expected = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    found = evaluate.preprocess(image, 224)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_image_tower_wants_uint8_and_ignores_autocast(tmp_path):
    torch.save(hub_state(reference_clip()), tmp_path / "model.bin")
    tower, images = load_clip_image(tmp_path / "model.bin"), pictures()
    with pytest.raises(TypeError, match="uint8"):
        tower(images.float() / 255)
    expected = tower(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tower(images).equal(expected)


def test_the_example_of_the_docstring_is_right():
    shown = re.search(r"-> \[(.*?), \.\.\.\]", clip_text.__doc__)[1]
    assert tokenize(["two red circles"])[0, :6].tolist() == [int(x) for x in shown.split(", ")]
