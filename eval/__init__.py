"""Evaluation: what a budget costs in accuracy, and what it saves.

Tasks, metrics, reports and plots live here, and ``nano``, the small embedded model on which every method is
judged without a download. What is published is made from recorded results, never typed by hand.
"""
