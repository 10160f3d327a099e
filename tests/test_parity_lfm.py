"LFM's mask and attention against numbers computed with its authors' own files (tests/data/parity)."
import json
import numpy as np
import pytest, torch
from parity_tools import close, fill, load
from episodes import backbone
from cdfss.methods.lfm import ACPA, APMM, APMS, ACPAOptions, APMOptions, mask_frequencies_reference

@pytest.fixture(scope='module')
def case(parity): return load(parity, 'lfm')

@pytest.fixture(scope='module')
def keys(parity): return json.loads((parity/'lfm.keys.json').read_text())

@pytest.fixture(scope='module')
def big():
    x = np.random.default_rng(1311).standard_normal((1, 2048, 13, 13)).astype(np.float32)
    return torch.from_numpy(x)

def eighth(a, name): return torch.from_numpy(a[name]).float() / 16

def masks(keys, group, prefix=''): return {n: fill(prefix + n, shape)[0] for n, (shape, _) in keys[group].items()}

def module(kind, options, **parameters):
    "The module with parameters in place of its own, whatever their width."
    m = kind(options, backbone())
    for n, v in parameters.items(): setattr(m, n, torch.nn.Parameter(v))
    return m

@pytest.mark.parametrize('kind,name', [(APMS, 'shared'), (APMM, 'perchannel')])
def test_mask(case, keys, kind, name):
    a, entry = case
    x, tol, o = eighth(a, 'x_i8'), entry['recommended_atol'], APMOptions(reference=True)
    filled = masks(keys, name, f'{name}:')
    close(filled['mask_amplitude'][None], a[f'mask_{name}_mask_amplitude'], 1e-6, 'amplitude mask by the weight rule')
    start = kind(o, backbone())
    assert (start.amplitude == 1).all() and (start.phase == 1).all()
    ones = torch.ones_like(filled['mask_amplitude'])
    close(module(kind, o, amplitude=ones, phase=ones).filter(x), a[f'mask_{name}_init'], tol, 'masks of ones')
    close(module(kind, o, amplitude=filled['mask_amplitude'], phase=filled['mask_phase']).filter(x), a[f'mask_{name}_out'], tol, 'filled masks')

def test_mask_gradients(case, keys):
    a, entry = case
    filled = masks(keys, 'shared', 'shared:')
    m = module(APMS, APMOptions(reference=True), amplitude=filled['mask_amplitude'], phase=filled['mask_phase'])
    loss = (m.filter(eighth(a, 'x_i8')) - eighth(a, 'mask_target_i8')).pow(2).mean()
    close(loss[None].detach(), a['mask_shared_loss'], entry['recommended_atol'], 'loss')
    loss.backward()
    for p, name in ((m.amplitude, 'amplitude'), (m.phase, 'phase')): close(p.grad[None], a[f'mask_shared_grad_{name}'], 1e-6, f'gradient of the {name} mask')

def test_mask_of_2048_channels(case, keys, big):
    a, entry = case
    filled = masks(keys, 'perchannel_2048')
    y = mask_frequencies_reference(big, filled['mask_amplitude'], filled['mask_phase'])
    close(y.flatten()[torch.from_numpy(a['big_index']).long()], a['big_mask_out'], entry['recommended_atol'], 'masked')
    close(torch.stack([y.mean(), y.std(), y.abs().max()]), a['big_mask_stats'], entry['recommended_atol'], 'statistics')

def attention(keys, group):
    down, up = (fill(n, shape) for n, (shape, _) in keys[group].items())
    return module(ACPA, ACPAOptions(reference=True), down=down, up=up)

def test_attention(case, keys):
    a, entry = case
    x, tol = eighth(a, 'x_i8'), entry['recommended_atol']
    close(torch.fft.fft2(x).angle().mean((-2, -1)), a['attention_pooled_phase'], tol, 'mean phase')
    close(attention(keys, 'attention').filter(x).detach(), a['attention_out'], tol, 'attention')

def test_attention_of_2048_channels(case, keys, big):
    a, entry = case
    y = attention(keys, 'attention_2048').filter(big).detach()
    close(y.flatten()[torch.from_numpy(a['big_index']).long()], a['big_attention_out'], entry['recommended_atol'], 'attention')
    close(torch.stack([y.mean(), y.std(), y.abs().max()]), a['big_attention_stats'], entry['recommended_atol'], 'statistics')
