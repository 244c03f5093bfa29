"""Every shell block of README.md and docs/ is run, or a comment before it says why not.

The commands run in this process, in a folder in which the pages' files are small. Get started makes a phrasebook of a
dozen items, a T5, a speech encoder and a model, each trained for two steps; own corpora and resume train one each.
Other pages take these under their own names. What is added to commands to keep them small is in tests/docs/running.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.docs.pages import GENERATED, PAGES, ROOT, Block, blocks_of
from tests.docs.running import CannotRun, Shell
from tests.docs.shell import is_shell_block

BLOCKS = [block for page in PAGES if page.parent != GENERATED for block in blocks_of(page) if is_shell_block(block)]
TO_RUN = [block for block in BLOCKS if block.reason is None or block.in_part]

TRAINED = (
    "exp/model",
    "exp/phrasebook/salm_t5/model",
    "exp/nmt_only/evaluation",  # a baseline may be a model
)
CHECKPOINTS = (
    "exp/salm_t5/checkpoints/salm_t5--val_bleu=31.4159-epoch=3.ckpt",
    "exp/small/resume/checkpoints/default--val_bleu=35.5386-epoch=1.ckpt",
)
"""Other names that pages have for a model and a checkpoint."""

TEST_SETS = """
test_ds:
  batch_size: 4
  datasets:
    flores:
      use_multimodal_sampling: true
      input_cfg:
        - {type: parallel_text, paths: {en: my_corpus/dev.en, de: my_corpus/dev.de, zh: my_corpus/dev.zh}}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """In a folder that has what the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    shell = Shell(folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    shell.run(block_with("nemo-emmett prepare phrasebook"))
    write_own_corpus(folder)
    shell.run(block_with("python examples/speechlm/pretrain_t5.py"))
    link(folder, folder / "exp/small/t5/t5", "exp/t5")
    link(folder, folder / "exp/small/encoder/encoder.nemo", "exp/encoder.nemo")
    link(folder, folder / "data/small", "data/phrasebook")
    shell.run(block_with("nemo-emmett train examples", "get-started.md"))
    shell.run(block_with("nemo-emmett train examples", "resume.md"))
    for command in ("init my_recipe.yaml", "index my_recipe.yaml"):
        shell.run(block_with(f"nemo-emmett {command}", "own-corpus.md"))
    (training,) = (block for block in TO_RUN if block.text.strip() == "nemo-emmett train my_recipe.yaml")
    shell.run(training)
    shutil.copy(folder / "my_recipe.yaml", folder / "recipe.yaml")
    link(folder, folder / "exp/my_recipe/model", *TRAINED)
    (checkpoint,) = (folder / "exp/small/resume/checkpoints").glob("*-last.ckpt")
    link(folder, checkpoint, *CHECKPOINTS)
    link(folder, checkpoint.with_name("recipe.yaml"), "exp/salm_t5/checkpoints/recipe.yaml")
    (folder / "test_sets.yaml").write_text(TEST_SETS)
    return shell


def block_with(start: str, page: str = "") -> Block:
    """The block that begins with a command, on a page."""
    return next(block for block in TO_RUN if block.text.startswith(start) and str(block.page).endswith(page))


def link(folder: Path, target: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)


def write_own_corpus(folder: Path) -> None:
    """``my_corpus``, from the phrasebook: tables of speech from English into German, and texts."""
    corpus = folder / "my_corpus"
    corpus.mkdir()
    for split, text in (("train", "text"), ("dev", "dev")):
        rows = ["id\taudio\tsource\ttarget"]
        for line in (folder / f"data/small/speech/{split}.en.jsonl").read_text().splitlines():
            record = json.loads(line)
            audio = f"../data/small/{record['audio_filepath'].removeprefix('../')}"
            rows.append(f"{record['id']}\t{audio}\t{record['text']}\t{record['translations']['de']}")
        (corpus / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        for language in ("en", "de"):
            shutil.copy(folder / f"data/small/text/{split}.{language}", corpus / f"{text}.{language}")
    (corpus / "dev.zh").write_text("十点二十分\n" * len((corpus / "dev.en").read_text().splitlines()))
    (folder / "speech.tsv").write_text((corpus / "train.tsv").read_text().replace("../", ""))
    link(folder, corpus / "text.en", "news.en")
    link(folder, corpus / "text.de", "news.de")


@pytest.mark.parametrize("block", TO_RUN, ids=lambda block: block.name)
def test_commands_run(block: Block, shell: Shell) -> None:
    (shell.folder / "profile.yaml").unlink(missing_ok=True)  # of a plan on another page, which would not be replaced
    left_out = shell.run(block)
    assert bool(left_out) is block.in_part, "all of it was run"


def blocks_in(tmp_path: Path, text: str) -> list[Block]:
    (tmp_path / "page.md").write_text(text)
    return list(blocks_of(tmp_path / "page.md"))


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    works, fails = blocks_in(
        tmp_path, "```bash\nnemo-emmett --version\n```\n```\n$ nemo-emmett train gone.yaml\noutput\n```\n"
    )
    assert Shell(tmp_path).run(works) == []
    with pytest.raises(AssertionError, match="there is no such file"):
        Shell(tmp_path).run(fails)


def test_a_command_that_cannot_be_run_needs_a_comment(tmp_path: Path) -> None:
    code = "```bash\nnemo-emmett --version  # runs\ntorchrun \\\n  train.py\n```\n"
    without, in_part = blocks_in(tmp_path, f"{code}<!-- run in part: needs two GPUs -->\n{code}")
    with pytest.raises(CannotRun, match=r"'torchrun train.py' is not run by"):
        Shell(tmp_path).run(without)
    shell = Shell(tmp_path)
    assert [line.split() for line in shell.run(in_part)] == [["torchrun", "train.py"]]
    assert len(shell.done) == 1
