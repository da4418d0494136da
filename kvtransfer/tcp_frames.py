"""The bytes on a KV data connection: its hand-shake and its frames. No sockets here; used by tcp.py and tcp_lane.py.

Hand-shake (S = decode, the server; C = prefill, the client; secret = the cluster's):

    S -> C   greeting   magic, version, nonce_s
    C -> S   hello      magic, version, length, nonce_c, Hello, HMAC(secret, "client", nonce_s, nonce_c, Hello)
    S -> C   welcome    magic, version, length, Welcome, HMAC(secret, "server", nonce_s, nonce_c, Hello, Welcome)

Each end has then proved that it knows the secret, over a nonce of the other. Both get two session keys, one per
direction.

Frames: a fixed header, then for DATA a table of `count` indexes (uint32) and the payload, `count` runs.

    magic 4 | version 1 | kind 1 | 0 0 | layer 4 | count 4 | sequence 8 | payload_nbytes 8 | key 16 | table 8 | mac 16

`mac` is keyed BLAKE2b over the rest of the header; `sequence` counts the frames of one direction, so a dropped,
repeated or replayed frame breaks the connection as a changed header does; `table` is the xxh3-64 of the index table.
The payload is under the manifest's digests and not under this MAC. `key` names the grant. LANDED carries the number of
stored runs in `count`, NACK its reason in `layer`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Sequence

import msgspec
import xxhash

from protocol.kv import XXH3, KVLayout
from protocol.parallel import ALONE, Parallel

MAGIC = b"TdKV"
VERSION = 1
GREETING = struct.Struct("!4sH2x32s")
PREAMBLE = struct.Struct("!4sH2xI")
NONCE_NBYTES = 32
PROOF_NBYTES = 32
MAX_HELLO_NBYTES = 4096

_HEAD = struct.Struct("!4sBB2xIIQQ16sQ")
MAC_NBYTES = 16
HEADER_NBYTES = _HEAD.size + MAC_NBYTES
MAX_RUNS = 1024  # per frame
MAX_PAYLOAD_NBYTES = 1 << 20  # per frame, unless a single run is larger; small, so that hashing and receiving overlap


class FrameError(Exception):
    """These bytes are not the next frame of this connection; the connection ends."""


class Kind(enum.IntEnum):
    DATA = 1  # prefill -> decode: runs of one layer
    FENCE = 2  # prefill -> decode: how many runs of this grant have landed?
    LANDED = 3  # decode -> prefill: so many distinct ones
    NACK = 4  # decode -> prefill: a DATA frame was thrown away


class Reason(enum.IntEnum):
    NOT_LIVE = 1
    OUTSIDE = 2
    NOT_YOURS = 3


REASONS = {
    Reason.NOT_LIVE: "the grant is unknown there, expired, cancelled or used",
    Reason.OUTSIDE: "a run lies outside of the grant",
    Reason.NOT_YOURS: "the grant names another prefill incarnation",
}


class Hello(msgspec.Struct, frozen=True):
    """A connection carries one route: from rank `rank` of a group of sizes `source` to rank `target_rank` of one of `target`."""

    incarnation: str
    peer_incarnation: str  # whom the client believes to talk to; "" when it does not care
    layout: KVLayout  # the whole model's
    source: Parallel = ALONE
    rank: int = 0
    target: Parallel = ALONE
    target_rank: int = 0
    digest: str = XXH3  # the kind of digests that the manifests will have


class Welcome(msgspec.Struct, frozen=True):
    incarnation: str
    layout: KVLayout
    refusal: str = ""  # not empty: the connection ends here, and this says why


class Header(msgspec.Struct, frozen=True):
    kind: Kind
    key: bytes
    layer: int = 0
    count: int = 0
    payload_nbytes: int = 0
    table: int = 0


def grant_key(grant_id: str) -> bytes:
    """What names a grant in a frame: 16 bytes whatever the length of its id."""
    return hashlib.blake2b(grant_id.encode(), digest_size=16).digest()


def table_digest(table: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(table)


def proof(secret: bytes, side: str, *parts: bytes) -> bytes:
    """HMAC-SHA256 over a label and the parts, each with its length, so that no two lists of parts look alike."""
    mac = hmac.new(secret, f"tandem-kv {side}".encode(), hashlib.sha256)
    for part in parts:
        mac.update(struct.pack("!I", len(part)))
        mac.update(part)
    return mac.digest()


class FrameWriter:
    """Makes the headers of one direction of one connection, in order."""

    def __init__(self, secret: bytes, direction: str, nonce_s: bytes, nonce_c: bytes) -> None:
        self._key = proof(secret, direction, nonce_s, nonce_c)
        self._sequence = 0

    def header(self, kind: Kind, key: bytes, layer: int = 0, count: int = 0, payload_nbytes: int = 0, table: int = 0) -> bytes:
        head = _HEAD.pack(MAGIC, VERSION, kind, layer, count, self._sequence, payload_nbytes, key, table)
        self._sequence += 1
        return head + hashlib.blake2b(head, key=self._key, digest_size=MAC_NBYTES).digest()


class FrameReader:
    """Checks the headers of one direction of one connection, in order. Raises FrameError."""

    def __init__(self, secret: bytes, direction: str, nonce_s: bytes, nonce_c: bytes) -> None:
        self._key = proof(secret, direction, nonce_s, nonce_c)
        self._sequence = 0

    def header(self, data: bytes | bytearray | memoryview) -> Header:
        head, mac = data[: _HEAD.size], data[_HEAD.size :]
        if not hmac.compare_digest(hashlib.blake2b(head, key=self._key, digest_size=MAC_NBYTES).digest(), bytes(mac)):
            raise FrameError("a frame header is damaged or forged")
        magic, version, kind, layer, count, sequence, payload_nbytes, key, table = _HEAD.unpack(head)
        if magic != MAGIC or version != VERSION:
            raise FrameError(f"frame of {magic!r} version {version}, this is {MAGIC!r} version {VERSION}")
        if sequence != self._sequence:
            raise FrameError(f"frame {sequence} came where {self._sequence} was due")
        self._sequence += 1
        try:
            return Header(Kind(kind), key, layer, count, payload_nbytes, table)
        except ValueError:
            raise FrameError(f"frame of unknown kind {kind}") from None


def session(secret: bytes, nonce_s: bytes, nonce_c: bytes, *, is_server: bool) -> tuple[FrameReader, FrameWriter]:
    """Both directions of a connection whose hand-shake is done."""
    incoming, outgoing = ("to decode", "to prefill") if is_server else ("to prefill", "to decode")
    return FrameReader(secret, incoming, nonce_s, nonce_c), FrameWriter(secret, outgoing, nonce_s, nonce_c)


def pack_hello(secret: bytes, nonce_s: bytes, nonce_c: bytes, hello: bytes) -> bytes:
    head = PREAMBLE.pack(MAGIC, VERSION, len(hello))
    return head + nonce_c + hello + proof(secret, "client", nonce_s, nonce_c, hello)


def pack_welcome(secret: bytes, nonce_s: bytes, nonce_c: bytes, hello: bytes, welcome: bytes) -> bytes:
    return PREAMBLE.pack(MAGIC, VERSION, len(welcome)) + welcome + proof(secret, "server", nonce_s, nonce_c, hello, welcome)


def preamble_length(data: bytes) -> int:
    """The length that follows. Raises FrameError on anything but our magic, version and a modest length."""
    magic, version, length = PREAMBLE.unpack(data)
    if magic != MAGIC or version != VERSION or length > MAX_HELLO_NBYTES:
        raise FrameError(f"not a hand-shake of this version: {magic!r}, version {version}, {length} bytes")
    return int(length)


def compare(one: bytes, other: bytes) -> bool:
    """In constant time."""
    return hmac.compare_digest(one, other)


def pack_indexes(indexes: Sequence[int]) -> bytes:
    """A DATA frame's table: uint32, big-endian."""
    return struct.pack(f"!{len(indexes)}I", *indexes)


def unpack_indexes(table: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f"!{len(table) // 4}I", table)
