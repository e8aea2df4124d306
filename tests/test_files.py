"""Protects the gates of files: what is damaged or foreign is named and never run; one writer."""
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import randomise
from model import (CHECKPOINT_FORMAT, UserError, UViT, UViTConfig, find_weights, load_frozen,
                   one_writer, read_checkpoint, read_weights, sha256, write_json, writing)
from sample import Pipeline

TINY = UViTConfig("intermediate", "cross_attention", n_image=1, n_text=1, fuse_shift=1,
                  image_size=6, channels=5, patch_size=3, width=24, heads=3, context_len=6,
                  context_dim=10)
MARKER = Path("marker")                     # made by whatever should not run


def refusal(path, read=read_checkpoint) -> str:
    """The one line that refuses a file; it names the file, and gives no advice to trust it."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "\x1b" not in message
    assert "Re-running" not in message and "trust" not in message and not MARKER.exists()
    return message


@pytest.fixture(scope="module")
def contents():
    """What a network needs of a checkpoint."""
    return {"format": CHECKPOINT_FORMAT, "step": 7, "uvit": dataclasses.asdict(TINY),
            "meta": {}, "latent_scale": 1.0, "model": randomise(UViT(TINY), 0).state_dict(),
            "ema": randomise(UViT(TINY), 1).state_dict()}


def same(a, b) -> bool:
    """Equality of what a file of torch.save holds."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- checkpoints ----

def test_a_checkpoint_describes_its_own_architecture(contents):
    torch.save(contents, "last.pt")
    checkpoint = read_checkpoint("last.pt")
    assert checkpoint["uvit"] == TINY and checkpoint["step"] == 7
    net = load_frozen(UViT(checkpoint["uvit"]), checkpoint["ema"])
    assert same(net.state_dict(), contents["ema"])


@pytest.mark.parametrize("changes,words", [
    ({"uvit": None}, "TypeError"), ({"uvit": [1]}, "TypeError"), ({"uvit": {}}, "missing"),
    ({"uvit": dataclasses.asdict(TINY) | {"adaln": 1}}, "unexpected keyword argument 'adaln'"),
    ({"uvit": dataclasses.asdict(TINY) | {"fusion": "late"}}, "--fusion=late: expected early or"),
    ({"uvit": dataclasses.asdict(TINY) | {"n_fuse": 2}}, "4 blocks: expected an odd number"),
    ({"uvit": dataclasses.asdict(TINY) | {"width": 48}}, "size mismatch"),
    ({"ema": None}, "to be dict-like"), ({"ema": {}}, "Missing key.*pos_embed"),
    ({"ema": {"pos_embed": 3}}, "Missing key"), ({"ema": {7: 3}}, "damaged, or not"),
    ({"format": "midfuse-1"}, "of another version of this code"),
    ({"format": 2}, "of another version of this code")], ids=str)
def test_a_checkpoint_with_other_contents_is_refused(contents, changes, words):
    torch.save(contents | changes, "last.pt")
    with pytest.raises(UserError, match=f"(?s)last.pt.*{words}"):
        Pipeline("last.pt")


# ---- foreign files ----

def save(content):
    return lambda path: torch.save(content, path)


def write(content):
    return lambda path: path.write_bytes(content)


FOREIGN = {     # name -> how it is made, what its refusal says
    "missing": (lambda path: None, "is missing: expected a checkpoint"),
    "folder": (lambda path: path.mkdir(), "is not a file: expected a checkpoint"),
    "pipe": (os.mkfifo, "is not a file: expected a checkpoint"),
    "dead link": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "empty": (write(b""), "EOFError"), "letter": (write(b"a"), "is damaged, or not"),
    "text": (write(b"import torch"), "not of torch.save"),
    "zeros": (write(bytes(999)), "is damaged, or not"),
    "JSON": (write(b'{"a": 1}'), "damaged, or not"), "number": (write(b"0" * 99), "damaged, or"),
    "HTML": (write(b"\n <!DOCTYPE html><html>Google Drive"), "this is HTML or"),
    "LFS": (write(b"version https://git-lfs.github.com/spec/v1\noid"), "or a git-LFS pointer"),
    "huge header": (write(b"\xff" * 8 + b"{}"), "this is not a checkpoint"),
    "no header": (write(bytes(8) + b"{"), "is damaged, or not"),
    "list": (save([1, 2]), "is damaged, or not"), "None": (save(None), "NoneType"),
    "tensor": (save(torch.zeros(3)), "is damaged, or not"),
    "empty dict": (save({}), "this is not a checkpoint of train.py"),
    "numbers": (save({1: 2}), "this is not a checkpoint of train.py"),
    "other": (save({"epoch": 3, "state_dict": {}}), "this is not a checkpoint of train.py"),
    "lightning": (save({"state_dict": {}, "hyper_parameters": Namespace(lr=1)}),
                  "or more than weights"),
    "module": (save(torch.nn.Linear(2, 2)), "or more than weights"),
    "U-ViT's first key": (save({"pos_embed": torch.zeros(1, 80, 64)}), "KeyError: 'patch_embed"),
    "U-ViT of numbers": (save({"pos_embed": 1, "patch_embed.proj.weight": 2}), "AttributeError")}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_by_what_they_are(name):
    make, words = FOREIGN[name]
    make(Path("foreign.pt"))
    signal.alarm(20)                                        # a pipe would wait for ever
    try:
        with pytest.raises(UserError, match=words):
            read_checkpoint("foreign.pt")
        refusal("foreign.pt")
    finally:
        signal.alarm(0)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("marker",)


class Program(torch.nn.Module):
    """Its TorchScript archive writes a file as soon as torch.jit.load reads it."""

    @torch.jit.export
    def __getstate__(self):
        return (torch.zeros(1), self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(state[0], "marker")
        self.training = state[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [read_checkpoint, read_weights], ids=["checkpoint", "weights"])
def test_nothing_in_a_file_is_run(read):
    torch.jit.save(torch.jit.script(Program()), "program.pt")
    torch.jit.load("program.pt")
    assert MARKER.exists()                                  # this is what would happen
    MARKER.unlink()
    assert "TorchScript archives" in refusal("program.pt", read)
    torch.save({"pos_embed": Malicious()}, "zip.pt")
    torch.save({"pos_embed": Malicious()}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("pickle.pt").write_bytes(pickle.dumps({"pos_embed": Malicious()}))
    for name in ("zip.pt", "legacy.pt", "pickle.pt"):
        refusal(name, read)


def test_what_may_not_be_read_is_not_called_damaged(monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")
    Path("last.pt").touch()
    monkeypatch.setattr("builtins.open", deny)
    assert refusal("last.pt") == "last.pt: permission denied."


# ---- damage ----

def noticed_or_harmless(path: Path, damaged: bytes, content) -> bool:
    """Whether damage is noticed; if it is not, the very same tensors are read."""
    path.write_bytes(damaged)
    try:
        assert same(read_weights(path), content)
        return False
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True


def test_flipped_bits_are_noticed_or_harmless(contents):
    path, generator = Path("last.pt"), random.Random(0)
    torch.save(contents, path)
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")                      # of the zip, at its end
    places = [*range(0, 32), *generator.sample(range(len(whole)), 40),
              *generator.sample(range(directory, len(whole)), 40)]
    noticed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        noticed += noticed_or_harmless(path, bytes(damaged), contents)
    assert noticed > 60                                     # the others are padding and dates


def test_lost_pages_and_cut_files_are_noticed(contents):
    path = Path("last.pt")
    torch.save(contents, path)
    whole = path.read_bytes()
    for start in range(0, len(whole), 4096):                # a page of zeros
        damaged = whole[:start] + bytes(len(whole[start:start + 4096])) + whole[start + 4096:]
        assert noticed_or_harmless(path, damaged, contents), start
    for size in (1, 100, 4000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        assert noticed_or_harmless(path, whole[:size], contents), size


# ---- safetensors ----

TENSORS = {"float": torch.randn(2, 3), "half": torch.randn(4).half(), "scalar": torch.tensor(3.5),
           "brain": torch.randn(2).bfloat16(), "double": torch.randn(1, 1).double(),
           "int": torch.tensor([-1, 1]).int(), "long": torch.tensor([[7]]),
           "empty": torch.empty(0), "flat": torch.empty(3, 0).half()}


@pytest.mark.parametrize("name", ["a.safetensors", "B.SAFETENSORS", "pytorch_model.bin", "blob"])
def test_safetensors_are_recognised_by_content_and_read_as_they_are(name):
    save_file(TENSORS, name, metadata={"format": "pt"})
    Path("link").symlink_to(name)                           # as in the cache of Hugging Face
    for path in (name, "link"):
        read = read_weights(path)
        assert set(read) == set(TENSORS)
        for key, tensor in TENSORS.items():
            assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor)


def test_safetensors_with_a_header_of_any_length_are_read():
    """Of 288 bytes, for one: the file then begins with a space."""
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    for length in range(64, 321, 8):
        start = length.to_bytes(8, "little") + header.ljust(length)
        Path("blob").write_bytes(start + b"\0\0\x80?")
        assert read_weights("blob")["a"].tolist() == [1]


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},                 # beyond the end
    {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, {"dtype": "F32"}, 7,
    {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}], ids=str)
def test_safetensors_that_contradict_themselves_are_refused(entry):
    header = json.dumps({"a": entry}).encode()
    Path("blob").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refusal("blob", read_weights)


# ---- the public weights that data was encoded with ----

def test_weights_are_found_in_their_folder_and_compared_by_digest():
    Path("weights").mkdir()
    Path("weights/kl.bin").write_bytes(b"weights")
    digest = sha256("weights/kl.bin")
    for file in ("kl.bin", "/another/machine/kl.bin"):
        for expected in (None, digest):
            found = find_weights({"file": file, "sha256": expected}, "weights", "the autoencoder")
            assert found == Path("weights/kl.bin")
    with pytest.raises(UserError, match="clip.bin is missing: expected the tower.* 00"):
        find_weights({"file": "clip.bin", "sha256": "00"}, "weights", "the tower")
    with pytest.raises(UserError, match="kl.bin has another SHA-256: .* SHA-256 00"):
        find_weights({"file": "kl.bin", "sha256": "00"}, "weights", "the autoencoder")


# ---- writing ----

def test_a_file_is_written_whole_or_not_at_all(monkeypatch):
    write_json("a.json", {"a": 1, "b": "猫"})
    assert json.loads(Path("a.json").read_text()) == {"a": 1, "b": "猫"}
    with writing("a.json", "w") as file:
        file.write("new")
        file.flush()
        assert json.loads(Path("a.json").read_text())["a"] == 1         # not before the block ends
    assert Path("a.json").read_text() == "new"
    with pytest.raises(KeyError), writing("a.json") as file:
        file.write(b"half")
        raise KeyError
    monkeypatch.setattr(os, "fsync", lambda file: os.write(-1, b""))    # a full disk, at the end
    with pytest.raises(OSError), writing("a.json") as file:
        file.write(b"other")
    assert Path("a.json").read_text() == "new" and os.listdir() == ["a.json"]


# ---- one writer ----

def hold(entered, wait):
    with one_writer("run", wait):
        entered.set()
        time.sleep(60)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_second_writer_is_refused_or_waits_and_a_lock_dies_with_its_process(capfd):
    Path("run").mkdir()
    fork, processes = multiprocessing.get_context("fork"), []

    def start(wait=False):
        entered = fork.Event()
        processes.append(fork.Process(target=hold, args=(entered, wait), daemon=True))
        processes[-1].start()
        return entered

    def end(process, number):
        os.kill(process.pid, number)
        process.join(5)
        assert not process.is_alive()
    assert start().wait(10)
    with pytest.raises(UserError, match="another process is writing run: wait for it"):
        with one_writer("run"):
            pass
    waiting, patient = start(wait=True), start(wait=True)
    assert not waiting.wait(0.5)
    end(processes[1], signal.SIGINT)                        # who waits answers Ctrl-C
    end(processes[0], signal.SIGKILL)
    assert patient.wait(10) and not waiting.is_set()
    end(processes[2], signal.SIGKILL)
    with one_writer("run"):
        pass
    assert "waiting for the other process that writes run" in capfd.readouterr().out
