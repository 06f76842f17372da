"""BlockManager: which request holds which KV blocks, and which blocks are kept for their content (the prefix cache).

PURE: no I/O, no clock. Owns reference counts, the free set, the prefix cache, and the fields `blocks`,
`num_committed_blocks`, `cache_entry` and `computing` of every Request. Knows block ids and token ids, not bytes.
Its only caller is scheduler.py, which decides who gets blocks and when.

A block is exactly one of: free · held by `refs > 0` requests · kept: held by nobody, content still in the cache.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from .errors import Bug
from .free_blocks import FreeBlocks
from .request import CacheKey, Request

EVICT_AT_ONCE = 32  # blocks evicted together, so that they can be neighbours


class Entry(NamedTuple):
    """One block's worth of tokens in the prefix cache, with everything before it."""

    id: int  # never reused, so a child's key can never mean another parent
    key: CacheKey
    block: int


class Admit(Enum):
    """What became of an attempt to give a request its blocks."""

    ADMITTED = "admitted"
    FULL = "full"  # not enough blocks
    COMPUTING = "computing"  # its next block is just being computed by another request: wait, then share it


class BlockManager:
    """The KV pool of `num_blocks` blocks of `block_size` token slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_releases = 0  # grows whenever blocks may have become available
        self._free = FreeBlocks(num_blocks)
        self._refs = [0] * num_blocks
        self._cache: dict[CacheKey, Entry] = {}
        self._entries: list[Entry | None] = [None] * num_blocks  # by block
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._roots: dict[str, int] = {}  # salt -> parent id of first blocks
        self._next_id = 1
        self._computing: dict[CacheKey, Request] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks held by requests."""
        return self.num_blocks - self.num_available

    @property
    def num_kept(self) -> int:
        """Blocks held by nobody whose content can still be found."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- taking and giving back

    def admit(self, request: Request, *, reserve: int, wait: bool = True) -> Admit:
        """Gives `request` blocks for all its known tokens, found in the prefix cache as far as possible.

        ADMITTED: `blocks` is filled and `num_committed_blocks` says how many of them were found. Otherwise nothing has
        changed. reserve: blocks that must stay available afterwards. wait: may answer COMPUTING.
        """
        if request.blocks:
            raise Bug(f"request {request.id} already has blocks. This is a bug.")
        if wait and request.computing in self._computing:
            return Admit.COMPUTING
        hits, missing = ([], None) if request.wants_prompt_logprobs else self._find(request)
        request.computing = None
        if wait and missing in self._computing:
            request.computing = missing
            return Admit.COMPUTING
        new = self.blocks_for(len(request.token_ids)) - len(hits)
        num_revived = sum(not self._refs[entry.block] for entry in hits)
        if self.num_available - num_revived - new < reserve:
            return Admit.FULL
        for entry in hits:
            self._hold(entry.block)
        request.blocks = [entry.block for entry in hits]
        request.num_committed_blocks = len(hits)
        request.cache_entry = hits[-1].id if hits else self._root(request.valid.cache_salt)
        self._extend(request, new)
        self._announce(request)
        return Admit.ADMITTED

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Appends blocks until `num_tokens` have slots; returns the new ones, None when there are not enough."""
        new = self.blocks_for(num_tokens) - len(request.blocks)
        return self._extend(request, new) if new <= self.num_available else None

    def release(self, request: Request) -> None:
        """Takes all blocks of `request`. Those in the prefix cache are kept, the others become free.

        Last block first: a block is of no use to the cache without the ones before it, so it must be evicted earlier.
        """
        self._withdraw(request)
        refs, entries, kept = self._refs, self._entries, self._kept
        for block in reversed(request.blocks):
            refs[block] -= 1
            if not refs[block]:
                if entries[block] is None:
                    self._free.add(block)
                else:
                    kept[block] = None
        request.blocks = []
        request.num_committed_blocks = 0
        self.num_releases += 1

    def _hold(self, block: int) -> None:
        if not self._refs[block]:
            del self._kept[block]
        self._refs[block] += 1

    def _extend(self, request: Request, count: int) -> list[int]:
        if count > len(self._free):
            self._evict(count - len(self._free))
        new = self._free.take(count, request.blocks[-1] if request.blocks else None)
        for block in new:
            self._refs[block] = 1
        request.blocks += new
        return new

    def _evict(self, at_least: int) -> None:
        """Frees the least recently used kept blocks; some more than asked, since they are often neighbours."""
        count = max(at_least, min(EVICT_AT_ONCE, len(self._kept) // 8))
        for _ in range(count):
            block, _ = self._kept.popitem(last=False)
            entry = self._entries[block]
            if entry is None:
                raise Bug(f"block {block} is kept without an entry in the prefix cache. This is a bug.")
            del self._cache[entry.key]
            self._entries[block] = None
            self._free.add(block)

    # ---- prefix cache

    def commit(self, request: Request) -> None:
        """Enters into the cache the blocks of `request` that are full of acknowledged tokens.

        A block whose content another request entered first stays private; what follows hangs below the other's entry.
        """
        size, tokens = self.block_size, request.token_ids
        self._withdraw(request)
        for index in range(request.num_committed_blocks, request.num_acknowledged_tokens // size):
            key = (request.cache_entry, tuple(tokens[index * size : (index + 1) * size]))
            entry = self._cache.get(key)
            if entry is None:
                entry = Entry(self._new_id(), key, request.blocks[index])
                self._cache[key] = self._entries[entry.block] = entry
            elif not self._refs[entry.block]:
                self._kept.move_to_end(entry.block)
            request.cache_entry = entry.id
            request.num_committed_blocks = index + 1
        self._announce(request)

    def _find(self, request: Request) -> tuple[list[Entry], CacheKey | None]:
        """The entries that a waiting request can share, and the key of the first block it cannot.

        Whole blocks, and never the last token: it must be computed to know what follows. The key is None when only the
        rest that has to be computed anyway is left.
        """
        size, tokens = self.block_size, request.token_ids
        parent = self._root(request.valid.cache_salt)
        hits: list[Entry] = []
        for start in range(0, (len(tokens) - 1) // size * size, size):
            key = (parent, tuple(tokens[start : start + size]))
            entry = self._cache.get(key)
            if entry is None:
                return hits, key
            hits.append(entry)
            parent = entry.id
        return hits, None

    def _announce(self, request: Request) -> None:
        """Notes what the next block of `request` will be, when all its tokens are known, for others to wait for."""
        size, start = self.block_size, request.num_committed_blocks * self.block_size
        if start + size <= len(request.token_ids):
            key = (request.cache_entry, tuple(request.token_ids[start : start + size]))
            if self._computing.setdefault(key, request) is request:
                request.computing = key

    def _withdraw(self, request: Request) -> None:
        key = request.computing
        if key is not None:
            if self._computing.get(key) is request:
                del self._computing[key]
            request.computing = None

    def _root(self, salt: str) -> int:
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = self._new_id()
        return root

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    # ---- checks

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises Bug unless every block is exactly one of free, held (with the right count) and kept.

        requests: all that may hold blocks. O(blocks): for tests and for idle moments.
        """
        held = Counter(block for request in requests for block in request.blocks)
        wrong = self._free.check_integrity()
        free = [block for start, end in self._free.runs() for block in range(start, end)]
        if sorted([*free, *held, *self._kept]) != list(range(self.num_blocks)):
            wrong.append("a block is lost, or more than one of free, held and kept")
        wrong += [
            f"block {block} has {count} references, {held[block]} requests hold it"
            for block, count in enumerate(self._refs)
            if count != held[block]
        ]
        cached = {entry.block: entry for entry in self._cache.values()}
        if cached != {block: entry for block, entry in enumerate(self._entries) if entry is not None}:
            wrong.append("the prefix cache by key and by block disagree")
        if not set(self._kept) <= set(cached):
            wrong.append("a block is kept that is not in the prefix cache")
        if wrong:
            raise Bug("The block manager is inconsistent: " + "; ".join(wrong) + ". This is a bug.")
