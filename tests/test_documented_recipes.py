"""The YAML of README.md and docs/ works: each piece is completed with tiny data and models, and trained or checked."""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lightning import Callback, Trainer
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import OmegaConf

from nemo_emmett.callbacks import RandomState, ResumableData, StopOnSignal
from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import plain
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.evaluation import evaluate
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.runner import compose_data, compose_recipe
from nemo_emmett.training import build_training, check_recipe, train

from .conftest import ENCODER_DIM, SENTENCES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)

BUDGET = "256MiB"
"""For OOMptimizer: a CPU's default would have it try batches of gigabytes."""


def fragments() -> dict[str, str]:
    """The YAML by page and its place among the page's others: ``data.md 2``."""
    return {
        f"{page.name} {number}": match[1]
        for page in PAGES
        for number, match in enumerate(YAML.finditer(page.read_text(encoding="utf-8")), start=1)
    }


FRAGMENTS = fragments()

COMPLETED = {
    "add-a-language.md 1": "adds_a_language",
    "README.md 1": "trains_with_oomptimizer",
    "corpora.md 1": "names_sources",
    "data.md 1": "trains",
    "evaluation.md 1": "is_evaluated",
    "data.md 2": "names_callbacks",
    "data.md 3": "names_forms_of_a_source",
    "data.md 4": "transcribes_a_share",
    "data.md 5": "weighs_its_sources",
    "data.md 6": "packs_its_groups",
    "low-resource-language.md 1": "has_test_sets",
    "low-resource-language.md 2": "weighs_its_sources",
    "migrate-from-salm.md 1": "resumes_a_dataset_of_ours",
    "migrate-from-salm.md 2": "names_callbacks",
    "migrate-from-salm.md 3": "has_groups",
    "models.md 1": "is_a_model_section",
    "models.md 2": "is_a_model_section",
    "models.md 3": "is_a_model_section",
    "models.md 4": "is_a_model_section",
    "models.md 5": "begins_with_weights",
    "oomptimizer.md 1": "trains_with_oomptimizer",
    "oomptimizer.md 2": "is_a_profile",  # a profile, no recipe
    "out-of-memory.md 1": "names_callbacks",
    "own-backbone.md 1": "fits_an_encoder",
    "resume.md 1": "is_a_part_of_a_recipe",
    "training.md 1": "has_a_schedule",
    "training.md 2": "names_callbacks",
}
"""What is done with each piece: the method of :class:`Completed` below."""


def test_every_piece_of_yaml_is_tested() -> None:
    assert FRAGMENTS.keys() == COMPLETED.keys()


@pytest.mark.parametrize("name", COMPLETED)
def test_documented_yaml_works(name: str, completed: Completed) -> None:
    getattr(completed, COMPLETED[name])(FRAGMENTS[name])


class Completed:
    """Gives pieces of YAML what they leave out.

    Args:
        folder: for their files.
        recipe: a whole recipe whose other sections they get.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self.recipe = recipe

    def trains(self, text: str) -> None:
        """Two steps of a recipe whose lists of sources are left out."""
        train_ds = self.recipe["data"]["train_ds"]
        speech, texts = (json.dumps(train_ds[group]["input_cfg"]) for group in ("audio", "text"))
        sources = iter([speech, texts, texts, speech])
        self._train(re.sub(r"\[\.\.\.\]", lambda _: next(sources), text).replace("num_workers: 2", "num_workers: 0"))
        assert next(sources, None) is None

    def packs_its_groups(self, text: str) -> None:
        """Two steps of a recipe of two groups whose lists of sources are left out; for tiny data, of fewer rows."""
        groups = self.recipe["data"]["train_ds"]
        sources = iter(json.dumps(groups[group]["input_cfg"]) for group in ("text", "audio"))
        indented = re.sub(r"\[\.\.\.\]", lambda _: next(sources), text).replace("batch_size: 8", "batch_size: 1")
        head = "data:\n  train_ds:\n    multi_config: true\n    sampler_fusion: zip\n    num_workers: 0\n"
        self._train(head + indented)

    def trains_with_oomptimizer(self, text: str) -> None:
        """Two steps with the batch sizes that OOMptimizer finds for the recipe as it is documented."""
        whole, profile = self._with_files(text), self.folder / "profile.yaml"
        if "input_cfg" not in text:
            whole += f"    manifest_filepath: {self.folder / 'corpus/speech/train.en.jsonl'}\n    num_workers: 0\n"
        self._train(whole, memory_budget=BUDGET, profile=str(profile))
        documented, found = OmegaConf.create(text).data.train_ds, Profile.read(profile)
        if "" in found.groups:
            assert list(found.groups[""].bucket_duration_bins) == list(documented.bucket_duration_bins)
        for name, group in found.groups.items():
            if name:
                assert {**group.as_config(), "batch_size": 0} == {
                    group.limit_key: documented[name][group.limit_key],
                    "batch_size": 0,
                }

    def names_sources(self, text: str) -> None:
        """The config of a dataset whose sources are lists in other files."""
        source = self.recipe["data"]["train_ds"]["audio"]["input_cfg"][0]
        for path in re.findall(r"input_cfg: (/\S+\.yaml)", text):
            own = self.folder / Path(path).name
            own.write_text(json.dumps([source]))
            text = text.replace(path, str(own))
        dataset = compose_data(self._written(text))
        OmegaConf.set_struct(dataset, False)
        check_data_config(OmegaConf.merge(dataset, {"batch_size": 1}), place="dataset")

    def names_forms_of_a_source(self, text: str) -> None:
        """A list whose every source is a dataset."""
        sources = compose_data(self._written(self._with_files(text)))
        assert len(sources) == 8
        for source in sources:
            check_data_config(
                OmegaConf.create({"input_cfg": [source], "batch_size": 1, "use_multimodal_sampling": True}), place="it"
            )

    def is_evaluated(self, text: str) -> None:
        """The test sets of an evaluation, which a model translates."""
        model = build_training(OmegaConf.create(self.recipe)).model.eval()
        found = evaluate(model, self._written(self._with_files(text)), max_new_tokens=2)
        assert {(one.test_set, one.modality, *one.direction) for one in found.scores} == {
            ("news", "text", "en", "de"),
            ("talks", "audio", "en", "de"),
        }
        assert not found.skipped

    def has_test_sets(self, text: str) -> None:
        """The test sets of an evaluation, which are not translated."""
        text = self._with_files(text).replace("target_lang: fr", "target_lang: de")  # the language of the tiny data
        test_ds = compose_data(self._written(text)).test_ds
        OmegaConf.set_struct(test_ds, False)
        check_data_config(test_ds, place="test_ds")

    def begins_with_weights(self, text: str) -> None:
        """A training that starts from the checkpoint of another one."""
        checkpoint = self.folder / "first.ckpt"
        first = build_training(OmegaConf.create(self.recipe)).model
        with torch.no_grad():
            for weight in first.parameters():
                weight.normal_()
        torch.save({"state_dict": first.state_dict()}, checkpoint)
        text = re.sub(r"exp/\S+\.ckpt", str(checkpoint), text)
        documented = OmegaConf.to_container(compose_recipe(self._written(text)))["model"]
        model = build_training(OmegaConf.create({**self.recipe, "model": self.recipe["model"] | documented})).model
        weights = model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())

    def is_a_model_section(self, text: str) -> None:
        """Keys with which a model is built and configured."""
        documented = OmegaConf.to_container(compose_recipe(self._written(text)))["model"]
        recipe = {**self.recipe, "model": self.recipe["model"] | documented}
        model = build_training(OmegaConf.create(recipe)).model
        model.configure_optimizers()
        for key, value in documented.items():
            if key != "optimizer":
                assert OmegaConf.to_container(model.cfg)[key] == value

    def has_a_schedule(self, text: str) -> None:
        """A model's schedule, as its comments say, and with the keys that are commented out."""
        for whole, last in ((text, 1.5e-4), (re.sub("^    # ", "    ", text, flags=re.MULTILINE), 1.0e-6)):
            whole += "trainer: {max_steps: 20000}\n"
            section = OmegaConf.to_container(compose_recipe(self._written(whole)), resolve=True)["model"]
            optimizer = {"_target_": "torch.optim.SGD"} | section["optimizer"]
            optimizer = hydra.utils.instantiate(optimizer, [torch.nn.Parameter(torch.zeros(1))])
            schedule = hydra.utils.instantiate(section["lr_scheduler"], optimizer)
            found = []
            for schedule.last_epoch in (0, 1000, 6000, 18000, 20000):
                found += schedule.get_lr()
            assert found == pytest.approx([0, 3e-4, 1.5e-4, 1.5e-4, last])

    def adds_a_language(self, text: str) -> None:
        """Two steps from an exported model, with the shares and the learning rate that the page says."""
        first = self.recipe | {"export_dir": str(self.folder / "first")}
        first["trainer"] = first["trainer"] | {
            "max_steps": 1,
            "limit_train_batches": 1,
            "limit_val_batches": 0,
            "val_check_interval": 1,
        }
        first["exp_manager"] = {"explicit_log_dir": str(self.folder / "exp_first"), "create_checkpoint_callback": False}
        trained = train(OmegaConf.create(first)).state_dict()
        text = self._with_files(text).replace("exp/first/model", str(self.folder / "first"))
        manifest = self.folder / "files" / "mboshi" / "train.jsonl"
        manifest.write_text(manifest.read_text().replace('"lang": "en"', '"lang": "mdw"'))
        text = text.replace("exp/${name}", str(self.folder / "second"))
        model = {key: value for key, value in self.recipe["model"].items() if key != "optimizer"}
        text = re.sub(r"^model:.*", f"model: {json.dumps(model)}", text, flags=re.DOTALL | re.MULTILINE)
        overrides = {
            "trainer.accelerator": "cpu",
            "trainer.strategy": "auto",
            "trainer.precision": "32-true",
            "trainer.max_steps": 4,
            "trainer.limit_train_batches": 4,
            "trainer.callbacks": "[]",
            "model.perception.spec_augment": "null",
            "model.lr_scheduler.warmup_steps": 2,
            "data.train_ds.num_workers": 0,
            **{f"data.train_ds.{group}.num_buckets": 1 for group in ("audio", "text")},
            **{f"data.train_ds.{group}.num_sub_buckets": 1 for group in ("audio", "text")},
            **{f"+data.train_ds.{group}.bucket_batch_size": "[4]" for group in ("audio", "text")},
        }
        cfg = compose_recipe(self._written(text), [f"{key}={value}" for key, value in overrides.items()])
        groups = {group.name: group for group in parse_dataset(plain(cfg.data.train_ds), "data.train_ds").groups}
        assert [leaf.share for leaf in blend_of(groups["audio"]).leaves()] == pytest.approx([0.75, 0.25])
        begun = build_training(cfg).model.state_dict()
        assert all(torch.equal(value, begun[name]) for name, value in trained.items())
        OmegaConf.set_struct(cfg, False)
        lrs = []
        model = _watched(lambda trainer: lrs.append(trainer.optimizers[0].param_groups[0]["lr"]), lambda: train(cfg))
        assert lrs == pytest.approx([2.5e-5, 5e-5, 5e-5, 5e-5])
        assert {f"val_bleu_{name}" for name in ("new", "old")} <= model.trainer.callback_metrics.keys()
        directions = json.loads((self.folder / "second" / "model" / "config.json").read_text())["training"][
            "directions"
        ]
        assert directions["audio"] == [["en", "de"], ["mdw", "de"]]

    def names_callbacks(self, text: str) -> None:
        """Callbacks that NeMo makes from the trainer's section."""
        callbacks = self._callbacks(text)
        assert [type(callback).__name__ for callback in callbacks] == re.findall(r"_target_: [\w.]+\.(\w+)", text)
        assert callbacks

    def resumes_a_dataset_of_ours(self, text: str) -> None:
        """A stock recipe that gets our dataloader, and the callbacks of a config group."""
        assert [type(callback) for callback in self._callbacks(text)] == [RandomState, ResumableData, StopOnSignal]
        train_ds = compose_recipe(self._written(text)).data.train_ds
        assert train_ds == {"use_emmett": True}
        OmegaConf.set_struct(train_ds, False)
        train_ds.update({"batch_size": 1, "manifest_filepath": str(self.folder / "corpus/speech/train.en.jsonl")})
        check_data_config(train_ds, place="data.train_ds")

    def has_groups(self, text: str) -> None:
        """A dataset of a group of speech and a group of text."""
        whole = self._with_keys_of_nemo(self._with_files(text))
        train_ds = compose_recipe(self._written(whole)).data.train_ds
        OmegaConf.set_struct(train_ds, False)
        check_data_config(train_ds, place="data.train_ds", examples=ExampleKind.CONVERSATION)
        assert [group.name for group in parse_dataset(train_ds, "data.train_ds").groups] == ["speech", "text"]

    def fits_an_encoder(self, text: str) -> None:
        """The model of a recipe whose speech encoder and adapter are others."""
        encoder, width = self.recipe["model"]["pretrained_asr"], f"input_dim: {ENCODER_DIM}"
        text = text.replace("/models/my_asr.nemo", encoder).replace("input_dim: 512", width)
        documented = OmegaConf.to_container(compose_recipe(self._written(text)))["model"]
        cfg = OmegaConf.create({**self.recipe, "model": self.recipe["model"] | documented})
        assert build_training(cfg).model.perception.modality_adapter.__class__.__name__ == "MLPConnector"

    def is_a_part_of_a_recipe(self, text: str) -> None:
        """Keys that a recipe takes, next to the others."""
        check_recipe(OmegaConf.merge(OmegaConf.create(self.recipe), compose_recipe(self._written(text))))

    def weighs_its_sources(self, text: str) -> None:
        """A dataset whose weights are counted."""
        train_ds = compose_recipe(self._written(self._with_files(text))).train_ds
        OmegaConf.set_struct(train_ds, False)
        train_ds.batch_size = 1
        train_ds.use_multimodal_sampling = True
        check_data_config(train_ds, place="train_ds")
        (group,) = parse_dataset(train_ds, "train_ds").groups
        shares = [leaf.share for leaf in blend_of(group).leaves()]
        assert len(shares) == text.count("- {type: ")
        assert sum(shares) == pytest.approx(1)

    def transcribes_a_share(self, text: str) -> None:
        """A source whose share is documented."""
        section = OmegaConf.create({**compose_data(self._written(self._with_files(text))), "batch_size": 1})
        check_data_config(section, place="it")
        (group,) = parse_dataset(section, "it").groups
        assert [leaf.share for leaf in blend_of(group).leaves()] == pytest.approx([0.8, 0.2])

    def is_a_profile(self, text: str) -> None:
        """A profile whose settings and fingerprint are left out."""
        path = self._written(text.replace("mode: calibrate, ...", "mode: calibrate").replace("{...}", "{}"))
        lines = Path(path).read_text().splitlines()
        second = [line for line in lines if line.startswith("  - bin")]
        assert len(second) == 1  # of two buckets the first is shown
        content = "\n".join(lines).replace("[4, 8.5]", "[4]").replace("[32, 14]", "[32]")
        Path(path).write_text(content)
        profile = Profile.read(path)
        assert profile.groups["audio"].bucket_batch_size == (32,)
        (measure,) = profile.measures["audio"]
        assert measure.memory.peak(measure.batch_size) == measure.predicted_peak
        assert measure.time.seconds(measure.batch_size) == measure.seconds
        assert profile.events[0].after == 14

    def _callbacks(self, text: str) -> list[Callback]:
        return resolve_trainer_cfg(compose_recipe(self._written(text)).trainer)["callbacks"]

    def _train(self, text: str, **of_oomptimizer: str) -> None:
        documented = compose_recipe(self._written(self._with_keys_of_nemo(text)))
        OmegaConf.set_struct(documented, False)
        for callback in documented.get("trainer", {}).get("callbacks", []):
            if callback._target_.endswith("OOMptimizer"):
                callback.update(of_oomptimizer)
        base = OmegaConf.create({key: self.recipe[key] for key in ("seed", "model", "trainer")})
        base.trainer.max_steps = base.trainer.limit_train_batches = 2
        base.trainer.limit_val_batches = 1
        cfg = OmegaConf.merge(base, documented)
        steps = []
        trained = _watched(lambda trainer: steps.append(trainer.global_step), lambda: train(cfg))
        assert trained is not None
        assert len(steps) == 2

    def _with_keys_of_nemo(self, text: str) -> str:
        """With the keys of NeMo's recipes that the piece refers to."""
        if "${model." not in text:
            return text
        tag = self.recipe["model"]["audio_locator_tag"]
        return f"{text}\nmodel: {{prompt_format: emmett_t5, audio_locator_tag: '{tag}'}}\n"

    def _written(self, text: str) -> str:
        path = self.folder / "fragment.yaml"
        path.write_text(text)
        return str(path)

    def _with_files(self, text: str) -> str:
        """With files of their names, of tiny data, in the place of those that are named."""
        for named in dict.fromkeys(re.findall(r"[\w./]+\.(?:gz|tsv|jsonl|json|tar|en|de|es)\b", text)):
            path = self.folder / "files" / named
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path)
            text = re.sub(rf"(?<![\w/.]){re.escape(named)}(?![\w.])", str(path), text)
        return text

    def _write(self, path: Path) -> None:
        language = "de" if ".de" in path.name else "en"
        lines = SENTENCES[language]
        pairs = list(zip(SENTENCES["en"], SENTENCES["de"], strict=True))
        if path.suffix == ".gz":
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        elif "speech" in path.name and path.suffix == ".tsv":
            columns = "audio\tsource\ttarget" if path.stem == "speech" else "path\tsentence\ttranslation"
            rows = [f"{record['audio_filepath']}\t{record['text']}\teins" for record in self._records()]
            path.write_text("\n".join([columns, *rows]) + "\n")
        elif path.suffix == ".tsv":
            path.write_text("english\tgerman\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
        elif path.name == "pairs.jsonl":
            records = [{"src": a, "tgt": b, "source_lang": "en", "target_lang": "de"} for a, b in pairs]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        elif path.name == "cuts.jsonl":
            CutSet.from_cuts(map(_cut, self._records())).to_file(path)
        elif path.suffix == ".jsonl":
            self._write_manifest(path, self._records())
        elif path.suffix in (".json", ".tar"):
            for shard in range(512):
                self._write_shard(path, shard)
        else:
            path.write_text("\n".join(lines) + "\n")

    def _records(self) -> list[dict]:
        manifest = self.folder / "corpus" / "speech" / "train.en.jsonl"
        records = [json.loads(line) for line in manifest.read_text().splitlines()]
        return [{**record, "audio_filepath": str(manifest.parent / record["audio_filepath"])} for record in records]

    def _write_shard(self, path: Path, shard: int) -> None:
        path = path.with_name(re.sub(r"_OP_.*_CL_", str(shard), path.name))
        records = self._records()
        record = records[shard % len(records)]
        audio = Path(record["audio_filepath"])
        if path.suffix == ".json":
            self._write_manifest(path, [{**record, "audio_filepath": audio.name, "shard_id": shard}])
        else:
            with tarfile.open(path, "w") as tar:
                tar.add(audio, audio.name)

    @staticmethod
    def _write_manifest(path: Path, records: list[dict]) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _cut(record: dict) -> MonoCut:
    recording = Recording.from_file(record["audio_filepath"])
    cut = recording.to_cut()
    cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0.0, recording.duration, text=record["text"])]
    return cut


@pytest.fixture
def completed(tmp_path: Path, recipe: dict) -> Completed:
    return Completed(tmp_path, recipe)


def _watched(note: Callable[[Trainer], None], run: Callable[[], Any]) -> Any:
    """Run a training, and note something of its trainer after each step."""
    from nemo_emmett.models import SALMT5

    original = SALMT5.on_train_batch_end

    def noted(self, outputs, batch, batch_idx) -> None:
        note(self.trainer)
        original(self, outputs, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SALMT5, "on_train_batch_end", noted)
        return run()


def test_a_recipe_with_a_documented_error_is_found(completed: Completed) -> None:
    broken = FRAGMENTS["README.md 1"].replace("      max_tokens: 512 ", "      # max_tokens: 512")
    assert broken != FRAGMENTS["README.md 1"]
    with pytest.raises(Exception, match=r"train_ds\.text\.max_tokens: is missing; OOMptimizer finds this group's one"):
        completed._train(completed._with_files(broken), memory_budget=BUDGET)
