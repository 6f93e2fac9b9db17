"""Writing files so that a reader, also one after a crash, sees the old file or the new one, never a part."""

import os
from pathlib import Path


def write_atomic(path, data):
    """Write bytes to `path` by way of a temporary file beside it, synced and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
