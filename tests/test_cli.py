"""Protects the command line: what a constant accepts; mistakes get one sentence, no traceback."""
import dataclasses
import errno
import importlib
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings, strategies

from model import (Constants, FilePath, Natural, Positive, Unit, UserError, command,
                   parse_arguments, run)

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train", "sample", "prepare_data", "evaluate"]


@dataclass
class Config(Constants):
    # the picture
    prompt: str = "a cat"           # what to draw
    out: FilePath | None = None     # a new folder; None: the next one
    seed: Natural = 0
    # the solver
    steps: Positive = 50            # of the solver; 3 + 4 is no problem
    learning_rate: Unit = 3e-3     # see [CFG] # twice
    shift: int = 0
    how: Literal["concat", "cross"] = "concat"
    raw: bool = False               # True: without the average
    save_every: Annotated[int, 1, 500] = 500


def answer(monkeypatch, capsys, *arguments, main=lambda config: print(config)):
    """(exit status, standard output, standard error) of a script, as Python's own exit would be."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    status, message = 0, ""
    try:
        run(main, Config)
    except SystemExit as stop:
        status, message = (1, f"{stop.code}\n") if isinstance(stop.code, str) else (stop.code, "")
    out, err = capsys.readouterr()
    return status, out, err + message


# ---- what is accepted ----

@pytest.mark.parametrize("arguments,field,value", [
    (["--learning_rate=1"], "learning_rate", 1.0), (["--learning_rate", "0"], "learning_rate", 0.0),
    (["--steps=7"], "steps", 7), (["--steps", "7"], "steps", 7), (["--shift", "-3"], "shift", -3),
    (["--raw"], "raw", True), (["--raw=True"], "raw", True), (["--raw", "True"], "raw", True),
    (["--raw=False"], "raw", False), (["--how", "cross"], "how", "cross"),
    (["--out=deep/new"], "out", "deep/new"), (["--out=None"], "out", None),
    (["--out", "~/new"], "out", str(Path.home() / "new")),
    (["--prompt=2+2=4"], "prompt", "2+2=4"), (["--prompt="], "prompt", ""),
    (["--prompt", "a dog"], "prompt", "a dog"), (["--prompt=~/a"], "prompt", "~/a"),
    (["--prompt=a --steps=3 dog"], "prompt", "a --steps=3 dog"),
    (["--prompt=--help"], "prompt", "--help"), (["--prompt=None"], "prompt", "None"),
    (["--prompt=猫"], "prompt", "猫")], ids=str)
def test_a_value_is_read_as_the_kind_of_its_constant(arguments, field, value):
    config = parse_arguments(Config, arguments)
    assert config == dataclasses.replace(Config(), **{field: value})
    assert type(getattr(config, field)) is type(value)


def test_several_constants_hold_together_and_the_others_keep_their_defaults():
    assert parse_arguments(Config, []) == Config()
    assert parse_arguments(Config, ["--raw", "--steps=3"]) == Config(steps=3, raw=True)


configurations = strategies.builds(
    Config, prompt=strategies.text(strategies.characters(codec="utf-8", exclude_characters="\0")),
    seed=strategies.integers(0, 2 ** 31 - 1), learning_rate=strategies.floats(0, 1),
    shift=strategies.integers(-10, 10), how=strategies.sampled_from(["concat", "cross"]),
    raw=strategies.booleans(), out=strategies.none() | strategies.just("a b/'c'"))


@settings(deadline=None, derandomize=True)
@given(configurations)
def test_the_command_of_a_configuration_gives_it_back(config):
    assert parse_arguments(Config, shlex.split(command("script.py", config))[2:]) == config


# ---- what is refused ----

NATURAL = "expected a whole number from 0 to 2,147,483,647."
WRONG = {       # name of a constant -> wrong values, what is expected
    "seed": (["many", "3.0", "1e3", "nan", "inf", "", "-1", "2147483648", "9" * 5000], NATURAL),
    "learning_rate": (["fast", "1,5", "nan", "-inf", "inf", "", "1.1", "-1e-9", "9" * 5000],
                      "expected a number from 0 to 1."),
    "save_every": (["0", "501"], "expected a whole number from 1 to 500."),
    "raw": (["true", "1", "yes", ""], "expected True or False."),
    "how": (["late", "", "Concat"], "expected concat or cross."),
    "prompt": (["\udcff", "a\0b"], "expected text in UTF-8."),
    "out": (["\udcff", "a\0b"], "expected text in UTF-8.")}


@pytest.mark.parametrize("name,value,expected", [
    (name, value, expected) for name, (values, expected) in WRONG.items() for value in values],
    ids=lambda value: repr(value)[:20])
def test_a_value_is_checked_once_for_the_command_line_and_for_python(name, value, expected):
    with pytest.raises(UserError) as shell:
        parse_arguments(Config, [f"--{name}={value}"])
    with pytest.raises(UserError) as python:
        Config(**{name: value})
    assert str(shell.value) == str(python.value) == f"--{name}={value[:100]}: {expected}"


@pytest.mark.parametrize("name,value", [
    ("steps", 3.0), ("steps", True), ("steps", None), ("steps", -1), ("learning_rate", 2),
    ("learning_rate", float("nan")), ("raw", 1), ("raw", None), ("prompt", 7), ("prompt", None),
    ("how", None), ("out", 7)])
def test_python_values_of_another_kind_are_refused(name, value):
    with pytest.raises(UserError, match=f"^--{name}={value}: expected "):
        Config(**{name: value})


@pytest.mark.parametrize("arguments,message", [
    (["--setps=3"], "'--setps=3' is no constant: did you mean --steps?"),
    (["--step=3"], "'--step=3' is no constant: did you mean --steps?"),
    (["--lr=3"], "'--lr=3' is no constant: did you mean --learning_rate?"),
    (["--learning-rate=3"], "'--learning-rate=3' is no constant: did you mean "
                            "--learning_rate?"),
    (["--Steps=3"], "'--Steps=3' is no constant: did you mean --steps?"),
    (["steps=3"], "'steps=3' is no constant: did you mean --steps?"),
    (["-steps=3"], "'-steps=3' is no constant: did you mean --steps?"),
    (["--steps=3", "dog"], "'dog' is no constant: did you mean --"),
    (["--prompt", "a", "dog"], "'dog' is no constant"), (["--=3"], "'--=3' is no constant"),
    (["--\udcff=3"], "'--\\udcff=3' is no constant"), (["@file"], "'@file' is no constant"),
    (["--"], "'--' is no constant"), ([""], "'' is no constant"),
    (["--prompt"], "argument --prompt: expected one argument"),
    (["--prompt", "--steps=3"], "argument --prompt: expected one argument"),
    (["--steps=3", "--steps=3"], "--steps is given 2 times: leave only one of them."),
    (["--raw", "--raw=False"], "--raw is given 2 times: leave only one of them."),
    (["--steps=a\nb"], "--steps=a b: expected a whole number")], ids=repr)
def test_a_mistake_is_answered_in_one_line_that_names_it(monkeypatch, capsys, arguments, message):
    status, out, err = answer(monkeypatch, capsys, *arguments)
    assert status == 1 and out == ""                                # main was not called
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and err.endswith("\n")


MEMORY = "error: out of memory: halve --batch_size (train.py: double --grad_accum, for the same " \
         "steps), or take a smaller model "


def test_what_the_machine_lacks_is_answered_in_one_line(monkeypatch, capsys):
    def failing(error):
        def main(config):
            raise error
        return answer(monkeypatch, capsys, main=main)[::2]
    for error, line in {
            UserError("no such folder."): "error: no such folder.",
            KeyboardInterrupt(): "interrupted",
            OSError(errno.ENOSPC, "No space left on device", "out/a.pt"):
                "error: out/a.pt: No space left on device.",
            PermissionError(errno.EACCES, "Permission denied", "out"):
                "error: out: Permission denied.",
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"):
                MEMORY + r"(OutOfMemoryError('CUDA out of memory.\nTried to allocate 2 GiB'))",
            MemoryError("Unable to allocate 71 PiB"):
                MEMORY + "(MemoryError('Unable to allocate 71 PiB'))",
            RuntimeError("DefaultCPUAllocator: can't allocate memory"):     # torch's, on a CPU
                MEMORY + """(RuntimeError("DefaultCPUAllocator: can't allocate memory"))""",
            FloatingPointError("The autoencoder gave NaN."): "error: The autoencoder gave NaN.",
            }.items():
        assert failing(error) == (1, line + "\n")
    stdout = sys.stdout
    assert failing(BrokenPipeError()) == (1, "")
    assert sys.stdout is not stdout         # or its flush at the exit would print a traceback
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(KeyError, match="a bug"):        # only mistakes of ours have a traceback
        failing(KeyError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))


# ---- help ----

@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--setps=3", "--help"]], ids=" ".join)
def test_help_is_printed_and_nothing_is_run(monkeypatch, capsys, arguments):
    status, out, err = answer(monkeypatch, capsys, *arguments)
    assert status == 0 and err == ""
    assert out.startswith(__doc__.strip())
    assert out.endswith('    save_every: Annotated[int, 1, 500] = 500\n\n')
    assert 'prompt: str = "a cat"           # what to draw' in out


# ---- the four commands ----

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_the_scripts_refuses_wrong_values_and_takes_its_default(script):
    """Wrong kind, empty, huge, negative, not a number, twice: each for every option."""
    Config, tried = importlib.import_module(script).Config, 0
    assert parse_arguments(Config, [f"--{field.name}={field.default}"
                                    for field in dataclasses.fields(Config)]) == Config()
    numbers = ["many", "", "9" * 5000, "1e308", "-1e308", "nan", "inf", "-inf", "0x10", "1,5"]
    for name, hint in get_type_hints(Config, include_extras=True).items():
        text = "str" in str(hint)
        default = getattr(Config, name)
        wrong = ["\udcff", "a\0b"] if text and "Literal" not in str(hint) else numbers
        arguments = [[f"--{name}={value}"] for value in wrong]
        arguments += [[f"--{name}={default}"] * 2, [f"--{name}x=1"], [f"--{name}", f"--{name}"]]
        if get_args(hint)[:1] == (int,) and not isinstance(get_args(hint)[1], str):
            low, high = get_args(hint)[1:]
            arguments += [[f"--{name}={low - 1}"], [f"--{name}={high + 1}"]]
        for one in arguments:
            with pytest.raises(UserError, match=f"^'?(argument )?--{name}"):
                parse_arguments(Config, one)
        tried += len(arguments)
    assert tried > 40


def test_the_scripts_run_as_programs(monkeypatch, capsys):
    """An architecture flag, which sample.py lacks; help; a reader who leaves; no traceback."""
    cut = subprocess.Popen([sys.executable, ROOT / "sample.py", "--help"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    cut.stdout.close()
    monkeypatch.setattr(sys, "argv", ["sample.py", "--width=256"])
    with pytest.raises(SystemExit, match="^error: '--width=256' is no constant"):
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--help"])
    runpy.run_path(str(ROOT / "prepare_data.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert err == "" and '    dataset: Literal["shapes", "coco", "folder"] = "shapes"' in out
    assert "train_images: " in out and "def " not in out
    assert out.startswith(importlib.import_module("prepare_data").__doc__.strip())
    assert cut.stderr.read() == b"" and cut.wait(timeout=120) == 1
