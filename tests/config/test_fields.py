"""The config of a run and its command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.fields import RunConfig
from finetune.config.flags import given_fields, parser
from finetune.config.given_values import advice, differences
from finetune.system.errors import ConfigError
from tests.conftest import ROOT


def make(**fields: Any) -> RunConfig:
    return RunConfig.from_fields(fields)


def test_defaults_follow_the_strategy() -> None:
    assert (make().unfreeze_from, make().lr_decay, make().patience) == ("layer3", 1.0, 3)
    gradual = make(strategy="gradual")
    assert (gradual.unfreeze_from, gradual.lr_decay) == ("layer2", 0.5)
    assert make(lr_schedule="cosine").patience == 0
    assert make(lr_schedule="cosine", patience=2).patience == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((word, "y") for word in ("y", "yes", "on", "true", "True", True)),
        *((word, "n") for word in ("n", "no", "off", "false", "False", False)),
        ("strong", "strong"),
    ],
)
def test_data_aug_reads_every_spelling_of_a_boolean(given: object, meant: str) -> None:
    assert make(data_aug=given).data_aug == meant


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert make(learning_rate="1e-3").learning_rate == 0.001
    assert make(batch_size="64").batch_size == 64


def test_none_means_the_default() -> None:
    assert make(epochs=None, patience=None) == make()
    assert given_fields(["--epochs=None"]) == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lerning_rate": 1}, ["unknown field 'lerning_rate'", "learning_rate"]),
        ({"strategy": "partail"}, ["strategy", "'partail'", "partial", "scratch"]),
        ({"batch_size": 0}, ["batch_size", "got 0", "greater than or equal to 1"]),
        ({"epochs": "ten"}, ["epochs", "'ten'", "integer"]),
        ({"epochs": True}, ["epochs", "True", "number"]),
        ({"epochs": 1.5}, ["epochs", "1.5"]),
        ({"learning_rate": 0}, ["learning_rate", "greater than 0"]),
        ({"learning_rate": "nan"}, ["learning_rate", "finite"]),
        ({"momentum": 1}, ["momentum", "less than 1"]),
        ({"image_size": 8}, ["image_size", "32"]),
        ({"val_fraction": 1}, ["val_fraction", "0 to 0.9"]),
        ({"val_fraction": "some"}, ["val_fraction", "auto or a number"]),
        ({"unfreeze_from": "fc"}, ["unfreeze_from", "layer4"]),
        ({"data_aug": "maybe"}, ["data_aug", "strong"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"batch_size": 1, "image_size": 32}, ["batch_size", "BatchNorm"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_fields(fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_two_errors_are_both_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)epochs.*batch_size"):
        make(epochs=0, batch_size=0)


def test_a_config_reads_back_what_it_wrote() -> None:
    for strategy in ("freeze", "partial", "gradual", "scratch"):
        config = make(strategy=strategy, data_aug="n", cache=False, lr_schedule="cosine")
        text = yaml.safe_dump(config.to_fields())
        assert RunConfig.from_fields(yaml.safe_load(text)) == config


def test_fields_without_effect_are_named_and_ignored() -> None:
    given = {"strategy": "freeze", "unfreeze_from": "layer1", "lr_decay": 0.1}
    config = RunConfig.from_fields(given)
    assert config == make(strategy="freeze")
    assert advice(given, config) == [
        "lr_decay, unfreeze_from: no effect with strategy freeze; ignored"
    ]


def test_too_few_epochs_name_the_parts_that_stay_frozen() -> None:
    config = make(strategy="gradual", epochs=2)
    (line,) = advice({}, config)
    assert "layer2 at epoch 3" in line
    assert "layer3 at epoch 2" in line
    assert "epochs=4" in line


def test_only_wandbs_environment_variables_fill_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "NAME", "OUT", "GROUP", "EPOCHS", "seed", "out"):
        monkeypatch.setenv(name, "7")
    assert make() == make(seed=42)
    assert (make().name, make().group, make().out.name) == (
        "partial-lr0.001-bs32-aug",
        None,
        "runs",
    )
    monkeypatch.setenv("WANDB_PROJECT", "plants")
    monkeypatch.setenv("WANDB_NAME", "first")
    assert (make().project, make().name) == ("plants", "first")


def test_differences_compare_values_not_spellings() -> None:
    config = make(learning_rate=0.001, data_aug="y")
    assert differences(config, {"learning_rate": "1e-3", "data_aug": True, "cache": "auto"}) == {}
    assert differences(config, {"batch_size": 64}) == {"batch_size": (32, 64)}


def test_arguments_that_wandb_adds_are_ignored_and_others_refused() -> None:
    assert given_fields(["--epochs=2", "--_wandb_requeue=1"]) == {"epochs": "2"}
    assert given_fields(["--skip_unreadable"]) == {"skip_unreadable": "true"}
    with pytest.raises(ConfigError, match="did you mean batch_size"):
        given_fields(["--batchsice", "3"])
    with pytest.raises(ConfigError, match="'batchsize': the field is batch_size"):
        given_fields(["--batchsize", "3"])
    with pytest.raises(ConfigError, match="unexpected argument"):
        given_fields(["partial"])


def test_help_explains_every_field_and_its_range() -> None:
    text = " ".join(parser("agent.py").format_help().split())
    for name, field in RunConfig.model_fields.items():
        assert f"--{name}" in text
        assert field.description
    assert "[≥ 32, ≤ 1024]" in text


def test_help_imports_neither_torch_nor_wandb() -> None:
    code = "import sys; sys.argv = ['agent.py', '--help']\n"
    code += "try: exec(open('agent.py').read())\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_config_file_with_a_tag_is_refused_and_not_run(tmp_path: Path) -> None:
    from finetune.config.given_values import read_mapping

    path = tmp_path / "config.yaml"
    path.write_text("epochs: !!python/object/apply:os.mkdir [pwned]")
    with pytest.raises(ConfigError, match="can't be read"):
        read_mapping(path)
    assert not Path("pwned").exists()


def test_the_inaturalist_sweep_has_valid_runs_only() -> None:
    sweep = yaml.safe_load((ROOT / "sweeps/inaturalist.yaml").read_text())
    assert (sweep["program"], sweep["method"]) == ("agent.py", "grid")
    assert sweep["metric"] == {"name": "best_val_acc", "goal": "maximize"}
    parameters = sweep["parameters"]
    for rate in parameters["learning_rate"]["values"]:
        given = {name: entry.get("value", rate) for name, entry in parameters.items()}
        assert advice(given, make(**given)) == []


def test_momentum_means_nothing_to_adamw_and_is_recorded_as_null() -> None:
    given = {"optimizer": "adamw", "momentum": 0.5}
    config = RunConfig.from_fields(given)
    assert config.to_fields()["momentum"] is None
    assert config == RunConfig.from_fields({"optimizer": "adamw"})
    assert advice(given, config) == ["momentum: no effect with optimizer adamw; ignored"]
    assert RunConfig.from_fields({}).momentum == 0.9
