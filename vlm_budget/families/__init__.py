"""One file per family of VLMs: the only code that knows a foreign model class."""
