"""Streams: what is too large for a message, or not there yet, goes over a socket of its own, as plain bytes.

    new_stream_unix(source) -> url      a unix socket whose first connection gets everything of the source
    stream(dest, url), open_stream(url), StreamFile(url)        the other end
    StreamProxy                         the same over HTTP, for URLs that it has signed

A stream is ended by closing it, and to the reader of a unix socket a writer that died looks the same as
one that has finished. Linux tells them apart in one case: a socket that is closed with something unread
in it gives the other end ECONNRESET, behind the data. So our readers send one byte when they connect. A
producer that is done closes its half and reads that byte before it closes the rest; one that fails or
dies leaves it unread.

A producer that knows nothing of this, such as the original, never reads the byte, and would look broken
always. So sockets that keep to it say so by their file's name, `checked-stream-*`, and only those are
sent the byte. From any other producer, and for a reader that sends nothing, such as the original, a
broken stream ends like a whole one.
"""

from acomm.streamproxy import STALL, StreamProxy, pass_on
from acomm.streamreaders import SILENCE, Dest, StreamFile, Writable, decline, open_stream, stream
from acomm.streamsocket import EXPIRY
from acomm.streamsources import Chunk, Chunks, Readable, Source, check_source, chunks_of
from acomm.unixstreams import MAX_OPEN, UnixStreams

__all__ = [
    "EXPIRY",
    "MAX_OPEN",
    "SILENCE",
    "STALL",
    "Chunk",
    "Chunks",
    "Dest",
    "Readable",
    "Source",
    "StreamFile",
    "StreamProxy",
    "UnixStreams",
    "Writable",
    "check_source",
    "chunks_of",
    "decline",
    "open_stream",
    "pass_on",
    "stream",
]
