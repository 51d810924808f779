"""How long a language model takes on this machine: measured once by ``vlm_budget.calibrate``, read ever after.

A calibration belongs to one language model (class, configuration, modules) on one device, number format, attention
backend, number of CPU threads and version of torch and transformers. It lies as a JSON file in the user's cache folder
(:func:`vlm_budget.machine.cache_folder`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LatencyError
from .machine import cache_folder, device_name

if TYPE_CHECKING:
    from .families.base import Family

_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """What a calibration holds for.

    Attributes:
        model: Class of the language model.
        fingerprint: Hash of its configuration and modules.
        device: Name of the device or devices it lies on.
        dtype: Number format of its weights.
        attention: Attention backend.
        threads: torch's CPU threads; 0 where no weights lie on a CPU.
        torch: Version.
        transformers: Version.
    """

    model: str
    fingerprint: str
    device: str
    dtype: str
    attention: str
    threads: int
    torch: str
    transformers: str

    @classmethod
    def of(cls, base: Any, family: Family) -> Setting:
        """The setting that a model is in now.

        Args:
            base: The inner model, with vision tower and language model.
            family: What is known about its class.
        """
        import torch
        import transformers

        decoder: Any = family.language_model(base)
        devices = {parameter.device for parameter in decoder.parameters()}
        return cls(
            model=type(decoder).__name__,
            fingerprint=_fingerprint(decoder),
            device=" + ".join(sorted({device_name(device) for device in devices})),
            dtype=str(decoder.dtype).removeprefix("torch."),
            attention=str(decoder.config._attn_implementation),
            threads=torch.get_num_threads() if any(device.type == "cpu" for device in devices) else 0,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
        )

    @property
    def file(self) -> Path:
        """Where the calibration of this setting lies."""
        name = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_folder() / "latency" / f"{self.model}-{name}.json"

    def __str__(self) -> str:
        """The setting for messages."""
        threads = f", {self.threads} threads" if self.threads else ""
        versions = f"torch {self.torch}, transformers {self.transformers}"
        return f"{self.model} in {self.dtype} with {self.attention} attention on {self.device}{threads}, {versions}"


def _fingerprint(decoder: Any) -> str:
    # The modules tell of adapters and quantised layers; names of files and versions say nothing about speed.
    config = {name: value for name, value in decoder.config.to_dict().items() if not name.startswith("_")}
    for name in ("transformers_version", "dtype", "torch_dtype", "architectures"):
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str) + repr(decoder)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Latency:
    """A fitted model of time: ``fixed + sum over layers of token n + pair n^2 + knee max(0, n - bend)``.

    Attributes:
        fixed_ms: What does not depend on the prompt.
        token_ms: Per layer and token.
        pair_ms: Per layer and pair of tokens.
        knee_ms: Per layer and token behind the ``bend``, where a device that was waiting for work is full.
        bend: Tokens.
        step_ms: A decoding step on an empty cache.
        step_token_ms: What every cached token adds to it.
        longest: Longest prompt measured.
        worst: Largest relative error of the fit at what was measured.
        samples: ``(tokens, milliseconds)`` that were measured, medians.
    """

    fixed_ms: float
    token_ms: float
    pair_ms: float
    knee_ms: float
    bend: int
    step_ms: float
    step_token_ms: float
    longest: int
    worst: float
    samples: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check that no number is one that a measurement cannot give."""
        numbers = [value for name, value in vars(self).items() if name != "samples"]
        if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in numbers):
            raise ValueError(f"times and tokens are finite and not negative, got {numbers}")

    def prefill_ms(self, lengths: Sequence[int]) -> float:
        """Predicted milliseconds of the language model over one prompt.

        Args:
            lengths: Tokens at every decoder layer.

        Raises:
            LatencyError: The prompt is longer than what was measured.
        """
        if max(lengths) > self.longest:
            raise LatencyError(
                f"a prompt of {max(lengths)} tokens is longer than what was calibrated ({self.longest}). Run "
                f"vlm_budget.calibrate(model, longest={max(lengths)})."
            )
        return self.fixed_ms + sum(
            self.token_ms * n + self.pair_ms * n * n + self.knee_ms * max(0, n - self.bend) for n in lengths
        )

    def decode_ms(self, cached: float) -> float:
        """Predicted milliseconds of one decoding step.

        Args:
            cached: Tokens in the cache, mean over the layers.
        """
        return self.step_ms + self.step_token_ms * cached

    def save(self, setting: Setting) -> Path:
        """Keep for later processes; a reader sees the old file or the new one, never a part.

        Raises:
            LatencyError: The folder cannot be written.
        """
        file = prepared(setting.file)
        data = {"version": _VERSION, "setting": asdict(setting), "latency": asdict(self)}
        try:
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as out:
                    out.write(json.dumps(data, indent=1) + "\n")
                os.replace(name, file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise _unwritable(file, error) from error
        return file

    @classmethod
    def load(cls, setting: Setting) -> Latency:
        """Read what was calibrated for a setting.

        Raises:
            LatencyError: There is none, or its file is damaged; the message says what to run.
        """
        file = setting.file
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            found, known = data["latency"], [field.name for field in fields(cls)]
            if data["version"] != _VERSION or data["setting"] != asdict(setting) or sorted(found) != sorted(known):
                raise ValueError("its version, setting or fields are not what its name says")
            return cls(**{**found, "samples": tuple((int(n), float(ms)) for n, ms in found["samples"])})
        except FileNotFoundError:
            raise LatencyError(
                "milliseconds cannot be predicted: this model was not calibrated on this machine. Run "
                f"vlm_budget.calibrate(model), or 'vlm-budget calibrate MODEL'. Looked for {str(file)!r}: "
                f"{setting}.{_others(setting)}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LatencyError(
                f"the calibration {str(file)!r} is damaged ({error}). Run vlm_budget.calibrate(model), which replaces "
                "it."
            ) from error


def prepared(file: Path) -> Path:
    """A file's path, its folder made ready.

    Raises:
        LatencyError: The folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(file, error) from error
    if not os.access(file.parent, os.W_OK):
        raise _unwritable(file, "no permission to write")
    return file


def _unwritable(file: Path, reason: object) -> LatencyError:
    return LatencyError(
        f"cannot keep the calibration in {str(file)!r}: {reason}. Name a folder that can be written in "
        "$VLM_BUDGET_CACHE."
    )


def _others(setting: Setting) -> str:
    """A sentence on calibrations of the same model in other settings."""
    notes = []
    for file in sorted(setting.file.parent.glob(f"{setting.model}-*.json")):
        try:
            other = json.loads(file.read_text(encoding="utf-8"))["setting"]
            if other["fingerprint"] == setting.fingerprint:
                differing = {name: other[name] for name, mine in asdict(setting).items() if other[name] != mine}
                notes.append(", ".join(f"{name} {value}" for name, value in differing.items()))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not what was looked for either
    return f" There is one for {'; another for '.join(notes)}." if notes else ""


class SavedLatency:
    """The calibration of the setting a model is in when asked, read once per setting.

    Args:
        base: The inner model.
        family: What is known about its class.
    """

    def __init__(self, base: Any, family: Family) -> None:
        self._base = base
        self._family = family
        self._read: dict[Any, Latency] = {}

    def __call__(self) -> Latency:
        """The calibration.

        Raises:
            LatencyError: There is none.
        """
        import torch

        decoder: Any = self._family.language_model(self._base)
        now = (decoder.device, decoder.dtype, decoder.config._attn_implementation, torch.get_num_threads())
        if now not in self._read:
            self._read[now] = Latency.load(Setting.of(self._base, self._family))
        return self._read[now]
