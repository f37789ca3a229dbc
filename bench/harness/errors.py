"""Why a benchmark ends without a table."""


class BenchmarkFailed(RuntimeError):
    """The benchmark cannot show what it was asked for."""


class ParityError(BenchmarkFailed):
    """A result is wrong: not the reference's bits, or too far from float64. Nothing was timed."""
