"""CDPruner: tokens that answer the instruction and differ from each other, by a determinantal point process.

Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, arXiv 2506.10967 (NeurIPS
2025), from the formula. The kernel is ``diag(r) S diag(r)``: S the cosine similarities of the projected tokens, r each
token's relevance to the instruction, scaled to [0, 1]. Greedy MAP inference chooses the tokens.

Where this differs from the released code, and why:

* Relevance is scaled over the item. The released code takes minimum and maximum over the whole batch, so that what is
  kept of one prompt depends on the others.
* ``relevance="llm"``, the default, compares projected tokens with the instruction's input embeddings in the language
  model, since no other text tower is at hand in a patched model. Ours, not the paper's (a port of the method to
  OpenVINO GenAI is said to do likewise; that is second-hand). :class:`ClipRelevance` is the published relevance.
* Tokens beyond the kernel's rank, of which the determinant says nothing, are chosen by relevance, so counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch

from vlm_budget.errors import OptionError
from vlm_budget.greedy import CosineRows, map_dpp, unit_rows
from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True)
class ClipRelevance:
    """Relevance by the CLIP that the model's vision tower was taken from: minus the mean cosine to the text.

    The minus sign is the released code's: the less a patch resembles the text, the more relevant it counts.

    Attributes:
        clip: A transformers ``CLIPModel`` with the weights of the model's vision tower.
        clip_tokenizer: CLIP's tokenizer.
        tokenizer: The patched model's tokenizer, to read the instruction.
    """

    clip: Any
    clip_tokenizer: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        """Check that the model is a CLIP, by what is used of it."""
        for name in ("visual_projection", "vision_model", "get_text_features"):
            if not hasattr(self.clip, name):
                raise OptionError(f"clip must be a CLIPModel; {type(self.clip).__name__} has no {name}")

    def __call__(self, ctx: Context, tokens: torch.Tensor) -> torch.Tensor:
        """[m] relevance of the tokens at ``tokens`` ([m] int64)."""
        assert ctx.hidden is not None and ctx.text_ids is not None
        weight = self.clip.visual_projection.weight
        hidden = ctx.hidden[tokens]
        if hidden.shape[-1] != weight.shape[-1]:
            raise OptionError(
                f"the vision tower's features are {hidden.shape[-1]} wide, those of the CLIP of ClipRelevance "
                f"{weight.shape[-1]}. Pass the CLIP that the model's vision tower was taken from, or relevance='llm'."
            )
        with torch.no_grad():
            normed = self.clip.vision_model.post_layernorm(hidden.to(weight))
            patches = unit_rows(self.clip.visual_projection(normed))
            return ctx.there(-(patches @ unit_rows(self._text_features(ctx.text_ids)).T).mean(1))

    def _text_features(self, ids: torch.Tensor) -> torch.Tensor:
        """[c, E] features of the instruction, cut into as many chunks as CLIP needs to read it all."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        words = self.clip_tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self.clip.config.text_config.max_position_embeddings - 2
        first, last = self.clip_tokenizer.bos_token_id, self.clip_tokenizer.eos_token_id
        features = []
        for start in range(0, max(len(words), 1), room):  # an empty instruction is one chunk without words
            chunk = [first, *words[start : start + room], last]
            inputs = torch.tensor([chunk], device=self.clip.visual_projection.weight.device)
            found = self.clip.get_text_features(input_ids=inputs)
            features.append(getattr(found, "pooler_output", found))  # transformers 5 wraps what 4 returned
        return torch.cat(features)

    def __repr__(self) -> str:
        """Which CLIP, without its layers."""
        name = getattr(self.clip.config, "_name_or_path", "") or type(self.clip).__name__
        return f"ClipRelevance({name!r})"


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Diversity among the tokens, weighed by their relevance to the instruction.

    Attributes:
        relevance: ``"llm"`` compares with the instruction's embeddings in the language model; a :class:`ClipRelevance`
            with CLIP's text features.
        theta: Weight of relevance, in [0, 1): r becomes ``exp(theta / (2 (1 - theta)) r)``; 0 is diversity alone. None
            uses r itself.
    """

    relevance: Literal["llm"] | ClipRelevance = "llm"
    theta: float | None = None

    paper = "arXiv 2506.10967"
    reads_text = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.relevance != "llm" and not isinstance(self.relevance, ClipRelevance):
            raise OptionError(f"relevance must be 'llm' or a ClipRelevance, got {self.relevance!r}")
        if self.theta is None:
            return
        if isinstance(self.theta, bool) or not isinstance(self.theta, Real):
            raise OptionError(f"theta must be a number in [0, 1) or None, got {self.theta!r}")
        if not 0 <= self.theta < 1:
            raise OptionError(f"theta must lie in [0, 1), got {self.theta}")

    @property
    def wants_hidden(self) -> bool:
        """CLIP's relevance starts from the features before the projector."""
        return super().wants_hidden or isinstance(self.relevance, ClipRelevance)

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Greedy MAP selection over all patch tokens of the item."""
        candidates = ctx.candidates
        rows = CosineRows(ctx.features[candidates])
        if isinstance(self.relevance, ClipRelevance):
            found = self.relevance(ctx, candidates)
        else:
            assert ctx.text is not None
            found = (rows.unit @ unit_rows(ctx.text).T).mean(1)
        return candidates[map_dpp(rows, self._log_quality(found), k)]

    def _log_quality(self, relevance: torch.Tensor) -> torch.Tensor:
        """[m] logarithm of r: relevance scaled to [0, 1], all ones where it does not differ; of its ``theta`` form."""
        low, high = relevance.aminmax()
        scaled = torch.where(high > low, (relevance - low) / (high - low), torch.ones_like(relevance))
        return scaled.log() if self.theta is None else self.theta / (2 * (1 - self.theta)) * scaled
