"""Every error that a user can cause, as one tree.

    CircuitKitError
    ├── UnknownName        a method, task, model, format or metric that is not registered
    ├── UnsupportedModel   a model that cannot be loaded, or whose wiring fails a law
    ├── TaskError          a behaviour that is not well stated: unequal pairs, bad ids, right == wrong
    ├── MetricError        a metric that cannot be used here: not finite, no gradient, not one number per example
    ├── OptionError        an option out of range, or clashing with another
    ├── GraphError         an edge or node that the graph does not have
    └── FormatError        a file that is missing, truncated, of another kind or of a newer version

Each message says what was got, what was expected, and what to do.
"""


class CircuitKitError(Exception):
    """Base of all errors that circuitkit raises on purpose."""


class UnknownName(CircuitKitError, KeyError):
    """A name that no registry knows; the message lists the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedModel(CircuitKitError):
    """A model that cannot be loaded, or whose wiring fails a law at load."""


class TaskError(CircuitKitError, ValueError):
    """A behaviour that is not well stated; the message names the row."""


class MetricError(CircuitKitError, ValueError):
    """A metric that cannot be used with this task, model or method."""


class OptionError(CircuitKitError, ValueError):
    """An option that is out of range or clashes with another."""


class GraphError(CircuitKitError, ValueError):
    """An edge, node or shape that does not fit the graph."""


class FormatError(CircuitKitError, ValueError):
    """A file that is missing, truncated, of another kind or of a newer version."""
