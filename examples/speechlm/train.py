"""Train a speech + text translation model from a recipe.

Usage:
    python examples/speechlm/train.py [--config-name RECIPE] [--config-path FOLDER] [key=value ...]

Without ``--config-name`` it trains SALM-T5 on the phrasebook (conf/salm_t5_phrasebook.yaml). Run again, it resumes from
the experiment's last checkpoint.
"""

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="salm_t5_phrasebook")
def main(cfg) -> None:
    """Train the model of the recipe."""
    from nemo_emmett.run_log import quiet_console

    with quiet_console("Importing NeMo and checking the recipe ..."):
        from nemo_emmett.training import train

        train(cfg)


if __name__ == "__main__":
    main()
