"LEM and LCM (LoEC): the operator against HSL's published code, the modules against slow forms written from the method card."
import numpy as np
import pytest, torch
from parity_tools import close, images, load
from cdfss.methods.loec import LCM, LEM, LCMMean, LCMMeanOptions, LCMOptions, LEMOptions, LEMStd, LEMStdOptions, random_style, swap_amplitude
from cdfss.methods.seams import build, used_options
from cdfss.models.segmenter import Match
from episodes import backbone, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- the operator -----------------------------------------------------------------------------------------------------------
def test_random_style_is_the_published_operator(parity):
    "HSL's global step: on the result of its local step with the stored draws, and alone, where the draw follows the seed."
    a, entry = load(parity, 'hsl_perturb')
    t, atol = {k: torch.from_numpy(a[k]) for k in a if a[k].dtype == np.float32}, entry['recommended_atol']
    for case, sigma in (('std01', .1), ('std06', .6)):
        close(random_style(t['foreground_only'], sigma, t[f'{case}_conv']), t[f'{case}_out'], atol, f'global style after the local step, std {sigma}')
    torch.manual_seed(23)
    close(random_style(images(a['images_u8']), .1), t['global_only'], atol, 'global style alone, std 0.1')

def slow_swap(content, style):
    "Re IFFT(|FFT(F')| exp(i angle FFT(F))), full and complex, in float64; the angle of nothing is 0."
    f, g = torch.fft.fft2(content.double()), torch.fft.fft2(style.double())
    angle = torch.where(f.abs() < 1e-12, 0., f.angle())
    return torch.fft.ifft2(g.abs()*torch.exp(1j*angle)).real

@pytest.mark.parametrize('h,w', [(8, 8), (7, 9), (9, 8), (1, 5), (6, 1), (25, 24)])
def test_half_spectrum_equals_the_whole(h, w):
    g = torch.Generator().manual_seed(h*100 + w)
    content, style = torch.randn(2, 3, h, w, generator=g), torch.randn(2, 3, h, w, generator=g)
    content[0, 1], style[1, 2] = 0, 0
    assert torch.allclose(swap_amplitude(content, style).double(), slow_swap(content, style), atol=1e-5)

def test_gradients_of_empty_channels_are_finite():
    x, style = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    x[0, 1], style[0, 2] = 0, 0
    x[1] = 0
    x.requires_grad_(), style.requires_grad_()
    swap_amplitude(x, style).square().sum().backward()
    assert x.grad.isfinite().all() and style.grad.isfinite().all() and x.grad[0, 0].abs().sum() > 0 and style.grad.abs().sum() > 0
    x.grad = None
    random_style(x, .1).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0

@pytest.mark.parametrize('bound', [1., 10.])
def test_a_bound_changes_the_gradient_of_nearly_empty_patterns_alone(bound):
    g = torch.Generator().manual_seed(0)
    x, style, way = (torch.randn(2, 4, 12, 9, generator=g) for _ in range(3))
    x[0, 2] *= 1e-5
    def gradient(bound):
        a = x.clone().requires_grad_()
        out = swap_amplitude(a, style, bound)
        (out * way).sum().backward()
        return out.detach(), a.grad
    (free, steep), (same, kept) = gradient(0.), gradient(bound)
    assert torch.allclose(free, same, atol=1e-5)
    growth = lambda grad: (torch.fft.rfft2(grad).abs().amax((2, 3)) / torch.fft.rfft2(way).abs().amax((2, 3)))
    assert growth(steep)[0, 2] > 1e4 and growth(kept).max() < 3*bound
    within = (torch.fft.rfft2(style).abs() <= bound*torch.fft.rfft2(x).abs())
    assert 0 < within.float().mean() < 1 and torch.allclose(torch.fft.rfft2(steep)[within], torch.fft.rfft2(kept)[within], rtol=1e-3, atol=1e-3*float(torch.fft.rfft2(kept).abs().max()))

def test_lems_gradient_is_bounded_unless_asked():
    x = torch.rand(1, 6, 10, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 1, 1, 1e-6]).view(1, 6, 1, 1)
    way = torch.randn(1, 6, 10, 10, generator=torch.Generator().manual_seed(1))
    def size(**options):
        a = x.clone().requires_grad_()
        torch.manual_seed(0)
        (LEM(LEMOptions(**options)).stage('stem', a, 'support') * way).sum().backward()           # its squares do not depend on the phase
        return float(a.grad.norm())
    assert size(bound=0.) > 1e3 * size()

def test_gradient_of_the_operator_is_its_derivative():
    g = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(1, 2, 5, 4, generator=g), torch.randn(2, 2, 3, 3, generator=g)
    v = torch.randn(1, 2, 5, 4, generator=g)
    x.requires_grad_()
    random_style(x, .5, kernel).pow(2).sum().backward()
    with torch.no_grad(): up, down = (random_style(x + s*1e-2*v, .5, kernel).pow(2).sum() for s in (1, -1))
    assert torch.allclose((x.grad*v).sum(), (up - down)/2e-2, rtol=2e-2)

def test_amplitude_and_phase():
    x = torch.randn(1, 4, 9, 9)
    torch.manual_seed(3)
    out = random_style(x, .1)
    torch.manual_seed(3)
    style = torch.nn.functional.conv2d(x, .1*torch.randn(4, 4, 3, 3), padding=1)
    f, s, o = (torch.fft.rfft2(t) for t in (x, style, out))
    assert torch.allclose(o.abs(), s.abs(), atol=1e-4) and torch.allclose(o*f.conj(), (o*f.conj()).abs().to(o.dtype), atol=1e-2)
    assert torch.allclose(random_style(x, .2, torch.ones(4, 4, 3, 3)), 2*random_style(x, .1, torch.ones(4, 4, 3, 3)), atol=1e-5)

# ---- LEM --------------------------------------------------------------------------------------------------------------------
def stages(seg, e, fit=True, seed=0):
    "Every stage of a batch of episodes, query then support."
    torch.manual_seed(seed)
    seg.train(fit)
    with torch.no_grad():
        return seg.encode(torch.cat([e.query, e.support.flatten(0, 1)]), queries=len(e), stages=seg.backbone.names)

def lem(**o): return segmenter('ssp+lem', {f'lem_{k}': v for k, v in o.items()})

def test_lem_disturbs_the_support_in_fit_only():
    e, plain = episode(2, 2), segmenter('ssp')
    a, b = stages(plain, e), stages(lem(), e)
    for name in a:
        assert torch.equal(a[name][:2], b[name][:2]), f'the query changed at {name}'
        assert not torch.equal(a[name][2:], b[name][2:]), f'the support did not change at {name}'
    torch.manual_seed(0)
    assert torch.equal(b['stem'][2:], random_style(a['stem'][2:], .1))
    test = stages(lem(), e, fit=False)
    assert all(torch.equal(a[n], test[n]) for n in a)

@pytest.mark.parametrize('branch,changed', [('support', (False, True)), ('query', (True, False)), ('both', (True, True))])
@pytest.mark.parametrize('where', ['stem', 'stage1', 'stage2'])
def test_lem_where_and_branch(branch, changed, where):
    e = episode(2)
    a, b = stages(segmenter('ssp'), e), stages(lem(where=where, branch=branch), e)
    names = list(a)
    for n in names:
        before = names.index(n) < names.index(where)
        for part, moved in ((slice(0, 2), changed[0]), (slice(2, None), changed[1])):
            assert torch.equal(a[n][part], b[n][part]) == (before or not moved), (n, part)

def test_lem_draws_anew_for_every_forward():
    seg, e = lem(), episode(2)
    torch.manual_seed(0)
    seg.train()
    with torch.no_grad(): first, second = (seg.encode(e.support.flatten(0, 1), queries=0)['stage3'] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(stages(seg, e, seed=7)['stage3'], stages(seg, e, seed=7)['stage3'])

def test_lem_p_is_the_share_of_disturbed_passes():
    x = torch.randn(1, 3, 6, 6)
    torch.manual_seed(0)
    assert torch.equal(LEM(LEMOptions(p=0)).stage('stem', x, 'support'), x)
    moved = sum(not torch.equal(LEM(LEMOptions(p=.3)).stage('stem', x, 'support'), x) for _ in range(500))
    assert abs(moved/500 - .3) < .07                                        # more than three standard errors
    assert LEM(LEMOptions()).stage('stem', x, 'query') is x and LEM(LEMOptions()).stage('stage1', x, 'support') is x

def test_lem_strength_blends():
    x = torch.randn(1, 3, 8, 8)
    def at(s):
        torch.manual_seed(1)
        return LEM(LEMOptions(strength=s)).stage('stem', x, 'support')
    assert torch.equal(at(0), x) and torch.allclose(at(.25), .75*x + .25*at(1), atol=1e-6)

def test_lem_std_keeps_each_channel_s_moments():
    x = torch.randn(2, 5, 12, 12)*torch.arange(1, 6).view(1, 5, 1, 1) + 3
    out = LEM(LEMOptions(renorm='std')).stage('stem', x, 'support')
    moments = lambda t: torch.stack([t.mean((2, 3)), t.std((2, 3))])
    assert torch.allclose(moments(out), moments(x), rtol=1e-3, atol=1e-3) and not torch.allclose(out, x, atol=.1)
    assert not torch.allclose(moments(LEM(LEMOptions()).stage('stem', x, 'support')), moments(x), rtol=.1)

def test_lem_lets_gradients_through_to_the_stem():
    seg = lem(where='stage1')
    with torch.enable_grad():
        seg.train()
        out = seg.encode(episode(1).support.flatten(0, 1), queries=0)['stage3']
    out.square().mean().backward()
    grad = seg.backbone.stages['stem'].conv1[0].weight.grad
    assert grad.isfinite().all() and grad.abs().sum() > 0

# ---- LCM --------------------------------------------------------------------------------------------------------------------
def resized(low, h, w):
    "Low-level features (c, hl, wl) at score size: means over the cells of each target position, or bilinear with corners aligned."
    c, hl, wl = low.shape
    if (hl, wl) == (h, w): return low
    out = np.zeros((c, h, w))
    for i in range(h):
        for j in range(w):
            if wl >= w: out[:, i, j] = low[:, i*hl//h:-(-(i + 1)*hl//h), j*wl//w:-(-(j + 1)*wl//w)].mean((1, 2))
            else:
                y, x = i*(hl - 1)/max(h - 1, 1), j*(wl - 1)/max(w - 1, 1)
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, hl - 1), min(x0 + 1, wl - 1)
                fy, fx = y - y0, x - x0
                out[:, i, j] = (1 - fy)*((1 - fx)*low[:, y0, x0] + fx*low[:, y0, x1]) + fy*((1 - fx)*low[:, y1, x0] + fx*low[:, y1, x1])
    return out

def slow_lcm(scores, low, k, w, beta, patch, mean_beta, scale):
    "loec.md, LCM: patches of certainty, the K highest, cosine of their low-level features with every patch, w (Sim - beta) added to the foreground."
    out = scores.astype(np.float64).copy()
    for b in range(len(scores)):
        s, f = scores[b].astype(np.float64), resized(low[b].astype(np.float64), *scores.shape[2:])
        H, W = s.shape[1:]
        cells = [(slice(y, min(y + patch, H)), slice(x, min(x + patch, W))) for y in range(0, H, patch) for x in range(0, W, patch)]
        certainty = [(s[1][c] - s[0][c]).mean() for c in cells]
        features = [f[(slice(None), *c)].mean((1, 2)) for c in cells]
        for a in sorted(range(len(cells)), key=lambda i: -certainty[i])[:k]:
            sim = [features[a] @ g/(np.linalg.norm(features[a])*np.linalg.norm(g)) for g in features]
            level = np.mean(sim) if mean_beta else beta
            for c, v in zip(cells, sim): out[b, 1][c] += scale*w*(v - level)
    return out

@pytest.mark.parametrize('patch', [1, 2, 5])
@pytest.mark.parametrize('size,low_size', [((7, 9), (7, 9)), ((7, 9), (14, 18)), ((9, 7), (13, 15)), ((8, 8), (5, 4)), ((3, 4), (6, 8))])
@pytest.mark.parametrize('o', [dict(), dict(k=1, beta=.2), dict(k=999, w=-.3), dict(beta_rule='mean', k=4), dict(scale=10.)])
def test_lcm_equals_the_slow_form(patch, size, low_size, o):
    g = torch.Generator().manual_seed(patch)
    scores, low = 5*torch.randn(2, 2, *size, generator=g), torch.rand(2, 6, *low_size, generator=g) + .1
    options = LCMOptions(patch=patch, **o)
    got = LCM(options).scores(scores, Match({'stem': low}, {}, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)))
    want = slow_lcm(scores.numpy(), low.numpy(), options.k, options.w, options.beta, patch, options.beta_rule == 'mean', options.scale)
    assert np.abs(got.double().numpy() - want).max() < 2e-4*options.scale and torch.equal(got[:, 0], scores[:, 0])
    assert not torch.allclose(got, scores, atol=1e-3) or options.beta_rule == 'mean'       # one patch is its own mean

def test_lcm_acts_at_test_only_and_keeps_the_fit():
    e = episode(2)
    plain, seg = segmenter('ssp'), segmenter('ssp+lcm')
    seg.extras[0].scores = None                                             # would fail if it were called
    a, b = plain.train().loss(e), seg.train().loss(e)
    assert all(torch.equal(a[k], b[k]) for k in a) and seg.needed == plain.needed == ('stage3',)
    assert seg.eval().needed == ('stem', 'stage3')
    with pytest.raises(TypeError): seg(e)

def test_lcm_reads_its_stage():
    e, net = episode(2), backbone()
    with torch.no_grad():
        by = {s: build('lcm', net, {'lcm_stage': s}).eval()(e).coarse for s in net.names}
        plain = build('ssp', net).eval()(e).coarse
        off = build('lcm', net, {'lcm_w': 0}).eval()(e).coarse
    assert torch.equal(off, plain)
    for s in net.names: assert torch.equal(by[s][:, 0], plain[:, 0]) and not torch.equal(by[s], plain)
    assert not torch.equal(by['stem'], by['stage1'])

# ---- variants ---------------------------------------------------------------------------------------------------------------
def test_lcm_mean_is_lcm_with_its_rule():
    g = torch.Generator().manual_seed(3)
    scores, low = 5*torch.randn(2, 2, 9, 8, generator=g), torch.rand(2, 6, 18, 16, generator=g) + .1
    match = Match({'stem': low}, {}, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    plain, mean = LCM(LCMOptions(k=2, w=.4)).scores(scores, match), LCMMean(LCMMeanOptions(k=2, w=.4)).scores(scores, match)
    assert torch.equal(mean, LCM(LCMOptions(k=2, w=.4, beta_rule='mean')).scores(scores, match)) and not torch.allclose(mean, plain, atol=1e-3)

def test_lem_std_is_lem_with_its_renorm():
    x = torch.rand(2, 8, 12, 12, generator=torch.Generator().manual_seed(4))
    def of(m):
        torch.manual_seed(7)
        return m.stage('stem', x, 'support')
    kept = of(LEMStd(LEMStdOptions(sigma=.3)))
    assert torch.equal(kept, of(LEM(LEMOptions(sigma=.3, renorm='std')))) and torch.allclose(kept.std((2, 3)), x.std((2, 3)), rtol=1e-3) and not torch.allclose(of(LEM(LEMOptions(sigma=.3))).std((2, 3)), x.std((2, 3)), rtol=.1)

@pytest.mark.parametrize('recipe', ['ssp+lem_std+lcm_mean', 'prototype+lcm_mean'])
def test_variants_have_options_of_their_own(recipe):
    flat = {k for k in used_options(recipe) if k.startswith(('lcm', 'lem'))}
    assert flat and all(k.startswith(('lcm_mean_', 'lem_std_')) for k in flat) and not flat & {'lcm_mean_beta', 'lcm_mean_beta_rule', 'lem_std_renorm'}
