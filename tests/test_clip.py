"""Protects what captions become: token ids, CLIP's features from every layout, the CLIP score."""
import hashlib
import html
import importlib.util
import random
import unicodedata
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from transformers import (CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection,
                          CLIPTokenizer, CLIPVisionModelWithProjection)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import clip_text
from clip_text import (CLIPText, count_truncated, encode, load_clip_text, load_text_tower,
                       openai_names, random_clip_text, tokenize, weights_sha256)
from evaluate import PREFIX, clip_scores, load_clip_image, preprocess, summarise_cosines
from model import UserError, load_strictly

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


def reference_clip() -> CLIPModel:
    """A small CLIP of Hugging Face's, both towers at random."""
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)
    return randomise(CLIPModel(config))


def hub_state(reference: CLIPModel) -> dict:
    """The state dict as the hub's files have it: with the integer `position_ids` of their time."""
    state = dict(reference.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    return state


def openai_state(reference: CLIPModel) -> dict:
    """The same weights as OpenAI's archive has them: its names, its float16, its three scalars.

    Written apart from `openai_names`, the other way round: from OpenAI's name to the reference's.
    """
    theirs, state = reference.state_dict(), {}
    for ours, tower, layers in (("", "text_model", 3), ("visual.", "vision_model", 2)):
        for i in range(layers):
            block, layer = f"{ours}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts).half()
                state[f"{block}.attn.out_proj.{kind}"] = theirs[
                    f"{layer}.self_attn.out_proj.{kind}"].half()
                state[f"{block}.mlp.c_fc.{kind}"] = theirs[f"{layer}.mlp.fc1.{kind}"].half()
                state[f"{block}.mlp.c_proj.{kind}"] = theirs[f"{layer}.mlp.fc2.{kind}"].half()
                state[f"{block}.ln_1.{kind}"] = theirs[f"{layer}.layer_norm1.{kind}"]
                state[f"{block}.ln_2.{kind}"] = theirs[f"{layer}.layer_norm2.{kind}"]
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
    return state | {
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T.contiguous().half(),
        "logit_scale": theirs["logit_scale"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"].half(),
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T.contiguous().half(),
        "input_resolution": torch.tensor(48), "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408)}


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


def random_captions(count: int) -> list[str]:
    """What captions may hold: words, HTML, contractions, mojibake, any code point, odd spaces."""
    draw = random.Random(0)
    words = ("a the man Woman's DOGS zebra skateboarding 3rd x2 don't I'LL we've they're it'd 'S "
             "snowboarder's café naïve ſ's").split()
    entities = ["&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&#x27;s", "&nbsp;", "&amp;nbsp;",
                "&eacute;", "&notit;", "&#x1c;", "&#0;", "&"]
    odd = ["Ã©", "â€™s", "“quoted”", "’s", "ﬁne", "Ⅷ", "²½", "٣٤", "日本語",
           "😀👍🏽", "e\u0301", "İ", "ß", "\u200b", "\ufeff", "!!??", "...", "<|", "|>"]
    spaces = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x0b",
              "\x85", ""]

    def code_point():
        while True:                     # an assigned one: the others change with each Unicode
            character = chr(draw.randrange(draw.choice([0x20, 0x250, 0x3000, 0x30000])))
            if unicodedata.category(character) not in ("Cn", "Co", "Cs"):
                return character

    def piece():
        kind = draw.random()
        if kind < 0.85:
            return draw.choice(words if kind < 0.5 else entities if kind < 0.65 else odd)
        return "".join(code_point() for _ in range(draw.randrange(1, 6)))
    return ["".join(piece() + draw.choice(spaces) for _ in range(draw.randrange(1, 12)))
            for _ in range(count)]


def test_token_ids_equal_transformers_on_4000_random_strings_after_openais_cleaning():
    ids, ranks = clip_text.vocabulary()
    reference = CLIPTokenizer(vocab=dict(ids), merges=list(ranks))
    for caption in random_captions(4000):
        cleaned = html.unescape(html.unescape(ftfy.fix_text(caption)))
        if "'ſ" not in cleaned:         # to OpenAI's pattern, a contraction with a long s
            assert [49406, *encode(caption), 49407] == reference(cleaned)["input_ids"], \
                repr(caption)


def test_token_ids_equal_open_clips_on_4000_random_strings():
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("wants `pip install --no-deps open_clip_torch==3.3.0`, "
                    "whose requirements are large")
    spec = importlib.util.spec_from_file_location(  # the file alone, without torchvision
        "tokenizer", Path(package.origin).parent / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference = module.SimpleTokenizer()
    for caption in random_captions(4000):
        assert encode(caption) == reference.encode(caption), repr(caption)


def test_special_tokens_in_the_text_are_their_own_ids():
    assert encode("<|startoftext|>a dog<|endoftext|>") == [49406, 320, 1929, 49407]
    assert encode("<|ENDOFTEXT|>") == [49407]


def test_captions_are_padded_with_the_end_token():
    tokens = tokenize(["", "a dog"])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406] + 76 * [49407]
    assert tokens[1].tolist() == [49406, 320, 1929] + 74 * [49407]


def test_a_prompt_of_200_words_is_truncated_keeps_its_end_token_and_is_counted():
    prompt = " ".join(200 * ["dog"])
    assert tokenize([prompt])[0].tolist() == [49406] + 75 * [1929] + [49407]
    fits = " ".join(75 * ["dog"])
    assert tokenize([fits])[0].tolist() == tokenize([prompt])[0].tolist()
    assert count_truncated([prompt, fits, "a dog", fits + " dog"]) == 2
    assert tokenize(["a dog"], length=3).tolist() == [[49406, 320, 49407]]


def test_no_captions_give_no_rows():
    assert tokenize([]).shape == (0, 77)


def test_a_damaged_merge_table_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "merges.gz"
    damaged.write_bytes(clip_text.MERGES.read_bytes()[:-1])
    monkeypatch.setattr(clip_text, "MERGES", damaged)
    clip_text.vocabulary.cache_clear()
    with pytest.raises(RuntimeError, match="damaged"):
        clip_text.vocabulary()
    clip_text.vocabulary.cache_clear()


# ---- text tower ----

@torch.no_grad()
def test_text_features_equal_transformers_from_a_hub_file(tmp_path):
    reference = reference_clip()
    torch.save(hub_state(reference), tmp_path / "pytorch_model.bin")
    tower = load_clip_text(tmp_path / "pytorch_model.bin")
    tokens = tokenize(CAPTIONS)
    features, pooled = tower(tokens)
    expected = reference.text_model(tokens)
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, reference.text_projection(expected.pooler_output),
                               atol=1e-5, rtol=1e-5)
    assert (not tower.training
            and not any(parameter.requires_grad for parameter in tower.parameters()))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("layout", ["TorchScript", "state dict"])
def test_both_towers_equal_transformers_from_openais_file(tmp_path, layout):
    reference, path = halve_weights(reference_clip()), tmp_path / "ViT.pt"
    if layout == "TorchScript":
        save_torchscript(openai_state(reference), path)
    else:
        torch.save(openai_state(reference), path)
    features, pooled = load_clip_text(path)(tokenize(CAPTIONS))
    expected = reference.text_model(tokenize(CAPTIONS))
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, reference.text_projection(expected.pooler_output),
                               atol=1e-5, rtol=1e-5)
    images = pictures()
    expected = reference.visual_projection(
        reference.vision_model(preprocess(images, 48)).pooler_output)
    torch.testing.assert_close(load_clip_image(path)(images), expected, atol=1e-5, rtol=1e-5)
    assert load_clip_text(path).text_projection.dtype == torch.float32


def test_both_layouts_of_the_same_weights_become_the_same_state_dict():
    reference = halve_weights(reference_clip())
    one, other = openai_names(openai_state(reference)), openai_names(hub_state(reference))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].float(), other[name]) for name in one)


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
    with pytest.raises(UserError, match="no projection"):
        clip_scores(torch.ones(1, 32), pooled)


@torch.no_grad()
def test_text_features_at_the_size_of_vit_l_14_equal_transformers():
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                            num_attention_heads=12, projection_dim=768)
    reference = randomise(CLIPTextModelWithProjection(config))
    tower = CLIPText(width=768, layers=12, heads=12, projection=768)
    load_strictly(tower, openai_names(reference.state_dict()), "L/14")
    assert sum(parameter.numel() for parameter in tower.parameters()) == 123_060_480 + 768 * 768
    tokens = tokenize(["a photo of three red circles and a dog"])
    features, pooled = tower.eval()(tokens)
    expected = reference(tokens)
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_exact_gelu_in_place_of_quickgelu_gives_other_features(tmp_path, monkeypatch):
    reference = reference_clip()
    torch.save(hub_state(reference), tmp_path / "model.bin")
    tower = load_clip_text(tmp_path / "model.bin")
    expected = reference.text_model(tokenize(CAPTIONS)).last_hidden_state
    assert (tower(tokenize(CAPTIONS))[0] - expected).abs().max() < 1e-5
    monkeypatch.setattr(clip_text.QuickGELU, "forward", lambda self, x: F.gelu(x))
    assert (tower(tokenize(CAPTIONS))[0] - expected).abs().max() > 1e-2


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
    with pytest.raises(UserError, match="other random numbers"):
        load_text_tower(description | {"sha256": "0" * 64}, "weights")


def test_a_clip_file_is_read_only_if_it_is_the_one_described(tmp_path):
    path = tmp_path / "ViT.pt"
    description = {"kind": "clip", "file": "ViT.pt", "sha256": None}
    with pytest.raises(UserError, match="ViT.pt is missing, the text tower.*put it into"):
        load_text_tower(description, tmp_path)
    torch.save(openai_state(reference_clip()), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for known in (None, sha256):
        assert isinstance(load_text_tower(description | {"sha256": known}, tmp_path), CLIPText)
    with pytest.raises(UserError, match=f"has SHA-256 {sha256}, but .* the text tower of SHA-256 "
                                        f"{'0' * 64}: put that one there"):
        load_text_tower(description | {"sha256": "0" * 64}, tmp_path)


# ---- files that do not fit ----

def save_without(path: Path, missing: str, **extra) -> Path:
    state = {name: tensor for name, tensor in hub_state(reference_clip()).items()
             if missing not in name}
    torch.save(state | extra, path)
    return path


@pytest.mark.parametrize("load, missing, message", [
    (load_clip_text, "token_embedding", "no CLIP text tower: there is no token_embedding.weight"),
    (load_clip_text, "text_model.encoder.layers.1.self_attn.k_proj.weight",
     "missing transformer.resblocks.1.attn.in_proj_w"),
    (load_clip_text, "text_model.final_layer_norm.bias", "missing ln_final.bias"),
    (load_clip_image, "visual_projection", "no CLIP image tower: there is no proj"),
    (load_clip_image, "vision_model.pre_layrnorm.bias", "missing ln_pre.bias"),
])
def test_a_file_with_a_missing_weight_is_refused_by_name(tmp_path, load, missing, message):
    with pytest.raises(UserError, match=message):
        load(save_without(tmp_path / "model.bin", missing))


def test_a_file_with_a_surplus_weight_is_refused_by_name(tmp_path):
    path = save_without(tmp_path / "model.bin", "nothing",
                        **{"text_model.adapter.weight": torch.ones(1)})
    with pytest.raises(UserError, match="unexpected text_model.adapter.weight"):
        load_clip_text(path)
    assert load_clip_image(path).side == 48             # the other tower is none of its business


def test_a_width_that_is_no_multiple_of_64_is_refused(tmp_path):
    config = CLIPTextConfig(**TEXT | dict(hidden_size=32))
    torch.save(CLIPTextModelWithProjection(config).state_dict(), tmp_path / "tiny.bin")
    with pytest.raises(UserError, match="width 32; expected a multiple of 64"):
        load_clip_text(tmp_path / "tiny.bin")


# ---- image tower ----

@torch.no_grad()
def test_image_features_equal_transformers_from_a_hub_file(tmp_path):
    reference = reference_clip()
    torch.save(hub_state(reference), tmp_path / "pytorch_model.bin")
    tower, images = load_clip_image(tmp_path / "pytorch_model.bin"), pictures()
    vision = CLIPVisionModelWithProjection(reference.config.vision_config).eval()
    vision.load_state_dict({name: tensor for name, tensor in reference.state_dict().items()
                            if name.startswith("vis")})
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48},
                                      crop_size={"height": 48, "width": 48})
    pixels = processor(list(images.permute(0, 2, 3, 1).numpy()),
                       return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower(images), vision(pixels).image_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("H, W", [(256, 256), (224, 224), (300, 400),
                                  (401, 233), (100, 260), (224, 500)])
def test_preprocessing_equals_transformers_on_any_shape(H, W):
    images = pictures(2, H, W)
    expected = CLIPImageProcessorPil()(list(images.permute(0, 2, 3, 1).numpy()),
                                       return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(images, 224), expected, atol=2e-6, rtol=0)


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
    np.testing.assert_allclose(preprocess(image, 224)[0].permute(1, 2, 0).numpy(), expected,
                               atol=2e-6, rtol=0)


def test_torchs_bicubic_resize_is_not_clips():
    images = pictures(1, 256, 256)
    naive = F.interpolate(images.float() / 255, size=224, mode="bicubic", align_corners=False)
    mean, std = (torch.tensor([0.48145466, 0.4578275, 0.40821073]),
                 torch.tensor([0.26862954, 0.26130258, 0.27577711]))
    naive = (naive - mean[:, None, None]) / std[:, None, None]
    assert (naive - preprocess(images, 224)).abs().max() > 0.1


@torch.no_grad()
def test_the_image_tower_wants_uint8_and_ignores_autocast(tmp_path):
    torch.save(hub_state(reference_clip()), tmp_path / "model.bin")
    tower, images = load_clip_image(tmp_path / "model.bin"), pictures()
    with pytest.raises(TypeError, match="uint8"):
        tower(images.float() / 255)
    expected = tower(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tower(images).equal(expected)


# ---- CLIP score ----

def test_the_score_is_a_cosine_whatever_the_scale():
    images, texts = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = [(i @ t / i.norm() / t.norm()).item() for i, t in zip(images, texts)]
    torch.testing.assert_close(clip_scores(images, texts), torch.tensor(expected))
    torch.testing.assert_close(clip_scores(7 * images, 0.01 * texts), torch.tensor(expected))
    torch.testing.assert_close(clip_scores(images, images), torch.ones(5))


def test_matched_pairs_score_higher_than_shuffled_ones():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(64, 32, generator=generator)
    images = texts + torch.randn(64, 32, generator=generator)
    assert clip_scores(images, texts).mean() > clip_scores(images, texts.roll(1, 0)).mean() + 0.5


def test_towers_of_two_models_are_refused():
    with pytest.raises(UserError, match="not of the same CLIP model"):
        clip_scores(torch.ones(4, 512), torch.ones(4, 768))


def test_the_three_scores_are_of_the_same_cosines_and_only_one_is_clipped_at_zero():
    scores = summarise_cosines(torch.tensor([0.5, -0.1]))
    assert scores == pytest.approx({
        "cosine": 0.2, "x 100": 20.0, "x 2.5": 0.625})          # 2.5 (0.5 + 0) / 2
    assert PREFIX == "A photo depicts "
