"Shared fixtures. jaxtyping shapes in the package's annotations are checked at run time for the whole test run."
import os
from pathlib import Path
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '2')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # spinning threads of two processes on two cores slow each other down twentyfold
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

@pytest.fixture(scope='session')
def cases(parity):
    "Where a case lies: in the repository, or, if it is large, beside the checkout; the test is skipped where it is absent."
    def where(name):
        for folder in (parity, ROOT.parent/'shared'/'parity'):
            if (folder/f'{name}.npz').exists(): return folder
        pytest.skip(f'{name} is not beside the checkout')
    return where

@pytest.fixture(scope='module')
def one_thread():
    "torch on one thread: tiny tensors are not worth two, least of all beside other work."
    import torch
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)

@pytest.fixture(scope='session')
def miniature(tmp_path_factory) -> Path:
    "A data root drawn like the built-in miniature, with few images: enough for 1 and 5 shots on VOC, ISIC and chest."
    from cdfss.data.miniature import make
    return make(tmp_path_factory.mktemp('miniature'), counts={'VOC2012': 60, 'FSS-1000': 0, 'Deepglobe': 0, 'ISIC': 24, 'LungSegmentation': 10})
