"""Tasks: a YAML file each, and the functions that read and score their datasets."""
