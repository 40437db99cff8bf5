"""JSON schemas as llguidance reads them: what is only an annotation is left out."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgemix.errors import InputError
from edgemix.runtime.text.grammar_engine import llguidance_module

if TYPE_CHECKING:
    from collections.abc import Mapping

_VALUES = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose value is data. Schemas may stand anywhere else: a `$ref` can point there."""
_MAPPINGS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose value maps names to schemas."""


def schema_text(given: Mapping[str, Any] | str) -> str:
    """Return a JSON schema as text, without formats that llguidance does not know: they are annotations there.

    Raises:
        InputError: It is not a JSON schema.
        EdgemixError: llguidance is not installed.
    """
    try:
        schema = json.loads(given) if isinstance(given, str) else dict(given)
        json.dumps(schema).encode()
        if not isinstance(schema, dict):
            raise InputError("json_schema must be a JSON object", 'For any JSON at all, give "{}".')
        return json.dumps(_without_annotations(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"json_schema is not JSON: {error}", "Correct the schema.") from None


def _without_annotations(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_annotations(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and not _is_known(value):
            continue
        if key in _MAPPINGS and isinstance(value, dict):
            kept[key] = {name: _without_annotations(each) for name, each in value.items()}
        else:
            kept[key] = value if key in _VALUES else _without_annotations(value)
    return kept


@lru_cache(maxsize=256)
def _is_known(name: str) -> bool:
    """Whether llguidance holds texts to a format."""
    matcher = llguidance_module().LLMatcher
    grammar = matcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}), defaults={})
    return not matcher.validate_grammar(grammar)
