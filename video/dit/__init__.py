"""Sparse attention in the diffusion transformers of video pipelines.

A *model adapter* (``models/``) knows where a foreign transformer keeps its self-attention, its grid of tokens and its
text. A *method* (``methods/``) puts the video tokens of one call in an order, cuts them into blocks and says which
pairs of blocks are computed. Everything else is the same for all of them: :mod:`.attend` computes a call, :mod:`.seam`
brings calls from the processors, :mod:`.clock` knows the step, :mod:`.handle` is what ``vlm_budget.patch`` returns.
"""
