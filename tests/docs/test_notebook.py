"""The tutorial notebook runs from its first cell to its last, in a smaller setting, and shows what it says.

Its stored outputs are those of its own setting: ``jupyter nbconvert --execute --inplace --to notebook`` makes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorials" / "joint_training.ipynb"

SMALL = """
PHRASES = 60
SPOKEN_PHRASES = 40
SPANISH_RECORDINGS = 10
TEST_PHRASES = 6
T5_STEPS = 12
ENCODER_STEPS = 4
JOINT_STEPS = 20
"""
"""In place of the cell of parameters; all other cells are run as they are."""

SHOWN = """
print(json.dumps({
    "drawn": list(drawn.items()),
    "spanish_shares": list(spanish_shares.items()),
    "lengths": {group.place: len(group.lengths.inputs) for group in groups},
    "bins": {group.place: group.bins for group in groups},
    "padding": padding,
    "padding_of_groups": {group.place: 100 * group.padding.share for group in groups},
    "planned": {name: buckets.bucket_batch_size for name, buckets in profile.groups.items()},
    "curves": {tag: curve.values for tag, curve in curves.items()},
    "before": [[score.modality, score.sentences] for score in before.scores],
    "after": [[score.modality, score.sentences] for score in after.scores],
}))
"""
"""Appended: what the tests look at."""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """The notebook, run in the folder that it is in, by this interpreter; nothing is written into the user's home."""
    folder = tmp_path_factory.mktemp("notebook")
    write_kernel_spec(folder / "kernels" / "this_python")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert names_set(parameters.source) == names_set(SMALL)
    parameters.source = SMALL
    notebook.cells.append(nbformat.v4.new_code_cell(SHOWN))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "TMPDIR"):
            patch.setenv(variable, str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, kernel_name="this_python", timeout=300, resources=resources).execute()
    return notebook


def names_set(source: str) -> set[str]:
    return {line.split(" = ")[0] for line in source.strip().split("\n")}


def outputs(cell: Any, kind: str) -> list[str]:
    """The outputs of a cell of a MIME type, or the texts of a stream."""
    if kind in ("stdout", "stderr"):
        return [output["text"] for output in cell.outputs if output.get("name") == kind]
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


def code_cells(notebook: nbformat.NotebookNode) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def shown(executed) -> dict[str, Any]:
    return json.loads("".join(outputs(executed.cells[-1], "stdout")))


def test_no_cell_prints_a_warning(executed):
    for cell in code_cells(executed):
        assert outputs(cell, "stderr") == [], cell.source
        assert "warning" not in "".join(outputs(cell, "stdout")).lower(), cell.source


def test_at_every_moment_a_source_is_within_one_example_of_its_share(shown):
    shares = dict(shown["spanish_shares"])
    assert shares[0.0] == 0.5 > shares[0.5] > shares[1.0] > 0.1
    drawn = dict(shown["drawn"])
    assert drawn.keys() == shares.keys()
    for temperature, languages in drawn.items():
        assert len(languages) == 300
        for number in range(1, len(languages) + 1):
            assert abs(languages[:number].count("es") - number * shares[temperature]) < 1


def test_each_example_is_measured_and_each_bucket_has_its_padding_and_batch_size(shown):
    assert shown["lengths"] == {"data.train_ds.audio": 40 + 10, "data.train_ds.text": 2 * 60}
    for place, bins in shown["bins"].items():
        padding = shown["padding"][place]
        assert len(padding) == len(shown["planned"][place.rpartition(".")[2]]) == len(bins) >= 4
        assert min(padding) <= shown["padding_of_groups"][place] <= max(padding) < 50
    # The longer the bucket, the smaller its batches.
    assert shown["planned"]["audio"] == sorted(shown["planned"]["audio"], reverse=True)
    assert min(shown["planned"]["audio"]) > 1


def test_the_index_reports_the_record_without_text(executed):
    (cell,) = (cell for cell in code_cells(executed) if "print_index(" in cell.source)
    lines = "".join(outputs(cell, "stdout")).split("\n")
    (source,) = (number for number, line in enumerate(lines) if line.startswith("speech/few.es.jsonl"))
    assert lines[source].split()[1:3] == ["11", "10"]  # records, examples
    assert lines[source + 1].split() == ["skipped:", "empty", "text", "(line", "11)", "1"]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_the_loss_of_each_modality_falls(shown, modality):
    losses = shown["curves"][f"loss_{modality}"]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


def test_both_modalities_are_scored_on_the_whole_test_set(shown):
    assert shown["before"] == [["text", 6], ["text", 6]]
    assert sorted(shown["after"]) == [["audio", 6], ["audio", 6], ["text", 6], ["text", 6]]


def test_pictures_tables_and_recordings_are_shown(executed):
    cells = code_cells(executed)
    assert [len(outputs(cell, "image/png")) for cell in cells if "plt.subplots" in cell.source] == [1] * 5
    for table in ("print_index(", "print_blend(", "print_bins(", "plan(", "evaluate("):
        assert all("".join(outputs(cell, "stdout")).count("\n") > 5 for cell in cells if table in cell.source)
    recordings = [html for cell in cells for html in outputs(cell, "text/html") if "<audio" in html]
    assert len(recordings) == 1 + 2 * 3


def test_the_stored_outputs_are_those_of_one_run_in_order():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(outputs(cell, "image/png") for cell in cells if "plt.subplots" in cell.source)
    assert not any(outputs(cell, "stderr") for cell in cells)
    assert NOTEBOOK.stat().st_size < 2_000_000
