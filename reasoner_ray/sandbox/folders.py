"""A scratch folder that a program writes to as it likes: how full it is, and how it is emptied."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator

MAX_DEPTH = 100


def files_below(folder: str) -> Iterator[float]:
    """Bytes on disk of every entry below a folder that is being written to; links are not followed.

    A tree deeper than ``MAX_DEPTH`` counts as infinitely large: nobody needs one, and looking through it takes long.
    """
    pending = [(folder, 0)]
    while pending:
        path, depth = pending.pop()
        if depth > MAX_DEPTH:
            yield math.inf
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                size = 0
                with contextlib.suppress(OSError):  # removed meanwhile
                    size = entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
                yield size


def deleted_files(pids: list[int]) -> int:
    """Bytes on disk of files that have no name any more, but that these processes hold open."""
    held = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(f"/proc/{pid}/fd/{name}")
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        held[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(held.values())


def empty_folder(folder: str) -> None:
    """Remove whatever a program left in its scratch folder: trees of any depth, folders without permissions, links."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    moved = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if not _is_folder(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for entry in os.listdir(inner):
                        if _is_folder(entry, inner):
                            moved += 1  # up to the top, so that neither recursion nor long paths are needed
                            os.rename(entry, f".{moved}.moved", src_dir_fd=inner, dst_dir_fd=top)
                        else:
                            os.unlink(entry, dir_fd=inner)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _is_folder(name: str, inside: int) -> bool:
    """Whether an entry is a folder; if so, it is opened to its owner first."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
        return False
    os.chmod(name, 0o700, dir_fd=inside)
    return True
