"""Asks the NVIDIA driver, when its library is there, which GPUs this process may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from fedra_edge.protocol.devices import Accelerator

LOGGER: Final = logging.getLogger(__name__)


class MemoryState(Protocol):
    """Memory of one GPU, in bytes."""

    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def free(self) -> int: ...  # noqa: D102


class DriverLibrary(Protocol):
    """The part of ``pynvml`` (package nvidia-ml-py) that we ask."""

    @property
    def NVMLError(self) -> type[Exception]: ...  # noqa: D102, N802
    def nvmlInit(self) -> object: ...  # noqa: D102, N802
    def nvmlShutdown(self) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> MemoryState: ...  # noqa: D102, N802


class _Found(NamedTuple):
    uuid: str
    accelerator: Accelerator


def find_accelerators() -> tuple[Accelerator, ...]:
    """List the GPUs that this process may use; none without driver or library."""
    try:
        import pynvml
    except ImportError:
        return ()
    library: DriverLibrary = pynvml
    return list_accelerators(library, os.environ.get("CUDA_VISIBLE_DEVICES"))


def list_accelerators(library: DriverLibrary, visible: str | None) -> tuple[Accelerator, ...]:
    """List the GPUs; ``visible`` is the value of CUDA_VISIBLE_DEVICES, None when it is not set."""
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        LOGGER.debug("no NVIDIA driver: %s", error)
        return ()
    try:
        found = [_describe(library, index) for index in range(library.nvmlDeviceGetCount())]
    except library.NVMLError as error:
        LOGGER.warning("the NVIDIA driver does not describe its GPUs: %s", error)
        return ()
    finally:
        library.nvmlShutdown()
    return tuple(item.accelerator for item in _select(found, visible))


def _describe(library: DriverLibrary, index: int) -> _Found:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    name = _text(library.nvmlDeviceGetName(handle))[:200]
    accelerator = Accelerator(name=name, memory_bytes=memory.total, free_bytes=memory.free)
    return _Found(_text(library.nvmlDeviceGetUUID(handle)), accelerator)


def _select(found: Sequence[_Found], visible: str | None) -> list[_Found]:
    """Apply CUDA's own rule: indices or UUID prefixes in order, the first unknown one ends it."""
    if visible is None:
        return list(found)
    selected: list[_Found] = []
    for wanted in (text.strip() for text in visible.split(",")):
        if wanted.isdecimal():
            matches = list(found[int(wanted) : int(wanted) + 1])
        else:
            matches = [item for item in found if wanted and item.uuid.startswith(wanted)]
        if len(matches) != 1:
            break
        selected += matches
    return selected


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
