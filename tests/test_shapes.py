"""Protects the ruler: shapes are the same on any machine, and the detector reads them right."""
import numpy as np
import pytest
import torch

import evaluate
import prepare_data
from prepare_data import Config, Scene, list_scenes, open_shapes, scene_of, unseen_scenes
from vae import LinearAutoencoder, to_pictures, to_unit


def small(**changes):
    return Config(**{"train_images": 60, "val_images": 20} | changes)


def pictures_of(config, split, count):
    source = open_shapes(config, split)
    return source[:count], [captions[0] for captions in source.captions[:count]]


def test_every_caption_is_one_scene_and_grammar_is_right():
    one, two, relations = list_scenes()
    assert (len(one), len(two), len(relations)) == (162, 11016, 1224)
    assert len(scene_of()) == 162 + 11016 + 1224
    circles, squares = (3, "red", "circle"), (2, "blue", "square")
    assert Scene(((1, "red", "circle"),)).caption == "one red circle"
    assert Scene((circles, squares)).caption == "three red circles and two blue squares"
    pair = Scene(((1, "red", "circle"), (1, "blue", "square")), "above")
    assert pair.caption == "a red circle above a blue square"
    assert all(1 <= len(scene.objects) <= 9 for scene in scene_of().values())


def test_a_tenth_of_the_combinations_is_unseen_whatever_the_seed():
    one, _, relations = list_scenes()
    assert sum(scene in unseen_scenes() for scene in one) == 16
    assert sum(scene in unseen_scenes() for scene in relations) == 122
    for seed in (0, 1):
        source = open_shapes(Config(train_images=3000, seed=seed), "train")
        assert not any(scene_of()[text] in unseen_scenes() for [text] in source.captions)
        held_out = open_shapes(Config(val_images=50, seed=seed), "val")
        unseen = [scene_of()[text] in unseen_scenes() for [text] in held_out.captions]
        assert unseen == [i % 2 == 1 for i in range(50)]


def test_a_picture_depends_on_seed_split_and_number_alone():
    source, again = open_shapes(small(), "train"), open_shapes(small(train_images=10), "train")
    assert source.captions[:10] == again.captions
    assert (source.load(7) == again.load(7)).all()
    assert source.captions != open_shapes(small(seed=1), "train").captions
    assert (source.load(7) != open_shapes(small(), "val").load(7)).any()


def test_the_first_pictures_are_these_on_any_machine():
    source = open_shapes(Config(), "train")
    assert [captions[0] for captions in source.captions[:3]] == [
        "a red circle above a purple triangle", "one purple circle",
        "a red square to the left of a green square"]
    assert [int(source.load(i).sum()) for i in range(3)] == [726165, 735782, 708694]


@pytest.mark.parametrize("size", [32, 64])
def test_the_detector_reads_real_and_reconstructed_pictures(size):
    pictures, captions = pictures_of(Config(image_size=size), "val", 300)
    training, _ = pictures_of(Config(image_size=size), "train", 500)
    autoencoder = LinearAutoencoder()
    autoencoder.fit(to_unit(training))
    mean = autoencoder.encode(to_unit(pictures)).chunk(2, dim=1)[0]
    decoded = to_pictures(autoencoder.decode(mean))
    for shown in (pictures, decoded):
        scores = evaluate.score_shapes(shown, captions)
        for group in ("seen", "unseen"):
            assert scores[group]["pictures"] == 150
            assert min(scores[group][kind] for kind in evaluate.KINDS) > 0.98


def test_the_detector_reads_noisy_pictures():
    """A generated picture is never as clean as a drawn one; a rough square is not a circle."""
    pictures, captions = pictures_of(Config(), "val", 200)
    noisy = pictures + np.random.default_rng(0).normal(0, 20, pictures.shape)
    scores = evaluate.score_shapes(noisy.clip(0, 255).astype(np.uint8), captions)
    assert min(scores[group]["everything"] for group in ("seen", "unseen")) > 0.95


def test_shuffled_captions_are_judged_wrong():
    pictures, captions = pictures_of(Config(), "val", 200)
    scores = evaluate.score_shapes(pictures, captions[1:] + captions[:1])
    assert max(scores[group]["everything"] for group in ("seen", "unseen")) < 0.05


def test_each_kind_of_mistake_is_seen():
    rng = np.random.default_rng(0)
    scene = Scene(((2, "red", "circle"), (1, "blue", "square")))

    def judge(groups, relation="", asked=scene):
        picture = prepare_data.draw_scene(Scene(groups, relation), rng, 32)
        return evaluate.judge_picture(picture, asked)
    assert judge(scene.groups) == {"count": True, "colour": True, "shape": True, "everything": True}
    for groups, kind in ((((3, "red", "circle"), (1, "blue", "square")), "count"),
                         (((2, "green", "circle"), (1, "blue", "square")), "colour"),
                         (((2, "red", "triangle"), (1, "blue", "square")), "shape")):
        assert not judge(groups)[kind] and not judge(groups)["everything"]
    swapped = judge(((1, "red", "circle"), (2, "blue", "square")))
    assert swapped["count"] and swapped["colour"] and swapped["shape"] and not swapped["everything"]
    pair = ((1, "red", "circle"), (1, "blue", "square"))
    for relation, opposite in (("above", "below"), ("to the left of", "to the right of")):
        assert judge(pair, relation, Scene(pair, relation))["everything"]
        wrong = judge(pair, opposite, Scene(pair, relation))
        assert not wrong["relation"] and not wrong["everything"] and wrong["colour"]


def test_blank_pictures_and_touching_specks_hold_no_objects():
    picture = np.full((32, 32, 3), prepare_data.BACKGROUND, dtype=np.uint8)
    assert evaluate.detect_objects(picture) == []
    assert not any(evaluate.judge_picture(picture, scene_of()["one red circle"]).values())
    picture[3:5, 3:5] = prepare_data.COLOURS["red"]
    assert evaluate.detect_objects(picture) == []


def test_the_cache_has_what_it_says():
    prepare_data.main(small())
    cache = prepare_data.read_cache("data/shapes")
    assert cache.train_moments.shape == (60, 32, 8, 8) and cache.val_moments.shape == (20, 32, 8, 8)
    assert cache.captions[0] == "" and cache.text.shape[1:] == (16, 64)
    assert len(cache.captions) == len({*cache.captions}) == len(cache.text)
    for name, pairs in (("train", cache.train_pairs), ("val", cache.val_pairs)):
        captions = [[cache.captions[row]] for row in pairs[:, 1]]
        assert captions == open_shapes(small(), name).captions
    mean = torch.tensor(cache.train_moments).chunk(2, dim=1)[0]
    assert abs((mean * cache.meta["latent_scale"]).std().item() - prepare_data.LATENT_STD) < 1e-3
