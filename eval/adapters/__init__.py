"""This library inside other evaluation harnesses."""
