import pytest

import zeropoint as zp

from .cases import small


@pytest.fixture
def path(tmp_path):
    """A sound checkpoint of `small()`."""
    zp.save(small(), tmp_path / "saved")
    return tmp_path / "saved"
