"""JSON schemas and regular expressions as data: how large they are, and how an object is closed. Pure, linear in size.

Nothing here runs a regular expression or follows a reference. Called by grammars.py and, in its own process, by
grammar_trial.py.
"""

from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100  # nested objects and arrays; each nested property takes two
MAX_REGEX_SIZE = 10_000  # characters, with every repetition written out: `(a{20}b){5}` has 105

# Keywords whose subschemas apply to the same object: there, one of them must not rule out the others' properties.
_COMBINING = ("allOf", "dependentSchemas", "if", "then", "else", "not", "unevaluatedProperties")


def problem(schema: dict[str, Any]) -> str | None:
    """Why `schema` is too costly even to look at, as the end of a sentence about it."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        for node in level:
            if isinstance(node, dict):
                for pattern in _patterns(node):
                    size = regex_size(pattern)
                    if size > MAX_REGEX_SIZE:
                        return f"has a pattern of {size} characters when written out; at most {MAX_REGEX_SIZE} may be"
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
        if not level:
            return None
    return f"is nested more than {MAX_DEPTH} levels deep"


def _children(node: dict[str, Any] | list[Any]) -> Iterator[Any]:
    yield from node.values() if isinstance(node, dict) else node


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    pattern, properties = node.get("pattern"), node.get("patternProperties")
    if isinstance(pattern, str):
        yield pattern
    if isinstance(properties, dict):
        yield from properties


def regex_size(regex: str) -> int:
    """Characters of `regex` with every counted repetition written out; about right for what is not well formed."""
    sizes = [0]  # of the group that is open at each level, so far
    last = 0  # of the latest item, which a count after it multiplies
    position = 0
    while position < len(regex):
        character = regex[position]
        if character == "(":
            sizes.append(0)
            last = 0
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif character == "{" and (count := _count(regex, position)) is not None:
            times, position = count
            sizes[-1] += last * (times - 1)
            last *= times
            continue
        elif character not in "*+?|":
            if character == "\\":
                position += 1
                if regex[position : position + 2] in ("u{", "U{", "x{", "p{", "P{"):  # `\u{1234}` is no count
                    position = max(position, regex.find("}", position))
            elif character == "[":
                position = _end_of_class(regex, position)
            last = 1
            sizes[-1] += 1
        position += 1
    return sum(sizes)


# Classes are ASCII, as TGI had them and JavaScript has them.
_CLASSES = {"d": "[0-9]", "w": "[0-9a-zA-Z_]", "s": r"[ \t\n\r\f\v]"}
_CLASSES |= {name.upper(): f"[^{members[1:]}" for name, members in _CLASSES.items()}


def lark_regex(regex: str) -> str:
    """`regex` as a terminal of llguidance's Lark, slashes around it."""
    parts = []
    position = 0
    while position < len(regex):
        character = regex[position]
        if character == "\\" and position + 1 < len(regex):
            position += 1
            following = regex[position]
            character = _CLASSES.get(following, "\\" + ("n" if following == "\n" else following))
        elif character in "/\n":
            character = "\\/" if character == "/" else "\\n"
        parts.append(character)
        position += 1
    return f"/{''.join(parts)}/"


def _count(regex: str, start: int) -> tuple[int, int] | None:
    """The larger number in `{n}`, `{n,}`, `{n,m}` or `{,m}` at `start`, and where it ends; None when it is no count."""
    end = regex.find("}", start, start + 32)
    parts = regex[start + 1 : end].split(",") if end > 0 else []
    if not 1 <= len(parts) <= 2 or not all(part.isascii() and (part.isdigit() or not part) for part in parts):
        return None
    return max(1, *(int(part or 0) for part in parts)), end + 1


def _end_of_class(regex: str, start: int) -> int:
    """The place of the `]` that closes the class opened at `start`; the last one when it is never closed."""
    depth, position = 0, start
    while position < len(regex):
        character = regex[position]
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
            position += regex.startswith("^", position + 1)
            position += regex.startswith("]", position + 1)  # a `]` that comes first is a member
        elif character == "]":
            depth -= 1
            if not depth:
                return position
        position += 1
    return len(regex) - 1


def closed(schema: Any) -> Any:
    """`schema` where what has `properties` is an object with these and no others, as TGI generated it.

    What says otherwise (`additionalProperties`, `patternProperties`) stands; and a schema that puts one object together
    from several parts stays as it is, because no part knows the others' properties.
    """
    return schema if _combines(schema) else _closed(schema)


def _combines(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_combines, node))
    if not isinstance(node, dict):
        return False
    if any(name in node for name in _COMBINING):
        return True
    if len(node.keys() & {"properties", "$ref", "anyOf", "oneOf"}) > 1:
        return True
    return any(map(_combines, node.values()))


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(child) for child in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for name, value in node.items():
        if name in ("enum", "const", "default", "examples"):
            result[name] = value
        elif name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            result[name] = {key: _closed(child) for key, child in value.items()}
        else:
            result[name] = _closed(value)
    if isinstance(node.get("properties"), dict):
        result.setdefault("type", "object")
        if not node.keys() & {"additionalProperties", "patternProperties"}:
            result["additionalProperties"] = False
    return result
