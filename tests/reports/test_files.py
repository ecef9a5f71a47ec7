"""Files of reports: where none may go, and writing each whole."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest

from pome.config.outputs import Reports
from pome.errors import OutputError
from pome.reports.files import check_targets, write_texts


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ({"html": "nowhere/report.html"}, "nowhere/report.html: its folder does not exist"),
        ({"csv": "ft"}, "ft: lies in ft, which is an input or OUT"),
        ({"csv": "ft/model.safetensors"}, "lies in ft"),
        ({"html": "ft/more/page.html"}, "lies in ft"),
        ({"html": "link/config.json"}, "link/config.json: lies in ft"),
        ({"csv": "out/table.csv"}, "lies in out"),
        ({"plots": "base/plots"}, "lies in base"),
        ({"html": "other/config.json"}, "other holds a checkpoint"),
        ({"csv": "made/README.md"}, "made holds a checkpoint"),
        ({"plots": "other"}, "other holds a checkpoint"),
        ({"html": "x", "csv": "./x"}, "./x: two reports would be written there"),
        ({"html": "free"}, "free: a folder; name the file"),
        ({"plots": "free/file"}, "free/file: a file; name the folder"),
        ({"csv": "free/fifo"}, "free/fifo: no regular file"),
        ({"csv": "/proc/self/table.csv"}, "/proc/self/table.csv: cannot be written"),
    ],
)
def test_no_report_is_written_over_a_checkpoint_or_where_it_cannot_be(tmp_path, monkeypatch, reports, said):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("ft", "config.json"), ("other", "model.safetensors"), ("made", "pome_manifest.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "ft/more").mkdir()
    (tmp_path / "link").symlink_to("ft")
    (tmp_path / "free").mkdir()
    (tmp_path / "free/file").write_text("kept")
    os.mkfifo(tmp_path / "free/fifo")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=said):
        check_targets(Reports(**reports), ("base", "ft", "out"))
    check_targets(Reports(html="free/file", csv="free/table.csv", plots="free"), ("base", "ft", "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    target, link = tmp_path / "page.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to("page.html")
    with (
        pytest.raises(OutputError, match="page.html: cannot be written: No space left"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
        write_texts(Reports(html=str(target)), lambda: "new", lambda: "")
    assert (target.read_text(), len(list(tmp_path.iterdir()))) == ("old", 2)
    write_texts(Reports(html=str(link)), lambda: "new", lambda: "")
    assert (target.read_text(), link.is_symlink(), len(list(tmp_path.iterdir()))) == ("new", True, 2)
