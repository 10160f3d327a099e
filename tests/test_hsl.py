"DSR, HSM and PCMT (HSL): neutral settings, limits with a known answer, draws that follow the seed, and what happens where there is nothing to see."
import dataclasses
import numpy as np
import pytest, torch
import torch.nn.functional as F
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.engine.adapt import pick
from cdfss.engine.evaluate import FeatureStore, stored_match
from cdfss.methods.hsl import DSR, HSM, PCMT, Augment, AugmentOptions, DSROptions, HSMOptions, PCMTOptions, bounds, foreground_style, otsu, present, region_means, resize_labels, soften, warp
from cdfss.methods.loec import random_style
from cdfss.methods.seams import build
from cdfss.models.segmenter import Match
from episodes import backbone, episode, segmenter
from fakes import polyps

pytestmark = pytest.mark.usefixtures('one_thread')

def restyled(e, seed=0, **o):
    torch.manual_seed(seed)
    return DSR(DSROptions(**o)).images(e)

# ---- DSR --------------------------------------------------------------------------------------------------------------------
def test_dsr_is_nothing_at_p_zero_and_follows_the_seed():
    e = episode(2, 2)
    assert restyled(e, p=0.0) is e
    a, b, c = restyled(e, 1), restyled(e, 1), restyled(e, 2)
    assert torch.equal(a.query, b.query) and torch.equal(a.support, b.support) and not torch.equal(a.query, c.query)
    assert a.query.isfinite().all() and a.support.isfinite().all() and torch.equal(a.support_masks, e.support_masks)

def test_dsr_foreground_stays_within_the_softened_mask():
    e, out = episode(2, 1, void=False), restyled(episode(2, 1, void=False), parts='foreground')
    near = soften(e.query_mask.float(), 9) > 0
    assert torch.equal(out.query.permute(0, 2, 3, 1)[~near], e.query.permute(0, 2, 3, 1)[~near]) and not torch.equal(out.query, e.query)

def test_dsr_global_part_is_lem_s_operator():
    e = episode(2, 2)
    out = restyled(e, 5, parts='global', sigma=.6)
    def drawn(x):
        torch.rand(())
        return random_style(x, .6)
    torch.manual_seed(5)
    assert torch.equal(out.query, drawn(e.query)) and all(torch.equal(out.support[:, i], drawn(e.support[:, i])) for i in range(2))

@pytest.mark.parametrize('mask', [torch.zeros(65, 65), torch.zeros(65, 65).index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(1.))], ids=['empty', 'a pixel'])
def test_dsr_leaves_images_without_an_object(mask):
    e = episode(1, 1, void=False)
    e = dataclasses.replace(e, query_mask=mask.bool()[None], support_masks=mask.bool()[None, None])
    out = restyled(e, parts='foreground')
    assert torch.equal(out.query, e.query) and torch.equal(out.support, e.support)

def test_dsr_does_not_see_ignored_pixels():
    e = episode(2, 1)
    other = dataclasses.replace(e, query_mask=e.query_mask ^ e.ignore)
    assert torch.equal(restyled(e).query, restyled(other).query)

def slow_foreground(image, soft, region, weight):
    "hsl.md, DSR 1, in float64 with the whole spectrum."
    (y, x), (v, u) = bounds(soft > 0), bounds(region)
    own = image[:, y, x].double()
    other = F.interpolate(image[:, v, u][None], own.shape[-2:], mode='bilinear', align_corners=True)[0].double()
    w, f = weight.double().view(3, 1, 1), torch.fft.fft2(own)
    new = torch.fft.ifft2((w*torch.fft.fft2(other).abs() + (1 - w)*f.abs())*torch.exp(1j*f.angle())).real
    out = image.double().clone()
    out[:, y, x] = soft[y, x]*new + (1 - soft[y, x])*own
    return out

def test_foreground_style_is_the_formula():
    g = torch.Generator().manual_seed(0)
    image, mask, region = torch.randn(3, 40, 31, generator=g), torch.zeros(40, 31), torch.zeros(40, 31, dtype=torch.bool)
    mask[5:20, 8:22], region[25:38, 2:9] = 1, True
    soft, weight = soften(mask[None], 9)[0], torch.tensor([.5, -.3, 1.])
    assert torch.allclose(foreground_style(image, soft, region, weight).double(), slow_foreground(image, soft, region, weight), atol=1e-5)

def test_whole_images_are_restyled_in_training_only():
    seg, e = segmenter('ssp+dsr'), episode(2)
    seg.extras[0].images = None                                             # would fail if it were called
    seg.eval()(e)
    with pytest.raises(TypeError): seg.train().loss(e)
    assert seg.eval().shares_encoding and not seg.train().shares_encoding and seg.extras_needed == ('slic-5',) and seg.eval().extras_needed == ()

# ---- HSM --------------------------------------------------------------------------------------------------------------------
def hsm(**o): return HSM(HSMOptions(**o), backbone())

@torch.no_grad()
def test_hsm_with_one_region_and_with_a_region_for_each_pixel():
    g = torch.Generator().manual_seed(0)
    f, low = torch.rand(2, 128, 6, 7, generator=g), torch.rand(2, 32, 12, 14, generator=g)
    one, each = torch.zeros(2, 3, 3).long(), torch.arange(42).view(1, 6, 7).expand(2, -1, -1)
    m = hsm(high=1.0)
    assert torch.allclose(m.enhance(f, low, [one]*4), (f + 4*f.mean((2, 3), keepdim=True))/5, atol=1e-4)
    assert torch.allclose(m.enhance(f, low, [each]*4), f, atol=1e-4)
    assert torch.allclose(m.enhance(-f, low, [each]*4), torch.zeros_like(f), atol=1e-4)           # its ReLU

def test_region_means_are_the_slow_ones():
    g = torch.Generator().manual_seed(0)
    f, labels = torch.randn(2, 5, 6, 7, generator=g), torch.randint(0, 9, (2, 42), generator=g)
    got = region_means(f, F.one_hot(labels, 10).float())
    for i in range(2):
        for r in range(10):
            at = labels[i] == r
            want = f[i].flatten(1)[:, at].mean(1) if at.any() else torch.zeros(5)
            assert torch.allclose(got[i, r], want, atol=1e-4)

def test_present_keeps_regions_and_drops_absent_ones():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 400, (3, 50), generator=g)
    new = present(labels)
    for a, b in zip(labels, new): assert torch.equal(a.unique(return_inverse=True)[1], b)

@torch.no_grad()
def test_absent_regions_do_not_attend_unless_as_in_the_released_code():
    g = torch.Generator().manual_seed(0)
    f, low = torch.rand(2, 128, 6, 6, generator=g), torch.rand(2, 32, 12, 12, generator=g)
    few = torch.randint(0, 4, (2, 6, 6), generator=g)
    gaps, crowd = few*50, torch.cat([few[:1], torch.arange(36).view(1, 6, 6)])              # other numbers; a neighbour with more regions
    m, reference = hsm(), hsm(reference=True)
    reference.load_state_dict(m.state_dict())
    assert torch.allclose(m.enhance(f, low, [few]*4), m.enhance(f, low, [gaps]*4), atol=1e-5)
    assert torch.allclose(m.enhance(f, low, [few]*4)[0], m.enhance(f, low, [crowd]*4)[0], atol=1e-5)
    assert not torch.allclose(reference.enhance(f, low, [few]*4)[0], reference.enhance(f, low, [crowd]*4)[0], atol=1e-3)

@torch.no_grad()
def test_every_scale_counts_but_the_released_code_s_last():
    g = torch.Generator().manual_seed(0)
    f, low = torch.rand(1, 128, 6, 6, generator=g), torch.rand(1, 32, 12, 12, generator=g)
    maps = [torch.randint(0, n, (1, 6, 6), generator=g) for n in (2, 5, 9, 20)]
    for m, last in ((hsm(), True), (hsm(reference=True), False)):
        whole = m.enhance(f, low, maps)
        for i in range(4):
            other = [torch.zeros_like(l) if i == j else l for j, l in enumerate(maps)]
            assert torch.equal(whole, m.enhance(f, low, other)) == (i == 3 and not last)

def test_hsm_trains_by_a_term_of_its_own():
    plain, seg, e = segmenter('ssp'), segmenter('ssp+hsm'), episode(2)
    a, b = plain.train().loss(e), seg.train().loss(e)
    assert list(b) == [*a, 'enhanced'] and all(torch.equal(a[n], b[n]) for n in a)
    b['enhanced'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in seg.extras[0].parameters())

def test_low_level_features_are_detached():
    low = torch.rand(1, 32, 12, 12, requires_grad=True)
    m = hsm()
    (m.enhance(torch.rand(1, 128, 6, 6), low, [torch.zeros(1, 6, 6).long()]*4)*torch.randn(128, 1, 1)).sum().backward()
    assert low.grad is None and m.project.weight.grad.abs().sum() > 0

@pytest.mark.parametrize('options,said', [(dict(maps='slick-5'), "unknown image map 'slick'"), (dict(maps='5,10'), "image map '5'"), (dict(low='stage9'), "unknown stage for HSM")])
def test_hsm_refuses_what_does_not_exist(options, said):
    with pytest.raises(InputError, match=said): hsm(**options)

# ---- PCMT -------------------------------------------------------------------------------------------------------------------
def slow_otsu(values, drop=.05):
    "Otsu's level by its definition: the split of the histogram with the largest variance between the classes."
    low, high = values.min(), values.max()
    levels = ((values - low)/max(high - low, np.float32(1e-12))*np.float32(255)).astype(int)
    levels = levels[levels >= int(255*drop)]
    best = (-1, 0)
    for t in range(256):
        a, b = levels[levels <= t], levels[levels > t]
        if len(a) and len(b):
            between = len(a)*len(b)*(a.mean() - b.mean())**2
            if between > best[0]*(1 + 1e-12): best = (between, t)
    return low + best[1]/255*(high - low)

@pytest.mark.parametrize('seed', range(4))
def test_otsu_is_its_definition(seed):
    g = np.random.default_rng(seed)
    v = np.concatenate([g.normal(-.4, .1, 700), g.normal(g.uniform(0, .5), .2, 300)]).astype(np.float32)
    assert abs(otsu(torch.from_numpy(v)[None]).item() - slow_otsu(v)) < 1e-5

@pytest.mark.parametrize('v', [torch.zeros(2, 5, 5), torch.full((1, 9), 3.), torch.tensor([[0., 1.]])])
def test_otsu_of_flat_maps_is_finite(v): assert otsu(v).isfinite().all()

def test_pcmt_rules():
    e = episode(3)
    of = lambda **o: segmenter('ssp+pcmt', {f'pcmt_{k}': v for k, v in o.items()})(e).mask
    with torch.no_grad():
        plain, p = segmenter('ssp')(e).mask, segmenter('ssp')(e)
        confidence = (p.scores[:, 1] - p.scores[:, 0])/10
        assert torch.equal(of(rule='zero'), plain)
        assert torch.equal(of(rule='otsu'), confidence > otsu(confidence)[:, None, None])
        assert torch.equal(of(beta=1e4, gamma=5.0), plain)                 # r = 0
        assert torch.equal(of(beta=1e4, gamma=-5.0), of(rule='otsu'))      # r = 1
    assert not torch.equal(of(rule='otsu'), plain)

def test_rate_falls_with_the_separation_of_prototypes():
    def rate(apart):
        fg, bg = torch.tensor([[1., 0]]), torch.tensor([[np.cos(apart), np.sin(apart)]]).float()
        return PCMT().rate(Match({}, {}, *2*[torch.zeros(1, 1, 2, 2)]), dict(fg_prototype=fg, bg_prototype=bg, self_fg_prototype=fg, self_bg_prototype=bg)).item()
    rates = [rate(a) for a in (0., .3, .6, 1.5)]
    assert rates == sorted(rates, reverse=True) and rates[0] > .95 and rates[-1] < 1e-6

@torch.no_grad()
def test_prototypes_are_found_for_bases_that_have_none():
    "On the plain prototype base PCMT finds the same four prototypes that SSP reports."
    from cdfss.methods.hsl import prototypes_of
    e, net = episode(2), backbone()
    ssp, plain = build('ssp', net, {'ssp_refine': False}).eval(), build('prototype', net).eval()
    match = ssp.match(e)
    for a, b in zip(prototypes_of(match, ssp.compare(match)), prototypes_of(match, plain.compare(match))): assert torch.allclose(a, b, atol=1e-5)

def test_labels_at_any_size():
    labels = torch.arange(12).view(1, 3, 4)
    assert torch.equal(resize_labels(resize_labels(labels, (9, 8)), (3, 4)), labels) and resize_labels(labels, (2, 2)).shape == (1, 2, 2)

# ---- the source's augmentation ----------------------------------------------------------------------------------------------
def augmented(e, seed=0, **o):
    torch.manual_seed(seed)
    return Augment(AugmentOptions(**o)).images(e)

def test_augmentation_moves_images_masks_and_maps_together():
    e = episode(2, 2, 96, void=True)
    sign = lambda m: m.float()[..., None, :, :].expand(*m.shape[:-2], 3, *m.shape[-2:])
    e = dataclasses.replace(e, query=sign(e.query_mask), support=sign(e.support_masks), extras={'grid-96': e.query_mask[:, None].expand(-1, 3, -1, -1).to(torch.int16).clone()})
    e.extras['grid-96'][:, 1:] = e.support_masks
    out = augmented(e, blur=0.)
    for images, masks, maps in ((out.query, out.query_mask, out.extras['grid-96'][:, 0]), (out.support, out.support_masks, out.extras['grid-96'][:, 1:])):
        assert ((images[..., 0, :, :] > .5) == masks).float().mean() > .985 and torch.equal(maps.bool(), masks) and maps.dtype == torch.int16
    assert not torch.equal(out.query_mask, e.query_mask) and out.ignore.dtype == torch.bool and out.ignore.any() and not torch.equal(out.support_ignore, e.support_ignore)
    a, b = augmented(e, 3), augmented(e, 3)
    assert torch.equal(a.query, b.query) and torch.equal(a.support, b.support)

def test_cropping_moves_images_masks_and_maps_together():
    e = episode(3, 2, 96, void=False)
    sign = lambda m: 2*m.float()[..., None, :, :].expand(*m.shape[:-2], 3, *m.shape[-2:]) - 1                   # 0, the mean, is neither
    e = dataclasses.replace(e, query=sign(e.query_mask), support=sign(e.support_masks), extras={'grid-96': e.query_mask[:, None].expand(-1, 3, -1, -1).to(torch.int16).clone()}, support_ignore=None)
    e.extras['grid-96'][:, 1:] = e.support_masks
    out = augmented(e, rule='sccan', blur=0.)
    for images, masks, void, maps in ((out.query, out.query_mask, out.ignore, out.extras['grid-96'][:, 0]), (out.support, out.support_masks, out.support_ignore, out.extras['grid-96'][:, 1:])):
        assert ((images[..., 0, :, :] > 0) == masks)[~void].float().mean() > .985 and not (masks & void).any() and (images[..., 0, :, :][void].abs() < .6).float().mean() > .9
        assert torch.equal(maps == 1, masks) and torch.equal(maps == 2, void) and maps.dtype == torch.int16      # beyond the image: a region of its own
    assert out.ignore.any() and out.query.shape == e.query.shape and not torch.equal(out.query_mask, e.query_mask)
    a, b = augmented(e, 3, rule='sccan'), augmented(e, 3, rule='sccan')
    assert torch.equal(a.query, b.query) and torch.equal(a.support_ignore, b.support_ignore)

def test_cropping_at_nothing_and_its_ranges():
    e, still = episode(2, 1, 64), dict(rule='sccan', scale=0., turn=0., blur=0.)
    out = augmented(e, **still, flip=0.)
    assert torch.equal(out.query, e.query) and torch.equal(out.query_mask, e.query_mask & ~e.ignore) and torch.equal(out.ignore, e.ignore) and torch.equal(out.extras['slic-5'][:, :, ::8, ::8], resize_labels(e.extras['slic-5'], (64, 64))[:, :, ::8, ::8])
    assert torch.equal(augmented(e, **still, flip=1.).support, e.support.flip(-1))
    whole = dataclasses.replace(e, query_mask=torch.ones_like(e.query_mask), support_masks=torch.ones_like(e.support_masks), ignore=None, support_ignore=None, extras={})
    def sides(domain):
        seen = [augmented(dataclasses.replace(whole, domain=domain), s, rule='sccan', turn=0.).query_mask.float().amax(-1).sum(-1) for s in range(60)]
        return torch.cat(seen)/64
    assert .88 < sides('voc').min() < .93 and .79 < sides('coco').min() < .84                                  # the smallest picture within the square

@pytest.mark.parametrize('o,same', [(dict(p=0.), True), (dict(scale=0., turn=0., blur=0., flip=0.), True), (dict(scale=0., turn=0., blur=1., flip=0.), False), (dict(scale=0., turn=0., blur=0., flip=1.), False)])
def test_augmentation_at_nothing(o, same):
    e = episode(1, 1)
    out = augmented(e, **o)
    assert torch.allclose(out.query, e.query, atol=1e-4) == same
    if o.get('flip') == 1.: assert torch.allclose(out.query, e.query.flip(-1), atol=1e-4) and torch.equal(out.support_masks, e.support_masks.flip(-1))
    elif o.get('blur') == 1.: assert torch.equal(out.query_mask, e.query_mask)

def test_augmentation_stays_within_its_range():
    torch.manual_seed(0)
    affine, blur = Augment(AugmentOptions(flip=0.)).draw(2000, 'cpu')
    zoom, turn = affine[:, :, 0].norm(dim=1), torch.atan2(affine[:, 1, 0], affine[:, 0, 0]).rad2deg()
    assert 1/1.1 - 1e-4 <= zoom.min() < .92 and 1.1 < zoom.max() <= 1/.9 + 1e-4 and 9 < turn.abs().max() <= 10 + 1e-3 and .4 < (blur > 0).float().mean() < .6
    assert (affine[:, :, 2].abs() <= (1 - zoom).clamp(min=0)[:, None] + 1e-6).all()

def test_the_loss_sees_the_moved_mask():
    "An augmentation that only flips: the loss is that of the flipped episode."
    e = episode(2, 1, 64)
    flipped = dataclasses.replace(e, **{n: getattr(e, n).flip(-1) for n in ('query', 'support', 'support_masks', 'query_mask', 'ignore', 'support_ignore')})
    seg, plain = segmenter('ssp+augment', dict(augment_scale=0., augment_turn=0., augment_blur=0., augment_flip=1.)), segmenter('ssp')
    a, b = seg.train().loss(e), plain.train().loss(flipped)
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in b) and not torch.allclose(a['matched'], plain.loss(e)['matched'], atol=1e-3)

# ---- what is made once for an image -----------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path):
    polyps(tmp_path/'data', 5, (64, 64))
    return ImageStore(open_dataset('kvasir', tmp_path/'data'), 64, cache=tmp_path/'cache')

@torch.no_grad()
def test_hsm_acts_once_for_each_image(store, monkeypatch):
    seg, plain = segmenter('hsl'), segmenter('hsl')
    plain.load_state_dict(seg.state_dict())
    asked, seen = [(0, (1, 2), 0), (2, (0, 1), 0), (3, (0, 2), 0)], []
    enhance = HSM.enhance
    monkeypatch.setattr(HSM, 'enhance', lambda self, high, *a: seen.append(len(high)) or enhance(self, high, *a))
    def matched(ahead, seg=seg):
        f = FeatureStore(seg, store, seg.needed, ahead=ahead)
        return stored_match(f, store, asked, 'cpu', seg.extras_needed)[0]
    match = matched(True)
    a = seg.decide(match, (64, 64))
    assert sum(seen) == 4                                                  # images 0 to 3
    b = seg.decide(matched(False), (64, 64))
    assert sum(seen) == 4 + 9 and torch.allclose(a.scores, b.scores, atol=1e-5)
    assert torch.equal(seg.decide(pick(match, 1), (64, 64)).mask, a.mask[1:2])
    changed = dataclasses.replace(match, query=match.query | {'stage3': match.query['stage3'].roll(1, -1)})
    want = plain.decide(dataclasses.replace(changed, made={}), (64, 64))
    assert torch.equal(seg.decide(changed, (64, 64)).scores, want.scores) and not torch.allclose(want.scores, a.scores, atol=1e-3)
    assert torch.equal(plain.decide(match, (64, 64)).scores, b.scores)      # another HSM does not take what this one made
    assert not matched(True, segmenter('ssp+hsm', {'hsm_reference': True})).made and not matched(True, segmenter('ssp+hsm', {'hsm_strength': 0.})).made
