"""The shard's own exceptions: what one row may cause, what start may end with, and bugs.

The user's errors are the router's (tgi_router/errors.py); what arrives here was validated there once already.
"""


class RowProblem(Exception):
    """Something is wrong with one row. The row is dropped and reported as a RowError; the step goes on without it."""


class Bug(Exception):
    """What can only happen when our own code is wrong: a plan that contradicts the shard's state. Ends the process."""


class StepOrder(Exception):
    """A step came out of order. Its call fails; the process lives, because another router may connect and reset."""


class StartError(Exception):
    """The shard cannot start; one sentence that says why, with the numbers and the flag that helps."""
