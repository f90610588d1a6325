"""Strategies, schedules and early stopping as data."""

from typing import Any

import pytest

from finetune.config import strategies
from finetune.config.backbones import find_backbone
from finetune.config.strategies import SCHEDULES, STRATEGIES, Plan, epochs_since_best

PARTS = find_backbone("resnet18").part_names


def plan(strategy: str, **settings: Any) -> Plan:
    return strategies.plan(strategy, PARTS, **settings)


def test_freeze_trains_only_fc_and_scratch_everything() -> None:
    assert plan("freeze").trainable_parts(99) == ("fc",)
    assert plan("scratch").trainable_parts(0) == PARTS


def test_partial_trains_all_its_parts_from_the_start() -> None:
    assert plan("partial").trainable_parts(0) == ("layer3", "layer4", "fc")
    assert plan("partial", unfreeze_from="stem").trainable_parts(0) == PARTS


def test_gradual_unfreezes_part_by_part_with_smaller_learning_rates() -> None:
    opened = [plan("gradual").first_trainable(epoch) for epoch in range(6)]
    assert opened == ["fc", "layer4", "layer3", "layer2", "layer2", "layer2"]
    shares = plan("gradual").rate_shares
    assert [shares[p] for p in ("fc", "layer4", "layer3", "layer2")] == [1, 0.5, 0.25, 0.125]


def test_probe_and_lp_ft_solve_the_head_and_lp_ft_trains_everything_from_the_start() -> None:
    solving = [name for name, entry in STRATEGIES.items() if entry.solves_head]
    assert solving == ["probe", "lp-ft"]
    assert plan("probe").trainable_parts(0) == ("fc",)
    assert plan("lp-ft").trainable_parts(0) == PARTS
    assert plan("lp-ft", unfreeze_from="layer4").trainable_parts(0) == ("layer4", "fc")


def test_unfreeze_every_sets_the_epochs_between_unfreezings() -> None:
    spaced = plan("gradual", unfreeze_from="layer3", unfreeze_every=3)
    assert dict(spaced.start_epochs) == {"layer3": 6, "layer4": 3, "fc": 0}
    assert spaced.all_open_epoch == 6
    assert spaced.opened_too_late(6) == {"layer3": 6}
    assert "layer2" not in spaced.start_epochs


def test_a_setting_that_a_strategy_ignores_does_not_change_it() -> None:
    assert plan("partial", unfreeze_every=5) == plan("partial")
    assert "unfreeze_every" in STRATEGIES["partial"].ignores


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_stays_between_0_and_1(name: str) -> None:
    values = [SCHEDULES[name](i / 100) for i in range(101)]
    assert max(values) == pytest.approx(1.0)
    assert min(values) >= 0


def test_onecycle_equals_torchs_scheduler() -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1001, cycle_momentum=False
    )
    for step in range(1001):
        ours = SCHEDULES["onecycle"](step / 1000)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.005)
        optimizer.step()
        if step < 1000:
            theirs.step()


def test_patience_counts_from_the_epoch_at_which_everything_trains() -> None:
    gradual = plan("gradual")  # everything trains from epoch 3 on
    assert epochs_since_best([1, 2, 3], gradual) == 0
    assert epochs_since_best([0.1, 0.2, 0.3, 9.0], gradual) == 0
    assert epochs_since_best([0.1, 0.2, 0.3, 9.0, 9.5, 9.6], gradual) == 2
    assert epochs_since_best([0.1, 0.2, 0.3, 9.0, 8.5, 8.6], gradual) == 1
    assert epochs_since_best([3, 2, 2, 2], plan("partial")) == 2
    assert epochs_since_best([], plan("partial")) == 0
