"""Parts of models: batches by modality, placement of audio, loss, BLEU, and the states of random generators.

- :mod:`nemo_emmett.modules.batch`: the batch's modalities, and NeMo's flat SALM batch in our terms.
- :mod:`nemo_emmett.modules.placement`: recordings put where their locator tokens stand.
- :mod:`nemo_emmett.modules.loss`: token cross-entropy per modality over all ranks.
- :mod:`nemo_emmett.modules.linear_cross_entropy`: cross-entropy of an output layer without its logits.
- :mod:`nemo_emmett.modules.bleu`: sacreBLEU as everything here uses it.
- :mod:`nemo_emmett.modules.random_state`: states of the random generators.
- :mod:`nemo_emmett.modules.tensors`: what a rank holds of its tensors, and whether weights are finite.
"""
