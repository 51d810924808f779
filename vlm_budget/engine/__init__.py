"""The only code that knows lengths, masks, positions and caches."""
