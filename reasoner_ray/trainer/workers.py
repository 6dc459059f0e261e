"""The number of rollout engines as the user changes it while a run goes on: ``echo 4 > RUN/workers``."""

from __future__ import annotations

from pathlib import Path

from reasoner_ray.errors import ConfigError

WORKERS_FILE = "workers"


class WantedWorkers:
    """Reads the file ``workers`` of a run's folder. One that was there before counts: a resumed run keeps its engines."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / WORKERS_FILE
        self._seen = -1  # when the file was last written, ns

    def written(self) -> int | None:
        """The wanted number, where the file was written since the last call. Raises ``ConfigError`` where it holds none."""
        try:
            when, text = self._file.stat().st_mtime_ns, self._file.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._file} cannot be read: {error}") from error
        if when == self._seen or not text:  # a shell empties a file before it writes to it
            return None
        self._seen = when
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"{self._file} holds {text[:40]!r}, which is no number of engines; write 1 or more into it")
        return int(text)
