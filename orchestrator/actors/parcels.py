"""What a worker sends to the sink: as it is where it is small, else a reference to follow once there is room.

What an actor's method is given as an argument is in its memory before it has begun, however full that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.actors.ray_calls import fetch_object, put_object

# A reference costs a question to the worker; below this a copy is cheaper.
INLINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Parcel:
    """Some content of about so many bytes. Pickles; a large one holds for as long as its sender lives."""

    size_bytes: int
    content: Any
    # In a tuple, for Ray follows a reference that is itself an argument or a field of none.
    reference: tuple[Any] | None = None

    async def unpacked(self, timeout_seconds: float) -> Any:
        """The content, brought from where it was packed.

        Raises:
            TimeoutError: it is not here in time.
            RayError: it is lost, as its sender is.
        """
        if self.reference is None:
            return self.content
        return await fetch_object(self.reference[0], timeout_seconds=timeout_seconds)


def packed(content: Any, size_bytes: int) -> Parcel:
    """A parcel of the content. Blocking.

    Raises:
        ObjectStoreFullError: this node has no room for it.
    """
    if size_bytes <= INLINE_BYTES:
        return Parcel(size_bytes, content)
    return Parcel(size_bytes, None, (put_object(content),))
