"""Translate test sets with an exported model and score the translations.

Usage:
    python examples/speechlm/evaluate.py model=exp/phrasebook/salm_t5/model output=exp/phrasebook/evaluation

The recipe, conf/evaluate_phrasebook.yaml unless ``--config-name`` says otherwise, names the test sets.
Prints BLEU and chrF++ per direction and modality, writes ``evaluation.json``, ``report.html`` and ``hypotheses``, and
says where they are.
``torchrun --nproc-per-node=8 examples/speechlm/evaluate.py ...``, or ``srun`` with a task for each GPU, shares each
test set out. ``nemo-emmett evaluate MODEL CONFIG`` does the same.
"""

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="evaluate_phrasebook")
def main(cfg) -> None:
    """Evaluate the recipe's model on its test sets."""
    from nemo_emmett.evaluation.recipe import check_evaluation

    check_evaluation(cfg)  # before NeMo is imported, which takes ten seconds
    from nemo_emmett.run_log import quiet_console

    with quiet_console("Importing NeMo and loading the model ...", stdout_is_output=True):
        from nemo_emmett.evaluation import evaluate_recipe

        evaluate_recipe(cfg)


if __name__ == "__main__":
    main()
