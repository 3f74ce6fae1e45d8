"""Bad data: raised, or counted and left out with a summary."""

from __future__ import annotations

from collections import Counter
from typing import Literal


class DataError(ValueError):
    """Data that cannot be used. `kind` is what a summary counts; the text names the file, the id and the fault."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)  # both, or it could not be unpickled in the process that the user sees
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]


class Problems:
    """Raises what is wrong with a data set or, with `on_error="skip"`, keeps it for a summary.

    A fault counts once, however many epochs and processes meet it.
    """

    def __init__(self, on_error: Literal["raise", "skip"] = "raise") -> None:
        self.on_error = on_error
        self._kinds: dict[str, str] = {}  # of each text

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it.

        Raises:
            DataError: unless `on_error` is "skip".
        """
        if self.on_error != "skip":
            advice = "on_error=skip (--on-error skip) counts it and leaves it out"
            raise DataError(error.kind, f"{error}; {advice}") from None
        self._kinds[str(error)] = error.kind

    def merge(self, other: Problems) -> None:
        """Add what another process found."""
        self._kinds |= other._kinds

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def counts(self) -> Counter[str]:
        """How many problems there are of each kind."""
        return Counter(self._kinds.values())

    def summary(self, examples: int = 3) -> str:
        """A line for each kind, most frequent first, with some of its problems below."""
        lines = [f"bad data: {len(self)} left out" if self._kinds else "bad data: none"]
        for kind, count in self.counts.most_common():
            texts = [text for text, other in self._kinds.items() if other == kind]
            lines += [f"  {kind}: {count}", *(f"    {text}" for text in texts[:examples])]
            if count > examples:
                lines.append(f"    and {count - examples} more")
        return "\n".join(lines)
