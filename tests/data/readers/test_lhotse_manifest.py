"""lhotse manifests: one bad record costs one record."""

from __future__ import annotations

from lhotse import CutSet
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.lhotse_manifest import LhotseManifest

from .comparing import comparable


def test_lhotse_cuts_and_bad_lines(speech, tmp_path) -> None:
    cuts = CutSet(list(LazyNeMoIterator(str(speech(3)))))
    path = tmp_path / "cuts.jsonl.gz"
    cuts.to_file(path)
    assert [comparable(c) for c in LhotseManifest(str(path), SkippedRecords())] == [comparable(c) for c in cuts]

    plain = tmp_path / "cuts.jsonl"
    cuts.to_file(plain)
    with plain.open("a") as file:
        file.write('nothing\n{"id": "a", "type": "MonoCut"}\n{"id": "b"}\n')
    skipped = SkippedRecords()
    assert len(list(LhotseManifest(str(plain), skipped))) == 3
    assert skipped.causes() == {"not JSON": 1, "not a lhotse cut": 2}
