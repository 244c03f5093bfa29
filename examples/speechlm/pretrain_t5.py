"""Train a small T5 from nothing to translate text, and save it as a Hugging Face folder.

Usage:
    python examples/speechlm/pretrain_t5.py corpus=data/phrasebook exp_dir=exp/phrasebook/t5

It trains as SALM-T5 without a speech encoder (``perception: null``): the same data, prompt, loss and validation.
"""

from pathlib import Path

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="pretrain_t5_phrasebook")
def main(cfg) -> None:
    """Make and train the language model of the recipe."""
    import lightning
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from nemo_emmett.corpora.tokenizers import file_texts, train_t5_tokenizer
    from nemo_emmett.training import train

    if Path(cfg.output, "config.json").exists():
        print(f"{cfg.output} exists already; remove it to train it again.")
        return
    init_dir = Path(cfg.t5.init_dir)
    if not (init_dir / "config.json").exists():
        train_t5_tokenizer(file_texts(cfg.t5.texts), init_dir, cfg.t5.vocab_size, cfg.t5.languages)
        tokenizer = AutoTokenizer.from_pretrained(init_dir, trust_remote_code=False)
        config = T5Config(
            vocab_size=len(tokenizer),
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **OmegaConf.to_container(cfg.t5.config),
        )
        lightning.seed_everything(cfg.seed)
        T5ForConditionalGeneration(config).save_pretrained(init_dir)

    model = train(cfg)
    if model.trainer.is_global_zero:
        model.llm.save_pretrained(cfg.output)
        AutoTokenizer.from_pretrained(init_dir, trust_remote_code=False).save_pretrained(cfg.output)
        print(f"The language model is in {cfg.output}")


if __name__ == "__main__":
    main()
