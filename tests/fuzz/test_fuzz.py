"""A short run of the fuzzer over every target: as many inputs as always, however fast the machine is. STERNA_FUZZ_MINUTES
runs for a time instead, as `make fuzz` does.
"""

import os
from pathlib import Path

import pytest
from tests.fuzz import corpus
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

MINUTES = os.environ.get("STERNA_FUZZ_MINUTES")
INPUTS = 60
FEW_INPUTS = {"destination": 12, "machine": 12, "commands": 8, "commands-hmp": 8}
"""Of targets that take a tenth of a second for each."""
SEED = int(os.environ.get("STERNA_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    corpus.build(directory)
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_says_what_is_wrong_and_does_nothing_else(target: str, recordings: Path) -> None:
    if MINUTES is None:
        result = fuzz(target, recordings, SEED, count=FEW_INPUTS.get(target, INPUTS))
    else:
        result = fuzz(target, recordings, SEED, seconds=float(MINUTES) * 60 / len(TARGETS))
    assert result.count > 0
    assert not result.findings, [finding.what for finding in result.findings]
