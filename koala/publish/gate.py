"""The gate: what a student must reach to be released."""

from collections.abc import Mapping

from koala.errors import KoalaError


def shortfalls(metrics: Mapping[str, float], require: Mapping[str, float]) -> list[str]:
    """Return a phrase for each metric below its threshold; none where the gate is open.

    Raises:
        KoalaError: A threshold names a metric that was not measured.
    """
    for name in require:
        if name not in metrics:
            raise KoalaError(
                f"publish.require names {name!r}, which was not measured: choose from {', '.join(metrics)}"
            )
    return [
        f"{name} is {metrics[name]:.3f}, below {least:g}"
        for name, least in require.items()
        if not metrics[name] >= least  # also true for NaN
    ]
