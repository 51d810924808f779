"""The supported video transformers of diffusers: where their attention is, what its tokens are, and presets."""
