"""Parts of models: batches by modality, placement of audio, loss, BLEU, and the states of random generators.

- :mod:`nemo_emmett.modules.batch`: the batch's modalities, and NeMo's flat SALM batch in our terms.
- :mod:`nemo_emmett.modules.placement`: recordings put where their locator tokens stand.
- :mod:`nemo_emmett.modules.loss`: token cross-entropy per modality over all ranks.
- :mod:`nemo_emmett.modules.linear_cross_entropy`: cross-entropy of an output layer without its logits.
- :mod:`nemo_emmett.modules.metrics`: sacreBLEU as everything here uses it.
- :mod:`nemo_emmett.callbacks.random_state`: random states in Lightning checkpoints.
- :mod:`nemo_emmett.callbacks.resumable_loop`: Lightning's epoch loop, resumed exactly.
- :mod:`nemo_emmett.callbacks.stop_on_signal`: SIGTERM and SIGINT end training with a checkpoint.
- :mod:`nemo_emmett.callbacks.nonfinite`: training steps whose loss or gradients are not finite.
- :mod:`nemo_emmett.callbacks.training_clock`: seconds of training, validation left out.
"""
