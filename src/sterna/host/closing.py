"""What holds something of this computer's (a descriptor, memory, a thread) until it is closed."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager, which is closed at the end of a `with` statement."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
