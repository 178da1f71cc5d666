"""A short run of the fuzzer over every target; STERNA_FUZZ_MINUTES makes it longer, `make fuzz` has the long one."""

import os
from pathlib import Path

import pytest
from tests.fuzz import corpus
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS

MINUTES = float(os.environ.get("STERNA_FUZZ_MINUTES", "0.2"))
SEED = int(os.environ.get("STERNA_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    corpus.build(directory)
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_says_what_is_wrong_and_does_nothing_else(target: str, recordings: Path) -> None:
    result = fuzz(target, recordings, SEED, seconds=MINUTES * 60 / len(TARGETS))
    assert result.count > 0
    assert not result.findings, [finding.what for finding in result.findings]
