"""pytest's side of the suite: its option, and the fixtures that its tests ask for."""

import pkgutil
from collections.abc import Iterator

import pytest

from sterna.testing.conformance.backends import BACKENDS, Backend
from sterna.testing.conformance.guest import ConformanceGuest, MakeGuest, Variant

_UNDER_TEST = pytest.StashKey[tuple[Backend, ...]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        metavar="MODULE:NAME",
        help="the hypervisor under test, a sterna.testing.Backend or its class; may be given again",
    )


def pytest_configure(config: pytest.Config) -> None:
    named: list[str] = config.getoption("--backend") or []
    config.stash[_UNDER_TEST] = tuple(map(_find, named)) or BACKENDS


def _backends(config: pytest.Config) -> tuple[Backend, ...]:
    """Those that the user named, or all that the package has."""
    return config.stash.get(_UNDER_TEST, BACKENDS)


def _find(name: str) -> Backend:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--backend {name}: {error}") from error
    backend = found() if isinstance(found, type) else found
    if not isinstance(backend, Backend):
        raise pytest.UsageError(f"--backend {name}: this is no sterna.testing.Backend")
    return backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that uses `variant`, as `make_guest` does, comes once for each hypervisor and way to keep a log."""
    if "variant" in metafunc.fixturenames:
        combinations = [(backend, mode) for backend in _backends(metafunc.config) for mode in backend.modes]
        metafunc.parametrize("variant", combinations, ids=[f"{b.name}-{mode}" for b, mode in combinations])


@pytest.fixture
def make_guest(variant: Variant) -> Iterator[MakeGuest]:
    """Makes guests of one hypervisor and one way to keep a log, and closes them."""
    backend, mode = variant
    if why := backend.missing():
        pytest.skip(why)
    guests: list[ConformanceGuest] = []

    def make(**arguments: object) -> ConformanceGuest:
        guests.append(ConformanceGuest(backend, mode, **arguments))  # type: ignore[arg-type]
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def guest(make_guest: MakeGuest) -> ConformanceGuest:
    """Such a guest, with one vCPU."""
    return make_guest()


@pytest.fixture
def to_compare(pytestconfig: pytest.Config) -> tuple[Backend, ...]:
    """The hypervisor under test, and those of this package."""
    return tuple(dict.fromkeys((*_backends(pytestconfig), *BACKENDS)))
