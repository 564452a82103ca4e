"""Strict configuration: kinds by file name, recipe keys checked against constructors, errors that name the key.

An extension point is a package ``agglo.<point>``; a kind is a file in it with one public class, whose keyword-only
constructor parameters are the legal recipe keys. Third parties add kinds through the entry-point group
``agglo.<point>``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from agglo.types import AggloError, ConfigError

POINTS: dict[str, str] = {
    "students": "Student",
    "heads": "Head",
    "teachers": "Teacher",
    "upsamplers": "Upsampler",
    "text": "TextTower",
    "normalizers": "Normalizer",
    "losses": "Loss",
    "balancers": "Balancer",
    "sources": "Source",
    "evals": "Eval",
    "exports": "Export",
    "runtimes": "Runtime",
    "objectives": "Objective",
}
"""Extension point → the contract class in its ``base.py``."""

NESTED: dict[str, str] = {
    "source": "sources",
    "sources": "sources",
    "train": "sources",
    "val": "sources",
    "test": "sources",
    "text": "text",
}
"""Parameter name of a kind → extension point of its value, ``{kind: ...}`` or a list of them."""

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class Strict(BaseModel):
    """A typed, immutable node of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# --- kinds ------------------------------------------------------------------------------------------------------------


def _point(point: str) -> str:
    if point not in POINTS:
        raise ConfigError(f"no extension point {point!r}{nearest(point, POINTS)}")
    return point


@cache
def _plugins(point: str) -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=f"agglo.{point}")}


def kinds(point: str, *, installed: bool = True) -> list[str]:
    """Names of the kinds of an extension point, sorted.

    Args:
        point: one of :data:`POINTS`.
        installed: include kinds that other packages provide through entry points.

    Raises:
        ConfigError: no such extension point.
    """
    folder = Path(__file__).parent / _point(point)
    names = {path.stem for path in folder.glob("*.py") if path.stem != "base" and not path.stem.startswith("_")}
    return sorted(names | set(_plugins(point) if installed else ()))


@cache
def find(point: str, kind: str, *, installed: bool = True) -> type:
    """The class of a kind.

    Args:
        point: an extension point, e.g. ``"losses"``.
        kind: a file name in it, e.g. ``"angular"``.
        installed: False for kinds named by a downloaded checkpoint, which may only use built-in ones.

    Raises:
        ConfigError: unknown point or kind; suggests the nearest name.
    """
    known = kinds(point, installed=installed)
    if kind not in known:
        raise ConfigError(f"no kind {kind!r} of {point}{nearest(kind, known)}")
    if not (Path(__file__).parent / point / f"{kind}.py").exists():
        return _plugins(point)[kind].load()
    base = getattr(importlib.import_module(f"agglo.{point}.base"), POINTS[point])
    module = importlib.import_module(f"agglo.{point}.{kind}")
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(found) != 1:
        raise ConfigError(f"agglo/{point}/{kind}.py must define one public {base.__name__}, found {len(found)}")
    return found[0]


@cache
def schema(cls: type) -> type[BaseModel]:
    """A pydantic model of the keyword-only constructor parameters of ``cls``: the legal recipe keys."""
    hints = get_type_hints(cls.__init__, include_extras=True)  # with constraints: Annotated[int, Field(gt=0)]
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    return create_model(cls.__name__, __config__=_STRICT, **fields)


def check_options(point: str, options: Mapping[str, Any], where: str = "", *, installed: bool = True) -> dict[str, Any]:
    """Validate ``{"kind": ..., **keys}`` against the kind's constructor.

    Args:
        point: the extension point.
        options: the mapping from the recipe.
        where: dotted path of the mapping in the recipe, for messages.
        installed: see :func:`find`.

    Returns:
        The mapping with all defaults filled in, ``kind`` first.

    Raises:
        ConfigError: no kind, an unknown kind, an unknown key, a value of the wrong type.
    """
    if "kind" not in options:
        glued = next((str(key) for key in options if str(key).startswith("kind:")), None)
        hint = f"; YAML needs a space after the colon: {glued.replace(':', ': ', 1)}" if glued else ""
        raise ConfigError(f"{where or point}: needs `kind:`, one of {', '.join(kinds(point))}{hint}")
    try:
        cls = find(point, str(options["kind"]), installed=installed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None
    keys = {key: value for key, value in options.items() if key != "kind"}
    refuse_large(keys, where or f"{point}.{options['kind']}")
    try:
        checked = schema(cls).model_validate(keys)
    except ValidationError as error:
        raise ConfigError(explain(error, keys, where or f"{point}.{options['kind']}", schema(cls))) from None
    values = {name: getattr(checked, name) for name in type(checked).model_fields}
    for name, value in values.items():
        for index, entry in enumerate(value if isinstance(value, list) else [value]):
            if name in NESTED and isinstance(entry, Mapping):
                inner = f"{where}.{name}" + (f".{index}" if isinstance(value, list) else "")
                check_options(NESTED[name], entry, inner.removeprefix("."), installed=installed)
    return {"kind": options["kind"], **values}


def build(point: str, options: Mapping[str, Any], *program: Any, where: str = "", installed: bool = True) -> Any:
    """Construct the kind named by ``options``.

    Args:
        point: the extension point.
        options: ``{"kind": name, **keys}``.
        program: the positional arguments of the contract (feature specs, names).
        where: dotted path in the recipe, for messages.
        installed: see :func:`find`.

    Raises:
        ConfigError: the options do not fit the kind's constructor.
    """
    checked = check_options(point, options, where, installed=installed)
    kind = checked.pop("kind")
    try:
        return find(point, kind, installed=installed)(*program, **checked)
    except AggloError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where or f'{point}.{kind}'}: {error}") from error


def refuse_large(value: Any, where: str) -> None:
    """Refuse whole numbers that do not fit 64 bits, wherever they are in a tree.

    Raises:
        ConfigError: names the key.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            refuse_large(each, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            refuse_large(each, f"{where}.{index}")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where}: a number of {value.bit_length()} bits is too large; at most {(1 << 63) - 1}")


# --- YAML and overrides -----------------------------------------------------------------------------------------------


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.width = 110
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def read_yaml(text: str, name: str = "recipe") -> dict[str, Any]:
    """Parse YAML 1.2; duplicate keys are an error.

    Raises:
        ConfigError: not YAML, or not a mapping; names the line.
    """
    try:
        data = _yaml().load(text)
        _copy(data)  # fails on an anchor that contains itself
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{name}, line {line}: {error.problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # control characters, numbers of thousands of digits
        raise ConfigError(f"{name}: not YAML ({str(error).strip().splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping of keys at the top, found {type(data).__name__}")
    return data


def write_yaml(data: Any) -> str:
    """``data`` as YAML, keys in their given order."""
    from io import StringIO

    out = StringIO()
    _yaml().dump(data, out)
    return out.getvalue()


def override(
    data: dict[str, Any], assignments: Iterable[str] | Mapping[str, Any], keep: Collection[str] = ()
) -> dict[str, Any]:
    """Apply ``key.path=value`` assignments to a copy of a nested mapping; values are YAML (``[1, 2]``, ``null``).

    A mapping of dotted keys to plain values is applied likewise.

    List elements are addressed by index: ``partitions.0.batch=64``. Setting ``kind`` drops that mapping's other keys,
    which belong to the replaced kind, except those in ``keep``.

    Raises:
        ConfigError: no ``=``, an index out of range, or a path through a value without keys.
    """
    root = _copy(data)
    if isinstance(assignments, Mapping):
        for key, value in assignments.items():
            _assign(root, str(key).split("."), _copy(value), f"{key}={value!r}", keep)
        return root
    if isinstance(assignments, str):
        raise ConfigError(f"overrides: {assignments!r} is one string: give a list of them, [{assignments!r}]")
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {assignment!r} is not of the form key.path=value")
        try:
            value = _yaml().load(text) if text else None
            _copy(value)
        except (YAMLError, ValueError, RecursionError):
            raise ConfigError(f"override {assignment!r}: {text!r} is not a YAML value") from None
        _assign(root, path.split("."), value, assignment, keep)
    return root


def merge(base: Any, own: Any, keep: Collection[str] = ()) -> Any:
    """``own`` over ``base``: mappings are merged key by key, other values replaced.

    Another ``kind`` drops the keys of the base's kind, except those in ``keep``.
    """
    if not isinstance(base, Mapping) or not isinstance(own, Mapping):
        return own
    if "kind" in own and own["kind"] != base.get("kind"):
        base = {key: value for key, value in base.items() if key in keep}
    return {**base, **{key: merge(base.get(key), value, keep) for key, value in own.items()}}


def _assign(root: Any, keys: list[str], value: Any, assignment: str, keep: Collection[str]) -> None:
    node: Any = root
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"override {assignment!r}: {key!r} is not an index of a list of {len(node)}")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise ConfigError(f"override {assignment!r}: {'.'.join(keys[:position])} is a value without keys")
        if not last:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]
        else:
            holder: Any = node
            if index == "kind" and holder.get("kind") != value:
                for stale in set(holder) - set(keep):
                    del holder[stale]
            holder[index] = value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_copy(item) for item in value]
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'? (all: ...)"`` if a known name is close, else ``"; choose from: a, b, c"``."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}? (all: {', '.join(options)})"
    return f"; choose from: {', '.join(options)}" if options else ""


def explain(error: ValidationError, data: Any, where: str, model: type[BaseModel]) -> str:
    """One line per problem: the dotted key, what is wrong with it, and the nearest legal key."""
    lines = []
    for problem in error.errors():
        location = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        key = ".".join(str(part) for part in location)
        path = f"{where}.{key}" if where and key else where or key
        if problem["type"] == "extra_forbidden":
            legal = _fields_at(model, location[:-1])
            lines.append(f"{path}: unknown key{nearest(str(location[-1]), legal)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: missing")
        elif isinstance(cause := problem.get("ctx", {}).get("error"), ConfigError):
            lines.append(str(cause))  # includes its own key
        else:
            lines.append(f"{path}: {problem['msg']} (got {problem['input']!r})")
    return "\n".join(lines)


def _fields_at(model: Any, location: Sequence[Any]) -> list[str]:
    """The legal keys at a location of a pydantic tree."""
    node = model
    for part in location:
        candidates = [node, *getattr(node, "__args__", ())]
        for candidate in candidates:
            fields = getattr(candidate, "model_fields", None)
            if fields and part in fields:
                node = fields[part].annotation
                break
        else:
            node = next((arg for arg in getattr(node, "__args__", ()) if hasattr(arg, "model_fields")), node)
    for candidate in [node, *getattr(node, "__args__", ())]:
        if hasattr(candidate, "model_fields"):
            return list(candidate.model_fields)
    return []
