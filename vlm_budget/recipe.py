"""The portable plan: methods and what they may spend, found on calibration data, for any prompt of one model.

A :class:`~vlm_budget.plan.Plan` holds exact counts and fits one batch only. A recipe is what searches write
(``plan.json``): which methods with which options, a budget or per-layer rates, and where all of it comes from. Its
checksum tells an edited or damaged file from the one that was written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .budget import Budget
from .errors import BudgetError, PlanError, PlanMismatchWarning
from .plan import Plan, checksum, in_file, json_object, read_text

if TYPE_CHECKING:
    from .pruner import Pruner

KIND = "recipe"
_VERSION = 1
_FAR = 0.25  # share of visual tokens beyond which per-layer rates found elsewhere are no longer vouched for

# What makes two models the same to a schedule, under names that did not change since transformers 4.57.
_WHOLE = (
    "model_type",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_grid_pinpoints",
    "scale_factor",
    "downsample_ratio",
)
_PART = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "depth",
    "embed_dim",
    "num_heads",
    "image_size",
    "patch_size",
    "spatial_merge_size",
)


@dataclass(frozen=True)
class ModelFacts:
    """The model a recipe was made on.

    Attributes:
        name: Class of the inner model.
        config: SHA-256 of the sizes in its configuration; weights do not count.
        layers: Decoder layers.
        tokens: Least and most visual tokens of a calibration prompt.
    """

    name: str
    config: str
    layers: int
    tokens: tuple[int, int]

    @classmethod
    def of(cls, base: Any, tokens: Iterable[int]) -> ModelFacts:
        """Read them off an inner model.

        Args:
            base: The model that holds vision tower and language model.
            tokens: Visual tokens of the calibration prompts.
        """
        known = list(tokens)
        layers = int(base.config.get_text_config().num_hidden_layers)
        return cls(type(base).__name__, _config_hash(base.config), layers, (min(known), max(known)))


@dataclass(frozen=True)
class CalibrationFacts:
    """What a recipe was judged on.

    Attributes:
        hash: SHA-256 of prompts, pixels and answers.
        size: Prompts.
        metric: Name of the metric; higher is better.
        tolerance: Loss that was allowed, in the metric's own way; None where a budget was given instead.
        quality: The metric with the recipe.
        full_quality: The metric of the unpruned model.
    """

    hash: str
    size: int
    metric: str
    tolerance: float | None
    quality: float
    full_quality: float


@dataclass(frozen=True)
class Recipe:
    """Methods, their options and what they may spend, with provenance.

    Attributes:
        spec: ``(name, options)`` per method, options as plain data.
        budget: Budget as text; None where the options alone say the schedule.
        model: The model it was made on.
        calibration: What it was judged on; None for one written by hand.
        cost: Measured and predicted cost by name, means per prompt (``"share"``, ``"flops"``, ``"ms"``, …).
        library: Version of this library that wrote it.
    """

    spec: tuple[tuple[str, Mapping[str, Any]], ...]
    budget: str | None
    model: ModelFacts
    calibration: CalibrationFacts | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    library: str = __version__

    def __post_init__(self) -> None:
        """Check what can be checked without the methods."""
        if not self.spec:
            raise PlanError("a recipe names at least one method")
        if self.budget is not None:
            try:
                Budget.parse(self.budget)
            except BudgetError as error:
                raise PlanError(f"the recipe's budget cannot be read: {error}") from error

    @classmethod
    def of(cls, methods: Iterable[Pruner], budget: Budget | None, model: ModelFacts, **facts: Any) -> Recipe:
        """A recipe of configured methods.

        Args:
            methods: Registered methods.
            budget: What they may spend; None where they are fixed.
            model: Where it was made.
            facts: ``calibration`` and ``cost``.

        Raises:
            PlanError: A method is not registered, or has an option that is no plain data.
        """
        spec = tuple(spec_of(method) for method in methods)
        return cls(spec, None if budget is None else str(budget), model, **facts)

    def methods(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and options, ready for ``PRUNERS.get(name)(**options)``."""
        return [(name, _frozen_options(options)) for name, options in self.spec]

    def check_model(self, base: Any) -> None:
        """Refuse a model other than the recipe's.

        Args:
            base: The inner model, which holds vision tower and language model.

        Raises:
            PlanError: Another class, another number of layers, or other sizes.
        """
        here = ModelFacts.of(base, self.model.tokens)
        for what, mine, its in (
            ("class", self.model.name, here.name),
            ("number of decoder layers", self.model.layers, here.layers),
            ("configuration", self.model.config[:12], here.config[:12]),
        ):
            if mine != its:
                raise PlanError(
                    f"the recipe was made for another model: its {what} is {mine}, this model's is {its}. Search on "
                    "this model, or load the one of the recipe."
                )

    def warn_if_far(self, tokens: int) -> None:
        """Warn when a prompt has far more or fewer visual tokens than the calibration prompts had.

        Args:
            tokens: Unpruned visual tokens of the prompt.
        """
        least, most = self.model.tokens
        if tokens < least * (1 - _FAR) or tokens > most * (1 + _FAR):
            range_ = f"{least}" if least == most else f"{least} to {most}"
            warnings.warn(
                f"this prompt has {tokens} visual tokens, the recipe was calibrated on {range_}: more than "
                f"{_FAR:.0%} away, so its quality and cost are not vouched for. Calibrate on prompts like this one.",
                PlanMismatchWarning,
                stacklevel=2,
            )

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back to an equal recipe."""
        content = self._content()
        return json.dumps({**content, "checksum": checksum(content)}, indent=1)

    def _content(self) -> dict[str, Any]:
        own = asdict(self)
        own["methods"] = [{"name": name, "options": options} for name, options in own.pop("spec")]
        content = {"kind": KIND, "version": _VERSION, **own}
        plain: dict[str, Any] = json.loads(json.dumps(content))  # tuples are lists, as they will be when read
        return plain

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            PlanError: Not a recipe, of an unknown version, truncated, or edited after it was written.
        """
        data = json_object(text)
        if data.get("kind") != KIND:
            raise PlanError(f"not a recipe: 'kind' is {data.get('kind')!r}. A plan for one batch is read by Plan.load.")
        if data.get("version") != _VERSION:  # first: another version may differ in everything else
            raise PlanError(f"recipe version {data.get('version')!r} is not supported, expected {_VERSION}")
        if "checksum" not in data:
            raise PlanError("the recipe has no checksum: it was edited or cut off. Write recipes with Recipe.save.")
        if data.pop("checksum") != checksum(data):
            raise PlanError(
                "the recipe was edited or damaged: its content does not match its checksum. Change a recipe with "
                "dataclasses.replace(recipe, …) and save it anew."
            )
        try:
            spec = tuple((one["name"], _frozen_options(one["options"])) for one in data.pop("methods"))
            model = data.pop("model")
            facts = ModelFacts(**{**model, "tokens": tuple(model["tokens"])})
            judged = data.pop("calibration")
            rest = {own.name: data[own.name] for own in fields(cls) if own.name in ("budget", "cost", "library")}
            return cls(spec, model=facts, calibration=None if judged is None else CalibrationFacts(**judged), **rest)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a recipe: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe written by :meth:`save`.

        Raises:
            PlanError: The file cannot be read, or is no intact recipe.
        """
        text = read_text(path)
        with in_file(path):
            return cls.from_json(text)


def read_plan(path: str | Path) -> Plan | Recipe:
    """Read what ``patch(model, plan=path)`` may be given: a plan for one batch, or a recipe.

    Raises:
        PlanError: The file cannot be read, or is neither.
    """
    text = read_text(path)
    with in_file(path):
        return Recipe.from_json(text) if "kind" in json_object(text) else Plan.from_json(text)


def _config_hash(config: Any) -> str:
    values = config.to_dict()
    parts = {name: part for name, part in values.items() if name.endswith("_config") and isinstance(part, dict)}
    structure = {name: values[name] for name in _WHOLE if values.get(name) is not None}
    structure["language_model"] = parts.get("text_config", {}).get("model_type")
    for name in ("text_config", "vision_config"):
        part = parts.get(name, {})
        structure[name] = {key: part[key] for key in _PART if part.get(key) is not None}
    return checksum(structure)


def spec_of(method: Pruner) -> tuple[str, dict[str, Any]]:
    """Registered name of a method, and its options that are not the defaults, as plain data.

    Raises:
        PlanError: The method is not registered, or has an option that is no plain data.
    """
    from .registry import MERGES, PRUNERS

    name = PRUNERS.name_of(type(method))
    if name is None:
        raise PlanError(f"{type(method).__name__} is not registered, so a recipe cannot name it; PRUNERS.register it")
    options = {
        own.name: getattr(method, own.name) for own in fields(method) if getattr(method, own.name) != own.default
    }
    merge = options.get("merge")
    if merge is not None:
        options["merge"] = MERGES.name_of(type(merge)) if merge == type(merge)() else merge
    try:
        json.dumps(options)
    except TypeError as error:
        raise PlanError(f"{method} has an option that a recipe cannot write: {error}") from error
    return name, options


def _frozen_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """With the tuples that JSON made lists of."""
    return {key: _frozen(value) for key, value in options.items()}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
