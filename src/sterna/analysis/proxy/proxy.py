"""The proxy itself: it listens, connects on, forwards, and follows the migration until it has ended.

Anybody may connect: how many connections there are, what they cost and what is remembered of them is bounded, and those that
say nothing are cut. Analysis and recording have threads of their own. A proxy is for one migration: it ends when that has.
Only when the destination was told to run the guest and the connection broke before the source learnt that it does, the
proxy stays for a while, so that the source can ask through it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sterna.analysis.proxy.analysis import Analysis
from sterna.analysis.proxy.answers import Answers
from sterna.analysis.proxy.connection import LAST_WORD_SECONDS, Connection, ConnectionKind
from sterna.analysis.proxy.livechannels import LiveChannels
from sterna.analysis.proxy.outcome import ProxyOutcome, ProxyVerdict, judge, was_committed
from sterna.analysis.proxy.recording import Recording
from sterna.analysis.proxy.tee import RING_BYTES, TeeReader
from sterna.analysis.proxy.view import ConnectionView, ProxyView
from sterna.host.closing import Closing
from sterna.migration import outcome_query
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.channels.uri import ListeningUri
from sterna.migration.errors import Cancelled, ChannelError, UriError
from sterna.ownership import AttemptOutcome
from sterna.stream.multifd.format import CHANNEL_LIMIT

DOUBT_SECONDS = 60.0
"""How long the source has to ask who runs the guest."""
_CHANNELS_SECONDS = 2.0
"""How long the first look at the channels waits for those that have connected and not said yet what they are."""
_OTHERS_SECONDS = 5.0
"""How long connections may outlast that of the main stream."""
MOST_OPEN = 320
"""Connections at once: a main stream, 255 channels, and some to spare. More are turned away."""
MOST_FOREIGN = 32
"""Of these, connections that are known to be neither the main stream nor one of its channels."""
MOST_REMEMBERED = 16
"""Of foreign connections that have ended, those that are told one by one."""
SILENT_SECONDS = 30.0
"""How long a connection may not say what it carries."""
_LEAVE_SECONDS = 2.0
"""How long analysis and recording have for what they hold when the user wants to wait for nothing."""
_LARGE_RINGS = 4
_SMALL_RING_BYTES = 1 << 20
"""The ring of each connection beyond the first few that are open: together they take less than half a GiB."""


_WORK = {
    "proxy-analysis": "the analysis of what went through",
    "proxy-connection": "other connections to end",
    "proxy-record": "the recording to be written",
}
"""What is waited for, by the name of the thread that does it; the first before the last."""


class Proxy(Closing):
    """Between a source that connects to `listen` and a destination that waits at `destination`.

    :param digests: hold guest RAM as the destination has it, and digest it at the end
    :param record: directory for what goes through
    :raise UriError: When the proxy would connect to itself.
    :raise RecordingError: When nothing can be recorded there.
    :raise ChannelError: When it cannot be listened at `listen`.
    """

    def __init__(
        self,
        listen: ListeningUri,
        destination: ListeningUri,
        *,
        digests: bool = True,
        record: Path | None = None,
    ) -> None:
        if listen.serves(destination):
            raise UriError(
                f"{destination}: that is where the proxy itself is to listen; give the address that the destination waits at"
            )
        self._destination = destination
        self._changed = threading.Condition()
        self._analysis = Analysis(self._changed, digests)
        # Held from when a connection is taken until the destination has its like: a QEMU takes the first for the main channel.
        self._turn = threading.Semaphore()
        self._connections: list[Connection] = []
        self._ended_others: dict[ConnectionKind, ConnectionView] = {}
        self._turned_away = 0
        self._readers: dict[Connection, tuple[TeeReader, Sequence[TeeReader]]] = {}
        self._threads: list[threading.Thread] = []
        self._main: Connection | None = None
        self._main_ended = 0.0
        self._channels_known = self._channels_over = False
        self._unreachable = ""
        self._bell = threading.Event()
        self._answer: AttemptOutcome | None = None
        self._interrupts = 0
        self._cut_by_user = False
        self._started_ns = self._ended_ns = 0
        self._recording: Recording | None = None
        self._listener = listen.listen()
        self._cut, self._late, self._enough = Cancellation(), Cancellation(), Cancellation()
        try:
            # Made when all else is there: a proxy that cannot listen leaves no directory.
            if record is not None:
                self._recording = Recording(record)
        except BaseException:
            self.close()
            raise

    @property
    def uri(self) -> str:
        """Where it listens: connect to this."""
        return self._listener.uri

    def run(self, watch: Callable[["Proxy"], None] = lambda proxy: None, seconds: float = 0.1) -> ProxyView:
        """Forward one migration.

        :param watch: called every so many seconds in the calling thread
        :raise ChannelError: When nobody can be waited for.
        """
        accepting = threading.Thread(target=self._accept, name="proxy-accept", daemon=True)
        try:
            accepting.start()
        except RuntimeError as error:  # the operating system has no thread to spare
            raise ChannelError(f"{self.uri} cannot be waited at: {error}") from error
        try:
            while True:
                with self._changed:
                    if self._is_over():
                        break
                    self._changed.wait(seconds)
                self._cut_silent()
                watch(self)
        finally:
            self._ended_ns = time.monotonic_ns()
            for cancellation in (self._enough, self._cut, self._late):
                cancellation.set()
            accepting.join()
            self._listener.close()
        for thread in self._workers():
            while thread.is_alive() and not self._is_left():
                thread.join(seconds)
                watch(self)
        with self._changed:
            if self._analysis.runs:
                self._analysis.fault = "the analysis was left before its end"
            if self._recording and any(thread.is_alive() for thread in self._recording.threads):
                self._recording.fault = "it was left before all was written"
        return self.view()

    def _workers(self) -> Iterator[threading.Thread]:
        """What has something to bring to its end when all connections are cut; each may begin the next."""
        yield from self._threads
        if self._analysis.thread:
            yield self._analysis.thread
        if self._recording:
            yield from self._recording.threads

    def _is_left(self) -> bool:
        return self._interrupts > 1 and time.monotonic_ns() - self._ended_ns > _LEAVE_SECONDS * 1e9

    def interrupt(self) -> None:
        """Cut the migration. When the destination has all of the stream it may run the guest at any moment: then wait for
        its answer. A second time: wait for nothing.
        """
        with self._changed:
            self._interrupts += 1
            if self._interrupts > 1 or self._analysis.survey is None or not self._analysis.survey.complete:
                self._cut_by_user = True
                self._cut.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening, if it was never run, and leave no directory in which nothing was recorded."""
        self._listener.close()
        if self._recording:
            self._recording.close()
        for cancellation in (self._enough, self._cut, self._late):
            cancellation.close()

    # -- what has been seen ----------------------------------------------------------------------------------

    def view(self) -> ProxyView:
        """What has been seen until now."""
        with self._changed:
            main, survey, fault = self._main, self._analysis.survey, self._analysis.fault
            connections = [
                ConnectionView(one.kind, one.tee.forwarded, one.back.forwarded) for one in self._connections
            ]
            connections += self._ended_others.values()
            stalled = sum(tee.stalled_seconds for one in self._connections for tee in (one.tee, one.back))
        started = self._started_ns
        starts: tuple[float, ...] = ()
        confirmed = None
        if main and survey:
            times = [main.tee.time_at(one.offset) for one in survey.passes]
            starts = tuple(max(0.0, (at - started) / 1e9) for at in times)
        if main and main.answers.decided_ns:
            confirmed = max(0.0, (main.answers.decided_ns - main.tee.last_ns) / 1e9)
        ended = self._ended_ns or time.monotonic_ns()
        return ProxyView(
            self._verdict(),
            survey,
            fault,
            main.answers if main else Answers(),
            tuple(connections),
            (ended - started) / 1e9 if started else 0.0,
            starts,
            confirmed,
            stalled,
            self._recording.fault if self._recording else "",
            self._turned_away,
            self._waiting(),
        )

    def _waiting(self) -> str:
        main = self._main
        if main is None or not (main.forward_end or main.backward_end):
            return ""
        if not main.over:
            who = "source" if main.forward_end is None else "destination"
            return f"the {who} to close its connection, at most {LAST_WORD_SECONDS:g} s"
        working = [thread.name for thread in self._workers() if thread.is_alive()]
        if not self._ended_ns and "proxy-analysis" not in working and self._is_in_doubt():
            return f"the source to ask who runs the guest, at most {DOUBT_SECONDS:g} s"
        return next((text for name, text in _WORK.items() if name in working), "")

    def _verdict(self) -> ProxyVerdict:
        main = self._main
        if main is None:
            if self._unreachable:
                return ProxyVerdict(ProxyOutcome.UNREACHABLE, self._unreachable)
            return ProxyVerdict(ProxyOutcome.NOTHING, "no migration came")
        return judge(
            self._analysis.survey if not self._analysis.fault else None,
            main.answers,
            main.first_end
            or ("the proxy was interrupted" if self._cut_by_user else "the connection was cut"),
            closed_first=0 < main.forward_ended_ns < main.answers.decided_ns,
            interrupted=self._cut_by_user,
            answer=self._answer,
        )

    def _is_over(self) -> bool:
        alive = [thread for thread in self._threads if thread.is_alive()]
        if self._interrupts > 1:
            return True
        if self._main is None:
            return self._interrupts > 0 or (not alive and bool(self._unreachable))
        if not self._main_ended or self._analysis.runs:
            return False
        if self._is_in_doubt():
            return time.monotonic() - self._main_ended > DOUBT_SECONDS
        return not alive or time.monotonic() - self._main_ended > _OTHERS_SECONDS

    def _is_in_doubt(self) -> bool:
        assert self._main is not None
        answers = self._main.answers
        told = answers.runs or answers.refusal or self._answer is not None
        return was_committed(self._analysis.survey) and not told

    # -- connections -----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept(self._enough, self._cut)
            except Cancelled:
                return
            except ChannelError as error:
                with self._changed:
                    self._unreachable = str(error)
                return
            with self._changed:
                self._threads = [other for other in self._threads if other.is_alive()]
                if len(self._threads) >= MOST_OPEN:
                    self._turned_away += 1
                    near.close()
                    continue
            near.watch(self._cancellation())
            self._turn.acquire()
            thread = threading.Thread(target=self._serve, args=(near,), name="proxy-connection", daemon=True)
            with self._changed:
                self._threads.append(thread)
                self._started_ns = self._started_ns or time.monotonic_ns()
                try:
                    thread.start()
                except RuntimeError:  # the operating system has no thread to spare
                    self._threads.remove(thread)
                    self._turn.release()
                    near.close()

    def _cancellation(self) -> Cancellation:
        """What ends a new connection: after the migration was cut only questions come, which are let through."""
        return self._late if self._cut.is_set else self._cut

    def _serve(self, near: SocketChannel) -> None:
        try:
            with near:
                try:
                    far = self._destination.connect(self._cancellation())
                except Cancelled:
                    return
                except ChannelError as error:
                    with self._changed:
                        self._unreachable = str(error)
                    return
                finally:
                    self._turn.release()
                with far:
                    connection = self._connect(near, far)
                    try:
                        connection.run()
                    finally:
                        self._finish(connection)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _connect(self, near: SocketChannel, far: SocketChannel) -> Connection:
        with self._changed:
            is_one_of_few = sum(not one.over for one in self._connections) < _LARGE_RINGS
        connection = Connection(
            near,
            far,
            self._identified,
            self._bell.set,
            RING_BYTES if is_one_of_few else _SMALL_RING_BYTES,
        )
        records = [tee.attach() for tee in (connection.tee, connection.back) if self._recording]
        with self._changed:
            self._readers[connection] = connection.tee.attach(), records
            self._connections.append(connection)
        return connection

    def _identified(self, connection: Connection) -> None:
        reader, records = self._readers[connection]
        with self._changed:
            channels = sum(one.kind is ConnectionKind.CHANNEL for one in self._connections)
            if channels > CHANNEL_LIMIT and connection.kind is ConnectionKind.CHANNEL:
                connection.kind = ConnectionKind.OTHER
        if self._recording:
            self._recording.start(connection, *records)
        with self._changed:
            if connection.kind is ConnectionKind.MAIN and self._main is None:
                self._main = connection
                if not self._analysis.start(reader, LiveChannels(self, reader)):
                    self._channels_over = True
            elif connection.kind is not ConnectionKind.CHANNEL or self._channels_over:
                reader.close()
            if self._is_foreign(connection) and len(self._foreign(ended=False)) > MOST_FOREIGN:
                self._turned_away += 1
                connection.cut()
            self._changed.notify_all()

    def _is_foreign(self, connection: Connection) -> bool:
        """Whether it is known to be neither the main stream nor one of its channels."""
        return connection is not self._main and connection.kind not in (
            ConnectionKind.UNKNOWN,
            ConnectionKind.CHANNEL,
        )

    def _foreign(self, *, ended: bool) -> list[Connection]:
        return [one for one in self._connections if self._is_foreign(one) and one.over is ended]

    def _cut_silent(self) -> None:
        before = time.monotonic_ns() - SILENT_SECONDS * 1e9
        with self._changed:
            is_late = 0 < self._main_ended < time.monotonic() - _OTHERS_SECONDS
            silent = [
                one
                for one in self._connections
                if not one.over
                # What a channel still owes when the main stream is over, the analysis would wait for in vain.
                and (
                    is_late
                    if one.kind is ConnectionKind.CHANNEL
                    else one.kind is ConnectionKind.UNKNOWN and one.started_ns < before
                )
            ]
        for connection in silent:
            connection.cut()

    def _finish(self, connection: Connection) -> None:
        if connection.kind is ConnectionKind.UNKNOWN:  # it said nothing
            analysed, recorded = self._readers[connection]
            for reader in (analysed, *recorded):
                reader.close()
        with self._changed:
            connection.over = True
            if connection is self._main:
                self._main_ended = time.monotonic()
            elif (
                connection.kind is ConnectionKind.QUESTION
                and len(connection.back.head) >= outcome_query.ANSWER_BYTES
            ):
                answer = connection.back.head[: outcome_query.ANSWER_BYTES]
                try:
                    self._answer, _ = outcome_query.decode_answer(answer, str(self._destination))
                except ChannelError:
                    pass
            elif connection.kind is ConnectionKind.UNKNOWN:
                self._forget(connection)
            elif connection.kind is ConnectionKind.CHANNEL and self._main is None:
                # It was none of the migration that is to come.
                connection.kind = ConnectionKind.OTHER
                self._readers[connection][0].close()
            for other in self._foreign(ended=True)[:-MOST_REMEMBERED]:
                known = self._ended_others.get(other.kind, ConnectionView(other.kind, 0, 0, 0))
                self._ended_others[other.kind] = ConnectionView(
                    other.kind,
                    known.forwarded + other.tee.forwarded,
                    known.returned + other.back.forwarded,
                    known.count + 1,
                )
                self._forget(other)

    def _forget(self, connection: Connection) -> None:
        self._connections.remove(connection)
        del self._readers[connection]

    def channels(self, is_own: Callable[[bytes], bool]) -> list[tuple[str, TeeReader]]:
        """What the channels of multifd send, each with a name. The source has connected all of them before its first
        part ends; the first call waits a little for those of which it is not known yet what they are.

        :param is_own: whether a channel with such an initial packet is the migration's; others are foreign from now on
        """
        with self._changed:
            if not self._channels_known:
                self._changed.wait_for(
                    lambda: (
                        all(one.kind is not ConnectionKind.UNKNOWN for one in self._connections)
                        and not self._listener.pending
                    ),
                    _CHANNELS_SECONDS,
                )
                self._channels_known = True
            channels = [one for one in self._connections if one.kind is ConnectionKind.CHANNEL]
            for foreign in [one for one in channels if not is_own(one.opening)]:
                channels.remove(foreign)
                foreign.kind = ConnectionKind.OTHER
                self._readers[foreign][0].close()
            return [(f"multifd connection {i}", self._readers[one][0]) for i, one in enumerate(channels)]

    def close_channels(self) -> None:
        """Read no more of any channel."""
        with self._changed:
            self._channels_over = True
            unread = [
                self._readers[one][0] for one in self._connections if one.kind is ConnectionKind.CHANNEL
            ]
            self._changed.notify_all()
        for channel in unread:
            channel.close()

    def wait_ready(self, readers: Sequence[TeeReader]) -> TeeReader:
        """Wait until one of the readers has something to read."""
        while True:
            self._bell.clear()
            for reader in readers:
                if reader.ready:
                    return reader
            self._bell.wait()
