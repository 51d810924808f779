"""From a name to a model that can answer: shipped, a local folder, or a hub id."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError, OptionError, UnsupportedModelError, VLMBudgetError
from ..registry import FAMILIES

# By string, as methods are: the core never imports what lies on a higher floor.
NANO = "vlm_budget.eval.nano"
SHIPPED = (NANO, "vlm_budget.eval.views")
"""Packages that have shipped models: ``names()`` and ``folder(name)``."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        name: What the user asked for.
        shipped: It is one of the models that come with the library.
        family: Name of its family.
        model: In evaluation mode, on its device.
        processor: Its processor.
    """

    name: str
    shipped: bool
    family: str
    model: Any
    processor: Any

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """Number format of its weights."""
        return str(self.model.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "family": self.family,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "device": self.device,
            "dtype": self.dtype,
            "attention": getattr(self.model.config, "_attn_implementation", None),
        }


def shipped_models() -> dict[str, Any]:
    """Names of the shipped models, and the packages they are in."""
    packages = [importlib.import_module(name) for name in SHIPPED]
    return {name: package for package in packages for name in package.names()}


def resolve(name: str) -> tuple[str, bool]:
    """What ``from_pretrained`` should get for a name, and whether it is a shipped model.

    Raises:
        ModelLoadError: A folder that is missing, or is not a model's.
    """
    known = shipped_models()
    if name in known:
        return _folder(known[name].folder(name), name), True
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.altsep == "\\" or name.endswith("/")
    if path.exists() or looks_local:
        return _folder(path, name), False
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near:
        raise ModelLoadError(f"there is no model {name!r}. Did you mean {near[0]!r}?")
    return name, False


def _folder(path: Path, name: str) -> str:
    if not path.exists():
        raise ModelLoadError(f"there is no model folder {name!r}")
    if not path.is_dir():
        raise ModelLoadError(f"{name!r} is a file; --model takes a folder with a config.json, or a hub id")
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{name!r} is no model folder: it has no config.json")
    return str(path)


def pick_device(wanted: str) -> str:
    """``auto`` to the best device there is.

    Raises:
        OptionError: The wanted device is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, available in there.items() if available)
    if not there[wanted]:
        raise OptionError(f"--device {wanted}: torch {torch.__version__} sees none here; use auto or cpu")
    return wanted


def load(name: str, device: str, dtype: str, step: Callable[[str], None], debug: bool = False) -> Loaded:
    """Load a model and its processor.

    Args:
        name: A shipped model, a local folder or a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        step: Told what comes next; called four times.
        debug: Leave the libraries' own messages on.

    Raises:
        ModelLoadError: There is no such model, or it cannot be loaded.
        UnsupportedModelError: No family knows its class; said before any weights are fetched.
        OptionError: The device is not there.
    """
    source, shipped = resolve(name)
    step("starting torch and transformers")
    import torch
    import transformers

    if not debug:
        transformers.logging.set_verbosity(logging.CRITICAL)
        transformers.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries are not news
    where = pick_device(device)
    form = getattr(torch, dtype) if dtype != "auto" else (torch.float32 if where == "cpu" else "auto")
    try:
        step("reading its configuration")
        config = transformers.AutoConfig.from_pretrained(source)
        family = family_of(config)
        step("loading its processor")
        processor = transformers.AutoProcessor.from_pretrained(source)
        step("loading its weights")
        model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=form).to(where).eval()
    except VLMBudgetError:
        raise
    except Exception as error:  # foreign files raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "" if Path(source).is_dir() else "neither a folder here nor a model that the hub gives: "
        raise ModelLoadError(f"cannot load {name!r}: {what}{reason}") from error
    if shipped and where == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 4))  # more threads make a model of a million weights slower
    return Loaded(name, shipped, family, model, processor)


def family_of(config: Any) -> str:
    """Name of the family that knows a configuration's model class.

    Raises:
        UnsupportedModelError: None does.
    """
    named = list(getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")])
    supported = []
    for family in FAMILIES:
        models = FAMILIES.get(family)().models
        if set(named) & set(models):
            return family
        supported.append(models[0])
    raise UnsupportedModelError(f"{named[0]} is not a supported model. Supported: {', '.join(sorted(supported))}.")
