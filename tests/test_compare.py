"""Protects the comparison: runs resume to the same curve, and no verdict without its interval."""
import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import compare
import evaluate
import prepare_data
import sample
import train
from model import UserError, choose_device, choose_precision, count_multiply_adds
from prepare_data import scene_of, unseen_scenes


@pytest.fixture
def tiny(monkeypatch):
    """A task of a few pictures, a network of width 16, and six steps with an examination at two."""
    data = {"out": "data/tiny", "train_images": 60, "val_images": 20}
    network = {"width": 16, "heads": 2, "batch_size": 4, "steps": 6, "warmup": 1, "depth": 3}
    monkeypatch.setitem(compare.TASKS, "shapes", (data, network))

    def sample_latents(*inputs):                        # in 2 steps of the solver, not 20
        return sample.sample_latents(*inputs[:-2], 2, inputs[-1])
    monkeypatch.setattr(compare, "sample_latents", sample_latents)
    monkeypatch.setitem(compare.EVERY, "shapes", 2)
    monkeypatch.setattr(compare, "ON_THE_WAY", 4)
    monkeypatch.setattr(compare, "AT_THE_END", 6)


def folder(name, seed=0):
    return Path("out/compare/shapes") / f"{name}-{seed}"


def test_a_run_that_stops_early_and_resumes_has_the_curve_of_an_unbroken_one(tiny, monkeypatch):
    one = compare.Config(one="early-concat-0")
    compare.main(one)
    unbroken = compare.read_curve(folder("early-concat"))
    assert [point["step"] for point in unbroken] == [2, 4, 6]
    assert [point["captions"] for point in unbroken] == [4, 4, 6]
    folder("early-concat").rename("apart")

    compare.main(compare.Config(one="early-concat-0", until=3))
    assert compare.read_curve(folder("early-concat")) == unbroken[:2]
    checkpoint = torch.load(folder("early-concat") / "run" / "last.pt", weights_only=True)
    assert checkpoint["step"] == 5                      # nothing of it is lost
    saved = (folder("early-concat") / "run" / "last.pt").read_bytes()
    assert [look["step"] for look in compare.read_looks(folder("early-concat"))] == [5]
    compare.main(one)
    assert compare.read_curve(folder("early-concat")) == unbroken
    looks = compare.read_looks(folder("early-concat"))
    assert [look["step"] for look in looks] == [5, 6]
    assert looks[1:] == compare.read_looks(Path("apart"))
    for curve in (folder("early-concat"), Path("apart")):
        facts = json.loads((curve / "curve.json").read_text())
        assert (facts["name"], facts["seed"], facts["batch_size"]) == ("early-concat", 0, 4)
        assert facts["choice"]["fusion"] == "early"
        assert facts["precision"] == str(choose_precision(choose_device()))

    (folder("early-concat") / "run" / "last.pt").write_bytes(saved)     # killed before step 6 was
    (folder("early-concat") / "where.json").unlink()                    # saved, after its point was
    compare.main(one)
    assert compare.read_curve(folder("early-concat")) == unbroken
    assert compare.read_looks(folder("early-concat")) == looks[1:]

    monkeypatch.setattr(train, "main", None)            # whole: not trained again
    compare.main(one)
    (folder("early-concat") / "where.json").unlink()    # but looked at
    compare.main(one)
    assert compare.read_looks(folder("early-concat")) == looks[1:]


def test_a_point_is_what_the_detector_reads_in_the_pictures_of_the_ema(tiny):
    compare.main(compare.Config(one="early-cross-1", until=2))
    point, = compare.read_curve(folder("early-cross", 1))
    with open(folder("early-cross", 1) / "run" / "log.csv", newline="") as file:
        log = next(csv.DictReader(file))
    assert (log["step"], float(log["held_out_ema"])) == ("2", point["held_out_ema"])
    checkpoint = folder("early-cross", 1) / "run" / "last.pt"
    examination = compare.Examination(Path("none"), {}, train.Config(data="data/tiny"), until=9)
    pipeline = sample.Pipeline(checkpoint)              # of step 3
    net, captions = pipeline.net, examination.captions[:4]
    pictures = examination.draw(net, 4).astype(int)
    expected = pipeline.draw(captions, [0, 1, 2, 3], 2, 3.0)
    assert abs(pictures - expected).mean() < 1          # cached features are rounded to 16 bits
    assert abs(pictures - expected[::-1]).mean() > 10
    cache = prepare_data.read_cache("data/tiny")
    assert examination.captions == evaluate.choose_prompts(cache, evaluate.Config(n=6))[1]
    facts = json.loads((folder("early-cross", 1) / "curve.json").read_text())
    assert facts["multiply_adds"] == list(count_multiply_adds(net.config))
    assert point["scores"]["seen"]["pictures"] == point["scores"]["unseen"]["pictures"] == 2


def test_ctrl_c_keeps_what_there_is_and_says_so(tiny):
    """Stopped by the user, and not by `until`: the run is not whole, and the next one not begun."""
    examine = compare.Examination.examine

    def stop(self, step, *rest):
        examine(self, step, *rest)
        signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Examination, "examine", stop)
        with pytest.raises(KeyboardInterrupt):
            compare.main(compare.Config(one="early-concat-0"))
    assert [point["step"] for point in compare.read_curve(folder("early-concat"))] == [2]
    assert not compare.is_whole(compare.Config(), "early-concat", 0)


def test_an_examination_that_fails_ends_the_run_which_then_resumes(tiny):
    """And is not taken for whole, as it would be if train.py went on without the point."""
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(compare.Examination, "draw", fail)
        with pytest.raises(compare.ExaminationError, match="CUDA out of memory"):
            compare.main(compare.Config(one="early-concat-0"))
    assert not compare.is_whole(compare.Config(), "early-concat", 0)
    compare.main(compare.Config(one="early-concat-0"))
    assert compare.is_whole(compare.Config(), "early-concat", 0)
    (folder("early-concat") / "curve.json").write_text('{"curve": [{"step": 2}]}')
    assert not compare.is_whole(compare.Config(), "early-concat", 0)


def test_runs_are_shared_out_to_processes(tiny, monkeypatch):
    """Seed by seed, so that there is a complete table whenever one stops."""
    asked = []

    def call(line, stdout, stderr, env):
        assert env["OMP_NUM_THREADS"] == "1"
        asked.append(line[2:])
        stdout.write("done\n")
    monkeypatch.setattr(compare.subprocess, "run", call)
    with pytest.raises(UserError, match="no run of early-concat, notext has come to step 4"):
        compare.main(compare.Config(models="early-concat,notext", seeds=2, until=4, processes=1))
    assert asked == [[f"--one={name}-{seed}", "--task=shapes", "--until=4"]
                     for seed in (0, 1) for name in ("early-concat", "notext")]


@pytest.mark.parametrize("constants", [{"models": "early"}, {"one": "late-concat-0"}])
def test_an_unknown_model_is_refused(constants):
    with pytest.raises(UserError, match="is no model: expected .*early-concat"):
        compare.main(compare.Config(**constants))


# ---- the second task ----

def test_the_second_task_says_what_and_fixes_the_layout(monkeypatch):
    monkeypatch.setitem(compare.TASKS, "what",
                        ({"out": "data/what", "train_images": 90, "val_images": 60}, {}))
    cache = prepare_data.read_cache(compare.prepare("what"))
    captions = [cache.captions[row] for row in cache.val_pairs[:, 1]]
    scenes = [scene_of()[caption] for caption in captions]
    assert all(len(scene.objects) == 9 and len({*scene.objects}) == 1 for scene in scenes)
    assert [scene in unseen_scenes() for scene in scenes] == [False, True] * 30
    assert len({*cache.captions}) == 1 + 18
    assert evaluate.score_shapes(cache.val_images, captions)["seen"]["everything"] == 1
    assert prepare_data.choose_scene.__module__ == "prepare_data"   # all is as before


# ---- figures ----

def curve(*shares, every=300):
    return [{"step": every * i, "everything": share, "held_out_ema": 0.1 / i,
             **dict.fromkeys(("count", "colour", "shape"), share), "relation": None,
             "scores": {"seen": {"everything": share}, "unseen": {"everything": share}}}
            for i, share in enumerate(shares, start=1)]


def run_of(name, seed, *shares, multiply_adds=(10 ** 6, 10 ** 8)):
    return {"name": name, "seed": seed, "batch_size": 32, "multiply_adds": multiply_adds,
            "choice": compare.MODELS.get(name, {}), "curve": curve(*shares), "where": []}


def test_steps_to_a_level_lie_on_the_line_between_two_points():
    run = run_of("x", 0, 0.4, 0.7, 0.9, 0.85, 0.95)
    assert compare.steps_to(run, 0.8) == pytest.approx(750)
    assert compare.steps_to(run, 0.9) == pytest.approx(900)         # the first time
    assert compare.steps_to(run, 0.2) == pytest.approx(150)         # from nothing at step 0
    assert compare.steps_to(run, 0.95) == 1500
    assert compare.steps_to(run, 0.96) is None


def test_work_counts_each_image_three_times_with_its_text():
    assert compare.work(run_of("x", 0), 1000) == pytest.approx(3 * 1000 * 32 * 0.101e9 / 1e12)


def test_equal_work_is_read_off_the_line_through_the_other_curve():
    cheap, dear = run_of("x", 0, 0.4, 0.6), run_of("y", 0, 0.2, 0.5, multiply_adds=(0, 1.515e8))
    assert compare.at_equal_work(cheap, dear, 300) == pytest.approx((40, 100 * 0.2 * 2 / 3))
    assert compare.at_equal_work(cheap, dear, 600) == pytest.approx((60, 30))   # of step 400
    assert compare.at_equal_work(dear, cheap, 600) == (50, None)                # of step 900


@pytest.mark.parametrize("first, name", [*enumerate(compare.GROUPS["positions"])])
def test_the_window_of_a_run_is_the_blocks_that_see_the_text(first, name):
    assert compare.window_of(run_of(name, 0)) == range(first, first + 3)
    assert compare.window_of(run_of(compare.BASE, 0)) == range(9)


def test_the_windows_of_size_s_go_from_its_first_blocks_to_its_last():
    windows = []
    for name in compare.GROUPS["positions"]:
        choice = compare.choice_of("S", name)
        windows.append(compare.window_of(run_of(name, 0) | {"choice": choice}))
    assert windows == [range(first, first + 3) for first in (0, 2, 4, 6, 8)]
    assert train.Config(**choice).depth == 13 and choice["n_image"] == 4    # 4 + 3 + 4 blocks
    assert compare.MODELS["shift+2"]["fuse_shift"] == 2
    with pytest.raises(UserError, match="expected windows or positions"):
        compare.main(compare.Config(models="text", task="S"))


def test_effects_are_of_the_seeds_that_all_their_models_have(capsys):
    rights = {"early-concat": (0.5, 0.6), "early-cross": (0.7, 0.8),
              "intermediate-concat": (0.4, 0.3), "intermediate-cross": (0.6, 0.5, 0.9)}
    models = {name: [run_of(name, seed, right) for seed, right in enumerate(shares)]
              for name, shares in rights.items()}
    for name, runs in models.items():
        ranks = {str(i): 9 for i in range(9)} | dict.fromkeys("234", 4)
        if name.startswith("intermediate"):
            ranks = dict.fromkeys("234", 3)
        for run in runs:
            run["where"] = [{"step": 301, "rank": ranks}]
    compare.print_effects(models, 300)
    title, _, fusion, conditioning = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in
        capsys.readouterr().out.strip().splitlines()]
    assert title[:3] == ["mean of both pairs", "seeds", "everything, %"]
    assert fusion[:3] == ["intermediate less early", "2", "undecided (-20.0 ± 127.1)"]  # -10, -30
    assert conditioning[:3] == ["cross_attention less concat", "2", "+20.0 ± 0.0"]
    assert title[-2].endswith("blocks that both have")          # 2, 3 and 4 of all four
    assert [fusion[-2], conditioning[-2]] == ["-25.0% ± 0.0", "undecided (+0.0% ± 0.0)"]
    assert title[-1] == "everything at equal work, %" and fusion[-1] == fusion[2]
    models |= {name: [run_of(name, 0, 0.95)] for name in ("shift-2", "shift-2-cross")}
    ranks = {"0": 18, "1": 18, "2": 9}                          # early: 9, 9 and 4
    models["shift-2"][0]["where"] = models["shift-2-cross"][0]["where"] = [
        {"step": 301, "rank": ranks}]
    compare.print_effects(models, 300)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.strip().splitlines()]
    assert rows[2][:3] == fusion[:3] and rows[5][:3] == conditioning[:3]
    assert rows[3][:3] == ["front less early", "1", "undecided (+35.0)"]
    assert rows[4][:3] == ["front less intermediate", "1", "undecided (+45.0)"]
    assert [row[-2] for row in rows[3:5]] == ["undecided (+104.5%)", "undecided (+200.0%)"]
    assert {len(row) for row in rows} == {len(title)}
    compare.print_effects({"early-cross": models["early-cross"]}, 300)
    assert capsys.readouterr().out == ""


def test_the_trend_is_the_slope_over_the_positions_of_each_whole_seed(capsys):
    rights = {"shift-2": (0.9, 0.8), "intermediate-concat": (0.5, 0.8), "shift+2": (0.3, 0.4, 0.1)}
    runs = {name: [run_of(name, seed, right) for seed, right in enumerate(shares)]
            for name, shares in rights.items()}
    slopes = compare.slopes_of(runs, 300, "everything")
    assert slopes == pytest.approx([-0.15, -0.1])       # not of seed 2, which has one alone
    compare.print_trend(runs, 300)
    assert "(2 seeds, step 300): -12.5 ± 31.8 points" in capsys.readouterr().out
    runs.pop("shift+2")
    compare.print_trend(runs, 300)                      # no line through two positions
    assert capsys.readouterr().out == ""


def test_intervals_are_students():
    values = [3.0, 4.0, 4.5, 7.0, 2.0]
    mean, half = compare.interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert compare.interval([5.0]) == (5.0, np.inf)
    assert compare.show_mean([5.0]) == "5.0"
    assert compare.show_mean([5.0, None, 6.0]) == "2 of 3"


def test_a_difference_whose_interval_holds_zero_is_undecided():
    show = compare.show_difference
    assert show([(80, 100), (82, 100), (78, 100)], "steps") == "-20.0% ± 5.0"
    assert show([(80, 100), (120, 100), (90, 100)], "steps").startswith("undecided (-3.3% ± ")
    assert show([(80, 100)], "steps") == "undecided (-20.0%)"               # a single seed
    assert show([(80, 90), (81, 90)], "everything, %") == "-9.5 ± 6.4"      # in points
    assert show([(80, None)], "steps") == show([], "steps") == ""


def test_the_report_has_tables_pictures_and_every_curve_of_every_run(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(compare.where, "draw_heat_map", lambda *inputs: drawn.append(inputs[1:]))
    for seed in (0, 1, 2):                              # the last point is later than `until`
        for name, shares in (("early-concat", (0.5, 0.8 + seed / 100, 0.96, 0)),
                             ("intermediate-concat", (0.5, 0.8 + seed / 100, 0.97, 0)),
                             ("shift-2", (0.7, 0.9 + seed / 100, 0.97, 0))):
            folder(name, seed).mkdir(parents=True)
            (folder(name, seed) / "curve.json").write_text(json.dumps(run_of(name, seed, *shares)))
    folder("shift+2").mkdir()
    (folder("shift+2") / "curve.json").write_text(json.dumps(run_of("shift+2", 0, 0.1)))
    for name, window in (("early-concat", range(9)), ("shift-2", range(3))):
        for seed in (0, 1):
            shares = {str(i): [0.1 * i + 0.02 * seed] * 5 for i in window}
            ranks = {str(i): 2 + i + seed for i in window}
            look = {"step": 901, "blocks": 9, "t": [100, 300, 500, 700, 900],
                    "lost_if_hidden": shares, "rank": ranks, "rank_text_alone": ranks}
            later = look | {"step": 1500, "lost_if_hidden": {block: [9] * 5 for block in shares}}
            (folder(name, seed) / "where.json").write_text(json.dumps([look, later]))
    elsewhere = run_of("text4", 5, 0.1)                 # trained on another machine
    longer = run_of("shift+2", 0, 0.1, 0.2)             # than here
    Path("results").mkdir()
    Path("results/results.json").write_text(json.dumps(
        {"shapes": [elsewhere, longer], "small": []}))

    monkeypatch.setattr(compare, "train_all", lambda *_: None)
    compare.main(compare.Config(models="all", until=900, to="results"))
    results = json.loads(Path("results/results.json").read_text())
    assert len(results["shapes"]) == 11 and results["small"] == []
    kept = {(run["name"], run["seed"]): run for run in results["shapes"]}
    assert kept["text4", 5] == json.loads(json.dumps(elsewhere))
    assert kept["shift+2", 0] == json.loads(json.dumps(longer))
    assert [look["step"] for look in kept["early-concat", 1]["where"]] == [901, 1500]
    for picture in ("work.png", "positions.png"):
        assert Path("results", picture).stat().st_size > 10_000
    (shares, _, title), = drawn                         # as far as all its seeds go, not `until`
    assert np.all(shares["8"] == 9) and "2 seeds, step 1,500" in title
    out = capsys.readouterr().out
    lines = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    assert not any("shift+2" in cell for line in lines for cell in line)        # not whole
    assert "no run has come to step 900: shift+2, text4." in out
    assert "relation" not in out                        # these runs have none
    rows = {tuple(cell.strip() for cell in line[1:4]) for line in lines}
    assert ("shift-2", "3", "97.0 ± 0.0") in rows
    assert ("intermediate-concat", "3", "+1.0 ± 0.0") in rows           # points
    assert ("shift-2", "2", "1 ± 13") in rows                           # block 0, 0 and 2%
    assert ("early-concat", "2", "2.50 ± 6.35") in rows                 # its rank, 2 and 3
    for run in results["shapes"]:                       # what is here now is of others
        if folder(run["name"], run["seed"]).exists():
            (folder(run["name"], run["seed"]) / "curve.json").write_text("{}")
    before = Path("results/results.json").read_bytes()
    report = compare.Config(models="all", until=900, report="results/results.json", to="again")
    monkeypatch.delattr(compare, "train_all")
    compare.main(report)
    assert capsys.readouterr().out == out.replace("pictures in results", "pictures in again")
    assert Path("results/results.json").read_bytes() == before
    assert {path.name for path in Path("again").iterdir()} == {"work.png", "positions.png"}
    Path("results/results.json").write_text("[]")
    with pytest.raises(UserError, match="results.json is damaged, or not runs"):
        compare.main(report)


def test_the_forecast_is_the_mean_over_the_blocks_of_each_window(capsys):
    models = {name: [run_of(name, seed) for seed in (0, 1)]
              for name in [compare.BASE, *compare.GROUPS["positions"]]}
    for seed, run in enumerate(models[compare.BASE]):
        lost = {str(i): [(9 - i) / 10 * (1 + seed)] for i in range(9)}  # 90, 80, ... 10%; doubled
        run["where"] = [{"step": 300, "t": [900], "lost_if_hidden": lost, "kept_if_alone": lost}]
    compare.print_forecast(models, 300)
    lost, kept = capsys.readouterr().out.strip().splitlines()[-2:]
    assert [cell.strip() for cell in lost.split("|")[1:-1]] == [
        "% lost if hidden, t = 900", "120 ± 508", "105 ± 445", "90 ± 381", "75 ± 318", "60 ± 254",
        "-15.0 ± 63.5"]
    assert kept.split("|")[2:] == lost.split("|")[2:]
    compare.print_forecast({name: models[name] for name in compare.GROUPS["positions"]}, 300)
    assert capsys.readouterr().out == ""                # early fusion is not among them


def test_a_sweep_is_drawn_from_the_folders_of_evaluate(tmp_path):
    for real in (False, True):
        for w in (3.0, 1.0):
            path = Path(f"real{real}/w{w}/eval.json")
            path.parent.mkdir(parents=True)
            shapes = {"seen": {"everything": w / 4}, "unseen": {"everything": w / 5}}
            path.write_text(json.dumps({
                "name": "last.pt", "protocol": {"guidance_scale": w, "steps": 20, "seed": 0},
                "scores": {"fid": 7 + w, "clip_prefix": 22 + w} if real else shapes}))
        compare.main(compare.Config(sweep=f"real{real}", to=f"to{real}"))
        assert Path(f"to{real}/guidance.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="holds no folders"):
        compare.main(compare.Config(sweep="nothing"))
