"""The signals that end a command in order."""

import signal


def heard_hangup() -> tuple[signal.Signals, ...]:
    """SIGHUP, unless whoever started the command (nohup) has it ignored."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
