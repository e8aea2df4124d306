"""Protects the benchmark: it times what train.py computes, and reports what it ran."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from model import UViT, UViTConfig

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


def test_the_published_way_of_computing_gives_the_same_step():
    """It is slower, not different: the same weights and batch give nearly the same update."""
    ours, published = [bench.Bench(TINY, kind, 4, torch.device("cpu"))
                       for kind in ("ours", "as published")]
    published.net.load_state_dict(ours.net.state_dict())
    published.ema.load_state_dict(ours.ema.state_dict())
    for one in (ours, published):
        one.precision = torch.float32
        one.step()
    for net in ("net", "ema"):
        for a, b in zip(getattr(ours, net).parameters(), getattr(published, net).parameters()):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_the_benchmark_prints_and_writes_every_model(capsys, monkeypatch):
    models = bench.describe_models("shapes").items()
    small = {name: replace(uvit, width=32) for name, uvit in models}
    monkeypatch.setattr(bench, "describe_models", lambda size: small)
    monkeypatch.setattr(bench, "measure_peak", lambda *_: 1e12)
    bench.main(bench.Config(batch_size=1, repeats=1, sample_batch=1, sample_steps=1,
                            json="bench.json"))
    rows = json.loads(Path("bench.json").read_text())["rows"]
    assert list(rows) == [
        "early/concat", "early/cross_attention", "intermediate/concat",
        "intermediate/cross_attention", "early/concat, plain", "early/concat, as published"]
    row = rows["intermediate/concat"]
    assert row["multiply_adds"] < 0.8 * rows["early/concat"]["multiply_adds"]
    assert row["images_per_second"] == pytest.approx(1000 / row["step_ms"])
    flops = 6 * row["multiply_adds"] * row["images_per_second"]
    assert row["share_of_peak"] == pytest.approx(flops / 1e12)
    assert all(row[f"{part}_ms"] > 0 for part in (*bench.PARTS, "sampling_text", "sampling_step"))
    out = capsys.readouterr().out
    assert "size: shapes" in out and out.count("| intermediate/concat ") == 2
