"""Train a small FastConformer to transcribe with NeMo's own CTC model, and save it as a .nemo file.

Usage:
    python examples/speechlm/pretrain_encoder.py corpus=data/phrasebook exp_dir=exp/phrasebook/encoder

EMMeTT's speech encoder comes pretrained (Canary-1B's); for a demo from nothing, this makes one. With
``trainer.max_steps=0`` it has random weights.
"""

from pathlib import Path

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="pretrain_encoder_phrasebook")
def main(cfg) -> None:
    """Train the speech encoder of the recipe."""
    import lightning
    import torch
    from nemo.collections.asr.models import EncDecCTCModelBPE
    from nemo.utils.trainer_utils import resolve_trainer_cfg

    from nemo_emmett.corpora.tokenizers import manifest_texts, train_sentencepiece

    if Path(cfg.output).exists():
        print(f"{cfg.output} exists already; remove it to train it again.")
        return
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    lightning.seed_everything(cfg.seed)
    train_sentencepiece(manifest_texts(cfg.tokenizer.manifests), cfg.tokenizer.dir, cfg.tokenizer.vocab_size)
    trainer = lightning.Trainer(**resolve_trainer_cfg(cfg.trainer))
    model = EncDecCTCModelBPE(cfg.model, trainer)
    if trainer.max_steps:  # NeMo's schedules cannot be built for no steps
        trainer.fit(model)
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
    model.save_to(cfg.output)
    print(f"The speech encoder is in {cfg.output}")


if __name__ == "__main__":
    main()
