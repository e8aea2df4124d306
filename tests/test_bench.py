"""Protects the scripts that measure: they time what train.py computes, and report what they ran."""
import json
from pathlib import Path

import pytest
import torch

import bench
import compare
import prepare_data
from model import UserError, UViT, UViTConfig

TINY = UViTConfig("early", "concat", depth=5, image_size=8, channels=4, patch_size=2, width=32,
                  heads=4, context_len=5, context_dim=6)


def plain_state(net: UViT) -> dict[str, torch.Tensor]:
    """The weights of a UViT under the names of torch's transformer layers."""
    names = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.proj": "self_attn.out_proj",
             "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    state = {}
    for name, tensor in net.state_dict().items():
        if "skip_linear" in name:
            name = name.replace("out_blocks", "merges").replace("skip_linear.", "")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state


def test_the_plain_baseline_computes_the_same_as_early_concat():
    """A U-ViT of torch's own layers, given our weights: an independent check of ours."""
    torch.manual_seed(0)
    net, plain = UViT(TINY, init_std=0.2), bench.PlainUViT(TINY)
    missing, unexpected = plain.load_state_dict(plain_state(net), strict=False)
    assert not unexpected
    assert all(name.endswith("in_proj_bias") for name in missing)       # 0 at first; we have none
    zt, t, context = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 1000]), torch.randn(3, 5, 6)
    torch.testing.assert_close(plain(zt, t, context), net(zt, t, context), atol=2e-5, rtol=1e-4)


def test_published_way_of_computing_gives_the_same_step():
    """It is slower, not different: the same weights and batch give nearly the same update."""
    ours, published = [bench.Bench(TINY, kind, 4, torch.device("cpu"))
                       for kind in ("ours", "as published")]
    for one in (ours, published):
        one.precision = torch.float32
    published.net.load_state_dict(ours.net.state_dict())
    published.ema.load_state_dict(ours.ema.state_dict())
    ours.step()
    published.step()
    for net in ("net", "ema"):
        for a, b in zip(getattr(ours, net).parameters(), getattr(published, net).parameters()):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_benchmark_prints_and_writes_every_model(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_peak", lambda *_: 1e12)
    bench.main(bench.Config(batch_size=1, repeats=1, sample_batch=1, sample_steps=1,
                            json="bench.json"))
    result = json.loads(Path("bench.json").read_text())
    assert list(result["rows"]) == [
        "early/concat", "early/cross_attention", "intermediate/concat",
        "intermediate/cross_attention", "early/concat, plain", "early/concat, as published"]
    row = result["rows"]["intermediate/concat"]
    assert row["multiply_adds"] < 0.8 * result["rows"]["early/concat"]["multiply_adds"]
    assert row["images_per_second"] == pytest.approx(1000 / row["step_ms"])
    flops = 6 * row["multiply_adds"] * row["images_per_second"]
    assert row["share_of_peak"] == pytest.approx(flops / 1e12)
    assert all(row[f"{part}_ms"] > 0 for part in (*bench.PARTS, "sampling_text", "sampling_step"))
    assert capsys.readouterr().out.count("| intermediate/concat |") == 2


def test_benchmark_refuses_an_unknown_size_or_mode():
    with pytest.raises(UserError, match="--size=M: expected shapes or S"):
        bench.main(bench.Config(size="M"))
    with pytest.raises(UserError, match="--compile=on: expected auto, off, default"):
        bench.main(bench.Config(compile="on"))


@pytest.fixture
def tiny_setting(monkeypatch):
    """compare.py on a small cache with tiny networks, writing into the test's own folder."""
    prepare_data.main(prepare_data.Config(train_images=40, val_images=12))
    tiny = {"steps": 10, "batch_size": 4, "width": 16, "heads": 2, "depth": 5, "n_image": 1,
            "validation_images": 4, "sample_steps": 2}
    monkeypatch.setattr(compare, "SIZES", {"small": ({}, tiny)})


def test_comparison_trains_evaluates_and_collects_every_model_and_seed(tiny_setting, capsys):
    compare.main(compare.Config(n=4, speed=1.5))
    assert len(json.loads(Path("out/compare-small/results.json").read_text())["small"]) == 5
    compare.main(compare.Config(seed=1, n=4, speed=1.5, to="assets"))
    runs = json.loads(Path("assets/results.json").read_text())["small"]
    steps = dict.fromkeys(compare.MODELS, 10) | {compare.EQUAL_TIME: 15}
    assert sorted((run["model"], run["seed"], run["steps"]) for run in runs) == sorted(
        (model, seed, steps[model]) for model in steps for seed in (0, 1))
    assert {run["model"]: run["conditioning"] for run in runs}["early-cross"] == "cross_attention"
    assert all(run["captions"] == 4 and len(run["curve"]) >= 10 for run in runs)
    assert Path("assets/curves-small.png").exists() and Path("assets/compare-small.png").exists()
    assert "| early-concat | 2 | 10 |" in capsys.readouterr().out

    before = Path("out/compare-small/early-concat-0/last.pt").read_bytes()
    compare.main(compare.Config(n=4, speed=1.5))                                # all is there
    assert Path("out/compare-small/early-concat-0/last.pt").read_bytes() == before
    assert "of 4 = " not in capsys.readouterr().out             # said at the start of a training


def test_a_run_of_another_length_is_neither_taken_nor_prolonged(tiny_setting):
    compare.train_model(compare.Config(), "early-concat", compare.MODELS["early-concat"], 2)
    with pytest.raises(UserError, match="early-concat-0 is a run of 2 steps, not of 10"):
        compare.main(compare.Config(n=4))


def test_interrupted_comparison_goes_on_where_it_stopped(tiny_setting, monkeypatch):
    train_main = compare.train.main

    def stop_early(config):
        train_main(config)
        if config.name.endswith("early-cross-0"):
            raise KeyboardInterrupt
    monkeypatch.setattr(compare.train, "main", stop_early)
    with pytest.raises(KeyboardInterrupt):
        compare.main(compare.Config(n=4, speed=1.5))
    assert not Path("out/compare-small/intermediate-concat-0").exists()
    monkeypatch.setattr(compare.train, "main", train_main)
    compare.main(compare.Config(n=4, speed=1.5))
    assert len(json.loads(Path("out/compare-small/results.json").read_text())["small"]) == 5


def test_report_without_runs_says_what_to_do():
    with pytest.raises(UserError, match="holds no evaluated run"):
        compare.main(compare.Config(report=True))
    with pytest.raises(UserError, match="--size=L: expected small or S"):
        compare.main(compare.Config(size="L"))
