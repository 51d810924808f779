"""Schedules and methods found on calibration data: G-Search, P-Sigmoid, and the Pareto front over all methods.

Everything here can be stopped and resumed: what was evaluated stands in a journal (``journal``). optuna and matplotlib
come with the extra ``search`` and load only where they are used.
"""
