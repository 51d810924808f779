"""Pruning methods, one file each. They are found by name through ``vlm_budget.registry``."""
