"""A model behind HTTP: an OpenAI-compatible API for recordings, one for texts, and a page for people.

The modules in the order of a request's way:

- ``server``: the process: its socket, and how it stops. ``connections``: how many there are, and for how long without a
  request. ``app``: the API's addresses, by FastAPI; ``page``: the files of the page at ``/``.
- ``gate``: which requests are let in (key, size, number, time), by ``limits``. ``request_errors``: how others are
  refused. ``metrics``: what Prometheus reads.
- ``directions``: which languages the model translates. ``uploads``: bytes to samples.
- ``service``: requests to inputs of the model, and answers to results. ``batching``: the thread that owns the model.

- ``vllm``: the plugin by which vLLM serves exported models, instead of the server here.

``app``, ``connections``, ``gate``, ``metrics`` and ``server`` need the extra ``serve``.
"""
