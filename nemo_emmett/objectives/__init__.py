"""What a model is trained on besides the cross-entropy of its answers (``model.objectives``).

- :mod:`nemo_emmett.objectives.objective`: the interface, and the schedule of weights.
- :mod:`nemo_emmett.objectives.transcription`: transcripts as answers, with a weight of their own.
- :mod:`nemo_emmett.objectives.teaching`: closeness to a teacher: distillation (speech) and retention (text).
- :mod:`nemo_emmett.objectives.alignment`: distances of speech from text of another length.
- :mod:`nemo_emmett.objectives.consistency`: closeness of encoded speech to its embedded transcript.
- :mod:`nemo_emmett.objectives.registry`: the objectives by name, and their section.
"""
