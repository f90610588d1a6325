"""The page's lists of runs, and of what they were made with.

Turns outcomes into tables. Judges nothing.

    >>> ended_well(finished)  # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune.analysis.comparison import Comparison, percent
from finetune.analysis.read_runs import RunRecord
from finetune.analysis.report.markup import (
    Cell,
    dot,
    esc,
    number,
    section,
    split_constant_columns,
    table,
)


def ended_well(finished: Sequence[RunRecord]) -> str:
    if not finished:
        return ""
    heads = (
        *("run", "strategy", "accuracy", "loss", "learning rate", "batch", "augmentation"),
        *("seed", "best epoch", "epochs", "minutes", "pictures/s"),
    )
    rows: list[list[str | Cell]] = []
    for one in sorted(finished, key=lambda o: -o.result.best_val_acc if o.result else 0):
        result = one.result
        assert result is not None
        rows.append(
            [
                f"<code>{esc(one.run_id)}</code>",
                dot(one.strategy),
                number(result.best_val_acc, percent(result.best_val_acc)),
                number(result.best_val_loss, f"{result.best_val_loss:.3f}"),
                number(one.config.get("learning_rate")),
                number(one.config.get("batch_size")),
                esc(one.config.get("data_aug")),
                number(result.seed),
                number(result.best_epoch),
                number(result.epochs_run),
                number(result.train_seconds, f"{result.train_seconds / 60:.2f}"),
                number(result.images_per_second, f"{result.images_per_second:.0f}"),
            ]
        )
    alike, columns = split_constant_columns(heads, rows, always=("run", "strategy", "accuracy"))
    about = f"{len(rows)} run{'s' * (len(rows) != 1)}. {alike}"
    return section("All runs that ended well", about, table(*columns, tall=True))


def others(comparison: Comparison) -> str:
    if not comparison.others:
        return ""
    rows: list[list[str | Cell]] = [
        [
            f"<code>{esc(one.run_id)}</code>",
            dot(one.strategy) if one.config else "–",
            esc("diverged" if one.diverged else one.state if one.result is None else "left out"),
            esc(one.name),
            esc(one.reason or "see the warnings above"),
        ]
        for one in comparison.others
    ]
    heads = ("run", "strategy", "state", "name", "reason")
    return section("Runs that did not end well, or were left out", "", table(heads, rows, tall=True))  # noqa: E501  # fmt: skip


def provenance(outcomes: Sequence[RunRecord]) -> str:
    counts: dict[str, Counter[str]] = {}

    def count(what: str, value: object) -> None:
        counts.setdefault(what, Counter())[str(value)] += 1

    for one in outcomes:
        if one.result is None:
            continue
        result = one.result
        count("data", result.dataset_fingerprint)
        count("split", result.split_fingerprint)
        count("source weights", result.weights_fingerprint or "none (from scratch)")
        count("pictures", f"{result.num_train} train, {result.num_val} validate")
        count("git commit", result.git_commit or "unknown")
        count("threads", result.num_threads)
        for name, version in result.versions.items():
            count(name, version)
    rows: list[list[str | Cell]] = [
        [esc(what), f"<code>{esc(value)}</code>", number(n)]
        for what, values in counts.items()
        for value, n in values.most_common(8)
    ]
    if not rows:
        return ""
    about = "Versions and fingerprints of what the runs were made with."
    return section("What the runs stand on", about, table(("what", "value", "runs"), rows))
