"""Models behind an HTTP interface.

- ``vllm``: the plugin by which vLLM serves exported models.
"""
