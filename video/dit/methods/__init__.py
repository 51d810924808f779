"""The methods: a permutation, blocks, and a map of those that are computed."""
