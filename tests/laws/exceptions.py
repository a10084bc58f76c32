"""Which laws a method cannot obey, each with the reason; and options that make slow methods quick in the laws."""

# law -> method -> reason. The test of the law is not run for the method; a method without an entry is held to all laws.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "identical pairs score zero": {},
    "some possible edge scores": {},
    "scores scale with the metric": {},
    "cutting the work changes nothing": {},
    "order changes nothing": {},
    "padding changes nothing": {},
    "exact where the model is linear": {},
    "corrupt values are used": {},
}

# Options with which a method is run in the laws; learned masks take few steps there.
OPTIONS: dict[str, dict[str, object]] = {}
