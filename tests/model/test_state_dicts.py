"""Source weights as people have them: what is taken, what is said, what is refused."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

import finetune
from finetune.system.errors import WeightsError
from tests.conftest import Train
from tests.support.tiny_network import load_into, tiny

State = dict[str, Tensor]
NUM_CLASSES = 5


def plain(num_classes: int = NUM_CLASSES) -> State:
    return dict(tiny(num_classes, seed=7).state_dict())


def prefixed(prefix: str, state: State | None = None) -> State:
    return {prefix + key: tensor for key, tensor in (state or plain()).items()}


def without(words: str, state: State | None = None) -> State:
    return {k: v for k, v in (state or plain()).items() if words not in k}


def headless() -> State:
    return without("fc.")


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def load(path: Path) -> tuple[State, list[str], str]:
    """The network with the weights of a file, the lines logged, and the fingerprint."""
    model, lines = tiny(NUM_CLASSES, seed=1), list[str]()
    source = load_into(model, str(path), lines.append)
    return dict(model.state_dict()), lines, source


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


PREFIXES = (
    *("module.", "model.", "_orig_mod.", "net.", "backbone.", "network."),
    *("_orig_mod.module.", "model.backbone."),
)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_removed_and_logged(prefix: str, suffix: str, tmp_path: Path) -> None:
    state, lines, source = load(save(prefixed(prefix), tmp_path / f"weights{suffix}"))
    expected = plain()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert lines == [f"weights: {tmp_path}/weights{suffix}: prefix {prefix!r} removed"]
    assert source == load(save(expected, tmp_path / "plain.pth"))[2]


WRAPPERS = {
    "DataParallel": (nn.DataParallel, "prefix 'module.' removed"),
    "compile": (torch.compile, "prefix '_orig_mod.' removed"),
    "AveragedModel": (
        torch.optim.swa_utils.AveragedModel,
        "prefix 'module.' removed, n_averaged outside it left out",
    ),
}


@pytest.mark.parametrize(("wrap", "note"), WRAPPERS.values(), ids=WRAPPERS)
def test_weights_of_torchs_own_wrappers_are_read(
    wrap: Callable[[nn.Module], nn.Module], note: str, tmp_path: Path
) -> None:
    state, lines, _ = load(save(wrap(tiny(5, seed=7)).state_dict(), tmp_path / "w.pth"))
    assert torch.equal(state["fc.weight"], plain()["fc.weight"])
    assert lines == [f"weights: {tmp_path}/w.pth: {note}"]


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "net"])
def test_a_state_dict_within_a_checkpoint_is_read(entry: str, tmp_path: Path) -> None:
    content = {"epoch": 3, "optimizer": {"state": {}}, "arch": "resnet18", entry: plain()}
    state, lines, source = load(save(content, tmp_path / "w.pth"))
    assert torch.equal(state["conv1.weight"], plain()["conv1.weight"])
    assert lines == [f"weights: {tmp_path}/w.pth: entry {entry!r} read"]
    assert source == load(save(plain(), tmp_path / "plain.pth"))[2]


class Lit(pl.LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny(10, seed=7)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))


def test_a_lightning_checkpoint_is_read_without_the_weights_of_its_loss(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(Lit(learning_rate=0.1))
    trainer.save_checkpoint(tmp_path / "lit.ckpt")
    state, lines, _ = load(tmp_path / "lit.ckpt")
    assert torch.equal(state["conv1.weight"], plain(10)["conv1.weight"])
    assert lines == [
        f"weights: {tmp_path}/lit.ckpt: entry 'state_dict' read; prefix 'model.' removed, "
        "criterion.weight outside it left out; head fc left out"
    ]


def test_missing_counters_of_batches_are_taken_as_0(tmp_path: Path) -> None:
    content = prefixed("module.", without("num_batches_tracked"))
    state, lines, source = load(save(content, tmp_path / "w.pth"))
    assert state["layer1.0.bn1.num_batches_tracked"] == 0
    note = "prefix 'module.' removed; num_batches_tracked missing, taken as 0"
    assert lines == [f"weights: {tmp_path}/w.pth: {note}"]
    assert source == load(save(plain(), tmp_path / "plain.pth"))[2]


OTHER_HEADS: dict[str, tuple[State, str]] = {
    "other classes": ({"fc.weight": torch.ones(9, 16), "fc.bias": torch.ones(9)}, "fc"),
    "no bias": ({"fc.weight": torch.ones(5, 16)}, "fc"),
    "Sequential": (
        {"fc.0.weight": torch.ones(8, 16), "fc.0.bias": torch.ones(8)}
        | {"fc.3.weight": torch.ones(5, 8), "fc.3.bias": torch.ones(5)},
        "fc.0 and fc.3",
    ),
    "classifier": ({"classifier.1.weight": torch.ones(5, 16)}, "classifier.1"),
    "head": ({"head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}, "head"),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_another_head_is_left_out_and_the_network_keeps_its_own(name: str, tmp_path: Path) -> None:
    head, shown = OTHER_HEADS[name]
    state, lines, source = load(save(headless() | head, tmp_path / "w.pth"))
    assert torch.equal(state["fc.weight"], tiny(5, seed=1).fc.weight)
    assert torch.equal(state["conv1.weight"], plain()["conv1.weight"])
    assert lines == [f"weights: {tmp_path}/w.pth: head {shown} left out"]
    assert source == load(save(plain(), tmp_path / "plain.pth"))[2]


def test_a_head_of_the_same_name_and_shape_is_loaded_and_another_beside_it_is_not(
    tmp_path: Path,
) -> None:
    content = plain() | {"head.weight": torch.ones(3, 16)}
    state, lines, _ = load(save(content, tmp_path / "w.pth"))
    assert torch.equal(state["fc.weight"], plain()["fc.weight"])
    assert lines == [f"weights: {tmp_path}/w.pth: head head left out"]


def test_nothing_is_logged_about_a_plain_state_dict(tmp_path: Path) -> None:
    assert load(save(plain(), tmp_path / "w.pth"))[1] == []
    assert load(save(headless(), tmp_path / "w.pth"))[1] == []


def test_a_run_logs_what_was_changed_in_its_weights(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(prefixed("module.", plain(9)), tmp_path / "w.pth")
    train(strategy="freeze", epochs=1, weights=path)
    line = f"weights: {path}: prefix 'module.' removed; head fc left out"
    assert capsys.readouterr().out.splitlines().count(line) == 1


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_deeper_network_is_refused_with_counts_and_shapes(prefix: str, tmp_path: Path) -> None:
    state = prefixed(prefix, dict(resnet50().state_dict()))
    said = refusal(save(state, tmp_path / "w.pth"))
    assert "a state dict of tiny is needed, with the names of tests.support.tiny_network" in said
    assert re.search(r"\d+ of shape: conv1\.weight \(64, 3, 7, 7\), not \(8, 3, 7, 7\)", said)
    assert re.search(r"\d+ unknown: layer1\.0\.conv3\.weight.* and \d+ more", said)
    assert f"found 320 entries: {prefix}conv1.weight, " in said


def test_another_layout_is_refused_with_what_is_missing_and_what_was_found(tmp_path: Path) -> None:
    renamed = {key.replace("layer", "stages."): tensor for key, tensor in plain().items()}
    said = refusal(save({"model": renamed}, tmp_path / "w.pth"))
    assert re.search(r"\d+ missing: layer1\.0\.conv1\.weight \(8, 8, 3, 3\), ", said)
    assert re.search(r"\d+ unknown: stages\.1\.0\.conv1\.weight", said)


def test_an_entry_more_within_the_network_is_refused(tmp_path: Path) -> None:
    state = plain() | {"layer1.0.attention.weight": torch.ones(1)}
    said = refusal(save(prefixed("module.", state), tmp_path / "w.pth"))
    assert "1 unknown: layer1.0.attention.weight" in said


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    state = prefixed("student.") | prefixed("teacher.")
    said = refusal(save(state, tmp_path / "w.pth"))
    assert "with the prefixes 'student.' and 'teacher.'; save one alone" in said


def test_a_checkpoint_without_a_state_dict_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    said = refusal(save({"epoch": 3, "model": "resnet18", "ema": plain()}, tmp_path / "w.pth"))
    assert "no state dict is in the file itself or in an entry state_dict or model or" in said
    assert "found 3 entries: epoch, model and ema" in said


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_model_is_refused_with_the_line_that_saves_its_state_dict(
    zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save(tiny(5, seed=7), path, _use_new_zipfile_serialization=zipped)
    said = refusal(path)
    assert "it holds a pickled model or another object (" in said
    assert "execute code" in said
    (command,) = re.findall(r"torch\.save\(.+, NEW\)", said)
    exec(command, {"torch": torch, "NEW": tmp_path / "new.pth"})  # the advice works
    assert load(tmp_path / "new.pth")[1] == []


def test_an_object_beside_the_state_dict_is_refused_by_its_name(tmp_path: Path) -> None:
    content = {"model": plain(), "args": argparse.Namespace(learning_rate=0.1)}
    assert "(argparse.Namespace)" in refusal(save(content, tmp_path / "w.pth"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_the_line_that_saves_its_state_dict(
    tmp_path: Path,
) -> None:
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.script(tiny(5, seed=7)), path)
    said = refusal(path)
    assert "is a TorchScript archive" in said
    (command,) = re.findall(r"torch\.save\(.+, NEW\)", said)
    exec(command, {"torch": torch, "NEW": tmp_path / "new.pth"})
    assert load(tmp_path / "new.pth")[1] == []


def test_resuming_accepts_the_same_weights_in_another_form(train: Train, tmp_path: Path) -> None:
    path = save(plain(9), tmp_path / "w.pth")
    run = train(strategy="freeze", epochs=1, weights=path, keep_last=True)
    save({"state_dict": prefixed("model.", without("fc.", plain(9)))}, path)
    finetune.train_and_finetune(resume=run.path, epochs=2)
