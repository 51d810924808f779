"""Video: reading, scoring and searching frames, and sparse attention in video diffusion transformers.

Here will live ``frames`` (decoding, frame scorers and frame search for long videos) and ``dit`` (block-sparse
attention behind the processors of diffusers pipelines, one adapter file per model). It stands beside
``vlm_budget.pruners`` on the same floor, and neither imports the other.
"""
