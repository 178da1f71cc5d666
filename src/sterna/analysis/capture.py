"""A stream in files: one, or a main stream with the channels of multifd beside it.

A capture is a directory with ``main.stream``, and ``channel-0.stream`` and so on where there are channels.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from io import RawIOBase
from pathlib import Path
from typing import cast

from sterna.analysis.channel_survey import ChannelInput, StoredChannels
from sterna.analysis.findings import StreamSurvey
from sterna.analysis.survey import survey
from sterna.stream.description import find_description
from sterna.stream.reader import StreamSource
from sterna.stream.wire import VMDESC_LIMIT

MAIN_FILE = "main.stream"
CHANNEL_FILES = "channel-*.stream"


def survey_file(
    path: Path | str, channels: Sequence[Path] = (), *, digests: bool = False, page_digests: bool = False
) -> StreamSurvey:
    """Survey a stream in a file, in anything else that can be read as one, or in a capture.

    :param channels: files of the channels of multifd
    :param digests: as for `survey`
    :param page_digests: as for `survey`
    :raise OSError: When a file cannot be opened or searched.
    :raise ValueError: When a channel is given twice.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MAIN_FILE).exists():
            raise FileNotFoundError(errno.ENOENT, f"no {MAIN_FILE} in it", str(path))
        channels = [*channels, *sorted(path.glob(CHANNEL_FILES))]
        path /= MAIN_FILE
    if repeated := [channel for i, channel in enumerate(channels) if channel in channels[:i]]:
        raise ValueError(f"the channel {repeated[0]} is given twice")
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=0))
        sources = [
            ChannelInput(str(channel), _source(stack.enter_context(channel.open("rb", buffering=0))))
            for channel in channels
        ]
        text = None
        if file.seekable():
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - VMDESC_LIMIT - 5))
            text = find_description(file.read(VMDESC_LIMIT + 5))
            file.seek(0)
        return survey(
            _source(file),
            description=text,
            digests=digests,
            page_digests=page_digests,
            channels=StoredChannels(sources) if sources else None,
        )


def _source(file: RawIOBase) -> StreamSource:
    # Files open for reading that block return a number of bytes, never None.
    return cast(StreamSource, file)
