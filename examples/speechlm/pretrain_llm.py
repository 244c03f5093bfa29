"""Train a small decoder-only language model from nothing to translate text, and save it as a Hugging Face folder.

Usage:
    python examples/speechlm/pretrain_llm.py corpus=data/phrasebook exp_dir=exp/phrasebook/llm

It trains as SALM-GPT without a speech encoder (``perception: null``): the same data, prompt, loss and validation.
"""

from pathlib import Path

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="pretrain_llm_phrasebook")
def main(cfg) -> None:
    """Make and train the language model of the recipe."""
    import lightning
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from nemo_emmett.corpora.tokenizers import file_texts, train_llama_tokenizer
    from nemo_emmett.training import train

    if Path(cfg.output, "config.json").exists():
        print(f"{cfg.output} exists already; remove it to train it again.")
        return
    init_dir = Path(cfg.llm.init_dir)
    if not (init_dir / "config.json").exists():
        train_llama_tokenizer(file_texts(cfg.llm.texts), init_dir, cfg.llm.vocab_size, cfg.llm.languages)
        tokenizer = AutoTokenizer.from_pretrained(init_dir, trust_remote_code=False)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **OmegaConf.to_container(cfg.llm.config),
        )
        lightning.seed_everything(cfg.seed)
        LlamaForCausalLM(config).save_pretrained(init_dir)

    model = train(cfg)
    if model.trainer.is_global_zero:
        with model.embeddings_inside():
            model.llm.save_pretrained(cfg.output)
        AutoTokenizer.from_pretrained(init_dir, trust_remote_code=False).save_pretrained(cfg.output)
        print(f"The language model is in {cfg.output}")


if __name__ == "__main__":
    main()
