import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.stream.return_path import PRIVATE_TYPES, ReturnMessage, ReturnPathDecoder, pong, shut
from sterna.stream.vmstate import StreamError
from sterna.stream.wire import RETURN_PATH_LIMIT, ReturnPathType

MESSAGES = st.one_of(
    st.integers(0, 2**32 - 1).map(shut),
    st.integers(0, 2**32 - 1).map(pong),
    st.binary(min_size=12, max_size=12).map(lambda data: ReturnMessage(ReturnPathType.REQ_PAGES, data)),
    st.binary(min_size=14, max_size=268).map(lambda data: ReturnMessage(ReturnPathType.REQ_PAGES_ID, data)),
    st.builds(
        ReturnMessage,
        st.integers(PRIVATE_TYPES.start, PRIVATE_TYPES.stop - 1),
        st.binary(max_size=RETURN_PATH_LIMIT),
    ),
)


def test_layout() -> None:
    assert shut(0).encode().hex() == "0001000400000000"
    assert pong(7).encode().hex() == "0002000400000007"
    assert pong(7).value == 7
    assert ReturnMessage(0x8001, b"ab").encode().hex() == "800100026162"


@pytest.mark.slow
@given(st.lists(MESSAGES, max_size=5), st.data())
def test_messages_come_back_from_pieces_of_any_size(
    messages: list[ReturnMessage], data: st.DataObject
) -> None:
    wire = b"".join(message.encode() for message in messages)
    decoder = ReturnPathDecoder()
    found = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += decoder.feed(wire[:size])
        wire = wire[size:]
    decoder.close()
    assert found == messages


@given(st.binary(max_size=64), st.booleans())
def test_garbage_is_refused_or_waits_for_more(garbage: bytes, valid_first: bool) -> None:
    decoder = ReturnPathDecoder()
    where = ("return path", True)
    try:
        found = decoder.feed((shut(1).encode() if valid_first else b"") + garbage)
        assert all(message.encode() for message in found)
        decoder.close()
    except StreamError as error:
        where = (str(error.section), error.offset is not None)
    assert where == ("return path", True)


def test_errors_say_where() -> None:
    decoder = ReturnPathDecoder()
    assert decoder.feed(pong(1).encode() + b"\0") == [pong(1)]
    with pytest.raises(StreamError, match="offset 0x8: a message of unknown type 0x63"):
        decoder.feed(b"\x63\xff\xff")
    with pytest.raises(StreamError, match="PONG with 5 bytes of payload"):
        ReturnPathDecoder().feed(b"\0\2\0\5")
    with pytest.raises(StreamError, match="type 0x8000 with 65535 bytes"):
        ReturnPathDecoder().feed(b"\x80\0\xff\xff")
    cut = ReturnPathDecoder()
    cut.feed(b"\0\1\0\4\0")
    with pytest.raises(StreamError, match="offset 0x5: the return path is cut short"):
        cut.close()


def test_wrong_messages_are_not_encoded() -> None:
    for message in (
        ReturnMessage(0),
        ReturnMessage(8),
        ReturnMessage(1, b""),
        ReturnMessage(0x9000, bytes(RETURN_PATH_LIMIT + 1)),
    ):
        with pytest.raises(StreamError):
            message.encode()


def test_what_came_before_a_malformed_message_is_delivered() -> None:
    decoder = ReturnPathDecoder()
    assert decoder.feed(pong(1).encode() + shut(1).encode() + b"\0\x63\0\0") == [pong(1), shut(1)]
    for call in (decoder.check, decoder.close, lambda: decoder.feed(b"")):
        with pytest.raises(StreamError, match="offset 0x10: a message of unknown type 0x63"):
            call()
