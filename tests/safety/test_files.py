"""Files next to data and models are data: profiles, sidecars, summaries of corpora, evaluations, checkpoints."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree

import pytest
import torch
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.corpora import Recording, prepare_corpus
from nemo_emmett.corpora.audio_files import measured, read_samples
from nemo_emmett.data import get_multimodal_dataloader
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER
from nemo_emmett.evaluation import from_json, to_json, write_report
from nemo_emmett.evaluation.results import write_hypotheses
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.profile import Profile
from tests.corpora import toy_corpus
from tests.evaluation.samples import build_evaluation, build_translations
from tests.safety.conftest import Payload, with_own_code
from tests.safety.test_data import AsRead


def test_a_profile_makes_nothing(payload: Payload, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(f"train_ds: {{bucket_duration_bins: [1], bucket_batch_size: [1]}}\nsettings: {payload.yaml}\n")
    assert "corrupt" in payload.refused(lambda: Profile.read(path))


def test_sidecars_are_not_unpickled(payload: Payload, tmp_path: Path) -> None:
    source = {"type": "parallel_text", "source_lang": "en", "target_lang": "de"}
    for language in ("en", "de"):
        (tmp_path / f"train.{language}").write_text("one\ntwo\nthree\n")
    source |= {"source_paths": str(tmp_path / "train.en"), "target_paths": str(tmp_path / "train.de")}
    config = {"input_cfg": [source] * 2, "batch_size": 1, "num_workers": 0, "sampling": "emmett", "weights": "auto"}
    config |= {"seed": 0, "shard_seed": 0, "use_multimodal_sampling": True}

    def read() -> None:
        next(iter(get_multimodal_dataloader(config, 0, 1, AsRead(), None)))

    payload.refused(read)
    sidecars = set((tmp_path / HIDDEN_FOLDER).iterdir())
    assert len(sidecars) == 3  # of lines and of lengths
    for content in (pickle.dumps(payload), b"\x80", b""):
        for sidecar in sidecars:
            sidecar.write_bytes(content)
        payload.refused(read)


# Corpora


def test_the_summary_of_a_corpus_names_no_file_to_write_or_to_delete(payload: Payload, tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    toy_corpus.make_source(tmp_path / "source")
    prepare_corpus(toy_corpus.CORPUS, tmp_path / "source", out, num_jobs=1, show_progress=False)
    there = {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)}
    summary = json.loads((out / "corpus.json").read_text())
    summary["parts"][0]["name"] = "../../precious/kept"
    (out / "corpus.json").write_text(json.dumps(summary))
    (out / ".unfinished").symlink_to(precious)  # which a finished corpus has removed
    again = prepare_corpus(toy_corpus.CORPUS, tmp_path / "source", out, num_jobs=1, show_progress=False)
    assert not again.made_now
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == there
    assert (precious / "kept").read_text() == "kept"


def test_a_publishers_file_with_the_name_of_a_command(payload: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(payload.folder)
    path = payload.folder / f"x;touch {payload.marker.name};.sph"
    path.write_bytes(b"NIST_1A\n   1024\n")  # which libsndfile leaves to others
    for read in (measured, read_samples):
        assert payload.refused(lambda read=read: read(Recording(path))) == "UnusableRecording: runs a command"


# Evaluations

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg/onload=alert(1)>{{ 7 * 7 }}"


class Tags(HTMLParser):
    """The tags of a page, and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def test_no_word_of_an_evaluation_becomes_a_part_of_its_page(tmp_path: Path) -> None:
    translations = [one for kind in ("text", "audio") for one in build_translations(tmp_path, kind)[:6]]
    plain = build_evaluation(translations)
    said = {"id": MARKUP, "hypothesis": MARKUP, "source_text": MARKUP, "reference": MARKUP}
    evil = build_evaluation([replace(one, **said, test_set=f"{one.test_set}{MARKUP}") for one in translations])
    evil = replace(
        evil,
        model=MARKUP,
        name=MARKUP,
        command=MARKUP,
        versions={MARKUP: MARKUP},
        skipped={MARKUP: 1},
        config={"x": MARKUP},
    )
    pages = []
    for name, evaluation in (("plain", plain), ("evil", evil)):
        to_json(evaluation, tmp_path / f"{name}.json")
        write_report(from_json(tmp_path / f"{name}.json"), tmp_path / f"{name}.html", examples=5)
        pages.append(Tags((tmp_path / f"{name}.html").read_text()))
    assert pages[1].tags - pages[0].tags <= {"wbr", "details", "summary", "ul", "li"}
    assert not pages[1].tags & {"script", "iframe", "object", "embed"}
    assert not {name for name in pages[1].attributes if name.startswith("on")}
    assert "{{ 7 * 7 }}" in (tmp_path / "evil.html").read_text()


def test_hypotheses_stay_in_their_folder(tmp_path: Path) -> None:
    one = build_translations(tmp_path, "text")[0]
    evil = [replace(one, test_set="../../a"), replace(one, modality="../b"), replace(one, target_lang="/../../c")]
    (tmp_path / "deep" / "hypotheses").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    write_hypotheses(replace(build_evaluation([one]), translations=evil), tmp_path / "deep" / "hypotheses")
    written = set(tmp_path.rglob("*")) - before
    assert len(written) == 6
    assert {path.parent for path in written} == {tmp_path / "deep" / "hypotheses"}


@pytest.mark.parametrize("content", [b"\x80\x04.", b"!!python/object/apply:os.system ['true']"])
def test_an_evaluation_is_json_or_nothing(payload: Payload, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evaluation.json"
    for written in (content, pickle.dumps(payload), payload.yaml.encode()):
        path.write_bytes(written)
        assert payload.refused(lambda: from_json(path))


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5: Path, tiny_corpus: Path) -> tuple[Path, Callable[..., dict]]:
    """A log folder with a checkpoint, and the recipe that goes on from it."""
    folder = tmp_path_factory.mktemp("trained")
    text = {"type": "parallel_text", "source_lang": "en", "target_lang": "de"}
    text |= {
        f"{side}_paths": str(tiny_corpus / "text" / f"train.{text[f'{side}_lang']}") for side in ("source", "target")
    }
    data = {"batch_size": 2, "num_workers": 0, "use_multimodal_sampling": True, "input_cfg": [text]}

    def recipe(log_dir: Path, steps: int, **model) -> dict:
        optimizer = {"_target_": "torch.optim.SGD", "lr": 0.1}
        trainer = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "limit_train_batches": 10}
        trainer |= {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
        trainer |= {"enable_progress_bar": False, "val_check_interval": 1, "num_sanity_val_steps": 0}
        checkpoints = {
            "monitor": "val_loss",
            "save_top_k": 1,
            "always_save_nemo": False,
            "save_nemo_on_train_end": False,
        }
        return OmegaConf.create(
            {
                "model": {"_target_": "salm_t5", "pretrained_llm": str(tiny_t5), "optimizer": optimizer, **model},
                "trainer": trainer,
                "data": {
                    "train_ds": data | {"seed": 0, "shard_seed": 0, "shuffle": True},
                    "validation_ds": {
                        "batch_size": 2,
                        "datasets": {"dev": {"use_multimodal_sampling": True, "input_cfg": [text]}},
                    },
                },
                "exp_manager": {
                    "explicit_log_dir": str(log_dir),
                    "create_tensorboard_logger": False,
                    "resume_if_exists": True,
                    "resume_ignore_no_checkpoint": True,
                    "checkpoint_callback_params": checkpoints,
                },
            }
        )

    training.train(recipe(folder, 1))
    return folder, recipe


def test_resuming_unpickles_nothing_unless_the_recipe_trusts_it(trained, payload: Payload, tmp_path: Path) -> None:
    folder, recipe = trained
    log = copytree(folder, tmp_path / "log")
    for path in log.rglob("*.ckpt"):
        torch.save(torch.load(path, weights_only=True) | {"x": payload}, path)
    said = payload.refused(lambda: training.train(recipe(log, 2)))
    assert said.startswith("ModelError: the checkpoint")
    assert "model.trust_remote_code: true" in said
    training.train(recipe(log, 2, trust_remote_code=True))
    assert payload.ran


def with_a_pickle(checkpoint: dict, payload: Payload, backbone: Path) -> None:
    checkpoint["x"] = payload


def with_a_stranger(checkpoint: dict, payload: Payload, backbone: Path) -> None:
    checkpoint["hyper_parameters"]["cfg"]["perception"] = {
        "modality_adapter": {"_target_": f"megatron.{payload.target}"}
    }


def with_trust(checkpoint: dict, payload: Payload, backbone: Path) -> None:
    with_own_code(backbone, payload)
    own = {"pretrained_llm": str(backbone), "trust_remote_code": True}
    checkpoint["hyper_parameters"]["cfg"].update(own)
    checkpoint["hyper_parameters"]["trust_remote_code"] = True


@pytest.mark.parametrize("tamper", [with_a_pickle, with_a_stranger, with_trust], ids=lambda tamper: tamper.__name__)
def test_loading_a_checkpoint_runs_nothing_unless_the_caller_trusts_it(
    trained, payload: Payload, backbone: Path, tmp_path: Path, tamper: Callable
) -> None:
    (last,) = trained[0].rglob("*-last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    tamper(checkpoint, payload, backbone)
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    said = payload.refused(lambda: SALMT5.load_from_checkpoint(tmp_path / "evil.ckpt"))
    assert said.startswith("ModelError: ")
    if tamper is not with_a_stranger:
        with suppress(Exception):
            SALMT5.load_from_checkpoint(tmp_path / "evil.ckpt", trust_remote_code=True)
        assert payload.ran


def test_our_own_checkpoints_hold_nothing_that_needs_trust(trained, tmp_path: Path) -> None:
    folder, recipe = trained
    (last,) = folder.rglob("*-last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1
    log = copytree(folder, tmp_path / "log")
    assert training.train(recipe(log, 2)).trainer.global_step == 2
