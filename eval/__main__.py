"""``python -m vlm_budget.eval run …``: what ``accelerate launch -m`` starts in every process."""

from __future__ import annotations

from vlm_budget.eval.cli import app

if __name__ == "__main__":
    app(prog_name="python -m vlm_budget.eval")
