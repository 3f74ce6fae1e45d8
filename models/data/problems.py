"""Bad data: the error that it raises, and the summary of what was left out."""

from __future__ import annotations

from collections import Counter
from typing import Literal


class DataError(ValueError):
    """Data that cannot be used.

    Args:
        kind: the kind of problem; summaries count each kind.
        text: the file, the id and the problem.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)  # both are needed to unpickle the error of a worker process
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]


class Problems:
    """The bad data of a data set, which is raised or, with `on_error="skip"`, collected for a summary.

    Each problem counts once, even if several epochs or processes report it.
    """

    def __init__(self, on_error: Literal["raise", "skip"] = "raise") -> None:
        self.on_error = on_error
        self._kinds: dict[str, str] = {}  # the kind by the text

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it.

        Raises:
            DataError: `on_error` is not "skip".
        """
        if self.on_error != "skip":
            advice = "on_error=skip (--on-error skip) counts it and leaves it out"
            raise DataError(error.kind, f"{error}; {advice}") from None
        self._kinds[str(error)] = error.kind

    def merge(self, other: Problems) -> None:
        """Add the problems of another process."""
        self._kinds |= other._kinds

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def counts(self) -> Counter[str]:
        """The number of problems of each kind."""
        return Counter(self._kinds.values())

    def summary(self, examples: int = 3) -> str:
        """Text with one line for each kind, most frequent first, followed by up to `examples` of its problems."""
        lines = [f"bad data: {len(self)} left out" if self._kinds else "bad data: none"]
        for kind, count in self.counts.most_common():
            texts = [text for text, other in self._kinds.items() if other == kind]
            lines += [f"  {kind}: {count}", *(f"    {text}" for text in texts[:examples])]
            if count > examples:
                lines.append(f"    and {count - examples} more")
        return "\n".join(lines)
