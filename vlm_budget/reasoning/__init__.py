"""The language stage: what a model may spend on thinking, after the visual tokens are settled.

Here will live one ledger of generated tokens and one policy interface with five verbs: cap, extend, stop,
branch or prune, and route or vote. A policy reads the ledger and says what happens next; it never touches the
visual budget, which is spent before the first token is generated.
"""
