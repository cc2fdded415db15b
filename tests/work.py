"""How much a function does, in a measure that is the same on every machine and at any load."""

import sys


def count_calls(function):
    """Return how many calls of functions, Python's and C's, `function()` makes in this thread."""
    num_calls = 0

    def count(frame, event, argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return num_calls
