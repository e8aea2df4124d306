"""Protects the command line: what --key=value accepts; mistakes get a sentence, no traceback."""
import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model import UserError, describe, override, run

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train", "sample", "prepare_data", "evaluate"]


@dataclass
class Config:
    # the picture
    prompt: str = "a cat"           # what to draw
    seed: int = 0
    # the solver
    steps: int = 50                 # of the solver; 3 + 4 is no problem
    learning_rate: float = 3e-3     # see [CFG] # twice
    raw: bool = False               # True: without the average
    save_every: int = 500


def answer(monkeypatch, capsys, *arguments, main=lambda config: print(config)):
    """(exit status, standard output, standard error) of a script, as Python's own exit would be."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    status, message = 0, ""
    try:
        run(main, Config)
    except SystemExit as stop:
        status, message = ((1, f"{stop.code}\n") if isinstance(stop.code, str)
                           else (stop.code or 0, ""))
    out, err = capsys.readouterr()
    return status, out, err + message


# ---- what is accepted ----

@pytest.mark.parametrize("argument,field,value", [
    ("--learning_rate=1", "learning_rate", 1.0), ("--learning_rate=-1e-4", "learning_rate", -1e-4),
    ("--steps=7", "steps", 7), ("--seed=-3", "seed", -3),
    ("--raw=True", "raw", True), ("--raw=False", "raw", False),
    ("--prompt=2+2=4", "prompt", "2+2=4"), ("--prompt=", "prompt", ""),
    ("--prompt=a --steps=3 dog", "prompt", "a --steps=3 dog"), ("--prompt=7", "prompt", "7"),
    ("--prompt=--help", "prompt", "--help"), ("--prompt='quoted'", "prompt", "'quoted'"),
    ("--prompt=猫", "prompt", "猫")])
def test_a_value_is_read_as_the_type_of_its_constant(argument, field, value):
    config = override(Config, [argument])
    assert config == dataclasses.replace(Config(), **{field: value})
    assert type(getattr(config, field)) is type(value)


def test_without_arguments_every_constant_keeps_its_default():
    assert override(Config, []) == Config()


def test_several_overrides_hold_together_and_of_two_the_later_one_wins():
    assert override(Config, ["--steps=3", "--raw=True", "--steps=4"]) == Config(steps=4, raw=True)


def test_main_gets_the_configuration(monkeypatch, capsys):
    received = []
    assert answer(monkeypatch, capsys, "--steps=3", main=received.append) == (0, "", "")
    assert received == [Config(steps=3)]


def test_out_of_memory_is_answered_in_one_line(monkeypatch, capsys):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    status, _, err = answer(monkeypatch, capsys, main=full)
    assert status == 1 and err == "error: out of memory (CUDA out of memory.)\n"


# ---- what is refused ----

@pytest.mark.parametrize("arguments,message", [
    (["--steps=many"], "--steps=many: expected a whole number."),
    (["--steps=3.0"], "--steps=3.0: expected a whole number."),
    (["--steps=1e3"], "--steps=1e3: expected a whole number."),
    (["--steps=nan"], "--steps=nan: expected a whole number."),
    (["--steps="], "--steps=: expected a whole number."),
    (["--learning_rate=fast"], "--learning_rate=fast: expected a number."),
    (["--learning_rate=1,5"], "--learning_rate=1,5: expected a number."),
    (["--raw=true"], "--raw=true: expected True or False."),
    (["--raw=1"], "--raw=1: expected True or False."),
    (["--raw=yes"], "--raw=yes: expected True or False."),
    (["--raw="], "--raw=: expected True or False."),
    (["--setps=3"], "--setps is not a constant of this script; did you mean --steps?"),
    (["--step=3"], "--step is not a constant of this script; did you mean --steps?"),
    (["--learning=3"],
     "--learning is not a constant of this script; did you mean --learning_rate?"),
    (["--learning-rate=3"],
     "--learning-rate is not a constant of this script; did you mean --learning_rate?"),
    (["--Steps=3"], "--Steps is not a constant of this script; did you mean --steps?"),
    (["--=3"], "-- is not a constant of this script"),
    (["--prompt", "a dog"], "'--prompt' is not an override; write it as --prompt=VALUE."),
    (["--raw"], "'--raw' is not an override; write it as --raw=True."),
    (["a dog"], "'a dog' is not an override; write it as --key=value."),
    (["steps=3"], "'steps=3' is not an override; write it as --steps=VALUE."),
    (["-steps=3"], "'-steps=3' is not an override"),
    ([""], "'' is not an override; write it as --key=value."),
    (["--"], "'--' is not an override; write it as --key=value."),
    (["--steps=3", "dog"], "'dog' is not an override"),
    (["--steps=3", "--raw=yes"], "--raw=yes: expected True or False.")], ids=" ".join)
def test_a_mistake_is_answered_in_one_line_that_names_it(monkeypatch, capsys, arguments, message):
    status, out, err = answer(monkeypatch, capsys, *arguments)
    assert status == 1 and out == ""                                # main was not called
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and err.endswith("\n")


def test_only_mistakes_of_the_user_are_answered_without_a_traceback(monkeypatch, capsys):
    def wrong_folder(config):
        raise UserError("no such folder.")

    def bug(config):
        raise ValueError("a bug")
    assert answer(monkeypatch, capsys, main=wrong_folder) == (1, "", "error: no such folder.\n")
    with pytest.raises(ValueError, match="a bug"):
        answer(monkeypatch, capsys, main=bug)


# ---- help ----

def test_help_lists_every_constant_with_its_default_and_its_comment():
    assert describe(Config).splitlines() == [
        "the picture",
        '  --prompt="a cat"                        what to draw',
        "  --seed=0",
        "",
        "the solver",
        "  --steps=50                              of the solver; 3 + 4 is no problem",
        "  --learning_rate=3e-3                    see [CFG] # twice",
        "  --raw=False                             True: without the average",
        "  --save_every=500"]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--setps=3", "--help"]], ids=" ".join)
def test_help_is_printed_and_nothing_is_run(monkeypatch, capsys, arguments):
    status, out, err = answer(monkeypatch, capsys, *arguments)
    assert status == 0 and err == ""
    assert out.startswith(__doc__.strip()) and describe(Config) in out and "Config(" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_the_scripts_leaves_nothing_out(script):
    Config = importlib.import_module(script).Config
    fields = dataclasses.fields(Config)
    lines = describe(Config).splitlines()
    listed = {line.strip().removeprefix("--").split("=")[0]: line
              for line in lines if line.startswith("  --")}
    assert list(listed) == [field.name for field in fields]
    for field in fields:
        assert field.type in (int, float, bool, str), f"{field.name} can't be overridden"
        shown = listed[field.name].split("=", 1)[1].split("  ")[0].strip()
        assert ast.literal_eval(shown) == field.default and type(field.default) is field.type
    comments = [line.split("  # ")[1].strip()
                for line in inspect.getsource(Config).splitlines() if "  # " in line.strip()]
    assert all(comment in "\n".join(lines) for comment in comments) and len(comments) > 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_of_the_scripts_can_be_set_to_its_own_default(script):
    Config = importlib.import_module(script).Config
    arguments = [f"--{field.name}={field.default}" for field in dataclasses.fields(Config)]
    assert override(Config, arguments) == Config()


def test_the_scripts_answer_from_a_shell():
    """sample.py with an architecture flag, which it lacks; prepare_data.py --help; no traceback."""
    commands = [["sample.py", "--width=256"], ["prepare_data.py", "--help"]]
    processes = [subprocess.Popen([sys.executable, ROOT / script, *arguments],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True, encoding="utf-8")
                 for script, *arguments in commands]
    (wrong_out, wrong_err), (help_out, help_err) = [process.communicate(timeout=120)
                                                    for process in processes]
    assert [process.returncode for process in processes] == [1, 0]
    assert wrong_err.startswith("error: --width is not a constant of this script; did you mean --")
    assert wrong_err.count("\n") == 1 and wrong_out == ""
    assert help_err == "" and help_out.startswith(
        importlib.import_module("prepare_data").__doc__.strip())
    assert "  --dataset=\"shapes\"" in help_out
