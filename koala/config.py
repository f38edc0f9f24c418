"""The base of every configuration type."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Config(BaseModel):
    """A frozen section of params.yaml. An unknown key is refused, as is a number that is none; lists become tuples.

    Each field is explained by the string below it, which `koala params --schema` exports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    untracked: ClassVar[frozenset[str]] = frozenset({"machine"})
    """Fields that do not decide what a stage makes: a change of them neither reruns nor restarts it."""
    beside_rows: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide nothing of a row by itself: what was made of it by other values of them is taken over."""

    def recipe(self) -> dict[str, Any]:
        """Return the fields that decide what a stage makes, as JSON-able values."""
        return self.model_dump(mode="json", exclude=set(self.untracked))

    def resume_key(self) -> dict[str, Any]:
        """Return the part of `recipe()` that interrupted work must share to be resumed."""
        return self.recipe()

    def of_rows(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a recipe that decides what is made of a row by itself."""
        return {name: value for name, value in recipe.items() if name not in self.beside_rows}

    def of_work(self, name: str) -> Self:
        """Return the configuration for a work folder, whose name is the same on every machine."""
        return self


def _tagged(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    for kind, options in value.items():
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"the options of {kind} must be a mapping, not {options!r}")
    return [{"kind": kind, **(options or {})} for kind, options in value.items()]


BY_KIND = BeforeValidator(_tagged)
"""Read a mapping of kinds to their options, `{words: {at_least: 4}}`, as a list of tagged sections."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted names: `{"a": {"b": 1}}` gives `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            flat |= flatten(value, full)
        else:
            flat[full] = value
    return flat
