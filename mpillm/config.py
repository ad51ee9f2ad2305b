"""The machinery of a run's settings: TOML and `--section.key=value` in, checked sections out.

A section is a `Section` subclass whose fields carry their type, bounds and one line of help:

    class TrainSettings(Section, frozen=True, kw_only=True):
        steps: Annotated[int, Meta(ge=1, description="optimizer steps in the whole run")] = 1000

`load` reads a file and the command line into such a class, `dump` writes it back as TOML that loads
to an equal value, `describe` lists every setting. Each mistake is a `UserError` of one line: where
(file and section.key, or the option), what was expected, what was given, the nearest valid name.
Integers are accepted for numbers; true and false never for integers.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec
import tomli_w
from msgspec import inspect

from mpillm.errors import UserError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Section", "describe", "dump", "from_table", "load", "setting_names", "to_table"]

_LONGEST_VALUE = 80  # characters of a given value that an error line shows
_LARGEST_FILE = 256 * 2**10  # bytes
_MOST_DOTS = 200  # in a line
_DEEPEST = 32
_MOST_BITS = 256


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the settings. Subclasses say `frozen=True, kw_only=True` too."""

    @classmethod
    def variant(cls, table: dict[str, Any], where: str) -> type[Section]:
        """The class that `table` is read as. A union of sections overrides this to read its tag.

        Errors are to begin with `where`, a dot, the key and a colon.
        """
        return cls


T = TypeVar("T", bound=Section)
_Path = tuple[str, ...]


@dataclass(frozen=True)
class _Origin:
    """Where a run's settings came from: a file, and options with their text after `=`, if any."""

    file: Path | None = None
    options: dict[_Path, str | None] = field(default_factory=dict)

    def where(self, path: _Path) -> str:
        """How an error line names the setting at `path`."""
        for option in self.options:
            if path and option[: len(path)] == path:
                return "--" + _dotted(option)
        file = [str(self.file)] if self.file else []
        return ": ".join([*file, _dotted(path)] if path else file) or "settings"


def _dotted(path: _Path) -> str:
    """A path in one line, not too long, whatever a file's keys hold."""
    keys = (key if key.isprintable() else repr(key) for key in path)
    return ".".join(
        k if len(k) <= _LONGEST_VALUE else k[: _LONGEST_VALUE - 3] + "..." for k in keys
    )


# --- in ------------------------------------------------------------------------------------------


def load(
    kind: type[T], source: Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> T:
    """Settings from a TOML file, a table of tables or nothing, with `overrides`, all checked.

    An override is `--section.key=value`, the value a TOML literal or plain text; `--section.key`
    alone sets a switch to true. The last one given counts.
    """
    table = _read(source) if isinstance(source, Path) else dict(source or {})
    origin = _Origin(source if isinstance(source, Path) else None)
    for override in overrides:
        keys, text = _split_override(override)
        origin.options[keys] = text
        inner = table
        for key in keys[:-1]:  # along a copy: the caller's tables stay as they are
            below = inner.get(key)
            inner[key] = dict(below) if isinstance(below, Mapping) else {}
            inner = inner[key]
        inner[keys[-1]] = True if text is None else _literal(text)
    return _decode(kind, kind, table, (), origin)


def from_table(kind: type[T], table: Mapping[str, Any]) -> T:
    """The settings in a table of tables, checked as `load` does."""
    return load(kind, table)


def _read(path: Path) -> dict[str, Any]:
    """Parse a TOML file."""
    try:
        # Should it be a FIFO, it is not waited for.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: not a regular file")
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise UserError(f"{path}: more than {_LARGEST_FILE >> 10} KiB; not a file of settings")
        return _parse(raw.decode())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_nearest_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {' '.join(str(error).split())}") from None


def _parse(text: str) -> dict[str, Any]:
    """The table that TOML spells. Raises ValueError.

    Beyond what TOML says, nothing in a file can hurt: a key of n parts takes n * n steps to read,
    and what is nested deeply or an integer of many digits cannot be shown in an error line.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MOST_DOTS:
            raise ValueError(f"line {number} has more than {_MOST_DOTS} dots")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[Any] = [table]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        values = [value for items in inner for value in items]
        if any(isinstance(value, int) and value.bit_length() > _MOST_BITS for value in values):
            raise ValueError(f"an integer has more than {_MOST_BITS} bits")
        level = [value for value in values if isinstance(value, dict | list)]
        if not level:
            return table
    raise ValueError("nested too deeply")


def _nearest_file(path: Path) -> str:
    """The end of an error line about a missing file."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = [str(file) for file in folder.glob("*.toml")]
    return did_you_mean(str(path), names) if names else f"{folder} holds no TOML file"


def _split_override(override: str) -> tuple[_Path, str | None]:
    """Path and text of `--section.key=value`; hyphens in the name count as underscores."""
    name, equals, text = override.partition("=")
    keys = tuple(name[2:].replace("-", "_").split("."))
    if not name.startswith("--") or not all(keys):
        raise UserError(f"{override}: expected --section.key=value")
    return keys, text if equals else None


def _literal(text: str) -> Any:
    """The value that `text` spells in TOML (or in Python, for numbers such as .5), else `text`."""
    try:
        table = _parse(f"value = {text}")
        if table.keys() == {"value"}:
            return table["value"]
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _decode(root: type[Section], kind: type[T], table: Any, path: _Path, origin: _Origin) -> T:
    """An instance of `kind`, or of its variant, from a table; `root` is for suggestions."""
    where, name = origin.where(path), _dotted(path)
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: a section, not a value; expected {name}.key, got {_show(table)}")
    chosen = _variant(kind, dict(table), path, origin)
    fields = msgspec.structs.fields(chosen)
    names = [entry.encode_name for entry in fields]
    for key in table:
        if key not in names:
            what = "setting" if path else "section"
            nearest = _nearest_setting(root, (*path, key), names)
            raise UserError(f"{origin.where((*path, key))}: no such {what}; {nearest}")
    values: dict[str, Any] = {}
    for entry in fields:
        name = entry.encode_name  # without the underscore of a field that is a Python keyword
        here, section = (*path, name), _section(entry.type)
        if name not in table:
            if entry.required:
                what = f"section [{_dotted(here)}]" if section else f"setting {_dotted(here)}"
                raise UserError(f"{origin.where(())}: missing {what}: {_help(entry)}")
        elif section:
            values[entry.name] = _decode(root, section, table[name], here, origin)
        else:
            values[entry.name] = _value(entry.type, table[name], here, origin)
    return chosen(**values)


def _variant(kind: type[T], table: dict[str, Any], path: _Path, origin: _Origin) -> type[T]:
    """The class to read `table` as; its error is told with the file or the option."""
    try:
        chosen = kind.variant(table, _dotted(path))
    except UserError as error:
        key, _, rest = str(error).partition(": ")
        raise UserError(f"{origin.where(tuple(key.split('.')))}: {rest}") from None
    if not issubclass(chosen, kind):
        raise TypeError(f"{chosen} is no variant of {kind}")
    return chosen


def _value(kind: Any, value: Any, path: _Path, origin: _Origin) -> Any:
    """A checked value of one setting."""
    expected, where = inspect.type_info(kind), origin.where(path)
    text = origin.options.get(path)
    # `--run.dir=7` is 7 to TOML, and yet a fine name; `--data.text=a.txt` is a list of one.
    candidates = [value] if text is None else [value, text, [value], [text]]
    for candidate in candidates:
        try:
            result = msgspec.convert(candidate, kind)
        except msgspec.ValidationError:
            continue
        items = result if isinstance(result, list | tuple) else [result]
        if all(item == item for item in items):  # nan satisfies no bound and equals nothing
            return result
    given = value if text is None else text
    choices = _choices(expected)
    if choices and isinstance(given, str):
        raise UserError(f"{where}: no such value {_show(given)}; {did_you_mean(given, choices)}")
    if path in origin.options and text is None:
        raise UserError(f"{where}: no value given; expected {where}={_words(expected)}")
    raise UserError(f"{where}: expected {_words(expected)}, got {_show(value)}")


# --- out -----------------------------------------------------------------------------------------


def to_table(config: Section) -> dict[str, Any]:
    """The settings as a table of tables of plain values; settings that are None are left out."""
    names = zip(config.__struct_encode_fields__, config.__struct_fields__, strict=True)
    pairs = ((name, getattr(config, field)) for name, field in names)
    return {
        name: to_table(value) if isinstance(value, Section) else msgspec.to_builtins(value)
        for name, value in pairs
        if value is not None
    }


def dump(config: Section) -> str:
    """The settings as TOML that loads back to an equal value."""
    return tomli_w.dumps(to_table(config))


def describe(kind: type[Section]) -> str:
    """Every setting as `--section.key=default`, with its meaning and its type, by section."""
    lines: list[str] = []
    section = ""
    for name, entry, owner in _settings(kind):
        if (prefix := name.rpartition(".")[0]) != section:
            section = prefix
            lines += ["", f"[{section}] {_first_line(owner)}"]
        default = "" if entry.default in (None, msgspec.NODEFAULT) else _show(entry.default)
        expected = _words(inspect.type_info(entry.type))
        lines.append(f"  {f'--{name}={default}':<36} {_help(entry)} ({expected})")
    return "\n".join(lines).lstrip("\n")


def setting_names(kind: type[Section]) -> list[str]:
    """The dotted names of all settings; of a union of sections, those of the usual variant."""
    return [name for name, _, _ in _settings(kind)]


# --- types in words ------------------------------------------------------------------------------


def _settings(
    kind: type[Section], prefix: str = ""
) -> Iterator[tuple[str, msgspec.structs.FieldInfo, type[Section]]]:
    """Dotted name, field and owning section of every setting below `kind`."""
    chosen = kind.variant({}, prefix.rstrip("."))
    for entry in msgspec.structs.fields(chosen):
        section = _section(entry.type)
        if section:
            yield from _settings(section, f"{prefix}{entry.encode_name}.")
        else:
            yield prefix + entry.encode_name, entry, chosen


def _section(kind: Any) -> type[Section] | None:
    """The section class behind a field's type; None for a plain value."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return bare if isinstance(bare, type) and issubclass(bare, Section) else None


def _nearest_setting(root: type[Section], path: _Path, siblings: Sequence[str]) -> str:
    """The end of an error line: the same key in another section, else the nearest sibling."""
    names = (name for name in setting_names(root) if name != _dotted(path))
    same = [f"'{name}'" for name in names if name.rpartition(".")[2] == path[-1]]
    return f"did you mean {' or '.join(same)}?" if same else did_you_mean(path[-1], siblings)


def _help(entry: msgspec.structs.FieldInfo) -> str:
    """One line about a setting or a section."""
    section = _section(entry.type)
    if section:
        return _first_line(section)
    info = inspect.type_info(entry.type)
    extra = info.extra_json_schema if isinstance(info, inspect.Metadata) else None
    return str((extra or {}).get("description", entry.name))


def _first_line(kind: type[Section]) -> str:
    return (kind.__doc__ or kind.__name__).strip().splitlines()[0]


def _choices(info: inspect.Type) -> list[str]:
    """The words that a setting may take; empty when it is not a choice of words."""
    if isinstance(info, inspect.Metadata):
        return _choices(info.type)
    if isinstance(info, inspect.LiteralType):
        return [value for value in info.values if isinstance(value, str)]
    return []


def _words(info: inspect.Type) -> str:
    """A type and its bounds in words, such as `integer >= 1` or `[number, number]`."""
    match info:
        case inspect.Metadata(type=inner):
            return _words(inner)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "integer" + _bounds(info)
        case inspect.FloatType():
            return "number" + _bounds(info)
        case inspect.StrType(min_length=shortest):
            return "text that is not empty" if shortest else "text"
        case inspect.LiteralType(values=values):
            return " | ".join(str(value) for value in values)
        case inspect.TupleType(item_types=items):
            return "[" + ", ".join(_words(item) for item in items) + "]"
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return f"[{_words(item)}, ...]"
        case inspect.UnionType(types=types):
            kept = (item for item in types if not isinstance(item, inspect.NoneType))
            return " or ".join(_words(item) for item in kept)
    raise TypeError(f"settings of type {info} are not supported")


def _bounds(info: inspect.IntType | inspect.FloatType) -> str:
    """The bounds of a number, such as ` >= 0 and < 1`."""
    signs = {">": info.gt, ">=": info.ge, "<": info.lt, "<=": info.le}
    return " and".join(
        f" {sign} {int(bound) if bound == int(bound) else bound}"
        for sign, bound in signs.items()
        if bound is not None
    )


def _show(value: Any) -> str:
    """A value as an error line shows it: on one line, not too long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(_show(item) for item in value) + "]"
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
