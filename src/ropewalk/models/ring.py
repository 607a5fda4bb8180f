"""A few buffers on the device through which the weights of many layers pass, copied from the host while others compute.

    host   | 0 | 1 | 2 | 3 | ...     pinned, one block of bytes for each layer
    ring   | 2 | 3 |                 the layer that computes, and the next one, which a stream of its own brings

On a GPU a copy waits for what was asked of the compute stream before, so that it writes over nothing that is still to be read, and the
compute stream waits for the copy where a layer begins. On a CPU the same code copies in its turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ropewalk.errors import ModelError

ALIGNED = 256  # bytes at which a tensor within a block begins: what any kernel may ask of an address
PAGE = 4096
NAN = 255  # a byte of which every floating type makes NaN


class Ring:
    """`slots` buffers that each hold one of the host's blocks, or none; a slot that is given back may be `poisoned` for a test."""

    def __init__(self, host: Sequence[Tensor], slots: int, device: torch.device, *, poisoned: bool = False) -> None:
        self.host, self.poisoned = host, poisoned
        size = max(len(block) for block in host)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.copies = 0  # how many blocks have come
        self._held: dict[int, int] = {}  # block -> its slot, that used longest ago first
        self._free = [*range(slots)]  # that given back longest ago first
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._coming: dict[int, torch.cuda.Event] = {}  # slot -> when its block is there

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def slot(self, block: int) -> int | None:
        """Where the block is, or is coming to."""
        return self._held.get(block)

    def bring(self, block: int, but: int | None = None) -> tuple[int, int | None]:
        """Begins to copy a block where it is not there -> its slot, and the block that went for it; that of `but` stays."""
        if block in self._held:
            self._held[block] = slot = self._held.pop(block)
            return slot, None
        gone = None
        if self._free:
            slot = self._free.pop(0)
        else:
            gone = next(held for held in self._held if held != but)
            slot = self._held.pop(gone)
        self._copy(block, slot)
        self._held[block] = slot
        self.copies += 1
        return slot, gone

    def wait(self, block: int) -> None:
        """What is computed from here on finds the block in its slot."""
        event = self._coming.pop(self._held[block], None)
        if event is not None:
            torch.cuda.current_stream(self.buffers[0].device).wait_event(event)

    def give_back(self, block: int) -> None:
        """Nothing reads the block any more."""
        slot = self._held.pop(block)
        self._coming.pop(slot, None)
        self._free.append(slot)
        if self.poisoned:
            self.buffers[slot].fill_(NAN)

    def _copy(self, block: int, slot: int) -> None:
        source = self.host[block]
        into = self.buffers[slot][: len(source)]
        if self._side is None:
            into.copy_(source)
            return
        self._side.wait_stream(torch.cuda.current_stream(into.device))
        with torch.cuda.stream(self._side):
            into.copy_(source, non_blocking=True)
        self._coming[slot] = self._side.record_event()


def host_block(size: int, device: torch.device) -> Tensor:
    """So many bytes of the host, pinned where a GPU will read them.

    Registered by hand: torch's own allocator of pinned memory rounds up to a power of two, which could take twice as much.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % PAGE  # a page that two blocks share could not be registered twice
    block = room[begin : begin + size]
    if size:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(block.data_ptr(), size, 0)):
            raise ModelError(
                f"{size / 1e9:.1f} GB of the host's memory cannot be pinned for the GPU to read; free some, raise the limit of locked "
                "memory (ulimit -l), or leave the weights on the GPU: stream_weights: off"
            )
        weakref.finalize(room.untyped_storage(), runtime.cudaHostUnregister, block.data_ptr()).atexit = False
    return block
