"""Makes a deprecation warning that our code causes an error; a Python that has this folder in its path runs it first.

A filter cannot tell: it sees the module that a library chose to blame, often one of its own. Here the stack tells, and
ours it is when our code called the library that warns, with nothing but Python's own modules between them. What
libraries do to each other, or in threads of their own, is for them to mend and not shown.
"""

import sys
import warnings

show = warnings._showwarnmsg  # what every warning that is not filtered out goes through, also those of C


def is_deprecation(category):
    kinds = DeprecationWarning, PendingDeprecationWarning, FutureWarning
    return issubclass(category, kinds) or category.__name__ == "VisibleDeprecationWarning"  # NumPy's


def packages(frame):
    """The installed packages whose code is on the stack, innermost first; "" is code that is not installed: ours."""
    while frame:
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name not in sys.stdlib_module_names:
            yield name if "site-packages" in (frame.f_globals.get("__file__") or "") else ""
        frame = frame.f_back


def is_ours(frame):
    warns, *callers = packages(frame)
    return not warns or next((name for name in callers if name != warns), warns) == ""


def refuse(message):
    if is_deprecation(message.category) and is_ours(sys._getframe(1)):
        raise message.message
    if not issubclass(message.category, (DeprecationWarning, PendingDeprecationWarning)):
        show(message)


warnings._showwarnmsg = refuse
warnings.simplefilter("always", DeprecationWarning)
warnings.simplefilter("always", PendingDeprecationWarning)
