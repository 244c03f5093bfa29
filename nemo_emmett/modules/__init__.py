"""Parts of models, in the order in which a batch passes them.

- :mod:`nemo_emmett.modules.batch`: a batch as one-modality batches, NeMo's flat SALM batch among them.
- :mod:`nemo_emmett.modules.encoder_cache`: outputs of a frozen speech encoder, kept on disk.
- :mod:`nemo_emmett.modules.modality_adapters`: between the speech encoder and the language model.
- :mod:`nemo_emmett.modules.perception_lengths`: how many positions of the language model a recording takes.
- :mod:`nemo_emmett.modules.packing`: several examples in a row, none of which attends to another.
- :mod:`nemo_emmett.modules.placement`: encoded recordings in place of their locator tokens.
- :mod:`nemo_emmett.modules.cross_attention`: BESTOW's layers from text to speech.
- :mod:`nemo_emmett.modules.gated_lora`: LoRA that acts on the examples with speech alone.
- :mod:`nemo_emmett.modules.linear_cross_entropy`: cross-entropy of an output layer without its logits.
- :mod:`nemo_emmett.modules.vocabulary`: whole, or split over the ranks of tensor parallelism.
- :mod:`nemo_emmett.modules.weighted_linear_loss`: the same with weights, and the divergence from a teacher.
- :mod:`nemo_emmett.modules.gradient_projection`: gradients of two tasks compared, and their conflict projected away.
- :mod:`nemo_emmett.modules.loss`: token cross-entropy per modality over all ranks.
- :mod:`nemo_emmett.modules.data_ranks`: ranks that read different data.
- :mod:`nemo_emmett.modules.metrics`: sacreBLEU's metrics with the settings of validation and evaluation.
- :mod:`nemo_emmett.modules.evaluation_mode`: parts of a model in evaluation mode for a while.
- :mod:`nemo_emmett.modules.random_state`: states of the random generators.
- :mod:`nemo_emmett.modules.tensors`: what a rank holds of its tensors, and whether weights are finite.
"""
