"""Two synthetic tasks with exact ground truth: posed views of a room, and a long clip with short events."""
