"""A small video diffusion model of our own, and what sparse attention does to its clips."""
