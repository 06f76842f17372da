"""Jinja's immutable sandbox, bounded: a chat template can neither run for ever nor make huge values out of small ones.

Jinja's own sandbox bounds `range` alone, so loops inside loops go on for days without writing anything. Here every
round of a loop and every call of a macro looks at the clock, and `+`, `~`, `*` and `**` refuse results beyond any
prompt. `chat_template.py` decides what templates see and how long they may take.
"""

import threading
import time
from collections.abc import Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_ITEMS = 4_000_000  # characters of a text, elements of a list
_MAX_BITS = 10_000


class _Clock(Extension):
    """Ends renderings of this thread that are over their time."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._thread = threading.local()

    def start(self, seconds: float) -> None:
        self._thread.deadline = time.monotonic() + seconds
        self._thread.seconds = seconds

    def tick(self) -> None:
        """Raises SecurityError when the time is over."""
        if time.monotonic() > self._thread.deadline:
            raise SecurityError(f"rendering takes longer than {self._thread.seconds:g} seconds")

    def concat(self, *values: Any) -> str:
        """What `~` makes."""
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > _MAX_ITEMS:
            raise SecurityError("the result of `~` would be too large")
        return "".join(texts)


class _Bounded(NodeTransformer):
    """Puts the clock into loops and macros, and our `~` in the place of Jinja's, which no hook reaches."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._timed(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._timed(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._timed(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._clock.call_method("concat", node.nodes, lineno=node.lineno)

    def _timed(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        look = nodes.ExprStmt(self._clock.call_method("tick", lineno=node.lineno), lineno=node.lineno)
        node.body.insert(0, look)
        return node


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment. `start_clock` must precede every rendering, on its thread."""

    intercepted_binops = frozenset({"+", "*", "**"})  # which also keeps them from being computed by the compiler

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._clock = _Clock(self)
        self.extensions[_Clock.identifier] = self._clock

    def start_clock(self, seconds: float) -> None:
        """From now on this thread's rendering may take `seconds`."""
        self._clock.start(seconds)

    def from_timed(self, source: str) -> jinja2.Template:
        """The template in `source`, with the clock in its loops and macros. Raises TemplateSyntaxError."""
        tree: nodes.Template = _Bounded(self._clock).visit(self.parse(source))
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`. Raises SecurityError when the result would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            too_large = bits > _MAX_BITS
        else:
            too_large = _num_items(operator, left, right) > _MAX_ITEMS
        if too_large:
            raise SecurityError(f"the result of `{operator}` would be too large")
        return super().call_binop(context, operator, left, right)


def _num_items(operator: str, left: Any, right: Any) -> int:
    """Length of what `+` or `*` makes of texts and lists; 0 of other things."""
    if operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        count, items = (left, right) if isinstance(left, int) else (right, left)
        return int(count) * len(items) if isinstance(items, Sized) else 0
    if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        return len(left) + len(right)
    return 0
