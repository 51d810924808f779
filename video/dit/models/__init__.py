"""The video transformers of diffusers that are supported: where their attention is, what its tokens are, and presets."""
