"IFA against numbers computed with its authors' own code (the case is too large for the repository: skipped where the shared folder is absent)."
import dataclasses
import pytest, torch
from parity_tools import close, images, load, official_state
from cdfss.episode import Episode
from cdfss.methods import ifa                                            # registers the importer
from cdfss.models.importers import from_official

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def shared(repo):
    folder = repo.parent/'shared'/'parity'
    if not (folder/'ifa_full.npz').is_file(): pytest.skip('no shared parity cases beside the checkout')
    return folder

@pytest.fixture(scope='module')
def case(shared): return load(shared, 'ifa_full')

@pytest.fixture(scope='module')
def state(shared): return official_state(shared, 'ifa_full')

def episode(a, shots):
    t = lambda name: torch.from_numpy(a[name])
    s, q = t('support_mask')[:shots].transpose(0, 1), t('query_mask')
    return Episode(query=images(a['query_u8']), support=images(a['support_u8'])[:shots].transpose(0, 1), support_masks=s == 1, support_ignore=s == 255, query_mask=q == 1, ignore=q == 255)

def segmenter(state, **options):
    seg = from_official('ifa', state)
    seg.options = dataclasses.replace(seg.options, **options)
    return seg

@pytest.mark.parametrize('shots', [1, 5])
@torch.no_grad()
def test_prediction_is_ssp(state, case, shots):
    a, entry = case
    for refine in (True, False):
        scores = segmenter(state, refine=refine)(episode(a, shots)).scores
        close(scores if shots == 1 else scores[..., ::4, ::4], a[f'k{shots}_logits_refine_{str(refine).lower()}'], entry['recommended_atol'], f'logits, refine={refine}')

def loss(seg, e, tuning):
    seg.train(not tuning)
    seg.adapting = tuning
    terms = seg.loss(e)
    return torch.stack([sum(terms.values()), *terms.values()]), terms

@pytest.mark.parametrize('shots', [1, 2])
@pytest.mark.parametrize('tuning', [False, True])
def test_losses(state, case, shots, tuning):
    "Two shots of two episodes at once are paired as in the released code; the right pairing gives other numbers."
    a, entry = case
    want = a[f"k{shots}_loss_{'finetune' if tuning else 'train'}_refine_true"]
    with torch.no_grad():
        close(loss(segmenter(state, reference=True), episode(a, shots), tuning)[0], want, entry['recommended_atol'], 'loss: total, then the terms')
        right = loss(segmenter(state), episode(a, shots), tuning)[0]
    assert torch.allclose(right, torch.from_numpy(want), atol=entry['recommended_atol']) == (shots == 1)

def test_gradients_of_tuning(state, case):
    a, entry = case
    seg = segmenter(state)
    for s in ('stage2', 'stage3'): seg.backbone.stages[s].requires_grad_(True)              # the case's norms count the affine parts of batch norms
    loss(seg, episode(a, 1), True)[0][0].backward()
    grads = dict(seg.backbone.stages.named_parameters())
    for ours, name, by in (('stage3.layer3.5.conv3.weight', 'layer3.5.conv3.weight', 512), ('stage2.layer2.0.conv1.weight', 'layer2.0.conv1.weight', 64)):
        close(grads[ours].grad.flatten()[::by][:512], a[f'k1_grad_finetune.{name}'], entry['recommended_atol'], f'gradient of {name}')
    norm = lambda s: torch.stack([p.grad.norm() for n, p in grads.items() if n.startswith(s) and p.grad is not None] or [torch.zeros(())]).norm()
    got = torch.stack([norm(s) for s in ('stem', 'stage1', 'stage2', 'stage3')])
    assert torch.allclose(got, torch.from_numpy(a['k1_grad_norms']), rtol=1e-3)
