r"""Train a recipe's model and evaluate it in the same process: one run of the experiment (experiment.py).

Usage:
    python examples/speechlm/train_and_evaluate.py --config-name=salm_t5_phrasebook \
        +evaluation.recipe=evaluate_phrasebook +evaluation.output=exp/run/evaluation [key=value ...]

``evaluation.recipe`` names the recipe of the test sets in conf/, those of the corpus that is trained on, and
``evaluation.without`` a list of those to leave out; ``evaluation.output`` receives evaluation.json and report.html, and
the card of the exported model its scores. With ``evaluation.best: true`` the exported model is evaluated, that of the
best checkpoint, in place of the one after the last step; the checkpoints are then removed.
"""

import shutil
from pathlib import Path

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="salm_t5_phrasebook")
def main(cfg):
    """Train the recipe, then evaluate."""
    from omegaconf import OmegaConf

    from nemo_emmett.evaluation import evaluate
    from nemo_emmett.evaluation.table import scores_in_markdown
    from nemo_emmett.models import load
    from nemo_emmett.models.card import write_scores
    from nemo_emmett.training import train

    test_sets = OmegaConf.load(Path(__file__).with_name("conf") / f"{cfg.evaluation.recipe}.yaml")
    test_sets.corpus = cfg.corpus
    for name in cfg.evaluation.get("without", []):
        del test_sets.test_ds.datasets[name]
    model = train(cfg)
    best = cfg.evaluation.get("best", False)
    evaluation = evaluate((load(cfg.export_dir) if best else model).eval(), test_sets, output=cfg.evaluation.output)
    if evaluation is not None and cfg.get("export_dir"):
        write_scores(cfg.export_dir, scores_in_markdown(evaluation))
    if best:
        shutil.rmtree(Path(cfg.exp_dir, "checkpoints"), ignore_errors=True)


if __name__ == "__main__":
    main()
