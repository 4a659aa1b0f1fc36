"""The fast scan of a tar: finds what `plain` finds, at about the speed of reading the headers alone.

Three things make it fast:
- Windows. One read of 4 KiB often serves an extended header, the header behind it, a small label and the next header.
- Batches. To go from header to header only their sizes are needed. Headers stay where they were read (a Python object for each
  would cost more than reading it), and NumPy takes checksums and names out of all headers of a batch of windows at once.
- Leaps. Writers repeat themselves: a label, an image, a label, an image. A leap guesses that each of the next windows has its
  headers where the last one had them and checks that for a whole batch at once. Nothing is taken on a guess: where it is
  wrong, the batch is walked header by header.
"""

from __future__ import annotations

import os
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.index.tar.headers import (
    BLOCK,
    END_MARK,
    EXTENDED,
    FILE,
    HARD_LINK,
    LINK_TARGET,
    MAX_EXTENDED,
    NAME,
    NO_CONTENT,
    PAX,
    PAX_GLOBAL,
    PREFIX,
    REGULAR,
    SIZE_DIGITS,
    SPARSE,
    SYMBOLIC_LINK,
    TYPE,
    Extension,
    Headers,
    checksum_ok,
    checksums_ok,
    extend,
    name_of,
    padded,
    size_of,
    sparse_map_bytes,
    text_of,
)
from tarflow.data_pipeline.index.tar.links import TarLink
from tarflow.data_pipeline.index.tar.members import TarScan

WINDOW = 4096  # bytes
WINDOWS = 256  # in a batch: a megabyte stays in the processor's cache
GUESSES = (
    2  # series of leaps that may come to an end before leaping is given up: two for a regular shard with an odd spot
)
_REGULAR = np.frombuffer(REGULAR, dtype=np.uint8)
_NOT_MEMBERS = EXTENDED + bytes([PAX_GLOBAL])
_ELEVEN_DIGITS = 8 ** np.arange(10, -1, -1)


def fast_scan(fd: int, scan: TarScan, keep: int) -> None:
    """Fill `scan` with the members of the open tar; contents of up to `keep` bytes are kept. Raises OSError."""
    FastScan(fd, scan, keep).run()


class _Stop(Enum):
    """Why a walk from header to header stopped."""

    FULL = auto()  # all windows of the batch are in use
    END_MARK = auto()
    BAD_HEADER = auto()
    END_OF_FILE = auto()  # in the place of a header, or inside one


class _Batch:
    """The headers met in one fill of the buffer.

    Header i starts at `at[i]` in the buffer and at `positions[i]` in the file; `sizes[i]`: bytes of its content. What is
    special about some headers stands by their number: `not_files` (everything but regular files with all their bytes),
    `long_names`, `links` (their targets), `sparse`.
    """

    def __init__(self) -> None:
        self.at: list[int] = []
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.not_files: set[int] = set()
        self.long_names: dict[int, bytes] = {}
        self.links: dict[int, bytes] = {}
        self.sparse: set[int] = set()


class FastScan:
    """One scan of one file. `windows`, `guesses`: the constants above, for tests. `leaps`: batches that were leapt over."""

    def __init__(self, fd: int, scan: TarScan, keep: int, windows: int = WINDOWS, guesses: int = GUESSES) -> None:
        self.fd = fd
        self.scan = scan
        self.keep = keep
        self.guesses = guesses
        self.leaps = 0
        self.buffer = bytearray(windows * WINDOW)
        self.windows = [memoryview(self.buffer)[i : i + WINDOW] for i in range(0, len(self.buffer), WINDOW)]
        self.blocks: Headers = np.frombuffer(self.buffer, dtype=np.uint8).reshape(-1, BLOCK)
        self.extension: Extension | None = None  # for the next member, which may be in the next batch

    def run(self) -> None:
        """Scan the file from its beginning to its end or first damage."""
        position = 0
        while True:
            batch = _Batch()
            position, stop = self._walk(batch, position)
            if not self._take(batch):
                return  # at a wrong checksum: what the walk met behind it is meaningless
            if stop is not _Stop.FULL:
                break
            if self.guesses and self.extension is None:
                position = self._leap_on(batch, position)
        if stop is _Stop.BAD_HEADER:
            self.scan.damaged_header(position)
        elif stop is _Stop.END_OF_FILE:
            self._end(batch, position)

    def _walk(self, batch: _Batch, position: int) -> tuple[int, _Stop]:
        """Go from header to header until the batch is full; (position of the next header, why it stopped).

        The hot loop of indexing: everything but plain files is left to `_special`.
        """
        buffer, at, positions, sizes = self.buffer, batch.at, batch.positions, batch.sizes
        size_starts, size_stops = SIZE_DIGITS.start, SIZE_DIGITS.stop
        filled = 0
        start, base, used = position, 0, 0  # the newest window: buffer[base:used] holds the file from `start` on
        while True:
            # Have the header in a window: mostly it is in the newest one already, behind a small content.
            inside = base + position - start
            if inside + BLOCK > used:
                if position >= self.scan.file_bytes:
                    return position, _Stop.END_OF_FILE
                if filled == len(self.windows):
                    return position, _Stop.FULL
                start, base = position, filled * WINDOW
                inside, used = base, base + self._fill(self.windows[filled], position)
                filled += 1
                if used < inside + BLOCK:
                    return position, _Stop.END_OF_FILE
            # Its size is all that is needed to go on. Eleven octal digits, nearly always.
            try:
                size = int(buffer[inside + size_starts : inside + size_stops], 8)
            except ValueError:
                size = -1
            if size < 0:
                header = bytes(buffer[inside : inside + BLOCK])
                if header == END_MARK:
                    return position, _Stop.END_MARK
                size = size_of(header)
                if size < 0:
                    return position, _Stop.BAD_HEADER
            # Leave it there for `_take`, unless it changes what the size means or says something of other headers.
            at.append(inside)
            positions.append(position)
            if buffer[inside + TYPE] != FILE or self.extension is not None:
                size = self._special(batch, position, inside, used, size)
            sizes.append(size)
            position += BLOCK + (size + BLOCK - 1 & -BLOCK)  # `padded`, without the call

    def _fill(self, window: memoryview, position: int) -> int:
        """Read into the window, again after a short read; the bytes that came, fewer than asked for only at the file's end."""
        got = os.preadv(self.fd, [window], position)
        while 0 < got < len(window) and position + got < self.scan.file_bytes:
            more = os.preadv(self.fd, [window[got:]], position + got)
            if more == 0:
                break
            got += more
        return got

    def _special(self, batch: _Batch, position: int, inside: int, used: int, size: int) -> int:
        """Note what is special about the header at `inside`, the batch's next; the bytes of its content."""
        number, kind, content = len(batch.sizes), self.buffer[inside + TYPE], inside + BLOCK
        if kind not in REGULAR:
            batch.not_files.add(number)
        if kind in EXTENDED:
            data = bytes(self.buffer[content : min(content + size, used)])
            if len(data) < size:  # it goes on behind the window
                data = os.pread(self.fd, min(size, MAX_EXTENDED), position + BLOCK)
            self.extension = extend(self.extension, kind, data)
            return size
        if kind == PAX_GLOBAL:
            return size

        said, self.extension = self.extension or Extension(), None
        if said.name is not None:
            batch.long_names[number] = said.name
        if kind in REGULAR:
            if said.sparse:
                batch.not_files.add(number)
                batch.sparse.add(number)
            return size if said.size is None else said.size
        header = bytes(self.buffer[inside:content])
        if kind in (HARD_LINK, SYMBOLIC_LINK):
            batch.links[number] = text_of(header[LINK_TARGET]) if said.link_target is None else said.link_target
        if kind == SPARSE:
            batch.sparse.add(number)
            return size + sparse_map_bytes(self.fd, position, header)
        return 0 if kind in NO_CONTENT else size

    def _end(self, batch: _Batch, position: int) -> None:
        """Say how the file ended without an end mark; a member that was cut is taken back."""
        scan = self.scan
        if not batch.sizes or batch.positions[-1] + BLOCK + batch.sizes[-1] <= scan.file_bytes:
            scan.damaged_end(position)
            return
        if len(batch.sizes) - 1 not in batch.not_files:
            scan.cut_member = scan.names.pop()
            scan.contents.pop(len(scan.names), None)
            scan.offsets.pop()
            scan.sizes.pop()
        scan.damaged_content(batch.positions[-1], batch.sizes[-1])

    def _take(self, batch: _Batch, checked: Headers | None = None) -> bool:
        """Check the batch's headers and add its files to the scan. False, with the damage noted, at a wrong checksum.

        `checked`: the headers, where all of them were found right before.
        """
        if not batch.at:
            return True
        scan = self.scan
        headers = self.blocks[np.array(batch.at) // BLOCK] if checked is None else checked
        good = self._first_wrong(batch, headers) if checked is None else len(batch.at)
        names = self._names(batch, headers)

        # What is not a file is only counted or noted by name.
        for i, target in batch.links.items():
            if i < good:
                scan.links.append(TarLink(names[i], target, self.buffer[batch.at[i] + TYPE] == SYMBOLIC_LINK))
        scan.sparse += [names[i] for i in sorted(batch.sparse) if i < good]
        scan.not_files += sum(
            self.buffer[batch.at[i] + TYPE] not in _NOT_MEMBERS for i in batch.not_files - batch.sparse if i < good
        )

        # The files, with their offsets, sizes and small contents; mostly that is every header.
        offsets, sizes, at = [position + BLOCK for position in batch.positions], batch.sizes, batch.at
        if good < len(batch.at) or batch.not_files:
            files = [i for i in range(good) if i not in batch.not_files]
            names, offsets = [names[i] for i in files], [offsets[i] for i in files]
            sizes, at = [sizes[i] for i in files], [at[i] for i in files]
        self._keep_small(at, offsets, sizes)
        scan.names += names
        scan.offsets += offsets
        scan.sizes += sizes
        return good == len(batch.at)

    def _first_wrong(self, batch: _Batch, headers: Headers) -> int:
        """The number of the first header with a wrong checksum, which is noted as damage; the count of headers without one."""
        for i in np.flatnonzero(~checksums_ok(headers)).tolist():
            if not checksum_ok(headers[i].tobytes()):
                self.scan.damaged_header(batch.positions[i])
                return int(i)
        return len(batch.at)

    def _names(self, batch: _Batch, headers: Headers) -> list[bytes]:
        """The names of all headers of a batch."""
        names: list[bytes] = headers[:, NAME].copy().view(f"S{NAME.stop}").ravel().tolist()
        if b"\0" in b"".join(names):  # NumPy strips NULs at the end only
            names = [text_of(name) for name in names]
        for i in np.flatnonzero(headers[:, PREFIX.start]).tolist():
            names[i] = name_of(headers[i].tobytes())
        for i, name in batch.long_names.items():
            names[i] = name
        return names

    def _keep_small(self, at: list[int], offsets: list[int], sizes: list[int]) -> None:
        """Keep the contents of small members: they are labels, and mostly in a window already."""
        before, whole = len(self.scan.names), memoryview(self.buffer)
        for number in [i for i, size in enumerate(sizes) if size <= self.keep]:
            content, size = at[number] + BLOCK, sizes[number]
            end_of_window = at[number] // WINDOW * WINDOW + WINDOW
            data = bytes(whole[content : min(content + size, end_of_window)])
            self.scan.contents[before + number] = (
                data if len(data) == size else os.pread(self.fd, size, offsets[number])
            )

    def _leap_on(self, batch: _Batch, position: int) -> int:
        """Leap for as long as windows look like the last one of `batch`; the position of the next header."""
        last = len(self.windows) - 1
        layout = [place % WINDOW for place in batch.at if place // WINDOW == last]
        while (further := self._leap(position, layout)) > position:
            position = further
            self.leaps += 1
        self.guesses -= 1  # the series came to an end: right at the end of a shard, a bad guess where layouts vary
        return position

    def _leap(self, position: int, layout: list[int]) -> int:
        """Take a batch of windows with headers at the places of `layout` in each; the position behind them.

        Where anything is not as guessed, the scan is left as it was and `position` is returned.
        """
        # The size of a window's last member says where the next window begins. Reading on by it, right or wrong, is cheap.
        starts, behind = self._read_windows(position, layout[-1])
        if not starts or behind > self.scan.file_bytes:
            return position
        places = np.array(layout)
        at = (np.arange(len(starts))[:, None] * WINDOW + places).ravel()
        headers = self.blocks[at // BLOCK]

        # All of it has to be as a walk would have found it: sizes in plain digits, regular files or pax headers that say
        # nothing of the next member, each header right behind the content before it, right checksums.
        digits = headers[:, SIZE_DIGITS].astype(np.int64) - ord("0")
        sizes = digits @ _ELEVEN_DIGITS
        extended = headers[:, TYPE] == PAX
        if not (
            ((digits & ~7) == 0).all()
            and (np.isin(headers[:, TYPE], _REGULAR) | extended).all()
            and not extended[len(layout) - 1 :: len(layout)].any()  # its content might lie behind the window
            and self._say_nothing(at[extended], sizes[extended])
        ):
            return position
        ends = places + BLOCK + -(-sizes.reshape(-1, len(layout)) // BLOCK) * BLOCK
        if (ends[:, :-1] != places[1:]).any() or not checksums_ok(headers).all():
            return position

        batch = _Batch()
        batch.at, batch.sizes, batch.not_files = at.tolist(), sizes.tolist(), set(np.flatnonzero(extended).tolist())
        batch.positions = (np.array(starts)[:, None] + places).ravel().tolist()
        self._take(batch, headers)
        return behind

    def _read_windows(self, position: int, last: int) -> tuple[list[int], int]:
        """Read windows whose last header is at `last`: its size says where the next begins. (their positions, the next one)."""
        starts = []
        for number, window in enumerate(self.windows):
            if os.preadv(self.fd, [window], position) < WINDOW:
                break
            size_at = number * WINDOW + last + SIZE_DIGITS.start
            try:
                size = int(self.buffer[size_at : size_at + 11], 8)
            except ValueError:
                break
            if size < 0:
                break
            starts.append(position)
            position += last + BLOCK + padded(size)
        return starts, position

    def _say_nothing(self, at: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
        """Whether pax headers at these places in the buffer only hold what a scan does not need, such as times."""
        if not len(at):
            return True
        records = self.blocks[at // BLOCK + 1].tobytes()
        return bool((sizes <= BLOCK).all()) and not (b"path=" in records or b"size=" in records)
