"""``python -m vlm_budget.cli`` is ``vlm-budget``."""

from . import main

main()
