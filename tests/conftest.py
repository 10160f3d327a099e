"Shared fixtures. jaxtyping shapes in the package's annotations are checked at run time for the whole test run."
import os
from pathlib import Path
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '2')
from jaxtyping import install_import_hook
_hook = install_import_hook('cdfss', 'typechecking.checker')

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='session')
def repo() -> Path: return ROOT

@pytest.fixture(scope='session')
def real_data() -> Path:
    "The folder of real images beside the checkout; tests that need it are skipped where it is absent."
    folder = Path(os.environ.get('CDFSS_REAL_DATA', ROOT.parent/'shared'/'data'))
    if not (folder/'VOC2012').is_dir(): pytest.skip('no real images beside the checkout')
    return folder

@pytest.fixture(scope='session')
def parity() -> Path:
    "Small parity cases, copied into the repository so that they run everywhere."
    return ROOT/'tests'/'data'/'parity'
