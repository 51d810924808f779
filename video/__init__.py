"""Video: reading, scoring and searching frames, and sparse attention in video diffusion transformers.

``frames`` decodes, scores and searches frames of long videos; ``dit`` makes the self-attention of diffusers' video
transformers sparse, one adapter file per model and one file per method. They stand beside ``vlm_budget.pruners`` on the
same floor, and neither imports the other.
"""
