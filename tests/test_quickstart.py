"""The notebook docs/quickstart.ipynb, executed cell by cell as Jupyter would."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's libraries
def test_the_notebook_goes_from_photographs_to_predictions_and_a_report(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    config = tmp_path / "fields.yaml"
    changed = {"epochs": 1, "val_fraction": 0.25, "image_size": 32, "learning_rate": 0.01}
    given = {k: str(v) if isinstance(v, Path) else v for k, v in (fields | changed).items()}
    config.write_text(yaml.safe_dump(given))
    monkeypatch.setenv("FINETUNE_CONFIG", str(config))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("<polyline" in data.get("text/html", "") for data in shown)
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.count("Prediction(") == 5
    assert len(re.findall(r"^\[\d/4\] .* finished", printed, re.M)) == 4
    of_sweep = printed.partition("[1/4]")[2]
    assert "epoch" not in of_sweep, "each line stays, so there is none for an epoch"
    assert re.search(r"^accuracy \d+\.\d%, 95 % interval", printed, re.M)
    assert "over 3 fresh seeds" in printed or "mean of 3 fresh seeds" in printed
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
