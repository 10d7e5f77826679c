"""A process that opens the video files whose names it is told, so that a crash of a decoder ends it and not the test.

Its address space is limited: a file whose header lies must not take more memory than EXTRA_BYTES.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from vpo_engine.runs.video_file import VideoFile

EXTRA_BYTES = 4 << 30


def main() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        print(json.dumps(_opened(Path(json.loads(line)))), flush=True)


def _opened(path: Path) -> dict[str, object]:
    """Return the shape of a video of which first and last frame were read, or the type and text of the error."""
    try:
        video = VideoFile.open(path)
        found = video[:, [0, video.shape[1] - 1]]
        assert found.shape[2:] == video.shape[2:], found.shape
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"shape": list(video.shape), "fps": video.fps}


if __name__ == "__main__":
    main()
