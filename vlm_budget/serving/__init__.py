"""Serving: the same budgets inside vLLM, as an out-of-tree plug-in.

Here will live the entry point of the group ``vllm.general_plugins`` and the model classes it registers: they
promise the pruned number of visual tokens before the prompt is expanded, and return exactly that many rows.
It is the only place of the project that may import vLLM, which is never a dependency of the core.
"""
