"""Protects the run: exact resume, the average, any division of the work, no way to lose it."""
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import prepare_data
import train
from model import UserError, noise_schedule, one_writer, read_checkpoint
from train import Config

ROOT = Path(train.__file__).parent
TINY = {"data": "data/tiny", "name": "run", "width": 32, "heads": 2, "n_image": 1, "n_fuse": 1,
        "n_text": 1, "depth": 5, "batch_size": 8, "steps": 6, "warmup": 2, "precision": "float32",
        "sample_steps": 2,
        "log_every": 1, "validate_every": 3, "draw_every": 100, "save_every": 100, "score": False}


def tiny(**changes) -> Config:
    return Config(**(TINY | changes))


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    prepare_data.main(prepare_data.Config(out=str(folder / "tiny"), train_images=40, val_images=10))
    prepare_data.main(prepare_data.Config(out=str(folder / "other"), train_images=30, val_images=10,
                                          seed=1))
    return folder


@pytest.fixture(autouse=True)
def data(alone, caches):
    Path("data").symlink_to(caches)


def weights(name="run", kind="model"):
    return read_checkpoint(f"out/{name}/last.pt")[kind]


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def close(a, b):
    return all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


# ---- resume ----

@pytest.mark.parametrize("changes", [
    {}, {"fusion": "early", "conditioning": "cross_attention", "grad_accum": 2}])
def test_three_steps_and_three_after_a_resume_are_six_bit_for_bit(changes, monkeypatch):
    train.main(tiny(name="whole", **changes))
    with monkeypatch.context() as context:
        stop_after(3, context)
        train.main(tiny(**changes))
    assert read_checkpoint("out/run/last.pt")["step"] == 3
    train.main(tiny(resume=True, **changes))
    whole, parts = read_checkpoint("out/whole/last.pt"), read_checkpoint("out/run/last.pt")
    assert parts["step"] == 6
    for kind in ("model", "ema"):
        assert equal(whole[kind], parts[kind])
    for a, b in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
        assert equal(a, b)
    assert parts["report"]["best"] == whole["report"]["best"]
    logs = [[line.split(",")[2] for line in Path(f"out/{name}/log.csv").read_text().splitlines()]
            for name in ("whole", "run")]
    assert logs[0] == logs[1]                               # the losses, each step once


def stop_after(step, monkeypatch, number=signal.SIGINT):
    """Press Ctrl-C, once, in the middle of a step."""
    rate, pressed = train.learning_rate, []

    def press(current, config):
        if current == step and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), number)
        return rate(current, config)
    monkeypatch.setattr(train, "learning_rate", press)


def test_ctrl_c_saves_and_prints_the_command_that_resumes(monkeypatch, capsys):
    stop_after(2, monkeypatch)
    train.main(tiny())
    assert read_checkpoint("out/run/last.pt")["step"] == 2
    printed = capsys.readouterr().out
    assert "Stopped at step 2" in printed and "--resume=True" in printed and "--name=run" in printed


def test_a_run_says_that_it_is_saved_before_it_is_scored(monkeypatch, capsys):
    def fail(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "main", fail)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny(steps=2, score=True))
    printed = capsys.readouterr().out
    assert "whole and saved; it is scored by:" in printed
    assert " --checkpoint=out/run/last.pt --data=data/tiny --steps=2\n" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_in_its_last_step_is_not_scored(monkeypatch, number):
    stop_after(2, monkeypatch, number)
    monkeypatch.setattr(evaluate, "main", lambda _: pytest.fail("scored"))
    train.main(tiny(steps=2, score=True))


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.open_run(tiny()) as (_, _, stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_resume_with_another_architecture_or_cache_is_refused_with_the_right_command():
    train.main(tiny(steps=1))
    with pytest.raises(UserError, match=r"another architecture.*--resume=True.*--width=32"):
        train.main(tiny(steps=2, width=64, resume=True))
    with pytest.raises(UserError, match="last.pt was trained with .*its own command is"):
        train.main(tiny(steps=2, data="data/other", resume=True))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"init_std": 0.1}, {"sincos_positions": False},
                                     {"weight_decay": 0.5}, {"beta": 0.7}], ids=str)
def test_what_would_have_no_effect_any_more_cannot_change_on_resume(changes):
    train.main(tiny(steps=1))
    with pytest.raises(UserError, match=f"trained with another {next(iter(changes))};"):
        train.main(tiny(steps=2, resume=True, **changes))


def test_a_constant_that_the_fusion_does_not_use_may_change_on_resume():
    train.main(tiny(steps=1))
    train.main(tiny(steps=2, resume=True, depth=9))
    assert read_checkpoint("out/run/last.pt")["step"] == 2


def test_the_log_of_a_resumed_run_is_that_of_an_unbroken_one(monkeypatch):
    train.main(tiny(name="whole", log_every=6, validate_every=6))
    with monkeypatch.context() as context:
        stop_after(4, context)
        train.main(tiny(log_every=6, validate_every=6))
    train.main(tiny(log_every=6, validate_every=6, resume=True))
    (_, whole), (_, resumed) = [Path(f"out/{name}/log.csv").read_text().splitlines()
                                for name in ("whole", "run")]
    both = [line.split(",") for line in (whole, resumed)]
    for line in both:
        del line[5], line[1]                            # images/s, seconds
    assert both[0] == both[1]


def test_a_second_writer_of_a_run_is_refused():
    train.main(tiny(steps=1))
    program = "import train; from test_train import tiny; train.main(tiny(steps=2, resume=True))"
    with one_writer("out/run"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert "another process is writing out/run: wait" in done.stderr
    train.main(tiny(steps=2, resume=True))


def test_a_resumed_log_has_every_step_once_whatever_was_done_to_it():
    train.main(tiny(steps=4, save_every=2))
    path = Path("out/run/log.csv")
    path.write_text(path.read_text().replace(",", ";") + "5,0.3")       # a spreadsheet; a cut line
    train.main(tiny(steps=6, resume=True))
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", *"123456"]


def test_a_new_run_never_writes_over_an_old_one_and_says_where_it_is(capsys):
    train.main(tiny(steps=1))
    before = Path("out/run/last.pt").read_bytes()
    train.main(tiny(steps=1, seed=1))
    told = "This run is out/run-2; to resume it: python train.py --data=data/tiny --name=run-2"
    assert told in capsys.readouterr().out
    assert Path("out/run/last.pt").read_bytes() == before
    assert read_checkpoint("out/run-2/last.pt")["config"]["name"] == "run-2"


# ---- the same result, however the work is divided ----

def test_accumulated_batches_equal_one_batch():
    train.main(tiny(name="one", batch_size=8))
    train.main(tiny(name="eight", batch_size=1, grad_accum=8))
    assert close(weights("one"), weights("eight"))


def test_two_processes_equal_one_with_the_same_batch():
    train.main(tiny(name="one", grad_accum=2))
    arguments = [f"--{key}={value}"
                 for key, value in (TINY | {"name": "two", "grad_accum": 2}).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", ROOT / "train.py", *arguments],
                   check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for kind in ("model", "ema"):
        assert close(weights("one", kind), weights("two", kind))
    assert read_checkpoint("out/one/last.pt")["report"]["best"] == pytest.approx(
        read_checkpoint("out/two/last.pt")["report"]["best"], abs=1e-5)


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_each_of_the_four_models_trains_from_the_same_constants(fusion, conditioning):
    train.main(tiny(steps=1, fusion=fusion, conditioning=conditioning, precision="bfloat16"))
    assert read_checkpoint("out/run/last.pt")["uvit"].fusion == fusion


# ---- the moving average, the batches, the rate ----

def test_the_moving_average_is_the_formula(monkeypatch):
    seen, recorded = [], []
    lerp = torch._foreach_lerp_

    def watch(ema, parameters, weight):
        recorded.extend(p for p in ema if p.requires_grad or torch.is_grad_enabled())
        if not seen:
            seen.append([p.detach().clone() for p in ema])
        lerp(ema, parameters, weight)
        seen.append(([p.detach().clone() for p in parameters], weight))
    monkeypatch.setattr(torch, "_foreach_lerp_", watch)
    train.main(tiny(steps=5, ema_decay=0.3))
    assert not recorded                         # by autograd, which would keep every step in memory
    expected = seen[0]
    for step, (parameters, weight) in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        assert weight == pytest.approx(1 - decay)
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, parameters)]
    for e, actual in zip(expected, weights(kind="ema").values()):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(e, actual, rtol=1e-5, atol=1e-6)


def batches(**changes):
    return train.Batches(prepare_data.read_cache("data/tiny"), tiny(**changes),
                         torch.device("cpu"))


def test_an_epoch_has_every_picture_once_and_epochs_differ_in_order_and_noise():
    data = batches()
    epochs = [torch.cat([data.choose(step, 8)[0] for step in range(5 * e, 5 * e + 5)])
              for e in range(2)]
    for pictures in epochs:
        assert sorted(pictures.tolist()) == list(range(40))
    assert not torch.equal(*epochs)
    straddling = torch.cat([data.choose(step, 16)[0] for step in range(5)])     # two epochs of 40
    assert sorted(straddling[:40].tolist()) == list(range(40)) == sorted(straddling[40:].tolist())


def test_a_batch_is_a_function_of_seed_and_step():
    first, again, other = batches().read(3), batches().read(3), batches(seed=1).read(3)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0]))
    assert not torch.equal(first[0][1], other[0][1])
    z0, eps, t, context = first[0]
    assert z0.shape == eps.shape == (8, 16, 8, 8) and context.shape == (8, 16, 64)
    assert t.min() >= 1 and t.max() <= 1000


def test_text_is_dropped_for_the_null_context_at_the_given_rate():
    assert (batches(p_uncond=1.0).choose(0, 40)[1] == 0).all()
    assert (batches(p_uncond=0.0).choose(0, 40)[1] != 0).all()
    rows = torch.cat([batches(p_uncond=0.1).choose(step, 40)[1] for step in range(100)])
    assert 0.08 < (rows == 0).float().mean() < 0.12


def test_each_picture_is_given_one_of_its_own_captions():
    data = batches(p_uncond=0.0)
    data.pairs = torch.tensor([[i, 100 * i + k] for i in range(40) for k in range(1 + i % 3)])
    data.first_pair = torch.searchsorted(data.pairs[:, 0].contiguous(), torch.arange(41))
    chosen = [data.choose(step, 40) for step in range(30)]
    for pictures, rows in chosen:
        assert (rows // 100 == pictures).all() and (rows % 100 <= pictures % 3).all()
    assert len({int(rows[pictures == 2]) for pictures, rows in chosen}) == 3


def test_the_rate_rises_stays_and_falls():
    config = tiny(steps=100, warmup=10, cooldown=0.5, learning_rate=1.0)
    rates = [train.learning_rate(step, config) for step in range(1, 101)]
    assert (rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
            and rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02))
    assert train.learning_rate(
        100, tiny(steps=100, warmup=0, cooldown=0.0, learning_rate=1.0)) == 1.0


def test_training_lowers_the_held_out_loss_and_best_is_kept():
    train.main(tiny(steps=60, validate_every=20, learning_rate=3e-3))
    lines = [line.split(",") for line in Path("out/run/log.csv").read_text().splitlines()]
    held_out = [float(line[-1]) for line in lines[1:] if line[-1]]
    assert len(held_out) == 3 and held_out[-1] < 0.9 * held_out[0]
    best = read_checkpoint("out/run/best.pt")["report"]["best"]
    assert best == pytest.approx(min(held_out), rel=1e-4)


def test_a_held_out_loss_that_is_not_finite_is_never_the_best():
    report = train.Report(tiny(), Path(), torch.device("cpu"))
    losses = 0.5, float("nan"), 0.9, 0.8, 0.4
    assert [report.judge(1.0, ema) for ema in losses] == [True, False, False, False, True]
    assert report.best == 0.4


# ---- failures ----

def poison(monkeypatch, steps):
    """Make the loss NaN at these steps."""
    compute, calls = train.compute_loss, []

    def broken(*arguments):
        if arguments[0].training:
            calls.append(1)
            if len(calls) in steps:
                return compute(*arguments) * float("nan")
        return compute(*arguments)
    monkeypatch.setattr(train, "compute_loss", broken)


def test_a_step_that_is_not_finite_is_left_out_and_counted(monkeypatch, capsys):
    poison(monkeypatch, {2})
    train.main(tiny(steps=3, name="poisoned"))
    assert "1 skipped: not finite" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in weights("poisoned").values())
    log = Path("out/poisoned/log.csv").read_text().splitlines()
    assert log[-1].split(",")[6] == "1"


def test_a_run_goes_on_while_some_steps_are_finite(monkeypatch):
    poison(monkeypatch, {step for step in range(100) if step % 4 == 0})
    train.main(tiny(steps=90))
    assert int(Path("out/run/log.csv").read_text().splitlines()[-1].split(",")[6]) > 10


def test_ten_such_steps_in_a_row_stop_the_run_with_advice(monkeypatch):
    train.main(tiny(steps=1))
    before = weights()
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(UserError, match="No step is finite any more.*--learning_rate"):
        train.main(tiny(steps=50, resume=True))
    assert equal(before, weights())


@pytest.fixture
def save():
    """Save a tiny checkpoint of the given step and weight."""
    def save(step, value=1.0):
        net = torch.nn.Linear(1, 1)
        net.config = tiny()
        torch.nn.init.constant_(net.weight, value)
        cache = prepare_data.read_cache("data/tiny")
        train.save_checkpoint(Path(), {"model": net, "ema": net}, tiny(), cache, "last.pt", step)
    return save


def test_a_crash_or_a_full_disk_while_saving_costs_nothing(monkeypatch, save):
    save(1)

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save(2)

    def kill(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(3)
    assert torch.load("last.pt", weights_only=True)["step"] == 1


def test_a_really_full_disk_is_answered_and_leaves_nothing_behind():
    program = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
import train; from test_train import tiny; train.main(tiny(steps=2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, check=False)
    assert "File too large: 'out/run/last.pt'" in done.stderr
    assert not list(Path("out/run").glob("*last*")) + list(Path("out/run").glob(".last*"))


def test_only_the_last_checkpoint_may_stop_a_run(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.sample, "draw_grid", full)
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *arguments: (
        full() if "best.pt" in arguments else save(*arguments)))
    train.main(tiny(draw_every=2))
    printed = capsys.readouterr().out
    assert printed.count("the sample grid is not written ([Errno 28] No space left on device") == 3
    assert printed.count("best.pt is not written") == 2
    assert read_checkpoint("out/run/last.pt")["step"] == 6


def test_a_closed_terminal_does_not_stop_a_run(monkeypatch):
    class Closed:
        def write(self, _):
            raise OSError(5, "Input/output error")
        flush = write
    monkeypatch.setattr(sys, "stdout", Closed())
    train.main(tiny())
    assert read_checkpoint("out/run/last.pt")["step"] == 6


def test_a_broken_compiler_costs_the_speed_and_not_the_run(monkeypatch, capsys):
    def broken(function):
        def fail(*_):
            raise RuntimeError("no C compiler found")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    train.main(tiny(steps=2, compile="on"))
    told = "torch.compile failed and is off (RuntimeError: no C compiler found)"
    assert told in capsys.readouterr().out
    assert read_checkpoint("out/run/last.pt")["step"] == 2


def test_gradients_are_not_clipped_at_zero():
    train.main(tiny(name="free", steps=2, grad_clip=0.0))
    train.main(tiny(name="high", steps=2, grad_clip=1e9))
    assert equal(weights("free"), weights("high"))


def test_pictures_that_are_not_finite_are_left_out_and_said(monkeypatch, capsys):
    class Broken:
        def decode(self, z):
            raise FloatingPointError("The output has NaN.")

        def to(self, device):
            return self
    monkeypatch.setattr(train, "load_autoencoder", lambda *_: Broken())
    train.main(tiny(steps=1))
    assert "the sample grid is not written (The output has NaN.)" in capsys.readouterr().out


def test_a_run_whose_name_has_a_folder_names_itself_rightly(monkeypatch, capsys):
    stop_after(2, monkeypatch)
    train.main(tiny(name="some/run"))
    assert "--name=some/run" in capsys.readouterr().out.split("resume with:")[1]


@pytest.mark.parametrize("key, value", [
    ("optimizer", None), ("optimizer", {}), ("model", {}), ("report", {}), ("config", {"gone": 1}),
    ("ema", {"pos_embed": torch.zeros(3)}), ("scaler", "none")])
def test_a_checkpoint_that_is_no_run_cannot_be_resumed(key, value):
    train.main(tiny(steps=1))
    path = Path("out/run/last.pt")
    checkpoint = torch.load(path, weights_only=True) | {key: value}
    if value is None:
        del checkpoint[key]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="out/run/last.pt"):
        train.main(tiny(resume=True, precision="float16" if key == "scaler" else "float32"))


def test_few_held_out_pictures_are_measured_at_many_noise_levels():
    cache = prepare_data.read_cache("data/tiny")
    held_out = train.HeldOut(cache, tiny(), noise_schedule().float(), torch.float32)
    t = torch.cat([batch[2] for batch in held_out.batches])
    assert len(t) >= 100 and len(t.unique()) > 90 and t.min() == 1 and t.max() == 1000


def test_drawing_is_not_training_time():
    def draw(*_):
        time.sleep(0.5)
    train.main(tiny(steps=4, log_every=4, validate_every=4, draw_every=1), draw)
    line = Path("out/run/log.csv").read_text().splitlines()[-1].split(",")
    assert float(line[1]) > 1.5 and float(line[5]) > 4 * 8 / 1.5   # seconds, images/s


@pytest.mark.parametrize("changes, words", [
    ({"batch_size": 0}, "batch_size=0"), ({"precision": "half"}, "--precision=half"),
    ({"compile": "yes"}, "--compile=yes"), ({"data": "data/none"}, "prepare_data.py"),
    ({"resume": True}, "out/run is missing"),
    ({"n_fuse": 2}, "4 blocks: expected an odd number"), ({"seed": -1}, "seed=-1"),
    ({"name": "/run"}, "below out/"), ({"name": "."}, "below out/"), ({"name": "a/../b"}, "below"),
    ({"name": "lr3e-3,bs32"}, "without a comma"), ({"sample_steps": 0}, "sample_steps=0")])
def test_mistakes_are_answered_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        train.main(tiny(**changes))


def test_only_the_folder_of_the_shapes_is_filled_by_itself(monkeypatch):
    monkeypatch.setattr(Config, "data", "data/mine")            # its constant is edited
    monkeypatch.setattr(prepare_data, "main", lambda config: pytest.fail("shapes are drawn"))
    with pytest.raises(UserError, match="data/mine/meta.json is missing"):
        train.main(tiny(data="data/mine"))


def test_the_whole_house_from_the_command_line():
    def call(script, *arguments):
        done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
    Path("data").unlink()
    call("prepare_data.py", "--out=data/tiny", "--train_images=40", "--val_images=10")
    options = TINY | {"score": False, "draw_every": 6, "name": "house"}
    printed = call("train.py", *[f"--{key}={value}" for key, value in options.items()])
    assert "python sample.py --checkpoint=out/house/last.pt" in printed
    assert Path("out/house/samples/step_000006.png").exists()
    call("sample.py", "--checkpoint=out/house/last.pt", "--prompt=one red circle", "--n=2",
         "--steps=2")
    assert sorted(path.name for path in Path("out/house/generated/0001").iterdir()) == \
        ["00000.png", "00001.png", "captions.txt", "grid.png"]
    printed = call("evaluate.py", "--checkpoint=out/house/last.pt", "--data=data/tiny", "--n=10",
                   "--steps=2")
    assert "real pictures (ceiling)" in printed and Path("out/house/eval.json").exists()


def test_every_constant_reaches_the_checkpoint():
    train.main(tiny(steps=1, p_uncond=0.25))
    assert Config(**read_checkpoint("out/run/last.pt")["config"]) \
        == dataclasses.replace(tiny(steps=1, p_uncond=0.25), name="run")
