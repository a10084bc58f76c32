"""Which laws a method cannot obey, each with the reason; and options that make slow methods quick in the laws."""

LEARNED = ("edge-pruning", "matryoshka", "subnetwork-probing", "ugs")


def learned(reason: str) -> dict[str, str]:
    """The same reason for all methods that learn masks."""
    return dict.fromkeys(LEARNED, reason)


# law -> method -> reason. The test of the law is not run for the method; a method without an entry is held to all laws.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "identical pairs score zero": {
        "information-flow-routes": "it never sees the corrupt inputs: shares of a stream do not depend on them",
    },
    "some possible edge scores": {},
    "scores scale with the metric": {
        **learned("it learns chances and rankings, which the metric's scale does not change (tested)"),
        "atp-star-edges": "it gives magnitudes: minus the metric scores the same",
        "discrete-codes": "it never sees the metric: codes are made of what is written",
        "information-flow-routes": "it never sees the metric: shares of a stream do not depend on it",
    },
    "cutting the work changes nothing": {},
    "order changes nothing": {
        **learned("another order of the examples draws other examples for each step"),
    },
    "padding changes nothing": {
        **learned("what is learned on all examples is no mean of what each teaches; padding is tested apart"),
        "atp-star-edges": "the magnitude of a mean over examples is not the mean of their magnitudes",
        "discrete-codes": "it counts codes over all examples together; padding is tested in test_discrete_codes.py",
        "peap": "prompts of different lengths have different positions; tested with a schema in test_peap.py",
    },
    "exact where the model is linear": {
        **learned("it learns which edges to keep together, not what each does alone"),
        "atp-star-edges": "it gives magnitudes, averaged over passes that leave out paths",
        "discrete-codes": "it gives numbers of codes, not effects on the metric",
        "information-flow-routes": "it gives shares of what a reader reads, not effects on the metric",
        "peap": "its edges are those of a graph with positions; tested on that graph in test_peap.py",
    },
    "corrupt values are used": {},
    "what has no effect scores zero": {
        "discrete-codes": "what differs between clean and corrupt inputs is counted, whether it has an effect or not",
        "information-flow-routes": "a write that changes nothing is still part of what a reader reads",
    },
    "a broken metric is refused": {
        "discrete-codes": "it never calls the metric, so it cannot notice",
        "information-flow-routes": "it never calls the metric, so it cannot notice",
    },
}

# The metric of the task is the one that laws change or break; a warm start has laws of its own.
FEW_STEPS: dict[str, object] = {"steps": 4, "examples": 3, "objective": "task", "warm_start": None}

# No |r| is below 0, so nothing is dropped and every edge's r is its own effect on the whole model, to which the laws
# apply. What is dropped at other thresholds is held to literal searches in test_acdc.py and test_group_testing.py.
NOTHING_DROPPED: dict[str, object] = {"tau": 0.0, "magnitude": True, "objective": "task"}

# Options with which a method is run in the laws; learned masks take few steps there.
OPTIONS: dict[str, dict[str, object]] = {
    # After few steps a code does not hang on the last digit of what was written.
    "discrete-codes": {"steps": 4, "seeds": 2},
    "peap": {"spans": "start"},  # some tasks there have prompts of different lengths
    "acdc": NOTHING_DROPPED,
    "group-testing": NOTHING_DROPPED,
    "edge-pruning": {"target": 0.5, **FEW_STEPS},
    "matryoshka": FEW_STEPS,
    "subnetwork-probing": FEW_STEPS,
    "ugs": FEW_STEPS,
}
