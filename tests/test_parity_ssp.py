"SSP against numbers computed with its authors' own code (tests/data/parity)."
import pytest, torch
import torch.nn.functional as F
from parity_tools import close, images, load, official_state
from cdfss.episode import Episode
from cdfss.models.importers import from_official
from cdfss.models.prototype import support_prototypes
from cdfss.models.segmenter import Match
from cdfss.models.ssp import SSP, SSPOptions, self_support
from cdfss.models.backbones import BackboneOptions, create_backbone

def episode(a, shots):
    "The case's episode with its first `shots` supports; 255 is ignored."
    t = lambda name: torch.from_numpy(a[name])
    s, q = t('support_mask')[:shots].transpose(0, 1), t('query_mask')
    return Episode(query=images(a['query_u8']), support=images(a['support_u8'])[:shots].transpose(0, 1), support_masks=s == 1,
                   support_ignore=s == 255, query_mask=q == 1, ignore=q == 255)

@pytest.fixture(scope='module')
def case(parity): return load(parity, 'ssp_full')

@pytest.fixture(scope='module')
def segmenter(parity): return from_official('ssp', official_state(parity, 'ssp_full'))

def with_refine(segmenter, refine):
    segmenter.options = SSPOptions(refine=refine)
    return segmenter

@pytest.mark.parametrize('shots', [1, 5])
@pytest.mark.parametrize('refine', [False, True])
@torch.no_grad()
def test_logits(segmenter, case, shots, refine):
    a, entry = case
    scores = with_refine(segmenter.eval(), refine)(episode(a, shots)).scores
    want = a[f'k{shots}_logits_refine_{str(refine).lower()}']
    close(scores if shots == 1 else scores[..., ::4, ::4], want, entry['recommended_atol'], f'{shots}-shot logits, refine={refine}')

@torch.no_grad()
def test_intermediates(segmenter, case):
    a, entry = case
    match = segmenter.eval().match(episode(a, 1))
    f = match.query['stage3']
    out = with_refine(segmenter, False).compare(match)
    ssfp, ssbp, asbp = self_support(f, out['support_scores'], segmenter.options)
    fp, bp = support_prototypes(match, 'stage3')
    for got, name in ((f[:, ::32], 'k1_feature_q_sub'), (fp, 'k1_FP'), (bp, 'k1_BP'), (out['support_scores'], 'k1_out0_lowres'),
                      (ssfp[:, ::8], 'k1_SSFP_1'), (ssbp[:, ::8], 'k1_SSBP_1'), (asbp[:, ::64], 'k1_ASBP_1_sub'), (out['scores'], 'k1_out1_lowres')):
        close(got, a[name], entry['recommended_atol'], name)

@pytest.mark.parametrize('shots,refine', [(1, True), (1, False), (2, True)])
def test_training_loss_and_gradients(segmenter, case, shots, refine):
    a, entry = case
    seg = with_refine(segmenter.train(), refine)
    for p in seg.parameters(): p.grad = None
    terms = seg.loss(episode(a, shots))
    total = sum(terms.values())
    want = a[f'k{shots}_loss_train_refine_{str(refine).lower()}']
    close(torch.stack([total, *terms.values()]).detach(), want, entry['recommended_atol'], 'loss: total, then the terms in order')
    if (shots, refine) == (1, True):
        total.backward()
        grads = dict(seg.backbone.stages.named_parameters())
        for ours, name, step in (('stage3.layer3.5.conv3.weight', 'layer3.5.conv3.weight', 512), ('stage2.layer2.0.conv1.weight', 'layer2.0.conv1.weight', 64)):
            close(grads[ours].grad.flatten()[::step][:512], a[f'k1_grad_train.{name}'], entry['recommended_atol'], f'gradient of {name}')
        norm = lambda s: torch.stack([p.grad.norm() for n, p in grads.items() if n.startswith(s) and p.grad is not None] or [torch.zeros(())]).norm()
        got = torch.stack([norm(s) for s in ('stem', 'stage1')])
        close(got, a['k1_grad_norms'][:2], 0, 'the stem and stage 1 are frozen')

def head(a, features_s, masks_s, refine, features_q=None):
    seg = SSP(create_backbone(BackboneOptions(weights='none')), options=SSPOptions(refine=refine)).eval()
    m = torch.from_numpy(masks_s).transpose(0, 1)
    q = torch.from_numpy(a['feature_q_i8'] if features_q is None else features_q).float() / 16
    return seg, Match({'stage3': q}, {'stage3': torch.from_numpy(features_s).float().transpose(0, 1) / 16}, (m == 1).float(), (m == 0).float())

@pytest.mark.parametrize('shots', [1, 2])
@pytest.mark.parametrize('refine', [False, True])
@torch.no_grad()
def test_head(parity, shots, refine):
    a, entry = load(parity, 'ssp_head')
    seg, match = head(a, a['feature_s_i8'][:shots], a['mask_s'][:shots], refine)
    out, tol = seg.compare(match), entry['recommended_atol']
    close(out['scores'], a[f'k{shots}_logits_refine_{str(refine).lower()}'], tol, 'logits')
    close(out['support_scores'], a[f'k{shots}_out0'], tol, 'first scores')
    ssfp, ssbp, _ = self_support(match.query['stage3'], out['support_scores'], seg.options)
    close(ssfp, a[f'k{shots}_SSFP_1'], tol, 'SSFP')
    close(ssbp, a[f'k{shots}_SSBP_1'], tol, 'SSBP')

@torch.no_grad()
def test_head_falls_back_to_the_most_probable_pixels(parity):
    a, entry = load(parity, 'ssp_head')
    seg, match = head(a, a['topk_feature_s_i8'][None] if a['topk_feature_s_i8'].ndim == 4 else a['topk_feature_s_i8'], a['mask_s'][:1], True, a['topk_feature_q_i8'])
    out, tol = seg.compare(match), entry['recommended_atol']
    assert (out['support_scores'].softmax(1)[:, 1].max(), out['support_scores'].softmax(1)[:, 0].max()) < (.7, .6)
    close(out['support_scores'], a['topk_out0'], tol, 'first scores')
    close(out['matched'], a['topk_out1'], tol, 'after self-support')
    close(out['scores'], a['topk_logits_refine_true'], tol, 'final')
