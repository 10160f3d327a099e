"HSL against numbers computed with its authors' own code (tests/data/parity)."
import dataclasses, random
import numpy as np
import pytest, torch
import torch.nn.functional as F
from parity_tools import close, images, load, official_state
from cdfss.basics import InputError
from cdfss.episode import Episode
from cdfss.methods import hsl
from cdfss.methods.hsl import PCMT, foreground_style, otsu, resize_labels, soften
from cdfss.methods.loec import random_style
from cdfss.models import prototype
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.importers import from_official
from cdfss.models.segmenter import Match
from cdfss.models.ssp import SSP, SSPOptions

pytestmark = pytest.mark.usefixtures('one_thread')
NAMES = ('slic-5', 'slic-10', 'slic-15', 'slic-20')

@pytest.fixture(scope='module')
def case(parity): return load(parity, 'hsl_full')

@pytest.fixture(scope='module')
def segmenter(parity): return from_official('hsl', official_state(parity, 'hsl_full'))

def episode(a, shots):
    t = lambda name: torch.from_numpy(a[name])
    x, m, maps = images(a['images_u8']), t('masks').bool(), torch.from_numpy(a['spixel'].astype(np.int64))[:, :shots + 1] - 1
    return Episode(x[:, 0], x[:, 1:shots + 1], m[:, 1:shots + 1], query_mask=m[:, 0], extras={n: maps[:, :, i] for i, n in enumerate(NAMES)})

def with_hsm(segmenter, **o):
    segmenter.extras[1].options = dataclasses.replace(segmenter.extras[1].options, **o)
    return segmenter

def pcmt_rows(match, out, scores):
    "The seven numbers of the case's `pcmt` arrays."
    fg, bg, sfg, sbg = hsl.prototypes_of(match, out)
    cos = [F.cosine_similarity(*p) for p in ((sfg, fg), (sfg, bg), (fg, sbg))]
    rate, t = PCMT().rate(match, out), otsu((scores[:, 1] - scores[:, 0]) / 10)
    return torch.stack([*cos, cos[0] - .5*(cos[1] + cos[2]), rate, t, t*rate], 1)

@pytest.mark.parametrize('shots', [1, 2])
@pytest.mark.parametrize('gray', [False, True])
@torch.no_grad()
def test_prediction(segmenter, case, shots, gray):
    a, entry = case
    seg, name = with_hsm(segmenter.eval(), instance_norm=gray), f"{'gray_' if gray else ''}k{shots}"
    e, tol = episode(a, shots), entry['recommended_atol']
    match = seg.refine_match(seg.match(e))
    p = seg.answer(match, e.query.shape[-2:])
    close(p.scores if (gray, shots) == (False, 1) else p.scores[..., ::4, ::4], a[f'{name}_en_out'], tol, 'logits')
    close(pcmt_rows(match, seg.compare(match), p.scores), a[f'{name}_pcmt'], tol, 'the threshold and what it is made of')
    assert np.array_equal(p.mask.numpy(), np.unpackbits(a[f'{name}_pred_bits'], axis=-1)[..., :97].astype(bool))

@torch.no_grad()
def test_intermediates(segmenter, case):
    a, entry = case
    seg, e, tol = with_hsm(segmenter.eval(), instance_norm=False), episode(a, 1), entry['recommended_atol']
    hsm, plain = seg.extras[1], seg.match(e)
    high, low = plain.query['stage3'], plain.query['stem']
    projected = F.interpolate(hsm.project(low).relu(), high.shape[-2:], mode='bilinear', align_corners=True)
    close(high[:, ::64], a['k1_feature_q_sub'], tol, 'query features')
    close(projected[:, ::64], a['k1_feature_q0_sub'], tol, 'projected low-level features')
    match = seg.refine_match(plain)
    out = seg.compare(match)
    close(out['fg_prototype'][:, ::4], a['k1_EN_FP'], tol, 'foreground prototype')
    close(out['bg_prototype'][:, ::4], a['k1_EN_BP'], tol, 'background prototype')
    close(out['support_scores'], a['k1_en_out0'], tol, 'first scores')

def terms_in_order(terms): return torch.stack([sum(terms.values()), *(terms[n] for n in ('matched', 'self', 'support', 'enhanced'))]).detach()

def trained(parity):
    seg = with_hsm(from_official('hsl', official_state(parity, 'hsl_full')), instance_norm=False).train()
    seg.extras[0].options = dataclasses.replace(seg.extras[0].options, p=0.0)
    return seg

@pytest.fixture
def nearest(monkeypatch):
    "Masks at feature size by the nearest pixel in the losses too, as the reference does; HSM's reference mode covers what is predicted."
    monkeypatch.setattr(prototype, 'resize_mask', lambda mask, size: F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), tuple(size)).reshape(*mask.shape[:-2], *size))

def test_training_loss_statistics_and_gradients(parity, case, nearest):
    a, entry = case
    seg, e = trained(parity), episode(a, 1)
    terms = seg.loss(e)
    close(terms_in_order(terms), a['train_loss'], entry['recommended_atol'], 'loss: total, then the terms')
    close(seg.backbone.stages['stage3'].layer3[5].bn3.running_mean, a['train_running_mean_after'], entry['recommended_atol'], 'running mean')
    sum(terms.values()).backward()
    norm = lambda start: torch.stack([p.grad.norm() for n, p in seg.named_parameters() if n.startswith(start)]).norm()
    got = [norm(s) for s in ('backbone.stages.stem', 'backbone.stages.stage1', 'backbone.stages.stage2', 'backbone.stages.stage3',
                             'extras.1.layers.0', 'extras.1.layers.1', 'extras.1.project')]
    assert torch.allclose(torch.stack(got), torch.from_numpy(a['train_grad_norms']), rtol=1e-3)

def restyled(images_, masks, labels, sigma):
    "DSR on one set of images with the draws in the order of the reference: numpy for regions, torch for weights, which it applies to rolled channels."
    labels, soft, out = resize_labels(labels, images_.shape[-2:]), soften(masks.float(), 9), []
    random.random()
    for x, d, l in zip(images_, soft, labels):
        found = l.unique()
        region = l == int(np.random.choice((found + 1).numpy())) - 1
        least = l.numel()/len(found)
        if region.sum() < least or d.sum() < least: out.append(x)
        else: out.append(foreground_style(x, d, region, (.25*torch.randn(3, 1, 1)).clamp(-1, 1).flatten().roll(-1)))
    random.random()
    return random_style(torch.stack(out), sigma)

def test_perturbed_training(parity, case, nearest):
    a, entry = case
    seg, e = trained(parity), episode(a, 1)
    random.seed(11), np.random.seed(12), torch.manual_seed(13)
    maps = e.extras['slic-5']
    e = dataclasses.replace(e, query=restyled(e.query, e.query_mask, maps[:, 0], .1), support=restyled(e.support[:, 0], e.support_masks[:, 0], maps[:, 1], .1)[:, None])
    close(sum(seg.loss(e).values()).detach()[None], a['train_perturbed_loss'], entry['recommended_atol'], 'loss of restyled images')

def test_foreground_style(parity):
    a, entry = load(parity, 'hsl_perturb')
    x, m = images(a['images_u8']), torch.from_numpy(a['masks']).bool()
    close(soften(m.float(), 9), a['dilated_mask'], 1e-5, 'softened mask')
    maps = torch.from_numpy(a['spixel'].astype(np.int64))[:, 0] - 1
    for case, sigma in (('std01', .1), ('std06', .6)):
        np.random.seed(22), torch.manual_seed(23)
        close(restyled(x, m, maps, sigma), a[f'{case}_out'], entry['recommended_atol'], f'both steps, std {sigma}')
    assert not torch.allclose(torch.from_numpy(a['foreground_only'])[0], x[0]) and torch.equal(torch.from_numpy(a['foreground_only'])[2], x[2])

@torch.no_grad()
def test_threshold(parity):
    a, entry = load(parity, 'hsl_pcmt')
    t = lambda n: torch.from_numpy(a[n])
    seg = SSP(create_backbone(BackboneOptions(weights='none')), [PCMT()], SSPOptions(refine=False)).eval()
    q, s, m = (t('feature_q')/5).relu(), (t('feature_s')/5).relu(), F.interpolate(t('mask_s')[:, None], (14, 14))       # to the nearest
    match = Match({'stage3': q}, {'stage3': s[:, None]}, (m == 1).float(), (m == 0).float())
    p = seg.answer(match, (56, 56))
    close(p.scores, a['en_out'], entry['recommended_atol'], 'logits')
    close(pcmt_rows(match, seg.compare(match), p.scores), a['pcmt'], entry['recommended_atol'], 'the threshold and what it is made of')
    assert torch.equal(p.mask, t('pred').bool())

def test_otsu(parity):
    a, _ = load(parity, 'hsl_pcmt')
    maps = torch.from_numpy(a['otsu_maps'])
    close(otsu(maps), a['otsu_thresholds'], 1e-6, 'thresholds')
    close(otsu(maps, .2), a['otsu_thresholds_drop20'], 1e-6, 'thresholds, 20 % dropped')
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    level = ((maps - low)/(high - low)*255).floor()
    at = ((otsu(maps)[:, None, None] - low)/(high - low)*255).round()
    assert np.array_equal((level > at).numpy(), np.unpackbits(a['otsu_binary_bits'], axis=-1)[..., :52].astype(bool))

# ---- the ViT ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def vit(parity): return from_official('hsl', official_state(parity, 'hsl_vit'))

def test_vit_s_names_map_one_to_one(parity, vit):
    state, own = official_state(parity, 'hsl_vit'), vit.state_dict()
    assert len(own) == len(state) and vit.backbone.options.backbone == 'vit_base_patch16_384:10@96' and vit.extras[1].project is None and vit.extras[0].sigma == .6
    cut = {k: v for k, v in state.items() if k != 'backbone.purifier.layers.3.bias'}
    for bad, said in ((cut, "nothing for 'backbone.stages.stage2.layers.3.bias'"), (state | {'backbone.backbone.dist_token': torch.zeros(1)}, "unknown tensor 'backbone.backbone.dist_token'")):
        with pytest.raises(InputError, match=said): from_official('hsl', bad)

@pytest.mark.parametrize('shots', [1, 2])
@torch.no_grad()
def test_vit(parity, vit, shots):
    a, entry = load(parity, 'hsl_vit')
    e, tol, name = episode(a, shots), entry['recommended_atol'], f'k{shots}'
    plain = vit.match(e)
    if shots == 1: close(plain.query['stage2'][:, ::32], a['k1_feature_q_sub'], tol, 'query features')
    match = vit.refine_match(plain)
    p = vit.answer(match, e.query.shape[-2:])
    close(p.scores if shots == 1 else p.scores[..., ::4, ::4], a[f'{name}_en_out'], tol, 'logits')
    close(pcmt_rows(match, vit.compare(match), p.scores), a[f'{name}_pcmt'], tol, 'the threshold and what it is made of')
    assert np.array_equal(p.mask.numpy(), np.unpackbits(a[f'{name}_pred_bits'], axis=-1).astype(bool))
