"LFM's modules: identity before tuning, the mask against a slow one, what each reads and leaves alone."
import cmath, math
import pytest, torch
from cdfss.basics import InputError
from cdfss.methods.lfm import ACPA, APMM, APMS, ACPAOptions, APMOptions, mask_frequencies, mask_frequencies_reference, stretch
from cdfss.methods.seams import build, parse_recipe
from cdfss.models.prototype import resize_mask
from episodes import backbone, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')
G = lambda seed=0: torch.Generator().manual_seed(seed)

def stir(seg, seed=1):
    "The modules as after tuning: away from their start."
    for p in seg.extras.parameters(): p.data += .7*torch.randn(p.shape, generator=G(seed))
    return seg

# ---- the mask ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('size', [(13, 13), (12, 12), (5, 9), (8, 3), (25, 24)])
@pytest.mark.parametrize('m', [1, 6])
def test_zero_masks_are_the_identity_to_the_bit(size, m):
    x, zero = torch.randn(2, 3, 6, *size, generator=G()), torch.zeros(m, 13, 7)
    assert torch.equal(mask_frequencies(x, zero, zero), x)

def slow(x, gain, scale):
    "Each coefficient of a real odd map by hand; `gain` and `scale` are functions of the frequency pair with kx >= 0."
    n = x.shape[0]
    z = torch.fft.fft2(x.double())
    out = torch.zeros(n, n, dtype=torch.complex128)
    for i in range(n):
        for j in range(n):
            ky, kx = (k if k <= n//2 else k - n for k in (i, j))
            key = (ky, kx) if kx >= 0 else (-ky, -kx)
            c = complex(z[i, j])
            out[i, j] = cmath.rect(gain(*key)*abs(c), scale(*key)*cmath.phase(c))
    return torch.fft.ifft2(out).real

def test_mask_is_that_of_the_formula():
    x, a, p = torch.randn(7, 7, generator=G()), torch.randn(1, 7, 4, generator=G(1)), torch.randn(1, 7, 4, generator=G(2))
    a[:, :, 0], p[:, :, 0] = (a[:, :, 0] + a[:, :, 0].flip(-1))/2, (p[:, :, 0] + p[:, :, 0].flip(-1))/2       # the column that mirrors itself
    of = lambda m: lambda ky, kx: 2*torch.sigmoid(m[0, ky + 3, kx].double()).item()
    assert torch.allclose(mask_frequencies(x[None, None], a, p)[0, 0].double(), slow(x, of(a), of(p)), atol=1e-5)

@pytest.mark.parametrize('c', [1, 4])
def test_amplitude_masks_that_mirror_are_the_published_ones(c):
    "On an odd map, with symmetric amplitude masks and phases kept, both forms are the same filter up to the gain's scale."
    x, half = torch.randn(2, 4, 13, 13, generator=G()), torch.randn(c, 13, 7, generator=G(1))
    half[:, :, 0] = (half[:, :, 0] + half[:, :, 0].flip(-1))/2
    whole = torch.cat([half.flip(-2, -1)[..., :6], half], -1)
    shifted = torch.roll(whole, c//2, 0)                                                            # the reference's relabelling of channels
    keep = torch.full_like(shifted, 99.)
    assert torch.allclose(mask_frequencies(x, half, torch.zeros_like(half)), 2*mask_frequencies_reference(x, shifted, keep), atol=1e-4)

def test_stretch_puts_each_frequency_in_its_place():
    mask = torch.arange(13*7.).view(1, 13, 7)
    same = stretch(mask, (13, 13))
    assert torch.equal(same[0], mask[0].roll(7, 0))                                                 # rows in fft order, DC first
    for h, w in ((12, 12), (50, 37), (3, 4)):
        at = stretch(mask, (h, w))
        assert at.shape == (1, h, w//2 + 1) and at[0, 0, 0] == mask[0, 6, 0]
    assert stretch(mask, (12, 12)).unique().numel() == 12*7                                         # an entry for each frequency

def test_reference_needs_the_maps_size():
    with pytest.raises(InputError, match='grid=13: the reference masks need the map.s own size, 12x12') as e:
        mask_frequencies_reference(torch.randn(1, 2, 12, 12), torch.ones(1, 13, 13), torch.ones(1, 13, 13))
    assert '\n' not in str(e.value)

# ---- the modules ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('base,m', [('ssp', 'apm_s'), ('ssp', 'apm_m'), ('prototype', 'acpa'), ('hsnet', 'apm_s'), ('patnet', 'acpa')])
@torch.no_grad()
def test_untuned_module_is_the_base_and_a_stirred_one_is_not(base, m):
    plain, other, e = segmenter(base), segmenter(f'{base}+{m}'), episode(2, 2)
    assert torch.equal(plain(e).scores, other(e).scores)
    assert not torch.equal(plain(e).scores, stir(other)(e).scores)

@torch.no_grad()
def test_only_the_named_stage_changes():
    seg, e = stir(segmenter('hsnet+apm_m+acpa')), episode(2, 2)
    before = seg.match(e)
    after = seg.refine_match(before)
    deep = [n for n in before.query if n.startswith('stage4')]
    assert deep and after.fg is before.fg
    for n in before.query:
        assert torch.equal(before.query[n], after.query[n]) == (n not in deep), n
        assert torch.equal(before.support[n], after.support[n]) == (n not in deep), n
    seg = stir(segmenter('hsnet+apm_s', {'apm_s_where': 'stage3'}))
    after = seg.refine_match(before)
    assert [n for n in before.query if not torch.equal(before.query[n], after.query[n])] == [n for n in before.query if n.startswith('stage3')]
    with pytest.raises(InputError, match="stage for APMS 'stage9'"): build('ssp+apm_s', backbone(), {'apm_s_where': 'stage9'})

def test_query_and_supports_are_filtered_alike_by_the_mask():
    seg = stir(segmenter('ssp+apm_m'))
    e = episode(2)
    match = seg.match(e)
    match.support['stage3'] = match.query['stage3'][:, None]
    after = seg.refine_match(match)
    assert torch.allclose(after.query['stage3'], after.support['stage3'][:, 0], atol=1e-6)

def test_masks_have_the_papers_sizes():
    net = backbone()
    counts = {m: sum(p.numel() for p in kind(o(reference=True), net).parameters())
              for m, kind, o in (('s', APMS, APMOptions), ('m', APMM, APMOptions), ('a', ACPA, ACPAOptions))}
    assert counts == dict(s=2*169, m=128*2*169, a=2*8*128)
    assert sum(p.numel() for p in APMS(None, net).parameters()) == 2*13*7

# ---- attention --------------------------------------------------------------------------------------------------------------
def test_attention_reads_the_foreground_of_supports_alone():
    m = ACPA(None, backbone())
    m.up.data = torch.randn(m.up.shape, generator=G())
    x, fg = torch.randn(2, 128, 12, 12, generator=G(1)), torch.zeros(2, 96, 96)
    fg[:, 20:60, 30:70] = 1
    inside = resize_mask(fg, (12, 12))[:, None]
    other = torch.where(inside > 0, x, torch.randn(x.shape, generator=G(2)))
    w = m.weights(x*inside)
    assert torch.allclose(m.filter(x, fg), x*w[..., None, None])
    assert torch.allclose(m.filter(other, fg), other*w[..., None, None])
    assert not torch.allclose(m.filter(x, fg), m.filter(x))
    assert 0 < w.min() and w.max() < 2 and w.std() > 0
    assert torch.allclose(m.filter(x, fg)*inside, x*inside*m.weights(x*inside)[..., None, None], atol=1e-6)      # as published: mask, then weigh

def test_published_attention_sees_one_bit_a_channel():
    m = ACPA(ACPAOptions(reference=True), backbone())
    x = torch.randn(1, 128, 13, 13, generator=G())
    other = torch.randn(1, 128, 13, 13, generator=G(1))
    other = other - other.mean((-2, -1), keepdim=True) + x.mean((-2, -1), keepdim=True)                          # another map, the same signs of means
    assert torch.allclose(m.weights(x), m.weights(other), atol=1e-5)
    assert not torch.allclose(m.weights(x), m.weights(-x), atol=1e-4)
    m = ACPA(None, backbone())
    m.up.data = torch.randn(m.up.shape, generator=G())
    assert not torch.allclose(m.weights(x), m.weights(other), atol=1e-3)

def test_modules_draw_nothing_from_the_common_generator():
    net = backbone()
    torch.manual_seed(0)
    seg = build('hsnet+apm_m+acpa', backbone(last_stage='last', output_stride=32))
    plain = build('hsnet', backbone(last_stage='last', output_stride=32))
    assert all(torch.equal(v, seg.state_dict()[n]) for n, v in plain.state_dict().items())
    a, b = ACPA(None, net), ACPA(None, net)
    assert torch.equal(a.down, b.down) and a.down.std() > 0

def test_the_name(): assert str(parse_recipe('lfm')) == 'hsnet+apm_m+acpa' and parse_recipe('lfm').adapts and not parse_recipe('hsnet').adapts
