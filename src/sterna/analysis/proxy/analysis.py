"""The analysis of a main stream that goes through a proxy, in a thread of its own."""

import logging
import threading
import time

from sterna.analysis.findings import StreamSurvey
from sterna.analysis.proxy.livechannels import LiveChannels
from sterna.analysis.proxy.tee import TeeReader
from sterna.analysis.survey import Surveyor

log = logging.getLogger(__name__)

_SURVEY_SECONDS = 0.2


class Analysis:
    """Surveys what has come so far, again and again. Whatever goes wrong with it, the migration goes on.

    :param lock: held while `survey` and `fault` change
    :param digests: hold guest RAM as the destination has it, and digest it at the end
    :ivar survey: the latest, None before the first
    :ivar fault: why there is none of all that went through; empty while it may come yet
    :ivar thread: None before it has begun
    """

    def __init__(self, lock: threading.Condition, digests: bool) -> None:
        self._lock, self._digests = lock, digests
        self.survey: StreamSurvey | None = None
        self.fault = ""
        self.thread: threading.Thread | None = None
        self._surveyed = 0.0

    @property
    def runs(self) -> bool:
        """Whether it has begun and not come to its end."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, reader: TeeReader, channels: LiveChannels) -> bool:
        """Begin, with the lock held.

        :return: False when there is no thread to spare, which is its fault then
        """
        thread = threading.Thread(
            target=self._run, args=(reader, channels), name="proxy-analysis", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the operating system has no thread to spare
            self.fault = f"the analysis was not begun: {error}"
            reader.close()
            return False
        self.thread = thread
        return True

    def _run(self, reader: TeeReader, channels: LiveChannels) -> None:
        try:
            surveyor = Surveyor(reader, None, self._digests, channels, self._note)
            surveyor.read()
            survey = surveyor.result()
            with self._lock:
                self.survey = survey
        except Exception as error:
            log.exception("the analysis failed")
            with self._lock:
                self.fault = f"the analysis failed: {type(error).__name__}: {error}"
        finally:
            reader.close()
            channels.close()

    def _note(self, surveyor: Surveyor) -> None:
        if (now := time.monotonic()) - self._surveyed < _SURVEY_SECONDS and not surveyor.complete:
            return
        survey = surveyor.result()
        with self._lock:
            self.survey, self._surveyed = survey, now
